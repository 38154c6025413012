"""vLLM's own engine core, stepped by hand, with our port on it."""

import contextlib
import os
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
# Else each engine compiles a part of vLLM's sampler for ten seconds. Servers of tests do.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.core.sched.output import SchedulerOutput  # noqa: F401
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.executor import Executor
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from llumnix.core.messages import OFFICE, Revive
from llumnix.core.types import RequestId
from llumnix.engine.cores import nap_while_waiting, share_of_cores
from llumnix.engine.kv.agent import TransferOptions
from llumnix.engine.kv.agent_client import AgentClient, Pulled
from llumnix.engine.migration.unsupported import WORKER_EXTENSION
from llumnix.engine.migration.vllm_core import note_reasoning, take_order
from llumnix.engine.migration.vllm_port import VllmPort
from llumnix.frontend.streams.revivable import again
from support.duo import Said

KEY = b"conformance"
COPY_PATIENCE_S = 0.002


@contextlib.contextmanager
def own_cores(ranks: int) -> Iterator[None]:
    """Where several processes run the tests, engines that are started in this context compute on
    this one's share of the cores. vLLM would put those of all processes on the same ones."""
    name, worker = "VLLM_CPU_OMP_THREADS_BIND", os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None or name in os.environ:
        yield
        return
    slot, slots = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    share = share_of_cores(sorted(os.sched_getaffinity(0)), slot, slots, ranks)
    if share is not None:
        os.environ[name] = share
    try:
        yield
    finally:
        os.environ.pop(name, None)


class RealEngine:
    """One vLLM engine core with its workers; `options` of a request are vLLM's SamplingParams."""

    def __init__(
        self,
        number: int,
        folder: Path,
        model: Path,
        *,
        transfer: TransferOptions | None = None,
        force_async: bool = False,
        worker_cls: str | None = None,
        **args: Any,
    ) -> None:
        settings: dict[str, Any] = {
            "model": str(model),
            "dtype": "float32",
            "enforce_eager": True,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 32 * 2**20,
            **args,
        }
        config = EngineArgs(**settings).create_engine_config(UsageContext.ENGINE_CONTEXT)
        config.parallel_config.worker_extension_cls = WORKER_EXTENSION
        config.instance_id = f"conformance-{number}"
        if worker_cls is not None:
            config.parallel_config.worker_cls = worker_cls
        if force_async:
            config.scheduler_config.async_scheduling = True
        self.config = config
        nap_while_waiting()  # As the host does.
        with own_cores(config.parallel_config.world_size):
            self.core = EngineCore(config, Executor.get_class(config), log_stats=False)
        self.processor = InputProcessor(config)
        if current_platform.is_cpu():  # As the host does.
            self.rpc("llumnix_keep_generators")
        self.finished: queue.Queue[Pulled] = queue.Queue()
        self.agents = self.rpc(
            "llumnix_open",
            f"unix:{folder}/kv-{number}-{{rank}}",
            KEY,
            transfer or TransferOptions(checksums=True),
        )
        self.client = AgentClient(agents=self.agents, key=KEY, on_pulled=self.finished.put)
        self.client.start()
        self.renew()

    def rpc(self, method: str, *args: Any) -> list[Any]:
        return self.core.model_executor.collective_rpc(method, args=args)

    def bytes_of(self, blocks: list[int]) -> list[bytes]:
        """What these blocks hold on the first worker, one string for each tensor."""

        def read(worker: Any) -> list[bytes]:
            # In the worker's process, to which functions of a test go by value.
            import torch

            from llumnix.engine.migration.worker import unnested

            count, found = worker.cache_config.num_gpu_blocks, []
            for tensor in unnested(worker.model_runner.kv_caches):
                rows = tensor.reshape(count, -1, *tensor.shape[1:])[torch.tensor(blocks)]
                found.append(rows.contiguous().cpu().view(torch.uint8).numpy().tobytes())
            return found

        answers: list[list[bytes]] = self.core.model_executor.collective_rpc(read)
        return answers[0]

    def renew(self) -> None:
        self.port = VllmPort(self.core, self.agents, self.client, self._pull_failed)

    def _pull_failed(self, ticket: int, why: str) -> None:
        self.finished.put(Pulled(ticket=ticket, bytes=0, seconds=0.0, error=why))

    def close(self) -> None:
        self.client.close()
        self.core.shutdown()

    # -- TestEngine

    def add(
        self,
        request: RequestId,
        prompt: list[int],
        options: SamplingParams,
        lora: LoRARequest | None = None,
        client: int = OFFICE,
    ) -> None:
        made = self.make(request, prompt, options, lora)
        made.client_index = client
        self.add_core_request(made)

    def make(
        self, request: RequestId, prompt: Any, options: SamplingParams, lora: Any = None
    ) -> EngineCoreRequest:
        made = self.processor.process_inputs(
            request, {"prompt_token_ids": prompt}, options.clone(), ("generate",), lora_request=lora
        )
        made.request_id = request
        return made

    def again(
        self, order: Revive, prompt: Any, options: SamplingParams, lora: Any = None
    ) -> Request:
        """What the engine makes of a request that is sent again."""
        sent = again(self.make(order.request, prompt, options, lora), order)
        frames = [bytes(frame) for frame in MsgpackEncoder().encode(sent)]
        made, _ = self.core.preprocess_add_request(MsgpackDecoder(EngineCoreRequest).decode(frames))
        note_reasoning(made)
        assert take_order(made) == order
        return made

    def add_core_request(self, made: EngineCoreRequest) -> None:
        new, wave = self.core.preprocess_add_request(made)
        note_reasoning(new)
        self.core.add_request(new, wave)

    def abort(self, request: RequestId) -> None:
        self.core.abort_requests([request])

    def step(self) -> list[Said]:
        began = time.monotonic()
        outputs, ran = self.core.step_fn()
        self.port.step_timer.record_step(time.monotonic() - began)
        self.core.post_step(True)
        self.port.between_steps(ran)
        self.port.destination.begin_pulls()
        said: list[Said] = []
        for batch in (outputs or {}).values():
            for output in batch.outputs:
                done = output.finish_reason is not None
                said.append(
                    (RequestId(output.request_id), list(output.new_token_ids), done, output)
                )
        return said

    def idle(self) -> bool:
        return not self.core.scheduler.has_requests() and not self.core.batch_queue

    def preempt_somebody(self) -> None:
        running = self.core.scheduler.running
        if running:
            self.core.scheduler._preempt_request(running.pop(), 0.0)

    def pulls(self) -> list[tuple[int, str | None, int, float]]:
        found = []
        # A moment's patience: a test's clock must not run away from a real copy.
        copies = self.client._joining or self.port.destination.holds()
        patience_s = COPY_PATIENCE_S if copies else 0.0
        with contextlib.suppress(queue.Empty):
            while True:
                done = self.finished.get(timeout=patience_s)
                if done.ticket < 0:
                    self.port.destination.linked(done.ticket, done.error)
                    continue
                found.append((done.ticket, done.error, done.bytes, done.seconds))
        return found

    def blocks_used(self) -> int:
        pool = self.core.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()

    def requests_held(self) -> int:
        return (
            len(self.core.scheduler.requests)
            + len(self.port.destination._arriving)
            + len(self.port.source._pins)
        )

    def runs(self, request: RequestId) -> bool:
        scheduler = self.core.scheduler
        known = scheduler.requests.get(request)
        return (
            known is not None
            and not known.is_finished()
            and request not in self.port.source._stopped
        )

    def requests_of(self, client: int) -> list[RequestId]:
        requests = self.core.scheduler.requests
        return [RequestId(name) for name, r in requests.items() if r.client_index == client]

    def die(self) -> None:
        """Forgets everything, as a new process in its place would have."""
        self.core.abort_requests(list(self.core.scheduler.requests))
        for name in list(self.port.source._pins):
            self.port.unpin(name)
        while not self.idle():
            self.step()
        while self.port.destination._arriving:
            self.port.drop(next(iter(self.port.destination._arriving)))
        self.pulls()
        self.renew()
