"""The deployment as the page shows it, and what has changed in it from one look to the next.

Pure, but for the number of its first look, which is drawn: a look, the instances and their reports
go in, messages come out. docs/operating.md lists the messages. A request is named by `k`, a small
number that is never used twice.

A frontend does not see which of its requests wait in an engine's queue; the report says how many of
each class do. So of the requests without a token the youngest are shown as waiting.
"""

import secrets
from collections import deque
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from llumnix.core.priorities import Priorities
from llumnix.core.reports import LoadReport
from llumnix.core.scheduling.headroom import Freeness, freeness_now
from llumnix.core.supervision.lifecycle import InstanceStatus
from llumnix.core.types import InstanceId, RequestId
from llumnix.frontend.streams.look import Ended, Look, Placed, SeenStream

ROWS_MAX = 4000
"""So many requests are shown one by one; the rest are counted by instance."""
DISPATCHES_SHOWN = 5
"""Of the requests placed since the last look so many are told; of the rest how many they were."""
FIRST_SEQ_MAX = 2**52
"""JavaScript's numbers are exact up to twice that."""
HISTORY_KEPT = 500
HISTORY_S = 600.0
RATES_EVERY_S = 1.0
RATES_OVER_S = 5.0
FIRST_TOKENS_OVER_S = 60.0
FIRST_TOKENS_KEPT = 2000

WAITS, PROMPT, DECODES, ORPHAN = "w", "p", "d", "o"
"""What a request does: it waits, its prompt is computed, it has tokens, its instance has died."""


class Message(NamedTuple):
    """One event of the feed."""

    event: str
    data: dict[str, Any]


class Deployment(NamedTuple):
    """What is seen of the instances at the moment of a look."""

    statuses: Sequence[InstanceStatus]
    reports: Sequence[LoadReport] | None  # None: the controller does not answer

    def of(self, instance: InstanceId) -> "Deployment":
        """That one alone."""
        reports = self.reports and [r for r in self.reports if r.instance == instance]
        return Deployment([s for s in self.statuses if s.id == instance], reports)


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """A request that is shown."""

    k: int
    request: RequestId
    client_id: str
    instance: InstanceId
    rank: int
    phase: str
    prompt: int
    out: int
    born_s: float
    told: int  # of its output tokens the watchers know so many
    seen: int  # the look that saw it last

    def shown(self, now_s: float) -> list[Any]:
        """As in the messages `state` and `delta`."""
        return [
            self.k, self.instance, self.rank, self.phase, self.prompt, self.out,
            round(now_s - self.born_s, 1), self.client_id, self.request,
        ]  # fmt: skip


class Rates:
    """Requests and tokens a second, and how long clients waited for the first token."""

    def __init__(self) -> None:
        self._ended = 0
        self._ended_tokens = 0
        self._marks: deque[tuple[float, int, int]] = deque()
        self._waits: deque[tuple[float, float]] = deque(maxlen=FIRST_TOKENS_KEPT)

    def take(self, ended: Iterable[Ended], open_tokens: int, now_s: float) -> None:
        """What a look has seen. `open_tokens`: output tokens of all streams that are open."""
        for end in ended:
            self._ended += 1
            self._ended_tokens += end.tokens
            if end.first_token_s is not None:
                self._waits.append((now_s, end.first_token_s))
        self._marks.append((now_s, self._ended, self._ended_tokens + open_tokens))
        while self._marks[0][0] < now_s - RATES_OVER_S:
            self._marks.popleft()
        while self._waits and self._waits[0][0] < now_s - FIRST_TOKENS_OVER_S:
            self._waits.popleft()

    def shown(self) -> dict[str, Any]:
        """As in the message `delta`."""
        (began_s, requests, tokens), (now_s, *now) = self._marks[0], self._marks[-1]
        over_s = max(now_s - began_s, 1e-3)
        waits = sorted(s * 1e3 for _, s in self._waits)
        return {
            "req_s": round(max(0, now[0] - requests) / over_s, 1),
            "tok_s": round(max(0, now[1] - tokens) / over_s),
            "ttft_ms": [round(waits[int(len(waits) * p)], 1) for p in (0.5, 0.99)] if waits else [],
        }


class Picture:
    """All that the page shows."""

    def __init__(self, priorities: Priorities) -> None:
        self._priorities = priorities
        self._rows: dict[RequestId, Row] = {}
        self._instances: dict[InstanceId, dict[str, Any]] = {}
        self._deployment: Deployment | None = None  # the last one
        self._more: dict[InstanceId, list[int]] = {}
        self._rates = Rates()
        self._rates_at_s = float("-inf")
        self._history: deque[Message] = deque(maxlen=HISTORY_KEPT)
        self._up = True
        self._frontends = 1
        self._next_k = 0
        # Of the last look. It begins anywhere, so that no two pictures share one: those of several
        # processes, or of all instances and of one, may begin at the same moment.
        self.seq = 0

    @property
    def requests(self) -> Container[RequestId]:
        """Those that it shows."""
        return self._rows.keys()

    # -- what a watcher who comes now is told

    def whole(self, now_s: float) -> list[Message]:
        """All that there is."""
        state = {
            "seq": self.seq,
            "t": now_s,
            "controller": self._controller(),
            "frontends": self._frontends,
            "instances": self._instances,
            "requests": [row.shown(now_s) for row in self._rows.values()],
            "more": self._more,
            "rates": self._rates.shown() if self.seq else {},
        }
        return [Message("state", state)]

    def history(self, now_s: float) -> Message:
        """What has happened in the last ten minutes."""
        recent = [m for m in self._history if m.data["t"] > now_s - HISTORY_S]
        return Message("history", {"events": [{"event": m.event, **m.data} for m in recent]})

    # -- what has changed

    def take(self, look: Look, deployment: Deployment, now_s: float) -> list[Message]:
        """Takes a look in; returns what those are told who know all before it. `now_s`: the wall
        clock. The first look tells nothing: all of it is history."""
        first = not self.seq
        self.seq = self.seq + 1 if self.seq else 1 + secrets.randbelow(FIRST_SEQ_MAX)
        delta: dict[str, Any] = {"seq": self.seq, "t": now_s}
        self._take_instances(deployment, delta)
        closed = {end.request: end.how for end in look.ended}
        ks = {request: row.k for request, row in self._rows.items() if request in closed}
        self._take_streams(look.streams, deployment.reports or (), now_s, delta)
        self._close(closed, delta)
        self._rates.take(look.ended, sum(s.output_tokens for s in look.streams), now_s)
        self._frontends = look.frontends
        if now_s >= self._rates_at_s + RATES_EVERY_S:
            self._rates_at_s = now_s
            delta |= {"rates": self._rates.shown(), "out": self._news_of_tokens()}
            delta |= {"controller": self._controller(), "frontends": look.frontends}
        told = [self._noted(note, ks) for note in look.notes]
        told += self._controller_changed(deployment, now_s)
        self._history.extend(m for m in told if m.data.get("phase") != "begun")
        if first:
            return []
        changed = [Message("delta", delta)] if len(delta) > 2 else []
        return changed + told + self._placed(look.placed, now_s)

    def _controller(self) -> str:
        return "up" if self._up else "bypassed"

    def _take_instances(self, deployment: Deployment, delta: dict[str, Any]) -> None:
        if deployment is self._deployment:
            return
        self._deployment = deployment
        reports = {(r.instance, r.engine_index): r for r in deployment.reports or ()}
        freeness = freeness_now(self._priorities, reports.values())
        there: dict[InstanceId, dict[str, Any]] = {}
        changes: dict[InstanceId, dict[str, Any] | None] = {}
        for status in deployment.statuses:
            run = status.engine_index
            report = None if run is None else reports.get((status.id, run))
            before = self._instances.get(status.id, {})
            load = _load(report, freeness)
            if deployment.reports is None and before:
                load = {name: before[name] for name in load}
            now = {
                "state": status.state,
                "node": status.node,
                "restarts": status.restarts,
                "why": status.why,
                **load,
            }
            there[status.id] = now
            news = {name: value for name, value in now.items() if before.get(name, ...) != value}
            if news:
                changes[status.id] = news
        changes |= {name: None for name in self._instances if name not in there}
        self._instances = there
        if changes:
            delta["instances"] = changes

    def _take_streams(
        self,
        streams: Iterable[SeenStream],
        reports: Iterable[LoadReport],
        now_s: float,
        delta: dict[str, Any],
    ) -> None:
        waiting = {
            (report.instance, rank): load.waiting
            for report in reports
            for rank, load in enumerate(report.classes)
            if load.waiting
        }
        more: dict[InstanceId, list[int]] = {}
        opened: list[Row] = []
        moved: list[list[Any]] = []
        # The youngest first, since those are the ones that wait.
        for stream in sorted(streams, key=lambda s: s.age_s) if waiting else streams:
            row = self._rows.get(stream.request)
            phase = DECODES if stream.output_tokens else PROMPT
            if stream.orphan:
                phase = ORPHAN
            elif phase == PROMPT and waiting:
                place = stream.instance, self._priorities.rank(stream.priority)
                if waiting.get(place, 0) > 0:
                    waiting[place] -= 1
                    phase = WAITS
            if row is None:
                if len(self._rows) >= ROWS_MAX:
                    count = more.setdefault(stream.instance, [0, 0])
                    count[0] += 1
                    count[1] += stream.prompt_tokens + stream.output_tokens
                    continue
                opened.append(self._open(stream, phase, now_s))
                continue
            row.seen, row.out = self.seq, stream.output_tokens
            if row.instance != stream.instance or row.phase != phase:
                row.instance, row.phase = stream.instance, phase
                moved.append([row.k, row.instance, phase, row.out])
                row.told = row.out
        if opened:
            delta["open"] = [row.shown(now_s) for row in opened]
        if moved:
            delta["moved"] = moved
        if more != self._more:
            delta["more"] = self._more = more

    def _open(self, stream: SeenStream, phase: str, now_s: float) -> Row:
        row = Row(
            k=self._next_k,
            request=stream.request,
            client_id=stream.client_id,
            instance=stream.instance,
            rank=self._priorities.rank(stream.priority),
            phase=phase,
            prompt=stream.prompt_tokens,
            out=stream.output_tokens,
            born_s=now_s - stream.age_s,
            told=stream.output_tokens,
            seen=self.seq,
        )
        self._next_k += 1
        self._rows[stream.request] = row
        return row

    def _close(self, closed: dict[RequestId, str], delta: dict[str, Any]) -> None:
        over = [row for row in self._rows.values() if row.seen != self.seq]
        for row in over:
            del self._rows[row.request]
        if over:
            delta["close"] = [[row.k, closed.get(row.request, "")] for row in over]

    def _news_of_tokens(self) -> list[list[int]]:
        news = [row for row in self._rows.values() if row.out != row.told]
        for row in news:
            row.told = row.out
        return [[row.k, row.out] for row in news]

    # -- what happened

    def _noted(self, note: dict[str, Any], ks: dict[RequestId, int]) -> Message:
        """A note of a process as the page gets it. `ks`: of requests that have just ended."""
        row = self._rows.get(RequestId(note["target"]))
        k = row.k if row is not None else ks.get(RequestId(note["target"]))
        if note["kind"] != "move":
            more = note.get("revival", {})
            told = {name: more[name] for name in ("instance", "client_id", "gap_s") if name in more}
            shown = {name: note[name] for name in ("t", "kind", "target", "why")}
            return Message("decision", {**shown, "k": k, **told})
        move = note["move"]
        stages = move["stages"]
        return Message(
            "move",
            {
                "t": note["t"],
                "id": move["id"],
                "k": k,
                "request": move["request_id"],
                "from": move["source"],
                "to": move["destination"],
                "phase": "begun" if move["outcome"] == "running" else "ended",
                "outcome": move["outcome"],
                "stages": len(stages),
                "tokens": sum(s["tokens"] for s in stages),
                "bytes": sum(s["bytes"] for s in stages),
                "downtime_ms": move["downtime_ms"],
                "reason": move["reason"],
                "why": move["why"],
            },
        )

    def _controller_changed(self, deployment: Deployment, now_s: float) -> list[Message]:
        up = deployment.reports is not None
        if up == self._up:
            return []
        self._up = up
        kind, why = ("back", "it places requests again") if up else ("bypass", "it does not answer")
        note = {"t": now_s, "kind": kind, "target": "controller", "why": why, "k": None}
        return [Message("decision", note)]

    def _placed(self, placed: Sequence[Placed], now_s: float) -> list[Message]:
        told = [
            Message("decision", {"t": now_s, "kind": "dispatch", "k": row.k, **_dispatch(one)})
            for one in placed
            if (row := self._rows.get(one.request)) is not None
        ][:DISPATCHES_SHOWN]
        if (rest := len(placed) - len(told)) > 0:
            told.append(Message("decision", {"t": now_s, "kind": "dispatches", "count": rest}))
        return told


def _dispatch(one: Placed) -> dict[str, Any]:
    return {"target": one.instance, "request": one.request, "why": one.why}


def greeting(priorities: Priorities, **known: Any) -> Message:
    """The first message that a watcher gets."""
    classes = [asdict(c) for c in priorities.classes]
    shown = [{"name": c["name"], "priority": c["priority"]} for c in classes]
    return Message("hello", {"v": 1, "classes": shown, **known})


def _load(report: LoadReport | None, freeness: Freeness) -> dict[str, Any]:
    if report is None:
        return {"kv": 0, "cap": 0, "free": None, "run": [], "wait": []}
    free = freeness.get((report.instance, report.engine_index))
    return {
        "kv": report.kv_tokens_used,
        "cap": report.kv_tokens_total,
        "free": None if free is None else round(free),
        "run": [c.running for c in report.classes],
        "wait": [c.waiting for c in report.classes],
    }
