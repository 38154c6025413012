"""A whole instance without a model: vLLM's busy loop with all of ours in it."""

import queue
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import EngineCore, EngineCoreActor
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.request import Request

from llumnix.core.events import LoadReported
from llumnix.core.limits import MigrationLimits
from llumnix.core.messages import IN_BAND, Migrate, MigrationEnded
from llumnix.core.migration.arrivals import DEFER_PREFILLS_STEPS_MAX, Deferrals
from llumnix.core.priorities import Priorities
from llumnix.core.settings import PrioritySettings
from llumnix.core.types import EngineIndex, Epoch, InstanceId, MigrationId, RequestId
from llumnix.engine import folders
from llumnix.engine import instance as module
from llumnix.engine.folders import PrivateFolder
from llumnix.engine.instance import EngineInstance
from llumnix.engine.kv.agent import TransferOptions
from llumnix.engine.launch import InstanceConfig, LlumletConfig
from llumnix.engine.queueing import AgingQueue
from llumnix.engine.reporting.flight_recorder import FlightRecorder
from llumnix.wire import decode, encode
from support.no_model import BLOCK, NoModel, engine_config, made

PATIENCE_S = 60.0


class Outputs(queue.Queue[Any]):
    """The engine waits for a test that is late: its requests don't end meanwhile."""

    def put_nowait(self, item: Any) -> None:
        self.put(item)


class Running:
    """An instance whose busy loop runs on a thread, and what comes out of it."""

    def __init__(self, folder: Path, model: Path, number: int) -> None:
        instance = InstanceConfig(
            instance=InstanceId(f"i{number}"),
            engine_index=EngineIndex(number),
            slot=number,
            slots=2,
            controller=f"ipc://{folder}/controller",
            llumlet=LlumletConfig(
                peers=f"ipc://{folder}/peer-{{engine}}",
                agents=f"unix:{folder}/kv-{{engine}}-{{rank}}",
                key=b"instances",
                limits=MigrationLimits(),
                priorities=Priorities(PrioritySettings()),
                min_stay=10.0,
                looks_at_caches=False,
                transfer=TransferOptions(),
            ),
            event_log=None,
        )
        addresses = EngineZmqAddresses(
            inputs=[f"ipc://{folder}/in"], outputs=[f"ipc://{folder}/out"]
        )
        config = engine_config(model, blocks=100, ahead=True)
        self.engine: Any = EngineInstance(instance, config, addresses, NoModel, log_stats=False)
        self.engine.model_executor.core = self.engine
        self.admitted: set[str] = set()
        self._note_reports()
        self.tokens: dict[str, int] = {}
        self.ended: set[str] = set()
        self.outcomes: list[MigrationEnded] = []
        self.answers: list[Any] = []
        self._outputs = Outputs(maxsize=1)
        self.engine.output_queue = self._outputs  # Nobody else reads it then.
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _note_reports(self) -> None:
        send = self.engine._controller.send

        def noted(fact: Any) -> bool:
            if isinstance(fact, LoadReported):
                self.admitted |= set(fact.report.admitted)
            return bool(send(fact))

        self.engine._controller.send = noted

    def _run(self) -> None:
        try:
            self.engine.run()
        except BaseException as error:
            self.error = error
            raise

    def add(self, request: Request) -> None:
        self.engine.input_queue.put((EngineCoreRequestType.ADD, (request, 0)))

    def call(self, method: str, *args: Any) -> None:
        """A utility call of the office's."""
        self.engine.input_queue.put((EngineCoreRequestType.UTILITY, (0, 1, method, args)))

    def at_rest(self) -> bool:
        """Whether nothing is left of any request. Its thread may be about to add to it."""
        scheduler = self.engine.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        return not (
            scheduler.requests
            or not self.engine.input_queue.empty()
            or pool.get_num_free_blocks() != pool.num_gpu_blocks - 1
            or self.engine._host.llumlet.busy
        )

    def hear(self, timeout_s: float) -> None:
        try:
            _, outputs = self._outputs.get(timeout=timeout_s)
        except queue.Empty:
            return
        if outputs.utility_output is not None:
            assert outputs.utility_output.failure_message is None
            self.answers.append(outputs.utility_output.result.result)
        for output in outputs.outputs:
            if output.kv_transfer_params and IN_BAND in output.kv_transfer_params:
                message = decode(output.kv_transfer_params[IN_BAND])
                if isinstance(message, MigrationEnded):
                    self.outcomes.append(message)
                continue
            name = output.request_id
            self.tokens[name] = self.tokens.get(name, 0) + len(output.new_token_ids)
            if output.finish_reason is not None:
                self.ended.add(name)

    def stop(self) -> None:
        self.engine.stop()
        patience = time.monotonic() + PATIENCE_S
        while self._thread.is_alive() and time.monotonic() < patience:
            self.hear(0.01)
        assert not self._thread.is_alive()


@pytest.fixture
def pair(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[Running]]:
    monkeypatch.setattr(EngineCoreActor, "_set_nixl_side_channel_host", staticmethod(lambda: None))
    monkeypatch.setattr(module, "take_devices", lambda *_: [])
    monkeypatch.setattr(module, "own_folder", lambda *_: None)
    monkeypatch.setattr(module, "start_resource_tracker", lambda: None)
    monkeypatch.setattr(EngineInstance, "_leave_on_sigterm", lambda self: None)
    both = [Running(tmp_path, tiny_model, number) for number in range(2)]
    yield both
    for one in both:
        one.stop()
        assert one.error is None


def test_requests_run_move_and_end(pair: list[Running]) -> None:
    source, destination = pair
    assert isinstance(source.engine.scheduler.waiting, AgingQueue)
    names = [f"r{n}" for n in range(12)]
    tokens = 300
    for n, name in enumerate(names):
        source.add(made(source.engine, name, [n] * (2 * BLOCK), tokens, priority=-100 * (n % 2)))
    while source.tokens.get("r1", 0) < 3:
        source.hear(PATIENCE_S)
    order = Migrate(
        migration=MigrationId("m0"),
        request=RequestId("r1"),
        destination=EngineIndex(1),
        address=destination.engine.describe().address,
        epoch=Epoch(1),
    )
    source.call("llumnix_migrate", encode(order))
    done: set[str] = set()
    while len(done) < len(names):
        source.hear(0.01)
        destination.hear(0.01)
        assert source.error is None
        assert destination.error is None
        done = source.ended | destination.ended
    while not source.outcomes:
        source.hear(PATIENCE_S)
    (outcome,) = source.outcomes
    for name in names:
        assert source.tokens.get(name, 0) + destination.tokens.get(name, 0) == tokens
    assert outcome.taken == ("r1" in destination.ended)
    assert source.admitted >= set(names), "the scheduler books each of them until it is reported"


def test_nothing_of_a_dead_frontend_is_left_and_all_of_the_others(pair: list[Running]) -> None:
    """With requests that wait, run and move, and one that comes later than the news."""
    source, destination = pair
    tokens, dead = 300, 1
    names = [f"r{n}" for n in range(16)]
    for n, name in enumerate(names):
        new = made(source.engine, name, [n] * (2 * BLOCK), tokens, client_index=n % 2)
        source.add(new)
    while source.tokens.get("r1", 0) < 3:
        source.hear(PATIENCE_S)
    order = Migrate(
        migration=MigrationId("m1-0"),
        request=RequestId("r1"),
        destination=EngineIndex(1),
        address=destination.engine.describe().address,
        epoch=Epoch(1),
        client=dead,
    )
    source.call("llumnix_migrate", encode(order))
    for one in pair:
        for _ in range(2):  # The office makes sure.
            one.call("llumnix_client_lost", dead)
    for one in pair:
        one.add(made(one.engine, "late", [99] * BLOCK, tokens, client_index=dead))
    while any(source.tokens.get(name, 0) < tokens for name in names[::2]):
        source.hear(PATIENCE_S)
    while not (source.at_rest() and destination.at_rest() and destination.answers[1:]):
        source.hear(0.01)
        destination.hear(0.01)
    assert source.answers == [None, 8, 0], "all of them were here"
    assert destination.answers == [0, 0]
    assert not source.ended & {"late", *names[1::2]}
    assert not source.outcomes, "a dead frontend is told nothing"
    assert "late" in source.admitted, "the scheduler has booked it"


def test_orders_are_carried_out_between_any_two_steps() -> None:
    """Whether or not a report goes out."""
    one: Any = object.__new__(EngineInstance)
    carried_out: list[Any] = []
    one._controller = SimpleNamespace(poll=lambda: ["an order"])
    one._host = SimpleNamespace(poll=carried_out.append)
    one._queueing, one._changed = SimpleNamespace(look=lambda: None), False
    one._maybe_publish_request_counts()
    assert carried_out == [["an order"]]


def test_prompts_are_put_off_in_no_more_than_every_other_of_many_steps() -> None:
    """A draining instance may send one request after the other for minutes."""
    one: Any = object.__new__(EngineInstance)
    quiet = [True]
    one._host = SimpleNamespace(defer_prefills=lambda: quiet[0])
    one._deferrals = Deferrals()
    one.scheduler = SimpleNamespace(waiting=[], running=[])
    assert all(one._should_throttle_prefills() for _ in range(1000)), "nobody has to wait"
    one.scheduler.waiting = ["a prompt"]
    put_off = [one._should_throttle_prefills() for _ in range(1000)]
    assert put_off[: DEFER_PREFILLS_STEPS_MAX + 1] == [True] * DEFER_PREFILLS_STEPS_MAX + [False]
    assert sum(put_off) <= 500 + DEFER_PREFILLS_STEPS_MAX
    quiet[0] = False
    assert not any(one._should_throttle_prefills() for _ in range(DEFER_PREFILLS_STEPS_MAX))
    quiet[0] = True
    assert all(one._should_throttle_prefills() for _ in range(DEFER_PREFILLS_STEPS_MAX))


def test_a_running_prompt_with_an_adapter_is_not_left_out() -> None:
    """vLLM counts the adapters of those that a step computes. It would start a request with another
    adapter beside it, and end with an assertion one step later."""
    one: Any = object.__new__(EngineInstance)
    one._host = SimpleNamespace(defer_prefills=lambda: True)
    one._deferrals = Deferrals()

    def runs(*, prompt: bool, adapter: str | None) -> SimpleNamespace:
        return SimpleNamespace(is_prefill_chunk=prompt, lora_request=adapter)

    plain, mine = runs(prompt=True, adapter=None), runs(prompt=True, adapter="a")
    answers = runs(prompt=False, adapter="b")
    for waiting in ([], ["a prompt"]):
        one.scheduler = SimpleNamespace(waiting=waiting, running=[plain, mine])
        assert not one._should_throttle_prefills()
        one.scheduler.running = [plain, answers]
        assert one._should_throttle_prefills()


def test_what_starts_after_the_resource_tracker_inherits_which_signals_are_blocked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a SIGTERM to all processes would end vLLM's workers, and requests with them."""
    tracker = resource_tracker.ResourceTracker()
    monkeypatch.setattr(resource_tracker, "ensure_running", tracker.ensure_running)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        folders.start_resource_tracker()
        assert tracker._fd is not None
        assert {signal.SIGTERM, signal.SIGINT} <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        tracker._stop()


@pytest.mark.parametrize(("end", "left"), [(SystemExit(), False), (RuntimeError("a bug"), True)])
def test_after_a_failure_it_waits_for_no_worker_and_leaves_its_flight_recorder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException, left: bool
) -> None:
    engine: Any = object.__new__(EngineInstance)
    closers = {"_controller": "open", "_reporter": "start", "_host": "close", "_log": "close"}
    for name, begin in closers.items():
        calls = dict.fromkeys((begin, "close"), lambda: None)
        setattr(engine, name, SimpleNamespace(**calls))
    engine._prefixes, engine._offer = None, lambda: None
    engine.engine_index, engine.vllm_config = 7, object()
    watched: list[Any] = []
    monkeypatch.setattr(module, "start_watchdog", lambda *given: watched.append(given))
    engine._folder = PrivateFolder.inside(tmp_path / "deployment", "e0")
    core: Any = SimpleNamespace(
        model_executor=SimpleNamespace(execute_model=None), scheduler=None, batch_queue=None
    )
    recorder = FlightRecorder(engine._folder.path, core)

    def run_busy_loop() -> None:
        assert watched == [("engine_7", engine.vllm_config)]
        raise end

    engine.run_busy_loop = run_busy_loop
    shut_down: list[Any] = []
    monkeypatch.setattr(EngineCore, "shutdown", lambda self: shut_down.append(self))
    if left:
        with pytest.raises(RuntimeError, match="a bug"):
            engine.run()
    else:
        engine.run()
    assert shut_down == ([] if left else [engine])
    assert recorder.path.exists() == left
    assert (tmp_path / "deployment").exists() == left


def test_a_sigterm_asks_for_a_drain_and_a_second_one_is_rays() -> None:
    """It was blocked from the start of the process until an engine is there to be drained."""
    left: list[str] = []
    rays: list[int] = []
    engine: Any = object.__new__(EngineInstance)
    engine._host = SimpleNamespace(leave=left.append)
    before = signal.signal(signal.SIGTERM, lambda number, _: rays.append(number))
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        engine._leave_on_sigterm()
        signal.raise_signal(signal.SIGTERM)
        assert (left, rays) == (["its process got a SIGTERM"], [])
        signal.raise_signal(signal.SIGTERM)
        assert (len(left), rays) == (1, [signal.SIGTERM])
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
