"""What one engine of this deployment is started with, without knowing Ray.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`Executor.get_class`, `EngineZmqAddresses`, `ray_env.get_env_vars_to_copy` (the names of variables
that an engine in another process needs), `WORKER_SPECIFIC_ENV_VARS` (those that belong to one
process or host), `current_platform.ray_device_key`. `topk_topp_sampler.compiled_random_sample` is
compiled unless torch's `TORCH_COMPILE_DISABLE` is set.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.ray.ray_env import get_env_vars_to_copy
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.executor import Executor
from vllm.v1.executor.ray_utils import WORKER_SPECIFIC_ENV_VARS

from llumnix.config import ADMIN_API_KEY_VARIABLE, LogPlace
from llumnix.core.limits import MigrationLimits
from llumnix.core.priorities import Priorities
from llumnix.core.queue_rules import PLAIN, QueueRules
from llumnix.core.types import EngineIndex, InstanceId
from llumnix.engine.kv.transports import TransferOptions
from llumnix.sockets import SocketKeys

_NO_COMPILE = "TORCH_COMPILE_DISABLE"
_ALSO = {"LD_PRELOAD", "NUMEXPR_MAX_THREADS", "PYTHONPATH", _NO_COMPILE}
_ALSO_PREFIXES = ("TORCHINDUCTOR_", "HF_", "LLUMNIX_")
_KEYS = {"VLLM_API_KEY", "LLUMNIX_API_KEY", ADMIN_API_KEY_VARIABLE}
"""Only for the frontend."""
_NEVER = {"OMP_NUM_THREADS", "RANK", "VLLM_PORT", *_KEYS, *WORKER_SPECIFIC_ENV_VARS}
_OF_ONE_HOST = re.compile(r"VLLM_.*_(HOST|IP)|MOONCAKE_REQUESTER_LOCAL_HOSTNAME")
"""vLLM's variables that name the host itself. They are of no use anywhere else."""
_BEFORE_PYTHON = re.compile(r"(LD_|PYTHON|MALLOC_|NUMEXPR_).*")
"""Variables that are read as a process starts, or by what Ray itself imports there."""

LOOPBACK_INTERFACE = "lo"


@dataclass(frozen=True, slots=True, kw_only=True)
class LlumletConfig:
    """What all llumlets of a deployment share. No API key is in it."""

    peers: str  # ZMQ address to listen at; `{engine}` and `{host}` are filled in by the engine
    agents: str  # the same of its workers (engine/kv/links.py), with `{rank}` too
    key: bytes = field(repr=False)  # by which the workers' agents know each other
    limits: MigrationLimits
    transfer: TransferOptions
    priorities: Priorities  # the classes as the policy treats them
    min_stay: float  # a request that was moved stays for that many times what its move took
    looks_at_caches: bool  # the policy wants to know what is in prefix caches
    queue_rules: QueueRules = PLAIN  # which request starts next where memory is short


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceConfig:
    """Which run of which instance an engine is, and where it finds the others."""

    instance: InstanceId
    engine_index: EngineIndex
    slot: int  # its place among the instances that share a CPU host's cores,
    slots: int  # of so many
    controller: str  # ZMQ address
    llumlet: LlumletConfig
    event_log: LogPlace | None
    log_format: str = "text"
    host: str = ""  # this host's address in the cluster, known only there
    keys: SocketKeys | None = None  # of all sockets on TCP


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLaunch:
    """The arguments of `EngineInstance` that all instances share, and their environment."""

    vllm_config: VllmConfig
    addresses: EngineZmqAddresses
    executor_class: Any
    log_stats: bool
    device: str | None  # Ray's name of its devices; None on a CPU host
    devices_per_instance: int
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    """May hold secrets, so it travels in memory alone."""
    environment_before: dict[str, str] = field(default_factory=dict, repr=False)
    """What the interpreter itself reads. Ray must set it as it starts the process."""

    @classmethod
    def of(
        cls,
        vllm_config: VllmConfig,
        inputs: Sequence[str],
        outputs: Sequence[str],
        log_stats: bool,
    ) -> "EngineLaunch":
        """For this configuration. `inputs` and `outputs`: ZMQ addresses of all frontends that there
        may ever be, by client index."""
        names = get_env_vars_to_copy(destination="instances")
        names |= _ALSO | {n for n in os.environ if n.startswith(_ALSO_PREFIXES)}
        names = {n for n in names - _NEVER if n in os.environ and not _OF_ONE_HOST.fullmatch(n)}
        before = {n for n in names if _BEFORE_PYTHON.fullmatch(n)}
        environment = {n: os.environ[n] for n in names - before}
        return cls(
            vllm_config=vllm_config,
            addresses=EngineZmqAddresses(inputs=list(inputs), outputs=list(outputs)),
            executor_class=Executor.get_class(vllm_config),
            log_stats=log_stats,
            device=None if current_platform.is_cpu() else current_platform.ray_device_key,
            devices_per_instance=vllm_config.parallel_config.world_size,
            environment=_eager(vllm_config) | environment | _inside_one_host(vllm_config),
            environment_before={n: os.environ[n] for n in before},
        )


def _eager(vllm_config: VllmConfig) -> dict[str, str]:
    """Has an engine on a CPU compile nothing that is to compile nothing. vLLM heeds that for the
    model alone: it compiles the sampling for the first request that draws its tokens without a
    seed. Where no compiled code is kept yet, that takes half a minute, and the engine counts as
    stalled."""
    eager = current_platform.is_cpu() and vllm_config.model_config.enforce_eager
    return {_NO_COMPILE: "1"} if eager else {}


def _inside_one_host(vllm_config: VllmConfig) -> dict[str, str]:
    """Keeps what one instance's workers say to each other, pickles among it, on loopback. By
    default torch listens at the address of the host's name."""
    libraries = ["GLOO_SOCKET_IFNAME"]
    if vllm_config.kv_transfer_config is None:  # A connector may use NCCL between hosts.
        libraries.append("NCCL_SOCKET_IFNAME")
    return dict.fromkeys(libraries, LOOPBACK_INTERFACE)
