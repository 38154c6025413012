"""A table of streams that is checked after every call, and one stream on its way."""

from typing import Any

from llumnix.core.codes import AbortCode
from llumnix.core.messages import Grant, Migrate, MigrationEnded, Revive, TookOver
from llumnix.core.streams.effects import Abort, Effect, GrantEnded, Orphaned, Revived
from llumnix.core.streams.stream import Stream
from llumnix.core.streams.table import DESTINATION_DIED, ENGINE_DIED, StreamTable
from llumnix.core.types import EngineIndex, RequestId

R = RequestId("r")
SOURCE, DESTINATION, THIRD = EngineIndex(0), EngineIndex(1), EngineIndex(2)


class Table(StreamTable[str, str]):
    """A table of streams that is checked after every call."""

    def _checked(self, result: Any) -> Any:
        self.check()
        return result

    def open_on(self, engine: EngineIndex, request: RequestId = R) -> Stream[str, str]:
        """A stream that an engine owns."""
        stream = self.open(request, "info")
        self.check()
        assert self.placed(stream, engine)
        return self._checked(stream)

    def hear(self, engine: EngineIndex, tokens: int, output: str) -> tuple[list[str], list[Effect]]:
        """What is due to the client, and what follows."""
        due: list[str] = []
        effects = self.receive(engine, R, list(range(tokens)), output, due)
        return self._checked((due, list(effects)))

    def order(self, to: EngineIndex = DESTINATION, where: str = "there") -> Migrate:
        """A migration that is granted."""
        order = self.grant(R, to, where)
        assert isinstance(order, Migrate)
        return self._checked(order)

    def ask(self, engine: EngineIndex = THIRD) -> Revive:
        """An engine is asked to go on with the orphan."""
        order = self.revive(R, engine)
        assert isinstance(order, Revive)
        return self._checked(order)

    def take(self, order: Grant, outputs: int, tail: list[int] | None = None) -> list[Effect]:
        """The destination says that it goes on after `outputs` tokens, by default all in `tail`."""
        message = TookOver(
            migration=order.migration,
            request=order.request,
            epoch=order.epoch,
            outputs=outputs,
            tail=list(range(outputs)) if tail is None else tail,
        )
        return self._checked(list(self.took_over(order.destination, message)))

    def end(self, order: Grant, *, taken: bool, why: str = "") -> list[Effect]:
        """The source says how its migration ended, or an engine that it does not go on with the
        orphan."""
        message = MigrationEnded(
            migration=order.migration, request=order.request, taken=taken, why=why
        )
        return self._checked(list(self.ended(message)))

    def refuse(self, order: Grant, why: str) -> list[Effect]:
        """The engine that got the order could not take it in."""
        return self._checked(list(self.refused(order.migration, why)))

    def lose(self, engine: EngineIndex, *living: EngineIndex) -> list[Effect]:
        """An engine dies."""
        return self._checked(list(self.engine_lost(engine, living)))

    def tell(self, order: Migrate, fate: str) -> list[Effect]:
        """The destination answers what it decided."""
        return self._checked(list(self.fate(order.migration, fate)))

    def shut(self) -> list[EngineIndex] | None:
        """The stream is over: the engines that may still hold its request."""
        closed = self.close(R)
        self.check()
        return None if closed is None else closed[1]

    def one(self) -> Stream[str, str]:
        """The stream."""
        stream = self.get(R)
        assert stream is not None
        return stream


def moving(outputs: int = 0) -> tuple[Table, Migrate]:
    """A stream on its way from `SOURCE` to `DESTINATION`; `outputs` tokens have arrived."""
    table = Table()
    table.open_on(SOURCE)
    if outputs:
        table.hear(SOURCE, outputs, "before")
    return table, table.order()


def orphan(outputs: int = 1) -> Table:
    """A stream whose engine, `SOURCE`, died after so many tokens."""
    table = Table()
    table.open_on(SOURCE)
    if outputs:
        table.hear(SOURCE, outputs, "before")
    table.lose(SOURCE)
    return table


def reviving(outputs: int = 1) -> tuple[Table, Revive]:
    """The same, and `THIRD` was asked to go on with it."""
    table = orphan(outputs)
    return table, table.ask()


def migrated(order: Migrate, why: str = "") -> GrantEnded:
    return GrantEnded(migration=order.migration, outcome="migrated", why=why)


def lost(order: Migrate, why: str = ENGINE_DIED) -> GrantEnded:
    return GrantEnded(migration=order.migration, outcome="lost", why=why)


def aborted(order: Migrate, why: str = "") -> GrantEnded:
    code = AbortCode.PEER_LOST if why == DESTINATION_DIED else AbortCode.OTHER
    return GrantEnded(migration=order.migration, outcome="aborted", why=why, code=code)


def abort(*engines: EngineIndex) -> list[Effect]:
    return [Abort(engine=engine, request=R) for engine in engines]


def orphaned(
    why: str = ENGINE_DIED, *, warm: EngineIndex | None = None, declined: AbortCode | None = None
) -> Orphaned:
    return Orphaned(request=R, why=why, warm=warm, declined=declined)


def revived(engine: EngineIndex) -> Revived:
    return Revived(request=R, owner=engine)


def goes_to(table: Table, engine: EngineIndex) -> bool:
    """Whether the engine's tokens are the stream's."""
    return table.hear(engine, 1, "probe")[0] == ["probe"]
