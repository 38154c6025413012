"""scripts/setup_next.py: the next vLLM's Python files over the kernels of the one that is here."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "setup_next.py"
LOOK = """
import importlib.metadata, pathlib, vllm, beside
files = sorted(p.name for p in pathlib.Path(vllm.__file__).parent.iterdir() if p.suffix != '')
print(importlib.metadata.version('vllm'), vllm.NUMBER, *files)
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script for a repository of its own, with a vLLM of its own in a .venv of its own."""
    spec = importlib.util.spec_from_file_location("setup_next", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    site = tmp_path / "site"
    for name in ("vllm/__init__.py", "vllm/_C.so", "beside.py"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text("NUMBER = 1")
    (tmp_path / "next.lock").write_text("vllm==2.0.0\n")
    monkeypatch.setattr(module, "LOCK", tmp_path / "next.lock")
    monkeypatch.setattr(module, "NEXT", tmp_path / "next")
    monkeypatch.setattr(module, "STAMP", tmp_path / "next" / "stamp")
    found = SimpleNamespace(origin=str(site / "vllm" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(module.site, "getsitepackages", lambda: [str(site)])
    return module


def pip(monkeypatch: pytest.MonkeyPatch, script: Any, status: int = 0) -> list[list[str]]:
    """Stands in for it: brings a wheel for GPUs. Returns what it was called with."""
    calls: list[list[str]] = []

    def run(words: list[str], **_: Any) -> Any:
        calls.append(words)
        wheel = Path(words[words.index("--dest") + 1]) / "vllm-2.0.0-cp38-abi3-linux_x86_64.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("vllm/__init__.py", "NUMBER = 2")
            archive.writestr("vllm/_C.so", "for a GPU")
            archive.writestr("vllm/_flash.so", "for a GPU")
            archive.writestr("vllm-2.0.0.dist-info/METADATA", "Name: vllm\nVersion: 2.0.0\n\nText")
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run))
    return calls


def test_its_python_sees_the_next_vllm_with_the_kernels_of_this_one(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = pip(monkeypatch, script)
    assert script.main() == 0
    python = [script.NEXT / "bin" / "python", "-c", LOOK]
    seen = subprocess.run(python, capture_output=True, text=True, check=True).stdout.split()
    assert seen == ["2.0.0+cpu", "2", "_C.so", "__init__.py"]
    (kernel,) = script.NEXT.rglob("_C.so")
    assert kernel.read_text() == "NUMBER = 1"
    assert script.main() == 0
    assert len(calls) == 1, "nothing is to be done the second time"
    script.LOCK.write_text("vllm==2.0.1\n")
    assert script.main() == 0
    assert len(calls) == 2
    assert calls[0][:3] == [sys.executable, "-m", "pip"]
    assert "--no-deps" in calls[0]


def test_what_could_not_be_downloaded_is_not_taken_for_done(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = pip(monkeypatch, script, status=1)
    assert [script.main(), script.main()] == [1, 1]
    assert len(calls) == 2


def test_without_a_vllm_it_says_what_to_run(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert script.main() == 2
    assert "run `make setup-dev`" in capsys.readouterr().err
