"""What is said of an engine's prefix cache is what a request would find in it."""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

vllm = pytest.importorskip("vllm")

import torch  # noqa: E402
from vllm import SamplingParams  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core import kv_cache_utils  # noqa: E402
from vllm.v1.core.kv_cache_manager import KVCacheManager  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request, RequestStatus  # noqa: E402

from llumnix.core.events import PrefixesChanged  # noqa: E402
from llumnix.core.prefixes import BLOCK_TOKENS, chain, root  # noqa: E402
from llumnix.core.scheduling.prefix_index import PrefixIndex  # noqa: E402
from llumnix.core.types import EngineIndex, InstanceId, RequestId  # noqa: E402
from llumnix.engine.reporting import prefix_reader as prefix_reader_module  # noqa: E402
from llumnix.engine.reporting.prefix_reader import PrefixReader, RecordingBlockMap, prefix_reader  # noqa: E402
from llumnix.frontend.prompt_blocks import prompt_blocks  # noqa: E402

I0, ENGINE = InstanceId("i0"), EngineIndex(3)
TOKENS = list(range(1000, 1384))


class Heard:
    """What a controller makes of the facts."""

    def __init__(self, reader: PrefixReader) -> None:
        self.reader, self.index = reader, PrefixIndex()
        self.facts: list[PrefixesChanged] = []

    def listen(self) -> PrefixesChanged | None:
        fact = self.reader.read(at_once=True)
        if fact is not None:
            assert (fact.instance, fact.engine_index) == (I0, ENGINE)
            assert not set(fact.stored) & set(fact.removed)
            self.facts.append(fact)
            if fact.cleared:
                self.index.clear(I0)
            self.index.remove(I0, fact.removed)
            self.index.store(I0, fact.stored)
        return fact

    def blocks(self, prefix: Sequence[int]) -> int:
        """How many of its leading blocks a request would find."""
        return self.index.hit(I0, prefix)


# -- a whole engine -----------------------------------------------------------------------------


@pytest.fixture
def heard(engine: Any) -> Iterator[Heard]:
    """The reader of a whole engine, as engine/instance.py makes and reads it."""
    scheduler = engine.core.scheduler
    reader = prefix_reader(scheduler, I0, ENGINE, lambda: None)
    assert reader is not None
    reader.start()
    yield Heard(reader)
    reader.close()


def prefix(engine: Any, prompt: list[int], salt: str | None = None) -> tuple[int, ...]:
    """What the frontend would ask with."""
    made = engine.make(RequestId("x"), prompt, SamplingParams(max_tokens=1))
    made.cache_salt = salt
    return prompt_blocks(made)


def run(
    engine: Any, heard: Heard, name: str, prompt: list[int], tokens: int = 1, salt: Any = None
) -> list[int]:
    """The request's answer; the reader is asked before and after each step."""
    options = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    made = engine.make(RequestId(name), prompt, options)
    made.cache_salt = salt
    engine.add_core_request(made)
    heard.reader.track(engine.core.scheduler.requests[made.request_id])
    answer: list[int] = []
    while not engine.idle():
        heard.listen()
        for _, new, _, _ in engine.step():
            answer += new
        heard.listen()
    while heard.reader.more:
        heard.listen()
    assert heard.listen() is None, "nothing is left"
    return answer


def findable(engine: Any, prompt: list[int], salt: str | None = None) -> int:
    """The tokens that vLLM itself would find."""
    made = engine.make(RequestId("y"), prompt, SamplingParams(max_tokens=1))
    made.cache_salt = salt
    request, _ = engine.core.preprocess_add_request(made)
    kv = engine.core.scheduler.kv_cache_manager
    return int(kv.coordinator.find_longest_cache_hit(request.block_hashes, len(prompt))[1])


def prompt_of(length: int, seed: int) -> list[int]:
    return [3 + (seed * 131 + n * 7) % 500 for n in range(length)]


def test_the_prompts_that_ran_are_known_by_the_frontends_names(engine: Any, heard: Heard) -> None:
    first = heard.listen()
    assert first is not None
    assert (first.cleared, first.stored) == (True, ())
    lengths = (10, 63, 64, 65, 127, 128, 200)
    for length in lengths:
        run(engine, heard, f"r{length}", prompt_of(length, length))
    for length in lengths:
        prompt = prompt_of(length, length)
        assert heard.blocks(prefix(engine, prompt)) == length // BLOCK_TOKENS
        assert heard.blocks(prefix(engine, prompt_of(length, 999))) == 0


def test_prompts_of_one_salt_are_known_under_it_alone(engine: Any, heard: Heard) -> None:
    prompt = prompt_of(200, 1)
    run(engine, heard, "a", prompt, salt="mine")
    assert heard.blocks(prefix(engine, prompt, "mine")) == 3
    assert heard.blocks(prefix(engine, prompt, "yours")) == 0
    assert heard.blocks(prefix(engine, prompt)) == 0


def test_what_was_generated_is_known_too(engine: Any, heard: Heard) -> None:
    """The next turn of a conversation begins with it."""
    prompt = prompt_of(100, 1)
    answer = run(engine, heard, "a", prompt, tokens=100)
    assert heard.blocks(prefix(engine, prompt + answer)) == 3
    assert len(prompt + answer) // BLOCK_TOKENS == 3


def test_what_was_evicted_is_said_to_be_gone(engine: Any, heard: Heard) -> None:
    """Room for 768 tokens: at every step the hits are those of vLLM."""
    prompts = [prompt_of(160 + 32 * n, n) for n in range(6)]
    prompts += [[*prompts[n], *prompt_of(100, 7)] for n in range(3)]
    gone = 0
    for n, prompt in enumerate(prompts * 2):
        run(engine, heard, f"r{n}", prompt, tokens=5, salt="s" if n % 4 == 0 else None)
        for m, other in enumerate(prompts):
            salt = "s" if m % 4 == 0 else None
            hits = heard.blocks(prefix(engine, other, salt))
            assert hits == findable(engine, other, salt) // BLOCK_TOKENS, f"{m} after {n}"
            gone += m < n and hits == 0
    assert gone > 10
    assert sum(len(f.removed) for f in heard.facts) > 20


def test_a_cache_that_was_reset_is_said_to_be_empty_at_once(engine: Any, heard: Heard) -> None:
    prompt = prompt_of(200, 1)
    run(engine, heard, "a", prompt)
    assert engine.core.scheduler.reset_prefix_cache()
    fact = heard.listen()
    assert fact is not None
    assert (fact.cleared, fact.stored, fact.removed) == (True, (), ())
    assert heard.blocks(prefix(engine, prompt)) == 0
    run(engine, heard, "b", prompt)
    assert heard.blocks(prefix(engine, prompt)) == 3


def test_the_reader_keeps_no_more_names_than_there_are_blocks(engine: Any, heard: Heard) -> None:
    for n in range(12):
        run(engine, heard, f"r{n}", prompt_of(100 + 30 * n, n), tokens=9)
    pool, reader = engine.core.scheduler.kv_cache_manager.block_pool, heard.reader
    assert 0 < len(reader._names) <= pool.num_gpu_blocks - 1
    assert len(reader.kept) == len(reader._names)
    assert engine.core.scheduler.reset_prefix_cache()
    heard.listen()
    assert (reader._names, reader.kept, reader._tracked) == ({}, {}, {})
    assert reader._map.dropped == []


def test_many_blocks_that_are_known_hide_no_new_ones(
    engine: Any, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_reader_module, "NAMES_MAX", 2)
    prompt = prompt_of(320, 1)
    run(engine, heard, "a", prompt)
    longer = [*prompt, *prompt_of(64, 2)]
    made = engine.make(RequestId("b"), longer, SamplingParams(max_tokens=1))
    engine.add_core_request(made)
    heard.reader.track(engine.core.scheduler.requests["b"])
    while not engine.idle():
        engine.step()
    fact = heard.listen()
    assert fact is not None
    assert len(fact.stored) == 1
    assert heard.blocks(prefix(engine, longer)) == 6
    assert (heard.reader._tracked, heard.reader.more) == ({}, False)


def test_what_is_not_asked_for_again_at_once_is_told_in_time(engine: Any, heard: Heard) -> None:
    heard.listen()
    run(engine, heard, "a", prompt_of(200, 1))
    made = engine.make(RequestId("b"), prompt_of(200, 2), SamplingParams(max_tokens=1))
    engine.add_core_request(made)
    heard.reader.track(engine.core.scheduler.requests["b"])
    while not engine.idle():
        engine.step()
    heard.reader._read_s = time.monotonic() + 3600
    assert heard.reader.read() is None
    assert heard.listen() is not None
    assert heard.blocks(prefix(engine, prompt_of(200, 2))) == 3


def test_many_blocks_are_named_over_several_calls(
    engine: Any, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_reader_module, "NAMES_MAX", 2)
    made = [engine.make(RequestId(n), prompt_of(340, k), SamplingParams(max_tokens=1))
            for k, n in enumerate("ab")]  # fmt: skip
    for one in made:
        engine.add_core_request(one)
        heard.reader.track(engine.core.scheduler.requests[one.request_id])
    while not engine.idle():
        engine.step()
    told = 0
    while told == 0 or heard.reader.more:
        told += heard.listen() is not None
    assert told == 5
    assert [heard.blocks(prefix(engine, prompt_of(340, k))) for k in range(2)] == [5, 5]
    assert heard.reader._tracked == {}


# -- vLLM's cache alone, in other sizes ---------------------------------------------------------


def manager(size: int, blocks: int) -> KVCacheManager:
    spec = FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    config = KVCacheConfig(
        num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l"], spec)]
    )
    return KVCacheManager(config, 4096, scheduler_block_size=size, hash_block_size=size)


def reader_of(kv: KVCacheManager) -> PrefixReader:
    reader = prefix_reader(
        SimpleNamespace(kv_cache_manager=kv, running=[]), I0, ENGINE, lambda: None
    )
    assert reader is not None
    return reader


def compute(reader: PrefixReader, kv: KVCacheManager, one: Request, **found: Any) -> Any:
    """The blocks of the request are there, as after a step with all of it."""
    slots = kv.allocate_slots(
        one, one.num_tokens - found.get("num_new_computed_tokens", 0), **found
    )
    if slots is not None:
        one.num_computed_tokens = one.num_tokens
        reader.track(one)
    return slots


def request(name: str, tokens: list[int], size: int, salt: str | None, lora: Any) -> Request:
    kv_cache_utils.init_none_hash(sha256)
    return Request(
        name,
        tokens,
        SamplingParams(max_tokens=1),
        None,
        cache_salt=salt,
        lora_request=lora,
        block_hasher=kv_cache_utils.get_request_block_hasher(size, sha256),
    )


ADAPTER = LoRARequest("adapter", 1, "/nowhere")
PROMPTS = st.lists(
    st.tuples(
        st.integers(0, 3),  # Which beginning,
        st.integers(1, 700),  # how much of it,
        st.integers(0, 2),  # and what follows.
        st.sampled_from([(None, None), ("salt", None), (None, ADAPTER), ("salt", ADAPTER)]),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(
    prompts=PROMPTS,
    size=st.sampled_from([16, 32, 64, 128]),
    room=st.integers(800, 3000),
    order=st.randoms(use_true_random=False),
    reuse=st.booleans(),
)
def test_in_every_block_size_the_hits_are_vllms_own(
    prompts: list, size: int, room: int, order: Any, reuse: bool
) -> None:
    """Requests come, share, double each other's blocks (without `reuse` they do not look for
    any), go, and push others out."""
    kv = manager(size, room // size + 1)
    reader = reader_of(kv)
    heard = Heard(reader)
    made, there = [], []
    for n, (beginning, length, following, (salt, lora)) in enumerate(prompts):
        tokens = [beginning * 7 + t % 50 for t in range(length)] + [500 + following] * 90
        one = request(f"r{n}", tokens, size, salt, lora)
        made.append((one, chain(root(lora and lora.lora_name, salt), tokens)))
        blocks, hit, _ = kv.get_computed_blocks(one) if reuse else (None, 0, 0)
        found = {"num_new_computed_tokens": hit, "new_computed_blocks": blocks}
        slots = compute(reader, kv, one, **found)
        if slots is not None:
            there.append(one)
        while there and (slots is None or order.random() < 0.4):
            over = there.pop(order.randrange(len(there)))
            over.status = RequestStatus.FINISHED_STOPPED
            kv.free(over)
            slots = ()
        if order.random() < 0.1 and not there:
            assert kv.reset_prefix_cache()
        if order.random() < 0.8:
            heard.listen()
    heard.listen()
    for one, names in made:
        found = kv.coordinator.find_longest_cache_hit(one.block_hashes, one.num_tokens)[1]
        hits = heard.blocks(names)
        assert found // BLOCK_TOKENS <= hits <= found // BLOCK_TOKENS + (size - 1) // BLOCK_TOKENS
        holders = holders_of(kv, one)[: (one.num_tokens - 1) // size]
        found = kv.coordinator.find_longest_cache_hit(one.block_hashes, one.num_tokens - 1)[1]
        if holders == sorted(holders, key=lambda n: (n is None, n == 0)):  # No holes.
            held = sum(bool(n) for n in holders)
            assert reader.cached_tokens(one) == (found, held * size)


def holders_of(kv: Any, one: Request) -> list[int | None]:
    """How many requests hold each of its blocks; None for those that the cache does not have."""
    found = (kv.block_pool.get_cached_block(h, [0]) for h in one.block_hashes)
    return [blocks and blocks[0].ref_cnt for blocks in found]


def test_a_block_whose_hash_covers_tokens_to_come_is_named_once_these_are_there() -> None:
    """As with a drafter since vLLM 0.33. An engine's own thread would end otherwise."""
    kv = manager(16, 100)
    heard = Heard(reader_of(kv))
    tokens = list(range(2 * BLOCK_TOKENS))
    one = request("a", tokens, 16, None, None)
    whole = list(one.block_hashes)
    one.block_hashes[:] = whole[:-1]
    one._block_hasher = lambda r: whole[len(r.block_hashes) :] if r.num_tokens > len(tokens) else []
    assert compute(heard.reader, kv, one, delay_cache_blocks=True) is not None
    kv.cache_blocks(one, len(tokens) - 16)
    heard.listen()
    assert heard.blocks(chain(root(None, None), tokens)) == 1
    one.append_output_token_ids(7)
    kv.cache_blocks(one, len(tokens))
    heard.listen()
    assert heard.blocks(chain(root(None, None), tokens)) == 2
    assert heard.reader.cached_tokens(one) == (2 * BLOCK_TOKENS, 2 * BLOCK_TOKENS)


def test_what_a_request_will_find_and_share_is_told_apart() -> None:
    kv = manager(16, 100)
    reader = reader_of(kv)
    beginning = list(range(160))
    first = request("a", beginning, 16, None, None)
    compute(reader, kv, first)
    again = request("b", [*beginning[:96], *range(300, 400)], 16, None, None)
    assert reader.cached_tokens(again) == (96, 96)
    assert reader.cached_tokens(first) == (144, 144), "the last token is computed in any case"
    kv.free(first)
    assert reader.cached_tokens(again) == (96, 0)
    assert reader.cached_tokens(request("c", [9] * 50, 16, None, None)) == (0, 0)
    again.skip_reading_prefix_cache = True
    assert reader.cached_tokens(again) == (0, 0)


# -- whether, and when --------------------------------------------------------------------------


def unreadable(
    kv: KVCacheManager, caplog: pytest.LogCaptureFixture, level: int = logging.WARNING
) -> str:
    logger = logging.getLogger("llumnix.engine")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, "llumnix.engine")
    try:
        scheduler = SimpleNamespace(kv_cache_manager=kv, running=[])
        assert prefix_reader(scheduler, I0, ENGINE, lambda: None) is None
    finally:
        logger.removeHandler(caplog.handler)
    (line,) = caplog.messages[-1:]
    assert caplog.records[-1].levelno == level
    assert not isinstance(kv.block_pool.cached_block_hash_to_block, RecordingBlockMap)
    return line


def test_an_engine_that_cannot_tell_says_why(caplog: pytest.LogCaptureFixture) -> None:
    assert "--block-size of 48 does not go with our 64" in unreadable(manager(48, 10), caplog)
    assert "--block-size of 96 does not go with our 64" in unreadable(manager(96, 10), caplog)
    window = SlidingWindowSpec(
        block_size=64, num_kv_heads=1, head_size=1, dtype=torch.float32, sliding_window=128
    )
    config = KVCacheConfig(
        num_blocks=10, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l"], window)]
    )
    kv = KVCacheManager(config, 4096, scheduler_block_size=64, hash_block_size=64)
    assert "no layer of the model looks at the whole prompt" in unreadable(kv, caplog)
    kv = manager(64, 10)
    kv.enable_caching = False
    assert "prefix caching is off" in unreadable(kv, caplog, logging.INFO)


def test_only_one_group_of_layers_counts() -> None:
    full = FullAttentionSpec(block_size=64, num_kv_heads=1, head_size=1, dtype=torch.float32)
    window = SlidingWindowSpec(
        block_size=64, num_kv_heads=1, head_size=1, dtype=torch.float32, sliding_window=128
    )
    groups = [KVCacheGroupSpec(["a"], window), KVCacheGroupSpec(["b"], full)]
    config = KVCacheConfig(num_blocks=40, kv_cache_tensors=[], kv_cache_groups=groups)
    kv = KVCacheManager(config, 4096, scheduler_block_size=64, hash_block_size=64)
    reader = reader_of(kv)
    heard = Heard(reader)
    one = request("a", TOKENS, 64, None, None)
    assert compute(reader, kv, one) is not None
    heard.listen()
    assert heard.blocks(chain(root(None, None), TOKENS)) == len(TOKENS) // 64
    assert set(reader.kept.values()) == {1}


def test_everything_is_said_anew_now_and_then_and_an_idle_engine_woken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix_reader_module, "SNAPSHOT_EVERY_S", 0.05)
    kv, woken = manager(64, 20), threading.Event()
    scheduler = SimpleNamespace(kv_cache_manager=kv, running=[])
    reader = prefix_reader(scheduler, I0, ENGINE, woken.set)
    assert reader is not None
    reader.start()
    assert compute(reader, kv, request("a", TOKENS, 64, None, None)) is not None
    ours = chain(root(None, None), TOKENS)
    for _ in range(3):
        assert woken.wait(10)
        woken.clear()
        fact = reader.read(at_once=True)
        assert fact is not None
        assert (fact.stored, fact.removed, fact.cleared) == (ours, (), True)
    reader.close()
    reader.read(at_once=True)
    time.sleep(0.1)
    assert reader.read(at_once=True) is None


def test_an_adapter_that_is_loaded_anew_names_the_same_blocks() -> None:
    """vLLM tells them apart by the path too; they are gone when both are."""
    kv = manager(64, 40)
    reader = reader_of(kv)
    heard = Heard(reader)
    ours = chain(root("adapter", None), TOKENS)
    for n, path in enumerate(("/here", "/there")):
        one = request(f"r{n}", TOKENS, 64, None, LoRARequest("adapter", n + 1, path))
        assert compute(reader, kv, one) is not None
        heard.listen()
        assert heard.blocks(ours) == len(TOKENS) // 64
    assert set(reader.kept.values()) <= {1, 2}


def test_a_preempted_request_is_named_anew(engine: Any, heard: Heard) -> None:
    """Others have taken its blocks meanwhile, so it computes its prompt again."""
    prompt, pool = prompt_of(200, 3), engine.core.scheduler.kv_cache_manager.block_pool
    made = engine.make(RequestId("a"), prompt, SamplingParams(max_tokens=20, ignore_eos=True))
    engine.add_core_request(made)
    heard.reader.track(engine.core.scheduler.requests["a"])
    for _ in range(3):
        engine.step()
        heard.listen()
    assert heard.blocks(prefix(engine, prompt)) == 3
    engine.preempt_somebody()
    pool.free_blocks(pool.get_new_blocks(pool.get_num_free_blocks()))
    heard.listen()
    assert heard.blocks(prefix(engine, prompt)) == findable(engine, prompt) == 0
    while not engine.idle():
        engine.step()
        heard.listen()
    assert heard.blocks(prefix(engine, prompt)) == findable(engine, prompt) // BLOCK_TOKENS == 3


# -- the frontend -------------------------------------------------------------------------------


def asked(**fields: Any) -> tuple[int, ...]:
    known: dict[str, Any] = {
        "prompt_token_ids": TOKENS,
        "lora_request": None,
        "cache_salt": None,
        "mm_features": None,
        "prompt_embeds": None,
        "params": SamplingParams(max_tokens=1),
        **fields,
    }
    made: Any = SimpleNamespace(**known)
    return prompt_blocks(made)


def test_the_frontend_asks_by_the_same_names() -> None:
    assert asked() == chain(root(None, None), TOKENS)
    assert asked(cache_salt="s") == chain(root(None, "s"), TOKENS)
    assert asked(lora_request=ADAPTER, cache_salt="s") == chain(root("adapter", "s"), TOKENS)


def test_the_frontend_does_not_ask_for_what_cannot_be_found() -> None:
    assert asked(mm_features=[object()]) == ()
    assert asked(prompt_embeds=torch.zeros(1)) == ()
    assert asked(prompt_token_ids=None) == ()
    assert asked(params=SamplingParams(max_tokens=1, prompt_logprobs=1)) == ()
