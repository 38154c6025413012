"""Folders for sockets: short enough, private, and swept when their owner was killed."""

import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest
from vllm.v1.executor import multiproc_executor, uniproc_executor

from llumnix.core.types import EngineIndex
from llumnix.engine import folders
from llumnix.engine.folders import PrivateFolder, sweep
from llumnix.errors import UsageError

OWNER = """
import sys, time
from pathlib import Path
from llumnix.engine.folders import PrivateFolder
kept = [PrivateFolder.of(Path(path)) for path in sys.argv[1:]]
print("made", flush=True)
time.sleep(60)
"""


def killed_owner_of(*paths: Path) -> None:
    """Another process made these and was killed."""
    words = [sys.executable, "-c", OWNER, *map(str, paths)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"made\n"
        for path in paths:
            assert sweep(path.parent) == []
        owner.send_signal(signal.SIGKILL)


def test_a_folder_is_its_owners_alone_and_goes_with_all_that_is_in_it() -> None:
    folder = PrivateFolder.make_short()
    assert folder.path.stat().st_mode & 0o777 == 0o700
    (folder.path / "ray").mkdir()
    folder.remove()
    assert not folder.path.exists()


def test_under_a_long_tmpdir_it_goes_to_tmp(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = PrivateFolder.make_short()
    try:
        assert folder.path.parent == Path("/tmp")
        assert len(str(folder.path)) + folders.RAY_ADDS <= folders.SOCKET_PATH_MAX
    finally:
        folder.remove()


def test_a_folder_inside_another_is_made_with_it_for_the_user_alone(tmp_path: Path) -> None:
    folder = PrivateFolder.inside(tmp_path / "outer", "e0")
    for made in (folder.path, folder.path.parent):
        assert made.stat().st_mode & 0o777 == 0o700
    assert PrivateFolder.inside(tmp_path / "outer", "e1").path.parent == folder.path.parent


@pytest.mark.parametrize("which", ["outer", "outer/e0"])
@pytest.mark.parametrize("how", ["open to all", "of somebody else", "a link"])
def test_a_folder_that_somebody_else_put_there_is_not_taken(
    tmp_path: Path, which: str, how: str
) -> None:
    (tmp_path / "outer").mkdir(mode=0o700)
    folder = tmp_path / which
    folder.mkdir(mode=0o700, exist_ok=True)
    if how == "open to all":
        folder.chmod(0o777)
    elif how == "a link":
        folder.rmdir()
        folder.symlink_to(tmp_path)
        tmp_path.chmod(0o700)
    elif os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
    else:
        pytest.skip("only root can give a folder away")
    with pytest.raises(PermissionError):
        PrivateFolder.inside(tmp_path / "outer", "e0")


def test_without_any_short_folder_tmpdir_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: str) -> str:
        raise PermissionError

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    with pytest.raises(UsageError, match="set TMPDIR to a short folder"):
        PrivateFolder.make_short()


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_has_is_not(
    tmp_path: Path,
) -> None:
    dead, unlocked, other = (tmp_path / name for name in ("llumnix-a", "llumnix-b", "other"))
    killed_owner_of(dead)
    unlocked.mkdir()
    PrivateFolder.of(other)
    mine = PrivateFolder.of(tmp_path / "llumnix-c")
    files = len(os.listdir("/proc/self/fd"))
    assert sweep(tmp_path) == [dead]
    assert len(os.listdir("/proc/self/fd")) == files, "every lock that it tried is closed"
    assert sorted(tmp_path.iterdir()) == [unlocked, mine.path, other]


SHARING = """
import os, sys, time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from llumnix.engine.folders import PrivateFolder, name_shared_memory
kept = PrivateFolder.of(Path(sys.argv[1]))
os.environ["VLLM_RPC_BASE_PATH"] = sys.argv[1]
name_shared_memory()
memory = SharedMemory(create=True, size=10)
other = SharedMemory(memory.name)
print(memory.name, resource_tracker._resource_tracker._pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("swept", ["llumnix-a", "llumnix-a/e1"])
def test_shared_memory_goes_with_its_owners_folder_where_the_tracker_was_killed_too(
    tmp_path: Path, swept: str
) -> None:
    (tmp_path / "llumnix-a").mkdir(mode=0o700)
    foreign = SharedMemory(create=True, size=10)
    owners: list[subprocess.Popen[str]] = []
    try:
        names = {}
        for folder in {swept, "llumnix-a/e11", "llumnix-aa"}:
            words = [sys.executable, "-c", SHARING, str(tmp_path / folder)]
            owner = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
            owners.append(owner)
            assert owner.stdout is not None
            names[folder], tracker = owner.stdout.readline().split()
            if folder == swept:
                os.kill(int(tracker), signal.SIGKILL)
                owner.kill()
                owner.wait()
        there = folders.SHARED_MEMORY
        assert all((there / name).exists() for name in names.values())
        assert all(name.startswith("llumnix-a") for name in names.values())
        sweep(tmp_path)
        # With the outer folder's owner all inside are dead.
        gone = {n for f, n in names.items() if f == swept or f.startswith(swept + "/")}
        assert {name for name in names.values() if not (there / name).exists()} == gone
        assert (there / foreign.name).exists()
    finally:
        foreign.close()
        foreign.unlink()
        for owner in owners:
            owner.kill()
            owner.wait()


def test_an_engines_folder_goes_and_the_one_around_it_with_the_last(tmp_path: Path) -> None:
    host = tmp_path / "llumnix-a"
    dead, other = host / "e0", host / "e1"
    killed_owner_of(dead)
    mine = PrivateFolder.of(other)
    assert sweep(tmp_path) == [dead]
    assert list(host.iterdir()) == [other]
    mine.remove()
    killed_owner_of(dead)
    assert sweep(tmp_path) == [dead]
    assert not host.exists()


def test_another_users_folder_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    killed_owner_of(tmp_path / "llumnix-a")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert sweep(tmp_path) == []
    assert sweep(tmp_path / "gone meanwhile") == []


def test_an_engine_on_another_host_makes_its_own_rather_than_take_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for executor in (uniproc_executor, multiproc_executor):
        monkeypatch.setattr(executor, "get_file_store_init_method", None)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    for shared in (tmp_path / "taken", tmp_path / "not" / "there"):
        if shared.name == "taken":
            shared.mkdir()
            shared.chmod(0o777)
        monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(shared))
        folder = folders.own_folder(EngineIndex(0))
        try:
            assert os.environ["VLLM_RPC_BASE_PATH"] == str(folder.path)
            assert folder.path.parent == Path("/tmp")
            assert folder.path.stat().st_mode & 0o777 == 0o700
            store = uniproc_executor.get_file_store_init_method()
            assert store.startswith(f"file://{folder.path}/{folder.path.name}-workers-")
        finally:
            folder.remove()
