"""Requests drawn for a run: from pairs, from files of requests, from clients' statistics."""

import gzip
import itertools
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llumnix.config import LogPlace
from llumnix.core.events import RequestArrived
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import InstanceId, RequestId
from llumnix.errors import UsageError
from llumnix.frontend.streams.info import FleetStreams, StreamInfo, shown
from llumnix.observe.event_log import EventLog
from llumnix.sim.workloads.named_files import CLIENTS, FILES
from llumnix.sim.workloads.traces import read_clients
from llumnix.sim.workloads.workload import PAIRS, TRACES, Arrival, Workload, requests_of

TABLE = {
    "S": (128, 38, 113, 413, 1464),
    "M": (256, 32, 173, 1288, 4208),
    "L": (512, 55, 582, 3113, 5166),
    "sharegpt in": (306, 74, 348, 1484, 3388),
    "sharegpt out": (500, 487, 781, 988, 1234),
    "burstgpt in": (830, 582, 1427, 2345, 3549),
    "burstgpt out": (271, 243, 434, 669, 964),
}
"""Table 1 of the paper: mean, P50, P80, P95, P99 in tokens."""
MANY = 40_000
ROWS = [(5, 100, 10), (6, 200, 20), (8, 300, 30), (9, 400, 40)]
CSV = "arrival_s,input_tokens,output_tokens\n" + "".join(f"{a},{i},{o}\n" for a, i, o in ROWS)


def pair(trace: str = "S-S", **more: Any) -> Workload:
    return replace(Workload(trace=trace, requests=300, rate_per_s=4.0), **more)


def lengths(arrivals: list[Arrival]) -> list[tuple[int, int]]:
    return [(a.prompt_tokens, a.output_tokens) for a in arrivals]


def gaps(arrivals: list[Arrival]) -> list[float]:
    return [b.at_s - a.at_s for a, b in itertools.pairwise(arrivals)]


def cv(values: list[float]) -> float:
    return statistics.pstdev(values) / statistics.fmean(values)


def write(path: Path, text: str) -> str:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def as_jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def whole(path: str, **more: Any) -> Workload:
    """All requests of a file, at its own rate."""
    rows = Path(path).read_bytes()
    text = (gzip.decompress(rows) if path.endswith(".gz") else rows).decode()
    count = len(text.splitlines()) - (".csv" in path)
    return replace(Workload(trace=path, requests=count, rate_per_s=None), **more)


# Pairs.


@pytest.mark.parametrize(
    ("trace", "rows"),
    [
        ("S-S", ("S", "S")),
        ("M-M", ("M", "M")),
        ("L-L", ("L", "L")),
        ("S-L", ("S", "L")),
        ("L-S", ("L", "S")),
        ("sharegpt", ("sharegpt in", "sharegpt out")),
        ("burstgpt", ("burstgpt in", "burstgpt out")),
    ],
)
def test_a_pair_has_the_means_and_quantiles_of_the_papers_table(
    trace: str, rows: tuple[str, str]
) -> None:
    drawn = lengths(pair(trace, requests=MANY).draw(1))
    # The table's S, M and L are one draw of 10,000 at the edge of what such draws give.
    near = 0.03 if trace in ("sharegpt", "burstgpt") else 0.18
    for side, row in zip(zip(*drawn, strict=True), rows, strict=True):
        mean, *quantiles = TABLE[row]
        assert statistics.fmean(side) == pytest.approx(mean, rel=0.03)
        ordered = sorted(side)
        found = [ordered[int(q * MANY)] for q in (0.5, 0.8, 0.95, 0.99)]
        assert found == pytest.approx(quantiles, rel=near)


def test_a_seed_draws_what_it_always_drew() -> None:
    """Raw figures of old runs stay reproducible."""
    drawn = pair("L-L", requests=4, rate_per_s=3.0, scale=0.5, tokens_max=900, high_share=0.5)
    assert [
        (round(a.at_s, 6), a.prompt_tokens, a.output_tokens, a.high, a.clipped)
        for a in drawn.draw(0)
    ] == [
        (0.120705, 895, 4, True, True),
        (0.153534, 888, 11, True, True),
        (0.324751, 888, 11, False, True),
        (1.18179, 251, 106, False, False),
    ]


def test_a_seed_draws_the_same_again_and_another_one_does_not() -> None:
    drawn = pair(high_share=0.2)
    assert drawn.draw(3) == drawn.draw(3)
    assert lengths(drawn.draw(3)) != lengths(drawn.draw(4))
    assert gaps(drawn.draw(3)) != gaps(drawn.draw(4))


@pytest.mark.parametrize(
    "other", [{"rate_per_s": 40.0}, {"cv": 4.0}, {"high_share": 0.9}, {"rate_per_s": 0.5}]
)
def test_another_rate_or_share_changes_no_lengths(other: dict[str, float]) -> None:
    assert lengths(pair(**other).draw(5)) == lengths(pair().draw(5))


def test_another_rate_stretches_the_same_arrivals() -> None:
    slow, fast = pair(rate_per_s=1.0).draw(5), pair(rate_per_s=10.0).draw(5)
    assert [a.at_s for a in slow] == pytest.approx([a.at_s * 10 for a in fast])


@pytest.mark.parametrize(("wanted", "near"), [(None, 0.03), (1.0, 0.03), (0.5, 0.03), (4.0, 0.1)])
def test_gaps_have_the_wanted_variation_and_rate(wanted: float | None, near: float) -> None:
    found = gaps(pair(requests=MANY, rate_per_s=5.0, cv=wanted).draw(2))
    assert cv(found) == pytest.approx(wanted or 1.0, rel=near)
    assert statistics.fmean(found) == pytest.approx(0.2, rel=near)


def test_a_share_of_the_requests_is_urgent() -> None:
    drawn = pair(requests=MANY, high_share=0.1).draw(1)
    assert sum(a.high for a in drawn) / MANY == pytest.approx(0.1, rel=0.05)
    assert not any(a.high for a in pair().draw(1))


def test_a_request_that_is_too_long_is_shrunk_in_both_parts_alike(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "input_tokens,output_tokens\n300,100\n")
    arrival = Arrival(at_s=0.0, prompt_tokens=300, output_tokens=100)
    drawn = [
        whole(path, rate_per_s=1.0, **limits).draw(0)[0]
        for limits in ({}, {"tokens_max": 400}, {"tokens_max": 200}, {"scale": 0.5})
    ]
    assert [replace(a, at_s=0.0) for a in drawn] == [
        arrival,
        arrival,
        replace(arrival, prompt_tokens=150, output_tokens=50, clipped=True),
        replace(arrival, prompt_tokens=150, output_tokens=50),
    ]


def test_no_part_of_a_request_is_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "input_tokens,output_tokens\n5000,0\n")
    (arrival,) = whole(path, rate_per_s=1.0, scale=0.01, tokens_max=10).draw(0)
    assert (arrival.prompt_tokens, arrival.output_tokens) == (9, 1)


# Files of requests.


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.jsonl", "t.jsonl.gz"])
def test_a_file_is_csv_or_jsonl_zipped_or_not(tmp_path: Path, name: str) -> None:
    columns = ("arrival_s", "input_tokens", "output_tokens")
    rows = [dict(zip(columns, row, strict=True)) for row in ROWS]
    path = write(tmp_path / name, as_jsonl(rows) if "jsonl" in name else CSV)
    assert whole(path).draw(0) == [
        Arrival(at_s=0.0, prompt_tokens=100, output_tokens=10),
        Arrival(at_s=1.0, prompt_tokens=200, output_tokens=20),
        Arrival(at_s=3.0, prompt_tokens=300, output_tokens=30),
        Arrival(at_s=4.0, prompt_tokens=400, output_tokens=40),
    ]


def test_a_files_own_gaps_are_stretched_to_the_rate(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", CSV)
    at_s = [a.at_s for a in whole(path, rate_per_s=7.5).draw(0)]
    assert at_s == pytest.approx([0.0, 0.1, 0.3, 0.4])


def test_a_seed_picks_a_place_in_a_file_with_arrival_times(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", CSV)
    drawn = [whole(path, requests=2).draw(seed) for seed in range(20)]
    assert {tuple(lengths(d)) for d in drawn} == {
        ((100, 10), (200, 20)),
        ((200, 20), (300, 30)),
        ((300, 30), (400, 40)),
    }
    assert {d[0].at_s for d in drawn} == {0.0}


def test_gaps_that_are_drawn_keep_the_files_rate_if_none_is_wanted(tmp_path: Path) -> None:
    rows = "".join(f"{n / 4},10,10\n" for n in range(5000))
    path = write(tmp_path / "t.csv", "arrival_s,input_tokens,output_tokens\n" + rows)
    found = gaps(whole(path, cv=1.0).draw(0))
    assert statistics.fmean(found) == pytest.approx(0.25, rel=0.05)
    assert cv(found) == pytest.approx(1.0, rel=0.05)


def test_without_arrival_times_rows_are_drawn_at_random_and_none_twice(tmp_path: Path) -> None:
    rows = "".join(f"{n},{n}\n" for n in range(1, 101))
    path = write(tmp_path / "t.csv", "input_tokens,output_tokens\n" + rows)
    drawn = lengths(whole(path, rate_per_s=2.0).draw(0))
    assert sorted(drawn) == [(n, n) for n in range(1, 101)]
    assert drawn != sorted(drawn)
    assert drawn[:9] == lengths(whole(path, rate_per_s=9.0).draw(0))[:9]


def test_a_file_can_say_which_requests_are_urgent(tmp_path: Path) -> None:
    rows = "".join(f"10,10,{n}\n" for n in (0, -100, 5))
    path = write(tmp_path / "t.csv", "input_tokens,output_tokens,priority\n" + rows)
    drawn = [whole(path, rate_per_s=1.0).draw(seed) for seed in range(9)]
    assert all(sum(a.high for a in d) == 1 for d in drawn)
    with pytest.raises(UsageError, match="no --high"):
        whole(path, rate_per_s=1.0, high_share=0.1).draw(0)


@pytest.mark.parametrize("name", ["events.jsonl", "log"])
def test_an_event_log_is_a_trace(tmp_path: Path, name: str) -> None:
    log = EventLog(LogPlace(path=str(tmp_path / name)), who="controller 1")
    log.started(SchedulerSettings())
    log.fact(RequestArrived(request=RequestId("a"), prompt_tokens=30), 7.0)
    now_s = time.monotonic()
    ended = (
        ("a", 0, 2.0, 30, 9, "stop"),
        ("b", -100, 0.0, 20, 4, "abort"),
        ("hung up at once", 0, 0.5, 20, 0, "abort"),
        ("lost its engine", 0, 0.7, 20, 5, "error"),
    )
    for request, priority, came_s, prompt, output, reason in ended:
        info = StreamInfo(
            client_id=request,
            prompt_tokens=prompt,
            priority=priority,
            started_s=now_s + came_s,
        )
        stream = FleetStreams().open(RequestId(request), info)
        stream.tokens = [0] * output
        log.request(shown(stream, InstanceId("i0"), reason, None))
    log.close()
    trace = str(tmp_path / name)
    assert requests_of(trace, None) == 2
    drawn = whole(trace, requests=2).draw(0)
    assert [replace(a, at_s=round(a.at_s, 2)) for a in drawn] == [
        Arrival(at_s=0.0, prompt_tokens=20, output_tokens=4, high=True),
        Arrival(at_s=2.0, prompt_tokens=30, output_tokens=9),
    ]


def test_an_event_log_of_several_files_is_one_trace(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for number, file in enumerate((tmp_path / "log.1", path)):
        first = {"kind": "log", "who": "x", "at": 0.0, "version": 2, "goes_on": number > 0}
        ended = {"started": 0.0, "prompt_tokens": 5 + number, "output_tokens": 3, "priority": 0}
        line = {"at": number, "time": number, "who": "x", "kind": "request"}
        body = {"body": {**ended, "started": number, "finish_reason": "stop"}}
        file.write_text(f"{json.dumps(first)}\n{json.dumps({**line, **body})}\n")
    drawn = whole(str(path), requests=2).draw(0)
    assert [(a.at_s, a.prompt_tokens) for a in drawn] == [(0.0, 5), (1.0, 6)]


def test_an_event_log_without_a_request_that_ended_is_refused(tmp_path: Path) -> None:
    log = EventLog(LogPlace(path=str(tmp_path / "log")), who="controller 1")
    log.started(SchedulerSettings())
    log.close()
    with pytest.raises(UsageError, match="has no requests"):
        whole(str(tmp_path / "log"), requests=1).draw(0)


def test_a_file_is_read_once(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", CSV)
    workload = whole(path)
    before = workload.draw(0)
    Path(path).write_text("nothing\n")
    assert workload.draw(0) == before


def test_a_named_trace_is_looked_for_in_the_folder_that_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "azure2023_code.csv.gz", CSV)
    named = Workload(trace="azure-code", requests=4, rate_per_s=None, folder=tmp_path)
    monkeypatch.delenv("LLUMNIX_TRACES", raising=False)
    assert lengths(named.draw(0)) == [(i, o) for _, i, o in ROWS]
    monkeypatch.setenv("LLUMNIX_TRACES", str(tmp_path))
    assert replace(named, folder=None).draw(0) == named.draw(0)


@pytest.mark.parametrize(
    ("name", "spread"),
    [
        ("mooncake-conversation", [0.0, 0.75, 1.5, 2.25, 3.0, 4.5]),
        ("mooncake-arxiv", [0.0, 0.75, 1.5, 2.25, 3.0, 4.5]),
        ("ragpulse", [0.0, 0.25, 0.5, 0.75, 3.0, 3.5]),
    ],
)
def test_requests_of_one_instant_are_spread_over_the_grid_of_their_trace(
    tmp_path: Path, name: str, spread: list[float]
) -> None:
    rows = [{"arrival_s": t, "input_tokens": 9, "output_tokens": 9} for t in (0, 0, 0, 0, 3, 3)]
    path = write(tmp_path / FILES[name].file, as_jsonl(rows))
    named = Workload(trace=name, requests=6, rate_per_s=None, folder=tmp_path)
    assert [a.at_s for a in named.draw(0)] == spread
    assert [a.at_s for a in whole(path).draw(0)] == [0, 0, 0, 0, 3, 3]


# Prefixes.


def prompts(tmp_path: Path, *rows: dict[str, Any]) -> str:
    return write(
        tmp_path / "t.jsonl",
        as_jsonl([{"arrival_s": n, "output_tokens": 8, **row} for n, row in enumerate(rows)]),
    )


def test_an_id_stands_for_512_tokens_and_all_before_them(tmp_path: Path) -> None:
    path = prompts(
        tmp_path,
        {"input_tokens": 1400, "hash_ids": [46, 47, 48]},
        {"input_tokens": 1536, "hash_ids": [46, 47, 50]},
        {"input_tokens": 1024, "hash_ids": [9, 47]},
        {"input_tokens": 300, "hash_ids": [46]},
    )
    found = [(a.prefix, a.prefix_block_tokens) for a in whole(path).draw(0)]
    # The last block of 1,400 tokens and the only one of 300 are not full. The 47 after a 9 is
    # another prefix than the 47 after a 46.
    assert found == [((0, 1), 512), ((0, 1, 3), 512), ((4, 5), 512), ((), 512)]


def test_an_id_gives_32_blocks_of_16_tokens(tmp_path: Path) -> None:
    path = prompts(
        tmp_path,
        {"input_tokens": 1024, "hash_ids": [7, 8]},
        {"input_tokens": 1024, "hash_ids": [7, 9]},
    )
    one, two = whole(path).draw(0)
    assert one.blocks(16) == tuple(range(15, 1024, 16))
    assert two.blocks(16)[:32] == one.blocks(16)[:32]
    assert set(two.blocks(16)[32:]).isdisjoint(one.blocks(16))
    assert len(one.blocks(768)) == 1
    assert one.blocks(768) != two.blocks(768)


def test_parts_of_different_lengths_become_blocks_of_16_tokens(tmp_path: Path) -> None:
    parts = {"hash_tokens": [40, 10, 30], "input_tokens": 90}
    path = prompts(
        tmp_path,
        {**parts, "hash_ids": [1, 2, 3]},
        {**parts, "hash_ids": [1, 2, 4]},
        {**parts, "hash_ids": [1, 5, 3]},
        {**parts, "hash_ids": [6, 2, 3]},
    )
    first, *others = whole(path).draw(0)
    assert (len(first.prefix), first.prefix_block_tokens) == (5, 16)
    # They agree in 50, 40 and 0 tokens.
    assert [len({*first.prefix} & {*o.prefix}) for o in others] == [3, 2, 0]
    assert len({i for a in (first, *others) for i in a.prefix}) == 5 + 2 + 3 + 5


def test_a_prefix_shrinks_with_its_prompt_and_ends_where_that_is_cut(tmp_path: Path) -> None:
    path = prompts(
        tmp_path,
        {"input_tokens": 5120, "hash_ids": list(range(10))},
        {"input_tokens": 5120, "hash_ids": [20, 21], "hash_tokens": [2560, 2560]},
    )
    half = whole(path, scale=0.5).draw(0)
    assert [(a.prompt_tokens, len(a.prefix), a.prefix_block_tokens) for a in half] == [
        (2560, 10, 256),
        (2560, 160, 16),
    ]
    cut = whole(path, scale=0.5, tokens_max=1000).draw(0)
    assert [(a.prompt_tokens, a.clipped) for a in cut] == [(998, True), (998, True)]
    assert [a.prefix for a in cut] == [half[0].prefix[:3], half[1].prefix[:62]]


def test_a_csv_has_its_ids_as_json(tmp_path: Path) -> None:
    text = 'input_tokens,output_tokens,hash_ids\n1024,1,"[5, 6]"\n'
    path = write(tmp_path / "t.csv", text)
    assert whole(path, rate_per_s=1.0).draw(0)[0].prefix == (0, 1)


def test_a_trace_without_ids_has_no_prefixes() -> None:
    arrival = pair().draw(0)[0]
    assert (arrival.prefix, arrival.prefix_block_tokens, arrival.blocks(16)) == ((), 0, ())


# Clients.

FLAT = {"input_tokens": {"mean": 100, "q": [100] * 15}, "output_tokens": {"mean": 7, "q": [7] * 15}}
STEEP = {
    "input_tokens": {"mean": 0, "q": [10, 10, 10, 20, 20, 20, 80, 80, 80, 80, 80, 80, 80, 80, 80]},
    "output_tokens": {"mean": 0, "q": [0, *range(1, 15)]},
}


def client(number: int, windows: list[list[Any]], table: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "client": number,
        "lengths_available": table is not None,
        "windows_600s": windows,
        "lengths_6h": {"0": table, "21600": table} if table else {},
    }


def clients(folder: Path, *those: dict[str, Any], **more: Any) -> Workload:
    write(folder / CLIENTS["servegen-m-mid"].file, as_jsonl(list(those)))
    base = Workload(trace="servegen-m-mid", requests=1000, rate_per_s=None, folder=folder)
    return replace(base, **more)


@pytest.mark.parametrize(("family", "shape"), [("G", 0.1), ("G", 4.0), ("W", 0.5), ("", 1.0)])
def test_clients_send_at_their_rate_from_a_windows_beginning(
    tmp_path: Path, family: str, shape: float
) -> None:
    """Over many windows, so that the first gap of each counts: an ordinary first gap would give
    bursty clients more requests than their rate."""
    windows = [[600 * n, 0.05, 1.0, family, shape] for n in range(36)]
    drawn = clients(tmp_path, *(client(n, windows, FLAT) for n in range(4)), requests=6000).draw(1)
    assert 6000 / drawn[-1].at_s == pytest.approx(4 * 0.05, rel=0.06)


@pytest.mark.parametrize(
    ("family", "shape", "variation"), [("G", 0.25, 2.0), ("G", 4.0, 0.5), ("W", 0.5, 2.236)]
)
def test_a_clients_gaps_have_the_variation_of_their_family(
    tmp_path: Path, family: str, shape: float, variation: float
) -> None:
    windows = [[0, 100.0, 1.0, family, shape]]
    drawn = clients(tmp_path, client(0, windows, FLAT), requests=MANY).draw(0)
    assert cv(gaps(drawn)) == pytest.approx(variation, rel=0.05)


def test_all_clients_rates_are_scaled_by_one_factor(tmp_path: Path) -> None:
    windows = [[0, 1.0, 1.0, "G", 1.0]], [[0, 3.0, 1.0, "G", 1.0]]
    both = client(0, windows[0], FLAT), client(1, windows[1], STEEP)
    drawn = clients(tmp_path, *both, requests=2000, rate_per_s=400.0).draw(1)
    assert 2000 / drawn[-1].at_s == pytest.approx(400, rel=0.05)
    assert sum(a.prompt_tokens == 100 for a in drawn) / 2000 == pytest.approx(0.25, rel=0.1)
    slow = clients(tmp_path, *both, requests=2000, rate_per_s=4.0).draw(1)
    assert lengths(slow) == lengths(drawn)
    assert [a.at_s for a in slow] == pytest.approx([a.at_s * 100 for a in drawn])


def test_a_seed_picks_the_window_and_the_following_ones_come_after(tmp_path: Path) -> None:
    """Each window has a client of its own here, who sends 60 requests on average."""
    rows = [
        client(n, [[600 * n, 0.1, 1.0, "G", 50.0]], {**FLAT, "input_tokens": {"q": [n + 1] * 15}})
        for n in range(4)
    ]
    orders = set()
    for seed in range(30):
        drawn = clients(tmp_path, *rows, requests=200).draw(seed)
        served = [(int(a.at_s // 600), a.prompt_tokens) for a in drawn]
        assert served == sorted(served, key=lambda s: s[0])
        orders.add(tuple(prompt for _, prompt in sorted(set(served))))
    assert orders == {(1, 2, 3, 4), (2, 3, 4, 1), (3, 4, 1, 2), (4, 1, 2, 3)}


def test_a_clients_lengths_follow_its_quantiles(tmp_path: Path) -> None:
    windows = [[0, 100.0, 1.0, "G", 1.0]]
    drawn = clients(tmp_path, client(0, windows, STEEP), requests=MANY).draw(0)
    ordered = sorted(a.prompt_tokens for a in drawn)
    assert [ordered[int(q * MANY)] for q in (0.0, 0.05, 0.15, 0.3, 0.45, 0.6, 0.99)] == (
        pytest.approx([10, 10, 14, 20, 40, 80, 80], rel=0.05)
    )
    assert {a.output_tokens for a in drawn} == set(range(1, 15))


def test_clients_of_unknown_lengths_are_left_out(tmp_path: Path) -> None:
    windows = [[0, 5.0, 1.0, "G", 1.0]]
    workload = clients(tmp_path, client(0, windows, None), client(1, windows, FLAT))
    drawn = workload.draw(0)
    assert set(lengths(drawn)) == {(100, 7)}
    assert 1000 / drawn[-1].at_s == pytest.approx(5.0, rel=0.1)
    assert workload.draw(0) == drawn != workload.draw(1)


# Bad input.


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("", r"has no requests; a trace has the columns input_tokens and output_tokens"),
        ("input_tokens,output_tokens\n", r"has no requests"),
        ("input_tokens\n5\n", r"request 1 has no output_tokens; a trace has the columns"),
        ("a,b\n5,5\n", r"has no input_tokens and no output_tokens"),
        ("input_tokens,output_tokens\n5,5\n5,x\n", r"request 2: .*'x'; mend that row"),
        ("input_tokens,output_tokens\n5,-5\n", r"request 1: -5 tokens; mend"),
        ("input_tokens,output_tokens,hash_ids\n5,5,7\n", r"request 1: '7' is no list; mend"),
        ("arrival_s,input_tokens,output_tokens\n2,5,5\n1,5,5\n", r"sort the requests by arrival_s"),
        ("arrival_s,input_tokens,output_tokens\nnan,5,5\n", r"sort the requests by arrival_s"),
    ],
)
def test_a_bad_csv_is_refused_with_the_fix(tmp_path: Path, text: str, fix: str) -> None:
    path = write(tmp_path / "t.csv", text)
    with pytest.raises(UsageError, match=fix):
        Workload(trace=path, requests=1, rate_per_s=1.0).draw(0)


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("\n", r"has no requests"),
        ("{\n", r"line 1 is no JSON"),
        ("[1, 2]\n", r"line 1 is no JSON object; a trace has the columns"),
        (
            '{"input_tokens": 5, "output_tokens": 5, "arrival_s": 1}\n'
            '{"input_tokens": 5, "output_tokens": 5}\n',
            r"only some requests have arrival_s; give it to all or to none",
        ),
        (
            '{"input_tokens": 5, "output_tokens": 5, "hash_ids": [1, 2], "hash_tokens": [5]}\n',
            r"2 hash_ids and 1 hash_tokens; mend",
        ),
    ],
)
def test_a_bad_jsonl_is_refused_with_the_fix(tmp_path: Path, text: str, fix: str) -> None:
    path = write(tmp_path / "t.jsonl", text)
    with pytest.raises(UsageError, match=fix):
        Workload(trace=path, requests=1, rate_per_s=1.0).draw(0)


def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv.gz").write_text(CSV)
    with pytest.raises(UsageError, match="cannot be read"):
        Workload(trace=str(tmp_path / "t.csv.gz"), requests=1, rate_per_s=1.0).draw(0)
    path = Path(write(tmp_path / "c.jsonl", '{"input_tokens": 5}\n'))
    with pytest.raises(UsageError, match=r"no file of ServeGen's clients .*: put the right one"):
        read_clients(path)


def test_an_unknown_trace_is_refused_with_all_names() -> None:
    with pytest.raises(UsageError) as refused:
        pair("S-M").draw(0)
    assert str(refused.value) == (
        "no trace is called 'S-M', and no file: give the path of a csv or jsonl file, or one of "
        "S-S, M-M, L-L, S-L, L-S, sharegpt, burstgpt, azure-code, azure-conv, "
        "mooncake-conversation, mooncake-arxiv, ragpulse, arxiv-vidur, sharegpt4-sarathi, "
        "sharegpt-helix, servegen-m-small, servegen-m-mid, servegen-m-large, servegen-deepseek-r1"
    )


def test_a_named_trace_without_its_file_is_refused_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix = "give the folder that has it with --traces DIR, or in LLUMNIX_TRACES"
    monkeypatch.delenv("LLUMNIX_TRACES", raising=False)
    with pytest.raises(UsageError, match=f"azure2023_conv.csv.gz, not part of llumnix: {fix}"):
        pair("azure-conv").draw(0)
    with pytest.raises(UsageError, match=f"servegen_m-mid_clients.*not in .*: {fix}"):
        pair("servegen-m-mid", folder=tmp_path).draw(0)


def test_more_requests_than_a_file_has_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", CSV)
    with pytest.raises(UsageError, match="has 4 requests: ask for no more"):
        whole(path, requests=5).draw(0)


def test_requests_without_a_rate_are_refused(tmp_path: Path) -> None:
    at_once = "arrival_s,input_tokens,output_tokens\n1,5,5\n1,5,5\n"
    path = write(tmp_path / "t.csv", at_once)
    with pytest.raises(UsageError, match="S-S has no rate of its own: give one"):
        pair(rate_per_s=None).draw(0)
    with pytest.raises(UsageError, match="have no rate of their own: give one"):
        whole(path, cv=1.0).draw(0)
    with pytest.raises(UsageError, match=r"come at once.*: ask for more requests"):
        whole(path, rate_per_s=1.0).draw(0)
    assert [a.at_s for a in whole(path).draw(0)] == [0.0, 0.0]
    assert [a.at_s for a in whole(path, requests=1, rate_per_s=1.0).draw(0)] == [0.0]


@pytest.mark.parametrize(
    ("bad", "fix"),
    [
        ({"requests": 0}, "requests is 0: give a number above 0"),
        ({"rate_per_s": -1.0}, "rate is -1.0: give a number above 0"),
        ({"cv": 0.0}, "cv is 0.0: give a number above 0"),
        ({"scale": float("nan")}, "scale is nan: give a number above 0"),
        ({"tokens_max": 1}, "a request has 2 tokens or more, not 1: allow more"),
        ({"high_share": 1.5}, "the share of urgent requests is 1.5: give 0 to 1"),
    ],
)
def test_a_workload_that_makes_no_sense_is_refused(bad: dict[str, Any], fix: str) -> None:
    with pytest.raises(UsageError) as refused:
        pair(**bad)
    assert str(refused.value) == fix


def test_every_trace_has_a_line_on_it() -> None:
    assert list(TRACES) == [*PAIRS, *FILES, *CLIENTS]
    assert [text for text in TRACES.values() if not 30 < len(text) < 110 or "\n" in text] == []
