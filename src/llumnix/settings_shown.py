"""The settings of a server as users are shown them: what is not a default, and no secret."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import yaml

from llumnix.flag_sources import TWINS

SECRET = frozenset({"api_key", "admin_api_key", "hf_token"})
"""Flags whose values nobody is shown."""
SCHEDULER_FLAGS = frozenset({
    "scheduler-config", "policy", "min-instances", "max-instances", "queue-max", "priority-class",
    "survival",
})  # fmt: skip
"""Flags that make the scheduler's settings (`DeploymentConfig`)."""
MASK = "***"
OURS = "llumnix"
"""Where a value is from that nobody gave: llumnix's own, which differs from vLLM's default."""
_SECRET_WORD = re.compile(
    r"key$|token$|secret|passw|passphrase|credential|authorization", re.IGNORECASE
)
_SECRET_IN_TEXT = re.compile(
    r"""(?ix) ( \w* (?: key | token | secret | passw\w* | passphrase | credential | authorization)
    \w* ["']? \s* [=:] \s* ) (?: "[^"]*" | '[^']*' | [^\s,;)}\]]+ )"""
)
_SECRET_IN_URL = re.compile(r"(://)[^/@\s]*@")
_NO_SETTING = frozenset({"subparser", "model_tag", "access", "config", "dispatch_function"})


def settings_shown(
    args: argparse.Namespace, defaults: argparse.Namespace, sources: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Name, value and source of all that is not a default, by name. Secrets are masked."""
    rows = []
    for name, value in sorted(vars(args).items()):
        if name in _NO_SETTING or (name not in sources and value == getattr(defaults, name, None)):
            continue
        rows.append({
            "name": name.replace("_", "-"),
            "value": MASK if name in SECRET else _shown(name, value),
            "source": sources.get(name, OURS),
        })  # fmt: skip
    return rows


def others_shown(
    args: argparse.Namespace, defaults: argparse.Namespace, sources: Mapping[str, str]
) -> dict[str, Any]:
    """The same by name, without the scheduler's settings, and without keys, of which variables are
    gone once they were read. A model that is named without --model is the parser's `model_tag`."""
    left_out = SCHEDULER_FLAGS | {name.replace("_", "-") for name in {*SECRET, *TWINS}}
    rows = settings_shown(args, defaults, sources)
    others = {row["name"]: row["value"] for row in rows if row["name"] not in left_out}
    tag = getattr(args, "model_tag", None)
    return others if tag is None else {**others, "model": tag}


def _shown(name: str, value: Any) -> Any:
    """As JSON, without a secret. The scheduler's tree of a --config file is a text here, and its
    `key_caps` are keys."""
    if name == "scheduler_config" and isinstance(value, str) and value.lstrip().startswith("{"):
        value = yaml.safe_load(value)
        if (value.get("priorities") or {}).get("key_caps"):
            value["priorities"]["key_caps"] = MASK
    return _plain(value)


def _plain(value: Any) -> Any:
    """As JSON, with what looks like a secret masked. Of a configuration object: what is set."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return _SECRET_IN_URL.sub(rf"\1{MASK}@", value)
    if is_dataclass(value) and not isinstance(value, type):
        shown = {f.name: getattr(value, f.name, None) for f in fields(value) if f.repr}
        return _plain({name: each for name, each in shown.items() if each not in (None, {}, [])})
    if isinstance(value, Mapping):
        return {
            str(k): MASK if v and _SECRET_WORD.search(str(k)) else _plain(v)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    return _plain(_SECRET_IN_TEXT.sub(rf"\1{MASK}", str(value)))
