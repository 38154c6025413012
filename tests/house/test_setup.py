"""scripts/setup.sh says in one line what it cannot do, before it does anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("bash", "dirname", "cat", "cut", "sha256sum", "rm", "mkdir")


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The script in a folder of its own; `bin` is all that it finds."""
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in NEEDED:
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    program(programs, "uname", "echo Linux x86_64")
    return tmp_path


def run(copy: Path, **env: str) -> tuple[int, str]:
    done = subprocess.run(
        [copy / "bin" / "bash", copy / "scripts" / "setup.sh"],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": str(copy / "bin"), **env},
        check=False,
    )
    return done.returncode, done.stderr.strip()


def made(copy: Path, python: str) -> None:
    """A .venv whose python does that."""
    (copy / ".venv" / "bin").mkdir(parents=True)
    program(copy / ".venv" / "bin", "python", python)


def test_another_platform_is_refused_before_a_tool_that_it_lacks_is_used(copy: Path) -> None:
    program(copy / "bin", "uname", "echo Darwin arm64")
    (copy / "bin" / "sha256sum").unlink()
    status, said = run(copy)
    assert status == 2
    assert said.startswith("setup: the locked CPU set-up is for Linux on x86-64, this is Darwin")


def test_no_python_that_is_new_enough(copy: Path) -> None:
    status, said = run(copy)
    assert (status, said) == (2, "setup: needs Python 3.11 or newer; set PYTHON to its path")


def test_a_venv_that_could_not_be_made_does_not_stay(copy: Path) -> None:
    program(
        copy / "bin",
        "python3.11",
        '[ "$1" = -m ] && { mkdir -p .venv/bin; echo "no ensurepip" >&2; exit 1; }; exit 0',
    )
    for _ in range(2):
        status, said = run(copy)
        assert status == 2
        assert "no ensurepip\nsetup: python3.11 cannot make .venv" in said
        assert "apt install python3-venv" in said
        assert not (copy / ".venv").exists()


def test_an_old_venv_is_not_taken_for_a_new_one(copy: Path) -> None:
    made(copy, "exit 1")
    status, said = run(copy)
    assert status == 2
    assert said == "setup: .venv has no Python 3.11 or newer; remove .venv and run this again"


def test_a_venv_without_pip_is_named(copy: Path) -> None:
    made(copy, f'[ "$1" = -m ] && exit 1; exec {sys.executable} "$@"')
    status, said = run(copy)
    assert (status, said) == (2, "setup: .venv has no pip; remove .venv and run this again")


def test_without_torch_both_errors_are_shown_and_the_way_out(copy: Path) -> None:
    made(
        copy,
        '[ "$*" = "-m pip --version" ] && exit 0\n'
        '[[ "$*" = *--index-url* ]] && { echo "second: refused" >&2; exit 1; }\n'
        '[ "$2" = pip ] && { printf "noise\\nfirst: no such version\\n" >&2; exit 1; }\n'
        '[[ "$2" = *version_info* ]]',
    )
    status, said = run(copy, TORCH_INDEX="https://example.org/cpu", HOME=os.environ["HOME"])
    assert status == 2
    assert "second: refused" in said
    assert "from pip's own index: first: no such version" in said
    assert said.endswith("set TORCH_INDEX to an index that has it (tried: https://example.org/cpu)")
    assert "noise" not in said
