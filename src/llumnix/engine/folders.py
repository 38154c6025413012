"""Private folders for sockets and logs, which are swept once their owner is dead.

Their names are short enough for a socket's path. The process that makes a folder holds a lock in it
for as long as it lives. Another process that gets the lock knows that the owner is dead. That holds
in another container with the same /tmp too, where a process id says nothing. Shared memory of a
dead engine is removed by Python's resource tracker. If that was killed too, the sweep does it: the
memory has the name of its owner's folder.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes): the
executors look `get_file_store_init_method()` up in their own modules; it names the file through
which their workers meet, and CPU workers name their shared memory after it. Queues between workers
are Python's `SharedMemory`, which vLLM gives no name, so that `shared_memory._make_filename()`
does; a worker imports its extension class before it makes any.
"""

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
import signal
import stat
import tempfile
from multiprocessing import resource_tracker, shared_memory, util
from pathlib import Path
from uuid import uuid4

from llumnix.core.types import EngineIndex
from llumnix.errors import UsageError

PREFIX = "llumnix-"
SOCKET_PATH_MAX = 107
RAY_ADDS = 60
"""So many characters Ray's sockets add to the path of its folder."""
SHARED_MEMORY = Path("/dev/shm")
_LOCK = "lock"
_stock_name = shared_memory._make_filename  # type: ignore[attr-defined]


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
            _sweep_shared_memory(path)
            shutil.rmtree(path, ignore_errors=True)
        if inner and not (outer / _LOCK).exists():
            with contextlib.suppress(OSError):
                outer.rmdir()  # The last one out.
        removed += dead
    return removed


def name_shared_memory() -> None:
    """Has the shared memory that this process makes from now on named for the folder of its engine,
    or of its deployment."""
    shared_memory._make_filename = _shared_memory_name  # type: ignore[attr-defined]


def _shared_memory_name() -> str:
    folder = os.environ.get("VLLM_RPC_BASE_PATH")
    if folder is None:
        return str(_stock_name())
    return f"/{_prefix(Path(folder))}{secrets.token_hex(4)}"


def _prefix(folder: Path) -> str:
    """How the names of the shared memory of a folder's owner begin. A folder inside another has
    that one's name first."""
    whole = folder.name.startswith(PREFIX)
    return f"{folder.name}-" if whole else f"{folder.parent.name}-{folder.name}-"


def _sweep_shared_memory(folder: Path) -> None:
    """Removes what an owner left that is dead."""
    for path in SHARED_MEMORY.glob(f"{glob.escape(_prefix(folder))}*"):
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
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def own_folder(engine_index: EngineIndex) -> PrivateFolder | None:
    """A folder of this engine's inside the deployment's, for vLLM's own Unix sockets, the file
    through which its workers meet, and the flight recorder. On another host the deployment's folder
    is made; if somebody else has put one there under that name, a new one is made elsewhere."""
    from vllm.v1.executor import multiproc_executor, uniproc_executor

    shared = os.environ.get("VLLM_RPC_BASE_PATH")
    if shared is None:
        return None
    sweep(Path(shared).parent)
    try:
        folder = PrivateFolder.inside(Path(shared), f"e{engine_index}")
    except OSError:
        folder = PrivateFolder.make_short()
    os.environ["VLLM_RPC_BASE_PATH"] = str(folder.path)
    name_shared_memory()
    # vLLM's would stay in /tmp when the engine is killed.
    store = f"file://{folder.path}/{_prefix(folder.path)}workers-"
    for executor in (uniproc_executor, multiproc_executor):
        executor.get_file_store_init_method = lambda: store + uuid4().hex
    return folder


def leave_folder(folder: PrivateFolder | None) -> None:
    """Removes an engine's own folder as the engine ends."""
    if folder is not None:
        folder.remove()
        with contextlib.suppress(OSError):
            folder.path.parent.rmdir()  # On another host, if it is the last one.


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
