"""Each alert fires when what it is for happens, and clears when that is over: as Prometheus' own
test program evaluates the rules."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

RULES = Path(__file__).resolve().parents[2] / "deploy" / "prometheus" / "alerts.yml"
ALERTS = [rule["alert"] for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]]
EVERY_S = 5
promtool = shutil.which("promtool") or "promtool"

WHERE = 'job="llumnix", instance="a:8000"'


def flat(value: float, seconds: int) -> str:
    """The same at each scrape, for so long."""
    return f"{value}x{seconds // EVERY_S}"


def grows(step: float, seconds: int) -> str:
    """A counter from 0 that grows so much between two scrapes."""
    return f"0+{step}x{seconds // EVERY_S}"


def then(*parts: str) -> str:
    return " ".join(parts)


def happens(count: int, before: int = 60, after: int = 1800) -> str:
    """A counter that grows by so much at once, a minute after the start."""
    return then(flat(0, before), flat(count, after))


def is_for(value: float, seconds: int, else_value: float = 0) -> str:
    """A gauge that has the value from a minute on, for so long."""
    return then(flat(else_value, 60), flat(value, seconds), flat(else_value, 1800))


CASES: dict[str, tuple[dict[str, str], int, int]] = {
    "LlumnixDown": (
        {f"up{{{WHERE}}}": is_for(0, 120, 1), f"llumnix_build_info{{{WHERE}}}": flat(1, 60)},
        100,
        240,
    ),
    "LlumnixNoInstanceServes": (
        {f'llumnix_instances{{state="serving", {WHERE}}}': is_for(0, 60, 2)},
        80,
        180,
    ),
    "LlumnixStartTakesLong": (
        {f'llumnix_instances{{state="serving", {WHERE}}}': then(flat(0, 1200), flat(2, 1800))},
        1000,
        1300,
    ),
    "LlumnixInstanceFailed": (
        {f'llumnix_instances{{state="failed", {WHERE}}}': is_for(1, 60)},
        80,
        180,
    ),
    "LlumnixInstanceRestarts": (
        {f'llumnix_restarts_total{{engine="0", cause="signal", {WHERE}}}': happens(3)},
        100,
        900,
    ),
    "LlumnixInstanceHangs": (
        {f'llumnix_instance_last_step_age_seconds{{engine="0", {WHERE}}}': is_for(16, 60)},
        80,
        180,
    ),
    "LlumnixStreamsWait": (
        {f'llumnix_streams{{state="orphaned", {WHERE}}}': is_for(2, 60)},
        90,
        180,
    ),
    "LlumnixStreamLost": (
        {f'llumnix_streams_ended_total{{how="lost", {WHERE}}}': happens(1)},
        90,
        500,
    ),
    "LlumnixRequestQuarantined": (
        {f"llumnix_requests_quarantined_total{{{WHERE}}}": happens(1)},
        90,
        500,
    ),
    "LlumnixControllerBypassed": (
        {f'llumnix_controller_up{{process="frontend1", {WHERE}}}': is_for(0, 60, 1)},
        80,
        180,
    ),
    "LlumnixControllerRestarts": (
        {f"llumnix_controller_starts_total{{{WHERE}}}": happens(4)},
        100,
        500,
    ),
    "LlumnixFrontendFailed": (
        {f'llumnix_frontend_processes{{state="failed", {WHERE}}}': is_for(1, 60)},
        80,
        180,
    ),
    "LlumnixLoopLags": (
        {
            f'llumnix_loop_lag_seconds_bucket{{process="office", le="0.05", {WHERE}}}': then(
                flat(0, 600), grows(100, 1200)
            ),
            f'llumnix_loop_lag_seconds_bucket{{process="office", le="0.1", {WHERE}}}': then(
                grows(100, 600), f"12000+100x{1200 // EVERY_S}"
            ),
            f'llumnix_loop_lag_seconds_bucket{{process="office", le="+Inf", {WHERE}}}': then(
                grows(100, 600), f"12000+100x{1200 // EVERY_S}"
            ),
        },
        400,
        1000,
    ),
    "LlumnixNoRoom": ({f"llumnix_mean_freeness_tokens{{{WHERE}}}": is_for(-5, 180, 9)}, 200, 300),
    "LlumnixRefusesForLoad": (
        {
            f'llumnix_gate_refusals_total{{code="queue_full", {WHERE}}}': then(
                grows(1, 600), flat(120, 1800)
            ),
            f'llumnix_dispatches_total{{policy="llumnix", reason="soonest", {WHERE}}}': grows(
                10, 2400
            ),
        },
        500,
        1200,
    ),
    "LlumnixScalingRefused": (
        {
            f'llumnix_scaling_decisions_total{{decision="add", outcome="refused", {WHERE}}}': (
                happens(1)
            )
        },
        100,
        900,
    ),
    "LlumnixDrainTakesLong": (
        {f'llumnix_instances{{state="draining", {WHERE}}}': is_for(1, 420)},
        420,
        600,
    ),
    "LlumnixMovesAbort": (
        {
            f'llumnix_migrations_total{{reason="balance", outcome="aborted", {WHERE}}}': then(
                grows(1, 900), flat(180, 1800)
            ),
            f'llumnix_migrations_total{{reason="balance", outcome="migrated", {WHERE}}}': grows(
                1, 2700
            ),
        },
        800,
        2000,
    ),
    "LlumnixMovesPause": (
        {
            f'llumnix_migration_downtime_seconds_bucket{{copy="staged", le="0.1", {WHERE}}}': then(
                flat(0, 900), grows(1, 1800)
            ),
            f'llumnix_migration_downtime_seconds_bucket{{copy="staged", le="0.25", {WHERE}}}': then(
                grows(1, 900), f"180+1x{1800 // EVERY_S}"
            ),
            f'llumnix_migration_downtime_seconds_bucket{{copy="staged", le="+Inf", {WHERE}}}': then(
                grows(1, 900), f"180+1x{1800 // EVERY_S}"
            ),
        },
        800,
        2000,
    ),
    "LlumnixEventLogDrops": (
        {f'llumnix_event_log_dropped_total{{writer="engine", {WHERE}}}': happens(7)},
        90,
        500,
    ),
}
"""Of each alert: its series, when it fires, and when it is clear again, in seconds."""


@pytest.fixture(scope="module", autouse=True)
def needs_promtool() -> None:
    if shutil.which(promtool) is None:
        pytest.skip("needs promtool (Debian's package prometheus)")


def run(*words: object) -> str:
    """What promtool says, if it is not content."""
    done = subprocess.run([promtool, *map(str, words)], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def looked_at(alert: str, at_s: int, firing: bool) -> dict[str, Any]:
    """`alert`: its name, or several as a regular expression."""
    return {
        "expr": f'count(count(ALERTS{{alertname=~"{alert}", alertstate="firing"}}))',
        "eval_time": f"{at_s}s",
        "exp_samples": [{"labels": "{}", "value": 1}] if firing else [],
    }


def test_prometheus_reads_the_rules() -> None:
    assert run("check", "rules", "--lint-fatal", RULES) == ""


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_fires_and_clears(alert: str, tmp_path: Path) -> None:
    series, fires_s, clear_s = CASES[alert]
    looks = [(30, False), (fires_s, True), (clear_s, False)]
    assert wrong(tmp_path, series, alert, looks) == ""


def wrong(folder: Path, series: dict[str, str], alert: str, looks: list[tuple[int, bool]]) -> str:
    """What promtool says of these series if the alert does not fire as it should: at which seconds,
    and whether."""
    test = {
        "interval": f"{EVERY_S}s",
        "input_series": [{"series": s, "values": values} for s, values in series.items()],
        "promql_expr_test": [looked_at(alert, at_s, firing) for at_s, firing in looks],
    }
    file = folder / "test.yml"
    whole = {"rule_files": [str(RULES)], "evaluation_interval": f"{EVERY_S}s", "tests": [test]}
    file.write_text(yaml.safe_dump(whole))
    return run("test", "rules", file)


def test_a_start_that_takes_ten_minutes_wakes_nobody(tmp_path: Path) -> None:
    first = 'job="llumnix", instance="b:8000"'
    series = {
        f'llumnix_instances{{state="serving", {first}}}': then(flat(0, 600), flat(2, 600)),
        f'llumnix_instances{{state="starting", {first}}}': then(flat(2, 600), flat(0, 600)),
        # Another deployment serves all the while.
        f'llumnix_instances{{state="serving", {WHERE}}}': flat(2, 1200),
    }
    looks = [(at_s, False) for at_s in (30, 60, 300, 590, 900)]
    assert wrong(tmp_path, series, ".*", looks) == ""


def test_an_outage_is_never_without_an_alert(tmp_path: Path) -> None:
    series = {f'llumnix_instances{{state="serving", {WHERE}}}': is_for(0, 3 * 3600, 2)}
    looks = [(at_s, True) for at_s in (80, 900, 1000, 3500, 3700, 3900, 10000)]
    either = "LlumnixNoInstanceServes|LlumnixStartTakesLong"
    assert wrong(tmp_path, series, either, looks) == ""


def test_every_alert_says_how_urgent_it_is_and_what_to_do() -> None:
    for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"].keys() == {"summary", "description"}
