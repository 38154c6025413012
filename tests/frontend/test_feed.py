"""The page's feed: one task while somebody watches, the same bytes for all, and who does not read
is skipped."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.exceptions import HTTPException

pytest.importorskip("vllm")

from vllm.v1.engine import FinishReason

from llumnix.core.priorities import Priorities
from llumnix.core.settings import PrioritySettings
from llumnix.core.supervision.lifecycle import InstanceStatus
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.frontend.own_streams import OwnStreams
from llumnix.frontend.streams.look import Cursor, Look, SeenStream, joined
from llumnix.frontend.ui import feed as ui
from llumnix.frontend.ui.picture import Deployment, Picture, greeting
from llumnix.observe.notes import Notes, Ring
from support.frontend import front, tokens

PRIORITIES = Priorities(PrioritySettings())
SEEN = SeenStream(RequestId("a"), "mine", InstanceId("i0"), False, 0, 5, 1, 1.0)


class World:
    """What a feed looks at; it counts the looks."""

    def __init__(self) -> None:
        self.looks = 0
        self.stopping = False
        self.fails = False
        source = ui.Source(
            look=self.look, deployment=self.deployment, stopping=lambda: self.stopping
        )
        self.feed = ui.Feed(source, lambda: Picture(PRIORITIES), greeting(PRIORITIES, model="m"))

    async def look(self, since: Cursor) -> Look:
        self.looks += 1
        assert since == ({} if self.looks == 1 else {"x": self.looks - 1})
        seen = SEEN._replace(request=RequestId(f"r{self.looks}"))
        return Look(streams=[seen], cursor={"x": self.looks})

    async def deployment(self) -> Deployment:
        if self.fails:
            raise RuntimeError("no answer")
        return Deployment([], [])


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(ui, "LOOK_EVERY_S", 0.01)
    return World()


def events(payload: bytes) -> list[tuple[str, dict[str, Any]]]:
    blocks = payload.decode().split("\n\n")[:-1]
    parts = [block.split("\n") for block in blocks]
    return [(e.removeprefix("event: "), json.loads(d.removeprefix("data: "))) for e, d in parts]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.005)


async def test_a_watcher_is_greeted_then_told_all_then_what_changes(world: World) -> None:
    watcher = world.feed.join()
    stream = watcher.stream()
    first = events(await anext(stream))
    assert [name for name, _ in first] == ["hello", "history", "state"]
    assert first[0][1]["classes"] == [
        {"name": "high", "priority": -100},
        {"name": "normal", "priority": 0},
    ]
    ((name, delta),) = events(await anext(stream))
    assert name == "delta"
    assert [row[8] for row in delta["open"]] == ["r2"]
    assert delta["close"] == [[0, ""]]
    world.feed.leave(watcher)


async def test_it_looks_only_while_somebody_watches(world: World) -> None:
    await asyncio.sleep(0.05)
    assert world.looks == 0
    one, two = world.feed.join(), world.feed.join()
    await until(lambda: world.looks > 2)
    world.feed.leave(one)
    looks = world.looks
    await until(lambda: world.looks > looks + 2)
    world.feed.leave(two)
    await asyncio.sleep(0.03)
    looks = world.looks
    await asyncio.sleep(0.05)
    assert world.looks == looks
    assert not [t for t in asyncio.all_tasks() if t.get_name() == "llumnix-feed"]


async def test_all_get_the_same_bytes(world: World) -> None:
    watchers = [world.feed.join() for _ in range(3)]
    streams = [w.stream() for w in watchers]
    for stream in streams:
        await anext(stream)
    got = [await anext(stream) for stream in streams]
    assert got[0] is got[1] is got[2]
    for watcher in watchers:
        world.feed.leave(watcher)


async def test_who_does_not_read_is_skipped_and_told_all_later(world: World) -> None:
    watcher, quick = world.feed.join(), world.feed.join()
    stream, fast = watcher.stream(), quick.stream()
    await anext(stream)
    for _ in range(3 * ui.QUEUED_MAX):
        await anext(fast)
    assert watcher.behind
    last = world.looks
    ((name, state),) = events(await anext(stream))
    assert name == "state"
    assert state["seq"] >= last
    for each in (watcher, quick):
        world.feed.leave(each)


async def test_a_seventeenth_is_turned_away(world: World) -> None:
    watchers = [world.feed.join() for _ in range(ui.WATCHERS_MAX)]
    with pytest.raises(ui.TooManyWatchersError, match="close one"):
        world.feed.join()
    world.feed.leave(watchers.pop())
    watchers.append(world.feed.join())
    for watcher in watchers:
        world.feed.leave(watcher)


async def test_a_watcher_that_comes_back_gets_what_it_has_missed(world: World) -> None:
    stays, lost = world.feed.join(), world.feed.join()
    stream = lost.stream()
    await anext(stream)
    ((_, delta),) = events(await anext(stream))
    world.feed.leave(lost)
    looks = world.looks
    await until(lambda: world.looks > looks + 4)
    back = world.feed.join(since=delta["seq"])
    got = events(await anext(back.stream()))
    assert {name for name, _ in got} == {"delta"}
    assert [d["seq"] for _, d in got] == [delta["seq"] + n + 1 for n in range(len(got))]
    assert len(got) > 3
    for each in (stays, back):
        world.feed.leave(each)


async def test_a_watcher_that_comes_back_to_another_process_gets_all(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their feeds may have begun at the same moment, as when all pages have just been told to ask
    again."""
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0)
    other = World()
    watchers = [(one, one.feed.join()) for one in (world, other)]
    (*_, (_, state)), _ = [events(await anext(w.stream())) for _, w in watchers]
    await until(lambda: other.looks > 5)
    back = other.feed.join(since=state["seq"])
    assert [name for name, _ in events(await anext(back.stream()))] == ["hello", "history", "state"]
    for one, watcher in [*watchers, (other, back)]:
        one.feed.leave(watcher)


async def test_a_watcher_that_comes_back_too_late_gets_all(world: World) -> None:
    stays = world.feed.join()
    ((_, _), (_, _), (_, state)) = events(await anext(stays.stream()))
    await until(lambda: world.looks > ui.KEPT_MAX + 3)
    for since in (state["seq"], 0, 10**15):
        late = world.feed.join(since=since)
        names = [name for name, _ in events(await anext(late.stream()))]
        assert names == ["hello", "history", "state"]
        world.feed.leave(late)
    world.feed.leave(stays)


async def test_a_watcher_of_one_instance_is_told_of_it_alone(world: World) -> None:
    there = SEEN._replace(request=RequestId("there"), instance=InstanceId("i1"))
    here = SEEN._replace(request=RequestId("here"))
    deaths = [{"t": 1.0, "kind": "death", "target": name, "why": ""} for name in ("i0", "i1")]
    looks = [Look(streams=[here, there]), Look(streams=[there], notes=deaths)]
    looks.append(Look(streams=[there, here._replace(instance=InstanceId("i1"))]))

    async def look(since: Cursor) -> Look:
        return looks.pop(0) if len(looks) > 1 else looks[0]

    source = ui.Source(look=look, deployment=world.deployment)
    feed = ui.Feed(source, lambda: Picture(PRIORITIES), greeting(PRIORITIES))
    watcher = feed.join(ui.Wish(instance=InstanceId("i1")))
    stream = watcher.stream()
    *_, (_, state) = events(await anext(stream))
    assert [row[8] for row in state["requests"]] == ["there"]
    told = events(await anext(stream))
    assert [d["target"] for name, d in told if name == "decision"] == ["i1"]
    ((_, delta),) = events(await anext(stream))
    assert [row[8] for row in delta["open"]] == ["here"]
    feed.leave(watcher)


async def test_a_slow_watcher_is_told_seldom_and_of_everything() -> None:
    group = ui.Group(ui.Wish(rate=1), Picture(PRIORITIES), ())
    watcher = ui.Watcher(group.wish, None)
    group.watchers.add(watcher)
    hello = greeting(PRIORITIES)
    for n in range(6):
        seen = SEEN._replace(request=RequestId(f"r{n}"))
        note = {"t": time.time(), "kind": "up", "target": f"i{n}", "why": ""}
        group.take(Look(streams=[seen], notes=[note]), Deployment([], []), hello, n * 0.2)
    stream = watcher.stream()
    (_, (_, past), (_, state)) = events(await anext(stream))
    assert [row[8] for row in state["requests"]] == ["r0"]
    told = events(await anext(stream))
    (delta,) = [d for name, d in told if name == "delta"]
    assert [row[8] for row in delta["open"]] == ["r5"]
    assert (delta["close"], delta["seq"]) == ([[0, ""]], state["seq"] + 1)
    heard = past["events"] + [d for name, d in told if name == "decision"]
    assert [d["target"] for d in heard] == [f"i{n}" for n in range(6)]


async def test_one_who_comes_later_and_wants_another_thing_is_told_of_the_past(
    world: World,
) -> None:
    looks = [0]

    async def look(since: Cursor) -> Look:
        looks[0] += 1
        note = {"t": time.time(), "kind": "up", "target": f"i{looks[0]}", "why": ""}
        return Look(notes=[note])

    source = ui.Source(look=look, deployment=world.deployment)
    feed = ui.Feed(source, lambda: Picture(PRIORITIES), greeting(PRIORITIES))
    first = feed.join()
    await until(lambda: looks[0] > 3)
    later = feed.join(ui.Wish(rate=4))
    past = events(await anext(later.stream()))[1][1]["events"]
    assert [d["target"] for d in past] == [f"i{n + 1}" for n in range(len(past))]
    assert len(past) > 3
    for each in (first, later):
        feed.leave(each)


@pytest.mark.parametrize(("count", "often"), [(ui.MANY, True), (ui.MANY + 1, False)])
async def test_many_instances_are_looked_at_once_a_second(
    world: World, count: int, often: bool
) -> None:
    asked = []
    status = InstanceStatus(
        id=InstanceId("i0"), state="serving", hung=False, node="", pid=1, restarts=0, why=None,
        engine_index=EngineIndex(0), devices=[],
    )  # fmt: skip

    async def deployment() -> Deployment:
        asked.append(1)
        return Deployment([status] * count, [])

    feed = ui.Feed(
        ui.Source(look=world.look, deployment=deployment),
        lambda: Picture(PRIORITIES),
        greeting(PRIORITIES),
    )
    watcher = feed.join()
    await until(lambda: world.looks > 5)
    assert len(asked) == (world.looks if often else 1)
    feed.leave(watcher)


async def test_it_ends_when_the_server_stops(world: World) -> None:
    watcher = world.feed.join()
    stream = watcher.stream()
    await anext(stream)
    world.stopping = True
    async with asyncio.timeout(5):
        async for _ in stream:
            pass
    world.feed.leave(watcher)


async def test_after_a_failure_watchers_are_told_all_anew(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("llumnix.tasks.FIRST_PAUSE_S", 0.01)
    watcher = world.feed.join()
    stream = watcher.stream()
    await anext(stream)
    world.fails = True
    await until(lambda: "no answer" in caplog.text)
    world.looks, world.fails = 0, False
    names: list[str] = []
    async with asyncio.timeout(5):
        while "state" not in names:
            names += [name for name, _ in events(await anext(stream))]
    assert "hello" not in names
    world.feed.leave(watcher)


async def test_a_process_that_does_not_answer_once_goes_on_where_it_was(
    world: World,
) -> None:
    asked: list[dict[str, int]] = []

    async def look(since: Cursor) -> Look:
        asked.append(dict(since))
        return Look(cursor={"0/notes": 3} if len(asked) == 1 else {"1/notes": len(asked)})

    source = ui.Source(look=look, deployment=world.deployment)
    feed = ui.Feed(source, lambda: Picture(PRIORITIES), greeting(PRIORITIES))
    watcher = feed.join()
    await until(lambda: len(asked) > 3)
    assert asked[3] == {"0/notes": 3, "1/notes": 3}
    feed.leave(watcher)


async def test_a_look_that_another_process_does_not_answer_in_time_is_left_out(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    looks: list[int] = []

    async def look(since: Cursor) -> Look:
        looks.append(len(looks))
        if len(looks) == 2:
            raise HTTPException(503, "The main process does not answer; try again.")
        return Look()

    source = ui.Source(look=look, deployment=world.deployment)
    feed = ui.Feed(source, lambda: Picture(PRIORITIES), greeting(PRIORITIES))
    watcher = feed.join()
    await until(lambda: len(looks) > 4)
    assert not caplog.records
    assert not watcher.behind
    feed.leave(watcher)


# -- what a look sees


async def test_a_look_shows_streams_and_what_happened_since_the_last(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        streams = OwnStreams(one.client)
        before = streams.look({})
        await one.add_request("a", 1)
        one.take_in(tokens(1, "a", 7, 8))
        one.client.first_token_s = lambda request: 0.25
        await one.add_request("b", 0)
        look = streams.look(before.cursor)
        seen = {s.request: (s.instance, s.output_tokens, s.orphan) for s in look.streams}
        assert seen == {"a": ("i1", 2, False), "b": ("i0", 0, False)}
        assert [(p.request, p.instance) for p in look.placed] == [("a", "i1"), ("b", "i0")]
        assert streams.row("a")["first_token_s"] == 0.25
        assert streams.row("a")["class"] == "normal"
        one.take_in(tokens(1, "a", 9, finish_reason=FinishReason.STOP))
        after = streams.look(look.cursor)
        assert [tuple(e) for e in after.ended] == [("a", "stop", 3, 0.25)]
        assert [s.request for s in after.streams] == ["b"]
        assert after.placed == []


async def test_of_a_request_why_it_was_placed_is_kept(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        one.link.why = "the freest"
        await one.add_request("a", 1)
        assert OwnStreams(one.client).row("a")["why"] == "i1: the freest"


def test_looks_of_several_processes_are_joined_in_order_of_time() -> None:
    notes = [{"t": t, "kind": "up", "target": "i0", "why": ""} for t in (1.0, 2.0, 3.0)]
    whole = joined([
        Look(streams=[SEEN], notes=[notes[1]], cursor={"0/notes": 4}),
        Look(notes=[notes[0], notes[2]], cursor={"1/notes": 2}),
        Look(cursor={"fleet/notes": 9}, frontends=0),
    ])  # fmt: skip
    assert whole.notes == notes
    assert whole.cursor == {"0/notes": 4, "1/notes": 2, "fleet/notes": 9}
    assert (whole.frontends, whole.streams) == (2, [SEEN])


def test_a_ring_gives_what_came_since_as_far_as_it_is_kept() -> None:
    ring: Ring[int] = Ring(3)
    for number in range(5):
        ring.add(number)
    assert ring.since(0) == [2, 3, 4]
    assert ring.since(4) == [4]
    assert ring.since(5) == []
    assert ring.since(9) == []


def test_a_note_has_a_time_a_kind_and_a_reason() -> None:
    notes = Notes()
    notes.note("death", "i0", "its process ended")
    (note,) = notes.since(0)
    assert note["t"] > 1e9
    assert {n: note[n] for n in ("kind", "target", "why")} == {
        "kind": "death", "target": "i0", "why": "its process ended"
    }  # fmt: skip
