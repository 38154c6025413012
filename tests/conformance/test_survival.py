"""A request whose engine dies again and again generates, token for token and to the last digit of
its log-probabilities, what it generates undisturbed: on vLLM's engines, for every sampling option.
"""

from pathlib import Path
from typing import Any

import pytest

from conformance.engines import RealKind
from conformance.scenarios import owner_of
from conformance.test_exactness import CASES, PROMPT, left_alone, options, run, story
from support.duo import Duo
from support.tiny_model import make_lora

pytest.importorskip("vllm")
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

pytestmark = pytest.mark.live

KILLS = (0, 1, 2, 30)
"""How many tokens the client has at each death."""


def outlived(
    kind: RealKind,
    params: SamplingParams,
    kills: tuple[int, ...] = KILLS,
    prompt: list[int] = PROMPT,
    *,
    turns: int = 1,
    unheard: int = 0,
    lora: LoRARequest | None = None,
) -> list[Any]:
    """The story of a request whose engine is killed after so many tokens. `turns`: before the first
    death at the least. `unheard`: steps before each death that nobody hears of."""
    duo = kind.duo()
    duo.survival = True
    request = duo.add("killed", prompt, params, more=() if lora is None else (lora,))
    for _ in range(turns):
        duo.turn()
    for tokens in kills:
        kill(duo, request, tokens, unheard)
    duo.finish()
    duo.check_nothing_left()
    assert duo.state[request] == "finished"
    assert duo.revived == len(kills)
    return story(duo, request)


def kill(duo: Duo, request: Any, tokens: int, unheard: int = 0) -> None:
    """Kills the engine that has the request once its client has so many tokens."""
    owner = owner_of(duo, request, tokens)
    for _ in range(unheard):
        duo.engines[owner].step()
    assert duo.state[request] == "open"
    duo.kill(owner)


@pytest.mark.parametrize("case", CASES)
def test_four_deaths_change_nothing(real: RealKind, case: str) -> None:
    assert outlived(real, options(**CASES[case])) == left_alone(real, case)


@pytest.mark.parametrize("case", ["greedy", "seeded with every option", "json"])
@pytest.mark.parametrize("kills", [(0,), (1,), (29,)])
def test_what_nobody_heard_is_computed_again(
    real: RealKind, case: str, kills: tuple[int, ...]
) -> None:
    found = outlived(real, options(**CASES[case]), kills, unheard=3)
    assert found == left_alone(real, case)


def test_a_stop_token_after_a_death_stops_it(real: RealKind) -> None:
    params = {"temperature": 0.8, "seed": 9, "max_tokens": 200}
    undisturbed, _ = run(real, options(**params), 0)
    tokens = [t for told in undisturbed if isinstance(told, tuple) for t in told[0]]
    stop = next(t for i, t in enumerate(tokens) if i > 60 and t not in tokens[:i])
    expected, _ = run(real, options(**params, stop_token_ids=[stop]), 0)
    found = outlived(real, options(**params, stop_token_ids=[stop]))
    assert found == expected
    assert found[-1][1].name == "STOP"


def test_all_tokens_but_the_last_may_be_there(real: RealKind) -> None:
    """Of `max_tokens`, and of `min_tokens`."""
    params = options(temperature=0.8, seed=19, max_tokens=30, min_tokens=29, ignore_eos=False)
    expected, _ = run(real, params, 0)
    assert outlived(real, params, (28, 29)) == expected


def test_with_a_lora_adapter(real: RealKind, tiny_model: Path, tmp_path: Path) -> None:
    lora = LoRARequest("adapter", 1, str(make_lora(tmp_path / "adapter", tiny_model)))
    params = options(temperature=0.8, seed=31)
    plain, _ = run(real, params, 0)
    expected, _ = run(real, params, 0, lora=lora)
    assert expected != plain
    assert outlived(real, params, lora=lora) == expected


@pytest.mark.parametrize("kills", [(0,), (0, 7)])
def test_in_the_middle_of_its_prompt(
    real: RealKind, kills: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeded, with its prompt in chunks at both engines."""
    prompt = [(17 * i) % 400 + 60 for i in range(1500)]
    params = options(temperature=0.8, seed=51, max_tokens=40)
    expected, _ = run(real, params, 0, prompt)
    for engine in real.engines:
        monkeypatch.setattr(engine.core.scheduler, "max_num_scheduled_tokens", 256)
    assert outlived(real, params, kills, prompt, turns=2) == expected


def test_before_it_was_ever_scheduled(real: RealKind) -> None:
    """With eight that ran before it: all nine go on, and none loses its place or a token."""
    params = options(temperature=0.8, seed=41)
    expected, _ = run(real, params, 0)
    others, _ = run(real, options(temperature=0), 0, PROMPT[:20])
    duo = real.duo()
    duo.survival = True
    before = [duo.add(f"b{n}", PROMPT[:20], options(temperature=0)) for n in range(8)]
    request = duo.add("killed", PROMPT, params)
    duo.turn()
    assert not duo.got[request]
    kill(duo, request, 0)
    duo.finish()
    assert story(duo, request) == expected
    assert [story(duo, name) for name in before] == [others] * 8
    assert duo.revived == 9
    duo.check_nothing_left()


def test_where_its_prompt_is_cached_little_is_computed_again(real: RealKind) -> None:
    params = options(temperature=0, max_tokens=60)
    prompt = [(19 * i) % 400 + 60 for i in range(300)]
    expected, _ = run(real, params, 0, prompt)
    duo = real.duo()
    duo.survival = True
    duo.add("earlier", prompt, options(temperature=0, max_tokens=2), on=1)
    duo.finish()
    request = duo.add("killed", prompt, params)
    kill(duo, request, 5)
    scheduled: list[int] = []
    schedule = real.engines[1].core.scheduler.schedule

    def noted(*args: Any) -> Any:
        output = schedule(*args)
        scheduled.append(output.total_num_scheduled_tokens)
        return output

    real.engines[1].core.scheduler.schedule = noted
    try:
        duo.finish()
    finally:
        del real.engines[1].core.scheduler.schedule
    assert story(duo, request) == expected
    assert max(scheduled) < 64
    duo.check_nothing_left()


def test_a_death_during_a_move_changes_nothing(real: RealKind) -> None:
    """The destination had a part of its KV, and is the one that goes on."""
    prompt = [(23 * i) % 400 + 60 for i in range(300)]
    for case in ("greedy", "seeded with every option"):
        params = options(**CASES[case])
        expected, _ = run(real, params, 0, prompt)
        duo = real.duo()
        duo.survival = True
        request = duo.add("killed", prompt, params)
        owner_of(duo, request, 9)
        assert duo.migrate(request, 1)
        for _ in range(2):
            duo.turn()
        kill(duo, request, 9)
        duo.finish()
        assert story(duo, request) == expected
        assert duo.revived + sum(ended.taken for ended in duo.ended) >= 1
        duo.check_nothing_left()


def forgetful(admit: Any) -> Any:
    """An `admit` that takes in all tokens but the last."""
    return lambda request, made, outputs: admit(request, made, outputs[:-1])


def test_a_token_that_is_not_handed_over_would_be_noticed(
    real: RealKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    for case in ("greedy", "seeded", "json"):
        with monkeypatch.context() as patch:
            duo = real.duo()
            duo.survival = True
            request = duo.add("killed", PROMPT, options(**CASES[case]))
            owner_of(duo, request, 20)
            port = duo.engines[1].port  # type: ignore[index]
            patch.setattr(port, "admit", forgetful(port.admit))
            kill(duo, request, 20)
            duo.finish()
        assert story(duo, request) != left_alone(real, case)
        assert duo.revived == 1
