"""The board and the alerts ask for metrics and labels that there are. Nobody renders the board
here: Grafana is not among what can be installed."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import yaml

from llumnix.observe.metrics import FAMILIES
from support.server import Server, eventually, free_port

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
UNSEEN = {"Scaling", "Drains"}
"""Annotations of what does not happen in the test below."""
WINDOW = "15s"  # of rates, in place of Grafana's
FLAGS = ("--dtype", "float32", "--kv-cache-memory-bytes", "33554432", "--max-num-seqs", "16")


@contextlib.contextmanager
def scraping(port: int, folder: Path) -> Iterator[httpx.Client]:
    """A Prometheus that looks at the server each second, and where to ask it."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ROOT / "deploy" / "prometheus" / "alerts.yml")],
        "scrape_configs": [
            {"job_name": "llumnix", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    own = free_port()
    words = ["prometheus", f"--config.file={folder}/prometheus.yml"]
    words += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{own}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{own}", trust_env=False) as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)


def samples(prometheus: httpx.Client, query: str) -> list[Any]:
    answer = prometheus.get("/api/v1/query", params={"query": query}).json()
    assert answer["status"] == "success", (query, answer)
    return answer["data"]["result"]


def make_something_happen(server: Server) -> None:
    """A dispatch, a refusal, a move, and a death with a revival."""
    server.complete(max_tokens=8).raise_for_status()
    assert server.http.get("/llumnix/v1/instances", headers={"Host": "x.org"}).status_code == 403
    body = {"prompt": "p", "max_tokens": 1200, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        (row,) = server.requests()
        order = {"request_id": row["request"]}
        moved = server.http.post("/llumnix/v1/migrations", json=order).json()
        assert moved["outcome"] == "migrated", moved
        os.kill(server.instances()[moved["destination"]]["pid"], signal.SIGKILL)
        assert [line for line in lines if line][-1] == "data: [DONE]"


@pytest.mark.live
@pytest.mark.slow
@needs_prometheus
def test_every_query_of_the_board_has_something_to_show(tmp_path: Path, tiny_model: Path) -> None:
    log = tmp_path / "log"
    server = Server(str(tiny_model), "--served-model-name", "tiny", *FLAGS, log=log)
    try:
        server.wait_until_serving()
        with scraping(server.port, tmp_path) as prometheus:
            eventually(lambda: up(prometheus), 30, "a scrape")
            time.sleep(3)
            make_something_happen(server)
            time.sleep(5)
            empty = [
                (where, text)
                for where, text in BOARD.queries()
                if where not in UNSEEN
                and not samples(prometheus, asked(text.replace("$__rate_interval", WINDOW)))
            ]
            assert empty == []
            (survived,) = samples(prometheus, 'llumnix_streams_survived_total{how="revived"}')
            assert survived["value"][1] == "1"
    finally:
        server.stop()


def up(prometheus: httpx.Client) -> bool:
    """Whether it runs, and has scraped."""
    with contextlib.suppress(httpx.TransportError):
        if prometheus.get("/-/ready").status_code == 200:
            return any(one["value"][1] == "1" for one in samples(prometheus, "up"))
    return False
