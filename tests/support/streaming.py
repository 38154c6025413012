"""Streams of vLLM's OpenAI API as a client sees them, undisturbed or while they are moved."""

import copy
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from support.server import Server, all_requests, real_time

TIMEOUT_S = 120
CONCATENATED = {"text", "content", "arguments", "reasoning", "reasoning_content"}
"""Strings of which every chunk carries a piece."""
_numbers = itertools.count()


@dataclass(slots=True, kw_only=True)
class Recorded:
    """One stream. `lines`: its raw SSE lines; `broke`: how the connection ended, if badly."""

    name: str
    status: int = 0
    instance: str | None = None
    lines: list[str] = field(default_factory=list)
    broke: str | None = None
    hops: list[dict[str, Any]] = field(default_factory=list)

    @property
    def pieces(self) -> list[dict[str, Any]]:
        """The chunks, decoded."""
        return [json.loads(line[6:]) for line in self.lines if line.startswith("data: {")]

    @property
    def error(self) -> Any:
        """vLLM's error, or how the connection broke; None for a stream that ended well."""
        for piece in self.pieces:
            if "error" in piece:
                return piece["error"]
        if self.broke or self.status != 200:
            return self.broke or self.lines or self.status
        return None if "data: [DONE]" in self.lines else "no [DONE]"

    @property
    def raw(self) -> list[str]:
        """The lines with what differs between any two runs taken out: ids, times and comments."""
        lines = (line for line in self.lines if line and not line.startswith(":"))
        return [_ANY_TIME.sub(r"\g<1>0", _ANY_ID.sub(r"\1*", line)) for line in lines]

    def folded(self) -> str:
        """As `raw`, with each choice's chunks joined to one: where vLLM cuts a stream into chunks
        is up to time alone, for it joins what the client's connection has not taken yet."""
        choices: dict[int, dict[str, Any]] = {}
        rest = []
        for line in self.raw:
            if not line.startswith("data: {"):
                rest.append(line)
                continue
            piece = json.loads(line[6:])
            for choice in piece.pop("choices", []):
                _join(choices.setdefault(choice["index"], {}), choice)
            if piece not in rest:
                rest.append(piece)
        for choice in choices.values():
            for call in choice.get("delta", {}).get("tool_calls") or ():
                call["function"]["arguments"] = _first_value(call["function"]["arguments"] or "")
        return json.dumps([choices[i] for i in sorted(choices)] + rest, indent=0)

    def text(self, index: int = 0) -> str:
        """What one choice says."""
        said = ""
        for choice in (c for p in self.pieces for c in p.get("choices", [])):
            if choice["index"] == index:
                said += choice.get("text") or choice.get("delta", {}).get("content") or ""
        return said

    def tokens(self, index: int = 0) -> list[int]:
        """One choice's tokens (of a request with `return_token_ids`)."""
        choices = [c for p in self.pieces for c in p.get("choices", []) if c["index"] == index]
        return [token for c in choices for token in c.get("token_ids") or []]

    def places(self) -> set[str]:
        """The instances that the request was on."""
        moved = [h for h in self.hops if h["outcome"] == "migrated"]
        return {h["source"] for h in moved} | {h["destination"] for h in moved}


_ANY_ID = re.compile(r'("id": ?")[^"]*')
_ANY_TIME = re.compile(r'("created": ?)\d+')


def _first_value(text: str) -> str:
    """A tool call's arguments alone. vLLM 0.32's parser for hermes sends with them the brace that
    closes the call, if that does not come in one chunk with what follows it."""
    try:
        return text[: json.JSONDecoder(strict=False).raw_decode(text)[1]]
    except ValueError:  # They were cut off.
        return text


def _join(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    """Adds a chunk's fields to those of the chunks before it."""
    for key, value in piece.items():
        before = whole.get(key)
        if value is None or value == before == piece.get("index"):
            whole.setdefault(key, value)
        elif key == "tool_calls":
            # One chunk may have several pieces of one call.
            before = whole[key] = before or []
            for call in value:
                mine = next((c for c in before if c["index"] == call["index"]), None)
                before.append(copy.deepcopy(call)) if mine is None else _join(mine, call)
        elif isinstance(value, dict) and key != "top_logprobs":
            before = whole[key] = before or {}
            _join(before, value)
        elif before is None:
            whole[key] = copy.deepcopy(value)
        elif isinstance(value, list):
            before += value
        elif key in CONCATENATED:
            whole[key] = before + value
        else:
            whole[key] = value


def first_difference(one: Recorded, other: Recorded) -> str | None:
    """Where two streams differ; None if they do not."""
    if one.raw == other.raw:
        return None
    here, there = one.folded().split("\n"), other.folded().split("\n")
    for number, (a, b) in enumerate(itertools.zip_longest(here, there)):
        if a != b:
            return f"folded line {number}: {a!r:.300} != {b!r:.300}"
    return None


def stream(
    server: Server,
    path: str,
    body: dict[str, Any],
    *,
    name: str = "",
    on_chunk: Callable[[int], bool | None] = lambda count: None,
) -> Recorded:
    """Streams one request to its end, or until `on_chunk(chunks so far)` says False: then the
    client hangs up."""
    real_time()
    seen = Recorded(name=name or f"stream-{next(_numbers)}")
    body = {"stream_options": {"include_usage": True}, **body, "model": body.get("model", "tiny")}
    key = {"Authorization": f"Bearer {server.key}"} if server.key else {}
    chunks = 0
    try:
        with httpx.stream(
            "POST",
            server.url + path,
            json={**body, "stream": True},
            headers={"X-Request-Id": seen.name, **key},
            timeout=TIMEOUT_S,
        ) as response:
            seen.status = response.status_code
            seen.instance = response.headers.get("x-llumnix-instance")
            for line in response.iter_lines():
                seen.lines.append(line)
                if line.startswith("data: {"):
                    chunks += 1
                    if on_chunk(chunks) is False:
                        break
    except httpx.TransportError as error:
        seen.broke = repr(error)
    return seen


def migrate(server: Server, request: str, **more: Any) -> httpx.Response:
    """Asks for one migration."""
    body = {"request_id": request, **more}
    return httpx.post(server.url + "/llumnix/v1/migrations", json=body, timeout=TIMEOUT_S)


def rows(server: Server, name: str) -> list[dict[str, Any]]:
    """The rows of one client's request."""
    there = all_requests(lambda path: httpx.get(server.url + path, timeout=TIMEOUT_S))
    return [row for row in there if row["id"] == name]


def stream_moved(
    server: Server,
    path: str,
    body: dict[str, Any],
    *,
    hops: int = 6,
    every_chunks: int = 12,
    name: str = "",
    **order: Any,
) -> Recorded:
    """Streams one request while each of its sequences is moved `hops` times: a hop is ordered when
    the client has received that many further chunks. The answers come with the stream."""
    name = name or f"moved-{next(_numbers)}"
    count, ended = 0, threading.Event()
    more = threading.Condition()
    answers: list[dict[str, Any]] = []

    def on_chunk(chunks: int) -> None:
        nonlocal count
        with more:
            count = chunks
            more.notify()

    def move() -> None:
        real_time()
        had = 0
        for _ in range(hops):
            with more:
                while count < had + every_chunks and not ended.is_set():
                    more.wait(TIMEOUT_S)
            if ended.is_set():
                return
            for row in rows(server, name):
                answer = migrate(server, row["request"], **order)
                answers.append({"status": answer.status_code, **answer.json()})
            had = count

    mover = threading.Thread(target=move)
    mover.start()
    try:
        seen = stream(server, path, body, name=name, on_chunk=on_chunk)
    finally:
        with more:
            ended.set()
            more.notify()
        mover.join()
    # One that the request's end overtook is not there any more.
    seen.hops = [a for a in answers if a["status"] != 404]
    return seen


class Background:
    """Streams requests from threads until told to stop."""

    def __init__(self, streams: int, one: Callable[[int, int], Recorded]) -> None:
        """`one(thread, number)` streams one request."""
        self.done: list[Recorded] = []
        self._one = one
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(streams)]

    def _run(self, index: int) -> None:
        number = 0
        while not self._stop.is_set():
            self.done.append(self._one(index, number))
            number += 1

    def stop(self) -> None:
        """Begins no more; returns when those under way have ended."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @contextmanager
    def running(self) -> Iterator["Background"]:
        """While the block runs."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self.stop()


def all_at_once(works: list[Callable[[], Any]]) -> list[Any]:
    """Does each in a thread of its own; their results in order. Raises what one of them raised."""
    # A thread can wait for its first moment as long as a stream takes: all begin when all are up.
    ready = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> Any:
        real_time()
        ready.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(run, work) for work in works]]
