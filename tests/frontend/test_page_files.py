"""The page's files: open to all, small, and allowed nothing but their own server."""

from typing import Any

import httpx
import pytest

pytest.importorskip("vllm")

from pathlib import Path

from llumnix.core.priorities import Priorities
from llumnix.core.settings import PrioritySettings
from llumnix.frontend.http.access import Access, Caller, Role
from llumnix.frontend.http.page import router_of
from llumnix.frontend.http.routes import control_app
from llumnix.frontend.ui import feed as ui
from llumnix.frontend.ui.picture import Picture, greeting

FOLDER = Path(ui.__file__).parent
FILES = sorted(f for f in FOLDER.iterdir() if f.suffix in (".html", ".css", ".js"))
BYTES_MAX, LINES_MAX = 60 * 1024, 1200
PAST, PAST_BYTES_MAX = "past.js", 3000
"""Loaded over an event log alone."""


def client(page: Any) -> httpx.AsyncClient:
    nothing: Any = None
    app = control_app(nothing, nothing, page=page)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t")


def feed() -> ui.Feed:
    nothing: Any = None
    priorities = Priorities(PrioritySettings())
    source = ui.Source(look=nothing, deployment=nothing)
    return ui.Feed(source, lambda: Picture(priorities), greeting(priorities))


async def test_each_file_has_its_type_and_may_do_nothing_but_ask_its_server() -> None:
    async with client(router_of(feed())) as http:
        for path in ("", *(f"/{f.name}" for f in FILES)):
            answer = await http.get("/llumnix/ui" + path)
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
            assert answer.headers["cache-control"] == "no-store"
        assert (
            (await http.get("/llumnix/ui/model.js"))
            .headers["content-type"]
            .startswith("text/javascript")
        )


@pytest.mark.parametrize("name", ["feed.py", "__init__.py", "..%2fui%2ffeed.py", "x.js", "%00"])
async def test_nothing_else_is_served(name: str) -> None:
    async with client(router_of(feed())) as http:
        assert (await http.get(f"/llumnix/ui/{name}")).status_code == 404


async def test_without_the_page_there_is_neither_page_nor_feed() -> None:
    async with client(None) as http:
        for path in ("/llumnix/ui", "/llumnix/ui/main.js", "/llumnix/v1/events"):
            assert (await http.get(path)).status_code == 404


async def test_when_too_many_watch_one_more_is_told_to_wait() -> None:
    one = feed()
    for _ in range(ui.WATCHERS_MAX):
        one.join()
    async with client(router_of(one)) as http:
        answer = await http.get("/llumnix/v1/events")
        assert answer.status_code == 429
        assert "close one" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("query", "status", "said"),
    [
        ("rate=0", 400, "rate: Input should be greater than or equal to 1"),
        ("rate=6", 400, "rate: Input should be less than or equal to 5"),
        ("since=x", 400, "since: Input should be a valid integer"),
        ("instance=i7", 404, "no instance i7; there are: i0, i1"),
    ],
)
async def test_what_a_watcher_cannot_have_is_told(query: str, status: int, said: str) -> None:
    one: Any = feed()

    async def instances() -> list[str]:
        return ["i0", "i1"]

    one.instances = instances
    async with client(router_of(one)) as http:
        answer = await http.get(f"/llumnix/v1/events?{query}")
        assert (answer.status_code, one.watched) == (status, 0)
        assert answer.json()["error"]["message"].startswith(said)


def test_the_files_need_no_key_and_only_they() -> None:
    access = Access(
        client_digests=(b"x",), admin_digests=(b"y",), clients_administer=False, hosts=None,
        origins=(),
    )  # fmt: skip
    stranger = Caller(role=Role.STRANGER, key=None, proved=False)
    refused = {
        (method, path): access.refusal(method, path, {}, stranger) is not None
        for method in ("GET", "POST")
        for path in ("/llumnix/ui", "/llumnix/ui/main.js", "/llumnix/uix", "/llumnix/v1/events")
    }
    assert [pair for pair, is_refused in refused.items() if not is_refused] == [
        ("GET", "/llumnix/ui"), ("GET", "/llumnix/ui/main.js")
    ]  # fmt: skip


def test_the_page_is_small() -> None:
    live = [f for f in FILES if f.name != PAST]
    modules = [f for f in live if f.suffix == ".js"]
    assert sum(len(f.read_bytes()) for f in live) < BYTES_MAX
    assert sum(len(f.read_text().splitlines()) for f in modules) < LINES_MAX
    assert len((FOLDER / PAST).read_bytes()) < PAST_BYTES_MAX


def test_no_file_makes_markup_of_text() -> None:
    makers = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http://")
    allowed = "http://www.w3.org/2000/svg"
    texts = {f.name: f.read_text().replace(allowed, "") for f in FILES if f.suffix == ".js"}
    assert [(n, m) for n, text in texts.items() for m in makers if m in text] == []
