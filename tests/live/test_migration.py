"""Requests are moved through HTTP, and their clients cannot tell: each stream is the undisturbed
one's, byte for byte but for ids, times and where vLLM cuts it into chunks."""

import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.gemma import BOS, NoGemma, make_tiny_gemma, prepare_gemma_270m
from support.server import Server, all_migrations, eventually, real_time
from support.streaming import (
    Background,
    Recorded,
    all_at_once,
    first_difference,
    migrate,
    rows,
    stream,
    stream_moved,
)

from .conftest import FLAGS, OneServer

pytestmark = pytest.mark.live
"""Of options and ends, tests/conformance has in every run what is slow here, without HTTP."""

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG = "Every block of this prompt matters to what comes after it. "
WHOLE = {"ignore_eos": True, "return_token_ids": True}
GREEDY = {"prompt": LONG * 4, "max_tokens": 180, "temperature": 0, **WHOLE}
# The coldest that still leaves a choice: a token then hangs on all of the KV before it.
SEEDED = {"prompt": LONG * 4, "max_tokens": 180, "temperature": 0.1, "seed": 7, **WHOLE}
# Greedy runs of random weights end in a loop; this keeps them going.
RESTLESS = {**GREEDY, "frequency_penalty": 1.5, "logit_bias": {"0": -100, "1": -100}}
ASK = [{"role": "user", "content": "What is the capital of France? " + LONG}]
CHATTING = {"messages": ASK, "max_tokens": 300, "temperature": 0.3, "seed": 5, "logprobs": True}
SCHEMA = {
    "type": "object",
    "properties": {
        "numbers": {
            "type": "array", "items": {"type": "integer"}, "minItems": 20, "maxItems": 25
        },
        "text": {"type": "string", "minLength": 60, "maxLength": 80},
    },
    "required": ["numbers", "text"],
    "additionalProperties": False,
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}
_salts = iter(range(10**6))


STILL = ("--policy", "least-loaded")
"""A policy that moves nothing: here only the tests do."""


@pytest.fixture
def fleet(server: Server) -> Iterator[Server]:
    """The shared server, which has nothing of a test's requests once that is over."""
    yield server
    left_clean(server)


@pytest.fixture
def narrow(one_server: OneServer, tiny_model: Path, logs: Path) -> Iterator[Server]:
    """Two instances that take four requests at once and prefill 32 tokens a step."""
    server = one_server.of(
        "narrow", tiny_model, logs / "narrow.log", *STILL, *FLAGS, "--max-num-seqs", "4",
        "--max-num-batched-tokens", "32", "--block-size", "32",
    )  # fmt: skip
    yield server
    left_clean(server)


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_tiny_gemma(tmp_path_factory.mktemp("gemma") / "tiny-gemma", tiny_model)


@pytest.fixture
def hybrid(one_server: OneServer, tiny_gemma: Path, logs: Path) -> Iterator[Server]:
    """Two instances of a tiny Gemma 3: layers with sliding windows beside layers without."""
    server = one_server.of(
        "hybrid", tiny_gemma, logs / "hybrid.log", *STILL, *FLAGS,
        "--max-num-batched-tokens", "32", "--block-size", "32",
    )  # fmt: skip
    yield server
    left_clean(server)


def left_clean(server: Server) -> None:
    """Nothing of any request is left on either instance."""
    eventually(lambda: server.requests() == [], 10, "no stream is left")
    eventually(
        lambda: all(
            (i["running"], i["waiting"], i["kv_tokens_used"]) == (0, 0, 0)
            for i in server.instances().values()
        ),
        10,
        f"no block is left: {server.instances()}",
    )


def salted(body: dict[str, Any]) -> dict[str, Any]:
    """Shares no prefix with other runs: a prompt of which half is cached is computed in other
    pieces, and its last bits come out otherwise."""
    return {**body, "cache_salt": f"salt {next(_salts)}"}


def check(
    server: Server, path: str, body: dict[str, Any], *, hops: int = 6, **order: Any
) -> tuple[Recorded, Recorded]:
    """Moves a request to and fro; its stream is the undisturbed one. On a busy machine half of the
    hops come in time."""
    calm = stream(server, path, salted(body))
    assert calm.error is None
    moved = stream_moved(server, path, salted(body), hops=hops, **order)
    assert moved.error is None
    assert first_difference(calm, moved) is None
    assert_moved(moved, at_least=hops // 2 * body.get("n", 1))
    return calm, moved


def assert_moved(moved: Recorded, at_least: int) -> None:
    outcomes = [(h["outcome"], h["reason"]) for h in moved.hops]
    assert len([o for o in outcomes if o[0] == "migrated"]) >= at_least, outcomes
    assert moved.places() == {"i0", "i1"}
    assert moved.instance == moved.hops[0]["source"]


def open_stream(
    server: Server, body: dict[str, Any], name: str, enough: threading.Event | None = None
) -> tuple[threading.Thread, list]:
    """A stream in a thread of its own, of which the first chunk has come; and what it will be. Its
    client hangs up when it has `enough`."""
    seen: list[Recorded] = []
    began = threading.Event()

    def goes_on(_: int) -> bool:
        began.set()
        return enough is None or not enough.is_set()

    def run() -> None:
        seen.append(stream(server, COMPLETIONS, body, name=name, on_chunk=goes_on))

    thread = threading.Thread(target=run)
    thread.start()
    assert began.wait(30)
    return thread, seen


# -- sampling


def test_greedy(fleet: Server) -> None:
    check(fleet, COMPLETIONS, {**GREEDY, "logprobs": 1})


def test_greedy_without_a_loop_and_with_eos_ignored(fleet: Server) -> None:
    calm, _ = check(fleet, COMPLETIONS, {**RESTLESS, "logprobs": 1})
    assert len(set(calm.tokens())) > 25


def test_the_comparison_sees_one_letter_changed_in_the_first_block(fleet: Server) -> None:
    """The negative control: what the other tests compare does hang on all of the KV."""
    for body in (SEEDED, RESTLESS, {**GREEDY, "logprobs": 1}):
        one = stream(fleet, COMPLETIONS, salted(body))
        other = stream(fleet, COMPLETIONS, salted({**body, "prompt": "x" + body["prompt"][1:]}))
        assert one.error is None
        assert other.error is None
        assert first_difference(one, other) is not None


@pytest.mark.slow
def test_seeded_with_logprobs(fleet: Server) -> None:
    calm, _ = check(fleet, COMPLETIONS, {**SEEDED, "logprobs": 3})
    assert len(set(calm.tokens())) > 25


def test_seeded_with_every_sampling_parameter(fleet: Server) -> None:
    first = stream(fleet, COMPLETIONS, SEEDED).tokens()
    body = {
        **SEEDED,
        "temperature": 0.4, "top_p": 0.95, "top_k": 100, "min_p": 0.001,
        "presence_penalty": 0.2, "frequency_penalty": 0.1, "repetition_penalty": 1.05,
        "min_tokens": 150, "stop_token_ids": first[5:25], "ignore_eos": False,
        "logit_bias": {"40": 1.5, "41": -2.0}, "bad_words": ["word20", "ab"],
        "allowed_token_ids": list(range(2, 500)), "logprobs": 2, "skip_special_tokens": False,
        "spaces_between_special_tokens": False, "max_tokens": 240,
    }  # fmt: skip
    calm, _ = check(fleet, COMPLETIONS, body)
    assert len(calm.tokens()) >= 150
    assert set(calm.tokens()) <= set(range(2, 500))


def test_a_long_prompt_with_logprobs(fleet: Server) -> None:
    _, moved = check(fleet, COMPLETIONS, {**SEEDED, "prompt": LONG * 27, "logprobs": 2})
    assert sum(s["tokens"] for s in moved.hops[0]["stages"]) > 1500


@pytest.mark.slow
def test_echoed_prompt_logprobs(fleet: Server) -> None:
    check(fleet, COMPLETIONS, {**SEEDED, "echo": True, "logprobs": 2})


def test_prompt_logprobs_without_a_stream(fleet: Server) -> None:
    body = {**SEEDED, "prompt_logprobs": 2, "logprobs": 1, "model": "tiny"}

    def post(name: str) -> dict[str, Any]:
        headers = {"X-Request-Id": name}
        answer = httpx.post(
            fleet.url + COMPLETIONS, json=salted(body), headers=headers, timeout=60
        ).json()
        return {k: v for k, v in answer.items() if k not in ("id", "created")}

    def move() -> list[str]:
        outcomes = []
        for hop in range(6):
            wanted = 10 + 25 * hop
            eventually(
                lambda wanted=wanted: any(
                    r["output_tokens"] >= wanted for r in rows(fleet, "with-prompt-logprobs")
                ),
                20,
            )
            outcomes.append(migrate(fleet, "with-prompt-logprobs").json().get("outcome"))
        return outcomes

    calm = post("calm")
    moved, outcomes = all_at_once([lambda: post("with-prompt-logprobs"), move])
    assert calm["choices"][0]["prompt_logprobs"][-1]
    assert moved == calm
    assert outcomes.count("migrated") >= 5


def test_n_sequences_each_moved(fleet: Server) -> None:
    calm, moved = check(fleet, COMPLETIONS, {**SEEDED, "n": 3})
    assert len({calm.text(i) for i in range(3)}) == 3
    assert len({h["request"] for h in moved.hops}) == 3


@pytest.mark.slow
def test_a_lora_adapter(fleet: Server) -> None:
    base = stream(fleet, COMPLETIONS, SEEDED)
    calm, _ = check(fleet, COMPLETIONS, {**SEEDED, "model": "adapter", "logprobs": 2})
    assert calm.tokens() != base.tokens()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocking", "recompute"])
def test_other_ways_to_get_the_kv_there(fleet: Server, how: str) -> None:
    check(fleet, COMPLETIONS, SEEDED, copy=how)
    check(fleet, COMPLETIONS, RESTLESS, copy=how)


# -- how it ends


def test_a_stop_string_that_comes_late(fleet: Server) -> None:
    text = stream(fleet, COMPLETIONS, SEEDED).text()
    piece = next(
        text[at : at + 9]
        for at in range(int(len(text) * 0.75), len(text))
        if text.find(text[at : at + 9]) == at and "�" not in text[at : at + 9]
    )
    calm, _ = check(fleet, COMPLETIONS, {**SEEDED, "stop": [piece, "no such text"]})
    assert calm.pieces[-2]["choices"][0]["stop_reason"] == piece
    assert calm.text() == text[: text.find(piece)]


@pytest.mark.slow
def test_a_stop_token_that_comes_late(fleet: Server) -> None:
    tokens = stream(fleet, COMPLETIONS, SEEDED).tokens()
    token = next(t for i, t in enumerate(tokens) if i > 130 and t not in tokens[:i])
    calm, _ = check(fleet, COMPLETIONS, {**SEEDED, "stop_token_ids": [token]})
    assert calm.pieces[-2]["choices"][0]["stop_reason"] == token
    assert calm.tokens() == tokens[: tokens.index(token) + 1]


# -- structured outputs


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param({"regex": "[a-z]{100}-[0-9]{100}"}, id="regex", marks=pytest.mark.slow),
        pytest.param(
            {"grammar": 'root ::= "go " pair{70} " end"\npair ::= ("ab" | "cd" | "e") (","|";")'},
            id="grammar",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"choice": [c + "lpha beta gamma " * 15 for c in "abc"]},
            id="choice",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_structured_outputs(fleet: Server, wanted: dict[str, Any]) -> None:
    calm, _ = check(fleet, CHAT, {**CHATTING, "structured_outputs": wanted})
    assert calm.pieces[-2]["choices"][0]["finish_reason"] == "stop"
    check(fleet, COMPLETIONS, {**SEEDED, "ignore_eos": False, "structured_outputs": wanted})


@pytest.mark.slow
def test_a_json_schema(fleet: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    calm, _ = check(fleet, CHAT, {**CHATTING, "max_tokens": 1500, "response_format": form})
    assert len(json.loads(calm.text(), strict=False)["numbers"]) >= 20


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        pytest.param({"type": "function", "function": {"name": "weather"}}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_tool_call(fleet: Server, choice: Any) -> None:
    body = {**CHATTING, "max_tokens": 1500, "tools": [TOOL], "tool_choice": choice}
    calm, _ = check(fleet, CHAT, body)
    calls = [
        call
        for piece in calm.pieces
        for one in piece["choices"]
        for call in one["delta"].get("tool_calls") or []
    ]
    arguments = "".join(c["function"].get("arguments") or "" for c in calls)
    said, _ = json.JSONDecoder(strict=False).raw_decode(arguments)
    said = said[0]["parameters"] if isinstance(said, list) else said
    assert len(said["numbers"]) >= 20


# -- many at once


def test_eight_at_once_moved_at_random_under_traffic(fleet: Server) -> None:
    bodies = [{**SEEDED, "prompt": f"{i} " + LONG * (i % 4), "seed": i} for i in range(4)]
    bodies += [{**RESTLESS, "prompt": f"{i} " + LONG * i} for i in range(4)]
    calm = [stream(fleet, COMPLETIONS, salted(body)) for body in bodies]
    ended = threading.Event()
    dice = random.Random(3)
    outcomes: list[str] = []

    def traffic(thread: int, number: int) -> Recorded:
        body = {"prompt": f"traffic {thread} {number}", "max_tokens": 30, "ignore_eos": True}
        return stream(fleet, COMPLETIONS, body)

    def move() -> None:
        while not ended.is_set():
            mine = [r for r in fleet.requests() if r["id"].startswith("eight-")]
            if mine:
                answer = migrate(fleet, dice.choice(mine)["request"])
                outcomes.append(answer.json().get("outcome", str(answer.status_code)))

    def once(round_: int) -> list[Recorded]:
        return all_at_once(
            [
                lambda i=i, body=body: stream(
                    fleet, COMPLETIONS, salted(body), name=f"eight-{round_}-{i}"
                )
                for i, body in enumerate(bodies)
            ]
        )

    def run_all() -> list[list[Recorded]]:
        """Again, until there were enough moves: a busy machine carries out few in one round."""
        rounds: list[list[Recorded]] = []
        try:
            while outcomes.count("migrated") < 30 and len(rounds) < 10:
                rounds.append(once(len(rounds)))
        finally:
            ended.set()
        return rounds

    with Background(3, traffic).running() as background:
        rounds, _, _ = all_at_once([run_all, move, move])
    for seen in rounds:
        assert [s.error for s in seen] == [None] * 8
        assert [first_difference(a, b) for a, b in zip(calm, seen, strict=True)] == [None] * 8
    assert [s.error for s in background.done] == [None] * len(background.done)
    assert outcomes.count("migrated") >= 30, outcomes
    assert background.done


# -- the routes


def test_the_routes_show_where_a_request_is(fleet: Server) -> None:
    thread, seen = open_stream(fleet, {**GREEDY, "max_tokens": 600}, "shown")
    (before,) = rows(fleet, "shown")
    answer = migrate(fleet, "shown")
    (after,) = rows(fleet, "shown")
    again = migrate(fleet, after["request"], destination=before["instance"])
    thread.join()
    shown = answer.json()
    assert answer.status_code == 200
    assert (shown["outcome"], shown["reason"]) == ("migrated", "")
    assert (shown["source"], shown["destination"]) == (before["instance"], after["instance"])
    assert after["request"] == before["request"]
    assert before["instance"] != after["instance"]
    assert seen[0].instance == before["instance"]
    assert again.json()["destination"] == before["instance"]
    assert shown["request_id"] == "shown"
    assert 0 < shown["downtime_ms"] <= shown["total_ms"]
    # Its first stage found most blocks cached by then or copied them all: those of the prompt.
    assert shown["stages"]
    assert all(s["tokens"] >= 0 and s["bytes"] >= 0 and s["ms"] >= 0 for s in shown["stages"])
    listed = all_migrations(fleet.http.get)
    one = fleet.http.get(f"/llumnix/v1/migrations/{shown['id']}").json()
    assert min(row.pop("ago_s") for row in [*listed[-2:], one]) > 0
    assert listed[-2:] == [shown, again.json()]
    assert one == shown


def test_orders_that_make_no_sense_say_so(fleet: Server) -> None:
    enough = threading.Event()
    pair, _ = open_stream(fleet, {**SEEDED, "n": 2, "max_tokens": 1200}, "pair", enough)
    one, _ = open_stream(fleet, {**GREEDY, "max_tokens": 1200}, "one", enough)
    names = [r["request"] for r in rows(fleet, "pair")]
    (here,) = [r["instance"] for r in rows(fleet, "one")]
    cases = [
        ({"request_id": "nobody"}, 404, ["no request nobody"]),
        ({"request_id": "one", "destination": "i9"}, 404, ["no instance i9", "i0, i1"]),
        ({"request_id": "one", "destination": here}, 409, [f"is on {here} already"]),
        ({"request_id": "pair"}, 409, ["2 sequences", *names]),
        ({"destination": "i1"}, 400, ["request_id", "required"]),
        ({"request_id": "one", "to": "i1"}, 400, ["to: ", "not permitted"]),
        ({"request_id": "one", "copy": "slowly"}, 400, ["copy: ", "'staged'"]),
        ({"request_id": 5}, 400, ["request_id: ", "string"]),
        ({"request_id": "one", "destination": ["i1"]}, 400, ["destination: "]),
        ([], 400, ["the body: "]),
    ]
    url = fleet.url + "/llumnix/v1/migrations"
    answers = [httpx.post(url, json=body) for body, _, _ in cases]
    answers.append(httpx.post(url, content=b"{"))
    missing = httpx.get(url + "/m999999")
    still, both = rows(fleet, "one"), rows(fleet, "pair")
    enough.set()
    pair.join()
    one.join()
    assert still[0]["instance"] == here
    assert {r["request"] for r in both} == set(names)
    assert [a.status_code for a in answers] == [status for _, status, _ in cases] + [400]
    for (_, status, words), answer in zip(cases, answers, strict=False):
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", status)
        assert [w for w in words if w not in error["message"]] == [], error["message"]
    assert missing.status_code == 404
    assert "no migration m999999" in missing.json()["error"]["message"]


# -- before the first token


def wait_for_row(server: Server, name: str) -> None:
    """Returns as soon as the request is listed: a prefill is over in a moment."""
    deadline = time.monotonic() + 10
    while not rows(server, name):
        assert time.monotonic() < deadline, f"{name} is not listed"


@pytest.mark.slow
def test_in_the_middle_of_a_chunked_prefill(narrow: Server) -> None:
    body = {**RESTLESS, "prompt": LONG * 32, "max_tokens": 60}
    calm = stream(narrow, COMPLETIONS, salted(body))
    assert calm.error is None
    for how in ("staged", "blocking", "recompute"):
        # A prefill is over in a moment, and may be so before it is moved.
        assert any(_moved_while_prefilled(narrow, body, calm, f"{how}-{i}", how) for i in range(4))


def _moved_while_prefilled(
    server: Server, body: dict[str, Any], calm: Recorded, name: str, how: str
) -> bool:
    """Moves a request twice, right from its start; its stream is the undisturbed one. Returns
    whether it had no token yet after the first hop."""

    def move() -> list[Any]:
        wait_for_row(server, name)
        seen = []
        for _ in range(2):
            answer = migrate(server, name, copy=how).json()
            seen.append((answer.get("outcome"), [r["output_tokens"] for r in rows(server, name)]))
        return seen

    moved, seen = all_at_once([lambda: stream(server, COMPLETIONS, salted(body), name=name), move])
    assert moved.error is None
    assert first_difference(calm, moved) is None
    return seen[0] == ("migrated", [0])


@pytest.mark.slow
def test_prompt_logprobs_stay_until_the_first_token(narrow: Server) -> None:
    body = {**RESTLESS, "prompt": LONG * 27, "max_tokens": 60, "echo": True, "logprobs": 1}

    def move() -> dict[str, Any]:
        wait_for_row(narrow, "collecting")
        return migrate(narrow, "collecting").json()

    calm = stream(narrow, COMPLETIONS, salted(body))
    moved, answer = all_at_once(
        [lambda: stream(narrow, COMPLETIONS, salted(body), name="collecting"), move]
    )
    assert (answer["outcome"], answer["destination"] != answer["source"]) == ("aborted", True)
    assert "log-probabilities are being collected" in answer["reason"]
    assert first_difference(calm, moved) is None


@pytest.mark.slow
def test_a_waiting_request_runs_at_once_elsewhere(narrow: Server) -> None:
    target = {**SEEDED, "prompt": "I wait for my turn.", "max_tokens": 60}
    calm = stream(narrow, COMPLETIONS, salted(target))
    hang_up = [threading.Event() for _ in range(8)]
    fillers = [
        lambda i=i: stream(
            narrow, COMPLETIONS, {"prompt": f"filler {i}", "max_tokens": 1900, **WHOLE},
            name=f"filler-{i}", on_chunk=lambda _, i=i: not hang_up[i].is_set(),
        )
        for i in range(8)
    ]  # fmt: skip

    def direct() -> tuple[Recorded, dict[str, Any], list[int]]:
        real_time()
        eventually(
            lambda: [i["running"] for i in narrow.instances().values()] == [4, 4], 30, "all busy"
        )
        ours: list[Recorded] = []
        thread = threading.Thread(
            target=lambda: ours.append(stream(narrow, COMPLETIONS, salted(target), name="patient"))
        )
        thread.start()
        eventually(lambda: rows(narrow, "patient"), 10)
        here = rows(narrow, "patient")[0]["instance"]
        eventually(lambda: narrow.instances()[here]["waiting"] == 1, 10, "it waits")
        elsewhere = [r for r in narrow.requests() if r["instance"] != here]
        hang_up[int(elsewhere[0]["id"][-1])].set()
        there = elsewhere[0]["instance"]
        eventually(lambda: narrow.instances()[there]["running"] == 3, 10, "there is a place")
        waiting = rows(narrow, "patient")[0]["output_tokens"]
        answer = migrate(narrow, "patient").json()
        thread.join()
        busy = narrow.instances()[here]["running"]
        for event in hang_up:
            event.set()
        return ours[0], answer, [waiting, busy]

    *_, (moved, answer, counts) = all_at_once([*fillers, direct])
    assert answer["outcome"] == "migrated", answer
    assert sum(s["tokens"] for s in answer["stages"]) == 0
    assert counts == [0, 4]
    assert moved.error is None
    assert first_difference(calm, moved) is None


# -- several kinds of layers


@pytest.mark.slow
def test_sliding_windows_beside_full_attention(hybrid: Server) -> None:
    """The prompt is six windows long, what follows three more."""
    check(hybrid, COMPLETIONS, {**RESTLESS, "prompt": LONG * 7, "logprobs": 1})
    check(hybrid, COMPLETIONS, {**RESTLESS, "prompt": LONG * 7}, copy="blocking")
    check(hybrid, COMPLETIONS, {**SEEDED, "prompt": LONG[:24], "logprobs": 1})


@pytest.mark.slow
def test_sliding_windows_in_the_middle_of_a_prefill(hybrid: Server) -> None:
    test_in_the_middle_of_a_chunked_prefill(hybrid)


@pytest.mark.slow
def test_gemma_3_270m(one_server: OneServer, logs: Path) -> None:
    """Real weights; the prompt is longer than their window of 512."""
    try:
        folder = prepare_gemma_270m()
    except NoGemma as why:
        pytest.skip(str(why))
    server = one_server.of(
        "270m", folder, logs / "270m.log", *STILL, "--dtype", "float32",
        "--kv-cache-memory-bytes", "268435456", "--max-num-seqs", "4", "--max-model-len", "2048",
    )  # fmt: skip
    facts = "The river Loire flows through France for more than a thousand kilometres. "
    ids = server.http.post(
        "/tokenize", json={"model": "tiny", "prompt": facts * 50, "add_special_tokens": False}
    ).json()["tokens"]
    assert len(ids) > 600
    body = {"prompt": [BOS, *ids], "max_tokens": 100, "temperature": 0, **WHOLE, "logprobs": 1}
    check(server, COMPLETIONS, body, hops=4)
    check(server, COMPLETIONS, {**body, "temperature": 0.8, "seed": 3}, hops=4)
    left_clean(server)
