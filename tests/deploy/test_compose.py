"""compose.yaml says what Compose knows, and what it mounts is there. No Docker runs here."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llumnix.frontend.arguments import SHUTDOWN_TIMEOUT_S
from llumnix.frontend.http.server import HTTP_CLOSE_TIMEOUT_S
from support.managed import seconds

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
COMPOSE = DEPLOY / "compose" / "compose.yaml"


def compose() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text())


def test_compose_knows_every_field() -> None:
    pytest.importorskip("check_jsonschema", reason="needs requirements/deploy.lock")
    words = ["--builtin-schema", "vendor.compose-spec", COMPOSE]
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_everything_that_is_mounted_or_built_from_is_there() -> None:
    whole = compose()
    for service in whole["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            there = (COMPOSE.parent / source).exists() if "/" in source else whole["volumes"]
            assert there, source
            assert "/" in source or source in whole["volumes"]
        assert set(service.get("secrets", [])) <= set(whole["secrets"])
    build = whole["services"]["llumnix"]["build"]
    assert (COMPOSE.parent / build["context"] / build["dockerfile"]).is_file()


def test_nothing_is_reached_from_other_machines() -> None:
    for service in compose()["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_a_stop_has_the_time_that_running_requests_have() -> None:
    grace_s = seconds(compose()["services"]["llumnix"]["stop_grace_period"])
    assert grace_s >= SHUTDOWN_TIMEOUT_S + HTTP_CLOSE_TIMEOUT_S + 20


def test_prometheus_reads_its_configuration() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool (Debian's package prometheus)")
    file = DEPLOY / "prometheus" / "prometheus.yml"
    done = subprocess.run(
        [promtool, "check", "config", "--syntax-only", file],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
