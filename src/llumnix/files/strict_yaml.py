"""YAML, read strictly: a name that stands twice in one mapping is refused. YAML's usual reader
drops the first without a word."""

from pathlib import Path
from typing import Any

import yaml

from llumnix.errors import UsageError

_NO_NAMES = ("tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")


class _Twice(yaml.MarkedYAMLError):
    """A name stands twice; `context_mark` and `problem_mark` are where."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Before `<<` is resolved, since a mapping may override a name that it merges.
        mapping: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: dict[str, yaml.Mark] = {}
        for key, _ in mapping.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag in _NO_NAMES:
                continue
            # As text, so that 7 and '7' are one name: nobody who writes both means two.
            name = str(self.construct_object(key))
            if name in seen:
                raise _Twice(context_mark=seen[name], problem_mark=key.start_mark)
            seen[name] = key.start_mark
        return mapping


def read_yaml(path: str, where: str) -> Any:
    """What the file says. `where` names it in a `UsageError`. Its text is not told there, since it
    may be a secret."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise UsageError(f"{where} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError:
        raise UsageError(f"{where} is not YAML") from None
    return parse_yaml(text, where)


def parse_yaml(text: str, where: str) -> Any:
    """What the text says; else like `read_yaml`."""
    try:
        return yaml.load(text, _Loader)
    except _Twice as error:
        marks = (error.context_mark, error.problem_mark)
        lines = [mark.line + 1 for mark in marks if mark is not None]
        at = (
            f"lines {lines[0]} and {lines[1]} have"
            if lines[0] != lines[1]
            else (f"line {lines[0]} has")
        )
        raise UsageError(f"{where}: {at} the same name; keep one of the two") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date like 2026-13-13.
        mark = getattr(error, "problem_mark", None)
        at = "" if mark is None else f" (line {mark.line + 1})"
        raise UsageError(f"{where} is not YAML{at}") from None
