"""Locks of shared memory: whose they are, how long they are waited for, and what a sweep may take.

`test_folders.py` has what is swept when processes are killed."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from llumnix.engine import folders
from llumnix.engine.folders import leave_memory, name_shared_memory, sweep_memory

OWNER = "llumnix-a-e1"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that stands for /dev/shm. This process may name its memory for `OWNER`."""
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "/not/there/llumnix-a/e1")
    monkeypatch.setattr(folders.shared_memory, "_make_filename", None)  # type: ignore[attr-defined]
    monkeypatch.setitem(folders.current_process()._config, "semprefix", "/mp")  # type: ignore[attr-defined]
    monkeypatch.setattr(folders, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(folders, "_held", {})
    return tmp_path


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it has slept, which takes no time."""
    slept: list[float] = []
    monkeypatch.setattr(folders, "time", SimpleNamespace(sleep=slept.append))
    return slept


def names(memory: Path) -> list[str]:
    return sorted(path.name for path in memory.iterdir())


def left_by_the_dead(memory: Path, owner: str = OWNER) -> list[str]:
    """The names of a free lock and of the memory beside it, which are made."""
    left = [f"{owner}.0a", f"{owner}.0b", f"{owner}.lock", f"sem.{owner}.-c"]
    for name in left:
        (memory / name).touch()
    return left


def assert_swept(*owners: str) -> None:
    assert sweep_memory() == list(owners)


def once_opened(monkeypatch: pytest.MonkeyPatch, then: Callable[[], None]) -> None:
    """Has this happen between the first opening of a lock and what is done with the lock next."""
    really = folders._open_lock

    def open_lock(path: Path) -> int:
        file = really(path)
        monkeypatch.setattr(folders, "_open_lock", really)
        then()
        return file

    monkeypatch.setattr(folders, "_open_lock", open_lock)


def test_a_lock_is_its_owners_alone(memory: Path) -> None:
    name_shared_memory()
    assert (memory / f"{OWNER}.lock").stat().st_mode & 0o777 == 0o600
    leave_memory()
    assert names(memory) == []


def test_where_there_is_no_memory_to_lock_nothing_is_swept(
    memory: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    monkeypatch.setattr(folders, "SHARED_MEMORY", memory / "not there")
    name_shared_memory()
    assert sweep_memory() == []
    assert (folders._held, slept) == ({}, [])


@pytest.mark.timeout(30)
@pytest.mark.parametrize("locked", [False, True])
def test_another_users_lock_is_neither_held_nor_swept(
    memory: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float], locked: bool
) -> None:
    left = left_by_the_dead(memory)
    with (memory / f"{OWNER}.lock").open("w") as theirs:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        if locked:
            fcntl.flock(theirs, fcntl.LOCK_EX)
        opened = len(os.listdir("/proc/self/fd"))
        name_shared_memory()
        assert (folders._held, slept) == ({}, [])
        assert sweep_memory() == []
        assert len(os.listdir("/proc/self/fd")) == opened
    assert sweep_memory() == []
    assert names(memory) == left


def test_a_lock_that_is_a_link_is_neither_held_nor_followed(memory: Path) -> None:
    left = left_by_the_dead(memory)
    (memory / f"{OWNER}.lock").rename(memory / "another")
    (memory / f"{OWNER}.lock").symlink_to(memory / "another")
    name_shared_memory()
    assert folders._held == {}
    assert sweep_memory() == []
    assert names(memory) == ["another", *left]


@pytest.mark.timeout(30)
def test_a_lock_that_stays_taken_is_waited_for_less_than_a_second(
    memory: Path, slept: list[float]
) -> None:
    with (memory / f"{OWNER}.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        name_shared_memory()
    assert folders._held == {}
    assert len(slept) > 1
    assert sum(slept) < 1


@pytest.mark.timeout(30)
def test_a_lock_that_a_sweep_has_for_a_moment_is_held_then(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (memory / f"{OWNER}.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        monkeypatch.setattr(folders, "time", SimpleNamespace(sleep=lambda _: other.close()))
        name_shared_memory()
    assert list(folders._held) == [f"{OWNER}.lock"]
    assert sweep_memory() == []
    leave_memory()
    assert names(memory) == []


def test_a_lock_that_is_swept_as_it_is_opened_is_made_anew(
    memory: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    left_by_the_dead(memory)
    once_opened(monkeypatch, lambda: assert_swept(OWNER))
    name_shared_memory()
    assert names(memory) == [f"{OWNER}.lock"]
    assert sweep_memory() == []
    leave_memory()
    assert names(memory) == []


def test_a_lock_that_another_worker_makes_first_is_shared(
    memory: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    really = os.link

    def link(*words: str | Path, src_dir_fd: int) -> None:
        monkeypatch.setattr(os, "link", really)
        (memory / f"{OWNER}.lock").touch()
        really(*words, src_dir_fd=src_dir_fd)

    monkeypatch.setattr(os, "link", link)
    name_shared_memory()
    assert list(folders._held) == [f"{OWNER}.lock"]
    leave_memory()
    assert names(memory) == []


def test_a_sweep_that_another_was_ahead_of_leaves_the_owners_new_lock_and_memory(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by_the_dead(memory)

    def another_sweeps_and_the_owner_is_back() -> None:
        assert_swept(OWNER)
        name_shared_memory()
        (memory / f"{OWNER}.0a").touch()

    once_opened(monkeypatch, another_sweeps_and_the_owner_is_back)
    assert sweep_memory() == []
    assert names(memory) == [f"{OWNER}.0a", f"{OWNER}.lock"]
    leave_memory()
    assert names(memory) == []


@pytest.mark.parametrize("call", ["flock of an old one", "flock", "link", "taken"])
def test_a_lock_that_is_not_had_is_closed(
    memory: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float], call: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    opened = len(os.listdir("/proc/self/fd"))
    lock = memory / f"{OWNER}.lock"
    if call in ("flock of an old one", "taken"):
        lock.touch()
    with lock.open("a") if call == "taken" else open(os.devnull) as other:
        if call == "taken":
            fcntl.flock(other, fcntl.LOCK_EX)
        else:
            monkeypatch.setattr(*((os, "link") if call == "link" else (fcntl, "flock")), fails)
        name_shared_memory()
    assert folders._held == {}
    assert len(os.listdir("/proc/self/fd")) == opened


def test_memory_of_another_program_stays_though_it_has_a_free_lock(memory: Path) -> None:
    left = left_by_the_dead(memory, "foo")
    left_by_the_dead(memory)
    assert_swept(OWNER)
    assert names(memory) == left


def test_what_another_user_has_under_an_owners_name_stays(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by_the_dead(memory)
    really = Path.lstat
    theirs = SimpleNamespace(st_uid=os.geteuid() + 1)
    monkeypatch.setattr(Path, "lstat", lambda p: theirs if p.name[-1] == "a" else really(p))
    assert_swept(OWNER)
    assert names(memory) == [f"{OWNER}.0a"]


@pytest.mark.parametrize("removed", range(4))
def test_a_sweep_that_is_cut_short_is_gone_on_with(
    memory: Path, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    left = left_by_the_dead(memory)
    really = folders._unlink

    def unlink(path: Path) -> None:
        if len(names(memory)) == len(left) - removed:
            raise KeyboardInterrupt
        really(path)

    monkeypatch.setattr(folders, "_unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        sweep_memory()
    assert len(names(memory)) == len(left) - removed
    monkeypatch.setattr(folders, "_unlink", really)
    assert_swept(OWNER)
    assert names(memory) == []
