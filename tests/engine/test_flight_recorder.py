"""The flight recorder: which requests an engine was computing when it died."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llumnix.core.types import RequestId
from llumnix.engine.reporting import flight_recorder
from llumnix.engine.reporting.flight_recorder import (
    FlightRecorder,
    forget_flight,
    read_flight,
    starting_in,
)


def step(
    *, new: tuple[str, ...] = (), resumed: tuple[str, ...] = (), drafts: int = 0, **on: Any
) -> Any:
    """A step; `on`: by request, how many tokens it computes, and its outputs before."""
    tokens = dict.fromkeys(new, 9) | {name: count for name, (count, _) in on.items()}
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=name) for name in new],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(on),
            resumed_req_ids=set(resumed),
            num_output_tokens=[outputs for _, outputs in on.values()],
        ),
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_spec_decode_tokens={name: [0] * drafts for name in on if drafts},
    )


class Core:
    """An engine core whose steps are launched by hand."""

    def __init__(self, folder: Path, *, queue: bool = False) -> None:
        self.launched: list[Any] = []
        self.batch_queue: list[Any] | None = [] if queue else None
        self.scheduler = SimpleNamespace(running=[])
        self.model_executor = SimpleNamespace(execute_model=self._execute)
        self.recorder = FlightRecorder(folder, self)
        self.at_launch: Any = None

    def _execute(self, batch: Any, non_block: bool) -> str:
        assert non_block
        self.at_launch = read_flight(self.recorder.path)
        self.launched.append(batch)
        return "future"

    def launch(self, batch: Any) -> tuple[set[str], set[str]]:
        """What the file says as the workers get the step."""
        self.scheduler.running = [
            SimpleNamespace(request_id=name) for name in batch.num_scheduled_tokens
        ]
        assert self.model_executor.execute_model(batch, non_block=True) == "future"
        assert self.launched[-1] is batch
        return set(self.at_launch.starting), set(self.at_launch.running)


@pytest.mark.parametrize(
    ("batch", "starting"),
    [
        (step(a=(1, 5), b=(1, 1)), set()),
        (step(new=("a",), b=(1, 5)), {"a"}),
        (step(a=(4, 0), b=(1, 5)), {"a"}),  # A further part of a prompt,
        (step(a=(1, 0), b=(1, 5)), {"a"}),  # and one of a single token.
        (step(resumed=("a",), a=(1, 7), b=(1, 5)), {"a"}),
        (step(a=(30, 7), b=(1, 5)), {"a"}),  # More of what a preemption had cost.
        (step(a=(4, 7), b=(4, 5), drafts=3), set()),
        (step(a=(9, 7), b=(4, 5), drafts=3), {"a"}),
    ],
)
def test_a_request_starts_where_more_than_its_next_token_is_computed(
    batch: Any, starting: set[str]
) -> None:
    assert starting_in(batch) == starting


def test_the_file_says_who_starts_before_the_step_is_launched(tmp_path: Path) -> None:
    core = Core(tmp_path)
    assert core.launch(step(new=("a", "b"))) == ({"a", "b"}, {"a", "b"})
    assert core.launch(step(a=(1, 1), b=(1, 1))) == (set(), {"a", "b"})
    assert core.launch(step(new=("c",), a=(1, 2), b=(1, 2))) == ({"c"}, {"a", "b", "c"})


def test_it_is_written_only_when_those_that_start_change(tmp_path: Path) -> None:
    core = Core(tmp_path)
    core.launch(step(new=("a",)))
    before = core.recorder.writes
    for _ in range(3):
        core.launch(step(a=(9, 0)))  # Its prompt goes on.
    core.launch(step(a=(1, 1)))
    for number in range(2, 50):
        core.launch(step(a=(1, number)))
    assert core.recorder.writes == before + 1


def test_a_step_counts_until_it_has_ended(tmp_path: Path) -> None:
    core = Core(tmp_path, queue=True)
    assert core.batch_queue is not None
    first = step(new=("a",))
    core.launch(first)
    core.batch_queue.insert(0, ("future", first, "future"))
    second = step(a=(1, 1))
    assert core.launch(second) == ({"a"}, {"a"})
    core.batch_queue[:] = [("future", second, "future")]
    assert core.launch(step(a=(1, 2))) == (set(), {"a"})


def test_suspects_are_those_that_start_else_all_that_run(tmp_path: Path) -> None:
    core = Core(tmp_path)
    core.launch(step(new=("a",), b=(1, 5)))
    found = read_flight(core.recorder.path)
    assert found is not None
    assert found.suspects == {RequestId("a")}
    core.launch(step(a=(1, 1), b=(1, 6)))
    found = read_flight(core.recorder.path)
    assert found is not None
    assert found.suspects == {RequestId("a"), RequestId("b")}


def test_nobody_is_suspected_before_the_first_step(tmp_path: Path) -> None:
    found = read_flight(Core(tmp_path).recorder.path)
    assert found is not None
    assert found.suspects == frozenset()


def test_many_long_names_fit(tmp_path: Path) -> None:
    core = Core(tmp_path)
    names = tuple(f"{number}-" + "x" * 500 for number in range(300))
    assert core.launch(step(new=names)) == (set(names), set(names))
    assert core.launch(step(**dict.fromkeys(names, (1, 1)))) == (set(), set(names))


@pytest.mark.parametrize("later", [False, True])
def test_an_engine_without_room_for_the_file_goes_on(
    later: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(file: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    core = Core(tmp_path) if later else None
    monkeypatch.setattr(flight_recorder.os, "posix_fallocate", full)
    core = core or Core(tmp_path)
    names = tuple(f"{number}-" + "x" * 500 for number in range(300))
    for _ in range(2):
        core.scheduler.running = [SimpleNamespace(request_id=name) for name in names]
        assert core.model_executor.execute_model(step(new=names), non_block=True) == "future"
    assert read_flight(core.recorder.path) is None, "what the file said would be wrong now"
    assert [r.getMessage() for r in caplog.records] == [
        "If this engine dies, all its requests are suspects: [Errno 28] No space left on device"
    ]


def test_the_files_room_is_taken_before_it_is_written(tmp_path: Path) -> None:
    found = Core(tmp_path).recorder.path.stat()
    assert found.st_blocks * 512 >= found.st_size


def test_a_torn_write_is_seen(tmp_path: Path) -> None:
    core = Core(tmp_path)
    core.launch(step(new=("first-request",)))
    before = core.recorder.path.read_bytes()
    core.launch(step(new=("other-request",)))
    after = core.recorder.path.read_bytes()
    assert len(before) == len(after)
    size = flight_recorder._HEAD.size
    torn = [before[:size] + after[size:], after[:size] + before[size:], after[:5]]
    middle = size + 6
    torn.append(before[:size] + after[size:middle] + before[middle:])
    for number, wrong in enumerate(torn):
        path = tmp_path / str(number)
        path.write_bytes(wrong)
        assert read_flight(path) is None
    for right in (before, after):
        path.write_bytes(right)
        assert read_flight(path) is not None


def test_a_file_that_is_elsewhere_names_nobody(tmp_path: Path) -> None:
    assert read_flight(tmp_path / "none") is None
    assert read_flight("") is None
    (tmp_path / "odd").write_bytes(os.urandom(100))
    assert read_flight(tmp_path / "odd") is None
    forget_flight(tmp_path / "none")
    forget_flight("")


KILLED = """
import sys, os, signal
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from engine.test_flight_recorder import Core, step
Core(Path(sys.argv[1])).launch(step(new=("a",)))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_outlives_its_engine_and_is_forgotten_once_it_was_read(tmp_path: Path) -> None:
    tests = str(Path(__file__).parents[1])
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), tests], check=False)
    assert ended.returncode == -signal.SIGKILL
    path = tmp_path / flight_recorder.FILE
    found = read_flight(path)
    assert found is not None
    assert found.starting == {RequestId("a")}
    forget_flight(path)
    assert not path.exists()


@pytest.mark.live
def test_a_real_engine_says_what_it_computes(engine: Any, tmp_path: Path) -> None:
    from vllm import SamplingParams

    core = engine.core
    launch = core.model_executor.execute_model
    recorder = FlightRecorder(tmp_path, core)
    try:
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        engine.add(RequestId("first"), list(range(3, 100)), params)
        seen = []
        while not engine.idle():
            engine.step()
            found = read_flight(recorder.path)
            assert found is not None
            seen.append((set(found.starting), set(found.running)))
            if len(seen) == 5:
                engine.add(RequestId("second"), [3, 4, 5], params)
        assert seen[0] == ({"first"}, {"first"})
        assert (set(), {"first"}) in seen
        assert ({"second"}, {"first", "second"}) in seen
        assert seen[-1][0] == set()
        assert recorder.writes < 8
    finally:
        core.model_executor.execute_model = launch
