"""A deployment as its event log tells of it: what a look would have shown at any moment of the log.

Read once; then `Moment` walks through it, forward alone. A log does not say when each token came:
between a request's first token and its end they are taken to have come evenly. Of a request that
has not ended in the log, the pace is the mean of the others, and its client's name is not known.

A log may go on over several runs of `llumnix serve`, and one that was killed does not say so. Its
last line is its end.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from llumnix.core.events import FleetReported
from llumnix.core.priorities import Priorities
from llumnix.core.reports import LoadReport
from llumnix.core.settings import SchedulerSettings
from llumnix.core.supervision.lifecycle import InstanceStatus
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.errors import UsageError
from llumnix.frontend.streams.look import Ended, Look, Placed, SeenStream
from llumnix.frontend.ui.picture import Deployment

REPORTS_EVERY_S = 0.5
"""Of an instance's reports of so long the first and the last are kept: a log may have millions."""
AFTER = {
    "up": "serving", "undrain": "serving", "add": "starting", "drain": "draining",
    "death": "restarting", "renew": "restarting", "give_up": "failed", "removed": None,
}  # fmt: skip
"""An instance's state after each kind of note; None: it is gone."""


class RunEnded(NamedTuple):
    """A run of `llumnix serve` was over: nothing of it is left."""


class Place(NamedTuple):
    """Where a request is from then on."""

    t: float
    instance: InstanceId
    orphan: bool = False  # its instance has died


@dataclass(slots=True, kw_only=True)
class PastStream:
    """A request. Times are the wall clock's, in seconds."""

    request: RequestId
    client_id: str
    priority: int
    prompt: int
    begun_s: float
    places: list[Place]
    why: str = ""  # it was placed there
    out: int | None = None  # output tokens at its end; None: its run, or the log, ends before it
    end_s: float = float("inf")
    how: str = ""
    first_token_s: float | None = None  # how long it waited for it
    lives: int = 0
    moves: list[dict[str, Any]] = field(default_factory=list)

    def seen(self, t: float, pace: float) -> SeenStream:
        """As a look at that time shows it. `pace`: tokens a second, if its own is not known."""
        place = self.places[max(0, bisect_right(self.places, t, key=lambda p: p.t) - 1)]
        began_s = self.begun_s + (self.first_token_s or 0.0)
        out = 0
        if self.out is None:
            out = 1 + int(max(0.0, t - began_s) * pace)
        elif self.out and t >= began_s:
            share = (t - began_s) / max(1e-6, self.end_s - began_s)
            out = 1 + int((self.out - 1) * min(1.0, share))
        return SeenStream(
            self.request, self.client_id, place.instance, place.orphan, self.priority, self.prompt,
            out, t - self.begun_s,
        )  # fmt: skip


class Past:
    """All that a log tells. `streams` in the order in which they began, `notes` and `changes` in
    that of their times."""

    def __init__(self) -> None:
        self.begin_s = self.end_s = 0.0
        self.settings = SchedulerSettings()
        self.streams: list[PastStream] = []
        self.notes: list[dict[str, Any]] = []
        self.changes: list[tuple[float, Any]] = []  # notes of instances, fleets, deaths, reports
        self.by_name: dict[str, PastStream] = {}
        self.pace = 0.0

    @property
    def priorities(self) -> Priorities:
        """The classes of requests."""
        return Priorities(self.settings.priorities)


class Kept(NamedTuple):
    """Which reports of an instance are kept."""

    since_s: float
    run: EngineIndex
    at: int | None  # where the last one is among the changes, if it is not the first


class Reader:
    """Makes a past of the lines of a log."""

    def __init__(self) -> None:
        self.past = Past()
        self._arrived: dict[str, tuple[int, int]] = {}
        self._open: dict[str, PastStream] = {}
        self._kept: dict[InstanceId, Kept] = {}
        self._fleets: set[str] = set()
        self._up: set[str] = set()  # instances that serve, as the last fleet notes it
        # The line before the last start of a controller, unless a fleet's note follows that.
        self._before_start_s: float | None = None

    def read(self, lines: Iterable[dict[str, Any]]) -> Past:
        """All of it. `UsageError` if the log tells of nothing that can be shown."""
        past, end_s = self.past, float("-inf")
        for line in lines:
            t, before_s = line["time"], end_s
            end_s = max(end_s, t)
            match line["kind"]:
                case "started":
                    self._before_start_s = before_s
                    past.settings = msgspec.convert(line["settings"], SchedulerSettings)
                case "fact":
                    self._fact(t, line["name"], line["body"])
                case "decision" if line["name"] == "Dispatch":
                    self._placed(t, line["body"])
                case "migration":
                    self._moved(t, line["body"])
                case "revival":
                    self._revived(t, line["body"])
                case "request":
                    self._ended(t - (line["at"] - line["body"]["started"]), t, line["body"])
                case "instance":
                    self._instance(line["who"], before_s, line["body"])
        if not past.changes and not past.by_name:
            raise UsageError("the event log has neither instances nor requests to show")
        past.end_s = end_s
        past.streams = sorted(past.by_name.values(), key=lambda s: s.begun_s)
        past.notes.sort(key=itemgetter("t"))
        past.changes.sort(key=itemgetter(0))
        # Before that the processes started.
        past.begin_s = min([t for t, _ in past.changes[:1]] + [s.begun_s for s in past.streams[:1]])
        past.pace = _pace(past.streams)
        return past

    def _instance(self, fleet: str, before_s: float, note: dict[str, Any]) -> None:
        """`before_s`: the time of the line before."""
        name, kind = note["target"], note["kind"]
        # In a container the next fleet may have the process id of the one before.
        if (self._fleets and fleet not in self._fleets) or (kind == "up" and name in self._up):
            start_s = self._before_start_s
            self._run_ended(before_s if start_s is None else start_s)
        self._fleets.add(fleet)
        self._before_start_s = None
        if kind == "up":
            self._up.add(name)
        elif kind in AFTER and kind not in ("drain", "undrain"):
            self._up.discard(name)
        self.past.notes.append(note)
        self.past.changes.append((note["t"], note))

    def _run_ended(self, t: float) -> None:
        self._up.clear()
        self.past.changes.append((t, RunEnded()))
        for name in [name for name, stream in self._open.items() if stream.begun_s <= t]:
            self._open.pop(name).end_s = t

    def _fact(self, t: float, name: str, body: dict[str, Any]) -> None:
        if name == "RequestArrived":
            self._arrived[body["request"]] = body["prompt_tokens"], body["priority"]
        elif name == "LoadReported":
            self._report(t, msgspec.convert(body["report"], LoadReport))
        elif name == "FleetReported":
            self.past.changes.append((t, msgspec.convert(body, FleetReported)))
        elif name == "InstanceLost":
            for stream in self._open.values():
                if stream.places[-1].instance == body["instance"]:
                    stream.places.append(Place(t, InstanceId(body["instance"]), True))

    def _report(self, t: float, report: LoadReport) -> None:
        """Keeps it; or in place of the one before, which was not the first of its time."""
        changes, kept = self.past.changes, self._kept.get(report.instance)
        report = replace(report, admitted=())
        if kept is None or t >= kept.since_s + REPORTS_EVERY_S or report.engine_index != kept.run:
            self._kept[report.instance] = Kept(t, report.engine_index, None)
        elif kept.at is None:
            self._kept[report.instance] = kept._replace(at=len(changes))
        else:
            changes[kept.at] = t, report
            return
        changes.append((t, report))

    def _placed(self, t: float, body: dict[str, Any]) -> None:
        name, instance = body["request"], InstanceId(body["instance"])
        prompt, priority = self._arrived.pop(name, (0, 0))
        if name in self.past.by_name:  # Its engine has died: it is placed anew.
            return
        self._open[name] = self.past.by_name[name] = PastStream(
            request=RequestId(name),
            client_id=name,
            priority=priority,
            prompt=prompt,
            begun_s=t,
            places=[Place(t, instance)],
            why=f"{instance}: {body['why']}",
        )

    def _moved(self, t: float, body: dict[str, Any]) -> None:
        note = {"t": t, "kind": "move", "target": body["request"], "why": body["why"], "move": body}
        self.past.notes.append(note)
        stream = self._open.get(body["request"])
        if stream is None or body["outcome"] == "running":
            return
        stream.moves.append(body)
        if body["outcome"] == "migrated":
            stream.places.append(Place(t, InstanceId(body["destination"])))

    def _revived(self, t: float, body: dict[str, Any]) -> None:
        note = {"kind": "revive", "target": body["request"], "why": body["why"], "revival": body}
        self.past.notes.append({"t": t, **note})
        if (stream := self._open.get(body["request"])) is not None:
            stream.lives = body["lives_used"]
            stream.places.append(Place(t, InstanceId(body["instance"])))

    def _ended(self, begun_s: float, t: float, body: dict[str, Any]) -> None:
        name = body["request"]
        stream = self._open.pop(name, None)
        if stream is None:  # It was placed before the log began, or without the controller.
            place = Place(begun_s, InstanceId(body["instance"]))
            stream = self.past.by_name[name] = PastStream(
                request=RequestId(name), client_id="", priority=0, prompt=0, begun_s=begun_s,
                places=[place],
            )  # fmt: skip
        stream.client_id, stream.priority = body["client_id"], body["priority"]
        stream.prompt, stream.out = body["prompt_tokens"], body["output_tokens"]
        stream.how, stream.end_s = body["finish_reason"], t
        stream.first_token_s = body.get("first_token_s")


def _pace(streams: Iterable[PastStream]) -> float:
    """Output tokens a second, over all requests that have ended."""
    known = [(s.out or 0, s.end_s - s.begun_s) for s in streams if s.out is not None]
    return sum(out for out, _ in known) / max(1e-6, sum(took_s for _, took_s in known))


class Moment:
    """Walks through a past."""

    def __init__(self, past: Past) -> None:
        self._past = past
        self._t = float("-inf")
        self._next_stream = self._next_change = self._next_note = 0
        self._open: dict[RequestId, PastStream] = {}
        self._statuses: dict[InstanceId, InstanceStatus] = {}
        self._reports: dict[InstanceId, LoadReport] = {}

    def at(self, t: float) -> tuple[Look, Deployment]:
        """What is seen at `t`, which is no earlier than the last one."""
        streams, before = self._past.streams, self._t
        begun, ended = [], []
        while self._next_stream < len(streams) and streams[self._next_stream].begun_s <= t:
            one = streams[self._next_stream]
            self._next_stream += 1
            self._open[one.request] = one
            if one.begun_s > before:
                begun.append(Placed(one.request, one.places[0].instance, one.why))
        for one in [s for s in self._open.values() if s.end_s <= t]:
            del self._open[one.request]
            if one.end_s > before:
                ended.append(Ended(one.request, one.how, one.out or 0, one.first_token_s))
        self._change_until(t)
        upto = bisect_right(self._past.notes, t, key=itemgetter("t"))
        notes, self._next_note = self._past.notes[self._next_note : upto], upto
        self._t = t
        look = Look(
            streams=[s.seen(t, self._past.pace) for s in self._open.values()],
            notes=notes,
            placed=begun,
            ended=ended,
        )
        order = sorted(self._statuses.values(), key=lambda s: (len(s.id), s.id))
        return look, Deployment(order, list(self._reports.values()))

    def _change_until(self, t: float) -> None:
        changes = self._past.changes
        until = bisect_right(changes, t, key=itemgetter(0))
        for _, change in changes[self._next_change : until]:
            match change:
                case LoadReport():
                    self._reports[change.instance] = change
                    if change.engine_index != self._status(change.instance).engine_index:
                        self._set(change.instance, engine_index=change.engine_index)
                case FleetReported():
                    self._fleet(change)
                case RunEnded():
                    self._statuses.clear()
                    self._reports.clear()
                case _:
                    self._noted(change)
        self._next_change = until

    def _status(self, name: InstanceId) -> InstanceStatus:
        if name not in self._statuses:
            self._statuses[name] = InstanceStatus(
                id=name, state="starting", hung=False, engine_index=None, node=None, pid=None,
                devices=[], restarts=0, why=None,
            )  # fmt: skip
        return self._statuses[name]

    def _set(self, name: InstanceId, **news: Any) -> None:
        self._statuses[name] = replace(self._status(name), **news)

    def _fleet(self, fleet: FleetReported) -> None:
        """It is right where notes are missing, as at the beginning of a log whose older files are
        gone."""
        for state, names in (("serving", fleet.serving), ("draining", fleet.draining)):
            for name in names:
                if self._status(name).state != state:
                    self._set(name, state=state)
        there = {*fleet.serving, *fleet.draining}
        for name in [n for n, s in self._statuses.items() if n not in there]:
            if self._statuses[name].state in ("serving", "draining"):
                self._set(name, state="restarting" if fleet.starting else "stopping")

    def _noted(self, note: dict[str, Any]) -> None:
        name, kind = InstanceId(note["target"]), note["kind"]
        state = AFTER.get(kind)
        if state is None:
            if kind in AFTER:
                self._statuses.pop(name, None)
                self._reports.pop(name, None)
            return
        restarts = self._status(name).restarts + (kind == "death")
        self._set(name, state=state, why=note["why"] or None, restarts=restarts)
        if state in ("restarting", "failed"):
            self._reports.pop(name, None)
