"""Decides whether an engine that lives does nothing, and when it is to be ended for that: fenced.

Rules
- An engine of which a process is stopped (SIGSTOP), its own or a worker's, in `STANDSTILL_LOOKS`
  looks in a row is fenced. So is one of which a process has ended: vLLM may take its time with the
  others before it says so. A look that comes late starts over, since the host slept.
- An engine that has requests and has completed no step for `STALLED_AFTER_S` is hung. It may be at
  a long prompt, so it is fenced only after `stall_s`, if given. Otherwise after `STALL_S`, or 20
  times the longest step of the last minute if that is longer, or `PROMPT_STALL_S` if the step may
  compute a prompt. Before a run's first step has ended it may take `FIRST_STEP_S` in any case. An
  engine that is paused, or carries out a call, is exempt.
- An engine whose reports cease is hung after `SILENT_LOOKS`. It is fenced after `LOST_LOOKS` in
  which neither a report nor an output of it came; if it carried out a call, or has yet to report
  for the first time, after `CALL_LOOKS`.
- An engine that reports no request is fenced if a frontend has had one there for `EMPTY_LOOKS` in
  which no output came: the connection between them broke, and a message was lost with it.
- Silence is counted in looks, not in seconds, because a watcher that stood still itself has seen
  nothing meanwhile.
- A stall is blamed on the requests that run. Silence, a stop and a lost message are not.
- A new report makes it healthy again.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from llumnix.core.limits import STALLED_AFTER_S
from llumnix.core.reports import LoadReport
from llumnix.core.supervision.blame import Fenced

LOOK_EVERY_S = 0.25
LATE_S = 1.0
STANDSTILL_LOOKS = 3
SILENT_LOOKS = 4
LOST_LOOKS = 20
CALL_LOOKS = 480
EMPTY_LOOKS = 160
"""A frontend that stands still takes no outputs in meanwhile. It is ended within 30 s."""
HOST_LOST_LOOKS = 8
"""All engines of a host, and its watcher too, must be silent for so many looks before the host is
lost. A link that is down for 1 s costs 1.4 s: TCP sends again after 0.2, 0.6 and 1.4 s."""
STALL_S = 10.0
STALL_STEPS = 20
PROMPT_STALL_S = 60.0
FIRST_STEP_S = 120.0
MINUTE_LOOKS = 240

STOPPED = "T"
"""As the kernel calls the state of a process that got a SIGSTOP. One that a debugger holds is
called `t`."""
GONE = "X"
ENDED = (GONE, "Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Standstill:
    """A process of an engine that does nothing any more."""

    pid: int
    gone: bool  # whether it has ended, and not only stopped


@dataclass(slots=True, kw_only=True)
class StopPolicy:
    """Follows the states of one engine's processes."""

    looked_s: float | None = None
    looks: dict[Standstill, int] = field(default_factory=dict)  # so many in a row saw this

    def look(self, now_s: float, states: Mapping[int, str]) -> Standstill | None:
        """Takes in one look. Returns what keeps the engine from going on, if something does."""
        late = self.looked_s is not None and now_s - self.looked_s > LATE_S
        before, self.looked_s, self.looks = self.looks, now_s, {}
        if late:
            return None
        for pid, state in states.items():
            if state == STOPPED or state in ENDED:
                seen = Standstill(pid=pid, gone=state in ENDED)
                self.looks[seen] = before.get(seen, 0) + 1
        return next((s for s, looks in self.looks.items() if looks >= STANDSTILL_LOOKS), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What is known of an engine that lives."""

    hung: str | None = None  # why it counts as hung, if it does
    silent: bool = False  # whether it does not report
    fence: Fenced | None = None  # why it is to be ended, if it is


@dataclass(slots=True, kw_only=True)
class HangPolicy:
    """Follows the reports of one run."""

    stall_s: float | None = None  # the user's, for all stalls but that of a first step
    newest: LoadReport | None = None
    silent_looks: int = 0  # looks since the newest report
    unheard_looks: int = 0  # those in a row in which neither a report nor an output came
    empty_looks: int = 0  # those in a row in which it knew of no request, though a frontend did
    longest_s: deque[float] = field(default_factory=lambda: deque(maxlen=MINUTE_LOOKS))
    """The longest step that ended before each look."""

    def look(
        self, report: LoadReport | None, *, paused: bool, heard: bool, owned: int = 0
    ) -> Health:
        """Takes in one look: the newest report, None if there is none. `paused`: whether it stands
        still on purpose. `heard`: whether outputs came since the look before. `owned`: the requests
        that frontends have there."""
        newest = self.newest
        if report is not None and (newest is None or report.sequence != newest.sequence):
            self._note_step(report)
            self.newest, self.silent_looks, self.unheard_looks = report, 0, 0
            self._note_empty(report, counts=owned > 0 and not heard and not paused)
            return self._reported(report, paused)
        self.unheard_looks = 0 if heard else self.unheard_looks + 1
        self.silent_looks += 1
        if newest is not None and self.silent_looks < SILENT_LOOKS:
            return self._reported(newest, paused)
        patient = newest is None or newest.in_call
        lost = self.unheard_looks >= (CALL_LOOKS if patient else LOST_LOOKS)
        if newest is None and not lost:
            return Health()  # Nothing yet.
        what = "its process reports nothing"
        return Health(
            hung=what,
            silent=True,
            fence=Fenced(why=what, blamed=False) if lost else None,
        )

    def _note_empty(self, report: LoadReport, *, counts: bool) -> None:
        known = report.running + report.waiting + report.moving_in + report.moving_out
        self.empty_looks = self.empty_looks + 1 if counts and not known else 0

    def _reported(self, report: LoadReport, paused: bool) -> Health:
        if self.empty_looks >= EMPTY_LOOKS:
            what = "it does not know of requests that it was given"
            return Health(hung=what, fence=Fenced(why=what, blamed=False))
        stalled_s = report.stalled_s
        if paused or stalled_s <= STALLED_AFTER_S:
            return Health()
        what = f"no step for {stalled_s:.0f} s, and it has requests"
        fence = not report.in_call and stalled_s > self._patience_s(report)
        return Health(hung=what, fence=Fenced(why=what, blamed=True) if fence else None)

    def _patience_s(self, report: LoadReport) -> float:
        """How long its present step may take."""
        prompts = report.prefill_tokens > 0 or report.waiting > 0
        patience_s = self.stall_s
        if patience_s is None:
            longest_s = max(self.longest_s, default=0.0)
            least_s = PROMPT_STALL_S if prompts else STALL_S
            patience_s = max(least_s, STALL_STEPS * longest_s)
        return patience_s if report.steps else max(patience_s, FIRST_STEP_S)

    def _note_step(self, report: LoadReport) -> None:
        """Remembers how long the steps took that have ended since the newest report. While the
        engine stands still nothing is forgotten: it is measured by the minute before."""
        before = self.newest
        if report.stalled_s > STALLED_AFTER_S:
            return
        took_s = 0.0
        # The first step may compile, and says nothing of the next.
        if before is not None and before.steps and report.steps > before.steps:
            mean_s = (report.steps_s - before.steps_s) / (report.steps - before.steps)
            took_s = max(mean_s, 0.0 if before.in_call else before.stalled_s)
        self.longest_s.append(took_s)
