"""The records of all streams of one frontend, found by request, engine and grant."""

from collections.abc import Iterator
from typing import Generic

from llumnix.core.messages import OFFICE, Grant
from llumnix.core.streams.states import stream_machine
from llumnix.core.streams.stream import Info, Output, Stream
from llumnix.core.types import EngineIndex, MigrationId, RequestId
from llumnix.errors import ProtocolError


class StreamIndex(Generic[Info, Output]):
    """The open streams. `client`: this frontend's client index, which is in the ids of its
    migrations, since an engine remembers those of all frontends."""

    def __init__(self, client: int = OFFICE) -> None:
        self.client = client
        self._prefix = f"m{client}-" if client else "m"
        self._granted = 0
        self._streams: dict[RequestId, Stream[Info, Output]] = {}
        self._by_engine: dict[EngineIndex, dict[RequestId, Stream[Info, Output]]] = {}
        self._by_migration: dict[MigrationId, Stream[Info, Output]] = {}
        self._dead: set[EngineIndex] = set()

    # -- looking

    def get(self, request: RequestId) -> Stream[Info, Output] | None:
        """The open stream of that request."""
        return self._streams.get(request)

    def of(self, migration: MigrationId) -> Stream[Info, Output] | None:
        """The open stream that has this grant, or had it revoked and not yet heard of its end."""
        return self._by_migration.get(migration)

    def on(self, engine: EngineIndex) -> list[Stream[Info, Output]]:
        """The streams that an engine owns."""
        return list(self._by_engine.get(engine, {}).values())

    def count(self, engine: EngineIndex) -> int:
        """How many streams an engine owns."""
        return len(self._by_engine.get(engine, ()))

    def __iter__(self) -> Iterator[Stream[Info, Output]]:
        """All open streams, also those that are being placed."""
        return iter(list(self._streams.values()))

    def __len__(self) -> int:
        return len(self._streams)

    # -- records

    def open(
        self, request: RequestId, info: Info, *, detailed: bool = False
    ) -> Stream[Info, Output]:
        """A new stream, for which an engine has to be found. `detailed`: its client gets more than
        the token with each token, so that a token alone cannot be filled in."""
        if request in self._streams:
            raise ProtocolError(f"stream {request} is open already")
        machine = stream_machine(request)
        stream: Stream[Info, Output] = Stream(
            request=request, info=info, machine=machine, detailed=detailed
        )
        self._streams[request] = stream
        return stream

    def _next_migration(self) -> MigrationId:
        self._granted += 1
        return MigrationId(f"{self._prefix}{self._granted - 1}")

    def _grant(self, stream: Stream[Info, Output], order: Grant) -> None:
        stream.grant = order
        self._by_migration[order.migration] = stream

    def _holders(self, stream: Stream[Info, Output]) -> list[EngineIndex]:
        """The living engines that may have the request: its owner, and where it was going."""
        going = stream.grant.destination if stream.grant is not None else None
        return [e for e in (stream.owner, going) if e is not None and e not in self._dead]

    def _own(self, stream: Stream[Info, Output], engine: EngineIndex | None) -> None:
        if stream.owner is not None:
            mine = self._by_engine[stream.owner]
            del mine[stream.request]
            if not mine:
                del self._by_engine[stream.owner]
        stream.owner = engine
        if engine is not None:
            stream.last_owner = engine
            self._by_engine.setdefault(engine, {})[stream.request] = stream

    def _drop_grant(self, stream: Stream[Info, Output]) -> None:
        if stream.grant is not None:
            del self._by_migration[stream.grant.migration]
        stream.grant = stream.takeover = None
        stream.held = []

    def _drop_revoked(self, stream: Stream[Info, Output]) -> None:
        for migration in stream.revoked:
            del self._by_migration[migration]
        stream.revoked.clear()

    # -- for tests and the simulator

    def check(self) -> None:
        """What must hold between two events, of each stream and of the indexes; AssertionError."""
        by_engine: dict[EngineIndex, set[RequestId]] = {}
        by_migration: dict[MigrationId, RequestId] = {}
        for request, stream in self._streams.items():
            assert stream.request == request, f"{stream.request} is kept as {request}"
            try:
                stream.check(self._dead)
            except AssertionError as error:
                raise AssertionError(f"{request}, {stream.state.value}: {error}") from error
            if stream.owner is not None:
                by_engine.setdefault(stream.owner, set()).add(request)
            grants = [stream.grant.migration] if stream.grant is not None else []
            for migration in (*stream.revoked, *grants):
                assert migration not in by_migration, f"{migration} is granted twice"
                by_migration[migration] = request
        assert {e: set(mine) for e, mine in self._by_engine.items()} == by_engine, "by engine"
        assert {m: s.request for m, s in self._by_migration.items()} == by_migration, "by migration"
