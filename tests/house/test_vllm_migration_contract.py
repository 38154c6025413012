"""What migration relies on inside vLLM: a test that fails names what changed and who relies on it.

Small objects of vLLM's are made and asked where that is quick; for the rest, its source is read.
"""

import dataclasses
import inspect
import pickle
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

vllm = pytest.importorskip("vllm")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from vllm.config import CacheConfig, ModelConfig, ParallelConfig, VllmConfig  # noqa: E402
from vllm.sampling_params import (  # noqa: E402
    SamplingParams,
    SamplingType,
    StructuredOutputsParams,
)
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core import kv_cache_utils  # noqa: E402
from vllm.v1.core.kv_cache_manager import KVCacheManager  # noqa: E402
from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: E402
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput  # noqa: E402
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402
from vllm.v1.engine import (  # noqa: E402
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
)
from vllm.v1.engine.core import EngineCore, EngineCoreProc  # noqa: E402
from vllm.v1.engine.core_client import AsyncMPClient  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout  # noqa: E402
from vllm.v1.request import Request, RequestStatus  # noqa: E402
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder  # noqa: E402
from vllm.v1.structured_output import StructuredOutputManager  # noqa: E402
from vllm.v1.worker.gpu import buffer_utils  # noqa: E402
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor, UvaBufferPool  # noqa: E402
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2  # noqa: E402
from vllm.v1.worker.gpu.states import RequestState  # noqa: E402
from vllm.v1.worker.gpu_input_batch import CachedRequestState  # noqa: E402
from vllm.v1.worker.utils import allocate_kv_cache  # noqa: E402
from vllm.v1.worker.worker_base import WorkerWrapperBase  # noqa: E402

from llumnix.engine.kv.blocks import HostMemory, lay_out  # noqa: E402
from llumnix.engine.migration import packed_tokens, unsupported  # noqa: E402
from llumnix.engine.migration.packed_tokens import (  # noqa: E402
    Gathered,
    Grown,
    Packed,
    Prompt,
    take_packed,
)
from llumnix.vllm_seam import V0_33, VERSION  # noqa: E402

BLOCK = 4
ROOT = Path(vllm.__file__).parent
RUNNER_V1 = "v1/worker/gpu_model_runner.py"
RUNNER_V2 = "v1/worker/gpu/model_runner.py"


def flat(text: str) -> str:
    """Without comments and line breaks, so that only a change of the code counts."""
    return re.sub(r"([(\[]) | (?=[)\]])", r"\1", " ".join(re.sub(r"#.*", "", text).split()))


def source(of: object) -> str:
    return flat(inspect.getsource(of))  # type: ignore[arg-type]


def in_file(path: str, method: str) -> str:
    """A method out of a file that takes long to import."""
    found = re.search(
        rf"^    def {method}\(.*?(?=^    def |^    @|\Z)", (ROOT / path).read_text(), re.M | re.S
    )
    assert found, f"{path} has no {method} any more"
    return flat(found[0])


def says(of: object, *needles: str, who: str) -> None:
    """Its source has all of these, in this order."""
    text = of if isinstance(of, str) else source(of)
    name = text[:60] if isinstance(of, str) else getattr(of, "__qualname__", of)
    at = 0
    for needle in needles:
        found = text.find(flat(needle), at)
        assert found >= 0, f"{name}: {needle!r} is gone or moved; {who} relies on it"
        at = found


def has(of: object, names: Iterable[str], who: str) -> None:
    """Its class or its constructor makes all of these attributes."""
    made = {*dir(of), *getattr(of, "__dataclass_fields__", ())}
    if inspect.isfunction(getattr(of, "__init__", None)):
        made |= set(re.findall(r"self\.(\w+)(?:: [^=]+)? = ", source(of.__init__)))  # type: ignore[misc]
    missing = set(names) - made
    assert not missing, f"{of} has no {sorted(missing)} any more; {who} reads them"


def takes(of: Any, *names: str, who: str) -> None:
    missing = set(names) - set(inspect.signature(of).parameters)
    assert not missing, f"{of.__qualname__} takes no {sorted(missing)} any more; {who} gives them"


def same(found: Iterable[str], ours: Iterable[str], what: str) -> None:
    new, gone = set(found) - set(ours), set(ours) - set(found)
    assert not new, f"new {what} {sorted(new)}: must a migration carry them?"
    assert not gone, f"{what} {sorted(gone)} are gone"


def request(name: str = "r", prompt: Sequence[int] = (1, 2, 3), **params: Any) -> Request:
    sampling = SamplingParams(max_tokens=50, **params)
    kv_cache_utils.init_none_hash(sha256)
    hasher = kv_cache_utils.get_request_block_hasher(BLOCK, sha256)
    return Request(name, list(prompt), sampling, None, block_hasher=hasher)


def manager(blocks: int = 10) -> KVCacheManager:
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    config = KVCacheConfig(
        num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l"], spec)]
    )
    return KVCacheManager(config, 64, scheduler_block_size=BLOCK, hash_block_size=BLOCK)


# -- the scheduler: engine/migration/vllm_source.py, engine/migration/vllm_destination.py


def test_the_scheduler_has_what_the_port_reads() -> None:
    names = {
        "_inflight_prefills", "block_size", "deferred_waiting", "finish_requests",
        "finished_req_ids", "kv_cache_config", "kv_cache_manager", "kv_holding_waiting",
        "max_num_active_reqs", "prev_step_scheduled_req_ids", "requests",
        "reset_preempted_req_ids", "running", "structured_output_manager", "waiting",
    }  # fmt: skip
    has(Scheduler, names, "engine/migration/vllm_source.py, vllm_destination.py")
    assert "__slots__" not in vars(Scheduler), "engine/instance.py shadows its has_requests()"


def test_requests_that_hold_kv_go_first_and_are_not_prefilled_again() -> None:
    says(
        Scheduler.schedule,
        "request_queue = self.kv_holding_waiting if not request_queue",
        "request_queue = self.waiting",
        "if request.num_computed_tokens == 0:",
        "did_prefix_cache_lookup = True",
        "else: new_computed_blocks = self.kv_cache_manager.empty_kv_cache_blocks"
        " num_new_local_computed_tokens = 0 num_computed_tokens = request.num_computed_tokens",
        "num_new_tokens = request.num_tokens - num_computed_tokens",
        "elif request.status == RequestStatus.PREEMPTED: scheduled_resumed_reqs.append(request)",
        "req_to_new_blocks[request_id] = self.kv_cache_manager.get_blocks(request_id)",
        who="engine/migration/vllm_source.py",
    )
    known = request()
    known.status, known.num_computed_tokens = RequestStatus.PREEMPTED, 3
    assert Scheduler._holds_kv_blocks(known)
    assert not Scheduler._is_blocked_waiting_status(known.status)


def test_the_number_of_running_requests_is_limited_where_we_count() -> None:
    limit = "num_running >= self.max_num_active_reqs"
    says(Scheduler.schedule, limit, who="arrivals.reserve")


def test_workers_are_told_of_requests_that_were_taken_out() -> None:
    says(
        Scheduler.schedule,
        "if self.use_v2_model_runner: scheduled_new_reqs.extend(scheduled_resumed_reqs)",
        "req._all_token_ids",
        "self.prev_step_scheduled_req_ids.update(num_scheduled_tokens.keys())",
        "preempted_req_ids=self.reset_preempted_req_ids",
        "finished_req_ids=self.finished_req_ids",
        who="vllm_source.handover_state",
    )
    says(
        Scheduler._make_cached_request_data,
        "if req_id not in self.prev_step_scheduled_req_ids:"
        " all_token_ids[req_id] = req.all_token_ids.copy()",
        who="arrivals._queue",
    )
    after = "self.finished_req_ids = set() self.reset_preempted_req_ids = set()"
    says(Scheduler._update_after_schedule, after, who="arrivals.ready")
    says(
        in_file(RUNNER_V2, "finish_requests"),
        "finished_req_ids = finished_req_ids.union(preempted_req_ids)",
        "self._remove_request(req_id)",
        who="vllm_source.handover_state",
    )


def test_preemption_sets_what_ours_sets() -> None:
    """vllm_port._break_deadlock makes a request give up its blocks as this does."""
    says(
        Scheduler._preempt_request,
        "self._free_request_blocks(request)",
        "request.status = RequestStatus.PREEMPTED request.num_computed_tokens = 0",
        "request.num_preemptions += 1",
        "self.waiting.prepend_request(request)",
        "self.reset_preempted_req_ids.add(request.request_id)",
        who="vllm_port._break_deadlock",
    )


def test_what_keeps_a_request_that_holds_blocks_from_starting() -> None:
    """Only for lack of memory somebody has to give his blocks up."""
    says(
        Scheduler.schedule,
        "if self._pause_state == PauseState.PAUSED_ALL:",
        "num_running = len(self.running) + self.num_waiting_for_streaming_input"
        " if num_running >= self.max_num_active_reqs: break",
        who="vllm_port._deadlocked",
    )
    blocked = {s for s in RequestStatus if Scheduler._is_blocked_waiting_status(s)}
    assert not blocked & {RequestStatus.WAITING, RequestStatus.PREEMPTED}


def test_counters_of_what_is_in_flight_return_to_zero() -> None:
    says(
        Scheduler._update_after_schedule,
        "request.num_computed_tokens += num_scheduled_token"
        " request.num_in_flight_tokens += num_scheduled_token",
        who="vllm_source.progress",
    )
    says(
        Scheduler.update_from_output,
        "request = self.requests.get(req_id)",
        "request.num_in_flight_tokens -= num_tokens_scheduled",
        "if request is None or request.is_finished():",
        "if status_before_stop == RequestStatus.RUNNING: stopped_running_reqs.add(request)",
        "self.running = remove_all(self.running, stopped_running_reqs)",
        who="vllm_source.stop",
    )
    up, down = "request.num_output_placeholders += ", "request.num_output_placeholders -= "
    says(AsyncScheduler._update_after_schedule, up, who="vllm_source.progress")
    says(AsyncScheduler._update_request_with_output, down, who="vllm_source.progress")


@pytest.mark.parametrize("status", [RequestStatus.RUNNING, RequestStatus.PREEMPTED])
def test_a_request_in_no_queue_can_be_finished(status: RequestStatus) -> None:
    """vllm_source.release, and an abort while a request is stopped."""
    known, freed = request(), []
    known.status = status
    scheduler = SimpleNamespace(
        requests={"r": known},
        running=[],
        waiting=create_request_queue(SchedulingPolicy.FCFS),
        kv_holding_waiting=create_request_queue(SchedulingPolicy.FCFS),
        deferred_waiting=set(),
        _free_request=lambda r, delay_free_blocks: freed.append(r),
    )
    Scheduler.finish_requests(scheduler, "r", RequestStatus.FINISHED_ABORTED)  # type: ignore[arg-type]
    assert freed == [known]
    assert known.is_finished()
    assert "output" not in source(Scheduler.finish_requests).lower(), "it would tell the client"
    says(Scheduler._free_request, "self.finished_req_ids.add(request_id)", who="arrivals.ready")
    says(Scheduler._free_blocks, "del self.requests[request.request_id]", who="arrivals.reserve")


@pytest.mark.parametrize("policy", list(SchedulingPolicy))
def test_queues_do_what_the_port_asks(policy: SchedulingPolicy) -> None:
    queue, first, second = create_request_queue(policy), request("a"), request("b")
    queue.prepend_request(second)
    queue.prepend_request(first)
    queue.remove_requests([request("stranger")])
    assert list(queue) == [first, second]
    queue.remove_requests([second])
    assert list(queue) == [first]


# -- KV blocks


def test_blocks_are_reserved_read_and_returned() -> None:
    kv, new = manager(), request(prompt=range(10))
    pool = kv.block_pool
    assert kv.enable_caching
    assert len(kv.get_computed_blocks(new)) == 3, "arrivals.reserve unpacks three"
    takes(
        kv.allocate_slots, "num_new_computed_tokens", "new_computed_blocks", "delay_cache_blocks",
        who="arrivals.reserve",
    )  # fmt: skip
    free = pool.get_num_free_blocks()
    assert kv.allocate_slots(new, 10, delay_cache_blocks=True) is not None
    assert new.num_computed_tokens == 0
    (blocks,) = kv.get_blocks("r").blocks
    assert [list(group) for group in kv.get_blocks("r").get_block_ids()] == [
        [b.block_id for b in blocks]
    ]
    assert free - pool.get_num_free_blocks() == len(blocks) == 3
    assert all(not b.is_null and b.block_hash is None for b in blocks), "they were cached too early"
    kv.cache_blocks(new, 10)
    assert [b.block_hash is not None for b in blocks] == [True, True, False]
    pool.touch(blocks)
    kv.free(new)
    assert free - pool.get_num_free_blocks() == 3, "a touched block outlives its request"
    pool.free_blocks(reversed(blocks))
    assert pool.get_num_free_blocks() == free
    found, hit, _ = kv.get_computed_blocks(again := request("s", range(10)))
    assert hit == 2 * BLOCK
    slots = kv.allocate_slots(
        again, 2, num_new_computed_tokens=hit, new_computed_blocks=found, delay_cache_blocks=True
    )
    assert slots is not None
    assert list(kv.get_blocks("s").blocks[0][:2]) == list(blocks[:2])
    assert kv.allocate_slots(request("t"), 1000, delay_cache_blocks=True) is None
    kv.free(request("never seen"))  # arrivals.drop, without blocks


def test_blocks_are_freed_behind_a_sliding_window_by_computed_tokens() -> None:
    """So slots ahead are got by num_new_tokens."""
    says(
        KVCacheManager.allocate_slots,
        "request.num_computed_tokens + num_new_computed_tokens",
        "self.coordinator.remove_skipped_blocks(request.request_id,"
        " max(0, total_computed_tokens - request.num_in_flight_tokens)",
        who="arrivals.reserve",
    )


# -- requests


def test_every_field_of_a_request_on_the_wire_was_considered() -> None:
    from llumnix.engine.migration.vllm_source import VllmSource

    call = source(VllmSource.describe).split("EngineCoreRequest(")[1].split("))")[0]
    filled = set(re.findall(r"(\w+)=", call))
    # Refused when set (engine/migration/unsupported.py): prompt_embeds, prompt_is_token_ids,
    # resumable. Read by data-parallel waves: current_wave; by the frontend: external_req_id; on
    # entry: abort_immediately.
    left_out = {
        "abort_immediately", "current_wave", "external_req_id", "prompt_embeds",
        "prompt_is_token_ids", "resumable",
    }  # fmt: skip
    same(EngineCoreRequest.__struct_fields__, filled | left_out, "fields of EngineCoreRequest")
    assert EngineCoreRequest.__struct_config__.array_like


def test_everything_a_request_knows_was_considered() -> None:
    """What is not on the wire, the handover carries, follows from the rest, or is at its start."""
    wire = {
        "arrival_time", "cache_salt", "client_index", "kv_hints", "lora_request", "pooling_params",
        "priority", "prompt_token_ids", "request_id", "sampling_params", "session_id",
        "structured_output_request", "trace_headers",
    }  # fmt: skip
    handover = {
        "_all_token_ids", "_output_token_ids", "all_token_ids", "num_computed_tokens",
        "num_preemptions", "output_token_ids", "prefill_stats", "status",
    }  # fmt: skip
    follows = {
        "_block_hasher", "block_hashes", "kv_cache_report_mode", "max_tokens", "num_prompt_tokens",
        "skip_reading_prefix_cache",
    }  # fmt: skip
    refused = {
        "_prompt_embeds_per_block_hashes", "ec_transfer_params", "kv_transfer_params",
        "mm_features", "prompt_embeds", "prompt_is_token_ids", "replay_start", "resumable",
        "shared_prefix_boundary", "spec_decode_metrics", "spec_token_ids", "streaming_queue",
    }  # fmt: skip
    # Nothing is in flight at a handover; the rest is rewritten by each step, or ends a request.
    fresh = {
        "abort_immediately", "drop_stale_output", "events", "is_prefill_chunk", "last_sched_seq",
        "next_decode_eligible_step", "num_in_flight_tokens", "num_nans_in_logits",
        "num_output_placeholders", "num_stale_output_tokens", "stop_reason",
    }  # fmt: skip
    same(vars(request()), wire | handover | follows | refused | fresh, "attributes of Request")


def test_a_request_is_made_and_fed_like_the_engines_own() -> None:
    takes(Request.from_engine_core_request, "request", "block_hasher", who="arrivals.reserve")
    own = "Request.from_engine_core_request(request, self.request_block_hasher)"
    says(EngineCore.preprocess_add_request, own, "grammar_init(req)", who="grammars.py")
    new = request()
    assert new.prefill_stats is not None
    assert not new.use_structured_output
    new.append_output_token_ids([4, 5])
    assert (list(new.output_token_ids), new.num_tokens, new.num_output_tokens) == ([4, 5], 5, 2)
    assert len(new.block_hashes) == 1, "block hashes follow the tokens"
    assert new.take_prefill_stats() is not None
    assert new.prefill_stats is None, "HandoverState.cached: None once the client was told"
    assert Request.__eq__ is object.__eq__, "vllm_source.stop finds it by identity"


def test_a_request_keeps_the_lists_of_its_tokens() -> None:
    prompt = Prompt([1, 2, 3])
    sampling = SamplingParams(max_tokens=4)
    new = Request("r", prompt, sampling, None)
    new.append_output_token_ids(4)
    new.append_output_token_ids([5])
    assert new.prompt_token_ids is prompt
    assert isinstance(new._all_token_ids, Grown)
    assert new._all_token_ids == [1, 2, 3, 4, 5]
    says(Scheduler.schedule, "req._all_token_ids,", who="engine/migration/packed_tokens.py")


def as_workers_get(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))  # noqa: S301


def test_runner_v2_takes_packed_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the kernel that it launches in the end, which wants a GPU."""
    written: list[list[int]] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda gpu, stride, rows, starts, contents, *_, **__: written.append(
                contents.tolist()
            )

    monkeypatch.setattr(packed_tokens, "_stay_packed", False)  # As it was, once this has ended.
    monkeypatch.setattr(buffer_utils, "_apply_write_kernel", Kernel())
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)
    tokens = StagedWriteTensor((4, 100), torch.int32, torch.device("cpu"))
    take_packed(SimpleNamespace(req_states=SimpleNamespace(all_token_ids=tokens)))
    assert not isinstance(tokens._staged_write_contents, Gathered), "a way of its own is left"
    assert isinstance(as_workers_get(Prompt([1])), Prompt)
    tokens.write_contents = UvaBufferPool(1, torch.int32)
    take_packed(SimpleNamespace(req_states=SimpleNamespace(all_token_ids=tokens)))
    arrived = as_workers_get(Prompt([1, 2]).copy())
    assert isinstance(arrived, Packed)
    for tokens_of_one in (arrived, Prompt([1, 2]).copy()):
        tokens.stage_write(1, 0, tokens_of_one)
        tokens.stage_write(2, 0, [3])
        tokens.stage_write(0, 0, [])
        tokens.apply_write()
    assert written == [[1, 2, 3]] * 2
    says(RequestState.add_request, "self.all_token_ids.stage_write(req_idx, 0, all_token_ids)",
        who="engine/migration/packed_tokens.py")  # fmt: skip
    says(
        RequestState.__init__,
        "self.all_token_ids = StagedWriteTensor(",
        who="engine/migration/packed_tokens.py",
    )
    says(RequestState.add_request, "prefill_len = len(all_token_ids)",
        who="engine/migration/packed_tokens.py")  # fmt: skip
    says(RunnerV2.add_requests, "prompt_len = new_req_data.prompt_len",
        who="engine/migration/packed_tokens.py")  # fmt: skip
    new = NewRequestData("r", arrived, [], None, None, ([],), 0, None, prefill_token_ids=arrived)
    assert new.prompt_len == 2
    take_packed(SimpleNamespace())


def test_a_description_is_one_message_that_decodes_to_the_same() -> None:
    values: list[Any] = ["r", [1, 2], None, SamplingParams(seed=7), None, 1.5, None, "salt", None]
    parts = MsgpackEncoder().encode(EngineCoreRequest(*values, priority=3))
    assert len(parts) == 1
    back = MsgpackDecoder(EngineCoreRequest).decode(bytes(parts[0]))
    assert (back.request_id, back.prompt_token_ids, back.priority) == ("r", [1, 2], 3)
    assert back.sampling_params.sampling_type == SamplingType.RANDOM_SEED


def test_grammars_are_compiled_aside_and_fed_token_by_token() -> None:
    new = request(structured_outputs=StructuredOutputsParams(json_object=True))
    structured: Any = new.structured_output_request
    assert new.use_structured_output
    assert structured.reasoning_ended is None
    assert structured.reasoning_parser_kwargs is None
    structured.llumnix_reasoning_ended = True  # arrivals.arrived writes that
    structured._grammar = ValueError("no")
    assert structured.is_grammar_ready
    assert isinstance(structured.grammar, ValueError), "arrivals.ready reads why"
    submit = "self.executor.submit(self._create_grammar, request)"
    put = "request.structured_output_request.grammar = grammar"
    built = "if self.backend is None:"
    says(StructuredOutputManager.grammar_init, built, submit, put, who="grammars.py")
    assert list(inspect.signature(StructuredOutputManager.accept_tokens).parameters) == [
        "self", "request", "new_token_ids",
    ]  # fmt: skip
    says(
        StructuredOutputManager.accept_tokens,
        "structured_req.reasoning_ended = True",
        "return grammar.accept_tokens(request.request_id,",
        who="arrivals._feed",
    )
    says(
        Scheduler.update_from_output,
        "self._update_request_with_output(request",
        "self.structured_output_manager.accept_tokens(request, new_token_ids",
        who="arrivals._feed",
    )


def test_an_engine_refuses_grammars_of_another_backend_where_we_decline_them() -> None:
    """engine/migration/grammars.py: whatever is raised there."""
    who = "grammars.py"
    if VERSION < V0_33:
        assert "VLLMValidationError" not in source(StructuredOutputManager.grammar_init), who
        return
    says(
        StructuredOutputManager.grammar_init,
        "request_backend = structured_outputs._backend",
        "request_backend != self.backend_name: raise VLLMValidationError(",
        who=who,
    )
    says(
        EngineCoreProc.process_input_sockets,
        "except VLLMValidationError as e:",
        "self._handle_request_validation_error(req, e)",
        who="frontend/streams/client.py's error_of",
    )


def test_what_cannot_be_moved_is_still_known_by_its_names() -> None:
    text = source(unsupported)

    def read(prefix: str) -> list[str]:
        return re.findall(rf"\b{prefix}\.(\w+)", text)

    has(
        VllmConfig,
        {*read("config"), "use_v2_model_runner"},
        "engine/migration/unsupported.py, vllm_destination.py",
    )
    has(ParallelConfig, read("parallel"), "engine/migration/unsupported.py")
    has(Scheduler, read("scheduler"), "engine/migration/unsupported.py")
    has(request(), read("request"), "engine/migration/unsupported.py")
    has(SamplingParams(), read("params"), "engine/migration/unsupported.py")
    assert hasattr(ModelConfig, "is_diffusion")
    assert '"generate"' in inspect.getsource(inspect.getmodule(ModelConfig)), "a runner's name"  # type: ignore[arg-type]
    assert "self.runner_type = " in inspect.getsource(ModelConfig)


# -- workers: engine/migration/worker.py


def test_the_worker_extension_is_mixed_in() -> None:
    says(
        WorkerWrapperBase.init_worker,
        "worker_extension_cls not in worker_class.__bases__",
        "assert not hasattr(worker_class, attr)",
        "worker_class.__bases__ = worker_class.__bases__ + (worker_extension_cls,",
        who="engine/migration/worker.py",
    )
    has(CacheConfig, ["num_gpu_blocks"], "engine/migration/worker.py")
    for path in (RUNNER_V1, RUNNER_V2):
        assert re.search(r"self\.kv_caches\b.* = \[", (ROOT / path).read_text()), path
        assert "self.device = device" in (ROOT / path).read_text(), path
    assert "self.rank = rank" in (ROOT / "v1/worker/worker_base.py").read_text()


def memory_of_layers(
    layout: KVCacheLayout, windowed: int, full: int, heads: int
) -> tuple[int, dict[str, torch.Tensor]]:
    """The blocks and tensors of a model with `windowed` layers of 2 KV heads, which see a window,
    and `full` layers of `heads` KV heads, which see all. They are two groups."""
    small = SlidingWindowSpec(
        block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.float32, sliding_window=64
    )
    large = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=heads, head_size=8, dtype=torch.float32
    )
    layers = {f"w{n}": small for n in range(windowed)} | {f"f{n}": large for n in range(full)}
    specs = kv_cache_utils.unify_kv_cache_spec_page_size(layers)
    groups = [
        KVCacheGroupSpec([n for n in layers if n[0] == kind], specs[f"{kind}0"]) for kind in "wf"
    ]
    config: Any = SimpleNamespace(
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: layout,
            num_gpu_blocks_override=8,
            prefix_cache_retention_interval=None,
        ),
    )
    made = kv_cache_utils.get_kv_cache_config_from_groups(config, groups, 2**20)
    return made.num_blocks, allocate_kv_cache(made, torch.device("cpu"), layout)


@pytest.mark.parametrize("order", ["ours", "reversed"])
@pytest.mark.parametrize(
    ("layout", "windowed", "full", "heads"),
    [
        *((layout, 2, 2, heads) for layout in ("LBHNC", "LBNHC") for heads in (2, 3, 4)),
        *((layout, 3, 2, heads) for layout in ("BLHNC", "BLNHC") for heads in (2, 3, 4)),
        ("LHBNC", 2, 2, 2),
        ("BHLNC", 3, 2, 2),
        ("BHLNC", 2, 3, 2),
    ],
)
def test_a_block_is_copied_whole_in_whichever_group_it_is(
    layout: str, windowed: int, full: int, heads: int, order: str
) -> None:
    """vLLM lays groups over each other and may pad the smaller page. So a block begins at the same
    byte in all of them, and the longest of them has the bytes of the others: engine/kv/blocks.py
    and engine/migration/worker.py rely on it."""
    made = [memory_of_layers(KVCacheLayout[layout], windowed, full, heads) for _ in range(2)]
    (blocks, ours), (_, theirs) = made
    names = sorted(ours, reverse=order == "reversed")
    near, far = (lay_out([of[n] for n in names], blocks) for _, of in made)
    if layout != "BHLNC":  # There a part of a block may be copied twice.
        places = {t.data_ptr() for t in ours.values()}
        longest = [max(t[0].nbytes for t in ours.values() if t.data_ptr() == p) for p in places]
        assert near.block_bytes == sum(longest)
    for tensor in theirs.values():
        tensor.fill_(1.0)
    chunk = np.empty(2 * far.block_bytes, np.uint8)
    HostMemory(far).gather([3, 4], chunk)
    HostMemory(near).scatter([3, 4], chunk)
    for name, tensor in ours.items():
        assert tensor[3:5].eq(1.0).all(), f"a part of a block of {name} stays behind"
        assert tensor[:3].eq(0.0).all(), f"another block of {name} is written to"
        assert tensor[5:].eq(0.0).all(), f"another block of {name} is written to"


def test_every_field_of_runner_v1s_request_was_considered() -> None:
    from llumnix.engine.migration.worker import LlumnixWorker

    text = source(LlumnixWorker._install).split("CachedRequestState(")[1]
    filled = set(re.findall(r"(\w+)=", text))
    left_out = {  # Of multimodal, embedded, speculative and pooling requests, which do not move.
        "in_progress_prompt_logprobs_cpu", "mrope_position_delta", "mrope_positions",
        "pooling_states", "prev_num_draft_len", "prompt_embeds", "prompt_is_token_ids",
    }  # fmt: skip
    fields = {f.name: f for f in dataclasses.fields(CachedRequestState)}
    same(fields, filled | left_out, "fields of CachedRequestState")
    assert all(fields[n].default is not dataclasses.MISSING for n in left_out)


def test_runner_v1_resumes_a_request_from_what_we_put_there() -> None:
    says(
        in_file(RUNNER_V1, "_update_states"),
        "for req_id in scheduler_output.finished_req_ids: req_state = self.requests.pop(req_id",
        "unscheduled_req_ids = cached_req_ids - (scheduled_req_ids - resumed_req_ids)",
        "sampling_params.sampling_type == SamplingType.RANDOM_SEED",
        "generator = torch.Generator(device=self.device)"
        " generator.manual_seed(sampling_params.seed)",
        "req_state = self.requests[req_id]",
        "num_output_tokens < len(req_state.output_token_ids)",
        "assert req_index is None assert new_block_ids is not None",
        "req_state.block_ids = new_block_ids",
        "resumed_token_ids = req_data.all_token_ids[req_id]"
        " req_state.output_token_ids = resumed_token_ids[-num_output_tokens:]",
        "reqs_to_add.append(req_state)",
        "self.input_batch.add_request(request)",
        who="worker.llumnix_install",
    )


def test_the_batched_copy_takes_what_we_give() -> None:
    """engine/kv/blocks_cuda.py; the operator itself is in vLLM's CUDA builds only."""
    from vllm import _custom_ops

    call = "torch.ops._C_cache_ops.swap_blocks_batch(src_ptrs, dst_ptrs, sizes,"
    says(_custom_ops.swap_blocks_batch, f"{call} is_src_access_order_any)", who="blocks_cuda.py")


# -- the engine core: engine/instance.py, engine/migration/host.py


def test_the_engine_core_has_what_we_read() -> None:
    names = "vllm_config scheduler model_executor batch_queue request_block_hasher abort_requests"
    has(EngineCore, names.split(), "engine/migration/vllm_destination.py, instance.py")
    ours = "input_queue output_queue shutdown_state _process_engine_step _handle_client_request"
    has(EngineCoreProc, ours.split(), "engine/migration/host.py, instance.py")


def test_our_pairs_reach_the_engines_own_thread() -> None:
    says(
        EngineCoreProc._process_input_queue,
        "self.input_queue.get(block=block) self._handle_client_request(*req)",
        "self.input_queue.get_nowait() self._handle_client_request(*req)",
        who="host._enqueue",
    )
    takes(EngineCoreProc._handle_client_request, "request_type", "request", who="instance.py")
    says(
        EngineCoreProc._handle_client_request,
        "request_type == EngineCoreRequestType.WAKEUP: return",
        "self.abort_requests(request)",
        "method := getattr(self, method_name)",
        who="instance.py",
    )
    says(EngineCore._process_aborts_queue, "self.abort_requests(request_ids)", who="instance.py")
    assert EngineCoreRequestType.WAKEUP.value


def test_an_engine_can_stand_still_between_its_input_and_its_step() -> None:
    """instance._process_input_queue."""
    says(
        source(EngineCoreProc),
        "def run_busy_loop(self):",
        "while self._handle_shutdown():",
        "self._process_input_queue()",
        "self._process_engine_step()",
        who="instance._process_input_queue",
    )
    says(
        EngineCoreProc._process_input_queue,
        "while not self.has_work() and self.is_running():",
        who="instance._process_input_queue",
    )
    says(
        EngineCoreProc.is_running,
        "self.shutdown_state == EngineShutdownState.RUNNING",
        who="instance._process_input_queue",
    )


def test_a_step_brings_the_oldest_batch_home_when_nothing_is_scheduled() -> None:
    """instance._landing_only, and the fences of engine/migration/vllm_destination.py."""
    says(
        EngineCore.step_with_batch_queue,
        "if self.scheduler.has_requests(): scheduler_output = self.scheduler.schedule(",
        "batch_queue.appendleft((future, scheduler_output, exec_future))",
        "elif not batch_queue:",
        "future, scheduler_output, exec_model_fut = batch_queue.pop()",
        "self.scheduler.update_from_output(scheduler_output, model_output)",
        who="instance._landing_only",
    )
    says(EngineCoreProc._process_engine_step, "= self.step_fn()", who="instance.py")
    assert inspect.signature(EngineCoreProc._process_engine_step).return_annotation is bool


def test_a_step_may_put_prompts_off() -> None:
    """tests/engine/test_standing_still.py shows that it does."""
    says(
        EngineCore.step_with_batch_queue,
        "self.scheduler.schedule(self._should_throttle_prefills())",
        who="instance._should_throttle_prefills",
    )
    says(
        EngineCore.step,
        "self.scheduler.schedule(self._should_throttle_prefills())",
        who="instance._should_throttle_prefills",
    )
    has(EngineCore, ["_should_throttle_prefills"], "instance._should_throttle_prefills")
    fields = {field.name for field in dataclasses.fields(SchedulerOutput)}
    assert {"total_num_scheduled_tokens", "num_scheduled_tokens"} <= fields, "engine/readings.py"


def test_outputs_leave_in_order_with_our_messages_among_them() -> None:
    put = "for output in outputs.items() if outputs else (): self.output_queue.put_nowait(output)"
    says(EngineCoreProc._process_engine_step, put, who="host._tell_frontend")
    says(
        EngineCoreProc.process_output_sockets,
        "output = self.output_queue.get()",
        "client_index, outputs = output outputs.engine_index = engine_index",
        who="frontend/streams/client.py",
    )
    message = {"llumnix": b"\x00\xff"}
    told = EngineCoreOutputs(outputs=[EngineCoreOutput("r", [], kv_transfer_params=message)])
    (part,) = MsgpackEncoder().encode(told)
    (output,) = MsgpackDecoder(EngineCoreOutputs).decode(bytes(part)).outputs
    assert (output.request_id, output.new_token_ids) == ("r", [])
    assert output.kv_transfer_params == message
    assert not output.finished


def test_one_engine_or_all_can_be_called() -> None:
    """frontend/engines/calls.py."""
    parameter = inspect.signature(AsyncMPClient._call_utility_async).parameters["engine"]
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    every = "self._call_utility_async(method, *args, engine=engine) for engine in self.core_engines"
    says(AsyncMPClient.call_utility_all_async, every, who="engines/calls.py")
    consensus = "await self.call_utility_all_async(method, *args)"
    says(AsyncMPClient.call_utility_consensus_async, consensus, who="engines/calls.py")


def test_what_touches_all_kv_memory_are_calls_that_ours_can_stand_before() -> None:
    """engine/memory_calls.py."""
    for name, parameters in {
        "pause_scheduler": ["self", "mode", "clear_cache"],
        "resume_scheduler": ["self"],
        "reset_prefix_cache": ["self", "reset_running_requests", "reset_connector"],
        "sleep": ["self", "level", "mode"],
        "wake_up": ["self", "tags"],
        "release_kv_cache_memory": ["self"],
    }.items():
        for kind in (EngineCore, EngineCoreProc):
            found = list(inspect.signature(getattr(kind, name)).parameters)
            assert found == parameters, f"{kind.__name__}.{name}"
    assert "self.pause_scheduler(" in inspect.getsource(EngineCore.sleep)
    assert "self.resume_scheduler()" in inspect.getsource(EngineCore.wake_up)
    assert "self.reset_prefix_cache(" in inspect.getsource(EngineCore._reset_caches)
    assert "isinstance(result, Future)" in inspect.getsource(EngineCoreProc._invoke_utility_method)
