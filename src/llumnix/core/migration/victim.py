"""Which request of a source is moved.

Rules
- A request that waits and that the destination has room for goes first, the first in line: it has
  nothing to copy, and runs there at once.
- Among those that run: of the least urgent class that has any; of these the shortest that gives the
  source the relief it wants, or, if none does, the longest.
- Not one that is in the middle of its prompt, that is on its way already, or that has not paid for
  its last move yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llumnix.core.events import MoveLimit
from llumnix.core.types import RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A request that could be moved. `rank`: of its class; `tokens`: its KV, or what it needs to
    start if it is `waiting`. `resting`: not to be moved now."""

    request: RequestId
    rank: int
    tokens: int
    waiting: bool = False
    resting: bool = False


def choose_victim(candidates: Sequence[Candidate], limits: Sequence[MoveLimit]) -> Candidate | None:
    """The request to move; None if no candidate is within the limits. `candidates`: those that wait
    in the order in which they will be served."""
    by_rank = {limit.rank: limit for limit in limits}
    running: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        limit = by_rank.get(candidate.rank)
        if limit is None or candidate.resting:
            continue
        if candidate.waiting:
            if candidate.tokens <= limit.waiting_max:
                return candidate
        elif limit.tokens_min <= candidate.tokens <= limit.tokens_max:
            running.setdefault(candidate.rank, []).append(candidate)
    if not running:
        return None
    rank = max(running)
    wanted = by_rank[rank].tokens_wanted
    enough = [c for c in running[rank] if c.tokens >= wanted]
    if enough:
        return min(enough, key=lambda c: (c.tokens, c.request))
    return max(running[rank], key=lambda c: (c.tokens, c.request))
