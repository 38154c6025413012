from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from support.browser import chromium, missing, wait_for
from support.fake_deployment import FakeDeployment, Served, application, served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Of a module, since playwright's loop runs on this thread as long as the browser lives."""
    why = missing()
    if why is not None:
        pytest.skip(why)
    with chromium() as one:
        yield one


@pytest.fixture
def world() -> FakeDeployment:
    """Four instances without requests."""
    return FakeDeployment()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def site(world: FakeDeployment, stack: ExitStack) -> Served:
    return stack.enter_context(served(application(world)))


class Seen:
    """What the page did that it must not."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []


Open = Callable[..., Any]


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def open_page(browser: Any, stack: ExitStack, seen: Seen) -> Iterator[Open]:
    """Opens the page of a site, and waits for the deployment if `ready`. No page may complain or
    ask another host."""

    def opened(site: Served, *, ready: bool = True, **how: Any) -> Any:
        context = browser.new_context(viewport={"width": 1280, "height": 800}, **how)
        stack.callback(context.close)
        page = context.new_page()
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.on(
            "console",
            lambda line: line.type == "error" and seen.complaints.append(line.text),
        )
        page.goto(site.url + "/llumnix/ui")
        if ready:
            wait_for(page, "llumnix.model.ready && llumnix.board.columns.length")
        return page

    yield opened
    assert [c for c in seen.complaints if "401" not in c and "403" not in c] == []
    assert [r for r in seen.requests if not r.startswith(("http://127.0.0.1:", "data:"))] == []
