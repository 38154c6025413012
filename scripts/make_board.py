"""Makes deploy/grafana/llumnix.json, the Grafana board, from the table below.

`python scripts/make_board.py` writes it. A row of the board is a list of panels; a panel has a
title, a unit of Grafana's, and its queries with their legends. tests/deploy/test_board.py holds
every query to the metrics that there are.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOARD = Path(__file__).resolve().parents[1] / "deploy" / "grafana" / "llumnix.json"
GRID = 24  # columns of Grafana's grid
HEIGHT = 8  # of a panel, in its rows
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]  # PromQL and legend
    help: str = ""
    kind: str = "timeseries"
    stacked: bool = False
    width: int = 8


def by(metric: str, *labels: str, **equal: str) -> str:
    """A counter's rate, by these labels."""
    choice = ", ".join(f'{name}="{value}"' for name, value in equal.items())
    return f"sum by ({', '.join(labels)}) (rate({metric}{{{choice}}}[$__rate_interval]))"


def quantiles(metric: str, choice: str = "", *labels: str) -> tuple[tuple[str, str], ...]:
    """P50 and P99 of a histogram."""
    grouped = ", ".join((*labels, "le"))
    rate = f"sum by ({grouped}) (rate({metric}_bucket{{{choice}}}[$__rate_interval]))"
    of = "".join(f" {{{{{label}}}}}" for label in labels)
    return tuple(
        (f"histogram_quantile({q}, {rate})", f"P{round(100 * q)}{of}") for q in (0.5, 0.99)
    )


E = 'engine=~"$engine"'
C = 'class=~"$class"'

ROWS: dict[str, list[Panel]] = {
    "Now": [
        Panel("Instances", "none", (("llumnix_instances", "{{state}}"),), stacked=True),
        Panel(
            "KV memory in use",
            "percentunit",
            (
                (
                    f"llumnix_instance_kv_used_tokens{{{E}}} / llumnix_instance_kv_capacity_tokens",
                    "{{engine}}",
                ),
                ("llumnix_kv_usage_ratio", "all"),
            ),
        ),
        Panel(
            "Freeness",
            "none",
            (
                (f"llumnix_instance_freeness_tokens{{{E}}}", "{{engine}}"),
                ("llumnix_mean_freeness_tokens", "mean"),
            ),
            "Spare tokens for each request. Below 0 an instance wants more memory than it has.",
        ),
        Panel(
            "Waiting, by class",
            "none",
            ((f'llumnix_class_requests{{{C}, phase="waiting"}}', "{{class}}"),),
            stacked=True,
        ),
        Panel(
            "Running, by instance",
            "none",
            ((f'llumnix_instance_requests{{{E}, phase="running"}}', "{{engine}}"),),
            stacked=True,
        ),
        Panel(
            "Time since the last step",
            "s",
            ((f"llumnix_instance_last_step_age_seconds{{{E}}}", "{{engine}}"),),
            "While there are requests. A hung engine's grows.",
        ),
    ],
    "Clients": [
        Panel("Time to first token", "s", quantiles("vllm:time_to_first_token_seconds", E)),
        Panel(
            "Time per output token",
            "s",
            quantiles("vllm:request_time_per_output_token_seconds", E),
        ),
        Panel("Whole request", "s", quantiles("vllm:e2e_request_latency_seconds", E)),
        Panel(
            "Tokens",
            "tps",
            (
                (f"sum(rate(vllm:prompt_tokens_total{{{E}}}[$__rate_interval]))", "prompt"),
                (f"sum(rate(vllm:generation_tokens_total{{{E}}}[$__rate_interval]))", "output"),
            ),
        ),
        Panel(
            "Streams that outlived their engine, and that did not",
            "none",
            (
                (
                    "sum by (how) (increase(llumnix_streams_survived_total[$__rate_interval]))",
                    "{{how}}",
                ),
                (
                    'sum by (how) (increase(llumnix_streams_ended_total{how=~"lost|quarantined"}'
                    "[$__rate_interval]))",
                    "{{how}}",
                ),
                ('llumnix_streams{state="orphaned"}', "wait"),
            ),
        ),
        Panel(
            "Pause of a stream whose engine died (P99)",
            "s",
            quantiles("llumnix_stream_gap_seconds", "", "how")[1:],
        ),
        Panel("Refusals", "reqps", ((by("llumnix_gate_refusals_total", "code"), "{{code}}"),)),
    ],
    "Moves": [
        Panel("By reason", "ops", ((by("llumnix_migrations_total", "reason"), "{{reason}}"),)),
        Panel("By outcome", "ops", ((by("llumnix_migrations_total", "outcome"), "{{outcome}}"),)),
        Panel(
            "Why they were called off",
            "ops",
            ((by("llumnix_migration_aborts_total", "code"), "{{code}}"),),
        ),
        Panel(
            "Out of one batch to ready in the next",
            "s",
            quantiles("llumnix_migration_downtime_seconds", 'copy="staged"'),
        ),
        Panel(
            "Bytes copied",
            "Bps",
            (("sum(rate(llumnix_migration_bytes_total[$__rate_interval]))", "bytes"),),
        ),
        Panel(
            "Requests that lost their memory to others",
            "reqps",
            (
                (
                    f"sum by (class) (rate(llumnix_preemptions_total{{{C}}}[$__rate_interval]))",
                    "{{class}}",
                ),
            ),
        ),
    ],
    "Changes": [
        Panel(
            "Engines started again",
            "none",
            (("sum by (cause) (increase(llumnix_restarts_total[$__rate_interval]))", "{{cause}}"),),
        ),
        Panel(
            "Drains that ended",
            "none",
            (
                (
                    "sum by (cause, outcome) (increase(llumnix_drains_total[$__rate_interval]))",
                    "{{cause}}: {{outcome}}",
                ),
            ),
        ),
        Panel("How long a start takes", "s", quantiles("llumnix_instance_start_seconds")),
        Panel("How long a drain takes", "s", quantiles("llumnix_drain_seconds")),
        Panel(
            "What scaling decided",
            "none",
            (
                (
                    "sum by (decision, outcome) "
                    "(increase(llumnix_scaling_decisions_total[$__rate_interval]))",
                    "{{decision}}: {{outcome}}",
                ),
            ),
        ),
    ],
    "Cost": [
        Panel(
            "Time added before a request is with its engine (P99)",
            "s",
            quantiles("llumnix_routing_seconds", "", "part")[1:],
        ),
        Panel(
            "From the question to the instance (P99)",
            "s",
            quantiles("llumnix_dispatch_seconds", "", "via")[1:],
        ),
        Panel(
            "Event loop late by",
            "s",
            quantiles("llumnix_loop_lag_seconds", "", "process"),
        ),
        Panel(
            "Controller's use of its core",
            "percentunit",
            (("rate(llumnix_controller_busy_seconds_total[$__rate_interval])", "busy"),),
        ),
        Panel(
            "Controller answers",
            "bool_yes_no",
            (("min(llumnix_controller_up)", "controller"),),
        ),
        Panel(
            "Time of a scrape",
            "s",
            (
                (
                    "scrape_duration_seconds and on (job, instance) llumnix_build_info",
                    "{{instance}}",
                ),
            ),
        ),
    ],
}

ANNOTATIONS = {
    "Restarts": ("sum by (engine, cause) (changes(llumnix_restarts_total[1m])) > 0", "red"),
    "Drains": ("sum by (cause, outcome) (changes(llumnix_drains_total[1m])) > 0", "blue"),
    "Scaling": ("sum by (decision) (changes(llumnix_scaling_decisions_total[1m])) > 0", "purple"),
}
VARIABLES = {
    "engine": "label_values(llumnix_instance_info, engine)",
    "class": "label_values(llumnix_class_requests, class)",
}


def queries() -> Iterator[tuple[str, str]]:
    """Every query of the board, with where it stands."""
    for panels in ROWS.values():
        for panel in panels:
            yield from ((panel.title, text) for text, _ in panel.queries)
    yield from ((title, text) for title, (text, _) in ANNOTATIONS.items())


def board() -> dict[str, Any]:
    """All of it, as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        place = {"h": 1, "w": GRID, "x": 0, "y": top}
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": place,
                "panels": [],
            }
        )
        top, left = top + 1, 0
        for panel in row:
            if left + panel.width > GRID:
                top, left = top + HEIGHT, 0
            place = {"h": HEIGHT, "w": panel.width, "x": left, "y": top}
            panels.append(_panel(panel, len(panels) + 1, place))
            left += panel.width
        top += HEIGHT
    return {
        "uid": "llumnix",
        "title": "llumnix",
        "tags": ["llumnix", "vllm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "annotations": {"list": [_annotation(n, q, c) for n, (q, c) in ANNOTATIONS.items()]},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                *(_variable(name, text) for name, text in VARIABLES.items()),
            ]
        },
        "panels": panels,
    }


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    custom: dict[str, Any] = {"lineWidth": 1, "fillOpacity": 10, "showPoints": "never"}
    if panel.stacked:
        custom |= {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 60}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom}, "overrides": []},
        "options": {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list"}},
        "targets": [
            {"refId": chr(ord("A") + n), "datasource": SOURCE, "expr": text, "legendFormat": legend}
            for n, (text, legend) in enumerate(panel.queries)
        ],
    }


def _annotation(name: str, query: str, colour: str) -> dict[str, Any]:
    return {
        "name": name,
        "datasource": SOURCE,
        "enable": True,
        "expr": query,
        "iconColor": colour,
        "step": "60s",
        "titleFormat": name,
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
        "sort": 3,
    }


def text() -> str:
    """The file."""
    return json.dumps(board(), indent=1) + "\n"


if __name__ == "__main__":
    BOARD.write_text(text())
