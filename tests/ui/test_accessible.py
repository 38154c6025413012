"""axe-core, a tool that looks for what keeps people with disabilities out, over all that the page
shows. What it cannot see, such as the board's picture, has a table beside it."""

from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("axe_playwright_python")

from axe_playwright_python.sync_playwright import Axe

from support.browser import needs_browser, wait_for
from support.fake_deployment import FakeDeployment, Served

from .conftest import Open

pytestmark = [needs_browser, pytest.mark.timeout(120)]

RULES_MIN = 20
RULES_MIN_OF_A_DIALOG = 8
"""So many of its rules found something to look at. It looks at an open dialog alone, with 22 as a
rule, and once, on a busy machine, with 10."""


def faults(page: Any, rules_min: int = RULES_MIN) -> list[str]:
    """What axe-core has to say against the page as it is now."""
    found = Axe().run(page, options={"resultTypes": ["violations", "passes"]}).response
    assert len(found["passes"]) >= rules_min
    return [
        f"{one['id']}: {node['html'][:200]}" for one in found["violations"] for node in one["nodes"]
    ]


@pytest.fixture(params=["light", "dark"])
def page(world: FakeDeployment, site: Served, open_page: Open, request: Any) -> Any:
    """With something of everything on it."""
    world.fill(40)
    world.add_request("i0", prompt=3000, waits=True)
    name = world.add_request("i1", prompt=3000).name
    page = open_page(site, color_scheme=request.param)
    site.do(lambda: world.move(name, "i3"))
    site.do(lambda: world.kill("i2"))
    wait_for(page, "document.querySelectorAll('#events li.bad').length")
    return page


def test_the_board_with_its_decisions_keeps_nobody_out(page: Any) -> None:
    assert faults(page) == []


def test_what_is_chosen_and_the_dialogs_keep_nobody_out(page: Any) -> None:
    page.focus("#board")
    for key in ("ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert faults(page) == []
    page.keyboard.press("ArrowUp")
    wait_for(page, "document.querySelector('#panel h3')")
    assert faults(page) == []
    for key in ("m", "?"):
        page.keyboard.press(key)
        page.wait_for_selector("dialog[open] button")
        assert faults(page, RULES_MIN_OF_A_DIALOG) == []
        page.keyboard.press("Escape")
        page.wait_for_selector("dialog", state="hidden")


def test_the_table_keeps_nobody_out(page: Any) -> None:
    page.keyboard.press("t")
    wait_for(page, "document.querySelectorAll('#table tr').length > 40")
    assert faults(page) == []
