"""Folders for sockets: short enough, private, and swept when their owner was killed."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import current_process, shared_memory
from pathlib import Path

import pytest
from vllm.v1.executor import multiproc_executor, uniproc_executor

from llumnix.core.types import EngineIndex
from llumnix.engine import folders
from llumnix.engine.folders import (
    PrivateFolder,
    keep_memory_swept,
    leave_memory,
    name_shared_memory,
    sweep,
    sweep_memory,
)
from llumnix.errors import UsageError
from support.endless import sweepers_end
from support.server import eventually

OWNER = """
import sys, time
from pathlib import Path
from llumnix.engine.folders import PREFIX, PrivateFolder
paths = [Path(path) for path in sys.argv[1:]]
nested = [path for path in paths if not path.name.startswith(PREFIX)]
kept = [PrivateFolder.inside(path.parent, path.name) for path in nested]
kept += [PrivateFolder.of(path) for path in paths if path not in nested]
print("made", flush=True)
time.sleep(600)
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
    assert (folder.path / "lock").stat().st_mode & 0o777 == 0o600
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
@pytest.mark.parametrize("how", ["open to all", "open to its group", "of somebody else", "a link"])
def test_a_folder_that_somebody_else_put_there_is_not_taken(
    tmp_path: Path, which: str, how: str
) -> None:
    (tmp_path / "outer").mkdir(mode=0o700)
    folder = tmp_path / which
    folder.mkdir(mode=0o700, exist_ok=True)
    if how == "open to all":
        folder.chmod(0o777)
    elif how == "open to its group":
        folder.chmod(0o770)
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
from pathlib import Path
from llumnix.engine import folders
from llumnix.engine.folders import name_shared_memory
memory, os.environ["VLLM_RPC_BASE_PATH"], name = sys.argv[1:]
folders.SHARED_MEMORY = Path(memory)
name_shared_memory()
if name:
    Path(memory, folders._shared_memory_name()[1:]).touch()
    Path(memory, f"{folders._owner()}.workers-1[0-1]-cpushm_0").touch()
    Path(memory, f"sem.{folders._owner()}.-abc").touch()
print("named", flush=True)
time.sleep(600)
"""


class Sharing:
    """Processes that have named shared memory. A folder stands for /dev/shm, which any server on
    this machine may sweep."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.memory = tmp_path / "memory"
        self.memory.mkdir()
        monkeypatch.setattr(folders, "SHARED_MEMORY", self.memory)
        self.started: list[subprocess.Popen[bytes]] = []

    def by(self, folder: str, *, makes: bool = True) -> subprocess.Popen[bytes]:
        """A process that has named its memory for this folder, and made some."""
        words = [sys.executable, "-c", SHARING, str(self.memory), f"/not/there/{folder}"]
        one = subprocess.Popen([*words, "x" if makes else ""], stdout=subprocess.PIPE)
        self.started.append(one)
        assert one.stdout is not None
        assert one.stdout.readline() == b"named\n"
        return one

    def kill(self, one: subprocess.Popen[bytes]) -> None:
        one.kill()
        one.wait()

    def owners(self) -> dict[str, int]:
        """Whose memory is there, and how many files each has."""
        names = [path.name.removeprefix("sem.").partition(".")[0] for path in self.memory.iterdir()]
        return {name: names.count(name) for name in names}


@pytest.fixture
def sharing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Sharing]:
    one = Sharing(monkeypatch, tmp_path)
    yield one
    for process in one.started:
        one.kill(process)


def test_shared_memory_of_the_dead_is_swept_without_a_folder_and_that_of_the_living_is_not(
    sharing: Sharing,
) -> None:
    (sharing.memory / "foreign").touch()
    dead = sharing.by("llumnix-a/e1")
    alive = [sharing.by(folder) for folder in ("llumnix-a", "llumnix-a/e11", "llumnix-aa")]
    stopped = sharing.by("llumnix-b/e1")
    stopped.send_signal(signal.SIGSTOP)
    there = sharing.owners()
    assert sweep_memory() == []
    sharing.kill(dead)
    assert sweep_memory() == ["llumnix-a-e1"]
    assert there.pop("llumnix-a-e1") == 4
    assert sharing.owners() == there
    for one in (*alive, stopped):
        sharing.kill(one)
    assert len(sweep_memory()) == 4
    assert sharing.owners() == {"foreign": 1}


@pytest.mark.parametrize("first", [0, 1])
def test_shared_memory_stays_until_the_engine_and_its_last_worker_have_ended(
    sharing: Sharing, first: int
) -> None:
    both = [sharing.by("llumnix-a/e1"), sharing.by("llumnix-a/e1", makes=False)]
    sharing.kill(both.pop(first))
    assert sweep_memory() == []
    assert sharing.owners() == {"llumnix-a-e1": 4}
    sharing.kill(both[0])
    assert sweep_memory() == ["llumnix-a-e1"]
    late = sharing.by("llumnix-a/e1")  # A worker that was only being started.
    assert sweep_memory() == []
    sharing.kill(late)
    assert sweep_memory() == ["llumnix-a-e1"]
    assert sharing.owners() == {}


def test_who_keeps_memory_swept_does_so_at_once_and_from_then_on(
    sharing: Sharing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "SWEEP_EVERY_S", 0.01)
    sharing.kill(sharing.by("llumnix-a/e1"))
    later = sharing.by("llumnix-a/e2")
    with sweepers_end(folders):
        keep_memory_swept()
        assert sharing.owners() == {"llumnix-a-e2": 4}
        sharing.kill(later)
        eventually(lambda: sharing.owners() == {}, 10, "the thread sweeps")


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process may name its memory."""
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "/not/there/llumnix-a/e1")
    monkeypatch.setattr(shared_memory, "_make_filename", shared_memory._make_filename)
    monkeypatch.setitem(current_process()._config, "semprefix", "/mp")


@pytest.mark.usefixtures("named")
def test_the_last_process_that_leaves_its_memory_removes_it(sharing: Sharing) -> None:
    other = sharing.by("llumnix-a/e1")
    for owners in ({"llumnix-a-e1": 4}, {}):
        name_shared_memory()
        name_shared_memory()  # As a worker in the engine's own process does.
        leave_memory()
        assert sharing.owners() == owners
        sharing.kill(other)


MAKING = """
import multiprocessing, os, sys, time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from llumnix.engine.folders import name_shared_memory
os.environ["VLLM_RPC_BASE_PATH"] = sys.argv[1]
name_shared_memory()
memory = SharedMemory(create=True, size=10)
semaphore = multiprocessing.get_context("spawn").Lock()
print(memory.name, "sem." + semaphore._semlock.name[1:], resource_tracker._resource_tracker._pid)
sys.stdout.flush()
time.sleep(600)
"""


def test_shared_memory_and_semaphores_are_swept_where_pythons_tracker_was_killed_too(
    tmp_path: Path,
) -> None:
    folder = tmp_path / f"llumnix-{os.getpid()}"
    with subprocess.Popen(
        [sys.executable, "-c", MAKING, str(folder)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        memory, semaphore, tracker = owner.stdout.readline().split()
        sweep_memory()
        made = [folders.SHARED_MEMORY / memory, folders.SHARED_MEMORY / semaphore]
        assert all(path.exists() for path in made)
        os.kill(int(tracker), signal.SIGKILL)
        owner.kill()
    sweep_memory()
    # A server on this machine may be at it.
    eventually(lambda: not any(path.exists() for path in made), 5, "swept")


def test_an_engines_folder_goes_and_the_one_around_it_with_the_last(tmp_path: Path) -> None:
    host = tmp_path / "llumnix-abcd1234"
    dead, other = host / "e0", host / "e1"
    killed_owner_of(dead)
    mine = PrivateFolder.inside(host, other.name)
    assert sweep(tmp_path) == [dead]
    assert list(host.iterdir()) == [other]
    mine.remove()
    killed_owner_of(dead)
    assert sweep(tmp_path) == [dead]
    assert not host.exists()


def test_an_empty_folder_that_a_user_may_have_made_stays(tmp_path: Path) -> None:
    modes = {"llumnix-notes": 0o700, "llumnix-abcd1234": 0o755, "llumnix-abcd1235": 0o700}
    for name, mode in modes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    assert sweep(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llumnix-abcd1234", "llumnix-notes"]


def test_a_link_to_a_dead_owners_folder_stays_and_so_does_the_folder(tmp_path: Path) -> None:
    elsewhere, swept = tmp_path / "elsewhere", tmp_path / "swept"
    (swept / "llumnix-a").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "lock").touch()
    links = [swept / "llumnix-abcd1234", swept / "llumnix-a" / "e0"]
    for link in links:
        link.symlink_to(elsewhere)
    assert sweep(swept) == []
    assert [link.is_symlink() for link in links] == [True, True]
    assert (elsewhere / "lock").exists()


def test_a_folder_that_only_begins_like_a_removed_one_stays(tmp_path: Path) -> None:
    """A user's, who knows no rule of ours."""
    theirs = tmp_path / "llumnix-removed-lines"
    ours = tmp_path / "llumnix-removed-0123abcd"
    for folder in (theirs, ours):
        folder.mkdir()
        (folder / "kept").touch()
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [theirs]
    assert (theirs / "kept").exists()


def test_another_users_folder_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    killed_owner_of(tmp_path / "llumnix-a")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert sweep(tmp_path) == []
    assert sweep(tmp_path / "gone meanwhile") == []


@pytest.mark.usefixtures("named")
def test_an_engine_on_another_host_makes_its_own_rather_than_take_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for executor in (uniproc_executor, multiproc_executor):
        monkeypatch.setattr(executor, "get_file_store_init_method", None)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    monkeypatch.setattr(folders, "SHARED_MEMORY", tmp_path)
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
            assert store.startswith(f"file://{folder.path}/{folder.path.name}.workers-")
            assert (tmp_path / f"{folder.path.name}.lock").exists()
        finally:
            folders.leave_folder(folder)
        assert not folder.path.exists()
        assert not list(tmp_path.glob("llumnix-*"))
