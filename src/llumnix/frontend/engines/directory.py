"""The engines that one frontend knows: which are coming, which are there, which take requests."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from llumnix.core.types import EngineIndex, InstanceId
from llumnix.frontend.engines.engine import Engine
from llumnix.frontend.engines.start_times import StartTimes

LOST_REMEMBERED_MAX = 256
"""How many engines that are gone are remembered, the newest ones. One may still own a stream, until
the destination of the stream's migration has said what it decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTarget:
    """An engine that a request can be moved to."""

    instance: InstanceId
    engine_index: EngineIndex
    address: str  # where its llumlet listens


class EngineDirectory:
    """The engines of one frontend. It does bookkeeping alone, and has no socket."""

    def __init__(self) -> None:
        self._engines: dict[EngineIndex, Engine] = {}
        self._lost: dict[EngineIndex, Engine] = {}
        self._rotation = 0
        self._starts = StartTimes()

    # -- what becomes of engines

    def expect(self, instance: InstanceId, engine_index: EngineIndex, slot: int) -> None:
        """Makes an engine known that will announce itself. Needs a running event loop."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        self._engines[engine_index] = Engine(
            instance=instance, engine_index=engine_index, slot=slot, ready=ready
        )
        self._starts.began(engine_index, loop.time())
        ready.add_done_callback(lambda _: self._starts.up(engine_index, loop.time()))

    def locate(self, engine_index: EngineIndex, address: str) -> None:
        """Says where the engine's llumlet listens."""
        if (engine := self._engines.get(engine_index)) is not None:
            engine.address = address

    async def ready(self, engine_index: EngineIndex) -> None:
        """Returns once the engine has announced itself."""
        await asyncio.shield(self._engines[engine_index].ready)

    def accept(self, engine_index: EngineIndex, accepting: bool) -> None:
        """Says whether the engine gets new requests from here."""
        if (engine := self._engines.get(engine_index)) is not None:
            engine.accepting = accepting

    def lose(self, engine_index: EngineIndex) -> Engine | None:
        """Takes an engine out that is gone; None if it is out already."""
        engine = self._engines.pop(engine_index, None)
        self._starts.over(engine_index)
        if engine is not None:
            self._lost[engine_index] = engine
            if len(self._lost) > LOST_REMEMBERED_MAX:
                del self._lost[next(iter(self._lost))]
        return engine

    # -- which there are

    def __contains__(self, engine_index: EngineIndex) -> bool:
        """Whether the engine is there, or was started and will be."""
        return engine_index in self._engines

    def get(self, engine_index: EngineIndex | None) -> Engine | None:
        """An engine that is there, or will be."""
        return None if engine_index is None else self._engines.get(engine_index)

    @property
    def by_index(self) -> Mapping[EngineIndex, Engine]:
        """All of them."""
        return self._engines

    def up(self) -> list[Engine]:
        """Those that have announced themselves."""
        return [e for e in self._engines.values() if e.ready.done()]

    @property
    def serving(self) -> bool:
        """Whether one takes requests."""
        return any(e.takes_requests for e in self._engines.values())

    def next_in_s(self) -> float | None:
        """After how many seconds the next engine will be there, as far as starts can be foretold;
        None if they cannot."""
        return self._starts.left_s(asyncio.get_running_loop().time())

    def takers(self) -> list[Engine]:
        """Those that take requests, in order of their slots."""
        return sorted((e for e in self._engines.values() if e.takes_requests), key=lambda e: e.slot)

    def in_turn(self) -> list[Engine]:
        """The same, each time beginning with the next of them."""
        engines = self.takers()
        self._rotation += 1
        turn = self._rotation % len(engines) if engines else 0
        return engines[turn:] + engines[:turn]

    def targets(self) -> list[EngineTarget]:
        """The same, as users and migrations need them."""
        return [_target(engine) for engine in self.takers()]

    def target(self, engine_index: EngineIndex) -> EngineTarget | None:
        """One engine, if it takes requests."""
        engine = self._engines.get(engine_index)
        return _target(engine) if engine is not None and engine.takes_requests else None

    def heard_s(self, engine_index: EngineIndex) -> float | None:
        """When outputs of an engine came last, on the monotonic clock; None if it is gone."""
        engine = self._engines.get(engine_index)
        return None if engine is None else engine.clock.heard_s

    # -- what is also known of one that is gone

    def name(self, engine_index: EngineIndex | None) -> InstanceId:
        """The instance that the engine is a run of."""
        engine = self._known(engine_index)
        return InstanceId(f"engine {engine_index}") if engine is None else engine.instance

    def slot(self, engine_index: EngineIndex | None) -> int:
        """The number among the metrics of the instance that the engine is a run of."""
        engine = self._known(engine_index)
        return 0 if engine is None else engine.slot

    def address(self, engine_index: EngineIndex) -> str:
        """Where the engine's llumlet listens; empty if that is not known."""
        engine = self._known(engine_index)
        return "" if engine is None else engine.address

    def _known(self, engine_index: EngineIndex | None) -> Engine | None:
        if engine_index is None:
            return None
        return self._engines.get(engine_index) or self._lost.get(engine_index)


def _target(engine: Engine) -> EngineTarget:
    return EngineTarget(
        instance=engine.instance, engine_index=engine.engine_index, address=engine.address
    )
