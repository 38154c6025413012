"""What engines are told: what they need, and no API key."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

from llumnix.cluster.supervision.runs import EngineLauncher
from llumnix.config import DeploymentConfig
from llumnix.core.settings import key_digest
from llumnix.engine.launch import LlumletConfig


def told(config: DeploymentConfig) -> LlumletConfig:
    addresses = SimpleNamespace(controller="ipc://c", peers="ipc://p", agents="ipc://a", keys=None)
    return EngineLauncher(SimpleNamespace(), SimpleNamespace(), addresses, config)._llumlet  # type: ignore[arg-type]


def test_neither_keys_nor_their_digests_go_to_engines(tmp_path: Path) -> None:
    settings = tmp_path / "scheduler.yaml"
    settings.write_text("priorities: {key_caps: {a-key: high}}\n")
    config = DeploymentConfig(scheduler_config=str(settings))
    assert key_digest("a-key") in config.scheduler.priorities.key_caps
    sent = pickle.dumps(told(config))
    assert b"high" in sent
    assert key_digest("a-key").encode() not in sent


@pytest.mark.parametrize(
    ("policy", "looks"),
    [("llumnix", True), ("cache-aware", True), ("least-loaded", False), ("round-robin", False)],
)
def test_engines_follow_their_caches_only_for_a_policy_that_asks(policy: str, looks: bool) -> None:
    assert told(DeploymentConfig(policy=policy)).looks_at_caches is looks


def test_engines_have_the_classes_as_the_policy_treats_them() -> None:
    assert told(DeploymentConfig(policy="llumnix")).priorities.preempt
    assert not told(DeploymentConfig(policy="llumnix-base")).priorities.preempt
