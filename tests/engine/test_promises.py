"""What an engine's requests may still take in their slices, with vLLM's own scheduler."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm import SamplingParams
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec
from vllm.v1.request import Request, RequestStatus

from engine.test_starts import HIGH, NORMAL, PASS, Served
from engine.test_stuck import following
from llumnix.core.priorities import Priorities
from llumnix.core.queue_rules import PLAIN, SliceRules
from llumnix.core.settings import PrioritySettings
from llumnix.core.types import RequestId
from llumnix.engine.queueing import Queueing
from llumnix.engine.starting import promises
from llumnix.engine.starting.promises import COUNT_IDLE_EVERY, EnginePromises
from support.no_model import BLOCK, add, made

SLICES = replace(PLAIN, slices=SliceRules(tokens=3 * BLOCK))

SESSION: dict[str, Any] = {"priority": NORMAL, "resumable": True, "arrival_time": 1.5}


def of(it: Served) -> EnginePromises:
    starts = it.queueing._starts
    assert starts is not None
    assert starts.promises is not None
    return starts.promises


def counted(it: Served, requests: list[Request]) -> int:
    """What these may still take, from their promises alone."""
    kv, left = it.scheduler.kv_cache_manager, 0
    for request in requests:
        if (promise := getattr(request, "llumnix_promise", None)) is not None:
            held = len(kv.get_blocks(request.request_id).blocks[0])
            left += max(0, promise.blocks - held)
    return left


@pytest.mark.parametrize(("blocks", "starts"), [(9, True), (10, False)])
def test_a_request_starts_only_if_its_slice_fits_beside_all_promises(
    tiny_model: Path, blocks: int, starts: bool
) -> None:
    it = Served(tiny_model, SLICES).running(4)
    it.add("b", blocks)
    # Of 20 blocks the first has five and may take three more; the newcomer's slice is three too.
    assert it.step() == (["b"] if starts else [])
    assert it.reader.read().keep_tokens == (0 if starts else 6 * BLOCK)


def test_several_that_start_at_once_count_with_their_promises(tiny_model: Path) -> None:
    it = Served(tiny_model, SLICES).running(2)
    for name in "bcdefg":
        it.add(name, 1)
    # The first takes six in all, each of the others four.
    assert it.step() == ["b", "c", "d"]


def test_a_model_without_kv_promises_little_and_ends_no_engine(tiny_model: Path) -> None:
    it = Served(tiny_model, SLICES).running(4)
    newcomer = it.add("b", 1)
    scheduler = it.scheduler
    scheduler.kv_cache_config = SimpleNamespace(kv_cache_groups=[])
    scheduler.kv_cache_manager.get_blocks = lambda name: SimpleNamespace(blocks=())
    those = EnginePromises(scheduler, SliceRules(tokens=3 * BLOCK))
    those.before_step()
    those.admitting()
    assert those.made() + those.first_slice(newcomer) > 0


def test_an_engine_that_runs_nothing_starts_whatever_fits(tiny_model: Path) -> None:
    it = Served(tiny_model, SLICES)
    it.add("a", 20, answer=1)
    assert it.step() == ["a"]


def test_the_rest_of_a_prompt_is_promised_once(tiny_model: Path) -> None:
    it = Served(tiny_model, SLICES, long_prefill_token_threshold=2 * BLOCK)
    it.add("a", 8)
    it.add("b", 7)
    # The first takes eleven in all, two of them now; of twenty nine are left.
    assert it.step() == ["a"]
    assert it.reader.read().keep_tokens == (6 + 3 + 3) * BLOCK
    it.add("c", 1)
    it.core.abort_requests(["b"])
    assert it.step() == ["c"]


def test_an_urgent_request_preempts_no_more_than_its_slice_needs(tiny_model: Path) -> None:
    it = Served(tiny_model, SLICES, preempt=True)
    for name in "abc":
        it.add(name, 2)
    it.step()
    it.reader.read()
    it.add("urgent", 5, priority=HIGH)
    it.step()
    assert it.reader.read().preemptions == 1
    assert it.scheduler.running[-1].request_id == "urgent"


def test_an_answer_is_learnt_and_one_that_is_cut_off_as_far_as_it_came(tiny_model: Path) -> None:
    it = Served(tiny_model, SLICES)
    it.reader._ended = it.queueing.ended
    stopped, capped = it.add("stopped", 1, answer=50), it.add("capped", 1, answer=20)
    assert stopped.sampling_params is not None
    it.step()
    it.reader.read()
    lengths = of(it).slices.lengths
    while capped.request_id in it.scheduler.requests:
        it.step()
    it.reader.read()
    assert (lengths.answers, sum(lengths._all.ended), lengths._all.left[:2]) == (1, 0, [1, 0])
    stopped.sampling_params.stop_token_ids = [7]
    stopped.sampling_params._all_stop_token_ids.add(7)
    it.step()
    it.reader.read()
    assert (lengths.answers, sum(lengths._all.ended), lengths._all.left[:2]) == (2, 1, [2, 1])


def test_what_is_kept_free_is_told_while_all_slots_are_taken(tiny_model: Path) -> None:
    rules = replace(PLAIN, slices=SliceRules(tokens=20 * BLOCK))
    it = Served(tiny_model, rules, blocks=100, max_num_seqs=2)
    for name in "abc":
        it.add(name, 2, answer=400)
    it.step()
    told = []
    for _ in range(10 * BLOCK):
        it.step()
        it.reader.mark_changed()
        own = 20  # The slice of the head.
        told.append(it.reader.read().keep_tokens // BLOCK - own)
        left = counted(it, it.scheduler.running)
        assert left <= told[-1] <= left + 2 * (COUNT_IDLE_EVERY // BLOCK + 1)
    assert told[0] - told[-1] > 15, "they have taken ten blocks each"


def test_nothing_is_kept_of_requests_while_nobody_waits(tiny_model: Path) -> None:
    it = Served(tiny_model, SLICES).running(4)
    it.add("b", 16)
    it.step()
    assert of(it)._known
    it.core.abort_requests(["b"])
    it.step()
    assert not of(it)._known
    assert not of(it)._due
    # It is counted again for a load report that comes before the next step.
    it.add("c", 16)
    assert it.reader.read().keep_tokens == 6 * BLOCK


def test_what_arrives_is_promised_its_slice_unless_it_comes_without_kv(tiny_model: Path) -> None:
    it = Served(tiny_model, SLICES).running(4)
    it.add("b", 16)
    it.step()
    before = it.reader.read().keep_tokens
    coming = it.scheduler.running[0]
    of(it)._arriving = lambda: [coming]
    of(it)._scheduler.waiting.peek_request()
    it.reader.mark_changed()
    assert it.reader.read().keep_tokens > before
    coming = made(it.core, "without KV", list(range(5 * BLOCK)), 9)
    it.reader.mark_changed()
    assert it.reader.read().keep_tokens == before


def test_a_session_without_input_is_promised_nothing_until_it_has_some(tiny_model: Path) -> None:
    it = Served(tiny_model, SLICES, blocks=40).running(4)
    session = add(it.core, "session", [9] * 2 * BLOCK, 2, **SESSION)
    it.add("b", 36)
    keep = []
    for _ in range(6):
        it.step()
        it.reader.mark_changed()
        keep.append(it.reader.read().keep_tokens)
    assert session.status == RequestStatus.WAITING_FOR_STREAMING_REQ
    alone = counted(it, it.scheduler.running) * BLOCK
    head = 3 * BLOCK
    assert keep[-1] == alone + head
    it.scheduler._update_request_as_session(session, following([8] * 5 * BLOCK))
    it.reader.mark_changed()
    # It has three blocks. The last takes the two tokens of answer beside a part of the input.
    assert it.reader.read().keep_tokens == alone + head + 5 * BLOCK


def test_idle_sessions_take_slots(tiny_model: Path) -> None:
    it = Served(tiny_model, SLICES, max_num_seqs=2).running(4)
    add(it.core, "session", [9] * BLOCK, 1, **SESSION)
    it.add("b", 1)
    for _ in range(4):
        assert "b" not in it.step()
    assert of(it)._skips > 1, "nobody can start, and so the sum is not followed"


def test_promises_count_in_every_group_of_layers_that_grows(tiny_model: Path) -> None:
    it = Served(tiny_model, SLICES).running(4)
    head = it.add("b", 36)
    it.step()
    those = of(it)
    before, first = those.made(), those.first_slice(head)
    those._growth = replace(those._growth, blocks=3)
    assert (those.made(), those.first_slice(head)) == (3 * before, 3 * first)
    assert before
    assert first


@pytest.mark.parametrize("first", ["mamba", "attention"])
def test_state_that_does_not_grow_is_no_part_of_a_promise(tiny_model: Path, first: str) -> None:
    attention = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32
    )
    mamba = MambaSpec(block_size=10 * BLOCK, shapes=((16, 16),), dtypes=(torch.float32,))
    layers = {"mamba": mamba, "attention": attention}
    it = Served(
        tiny_model,
        SLICES,
        layers={first: layers.pop(first), **layers},
        max_model_len=10 * BLOCK,
        enable_prefix_caching=False,
    )
    it.add("a", 4)
    assert it.step() == ["a"]
    # Of 20 blocks it has five and one of state, and may take three more.
    head = it.add("b", 7)
    it.scheduler.kv_cache_manager.block_pool.get_new_blocks(7)
    it.step()
    it.scheduler.waiting.peek_request()
    assert (of(it).made(), of(it).first_slice(head)) == (3, 3)
    for _ in range(2 * BLOCK):
        it.step()
    assert (of(it).made(), of(it).first_slice(head)) == (1, 3)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_sum_follows_what_happens_and_nobody_covered_is_preempted(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, seed: int, ahead: bool
) -> None:
    """Counted from outside, in a world with aborts and urgent requests."""
    monkeypatch.setattr(promises, "COUNT_EVERY", 10**9)
    dice = random.Random(f"{seed} promises")
    blocks = dice.randrange(24, 70)
    rules = replace(PASS, slices=SliceRules(tokens=dice.choice((0, 20, 48, 100))))
    it = Served(tiny_model, rules, blocks=blocks, ahead=ahead, preempt=True)
    it.reader._ended = it.queueing.ended
    account = of(it)
    left = most = checked = step = covered_steps = 0
    asked = account.admitting

    def admitting() -> None:
        nonlocal most, checked
        asked()
        running = it.scheduler.running
        assert list(account._known.values()) == running
        # An ended request is taken for one that held a block more, so that the sum is no less.
        real = counted(it, running)
        most, checked = max(most, account._left - real), checked + 1
        assert account._left >= real

    monkeypatch.setattr(account, "admitting", admitting)
    left = 120
    while left or it.scheduler.requests:
        if left and dice.random() < 0.2:
            left -= 1
            size = min(dice.choice((1, 2, 3, 12)), blocks - 12)
            it.add(f"r{left}", size, dice.randrange(1, 90), dice.choice((0, 0, 0, HIGH)))
        if it.scheduler.running and dice.random() < 0.02:
            gone = dice.choice(it.scheduler.running).request_id
            it.core.abort_requests([gone])
        free = it.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        running = list(it.scheduler.running)
        known = [r for r in running if getattr(r, "llumnix_promise", None) is not None]
        covered = (
            len(known) == len(running)
            and all(r.num_output_tokens + 2 < r.llumnix_promise.until for r in running)
            and counted(it, running) <= free
            and not any(r.priority == HIGH for r in it.scheduler.waiting)
        )
        before = it.reader.read().preemptions
        it.step()
        it.reader.mark_changed()
        if covered and len(running) > 1:
            covered_steps += 1
            assert it.reader.read().preemptions == before
        step += 1
        assert step < 20_000
    assert checked > 50
    assert covered_steps > 20
    assert most <= 12


def test_on_a_real_engine_none_is_preempted_and_answers_stay_the_same(engine: Any) -> None:
    """Three fit with their answers. By prompts alone four start."""
    scheduler, classes = engine.core.scheduler, Priorities(PrioritySettings())
    plain, kv = scheduler.waiting, scheduler.kv_cache_manager
    found = []
    for rules in (PLAIN, replace(PLAIN, slices=SliceRules(tokens=96))):
        queueing = Queueing(scheduler, classes, rules=rules)
        answers: dict[str, list[int]] = {}
        options = SamplingParams(max_tokens=90, temperature=0.0, ignore_eos=True)
        for number in range(8):
            prompt = list(range(3 + number, 153 + number))
            engine.add(RequestId(f"{len(found)}-{number}"), prompt, options)
        known = list(scheduler.requests.values())
        try:
            while not engine.idle():
                queueing.before_step()
                for name, tokens, *_ in engine.step():
                    answers.setdefault(name.partition("-")[2], []).extend(tokens)
        finally:
            scheduler.waiting, kv.watermark_blocks = plain, 0
        assert [len(a) for a in answers.values()] == [90] * 8
        found.append((sum(r.num_preemptions for r in known), answers))
        assert scheduler.reset_prefix_cache()
    (preempted, expected), (kept, answers) = found
    assert preempted > 0
    assert kept == 0
    assert answers == expected
