"""The controller's process, without Ray."""

import os
from pathlib import Path
from typing import Any

import pytest

from llumnix.cluster.controller import Controller
from llumnix.core.settings import SchedulerSettings


def test_a_bug_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray starts another then; an exception alone would leave nobody that decides."""
    controller = Controller([f"ipc://{tmp_path}/controller"], SchedulerSettings())
    codes: list[int] = []

    def broken(*_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(controller._scheduler, "handle", broken)
    monkeypatch.setattr(os, "_exit", codes.append)
    controller.run()
    assert codes == [1]
