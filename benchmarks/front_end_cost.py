"""What a token and a request cost the process that speaks HTTP, and how many it carries.

vLLM's application over our engine client, with uvloop and httptools as `llumnix serve` has them, in
a process on a core of its own. Engine and controller are stubs (stub_engine.py) beside the clients
on another core, so that the tokens are there when they are due. Each variant is such a process;
they run side by side and are measured in turns. `before` has all speed-ups of this path switched
off, `direct` all but the joining of tokens, `after` none.

Clients and servers have real-time priority where they may.

- `cost`: CPU time of the process, the least of all rounds, since what else runs on the machine only
  adds to it. Requests of two lengths tell what a token costs from what a request costs.
- `capacity`: Poisson arrivals of requests of 128 tokens, more a second from round to round, until
  1 % of the tokens come more than 200 ms after the engine sent them, or 1 % of the requests wait 50
  ms longer for their first token than without a front end, twice in a row.

    python benchmarks/front_end_cost.py [--out FILE] [--seconds 4] [--part cost|capacity]
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from common import free_port, markdown, percentile, write_result
from shapes import write_shape

MODEL = "mini"
SHORT, LONG = 8, 136
"""Tokens a request."""
STREAMS = 64
STEP_S = 0.008
LATE_P99_MS = 200.0
FIRST_P99_MS = 50.0
CAPACITY_TOKENS = 128
CAPACITY_STEP_S = 0.02
RATES = [40 * 1.2**n for n in range(16)]
VARIANTS = {
    "before": ("direct", "variables", "joining"),
    "direct": ("joining",),
    "after": (),
}
"""By name: the speed-ups that are switched off."""
PARTS = {"cost": ("before", "direct"), "capacity": ("before", "direct", "after")}
"""Which are measured. Where a chunk has one token, joining has nothing to do."""
PROMPT = "Tell me in some words what a front end does with its time all day long. " * 4
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
KINDS = {
    "chat, streamed": ("/v1/chat/completions", True),
    "completion, streamed": ("/v1/completions", True),
    "chat, whole": ("/v1/chat/completions", False),
}


# -- the process that is measured


def serve(folder: Path, port: int, core: int, off: list[str]) -> None:
    """Serves at the port until it is told to stop. `off`: speed-ups that are switched off."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    from llumnix.frontend.arguments import parse, settle_variables

    settle_variables()
    words = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m"]
    words += ["--enforce-eager", "--max-model-len", "2048", "--disable-uvicorn-access-log"]
    words += ["--chat-template", TEMPLATE, "--no-ui"]
    if "joining" in off:
        words += ["--max-stream-interval", "1"]
    command = parse(["serve", str(folder / "model"), *words], lambda text: None)
    import uvloop

    uvloop.run(_serve(command, folder, off))


async def _serve(command: Any, folder: Path, off: list[str]) -> None:
    from llumnix.core.priorities import Priorities
    from llumnix.core.settings import PrioritySettings
    from llumnix.frontend.client import FleetClient
    from llumnix.frontend.controller_link import ControllerLink
    from llumnix.frontend.door.listener import ListenAddress, Listener, StartProgress
    from llumnix.frontend.engines.sockets import ClientPlace
    from llumnix.frontend.http import direct_chunks, server
    from llumnix.frontend.llm import FleetLLM
    from llumnix.observe.event_log import EventLog
    from stub_engine import ENGINE, INSTANCE, addresses

    if "direct" in off:
        direct_chunks.adapt = lambda app: None
    if "variables" in off:
        server.enable_envs_cache = lambda: None
    where = addresses(folder)
    client = FleetClient(
        command.vllm_config,
        ClientPlace(input_address=where["input"], output_address=where["output"]),
        ControllerLink(where["controller"]),
        1,
        EventLog(None, who="front end"),
        Priorities(PrioritySettings()),
        survival=command.deployment.scheduler.survival,
    )
    client.start()
    client.engines.expect(INSTANCE, ENGINE, 0)
    await client.engines.ready(ENGINE)
    await client.bring_up(ENGINE)
    llm = FleetLLM(
        command.vllm_config,
        client,
        log_stats=True,
        log_requests=False,
        aggregate_engine_logging=False,
        on_stopping=server.stop_begins,
    )
    listener = Listener(ListenAddress.of(command.args), StartProgress(began_s=time.monotonic()))
    listener.open()

    async def announce() -> None:
        all_real_time()
        print("serving", flush=True)

    control: Any = SimpleNamespace(fleet=None, metrics=None)  # Nobody asks it anything.
    await server.serve(llm, control, listener, command.args, announce)


def all_real_time() -> str:
    """Lets all threads of this process go before what else runs here, where they may; returns the
    priority that they have."""
    try:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), os.SCHED_RR, os.sched_param(1))
    except OSError:
        return "ordinary"
    return "real-time"


# -- the clients


class Connection(asyncio.Protocol):
    """One connection of a client, which sends one request after the other."""

    def __init__(self) -> None:
        self.times_s: list[float] = []  # when each token came
        self.chunks = 0
        self._transport: Any = None
        self._done: asyncio.Future[None] | None = None
        self._head: bytes | None = b""
        self._tail = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    async def ask(self, request: bytes) -> None:
        self.times_s, self.chunks = [], 0
        self._head, self._tail = b"", b""
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._done

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        if self._head is not None:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(self._head.decode())
            length = head.partition(b"content-length: ")[2].partition(b"\r")[0]
            # What is still to come; below 0: parts until an empty one.
            self._left, self._head = int(length) if length else -1, None
        # Each token is a word with one "w", and nothing else has that letter.
        self.times_s += [now_s] * data.count(b"w")
        self.chunks += data.count(b"data: {")
        self._left -= len(data)
        self._tail = (self._tail + data)[-5:]
        if self._left == 0 or (self._left < 0 and self._tail == b"0\r\n\r\n"):
            assert self._done is not None
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(RuntimeError(f"the connection ended ({error})"))

    @property
    def closed(self) -> bool:
        """Whether the server has closed it; it does so when it is idle for some seconds."""
        return bool(self._transport.is_closing())

    def close(self) -> None:
        self._transport.close()


def message(number: int, path: str, tokens: int, *, stream: bool) -> bytes:
    """A request in bytes."""
    body: dict[str, Any] = {
        "model": "m",
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": stream,
    }
    if path.endswith("chat/completions"):
        body["messages"] = [{"role": "user", "content": PROMPT}]
    else:
        body["prompt"] = PROMPT
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    head += f"x-request-id: r{number}\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


class Server:
    """One front end under measurement, its stub engine and its clients."""

    def __init__(self, name: str, folder: Path, cores: tuple[int, int]) -> None:
        self.name, self._folder, self._cores = name, folder, cores
        self._numbers: Iterator[int] = iter(range(10**9))
        self._idle: list[Connection] = []

    async def start(self) -> None:
        from stub_engine import StubEngine

        self._port = free_port()
        off = ",".join(VARIANTS[self.name])
        command = [sys.executable, __file__, "--serve", str(self._folder), "--off", off]
        command += ["--port", str(self._port), "--core", str(self._cores[0])]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        self.engine = StubEngine(self._folder, STEP_S)
        log = (self._folder / "log").open("wb")
        self._process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=log, start_new_session=True
        )
        assert self._process.stdout is not None
        said = b"\n"
        while said and said != b"serving\n":
            said = await asyncio.to_thread(self._process.stdout.readline)
        if not said:
            raise RuntimeError((self._folder / "log").read_text()[-3000:])
        self._times = psutil.Process(self._process.pid).cpu_times

    def stop(self) -> None:
        for connection in self._idle:
            connection.close()
        self.engine.close()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def cpu_s(self) -> float:
        """CPU time that the process has taken."""
        times = self._times()
        return float(times.user + times.system)

    async def ask(self, kind: str, tokens: int) -> tuple[int, list[float], float, int]:
        """One request: the number of its chunks, how late each token came, how much later than
        without a front end the first one came (both in seconds), and how many tokens came."""
        path, stream = KINDS[kind]
        number = next(self._numbers)
        connection = self._idle.pop() if self._idle else None
        if connection is None or connection.closed:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(Connection, "127.0.0.1", self._port)
        data = message(number, path, tokens, stream=stream)
        began_s = time.perf_counter()
        await connection.ask(data)
        self._idle.append(connection)
        seen = self.engine.seen.pop(number)
        late = [came - sent for came, sent in zip(connection.times_s, seen.sent_s, strict=True)]
        return connection.chunks, late, seen.arrived_s - began_s + late[0], len(late)


async def closed(server: Server, kind: str, tokens: int, seconds: float) -> dict[str, float]:
    """`STREAMS` requests at a time; what each cost."""
    stop_s = time.perf_counter() + seconds
    requests = chunks = count = 0

    async def one() -> None:
        nonlocal requests, chunks, count
        while time.perf_counter() < stop_s:
            more, _, _, came = await server.ask(kind, tokens)
            requests, chunks, count = requests + 1, chunks + more, count + came

    server.engine.step_s = STEP_S
    before_s, began_s = server.cpu_s(), time.perf_counter()
    await asyncio.gather(*(one() for _ in range(STREAMS)))
    spent_s = server.cpu_s() - before_s
    share = spent_s / (time.perf_counter() - began_s)
    return {
        "requests": requests,
        "tokens": count,
        "request_us": spent_s / requests * 1e6,
        "tokens_a_chunk": count / chunks if chunks else 0.0,
        "cpu_share": share,
    }


async def cost(servers: list[Server], seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Of each kind of request and server: what a token and a request cost, in µs of CPU."""
    rows = []
    for kind in KINDS:
        figures: dict[tuple[str, int], list[dict[str, float]]] = {}
        for n in range(rounds + 1):
            for server in servers if n % 2 else servers[::-1]:
                for tokens in (SHORT, LONG):
                    one = await closed(server, kind, tokens, seconds if n else 1.0)
                    if n:  # The first round is the warm-up.
                        figures.setdefault((server.name, tokens), []).append(one)
        for server in servers:
            short, long = (
                min(one["request_us"] for one in figures[server.name, tokens])
                for tokens in (SHORT, LONG)
            )
            token_us = (long - short) / (LONG - SHORT)
            row = {
                "part": "cost",
                "kind": kind,
                "server": server.name,
                "token_us": round(token_us, 2),
                "request_us": round(short - SHORT * token_us, 1),
                "rounds": figures[server.name, LONG],
                "rounds_short": figures[server.name, SHORT],
            }
            print(kind, server.name, row["token_us"], row["request_us"], flush=True)
            rows.append(row)
    return rows


async def poisson(server: Server, rate: float, seconds: float) -> dict[str, float]:
    """So many requests a second arrive; how late tokens came."""
    server.engine.step_s = CAPACITY_STEP_S
    dice = random.Random(f"{rate}")
    late: list[float] = []
    first: list[float] = []

    async def one() -> None:
        _, mine, added, _ = await server.ask("chat, streamed", CAPACITY_TOKENS)
        late.extend(mine)
        first.append(added)

    tasks = []
    before_s, began_s = server.cpu_s(), time.perf_counter()
    next_s = began_s
    while next_s < began_s + seconds:
        await asyncio.sleep(next_s - time.perf_counter())
        tasks.append(asyncio.create_task(one()))
        next_s += dice.expovariate(rate)
    share = (server.cpu_s() - before_s) / (time.perf_counter() - began_s)
    await asyncio.gather(*tasks)
    return {
        "rate": rate,
        "requests": len(first),
        "cpu_share": share,
        "late_p50_ms": percentile(late, 0.5) * 1e3,
        "late_p99_ms": percentile(late, 0.99) * 1e3,
        "added_ttft_p50_ms": percentile(first, 0.5) * 1e3,
        "added_ttft_p99_ms": percentile(first, 0.99) * 1e3,
    }


async def capacity(servers: list[Server], seconds: float) -> list[dict[str, Any]]:
    """For each server, rate by rate, until it is out of bounds twice in a row."""
    rows: list[dict[str, Any]] = []
    failed = dict.fromkeys((s.name for s in servers), 0)
    for rate in RATES:
        for server in servers:
            if failed[server.name] == 2:
                continue
            row = await poisson(server, rate, seconds)
            bad = row["late_p99_ms"] > LATE_P99_MS or row["added_ttft_p99_ms"] > FIRST_P99_MS
            failed[server.name] = failed[server.name] + 1 if bad else 0
            rows.append({"part": "capacity", "server": server.name, "in_bounds": not bad, **row})
            print(server.name, {k: round(v, 2) for k, v in row.items()}, flush=True)
    return rows


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    wanted = [args.part] if args.part else list(PARTS)
    with tempfile.TemporaryDirectory() as temporary:
        model = write_shape(MODEL, Path(temporary) / "model")
        servers = []
        try:
            for name in VARIANTS:
                if not any(name in PARTS[part] for part in wanted):
                    continue
                folder = Path(temporary) / name
                folder.mkdir()
                (folder / "model").symlink_to(model)
                server = Server(name, folder, (args.core, 1 - args.core))
                servers.append(server)
                await server.start()
            print("priority:", all_real_time(), flush=True)
            for part in wanted:
                mine = [s for s in servers if s.name in PARTS[part]]
                if part == "cost":
                    rows += await cost(mine, args.seconds, args.rounds)
                else:
                    rows += await capacity(mine, args.seconds)
        finally:
            for server in servers:
                server.stop()
    return rows


def tables(rows: list[dict[str, Any]]) -> str:
    """What was measured, for people."""
    costs = [
        [r["kind"], r["server"], f"{r['token_us']:.1f}", f"{r['request_us']:.0f}"]
        for r in rows
        if r["part"] == "cost"
    ]
    carried = [
        [name, f"{max((r['rate'] for r in rows if carries(r, name)), default=0):.0f}"]
        for name in VARIANTS
        if any(r["part"] == "capacity" and r["server"] == name for r in rows)
    ]
    text = markdown(["kind", "server", "µs a token", "µs a request"], costs) if costs else ""
    if carried:
        text += "\n\n" + markdown(["server", "requests a second in bounds"], carried)
    return text


def carries(row: dict[str, Any], name: str) -> bool:
    return row["part"] == "capacity" and row["server"] == name and bool(row["in_bounds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=("cost", "capacity"))
    parser.add_argument("--core", type=int, default=0)
    for flag in ("--serve", "--off", "--port"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        off = args.off.split(",") if args.off else []
        return serve(Path(args.serve), int(args.port), args.core, off)
    import uvloop

    os.sched_setaffinity(0, {1 - args.core})
    rows = uvloop.run(measure(args))
    print(tables(rows))
    if args.out is not None:
        write_result(args.out, rows)
    return None


if __name__ == "__main__":
    main()
