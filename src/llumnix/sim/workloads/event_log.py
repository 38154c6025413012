"""Reads the requests of a live deployment's event log (observe/event_log.py) as a trace."""

from collections.abc import Iterable, Iterator
from typing import Any


def requests_in(lines: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The requests of an event log in order of arrival, the first at 0 s.

    Their lengths are those that they had when they ended or their client left. A request that got
    no token, or that ended with an error, is left out."""
    found = []
    for line in lines:
        if line.get("kind") == "request":
            body = line["body"]
            if body["output_tokens"] and body["finish_reason"] != "error":
                # Wall clock time of the arrival: monotonic clocks of several runs differ.
                found.append((line["time"] - (line["at"] - body["started"]), body))
    found.sort(key=lambda pair: pair[0])
    for arrival_s, body in found:
        yield {
            "arrival_s": arrival_s - found[0][0],
            "input_tokens": body["prompt_tokens"],
            "output_tokens": body["output_tokens"],
            "priority": body["priority"],
        }
