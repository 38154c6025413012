"""Owners, successors and sweeps of one folder at the same time, in every order.

Each system call of theirs that names or locks a file is a step. Two of them change places after
each pair of steps, or one is killed before each of its steps. Nothing here waits for time to pass.
"""

import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llumnix.engine import folders
from llumnix.engine.folders import PrivateFolder, leave_folder, sweep

STEPS = ("open", "mkdir", "rename", "rmdir", "unlink", "stat", "lstat", "fstat", "listdir", "close")
NAME = "llumnix-abcd1234"
KILLED = 9

Actor = Callable[[Path], PrivateFolder | None]
_here = threading.local()  # `step` and `sleep` of the actor whose thread it is


def _noted(call: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any, **more: Any) -> Any:
        getattr(_here, "step", lambda: None)()
        return call(*args, **more)

    return noted


@pytest.fixture(autouse=True)
def _steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STEPS:
        monkeypatch.setattr(os, name, _noted(getattr(os, name)))
    monkeypatch.setattr(fcntl, "flock", _noted(fcntl.flock))
    monkeypatch.setattr(folders, "time", SimpleNamespace(sleep=lambda _: _here.sleep()))
    monkeypatch.setattr(folders, "sweep_memory", list)
    monkeypatch.setattr(folders, "_held", {})


class Turns:
    """Two actors, of whom one runs at a time. The second begins after some steps of the first, and
    is held up after some of its own until the first has ended or sleeps."""

    def __init__(self, *pauses: int) -> None:
        self._left = list(pauses)
        self._turn = 0
        self._ended = [False, False]
        self._changed = threading.Condition()

    def run(self, *actors: Callable[[], Any]) -> list[Any]:
        """What they return."""
        results: list[Any] = [None, None]

        def act(me: int) -> None:
            _here.step, _here.sleep = lambda: self._step(me), lambda: self._let_other(me)
            with self._changed:
                self._wait_for_turn(me)
            try:
                results[me] = actors[me]()
            except BaseException as error:  # noqa: BLE001 - for whoever looks at the results
                results[me] = error
            with self._changed:
                self._ended[me] = True
                self._changed.notify_all()

        threads = [threading.Thread(target=act, args=(me,)) for me in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def _step(self, me: int) -> None:
        self._left[me] -= 1
        if self._left[me] == -1:
            self._let_other(me)

    def _let_other(self, me: int) -> None:
        with self._changed:
            self._turn = 1 - me
            self._changed.notify_all()
            self._wait_for_turn(me)

    def _wait_for_turn(self, me: int) -> None:
        assert self._changed.wait_for(lambda: self._turn == me or self._ended[1 - me], 60)


# -- who is there before, and who acts


def nothing(parent: Path) -> None:
    parent.mkdir(parents=True)


def dead(parent: Path) -> None:
    (parent / NAME / "ray").mkdir(parents=True)
    (parent / NAME).chmod(0o700)
    for name in ("lock", "ray/socket"):
        (parent / NAME / name).touch()


def dead_on_another_host(parent: Path) -> None:
    for name in ("", "e0"):
        (parent / NAME / name).mkdir(parents=True)
        (parent / NAME / name).chmod(0o700)
    for name in ("lock", "socket"):
        (parent / NAME / "e0" / name).touch()


def owns(parent: Path) -> PrivateFolder:
    return _used(PrivateFolder.of(parent / NAME))


def owns_on_another_host(parent: Path) -> PrivateFolder:
    return _used(PrivateFolder.inside(parent / NAME, "e1"))


def _used(folder: PrivateFolder) -> PrivateFolder:
    (folder.path / "mine").touch()
    return folder


def comes_and_goes(parent: Path) -> None:
    owns(parent).remove()


def comes_and_goes_on_another_host(parent: Path) -> None:
    leave_folder(_used(PrivateFolder.inside(parent / NAME, "e2")))


def sweeps(parent: Path) -> None:
    sweep(parent)


def steps_of(actor: Actor, parent: Path, *begin: Callable[[Path], None]) -> int:
    """The most steps that it takes alone, whatever is there when it begins."""
    most = 0
    for there in begin or (nothing, dead, dead_on_another_host):
        there(here := parent / there.__name__)
        taken: list[None] = []
        _here.step = lambda taken=taken: taken.append(None)
        try:
            actor(here)
        finally:
            del _here.step
        most = max(most, len(taken))
    return most


HERE = [(dead, owns, sweeps), (nothing, owns, sweeps), (dead, sweeps, sweeps)]
HERE += [(there, comes_and_goes, sweeps) for there in (dead, nothing)]
ELSEWHERE = [
    (there, owns_on_another_host, other)
    for there in (dead_on_another_host, nothing)
    for other in (sweeps, comes_and_goes_on_another_host)
]
ELSEWHERE += [(dead_on_another_host, comes_and_goes_on_another_host, sweeps)]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("there", "one", "other"), HERE + ELSEWHERE)
def test_whoever_owns_a_folder_keeps_it_and_what_is_dead_goes(
    tmp_path: Path, there: Callable[[Path], None], one: Actor, other: Actor, turned: bool
) -> None:
    actors = (other, one) if turned else (one, other)
    alone = [steps_of(actor, tmp_path / str(number)) for number, actor in enumerate(actors)]
    assert min(alone) > 5, "they take steps"
    for first in range(alone[0] + 1):
        for second in range(alone[1] + 1):
            parent = tmp_path / f"{first} {second}"
            there(parent)
            results = Turns(first, second).run(*(partial(actor, parent) for actor in actors))
            assert_kept(parent, results, f"after {first} and {second} steps")
            shutil.rmtree(parent, ignore_errors=True)


def assert_kept(parent: Path, results: list[Any], when: str) -> None:
    errors = [result for result in results if isinstance(result, BaseException)]
    assert not errors, when
    assert sweep(parent) in ([], [parent / NAME / "e0"]), f"{when}: it is swept"
    owned = [result for result in results if result is not None]
    for folder in owned:
        assert folder.path.parent in (parent, parent / NAME), when
        assert (folder.path / "mine").exists(), f"{when}: it was lost"
        assert os.path.samestat(os.fstat(folder._lock), (folder.path / "lock").stat()), when
        leave_folder(folder)
    sweep(parent)
    assert list(parent.rglob("*")) == [], f"{when}: something stays"


@pytest.mark.parametrize(
    ("there", "one"),
    [
        (dead, sweeps),
        (dead_on_another_host, sweeps),
        (nothing, comes_and_goes),
        (dead, comes_and_goes),
        (dead_on_another_host, comes_and_goes_on_another_host),
        (nothing, comes_and_goes_on_another_host),
    ],
)
def test_what_is_cut_short_anywhere_is_gone_on_with(
    tmp_path: Path, there: Callable[[Path], None], one: Actor
) -> None:
    for killed_at in range(steps_of(one, tmp_path, there)):
        there(parent := tmp_path / f"{killed_at}")
        if (pid := os.fork()) == 0:
            _here.step = partial(_die_at_the_end_of, iter(range(killed_at)))
            try:
                one(parent)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == KILLED
        sweep(parent)
        assert list(parent.rglob("*")) == [], f"killed before step {killed_at}"


def _die_at_the_end_of(steps: Iterator[int]) -> None:
    if next(steps, None) is None:
        os._exit(KILLED)


def test_a_deployments_folder_is_named_as_empty_ones_are_swept() -> None:
    folder = PrivateFolder.make_short()
    folder.remove()
    assert folders._OURS.fullmatch(folder.path.name)


def test_a_folder_that_another_keeps_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(folders, "time", SimpleNamespace(sleep=slept.append))
    mine = PrivateFolder.of(tmp_path / NAME)
    opened = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TimeoutError):
        PrivateFolder.of(tmp_path / NAME)
    assert len(os.listdir("/proc/self/fd")) == opened
    assert 0 < sum(slept) < 1
    mine.remove()
    assert list(tmp_path.iterdir()) == []
