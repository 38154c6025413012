"""Streams that go on while something happens to the hosts, or to their network."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from support.hosts import ServerOnHosts
from support.streaming import Recorded, first_difference, stream

COMPLETIONS = "/v1/completions"


def undisturbed(server: ServerOnHosts, bodies: list[dict[str, Any]]) -> list[Recorded]:
    """The streams with nothing going on."""
    seen = [stream(server, COMPLETIONS, body) for body in bodies]
    assert [s.error for s in seen] == [None] * len(bodies)
    return seen


class Streams:
    """All of them at once; the block begins once each has some tokens."""

    def __init__(self, server: ServerOnHosts, bodies: list[dict[str, Any]]) -> None:
        self._server = server
        self._bodies = bodies
        self._pool = ThreadPoolExecutor(len(bodies))
        self._begun = [threading.Event() for _ in bodies]
        self._chunks = [0] * len(bodies)
        self._futures: list[Future[Recorded]] = []

    def __enter__(self) -> "Streams":
        for number, body in enumerate(self._bodies):

            def heard(count: int, number: int = number) -> None:
                self._chunks[number] = count
                if count > 20:
                    self._begun[number].set()

            arguments = (self._server, COMPLETIONS, body)
            self._futures.append(self._pool.submit(stream, *arguments, on_chunk=heard))
        for begun in self._begun:
            assert begun.wait(60), self._so_far()
        return self

    def _so_far(self) -> list[tuple[int, Any]]:
        """Of each stream its chunks so far, and how it ended if it has."""
        ends = (f.result().error or "ended" if f.done() else "goes on" for f in self._futures)
        return list(zip(self._chunks, ends, strict=True))

    def ended(self, timeout_s: float = 120) -> list[Recorded]:
        return [future.result(timeout_s) for future in self._futures]

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def same(calm: list[Recorded], seen: list[Recorded]) -> None:
    assert [s.error for s in seen] == [None] * len(seen)
    assert [first_difference(a, b) for a, b in zip(calm, seen, strict=True)] == [None] * len(seen)


def to_and_fro(server: ServerOnHosts, body: dict[str, Any], moves: int) -> list[dict[str, Any]]:
    """One request that is moved so often, if it does not end before; the answers."""
    found = []
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            stream, server, COMPLETIONS, body, name="mover",
            on_chunk=lambda count: begun.set() if count > 5 else None,
        )  # fmt: skip
        assert begun.wait(60)
        for _ in range(moves):
            answer = server.http.post("/llumnix/v1/migrations", json={"request_id": "mover"})
            if answer.status_code == 404:
                break  # It has ended.
            found.append(answer.json())
        assert future.result().error is None
    return found
