"""Decaying means of answer length, step time and copy cost, and the thresholds derived from them.

Rules
- An old observation loses half its weight for every so many new ones.
- Before `ENOUGH_REQUESTS` answers have ended, the paper's fixed thresholds hold.
- Freeness is in decode steps, and so is a threshold. An instance is in trouble if its memory ends
  before enough of its requests do, so that thresholds are shares of the mean answer's length.
"""

from dataclasses import dataclass

from llumnix.core.reports import LoadReport
from llumnix.core.scheduling.tuning import (
    DESTINATION_SHARE,
    ENOUGH_REQUESTS,
    HALF_LIFE_BYTES,
    HALF_LIFE_REQUESTS,
    HALF_LIFE_STEPS,
    PAPER_SCALE_HIGH,
    PAPER_SCALE_LOW,
    PAPER_THRESHOLD,
    SCALE_HIGH_SHARE,
    SCALE_LOW_SHARE,
    SOURCE_MIN_STEPS,
    SOURCE_SHARE,
)
from llumnix.core.settings import MigrationSettings, ScalingSettings


@dataclass(slots=True)
class Mean:
    """A decaying mean: sum and count are halved whenever the count has reached `half_life`."""

    half_life: float
    total: float = 0.0
    count: float = 0.0

    def add(self, total: float, count: float) -> None:
        """Takes in `count` more observations that add up to `total`."""
        if count <= 0:
            return
        self.total += total
        self.count += count
        if self.count >= self.half_life:
            self.total /= 2
            self.count /= 2

    def value(self, default: float) -> float:
        """The mean; `default` before the first observation."""
        return self.total / self.count if self.count else default


class Observed:
    """Means over all instances, fed with each report and the report before it."""

    def __init__(self) -> None:
        self._answers = Mean(HALF_LIFE_REQUESTS)
        self._steps = Mean(HALF_LIFE_STEPS)
        self._moves = Mean(HALF_LIFE_BYTES)
        self._token_bytes = 0

    def take(self, report: LoadReport, before: LoadReport) -> None:
        """Takes in one instance's next report. `before`: the last one of the same run."""
        finished = report.finished - before.finished
        if finished:
            self._answers.add(report.finished_tokens - before.finished_tokens, finished)
        if report.steps != before.steps:
            self._steps.add(report.steps_s - before.steps_s, report.steps - before.steps)
        if report.moved_bytes != before.moved_bytes:
            self._moves.add(
                report.moved_s - before.moved_s, report.moved_bytes - before.moved_bytes
            )
        self._token_bytes = report.kv_token_bytes

    @property
    def answer_tokens(self) -> float | None:
        """Mean length of an answer, in tokens; None before enough answers have ended."""
        return self._answers.value(0) if self._answers.count >= ENOUGH_REQUESTS else None

    @property
    def step_s(self) -> float:
        """Mean duration of an engine's step, in seconds; 0 if none was seen."""
        return self._steps.value(0.0)

    def move_steps_per_token(self) -> float:
        """Decode steps that it takes to copy one token of KV; 0 before the first move."""
        step_s = self.step_s
        return self._moves.value(0.0) * self._token_bytes / step_s if step_s else 0.0

    def migration_thresholds(self, settings: MigrationSettings) -> tuple[float, float]:
        """Freeness, in decode steps, below which an instance is a source, and above which it is a
        destination."""
        return self._bounds(
            (settings.source_below, settings.destination_above),
            (SOURCE_SHARE, DESTINATION_SHARE),
            (PAPER_THRESHOLD, PAPER_THRESHOLD),
        )

    def scaling_thresholds(self, settings: ScalingSettings) -> tuple[float, float]:
        """The bounds of the mean freeness, in decode steps."""
        return self._bounds(
            (settings.freeness_low, settings.freeness_high),
            (SCALE_LOW_SHARE, SCALE_HIGH_SHARE),
            (PAPER_SCALE_LOW, PAPER_SCALE_HIGH),
        )

    def _bounds(
        self,
        given: tuple[float | None, float | None],
        shares: tuple[float, float],
        paper: tuple[float, float],
    ) -> tuple[float, float]:
        """A lower and an upper bound: those `given` if both are, else these `shares` of an answer,
        or the paper's before enough answers have ended."""
        low, high = given
        if low is not None and high is not None:
            return low, high
        answer = self.answer_tokens
        if answer is None:
            return paper
        low = max(SOURCE_MIN_STEPS, shares[0] * answer)
        return low, low * shares[1] / shares[0]
