"""What migration needs inside vLLM's worker processes: an extension class for its worker.

vLLM internals relied on here (tests/house/test_vllm_migration_contract.py fails when one
changes):
- `worker_extension_cls`: a class whose methods `collective_rpc` can call by name; they run on the
  worker's own thread, between two of its steps.
- `model_runner.kv_caches`: the KV tensors of all layers, possibly nested, possibly several of one
  storage; dimension 0 counts blocks (times a factor), and all groups share the blocks' numbers.
  Groups lie over each other: a block begins at the same byte in all of them, whatever its size.
- Only in model runner V1: `model_runner.requests[id]` is a `CachedRequestState`, which must be
  there when a request is resumed, with its output tokens and its seeded generator. That draws once
  a token, in `sampler.topk_topp_sampler`, as often whatever top-k and top-p are. Runner V2 gets all
  that from the scheduler.
- `collective_rpc` raises at the first worker whose call failed. The answers of the workers behind
  it stay unread, and the next call takes them for its own. So methods that a running engine calls
  return their error instead of raising it.
"""

import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import torch

from llumnix.engine.cores import SWITCH_INTERVAL_S, nap_while_waiting
from llumnix.engine.folders import name_shared_memory
from llumnix.engine.kv.agent import TransferOptions, WorkerAgent
from llumnix.engine.migration.packed_tokens import take_packed
from llumnix.engine.seeded import keep_generators

name_shared_memory()  # In each worker, before it makes any.


class RunnerState(msgspec.Struct, frozen=True, kw_only=True):
    """What runner V1 keeps of a request beside its KV."""

    request: str
    prompt: list[int]
    outputs: list[int]
    computed: int  # tokens with KV
    blocks: list[list[int]]
    generator: bytes  # the state of its seeded generator, empty without one
    draws: int = 0  # tokens that a generator whose state did not come has drawn before


class LlumnixWorker:
    """Mixed into vLLM's worker."""

    model_runner: Any
    cache_config: Any
    rank: int

    def llumnix_open(self, listen: str, key: bytes, options: TransferOptions) -> str:
        """Begins to serve this worker's KV blocks. Returns the address. `listen` has a `{rank}`."""
        # By default a thread of the agent would wait up to 5 ms for the interpreter's lock.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        nap_while_waiting()
        take_packed(self.model_runner)
        self._llumnix_agent = WorkerAgent(
            tensors=list(unnested(self.model_runner.kv_caches)),
            blocks=self.cache_config.num_gpu_blocks,
            listen=listen.format(rank=self.rank),
            key=key,
            options=options,
        )
        return self._llumnix_agent.start()

    def llumnix_keep_generators(self) -> None:
        """On a CPU, lets seeded requests survive prompts in chunks (engine/seeded.py)."""
        keep_generators(self.model_runner)

    def llumnix_hold(self, held: bool) -> None:
        """Keeps peers from reading KV blocks here, or lets them read again."""
        self._llumnix_agent.hold(held=held)

    def llumnix_generator(self, request: str) -> bytes | str:
        """The state of the request's seeded generator in runner V1, empty without one. A string
        says why it cannot be had."""
        try:
            state = self.model_runner.requests.get(request)
            generator = getattr(state, "generator", None)
            return b"" if generator is None else generator.get_state().numpy().tobytes()
        except Exception as error:  # noqa: BLE001 - see above
            return f"{type(error).__name__}: {error}"

    def llumnix_install(self, state: bytes, sampling_params: Any, lora_request: Any) -> str | None:
        """Gives runner V1 a request that it will be asked to resume. `state`: a `RunnerState`,
        encoded. Returns why it cannot be given, or None."""
        try:
            self._install(state, sampling_params, lora_request)
        except Exception as error:  # noqa: BLE001 - see above
            return f"{type(error).__name__}: {error}"
        return None

    def _install(self, state: bytes, sampling_params: Any, lora_request: Any) -> None:
        from vllm.sampling_params import SamplingType
        from vllm.v1.worker.gpu_input_batch import CachedRequestState

        arrived = msgspec.msgpack.decode(state, type=RunnerState)
        generator = None
        if sampling_params.sampling_type == SamplingType.RANDOM_SEED:
            generator = torch.Generator(device=self.model_runner.device)
            generator.manual_seed(sampling_params.seed)
            if arrived.generator:
                generator.set_state(
                    torch.frombuffer(bytearray(arrived.generator), dtype=torch.uint8)
                )
            self._draw(generator, arrived.draws)
        self.model_runner.requests[arrived.request] = CachedRequestState(
            req_id=arrived.request,
            prompt_token_ids=arrived.prompt,
            mm_features=[],
            sampling_params=sampling_params,
            pooling_params=None,
            generator=generator,
            block_ids=tuple(arrived.blocks),
            num_computed_tokens=arrived.computed,
            output_token_ids=arrived.outputs,
            lora_request=lora_request,
        )

    def _draw(self, generator: torch.Generator, draws: int) -> None:
        """Has a seeded generator draw as often as it did for the tokens that were generated."""
        if not draws:
            return
        runner = self.model_runner
        logits = torch.zeros(1, runner.input_batch.vocab_size, device=runner.device)
        for _ in range(draws):
            runner.sampler.topk_topp_sampler(logits, {0: generator}, None, None)


def unnested(tensors: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested lists that are not empty."""
    todo = [tensors]
    while todo:
        item = todo.pop(0)
        if isinstance(item, list | tuple):
            todo = [*item, *todo]
        elif item.numel():
            yield item
