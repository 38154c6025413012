"""An engine's clock, read as ours.

An engine stamps what it says with its host's monotonic clock, which counts from when that host was
started. vLLM takes differences of such stamps for inter-token latency, prefill and decode time, and
keeps a request on one engine. A request that moves between hosts has stamps of both.

vLLM 0.32 internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`EngineCoreOutputs.timestamp` and the `timestamp` of each of an output's `events` are the engine's
`time.monotonic()`, in seconds.
"""

import math

from vllm.v1.engine import EngineCoreOutputs

WINDOW_S = 60.0
"""Clocks of two hosts drift by some 10 µs a second: 0.6 ms in this time."""
ONE_CLOCK_S = 1.0
"""A message is no longer on its way than this. One that seems to be has another clock's stamp."""


class EngineClock:
    """The difference between an engine's clock and ours is taken from the message that was fastest
    within the last one to two windows: what it seems to have been on its way is the difference."""

    def __init__(self) -> None:
        self._since_s = -math.inf
        self._least_s = self._least_before_s = math.inf

    def translate(self, outputs: EngineCoreOutputs, now_s: float) -> None:
        """Rewrites the stamps in terms of our clock, in place. `now_s`: ours, in seconds."""
        ahead_s = self._ahead_s(now_s - outputs.timestamp, now_s)
        if not ahead_s:
            return
        outputs.timestamp += ahead_s
        for output in outputs.outputs:
            for event in output.events or ():
                event.timestamp += ahead_s

    def _ahead_s(self, seems_s: float, now_s: float) -> float:
        if now_s - self._since_s > WINDOW_S:
            self._since_s, self._least_before_s = now_s, self._least_s
            self._least_s = math.inf
        self._least_s = min(self._least_s, seems_s)
        least_s = min(self._least_s, self._least_before_s)
        return 0.0 if 0.0 <= least_s < ONE_CLOCK_S else least_s
