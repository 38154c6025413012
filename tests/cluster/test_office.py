"""The office and its frontends over their real line: what is told, asked, counted and shared.

A frontend here is the real link with a directory of engines, and no vLLM."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.exceptions import GracefulHTTPError
from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from llumnix.cluster.frontends import office as office_module
from llumnix.cluster.frontends.desk import Desk, the_one
from llumnix.cluster.frontends.office import Office
from llumnix.core.streams.quarantine import Quarantined
from llumnix.core.supervision.frontends import Held
from llumnix.core.supervision.lifecycle import InstanceStatus
from llumnix.core.supervision.readiness import FleetSeen
from llumnix.core.supervision.restart import RestartAfter
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.errors import (
    CapacityError,
    ConflictError,
    LlumnixError,
    UnknownMigrationError,
    UnknownQuarantineError,
    UnknownRequestError,
    UsageError,
)
from llumnix.frontend.engines.directory import EngineDirectory
from llumnix.frontend.engines.outputs import Complaints
from llumnix.frontend.engines.state import EngineState
from llumnix.frontend.office.adapter import Adapter
from llumnix.frontend.office.asking import AskedError
from llumnix.frontend.office.link import OfficeLink
from llumnix.frontend.office.messages import (
    AdaptersAre,
    CallAll,
    DoYouHave,
    EngineDied,
    EngineSaid,
    FleetWants,
    KeysAre,
    Message,
    MoveYours,
    QuarantineIs,
    Question,
    Serving,
    TurnIs,
    WhoIsAccused,
    YourLook,
    YourMigrations,
    YourRequest,
    YourRequests,
)
from llumnix.frontend.office.through_office import OfficeControl, OfficeOthers
from llumnix.frontend.own_streams import MoveAsked
from llumnix.frontend.streams.look import Look
from llumnix.frontend.streams.migration_records import LISTED_MAX
from llumnix.observe.notes import Notes
from llumnix.reload.key_file import KeyRing
from llumnix.reload.reloading import Reloading

E0, E1 = EngineIndex(0), EngineIndex(1)
I0, I1 = InstanceId("i0"), InstanceId("i1")


class Engines:
    """The office's client of engines, which notes what it is asked."""

    def __init__(self) -> None:
        self.engines = EngineDirectory()
        self.complaints = Complaints()
        self.shared_state = EngineState()
        self.drain_requests: Any = asyncio.Queue()
        self.on_statistics: Callable[[list[bytes]], None] = lambda frames: None
        self.dropped: list[int] = []
        self.loaded: list[LoRARequest] = []
        self.begun, self.loading = asyncio.Event(), asyncio.Event()
        self.loading.set()  # Else a load waits for it.
        self.broken: Exception | None = None

    def expect(self, instance: InstanceId, engine_index: EngineIndex, slot: int) -> None:
        self.engines.expect(instance, engine_index, slot)
        self.engines.accept(engine_index, False)

    async def bring_up(self, engine_index: EngineIndex) -> str | None:
        self.shared_state.joined.add(engine_index)
        return None

    def lose(self, engine_index: EngineIndex) -> bool:
        self.shared_state.forget(engine_index)
        return self.engines.lose(engine_index) is not None

    async def drop_client(self, client: int) -> None:
        self.dropped.append(client)

    async def add_lora_async(self, request: LoRARequest) -> bool:
        self.begun.set()
        await asyncio.sleep(0)
        await self.loading.wait()
        if self.broken is not None:
            raise self.broken
        self.loaded.append(request)
        state = self.shared_state
        state.end(state.begin("add_lora", (request,)), [True])
        return True

    async def call_joined(self, method: str, args: tuple[Any, ...]) -> dict[EngineIndex, Any]:
        if self.broken is not None:
            raise self.broken
        return {E0: [method, *args], E1: None}


class Fleet:
    """A fleet that is full."""

    def __init__(self) -> None:
        self.notes = Notes()
        self.rows: list[InstanceStatus] = []
        self.asked: list[tuple[Any, ...]] = []
        self.exposition = SimpleNamespace(text=self._text)

    async def _text(self) -> bytes:
        return b"metrics"

    def status(self) -> list[InstanceStatus]:
        return self.rows

    async def drain(self, instance: InstanceId, why: str, **how: Any) -> InstanceStatus:
        self.asked.append(("drain", instance, why, how))
        return self.seen().instances[0]

    async def undrain(self, instance: InstanceId) -> InstanceStatus:
        self.asked.append(("undrain", instance))
        return self.seen().instances[0]

    def seen(self) -> FleetSeen:
        one = InstanceStatus(
            id=InstanceId("i0"), state="serving", hung=False, engine_index=EngineIndex(0),
            node="here", pid=7, devices=["cpu:0"], restarts=0, why=None, takes_requests=True,
            step="up", for_s=1.5,
        )  # fmt: skip
        return FleetSeen(instances=[one], stopping=True)

    async def add(self) -> InstanceStatus:
        raise CapacityError("no room: DELETE one first")


class Front:
    """One frontend's process."""

    def __init__(self, address: str, client: int) -> None:
        self.client = client
        self.holding = Held(version=0)
        self.heard: list[Message] = []
        self.answers: dict[type, Any] = {}
        self.asked: list[Question] = []
        self.confirms = True
        self.link = OfficeLink(address, client, lambda: self.holding)
        self.named: tuple[list[RequestId], bool] = ([], False)
        mine: Any = SimpleNamespace(named=lambda _: self.named, move=self.move_mine)
        self.control = OfficeControl(self.link, mine)
        self.others = OfficeOthers(self.link)

    async def take(self, message: Message) -> None:
        self.heard.append(message)
        if isinstance(message, FleetWants) and self.confirms:
            self.holding = Held(
                version=message.version,
                in_flight=self.holding.in_flight,
                suspects=self.holding.suspects,
            )
            self.link.say_now()

    async def answer(self, question: Question) -> Any:
        self.asked.append(question)
        answer = self.answers.get(type(question))
        if isinstance(answer, Exception):
            raise answer
        if answer is asyncio.sleep:
            await asyncio.sleep(60)
        return answer

    async def move_mine(self, order: MoveAsked) -> dict[str, Any]:
        return {"mine": order.request_id}

    def hold(self, **fields: Any) -> None:
        self.holding = Held(**{"version": self.holding.version, **fields})
        self.link.say_now()

    @property
    def wants(self) -> FleetWants:
        return [m for m in self.heard if isinstance(m, FleetWants)][-1]


class World:
    """An office with two frontends."""

    def __init__(self, office: Office, engines: Engines, desk: Desk, fronts: list[Front]) -> None:
        self.office, self.engines, self.desk, self.fronts = office, engines, desk, fronts
        self.told: list[Any] = []
        self.fleet: Any = desk._fleet

    async def until(self, true: Callable[[], Any]) -> None:
        async with asyncio.timeout(5):
            while not true():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def world(folder: Path, count: int = 2, ring: KeyRing | None = None) -> AsyncIterator[World]:
    engines, told = Engines(), []
    link: Any = SimpleNamespace(tell=told.append)
    address = f"ipc://{folder}/office"
    office = Office(engines, link, address, count, 2)  # type: ignore[arg-type]
    office.start()
    desk = Desk(office, Fleet(), Reloading(ring or KeyRing()))  # type: ignore[arg-type]
    fronts: list[Front] = []
    for slot in range(count):
        client = office.roster.begin(slot)
        assert client is not None
        front = Front(address, client)
        front.link.start(front.take, front.answer)
        fronts.append(front)
    it = World(office, engines, desk, fronts)
    it.told = told
    await it.until(lambda: all(any(isinstance(m, FleetWants) for m in f.heard) for f in fronts))
    try:
        yield it
    finally:
        for front in fronts:
            front.link.close()
        office.close()
        await asyncio.sleep(0)


# -- the file of --keys


def keys_file(folder: Path, text: str) -> Path:
    file = folder / "keys.yaml"
    file.touch(mode=0o600)
    file.write_text(text)
    return file


async def test_a_reload_reads_the_file_once_and_tells_all_frontends(tmp_path: Path) -> None:
    file = keys_file(tmp_path, "ada: {key: a, open_max: 2}\n")
    ring = KeyRing(str(file))
    async with world(tmp_path, ring=ring) as w:
        changes = await w.fronts[0].control.reload()
        names = {"added": ["ada"], "removed": [], "changed": []}
        settings = {"now": [], "engines": [], "start": []}
        assert changes == {"keys": 1, **names, "settings": settings, "unconfirmed": []}
        for front in w.fronts:
            (told,) = [q for q in front.asked if isinstance(q, KeysAre) and q.keys]
            assert told.keys == list(ring.keys)
        file.write_text("ada: {}")
        with pytest.raises(UsageError, match="ada: give one of key and sha256"):
            await w.fronts[1].control.reload()
        assert [k.name for k in ring.keys] == ["ada"]
        late = Front(w.fronts[0].link._address, w.office.roster.begin(0) or 0)
        late.link.start(late.take, late.answer)
        await w.until(lambda: any(isinstance(q, KeysAre) for q in late.asked))
        late.link.close()


async def test_a_reload_names_the_frontends_that_have_not_confirmed(
    tmp_path: Path,
) -> None:
    file = keys_file(tmp_path, "ada: {key: a}\n")
    async with world(tmp_path, ring=KeyRing(str(file))) as w:
        w.fronts[1].answers[KeysAre] = asyncio.sleep
        changes = await w.fronts[0].control.reload()
        assert (changes["added"], changes["unconfirmed"]) == (["ada"], ["f1"])
        # It reads them all the same, once it goes on.
        (told,) = [q for q in w.fronts[1].asked if isinstance(q, KeysAre) and q.keys]
        assert [k.name for k in told.keys] == ["ada"]


async def test_of_two_reloads_at_once_the_later_reads_the_file_last(tmp_path: Path) -> None:
    file = keys_file(tmp_path, "ada: {key: a}\n")
    ring = KeyRing(str(file))
    read, slow = ring.read, [0.3, 0.0]

    def slower() -> Any:
        keys = read()
        time.sleep(slow.pop(0))
        return keys

    ring.read = slower  # type: ignore[method-assign]
    async with world(tmp_path, ring=ring) as w:
        first = asyncio.create_task(w.desk.reload())
        await asyncio.sleep(0.1)
        file.write_text("bob: {key: b}\n")
        second = await w.desk.reload()
        assert (second["added"], second["removed"]) == (["bob"], ["ada"])
        assert (await first)["added"] == ["ada"]
        for front in w.fronts:
            last = [q for q in front.asked if isinstance(q, KeysAre)][-1]
            assert [k.name for k in last.keys] == ["bob"]


async def test_a_frontend_that_comes_during_a_reload_ends_up_with_the_new_keys(
    tmp_path: Path,
) -> None:
    file = keys_file(tmp_path, "ada: {key: a}\n")
    ring = KeyRing(str(file))
    async with world(tmp_path, ring=ring) as w:
        w.desk.greeted(w.fronts[0].client)  # The task that tells it runs after the change.
        ring.replace(ring.read())
        await w.office.ask_all(YourRequests())
        last = [q for q in w.fronts[0].asked if isinstance(q, KeysAre)][-1]
        assert [k.name for k in last.keys] == ["ada"]


# -- what the fleet wants


async def test_frontends_get_what_the_fleet_wants_as_a_whole_and_once_for_many_changes(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        before = len(w.fronts[0].heard)
        w.office.expect(I0, E0, 0)
        w.office.locate(E0, "ipc:///peer")
        await w.office.bring_up(E0)
        w.office.accept(E0, True)
        w.office.note_silent(E0, True)
        w.office.open()
        await w.until(lambda: w.fronts[1].wants.open and w.fronts[0].wants.open)
        (engine,) = w.fronts[0].wants.engines
        assert (engine.instance, engine.address) == (I0, "ipc:///peer")
        assert (engine.accepting, engine.joined, engine.silent) == (True, True, True)
        assert len(w.fronts[0].heard) - before <= 2
        w.office.note_silent(E0, True)  # No news.
        await asyncio.sleep(0.05)
        assert len(w.fronts[0].heard) - before <= 2


async def test_one_that_comes_later_is_told_what_the_others_know(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.office.expect(I0, E0, 0)
        await w.fronts[0].others.load_adapter(adapter("a"))
        await w.fronts[0].others.condemned(quarantined("x"))
        first = w.fronts[1]
        w.office.ended(first.client, "killed")
        client = w.office.roster.begin(1)
        assert client is not None
        late = Front(w.office._address, client)
        w.fronts.append(late)
        late.link.start(late.take, late.answer)
        await w.until(lambda: len(late.asked) >= 2 and late.heard)
        assert [e.engine_index for e in late.wants.engines] == [E0]
        (adapters,) = [q for q in late.asked if isinstance(q, AdaptersAre)]
        assert [(a.name, a.number) for a in adapters.adapters] == [("a", 1)]
        (listed,) = [q for q in late.asked if isinstance(q, QuarantineIs)]
        assert [one.digest for one in listed.quarantined] == ["x"]


async def test_an_engine_that_is_drained_is_empty_once_all_know_it_and_say_so(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        one, other = w.fronts
        w.office.expect(I0, E0, 0)
        w.office.accept(E0, True)
        await w.until(lambda: one.wants.engines and other.wants.engines)
        other.confirms = False
        w.office.accept(E0, False)
        await w.until(lambda: not other.wants.engines[0].accepting)
        one.hold(in_flight={E0: 0})
        await asyncio.sleep(0.05)
        assert w.office.may_hold(E0)
        assert w.office.in_flight(E0) == 0
        other.holding = Held(version=other.wants.version, in_flight={E0: 1})
        other.link.say_now()
        await w.until(lambda: w.office.in_flight(E0) == 1)
        assert w.office.may_hold(E0)
        other.hold(in_flight={})
        await w.until(lambda: not w.office.may_hold(E0))


# -- deaths


async def test_a_death_is_told_before_the_list_without_the_engine_and_ends_are_added_up(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        for engine, instance in ((E0, I0), (E1, I1)):
            w.office.expect(instance, engine, int(engine))
        await w.until(lambda: len(w.fronts[1].wants.engines) == 2)
        order: list[str] = []
        for front, ended in zip(w.fronts, (2, 3), strict=True):
            front.answers[EngineDied] = ended
        one = w.fronts[0]
        take, answer = one.take, one.answer

        async def noting_take(message: Message) -> None:
            if isinstance(message, FleetWants):
                order.append(f"{len(message.engines)} engines")
            await take(message)

        async def noting_answer(question: Question) -> Any:
            order.append(type(question).__name__)
            return await answer(question)

        one.link._on_message, one.link._on_question = noting_take, noting_answer
        w.office.locate(E0, "ipc:///x")  # A list is on its way in the same turn of the loop.
        assert await w.office.lose(E1) == 5
        await w.until(lambda: order[-1:] == ["1 engines"])
        assert order.index("EngineDied") < order.index("1 engines")
        assert [(t.instance, t.engine_index) for t in w.told] == [(I1, E1)]
        assert await w.office.lose(E1) == 0


async def test_the_suspects_of_a_death_are_those_of_all_frontends(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.office.expect(I0, E0, 0)
        w.fronts[0].answers = {WhoIsAccused: ["a"], EngineDied: 0}
        w.fronts[1].answers = {WhoIsAccused: ["b"], EngineDied: 0}
        await w.office.lose(E0, blamed=True, suspects=frozenset(map(RequestId, "abc")))
        for front in w.fronts:
            (who,) = [q for q in front.asked if isinstance(q, WhoIsAccused)]
            assert who.among == ["a", "b", "c"]
            (died,) = [q for q in front.asked if isinstance(q, EngineDied)]
            assert sorted(died.suspects or ()) == ["a", "b"]
            assert died.blamed


async def test_a_frontend_that_hangs_delays_a_death_by_no_more_than_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(office_module, "SOON_S", 0.1)
    async with world(tmp_path) as w:
        w.office.expect(I0, E0, 0)
        w.fronts[0].answers = {EngineDied: 4}
        w.fronts[1].answers = {EngineDied: asyncio.sleep}
        assert await w.office.lose(E0) == 4


async def test_the_turn_to_try_suspects_goes_round(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        one, other = w.fronts

        def turns(front: Front) -> list[bool]:
            return [m.mine for m in front.heard if isinstance(m, TurnIs)]

        other.hold(suspects=True)
        await w.until(lambda: turns(other) == [True])
        one.hold(suspects=True)
        await asyncio.sleep(0.05)
        assert turns(one) == []
        other.hold(suspects=False)
        await w.until(lambda: turns(one) == [True] and turns(other) == [True, False])
        w.office.ended(one.client, "killed")
        other.hold(suspects=True)
        await w.until(lambda: turns(other) == [True, False, True])


async def test_engines_drop_the_requests_of_a_frontend_that_died_and_what_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(office_module, "LOST_AGAIN_S", (0.0, 0.01))
    async with world(tmp_path) as w:
        one = w.fronts[0]
        one.hold(in_flight={E0: 3})
        one.answers[YourRequests] = asyncio.sleep
        await w.until(lambda: w.office.in_flight(E0) == 3)
        asked = asyncio.create_task(w.office.ask(one.client, YourRequests(), None))
        await asyncio.sleep(0)
        decided = w.office.ended(one.client, "killed by SIGKILL")
        assert isinstance(decided, RestartAfter)
        with pytest.raises(LlumnixError, match="SIGKILL"):
            await asked
        assert w.office.in_flight(E0) == 0
        await w.until(lambda: w.engines.dropped == [one.client] * 2)
        one.link.send(Serving())  # It was on its way.
        await asyncio.sleep(0.05)
        assert w.office.roster.serving == 0


async def test_statistics_that_an_engine_sends_the_office_are_for_the_metrics(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        w.engines.on_statistics([b"x", b"y"])
        await w.until(lambda: [m for f in w.fronts for m in f.heard if isinstance(m, EngineSaid)])
        said = [m for f in w.fronts for m in f.heard if isinstance(m, EngineSaid)]
        assert said == [EngineSaid(frames=[b"x", b"y"])]


# -- what users ask


async def test_requests_of_all_are_joined_and_who_is_silent_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path) as w:
        one, other = w.fronts
        one.answers[YourRequests] = [{"request": "a"}]
        other.answers[YourRequests] = [{"request": "b"}]
        rows = await one.control.requests()
        assert sorted(r["request"] for r in rows.rows) == ["a", "b"]
        assert rows.incomplete == []
        other.answers[YourRequests] = ValueError("a bug")
        rows = await one.control.requests()
        assert [r["request"] for r in rows.rows] == ["a"]
        assert rows.incomplete == ["f1"]
        (told,) = caplog.messages
        assert told.endswith("(1 so far): f1: ValueError: a bug")
        other.answers[YourRequests] = asyncio.sleep
        assert (await one.control.requests()).incomplete == ["f1"]
        assert len(caplog.messages) == 1, "who is silent is told of by its own watch"


async def test_a_frontend_that_ends_amid_a_question_has_not_failed_on_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path) as w:
        one, other = w.fronts
        one.answers[YourRequests] = []
        other.answers[YourRequests] = asyncio.sleep
        asked = asyncio.create_task(one.control.requests())
        await w.until(lambda: any(isinstance(q, YourRequests) for q in other.asked))
        w.office.ended(other.client, "killed by SIGKILL")
        assert (await asked).incomplete == ["f1"]
        assert [told for told in caplog.messages if "failed on a question" in told] == []


async def test_a_move_ordered_at_one_frontend_is_made_by_the_one_that_has_the_request(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        one, other = w.fronts
        one.answers[DoYouHave] = [[], False]
        other.answers[DoYouHave] = [["cmpl-r-1"], False]
        other.answers[MoveYours] = {"outcome": "migrated"}
        order = MoveAsked(request_id="r", destination="i1", copy="staged")
        assert await one.control.move(order) == {"outcome": "migrated"}
        (asked,) = [q for q in other.asked if isinstance(q, MoveYours)]
        assert (asked.request_id, asked.destination) == ("cmpl-r-1", "i1")
        other.answers[MoveYours] = ConflictError("request r is being moved already")
        with pytest.raises(ConflictError, match="being moved already"):
            await one.control.move(order)
        one.answers[DoYouHave] = [["cmpl-r-2"], False]
        with pytest.raises(ConflictError, match="2 sequences have the id r"):
            await one.control.move(order)
        one.named = ([RequestId("r")], True)
        assert await one.control.move(order) == {"mine": "r"}
        one.named = ([RequestId("r")], False)
        other.answers[DoYouHave] = one.answers[DoYouHave] = [[], False]
        with pytest.raises(UnknownRequestError):
            await one.control.move(order)


def test_an_exact_id_goes_before_a_clients_name_in_another_frontend() -> None:
    assert the_one("r", {1: [["x"], False], 2: [["r"], True]}, []) == (2, "r")
    with pytest.raises(UnknownRequestError, match="f1 did not say"):
        the_one("r", {1: [[], False]}, ["f1"])


async def test_migrations_are_listed_in_the_order_in_which_they_began(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        one, other = w.fronts
        one.answers[YourMigrations] = [[1.0, {"id": "m1-0"}], [3.0, {"id": "m1-1"}]]
        other.answers[YourMigrations] = [[2.0, {"id": "m2-0"}]]
        listed = await other.control.migrations()
        assert [m["id"] for m in listed.rows] == ["m1-0", "m2-0", "m1-1"]
        assert listed.incomplete == []
        one.answers[YourMigrations] = []
        assert await one.control.migration("m2-0") == {"id": "m2-0"}
        other.answers[YourMigrations] = []
        with pytest.raises(UnknownMigrationError, match="m2-0"):
            await one.control.migration("m2-0")


async def test_who_does_not_say_its_migrations_in_time_is_named(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        one, other = w.fronts
        one.answers[YourMigrations] = [[1.0, {"id": "m1-0"}]]
        other.answers[YourMigrations] = asyncio.sleep
        listed = await one.control.migrations()
        assert listed.rows == [{"id": "m1-0"}]
        assert listed.incomplete == ["f1"]
        one.answers[YourMigrations] = []
        with pytest.raises(UnknownMigrationError, match=r"\(f1 did not say which it has\)"):
            await one.control.migration("m2-0")


async def test_of_more_migrations_than_are_listed_the_last_are(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for at, front in enumerate(w.fronts):
            front.answers[YourMigrations] = [
                [float(n), {"id": f"m{n}"}] for n in range(at, LISTED_MAX + 4, 2)
            ]
        listed = await w.fronts[0].control.migrations()
        assert [m["id"] for m in listed.rows] == [f"m{n}" for n in range(4, LISTED_MAX + 4)]


async def test_what_the_fleet_refuses_is_the_same_error_at_the_frontend(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        with pytest.raises(CapacityError, match="no room: DELETE one first"):
            await w.fronts[0].control.add()


async def test_a_probe_hears_of_every_frontend_what_the_fleet_says(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for front in w.fronts:
            assert await front.control.fleet() == Fleet().seen()


# -- what all have in common


def quarantined(digest: str) -> Quarantined:
    return Quarantined(
        digest=digest, request=RequestId("r"), client_id="c", prompt_tokens=3, output_tokens=0,
        since_s=1e12,
    )  # fmt: skip


async def test_a_condemned_request_is_refused_everywhere_before_its_client_hears_of_it(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        one, other = w.fronts
        await one.others.condemned(quarantined("bad"))
        listed = [q for q in other.asked if isinstance(q, QuarantineIs)][-1]
        assert [q.digest for q in listed.quarantined] == ["bad"]
        other.others.refused("bad")
        other.others.refused("other")
        await asyncio.sleep(0.05)
        (row,) = await other.control.quarantined()
        assert (row["id"], row["refused"]) == ("bad", 1)
        with pytest.raises(UnknownQuarantineError):
            await one.control.release("none")
        assert await other.control.release("bad") == 1
        listed = [q for q in one.asked if isinstance(q, QuarantineIs)][-1]
        assert listed.quarantined == []


def adapter(name: str, path: str = "/a", *, in_place: bool = False) -> LoRARequest:
    return LoRARequest(lora_name=name, lora_int_id=99, lora_path=path, load_inplace=in_place)


async def test_two_adapters_get_two_numbers_and_all_frontends_know_them(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        one, other = w.fronts
        first, second = adapter("a"), adapter("b")
        await asyncio.gather(one.others.load_adapter(first), other.others.load_adapter(second))
        assert {first.lora_int_id, second.lora_int_id} == {1, 2}
        assert {r.lora_int_id for r in w.engines.loaded} == {1, 2}
        for front in w.fronts:
            known = [q for q in front.asked if isinstance(q, AdaptersAre)][-1]
            assert {a.name: a.number for a in known.adapters} == {
                "a": first.lora_int_id, "b": second.lora_int_id,
            }  # fmt: skip
        await other.others.unload_adapter("a")
        known = [q for q in one.asked if isinstance(q, AdaptersAre)][-1]
        assert [a.name for a in known.adapters] == ["b"]
        (kept,) = w.engines.shared_state.calls()
        assert kept.args[0].lora_name == "b", "engines that come go without the other"


async def test_the_same_adapter_loaded_twice_is_loaded_once_and_another_path_is_refused(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        one, other = w.fronts
        await one.others.load_adapter(adapter("a"))
        again = adapter("a")
        await other.others.load_adapter(again)
        assert again.lora_int_id == 1
        assert len(w.engines.loaded) == 1
        with pytest.raises(ConflictError, match="already been loaded from /a"):
            await other.others.load_adapter(adapter("a", "/b"))
        await other.others.load_adapter(adapter("a", "/b", in_place=True))
        assert [r.lora_path for r in w.engines.loaded] == ["/a", "/b"]
        assert w.engines.loaded[-1].lora_int_id == 1


async def test_an_adapter_that_two_load_at_the_same_time_has_one_number(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        mine, theirs = adapter("a"), adapter("a")
        one, other = w.fronts
        await asyncio.gather(one.others.load_adapter(mine), other.others.load_adapter(theirs))
        assert mine.lora_int_id == theirs.lora_int_id == 1
        assert len(w.engines.loaded) == 1


async def test_an_adapter_that_is_unloaded_while_it_is_loaded_is_known_nowhere(
    tmp_path: Path,
) -> None:
    """In whatever order they come in, all go by the last of them."""
    async with world(tmp_path) as w:
        one, other = w.fronts
        go_on = w.engines.loading = asyncio.Event()
        loading = asyncio.create_task(one.others.load_adapter(adapter("a")))
        await asyncio.wait_for(w.engines.begun.wait(), 5)
        unloading = asyncio.create_task(other.others.unload_adapter("a"))
        await asyncio.sleep(0.1)
        go_on.set()
        await asyncio.gather(loading, unloading)
        for front in w.fronts:
            known = [q for q in front.asked if isinstance(q, AdaptersAre)][-1]
            assert known.adapters == []


async def test_an_adapter_that_cannot_be_loaded_is_known_nowhere(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.engines.broken = Exception("no such file")
        with pytest.raises(Exception, match=r"^no such file$"):
            await w.fronts[0].others.load_adapter(adapter("a"))
        assert not [q for q in w.fronts[1].asked if isinstance(q, AdaptersAre) and q.adapters]
        w.engines.broken = None
        later = adapter("b")
        await w.fronts[0].others.load_adapter(later)
        assert later.lora_int_id == 2


async def test_calls_that_change_what_engines_share_are_the_offices(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        others = w.fronts[0].others
        answers = await others.call_all("sleep", (1, "abort"))
        assert answers == {E0: ["sleep", 1, "abort"], E1: None}
        w.engines.broken = Exception("Call to sleep method failed")
        with pytest.raises(Exception, match="Call to sleep method failed") as failed:
            await others.call_all("sleep", (1, "abort"))
        assert type(failed.value) is Exception
        with pytest.raises(AskedError):
            await w.fronts[0].link.ask(CallAll(method="sleep"))
        w.engines.broken = EngineDeadError()
        with pytest.raises(EngineDeadError):
            await others.call_all("sleep", (1, "abort"))
        w.engines.broken = GracefulHTTPError("instance i1 did not answer", 504)
        with pytest.raises(GracefulHTTPError, match="i1 did not answer") as late:
            await others.call_all("sleep", (1, "abort"))
        assert int(late.value.http_status) == 504


# -- what else a frontend asks


async def test_a_frontend_asks_the_office_for_all_that_a_user_may_see(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        one, other = w.fronts
        w.fleet.rows = list(Fleet().seen().instances)
        w.office.expect(I0, E0, 0)
        other.hold(in_flight={E0: 3})
        await w.until(lambda: w.office.in_flight(E0) == 3)
        (row,) = await one.control.instances()
        assert (row.status.id, row.in_flight) == ("i0", 3)
        rows = await one.control.frontends()
        assert [(r.id, r.pid) for r in rows] == [("f0", os.getpid()), ("f1", os.getpid())]
        assert await one.control.metrics() == b"metrics"
        status = await one.control.drain(I0, "why", timeout_s=2.5, force=True, again=True)
        assert status.id == "i0"
        assert (await one.control.undrain(I0)).id == "i0"
        assert w.fleet.asked == [
            ("drain", "i0", "why", {"timeout_s": 2.5, "force": True, "again": True}),
            ("undrain", "i0"),
        ]


async def test_a_request_is_shown_by_the_frontend_that_has_it(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        one, other = w.fronts
        one.answers[DoYouHave] = [[], False]
        other.answers[DoYouHave] = [["r-0"], False]
        other.answers[YourRequest] = {"request": "r-0"}
        assert await one.control.request("r") == {"request": "r-0"}
        assert [q.name for q in other.asked if isinstance(q, YourRequest)] == ["r-0"]


async def test_a_look_joins_those_of_all_and_what_became_of_instances(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for front in w.fronts:
            name = f"f{front.client}"
            front.answers[YourLook] = Look(
                notes=[{"t": 1.0, "kind": "move", "target": name, "why": ""}], cursor={name: 7}
            )
        w.fleet.notes.note("up", "i0", "")
        look = await w.fronts[0].control.look({"f1": 3})
        assert sorted(n["target"] for n in look.notes) == ["f1", "f2", "i0"]
        assert look.cursor == {"f1": 7, "f2": 7, "fleet/notes": 1}
        assert look.frontends == 2
        assert [q.since for q in w.fronts[1].asked if isinstance(q, YourLook)] == [{"f1": 3}]


async def test_the_command_lines_adapters_are_loaded_in_order(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.desk.load_all([Adapter(name=n, number=0, path=f"/{n}") for n in "ab"])
        assert [(a.lora_name, a.lora_int_id) for a in w.engines.loaded] == [("a", 1), ("b", 2)]
        listed = [q for q in w.fronts[0].asked if isinstance(q, AdaptersAre)][-1]
        assert [a.name for a in listed.adapters] == ["a", "b"]


async def test_an_engine_was_heard_when_any_of_them_or_the_office_heard_it(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        assert w.office.heard_s(E0) is None
        w.office.expect(I0, E0, 0)
        own = w.office.heard_s(E0)
        assert own is not None
        w.fronts[0].hold(heard_s={E0: own - 5.0})
        w.fronts[1].hold(heard_s={E0: own + 5.0})
        await w.until(lambda: w.office.heard_s(E0) == own + 5.0)


async def test_room_for_more_instances_is_made_everywhere_and_never_given_up(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        w.office.grow_metrics(5)
        await w.until(lambda: w.fronts[1].wants.slots == 5)
        version = w.fronts[1].wants.version
        w.office.grow_metrics(3)
        w.office.expect(I0, E0, 0)
        await w.until(lambda: w.fronts[1].wants.version > version)
        assert w.fronts[1].wants.slots == 5


async def test_a_frontend_has_said_something_last_when_its_last_word_came(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        client = w.fronts[0].client
        assert w.office.said_s(99) is None
        w.office._lines[client].heard_s -= 50.0
        said_s = w.office.said_s(client)
        w.fronts[0].hold()
        await w.until(lambda: (w.office.said_s(client) or 0.0) - 49.0 > said_s)  # type: ignore[operator]


async def test_a_word_that_is_not_for_the_office_harms_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path) as w:
        one = w.fronts[0]
        one.link.send(TurnIs(mine=True))
        await w.until(lambda: "could not be handled" in caplog.text)
        with pytest.raises(AskedError, match="not for the office"):
            await one.link.ask(YourRequests())
        with pytest.raises(LlumnixError, match="has just ended"):
            await w.office.ask(99, YourRequests())
        assert await one.control.frontends()
