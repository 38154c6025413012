"""`llumnix doctor`: whether this host is fit to serve, and `llumnix version`.

Each check looks at one thing that was seen to go wrong, and names the fix. Nothing is started, and
neither vLLM nor Ray is imported.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes): an engine
has a queue to its workers in shared memory, and each worker one to its engine. A queue is a ring of
ten chunks, whose size `VLLM_MQ_MAX_CHUNK_BYTES_MB` sets for the first. vLLM makes none unless the
whole ring were free, but a chunk takes only what the largest message in it so far took.
"""

import argparse
import math
import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from llumnix.commands.printing import print_json
from llumnix.config import is_loopback, knobs
from llumnix.demo import cache_folder
from llumnix.errors import UsageError
from llumnix.versions import SUPPORTED, check_versions, commit, installed, versions_line

FILES_WANTED = 4096
"""Open files: a client's connection is one in its frontend, and Ray asks for some hundred."""
OBJECTS_BYTES = 80 * 2**20
"""Ray's objects in shared memory. KV blocks on their way are not in /dev/shm."""
RING_CHUNKS, STEPS_CHUNK_MB, ANSWERS_CHUNK_MB = 10, 16, 24
"""vLLM's rings: of an engine's steps, and of a worker's answers. MB here are 2^20 bytes."""
NCCL_BYTES = 10**9
"""What NCCL's manual asks for where several GPUs work together."""
MEMORY_WANTED_GB = 4.0
SOCKET_NAME_MAX = 107
"""Bytes of a Unix socket's path on Linux."""
SOCKETS_BELOW = (
    len("/llumnix-abcdefgh/ray/session_2026-11-28_12-00-00_000000_1234567/sockets/") + 16
)
"""What Ray and llumnix put behind the temporary folder, at the longest."""
GB = 10**9
INSTANCES = next(int(default) for name, default, _ in knobs() if name == "instances")
"""What `llumnix serve` starts by itself. Each has one worker."""
NVIDIA_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check has seen."""

    what: str
    verdict: str  # OK, WARN or FAIL
    text: str
    fix: str = ""


def doctor(argv: list[str]) -> int:
    """`llumnix doctor`: 1 if something would keep `llumnix serve` from working, else 0."""
    parser = argparse.ArgumentParser(
        prog="llumnix doctor", description="Looks whether this host is fit for `llumnix serve`."
    )
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="instances on this host, times their tensor and pipeline parallel sizes; by default "
        "one worker a GPU, or two without GPUs",
    )
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        parser.error("--workers must be 1 or more")
    findings = list(look(args.workers))
    if args.json:
        print_json([asdict(finding) for finding in findings])
    else:
        width = max(len(f.what) for f in findings)
        for f in findings:
            fix = f": {f.fix}" if f.fix else ""
            print(f"{f.verdict:<4}  {f.what.ljust(width)}  {f.text}{fix}")
    return 1 if any(f.verdict == "FAIL" for f in findings) else 0


def version(argv: list[str]) -> int:
    """`llumnix version`: of llumnix, vLLM, Ray and Python here."""
    parser = argparse.ArgumentParser(prog="llumnix version")
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args(argv)
    if not args.json:
        print(versions_line())
        return 0
    from llumnix import __version__

    found = {what: installed(what) for what in SUPPORTED}
    print_json({
        "llumnix": __version__,
        "commit": commit(),
        **{what: None if one is None else one[1] for what, one in found.items()},
        "python": platform.python_version(),
    })  # fmt: skip
    return 0


def look(workers: int | None = None) -> Iterable[Finding]:
    """All findings. A check that fails in itself is one, too. `workers`: the processes that will
    compute here, if the user says."""
    for check in CHECKS:
        try:
            found = _shared_memory(workers) if check is _shared_memory else check()
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            found = _warn(check.__name__.strip("_"), f"could not be looked at ({error})", "")
        if found is not None:
            yield found


def _ok(what: str, text: str) -> Finding:
    return Finding(what=what, verdict="OK", text=text)


def _warn(what: str, text: str, fix: str) -> Finding:
    return Finding(what=what, verdict="WARN", text=text, fix=fix)


def _fail(what: str, text: str, fix: str) -> Finding:
    return Finding(what=what, verdict="FAIL", text=text, fix=fix)


# -- checks


def _versions() -> Finding:
    try:
        check_versions()
    except UsageError as error:
        text, _, fix = str(error).partition(": ")
        return _fail("versions", text, fix)
    return _ok("versions", versions_line())


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= FILES_WANTED:
        return _ok("open files", f"up to {soft}")
    fix = f"`ulimit -n {FILES_WANTED * 4}`, or LimitNOFILE in the systemd unit"
    return _warn("open files", f"up to {soft} (at most {hard})", fix)


def _shared_memory(workers: int | None = None) -> Finding:
    free, gpus = shutil.disk_usage("/dev/shm").free, len(_gpu_devices())
    workers = workers or gpus or INSTANCES
    chunk = int(os.environ.get("VLLM_MQ_MAX_CHUNK_BYTES_MB") or STEPS_CHUNK_MB)
    rings = [RING_CHUNKS * mb * 2**20 for mb in (chunk, ANSWERS_CHUNK_MB)]
    # Instances of several workers share the ring of steps, so one a worker is the most there is.
    most = OBJECTS_BYTES + workers * sum(rings) + (NCCL_BYTES if min(workers, gpus) > 1 else 0)
    text = (
        f"{free / GB:.2f} GB free in /dev/shm, of which {workers} workers may take {most / GB:.2f}"
    )
    size = math.ceil(most / GB)
    fix = f"--shm-size {size}g for Docker, a memory-backed emptyDir of {size}Gi for Kubernetes"
    if free <= max(rings):
        text += f"; vLLM starts no worker where less than {max(rings) / GB:.2f} GB are free"
        return _fail("shared memory", text, fix)
    return _ok("shared memory", text) if free >= most else _warn("shared memory", text, fix)


def _temporary_folder() -> Finding:
    folder = tempfile.gettempdir()
    if not os.access(folder, os.W_OK):
        fix = "set TMPDIR to a short folder of yours"
        return _fail("temporary folder", f"{folder} is not writable", fix)
    if len(os.fsencode(folder)) + SOCKETS_BELOW > SOCKET_NAME_MAX:
        if os.access("/tmp", os.W_OK):
            return _ok("temporary folder", f"{folder} is too long for sockets; /tmp is taken")
        fix = "set TMPDIR to a short folder of yours"
        return _fail("temporary folder", f"{folder} is too long for names of sockets", fix)
    return _ok("temporary folder", folder)


def _cache_folder() -> Finding:
    try:
        folder = cache_folder()
    except UsageError as error:  # There is no home folder.
        text, _, fix = str(error).partition(": ")
        return _warn("cache folder", text, fix)
    there = next(f for f in (folder, *folder.parents) if f.exists())
    if os.access(there, os.W_OK):
        return _ok("cache folder", str(folder))
    fix = "set LLUMNIX_CACHE to a folder of yours, or its logs of lost instances are not kept"
    return _warn("cache folder", f"{folder} cannot be written", fix)


def _host_name() -> Finding:
    name = socket.gethostname()
    try:
        addresses = sorted({str(a[4][0]) for a in socket.getaddrinfo(name, None)})
    except OSError:
        fix = f"add `127.0.0.1 {name}` to /etc/hosts"
        return _warn("host name", f"{name} has no address", fix)
    if all(is_loopback(a) for a in addresses):
        return _ok("host name", f"{name} is {', '.join(addresses)}: fit for one host alone")
    return _ok("host name", f"{name} is {', '.join(addresses)}")


def _ray_address() -> Finding | None:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return None
    fix = f"give --ray-address {address} if that cluster is meant, else unset it"
    return _warn("RAY_ADDRESS", f"{address} is set, and `llumnix serve` does not go by it", fix)


def _proxies() -> Finding | None:
    names = sorted(n for n in os.environ if n.lower() in ("http_proxy", "https_proxy", "all_proxy"))
    if not names:
        return None
    text = f"{', '.join(names)} set: commands go past it to loopback, models are fetched through it"
    return _ok("proxies", text)


def _cores() -> Finding:
    cores, share = len(os.sched_getaffinity(0)), _cgroup("cpu.max")
    limit = ""
    if share is not None and share.split()[0] != "max":
        quota, period = map(int, share.split())
        cores = min(cores, max(1, quota // period))
        limit = " by the cgroup"
    if cores >= 4:
        return _ok("cores", f"{cores}{limit}")
    return _warn(
        "cores",
        f"{cores}{limit}: an engine on GPUs keeps one busy, and the HTTP process another",
        "give it one core an instance, and two",
    )


def _memory() -> Finding:
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    limit = _cgroup("memory.max")
    if limit is None or limit == "max" or int(limit) / GB >= host:
        text, memory = f"{host:.0f} GB", host
    else:
        memory = int(limit) / GB
        text = f"{memory:.1f} GB by the cgroup, of the host's {host:.0f}"
    if memory >= MEMORY_WANTED_GB:
        return _ok("memory", text)
    return _warn("memory", text, "give it a GB a process and room for the weights")


def _gpus() -> Finding:
    program = shutil.which("nvidia-smi")
    if program is None:
        devices = len(_gpu_devices())
        if devices:
            fix = "install the driver's tools, or give the container the `utility` capability"
            return _warn("GPUs", f"{devices} devices, but no nvidia-smi", fix)
        return _ok("GPUs", "none: instances run on the CPU")
    listed = _run([program, "-L"])
    count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    if listed.returncode or not count:
        said = " ".join((listed.stderr or listed.stdout).split())[:200]
        return _fail(
            "GPUs", f"nvidia-smi sees none ({said})", "mend the driver, or --gpus of Docker"
        )
    if count == 1:
        return _ok("GPUs", "1")
    peers = _run([program, "topo", "-p2p", "r"]).stdout
    rows = (line.split() for line in peers.splitlines())
    # A row for each GPU; below them stands what the words mean.
    words = {word for row in rows if row and row[0].startswith("GPU") for word in row}
    if words & {"NS", "CNS", "GNS", "TNS", "DR"}:
        fix = "KV then goes through the host's memory; see ACS and IOMMU in the host's BIOS"
        return _warn("GPUs", f"{count}, of which some cannot reach each other directly", fix)
    return _ok("GPUs", f"{count}, each reaches each")


def _gpu_devices() -> list[Path]:
    return list(Path("/dev").glob("nvidia[0-9]*"))


def _service_manager() -> Finding | None:
    unit = Path("/proc/1/comm").read_text().strip()
    if unit != "systemd" or not os.environ.get("INVOCATION_ID"):
        return None
    return _ok("systemd", "TimeoutStopSec must exceed --shutdown-timeout; KillMode=mixed suits")


def _run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, capture_output=True, text=True, timeout=NVIDIA_TIMEOUT_S, check=False
    )


def _cgroup(file: str) -> str | None:
    """What limits this process, by cgroup v2; None where nothing is known."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        path = next(line[3:] for line in lines if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    root = Path("/sys/fs/cgroup")
    for folder in (root / path.lstrip("/"), root):
        try:
            return (folder / file).read_text().strip()
        except OSError:
            continue
    return None


CHECKS: tuple[Callable[[], Finding | None], ...] = (
    _versions,
    _open_files,
    _shared_memory,
    _temporary_folder,
    _cache_folder,
    _host_name,
    _ray_address,
    _proxies,
    _cores,
    _memory,
    _gpus,
    _service_manager,
)
