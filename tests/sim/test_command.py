"""What `llumnix simulate` refuses, and what it finds."""

import json
from pathlib import Path
from typing import Any

import pytest

from llumnix.errors import UsageError
from llumnix.sim.command import simulate


def trace(path: Path, rows: int, answer: int = 20) -> str:
    """A file of requests that come every 0.3 s, each of its own length."""
    lines = "".join(f"{0.3 * n:.1f},{50 + n},{answer}\n" for n in range(rows))
    path.write_text("arrival_s,input_tokens,output_tokens\n" + lines)
    return str(path)


def said_by(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    """The JSON of a run on this process."""
    assert simulate([*args, "--json", "--processes", "1"]) == 0
    return json.loads(capsys.readouterr().out)


def test_seeds_that_would_be_one_run_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trace(tmp_path / "t.csv", 40)
    few = ["--trace", path, "--seeds", "3"]
    for more in ([], ["--requests", "40"], ["--rate", "2"], ["--sweep", "rate=1:3:1"]):
        with pytest.raises(UsageError, match=r"seeds 0 and 1 are the same run.*40 of the 40 req"):
            simulate([*few, *more])
    with pytest.raises(UsageError, match="are the same run"):
        simulate([*few, "--requests", "39"])  # Two places for three seeds.
    for drawn in (["--cv", "1"], ["--high-share", "0.5"], ["--requests", "10"]):
        runs = said_by(capsys, *few, *drawn)["runs"]
        assert len({json.dumps(run["metrics"]) for run in runs}) == 3
    # Faults are drawn, too, and a single seed is compared with nothing.
    assert len(said_by(capsys, *few, "--faults", "client=3")["runs"]) == 3
    assert len(said_by(capsys, "--trace", path)["runs"]) == 1


def test_rows_at_random_are_another_run_for_each_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.csv"
    path.write_text("input_tokens,output_tokens\n" + "".join(f"{50 + n},9\n" for n in range(40)))
    found = said_by(capsys, "--trace", str(path), "--rate", "3", "--seeds", "3")["runs"]
    assert len({json.dumps(run["metrics"]) for run in found}) == 3
