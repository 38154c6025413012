"""The board and the alerts ask for metrics and labels that there are. Nobody renders the board
here: Grafana is not among what can be installed."""

import importlib.util
import re
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from llumnix.observe.metrics import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS_LABELS = {"job", "instance"}
VLLM_LABELS = {"engine", "model_name"}
PROMETHEUS_METRICS = {"up": set(), "scrape_duration_seconds": set()}

promql = pytest.importorskip("promql_parser", reason="needs requirements/deploy.lock")


def script() -> ModuleType:
    path = ROOT / "scripts" / "make_board.py"
    spec = importlib.util.spec_from_file_location("make_board", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BOARD = script()


def alerts() -> Iterator[tuple[str, str]]:
    groups = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"]
    yield from ((rule["alert"], rule["expr"]) for group in groups for rule in group["rules"])


def asked(text: str) -> str:
    """A query as Grafana sends it."""
    text = text.replace("$__rate_interval", "1m")
    return re.sub(r"\$\w+", ".*", text)


QUERIES = [*BOARD.queries(), *alerts()]


def parts(node: Any) -> Iterator[Any]:
    """A parsed query and all that is in it."""
    yield node
    inside = [getattr(node, name, None) for name in ("lhs", "rhs", "expr", "vector_selector")]
    for part in [*inside, *(getattr(node, "args", None) or ())]:
        if part is not None:
            yield from parts(part)


def vllms() -> set[str]:
    """The names of vLLM's own metrics, as its sources have them."""
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "v1" / "metrics"
    text = "".join(path.read_text() for path in folder.glob("*.py"))
    return set(re.findall(r'"(vllm:\w+)"', text))


def labels_of(name: str) -> set[str]:
    """A metric's labels, by its name in a query."""
    le = {"le"} if name.endswith("_bucket") else set()
    base = re.sub(r"_(bucket|sum|count)$", "", name)
    if name in PROMETHEUS_METRICS:
        return PROMETHEUS_METRICS[name]
    if name.startswith("vllm:"):
        assert base.removesuffix("_total") in vllms() or base in vllms(), name
        return VLLM_LABELS | le
    assert base in FAMILIES, f"no metric {name}"
    assert bool(le) == (FAMILIES[base].kind == "histogram"), name
    return set(FAMILIES[base].labels) | le


@pytest.mark.parametrize(("where", "text"), QUERIES)
def test_every_query_asks_for_what_there_is(where: str, text: str) -> None:
    found = list(parts(promql.parse(asked(text))))
    selectors = [part for part in found if isinstance(part, promql.VectorSelector)]
    assert selectors
    there: set[str] = set()
    for selector in selectors:
        labels = labels_of(selector.name) | PROMETHEUS_LABELS
        there |= labels
        for matcher in selector.matchers.matchers:
            assert matcher.name in labels, (where, selector.name, matcher.name)
            family = FAMILIES.get(selector.name)
            values = family.labels.get(matcher.name, ()) if family else ()
            wanted = set(matcher.value.split("|")) - {".*"}
            assert not values or wanted <= set(values), (where, wanted)
    for part in found:
        if isinstance(part, promql.AggregateExpr) and part.modifier is not None:
            assert set(part.modifier.labels) <= there, (where, part.modifier.labels)


def test_a_query_for_what_is_not_there_would_be_found() -> None:
    for wrong in (
        "llumnix_instanzes",
        'llumnix_instances{engine="0"}',
        'llumnix_instances{state="servin"}',
        "sum by (class) (llumnix_instances)",
        "vllm:time_to_first_tokens",
        "llumnix_drain_seconds",
    ):
        with pytest.raises(AssertionError):
            test_every_query_asks_for_what_there_is("wrong", wrong)


def test_the_file_is_what_the_script_makes() -> None:
    assert BOARD.BOARD.read_text() == BOARD.text(), "run python scripts/make_board.py"


def test_grafana_could_place_every_panel() -> None:
    board = BOARD.board()
    panels = board["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in panels]
    assert all(p["x"] + p["w"] <= BOARD.GRID for p in places)
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above, (a, b)
    names = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", BOARD.text())) - {"__rate_interval", "__all"}
    assert used == names


needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs Debian's package prometheus"
)
