"""`make test` runs each test once, in two parts, and fails if either does."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTEST = """
import json, pathlib, sys
assert sys.argv[1:3] == ["-m", "pytest"], sys.argv
asked = sys.argv[3:]
print(json.dumps(asked), file=open("asked", "a"))
sys.exit(int(pathlib.Path("first" if "-n" in asked else "second").read_text()))
"""
"""In pytest's stead: notes its arguments, and ends with the status of its part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    status: int
    said: list[str]  # lines
    asked: list[list[str]]  # the arguments of each pytest


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The script in a folder of its own, over that pytest."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "test.sh", tmp_path / "scripts")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable}{PYTEST}")
    python.chmod(0o755)
    return tmp_path


def run(copy: Path, *words: str, first: int = 0, second: int = 0) -> Ran:
    """Runs the script; the first part and the second end with these statuses."""
    (copy / "first").write_text(str(first))
    (copy / "second").write_text(str(second))
    script = copy / "scripts" / "test.sh"
    done = subprocess.run(
        [script, *words], capture_output=True, text=True, timeout=60, check=False, cwd="/"
    )
    asked = [json.loads(line) for line in (copy / "asked").read_text().splitlines()]
    return Ran(status=done.returncode, said=done.stdout.splitlines(), asked=asked)


def test_each_test_is_in_one_of_the_two_parts(copy: Path) -> None:
    """What the first leaves out is all that the second runs, and it is there."""
    ran = run(copy)
    assert ran.status == 0
    first, second = ran.asked
    assert [word for word in first if "tests/" in word] == [f"--ignore={one}" for one in second]
    assert second
    assert all((ROOT / one).exists() for one in second)


@pytest.mark.parametrize(("first", "second", "failed"), [(1, 0, 1), (0, 2, 1), (1, 1, 2)])
def test_a_part_that_fails_hides_nothing_of_the_other_and_fails_the_whole(
    copy: Path, first: int, second: int, failed: int
) -> None:
    ran = run(copy, first=first, second=second)
    assert ran.status == 1
    assert len(ran.asked) == 2
    assert [line.startswith("== FAILED: ") for line in ran.said[-failed:]] == [True] * failed
    assert sum("FAILED" in line for line in ran.said) == failed


def test_arguments_go_to_one_pytest_as_they_are(copy: Path) -> None:
    ran = run(copy, "tests/core", "-k", "a and b", second=5)
    assert ran.status == 5
    assert ran.asked == [["tests/core", "-k", "a and b"]]


def test_the_makefile_runs_it_with_the_users_arguments() -> None:
    text = (ROOT / "Makefile").read_text()
    assert "\ntest: setup-dev\n\t@scripts/test.sh $(ARGS)\n" in text
