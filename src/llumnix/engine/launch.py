"""What it takes to start one engine of this deployment, without knowing Ray.

vLLM 0.32 internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`Executor.get_class`, `EngineZmqAddresses`, `ray_env.get_env_vars_to_copy` (the names of variables
that an engine in another process needs), `current_platform.ray_device_key`.
"""

import os
from dataclasses import dataclass, field
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.ray.ray_env import get_env_vars_to_copy
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.executor import Executor

_ALSO = ("LD_PRELOAD", "NUMEXPR_MAX_THREADS", "PYTHONPATH")
_ALSO_PREFIXES = ("TORCHINDUCTOR_", "HF_", "LLUMNIX_")
_NEVER = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LOCAL_RANK", "RANK", "VLLM_API_KEY")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLaunch:
    """The arguments of `EngineInstance` that all instances share. `device`: Ray's name of the
    devices that one instance needs `devices_per_instance` of; None on a CPU host."""

    vllm_config: VllmConfig
    addresses: EngineZmqAddresses
    executor_class: Any
    log_stats: bool
    device: str | None
    devices_per_instance: int
    env: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, vllm_config: VllmConfig, frontend_input: str, frontend_output: str, log_stats: bool
    ) -> "EngineLaunch":
        """For this configuration and these addresses of the frontend."""
        names = get_env_vars_to_copy(exclude_vars=set(_NEVER), destination="instances")
        names |= {*_ALSO, *(n for n in os.environ if n.startswith(_ALSO_PREFIXES))}
        return cls(
            vllm_config=vllm_config,
            addresses=EngineZmqAddresses(inputs=[frontend_input], outputs=[frontend_output]),
            executor_class=Executor.get_class(vllm_config),
            log_stats=log_stats,
            device=None if current_platform.is_cpu() else current_platform.ray_device_key,
            devices_per_instance=vllm_config.parallel_config.world_size,
            env={name: os.environ[name] for name in names if name in os.environ},
        )
