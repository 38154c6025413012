"""Copies of KV between engines: each engine has one link, which its copies share."""

from collections.abc import Callable
from dataclasses import dataclass

from llumnix.core.types import EngineIndex


@dataclass(slots=True, eq=False)
class Flow:
    """One copy. `left`: bytes; `version` counts its changes of speed."""

    source: EngineIndex
    destination: EngineIndex
    size: int
    left: float
    began_s: float
    seen_s: float
    speed: float
    ended: Callable[["Flow"], None]
    version: int = 0


class Network:
    """All copies under way. `bytes_s`: of a link, in each direction. `later(seconds, what)` calls
    `what()` at that time from now."""

    def __init__(self, bytes_s: float, later: Callable[[float, Callable[[], None]], None]) -> None:
        self._bytes_s = bytes_s
        self._later = later
        self._flows: list[Flow] = []

    def copy(
        self,
        source: EngineIndex,
        destination: EngineIndex,
        size: int,
        now: float,
        ended: Callable[[Flow], None],
    ) -> None:
        """Begins a copy of `size` bytes; `ended` is called when all of it is there."""
        self._flows.append(Flow(source, destination, size, size, now, now, 0.0, ended))
        self._share(now)

    def cut(self, engine: EngineIndex, now: float) -> list[Flow]:
        """An engine is gone: its copies stop. Returns those."""
        cut = [f for f in self._flows if engine in (f.source, f.destination)]
        self._flows = [f for f in self._flows if f not in cut]
        for flow in cut:
            flow.version += 1
        self._share(now)
        return cut

    def _share(self, now: float) -> None:
        """Every copy gets the smaller of its fair shares of both links."""
        out: dict[EngineIndex, int] = {}
        come: dict[EngineIndex, int] = {}
        for flow in self._flows:
            out[flow.source] = out.get(flow.source, 0) + 1
            come[flow.destination] = come.get(flow.destination, 0) + 1
        for flow in self._flows:
            speed = self._bytes_s / max(out[flow.source], come[flow.destination])
            if speed == flow.speed:
                continue
            flow.left -= flow.speed * (now - flow.seen_s)
            flow.seen_s, flow.speed = now, speed
            flow.version += 1
            self._later(max(0.0, flow.left / speed), _Due(self, flow, flow.version))

    def _end(self, flow: Flow, now: float) -> None:
        self._flows.remove(flow)
        self._share(now)
        flow.ended(flow)


@dataclass(slots=True)
class _Due:
    """The end of a copy, unless its speed has changed since."""

    network: Network
    flow: Flow
    version: int

    def __call__(self) -> None:
        if self.flow.version == self.version:
            now = self.flow.seen_s + max(0.0, self.flow.left / self.flow.speed)
            self.network._end(self.flow, now)
