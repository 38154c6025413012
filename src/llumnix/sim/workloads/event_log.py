"""The event log of a live deployment (observe/event_log.py) as a trace of requests."""

from collections.abc import Iterable, Iterator
from typing import Any


def logged(lines: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The requests of an event log in the order in which they came, the first at 0 s, with the
    lengths that they had when they ended or their client left. A request that got no token, or
    whose engine was lost, is left out."""
    found = []
    for line in lines:
        if line.get("kind") == "request":
            body = line["body"]
            if body["output_tokens"] and body["finish_reason"] != "error":
                # Monotonic clocks of several runs differ, the wall clock goes on.
                found.append((line["time"] - (line["at"] - body["started"]), body))
    found.sort(key=lambda pair: pair[0])
    for came_s, body in found:
        yield {
            "arrival_s": came_s - found[0][0],
            "input_tokens": body["prompt_tokens"],
            "output_tokens": body["output_tokens"],
            "priority": body["priority"],
        }
