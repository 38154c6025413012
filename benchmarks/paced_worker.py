"""vLLM's CPU worker whose steps take as long as those of a given GPU: `--worker-cls`.

The model is real and so is all else; a step that is done sleeps until its modelled time is over, as
the cores would while a GPU works. Several engines then share a few cores without one slowing
another down, which makes comparisons of policies repeatable. The paper did likewise for its largest
clusters, where "execution" is a sleep too.

`LLUMNIX_PACE`: `step,request,prompt,context`: milliseconds of a step, and more for each request
that is computed in it, each token of a prompt (beyond one a request), and each token of KV read.
"""

import os
import time
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


class PacedWorker(CPUWorker):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        pace = (float(x) / 1000 for x in os.environ["LLUMNIX_PACE"].split(","))
        self._step_s, self._request_s, self._prompt_s, self._context_s = pace

    def execute_model(self, scheduler_output: Any) -> Any:
        began = time.perf_counter()
        output = super().execute_model(scheduler_output)
        computed = scheduler_output.total_num_scheduled_tokens
        if computed:
            requests = len(scheduler_output.num_scheduled_tokens)
            context = computed + sum(scheduler_output.scheduled_cached_reqs.num_computed_tokens)
            context += sum(r.num_computed_tokens for r in scheduler_output.scheduled_new_reqs)
            wanted_s = (
                self._step_s
                + self._request_s * requests
                + self._prompt_s * (computed - requests)
                + self._context_s * context
            )
            time.sleep(max(0.0, began + wanted_s - time.perf_counter()))
        return output
