"""Makes docs/ui_light.png and docs/ui_dark.png: the page over a made-up deployment that is the same
every time, with a move in mid-flight. Needs Chromium (Debian's package `chromium`) and playwright.

    python scripts/shoot_page.py [--folder docs]
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.browser import chromium, wait_for  # noqa: E402
from support.fake_deployment import FakeDeployment, application, served  # noqa: E402

SIZE = {"width": 1440, "height": 900}
FLIGHT_MS = 240
"""How long after it has begun a move is shown; it takes 400."""
WARM_UP_S = 12
CHOOSE = """(name) => {
  const { board, model } = llumnix, rows = [...model.rows.values()];
  const row = rows.find((r) => r.request === name);
  board.chosen = { instance: row.inst, k: row.k };
  document.getElementById("board").focus({ preventScroll: true });
}"""
HOLD = """(late) => new Promise((done) => {
  const { board } = llumnix, frame = board.frame.bind(board);
  board.frame = (now) => {
    const flying = [...board.sprites.values()].find((s) => s.flight);
    if (!flying?.flight.trail.text) return frame(now);
    flying.flight.at = flying.flight.trail.at = performance.now() - late;
    frame(performance.now());
    board.frame = () => {};
    done();
  };
})"""


def world() -> FakeDeployment:
    """Four busy instances: one is full and has a queue, one is being drained."""
    one = FakeDeployment(instances=8, cap=24_000, seed=7)
    one.fill(110, share=0.52, urgent="35")
    for n in range(7):
        one.add_request("i1", prompt=900 + 120 * n, out=1, waits=True, age_s=0.5 + n)
    for n in range(5):
        one.add_request("i1", prompt=500 + 300 * n, out=200, age_s=30 + n)
    one.add_request("i4", prompt=2600, out=0, age_s=0.4)
    one.states["i6"], one.whys["i6"] = "draining", "draining: the load has fallen"
    for name in [r.name for r in one.requests.values() if r.instance == "i6"][3:]:
        one.requests[name].instance = "i3"
    return one


def tell_a_story(one: FakeDeployment) -> None:
    """What happened in the ten minutes before."""
    now = time.time()

    def at(minutes: float, kind: str, target: str, why: str, **more: Any) -> None:
        note = {"t": now - 60 * minutes, "kind": kind, "target": target, "why": why, **more}
        one.notes.add(note)

    requests = list(one.requests.values())
    for n in range(46):
        r = requests[n]
        record = one.move(r.name, r.instance, downtime_ms=1.6 + (n * 7 % 13) / 9)
        record = {**record, "source": f"i{n % 8}", "destination": f"i{(n * 3 + 1) % 8}"}
        one.requests[r.name].age_s += 1
        record["why"] = f"i{(n * 3 + 1) % 8} has {300 + n} steps of freeness, i{n % 8} has {n}"
        at(9.6 - n * 0.2, "move", r.name, "", move=record)
    one.notes._kept = type(one.notes._kept)([n for n in one.notes._kept if n["t"] < now - 1])
    at(6.1, "death", "i2", "its process was killed (SIGKILL)")
    for n in range(6):
        r = requests[n * 5]
        shown = {"client_id": r.client_id, "instance": f"i{n}", "gap_s": 0.28 + n / 50}
        at(6.09 - n / 300, "revive", r.name, "i2 died", revival=shown)
    at(5.5, "up", "i2", "")
    at(3.2, "add", "i7", "mean freeness 8 is below 10")
    at(2.9, "up", "i7", "")
    at(0.3, "drain", "i6", "the load has fallen")
    one.moves.clear()


def live(one: FakeDeployment, second: int) -> None:
    """A second of it: tokens, and requests that come and go."""
    one.step(6 + second * 5 % 4)
    short = sorted(one.requests.values(), key=lambda r: r.prompt)
    for r in [r for r in short if r.instance == "i0"][:2]:
        one.end(r.name)
        one.add_request("i0", prompt=r.prompt, out=8, age_s=0.3)


def shoot(folder: Path) -> None:
    """Writes the pictures."""
    for theme in ("light", "dark"):
        one = world()
        tell_a_story(one)
        with served(application(one)) as site, chromium() as browser:
            page = browser.new_page(viewport=SIZE, color_scheme=theme, device_scale_factor=1)
            page.goto(site.url + "/llumnix/ui")
            wait_for(page, "llumnix.model.ready")
            for second in range(WARM_UP_S):
                site.do(lambda one=one, n=second: live(one, n))
                time.sleep(1)
            crowded = [r for r in one.requests.values() if r.instance == "i1" and not r.waits]
            chosen = max(crowded, key=lambda r: r.prompt + r.out)
            why = "i2 has 214 steps of freeness, i1 has none and a queue"
            site.do(lambda one=one, r=chosen, why=why: one.move(r.name, "i2", why, 1.9))
            wait_for(page, "llumnix.board.trails.length")
            page.evaluate(CHOOSE, chosen.name)
            page.keyboard.press("Enter")
            for second in range(3):
                site.do(lambda one=one, n=second: live(one, n))
                time.sleep(1)
            page.evaluate("document.activeElement.blur()")
            why = "i5 has 331 steps of freeness, i2 has 36"
            site.do(lambda one=one, r=chosen, why=why: one.move(r.name, "i5", why, 2.1))
            page.evaluate(HOLD, FLIGHT_MS)
            page.wait_for_timeout(900)
            page.screenshot(path=folder / f"ui_{theme}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs")
    shoot(parser.parse_args().folder)


if __name__ == "__main__":
    main()
