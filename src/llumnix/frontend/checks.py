"""Checks, before anything is started, the arguments that vLLM uses only once the engines are up.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`validate_api_server_args`, `set_ulimit` and the plugin managers' import functions, which vLLM's
`setup_server` calls before it binds; `args.middleware` are import paths, `args.lora_modules` have a
`name` and a `path`.
"""

import importlib
import os
import re
from argparse import Namespace
from pathlib import Path

from llumnix.errors import UsageError


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
