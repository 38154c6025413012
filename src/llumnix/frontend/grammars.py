"""Checks the grammars of structured outputs on threads, beside the event loop.

vLLM checks them on the event loop, which all streams share, and a JSON schema of 1.5 MB takes a
second or more. The backends release the interpreter's lock for most of that.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
- `SamplingParams._validate_structured_outputs(model_config, structured_outputs_config, tokenizer)`
  is the whole check, and changes nothing but the parameters. `InputProcessor` looks it up on them
  when it verifies them. Parameters may carry attributes of ours; a clone need not.
- An engine ends a request with `FinishReason.ERROR`, and no reason, before its first token if it
  cannot compile the grammar, and with its first token if the grammar refuses that. It also does so
  if the KV did not come through a connector, or multimodal inputs are missing.
"""

import asyncio
import contextlib
import threading
from typing import Any

from vllm.config import ModelConfig, StructuredOutputsConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

THREADS_MAX = 4
"""How many grammars are checked at a time; further ones wait."""
BAD_GRAMMAR = (
    "The engine cannot compile the grammar of structured_outputs, response_format or tools, or "
    "nothing matches it: mend or simplify it."
)


class GrammarChecks:
    """Checks the grammars of one model's requests."""

    def __init__(
        self, model: ModelConfig, settings: StructuredOutputsConfig | None, tokenizer: Any
    ) -> None:
        self._model = model
        self._settings = settings
        self._tokenizer = tokenizer
        self._turns = asyncio.Semaphore(THREADS_MAX)

    async def check(self, params: Any) -> None:
        """Raises what vLLM raises for a bad grammar. vLLM does not check a good one again."""
        if not isinstance(params, SamplingParams) or params.structured_outputs is None:
            return
        await self._turns.acquire()
        loop = asyncio.get_running_loop()
        checked: asyncio.Future[None] = loop.create_future()

        def ended(error: BaseException | None) -> None:
            self._turns.release()
            if checked.done():
                return  # The client has left.
            if error is None:
                checked.set_result(None)
            else:
                checked.set_exception(error)

        def run() -> None:
            error: BaseException | None = None
            try:
                params._validate_structured_outputs(self._model, self._settings, self._tokenizer)
            except BaseException as raised:  # noqa: BLE001 - raised where the check is awaited
                error = raised
            with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits.
                loop.call_soon_threadsafe(ended, error)

        # Not a pool's thread: Python would wait for it at exit, and a check may take minutes.
        threading.Thread(target=run, name="llumnix-grammar", daemon=True).start()
        await checked
        params._validate_structured_outputs = _checked  # type: ignore[method-assign]


def may_only_fail_at_grammar(request: EngineCoreRequest, config: VllmConfig) -> bool:
    """Whether a request that an engine cannot begin has a bad grammar."""
    grammar = getattr(request.sampling_params, "structured_outputs", None)
    connector = config.kv_transfer_config or config.ec_transfer_config
    return grammar is not None and not request.mm_features and connector is None


def _checked(*_: Any) -> None:
    """Takes the place of the check, which has been made."""
