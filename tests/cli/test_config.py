"""`llumnix config`."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.test_cli import Server
from llumnix.cli import main


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def test_check_prints_what_is_not_a_default_and_where_from(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setenv("LLUMNIX_MAX_MODEL_LEN", "96")
    words = ["config", "check", str(tiny_model), "--api-key", "sesame", "--instances", "3"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["FLAG"] == ["VALUE", "FROM"]
    assert rows["instances"] == ["3", "command", "line"]
    assert rows["max-model-len"] == ["96", "LLUMNIX_MAX_MODEL_LEN"]
    assert rows["api-key"] == ["***", "command", "line"]
    assert rows["host"] == ["127.0.0.1", "llumnix"]
    assert "sesame" not in str(lines)
    assert main([*words, "--json"]) == 0
    out = capsys.readouterr().out  # vLLM, imported by other tests, may have its lines there.
    settings = json.loads(out[out.index("{\n") :])["settings"]
    assert {row["name"]: row["value"] for row in settings}["instances"] == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--instances", "0"], "--instances 0: must be 1 or more"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml cannot be read"),
        (["--max-model-len", "999999"], "vLLM refuses these settings"),
    ],
)
def test_what_serve_would_refuse_is_status_2_in_the_same_line(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    pytest.importorskip("vllm")
    assert main(["config", "check", str(tiny_model), *flags]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"llumnix: error: {said}")


def test_show_prints_what_a_server_was_started_with(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.body = {"settings": [{"name": "port", "value": 81, "source": "f.yaml"}]}
    assert main(["config", "show", "--url", server.url]) == 0
    assert capsys.readouterr().out == "FLAG  VALUE  FROM\nport  81     f.yaml\n"
    assert server.asked[0][:2] == ("GET", "/llumnix/v1/config")


def test_config_alone_says_what_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 2
    assert "say `check` or `show`" in capsys.readouterr().err
    assert main(["config", "--help"]) == 0
    assert main(["config", "check", "--help"]) == 0
