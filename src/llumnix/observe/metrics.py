"""llumnix's own metrics: deaths of engines, what becomes of their streams, quarantine, moves.

They are in prometheus_client's default registry, which vLLM's `/metrics` shows.

Rules
- A name, a label and each of its values is a promise. docs/operating.md lists them.
- All values of a label exist from the start, at 0. A rate would miss the first event otherwise.
- Each process counts what is its own: a frontend its streams and their moves, the fleet the deaths
  of engines. So vLLM may add up the processes of a deployment (`PROMETHEUS_MULTIPROC_DIR`), and a
  gauge says how (`multiprocess_mode`).
- Nothing is counted for each token.
"""

from itertools import product

from prometheus_client import Counter, Gauge, Histogram

from llumnix.core.messages import COPIES

HANDOVER_S = (0.001, 0.002, 0.004, 0.006, 0.008, 0.012, 0.016, 0.024, 0.032, 0.05, 0.1, 0.25, 1, 5)
MOVE_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60)
GAP_S = (0.1, 0.25, 0.5, 1, 1.5, 2, 4, 8, 15, 30, 60, 300)

ENGINE_DEATHS = Counter(
    "llumnix_engine_deaths",
    "Engines that ended unasked, how, and whether a request may have caused it",
    ("how", "blamed"),
)
STREAMS_WAITING = Gauge(
    "llumnix_streams",
    "Open streams without an engine, which wait for one to go on with them",
    ("state",),
    multiprocess_mode="livesum",
)
STREAMS_SURVIVED = Counter(
    "llumnix_streams_survived",
    "Streams that outlived their engine, by how",
    ("how",),
)
STREAM_GAP_S = Histogram(
    "llumnix_stream_gap_seconds",
    "From the death of a stream's engine to its next token elsewhere",
    ("how",),
    buckets=GAP_S,
)
STREAMS_ENDED = Counter(
    "llumnix_streams_ended",
    "Streams that ended with an error after the death of their engine, by how",
    ("how",),
)
QUARANTINED = Counter(
    "llumnix_requests_quarantined", "Requests that were quarantined, since engines died of them"
)
QUARANTINE_REFUSALS = Counter(
    "llumnix_quarantine_refusals", "New requests that were refused for their likeness to one"
)
MIGRATIONS = Counter("llumnix_migrations", "Migrations that ended, by outcome", ("outcome",))
MIGRATION_S = Histogram(
    "llumnix_migration_seconds",
    "From the grant to the end of a migration that succeeded",
    ("copy",),
    buckets=MOVE_S,
)
MIGRATION_DOWNTIME_S = Histogram(
    "llumnix_migration_downtime_seconds",
    "From out of the source's batch to the verdict, of a migration that succeeded",
    ("copy",),
    buckets=HANDOVER_S,
)
MIGRATION_BYTES = Counter(
    "llumnix_migration_bytes", "KV bytes that were pulled for migrations", ("copy",)
)

LABELS: dict[Counter | Gauge | Histogram, tuple[tuple[str, ...], ...]] = {
    ENGINE_DEATHS: (("ended", "fenced"), ("true", "false")),
    STREAMS_WAITING: (("orphaned",),),
    STREAMS_SURVIVED: (("handover", "revived", "resent"),),
    STREAM_GAP_S: (("revived", "resent"),),
    STREAMS_ENDED: (("lost", "quarantined"),),
    QUARANTINED: (),
    QUARANTINE_REFUSALS: (),
    MIGRATIONS: (("migrated", "aborted", "lost"),),
    MIGRATION_S: (COPIES,),
    MIGRATION_DOWNTIME_S: (COPIES,),
    MIGRATION_BYTES: (COPIES,),
}
"""All values of each label."""

for _metric, _values in LABELS.items():
    if _values:
        for _combination in product(*_values):
            _metric.labels(*_combination)
