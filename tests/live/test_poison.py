"""A request of which every engine dies ends alone, after two of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.poison import AT_ONCE, HANGS, LATER, as_plugin
from support.server import Server, eventually
from support.streaming import all_at_once, stream

from .conftest import FLAGS

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(900)]

PATH = "/v1/completions"
QUARANTINE = "/llumnix/v1/quarantine"
STREAMS = 24


@pytest.fixture(scope="module")
def poisoned(
    tiny_model: Path, logs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("plugin")
    patient = folder / "patient.yaml"
    patient.write_text("survival: {wait_s: 300, stall_s: 10}\n")
    server = Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS, "--max-num-seqs", str(STREAMS),
        "--policy", "least-loaded", "--scheduler-config", str(patient),
        log=logs / "poisoned.log", PYTHONPATH=as_plugin(folder),
    )  # fmt: skip
    yield server.wait_until_serving()
    server.stop()
    print(server.log[-6000:])


def innocent(number: int) -> dict[str, Any]:
    return {
        "prompt": [3 + number, 7, 9, 11] * 5, "max_tokens": 150, "temperature": 0.1,
        "seed": number, "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip


def poison(server: Server, token: int, **more: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": [5, 6, token], "max_tokens": 30, "temperature": 0, **more}
    body["ignore_eos"] = True
    return httpx.post(server.url + PATH, json=body, timeout=400)


def restarts(server: Server) -> int:
    return sum(row["restarts"] for row in server.instances().values())


@pytest.mark.parametrize("token", [AT_ONCE, LATER, HANGS])
def test_it_alone_ends_after_two_deaths_and_the_streams_beside_it_are_exact(
    poisoned: Server, token: int
) -> None:
    server = poisoned
    calm = all_at_once(
        [lambda n=n: stream(server, PATH, innocent(n), name=f"calm-{n}") for n in range(STREAMS)]
    )
    before = restarts(server)

    def strike() -> httpx.Response:
        def all_run() -> bool:
            rows = server.requests()
            return len(rows) == STREAMS and all(r["output_tokens"] > 2 for r in rows)

        eventually(all_run, 60, "all run")
        return poison(server, token)

    works = [lambda n=n: stream(server, PATH, innocent(n), name=f"{n}") for n in range(STREAMS)]
    *seen, answer = all_at_once([*works, strike])
    assert answer.status_code == 500, answer.text
    assert answer.json()["error"]["code"] == "request_quarantined"
    assert answer.headers["x-should-retry"] == "false"
    assert [s.error for s in seen] == [None] * STREAMS
    assert [s.tokens() for s in seen] == [c.tokens() for c in calm]
    assert [s.folded() for s in seen] == [c.folded() for c in calm]
    eventually(
        lambda: [i["state"] for i in server.instances().values()] == ["serving"] * 2, 120, "both"
    )
    assert restarts(server) - before <= 2
    assert ("no step for 10 s" in server.log) is (token == HANGS)

    again = [poison(server, token), poison(server, token, stream=True)]
    assert [a.status_code for a in again] == [422] * 2
    assert {a.json()["error"]["code"] for a in again} == {"request_quarantined"}
    assert {a.headers["x-should-retry"] for a in again} == {"false"}
    assert poison(server, 9).status_code == 200
    (row,) = server.http.get(QUARANTINE).json()["quarantine"]
    assert (row["prompt_tokens"], row["refused"]) == (3, 2)
    assert server.http.delete(f"{QUARANTINE}/{row['id']}").json() == {"released": 1}
    assert server.http.get(QUARANTINE).json() == {"quarantine": []}
    assert restarts(server) - before <= 2
