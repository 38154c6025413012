"""A plugin of vLLM's for tests: requests of which every engine dies.

One with `AT_ONCE` in its prompt ends its engine in the step that computes the prompt, one with
`LATER` as it is to compute the token after its fifth. With `HANGS` that step never ends.
"""

import time
from pathlib import Path
from typing import Any

AT_ONCE, LATER, HANGS = 511, 510, 509
METADATA = "Metadata-Version: 2.1\nName: poison\nVersion: 0\n"
ENTRY = "[vllm.general_plugins]\npoison = support.poison:install\n"


def as_plugin(folder: Path) -> str:
    """Puts into the folder what makes Python find the plugin; returns the PYTHONPATH for it."""
    found = folder / "poison-0.dist-info"
    found.mkdir()
    (found / "METADATA").write_text(METADATA)
    (found / "entry_points.txt").write_text(ENTRY)
    return f"{folder}:{Path(__file__).parents[1]}"


def install() -> None:
    """Called by vLLM in every process of its own."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    execute = GPUModelRunner.execute_model

    def execute_model(self: Any, batch: Any, *args: Any, **options: Any) -> Any:
        for new in batch.scheduled_new_reqs:
            if AT_ONCE in (new.prompt_token_ids or ()):
                raise RuntimeError("poison")
        cached = batch.scheduled_cached_reqs
        for name, outputs in zip(cached.req_ids, cached.num_output_tokens, strict=True):
            known = self.requests.get(name)
            prompt = (known is not None and known.prompt_token_ids) or ()
            if outputs >= 5 and LATER in prompt:
                raise RuntimeError("poison")
            if outputs >= 5 and HANGS in prompt:
                time.sleep(3600)
        return execute(self, batch, *args, **options)

    GPUModelRunner.execute_model = execute_model
