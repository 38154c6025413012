"""Two engines without a model, their llumlets' hosts, and as little of a frontend as will do:
for what happens on the engine's thread."""

import queue
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.v1.engine import FinishReason

from llumnix.core.limits import MigrationLimits
from llumnix.core.messages import IN_BAND, Migrate, MigrationEnded, TookOver
from llumnix.core.priorities import Priorities
from llumnix.core.settings import PrioritySettings
from llumnix.core.types import EngineIndex, Epoch, MigrationId, RequestId
from llumnix.engine.kv.agent import TransferOptions
from llumnix.engine.launch import LlumletConfig
from llumnix.engine.migration import host
from llumnix.engine.migration.host import HostItem, LlumletHost
from llumnix.engine.queueing import Queueing
from llumnix.wire import decode, encode
from support.no_model import engine_core

LIMITS = MigrationLimits(
    reserve_timeout_s=0.2,
    stage_timeout_s=0.2,
    progress_every_s=0.05,
    verdict_again_s=0.02,
    silence_timeout_s=0.4,
)
TURN_S = 0.001
"""By the hosts' clock, so that a loaded machine loses no message to a time-out."""
THREADS_S = 0.004
"""What a turn leaves to the threads that carry messages and blocks, while they have any."""
STEP_TURNS = 4
"""While a request moves, only one turn in so many makes a step, or it would end before."""
KEY = b"hosts"


class HostedEngine:
    """One of them. `turn` is one turn of vLLM's busy loop."""

    def __init__(self, number: int, folder: Path, model: Path, blocks: int) -> None:
        self.core: Any = engine_core(model, blocks=blocks)
        self.core.input_queue = queue.Queue()
        self.core.output_queue = queue.Queue()
        self.host = LlumletHost(
            self.core,
            EngineIndex(number),
            LlumletConfig(
                peers=f"ipc://{folder}/peer-{{engine}}",
                agents=f"unix:{folder}/kv-{{engine}}-{{rank}}",
                key=KEY,
                limits=LIMITS,
                priorities=Priorities(PrioritySettings()),
                min_stay=10.0,
                looks_at_caches=False,
                transfer=TransferOptions(checksums=True),
            ),
            "127.0.0.1",
            lambda *_: None,
        )
        self.host.start()
        Queueing(self.core.scheduler, Priorities(PrioritySettings()))

    def close(self) -> None:
        self.host.close()
        self.core.model_executor.agent.close()

    def turn(self, *, step: bool = True) -> None:
        """As `run_busy_loop` does, with our hooks in it."""
        while not self.core.input_queue.empty():
            kind, item = self.core.input_queue.get()
            assert kind is HostItem
            self.host.handle(item)
        self.host.poll()
        if step:
            outputs, ran = self.core.step_fn()
            for output in (outputs or {}).items():
                self.core.output_queue.put(output)
            self.host.port.between_steps(ran)
            self.host.poll()
        self.host.defer_prefills()
        self.host.hold_s(None)
        self.host.moving()

    def at_rest(self) -> bool:
        """Whether nothing of any request or migration is left."""
        scheduler, port = self.core.scheduler, self.host.port
        pool = scheduler.kv_cache_manager.block_pool
        held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        return not (
            scheduler.requests
            or scheduler.finished_req_ids
            or held
            or port.destination._arriving
            or port.source._pins
            or port.source._stopped
            or port.source._places
            or self.host.llumlet.busy
        )


class Hosts:
    """Both, and what a client got: tokens by the engine that said them."""

    def __init__(self, folder: Path, model: Path, blocks: int = 100) -> None:
        self.engines = [HostedEngine(n, folder, model, blocks) for n in range(2)]
        self.renew()
        self._migrations = 0
        self._turns = 0
        self._now_s = time.monotonic()
        self._time = host.time
        host.time = SimpleNamespace(monotonic=lambda: self._now_s)  # type: ignore[attr-defined]

    def renew(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}
        self.took_over: dict[str, int] = {}
        self.outcomes: list[MigrationEnded] = []

    def close(self) -> None:
        host.time = self._time  # type: ignore[attr-defined]
        for engine in self.engines:
            engine.close()

    def migrate(self, request: str) -> None:
        self._migrations += 1
        order = Migrate(
            migration=MigrationId(f"m{self._migrations}"),
            request=RequestId(request),
            destination=EngineIndex(1),
            address=self.engines[1].host.address,
            epoch=Epoch(1),
        )
        self.engines[0].host.migrate(encode(order))

    def turn(self) -> None:
        self._turns += 1
        self._now_s += TURN_S
        moving = any(engine.host.llumlet.busy for engine in self.engines)
        if moving:
            time.sleep(THREADS_S)
        for number, engine in enumerate(self.engines):
            engine.turn(step=not moving or not self._turns % STEP_TURNS)
            while not engine.core.output_queue.empty():
                self._hear(number, engine.core.output_queue.get()[1])

    def _hear(self, number: int, outputs: Any) -> None:
        for output in outputs.outputs:
            if output.kv_transfer_params and IN_BAND in output.kv_transfer_params:
                message = decode(output.kv_transfer_params[IN_BAND])
                if isinstance(message, TookOver):
                    self.took_over[message.request] = message.outputs
                elif isinstance(message, MigrationEnded):
                    self.outcomes.append(message)
                continue
            said = self.tokens.setdefault(output.request_id, [0, 0])
            said[number] += len(output.new_token_ids)
            if output.finish_reason is not None:
                name = "error" if output.finish_reason == FinishReason.ERROR else "finished"
                assert output.request_id not in self.ended, "it ended twice"
                self.ended[output.request_id] = name

    def until(self, done: Any, within_s: float = 60.0) -> None:
        end = time.monotonic() + within_s
        while not done():
            assert time.monotonic() < end, "it never came to an end"
            self.turn()

    def until_at_rest(self) -> None:
        self.until(lambda: all(engine.at_rest() for engine in self.engines))
