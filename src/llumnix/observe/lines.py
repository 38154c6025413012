"""Lines of the log: as text, or each as a JSON object.

A JSON line has `time`, `level`, `logger`, `process` and `msg`. One that tells of an event has its
code in `event`, and the event's own fields, such as `instance`; one with an exception has `trace`.
vLLM's and uvicorn's own lines are JSON too, with their names of fields (`--logging-config`).

What libraries and Ray print past any logger is made lines of ours by `Captured`.
"""

import contextlib
import logging
import os
import re
import select
import selectors
import sys
import threading
import time
from typing import Any

import msgspec

TAIL_LINES = 40
TELLING_LINES = 20
TAIL_WIDTH = 400
LINE_BYTES_MAX = 2**16
POLL_S = 0.1
CLOSE_TIMEOUT_S = 1.0
_encoder = msgspec.json.Encoder(enc_hook=str)
_FROM_RAY = re.compile(rb"^(?:\x1b\[\d+m)?\((\w[\w ]*) pid=(\d+)[^)]*\)(?:\x1b\[0m)? ?")


def about(event: str, **fields: Any) -> dict[str, Any]:
    """The `extra` of a log call that tells of an event."""
    return {"llumnix": {"event": event, **fields}}


def json_line(level: str, logger: str, process: str, msg: str, **fields: Any) -> str:
    """A line without its end."""
    now = time.time()
    line = {
        "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{now % 1 * 1e3:03.0f}Z"
    }
    line |= {"level": level, "logger": logger, "process": process, **fields, "msg": msg}
    return _encoder.encode(line).decode()


class JsonLines(logging.Formatter):
    """Makes each record one line of JSON."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = f"{process} {os.getpid()}"

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, "llumnix", {}))
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        return json_line(
            record.levelname, record.name, self._process, record.getMessage(), **fields
        )


class TextLines(logging.Formatter):
    """Makes each record a line of text. The tail of an engine's log follows it, indented."""

    def __init__(self) -> None:
        super().__init__("llumnix: %(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        tail = getattr(record, "llumnix", {}).get("tail", ())
        return "\n    | ".join((super().format(record), *tail))


def tail_of(lines: list[str], telling: int | None = None) -> list[str]:
    """What is shown of the end of a log. `telling`: the line that tells of the end, which many may
    follow, such as the stacks of all threads."""
    shown = lines[-TAIL_LINES:]
    if telling is not None and telling < len(lines) - TAIL_LINES:
        first = lines[telling : telling + TELLING_LINES]
        shown = [*first, "...", *lines[len(first) + 1 - TAIL_LINES :]]
    return [line[:TAIL_WIDTH] for line in shown]


class Captured:
    """Has all that this process and its children write to standard output and error come out as
    lines of JSON, until it is closed. Lines that are JSON objects already stay as they are."""

    def __init__(self, process: str) -> None:
        self._process = f"{process} {os.getpid()}"
        self._selector = selectors.DefaultSelector()
        self._kept: dict[int, int] = {}  # what stood for them before
        self._rests: dict[int, bytes] = {}
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
                self._take(stream.fileno())
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llumnix-lines", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Passes on what is still there, and gives the streams back."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        for fd, kept in self._kept.items():
            os.dup2(kept, fd)
        self._closing.set()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _take(self, fd: int) -> None:
        self._kept[fd] = os.dup(fd)
        reader, writer = os.pipe()
        os.dup2(writer, fd)
        os.close(writer)
        os.set_blocking(reader, False)
        self._rests[fd] = b""
        self._selector.register(reader, selectors.EVENT_READ, fd)

    def _run(self) -> None:
        while True:
            ready = self._selector.select(POLL_S)
            if not ready and self._closing.is_set():
                break
            for key, _ in ready:
                self._pass_on(key.fd, key.data)
        for fd, rest in self._rests.items():
            self._put(fd, [rest])

    def _pass_on(self, reader: int, fd: int) -> None:
        if not (some := os.read(reader, LINE_BYTES_MAX)):
            self._selector.unregister(reader)
            return
        *lines, rest = (self._rests[fd] + some).split(b"\n")
        if len(rest) > LINE_BYTES_MAX:
            lines, rest = [*lines, rest], b""
        self._rests[fd] = rest
        self._put(fd, lines)

    def _put(self, fd: int, lines: list[bytes]) -> None:
        """Writes the lines. Nothing may end the thread: whoever prints would wait for it forever
        once the pipe is full."""
        out = b"".join(self._as_json(line) + b"\n" for line in lines if line.strip())
        with contextlib.suppress(OSError):  # Its reader has gone.
            while out:
                try:
                    out = out[os.write(self._kept[fd], out) :]
                except BlockingIOError:  # Somebody who shares the stream has it not block.
                    select.select((), (self._kept[fd],), ())

    def _as_json(self, line: bytes) -> bytes:
        try:
            return as_json(line, self._process)
        except Exception:  # noqa: BLE001 - better as it is than not at all
            return line


def as_json(line: bytes, process: str) -> bytes:
    """A line that somebody wrote, as JSON. A line of an actor that Ray shows loses Ray's prefix."""
    match = _FROM_RAY.match(line)
    text = line[match.end() :] if match else line
    if text.lstrip().startswith(b"{"):
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            msgspec.json.decode(text, type=dict[str, Any])
            return text
    if match:
        process = f"{match[1].decode(errors='replace')} {match[2].decode()}"
    return json_line("INFO", "printed", process, text.decode(errors="replace").rstrip()).encode()
