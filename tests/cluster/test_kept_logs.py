"""What an engine logged outlives it, within bounds."""

from pathlib import Path

import pytest

from llumnix.cluster import kept_logs


def test_the_ends_of_the_logs_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kept_logs, "FILE_BYTES_MAX", 10)
    logs = tmp_path / "ray" / "session_latest" / "logs"
    logs.mkdir(parents=True)
    (logs / "worker-1.err").write_text("long before\nthe cause\n")
    (logs / "worker-1.out").write_text("")
    (logs / "a.socket").write_text("x")
    kept = kept_logs.keep_logs(tmp_path / "ray", tmp_path / "cache")
    assert {f.name: f.read_text() for f in kept.iterdir()} == {"worker-1.err": "the cause\n"}
    assert kept.stat().st_mode & 0o077 == 0


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for day in range(10, 20):
        (tmp_path / "logs" / f"2020-01-{day}T00-00-00").mkdir(parents=True)
    kept = kept_logs.keep_logs(tmp_path / "ray", tmp_path)
    left = sorted((tmp_path / "logs").iterdir())
    assert len(left) == kept_logs.KEPT_MAX
    assert left[-1] == kept
    assert left[-2].name == "2020-01-19T00-00-00"
