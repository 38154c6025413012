"""A simulated engine alone, with round figures."""

from llumnix.core.priorities import Priorities
from llumnix.core.queue_rules import PLAIN, QueueRules
from llumnix.core.settings import PrioritySettings
from llumnix.core.types import EngineIndex
from llumnix.sim.model.batching import EngineOptions
from llumnix.sim.model.engine import SimEngine
from llumnix.sim.model.profile import Profile

PROFILE = Profile(
    name="round",
    text="",
    step_s=0.01,
    request_s=0.001,
    context_s=0.00001,
    prompt_s=0.0001,
    kv_tokens=160,
    kv_token_bytes=1,
)


def engine(
    rules: QueueRules = PLAIN,
    profile: Profile = PROFILE,
    classes: PrioritySettings | None = None,
    **options: int,
) -> SimEngine:
    """`options`: those of `EngineOptions`."""
    return SimEngine(
        EngineIndex(0),
        profile,
        EngineOptions(**options),
        Priorities(classes or PrioritySettings()),
        job_of={}.__getitem__,
        rules=rules,
    )
