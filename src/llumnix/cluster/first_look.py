"""Reads those flags of `llumnix serve` that count before vLLM, which has the parser, is loaded."""

import argparse
import os
import ssl

from llumnix.config import knobs, option_strings
from llumnix.flag_sources import layered

_TEXT = ("host", "uds", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_ciphers", "ray_address")


def first_look(argv: list[str]) -> argparse.Namespace:
    """Where to listen, for whom, and which Ray to join, under the names and defaults of the real
    parser: from the command line, variables and the --config file."""
    parser = argparse.ArgumentParser(
        prog="llumnix serve", usage="llumnix serve --help", add_help=False, allow_abbrev=False
    )
    for name in _TEXT:
        parser.add_argument(*_spellings(name), dest=name)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(*_spellings("ssl_cert_reqs"), type=int, default=int(ssl.CERT_NONE))
    parser.add_argument(*_spellings("api_key"), nargs="*")
    parser.add_argument(*_spellings("api_key_file"))
    parser.add_argument("--keys")
    parser.add_argument("--insecure", action="store_true")
    words = layered(argv, parser, os.environ, strict=False).words
    seen, _ = parser.parse_known_args(words)
    return seen


def log_format(argv: list[str]) -> str:
    """How lines of the log are to look, for what is said of a mistake in the other flags too."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*_spellings("log_format"), dest="log_format", default="text")
    words = layered(argv, parser, os.environ, strict=False).words
    return str(parser.parse_known_args(words)[0].log_format)


def has_key(seen: argparse.Namespace) -> bool:
    """Whether any key is given. The real parser says whether it is a good one."""
    return bool(seen.api_key or seen.api_key_file or seen.keys)


def help_text() -> str:
    """`llumnix serve --help`: our flags, and where vLLM's are. Loads nothing."""
    parser = argparse.ArgumentParser(
        prog="llumnix serve",
        usage="llumnix serve [MODEL] [--instances N] [any flag of `vllm serve`]",
        description="Serve vLLM's OpenAI API over several vLLM instances. Without MODEL, the demo "
        "model is served.",
        epilog="For vLLM's flags vLLM is loaded first, some ten seconds: --help=all shows all, "
        "--help=GROUP those of a group (--help=Frontend), --help=WORD those with the word. Every "
        "flag may also stand in the file of --config, and has a variable: LLUMNIX_INSTANCES for "
        "--instances. `llumnix config check` says what comes of it.",
    )
    for name, _, flag in knobs():
        parser.add_argument(*option_strings(name), dest=name, **flag)
    return parser.format_help()


def _spellings(name: str) -> tuple[str, ...]:
    dashes = "--" + name.replace("_", "-")
    return (dashes,) if "_" not in name else (dashes, "--" + name)
