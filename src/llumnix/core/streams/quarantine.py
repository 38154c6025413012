"""Requests that are not computed again, since engines died of them.

A client that gets an error mostly sends its request again, with another id. So a request is known
by a digest of what an engine computes from: its prompt, its parameters and its adapter.

Rules
- A digest is refused for `REFUSED_FOR_S`, or until a user releases it.
- At most `KEPT_MAX` are kept; then the oldest is released.
"""

from dataclasses import dataclass

from llumnix.core.types import RequestId

REFUSED_FOR_S = 600.0
KEPT_MAX = 256
_ID_DIGITS = 16


@dataclass(slots=True, kw_only=True)
class Quarantined:
    """A request that is refused. Nothing of its prompt is kept."""

    digest: str
    request: RequestId
    client_id: str
    prompt_tokens: int
    output_tokens: int
    since_s: float
    refused: int = 0  # times that it was sent again

    @property
    def id(self) -> str:
        """The name that users give it."""
        return self.digest[:_ID_DIGITS]


class Quarantine:
    """The refused requests of one deployment. Every frontend has them."""

    def __init__(self) -> None:
        self._kept: dict[str, Quarantined] = {}  # by digest, the oldest first

    def has_length(self, prompt_tokens: int) -> bool:
        """Whether a request with a prompt of that length may be refused. That is sooner known than
        its digest."""
        return any(one.prompt_tokens == prompt_tokens for one in self._kept.values())

    def add(self, one: Quarantined) -> None:
        """Refuses such a request from now on."""
        self._kept.pop(one.digest, None)
        self._kept[one.digest] = one
        if len(self._kept) > KEPT_MAX:
            del self._kept[next(iter(self._kept))]

    def find(self, digest: str, now: float) -> Quarantined | None:
        """The refused request with this digest, if there is one."""
        self._expire(now)
        return self._kept.get(digest)

    def note_refused(self, name: str) -> None:
        """The one with this id was sent again, to a frontend that does not keep the list."""
        for one in self._kept.values():
            one.refused += one.id == name

    def all(self, now: float) -> list[Quarantined]:
        """All that are refused, the oldest first."""
        self._expire(now)
        return list(self._kept.values())

    def release(self, name: str | None) -> int:
        """Refuses the one with this id no longer, or all if it is None. Returns how many that
        were."""
        gone = [digest for digest, one in self._kept.items() if name in (None, one.id)]
        for digest in gone:
            del self._kept[digest]
        return len(gone)

    def _expire(self, now: float) -> None:
        for digest, one in list(self._kept.items()):
            if now - one.since_s < REFUSED_FOR_S:
                return
            del self._kept[digest]
