"""Compares the answers of llumnix over two instances with bare vLLM's, case by case.

Same model, same flags. Runs llm-comply's chat, responses and messages cases, a set of calls with
the openai SDK (greedy, so that the texts can be compared), and `vllm bench serve` with its random
dataset against both, and writes the table of docs/compatibility.md.

    python benchmarks/compatibility.py [--model FOLDER] [--out docs/compatibility.md]
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

from common import ROOT, Served, commit, serve, versions

NAME = "demo"
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


def _stream(client: openai.OpenAI) -> Any:
    pieces = chat(client, stream=True, stream_options={"include_usage": True})
    return [_plain(p) for p in pieces]


SDK: dict[str, Callable[[openai.OpenAI], Any]] = {
    "models": lambda c: [m.id for m in c.models.list()],
    "chat": lambda c: _plain(chat(c)),
    "chat, streaming with usage": _stream,
    "chat, a named tool": lambda c: _plain(
        chat(
            c,
            tools=[WEATHER],
            tool_choice={"type": "function", "function": {"name": "weather"}},
            max_tokens=80,
        )
    ),
    "chat, tools, automatic": lambda c: _plain(chat(c, tools=[WEATHER])),
    "chat, JSON schema": lambda c: _plain(
        chat(
            c,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "colour", "schema": SCHEMA, "strict": True},
            },
        )
    ),
    "chat, logprobs": lambda c: _plain(chat(c, logprobs=True, top_logprobs=3, max_tokens=12)),
    "chat, n=2, seeded": lambda c: _plain(chat(c, n=2, seed=7, temperature=0.8)),
    "completion, echo and stop": lambda c: _plain(
        c.completions.create(
            model=NAME,
            prompt="One, two, three,",
            max_tokens=24,
            temperature=0,
            echo=True,
            stop=["ten"],
        )
    ),
    "responses": lambda c: _plain(
        c.responses.create(model=NAME, input="Say hello.", max_output_tokens=24, temperature=0)
    ),
    "unknown model": lambda c: _error(lambda: chat(c, model="nothing")),
    "too long a prompt": lambda c: _error(
        lambda: c.completions.create(model=NAME, prompt="word " * 9000, max_tokens=4)
    ),
}


def _plain(answer: Any) -> Any:
    """The answer without what differs from call to call: ids and times."""
    text = json.dumps(answer.model_dump(), sort_keys=True)
    text = re.sub(r'"(id|item_id|call_id)": "[^"]*"', r'"\1": "…"', text)
    text = re.sub(r'"(created|created_at|completed_at)": [\d.]+', r'"\1": 0', text)
    return re.sub(r'"system_fingerprint": "[^"]*"', '"system_fingerprint": "…"', text)


def _error(call: Callable[[], Any]) -> Any:
    try:
        call()
    except openai.APIStatusError as error:
        return [error.status_code, error.message]
    return "no error"


def sdk(server: Served) -> dict[str, Any]:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    return {name: call(client) for name, call in SDK.items()}


def comply(server: Served, suite: str) -> dict[str, str]:
    """llm-comply's verdict on each case."""
    base = server.url if suite == "messages" else server.url + "/v1"
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "llm-comply"),
            *("--base-url", base, "--api-key", "none", "--model", NAME),
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
    return {case["id"]: case["status"] for case in report["results"]}


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


def rows(bare: Served, ours: Served, model: str) -> list[tuple[str, str, str, str, str]]:
    """(client, case, bare vLLM, llumnix, same?)."""
    table = []
    for suite in SUITES:
        theirs, mine = comply(bare, suite), comply(ours, suite)
        for case in sorted(theirs | mine):
            pair = (theirs.get(case, "-"), mine.get(case, "-"))
            table.append((f"llm-comply, {suite}", case, *pair, _same(*pair)))
    theirs, mine = sdk(bare), sdk(ours)
    for case in SDK:
        same = _same(theirs[case], mine[case])
        table.append(("openai SDK", case, _brief(theirs[case]), _brief(mine[case]), same))
    theirs, mine = bench(bare, model), bench(ours, model)
    for case in theirs:
        pair = (theirs[case], mine.get(case, "-"))
        table.append(("vllm bench serve", case, *pair, _same(*pair)))
    return table


def _same(a: Any, b: Any) -> str:
    return "yes" if a == b else "**no**"


def _brief(value: Any) -> str:
    text = json.dumps(value)
    found = re.search(r'\\"content\\": \\"(.{1,40})', text)
    if isinstance(value, list) and value and isinstance(value[0], int):
        return f"status {value[0]}"
    return "answered" if found is None else found[1].split("\\")[0].strip() or "answered"


def page(table: list[tuple[str, str, str, str, str]]) -> str:
    known = ", ".join(f"{n} {v}" for n, v in versions().items())
    lines = [
        "# The same answers as bare vLLM",
        "",
        "`python benchmarks/compatibility.py` starts bare `vllm serve` and `llumnix serve "
        "--instances 2` with the same model and flags, puts the same cases to both and writes this "
        "page. Answers are compared whole, but for ids, times and the fingerprint; what fails on "
        "both fails for the small demo model's or vLLM's reasons.",
        "",
        "Two kinds of rows may differ without a fault: llm-comply's cases sample at the model's "
        "default temperature with no limit of length, so one can pass on one run and exceed its "
        "time on the next; and `n` = 2 runs as one batch on bare vLLM and on two engines here, and "
        "bfloat16 results depend on the batch.",
        "",
        f"Made at commit {commit()} with {known}.",
        "",
        "| client | case | bare vLLM | llumnix | same |",
        "|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in table]
    different = sum(row[-1] != "yes" for row in table)
    lines += ["", f"{len(table)} cases, {different} different.", ""]
    return "\n".join(lines)


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
    flags = ["--enforce-eager", "--kv-cache-memory-bytes", "536870912"]
    flags += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    servers: list[Served] = []
    with tempfile.TemporaryDirectory() as logs:
        try:
            for kind in ("bare", "llumnix"):
                servers.append(serve(kind, args.model, NAME, flags, Path(logs) / f"{kind}.log"))
            asyncio.run(up(servers))
            table = rows(*servers, args.model)
        finally:
            for server in servers:
                server.stop()
    args.out.write_text(page(table))
    print(page(table))


if __name__ == "__main__":
    main()
