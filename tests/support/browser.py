"""A real browser: Debian's Chromium, driven by playwright."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def missing() -> str | None:
    """Why there is no browser to test with; None if there is one."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed (requirements/dev.lock)"
    if program() is None:
        return "no Chromium here: apt-get install chromium"
    return None


def program() -> str | None:
    """The browser's path."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


needs_browser = pytest.mark.skipif(missing() is not None, reason=str(missing()))


LAUNCH_S = 60
LAUNCHES_MAX = 2


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = launched(play)
        try:
            yield browser
        finally:
            browser.close()


def launched(play: Any) -> Any:
    """A browser that has started. One that does not start in time, because others have the cores,
    is started once more."""
    from playwright.sync_api import Error

    for attempt in range(LAUNCHES_MAX):
        try:
            return play.chromium.launch(
                executable_path=program(), args=["--no-sandbox"], timeout=LAUNCH_S * 1000
            )
        except Error:
            if attempt + 1 == LAUNCHES_MAX:
                raise
    raise AssertionError("unreachable")


def wait_for(page: Any, expression: str, timeout_s: float = 10) -> float:
    """Waits until an expression of the page's is true; returns how long that took in seconds.
    playwright's own wait evaluates text in the page, which the page's policy forbids."""
    began_s = time.monotonic()
    while not page.evaluate(f"() => Boolean({expression})"):
        assert time.monotonic() < began_s + timeout_s, f"never true: {expression}"
        time.sleep(0.02)
    return time.monotonic() - began_s
