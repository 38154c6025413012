"""A fleet without Ray, engines and HTTP, in virtual time."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from llumnix.cluster import fleet as fleet_module
from llumnix.cluster.fleet import Fleet
from llumnix.cluster.supervision.member import Member
from llumnix.cluster.supervision.runs import EngineRun
from llumnix.config import DeploymentConfig
from llumnix.core.events import DrainInstance, ScalingDecision
from llumnix.core.reports import LoadReport
from llumnix.core.settings import SchedulerSettings
from llumnix.core.supervision.blame import Death
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.frontend.engines.state import EngineState

I0, I1, I2 = InstanceId("i0"), InstanceId("i1"), InstanceId("i2")


class FakeLink:
    """To a controller that hears and says what the test wants."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.reports: list[LoadReport] | None = None  # as without a controller
        self.decisions: asyncio.Queue[ScalingDecision] = asyncio.Queue()
        self.on_tell: Callable[[Any], None] = lambda fact: None

    def tell(self, fact: Any) -> None:
        self.told.append(fact)
        self.on_tell(fact)

    async def loads(self) -> list[LoadReport] | None:
        return self.reports


class FakeFrontends:
    """The frontends: `held` counts each engine's streams."""

    def __init__(self) -> None:
        self.grown: list[int] = []
        self.leaving = False
        self.link = FakeLink()
        self.drain_requests: asyncio.Queue[DrainInstance] = asyncio.Queue()
        self.held: dict[int, int] = {}
        self.ended: dict[int, int] = {}
        self.accepting: dict[int, bool] = {}
        self.not_brought_up: str | None = None
        self.bring_up_s = 0.0
        self.shared_state = EngineState()
        self.streams = SimpleNamespace(on=self._streams)
        self.heard: dict[int, float] = {}
        self.blamed: dict[int, bool] = {}
        self.suspects: dict[int, frozenset[RequestId] | None] = {}

    @property
    def paused(self) -> bool:
        return self.shared_state.paused

    def note_silent(self, index: int, silent: bool) -> None:
        self.shared_state.note_silent(EngineIndex(index), silent)

    def heard_s(self, index: int) -> float | None:
        return self.heard.get(index)

    def grow_metrics(self, slots: int) -> None:
        self.grown.append(slots)

    def in_flight(self, index: int) -> int:
        return self.held.get(index, 0)

    def may_hold(self, index: int) -> bool:
        return self.in_flight(index) > 0

    async def bring_up(self, index: int) -> str | None:
        if self.bring_up_s:
            await asyncio.sleep(self.bring_up_s)
        return self.not_brought_up

    async def lose(
        self, index: int, *, blamed: bool = False, suspects: frozenset[RequestId] | None = None
    ) -> int:
        self.blamed.setdefault(index, blamed)
        self.suspects.setdefault(index, suspects)
        self.accepting.pop(index, None)
        self.shared_state.forget(EngineIndex(index))
        return sum(self.end(s.request, "lost") for s in self._streams(index))

    def _streams(self, index: int) -> list[Any]:
        return [SimpleNamespace(request=index) for _ in range(self.held.get(index, 0))]

    def end(self, request: Any, why: str) -> int:
        """A stream's request is called by its engine's index."""
        self.held[request] -= 1
        self.ended[request] = self.ended.get(request, 0) + 1
        return 1


class FakeRun:
    """One run; `ended` resolves when the test kills it."""

    def __init__(self, index: int) -> None:
        self.engine_index = EngineIndex(index)
        self.facts = self.remains = None
        self.placed = False
        self.unwanted = False
        self.counted = self.fenced = False
        self.began_s = 0.0
        self.step, self.step_for_s = "loading", 3.0
        self.heard_s: float | None = None
        self.last_words: list[str] = ["its last line"]
        self.ended: asyncio.Future[Death] | None = None

    @property
    def alive(self) -> bool:
        return self.ended is not None and not self.ended.done()

    reach: Any = EngineRun.reach
    end: Any = EngineRun.end
    why_ended: Any = EngineRun.why_ended


class FakeLauncher:
    """Runs that are ready after `ready_s`, for ever if that is infinite, unless `why_not` says why
    they end before. `broken` names the calls that raise."""

    event_log = None

    def __init__(self, client: FakeFrontends) -> None:
        self.client = client
        self.made: list[FakeRun] = []
        self.ended: list[int] = []
        self.broken: set[str] = set()
        self.ready_s = 0.0
        self.why_not: str | None = None
        self.answering: set[int] = set()
        self.settings: list[SchedulerSettings] = []

    def _call(self, name: str) -> None:
        if name in self.broken:
            raise RuntimeError(f"{name}: the control service is not reachable")

    def take_settings(self, settings: SchedulerSettings) -> None:
        self.settings.append(settings)

    def create(self, instance: InstanceId, slot: int) -> FakeRun:
        self._call("create")
        run = FakeRun(len(self.made))
        self.made.append(run)
        return run

    async def until_ready(self, run: FakeRun) -> str | None:
        self._call("until_ready")
        await asyncio.sleep(self.ready_s)
        if self.why_not is not None:
            return self.why_not
        run.ended = asyncio.get_running_loop().create_future()
        return None

    async def answers(self, run: FakeRun) -> bool:
        return run.engine_index in self.answering

    def accept(self, run: FakeRun, accepting: bool) -> None:
        self.client.accepting[run.engine_index] = accepting

    async def end(self, run: FakeRun) -> None:
        self._call("end")
        if run.alive:
            assert run.ended is not None
            run.ended.set_result(Death(why="stopped"))
        self.ended.append(run.engine_index)


class World:
    """A fleet and what it stands on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
        async def call(function: Callable[..., Any], *args: Any) -> Any:
            await asyncio.sleep(0)  # Ray answers later, and much may happen meanwhile.
            return function(*args)

        self.room = 100
        monkeypatch.setattr(fleet_module, "ask_ray", call)
        monkeypatch.setattr(fleet_module, "check_one_more", self._check)
        self.client = FakeFrontends()
        self.grown = self.client.grown
        launch: Any = SimpleNamespace(device=None, devices_per_instance=1)
        addresses: Any = SimpleNamespace(controller="", peers="", agents="", keys=None)
        frontends: Any = self.client
        self.fleet = Fleet(frontends, launch, addresses, DeploymentConfig(**config))
        self.launcher = FakeLauncher(self.client)
        self.fleet._launcher = self.fleet._supervisor._launcher = self.launcher  # type: ignore[assignment]
        self.said: list[str] = []

    def _check(self, launch: Any, *, there: int, waiting: int) -> None:
        if there >= self.room:
            raise fleet_module.CapacityError("no room")

    async def start(self, count: int = 2) -> "World":
        await self.fleet.start(count, self.said.append)
        return self

    def member(self, instance: str) -> Member:
        return self.fleet._members[InstanceId(instance)]

    def kill(
        self,
        instance: str,
        why: str = "killed",
        *,
        blamed: bool = False,
    ) -> None:
        run = self.member(instance).run
        assert run is not None
        assert run.ended is not None
        run.ended.set_result(Death(why=why, blamed=blamed))

    @property
    def states(self) -> dict[str, str]:
        return {s.id: s.state for s in self.fleet.status()}

    @property
    def why(self) -> dict[str, str | None]:
        return {s.id: s.why for s in self.fleet.status()}

    def hold(self, instance: str, streams: int) -> None:
        """Has the instance's engine hold that many streams."""
        run = self.member(instance).run
        assert run is not None
        self.client.held[run.engine_index] = streams

    def decide(self, decision: ScalingDecision) -> None:
        """Has the scheduler decide."""
        self.client.link.decisions.put_nowait(decision)

    def ask_for_drain(self, instance: InstanceId, why: str = "a SIGTERM") -> None:
        """Has an instance ask for its own drain."""
        self.client.drain_requests.put_nowait(DrainInstance(instance=instance, why=why))

    def accepting(self, instance: str) -> bool:
        run = self.member(instance).run
        assert run is not None
        return self.client.accepting[run.engine_index]

    def report(
        self, sequence: int, *, stalled_s: float = 0.0, only: str | None = None, steps: int = 0
    ) -> None:
        """Has the controller know a report of every instance, or keep that of all but one."""
        kept = {r.instance: r for r in self.client.link.reports or ()}
        for member in self.fleet._members.values():
            if member.run is not None and only in (None, member.id):
                kept[member.id] = LoadReport(
                    instance=member.id,
                    engine_index=member.run.engine_index,
                    sequence=sequence,
                    kv_tokens_used=0,
                    kv_tokens_total=1000,
                    stalled_s=stalled_s,
                    steps=steps,
                )
        self.client.link.reports = list(kept.values())
