"""Which prefixes are where, and what dispatch makes of it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumnix.core.events import (
    Dispatch,
    InstanceLost,
    LoadReported,
    PrefixesChanged,
    RequestArrived,
)
from llumnix.core.prefixes import BLOCK_TOKENS, PREFIX_BLOCKS_MAX, chain, extend, root
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.scheduling.prefix_index import PrefixIndex
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.scheduling.tuning import (
    HALF_WEIGHT_BATCH,
    NEIGHBOUR_PROMPT_SHARE,
    NEIGHBOUR_TOKENS,
    PREFILL_QUANTUM_TOKENS,
    PREFILL_WEIGHT,
)
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import EngineIndex, InstanceId, RequestId

INSTANCES = [InstanceId(f"i{n}") for n in range(3)]
PROMPT = list(range(4000))
KV_TOKENS = 10_000

# -- names ------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**31), max_size=400), st.data())
def test_the_chain_of_a_prefix_is_a_prefix_of_the_chain(tokens: list[int], data: Any) -> None:
    cut = data.draw(st.integers(0, len(tokens)))
    whole, part = chain(root(), tokens), chain(root(), tokens[:cut])
    assert len(whole) == len(tokens) // BLOCK_TOKENS
    assert part == whole[: cut // BLOCK_TOKENS]
    assert (
        chain(part[-1] if part else root(), tokens[len(part) * BLOCK_TOKENS :])
        == (whole[len(part) :])
    )


@given(st.data())
def test_prompts_that_differ_share_the_blocks_before_the_difference(data: Any) -> None:
    at = data.draw(st.integers(0, 299))
    other = [*PROMPT[:300]]
    other[at] += 1
    same = [a == b for a, b in zip(chain(root(), PROMPT[:300]), chain(root(), other), strict=True)]
    assert same == [n < at // BLOCK_TOKENS for n in range(len(same))]


def test_an_adapter_and_a_salt_tell_equal_prompts_apart() -> None:
    keys = [(None, None), ("a", None), (None, "a"), ("a", "b"), ("ab", None), (None, "ab")]
    roots = [root(*k) for k in keys]
    assert len(set(roots)) == len(keys)
    assert len({chain(r, PROMPT)[0] for r in roots}) == len(keys)


def test_hashes_fit_into_64_bits_and_are_the_same_in_every_process() -> None:
    assert chain(root(None, None), range(128)) == (32404033819427061, 5239371026481082449)
    assert all(0 <= h < 2**63 for h in chain(root(), PROMPT))
    assert extend(root(), PROMPT[:BLOCK_TOKENS]) == chain(root(), PROMPT)[0]


def test_only_so_many_blocks_are_looked_up() -> None:
    assert len(chain(root(), [7] * (BLOCK_TOKENS * (PREFIX_BLOCKS_MAX + 5)))) == PREFIX_BLOCKS_MAX


# -- the index --------------------------------------------------------------------------------

PROMPTS = [[0, 1, 2, 3, 4, 5], [0, 1, 2, 13, 14, 15], [20, 21, 22, 23, 24, 25]]
CHANGES = st.tuples(st.sampled_from(INSTANCES), st.integers(0, 2), st.integers(0, 6))
"""An instance keeps so many blocks of a prompt from now on."""


@given(st.lists(CHANGES, max_size=30), st.sampled_from(PROMPTS), st.integers(1, 3))
def test_hits_are_the_longest_beginnings(changes: list, prefix: list[int], most: int) -> None:
    index = PrefixIndex()
    lengths = {i: [0] * len(PROMPTS) for i in INSTANCES}
    for instance, prompt, length in changes:
        before = _kept(lengths[instance])
        lengths[instance][prompt] = length
        after = _kept(lengths[instance])
        index.remove(instance, before - after)
        index.store(instance, after - before)
    leading = {i: _leading(_kept(lengths[i]), prefix) for i in INSTANCES}
    assert {i: index.hit(i, prefix) for i in INSTANCES} == leading
    found = index.hits(prefix, most)
    assert found.items() <= leading.items()
    assert list(found.values()) == sorted(filter(None, leading.values()), reverse=True)[:most]
    for above in range(7):
        some = index.hits(prefix, most, above)
        assert some == {i: n for i, n in found.items() if n > above}


def _kept(lengths: list[int]) -> set[int]:
    return {h for p, length in zip(PROMPTS, lengths, strict=True) for h in p[:length]}


def _leading(kept: set[int], prefix: list[int]) -> int:
    return next((n for n, h in enumerate(prefix) if h not in kept), len(prefix))


def test_of_equal_hits_the_latest_come_first() -> None:
    """So that it is not always the same eight of a thousand."""
    index = PrefixIndex()
    for n in (1, 2, 0):
        index.store(INSTANCES[n], PROMPTS[0])
    assert list(index.hits(PROMPTS[0], 2)) == [INSTANCES[0], INSTANCES[2]]


@given(
    st.lists(st.tuples(st.sampled_from(INSTANCES), st.sets(st.integers(0, 9))), max_size=4),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_holes_are_no_hits_and_no_errors(
    kept_there: list[tuple[InstanceId, set[int]]], most: int, above: int
) -> None:
    """They can come of a controller that heard the end of a prompt only."""
    index, prefix = PrefixIndex(), list(range(10))
    model = {i: set[int]() for i in INSTANCES}
    for instance, blocks in kept_there:
        index.store(instance, blocks)
        model[instance] |= blocks
    for instance in INSTANCES:
        assert index.hit(instance, prefix) <= _leading(model[instance], prefix)
    for instance, blocks in index.hits(prefix, most, above).items():
        assert above < blocks <= _leading(model[instance], prefix)


def test_without_its_first_block_nothing_is_kept() -> None:
    index = PrefixIndex()
    index.store(INSTANCES[0], PROMPTS[0][1:])
    assert index.hits(PROMPTS[0], 3) == {}
    assert index.hit(INSTANCES[0], PROMPTS[0]) == 0
    assert index.hits([], 3) == {}


@given(st.lists(CHANGES, max_size=30))
def test_an_index_that_was_cleared_holds_nothing(changes: list) -> None:
    index = PrefixIndex()
    for instance, prompt, length in changes:
        index.store(instance, PROMPTS[prompt][:length])
    for instance in INSTANCES:
        index.clear(instance)
    assert (index._holders, index._kept) == ({}, {})


# -- the policy -------------------------------------------------------------------------------


def report(n: int, sequence: int = 1, **fields: Any) -> LoadReported:
    known: dict[str, Any] = {"engine_index": EngineIndex(n), "kv_tokens_used": 0, **fields}
    running, waiting = known.pop("running", 0), known.pop("waiting_tokens", 0)
    queue = known.pop("waiting", int(waiting > 0))
    load = ClassLoad(
        running=running, waiting=queue, waiting_tokens=waiting, waiting_prefill=waiting
    )
    return LoadReported(
        report=LoadReport(
            instance=INSTANCES[n],
            sequence=sequence,
            classes=(ClassLoad(running=known.pop("urgent", 0)), load),
            head_tokens=waiting,
            kv_tokens_total=KV_TOKENS,
            **known,
        )
    )


def kept(n: int, tokens: int, **fields: Any) -> PrefixesChanged:
    """Instance n keeps that many tokens of the prompt."""
    return PrefixesChanged(
        instance=INSTANCES[n],
        engine_index=EngineIndex(fields.pop("engine", n)),
        stored=chain(root(), PROMPT[:tokens]),
        **fields,
    )


def cluster(*reports: LoadReported, policy: str = "llumnix") -> Scheduler:
    s = Scheduler(SchedulerSettings(policy=policy))
    for known in reports:
        s.handle(known, 0.0)
    return s


def place(s: Scheduler, tokens: int = 1000, name: str = "r", prefix: bool = True) -> Dispatch:
    hashes = chain(root(), PROMPT[:tokens]) if prefix else ()
    fact = RequestArrived(request=RequestId(name), prompt_tokens=tokens, prefix=hashes)
    (decision,) = s.handle(fact, 0.0)
    assert isinstance(decision, Dispatch)
    return decision


def where(s: Scheduler, *args: Any, **kwargs: Any) -> str:
    return place(s, *args, **kwargs).instance


def test_a_hit_decides_between_instances_of_equal_load() -> None:
    s = cluster(report(0), report(1), report(2))
    s.handle(kept(1, 640), 0.0)
    decision = place(s)
    assert decision.instance == "i1"
    assert decision.why == "soonest: 640 of 1000 tokens are in its cache"


def test_a_hit_decides_against_a_somewhat_freer_instance() -> None:
    s = cluster(report(0), report(1, running=1, kv_tokens_used=3000))
    s.handle(kept(1, 1280), 0.0)
    assert where(s, tokens=2000) == "i1"


@pytest.mark.parametrize("tokens", [1000, 4000])
@pytest.mark.parametrize("beside", [0, 3, 20])
def test_a_hit_is_not_worth_a_batch_that_is_much_larger(tokens: int, beside: int) -> None:
    """Each request more there weighs as much as so many tokens, more if the prompt is long, and
    less among many."""
    saved = PREFILL_WEIGHT * (tokens - tokens % BLOCK_TOKENS)
    each = (
        (NEIGHBOUR_TOKENS + NEIGHBOUR_PROMPT_SHARE * tokens)
        * HALF_WEIGHT_BATCH
        / (HALF_WEIGHT_BATCH + beside)
    )
    few, many = (
        int((saved - PREFILL_QUANTUM_TOKENS) / each),
        int((saved + PREFILL_QUANTUM_TOKENS) / each) + 1,
    )
    for more, instance in ((0, "i1"), (few, "i1"), (many, "i0")):
        s = cluster(
            report(0, running=beside, kv_tokens_used=10),
            report(1, running=beside + more, kv_tokens_used=100),
        )
        s.handle(kept(1, tokens), 0.0)
        assert where(s, tokens=tokens) == instance, more


def test_the_longest_hit_decides_between_hits() -> None:
    s = cluster(report(0), report(1), report(2))
    s.handle(kept(1, 640), 0.0)
    s.handle(kept(2, 704), 0.0)
    assert where(s) == "i2"


@pytest.mark.parametrize(("queued", "instance"), [(600, "i1"), (1400, "i0")])
def test_a_hit_is_not_worth_a_queue_that_takes_longer_than_it_saves(
    queued: int, instance: str
) -> None:
    s = cluster(report(0, running=1), report(1, waiting_tokens=queued))
    s.handle(kept(1, 640), 0.0)
    assert where(s) == instance


def test_dispatches_on_their_way_count_as_a_queue() -> None:
    """Of what is not in the cache: there the fourth has less to wait for too."""
    s = cluster(report(0), report(1))
    s.handle(kept(1, 640), 0.0)
    assert [where(s, name=f"r{n}") for n in range(4)] == ["i1", "i0", "i1", "i1"]


@pytest.mark.parametrize(
    ("running", "hit", "instance"), [(1, 192, "i0"), (40, 192, "i1"), (1, 640, "i1")]
)
def test_a_hit_is_worth_memory_that_is_short(running: int, hit: int, instance: str) -> None:
    """Unless much of it is missing, and few run, of whom one might end: else no prompt would be
    found where its cache is once all memory is needed."""
    s = cluster(
        report(0, running=running), report(1, running=running, kv_tokens_used=KV_TOKENS - 1)
    )
    s.handle(kept(1, hit), 0.0)
    assert where(s) == instance


@pytest.mark.parametrize(("urgent", "instance"), [(0, "i1"), (1, "i0")])
def test_a_hit_is_not_worth_the_headroom_of_urgent_requests(urgent: int, instance: str) -> None:
    used = {"running": 1, "kv_tokens_used": 5000}
    s = cluster(report(0, running=1 + urgent), report(1, urgent=urgent, **used))
    s.handle(kept(1, 640), 0.0)
    assert where(s) == instance


@pytest.mark.parametrize(("waiting", "instance"), [(1, "i0"), (4, "i1")])
def test_where_all_have_queues_a_hit_is_worth_a_longer_one(waiting: int, instance: str) -> None:
    """Tokens that are computed again delay all waiting requests."""
    other, longer = 500 * waiting, 500 * waiting + 2200
    s = cluster(
        report(0, running=1, waiting=waiting, waiting_tokens=other),
        report(1, running=1, waiting=waiting, waiting_tokens=longer),
    )
    s.handle(kept(1, 640), 0.0)
    assert where(s) == instance


def test_a_request_that_disturbs_urgent_ones_anyway_goes_to_the_hit() -> None:
    both = {"running": 1, "urgent": 1, "kv_tokens_used": 5000}
    s = cluster(report(0, **both), report(1, **both))
    s.handle(kept(1, 640), 0.0)
    assert where(s) == "i1"


@pytest.mark.parametrize(("slots", "instance"), [(0, "i1"), (5, "i1"), (4, "i0"), (3, "i0")])
def test_a_hit_is_not_worth_an_instance_without_a_free_slot(slots: int, instance: str) -> None:
    """However much of a long prompt it has."""
    s = cluster(report(0, running=4, slots=9), report(1, running=4, slots=slots))
    s.handle(kept(1, len(PROMPT)), 0.0)
    assert where(s, tokens=len(PROMPT)) == instance


def test_without_a_hit_a_request_goes_where_it_starts_soonest() -> None:
    full, free = report(0, running=9, kv_tokens_used=900), report(1, running=1, kv_tokens_used=90)
    assert place(cluster(full, free)).why.startswith("soonest: ")
    for what in ({"prefix": False}, {"tokens": 63}):  # Not one whole block.
        s = cluster(full, free)
        s.handle(kept(0, 640), 0.0)
        assert where(s, **what) == "i1"


def test_long_prompts_that_none_has_fill_all_caches_in_turn() -> None:
    """Of instances that stand idle; short ones go to the warmest, and so do those that wait."""
    s = cluster(report(0), report(1), report(2))

    def told(name: str, sequence: int, tokens: int) -> str:
        chosen = where(s, tokens, name)
        done = {"sequence": sequence, "admitted": (RequestId(name),)}
        s.handle(report(int(chosen[1:]), **done), 0.0)
        return chosen

    assert [told(f"r{n}", n + 2, 2000) for n in range(4)] == ["i0", "i1", "i2", "i0"]
    assert [told(f"s{n}", n + 9, 200) for n in range(4)] == ["i0"] * 4
    s.handle(report(1, sequence=20, running=5, kv_tokens_used=500), 0.0)
    assert told("t", 21, 2000) == "i0"
    assert told("u", 22, 2000) == "i2"


def test_a_conversation_of_long_turns_stays_where_most_of_it_is_cached() -> None:
    """Where it is is the warmest too, and the next one in turn is idle as well."""
    s = cluster(report(0), report(1))
    places = []
    for turn in range(4):
        tokens = 800 + 700 * turn
        places.append(where(s, tokens, f"r{turn}"))
        number = int(places[-1][1:])
        s.handle(report(number, sequence=turn + 2, admitted=(RequestId(f"r{turn}"),)), 0.0)
        s.handle(kept(number, tokens), 0.0)
    assert places == ["i0"] * 4


def test_a_prefix_that_all_keep_goes_to_the_freest_of_them() -> None:
    s = cluster(
        report(0, running=3, kv_tokens_used=3000),
        report(1, running=1, kv_tokens_used=900),
        report(2, running=2, kv_tokens_used=2000),
    )
    for n in range(3):
        s.handle(kept(n, 640), 0.0)
    assert where(s) == "i1"


def test_a_prefix_that_all_keep_is_spread() -> None:
    s = cluster(report(0), report(1), report(2))
    for n in range(3):
        s.handle(kept(n, 640), 0.0)
    placed = [where(s, name=f"r{n}") for n in range(30)]
    assert {i: placed.count(i) for i in INSTANCES} == dict.fromkeys(INSTANCES, 10)


def test_a_hit_decides_for_no_instance_that_is_silent_or_does_not_accept() -> None:
    s = cluster(report(0), report(1, accepting=False))
    s.handle(kept(1, 640), 0.0)
    assert where(s) == "i0"
    s = cluster(report(1))
    s.handle(kept(1, 640), 0.0)
    s.handle(report(0), 9.0)
    fact = RequestArrived(request=RequestId("r"), prompt_tokens=1000, prefix=chain(root(), PROMPT))
    (decision,) = s.handle(fact, 9.0)
    assert isinstance(decision, Dispatch)
    assert decision.instance == "i0"


def test_what_was_removed_or_cleared_is_no_hit() -> None:
    s = cluster(report(0, kv_tokens_used=64), report(1, kv_tokens_used=64), report(2))
    s.handle(kept(1, 640), 0.0)
    gone = chain(root(), PROMPT[:64])
    s.handle(PrefixesChanged(instance=INSTANCES[1], engine_index=EngineIndex(1), removed=gone), 0.0)
    assert where(s) == "i2"
    s = cluster(report(0, kv_tokens_used=64), report(1, kv_tokens_used=64), report(2))
    s.handle(kept(1, 640), 0.0)
    s.handle(kept(1, 0, cleared=True), 0.0)
    assert where(s) == "i2"


def test_what_a_run_kept_ends_with_it() -> None:
    s = cluster(report(0, kv_tokens_used=64), report(1))
    s.handle(kept(0, 640), 0.0)
    s.handle(InstanceLost(instance=INSTANCES[0], engine_index=EngineIndex(0)), 0.0)
    s.handle(report(0, engine_index=EngineIndex(7), kv_tokens_used=64), 0.0)
    assert where(s, name="a") == "i1"
    s.handle(report(1, sequence=2, admitted=(RequestId("a"),), running=1), 0.0)
    s.handle(kept(1, 0, cleared=True), 0.0)
    s.handle(kept(1, 640), 0.0)
    s.handle(kept(0, 704, engine=3), 0.0)
    assert where(s, name="b") == "i1", "the run before is not listened to"
    s.handle(kept(0, 704, engine=7), 0.0)
    assert where(s, name="c") == "i0"


def test_a_death_that_a_second_frontend_tells_of_late_takes_nothing_from_the_successor() -> None:
    s = cluster(report(0, kv_tokens_used=64), report(1))
    lost = InstanceLost(instance=INSTANCES[0], engine_index=EngineIndex(0))
    s.handle(lost, 0.0)
    s.handle(report(0, engine_index=EngineIndex(7), kv_tokens_used=64), 0.0)
    s.handle(kept(0, 640, engine=7, cleared=True), 0.0)
    s.handle(lost, 0.0)
    assert where(s, name="a") == "i0"


@pytest.mark.parametrize("policy", ["cache-aware", "llumnix-base"])
def test_some_other_policies_look_at_prefixes_too(policy: str) -> None:
    s = cluster(report(0), report(1, running=1), policy=policy)
    s.handle(kept(1, 1280), 0.0)
    assert where(s, tokens=2000) == "i1"


@pytest.mark.parametrize("policy", ["infaas++", "least-loaded", "round-robin"])
def test_the_other_policies_do_not_look_at_prefixes(policy: str) -> None:
    s = cluster(report(0), report(1, running=1), policy=policy)
    s.handle(kept(1, 1280), 0.0)
    assert where(s, tokens=2000) == "i0"
