"""Where the versions of vLLM that llumnix goes with differ: nothing else asks for the version.

It is read from vLLM's own code. The name and version of the installed package are no guide: a CPU
build has another name, and a copy of the sources may have none.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes)

| | 0.32 | 0.33 |
| --- | --- | --- |
| the parser's module | `entrypoints.launchers.cli_args` | `entrypoints.common.cli_args` |
| ends a session of streamed inputs | an output with ABORT | one with ABORT or ERROR |
| `EngineCoreOutput.error`: why an engine refused a request | – | yes; vLLM answers with it |
| a failed stream of /v1/messages | ends as if a parser had failed | ends with its error |
| `--watchdog-config` | – | started by the engine's process |
"""

import importlib
import logging
from types import ModuleType
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.version import __version__ as RELEASE
from vllm.version import __version_tuple__

from llumnix.errors import UsageError
from llumnix.versions import SUPPORTED, named

logger = logging.getLogger("llumnix.engine")

V0_33 = (0, 33)


def minor_version(numbers: tuple[int | str, ...]) -> tuple[int, int]:
    """The first two numbers of a version; `UsageError` if llumnix does not go with it."""
    found = ".".join(map(str, numbers[:2]))
    if found not in SUPPORTED["vllm"]:
        whole = ".".join(map(str, numbers))
        raise UsageError(f"this is vLLM {whole}, and llumnix goes with {named('vllm')}")
    major, minor = found.split(".")
    return int(major), int(minor)


VERSION = minor_version(__version_tuple__)


def require_release(wanted: str) -> None:
    """`UsageError` unless this process has the very vLLM that its deployment was started with.
    Engines of two would neither read each other's requests nor name the same KV blocks alike."""
    if wanted != RELEASE:
        raise UsageError(
            f"this host has vLLM {RELEASE}, and the deployment was started with {wanted}: install "
            "that one here"
        )


SESSION_ENDS = frozenset(
    {FinishReason.ABORT} if VERSION < V0_33 else {FinishReason.ABORT, FinishReason.ERROR}
)
"""The reasons that end a session of streamed inputs. Others end one of its inputs."""

ENDS_MESSAGES_ITSELF = VERSION >= V0_33
"""Whether vLLM ends a failed stream of /v1/messages with its error."""


def cli_args() -> ModuleType:
    """The module with the parser of `vllm serve`."""
    where = "launchers" if VERSION < V0_33 else "common"
    return importlib.import_module(f"vllm.entrypoints.{where}.cli_args")


def error_of(output: EngineCoreOutput) -> Any | None:
    """Why the engine refused the request, in vLLM's words for its client; None if it says none."""
    return output.error if VERSION >= V0_33 else None


def start_watchdog(name: str, vllm_config: VllmConfig) -> None:
    """Begins to dump the stacks of this process if its engine's loop stands still, if that is
    configured. The loop itself says that it goes on, or waits for work."""
    if VERSION >= V0_33:
        from vllm.utils.watch_dog import start_watch_dog

        start_watch_dog(name, vllm_config.watchdog_config, logger)
