"""vLLM's CPU worker with just enough of CUDA pretended that asynchronous scheduling runs on it.

vLLM turns asynchronous scheduling off on CPUs. With streams and events that do nothing (all work is
done when a call returns) its code path runs all the same: a batch ahead, output placeholders.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker


class _DoesNothing:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@contextlib.contextmanager
def _no_stream(*_: Any, **__: Any) -> Iterator[None]:
    yield


torch.cuda.Stream = _DoesNothing  # type: ignore[misc,assignment]
torch.cuda.Event = _DoesNothing  # type: ignore[misc,assignment]
torch.cuda.current_stream = lambda *_, **__: _DoesNothing()  # type: ignore[assignment]
torch.cuda.stream = _no_stream  # type: ignore[misc,assignment]


class AsyncCpuWorker(CPUWorker):
    """The worker that `worker_cls` names."""
