"""All of llumnix's own metrics: each name once, with its type, help, labels and buckets.

docs/metrics.md is drawn from this module. Names, labels and their values are promises
(tests/observe/test_metrics.py has a copy).

Rules
- All combinations of labels exist from the start, at 0. A rate would miss the first event
  otherwise. Values that only a running deployment knows are given to `settle`.
- Each process counts what is its own: a frontend its streams and their moves, the fleet its
  instances. So the processes of a deployment may be added up (`PROMETHEUS_MULTIPROC_DIR`), and
  a gauge says how (`multiprocess_mode`). What is made only when somebody asks is a `Family` alone
  (observe/fleet_metrics.py).
- No label is `instance` or `job`, since Prometheus sets these. An instance is its slot, `engine`,
  as in vLLM's metrics.
- Nothing is counted for each token.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product

from prometheus_client import Counter, Gauge, Histogram

from llumnix.core.codes import AbortCode, DeathCode, DispatchCode, MoveCode
from llumnix.core.messages import COPIES

ROUTING_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
HANDOVER_S = (0.001, 0.002, 0.004, 0.006, 0.008, 0.012, 0.016, 0.024, 0.032, 0.05, 0.1, 0.25, 1, 5)
MOVE_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60)
LONG_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 15, 30, 60, 180, 600, 1800)
STAGES = (1, 2, 3, 4, 6, 8, 12, 16)

Labels = Mapping[str, tuple[str, ...]]
OPEN: tuple[str, ...] = ()
"""In place of a label's values, if only a running deployment knows them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One metric, as it is shown."""

    name: str
    kind: str  # counter, gauge or histogram
    help: str
    labels: Labels = field(default_factory=dict)
    buckets: tuple[float, ...] = ()


FAMILIES: dict[str, Family] = {}
"""By name, in the order of the page."""
_COUNTED: list[tuple[Counter | Gauge | Histogram, Labels]] = []


def _family(
    kind: str, name: str, text: str, labels: Labels | None = None, buckets: tuple[float, ...] = ()
) -> Family:
    """One that is made when somebody asks."""
    name = f"llumnix_{name}" + "_total" * (kind == "counter")
    found = Family(name=name, kind=kind, help=text, labels=labels or {}, buckets=buckets)
    FAMILIES[name] = found
    return found


def _counter(name: str, text: str, labels: Labels | None = None) -> Counter:
    one = _family("counter", name, text, labels)
    metric = Counter(one.name, text, tuple(one.labels))
    _COUNTED.append((metric, one.labels))
    return metric


def _gauge(name: str, text: str, labels: Labels | None = None) -> Gauge:
    one = _family("gauge", name, text, labels)
    metric = Gauge(one.name, text, tuple(one.labels), multiprocess_mode="livesum")
    _COUNTED.append((metric, one.labels))
    return metric


def _histogram(
    name: str, text: str, buckets: tuple[float, ...], labels: Labels | None = None
) -> Histogram:
    one = _family("histogram", name, text, labels, buckets)
    metric = Histogram(one.name, text, tuple(one.labels), buckets=buckets)
    _COUNTED.append((metric, one.labels))
    return metric


def settle(values: Mapping[str, Iterable[str]]) -> None:
    """Shows all combinations of labels, at 0. `values`: those of labels that only a running
    deployment knows."""
    for metric, labels in _COUNTED:
        choices = [known or tuple(values.get(name, ())) for name, known in labels.items()]
        if choices:
            for combination in product(*choices):
                metric.labels(*combination)


# -- the fleet, whenever somebody asks (observe/fleet_metrics.py)

PHASES = ("running", "waiting")
ENGINE: Labels = {"engine": OPEN}

BUILD_INFO = _family(
    "gauge", "build_info", "Versions and policy in use; always 1",
    {"version": OPEN, "vllm": OPEN, "ray": OPEN, "policy": OPEN},
)  # fmt: skip
INSTANCES = _family(
    "gauge", "instances", "Instances by state; one that is hung counts as what it would be",
    {"state": ("starting", "serving", "draining", "stopping", "restarting", "failed")},
)  # fmt: skip
INSTANCE_INFO = _family(
    "gauge", "instance_info", "Where an instance runs; always 1",
    {**ENGINE, "id": OPEN, "node": OPEN, "devices": OPEN},
)  # fmt: skip
FREENESS = _family(
    "gauge", "instance_freeness_tokens",
    "Freeness in tokens a request; absent while the instance is drained or silent", ENGINE,
)  # fmt: skip
VIRTUAL_USAGE = _family(
    "gauge", "instance_virtual_usage_tokens",
    "KV tokens used, wanted by the head of the queue, and kept free as headroom", ENGINE,
)  # fmt: skip
KV_USED = _family("gauge", "instance_kv_used_tokens", "KV tokens held by requests", ENGINE)
KV_CAPACITY = _family("gauge", "instance_kv_capacity_tokens", "KV tokens in all", ENGINE)
INSTANCE_REQUESTS = _family(
    "gauge", "instance_requests", "Requests in the batch and in the queue",
    {**ENGINE, "phase": PHASES},
)  # fmt: skip
STEP_AGE_S = _family(
    "gauge", "instance_last_step_age_seconds",
    "Since the last step was completed while there are requests, else 0; a hung engine's grows",
    ENGINE,
)  # fmt: skip
RUNNING = _family("gauge", "requests_running", "Requests in the batches of all instances")
WAITING = _family("gauge", "requests_waiting", "Requests in the queues of all instances")
KV_USAGE = _family("gauge", "kv_usage_ratio", "Share of all KV memory that requests hold")
MEAN_FREENESS = _family(
    "gauge", "mean_freeness_tokens", "Spare tokens for each request, over instances that stay"
)
CLASS_REQUESTS = _family(
    "gauge", "class_requests", "Batches and queues by priority class",
    {"class": OPEN, "phase": PHASES},
)  # fmt: skip
PREEMPTIONS = _family(
    "counter", "preemptions", "Requests that lost their KV memory to others", {"class": OPEN}
)
CONTROLLER_STARTS = _family("counter", "controller_starts", "Processes of the controller so far")
CONTROLLER_BUSY_S = _family(
    "counter", "controller_busy_seconds", "Time that the scheduler took for facts"
)
CONTROLLER_FACTS = _family(
    "counter", "controller_facts", "Facts that the scheduler was told",
    {"fact": ("RequestArrived", "LoadReported", "PrefixesChanged", "InstanceLost", "Tick",
              "FleetReported", "SettingsChanged")},
)  # fmt: skip
FRONTENDS = _family(
    "gauge", "frontend_processes", "Processes that speak HTTP",
    {"state": ("starting", "serving", "restarting", "failed")},
)  # fmt: skip
FRONTEND_RESTARTS = _family(
    "counter", "frontend_restarts", "Processes that speak HTTP and were started anew"
)

# -- instances come and go (cluster/)

RESTARTS = _counter(
    "restarts", "Runs of engines that died and were started anew",
    {**ENGINE, "cause": tuple(DeathCode)},
)  # fmt: skip
ENGINE_DEATHS = _counter(
    "engine_deaths", "Engines that ended unasked, how, and whether a request may have caused it",
    {"how": ("ended", "fenced"), "blamed": ("true", "false")},
)  # fmt: skip
START_S = _histogram("instance_start_seconds", "From the start of an engine to serving", LONG_S)
DRAIN_OUTCOMES = ("emptied", "undrained", "forced", "died")
DRAINS = _counter(
    "drains", "Drains that ended",
    {"cause": ("user", "scaling", "signal"), "outcome": DRAIN_OUTCOMES},
)  # fmt: skip
DRAIN_S = _histogram(
    "drain_seconds", "How long drains took", LONG_S, {"outcome": DRAIN_OUTCOMES}
)  # fmt: skip
SCALING = _counter(
    "scaling_decisions", "What scaling decided, and what became of it",
    {"decision": ("add", "drain", "undrain"), "outcome": ("done", "refused")},
)  # fmt: skip

# -- a request is placed (frontend/)

DISPATCHES = _counter(
    "dispatches", "Requests that were placed, by the reason; none: no instance could take it",
    {"policy": OPEN, "reason": tuple(DispatchCode)},
)  # fmt: skip
DISPATCH_S = _histogram(
    "dispatch_seconds", "From the question to the instance", ROUTING_S,
    {"via": ("controller", "self")},
)  # fmt: skip
ROUTING = _histogram(
    "routing_seconds",
    "Time added before a request is with its engine; total: all but vLLM's own rendering",
    ROUTING_S, {"part": ("gate", "hash", "dispatch", "send", "total")},
)  # fmt: skip
LOOP_LAG_S = _histogram(
    "loop_lag_seconds", "Lateness of a timer of 50 ms: what stalls all streams of the process",
    LAG_S, {"process": OPEN},
)  # fmt: skip
CONTROLLER_UP = _gauge(
    "controller_up", "Whether the controller answered last time; at 0 the process places by itself",
    {"process": OPEN},
)  # fmt: skip
CONTROLLER_BYPASSES = _counter(
    "controller_bypasses", "Times that a process began to place requests by itself"
)
HTTP_OPEN = _gauge("http_open", "HTTP requests that a stop would wait for")
KEYS_MAX = 100
"""So many keys of the file of --keys are told apart; those that come later count as `other`."""
KEY: Labels = {"key": OPEN}
KEY_REQUESTS = _counter(
    "key_requests", "Requests let in, by the name of their key in the file of --keys", KEY
)
KEY_TOKENS = _counter(
    "key_tokens", "Tokens of requests that ended, by the name of their key",
    {**KEY, "kind": ("prompt", "output")},
)  # fmt: skip
GATE_REFUSALS = _counter(
    "gate_refusals", "Requests that were turned away before vLLM",
    {"code": ("no_instance", "stopping", "queue_limit", "queue_full", "overloaded", "rate_limited",
              "too_many_open", "invalid_api_key", "admin_key_required", "role_required",
              "host_not_allowed", "foreign_origin", "too_large", "bad_class",
              "request_quarantined")},
)  # fmt: skip

# -- streams (frontend/streams/)

STREAMS = _gauge(
    "streams",
    "Streams of clients; held: tokens of a destination wait for the source's last ones; "
    "orphaned: none of the open ones' engines lives, and another is looked for",
    {"state": ("open", "held", "orphaned")},
)  # fmt: skip
STREAMS_ENDED = _counter(
    "streams_ended", "Streams by how they ended; lost or quarantined: an engine died",
    {"how": ("stop", "length", "abort", "error", "repetition", "lost", "quarantined")},
)  # fmt: skip
STREAMS_SURVIVED = _counter(
    "streams_survived",
    "Streams that outlived their engine: taken over by a move that was under way, revived "
    "elsewhere, or sent again since they had no token yet",
    {"how": ("handover", "revived", "resent")},
)  # fmt: skip
STREAM_GAP_S = _histogram(
    "stream_gap_seconds", "From the death of a stream's engine to its next token elsewhere",
    LONG_S, {"how": ("revived", "resent")},
)  # fmt: skip
QUARANTINED = _counter(
    "requests_quarantined", "Requests that were quarantined, since engines died of them"
)
QUARANTINE_REFUSALS = _counter(
    "quarantine_refusals", "New requests that were refused for their likeness to one"
)

# -- moves, counted by the frontend of the stream

COPY: Labels = {"copy": COPIES}
MIGRATIONS = _counter(
    "migrations", "Moves that ended",
    {"reason": tuple(MoveCode), "outcome": ("migrated", "aborted", "lost")},
)  # fmt: skip
MIGRATION_ABORTS = _counter(
    "migration_aborts", "Why moves were called off", {"code": tuple(AbortCode)}
)
MIGRATION_S = _histogram(
    "migration_seconds", "From the grant to the end of a move that succeeded", MOVE_S, COPY
)
MIGRATION_DOWNTIME_S = _histogram(
    "migration_downtime_seconds",
    "From out of the source's batch to the verdict, of a move that succeeded", HANDOVER_S, COPY,
)  # fmt: skip
MIGRATION_STAGES = _histogram(
    "migration_stages", "Stages that a move copied which succeeded", STAGES, COPY
)
MIGRATION_BYTES = _counter("migration_bytes", "KV bytes that were pulled for moves", COPY)
MIGRATIONS_OPEN = _gauge("migrations_open", "Moves under way")

# -- what watches

EVENT_LOG_DROPPED = _counter(
    "event_log_dropped", "Lines that could not be written to the event log",
    {"writer": ("frontend", "controller", "engine")},
)  # fmt: skip
UI_WATCHERS = _gauge("ui_watchers", "Open pages that show the deployment")

settle({})
