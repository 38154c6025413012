"""Decides whether an engine that lives is hung.

Rules
- An engine that has requests and has completed no step for `STALLED_AFTER_S` is hung. Its process
  still reports; a first long prompt may take that long too, so its streams are left alone.
- An engine whose reports cease altogether is hung after `SILENT_LOOKS`. Its streams are ended once
  its process was seen stopped in `STOPPED_LOOKS` looks in a row, or after `LOST_LOOKS` in any case.
- Silence is counted in looks, not in seconds, because a watcher that stood still itself has seen
  nothing meanwhile.
- A new report makes it healthy again.
"""

from dataclasses import dataclass, field

from llumnix.core.limits import STALLED_AFTER_S

LOOK_EVERY_S = 0.25
SILENT_LOOKS = 4
STOPPED_LOOKS = 3
LOST_LOOKS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What the reports of an engine say of it."""

    hung: str | None = None  # why it counts as hung, if it does
    lost: bool = False  # whether the requests that it holds are lost


@dataclass(slots=True, kw_only=True)
class HangPolicy:
    """Follows the reports of one run."""

    sequence: int | None = None  # of the newest report
    reported: Health = field(default_factory=Health)  # what the newest report says
    silent_looks: int = 0  # looks since the newest report
    stopped_looks: int = 0  # those of them, in a row, that saw its process stopped

    def look(self, sequence: int | None, stalled_s: float, *, stopped: bool) -> Health:
        """Takes in one look. `sequence` is that of the newest report, None if there is none, and
        `stalled_s` is what it says. `stopped` says whether the process is seen to be stopped."""
        if sequence is not None and sequence != self.sequence:
            self.sequence, self.silent_looks, self.stopped_looks = sequence, 0, 0
            self.reported = Health()
            if stalled_s > STALLED_AFTER_S:
                self.reported = Health(hung=f"no step for {stalled_s:.0f} s, and it has requests")
            return self.reported
        if self.sequence is None:
            return self.reported  # Nothing yet.
        self.silent_looks += 1
        self.stopped_looks = self.stopped_looks + 1 if stopped else 0
        if self.silent_looks < SILENT_LOOKS:
            return self.reported
        lost = self.stopped_looks >= STOPPED_LOOKS or self.silent_looks >= LOST_LOOKS
        what = "its process is stopped" if self.stopped_looks else "its process reports nothing"
        return Health(hung=what, lost=lost)
