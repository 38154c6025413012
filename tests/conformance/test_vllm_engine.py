"""The same scenarios on vLLM's engine: the double and the real thing behave alike."""

from typing import Any

import pytest

from conformance.engines import RealKind
from conformance.scenarios import FAULTS, KILLED_AFTER, MOMENTS, frontend_dies, outlive, strike
from llumnix.core.messages import Handover

pytestmark = pytest.mark.live


OF_THE_LINE = ("the other side is silent", "the message is lost", "the message comes twice")
"""Faults that no engine sees: what they do to the protocol, the fake engine's tests show."""


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=[pytest.mark.slow] * (f in OF_THE_LINE)) for f in FAULTS],
)
def test_a_migration_stands(real: RealKind, fault: str, moment: type) -> None:
    strike(real, fault, moment)


@pytest.mark.parametrize("name", KILLED_AFTER)
@pytest.mark.parametrize("unheard", [0, 2])
def test_a_request_outlives_its_engines(real: RealKind, name: str, unheard: int) -> None:
    outlive(real, name, unheard=unheard)


def test_of_a_dead_frontend_nothing_is_left(real: RealKind) -> None:
    frontend_dies(real)


def test_what_was_pulled_is_in_the_cache_when_the_handover_comes(real: RealKind) -> None:
    """Of a long prompt that takes a while, in which the request would stand still."""
    duo = real.duo()
    prompt = real.prompts(real.long_prompt)
    request = duo.add("long", prompt, real.options(real.tokens))
    duo.turn_until(lambda: len(duo.got[request]) >= 3)
    kv = real.engines[1].core.scheduler.kv_cache_manager
    kept: list[int] = []

    def before(message: Any) -> None:
        if isinstance(message, Handover):
            kept.append(len(kv.block_pool.cached_block_hash_to_block))

    duo.before = before
    assert duo.migrate(request)
    duo.finish()
    assert kept
    assert kept[0] >= real.long_prompt // duo.engines[1].port.block_tokens
    assert duo.got[request] == real.expected(prompt, real.tokens)


def test_the_end_of_a_pinned_request_goes_before_its_beginning(real: RealKind) -> None:
    """Else the prefix cache would keep blocks that nobody finds."""
    duo = real.duo()
    engine = real.engines[0]
    request = duo.add("pinned", real.prompts(real.long_prompt), real.options(real.tokens))
    duo.turn_until(lambda: len(duo.got[request]) >= 3)
    kv = engine.core.scheduler.kv_cache_manager
    ids = kv.get_blocks(request).get_block_ids()[0]
    engine.port.pin(request, 4 * engine.port.block_tokens, 8 * engine.port.block_tokens)
    engine.abort(request)
    engine.port.unpin(request)
    free = [b.block_id for b in kv.block_pool.free_block_queue.get_all_free_blocks()]
    order = [ids.index(b) for b in free if b in ids[:8]]
    assert order == sorted(order, reverse=True)
    assert len(order) == 8
