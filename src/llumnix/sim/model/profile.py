"""What an engine's steps and copies cost: a profile, read from a file.

Rules
- A step takes `step_s`, and `request_s` for each request in it that decodes, and `context_s` for
  each token of KV that those read.
- Prompts in it take `prompt_s` for each token, and `prompt_context_s` for each pair of a token and
  one before it. As far as `overlap_s` they hide behind the step itself: where a step's time is that
  of reading the weights, a short prompt is computed meanwhile.
- A step with prompts takes `prompts_least_s` or more: it is not launched as one graph, and the
  device may be faster than the host launches its kernels.
- A copy of KV shares its source's and its destination's link with the others there.

Profiles are JSON files, one beside this module for each name that `--profile` knows; `llumnix
profile` makes one of an engine.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from llumnix.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One engine on one kind of device. The costs of a step are those of the rules above."""

    name: str
    text: str  # what it is of, and where its figures are from
    step_s: float
    request_s: float
    context_s: float
    prompt_s: float
    kv_tokens: int  # KV memory
    kv_token_bytes: int  # of one token's KV
    prompt_context_s: float = 0.0
    overlap_s: float = 0.0
    prompts_least_s: float = 0.0
    block_tokens: int = 16
    link_bytes_s: float = 3e9  # of an instance's link, each way
    hop_s: float = 0.0005  # of a message between two processes
    stop_s: float = 0.0  # what a migration costs its request beyond messages and copies
    start_s: float = 60.0  # of an instance, from nothing to ready
    error: dict[str, float] = field(default_factory=dict)  # of the fit, by what was fitted

    def step(self, decodes: int, context: float, prompts: Sequence[tuple[int, int]] = ()) -> float:
        """How long a step takes. `context`: tokens of KV that its `decodes` read; `prompts`: of
        each, the tokens computed and those that were computed before."""
        seconds = self.step_s + self.request_s * decodes + self.context_s * context
        if prompts:
            computed = 0.0
            for new, before in prompts:
                computed += new * (self.prompt_s + self.prompt_context_s * (before + new / 2))
            seconds += max(0.0, computed - self.overlap_s)
            seconds = max(seconds, self.prompts_least_s)
        return seconds

    def prefill(self, new: int, before: int = 0) -> float:
        """A step with one prompt and nothing else."""
        return self.step(0, 0, [(new, before)])

    def decode(self, batch: int, context: float) -> float:
        """A step without prompts."""
        return self.step(batch, context)


def profile_names() -> list[str]:
    """Those that come with llumnix."""
    found = files("llumnix.sim.model").joinpath("profiles").iterdir()
    return sorted(p.name.removesuffix(".json") for p in found if p.name.endswith(".json"))


def load_profile(name: str) -> Profile:
    """By name, or from a file."""
    inside = files("llumnix.sim.model").joinpath("profiles", f"{name}.json")
    if name in profile_names():
        return _profile(json.loads(inside.read_text()), name)
    path = Path(name)
    if not path.is_file():
        raise UsageError(
            f"no profile {name!r}: give a file, or one of {', '.join(profile_names())}"
        )
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is no JSON: {error}") from error
    return _profile(found, name)


def save_profile(profile: Profile, path: Path) -> None:
    """Writes it so that `load_profile` reads it."""
    path.write_text(json.dumps(asdict(profile), indent=1) + "\n")


def _profile(found: Any, name: str) -> Profile:
    known = {f.name for f in fields(Profile)}
    needed = {"step_s", "request_s", "context_s", "prompt_s", "kv_tokens", "kv_token_bytes"}
    if not isinstance(found, dict) or not needed <= found.keys() or not found.keys() <= known:
        unknown = sorted(set(found) - known) if isinstance(found, dict) else []
        raise UsageError(
            f"profile {name}: wants {', '.join(sorted(needed))}"
            + (f"; does not know {', '.join(unknown)}" if unknown else "")
        )
    return Profile(**{"name": Path(name).stem, "text": "", **found})
