"""Private folders for sockets and logs, and shared memory. Both are swept once their owner is dead.

Names of folders are short enough for a socket's path. A lock in the folder says whether its owner
lives. That holds in another container with the same /tmp too, where a process id says nothing.

Rules for a folder and its file `lock`
- A process has the lock if it has locked the file, and the file still has its name then.
- An owner makes both, and has the lock for as long as it lives. It waits for another that has it,
  and makes the folder anew if that has gone meanwhile.
- A sweep that gets the lock knows that the owner is dead. While it has the lock, it renames the
  folder: a successor can make another of the old name at once. Then it removes the renamed one. An
  owner that ends does the same.
- A renamed folder is nobody's. If its removal was cut short, the next sweep removes the rest.
- An empty folder is nobody's either: an owner that has yet to lock it makes it anew.
- The folders in a deployment's go with it: its engines end with it. On other hosts that folder has
  no lock, and goes when it is empty.

Shared memory has the name of its owner's folder. Its lock lies beside it in /dev/shm, because the
folder may go first, or be seen by one service alone. The engine and its workers share that lock.
Most memory of a dead engine is removed by Python's resource tracker. The rest is left to the sweep:
what vLLM's CPU workers make in C++, and everything if the tracker was killed too. Not swept are the
files in which torch counts who maps CUDA memory (`kv/blocks_cuda.py`): torch names them.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes): the
executors look `get_file_store_init_method()` up in their own modules; it names the file through
which their workers meet, and CPU workers name their shared memory after it. Queues between workers
are Python's `SharedMemory`, which vLLM gives no name, so that `shared_memory._make_filename()`
does; a worker imports its extension class before it makes any. Python names semaphores by the
`semprefix` of the process, which its children inherit.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing import current_process, resource_tracker, shared_memory, util
from pathlib import Path
from uuid import uuid4

from llumnix.core.types import EngineIndex
from llumnix.errors import UsageError

PREFIX = "llumnix-"
SOCKET_PATH_MAX = 107
RAY_ADDS = 60
"""So many characters Ray's sockets add to the path of its folder."""
SHARED_MEMORY = Path("/dev/shm")
SWEEP_EVERY_S = 1.0
_GOING = PREFIX + "removed-"
_GONE = re.compile(_GOING + r"[0-9a-f]{8}")
"""What folders are called that were renamed to be removed. No owner gives such a name."""
_OURS = re.compile(PREFIX + r"[a-z0-9_]{8}|e\d+")
"""What owners call their folders: `mkdtemp` a deployment's, its number an engine's."""
HOLD_TRIES, HOLD_AGAIN_S = 20, 0.04
_LOCK = "lock"
_stock_name = shared_memory._make_filename  # type: ignore[attr-defined]
_held: dict[str, int] = {}  # locks of this process in `SHARED_MEMORY`, by their names


class PrivateFolder:
    """A folder for its owner only, which goes with this process at the latest."""

    def __init__(self, path: Path, lock: int | None) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def make_short(cls) -> "PrivateFolder":
        """A new one in the temporary folder, or in /tmp if that has too long a name for a socket's
        path; `UsageError` if neither will do."""
        wanted = tempfile.gettempdir()
        for parent in (wanted, "/tmp"):
            if len(f"{parent}/{PREFIX}12345678") + RAY_ADDS > SOCKET_PATH_MAX:
                continue
            with contextlib.suppress(OSError):
                # For its owner only: mkdtemp's doing.
                return cls.of(Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent)))
        raise UsageError(
            f"no folder for sockets: {wanted} (TMPDIR) has too long a name or is not writable, and "
            "neither is /tmp; set TMPDIR to a short folder of yours"
        )

    @classmethod
    def of(cls, path: Path) -> "PrivateFolder":
        """This folder, made if it is not there, is ours from now on. OSError if it cannot be: also
        where it is not this user's alone, or another process has it for longer than a sweep does.
        Somebody else who put it there would see or replace what is in it."""
        return cls._of(path)

    @classmethod
    def inside(cls, outer: Path, name: str) -> "PrivateFolder":
        """A folder in `outer`; both are made if they are not there. OSError as for `of`."""
        return cls._of(outer, outer / name)

    @classmethod
    def _of(cls, *paths: Path) -> "PrivateFolder":
        for _ in range(HOLD_TRIES):
            # A sweep has the lock, or has just removed what was made: pathlib may say it exists.
            with contextlib.suppress(BlockingIOError, FileExistsError, FileNotFoundError):
                for path in paths:
                    path.mkdir(mode=0o700, exist_ok=True)
                    if _mode(path) & 0o077:
                        raise PermissionError(f"{path} is open to others")
                return cls(path, _own(path / _LOCK))
            time.sleep(HOLD_AGAIN_S)
        raise TimeoutError(f"{paths[-1]} cannot be made or locked")

    def remove(self) -> None:
        """Removes the folder and what is in it."""
        _remove(self.path)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def sweep(parent: Path) -> list[Path]:
    """Removes the folders in `parent` whose owners are dead, and those inside of others; only this
    user's. Returns what it removed."""
    removed = []
    for outer in filter(_is_ours, parent.glob(PREFIX + "*")):
        if _swept(outer):
            removed.append(outer)
            continue
        removed += [inner for inner in _children(outer) if _swept(inner)]
        for path in (*_children(outer), outer):
            _remove_empty(path)
    return removed


def _swept(folder: Path) -> bool:
    """Removes the folder if its owner is dead."""
    if _GONE.fullmatch(folder.name):
        shutil.rmtree(folder, ignore_errors=True)
        return False
    with _taken(folder / _LOCK) as dead:
        if dead:
            _remove(folder)
    return dead


def _remove(folder: Path) -> None:
    """Removes a folder of which we have the lock."""
    going = folder.with_name(_GOING + secrets.token_hex(4))
    with contextlib.suppress(OSError):
        folder.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        # Else a user may have made it.
        if _OURS.fullmatch(folder.name) and _mode(folder) == 0o700:
            folder.rmdir()


def sweep_memory() -> list[str]:
    """Removes the shared memory on this host whose owners are dead; only this user's. Returns the
    owners' names."""
    owners = [n.removesuffix(f".{_LOCK}") for n in _in_memory(PREFIX) if n.endswith(f".{_LOCK}")]
    return [owner for owner in owners if _sweep_memory_of(owner)]


def _sweep_memory_of(owner: str) -> bool:
    lock = SHARED_MEMORY / f"{owner}.{_LOCK}"
    with _taken(lock) as dead:
        if dead:
            for name in _in_memory(f"{owner}.", f"sem.{owner}."):
                if name != lock.name:
                    _unlink(SHARED_MEMORY / name)
            _unlink(lock)  # The last, so that a sweep that is cut short is gone on with.
    return dead


def keep_memory_swept() -> None:
    """Does `sweep_memory`, and has a thread do it every `SWEEP_EVERY_S` from now on."""
    sweep_memory()

    def run() -> None:
        while True:
            time.sleep(SWEEP_EVERY_S)
            sweep_memory()

    threading.Thread(target=run, name="llumnix-sweep", daemon=True).start()


def name_shared_memory() -> None:
    """Has the shared memory and semaphores that this process makes from now on named for the folder
    of its engine, or of its deployment. They are not swept for as long as this process lives."""
    shared_memory._make_filename = _shared_memory_name  # type: ignore[attr-defined]
    if (owner := _owner()) is not None:
        current_process()._config["semprefix"] = f"/{owner}."  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):  # Not to be locked here: it is never swept.
            _hold(f"{owner}.{_LOCK}")


def leave_memory() -> None:
    """This process needs the memory that it named no more. The last one removes it."""
    for name in list(_held):
        os.close(_held.pop(name))
    sweep_memory()


def _owner() -> str | None:
    """Whose shared memory it is that this process makes; None outside a deployment. A folder inside
    another has that one's name first."""
    if (path := os.environ.get("VLLM_RPC_BASE_PATH")) is None:
        return None
    folder = Path(path)
    whole = folder.name.startswith(PREFIX)
    return folder.name if whole else f"{folder.parent.name}-{folder.name}"


def _shared_memory_name() -> str:
    owner = _owner()
    return str(_stock_name()) if owner is None else f"/{owner}.{secrets.token_hex(4)}"


def _hold(name: str) -> None:
    """Takes a share in a lock in `SHARED_MEMORY`, which is made if it is not there. OSError if that
    cannot be, also where another process keeps the lock for longer than a sweep does."""
    if name in _held:
        return
    path = SHARED_MEMORY / name
    for _ in range(HOLD_TRIES):
        with contextlib.suppress(BlockingIOError, FileExistsError), contextlib.ExitStack() as drop:
            new = False
            try:
                lock = _open_lock(path)
            except FileNotFoundError:
                new = True
                lock = os.open(SHARED_MEMORY, os.O_TMPFILE | os.O_RDWR, 0o600)
            drop.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if new:
                # Locked before it has a name. `src_dir_fd` has Python follow the link to the file.
                os.link(f"/proc/self/fd/{lock}", path, src_dir_fd=lock)
            if os.fstat(lock).st_nlink:  # Else it was swept meanwhile.
                drop.pop_all()
                _held[name] = lock
                return
        time.sleep(HOLD_AGAIN_S)
    raise TimeoutError(f"{path} stays locked")


def _in_memory(*beginnings: str) -> list[str]:
    try:
        return [name for name in os.listdir(SHARED_MEMORY) if name.startswith(beginnings)]
    except OSError:
        return []


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.lstat().st_uid == os.geteuid():
            path.unlink()


def _children(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if _is_ours(path)]
    except OSError:
        return []  # Just gone.


def _is_ours(folder: Path) -> bool:
    """Whether it is there and a folder, and this user's."""
    try:
        return _mode(folder) >= 0
    except OSError:
        return False


def _mode(folder: Path) -> int:
    """Its permissions; PermissionError if it is another user's, or no folder."""
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
        return stat.S_IMODE(found.st_mode)
    raise PermissionError(f"{folder} is somebody else's")


def _own(lock: Path) -> int | None:
    """Takes a folder's lock for good, made if it is not there: its descriptor, or None where the
    file system has no locks, so that the folder is never swept. BlockingIOError if another has it,
    FileNotFoundError if the folder has gone."""
    file = _open_lock(lock, os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_named(file, lock):
            raise FileNotFoundError(lock)
    except OSError as error:
        os.close(file)
        if isinstance(error, BlockingIOError | FileNotFoundError):
            raise
        return None
    return file


def _is_named(file: int, path: Path) -> bool:
    """Whether this is still the name of the open file. Else a sweep was first, and its owner may be
    back."""
    return os.path.samestat(os.fstat(file), path.lstat())


@contextlib.contextmanager
def _taken(lock: Path) -> Iterator[bool]:
    """Whether this lock of this user's is there and nobody has it; then it is ours meanwhile."""
    try:
        file = _open_lock(lock)
    except OSError:
        yield False
        return
    taken = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = _is_named(file, lock)
    except OSError:
        taken = False
    try:
        yield taken
    finally:
        os.close(file)


def _open_lock(path: Path, more: int = 0) -> int:
    """OSError if it is not there, or is a link, or another user put it there."""
    file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | more, 0o600)
    if os.fstat(file).st_uid == os.geteuid():
        return file
    os.close(file)
    raise PermissionError(f"{path} is somebody else's")


def own_folder(engine_index: EngineIndex) -> PrivateFolder | None:
    """A folder of this engine's inside the deployment's, for vLLM's own Unix sockets, the file
    through which its workers meet, and the flight recorder. On another host the deployment's folder
    is made; if somebody else has put one there under that name, a new one is made elsewhere."""
    from vllm.v1.executor import multiproc_executor, uniproc_executor

    shared = os.environ.get("VLLM_RPC_BASE_PATH")
    if shared is None:
        return None
    sweep(Path(shared).parent)
    sweep_memory()
    try:
        folder = PrivateFolder.inside(Path(shared), f"e{engine_index}")
    except OSError:
        folder = PrivateFolder.make_short()
    os.environ["VLLM_RPC_BASE_PATH"] = str(folder.path)
    name_shared_memory()
    # vLLM's would stay in /tmp when the engine is killed.
    store = f"file://{folder.path}/{_owner()}.workers-"
    for executor in (uniproc_executor, multiproc_executor):
        executor.get_file_store_init_method = lambda: store + uuid4().hex
    return folder


def leave_folder(folder: PrivateFolder | None) -> None:
    """Removes an engine's own folder as the engine ends."""
    if folder is not None:
        folder.remove()
        with contextlib.suppress(OSError):
            folder.path.parent.rmdir()  # On another host, if it is the last one.
        leave_memory()


def start_resource_tracker() -> None:
    """Starts Python's resource tracker, which removes shared memory once all its users are dead, in
    a session of its own. When an actor dies, Ray kills its process group; a tracker in that group
    would leave everything behind. vLLM's workers inherit the tracker. They also inherit which
    signals are blocked; Python unblocks two when it starts the tracker."""
    spawn, blocked = util.spawnv_passfds, signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def apart(path: bytes, args: list[str], fds: list[int]) -> int:
        *first, program = args
        return spawn(path, [*first, f"import os; os.setsid(); {program}"], fds)

    util.spawnv_passfds = apart
    try:
        resource_tracker.ensure_running()
    finally:
        util.spawnv_passfds = spawn
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
