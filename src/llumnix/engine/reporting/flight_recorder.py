"""A flight recorder: which requests an engine was computing when it died.

If an engine dies of a request, it mostly dies of its prompt, or of the first step after it came
from elsewhere. So the engine notes which requests are in such a step, in a small file that outlives
it. The fleet reads the file after a death.

Rules
- A request *starts* in a step that computes more than its next token: its prompt or a part of it,
  what was computed of it before elsewhere, or what it lost in a preemption.
- The file names those that start in a step in flight, and all that run. It is written when the
  first set changes, before the step is launched. In between no other begins to run.
- The engine writes into a mapped file, so that nothing is lost with the process. A checksum tells a
  reader that the engine died as it wrote. Without room for the file the engine goes on unrecorded.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
- `EngineCore` launches every step with `model_executor.execute_model(SchedulerOutput, ...)`, right
  after the scheduler made it, and before it is put into `batch_queue`. An entry of that is (future,
  `SchedulerOutput`, future).
- `SchedulerOutput.scheduled_new_reqs[i].req_id` (with runner V2 also requests that were preempted
  or moved), `scheduled_cached_reqs.req_ids` with `num_output_tokens`, which is 0 until the step
  after a prompt's last, and `resumed_req_ids`; `num_scheduled_tokens` by request, their sum
  `total_num_scheduled_tokens`, `scheduled_spec_decode_tokens` by request.
- `scheduler.running` has all that run, as of the step that is launched.
"""

import logging
import mmap
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from llumnix.core.types import RequestId

logger = logging.getLogger("llumnix.engine")

FILE = "flight"
"""Its name in the engine's own folder."""
_HEAD = struct.Struct("<4sQII")  # mark, generation, bytes that follow, checksum
_MARK = b"llfr"
_BYTES_AT_FIRST = 16_384


class Flight(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine was computing."""

    starting: frozenset[RequestId]  # in a step in flight
    running: frozenset[RequestId]  # all

    @property
    def suspects(self) -> frozenset[RequestId]:
        """Of which of them it may have died."""
        return self.starting or self.running


class FlightRecorder:
    """Writes the file of one engine. From now on every step of that is recorded before it is
    launched."""

    def __init__(self, folder: Path, core: Any) -> None:
        """`core`: vLLM's engine core."""
        self.path = folder / FILE
        self.writes = 0
        self._starting: frozenset[str] = frozenset()
        self._file: mmap.mmap | None = None
        self._map(_BYTES_AT_FIRST)
        self._write(())
        launch = core.model_executor.execute_model

        def recorded(batch: Any, *args: Any, **options: Any) -> Any:
            if self._starting or starts(batch):
                self._record(core, batch)
            return launch(batch, *args, **options)

        core.model_executor.execute_model = recorded

    def _record(self, core: Any, batch: Any) -> None:
        batches = [batch, *(entry[1] for entry in core.batch_queue or ())]
        starting = frozenset(name for each in batches for name in starting_in(each))
        if starting != self._starting:
            self._starting = starting
            self._write(request.request_id for request in core.scheduler.running)

    def _map(self, size: int) -> None:
        """Maps a file of that size. Its room on the disk is taken before: to write into a mapped
        file on a full disk would end the process. Without room the engine goes on unrecorded."""
        try:
            with self.path.open("a+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
                self._file = mmap.mmap(file.fileno(), size)
        except OSError as error:
            logger.warning("If this engine dies, all its requests are suspects: %s", error)
            self._file = None
            forget_flight(self.path)  # What it says would soon be wrong.

    def _write(self, running: Iterable[str]) -> None:
        if self._file is None:
            return
        self.writes += 1
        body = msgspec.msgpack.encode((list(self._starting), list(running)))
        size = _HEAD.size + len(body)
        if size > len(self._file):
            self._map(2 * size)
            if self._file is None:
                return
        head = _HEAD.pack(_MARK, self.writes, len(body), _checksum(self.writes, body))
        self._file[_HEAD.size : size] = body
        self._file[: _HEAD.size] = head


def starts(batch: Any) -> bool:
    """Whether a request starts in this step. `batch`: vLLM's `SchedulerOutput`."""
    cached = batch.scheduled_cached_reqs
    return bool(
        batch.scheduled_new_reqs
        or cached.resumed_req_ids
        or batch.total_num_scheduled_tokens > len(batch.num_scheduled_tokens)
        or 0 in cached.num_output_tokens
    )


def starting_in(batch: Any) -> set[str]:
    """The requests that start in this step."""
    if not starts(batch):
        return set()
    cached, tokens = batch.scheduled_cached_reqs, batch.num_scheduled_tokens
    drafts = batch.scheduled_spec_decode_tokens
    new = {request.req_id for request in batch.scheduled_new_reqs}
    more = {
        name
        for name, outputs in zip(cached.req_ids, cached.num_output_tokens, strict=True)
        if not outputs or tokens[name] > 1 + len(drafts.get(name, ()))
    }
    return new | more | set(cached.resumed_req_ids)


def read_flight(path: str | Path) -> Flight | None:
    """What a dead engine's recorder says; None if that cannot be read, because the engine is on
    another host, or died as it wrote."""
    try:
        found = Path(path).read_bytes()
        mark, generation, size, checksum = _HEAD.unpack_from(found)
        body = found[_HEAD.size : _HEAD.size + size]
        if mark != _MARK or checksum != _checksum(generation, body):
            return None
        starting, running = msgspec.msgpack.decode(body, type=tuple[list[str], list[str]])
    except (OSError, struct.error, msgspec.MsgspecError):
        return None
    return Flight(
        starting=frozenset(map(RequestId, starting)), running=frozenset(map(RequestId, running))
    )


def forget_flight(path: str | Path) -> None:
    """Removes a dead engine's record."""
    try:
        os.unlink(path)
    except OSError:
        return  # It is elsewhere, or has gone with its folder.


def _checksum(generation: int, body: bytes) -> int:
    return zlib.crc32(body, generation & 0xFFFFFFFF)
