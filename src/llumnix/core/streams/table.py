"""Who owns each stream: the frontend's part in migrations, and the one place that grants epochs.

Rules
- A stream takes tokens from its owner alone. What a destination says before the source's last
  tokens have arrived is held back, and follows them; what anybody else says is dropped.
- A destination becomes the owner by `TookOver` under the epoch it was granted, and no other way.
- A destination that died before it took over loses its grant for good, and the owner gets a fresh
  epoch. A source that died during a migration does not end the stream until the destination has
  said what it decided.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from llumnix.core.messages import Migrate, MigrationEnded, TookOver
from llumnix.core.types import EngineIndex, Epoch, MigrationId, RequestId
from llumnix.errors import ProtocolError

Output = TypeVar("Output")
FIRST_EPOCH = Epoch(0)


@dataclass(slots=True, kw_only=True)
class Ledger(Generic[Output]):
    """One stream. `outputs`: generated tokens that were accepted. `held`: what the next owner said
    before its time. `source_dead`: the owner died and the destination is being asked. `released`:
    the owner has let go of it."""

    owner: EngineIndex
    epoch: Epoch = FIRST_EPOCH
    last_epoch: Epoch = FIRST_EPOCH
    outputs: int = 0
    grant: Migrate | None = None
    takeover: TookOver | None = None
    held: list[tuple[int, Output]] = field(default_factory=list)
    source_dead: bool = False
    released: bool = False

    def next_epoch(self) -> Epoch:
        """An epoch that was never granted before."""
        self.last_epoch = Epoch(self.last_epoch + 1)
        return self.last_epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortAt:
    """Have the engine abort the request."""

    engine: EngineIndex
    request: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class TellLost:
    """Tell the engine that another one died, and for which migrations to that it has a fresh
    epoch."""

    engine: EngineIndex
    lost: EngineIndex
    granted: tuple[MigrationId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AskFate:
    """Ask the engine what it decided (`Llumlet.fate`), until it has."""

    engine: EngineIndex
    migration: MigrationId


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLost:
    """No engine runs the request any more."""

    request: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """The stream has a new owner. `missing`: tokens that the old one generated and never sent;
    `held`: what the new one said meanwhile. Both are due to the client, in this order."""

    request: RequestId
    owner: EngineIndex
    missing: tuple[int, ...] = ()
    held: tuple[object, ...] = ()


Effect = AbortAt | TellLost | AskFate | StreamLost | Moved


class Arbiter(Generic[Output]):
    """All streams of one frontend. `name` keeps its migrations' ids apart from other frontends'."""

    def __init__(self, name: str = "m") -> None:
        self._name = name
        self._count = 0
        self._streams: dict[RequestId, Ledger[Output]] = {}
        self._migrating: dict[MigrationId, RequestId] = {}
        self._revoked: dict[MigrationId, RequestId] = {}
        self._dead: set[EngineIndex] = set()

    def open(self, request: RequestId, owner: EngineIndex) -> Ledger[Output]:
        """A new stream."""
        ledger: Ledger[Output] = Ledger(owner=owner)
        self._streams[request] = ledger
        return ledger

    def get(self, request: RequestId) -> Ledger[Output] | None:
        """The open stream's ledger."""
        return self._streams.get(request)

    def close(self, request: RequestId) -> list[EngineIndex]:
        """The stream is over. Returns who may still hold the request: the owner, and where it was
        going."""
        ledger = self._streams.pop(request, None)
        if ledger is None:
            return []
        self._revoked = {m: r for m, r in self._revoked.items() if r != request}
        holders = [ledger.owner]
        if ledger.grant is not None:
            self._migrating.pop(ledger.grant.migration, None)
            holders.append(ledger.grant.destination)
        return [e for e in holders if e not in self._dead]

    def begin(
        self,
        request: RequestId,
        destination: EngineIndex,
        address: str,
        copy: str = "staged",
        *,
        wanted: bool = False,
    ) -> Migrate | None:
        """Grants the next epoch to a destination (`wanted`: by the source's llumlet); None if the
        stream is not there, is on its way already, or is there already, or if either engine is
        dead."""
        ledger = self._streams.get(request)
        if ledger is None or ledger.grant is not None or ledger.owner == destination:
            return None
        if {ledger.owner, destination} & self._dead:
            return None
        migration = MigrationId(f"{self._name}{self._count}")
        self._count += 1
        ledger.grant = Migrate(
            migration=migration,
            request=request,
            destination=destination,
            address=address,
            epoch=ledger.next_epoch(),
            copy=copy,
            wanted=wanted,
        )
        self._migrating[migration] = request
        return ledger.grant

    def offer(
        self, engine: EngineIndex, request: RequestId, tokens: int, output: Output
    ) -> tuple[list[Output], list[Effect]]:
        """What an engine said of a request, with `tokens` new tokens: returns what to pass on now,
        and what follows from it."""
        ledger = self._streams.get(request)
        if ledger is None:
            return [], []
        if ledger.owner == engine:
            ledger.outputs += tokens
            if ledger.takeover is None:
                return [output], []
            return [output], self._flip_if_due(request, ledger)
        if ledger.takeover is not None and ledger.grant and ledger.grant.destination == engine:
            ledger.held.append((tokens, output))
        return [], []

    def took_over(self, engine: EngineIndex, message: TookOver) -> list[Effect]:
        """A destination says that it owns the request."""
        ledger = self._streams.get(message.request)
        grant = ledger.grant if ledger is not None else None
        if ledger is None or grant is None or grant.epoch != message.epoch:
            return [AbortAt(engine=engine, request=message.request)]
        ledger.takeover = message
        if ledger.source_dead:
            return self._flip_without_source(message.request, ledger)
        return self._flip_if_due(message.request, ledger)

    def ended(self, message: MigrationEnded) -> list[Effect]:
        """The source says how its migration ended. A take-over is settled by the destination's own
        word, unless it died before that was heard: then nobody has the request any more."""
        revoked = self._revoked.pop(message.migration, None)
        if message.taken and revoked is not None:
            return [StreamLost(request=revoked)]
        request = self._migrating.get(message.migration)
        ledger = self._streams.get(request) if request is not None else None
        if ledger is not None and message.taken:
            ledger.released = True
        elif ledger is not None and not ledger.source_dead:
            del self._migrating[message.migration]
            ledger.grant = None
        return []

    def engine_lost(self, engine: EngineIndex, others: Iterable[EngineIndex]) -> list[Effect]:
        """An engine died: nothing of what it still says counts. `others`: those that live; all are
        told, since a migration may outlive its stream."""
        self._dead.add(engine)
        effects: list[Effect] = []
        granted: dict[EngineIndex, list[MigrationId]] = {}
        for request, ledger in list(self._streams.items()):
            if ledger.grant is not None and ledger.grant.destination == engine:
                effects += self._destination_lost(request, ledger, granted)
            elif ledger.owner == engine:
                effects += self._source_lost(request, ledger)
        told: list[Effect] = [
            TellLost(engine=e, lost=engine, granted=tuple(granted.get(e, ()))) for e in others
        ]
        return told + effects

    def fate(self, migration: MigrationId, fate: str) -> list[Effect]:
        """A destination answered `AskFate` with a decision. `taken` needs no action: its `TookOver`
        came before."""
        request = self._migrating.get(migration)
        ledger = self._streams.get(request) if request is not None else None
        if request is None or ledger is None or not ledger.source_dead or fate == "taken":
            return []
        return [StreamLost(request=request)]

    def on(self, engine: EngineIndex) -> Iterable[RequestId]:
        """The streams that an engine owns."""
        return [r for r, ledger in self._streams.items() if ledger.owner == engine]

    # -- one stream

    def _flip_if_due(self, request: RequestId, ledger: Ledger[Output]) -> list[Effect]:
        assert ledger.takeover is not None
        if ledger.outputs > ledger.takeover.outputs:
            raise ProtocolError(
                f"{request}: engine {ledger.owner} sent {ledger.outputs} tokens, but engine "
                f"{ledger.grant and ledger.grant.destination} goes on after "
                f"{ledger.takeover.outputs}"
            )
        if ledger.outputs < ledger.takeover.outputs:
            return []
        return [self._flip(request, ledger, ())]

    def _flip_without_source(self, request: RequestId, ledger: Ledger[Output]) -> list[Effect]:
        """The old owner is dead: what it did not send comes from the take-over's own list. If the
        two do not fit together the stream is lost, and no other of the dead engine's."""
        takeover, grant = ledger.takeover, ledger.grant
        assert takeover is not None
        assert grant is not None
        count = takeover.outputs - ledger.outputs
        if not 0 <= count <= len(takeover.tail) or grant.destination in self._dead:
            return [
                AbortAt(engine=grant.destination, request=request),
                StreamLost(request=request),
            ]
        missing = tuple(takeover.tail[-count:]) if count else ()
        ledger.outputs += count
        return [self._flip(request, ledger, missing)]

    def _flip(self, request: RequestId, ledger: Ledger[Output], missing: tuple[int, ...]) -> Effect:
        assert ledger.grant is not None
        ledger.owner, ledger.epoch = ledger.grant.destination, ledger.grant.epoch
        self._migrating.pop(ledger.grant.migration, None)
        held = ledger.held
        ledger.outputs += sum(tokens for tokens, _ in held)
        ledger.grant = ledger.takeover = None
        ledger.held, ledger.source_dead, ledger.released = [], False, False
        return Moved(
            request=request,
            owner=ledger.owner,
            missing=missing,
            held=tuple(output for _, output in held),
        )

    def _destination_lost(
        self,
        request: RequestId,
        ledger: Ledger[Output],
        granted: dict[EngineIndex, list[MigrationId]],
    ) -> list[Effect]:
        grant = ledger.grant
        assert grant is not None
        source_told = granted.setdefault(ledger.owner, [])
        if ledger.takeover is not None or ledger.released or ledger.source_dead:
            # It took over and died with it, or both engines are gone.
            return [StreamLost(request=request)]
        source_told.append(grant.migration)
        self._revoked[grant.migration] = request
        self._migrating.pop(grant.migration, None)
        ledger.grant, ledger.epoch = None, ledger.next_epoch()
        return []

    def _source_lost(self, request: RequestId, ledger: Ledger[Output]) -> list[Effect]:
        if ledger.grant is None:
            return [StreamLost(request=request)]
        ledger.source_dead = True
        if ledger.takeover is not None:
            return self._flip_without_source(request, ledger)
        return [
            AskFate(engine=ledger.grant.destination, migration=ledger.grant.migration),
        ]
