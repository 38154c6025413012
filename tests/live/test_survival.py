"""Instances are killed, and no client notices: each answer is the undisturbed one's, byte for byte
but for ids, times and where vLLM cuts a stream into chunks."""

import itertools
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.server import Server, eventually, real_time
from support.streaming import all_at_once, rows, stream

from .conftest import FLAGS
from .test_migration import ASK, CHAT, COMPLETIONS, LONG, SCHEMA, TOOL, WHOLE

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(900)]

SEEDED = {"prompt": LONG * 3, "max_tokens": 220, "temperature": 0.1, "seed": 7, **WHOLE}
RESTLESS = {
    **SEEDED, "temperature": 0, "frequency_penalty": 1.5, "logit_bias": {"0": -100, "1": -100}
}  # fmt: skip
CHATTING = {"messages": ASK, "max_tokens": 220, "temperature": 0.3, "seed": 5, "logprobs": True}
GRAMMAR = 'root ::= "go " pair{70} " end"\npair ::= ("ab" | "cd" | "e") (","|";")'
EVERYTHING = {
    "temperature": 0.4, "top_p": 0.95, "top_k": 100, "min_p": 0.001, "presence_penalty": 0.2,
    "frequency_penalty": 0.1, "repetition_penalty": 1.05, "min_tokens": 150,
    "stop_token_ids": list(range(20, 60)), "ignore_eos": False,
    "logit_bias": {"40": 1.5, "41": -2.0}, "bad_words": ["word20", "ab"],
    "allowed_token_ids": list(range(2, 500)), "logprobs": 2,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (COMPLETIONS, RESTLESS),
    "seeded": (COMPLETIONS, SEEDED),
    "every parameter": (COMPLETIONS, {**SEEDED, **EVERYTHING}),
    "logprobs": (COMPLETIONS, {**SEEDED, "logprobs": 3}),
    "echoed prompt logprobs": (COMPLETIONS, {**SEEDED, "echo": True, "logprobs": 2}),
    "prompt logprobs, whole": (COMPLETIONS, {**SEEDED, "prompt_logprobs": 2, "stream": False}),
    "three sequences": (COMPLETIONS, {**SEEDED, "n": 3}),
    "adapter": (COMPLETIONS, {**SEEDED, "model": "adapter", "logprobs": 1}),
    "stop string": (COMPLETIONS, {**RESTLESS, "stop": ["zzz no such text", "word41"]}),
    "long prompt": (COMPLETIONS, {**SEEDED, "prompt": LONG * 27}),
    "one token": (COMPLETIONS, {**SEEDED, "max_tokens": 1, "stream": False}),
    "whole": (COMPLETIONS, {**SEEDED, "stream": False}),
    "grammar": (CHAT, {**CHATTING, "structured_outputs": {"grammar": GRAMMAR}}),
    "regex": (CHAT, {**CHATTING, "structured_outputs": {"regex": "[a-z]{100}-[0-9]{60}"}}),
    "choice": (
        CHAT,
        {
            **CHATTING,
            "structured_outputs": {"choice": [c + "lpha beta gamma " * 15 for c in "abc"]},
        },
    ),
    "JSON schema": (
        CHAT,
        {
            **CHATTING,
            "max_tokens": 900,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA},
            },
        },
    ),
    "tool call": (
        CHAT,
        {**CHATTING, "max_tokens": 900, "tools": [TOOL], "tool_choice": "required"},
    ),
    "chat, whole": (CHAT, {**CHATTING, "stream": False}),
    "responses": (
        "/v1/responses",
        {"input": LONG, "max_output_tokens": 200, "temperature": 0},
    ),
    "messages": (
        "/v1/messages",
        {"messages": ASK, "max_tokens": 200, "temperature": 0},
    ),
}
NEEDS_LORA = {"adapter"}
"""With --enable-lora, an engine of vLLM 0.32 ends when it computes prompt log-probabilities beside
another request. So adapters have a server of their own."""
_numbers = itertools.count()
_ANY = re.compile(
    r'("(?:id|item_id|response_id|created|created_at|completed_at)": ?)("[^"]*"|[\d.]+)'
)


def ask(server: Server, kind: str, name: str = "") -> Any:
    """What the client of one request of that kind gets, without ids and times."""
    path, body = KINDS[kind]
    body = {"model": "tiny", **body, "cache_salt": f"salt {next(_numbers)}"}
    name = name or f"calm-{next(_numbers)}"
    if path in (COMPLETIONS, CHAT) and body.get("stream", True):
        seen = stream(server, path, body, name=name)
        assert seen.error is None, (kind, seen.error)
        return seen.folded().split("\n")
    real_time()
    if path in (COMPLETIONS, CHAT):
        answer = _post(server, path, body, name)
        assert answer.status_code == 200, (kind, answer.text)
        return _ANY.sub(r"\1*", answer.text).split(",")
    del body["cache_salt"]
    answer = _post(server, path, {**body, "stream": True}, name)
    assert answer.status_code == 200, (kind, answer.text)
    return _events(kind, answer.text)


def _post(server: Server, path: str, body: dict[str, Any], name: str) -> httpx.Response:
    headers = {"X-Request-Id": name}
    return httpx.post(server.url + path, json=body, headers=headers, timeout=200)


def _events(kind: str, text: str) -> list[Any]:
    """Of a stream of events: their kinds without repetitions, what they say, and the last one."""
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    kinds = [name for name, _ in itertools.groupby(e["type"] for e in events)]
    assert not any("error" in name or "failed" in name for name in kinds), (kind, text[-500:])
    said = "".join(
        e["delta"] if isinstance(e["delta"], str) else e["delta"].get("text", "")
        for e in events
        if "delta" in e
    )
    usage = [e.get("usage") or e.get("response", {}).get("usage") for e in events]
    return [kinds, said, [u for u in usage if u][-1]]


@pytest.fixture(scope="module")
def mortal(tiny_model: Path, logs: Path) -> Iterator[Server]:
    server = Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS,
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--max-num-seqs", "24",
        "--policy", "least-loaded",
        log=logs / "mortal.log",
        VLLM_SERVER_DEV_MODE="1",
    )  # fmt: skip
    yield server.wait_until_serving()
    server.stop()
    print(server.log[-6000:])


def both_serve(server: Server) -> None:
    eventually(
        lambda: [i["state"] for i in server.instances().values()] == ["serving"] * 2, 120, "both"
    )


def hurt(server: Server, dead: str, when: Callable[[list[dict[str, Any]]], bool]) -> set[str]:
    """Sends one request of each kind in `CALM`, and kills an instance once `when` is true of the
    rows of all of them. Returns the kinds that had something there. Each answer must be the calm
    one's. If none is killed because all ended between two looks, it begins again."""
    for _ in range(5):
        if (hit := _hurt(server, dead, when)) is not None:
            return hit
    raise AssertionError("the moment was never seen")


def _hurt(
    server: Server, dead: str, when: Callable[[list[dict[str, Any]]], bool]
) -> set[str] | None:
    turn = next(_numbers)
    names = {f"{kind}-{turn}": kind for kind in CALM}
    left = set(names)

    def one(name: str, kind: str) -> Any:
        try:
            return ask(server, kind, name)
        finally:
            left.discard(name)

    def kill() -> set[str] | None:
        pid = server.instances()[dead]["pid"]
        found: list[dict[str, Any]] = []

        def ready() -> bool:
            found[:] = [r for r in server.requests() if r["id"] in names]
            return bool(found) and when(found)

        if eventually(lambda: (ready() and "now") or (not left and "late"), 60) == "late":
            return None
        os.kill(pid, signal.SIGKILL)
        return {names[r["id"]] for r in found if r["instance"] == dead}

    works = [lambda name=name, kind=kind: one(name, kind) for name, kind in names.items()]
    *answers, hit = all_at_once([*works, kill])
    for kind, answer in zip(names.values(), answers, strict=True):
        assert answer == CALM[kind], f"{kind} after {dead} was killed"
    both_serve(server)
    eventually(lambda: server.requests() == [], 10, "no stream is left")
    return hit


CALM: dict[str, Any] = {}


def test_every_kind_of_answer_outlives_its_instance(mortal: Server) -> None:
    for kind in KINDS.keys() - NEEDS_LORA:
        CALM[kind] = ask(mortal, kind)
    again = {kind: ask(mortal, kind) for kind in ("greedy", "responses", "messages", "whole")}
    assert again == {kind: CALM[kind] for kind in again}, "the comparison itself is at fault"
    moments: list[Callable[[list[dict[str, Any]]], bool]] = [
        lambda found: len(found) >= len(CALM) - 4,
        lambda found: any(r["output_tokens"] == 1 for r in found),
        lambda found: max(r["output_tokens"] for r in found) > 60,
        lambda found: max(r["output_tokens"] for r in found) > 120,
    ]
    hit = {"one token"}  # It is mostly over too soon.
    for turn in range(16):  # Where a kind runs, and for how long, is chance.
        if turn < len(moments) or not CALM.keys() <= hit:
            hit |= hurt(mortal, f"i{turn % 2}", moments[turn % len(moments)])
    assert CALM.keys() <= hit


def test_an_adapter(tiny_model: Path, logs: Path, lora: Path) -> None:
    server = Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS, "--policy", "least-loaded",
        "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"adapter={lora}",
        log=logs / "lora.log",
    ).wait_until_serving()  # fmt: skip
    try:
        calm, base = ask(server, "adapter"), ask(server, "seeded")
        assert calm != base

        def kill() -> None:
            eventually(lambda: any(r["output_tokens"] > 40 for r in rows(server, "mine")), 30)
            (row,) = rows(server, "mine")
            os.kill(server.instances()[row["instance"]]["pid"], signal.SIGKILL)

        answer, _ = all_at_once([lambda: ask(server, "adapter", "mine"), kill])
        assert answer == calm
    finally:
        server.stop()
        print(server.log[-3000:])


def test_one_stream_outlives_three_instances_without_another_to_go_to(
    tiny_model: Path, logs: Path
) -> None:
    server = Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS, "--instances", "1",
        log=logs / "lonely.log",
    ).wait_until_serving()  # fmt: skip
    try:
        body = {**SEEDED, "max_tokens": 1500, "logprobs": 1}
        calm = stream(server, COMPLETIONS, body).folded()

        def kill() -> int:
            kills = 0
            for at in (100, 400, 800):
                eventually(
                    lambda at=at: any(r["output_tokens"] > at for r in rows(server, "tough")), 150
                )
                os.kill(server.instances()["i0"]["pid"], signal.SIGKILL)
                kills += 1
            return kills

        seen, kills = all_at_once([lambda: stream(server, COMPLETIONS, body, name="tough"), kill])
        assert kills == 3
        assert seen.error is None
        assert seen.folded() == calm
    finally:
        server.stop()
        print(server.log[-3000:])


def test_a_stream_whose_instance_dies_in_a_pause_goes_on_after_it(mortal: Server) -> None:
    both_serve(mortal)
    calm = ask(mortal, "greedy")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, mortal, "greedy", "paused")
        eventually(lambda: [r for r in rows(mortal, "paused") if r["output_tokens"] > 20], 20)
        assert mortal.http.post("/pause", params={"mode": "keep"}).status_code == 200
        try:
            (row,) = rows(mortal, "paused")
            os.kill(mortal.instances()[row["instance"]]["pid"], signal.SIGKILL)
            eventually(lambda: [r["instance"] for r in rows(mortal, "paused")] == [None], 20)
            time.sleep(40)  # Longer than it takes for an engine to have declined too often.
            assert not answer.done()
        finally:
            assert mortal.http.post("/resume").status_code == 200
        assert answer.result(60) == calm
    both_serve(mortal)


def test_a_stream_outlives_its_instance_and_the_controller_together(mortal: Server) -> None:
    body = {**SEEDED, "max_tokens": 600}
    calm = stream(mortal, COMPLETIONS, body).folded()
    controllers = mortal.controllers()

    def kill() -> None:
        eventually(lambda: any(r["output_tokens"] > 50 for r in rows(mortal, "both")), 30)
        (row,) = rows(mortal, "both")
        for pid in (*controllers, mortal.instances()[row["instance"]]["pid"]):
            os.kill(pid, signal.SIGKILL)

    began_s = time.monotonic()
    seen, _ = all_at_once([lambda: stream(mortal, COMPLETIONS, body, name="both"), kill])
    assert seen.error is None
    assert seen.folded() == calm
    print(f"{time.monotonic() - began_s:.1f} s")
    both_serve(mortal)
