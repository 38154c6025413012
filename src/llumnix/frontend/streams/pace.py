"""Joins tokens to longer chunks while this process cannot keep up.

A token costs the process as much as its chunk does, and less than half if it shares one. So where
the event loop runs late, streams get a chunk for every 2, 4, 8 tokens, until it runs on time again.
A stream's first token is sent at once all the same, and none later than with its last.

The loop may be late because others use the cores. Joining would not help then, so it counts only if
the loop itself is busy. Nor does it count while no stream could be joined, as at a start's end.

vLLM internals relied on here (tests/frontend/test_pace.py fails when one changes):
- `OutputProcessor.request_states` has each open request's state. One that streams deltas
  (`output_kind`) sends an output when `stream_interval` tokens have come since the last one, or it
  is its first or last. With an interval of 1 it keeps no account of what it has sent
  (`sent_tokens_offset`), and sends the newest tokens alone.
- Its `detokenizer` counts its tokens (`num_output_tokens()`).
- A session of streamed inputs (`streaming_input`) counts otherwise, so it is left alone.
"""

import asyncio
import logging
import time
from collections.abc import Iterator

from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

logger = logging.getLogger("llumnix.frontend")

LOOK_EVERY_S = 0.05
LATE_S = 0.01
"""A loop that comes so much later than it was asked to is late."""
BUSY = 0.6
"""The share of a core that a busy loop takes."""
LATE_LOOKS = 2
"""Looks in a row that find it late and busy, before chunks get longer."""
CALM_LOOKS = 40
"""Looks in a row that find it neither, before they get shorter."""
TELL_EVERY_S = 60.0


class StreamPace:
    """How many tokens the streams of one output processor join at most: 1, 2, 4, … up to
    `interval_max`. A request that asked vLLM for more has more."""

    def __init__(self, processor: OutputProcessor, interval_max: int) -> None:
        self.interval = 1
        self._processor = processor
        self._interval_max = interval_max
        self._late = self._calm = 0
        self._own: dict[str, int] = {}  # what a request came with, of those that were changed
        self._told_s = -TELL_EVERY_S

    async def run(self) -> None:
        """Follows the event loop for ever."""
        loop = asyncio.get_running_loop()
        while True:
            due_s, began_s = loop.time() + LOOK_EVERY_S, time.thread_time()
            await asyncio.sleep(LOOK_EVERY_S)
            late_s = loop.time() - due_s
            self.look(late_s, (time.thread_time() - began_s) / (LOOK_EVERY_S + late_s))

    def look(self, late_s: float, busy: float) -> None:
        """Takes in how late the loop came, and the share of a core that it took since."""
        late = late_s > LATE_S and busy > BUSY and self._has_streams()
        self._late, self._calm = (self._late + 1, 0) if late else (0, self._calm + 1)
        if self._late >= LATE_LOOKS and self.interval * 2 <= self._interval_max:
            self.interval, self._late = self.interval * 2, 0
            self._tell(late_s)
        elif self._calm >= CALM_LOOKS and self.interval > 1:
            self.interval, self._calm = self.interval // 2, 0
        if self.interval > 1 or self._own:
            self._own = dict(self._set())

    def _has_streams(self) -> bool:
        return any(map(_can_join, self._processor.request_states.values()))

    def _set(self) -> Iterator[tuple[str, int]]:
        """Gives each stream its interval; yields those that must be looked at again."""
        for name, state in self._processor.request_states.items():
            if _can_join(state):
                own = self._own.get(name, state.stream_interval)
                if not _set_interval(state, max(own, self.interval)):
                    yield name, own

    def _tell(self, late_s: float) -> None:
        now_s = time.monotonic()
        if now_s - self._told_s >= TELL_EVERY_S:
            self._told_s = now_s
            logger.warning(
                "This process is late by %.0f ms: the chunks of its streams join up to %d tokens.",
                late_s * 1000,
                self.interval,
            )


def _can_join(state: RequestState) -> bool:
    return state.output_kind is RequestOutputKind.DELTA and not state.streaming_input


def _set_interval(state: RequestState, interval: int) -> bool:
    """Returns whether the state has its own interval back, so that it may be forgotten."""
    assert state.detokenizer is not None
    count = state.detokenizer.num_output_tokens()
    if state.stream_interval == 1 and interval > 1:
        state.sent_tokens_offset = count  # It has sent all, without an account.
    elif interval == 1 < state.stream_interval and state.sent_tokens_offset < count:
        interval = 2  # Tokens wait, and with 1 they would never be sent.
    state.stream_interval = interval
    return interval == 1
