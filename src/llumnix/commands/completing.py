"""`llumnix completion`: a script with which a shell completes commands and flags.

The script has all words in it, vLLM's flags among them, so that a TAB starts nothing. It is written
once; a later release may know more flags.
"""

import argparse
import contextlib
import importlib
import io
import re
from collections.abc import Iterable, Mapping

from llumnix.commands.registry import COMMANDS

SHELLS = ("bash", "zsh")
BASH = """_llumnix() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands}"
  else
    case "$word" in
    -*) case "${{COMP_WORDS[1]}}" in
{flags}
      esac ;;
    *) case "${{COMP_WORDS[1]}}" in
{others}
      esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _llumnix llumnix
"""
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
SUBCOMMANDS = {"config": ("check", "show"), "completion": SHELLS}
"""Words that are no flags."""


def completion(argv: list[str]) -> int:
    """`llumnix completion bash|zsh`: prints the script."""
    parser = argparse.ArgumentParser(
        prog="llumnix completion",
        description="Prints what `source <(llumnix completion bash)` has bash complete.",
    )
    parser.add_argument("shell", choices=SHELLS)
    args = parser.parse_args(argv)
    flags = {command: tuple(_flags(command, place)) for command, place in COMMANDS.items()}
    print((ZSH if args.shell == "zsh" else "") + script(flags), end="")
    return 0


def script(flags: Mapping[str, Iterable[str]]) -> str:
    """The script for commands with these flags."""
    return BASH.format(commands=" ".join(flags), flags=_cases(flags), others=_cases(SUBCOMMANDS))


def _cases(words: Mapping[str, Iterable[str]]) -> str:
    return "\n".join(f'      {name}) words="{" ".join(each)}" ;;' for name, each in words.items())


def _flags(command: str, place: str) -> list[str]:
    """The flags of a command: of `serve` as its parser has them, else as its help names them."""
    if command == "serve":
        from llumnix.frontend.arguments import flag_names

        return flag_names()
    module, _, name = place.partition(":")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        getattr(importlib.import_module(f"llumnix.{module}"), name)(["--help"])
    return sorted(set(re.findall(r"(?<![\w`-])--[a-z][a-z-]+", said.getvalue())))
