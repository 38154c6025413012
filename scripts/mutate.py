"""Puts the faults of tests/house/mutations.toml into a copy of the code, one at a time. Tests that
are there for a fault must fail with it, and pass without.

    python scripts/mutate.py [NAME...]

It prints a line for each fault, and exits with 1 if one survives or no longer applies. The checkout
stays as it is.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "tests" / "house" / "mutations.toml"
COPIED = ("src", "tests", "scripts", "benchmarks")
"""What tests import or read, beside pyproject.toml."""
TIMEOUT_S = 900
FAILED = 1
"""pytest's exit status if tests ran and some failed. With any other status none has noticed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """A fault: `old` becomes `new` in `file`."""

    name: str
    file: str
    old: str
    new: str
    harm: str
    noticed_by: list[str]  # ids of tests, at least one of which fails

    def why_stale(self, root: Path) -> str | None:
        """Why it does not apply to the code in `root`; None if it does."""
        path = root / self.file
        if not path.is_file():
            return f"{self.file} is not there"
        count = path.read_text().count(self.old)
        return None if count == 1 else f"its old lines stand {count} times in {self.file}"


def mutations(rows: Path = ROWS) -> list[Mutation]:
    return [Mutation(**row) for row in tomllib.loads(rows.read_text())["mutation"]]


def copy_code(to: Path) -> None:
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", ".hypothesis")
    for name in COPIED:
        shutil.copytree(ROOT / name, to / name, ignore=skipped)
    shutil.copy(ROOT / "pyproject.toml", to)


def status_of(tests: Sequence[str], copy: Path) -> int | None:
    """pytest's exit status; None if it did not end in time."""
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    # The copy stands before the installed package, also in the processes that tests start.
    env = os.environ | {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    log = copy / "last.log"
    with log.open("w") as out:
        try:
            return subprocess.run(
                command, cwd=copy, env=env, stdout=out, stderr=out, timeout=TIMEOUT_S, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return None


def outcome(mutation: Mutation, copy: Path) -> str:
    """`noticed`, or what is wrong."""
    if (why := mutation.why_stale(copy)) is not None:
        return f"STALE: {why}"
    path = copy / mutation.file
    before = path.read_text()
    path.write_text(before.replace(mutation.old, mutation.new))
    try:
        status = status_of(mutation.noticed_by, copy)
    finally:
        path.write_text(before)
    if status == FAILED:
        return "noticed"
    return "SURVIVED" if status == 0 else f"UNCLEAR: pytest ended with {status}"


def main(argv: Sequence[str]) -> int:
    """Tries the faults; returns the exit status."""
    parser = argparse.ArgumentParser(description="Puts faults in, and sees whether tests notice.")
    parser.add_argument("name", nargs="*", help="the faults to try (default: all)")
    names = parser.parse_args(argv).name
    known = mutations()
    if unknown := set(names) - {m.name for m in known}:
        parser.error(f"{ROWS.name} has no {', '.join(sorted(unknown))}")
    chosen = [m for m in known if not names or m.name in names]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_code(copy)
        tests = sorted({test for m in chosen for test in m.noticed_by})
        if status_of(tests, copy) != 0:
            print((copy / "last.log").read_text()[-4000:], file=sys.stderr)
            print("Tests fail without any fault, so they show nothing.", file=sys.stderr)
            return 1
        lines = []
        for mutation in chosen:
            began_s = time.monotonic()
            lines.append(outcome(mutation, copy))
            took_s = time.monotonic() - began_s
            print(f"{mutation.name:32} {took_s:5.0f} s  {lines[-1]}", flush=True)
    return int(any(line != "noticed" for line in lines))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
