"""The Ray actor around an engine: brings the driver's environment in, then makes the engine.

Ray writes an actor's `runtime_env` to its log on every host, and its control store keeps it; an
actor's arguments stay in memory. So all of the environment but what must be there before Python
starts comes as an argument, tokens and passwords among it. This file imports nothing that would
read it: vLLM comes in once it is set.
"""

import os
import pickle
from dataclasses import replace
from typing import Any

import ray

from llumnix.cluster import ray_runtime


class EngineActor:
    """One run of an instance's engine. Ray calls the methods of `EngineInstance` through it."""

    def __init__(self, environment: dict[str, str], arguments: bytes) -> None:
        """`arguments`: those of `EngineInstance`, pickled by the driver (`pack`)."""
        host = ray_runtime.node_address()
        os.environ.update(environment)
        # Else vLLM would take the address of the default route, which others may not reach, or
        # everybody may.
        os.environ.setdefault("VLLM_HOST_IP", host)
        from llumnix.engine.instance import EngineInstance

        # Ray has checked who may start an actor, and only such a one can call this.
        config, *others = pickle.loads(arguments)  # noqa: S301
        self._engine = EngineInstance(replace(config, host=host), *others)

    def describe(self) -> Any:
        """Where it lives; answers once the engine is ready."""
        return self._engine.describe()

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
    """The arguments of `EngineInstance` for an `EngineActor`."""
    packed: bytes = ray.cloudpickle.dumps(arguments)
    return packed
