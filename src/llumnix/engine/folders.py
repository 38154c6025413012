"""Private folders for sockets and logs, and shared memory. Both are swept once their owner is dead.

Names of folders are short enough for a socket's path. The process that makes a folder holds a lock
in it for as long as it lives. Another process that gets the lock knows that the owner is dead. That
holds in another container with the same /tmp too, where a process id says nothing.

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
        """This folder, made if it is not there, is ours from now on."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Locked before it has the name that is looked for.
        nascent = path / f".{_LOCK}"
        lock = os.open(nascent, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # No locks on this file system: it is never swept.
            os.close(lock)
            return cls(path, None)
        nascent.rename(path / _LOCK)
        return cls(path, lock)

    @classmethod
    def inside(cls, outer: Path, name: str) -> "PrivateFolder":
        """A folder in `outer`; both are made if they are not there. OSError if either cannot be, or
        is there and not this user's alone: somebody else may have put it there, who would then see
        or replace what is in it."""
        for folder in (outer, outer / name):
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                raise PermissionError(f"{folder} is somebody else's")
            if stat.S_IMODE(found.st_mode) & 0o077:
                raise PermissionError(f"{folder} is open to others")
        return cls.of(outer / name)

    def remove(self) -> None:
        """Removes the folder and what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def sweep(parent: Path) -> list[Path]:
    """Removes the folders in `parent` whose owners are dead, and those inside of others; only this
    user's. Returns what it removed."""
    removed = []
    for outer in parent.glob(PREFIX + "*"):
        inner = [path for path in _children(outer) if is_dead(path)]
        dead = [outer] if is_dead(outer) else inner
        for path in dead:
            shutil.rmtree(path, ignore_errors=True)
        if inner and not (outer / _LOCK).exists():
            with contextlib.suppress(OSError):
                outer.rmdir()  # The last one out.
        removed += dead
    return removed


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
        return [path for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []  # Another user's, or just gone.


def is_dead(folder: Path) -> bool:
    """Whether the folder had an owner, and the owner is dead."""
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
            return False
    except OSError:
        return False
    with _taken(folder / _LOCK) as dead:
        return dead


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
        taken = os.fstat(file).st_nlink > 0  # Else another sweep was first; its owner may be back.
    except OSError:
        taken = False
    try:
        yield taken
    finally:
        os.close(file)


def _open_lock(path: Path) -> int:
    """OSError if it is not there, or is a link, or another user put it there."""
    file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
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
