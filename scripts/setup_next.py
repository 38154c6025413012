"""Makes .venv-next: the next vLLM's Python files over the compiled CPU kernels of .venv's vLLM.

Of the next vLLM (requirements/next.lock) there is no CPU build yet, and its wheel has kernels for
GPUs alone. Its Python files run on the CPU kernels of the version before. So tests in .venv-next
prove what llumnix relies on in vLLM's Python; of the next version's kernels, of CUDA graphs and of
the torch that it wants they prove nothing.

Run it with .venv's Python, after `make setup-dev`. It downloads 340 MB, and does nothing when
nothing is to be done.
"""

import hashlib
import importlib.util
import shutil
import site
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements" / "next.lock"
NEXT = ROOT / ".venv-next"
STAMP = NEXT / ".llumnix-next"
GPU_ONLY = (".so", "/vllm-rs")


def main() -> int:
    """Returns the exit status."""
    installed = importlib.util.find_spec("vllm")
    if installed is None or installed.origin is None:
        print("setup-next: .venv has no vLLM; run `make setup-dev`", file=sys.stderr)
        return 2
    kernels = Path(installed.origin).parent
    parts = [Path(__file__).read_bytes(), LOCK.read_bytes(), str(kernels).encode()]
    wanted = hashlib.sha256(b"\0".join(parts)).hexdigest()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return 0
    shutil.rmtree(NEXT, ignore_errors=True)
    venv.create(NEXT, symlinks=True)
    (here,) = NEXT.glob("lib/python3.*/site-packages")
    with tempfile.TemporaryDirectory() as folder:
        print("setup-next: downloading vLLM's next version (340 MB)", flush=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        words = ["download", "--no-deps", "--only-binary=:all:", "--dest", folder, "-r", str(LOCK)]
        if subprocess.run([*pip, *words], check=False).returncode:
            return 1  # pip has said why.
        for wheel in Path(folder).glob("*.whl"):
            _unpack(wheel, here)
    for kernel in kernels.rglob("*.so"):
        (here / "vllm" / kernel.relative_to(kernels)).symlink_to(kernel)
    _name_as_cpu_build(here)
    below = f"import site; site.addsitedir({site.getsitepackages()[0]!r})\n"
    (here / "below.pth").write_text(below)
    STAMP.write_text(wanted)
    print("setup-next: done")
    return 0


def _unpack(wheel: Path, into: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        if wheel.name.startswith("vllm-"):
            names = [name for name in names if not name.endswith(GPU_ONLY)]
        archive.extractall(into, names)


def _name_as_cpu_build(here: Path) -> None:
    """vLLM takes itself for a CPU build if its version says so."""
    (path,) = here.glob("vllm-*.dist-info/METADATA")
    head, _, rest = path.read_text().partition("\nVersion: ")
    number, _, rest = rest.partition("\n")
    path.write_text(f"{head}\nVersion: {number}+cpu\n{rest}")


if __name__ == "__main__":
    raise SystemExit(main())
