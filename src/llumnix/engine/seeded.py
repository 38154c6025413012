"""Keeps seeded requests on CPU workers alive while their prompts are computed in chunks.

After every chunk of a prompt vLLM draws a token, throws it away and turns the request's generator
back by its offset. A CPU's generator has no offset. Turning it back raises, and the engine ends
with all its requests. Here no token is drawn from a request's own generator before its last chunk,
so that nothing has to be turned back.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes): model
runner V1 draws in `_sample`, with the generators of `input_batch.generators`, one dictionary from
step to step, by the request's index. In `_bookkeeping_sync`, which follows in the same step, it
turns back those of them whose index `discard_request_mask` marks.
"""

from typing import Any

import numpy as np


def keep_generators(runner: Any) -> None:
    """From now on this runner leaves a generator alone while its request is in the middle of its
    prompt."""
    sample, settle = runner._sample, runner._bookkeeping_sync
    aside: dict[int, Any] = {}

    def _sample(*args: Any, **more: Any) -> Any:
        batch = runner.input_batch
        for index in np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0]:
            generator = batch.generators.pop(int(index), None)
            if generator is not None:
                aside[int(index)] = generator
        return sample(*args, **more)

    def _bookkeeping_sync(*args: Any, **more: Any) -> Any:
        settled = settle(*args, **more)
        runner.input_batch.generators.update(aside)
        aside.clear()
        return settled

    runner._sample, runner._bookkeeping_sync = _sample, _bookkeeping_sync
