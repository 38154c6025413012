"""One instance: vLLM's engine core in a Ray actor's process, and the llumlet beside it.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
- `EngineCoreActor`: an engine core that is given its frontends' ZMQ addresses instead of shaking
  hands; `dp_rank` becomes the engine's index, whose two little-endian bytes are its ZMQ identity;
  `run()` is its busy loop, which leaves through `SystemExit` after a shutdown request. It calls
  `shutdown()` as it leaves, whatever the exception, and that waits for the workers.
- `EngineCoreProc._maybe_publish_request_counts()` is called on the busy loop's thread before and
  after every step, and `_notify_idle_state_callbacks()` before it waits for work: the places to
  read the scheduler's state with no lock.
- `EngineCore.add_request(request, request_wave)` takes in every request on that same thread.
- `EngineCoreProc._handle_client_request(kind, content)` gets all that lies in the input queue, and
  `abort_requests(ids)` every abort, on that same thread. A utility call finds any method of ours by
  name. `worker_extension_cls` names a class for the workers.
- `EngineCore.step_with_batch_queue()` schedules only if `scheduler.has_requests()`, and otherwise
  waits for the oldest batch in `batch_queue` and takes its outputs in. An entry of that is (future,
  `SchedulerOutput`, future), the oldest the last.
- `EngineCore._should_throttle_prefills()` is asked once a step; if it says yes, the scheduler
  computes no prompts in it, unless nothing else runs or the queue was not emptied the last time.
- `scheduler.max_num_active_reqs`: how many requests may run at a time.
- `_process_engine_step()` makes one step and says whether a model ran in it. With a `batch_queue`
  that has one in it, which began when the call before returned, it returns when that has landed.
- Every abort lies in `aborts_queue` beside the input queue. A step that ends carries out all that
  lie there, whatever came through the input queue since.
- `_process_input_queue()` is called before every step and handles all that lies in the queue; the
  busy loop goes on from it when there is work, or `is_running()` says no.
- `Request.client_index` is that of the frontend that sent it, to whose socket its outputs go. The
  statistics of a step go along with the outputs to any one frontend; without outputs, to index 0.
- `shutdown_state` and a WAKEUP in `input_queue` end the busy loop from another thread; a WAKEUP
  alone makes an idle one call `_notify_idle_state_callbacks()` once more.

Ray calls the constructor, then `run()`, which ends only with the engine, and the short methods on
the second of the actor's two threads.
"""

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreActor, EngineShutdownState
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.executor import Executor
from vllm.v1.request import Request

from llumnix.core.migration.arrivals import Deferrals
from llumnix.core.types import EngineIndex, MigrationId, RequestId
from llumnix.engine.cores import take_devices
from llumnix.engine.folders import leave_folder, own_folder, start_resource_tracker
from llumnix.engine.launch import InstanceConfig
from llumnix.engine.memory_calls import MemoryCalls
from llumnix.engine.migration.host import HostItem, LlumletHost
from llumnix.engine.migration.unsupported import WORKER_EXTENSION
from llumnix.engine.migration.vllm_core import note_reasoning, take_order
from llumnix.engine.queueing import Queueing
from llumnix.engine.readings import has_prompts, worker_pids
from llumnix.engine.reporting.controller_socket import ControllerSocket
from llumnix.engine.reporting.flight_recorder import FlightRecorder
from llumnix.engine.reporting.load_reader import LoadReader
from llumnix.engine.reporting.prefix_reader import PrefixReader, prefix_reader
from llumnix.engine.reporting.reporter import LoadReporter
from llumnix.engine.urgent import UrgentAdmission
from llumnix.engine.vllm_sockets import prepare_sockets
from llumnix.observe.event_log import EventLog
from llumnix.vllm_seam import start_watchdog

UTILITY = EngineCoreRequestType.UTILITY


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceFacts:
    """Where an instance lives."""

    node: str
    pid: int
    devices: list[str]
    address: str  # where its llumlet listens to others
    workers: list[int] = field(default_factory=list)  # processes of its own beside `pid`
    flight: str = ""  # the file of its flight recorder
    host: str = ""  # within which `pid` and `workers` mean something; its actor says it
    no_log: str | None = None  # why its log is not kept where the user wants it; likewise


class EngineInstance(MemoryCalls, EngineCoreActor):
    """vLLM's engine core with a llumlet, which reports its load."""

    def __init__(
        self,
        config: InstanceConfig,
        vllm_config: VllmConfig,
        addresses: EngineZmqAddresses,
        executor_class: type[Executor],
        log_stats: bool,
    ) -> None:
        self._instance_config = config
        self._folder = own_folder(config.engine_index)
        start_resource_tracker()
        world_size = vllm_config.parallel_config.world_size
        self._devices = take_devices(config.slot, config.slots, world_size)
        _tell_apart(vllm_config, config.engine_index)
        if not vllm_config.parallel_config.worker_extension_cls:
            vllm_config.parallel_config.worker_extension_cls = WORKER_EXTENSION
        self._lost_clients = prepare_sockets(config.keys, len(addresses.inputs))
        super().__init__(
            vllm_config, True, addresses, executor_class, log_stats, dp_rank=config.engine_index
        )
        self._log = EventLog(config.event_log, who=f"engine {config.engine_index} {os.getpid()}")
        self._host = LlumletHost(
            self,
            config.engine_index,
            config.llumlet,
            config.host,
            self._log.step,
            config.keys,
            self._is_here,
        )
        self._host.start()
        self._controller = ControllerSocket(config.controller, config.keys)
        self._reporter = LoadReporter(
            instance=config.instance,
            engine_index=config.engine_index,
            controller=self._controller,
            on_order=self._host.order,
            log_dropped=lambda: self._log.dropped,
        )
        priorities = config.llumlet.priorities
        rules, arriving = config.llumlet.queue_rules, self._host.port.destination.arriving
        self._queueing = Queueing(self.scheduler, priorities, rules=rules, arriving=arriving)
        self._urgent = UrgentAdmission(self.scheduler, priorities, self._queueing)
        self._stepped_s, self._deferrals, self._changed = 0.0, Deferrals(), True
        self._prefixes: PrefixReader | None = None
        if config.llumlet.looks_at_caches:
            self._prefixes = prefix_reader(
                self.scheduler, config.instance, config.engine_index, self._rouse
            )
        cached = {} if self._prefixes is None else {"cached_tokens": self._prefixes.cached_tokens}
        self._reader = LoadReader(
            self.scheduler,
            self.scheduler.max_num_active_reqs,
            priorities,
            taken_out=self._host.port.source.taken_out,
            **self._queueing.for_reports,
            **cached,
        )
        self._flight = None if self._folder is None else FlightRecorder(self._folder.path, self)
        self._leave_on_sigterm()

    def describe(self) -> InstanceFacts:
        """Where the instance lives. Answers once the engine is ready."""
        return InstanceFacts(
            node=socket.gethostname(),
            pid=os.getpid(),
            devices=self._devices,
            address=self._host.address,
            workers=worker_pids(self.model_executor),
            flight="" if self._flight is None else str(self._flight.path),
        )

    def run(self) -> None:
        """The engine's busy loop. Returns once the engine was asked to stop."""
        self._controller.open()
        self._reporter.start()
        if self._prefixes is not None:
            self._prefixes.start()
        self._offer()
        start_watchdog(f"engine_{self.engine_index}", self.vllm_config)
        try:
            super().run()
        except SystemExit:
            leave_folder(self._folder)  # After a failure the flight recorder in it is read.
            return  # Asked to stop. Ray would count the exception as a crash.
        finally:
            if self._prefixes is not None:
                self._prefixes.close()
            self._reporter.close()
            self._controller.close()
            self._host.close()
            self._log.close()

    def shutdown(self) -> None:
        """Not after a failure: streams would wait until the workers have ended, and the fleet kills
        them anyway."""
        if not isinstance(sys.exc_info()[1], Exception):
            super().shutdown()

    def accept(self, accepting: bool) -> None:
        """Says in every report from now on whether new requests are welcome."""
        self._reporter.accept(accepting)

    def _leave_on_sigterm(self) -> None:
        """A SIGTERM means: move everything away, then stop. A second one is Ray's, and ends the
        process at once. vLLM's workers, which have been started already, ignore it
        (cluster/signals.py)."""
        if threading.current_thread() is not threading.main_thread():
            return  # Not in a Ray actor.
        ray_handler = signal.getsignal(signal.SIGTERM)

        def leave(*_: Any) -> None:
            signal.signal(signal.SIGTERM, ray_handler)
            self._host.leave("its process got a SIGTERM")

        signal.signal(signal.SIGTERM, leave)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def stop(self) -> None:
        """Aborts what runs, and ends the busy loop."""
        self.vllm_config.shutdown_timeout = 0
        self.shutdown_state = EngineShutdownState.REQUESTED
        self._rouse()

    def _rouse(self) -> None:
        """Makes a busy loop that waits for work look around. Any thread."""
        self.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

    def add_request(self, request: Request, request_wave: int = 0) -> None:
        self._reporter.admit(RequestId(request.request_id))
        if self._host.llumlet.has_lost(request.client_index):
            return
        note_reasoning(request)
        if (order := take_order(request)) is not None:
            self._forget_aborts(request.request_id)
            self._host.revive(order, request)
            return
        super().add_request(request, request_wave)
        # A session of streamed inputs may have taken it in, or been ended by it.
        if self.scheduler.requests.get(request.request_id) is request:
            self._is_here(request)
        else:
            self._reader.mark_changed()

    def _forget_aborts(self, request: str) -> None:
        """Aborts that came before a request that is sent again do not count for it. One that came
        after it lies in the input queue too."""
        for _ in range(self.aborts_queue.qsize()):
            names = self.aborts_queue.get_nowait()
            names = (names,) if isinstance(names, str) else names
            if kept := [name for name in names if name != request]:
                self.aborts_queue.put_nowait(kept)

    def _is_here(self, request: Request) -> None:
        """A request came: a new one, or one from another engine."""
        self._reader.arrived(request)
        if self._prefixes is not None:
            self._prefixes.track(request)

    def abort_requests(self, request_ids: list[str]) -> None:
        self._host.client_gone(request_ids)
        self._reader.left(request_ids)
        super().abort_requests(request_ids)

    def llumnix_migrate(self, order: bytes) -> None:
        """Utility call: moves a request away (`Migrate`, encoded)."""
        self._host.migrate(order)

    def llumnix_engine_lost(
        self, engine: int, address: str, granted: list[str], client: int
    ) -> None:
        """Utility call: another engine died. Each frontend makes it, for its own requests."""
        self._host.engine_lost(engine, address, granted, client)

    def llumnix_client_lost(self, client: int) -> int:
        """Utility call: a frontend died. Frees all that is here of its requests, and takes no more
        of them. It may be called again. Returns how many were here."""
        self._host.client_lost(client)
        there = self.scheduler.requests.values()
        self.abort_requests(orphans := [r.request_id for r in there if r.client_index == client])
        self._host.poll()  # Their moves have ended.
        self._lost_clients.add(client)
        self.output_queue.put_nowait((client, EngineCoreOutputs()))  # Its socket is closed now.
        return len(orphans)

    def llumnix_fate(self, migration: str) -> str:
        """Utility call: what this engine decided about a migration to it."""
        return self._host.llumlet.fate(MigrationId(migration))

    def _handle_client_request(self, request_type: Any, request: Any) -> None:
        self._changed = True
        self._reporter.worked()
        if request_type is HostItem:
            self._host.handle(request)
            return
        # Ours are short.
        call = request_type is UTILITY and not request[2].startswith("llumnix_")
        with self._reporter.call() if call else contextlib.nullcontext():
            super()._handle_client_request(request_type, request)

    def _process_input_queue(self) -> None:
        super()._process_input_queue()
        # A request that is about to come would have to wait for a step that is begun now. So the
        # engine stands still, and deals with what comes meanwhile.
        while not self.batch_queue and self.is_running() and (wait_s := self._host.hold_s(None)):
            try:
                self._handle_client_request(*self.input_queue.get(timeout=wait_s))
            except queue.Empty:
                break

    def _process_engine_step(self) -> bool:
        began_s = time.monotonic()
        landing = bool(self.batch_queue)
        prompts = landing and has_prompts(self.batch_queue[-1][1])
        if landing and self._host.hold_s(self._stepped_s + self._host.port.step_s):
            with _landing_only(self.scheduler):
                ran = bool(super()._process_engine_step())
        else:
            self._queueing.before_step()
            self._urgent.make_room()
            ran = bool(super()._process_engine_step())
        self._count_step(began_s, ran, landing=landing, prompts=prompts)
        return ran

    def _count_step(self, began_s: float, ran: bool, *, landing: bool, prompts: bool) -> None:
        """A step has ended. `ran`: a model ran in it. `landing`: it had begun when the one before
        ended. `prompts`: it is known to have computed some."""
        now = time.monotonic()
        self._changed = True
        self._reporter.stepped(now - began_s if ran else None)
        self._host.port.between_steps(ran)
        if landing or (ran and not self.batch_queue):
            seconds = now - (self._stepped_s if landing else began_s)
            self._host.port.step_timer.record_step(seconds, prompts=prompts)
            self._queueing.stepped(seconds)
        self._stepped_s = now

    def _should_throttle_prefills(self) -> bool:
        if not self._host.defer_prefills():
            self._deferrals.rest()
            return False
        prompts = [r for r in self.scheduler.running if r.is_prefill_chunk]
        if not self.scheduler.waiting and not prompts:
            return True  # No prompt is there to be deferred.
        if any(r.lora_request is not None for r in prompts):
            return False  # vLLM would forget its adapter, start others', and end by an assertion.
        return self._deferrals.take()

    def turn(self) -> None:
        """All that is ours between two steps, before each and after each."""
        self._host.poll(self._controller.poll())
        self._queueing.look()
        # Before a step mostly nothing has come since the one before.
        if self._changed and self._reporter.due():
            self._offer()

    _maybe_publish_request_counts = turn  # as vLLM calls it

    def _notify_idle_state_callbacks(self) -> None:
        self._reporter.rests()
        self._offer(idle=True)
        while self._tell_prefixes(at_once=True):
            pass
        super()._notify_idle_state_callbacks()

    def _offer(self, idle: bool = False) -> None:
        self._changed = False
        moving, orders = self._host.moving()
        sequence = self._reporter.offer(self._reader.read(), moving, orders, at_once=idle)
        self._host.llumlet.reported(sequence)
        self._tell_prefixes()

    def _tell_prefixes(self, *, at_once: bool = False) -> bool:
        """Passes on what changed in the prefix cache, up to a bound. Returns whether there is
        more."""
        if self._prefixes is None:
            return False
        fact = self._prefixes.read(at_once=at_once)
        if fact is not None:
            self._controller.send(fact)
        return self._prefixes.more


@contextlib.contextmanager
def _landing_only(scheduler: Any) -> Iterator[None]:
    """While it lasts, a step takes in the oldest batch in flight and schedules no new one.

    With asynchronous scheduling the next step is in the queue before this one has ended, and a
    request that arrives now would wait for both.
    """
    scheduler.has_requests = lambda: False
    try:
        yield
    finally:
        del scheduler.has_requests


def _tell_apart(vllm_config: Any, engine_index: EngineIndex) -> None:
    """Names that vLLM expects to be unique over the engines of a deployment."""
    vllm_config.instance_id = f"{vllm_config.instance_id}-{engine_index}"
    if vllm_config.kv_transfer_config is not None:
        engine_id = vllm_config.kv_transfer_config.engine_id
        vllm_config.kv_transfer_config.engine_id = f"{engine_id}-{engine_index}"
