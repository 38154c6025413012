"""The simulator's report."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from llumnix.errors import UsageError
from llumnix.sim.report.data import (
    POINTS_MAX,
    Run,
    distribution,
    downsampled,
    estimate,
    evenly_picked,
    natural_key,
    settings_of,
)
from llumnix.sim.report.page import three_digits, write_report
from llumnix.sim.report.timeline import ARCS_MAX, drawable, timeline, wrapped
from llumnix.sim.summary import spread_and_tail, t_975
from sim.fake_result import fake_result

SMALL = {"rates": (2.0, 4.0), "seeds": 2, "instances": 6, "samples": 20}


def page_of(result: dict[str, Any], folder: Path) -> str:
    """The page without plotly.js, which must be in it once."""
    write_report(result, folder / "report.html")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


def data_of(page: str) -> dict[str, Any]:
    """What the page's plots are drawn from."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def words_of(page: str) -> str:
    """What a reader sees of the page's HTML, its elements apart."""
    body = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    result = fake_result(**SMALL, classes=True, scaling=True)
    return page_of(result, tmp_path_factory.mktemp("report"))


def test_the_page_needs_nothing_else(page: str) -> None:
    loads = r"""\b(src|href)\s*=|https?:|@import|\bfetch\(|XMLHttpRequest|url\(|\bimport\("""
    assert re.findall(loads, page) == []
    assert "default-src &#x27;none&#x27;" in page


def test_every_policy_and_every_figure_is_in_it(page: str) -> None:
    data = data_of(page)
    policies = ["llumnix", "infaas++", "round-robin"]
    assert data["workloads"] == ["L-L, 6 instances"]
    assert [f["title"] for f in data["against_rate"][0]] == [
        "TTFT, P99",
        "TTFT, mean",
        "TPOT, P99",
        "End to end, mean",
        "Preemption loss, mean",
        "Fragmentation, mean",
        "Serving instances, mean",
    ]
    assert [s["rate"] for s in data["settings"]] == ["2 requests/s", "4 requests/s"]
    for setting in data["settings"]:
        assert [f["title"] for f in setting["distributions"]] == ["TTFT", "TPOT"]
        titles = [f["title"] for f in setting["over_time"]]
        assert titles in (
            ["Fragmentation", "Waiting requests"],
            ["Fragmentation", "Waiting requests", "Serving instances"],
        )
        for figure in setting["distributions"] + setting["over_time"]:
            assert [line["name"] for line in figure["data"]] == policies
        assert setting["policies"] == list(setting["runs"]) == policies
        assert all(run["figure"]["data"] and run["decisions"] for run in setting["runs"].values())
    words = words_of(page)
    assert "3 seeds" not in words
    assert "2 seeds · 12 runs, simulated in 12.3 s" in words
    assert "llama-7b on A10" in words
    assert "By priority class" in words


def test_every_axis_has_a_title_with_its_unit(page: str) -> None:
    data = data_of(page)
    figures = [*data["against_rate"][0]]
    for setting in data["settings"]:
        figures += setting["distributions"] + setting["over_time"]
        figures += [run["figure"] for run in setting["runs"].values()]
    titles = {
        axis["title"]["text"]
        for figure in figures
        for name, axis in figure["layout"].items()
        if re.match("[xy]axis", name)
    }
    unitless = {"instance", "instances", "requests", "waiting requests", "serving instances"}
    assert [t for t in titles - unitless if not re.search(r", (s|ms|%|requests/s)$", t)] == []


def test_a_policy_has_one_colour_whoever_it_is_compared_with(tmp_path: Path) -> None:
    def colours(*policies: str) -> dict[str, int]:
        return data_of(page_of(fake_result(**SMALL, policies=policies), tmp_path))["colours"]

    both, one = colours("llumnix", "round-robin", "mine"), colours("round-robin", "other")
    assert one["round-robin"] == both["round-robin"]
    assert len({both[name] for name in ("llumnix", "round-robin", "mine")}) == 3


def test_the_table_has_means_intervals_ratios_and_the_best_in_bold(tmp_path: Path) -> None:
    def run(policy: str, seed: int, p99: float, moves: int) -> Run:
        metrics = {
            "ttft_s": {"p99": p99},
            "migrations": moves,
            "instances_mean": 2.0,
            "requests_failed": 0,
        }
        return {
            "policy": policy,
            "trace": "S-S",
            "rate": 1.0,
            "seed": seed,
            "instances": 2,
            "metrics": metrics,
        }

    runs = [run("infaas++", 0, 3.0, 0), run("llumnix", 0, 1.0, 5), run("llumnix", 1, 2.0, 6)]
    page = page_of({"runs": runs}, tmp_path)
    words = words_of(page)
    # Half of the interval: 12.706 * sqrt(0.5) / sqrt(2).
    assert "policy P99 migrations infaas++ 3.00 × 2.00 0 llumnix 1.50 ± 6.35 5.5 ± 6.4" in words
    assert "Means over the seeds, ± half of their 95 % t-interval; × the ratio to llumnix" in words
    assert re.findall(r"<td><b>(.*?)</b>", page) == ["1.50"]


def test_names_and_reasons_are_text_and_nothing_else(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img onerror=alert(2)>"
    result = fake_result(**SMALL, policies=("llumnix", evil), classes=True)
    result["about"] = {evil: evil}
    for run in result["runs"]:
        run["trace"] = evil
        run["metrics"]["classes"][evil] = run["metrics"]["classes"].pop("high")
        if details := run.get("details"):
            details["instances"] = {n + evil: s for n, s in details["instances"].items()}
            for one in details["decisions"]:
                one |= {"what": evil, "why": evil}
            for one in details["migrations"]:
                one |= {"source": "i0" + evil, "destination": "i1" + evil}
                one |= {"request": evil, "why": evil}
    page = page_of(result, tmp_path)
    assert len(re.findall(r"<script", page)) == 3  # plotly's, the data, page.js.
    assert "<img" not in page
    assert data_of(page)["settings"][0]["policies"] == ["llumnix", evil]
    # Plotly would take it for HTML: escaped in names, ticks, texts to point at, faults.
    data = data_of(page)
    drawn = [run["figure"] for s in data["settings"] for run in s["runs"].values()]
    for figure in (*drawn, *data["against_rate"][0]):
        # A line's `meta` is its policy, for page.js alone.
        traces = [{**t, "meta": None} if t.get("meta") == evil else t for t in figure["data"]]
        shown = json.dumps([traces, figure["layout"]])
        assert "<script" not in shown
        assert "<img" not in shown
        assert "&lt;img" in shown


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    result = fake_result(**SMALL, classes=True)
    for run in result["runs"]:
        run["metrics"] = dict.fromkeys(run["metrics"]) | {"classes": {"high": None}}
        for key in run.get("details") or {}:
            if key not in ("t_s", "instances", "migrations", "decisions"):
                run["details"][key] = [None] * 20
    result["runs"][0]["metrics"] = {"ttft_s": {"mean": math.nan, "p99": math.inf}}
    for series in result["runs"][0]["details"]["instances"].values():
        series |= {"kv_used": [None] * 20, "waiting": [None] * 20, "running": [None] * 20}
    data = data_of(page_of(result, tmp_path))
    assert data["against_rate"] == [[]]
    assert [s["distributions"] for s in data["settings"]] == [[], []]
    assert "no request waited" in data["settings"][0]["runs"]["llumnix"]["note"]


@pytest.mark.parametrize(
    "run",
    [
        {},
        {"policy": "p", "metrics": None, "details": None},
        {"policy": "p", "trace": "t", "rate": None, "seed": None, "details": {"t_s": []}},
        {"policy": "p", "rate": 1.0, "details": {"t_s": [0.0], "instances": {"i0": {}}}},
        {"policy": "p", "rate": 1.0, "details": {"ttft_s": [None], "decisions": [{}]}},
    ],
)
def test_a_single_run_may_lack_anything(run: dict[str, Any], tmp_path: Path) -> None:
    data = data_of(page_of({"runs": [run], "wall_s": None}, tmp_path))
    assert data["settings"][0]["policies"] == [run.get("policy", "")]
    assert data["against_rate"] == [[]]


def test_no_run_is_said(tmp_path: Path) -> None:
    assert "the result holds no run" in words_of(page_of({}, tmp_path))


def test_a_run_without_details_has_a_table_and_no_plot(tmp_path: Path) -> None:
    result = fake_result(**SMALL | {"rates": (3.0,), "seeds": 1}, policies=("infaas++",))
    del result["runs"][0]["details"]
    page = page_of(result, tmp_path)
    assert data_of(page)["settings"][0]["runs"] == {}
    assert "infaas++" in words_of(page)
    assert "<b>" not in page  # Nothing is the best of one.
    assert "±" not in words_of(page)


def test_without_plotly_the_error_names_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(UsageError, match=re.escape("pip install 'llumnix[report]'")):
        write_report(fake_result(**SMALL), tmp_path / "report.html")


def test_a_file_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file or directory; name another file"):
        write_report({}, tmp_path / "missing" / "report.html")


def test_many_instances_are_a_heat_map_and_few_are_lines() -> None:
    for instances, kind in ((4, "scatter"), (5, "heatmap")):
        run = fake_result(instances=instances, samples=10, seeds=1)["runs"][0]
        figure = timeline(run["details"])
        assert figure is not None
        assert figure["data"][0]["type"] == kind


def test_long_series_and_many_migrations_are_thinned_and_it_is_said(tmp_path: Path) -> None:
    result = fake_result(rates=(5.0,), seeds=1, policies=("llumnix",), instances=5, samples=1500)
    details = result["runs"][0]["details"]
    details["migrations"] *= -(-(ARCS_MAX + 1) // len(details["migrations"]))
    run = data_of(page_of(result, tmp_path))["settings"][0]["runs"]["llumnix"]
    heat, *traces = run["figure"]["data"]
    assert len(heat["x"]) == len(heat["z"][0]) == 500 <= POINTS_MAX
    dots = [t for t in traces if t["mode"] == "markers" and t["yaxis"] == "y2"]
    assert sum(len(t["x"]) for t in dots) == ARCS_MAX
    assert "2,000 of them are drawn, evenly picked" in run["note"]
    assert "each point is the mean of 3 samples" in run["note"]


def test_an_arc_goes_from_the_source_at_the_start_to_the_destination_at_the_end() -> None:
    run = fake_result(instances=12, samples=10, seeds=1)["runs"][0]
    move = {"t_s": 4.0, "ended_s": 6.5, "request": "r1", "source": "i10", "destination": "i2"}
    more = {"tokens": 1234, "waiting": False, "outcome": "migrated", "why": "because"}
    run["details"]["migrations"] = [move | more, {**move, "destination": None}]
    assert len(drawable(run["details"])) == 1
    figure = timeline(run["details"])
    assert figure is not None
    arc, dot = (t for t in figure["data"] if t.get("legendgroup") == "moved while running")
    assert (arc["x"][0], arc["y"][0]) == (4.0, 10)
    assert (arc["x"][-2], arc["y"][-2]) == (6.5, 2)
    assert arc["x"][-1] is None
    assert (dot["x"], dot["y"]) == ([6.5], [2])
    assert dot["customdata"] == [
        "<b>r1</b> i10 → i2<br>migrated, 1,234 tokens<br>4.00 s, took 2.500 s<br>because"
    ]


def test_settings_are_sorted_by_workload_and_rate() -> None:
    runs: list[Run] = [
        {"policy": "p", "trace": trace, "rate": rate, "instances": n}
        for trace, n, rate in (("B", 4, 10.0), ("A", 4, 2.0), ("B", 4, 9.0), ("B", 1, 9.0))
    ]
    assert [(s.workload, s.rate) for s in settings_of(runs)] == [
        ("B, 4 instances", 9.0),
        ("B, 4 instances", 10.0),
        ("A, 4 instances", 2.0),
        ("B, 1 instance", 9.0),
    ]


def test_the_arithmetic_of_small_things() -> None:
    assert estimate([], "ttft_s", "mean") is None
    known = {1: 12.706, 4: 2.776, 30: 2.042, 31: 2.040, 60: 2.000, 120: 1.980}
    assert {n: t_975(n) for n in known} == pytest.approx(known, abs=1e-3)
    hundreds = [*range(300), 1000.0]
    assert spread_and_tail(hundreds)["worst1"] == (298 + 299 + 1000) / 3
    assert [spread_and_tail(some)["worst1"] for some in ([2.0, 1.0], [])] == [2.0, None]
    assert downsampled([1, None, 3, None, None, 5], 2) == [1.0, 3.0, 5.0]
    assert downsampled([None, None], 2) == [None]
    assert evenly_picked(range(11), 3) == [0, 5, 10]
    assert sorted(["i10", "i9", "a"], key=natural_key) == ["a", "i9", "i10"]
    assert distribution([3.0, None, 1.0]) == ([1.0, 3.0], [50.0, 100.0])
    values, shares = distribution([float(n) for n in range(100_000)])
    assert len(values) <= POINTS_MAX + 1
    assert (values[-1], shares[-1]) == (99_999.0, 100.0)
    assert [three_digits(v) for v in (0, 0.01234, 1.5, 12.34, 1234.5)] == [
        *("0", "0.0123", "1.50", "12.3", "1,234"),
    ]
    assert wrapped("a & b " * 3, 9) == "a &amp; b a &amp;<br>b a &amp; b"
