"""What `llumnix serve` says and where it listens, before any engine is there."""

import subprocess
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from llumnix.cluster import serve as serving
from llumnix.cluster.addresses import Addresses
from llumnix.cluster.first_look import first_look
from llumnix.cluster.start import Start, curl_line
from llumnix.config import DeploymentConfig
from llumnix.frontend.arguments import refuse_strangers


def listening(*words: str) -> Namespace:
    """The arguments as `serve` has them after its first look."""
    seen = first_look(["serve", *words])
    refuse_strangers(seen, keyed=False, insecure=False)
    return seen


def test_it_listens_once_and_elsewhere_if_the_whole_command_line_says_so() -> None:
    start = Start()
    try:
        start.listen(listening("--port", "0"))
        first = start.listener
        assert first is not None
        url = first.url
        start.listen(listening("--port", "0", "--instances", "3"))
        assert start.listener is first
        start.say("loading vLLM")
        assert httpx.get(url).json()["phase"] == "loading vLLM"
        start.listen(listening("--port", "0", "--host", "localhost"))
        assert start.listener is not first
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
    finally:
        start.close()
    assert start.listener is None


def printed(keys: bool, url: str = "http://0.0.0.0:8000", *, generates: bool = True) -> list[str]:
    """The words of the line to try, as a shell with VLLM_API_KEY or KEY passes them on."""
    args: Any = SimpleNamespace(access=SimpleNamespace(keyed=keys), uds=None)
    line = curl_line(args, url, "m", generates=generates)
    words = []
    for environment in ({"VLLM_API_KEY": "k"}, {"KEY": "k"}):
        shell = line.replace("curl", r"printf '%s\n'", 1)
        done = subprocess.run(shell, shell=True, env=environment, capture_output=True, text=True)
        words.append(done.stdout.splitlines())
    assert words[0] == words[1]
    return words[0]


def test_the_line_to_try_has_the_key_from_either_variable() -> None:
    assert printed(True)[:3] == [
        "http://127.0.0.1:8000/v1/chat/completions", "-H", "Authorization: Bearer k",
    ]  # fmt: skip
    assert not any("Bearer" in word for word in printed(False))
    assert printed(True, "http://[::]:80", generates=False) == [
        "http://[::1]:80/v1/models", "-H", "Authorization: Bearer k",
    ]  # fmt: skip


async def test_what_fails_while_the_parts_are_made_leaves_none_of_them_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from llumnix.engine.launch import EngineLaunch
    from llumnix.frontend import client, llm

    done: list[str] = []

    class Client:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.start = lambda: done.append("started")
            self.close = lambda: done.append("closed")

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no tokenizer")

    monkeypatch.setattr(EngineLaunch, "of", lambda *_, **__: None)
    monkeypatch.setattr(client, "FleetClient", Client)
    monkeypatch.setattr(llm, "FleetLLM", fails)
    args: Any = SimpleNamespace(
        access=SimpleNamespace(keyed=False),
        disable_log_stats=True,
        enable_log_requests=False,
        aggregate_engine_logging=False,
    )
    command: Any = SimpleNamespace(args=args, vllm_config=None, deployment=DeploymentConfig())
    log: Any = SimpleNamespace(close=lambda: done.append("log closed"))
    addresses = Addresses.make(None)
    with pytest.raises(RuntimeError):
        await serving._run(command, log, addresses, Start())
    addresses.remove()
    assert done == ["started", "closed", "log closed"]


def test_where_the_logs_of_lost_instances_are_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLUMNIX_CACHE", str(tmp_path / "cache"))
    serving._keep_logs(tmp_path / "ray")
    assert f"what it logged is in {tmp_path / 'cache' / 'logs'}" in capsys.readouterr().out
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLUMNIX_CACHE", str(tmp_path / "file"))
    serving._keep_logs(tmp_path / "ray")
    assert "could not be kept" in capsys.readouterr().out
