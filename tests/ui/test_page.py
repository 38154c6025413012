"""The page in a real browser, over the real feed and a made-up deployment."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI

from llumnix.frontend.http.access import Access, digests
from llumnix.frontend.http.gate import Gate
from support.browser import needs_browser, wait_for
from support.fake_deployment import HIGH, FakeDeployment, Served, application, served

from .conftest import Open, Seen

pytestmark = [needs_browser, pytest.mark.timeout(120)]

USUAL, URGENT = [0, 114, 178], [213, 94, 0]
"""Okabe and Ito's blue and vermillion."""
PIXEL = """(name) => {
  const { model, board } = llumnix, rows = [...model.rows.values()];
  const s = board.sprites.get(rows.find((r) => r.request === name).k);
  const at = [(s.x + s.w - 2) * board.ratio, (s.y + s.h / 2) * board.ratio].map(Math.round);
  return [...board.c.getImageData(...at, 1, 1).data].slice(0, 3);
}"""


RECORD = """() => {
  const { board } = llumnix, own = (name) => board[name].bind(board);
  const [see, fly, arcs] = ["see", "fly", "arcs"].map(own);
  const drawn = (window.drawn = { seen: [], labels: [], trails: [], flew: false });
  board.see = (list, now) => { drawn.seen.push(...list.map((o) => o.see)); see(list, now); };
  board.fly = (sprite, how, now) => {
    fly(sprite, how, now);
    drawn.trails.push(how.orphan);
    drawn.flew ||= Boolean(sprite.flight);
  };
  board.arcs = (now) => {
    const plates = arcs(now);
    drawn.labels.push(...plates.map((p) => p.t.text));
    return plates;
  };
}"""
"""Keeps what is drawn for a moment: a busy machine may look too late."""


def column_of(page: Any, name: str) -> str | None:
    """The column that a request's block stands in, as it is drawn."""
    found: str | None = page.evaluate(
        """(name) => {
          const { model, board } = llumnix;
          const row = [...model.rows.values()].find((r) => r.request === name);
          const s = row && board.sprites.get(row.k);
          return s && !s.flight && board.columns.find((c) => Math.abs(c.x - s.x) < 1)?.id;
        }""",
        name,
    )
    return found


def soon(true: Callable[[], bool], within_s: float = 5.0) -> float:
    began_s = time.monotonic()
    while not true():
        assert time.monotonic() < began_s + within_s
        time.sleep(0.02)
    return time.monotonic() - began_s


def near(found: list[int], wanted: list[int]) -> bool:
    return all(abs(a - b) <= 60 for a, b in zip(found, wanted, strict=True))


def test_a_request_is_a_block_in_its_instances_column_in_its_classs_colour(
    world: FakeDeployment, site: Served, open_page: Open
) -> None:
    usual, urgent = (
        world.add_request("i1", prompt=6000),
        world.add_request("i2", prompt=3000, priority=HIGH),
    )
    page = open_page(site)
    for one, column, colour in ((usual, "i1", USUAL), (urgent, "i2", URGENT)):
        soon(lambda name=one.name, column=column: column_of(page, name) == column)
        soon(lambda name=one.name, colour=colour: near(page.evaluate(PIXEL, name), colour))
    heights = page.evaluate("() => [...llumnix.board.sprites.values()].map((s) => s.h)")
    assert heights[0] / heights[1] == pytest.approx(6001 / 3001, rel=0.02)


def test_a_move_is_seen_within_a_second_with_its_true_downtime(
    world: FakeDeployment, site: Served, open_page: Open
) -> None:
    one = world.add_request("i0", prompt=5000)
    page = open_page(site)
    soon(lambda: column_of(page, one.name) == "i0")
    page.evaluate(RECORD)
    site.do(lambda: world.move(one.name, "i3", "i3 is freer", 2.4))
    assert soon(lambda: column_of(page, one.name) == "i3") < 1.5
    assert near(page.evaluate(PIXEL, one.name), USUAL)
    soon(lambda: set(page.evaluate("drawn.labels")) == {"2.4 ms"})
    assert page.evaluate("drawn.flew")
    soon(lambda: "i3 is freer" in page.text_content("#events"))
    assert f"{one.client_id} moved i0 → i3, paused 2.4 ms" in page.text_content("#events")
    soon(lambda: "moved i0 → i3" in page.text_content("#live"))


def test_an_instance_dies_and_its_requests_fly_on_as_orphans(
    world: FakeDeployment, site: Served, open_page: Open
) -> None:
    names = [world.add_request("i0", prompt=1500).name for _ in range(3)]
    page = open_page(site)
    page.evaluate(RECORD)
    site.do(lambda: world.kill("i0"))
    wait_for(page, "drawn.seen.includes('flash')")
    wait_for(page, "[...llumnix.model.rows.values()].every((r) => r.phase === 'o')")
    assert {column_of(page, name) for name in names} == {"i0"}
    site.do(lambda: [world.revive(name, "i2") for name in names])
    soon(lambda: {column_of(page, name) for name in names} == {"i2"})
    soon(lambda: "goes on at i2 after 0.3 s" in page.text_content("#events"))


def test_a_request_that_is_revived_between_two_looks_flies_as_an_orphan(
    world: FakeDeployment, site: Served, open_page: Open
) -> None:
    one = world.add_request("i0", prompt=1500)
    page = open_page(site)
    soon(lambda: column_of(page, one.name) == "i0")

    page.evaluate(RECORD)

    def die() -> None:
        world.kill("i0")
        world.revive(one.name, "i2")

    site.do(die)
    wait_for(page, "drawn.trails.length")
    assert page.evaluate("drawn.trails") == [True]
    soon(lambda: column_of(page, one.name) == "i2")


def test_a_drained_column_greys_while_its_blocks_leave(
    world: FakeDeployment, site: Served, open_page: Open
) -> None:
    one = world.add_request("i0", prompt=5000)
    page = open_page(site)
    soon(lambda: near(page.evaluate(PIXEL, one.name), USUAL))
    page.click("#board", position={"x": 370, "y": 300})
    page.keyboard.press("d")
    page.click("dialog .go")
    soon(lambda: not near(page.evaluate(PIXEL, one.name), USUAL))
    assert world.orders == [("drain", "i0")]


HOSTILE = "<img src=x onerror='window.pwned=1'>\u202e\n</script><b>"


def test_ids_are_text_whatever_a_client_sends(
    world: FakeDeployment, site: Served, open_page: Open
) -> None:
    one = world.add_request("i0", HOSTILE, prompt=3000, key="<b>batch</b>")
    page = open_page(site)
    site.do(lambda: world.move(one.name, "i1", HOSTILE))
    soon(lambda: HOSTILE in page.text_content("#events"))
    page.focus("#board")
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    assert page.text_content("#panel h2") == HOSTILE
    soon(lambda: HOSTILE in page.text_content("#panel .moves"))
    assert "<b>batch</b>" in page.text_content("#panel .facts")
    page.keyboard.press("m")
    assert page.text_content("dialog form > p") == HOSTILE
    page.keyboard.press("Escape")
    page.click("#views")
    assert HOSTILE in page.text_content("#table")
    assert page.evaluate("window.pwned") is None
    assert page.query_selector("img, b > b, body script") is None


ORDERS = (
    ("d", ("drain", "i0")), ("u", ("undrain", "i0")), ("r", ("restart", "i0")), ("a", "add")
)  # fmt: skip
"""Keys, and what they order."""


def test_every_control_has_a_key(world: FakeDeployment, site: Served, open_page: Open) -> None:
    one = world.add_request("i0", prompt=3000)
    page = open_page(site)
    page.focus("#board")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.text_content("#panel h2") == "i0"
    for key, order in ORDERS:
        page.keyboard.press(key)
        page.wait_for_selector("dialog[open]")
        page.keyboard.press("Enter")
        soon(lambda order=order: order in world.orders)
        page.wait_for_selector("dialog", state="hidden")
    page.keyboard.press("ArrowUp")
    assert page.text_content("#panel h2") == one.client_id
    page.keyboard.press("m")
    page.select_option("dialog select", "i2")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    soon(lambda: ("migrate", one.name, "i2") in world.orders)
    soon(lambda: column_of(page, one.name) == "i2")
    page.wait_for_selector("dialog", state="hidden")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("no such thing")
    soon(lambda: page.text_content("#events") == "Nothing like that")
    page.keyboard.press("Escape")
    page.keyboard.press("t")
    assert page.is_visible("#table")
    page.keyboard.press("?")
    assert "add an instance" in page.text_content("dialog")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    assert page.is_hidden("#panel")


def test_nothing_is_ordered_without_a_confirmation(
    world: FakeDeployment, site: Served, open_page: Open
) -> None:
    page = open_page(site)
    page.keyboard.press("a")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="hidden")
    page.click("#add")
    page.click("dialog button:has-text('Cancel')")
    time.sleep(0.3)
    assert world.orders == []


def test_what_is_asked_as_soon_as_the_last_question_is_closed_stays(
    site: Served, open_page: Open
) -> None:
    """A browser tells later that a dialog is closed. A slow machine tells it after the next key."""
    page = open_page(site)
    page.keyboard.press("a")
    page.wait_for_selector("dialog[open] button")
    page.evaluate(
        """() => {
          document.querySelector("dialog").close();
          document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "?", bubbles: true }));
        }"""
    )
    wait_for(page, "document.querySelectorAll('dialog').length === 1")
    assert "add an instance" in page.text_content("dialog[open]")


def guarded(of: FakeDeployment, keys: list[str], admins: list[str]) -> FastAPI:
    """The page behind the gate of a server with these keys."""
    app = FastAPI()
    app.add_middleware(Gate)
    app.state.args = SimpleNamespace(
        access=Access(
            client_digests=digests(keys), admin_digests=digests(admins), clients_administer=True,
            hosts=frozenset(), origins=(),
        ),
        allowed_origins=(), allow_credentials=False, allowed_methods=["*"], allowed_headers=["*"],
        max_body_mb=1, control_app=application(of),
    )  # fmt: skip
    app.state.engine_client = SimpleNamespace(stopping=False, open_http=0, tracing=None)
    return app


def test_a_wrong_key_is_refused_and_the_right_one_opens(
    world: FakeDeployment, stack: ExitStack, open_page: Open
) -> None:
    world.add_request("i0", prompt=3000)
    site = stack.enter_context(served(guarded(world, ["plain"], ["root"])))
    page = open_page(site, ready=False)
    for key, said in ((None, "Unauthorized"), ("wrong", "Unauthorized"), ("plain", "admin key")):
        if key is not None:
            page.fill("dialog input", key)
            page.keyboard.press("Enter")
        soon(lambda said=said: said in (page.text_content("dialog") or ""))
        assert not page.evaluate("llumnix.model.ready")
        soon(lambda: page.input_value("dialog input") == "")
    page.fill("dialog input", "root")
    page.keyboard.press("Enter")
    wait_for(page, "llumnix.model.ready")
    page.keyboard.press("a")
    page.click("dialog .go")
    soon(lambda: world.orders == ["add"])


def test_a_key_that_may_not_administer_is_told_so_and_asked_for_another(
    world: FakeDeployment, stack: ExitStack, open_page: Open
) -> None:
    app = guarded(world, ["plain"], [])
    site = stack.enter_context(served(app))
    page = open_page(site, ready=False)
    page.fill("dialog input", "plain")
    page.keyboard.press("Enter")
    wait_for(page, "llumnix.model.ready")
    access = Access(
        client_digests=digests(["plain"]), admin_digests=digests(["root"]),
        clients_administer=True, hosts=frozenset(), origins=(),
    )  # fmt: skip
    app.state.args.access = access
    page.click("#add")
    page.click("dialog .go")
    soon(lambda: "use an admin key" in page.text_content("dialog .error"))
    assert world.orders == []
    page.fill("dialog input", "root")
    page.keyboard.press("Enter")
    soon(lambda: world.orders == ["add"])


def test_the_page_asks_nobody_but_its_server(
    world: FakeDeployment, site: Served, open_page: Open, seen: Seen
) -> None:
    page = open_page(site)
    page.click("#theme")
    page.click("#views")
    time.sleep(0.5)
    paths = {r.removeprefix(site.url) for r in seen.requests if not r.startswith("data:")}
    names = ("page.css", "main.js", "board.js", "feed.js", "model.js", "panel.js", "timeline.js")
    files = {f"/llumnix/ui/{name}" for name in names}
    assert paths == {"/llumnix/ui", "/llumnix/v1/events", *files}


def test_the_table_has_what_the_board_has(
    world: FakeDeployment, site: Served, open_page: Open
) -> None:
    world.fill(40)
    page = open_page(site)
    page.keyboard.press("t")
    soon(lambda: len(page.query_selector_all("#table table:nth-of-type(2) tbody tr")) == 40)
    assert len(page.query_selector_all("#table table:first-of-type tbody tr")) == 4
    page.click("#table table:nth-of-type(2) tbody button")
    assert page.is_visible("#panel")


def test_who_wants_no_motion_gets_lines_instead_of_flights(
    world: FakeDeployment, site: Served, open_page: Open
) -> None:
    one = world.add_request("i0", prompt=5000)
    page = open_page(site, reduced_motion="reduce")
    page.evaluate(RECORD)
    site.do(lambda: world.move(one.name, "i3"))
    wait_for(page, "drawn.trails.length")
    assert page.evaluate("drawn.flew") is False
    soon(lambda: column_of(page, one.name) == "i3")


def test_light_and_dark_follow_the_system_and_a_switch(site: Served, open_page: Open) -> None:
    page = open_page(site, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(14, 18, 23)"
    page.click("#theme")
    assert page.evaluate(ground) == "rgb(246, 247, 249)"


def test_of_a_crowded_column_the_largest_are_shown_and_the_rest_counted(
    world: FakeDeployment, site: Served, open_page: Open
) -> None:
    for n in range(75):
        world.add_request("i0", prompt=10 + n)
    page = open_page(site)
    wait_for(page, "llumnix.board.columns[0].rest?.n === 15")
    assert page.evaluate("llumnix.board.sprites.size") == 60


def test_more_instances_than_columns_are_a_grid_of_which_eight_open(
    stack: ExitStack, open_page: Open
) -> None:
    world = FakeDeployment(instances=70)
    site = stack.enter_context(served(application(world)))
    page = open_page(site, ready=False)
    wait_for(page, "llumnix.board.cells?.length === 70")
    x, y = page.evaluate("(({ x, y, s }) => [x + s / 2, y + s / 2])(llumnix.board.cells[20])")
    page.click("#board", position={"x": x, "y": y})
    wait_for(page, "llumnix.board.columns.length === 8 && llumnix.board.columns[0].id === 'i20'")
    page.keyboard.press("Escape")
    wait_for(page, "llumnix.board.inGrid")


def test_a_lost_feed_is_told_and_found_again(
    world: FakeDeployment, stack: ExitStack, open_page: Open, seen: Seen
) -> None:
    with served(application(world)) as site:
        page = open_page(site)
    soon(lambda: "Trying again" in (page.text_content("#banner") or ""))
    seen.complaints.clear()
    page.context.close()


def test_a_page_that_is_not_drawn_keeps_no_more_than_it_would_show(
    world: FakeDeployment, site: Served, open_page: Open
) -> None:
    one = world.add_request("i0", prompt=3000)
    page = open_page(site)
    soon(lambda: column_of(page, one.name) == "i0")
    page.evaluate(
        """() => {
          const { board } = llumnix, [k] = board.sprites.keys();
          board.frame = () => {};
          for (let n = 0; n < 5000; n++) {
            board.see([{ see: "flight", k, from: "i0", to: "i1", orphan: false }], n);
          }
        }"""
    )
    assert page.evaluate("llumnix.board.trails.length") <= 400
