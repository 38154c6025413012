"""What is said of an engine's prefix cache is what a request would find in it."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

vllm = pytest.importorskip("vllm")

import torch  # noqa: E402
from vllm import SamplingParams  # noqa: E402
from vllm.distributed.kv_events import (  # noqa: E402
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
)
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
from vllm.v1.request import Request  # noqa: E402

from llumnix.core.events import PrefixesChanged  # noqa: E402
from llumnix.core.policies.presets import POLICIES  # noqa: E402
from llumnix.core.prefixes import BLOCK_TOKENS, PrefixIndex, chain, root  # noqa: E402
from llumnix.core.settings import SchedulerSettings  # noqa: E402
from llumnix.core.types import EngineIndex, InstanceId, RequestId  # noqa: E402
from llumnix.engine import prefix_events  # noqa: E402
from llumnix.engine.prefix_events import PrefixBlocks, PrefixReader, prefix_reader  # noqa: E402
from llumnix.frontend.client import FleetClient  # noqa: E402

from .conftest import BLOCK  # noqa: E402

I0, ENGINE = InstanceId("i0"), EngineIndex(3)
CACHE_AWARE = SchedulerSettings(policy="cache-aware")


class Heard:
    """What a controller makes of the facts."""

    def __init__(self, read: Callable[[], PrefixesChanged | None]) -> None:
        self._read, self.index = read, PrefixIndex()
        self.facts: list[PrefixesChanged] = []

    def listen(self) -> PrefixesChanged | None:
        fact = self._read()
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
        return self.index.hits(prefix).get(I0, 0)


# -- a whole engine -----------------------------------------------------------------------------


@pytest.fixture
def heard(engine: Any) -> Iterator[Heard]:
    """The reader of a whole engine, as engine/instance.py makes and reads it."""
    scheduler = engine.core.scheduler
    reader = prefix_reader(CACHE_AWARE, scheduler, I0, ENGINE, lambda: None)
    assert reader is not None
    reader.start()
    one = Heard(reader.read)
    yield one
    reader.close()
    pool = scheduler.kv_cache_manager.block_pool
    pool.enable_kv_cache_events = False
    pool.kv_event_queue = []
    del pool.take_events


def prefix(engine: Any, prompt: list[int], salt: str | None = None) -> tuple[int, ...]:
    """What the frontend would ask with."""
    made = engine.make(RequestId("x"), prompt, SamplingParams(max_tokens=1))
    made.cache_salt = salt
    return FleetClient._prefix(SimpleNamespace(_hash_prefixes=True), made)


def run(
    engine: Any, heard: Heard, name: str, prompt: list[int], tokens: int = 1, salt: Any = None
) -> list[int]:
    """The request's answer; the reader is asked before and after each step."""
    options = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    made = engine.make(RequestId(name), prompt, options)
    made.cache_salt = salt
    engine.add_core_request(made)
    answer: list[int] = []
    while not engine.idle():
        heard.listen()
        for _, new, _, _ in engine.step():
            answer += new
        heard.listen()
    assert heard.listen() is None, "one fact a step is enough"
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


def test_the_reader_follows_no_more_blocks_than_there_are(engine: Any, heard: Heard) -> None:
    reader = prefix_reader(CACHE_AWARE, engine.core.scheduler, I0, ENGINE, lambda: None)
    assert reader is not None
    run(engine, Heard(reader.read), "warm", prompt_of(20, 0))
    for n in range(12):
        run(engine, Heard(reader.read), f"r{n}", prompt_of(100 + 30 * n, n), tokens=9)
    pool = engine.core.scheduler.kv_cache_manager.block_pool
    assert 0 < len(reader.blocks) <= pool.num_gpu_blocks - 1
    assert engine.core.scheduler.reset_prefix_cache()
    reader.read()
    assert (len(reader.blocks), reader.blocks.kept) == (0, {})


# -- vLLM's cache alone, in other sizes ---------------------------------------------------------


def manager(size: int, blocks: int) -> KVCacheManager:
    spec = FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    config = KVCacheConfig(
        num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l"], spec)]
    )
    return KVCacheManager(config, 4096, scheduler_block_size=size, hash_block_size=size)


def reader_of(kv: KVCacheManager) -> PrefixReader:
    reader = prefix_reader(
        CACHE_AWARE, SimpleNamespace(kv_cache_manager=kv), I0, ENGINE, lambda: None
    )
    assert reader is not None
    kv.block_pool.enable_kv_cache_events = True
    return reader


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
    heard = Heard(reader_of(kv).read)
    made, there = [], []
    for n, (beginning, length, following, (salt, lora)) in enumerate(prompts):
        tokens = [beginning * 7 + t % 50 for t in range(length)] + [500 + following] * 90
        one = request(f"r{n}", tokens, size, salt, lora)
        made.append((one, chain(root(lora and lora.lora_name, salt), tokens)))
        blocks, hit, _ = kv.get_computed_blocks(one) if reuse else (None, 0, 0)
        slots = kv.allocate_slots(
            one, len(tokens) - hit, num_new_computed_tokens=hit, new_computed_blocks=blocks
        )
        if slots is not None:
            there.append(one)
        while there and (slots is None or order.random() < 0.4):
            kv.free(there.pop(order.randrange(len(there))))
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


def test_images_and_embeddings_and_what_follows_them_are_left_out() -> None:
    image = ("image", 3)
    for second in ((image,), (b"digest",), (image, b"digest")):
        blocks = PrefixBlocks(64)
        blocks.take(stored([1, 2, 3], extra_keys=[None, second, None]))
        assert list(blocks.kept) == list(chain(root(None, None), TOKENS[:64]))
    blocks = PrefixBlocks(64)
    blocks.take(stored([1, 2, 3], extra_keys=[("salt", image), None, None]))
    assert blocks.kept == {}


# -- events made by hand ------------------------------------------------------------------------

TOKENS = list(range(1000, 1384))


def stored(
    names: list[int], first: int = 0, parent: int | None = None, size: int = 64, **fields: Any
) -> BlockStored:
    """Of `TOKENS`, from block `first` on."""
    return BlockStored(
        block_hashes=names,
        parent_block_hash=parent,
        token_ids=TOKENS[first * size : (first + len(names)) * size],
        block_size=size,
        lora_id=None,
        medium="GPU",
        lora_name=fields.pop("lora_name", None),
        group_idx=0,
        **fields,
    )


def gone(*names: int) -> BlockRemoved:
    return BlockRemoved(block_hashes=list(names), medium="GPU", group_idx=0)


def changes(blocks: PrefixBlocks, *events: Any) -> tuple[list[int], list[int], bool]:
    """Which of our blocks of `TOKENS`, by number, were stored and removed; whether all went."""
    for event in events:
        blocks.take(event)
    ours = chain(root(None, None), TOKENS)
    new, old, cleared = blocks.changes() or ((), (), False)
    return [ours.index(h) for h in new], [ours.index(h) for h in old], cleared


def fresh(size: int) -> PrefixBlocks:
    blocks = PrefixBlocks(size)
    assert blocks.changes() == ((), (), True)
    assert blocks.changes() is None
    return blocks


def test_four_blocks_of_16_make_one_of_ours() -> None:
    blocks = fresh(16)
    assert changes(blocks, stored([1, 2, 3], size=16)) == ([], [], False)
    assert changes(blocks, stored([4, 5], 3, parent=3, size=16)) == ([0], [], False)
    assert changes(blocks, stored([6, 7, 8], 5, parent=5, size=16)) == ([1], [], False)
    assert changes(blocks, gone(8)) == ([], [1], False)
    assert changes(blocks, gone(2)) == ([], [0], False)
    assert changes(blocks, stored([8], 7, parent=7, size=16)) == ([1], [], False)
    # One that was missing is back: a request that needed no more of it stored it.
    assert changes(blocks, stored([2], 1, parent=1, size=16)) == ([0], [], False)
    assert changes(blocks, gone(2), stored([2], 1, parent=1, size=16)) == ([], [], False)
    assert changes(blocks, gone(4, 3, 1, 2, 8, 7, 6, 5)) == ([], [0, 1], False)
    assert (len(blocks), blocks.kept, blocks._completers) == (0, {}, {})


def test_branches_within_a_block_of_ours_share_its_parts() -> None:
    blocks = fresh(16)
    branch = stored([9], 3, parent=3, size=16)
    branch.token_ids = [7] * 16
    ours = [chain(root(None, None), [*TOKENS[:48], *end])[0] for end in (TOKENS[48:64], [7] * 16)]
    blocks.take(stored([1, 2, 3, 4], size=16))
    blocks.take(branch)
    assert blocks.changes() == (tuple(ours), (), False)
    blocks.take(gone(4))
    assert blocks.changes() == ((), (ours[0],), False)
    blocks.take(gone(1))
    assert blocks.changes() == ((), (ours[1],), False)
    blocks.take(stored([1], size=16))
    assert blocks.changes() == ((ours[1],), (), False)


def test_a_block_of_64_is_one_of_ours() -> None:
    blocks = fresh(64)
    assert changes(blocks, stored([1, 2])) == ([0, 1], [], False)
    assert changes(blocks, stored([3], 2, parent=2), gone(1)) == ([2], [0], False)


def test_a_block_of_128_is_two_of_ours() -> None:
    blocks = fresh(128)
    assert changes(blocks, stored([1, 2], size=128)) == ([0, 1, 2, 3], [], False)
    assert changes(blocks, stored([3], 2, parent=2, size=128)) == ([4, 5], [], False)
    assert changes(blocks, gone(2)) == ([], [2, 3], False)


def test_a_block_that_is_kept_twice_is_gone_when_both_are() -> None:
    blocks = fresh(64)
    assert changes(blocks, stored([1]), stored([1])) == ([0], [], False)
    assert changes(blocks, gone(1)) == ([], [], False)
    assert changes(blocks, gone(1)) == ([], [0], False)
    assert changes(blocks, gone(1)) == ([], [], False)


def test_an_adapter_that_was_loaded_anew_under_its_name_keeps_the_block_alive() -> None:
    """vLLM's hashes differ then, ours do not."""
    blocks = fresh(64)
    assert changes(blocks, stored([1]), stored([2]), gone(1)) == ([0], [], False)
    assert changes(blocks, gone(2)) == ([], [0], False)


def test_after_a_clear_only_what_came_later_is_kept() -> None:
    blocks = fresh(64)
    changes(blocks, stored([1, 2]))
    assert changes(blocks, AllBlocksCleared(), stored([1])) == ([0], [], True)
    assert changes(blocks, gone(1), AllBlocksCleared()) == ([], [], True)
    assert changes(blocks, AllBlocksCleared()) == ([], [], False)


def test_names_follow_from_the_adapter_and_the_salt() -> None:
    blocks = fresh(64)
    lora, both = [("adapter",)] * 2, [("adapter", "salt"), ("adapter",)]
    blocks.take(stored([1, 2], lora_name="adapter", extra_keys=lora))
    blocks.take(stored([3, 4], lora_name="adapter", extra_keys=both))
    blocks.take(stored([5, 6], extra_keys=[("salt",), None]))
    new, _, _ = blocks.changes() or ((), (), False)
    roots = [root("adapter", None), root("adapter", "salt"), root(None, "salt")]
    assert new == tuple(h for r in roots for h in chain(r, TOKENS[:128]))


def test_what_cannot_be_followed_is_left_out() -> None:
    blocks = fresh(64)
    gaps = stored([1, 2, 3])
    gaps.block_hashes = [1, 3]  # As groups with sliding windows report.
    assert changes(blocks, gaps) == ([], [], False)
    assert changes(blocks, stored([4], 3, parent=99)) == ([], [], False)
    assert changes(blocks, stored([5, 6], size=32)) == ([], [], False)
    assert changes(blocks, gone(1, 2, 3, 4, 5)) == ([], [], False)
    assert len(blocks) == 0


def test_much_is_told_in_parts_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_events, "HASHES_MAX", 2)
    blocks = fresh(64)
    assert changes(blocks, stored([1, 2, 3, 4, 5])) == ([0, 1], [], False)
    assert changes(blocks, gone(5), gone(2)) == ([2, 3], [1], False)
    assert changes(blocks) == ([], [], False)
    blocks.start_anew()
    assert changes(blocks) == ([0, 2], [], True)
    assert changes(blocks, gone(1)) == ([3], [0], False)
    assert blocks.changes() is None


# -- whether, and when --------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "cache-aware"])
def test_other_policies_pay_nothing(policy: str) -> None:
    kv = manager(64, 10)
    scheduler = SimpleNamespace(kv_cache_manager=kv)
    found = prefix_reader(SchedulerSettings(policy=policy), scheduler, I0, ENGINE, lambda: None)
    assert found is None
    assert not kv.block_pool.enable_kv_cache_events


def unreadable(kv: KVCacheManager, caplog: pytest.LogCaptureFixture) -> str:
    logger = logging.getLogger("llumnix.engine")
    logger.addHandler(caplog.handler)
    try:
        scheduler = SimpleNamespace(kv_cache_manager=kv)
        assert prefix_reader(CACHE_AWARE, scheduler, I0, ENGINE, lambda: None) is None
    finally:
        logger.removeHandler(caplog.handler)
    (line,) = caplog.messages[-1:]
    assert not kv.block_pool.enable_kv_cache_events
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
    assert "prefix caching is off" in unreadable(kv, caplog)


def test_only_one_group_of_layers_counts() -> None:
    full = FullAttentionSpec(block_size=64, num_kv_heads=1, head_size=1, dtype=torch.float32)
    window = SlidingWindowSpec(
        block_size=64, num_kv_heads=1, head_size=1, dtype=torch.float32, sliding_window=128
    )
    groups = [KVCacheGroupSpec(["a"], window), KVCacheGroupSpec(["b"], full)]
    config = KVCacheConfig(num_blocks=40, kv_cache_tensors=[], kv_cache_groups=groups)
    kv = KVCacheManager(config, 4096, scheduler_block_size=64, hash_block_size=64)
    reader = reader_of(kv)
    heard = Heard(reader.read)
    one = request("a", TOKENS, 64, None, None)
    assert kv.allocate_slots(one, len(TOKENS)) is not None
    heard.listen()
    assert heard.blocks(chain(root(None, None), TOKENS)) == len(TOKENS) // 64
    assert set(reader.blocks.kept.values()) == {1}


def test_everything_is_said_anew_now_and_then_and_an_idle_engine_woken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix_events, "SNAPSHOT_EVERY_S", 0.05)
    kv, woken = manager(64, 20), threading.Event()
    scheduler = SimpleNamespace(kv_cache_manager=kv)
    reader = prefix_reader(CACHE_AWARE, scheduler, I0, ENGINE, woken.set)
    assert reader is not None
    reader.start()
    assert kv.allocate_slots(request("a", TOKENS, 64, None, None), len(TOKENS)) is not None
    ours = chain(root(None, None), TOKENS)
    for _ in range(3):
        assert woken.wait(10)
        woken.clear()
        fact = reader.read()
        assert fact is not None
        assert (fact.stored, fact.removed, fact.cleared) == (ours, (), True)
    reader.close()
    reader.read()
    time.sleep(0.1)
    assert reader.read() is None


def test_the_scheduler_finds_no_events_left() -> None:
    kv = manager(64, 20)
    reader = prefix_reader(
        CACHE_AWARE, SimpleNamespace(kv_cache_manager=kv), I0, ENGINE, lambda: None
    )
    assert reader is not None
    reader.start()
    reader.close()
    assert kv.allocate_slots(request("a", TOKENS, 64, None, None), len(TOKENS)) is not None
    assert kv.take_events() == []
    fact = reader.read()
    assert fact is not None
    assert len(fact.stored) == len(TOKENS) // 64


# -- the frontend -------------------------------------------------------------------------------


def asked(hash_prefixes: bool = True, **fields: Any) -> tuple[int, ...]:
    known: dict[str, Any] = {
        "prompt_token_ids": TOKENS,
        "lora_request": None,
        "cache_salt": None,
        "mm_features": None,
        "prompt_embeds": None,
        "params": SamplingParams(max_tokens=1),
        **fields,
    }
    return FleetClient._prefix(
        SimpleNamespace(_hash_prefixes=hash_prefixes), SimpleNamespace(**known)
    )


def test_the_frontend_asks_by_the_same_names() -> None:
    assert asked() == chain(root(None, None), TOKENS)
    assert asked(cache_salt="s") == chain(root(None, "s"), TOKENS)
    assert asked(lora_request=ADAPTER, cache_salt="s") == chain(root("adapter", "s"), TOKENS)


def test_the_frontend_does_not_ask_for_what_cannot_be_found() -> None:
    assert asked(hash_prefixes=False) == ()
    assert asked(mm_features=[object()]) == ()
    assert asked(prompt_embeds=torch.zeros(1)) == ()
    assert asked(prompt_token_ids=None) == ()
    assert asked(params=SamplingParams(max_tokens=1, prompt_logprobs=1)) == ()
