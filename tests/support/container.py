"""An image, built and run without a container engine's daemon or a registry of images: buildah
builds it in a chroot, from a base that mmdebstrap makes. A container is namespaces of its own, the
image's files read-only, and its user, command and variables."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.server import descendants

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates,tini"
RUN = """
root=$1; model=$2; shift 2
mount --make-rprivate /
mount --bind $root $root
mkdir -p $root/model
mount -t proc proc $root/proc
mount -t sysfs -o ro sysfs $root/sys
mount -t tmpfs -o mode=755 tmpfs $root/dev
for device in null zero full random urandom; do
    touch $root/dev/$device
    mount --bind /dev/$device $root/dev/$device
done
mkdir $root/dev/shm
mount -t tmpfs -o size=2g,mode=1777 tmpfs $root/dev/shm
mount -t tmpfs -o mode=1777 tmpfs $root/tmp
mount -t tmpfs -o mode=770,uid=2000,gid=0 tmpfs $root/var/cache/llumnix
mount --bind $model $root/model
mount -o remount,bind,ro $root/model
mount -o remount,bind,ro $root
exec chroot --userspec=2000:0 --groups=0 $root setpriv --no-new-privs "$@"
"""
"""What a container engine does before the first process starts. The network is the machine's."""


def _run(words: list[str], timeout_s: float) -> str:
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.strip()


class Images:
    """buildah's, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._words = ["buildah", "--root", str(folder / "store")]
        self._words += ["--runroot", str(folder / "run"), "--storage-driver", "vfs"]

    def do(self, *words: str, timeout_s: float = 600) -> str:
        """One of buildah's commands; what it printed."""
        return _run([*self._words, *words], timeout_s)

    def make_base(self, name: str) -> None:
        """Debian with Python, in place of the image that is named in the Dockerfile."""
        archive = self._folder / "base.tar"
        sources = Path("/etc/apt/sources.list.d/debian.sources")
        words = ["mmdebstrap", "--variant=minbase", f"--include={PACKAGES}", "stable", str(archive)]
        if sources.is_file():
            words[-2:] = ["", str(archive), str(sources)]
        self._folder.mkdir(exist_ok=True)
        _run(words, 600)
        container = self.do("from", "scratch")
        self.do("add", "--quiet", container, str(archive), "/")
        self.do("commit", "--quiet", "--rm", container, name)
        archive.unlink()

    def build(self, dockerfile: Path, name: str, base: str) -> None:
        """From the project's root. What pip and apt are told on this machine holds inside."""
        mounts = [f"--volume={path}:{path}:ro" for path in _settings_of_pip_and_apt()]
        words = ["--isolation", "chroot", "--build-arg", f"BASE={base}", *mounts]
        self.do("bud", *words, "-f", str(dockerfile), "-t", name, ".", timeout_s=1200)

    def config(self, name: str) -> dict[str, Any]:
        """What the image says of how it is run."""
        return json.loads(self.do("inspect", "--type", "image", name))["OCIv1"]["config"]

    @contextlib.contextmanager
    def files(self, name: str) -> Iterator[Path]:
        """A folder with the image's files."""
        container = self.do("from", name)
        try:
            yield Path(self.do("mount", container))
        finally:
            self.do("umount", container)
            self.do("rm", container)


def _settings_of_pip_and_apt() -> list[Path]:
    """Files and folders that say where packages come from."""
    found = [Path("/etc/apt"), Path("/etc/ssl/certs")]
    for name in ("/etc/pip.conf", "/etc/xdg/pip", Path.home() / ".config" / "pip"):
        found.append(Path(name))
    words = (
        subprocess.run(
            ["python3", "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
        )
        .stdout.replace("file://", "")
        .split("'")
    )
    named = [Path(word) for line in words for word in line.split() if word.startswith("/opt/")]
    found += {Path(*path.parts[:3]) for path in named}
    return [path for path in found if path.exists()]


class Container:
    """One that runs."""

    def __init__(
        self, files: Path, config: dict[str, Any], model: Path, args: list[str], log: Path
    ):
        assert config["User"] == "2000:0"
        words = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
        words += ["sh", "-euc", RUN, "sh", str(files), str(model)]
        words += [*config["Entrypoint"], *args]
        env = dict(pair.split("=", 1) for pair in config["Env"])
        with log.open("w") as out:
            self.process = subprocess.Popen(
                # The outer programs are this machine's.
                [shutil.which(words[0]) or words[0], *words[1:]],
                env={**env, "HF_HUB_OFFLINE": "1"},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _first(self) -> int:
        """Its first process, by this machine's number."""
        pid = self.process.pid
        (first,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(first)

    def users(self) -> set[int]:
        """Whose its processes are."""
        first = self._first()
        return {Path(f"/proc/{pid}").stat().st_uid for pid in {first, *descendants(first)}}

    def stop(self, timeout_s: float) -> int:
        """As an engine stops it: SIGTERM to its first process. Returns the exit status."""
        os.kill(self._first(), signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
