"""The command `llumnix`: which code each of its words runs."""

import importlib
import os
import select
import signal
import sys
import traceback

from llumnix.commands.registry import COMMANDS
from llumnix.errors import LlumnixError, UsageError
from llumnix.observe.console import lines_are_json, say
from llumnix.versions import check_versions, versions_line

USAGE = """usage: llumnix COMMAND ...

  serve [MODEL] [--instances N] [any flag of `vllm serve`]
          serve vLLM's OpenAI API over several vLLM instances

of a running `llumnix serve`:
  status [SERVER]
          show the instances
  top [--once] [SERVER]
          show instances, rates and decisions as they change
  requests [--instance I] [--class NAME] [--older S] [SERVER]
          list what is running or waiting
  migrate REQUEST [--to INSTANCE] [--copy staged|blocking|recompute] [SERVER]
          move a running request to another instance
  migrations [--since S] [--reason WORD] [--outcome WORD] [SERVER]
          list the last moves
  add [N] [--wait] [SERVER]
          start more instances
  drain, remove INSTANCE ... | --node NODE [--timeout S] [--force] [SERVER]
          move everything away from instances and stop them
  undrain INSTANCE ... [SERVER]
          let them serve on
  restart [INSTANCE ... | --node NODE] [--together] [--timeout S] [--force] [SERVER]
          move everything away from instances, stop them and start them again, one by one
  reload [SERVER]
          have it read its file of --keys and the scheduler's settings again

of this host, or of a file:
  config check [MODEL] [any flag of `llumnix serve`], config show [SERVER]
          what `serve` would start with and where each value is from; or was started with
  doctor  look whether this host is fit to serve
  version, --version
          llumnix's version, and those of vLLM, Ray and Python here
  completion bash|zsh
          a script with which the shell completes commands and flags
  simulate [--policy P,P] [--trace NAME|FILE] [--rate R] [--instances N] [--report FILE] ...
          the same scheduler and migrations in virtual time: which policy, how many instances
  profile [MODEL] [any engine flag of vLLM] --out FILE
          time one engine's steps, for `simulate --profile FILE`
  replay LOG [--json]
          run the decisions of an event log again, and compare
  ui LOG [--port N]
          show an event log on the page of a running server, at any time of it

SERVER: [--url URL | --uds PATH] [--api-key KEY | --api-key-file FILE] [--cacert FILE] [--json];
LLUMNIX_URL, and LLUMNIX_ADMIN_API_KEY or VLLM_API_KEY, stand for what is not given

`llumnix COMMAND --help` says more.
"""

WITH_VLLM = ("serve", "profile", "completion")
"""Those that stop at once where the wrong vLLM or Ray is installed."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status: 2 on bad input, and as of a program that SIGPIPE
    ended if the reader of standard output goes away meanwhile."""
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    finally:
        _flush()


def _main(argv: list[str]) -> int:
    try:
        return _run(argv)
    except UsageError as error:
        say(f"error: {error}", error=True)
        return 2
    except LlumnixError as error:
        say(str(error), error=True)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE
        # A bug, or a fault that nobody foresaw: the traceback, then one line.
        what = " ".join(f"{type(error).__name__}: {error}".split())
        trace = traceback.format_exc()
        if lines_are_json():
            say(f"unexpected {what}", error=True, trace=trace)
        else:
            say(trace, prefix="", error=True)
            say(f"unexpected {what}; the traceback is above", error=True)
        return 1


def _nobody_reads() -> bool:
    """Whether the reader of standard output is gone, as after `| head`."""
    poll = select.poll()
    try:
        poll.register(sys.stdout, 0)  # Errors are told all the same.
    except (OSError, TypeError, ValueError):  # It is closed, or no file.
        return False
    return bool(poll.poll(0))


def _flush() -> None:
    """Writes what waits. Where nobody reads, it goes nowhere; else Python would complain of it at
    its end."""
    try:
        if sys.stdout is not None:  # It is None after `>&-`.
            sys.stdout.flush()
    except BrokenPipeError:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)
    except (OSError, ValueError):
        pass  # The disk is full, say: of that Python tells at its end.


def _run(argv: list[str]) -> int:
    match argv[:1]:
        case ["--version"] | ["-V"]:
            print(versions_line())
            return 0
        case [] | ["--help"] | ["-h"]:
            print(USAGE, end="")
            return 0 if argv else 2
        case [command, *_] if command in COMMANDS:
            if command in WITH_VLLM:
                check_versions()
            module, _, name = COMMANDS[command].partition(":")
            function = getattr(importlib.import_module(f"llumnix.{module}"), name)
            status: int = function(argv if command == "serve" else argv[1:])
            return status
        case _:
            *most, last = COMMANDS
            raise UsageError(f"no command {argv[0]!r}; use {', '.join(most)} or {last}")


if __name__ == "__main__":
    raise SystemExit(main())
