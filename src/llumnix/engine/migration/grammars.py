"""Compiles the grammars of requests that move in, away from the engine's thread.

vLLM internals relied on here (tests/house/test_vllm_migration_contract.py fails when one
changes): `StructuredOutputManager.grammar_init` builds the one backend at its first call, which may
take long (tables of the whole vocabulary). Then it has the grammar compiled on `executor`, a pool
of threads, and leaves a future of it in `request.structured_output_request.grammar`. The engine
core calls it on the thread that takes requests in.
"""

import threading
from concurrent.futures import Future
from typing import Any

from vllm.v1.request import Request


class Grammars:
    """Those of one engine core."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        if not hasattr(manager, "llumnix_lock"):
            self._one_at_a_time()

    def _one_at_a_time(self) -> None:
        """Lets one thread at a time in. The engine core's own thread may call it too, and both
        would build the backend."""
        lock, init = threading.Lock(), self._manager.grammar_init

        def grammar_init(request: Request) -> None:
            with lock:
                init(request)

        self._manager.llumnix_lock, self._manager.grammar_init = lock, grammar_init

    def begin(self, request: Request) -> None:
        """Begins to compile. Until that is done or has failed, the request's grammar is not
        ready."""
        waiting: Future[Any] = Future()
        request.structured_output_request.grammar = waiting
        self._manager.executor.submit(self._init, request, waiting)

    def _init(self, request: Request, waiting: Future[Any]) -> None:
        try:
            self._manager.grammar_init(request)
        except Exception as error:  # noqa: BLE001 - the request is declined, whatever it is
            waiting.set_exception(error)
