"""Translates the time stamps of an engine to the frontend's clock.

An engine stamps its outputs with its host's monotonic clock, which counts from the start of that
host. vLLM subtracts such stamps to get inter-token latency, prefill and decode time; in vLLM a
request stays on one engine. Here it may move between hosts, and then has stamps of two clocks.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`EngineCoreOutputs.timestamp` and the `timestamp` of each of an output's `events` are the engine's
`time.monotonic()`, in seconds.
"""

import math

from vllm.v1.engine import EngineCoreOutputs

WINDOW_S = 60.0
"""Clocks of two hosts drift by some 10 µs a second: 0.6 ms in this time."""
ONE_CLOCK_S = 1.0
"""No message takes longer than this. If one seems to, its stamp is of another clock."""


class EngineClock:
    """Follows the difference between one engine's clock and ours.

    The difference is the time that the fastest message of the last one to two windows seems to have
    taken."""

    def __init__(self) -> None:
        self.heard_s = -math.inf  # when outputs came last
        self._since_s = -math.inf
        self._least_s = self._least_before_s = math.inf

    def translate(self, outputs: EngineCoreOutputs, now_s: float) -> None:
        """Rewrites the stamps to our clock, in place. `now_s` is the time on our clock."""
        self.heard_s = now_s
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
