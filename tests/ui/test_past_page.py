"""The page over an event log, in a real browser."""

from typing import Any

import pytest

pytest.importorskip("vllm")

from cli.test_ui import BEGAN, past
from llumnix.commands.page import application
from support.browser import needs_browser, wait_for
from support.fake_deployment import served

from .conftest import Open

pytestmark = [needs_browser, pytest.mark.timeout(120)]

PLACE = "[...llumnix.model.rows.values()][0]?.inst"
DRAG = """(value) => {
  const slider = document.querySelector("#past input");
  slider.value = value;
  slider.dispatchEvent(new Event("input"));
}"""


@pytest.fixture
def page(stack: Any, open_page: Open) -> Any:
    site = stack.enter_context(served(application(past(), "events.jsonl")))
    page = open_page(site)
    wait_for(page, "document.querySelector('#past')")
    return page


def test_the_slider_shows_another_moment_and_the_button_has_it_stand_still(page: Any) -> None:
    wait_for(page, f"{PLACE} === 'i0'")
    page.evaluate(DRAG, BEGAN + 45)
    wait_for(page, f"{PLACE} === 'i1'")
    assert page.text_content("#model") == "events.jsonl"
    wait_for(page, "document.querySelector('#events').textContent.includes('mine moved i0 → i1')")
    page.click("#past button")
    wait_for(page, "llumnix.model.hello.log.speed === 0")
    stands = page.text_content("#past span")
    page.wait_for_timeout(1500)
    assert page.text_content("#past span") == stands
    page.evaluate(DRAG, BEGAN + 10)
    wait_for(page, f"{PLACE} === 'i0'")
    assert "10 of 60 s" in page.text_content("#past span")
    page.select_option("#past select", "64")
    wait_for(page, "document.querySelector('#past span').textContent.includes('60 of 60 s')", 20)
    wait_for(page, "document.querySelector('#past button').textContent === 'Play'")


def test_nothing_can_be_ordered_of_the_past(page: Any) -> None:
    page.focus("#board")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.text_content("#panel h2") == "i0"
    for key in ("d", "a", "r"):
        page.keyboard.press(key)
    assert page.query_selector("dialog[open]") is None
    assert page.is_hidden("#add")
    assert page.is_hidden("#panel .acts")
    page.keyboard.press("ArrowUp")
    wait_for(page, "document.querySelector('#panel').textContent.includes('i0: the freest')")


def test_the_bar_keeps_nobody_out(page: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page, context="#past").response
    assert [v["id"] for v in found["violations"]] == []
    assert len(found["passes"]) > 5
