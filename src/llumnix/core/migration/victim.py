"""Which request of a source is moved.

Rules
- A request that waits goes first, the one that is first in line, if the destination has room for
  it: it has nothing to copy, and runs there at once.
- Else one that runs, of the least urgent class among them: the shortest that gives the source the
  relief that it wants, or the longest if none does.
- A request stays if it is in the middle of its prompt, is on its way already, or has not been here
  for long enough since its last move.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llumnix.core.events import MoveLimit
from llumnix.core.types import RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A request that could be moved."""

    request: RequestId
    rank: int  # of its class
    tokens: int  # of KV that it holds or, if it waits, needs to start
    waiting: bool = False
    resting: bool = False  # not to be moved now


def choose_victim(candidates: Sequence[Candidate], limits: Sequence[MoveLimit]) -> Candidate | None:
    """The request to move, or None if no candidate is within the limits. Candidates that wait stand
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
