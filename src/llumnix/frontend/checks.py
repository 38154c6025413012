"""Checks, before anything is started, the arguments that vLLM uses only once the engines are up.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`validate_api_server_args`, `set_ulimit` and the plugin managers' import functions, which vLLM's
`setup_server` calls before it binds; `args.middleware` are import paths, `args.lora_modules` have a
`name` and a `path`. Responses are stored in the process that gave them, if
`VLLM_ENABLE_RESPONSES_API_STORE` is set; resolvers of `LoRAResolverRegistry` number the adapters of
their own process. `Executor.get_class` looks at `parallel_config.distributed_executor_backend`
alone; an executor says whether it `uses_ray`.
"""

import contextlib
import importlib
import os
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from llumnix.core.scheduling.presets import queue_rules_of
from llumnix.core.settings import SchedulerSettings
from llumnix.errors import UsageError

CORES_EACH = 4
"""A frontend takes a core when it is busy, and an engine with its workers two or more."""


def check_logs(event_log: str | None, log_dir: str | None) -> None:
    """`UsageError` if the event log or the logs of processes cannot be written. Makes the folder
    for these."""
    if log_dir is not None:
        folder = Path(log_dir).absolute()
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise UsageError(f"--log-dir {folder} cannot be made or written; name a folder")
    if event_log is not None:
        path = Path(event_log).absolute()
        if not path.parent.is_dir():
            raise UsageError(f"--event-log {path}: its folder does not exist; make it first")
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UsageError(f"--event-log {path} cannot be written; name a file that can")


def check_server_args(args: Namespace) -> None:
    """`UsageError` for plugins, parsers, middlewares and LoRA adapters that cannot be used."""
    from vllm.entrypoints.launchers.launcher import set_ulimit, validate_api_server_args
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    try:
        if args.tool_parser_plugin:
            ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if args.reasoning_parser_plugin:
            ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        validate_api_server_args(args)
    except KeyError as error:
        raise UsageError(str(error.args[0])) from error
    for path in args.middleware:
        _check_middleware(path)
    for adapter in args.lora_modules or []:
        _check_adapter(adapter.name, adapter.path)
    set_ulimit()


def check_executor(name: str | None) -> None:
    """`UsageError` unless --distributed-executor-backend names an executor that an instance can
    start, as vLLM reads it. None: it is left out."""
    from vllm.v1.executor import Executor
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    if name is None:
        return
    flag, parallel = f"--distributed-executor-backend {name}", Namespace()
    parallel.distributed_executor_backend = name
    try:
        found = Executor.get_class(Namespace(parallel_config=parallel))  # type: ignore[arg-type]
    except (ImportError, ValueError, AttributeError, TypeError) as error:
        why = f"it cannot be used ({error})" if "." in name else "there is none of that name"
        raise UsageError(
            f"{flag}: {why}; use mp or uni, or the path of a class of executors, like "
            "package.module.Name"
        ) from error
    if found.uses_ray or issubclass(found, ExecutorWithExternalLauncher):
        raise UsageError(f"{flag}: an instance is one Ray actor, which starts its workers; use mp")


def check_queue(
    scheduling_policy: str, settings: SchedulerSettings, say: Callable[[str], None]
) -> None:
    """`UsageError` where promises are wanted of a queue that goes by arrival alone. Of the other
    rules that it has not, `say` is told."""
    rules = queue_rules_of(settings)
    if scheduling_policy == "priority":
        return
    if rules.slices is not None:
        wanted = "queue.slices" if settings.queue.slices else f"--policy {settings.policy}"
        raise UsageError(
            f"{wanted} does not go with --scheduling-policy {scheduling_policy}: promises are kept "
            "in a queue by priority alone; leave --scheduling-policy out"
        )
    if rules.growth or rules.passers or rules.short_first:
        say(
            f"warning: under --scheduling-policy {scheduling_policy} engines start requests by "
            f"arrival alone: neither classes nor the queue's rules of --policy {settings.policy} "
            "count there"
        )


def count_frontends(wanted: int | None, instances: int, say: Callable[[str], None]) -> int:
    """How many processes are to speak HTTP. `wanted`: what a user says; None: one an instance, like
    vLLM, as far as there are cores, and one on a CPU host. `UsageError` for what several cannot
    do."""
    from vllm.platforms import current_platform

    if wanted is not None and wanted < 1:
        raise UsageError(f"--api-server-count {wanted}: must be 1 or more")
    if wanted is None:
        cores = len(os.sched_getaffinity(0))
        count = 1 if current_platform.is_cpu() else min(instances, max(1, cores // CORES_EACH))
    else:
        count = wanted
    why_not = _why_one_frontend() if count > 1 else None
    if why_not is None:
        return count
    if wanted is not None:
        raise UsageError(f"--api-server-count {wanted}: {why_not}; use --api-server-count 1")
    say(f"one process speaks HTTP, since {why_not}")
    return 1


def _why_one_frontend() -> str | None:
    """What keeps several processes from serving side by side."""
    from vllm import envs
    from vllm.lora.resolver import LoRAResolverRegistry
    from vllm.plugins import load_general_plugins

    if envs.VLLM_ENABLE_RESPONSES_API_STORE:
        return (
            "VLLM_ENABLE_RESPONSES_API_STORE keeps each response in the process that gave it, and "
            "another one would not find it"
        )
    load_general_plugins()
    if LoRAResolverRegistry.get_supported_resolvers():
        return (
            "a resolver plugin loads LoRA adapters on first use (VLLM_PLUGINS), and numbers those "
            "of its own process"
        )
    return None


def _check_middleware(path: str) -> None:
    module, _, name = path.rpartition(".")
    try:
        getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise UsageError(
            f"--middleware {path} cannot be imported ({error}): give the path of a class or "
            "function, like package.module.Name"
        ) from error


def _check_adapter(name: str, path: str) -> None:
    folder = Path(os.path.expanduser(path))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not folder.exists():
        return  # A name on the hub, from which vLLM fetches it.
    if not (folder / "adapter_config.json").is_file():
        raise UsageError(
            f"--lora-modules {name}={path}: the folder holds no adapter_config.json; name a folder "
            "with a LoRA adapter"
        )
