"""Compares the answers of llumnix over two instances with bare vLLM's, case by case.

Same model, same flags; both answer greedily and with at most `TOKENS` tokens unless a call says
otherwise, so that texts can be compared and no case runs into its time limit. Runs llm-comply's
chat, responses and messages cases, a set of calls with the openai and anthropic SDKs, and `vllm
bench serve` with its random dataset against both, and writes the table of docs/compatibility.md.
What bare vLLM itself fails is listed below the table with the reason that llm-comply gives.

    python benchmarks/compatibility.py [--model FOLDER] [--out docs/compatibility.md]
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai

from common import ROOT, Served, commit, markdown, serve, versions

NAME = "demo"
Row = tuple[str, str, str, str, str]
TOKENS = 96
"""The default of both servers for the length of an answer. vLLM's is what is left of the context,
which takes the demo model minutes on a CPU."""
FLAGS = [
    "--enforce-eager",
    *("--dtype", "float32", "--kv-cache-memory-bytes", "536870912"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *(
        "--override-generation-config",
        json.dumps({"max_new_tokens": TOKENS, "temperature": 0.0, "top_p": 1.0, "top_k": -1}),
    ),
]
ASK = [{"role": "user", "content": "Name three colours of the rainbow."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["colour", "count"],
    "additionalProperties": False,
}
SUITES = {"chat": "openai-chat", "responses": "open-responses", "messages": "anthropic"}


def chat(client: openai.OpenAI, **more: Any) -> Any:
    settings = {"model": NAME, "messages": ASK, "max_tokens": 48, "temperature": 0} | more
    return client.chat.completions.create(**settings)


def complete(client: openai.OpenAI, **more: Any) -> Any:
    settings = {"model": NAME, "prompt": "One, two, three,", "max_tokens": 24, "temperature": 0}
    return client.completions.create(**settings | more)


def respond(client: openai.OpenAI, **more: Any) -> Any:
    settings = {"model": NAME, "input": "Say hello.", "max_output_tokens": 24, "temperature": 0}
    return client.responses.create(**settings | more)


def message(client: anthropic.Anthropic, **more: Any) -> Any:
    settings = {"model": NAME, "messages": ASK, "max_tokens": 48}
    return client.messages.create(**settings | more)


def post(client: openai.OpenAI, path: str, **body: Any) -> Any:
    """A route that the SDK does not know."""
    root = str(client.base_url).removesuffix("/v1/")
    return httpx.post(root + path, json={"model": NAME} | body, timeout=120).json()


def as_schema(schema: dict[str, Any]) -> dict[str, Any]:
    inner = {"name": "colour", "schema": schema, "strict": True}
    return {"type": "json_schema", "json_schema": inner}


SDK: dict[str, Callable[[openai.OpenAI], Any]] = {
    "models": lambda c: [m.id for m in c.models.list()],
    "chat": lambda c: _plain(chat(c)),
    "chat, streaming with usage": lambda c: _plain(
        chat(c, stream=True, stream_options={"include_usage": True})
    ),
    "chat, a named tool": lambda c: _plain(
        chat(
            c,
            tools=[WEATHER],
            tool_choice={"type": "function", "function": {"name": "weather"}},
            max_tokens=80,
        )
    ),
    "chat, a tool is required": lambda c: _plain(
        chat(c, tools=[WEATHER], tool_choice="required", max_tokens=80)
    ),
    "chat, tools, automatic": lambda c: _plain(chat(c, tools=[WEATHER])),
    "chat, JSON schema": lambda c: _plain(chat(c, response_format=as_schema(SCHEMA))),
    "chat, JSON schema, streaming": lambda c: _plain(
        chat(c, response_format=as_schema(SCHEMA), stream=True)
    ),
    "chat, one of three words": lambda c: _plain(
        chat(c, extra_body={"structured_outputs": {"choice": ["red", "green", "blue"]}})
    ),
    "chat, regular expression": lambda c: _plain(
        chat(c, extra_body={"structured_outputs": {"regex": "[a-z]{3,9}, [a-z]{3,9}"}})
    ),
    "chat, logprobs": lambda c: _plain(chat(c, logprobs=True, top_logprobs=3, max_tokens=12)),
    "chat, seeded": lambda c: _plain(chat(c, seed=7, temperature=0.8)),
    "chat, n=2, seeded": lambda c: _plain(chat(c, n=2, seed=7, temperature=0.8)),
    "chat, penalties and bias": lambda c: _plain(
        chat(c, frequency_penalty=0.6, presence_penalty=0.4, logit_bias={"100": 4})
    ),
    "completion, echo and stop": lambda c: _plain(complete(c, echo=True, stop=["ten"])),
    "completion, streaming": lambda c: _plain(complete(c, stream=True)),
    "completion, two prompts": lambda c: _plain(complete(c, prompt=["One, two,", "A, B, C,"])),
    "completion, token ids": lambda c: _plain(complete(c, prompt=[504, 260, 253])),
    "completion, logprobs of the prompt": lambda c: _plain(
        complete(c, max_tokens=4, logprobs=2, extra_body={"prompt_logprobs": 2})
    ),
    "completion, minimal length": lambda c: _plain(
        complete(c, extra_body={"min_tokens": 20, "ignore_eos": True})
    ),
    "responses": lambda c: _plain(respond(c)),
    "responses, streaming": lambda c: _plain(respond(c, stream=True)),
    "responses, instructions": lambda c: _plain(respond(c, instructions="Answer in French.")),
    "tokenize": lambda c: post(c, "/tokenize", prompt="One, two, three,"),
    "detokenize": lambda c: post(c, "/detokenize", tokens=[504, 260, 253]),
    "unknown model": lambda c: _error(lambda: chat(c, model="nothing")),
    "too long a prompt": lambda c: _error(lambda: complete(c, prompt="word " * 9000, max_tokens=4)),
    "temperature below zero": lambda c: _error(lambda: chat(c, temperature=-1)),
    "a schema that is none": lambda c: _error(
        lambda: chat(c, response_format=as_schema({"type": "nothing"}))
    ),
    "embeddings of a model that has none": lambda c: _error(
        lambda: c.embeddings.create(model=NAME, input="hello")
    ),
}
MESSAGES: dict[str, Callable[[anthropic.Anthropic], Any]] = {
    "message": lambda c: _plain(message(c)),
    "message, streaming": lambda c: _plain(message(c, stream=True)),
    "message, system prompt": lambda c: _plain(message(c, system="You answer in one word.")),
    "message, stop sequence": lambda c: _plain(message(c, stop_sequences=["red", "Red"])),
    "message, count of tokens": lambda c: _plain(c.messages.count_tokens(model=NAME, messages=ASK)),
    "message, unknown model": lambda c: _error(lambda: message(c, model="nothing")),
}


def _plain(answer: Any) -> Any:
    """The answer without what differs from call to call: ids and times. A stream's as a list."""
    if not hasattr(answer, "model_dump"):
        return [_plain(piece) for piece in answer]
    text = json.dumps(answer.model_dump(warnings=False), sort_keys=True)
    text = re.sub(r'"(id|item_id|call_id|request_id)": "[^"]*"', r'"\1": "…"', text)
    text = re.sub(r'"(created|created_at|completed_at)": [\d.]+', r'"\1": 0', text)
    return re.sub(r'"system_fingerprint": "[^"]*"', '"system_fingerprint": "…"', text)


def _error(call: Callable[[], Any]) -> Any:
    try:
        call()
    except (openai.APIStatusError, anthropic.APIStatusError) as error:
        return [error.status_code, error.message]
    return "no error"


def sdk(server: Served) -> dict[str, Any]:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    return {name: call(client) for name, call in SDK.items()}


def messages(server: Served) -> dict[str, Any]:
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    return {name: call(client) for name, call in MESSAGES.items()}


def comply(server: Served, suite: str) -> dict[str, dict[str, Any]]:
    """llm-comply's verdict on each case, by the case's name: "status", and perhaps "errors"."""
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "llm-comply"),
            *("--base-url", server.url + "/v1", "--api-key", "none", "--model", NAME),
            *("--format", SUITES[suite], "--timeout", "120", "--json"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    try:
        report = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        raise RuntimeError(f"llm-comply said: {done.stdout[-500:]} {done.stderr[-500:]}") from error
    return {case["id"]: case for case in report["results"]}


def bench(server: Served, model: str) -> dict[str, str]:
    """What `vllm bench serve` counts."""
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks/vllm_cli.py"), "bench", "serve"),
            *("--model", model, "--served-model-name", NAME, "--port", str(server.port)),
            *("--host", "127.0.0.1", "--dataset-name", "random", "--random-input-len", "64"),
            *("--random-output-len", "32", "--num-prompts", "24", "--max-concurrency", "8"),
            "--ignore-eos",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    wanted = ("Successful requests", "Failed requests", "Total input tokens", "Total generated")
    lines = [line for line in done.stdout.splitlines() if line.startswith(wanted)]
    if not lines:
        raise RuntimeError(f"vllm bench serve said: {done.stdout[-800:]} {done.stderr[-800:]}")
    return {line.split(":")[0]: line.split(":")[1].strip() for line in lines}


def rows(bare: Served, ours: Served, model: str) -> tuple[list[Row], list[Row]]:
    """What bare vLLM passes, and what it fails or skips: (client, case, bare vLLM, llumnix, same?),
    of the second kind with the reason in the last place."""
    compared: list[Row] = []
    left_out: list[Row] = []
    for client, ask in (("openai SDK", sdk), ("anthropic SDK", messages)):
        answers, mine = ask(bare), ask(ours)
        for case, answer in answers.items():
            same = _same(answer, mine[case])
            compared.append((client, case, _brief(answer), _brief(mine[case]), same))
    for suite in SUITES:
        theirs, mine = comply(bare, suite), comply(ours, suite)
        for case in sorted(theirs | mine):
            ours_said = mine.get(case, {"status": "absent"})["status"]
            said = theirs.get(case, {"status": "absent"})
            row = (f"llm-comply, {suite}", case, said["status"], ours_said)
            if said["status"] == "passed":
                compared.append((*row, _same(said["status"], ours_said)))
            else:
                left_out.append((*row, "; ".join(said.get("errors", []))[:100]))
    counted, mine = bench(bare, model), bench(ours, model)
    for case, count in counted.items():
        compared.append(("vllm bench serve", case, count, mine[case], _same(count, mine[case])))
    return compared, left_out


def _same(a: Any, b: Any) -> str:
    return "yes" if a == b else "**no**"


def _brief(value: Any) -> str:
    text = json.dumps(value)
    found = re.search(r'\\"(?:content|text)\\": \\"(.{1,40})', text)
    if isinstance(value, list) and value and isinstance(value[0], int):
        return f"status {value[0]}"
    return "answered" if found is None else found[1].split("\\")[0].strip() or "answered"


def page(compared: list[Row], left_out: list[Row]) -> str:
    known = ", ".join(f"{n} {v}" for n, v in versions().items())
    different = sum(row[-1] != "yes" for row in compared)
    lines = [
        "# The same answers as bare vLLM",
        "",
        "For whoever moves from vLLM. `python benchmarks/compatibility.py` puts the same cases to "
        "bare `vllm serve` and to `llumnix serve --instances 2` with the same model and flags, and "
        "writes this page. Answers are compared whole, but for ids, times and the fingerprint.",
        "",
        f"Made at commit {commit()} on {time.strftime('%Y-%m-%d')} with {known}: {len(compared)} "
        f"cases, {different} different.",
        "",
        markdown(
            ["client", "cases", "the same", "different"],
            [
                [client, str(len(mine)), str(mine.count("yes")), str(mine.count("**no**"))]
                for client in dict.fromkeys(row[0] for row in compared)
                for mine in [[row[-1] for row in compared if row[0] == client]]
            ],
        ),
        "",
        f"Both servers compute in float32, greedily unless a case says otherwise, and at most "
        f"{TOKENS} tokens. `n` = 2 runs as one batch on bare vLLM and on two engines here.",
        "",
        "## Case by case",
        "",
        markdown(
            ["client", "case", "bare vLLM", "llumnix", "same"],
            [[_cell(value) for value in row] for row in compared],
        ),
        "",
        "## What bare vLLM does not pass",
        "",
        "These cases of llm-comply say nothing about llumnix, so they are not counted above.",
        "",
        markdown(
            ["client", "case", "bare vLLM", "llumnix", "why, on bare vLLM"],
            [[_cell(value) for value in row] for row in left_out],
        ),
        "",
    ]
    return "\n".join(lines)


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


async def up(servers: list[Served]) -> None:
    await asyncio.gather(*(s.wait_until_up() for s in servers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder (default: the demo model)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/compatibility.md")
    args = parser.parse_args()
    if args.model is None:
        from llumnix.demo import prepare_demo_model

        args.model = str(prepare_demo_model(print))
    servers: list[Served] = []
    with tempfile.TemporaryDirectory() as logs:
        try:
            for kind in ("bare", "llumnix"):
                servers.append(serve(kind, args.model, NAME, FLAGS, Path(logs) / f"{kind}.log"))
            asyncio.run(up(servers))
            compared, left_out = rows(*servers, args.model)
        finally:
            for server in servers:
                server.stop()
    args.out.write_text(page(compared, left_out))
    print(page(compared, left_out))


if __name__ == "__main__":
    main()
