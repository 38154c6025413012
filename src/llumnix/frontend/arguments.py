"""The command line of `llumnix serve`: vLLM's parser, plus the knobs of `DeploymentConfig`.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`make_arg_parser`, `validate_parsed_serve_args`, `load_chat_template`, `FlexibleArgumentParser`,
`AsyncEngineArgs.from_cli_args(...).create_engine_config(...)`; `VLLM_MAX_N_SEQUENCES` bounds `n`,
and `VLLM_HTTP_TIMEOUT_KEEP_ALIVE` the seconds for which a connection may be idle;
without `args.api_key` and `VLLM_API_KEY` vLLM checks no key (tests/house/test_vllm_routes.py).
"""

import argparse
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from llumnix.config import (
    DeploymentConfig,
    check_keys,
    is_loopback,
    knobs,
    option_strings,
    read_keys,
)
from llumnix.core.settings import SchedulerSettings
from llumnix.demo import DEMO_MODEL, is_demo, prepare_demo_model
from llumnix.errors import UsageError
from llumnix.flag_sources import ALIASES, FLAG, PREFIX, Layered, layered, suit_device
from llumnix.frontend.checks import (
    check_executor,
    check_logs,
    check_queue,
    check_server_args,
    count_frontends,
)
from llumnix.frontend.door.listener import ListenAddress
from llumnix.frontend.http.access import Access, digests
from llumnix.reload.key_file import KeyRing
from llumnix.reload.reloading import Reloading
from llumnix.reload.settings_file import Given, SettingsFile
from llumnix.settings_shown import SECRET, others_shown, settings_shown

SHUTDOWN_TIMEOUT_S = 30
PROBES = "/live,/ready,/health,/metrics"
"""Asked every few seconds, and not worth a line of the access log."""
N_MAX = 128
"""The most answers to one prompt, as with OpenAI. vLLM's default is 16,384, and each answer is a
request to place."""
KEEP_ALIVE_S = 120
"""For how long a connection may be idle. A request that a client sends while the server closes its
connection is lost: the client gets a reset. So clients have to close first. httpx keeps an idle
connection for 5 s, aiohttp for 15, load balancers for 60, Go for 90; vLLM's default is 5."""

_REFUSED = {
    "data_parallel_size": "llumnix runs the instances; use --instances N",
    "data_parallel_rank": "llumnix numbers the instances; leave it out",
    "data_parallel_start_rank": "llumnix numbers the instances; leave it out",
    "data_parallel_size_local": "llumnix runs the instances; use --instances N",
    "data_parallel_hybrid_lb": "llumnix balances the load; leave it out",
    "data_parallel_external_lb": "llumnix balances the load; leave it out",
    "data_parallel_multi_port_external_lb": "llumnix balances the load; leave it out",
    "headless": "join further hosts to one Ray cluster and use --ray-address",
    "grpc": "llumnix serves HTTP; leave it out",
    "grpc_port": "llumnix serves HTTP; leave it out",
    "enable_elastic_ep": "POST /llumnix/v1/instances scales; leave it out",
    "enable_fault_tolerance": "llumnix restarts instances by itself; leave it out",
    "kv_events_config": "every instance would publish on the same port; leave it out",
    "mm_processor_cache_gb": "the frontend shares it with one engine only; leave it out",
    "device_ids": "Ray assigns the devices; set CUDA_VISIBLE_DEVICES instead",
    "nnodes": "an instance must fit on one host; lower the parallel sizes",
}


_CONFIG_FILES = ("config.json", "params.json")
"""What makes a folder a checkpoint: Hugging Face's, or Mistral's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeCommand:
    """The command line of `llumnix serve`, read and checked."""

    args: argparse.Namespace  # for vLLM's server, without keys; `access` has the gate's rules
    vllm_config: Any  # of one instance
    deployment: DeploymentConfig
    given: Given
    again: Callable[[], Given] | None = field(repr=False)  # reads them again; None without a file

    def reloading(self, take: Callable[[SchedulerSettings], None]) -> Reloading:
        """What the server may read again; `take` gets settings that have changed."""
        return Reloading(self.args.access.ring, SettingsFile(self.given, self.again), take)


def settle_variables() -> None:
    """Sets our defaults of vLLM's variables. Call it before vLLM reads them."""
    os.environ.setdefault("VLLM_MAX_N_SEQUENCES", str(N_MAX))
    os.environ.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", str(KEEP_ALIVE_S))


def make_parser() -> argparse.ArgumentParser:
    """The parser of `llumnix serve`."""
    return _make_parsers()[0]


def flag_names() -> list[str]:
    """All flags of `serve`, vLLM's too, as they are written."""
    names = _make_parsers()[1]._option_string_actions
    return sorted(name for name in names if name.startswith("--"))


def _make_parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of the whole command line, and that of the flags of `serve`."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from llumnix.vllm_seam import cli_args

    parser = FlexibleArgumentParser(prog="llumnix")
    subparsers = parser.add_subparsers(dest="subparser")
    serve = subparsers.add_parser(
        "serve",
        usage="llumnix serve [MODEL] [--instances N] [any flag of `vllm serve`]",
        description="Serve vLLM's OpenAI API over several vLLM instances. Without MODEL, the demo "
        f"model {DEMO_MODEL} is served.",
    )
    ours = serve.add_argument_group("llumnix")
    for name, default, flag in knobs():
        names = option_strings(name)
        ours.add_argument(*names, dest=name, default=default, **flag)
    cli_args().make_arg_parser(serve)
    # vLLM's own scheduling default (fcfs) ignores priorities.
    serve.set_defaults(
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        scheduling_policy="priority",
        disable_access_log_for_endpoints=PROBES,
    )
    return parser, serve


def parse(argv: list[str], say: Any) -> ServeCommand:
    """Reads `serve ...` (the words after the program's name); `UsageError` or argparse's own exit
    on bad input. `say(text)` is told what takes long."""
    from vllm import platforms

    parser, flags = _make_parsers()
    defaults = parser.parse_args(["serve"])
    given = layered(argv, flags, os.environ)
    for warning in given.warnings:
        say(warning)
    args = _parsed(parser, given)
    secrets = (*ALIASES, *(PREFIX + name.upper() for name in SECRET))
    gone = [name for name in secrets if os.environ.pop(name, None)]
    deployment, found = _checked(args, defaults, given.sources, say)
    _suit_log(args, deployment.log_format)
    check_server_args(args)
    # Last, since it may take long.
    demo = _choose_model(args, defaults, say)
    suit_device(platforms.current_platform, args, defaults, given.words, demo=demo)
    vllm_config = _engine_config(args)
    args.settings = settings_shown(args, defaults, given.sources)
    inline = (deployment.scheduler_config or "{").lstrip().startswith("{")
    return ServeCommand(
        args=args,
        vllm_config=vllm_config,
        deployment=deployment,
        given=found,
        again=None if given.file is None and inline else partial(read_again, argv, gone),
    )


def read_again(argv: list[str], gone: Sequence[str] = ()) -> Given:
    """What the words of `parse`, variables and files say now; `UsageError` if that is bad. `gone`:
    variables with secrets, which were read at the start and are kept nowhere. Their names stand for
    what they said."""
    parser, flags = _make_parsers()
    defaults = parser.parse_args(["serve"])
    for each in (parser, flags):  # argparse would print, and end the process.
        each.error, each.exit = _refuse, _never  # type: ignore[assignment]
        each.print_help = _never  # type: ignore[assignment]
    given = layered(argv, flags, {**os.environ, **dict(zip(gone, gone, strict=True))})
    return _checked(_parsed(parser, given), defaults, given.sources, lambda _: None)[1]


def _checked(
    args: argparse.Namespace, defaults: argparse.Namespace, sources: Mapping[str, str], say: Any
) -> tuple[DeploymentConfig, Given]:
    """All that `serve` refuses before vLLM looks at the model, for a start and for a reload alike.
    Takes the keys out of `args`, which gets the gate's rules."""
    from vllm.exceptions import VLLMError
    from vllm.renderers.chat_utils import load_chat_template

    from llumnix.vllm_seam import cli_args

    ListenAddress.of(args)
    clients = _take_keys(args, "api_key", sources, say)
    admins = _take_keys(args, "admin_api_key", sources, say)
    deployment = DeploymentConfig(**{name: getattr(args, name) for name, _, _ in knobs()})
    check_logs(deployment.event_log, deployment.log_dir)
    args.policy = deployment.scheduler.policy
    _refuse_what_breaks(args, defaults)
    check_queue(args.scheduling_policy, deployment.scheduler, say)
    args.access = _access(args, deployment, clients, admins, say)
    check_executor(args.distributed_executor_backend)
    others = others_shown(args, defaults, sources)
    args.api_server_count = count_frontends(args.api_server_count, deployment.instances, say)
    try:
        cli_args().validate_parsed_serve_args(args)
        load_chat_template(args.chat_template)
    except (TypeError, ValueError, KeyError, VLLMError) as error:
        raise UsageError(_one_line(error)) from error
    return deployment, Given(settings=deployment.scheduler, others=others)


def _refuse(message: str) -> NoReturn:
    raise UsageError(_one_line(ValueError(message)))


def _never(status: int = 0, message: str | None = None) -> NoReturn:
    _refuse(message or "a value is --help or --version, which are no settings")


def _parsed(parser: argparse.ArgumentParser, given: Layered) -> argparse.Namespace:
    try:
        return parser.parse_args(_with_demo_model(given.words))
    except (ValueError, OSError) as error:
        raise UsageError(_one_line(error)) from error


def _suit_log(args: argparse.Namespace, form: str) -> None:
    """Has vLLM's lines look as ours do: here, in its workers, and uvicorn's."""
    if form == "json":
        from vllm.config.logging import LoggingConfig
        from vllm.logger import configure_logging

        config = getattr(args, "logging_config", None) or LoggingConfig()
        args.logging_config = replace(config, formatter="json")
        configure_logging(args.logging_config)


def _refuse_what_breaks(args: argparse.Namespace, defaults: argparse.Namespace) -> None:
    for name, fix in _REFUSED.items():
        if getattr(args, name, None) != getattr(defaults, name, None):
            raise UsageError(f"--{name.replace('_', '-')} does not go with llumnix: {fix}")


def _take_keys(
    args: argparse.Namespace, name: str, sources: Mapping[str, str], say: Any
) -> list[str]:
    """The keys of a flag and its file. They are taken out of `args`, as their variables were out of
    the environment: the gate alone needs them, and neither logs, Ray nor an engine gets them.
    vLLM's own check, which it makes of them, knows no `x-api-key` and covers a part of the routes.
    """
    flag, file_flag = (f"--{n.replace('_', '-')}" for n in (name, f"{name}_file"))
    source = sources.get(name, FLAG)
    keys = check_keys(getattr(args, name) or (), flag if source == FLAG else f"{source}: {flag}")
    if (path := getattr(args, f"{name}_file")) is not None:
        keys += read_keys(path, file_flag)
        if os.stat(path).st_mode & stat.S_IROTH:
            say(f"warning: {file_flag} {path} can be read by every user here; chmod 600 it")
    setattr(args, name, None)
    return keys


def refuse_strangers(args: argparse.Namespace, *, keyed: bool, insecure: bool) -> None:
    """`UsageError` unless only this machine, or who has a key, can get in. vLLM listens on every
    interface unless told otherwise; we do not."""
    if args.host is None:
        args.host = "127.0.0.1"
    if not (args.uds or is_loopback(args.host) or keyed or insecure):
        raise UsageError(
            f"--host {args.host} is reachable from elsewhere: give --api-key KEY or --keys FILE, "
            "or --insecure to serve without one"
        )


def _access(
    args: argparse.Namespace,
    deployment: DeploymentConfig,
    clients: list[str],
    admins: list[str],
    say: Any,
) -> Access:
    """Who may do what."""
    ring = KeyRing(deployment.keys, [c.name for c in deployment.scheduler.priorities.classes])
    ring.others = frozenset(digests([*clients, *admins]))
    if ring:
        ring.replace(ring.read())
    keyed = bool(clients or ring)
    refuse_strangers(args, keyed=keyed, insecure=deployment.insecure)
    local = bool(args.uds) or is_loopback(args.host)
    if set(clients) & set(admins):
        raise UsageError(
            "a key is both an --api-key and an --admin-api-key: leave it out of --api-key"
        )
    clients_administer = local or deployment.insecure
    administered = admins or any("admin" in key.roles for key in ring.keys)
    if not administered and (ring or not clients_administer):
        say("warning: without an --admin-api-key nobody can add, drain or move on this server")
    names = frozenset(name.lower() for name in deployment.allowed_host or ())
    return Access(
        client_digests=digests(clients),
        admin_digests=digests(admins),
        clients_administer=clients_administer,
        # A browser reaches no Unix socket.
        hosts=names if names or (local and not args.uds) else None,
        origins=tuple(args.allowed_origins),
        ring=ring,
    )


def _with_demo_model(argv: list[str]) -> list[str]:
    """Names the demo model where vLLM would refuse --served-model-name without a MODEL. (A MODEL
    behind flags is told from a flag's value by the parser alone, so nothing is added else.)"""
    words = argv[1:]
    renamed = any(re.match(r"--served[-_]model[-_]name(=|$)", word) for word in words)
    named = any(re.match(r"--model(=|$)", word) for word in words)
    if renamed and not named and words[0].startswith("-"):
        return [argv[0], DEMO_MODEL, *words]
    return argv


def _choose_model(args: argparse.Namespace, defaults: argparse.Namespace, say: Any) -> bool:
    """Returns whether that is the demo model."""
    if args.model_tag is not None:
        args.model = args.model_tag
    folder = Path(os.path.expanduser(args.model))
    demo = is_demo(args.model, defaults.model)
    if demo:
        args.served_model_name = args.served_model_name or [DEMO_MODEL]
        folder = prepare_demo_model(say)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in _CONFIG_FILES):
            raise UsageError(
                f"{args.model}: the folder holds no config.json; name a folder with a checkpoint"
            )
        args.model = str(folder)
    elif not _may_be_fetched(args.model) and not folder.is_file():
        raise UsageError(
            f"{args.model}: no such folder; name a folder with a checkpoint or a model id"
        )
    return demo


def _may_be_fetched(model: str) -> bool:
    """Whether it has the form of a hub's model id, or of an object store's address, which are for
    vLLM to judge."""
    hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) and not model.startswith(".")
    return bool(hub_id or re.match(r"[a-z][a-z0-9+.-]*://", model))


def _engine_config(args: argparse.Namespace) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.exceptions import VLLMError
    from vllm.usage.usage_lib import UsageContext

    from llumnix.vllm_seam import cli_args

    # The cache of processed images is shared by the frontend and *one* engine.
    args.mm_processor_cache_gb = 0
    try:
        engine_args = AsyncEngineArgs.from_cli_args(args)
        cli_args().propagate_flash_late_interaction(args, engine_args)
        engine_args._api_process_count = args.api_server_count
        if args.api_server_count > 1:
            engine_args._api_process_rank = -1  # An engine's; each frontend sets its own.
        return engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    except ImportError as error:
        raise UsageError(
            f"{args.model} wants a package that is not installed ({_one_line(error)}); for an "
            "object store's models run `pip install 'vllm[runai]'`"
        ) from error
    except (ValueError, TypeError, OSError, LookupError, RuntimeError, VLLMError) as error:
        raise UsageError(_why_refused(args.model, error)) from error


def _why_refused(model: str, error: BaseException) -> str:
    text = _one_line(error)
    if "is not a local folder and is not a valid model identifier" in text or re.search(
        r"couldn't connect|offline|not found|404|cached|Repo|repository", text, re.IGNORECASE
    ):
        return (
            f"unknown model {model}: it is neither a folder here nor a model that can be fetched; "
            f"check the name, or name a folder with a checkpoint ({text})"
        )
    return f"vLLM refuses these settings for {model}: {text}"


def _one_line(error: BaseException) -> str:
    """The message without line breaks and pydantic's trailer."""
    text = str(error) or type(error).__name__
    text = re.sub(r"\s*\[type=.*", "", text, flags=re.DOTALL)
    text = re.sub(r"^\d+ validation errors? for \w+\s*", "", text)
    return re.sub(r"\s+", " ", text).strip()[:600]
