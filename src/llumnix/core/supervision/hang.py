"""Whether an engine that has not died does nothing all the same.

Rules
- An engine that has requests and has completed no step for `STALLED_AFTER_S` is hung. Its process
  still reports; a first long prompt may take that long too, so its streams are left alone.
- An engine whose reports cease altogether is hung after `SILENT_LOOKS`. Its streams are ended once
  its process was seen stopped in `STOPPED_LOOKS` looks in a row, or after `LOST_LOOKS` in any case.
- Silence is counted in looks at what it reported, not in seconds: an observer that stood still
  itself has seen nothing meanwhile.
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
    """What the reports of an engine say of it. `hung`: why it counts as hung, if it does. `lost`:
    nothing more is to be expected of the requests that it holds."""

    hung: str | None = None
    lost: bool = False


@dataclass(slots=True, kw_only=True)
class HangPolicy:
    """Of one run of one engine."""

    sequence: int | None = None  # of its newest report
    reported: Health = field(default_factory=Health)  # what that one says
    silent_looks: int = 0  # since that one came
    stopped_looks: int = 0

    def look(self, sequence: int | None, stalled_s: float, *, stopped: bool) -> Health:
        """Takes in one look. `sequence`: of the newest report that is known, None if none is;
        `stalled_s`: as it says; `stopped`: whether its process is seen to be stopped."""
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
