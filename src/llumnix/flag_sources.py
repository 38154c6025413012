"""Where the flags of `llumnix serve` get their values: the command line, else a variable, else the
--config file, else the default.

Every flag has a variable: `LLUMNIX_` and its name, so LLUMNIX_MAX_MODEL_LEN for --max-model-len,
and LLUMNIX_MODEL for the model. What variables and the file say becomes words of the command line,
so the parser alone checks it. Where several places name a flag, the first in this order counts
whole; values are not merged. Keys and the file of keys count as one flag there: who gives a key on
the command line does not let in those of a file that --config names.
"""

import argparse
import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llumnix.errors import UsageError
from llumnix.files.strict_yaml import read_yaml

PREFIX = "LLUMNIX_"
CONFIG_VARIABLE = "LLUMNIX_CONFIG"
LEFT_ALONE = frozenset({"LLUMNIX_CACHE", "LLUMNIX_URL", CONFIG_VARIABLE})
"""Variables that are read elsewhere, at the place of the flag if there is one."""
ALIASES = {"VLLM_API_KEY": "api_key"}
"""Variables of vLLM's that stand for a flag, where no variable of ours does."""
TWINS = {
    one: other
    for name in ("api_key", "admin_api_key")
    for one, other in ((name, f"{name}_file"), (f"{name}_file", name))
}
"""The flags of keys, and of files of keys, each with its other."""
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://\S+")
"""What Kubernetes writes into NAME_PORT and its like in pods beside a service called NAME."""
_OF_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT)(_|$)|_PORT_\d+_(TCP|UDP|SCTP)(_|$)")
FLAG = "command line"
CPU_KV_CACHE_BYTES = 2**30
"""KV memory of one instance on a CPU host, unless the user says otherwise. vLLM's default is a
large part of the host's memory, too much for several instances."""
ALIKE = 0.85
"""How near a variable's name must be to that of a flag to be taken for a slip."""
_SWITCH = {
    "1": True, "true": True, "yes": True, "on": True,
    "0": False, "false": False, "no": False, "off": False,
}  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Layered:
    """A command line that has what variables and the file say."""

    words: list[str]  # the command, the model if one is named, and flags; no --config
    sources: dict[str, str]  # by the parser's name of a flag: where its value is from
    file: str | None  # the --config file
    warnings: list[str] = field(default_factory=list)


def layered(
    argv: Sequence[str],
    parser: argparse.ArgumentParser,
    environ: Mapping[str, str],
    *,
    strict: bool = True,
) -> Layered:
    """Adds to `argv`, which begins with the command, what variables and the file say of the
    parser's flags. `UsageError` names the file or the variable. Unless `strict`, flags that the
    parser does not know are left out."""
    rest, path, where = _without_config(list(argv[1:]), environ)
    known = _by_name(parser)
    model = [rest.pop(0)] if rest and not rest[0].startswith("-") else []
    sources = dict.fromkeys(_named(rest, parser), FLAG)
    if model:
        sources["model"] = FLAG
    warnings = []
    if strict:
        warnings = [
            w for name, text in environ.items() if (w := _warning(name, text, known)) is not None
        ]
    words: list[str] = []
    for place in (
        _of_variables(environ, known),
        _of_aliases(environ, known),
        _of_file(path, where, known, strict=strict),
    ):
        before = frozenset(sources)
        for name, value, source in place:
            action = known[name]
            if action.dest in sources or TWINS.get(action.dest) in before:
                continue
            sources[action.dest] = source
            if action.dest == "model":
                model = [str(value)]
            else:
                words += _words(action, value, source)
    words = [argv[0], *model, *words, *rest]
    return Layered(words=words, sources=sources, file=path, warnings=warnings)


def variable_of(flag: str) -> str:
    """The variable of a flag, which is given without its dashes."""
    return PREFIX + flag.upper().replace("-", "_")


def _by_name(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Each flag by its names with underscores; the negations of switches are no names."""
    known: dict[str, argparse.Action] = {}
    for action in parser._actions:
        for option in action.option_strings:
            negates = isinstance(action, argparse.BooleanOptionalAction) and option.startswith(
                "--no-"
            )
            if option.startswith("--") and not negates:
                known[option[2:].replace("-", "_")] = action
    for name in ("help", "config"):
        known.pop(name, None)
    return known


# -- the command line


def _without_config(
    words: list[str], environ: Mapping[str, str]
) -> tuple[list[str], str | None, str]:
    """The words without --config, the file that it names, and what named it."""
    rest: list[str] = []
    files: list[str] = []
    left = iter(words)
    for word in left:
        if word == "--config":
            files.append(next(left, ""))
        elif word.startswith("--config="):
            files.append(word.partition("=")[2])
        else:
            rest.append(word)
    if len(files) > 1:
        raise UsageError("--config is given twice: put all of it into one file")
    if files:
        if not files[0] or files[0].startswith("--"):
            raise UsageError("--config: name the file, as in --config llumnix.yaml")
        return rest, files[0], "--config"
    return rest, environ.get(CONFIG_VARIABLE) or None, CONFIG_VARIABLE


def _named(words: Sequence[str], parser: argparse.ArgumentParser) -> Iterator[str]:
    """The parser's names of the flags among the words; it takes abbreviations, too."""
    options = parser._option_string_actions
    for word in words:
        if not word.startswith("-"):
            continue
        option = word.partition("=")[0].partition(".")[0]
        if option.startswith("--"):
            option = "--" + option[2:].replace("_", "-")
        if option in options:
            yield options[option].dest
        elif option.startswith("--"):
            meant = {a.dest for o, a in options.items() if o.startswith(option)}
            if len(meant) == 1:
                yield meant.pop()
        elif option[:2] == "-O":
            yield "optimization_level"


# -- variables and the file


def _of_variables(
    environ: Mapping[str, str], known: Mapping[str, argparse.Action]
) -> Iterator[tuple[str, Any, str]]:
    given: dict[str, str] = {}
    for variable, text in environ.items():
        name = variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX) or variable in LEFT_ALONE or not text:
            continue
        if name in known and not _is_service_link(variable, text):
            _once(given, known[name], variable, "the environment")
            yield name, _value(known[name], text, variable), variable


def _of_aliases(
    environ: Mapping[str, str], known: Mapping[str, argparse.Action]
) -> Iterator[tuple[str, Any, str]]:
    for variable, name in ALIASES.items():
        if name in known and environ.get(variable):
            yield name, environ[variable], variable


def _is_service_link(variable: str, text: str) -> bool:
    return variable.endswith("_PORT") and _SERVICE_LINK.fullmatch(text) is not None


def _value(action: argparse.Action, text: str, variable: str) -> Any:
    """What a variable says of a flag: a switch's true or false, a list as JSON (such as several
    classes in LLUMNIX_PRIORITY_CLASS), or the text."""
    if action.nargs == 0:
        switch = _SWITCH.get(text.strip().lower())
        if switch is None:
            raise UsageError(f"{variable}: it is a switch, so write true or false")
        return switch
    if _takes_several(action) and text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except ValueError as error:
            raise UsageError(f"{variable}: no list in JSON ({error})") from error
    return text


def _warning(variable: str, text: str, known: Mapping[str, argparse.Action]) -> str | None:
    """A warning if a variable is named as that of a flag and comes from elsewhere, or nearly so."""
    if not variable.startswith(PREFIX) or variable in LEFT_ALONE:
        return None
    name = variable.removeprefix(PREFIX).lower()
    if _is_service_link(variable, text):
        return (
            f"warning: {variable}={text} is a service link of Kubernetes and sets nothing; "
            f"give --{name.replace('_', '-')} on the command line, or enableServiceLinks: false"
            if name in known
            else None
        )
    if _OF_SERVICE_LINK.search(variable):
        return None
    near = [] if name in known else difflib.get_close_matches(name, known, 1, ALIKE)
    return (
        f"warning: {variable} sets nothing; did you mean {variable_of(near[0])}?" if near else None
    )


def _of_file(
    path: str | None, where: str, known: Mapping[str, argparse.Action], *, strict: bool
) -> Iterator[tuple[str, Any, str]]:
    given: dict[str, str] = {}
    for key, value in read_file(path, where).items() if path is not None else ():
        name = str(key).replace("-", "_").replace("model_tag", "model")
        if name in known:
            _once(given, known[name], str(key), f"{where} {path}")
            yield name, value, str(path)
        elif strict:
            flag, colon, _ = str(key).partition(":")
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0].replace('_', '-')}?" if near else "see --help=all"
            if colon:  # What follows it may be a key.
                hint = "is there a space after its colon?"
            raise UsageError(f"{where} {path}: no flag is called {flag + colon!r}; {hint}")


def _once(given: dict[str, str], action: argparse.Action, name: str, where: str) -> None:
    """`UsageError` if a place that has given the flag under one name gives it under another."""
    before = given.setdefault(action.dest, name)
    if before != name:
        raise UsageError(f"{where}: {before} and {name} are one flag; give one of the two")


def read_file(path: str, where: str) -> dict[str, Any]:
    """What a YAML file of flags says; `where` names it in a `UsageError`."""
    tree = read_yaml(path, f"{where} {path}")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{where} {path}: write a `flag: value` a line")
    return tree


# -- as words


def _takes_several(action: argparse.Action) -> bool:
    return action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction)


def _words(action: argparse.Action, value: Any, source: str) -> list[str]:
    """What gives the flag this value on a command line."""
    flag = next(o for o in action.option_strings if o.startswith("--"))
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(f"{source}: {flag} is a switch, so write true or false")
        negated = "--no-" + flag[2:]
        return [flag] if value else [negated] if negated in action.option_strings else []
    if isinstance(value, bool) and "on" in (action.choices or ()):
        value = "on" if value else "off"  # YAML's own reading of these words.
    if isinstance(value, list) and _takes_several(action):
        items = [_text(item) for item in value]
        if isinstance(action, argparse._AppendAction):
            return [f"{flag}={item}" for item in items]
        return [flag, *items] if items else []
    return [f"{flag}={_text(value)}"]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


# -- llumnix's own, by what the instances compute on


def suit_device(
    platform: Any, args: argparse.Namespace, defaults: argparse.Namespace, argv: Sequence[str],
    *, demo: bool,
) -> None:  # fmt: skip
    """Sets what fits these devices better than vLLM's defaults, unless the user has chosen.
    `platform`: vLLM's `current_platform`. `demo`: whether the demo model is served."""
    if platform.is_cpu():
        _suit_cpu(args, defaults, argv)
        if demo:
            _suit_demo_on_cpu(args, defaults)
    elif platform.is_cuda_alike() and args.distributed_executor_backend is None:
        # For one GPU vLLM gives model and scheduler one process, unless there is data parallelism.
        one = args.tensor_parallel_size == args.pipeline_parallel_size == 1
        args.distributed_executor_backend = "mp" if one else None


def _suit_cpu(args: argparse.Namespace, defaults: argparse.Namespace, argv: Sequence[str]) -> None:
    if not os.environ.get("VLLM_CPU_KVCACHE_SPACE") and args.kv_cache_memory_bytes is None:
        args.kv_cache_memory_bytes = CPU_KV_CACHE_BYTES
    compiling = ("compilation_config", "optimization_level", "cudagraph_capture_sizes")
    chosen = any(getattr(args, n, None) != getattr(defaults, n, None) for n in compiling)
    if not chosen and not any(re.match("--no[-_]enforce[-_]eager", word) for word in argv):
        # Compiling the model takes minutes on a few cores and gains little there.
        args.enforce_eager = True


def _suit_demo_on_cpu(args: argparse.Namespace, defaults: argparse.Namespace) -> None:
    if args.dtype == defaults.dtype:
        # vLLM 0.32's bfloat16 attention for AMX was seen to give wrong answers (bare vLLM, a Xeon).
        args.dtype = "float32"
