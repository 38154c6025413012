"""The Ray actor around an engine: brings the driver's environment in, then makes the engine.

Ray logs an actor's `runtime_env` on every host and keeps it in its control store, while an actor's
arguments stay in memory. The environment holds tokens and passwords, so it comes as an argument,
except for what Python needs before it starts. This file imports nothing that reads the environment:
vLLM is imported once it is set.
"""

import faulthandler
import os
import pickle
from dataclasses import replace
from typing import Any

import ray

from llumnix.cluster import ray_runtime

STDERR = 2


class EngineActor:
    """One run of an instance's engine. Ray calls the methods of `EngineInstance` through it."""

    def __init__(
        self, environment: dict[str, str], arguments: bytes, log: tuple[str, str] | None = None
    ) -> None:
        """`arguments`: those of `EngineInstance`, pickled by the driver (`pack`). `log`: where its
        log is kept, a folder and a name."""
        self._no_log = None if log is None else ray_runtime.keep_log(*log)
        host = ray_runtime.node_address()
        os.environ.update(environment)
        # Else vLLM would take the address of the default route. The other hosts may be unable to
        # reach that, or strangers may be able to.
        os.environ.setdefault("VLLM_HOST_IP", host)
        # Has a crash leave its mark in the log (processes.py), in vLLM's workers too.
        os.environ.setdefault("PYTHONFAULTHANDLER", "1")
        faulthandler.enable(STDERR)
        from llumnix.vllm_seam import require_release

        # Safe to unpickle: Ray lets only the deployment's own driver start an actor.
        release, packed = pickle.loads(arguments)  # noqa: S301
        require_release(release)  # Another would fail somewhere in what follows, or misread it.
        from llumnix.engine.instance import EngineInstance
        from llumnix.observe.console import log_to_stderr

        config, *others = pickle.loads(packed)  # noqa: S301
        log_to_stderr(config.log_format, process=f"engine {config.instance}")
        self._engine = EngineInstance(replace(config, host=host), *others)

    def describe(self) -> Any:
        """Where it lives; answers once the engine is ready."""
        host = ray_runtime.host_name()
        return replace(self._engine.describe(), host=host, no_log=self._no_log)

    def run(self) -> None:
        """The engine's busy loop; returns once the engine was asked to stop."""
        self._engine.run()

    def accept(self, accepting: bool) -> None:
        """Says in every report from now on whether new requests are welcome."""
        self._engine.accept(accepting)

    def stop(self) -> None:
        """Aborts what runs and ends the busy loop."""
        self._engine.stop()


def pack(*arguments: Any) -> bytes:
    """The arguments of `EngineInstance` for an `EngineActor`, and the vLLM that they are for."""
    from llumnix.vllm_seam import RELEASE

    return pickle.dumps((RELEASE, ray.cloudpickle.dumps(arguments)))
