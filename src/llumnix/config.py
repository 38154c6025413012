"""The configuration of a deployment, which does not change after its start.

Each knob is declared here, with unit, default and check, and becomes a flag on the command line.
vLLM declares its own flags, and core/settings.py the scheduler's finer knobs. `read_settings` reads
those from a YAML file; flags override it.
"""

import ipaddress
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from llumnix.core.scheduling.presets import POLICIES
from llumnix.core.settings import AdmissionSettings, PriorityClass, SchedulerSettings
from llumnix.core.slices.published import served
from llumnix.errors import UsageError
from llumnix.files.strict_yaml import parse_yaml, read_yaml

logger = logging.getLogger("llumnix.config")

BODY_MAX_MB = 64
"""Room for the 25 MB of audio that vLLM takes, and as much again for photographs in base64."""
STREAM_INTERVAL_MAX = 8
"""A token in a chunk of 8 costs the HTTP process a third of one that has its own; longer chunks
save little more."""
EVENT_LOG_MAX_MB = 1000  # of one file; observe/log_files.py says how many there are
WAIT_MAX_S = 3600
SIZE_MAX_MB = 10**9
BOUNDED = ("instances", "ready_min", "event_log_max_mb", "max_body_mb", "lame_duck", "ray_wait")
ADMIN_API_KEY_VARIABLE = "LLUMNIX_ADMIN_API_KEY"
API_KEY_VARIABLE = "VLLM_API_KEY"
SCHEDULER_FLAG = "--scheduler"
"""The other name of --scheduler-config: in a file of flags the knobs stand there themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPlace:
    """Where the event log is."""

    path: str
    file_max_bytes: int = EVENT_LOG_MAX_MB * 10**6  # then the next file is begun


def knob(default: Any, help: str, *, secret: bool = False, **flag: Any) -> Any:
    """A field that becomes a command-line flag; `flag` goes to argparse. `secret`: left out of
    the configuration's repr."""
    return field(default=default, repr=not secret, metadata={"help": help, "flag": flag})


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentConfig:
    """How many instances there are, how they are scheduled, and who may use them. `scheduler`
    follows from `policy`, `min_instances`, `max_instances`, `priority_class`, `survival` and
    `scheduler_config`."""

    instances: int = knob(2, "How many vLLM instances to start.", type=int, metavar="N")
    policy: str | None = knob(
        None,
        "How requests are scheduled; llumnix if neither this nor --scheduler-config says.",
        type=served,
        choices=list(POLICIES),
    )
    min_instances: int | None = knob(
        None, "Let the load decide the number of instances: never fewer.", type=int, metavar="N"
    )
    max_instances: int | None = knob(
        None, "Let the load decide the number of instances: never more.", type=int, metavar="N"
    )
    priority_class: Sequence[str] | None = knob(
        None,
        "A class of requests: vLLM's priority number (lower is served earlier), and the share of "
        "KV memory kept free where one of them runs. Again for each class; replaces the defaults, "
        "high=-100:0.88 and normal=0.",
        action="append",
        metavar="NAME=NUMBER[:HEADROOM]",
    )
    queue_max: int | None = knob(
        None,
        "Answer 429 once so many requests wait and no room is near; default: all may wait.",
        type=int,
        metavar="N",
    )
    scheduler_config: str | None = knob(
        None,
        "The scheduler's finer knobs, a YAML file (docs/scheduling.md). In the --config file they "
        "may stand under `scheduler`.",
        metavar="FILE",
    )
    survival: str | None = knob(
        None,
        "Whether a request goes on when its engine dies; on if --scheduler-config does not say.",
        choices=["on", "off"],
    )
    ray_address: str | None = knob(
        None,
        "Join this Ray cluster (HOST:PORT, or 'auto' for the one running here) instead of starting "
        "Ray on this machine.",
        metavar="ADDRESS",
    )
    ray_wait: float = knob(
        0.0, "Seconds in which hosts with room for all may join it.", type=float, metavar="S"
    )
    event_log: str | None = knob(
        None,
        "Append every fact, decision and migration step to this file (JSON lines; "
        "`llumnix replay` reads it).",
        metavar="PATH",
    )
    event_log_max_mb: float = knob(
        EVENT_LOG_MAX_MB,
        "Size of a file of --event-log, in MB, before the next begins; the last four are kept.",
        type=float,
        metavar="MB",
    )
    log_format: str = knob(
        "text",
        "How lines of the log look, vLLM's too; json: one JSON object a line.",
        choices=["text", "json"],
    )
    log_dir: str | None = knob(
        None,
        "Keep the logs of engines and controller in this folder, on each host, a file a process.",
        metavar="DIR",
    )
    migration_bandwidth: float | None = knob(
        None,
        "Limit on what one worker pulls for migrations, in MB/s.",
        type=float,
        metavar="MB_PER_S",
    )
    insecure: bool = knob(
        False,
        "Serve beyond loopback without an --api-key; or with one, and let it administer there "
        "without an --admin-api-key.",
        action="store_true",
    )
    api_key_file: str | None = knob(
        None, "File with more keys like --api-key's, one a line.", metavar="FILE"
    )
    admin_api_key: Sequence[str] | None = knob(
        None,
        "Keys that also administer: our routes that change something or show others' requests, "
        f"and vLLM's that concern the engines. Default: ${ADMIN_API_KEY_VARIABLE}.",
        secret=True,
        nargs="+",
        metavar="KEY",
    )
    admin_api_key_file: str | None = knob(
        None, "File with more keys like --admin-api-key's, one a line.", metavar="FILE"
    )
    keys: str | None = knob(
        None,
        "YAML file of keys with names, roles and limits, which is read again on `llumnix reload` "
        "(docs/keys.md).",
        metavar="FILE",
    )
    allowed_host: Sequence[str] | None = knob(
        None,
        "A name that requests without a key may be addressed to, beside names and addresses of "
        "this machine, for a reverse proxy that passes its own Host on. Again for each; * for any.",
        action="append",
        metavar="NAME",
    )
    max_body_mb: float = knob(
        BODY_MAX_MB, "The largest request body, in MB.", type=float, metavar="MB"
    )
    max_stream_interval: int = knob(
        STREAM_INTERVAL_MAX,
        "The most tokens that a stream's chunk joins while the HTTP process cannot keep up; 1: "
        "none are joined.",
        type=int,
        metavar="TOKENS",
    )
    ready_min: int = knob(
        1, "How many instances must serve for GET /ready to answer 200.", type=int, metavar="N"
    )
    lame_duck: float = knob(
        0.0,
        "Seconds after the first signal to stop in which requests are let in, and /ready is 503.",
        type=float,
        metavar="S",
    )
    metrics_port: int | None = knob(
        None,
        "Port for /metrics, /live and /ready alone, beside the model's; 0: any free one.",
        type=int,
        metavar="PORT",
    )
    metrics_host: str = knob("127.0.0.1", "Where --metrics-port listens.", metavar="HOST")
    metrics_open: bool = knob(
        False, "Show metrics at --metrics-port to everybody, without a key.", action="store_true"
    )
    no_ui: bool = knob(
        False, "Leave out /llumnix/ui, the page that shows the deployment.", action="store_true"
    )
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)

    def __post_init__(self) -> None:
        given = {name: f"{option_strings(name)[0]} {getattr(self, name):g}" for name in BOUNDED}
        for name in ("instances", "ready_min"):
            if getattr(self, name) < 1:
                raise UsageError(f"{given[name]}: must be 1 or more")
        for name in ("event_log_max_mb", "max_body_mb"):
            if not 0 < getattr(self, name) <= SIZE_MAX_MB:
                raise UsageError(f"{given[name]}: must be above 0, and {SIZE_MAX_MB} at most")
        for name in ("lame_duck", "ray_wait"):
            if not 0 <= getattr(self, name) <= WAIT_MAX_S:
                raise UsageError(f"{given[name]}: must be seconds from 0 to {WAIT_MAX_S}")
        limit = self.migration_bandwidth
        if limit is not None and not 0 < limit <= SIZE_MAX_MB:
            raise UsageError(
                f"--migration-bandwidth {limit}: must be above 0; leave it out for no limit"
            )
        if self.max_stream_interval < 1:
            raise UsageError(
                f"--max-stream-interval {self.max_stream_interval}: must be 1 or more; with 1 no "
                "tokens are joined"
            )
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65535:
            raise UsageError(f"--metrics-port {self.metrics_port}: must be 0 to 65535")
        for name in self.allowed_host or ():
            if name != "*" and not re.fullmatch(r"[\w.-]+", name):
                raise UsageError(
                    f"--allowed-host {name}: give the name alone, without scheme, port and path"
                )
        # A frozen dataclass has no other way to set a field that follows from others.
        object.__setattr__(self, "scheduler", self._scheduler())
        scaling = self.scheduler.scaling
        most, least = scaling.instances_max, scaling.instances_min or 1
        if most is not None and not least <= self.instances <= most:
            raise UsageError(
                f"--instances {self.instances} is what it starts with, so it must lie between "
                f"--min-instances {least} and --max-instances {most}"
            )

    @property
    def slots(self) -> int:
        """The most instances that the configuration allows for."""
        return max(self.instances, self.scheduler.scaling.instances_max or 0)

    @property
    def log_place(self) -> LogPlace | None:
        """Where the event log is, for a process in any folder; None if there is none."""
        if self.event_log is None:
            return None
        path = str(Path(self.event_log).absolute())
        return LogPlace(path=path, file_max_bytes=round(self.event_log_max_mb * 1e6))

    def _scheduler(self) -> SchedulerSettings:
        settings = read_settings(self.scheduler_config)
        if self.policy is not None:
            settings = replace(settings, policy=self.policy)
        flags = {"instances_min": self.min_instances, "instances_max": self.max_instances}
        given = {name: value for name, value in flags.items() if value is not None}
        if given:
            settings = replace(settings, scaling=replace(settings.scaling, **given))
        if self.queue_max is not None:
            settings = replace(settings, admission=AdmissionSettings(queue_max=self.queue_max))
        if self.priority_class:
            classes = tuple(_priority_class(text) for text in self.priority_class)
            settings = replace(settings, priorities=replace(settings.priorities, classes=classes))
        return with_survival(settings, self.survival)


def knobs() -> list[tuple[str, Any, dict[str, Any]]]:
    """Every knob as (field name, default, arguments for argparse's `add_argument`)."""
    return [
        (f.name, f.default, {"help": f.metadata["help"], **f.metadata["flag"]})
        for f in fields(DeploymentConfig)
        if "flag" in f.metadata
    ]


def option_strings(name: str) -> tuple[str, ...]:
    """How the knob of that name is called on the command line."""
    flag = "--" + name.replace("_", "-")
    return (flag, SCHEDULER_FLAG) if name == "scheduler_config" else (flag,)


def read_keys(path: str, flag: str) -> list[str]:
    """The API keys in a file, one a line; blank lines and lines that begin with # do not count.
    `UsageError` names the flag and the file, never a key."""
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{flag} {path} is no text; write one key a line") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UsageError(f"{flag} {path} holds no key; write one a line")
    return check_keys(keys, f"{flag} {path}")


def check_keys(keys: Sequence[str], where: str) -> list[str]:
    """The keys, if each can be sent in a header; else `UsageError`, which never names a key."""
    for key in keys:
        if not key:
            raise UsageError(f"{where}: a key is empty (a variable that is not set?)")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UsageError(
                f"{where}: a key may have letters, digits and signs of ASCII alone, and no spaces"
            )
    return list(keys)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def with_survival(settings: SchedulerSettings, switch: str | None) -> SchedulerSettings:
    """The settings with `--survival` on, off, or as they say."""
    if switch == "off":
        return replace(settings, survival=replace(settings.survival, lives=0))
    if switch == "on" and not settings.survival.on:
        raise UsageError("--survival on, but --scheduler-config says survival.lives: 0")
    return settings


def read_settings(path: str | None) -> SchedulerSettings:
    """The scheduler's settings in a YAML file or in braces. `UsageError` names file and knob."""
    if path is None:
        return SchedulerSettings()
    inline = path.lstrip().startswith("{")
    where = SCHEDULER_FLAG if inline else f"--scheduler-config {path}"
    tree = (parse_yaml(path, where) if inline else read_yaml(path, where)) or {}
    try:
        _check_names(tree, SchedulerSettings, "", where)
        settings = msgspec.convert(tree, SchedulerSettings)
    except (msgspec.ValidationError, UsageError) as error:
        raise UsageError(f"{where}: {error}") from error
    if served(settings.policy) not in POLICIES:
        raise UsageError(
            f"{where}: no policy {settings.policy!r}; there are: " + ", ".join(POLICIES)
        )
    return settings


def _check_names(tree: Any, kind: Any, where: str, source: str) -> None:
    """Raises `UsageError` on a key that is no knob, since it would set nothing. Renames knobs in
    `tree` that have their former names, with a warning that names where they were read."""
    if not isinstance(tree, dict):
        said = type(tree).__name__  # Not what it holds, which may be a key.
        raise UsageError(f"{where or 'the file'}: expected `knob: value` lines, not a {said}")
    _rename(tree, kind, where, source)
    known = get_type_hints(kind)
    for name, value in tree.items():
        path = f"{where}.{name}" if where else str(name)
        if name not in known:
            # Among the priorities it may be a key of `key_caps` that is not indented.
            told = where not in ("", "priorities") or get_close_matches(str(name), known, 1)
            said = path if told else f"of that name in {where or 'the file'}"
            raise UsageError(f"no knob {said}; there are: {', '.join(known)}")
        if is_dataclass(known[name]):
            _check_names(value, known[name], path, source)
        elif name == "classes" and isinstance(value, list):
            for number, each in enumerate(value):
                _check_names(each, PriorityClass, f"{path}[{number}]", source)


def _rename(tree: dict[Any, Any], kind: Any, where: str, source: str) -> None:
    """Gives knobs their present names."""
    for f in fields(kind):
        was = f.metadata.get("was")
        if was is None or was not in tree:
            continue
        old, new = f"{where}.{was}", f"{where}.{f.name}"
        if f.name in tree:
            raise UsageError(f"{old} is the former name of {new}; give that alone")
        logger.warning(
            "%s: %s is now called %s; the next release does not know the old name.",
            source,
            old,
            new,
        )
        tree[f.name] = tree.pop(was)


def _priority_class(text: str) -> PriorityClass:
    name, _, rest = text.partition("=")
    number, _, headroom = rest.partition(":")
    try:
        return PriorityClass(name=name, priority=int(number), headroom=float(headroom or 0))
    except ValueError as error:
        raise UsageError(
            f"--priority-class {text}: expected NAME=NUMBER or NAME=NUMBER:HEADROOM, like "
            "high=-100:0.88"
        ) from error
