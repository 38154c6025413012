"""API keys stay with the process that speaks HTTP."""

import pickle
from types import SimpleNamespace

from llumnix.cluster.supervision.runs import EngineLauncher
from llumnix.config import DeploymentConfig
from llumnix.core.settings import key_digest


def test_neither_keys_nor_their_digests_go_to_engines(tmp_path) -> None:
    settings = tmp_path / "scheduler.yaml"
    settings.write_text("priorities: {key_caps: {a-key: high}}\n")
    config = DeploymentConfig(scheduler_config=str(settings))
    assert key_digest("a-key") in config.scheduler.priorities.key_caps
    addresses = SimpleNamespace(controller="ipc://c", peers="ipc://p", agents="ipc://a", keys=None)
    launcher = EngineLauncher(SimpleNamespace(), SimpleNamespace(), addresses, config)  # type: ignore[arg-type]
    sent = pickle.dumps(launcher._seat)
    assert b"high" in sent
    assert key_digest("a-key").encode() not in sent
