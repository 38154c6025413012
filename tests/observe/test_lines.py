"""Lines of the log: text, or JSON that every reader can parse, whoever wrote them."""

import json
import logging
import subprocess
import sys
import time
from typing import Any

import pytest

from llumnix.observe.lines import (
    TAIL_LINES,
    TAIL_WIDTH,
    TELLING_LINES,
    JsonLines,
    TextLines,
    about,
    as_json,
    tail_of,
)


def record(msg: str, *args: Any, error: bool = False, **extra: Any) -> logging.LogRecord:
    exc_info = None
    if error:
        try:
            raise ValueError("two\nlines")
        except ValueError:
            exc_info = sys.exc_info()
    made = logging.LogRecord("llumnix.fleet", logging.ERROR, "f.py", 1, msg, args, exc_info)
    vars(made).update(extra)
    return made


def test_a_line_of_json_has_what_happened_as_fields() -> None:
    extra = about("death", instance="i1", tail=["a", "b"], cause=ValueError)
    line = JsonLines("main").format(record("Instance %s died\nat once", "i1", **extra))
    assert "\n" not in line
    found = json.loads(line)
    assert found.pop("time").endswith("Z")
    assert found.pop("process").startswith("main ")
    assert found == {
        "level": "ERROR", "logger": "llumnix.fleet", "event": "death", "instance": "i1",
        "tail": ["a", "b"], "cause": "<class 'ValueError'>", "msg": "Instance i1 died\nat once",
    }  # fmt: skip


def test_an_exception_is_a_field_of_its_line() -> None:
    line = JsonLines("main").format(record("it failed", error=True))
    assert "\n" not in line
    assert "ValueError: two\nlines" in json.loads(line)["trace"]


def test_in_text_the_tail_follows_indented() -> None:
    first, *tail = (
        TextLines().format(record("it died", **about("death", tail=["x", "y"]))).split("\n")
    )
    assert first.startswith("llumnix: ")
    assert first.endswith("ERROR it died")
    assert tail == ["    | x", "    | y"]
    assert "\n" not in TextLines().format(record("no event"))


def test_a_tail_is_bounded() -> None:
    tail = tail_of([f"{n} " + "x" * 1000 for n in range(100)])
    assert len(tail) == TAIL_LINES
    assert {len(line) for line in tail} == {TAIL_WIDTH}
    assert tail[-1].startswith("99 ")


def test_a_tail_begins_with_the_line_that_tells_of_the_end() -> None:
    lines = [str(n) for n in range(200)]
    tail = tail_of(lines, 100)
    assert len(tail) == TAIL_LINES
    assert tail[:2] == ["100", "101"]
    assert tail[TELLING_LINES] == "..."
    assert (tail[TELLING_LINES + 1], tail[-1]) == ("181", "199")
    assert tail_of(lines, 170) == tail_of(lines) == lines[-TAIL_LINES:]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (b'{"a": 1}', {"a": 1}),
        (
            b"plain \xff text",
            {"logger": "printed", "process": "main 7", "msg": "plain \ufffd text"},
        ),
        (b"{not json", {"msg": "{not json"}),
        (b'{"cut": "\xc3"}', {"msg": '{"cut": "\ufffd"}'}),
        (b'{"deep": ' + b"[" * 100_000, {"logger": "printed"}),
        (b'"a string"', {"msg": '"a string"'}),
        (b"(EngineActor pid=42) hello", {"process": "EngineActor 42", "msg": "hello"}),
        (b'\x1b[36m(EngineActor pid=42, ip=::1)\x1b[0m {"b": 2}', {"b": 2}),
        (b"(raylet) hello", {"msg": "(raylet) hello"}),
    ],
)  # fmt: skip
def test_a_line_of_anybodys_becomes_json(written: bytes, expected: dict[str, Any]) -> None:
    found = json.loads(as_json(written, "main 7"))
    assert expected.items() <= found.items()


CODE = """
import logging, os, subprocess, sys, warnings
from llumnix.observe.console import log_to_stderr, say
from llumnix.observe.lines import Captured, about
print("before")
log_to_stderr("json")
captured = Captured("main")
say("hello", event="ready")
logging.getLogger("llumnix.x").warning("two\\nlines", extra=about("restart", instance="i0"))
warnings.warn("careful")
print("printed", end="")
sys.stdout.flush()
os.write(2, b"x" * 100_000 + b"\\n")
subprocess.run(["sh", "-c", "echo from a child; echo and its error >&2"])
try:
    1 / 0
except ZeroDivisionError:
    import traceback
    traceback.print_exc()
captured.close()
say("at the end", error=True)
print("after")
"""


def test_all_that_a_process_and_its_children_write_is_json_until_it_is_closed() -> None:
    run = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, check=True
    )
    before, *out, after = run.stdout.splitlines()
    assert (before, after) == ("before", "after")
    said = [json.loads(line) for line in out]
    # "printed" has no end of its own, so that what the child writes goes on in the same line.
    assert [line["msg"] for line in said] == ["hello", "printedfrom a child"]
    assert said[0]["event"] == "ready"
    errors = [json.loads(line) for line in run.stderr.splitlines()]
    assert [line.get("event") for line in errors].count("restart") == 1
    messages = [line["msg"] for line in errors]
    assert any("careful" in msg for msg in messages)
    assert "and its error" in messages
    assert "ZeroDivisionError: division by zero" in messages
    assert messages[-1] == "at the end"
    assert sum(len(msg) for msg in messages if set(msg) == {"x"}) == 100_000


NOT_BLOCKING = """
import os, sys, time
from llumnix.observe import lines
real = lines.as_json
def odd(line, process):
    if b"odd" in line:
        raise MemoryError("as good as any")
    return real(line, process)
lines.as_json = odd
os.set_blocking(1, False)
captured = lines.Captured("main")
print("an odd line", flush=True)
for number in range(3000):
    print(f"{number} " + "x" * 100, flush=True)
captured.close()
"""


def test_no_line_ends_the_thread_and_none_is_lost_where_the_stream_does_not_block() -> None:
    words = [sys.executable, "-c", NOT_BLOCKING]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as run:
        time.sleep(0.5)  # So that the pipe is full.
        try:
            odd, *others = run.communicate(timeout=20)[0].splitlines()
        finally:
            run.kill()
    assert run.returncode == 0
    assert odd == "an odd line"
    assert [json.loads(line)["msg"].split()[0] for line in others] == [str(n) for n in range(3000)]
