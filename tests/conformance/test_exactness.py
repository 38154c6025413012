"""A request that is moved six times generates, token for token and to the last digit of its
log-probabilities, what it generates undisturbed: on vLLM's engines, for every sampling option."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from conformance.engines import RealKind
from support.duo import Duo
from support.tiny_model import make_lora

pytest.importorskip("vllm")
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

pytestmark = pytest.mark.live

HOPS = 6
PROMPT = [(13 * i) % 400 + 60 for i in range(150)]
EVERYTHING: dict[str, Any] = {
    "temperature": 0.9,
    "seed": 5,
    "top_p": 0.95,
    "top_k": 200,
    "min_p": 0.001,
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.4,
    "presence_penalty": 0.3,
    "min_tokens": 60,
    "logprobs": 3,
    "logit_bias": {77: 1.5, 78: -2.0},
    "bad_words": ["word40"],
    "ignore_eos": False,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "minLength": 30, "maxLength": 40},
        "b": {"type": "array", "items": {"type": "integer"}, "minItems": 8, "maxItems": 8},
    },
    "required": ["a", "b"],
}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.8, "seed": 1234},
    "seeded with every option": EVERYTHING,
    "penalties": {
        "temperature": 0,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
    },
    "log-probabilities": {"temperature": 0, "logprobs": 5},
    "log-probabilities of the prompt": {"temperature": 0, "logprobs": 1, "prompt_logprobs": 2},
    "allowed tokens": {"temperature": 1.0, "seed": 3, "allowed_token_ids": list(range(90, 190))},
    "json": {
        "temperature": 1.0,
        "seed": 8,
        "ignore_eos": False,
        "structured_outputs": StructuredOutputsParams(json=SCHEMA),
    },
    "regex": {
        "temperature": 0.9,
        "seed": 4,
        "ignore_eos": False,
        "structured_outputs": StructuredOutputsParams(regex="[a-f]{40}-[0-9]{40}-(xy){10}END"),
    },
    "grammar": {
        "temperature": 0.9,
        "seed": 6,
        "ignore_eos": False,
        "structured_outputs": StructuredOutputsParams(
            grammar='root ::= pair{30}\npair ::= [a-z] "=" [0-9] ";"'
        ),
    },
    "choice": {
        "temperature": 0.9,
        "seed": 6,
        "ignore_eos": False,
        "structured_outputs": StructuredOutputsParams(choice=["abc" * 30, "abd" * 30]),
    },
}


def options(**more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 90, "ignore_eos": True, "detokenize": False, **more})


def story(duo: Duo, request: Any) -> list[Any]:
    """Everything that was said to the client, in a form that can be compared."""
    told: list[Any] = []
    for output in duo.extras[request]:
        told.append((list(output.new_token_ids), output.finish_reason, output.stop_reason))
        if output.new_logprobs is not None:
            told.append([array.tolist() for array in output.new_logprobs[:3]])
        if output.new_prompt_logprobs_tensors is not None:
            told.append([t.tolist() for t in output.new_prompt_logprobs_tensors[:3]])
    return told


def run(
    kind: RealKind, params: SamplingParams, hops: int, prompt: list[int] = PROMPT, **how: Any
) -> tuple[list[Any], int]:
    """One request's story, and how often it was moved."""
    duo = kind.duo()
    lora = how.pop("lora", None)
    request = duo.add("moved", prompt, params, more=() if lora is None else (lora,))
    length = how.pop("every", 11)
    for hop in range(hops):
        duo.turn_until(
            lambda hop=hop: (
                len(duo.got[request]) >= 4 + hop * length or duo.state[request] != "open"
            )
        )
        duo.migrate(request, **how)
        duo.turn_until(lambda: duo.streams.get(request) is None or not _going(duo, request))
    duo.finish()
    duo.check_nothing_left()
    assert duo.state[request] == "finished"
    print("not moved:", [e.why for e in duo.ended if not e.taken])
    return story(duo, request), sum(e.taken for e in duo.ended)


def left_alone(kind: RealKind, case: str) -> list[Any]:
    """The story of a case that is neither moved nor loses its engine. It is run once."""
    if case not in kind.stories:
        kind.stories[case], _ = run(kind, options(**CASES[case]), 0)
    return kind.stories[case]


def _going(duo: Duo, request: Any) -> bool:
    stream = duo.streams.get(request)
    return stream is not None and stream.grant is not None


@pytest.mark.parametrize("case", CASES)
def test_six_hops_change_nothing(real: RealKind, case: str) -> None:
    found, moved = run(real, options(**CASES[case]), HOPS)
    assert found == left_alone(real, case)
    assert moved >= 5


@pytest.mark.parametrize("copy", ["blocking", "recompute"])
def test_the_other_ways_to_copy_change_nothing_either(real: RealKind, copy: str) -> None:
    params = options(temperature=0.8, seed=21)
    expected, _ = run(real, params, 0)
    found, moved = run(real, params, 3, copy=copy)
    assert found == expected
    assert moved == 3


def test_a_stop_token_after_a_move_stops_it(real: RealKind) -> None:
    params = {"temperature": 0.8, "seed": 9, "max_tokens": 200}
    undisturbed, _ = run(real, options(**params), 0)
    tokens = [t for told in undisturbed if isinstance(told, tuple) for t in told[0]]
    stop = next(t for i, t in enumerate(tokens) if i > 60 and t not in tokens[:i])
    expected, _ = run(real, options(**params, stop_token_ids=[stop]), 0)
    found, moved = run(real, options(**params, stop_token_ids=[stop]), 4)
    assert found == expected
    assert found[-1][1].name == "STOP"
    assert moved == 4


def test_with_a_lora_adapter(real: RealKind, tiny_model: Path, tmp_path: Path) -> None:
    lora = LoRARequest("adapter", 1, str(make_lora(tmp_path / "adapter", tiny_model)))
    params = options(temperature=0.8, seed=31)
    plain, _ = run(real, params, 0)
    expected, _ = run(real, params, 0, lora=lora)
    found, moved = run(real, params, HOPS, lora=lora)
    assert expected != plain
    assert found == expected
    assert moved == HOPS


def test_in_the_middle_of_its_prompt(real: RealKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded: a prompt in chunks, moved or not, draws the same tokens as a prompt in one."""
    prompt = [(17 * i) % 400 + 60 for i in range(1500)]
    params = options(temperature=0.8, seed=51, max_tokens=40)
    in_one, _ = run(real, params, 0, prompt)
    for engine in real.engines:
        monkeypatch.setattr(engine.core.scheduler, "max_num_scheduled_tokens", 256)
    expected, _ = run(real, params, 0, prompt)
    assert expected == in_one
    duo = real.duo()
    request = duo.add("moved", prompt, params)
    duo.turn()
    assert duo.migrate(request)
    duo.finish()
    assert story(duo, request) == expected
    assert [e.taken for e in duo.ended] == [True]
    assert len(duo.ended[0].stages) > 1
    duo.check_nothing_left()


def test_before_it_was_ever_scheduled(real: RealKind) -> None:
    params = options(temperature=0.8, seed=41)
    expected, _ = run(real, params, 0)
    duo = real.duo()
    for number in range(8):  # As many as the engine runs at once.
        duo.add(f"before{number}", PROMPT[:20], options(temperature=0))
    request = duo.add("moved", PROMPT, params)
    duo.turn()
    assert duo.migrate(request)
    duo.finish()
    assert story(duo, request) == expected
    assert [(e.taken, sum(s.bytes for s in e.stages)) for e in duo.ended] == [(True, 0)]


def test_what_the_destination_has_already_is_not_copied(real: RealKind) -> None:
    params = options(temperature=0, max_tokens=30)
    prompt = [(19 * i) % 400 + 60 for i in range(300)]
    expected, _ = run(real, params, 0, prompt)
    duo = real.duo()
    duo.add("earlier", prompt, params, on=1)
    duo.finish()
    request = duo.add("moved", prompt, params)
    duo.turn_until(lambda: len(duo.got[request]) >= 5)
    duo.migrate(request)
    duo.finish()
    assert story(duo, request) == expected
    assert sum(s.tokens for s in duo.ended[-1].stages) < 64


@pytest.mark.slow  # tests/live has it too, over HTTP.
def test_eight_at_once_under_random_traffic(real: RealKind) -> None:
    draw = random.Random(3)
    prompts = [[draw.randrange(60, 500) for _ in range(draw.randrange(30, 400))] for _ in range(8)]
    params = [
        options(temperature=0, max_tokens=100)
        if i % 2
        else options(temperature=0.8, seed=100 + i, max_tokens=100)
        for i in range(8)
    ]
    expected = [run(real, p, 0, prompt)[0] for p, prompt in zip(params, prompts, strict=True)]
    duo = real.duo()
    names = [duo.add(f"moved{i}", prompts[i], params[i], on=i % 2) for i in range(8)]
    traffic = itertools.count()
    while any(duo.state[n] == "open" for n in names):
        duo.turn()
        if draw.random() < 0.3:
            duo.migrate(draw.choice(names))
        if draw.random() < 0.1:
            background = [draw.randrange(60, 500) for _ in range(draw.randrange(20, 200))]
            on = draw.choice(list(duo.engines))
            duo.add(
                f"traffic{next(traffic)}", background, options(temperature=1.0, max_tokens=20), on
            )
    duo.finish()
    assert [story(duo, n) for n in names] == expected
    assert sum(e.taken for e in duo.ended) > 20
    duo.check_nothing_left()


def test_a_move_that_copies_nothing_would_be_noticed(
    real: RealKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    params = options(temperature=0)
    expected, _ = run(real, params, 0)
    for engine in real.engines:
        pull = engine.client.pull
        monkeypatch.setattr(
            engine.client, "pull", lambda t, p, s, d, pull=pull, **how: pull(t, p, [], [])
        )
    found, moved = run(real, params, 1)
    assert moved == 1
    assert found != expected
