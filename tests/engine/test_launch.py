"""What of the driver's environment reaches an engine elsewhere, and on which way."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.platforms import current_platform
from vllm.v1.executor.ray_utils import WORKER_SPECIFIC_ENV_VARS

from llumnix.config import ADMIN_API_KEY_VARIABLE
from llumnix.engine import launch
from llumnix.engine.launch import EngineLaunch, LlumletConfig

SECRETS = {
    "HF_TOKEN": "hf-secret",
    "HUGGING_FACE_HUB_TOKEN": "hub-secret",
    "S3_SECRET_ACCESS_KEY": "s3-secret",
    "VLLM_S3_ACCESS_KEY": "vllm-s3-secret",
    "LMCACHE_REMOTE_URL": "redis://:lm-secret@cache:6379",
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The launch of one engine from an environment with these variables."""

    def made(kv_transfer: Any = None, eager: bool = True, **environment: str) -> EngineLaunch:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(launch, "Executor", SimpleNamespace(get_class=lambda config: None))
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(world_size=1),
            kv_transfer_config=kv_transfer,
            model_config=SimpleNamespace(enforce_eager=eager),
        )
        return EngineLaunch.of(config, ["ipc:///in"], ["ipc:///out"], log_stats=True)  # type: ignore[arg-type]

    return made


def test_secrets_go_in_memory_and_never_where_ray_writes_them_down(launched: Any) -> None:
    keys = dict.fromkeys(("VLLM_API_KEY", ADMIN_API_KEY_VARIABLE), "api-secret")
    made = launched(**SECRETS, **keys, PYTHONPATH="/code", PYTHONHASHSEED="0")
    assert SECRETS.items() <= made.environment.items()
    # What Ray logs and keeps is only what the interpreter itself must see.
    assert {"PYTHONPATH": "/code", "PYTHONHASHSEED": "0"}.items() <= made.environment_before.items()
    known = ("LD_", "PYTHON", "MALLOC_", "NUMEXPR_")
    assert all(name.startswith(known) for name in made.environment_before)
    assert not keys.keys() & made.environment.keys()  # The frontend's business alone.
    assert "secret" not in repr(made)


def test_what_belongs_to_one_host_stays_there(launched: Any) -> None:
    more = {
        "VLLM_PORT", "VLLM_DP_MASTER_IP", "VLLM_P2P_SIDE_CHANNEL_HOST",
        "VLLM_EC_SIDE_CHANNEL_HOST", "MOONCAKE_REQUESTER_LOCAL_HOSTNAME",
    }  # fmt: skip
    of_one_host = WORKER_SPECIFIC_ENV_VARS | more
    made = launched(**dict.fromkeys(of_one_host, "1"), VLLM_NIXL_SIDE_CHANNEL_PORT="5600")
    assert not of_one_host & {*made.environment, *made.environment_before}
    assert made.environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "5600"


def test_an_instances_workers_talk_on_loopback_alone(launched: Any) -> None:
    network = {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "eth1"}
    loopback = dict.fromkeys(network, "lo")
    assert loopback.items() <= launched(**network).environment.items()
    between_hosts = launched(kv_transfer=object(), **network).environment
    assert between_hosts["GLOO_SOCKET_IFNAME"] == "lo"
    assert between_hosts["NCCL_SOCKET_IFNAME"] == "eth1"


def test_an_eager_engine_on_a_cpu_compiles_no_sampler_while_it_serves(
    launched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    assert launched().environment["TORCH_COMPILE_DISABLE"] == "1"
    assert "TORCH_COMPILE_DISABLE" not in launched(eager=False).environment
    assert launched(TORCH_COMPILE_DISABLE="0").environment["TORCH_COMPILE_DISABLE"] == "0"
    monkeypatch.delenv("TORCH_COMPILE_DISABLE")
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(current_platform, "ray_device_key", "GPU", raising=False)
    assert "TORCH_COMPILE_DISABLE" not in launched().environment


def test_the_agents_key_is_not_shown() -> None:
    fields = dict.fromkeys(("limits", "transfer", "priorities", "min_stay", "looks_at_caches"))
    config = LlumletConfig(peers="", agents="", key=b"agents-secret", **fields)  # type: ignore[arg-type]
    assert "secret" not in repr(config)
