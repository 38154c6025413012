"""The scheduler's settings: every knob once, with unit, default and check.

`--scheduler-config FILE` is this tree as YAML, and the table in docs/scheduling.md is drawn from
it. A knob that is null follows from what is observed (`core/scheduling/observed.py`), from the
policy, or from another knob, as its text says.
"""

import hashlib
import math
import string
from dataclasses import dataclass, field, replace
from typing import Any

from llumnix.core.limits import MigrationLimits
from llumnix.errors import UsageError

PAPER_BLOCK_TOKENS = 16
"""The paper's thresholds are in blocks of this many tokens for each request."""


def knob(default: Any, unit: str, help: str, *, was: str | None = None) -> Any:
    """A field with what a user needs to know. `was`: its name in the release before, which a
    configuration file may still use in this one."""
    return field(default=default, metadata={"unit": unit, "help": help, "was": was})


def _check(path: str, value: float | None, low: float = -math.inf, high: float = math.inf) -> None:
    if value is not None and not (low <= value <= high and abs(value) < math.inf):
        bound = "a finite number" if low == -math.inf else f"{low:g} or more"
        bound = bound if high == math.inf else f"between {low:g} and {high:g}"
        raise UsageError(f"{path}: {value:g} must be {bound}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorityClass:
    """One class of requests."""

    name: str
    priority: int  # vLLM's number; lower is served earlier
    headroom: float = 0.0
    """Share of an instance's KV memory (0 to 1) that is kept free while a request of the class runs
    there, so that it decodes as fast as on an instance of its own."""
    queue_max: int | None = None  # the most that wait, over all instances; more are refused

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("-", "").replace("_", "").isalnum():
            raise UsageError(f"priority class {self.name!r}: use letters, digits, - and _")
        if isinstance(self.headroom, bool) or not 0 <= self.headroom <= 1:
            raise UsageError(
                f"priority class {self.name}: headroom {self.headroom} must be a share between 0 "
                "and 1"
            )
        _check(f"priority class {self.name}: queue_max", self.queue_max, 1)


_DIGEST = "sha256:"


def key_digest(key: str) -> str:
    """The form in which an API key is kept: `sha256:` and its digest in hex digits."""
    return _DIGEST + hashlib.sha256(key.encode()).hexdigest()


HIGH = PriorityClass(name="high", priority=-100, headroom=0.88)
"""The paper keeps 1,600 of 13,616 tokens in use where a high request runs."""
NORMAL = PriorityClass(name="normal", priority=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrioritySettings:
    """Which requests go first, and who may ask for that."""

    classes: tuple[PriorityClass, ...] = knob(
        (HIGH, NORMAL),
        "name, vLLM's priority number, share of KV memory",
        "The classes. A request belongs to the first whose number is not below its own. With "
        "`queue_max`, the most of a class that wait.",
    )
    aging_s: float = knob(
        30.0, "s", "A request that has waited this long is queued as the most urgent class."
    )
    preempt: bool = knob(
        True,
        "true or false",
        "Preempt running requests of less urgent classes for one that cannot start.",
    )
    headroom_need: float | None = knob(
        1.1,
        "times the mean use of memory",
        "An instance that keeps headroom may use this much of its memory in any case. null: no "
        "more than its classes' headroom leaves.",
    )
    default_cap: str | None = knob(
        None,
        "a class's name",
        "The most urgent class for requests whose API key has no cap of its own. null: any class "
        "if the server has no API keys, else none that is more urgent than usual.",
    )
    key_caps: dict[str, str] = field(
        default_factory=dict,
        repr=False,
        metadata={
            "unit": "API key, or sha256:DIGEST of it: class",
            "help": "The most urgent class that requests with this key get.",
        },
    )
    """Keys are kept as digests, however they were given."""

    def __post_init__(self) -> None:
        _check("priorities.aging_s", self.aging_s, 0.1)
        _check("priorities.headroom_need", self.headroom_need, 0, 100)
        names = [c.name for c in self.classes]
        numbers = [c.priority for c in self.classes]
        if not names:
            raise UsageError("priorities.classes: name at least one class")
        for what, values in (("name", names), ("number", numbers)):
            if len(set(values)) != len(values):
                raise UsageError(f"priorities.classes: two classes have the same {what}")
        if min(c.headroom for c in self.classes) > 0:
            raise UsageError(
                "priorities.classes: every class has headroom, so no request could go anywhere; "
                "leave it out for one"
            )
        if self.default_cap is not None and self.default_cap not in names:
            raise UsageError(
                f"priorities.default_cap: no class {self.default_cap!r}; there are: "
                + ", ".join(names)
            )
        # A frozen dataclass has no other way to set a field that follows from what was given.
        digests = {
            key.lower() if key.startswith(_DIGEST) else key_digest(key): name
            for key, name in self.key_caps.items()
        }
        object.__setattr__(self, "key_caps", digests)
        for key, name in digests.items():
            if name not in names:
                # What was written is not told, since it is the key if the two are swapped.
                raise UsageError(
                    f"priorities.key_caps: write KEY: CLASS; the classes are: {', '.join(names)}"
                )
            digits = key.removeprefix(_DIGEST)
            if len(digits) != 64 or not set(digits) <= set(string.hexdigits):
                raise UsageError(
                    f"priorities.key_caps: a key begins with {_DIGEST}, and no digest of 64 hex "
                    "digits follows; `printf %s KEY | sha256sum` prints one"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationSettings:
    """When load is moved from one instance to another."""

    balance: bool | None = knob(
        None, "true or false", "Move requests to balance the load. null: as the policy has it."
    )
    interval_s: float = knob(
        0.05, "s", "Time between two rounds of pairing instances.", was="tick_s"
    )
    source_below: float | None = knob(
        None,
        "tokens a request",
        "An instance of lower freeness gives requests away. null: observed.",
    )
    destination_above: float | None = knob(
        None, "tokens a request", "An instance of higher freeness takes them. null: observed."
    )
    gain_min: float = knob(
        8.0,
        "decode steps",
        "The lower freeness of the pair must rise by this much beyond the move's own cost.",
    )
    min_stay: float = knob(
        10.0,
        "times a move's duration",
        "A request that was moved stays for this long at least.",
        was="payback",
    )
    rescues: int = knob(
        2,
        "requests",
        "The most requests that leave one instance in a round because they wait at or behind a "
        "head that does not fit, and fit elsewhere now. 0: none.",
    )
    moves_max: int = knob(
        1, "migrations", "Moves away from one instance at a time. A drain has its engine's limit."
    )

    def __post_init__(self) -> None:
        _check("migration.interval_s", self.interval_s, 0.001, 10)
        _check("migration.gain_min", self.gain_min, 0)
        _check("migration.min_stay", self.min_stay, 0)
        _check("migration.rescues", self.rescues, 0, MigrationLimits().outgoing_max)
        _check("migration.moves_max", self.moves_max, 1, MigrationLimits().outgoing_max)
        low, high = self.source_below, self.destination_above
        _check("migration.source_below", low)
        _check("migration.destination_above", high)
        if (low is None) != (high is None):
            raise UsageError(
                "migration: give both source_below and destination_above, or neither of them"
            )
        if low is not None and high is not None and high < low:
            raise UsageError(
                f"migration: destination_above ({high:g}) must not be below source_below ({low:g})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSettings:
    """Which request of an engine's queue starts next where memory is short."""

    growth_blocks: int | None = knob(
        None,
        "KV blocks a request",
        "A request starts only if each running request, itself included, can then take this many "
        "more; twice as many if it was preempted. 0: none. null: 1 under `llumnix` and "
        "`llumnix-base`, else 0.",
    )
    passers: int | None = knob(
        None,
        "requests",
        "How many requests behind a head that does not fit are tried. 0: none may pass it. "
        "null: 8 under `llumnix`, `llumnix-base` and `scls`, else 0.",
    )
    pass_s: float = knob(
        20.0,
        "s",
        "The longest for which a head that does not fit is passed, and the most by which "
        "`short_first` queues a request later than it came.",
    )
    pass_share: float = knob(
        0.5, "times the head's tokens", "All requests that pass a head take no more than this."
    )
    slices: bool | None = knob(
        None,
        "true or false",
        "A request starts only if its first slice fits beside what running requests may take until "
        "their slices end. null: true under `scls`, else false.",
    )
    slice_tokens: int | None = knob(
        None, "tokens of answer", "A slice's length. null: a quarter of the mean answer."
    )
    slice_quantile: float = knob(
        0.8,
        "share of requests",
        "Of the answers that became as long as a request's, this share ended within N more "
        "tokens; the request's slice is no longer than N.",
    )
    short_first: float | None = knob(
        None,
        "times a prompt's own time",
        "A request is queued as if it had come this much later, so that shorter prompts of its "
        "class pass it for that long. 0: by arrival. null: 4 under `llumnix` and `llumnix-base`, "
        "else 0.",
    )

    def __post_init__(self) -> None:
        _check("queue.growth_blocks", self.growth_blocks, 0, 64)
        _check("queue.passers", self.passers, 0, 64)
        _check("queue.pass_s", self.pass_s, 0)
        _check("queue.pass_share", self.pass_share, 0, 1)
        _check("queue.slice_tokens", self.slice_tokens, 1, 2**20)
        _check("queue.slice_quantile", self.slice_quantile, 0.01, 0.999)
        _check("queue.short_first", self.short_first, 0, 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingSettings:
    """When instances are added and drained. Off while `instances_max` is null."""

    instances_min: int | None = knob(None, "instances", "Never fewer (--min-instances).")
    instances_max: int | None = knob(None, "instances", "Never more (--max-instances).")
    freeness_low: float | None = knob(
        None,
        "tokens a request",
        "Below this mean freeness of normal requests instances are added, as many as the shortage "
        "needs. null: half the mean answer, observed.",
        was="low",
    )
    freeness_high: float | None = knob(
        None,
        "tokens a request",
        "Above this mean freeness an instance is drained. null: four times `freeness_low`.",
        was="high",
    )
    up_after_s: float = knob(2.0, "s", "How long it must be below `freeness_low`.")
    down_after_s: float = knob(30.0, "s", "How long it must be above `freeness_high`.")
    cooldown_s: float = knob(
        10.0,
        "s",
        "After a change nothing is drained until all instances that start have been up for this "
        "long.",
        was="settle_s",
    )

    def __post_init__(self) -> None:
        for name in ("up_after_s", "down_after_s", "cooldown_s"):
            _check(f"scaling.{name}", getattr(self, name), 0)
        _check("scaling.instances_min", self.instances_min, 1)
        _check("scaling.instances_max", self.instances_max, 1)
        if self.instances_min is not None and self.instances_max is None:
            raise UsageError("--min-instances needs --max-instances: how far may it grow?")
        if self.instances_max is not None and self.instances_max < (self.instances_min or 1):
            raise UsageError(
                f"--max-instances {self.instances_max} is below --min-instances "
                f"{self.instances_min}"
            )
        low, high = self.freeness_low, self.freeness_high
        _check("scaling.freeness_low", low)
        _check("scaling.freeness_high", high)
        if (low is None) != (high is None):
            raise UsageError(
                "scaling: give both freeness_low and freeness_high, or neither of them"
            )
        if low is not None and high is not None and high <= low:
            raise UsageError(
                f"scaling: freeness_high ({high:g}) must be above freeness_low ({low:g})"
            )

    @property
    def on(self) -> bool:
        """Whether the number of instances follows the load."""
        return self.instances_max is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionSettings:
    """When new requests are refused because too many wait."""

    queue_max: int | None = knob(
        None,
        "requests",
        "Once this many wait and the mean freeness is below zero, no more are let in "
        "(--queue-max). null: all are.",
    )

    def __post_init__(self) -> None:
        _check("admission.queue_max", self.queue_max, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SurvivalSettings:
    """What becomes of the requests of an engine that died."""

    lives: int = knob(
        3,
        "engines",
        "A request outlives so many engines that die under it. 0: none (--survival off).",
    )
    wait_s: float = knob(
        60.0, "s", "The longest that a request waits for an engine that goes on with it."
    )
    at_once: int = knob(
        8,
        "requests",
        "The most requests of dead engines that an engine takes up at a time; others wait.",
    )
    kept_mb: float = knob(
        1024.0,
        "MB",
        "The most that the frontend keeps of images, audio and embeddings of open requests. "
        "Requests beyond it end with their engine.",
    )
    stall_s: float | None = knob(
        None,
        "s",
        "An engine that has requests and makes no step for this long is ended, but no sooner than "
        "after 120 s if its first step has not ended. null: 20 times its longest step of the last "
        "minute, at least 10 s, and 60 s if the step may compute a prompt.",
    )

    def __post_init__(self) -> None:
        _check("survival.lives", self.lives, 0)
        _check("survival.wait_s", self.wait_s, 0)
        _check("survival.at_once", self.at_once, 1)
        _check("survival.kept_mb", self.kept_mb, 0)
        _check("survival.stall_s", self.stall_s, 1)

    @property
    def on(self) -> bool:
        """Whether a request may outlive its engine."""
        return self.lives > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """All settings of the scheduler."""

    policy: str = knob("llumnix", "a policy's name", "How requests are scheduled (--policy).")
    priorities: PrioritySettings = field(default_factory=PrioritySettings)
    queue: QueueSettings = field(default_factory=QueueSettings)
    migration: MigrationSettings = field(default_factory=MigrationSettings)
    scaling: ScalingSettings = field(default_factory=ScalingSettings)
    survival: SurvivalSettings = field(default_factory=SurvivalSettings)
    admission: AdmissionSettings = field(default_factory=AdmissionSettings)

    def without_keys(self) -> "SchedulerSettings":
        """The settings without API keys, for all processes but the frontend, which checks them."""
        return replace(self, priorities=replace(self.priorities, key_caps={}))
