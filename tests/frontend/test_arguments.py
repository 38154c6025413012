"""What the parsed command line becomes: the configuration that every instance gets."""

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from llumnix.errors import UsageError
from llumnix.frontend.arguments import ServeCommand, parse


def parsed(model: Path, *flags: str) -> ServeCommand:
    return parse(["serve", str(model), *flags], say=lambda _: None)


def policy(command: ServeCommand) -> str:
    return str(command.vllm_config.scheduler_config.policy)


def test_engines_schedule_by_priority_by_default(tiny_model: Path) -> None:
    assert policy(parsed(tiny_model)) == "priority"


def test_the_users_own_scheduling_policy_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    assert policy(parsed(tiny_model, "--scheduling-policy", "fcfs")) == "fcfs"
    config = tmp_path / "config.yaml"
    config.write_text("scheduling-policy: fcfs\n")
    assert policy(parsed(tiny_model, "--config", str(config))) == "fcfs"


def test_ray_as_an_instances_executor_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match=r"distributed-executor-backend ray: .*use mp"):
        parsed(tiny_model, "--distributed-executor-backend", "ray")


def test_what_differs_from_vllms_defaults_is_in_the_configuration(tiny_model: Path) -> None:
    command = parsed(tiny_model)
    assert command.args.host == "127.0.0.1"
    assert command.args.shutdown_timeout == 30
    assert command.vllm_config.cache_config.kv_cache_memory_bytes == 2**30
    assert command.vllm_config.model_config.enforce_eager
    assert not command.vllm_config.model_config.multimodal_config
