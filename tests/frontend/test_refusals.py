"""What is said when a request is turned away: codes, and when to try again."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from starlette.datastructures import MutableHeaders

from llumnix.core.keys import KeyLimits, KeyMeter
from llumnix.core.types import EngineIndex, InstanceId
from llumnix.frontend.door.refusals import REFUSALS, limit_headers, mark, refused
from llumnix.frontend.engines.directory import EngineDirectory
from llumnix.frontend.engines.start_times import StartTimes
from llumnix.observe import metrics

PAGE = Path(__file__).parents[2] / "docs" / "answers.md"
UNCOUNTED = {"loading", "no_frontend"}
E0, E1, E2 = (EngineIndex(n) for n in range(3))


def test_the_page_lists_every_code_with_its_status() -> None:
    rows = re.findall(r"^\| (\d{3}) \| (`[^|]+) \|", PAGE.read_text(), flags=re.M)
    listed = {code: int(status) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    assert listed == {code: refusal.status for code, refusal in REFUSALS.items()}


def test_every_code_has_its_count() -> None:
    (family,) = metrics.GATE_REFUSALS.collect()
    counted = {sample.labels["code"] for sample in family.samples}
    assert set(REFUSALS) - UNCOUNTED <= counted


@pytest.mark.parametrize("code", REFUSALS)
def test_what_may_help_a_second_time_says_when(code: str) -> None:
    answer = refused(code, "no")
    assert answer.status_code == REFUSALS[code].status
    again = answer.status_code in (429, 503)
    assert ("retry-after" in answer.headers) is again
    assert json.loads(answer.body)["error"]["retryable"] is again


@pytest.mark.parametrize(
    ("retry_s", "shown"), [(None, "1"), (0.0, "1"), (0.2, "1"), (7.01, "8"), (60.0, "60")]
)
def test_a_client_waits_for_whole_seconds(retry_s: float | None, shown: str) -> None:
    headers = MutableHeaders()
    mark(headers, "no_instance", retry_s=retry_s)
    assert headers["retry-after"] == shown


def test_a_code_that_is_no_refusal_says_nothing_of_another_time() -> None:
    headers = MutableHeaders()
    mark(headers, "engine_died")
    assert dict(headers) == {"x-llumnix-reason": "engine_died"}


def test_the_next_engine_is_expected_when_the_others_took_so_long() -> None:
    starts = StartTimes()
    assert starts.left_s(0.0) is None
    starts.began(E0, 0.0)
    assert starts.left_s(1.0) is None
    starts.up(E0, 20.0)
    assert starts.left_s(25.0) == 20.0  # Nothing is being started yet.
    starts.began(E1, 100.0)
    starts.began(E2, 105.0)
    assert starts.left_s(107.0) == 13.0
    assert starts.left_s(500.0) == 0.0
    starts.over(E1)
    assert starts.left_s(107.0) == 18.0
    starts.up(E2, 145.0)
    assert starts.left_s(145.0) == 30.0  # Between 20 and 40.


def test_an_engine_that_was_there_before_says_nothing_of_a_start() -> None:
    starts = StartTimes()
    starts.began(E0, 0.0)
    starts.up(E0, 0.05)
    starts.up(E1, 0.05)
    assert starts.left_s(1.0) is None


async def test_the_directory_follows_its_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, now_s = asyncio.get_running_loop(), [0.0]
    engines = EngineDirectory()
    monkeypatch.setattr(loop, "time", lambda: now_s[0])
    engines.expect(InstanceId("i0"), E0, 0)
    now_s[0] = 30.0
    engine = engines.get(E0)
    assert engine is not None
    engine.ready.set_result(None)
    await asyncio.sleep(0)
    engines.lose(E0)
    now_s[0] = 40.0
    engines.expect(InstanceId("i0"), E1, 0)
    now_s[0] = 45.0
    assert engines.next_in_s() == 25.0
    engines.lose(E1)
    assert engines.next_in_s() == 30.0


def test_what_is_left_of_limits_is_told_as_openai_has_it() -> None:
    meter = KeyMeter(KeyLimits(requests_per_min=60, tokens_per_min=6000), 0.0)
    meter.admit(0.0)
    meter.admit(0.0)
    meter.spend(9000, 0.0)
    assert limit_headers(None, 0.5) == []
    assert dict(limit_headers(meter, 0.5)) == {
        b"x-ratelimit-limit-requests": b"60", b"x-ratelimit-remaining-requests": b"58",
        b"x-ratelimit-reset-requests": b"2s", b"x-ratelimit-limit-tokens": b"6000",
        b"x-ratelimit-remaining-tokens": b"0", b"x-ratelimit-reset-tokens": b"1m30s",
    }  # fmt: skip
