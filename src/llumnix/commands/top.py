"""`llumnix top`: what the page at /llumnix/ui shows, in a terminal, once a second."""

import json
import time
from collections import Counter, deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from llumnix.commands.server_client import follow, server_parser
from llumnix.observe.console import say

if TYPE_CHECKING:
    from rich.console import RenderableType

EVENTS_PATH = "/llumnix/v1/events"
DRAW_EVERY_S = 1.0
BAR_CELLS = 24
LINES_SHOWN = 12
STYLES = {"serving": "green", "draining": "yellow", "starting": "yellow", "stopping": "yellow"}
"""By state of an instance; red for the others."""


def top(argv: list[str]) -> int:
    """Shows instances, rates and the last decisions until Ctrl-C."""
    parser = server_parser("top")
    parser.add_argument("--once", action="store_true", help="show it once, and end")
    args = parser.parse_args(argv)
    events = follow(args, EVENTS_PATH)
    try:
        if args.json:
            _print(events, once=args.once)
        else:
            _show(events, once=args.once)
    except KeyboardInterrupt:
        pass
    return 0


def _print(events: Iterable[tuple[str, dict[str, Any]]], *, once: bool) -> None:
    for event, data in events:
        print(json.dumps({"event": event, **data}), flush=True)
        if once and event == "state":
            return


def _show(events: Iterable[tuple[str, dict[str, Any]]], *, once: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    board, console = Board(), Console()
    with Live(console=console, auto_refresh=False, screen=not once) as live:
        drawn_s = float("-inf")
        for event, data in events:
            board.take(event, data)
            now_s = time.monotonic()
            if board.known and now_s >= drawn_s + DRAW_EVERY_S:
                live.update(board.drawn(), refresh=True)
                drawn_s = now_s
                if once:
                    return
    say("the server has ended the feed")


class Board:
    """What the feed has told so far."""

    def __init__(self) -> None:
        self.known = False  # whether it knows the whole deployment
        self._hello: dict[str, Any] = {}
        self._instances: dict[str, dict[str, Any]] = {}
        self._places: dict[int, tuple[str, str]] = {}  # instance and phase of each request
        self._head: dict[str, Any] = {"controller": "up", "rates": {}}
        self._lines: deque[tuple[float, str, str]] = deque(maxlen=LINES_SHOWN)

    def take(self, event: str, data: dict[str, Any]) -> None:
        """Takes an event of the feed in."""
        match event:
            case "hello":
                self._hello = data
            case "history":
                for one in data["events"]:
                    self._note(one)
            case "state":
                self._instances = dict(data["instances"])
                self._places = {row[0]: (row[1], row[3]) for row in data["requests"]}
                self._take_head(data)
                self.known = True
            case "delta":
                self._take_delta(data)
            case "move" | "decision":
                self._note({"event": event, **data})

    def _take_head(self, data: dict[str, Any]) -> None:
        self._head |= {name: data[name] for name in self._head if data.get(name)}

    def _take_delta(self, data: dict[str, Any]) -> None:
        for name, change in data.get("instances", {}).items():
            if change is None:
                self._instances.pop(name, None)
            else:
                self._instances[name] = {**self._instances.get(name, {}), **change}
        for row in data.get("open", ()):
            self._places[row[0]] = row[1], row[3]
        for k, instance, phase, _ in data.get("moved", ()):
            self._places[k] = instance, phase
        for k, _ in data.get("close", ()):
            self._places.pop(k, None)
        self._take_head(data)

    def _note(self, one: dict[str, Any]) -> None:
        if one["event"] == "move":
            if one["phase"] == "begun":
                return
            paused = one["downtime_ms"]
            pause = "" if paused is None else f", paused {paused:.1f} ms"
            moved = one["outcome"] == "migrated"
            what = f"{one['request']}: {one['from']} → {one['to']}{pause}"
            self._lines.append((one["t"], what if moved else f"{what}, {one['outcome']}",
                                one["why"] if moved else one["reason"]))  # fmt: skip
        elif one["kind"] not in ("dispatch", "dispatches"):
            self._lines.append((one["t"], f"{one['target']}: {one['kind']}", one.get("why", "")))

    # -- shown

    def drawn(self) -> "RenderableType":
        """The whole of it."""
        from rich.console import Group

        return Group(self._title(), self._table(), self._decisions())

    def _title(self) -> "RenderableType":
        from rich.text import Text

        rates, phases = self._head["rates"], Counter(phase for _, phase in self._places.values())
        waits = rates.get("ttft_ms") or ()
        first = " / ".join(f"{ms:.0f}" for ms in waits) or "–"
        up = self._head["controller"] == "up"
        return Text.assemble(
            ("llumnix ", "bold"),
            f"{self._hello.get('model', '')} · {self._hello.get('policy', '')}   ",
            f"{sum(phases.values())} requests, {phases['w']} waiting   ",
            f"{rates.get('req_s', 0)} requests/s   {rates.get('tok_s', 0)} tokens/s   ",
            f"first token {first} ms (P50 / P99)   controller ",
            (self._head["controller"], "green" if up else "bold red"),
        )

    def _table(self) -> "RenderableType":
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("", "state", "KV memory", "", "freeness", "running", "waiting", "why"):
            table.add_column(name, justify="right" if name in RIGHT else "left", no_wrap=True)
        for name, one in self._instances.items():
            state = one["state"]
            share = one["kv"] / one["cap"] if one["cap"] else 0.0
            full = round(share * BAR_CELLS)
            table.add_row(
                Text(name, "bold"),
                Text(state, STYLES.get(state, "red")),
                Text.assemble(("█" * full, "blue"), ("░" * (BAR_CELLS - full), "dim")),
                f"{share:.0%}",
                "–" if one["free"] is None else str(one["free"]),
                str(sum(one["run"])),
                str(sum(one["wait"])),
                Text(one["why"] or "", "dim"),
            )
        return table

    def _decisions(self) -> "RenderableType":
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, show_header=False, title_justify="left")
        for t, what, why in reversed(self._lines):
            at = time.strftime("%H:%M:%S", time.localtime(t))
            table.add_row(Text(at, "dim"), Text(_printable(what)), Text(_printable(why), "dim"))
        return table


def _printable(text: str) -> str:
    """Ids are the clients', and must not steer the terminal."""
    return "".join(c if c.isprintable() else "�" for c in text)


RIGHT = ("freeness", "running", "waiting")
