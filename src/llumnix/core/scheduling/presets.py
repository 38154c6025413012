"""The policies by name: how each dispatches, whether it balances, whether it keeps headroom, and
which rules its engines' queues have."""

from dataclasses import dataclass, replace

from llumnix.core.priorities import Priorities
from llumnix.core.queue_rules import QueueRules, SliceRules
from llumnix.core.scheduling.dispatch import DISPATCH_POLICIES
from llumnix.core.settings import SchedulerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What a policy does."""

    dispatch: str  # one of `DISPATCH_POLICIES`
    balance: bool  # moves running requests to balance the load
    headroom: bool  # keeps the headroom of urgent classes free; else those only go first
    text: str  # for docs/scheduling.md: "a new request goes to ..."
    priorities: bool = True  # false: all requests are treated alike
    growth_blocks: int = 0  # the knob `queue.growth_blocks` if it is null
    passers: int = 0  # the same for `queue.passers`
    slices: bool = False  # the same for `queue.slices`
    short_first: float = 0.0  # the same for `queue.short_first`

    @property
    def looks_at_caches(self) -> bool:
        """Whether dispatch looks at what is in the instances' prefix caches."""
        return DISPATCH_POLICIES[self.dispatch].looks_at_caches


POLICIES: dict[str, Preset] = {
    "llumnix": Preset(
        dispatch="soonest",
        balance=True,
        headroom=True,
        growth_blocks=1,
        passers=8,
        short_first=4.0,
        text="one with room and the fewest prompt tokens to compute before the request's first "
        "token, prefix caches taken into account; then the highest freeness. Requests move while "
        "they run",
    ),
    "llumnix-base": Preset(
        dispatch="soonest",
        balance=True,
        headroom=False,
        priorities=False,
        growth_blocks=1,
        passers=8,
        short_first=4.0,
        text="as under `llumnix`, with all requests treated alike whatever priority they ask for",
    ),
    "infaas++": Preset(
        dispatch="freest",
        balance=False,
        headroom=False,
        text="the highest freeness (the paper's baseline). Requests stay",
    ),
    "cache-aware": Preset(
        dispatch="soonest",
        balance=False,
        headroom=False,
        text="as under `llumnix`, without headroom. Requests stay",
    ),
    "least-loaded": Preset(
        dispatch="least-loaded",
        balance=False,
        headroom=False,
        text="the fewest requests. Requests stay",
    ),
    "round-robin": Preset(
        dispatch="round-robin",
        balance=False,
        headroom=False,
        text="the instances in turn. Requests stay",
    ),
    "scls": Preset(
        dispatch="soonest",
        balance=True,
        headroom=True,
        passers=8,
        slices=True,
        text="as under `llumnix`. Requests move. An engine starts a request only if the first "
        "slice of its answer fits beside the slices of all that run",
    ),
}


def priorities_of(settings: SchedulerSettings, *, keyed: bool = False) -> Priorities:
    """The classes as the policy treats them: without headroom unless it keeps headroom free.
    `keyed`: the server has API keys."""
    given, preset = settings.priorities, POLICIES[settings.policy]
    if preset.headroom:
        return Priorities(given, keyed=keyed)
    bare = tuple(replace(c, headroom=0.0) for c in given.classes)
    given = replace(given, classes=bare)
    return Priorities(given, ignore_priorities=not preset.priorities, keyed=keyed)


def balances(settings: SchedulerSettings) -> bool:
    """Whether requests move between instances that go on serving."""
    balance = settings.migration.balance
    return POLICIES[settings.policy].balance if balance is None else balance


def queue_rules_of(settings: SchedulerSettings) -> QueueRules:
    """The rules of the engines' queues: what the knobs say, else what the policy has."""
    given, preset = settings.queue, POLICIES[settings.policy]
    growth, passers, short = given.growth_blocks, given.passers, given.short_first
    slices = None
    if preset.slices if given.slices is None else given.slices:
        slices = SliceRules(tokens=given.slice_tokens or 0, quantile=given.slice_quantile)
    return QueueRules(
        growth=preset.growth_blocks if growth is None else growth,
        passers=preset.passers if passers is None else passers,
        pass_s=given.pass_s,
        pass_share=given.pass_share,
        slices=slices,
        short_first=preset.short_first if short is None else short,
    )
