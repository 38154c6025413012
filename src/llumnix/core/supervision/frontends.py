"""What is known of the frontends of a deployment that has several: which there are, how many
requests each has where, what each has confirmed, and whose turn it is to try suspects.

Rules
- A frontend is wanted for as long as the deployment runs; it is known by its *slot*. Each of its
  processes is a *client* with a number that is never used again, so that nothing of one that died
  can reach the next. Number 0 is the office's own.
- An engine knows the addresses of a fixed number of clients. Once all are used up, no frontend is
  started again.
- What the fleet wants is numbered in versions. A frontend confirms each, together with what it
  holds. So an engine that takes nothing more is empty once every frontend that may know the engine
  has confirmed that version, and says that it has no request there.
- One frontend at a time has suspects computed again (core/streams/probation.py): if two did, none
  could tell whose suspect killed an engine. It keeps the turn until it has no suspect left.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from llumnix.core.supervision.restart import GiveUp, RestartAfter, RestartPolicy
from llumnix.core.types import EngineIndex

SPARE_CLIENTS = 16
"""So many times frontends are started again in the life of a deployment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendStatus:
    """One frontend, as users see it."""

    id: str
    state: str  # starting, serving, restarting or failed
    pid: int | None
    restarts: int
    why: str | None  # what went wrong with it last


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What one frontend has, by its own word."""

    version: int  # the last one that it has carried out
    in_flight: dict[EngineIndex, int] = field(default_factory=dict)  # requests that engines own
    heard_s: dict[EngineIndex, float] = field(default_factory=dict)  # when outputs came last
    suspects: bool = False  # whether some of its requests may have killed an engine


@dataclass(slots=True, kw_only=True)
class _Frontend:
    """One slot."""

    id: str
    state: str = "starting"
    client: int | None = None  # of its process, from its start to its end
    pid: int | None = None
    greeted: bool = False  # whether it gets what the fleet wants
    served_since_s: float | None = None
    held: Held = field(default_factory=lambda: Held(version=0))
    restarts: int = 0
    why: str | None = None
    crashes: RestartPolicy = field(default_factory=RestartPolicy)


class Roster:
    """The frontends of one deployment. Times are of one clock, in seconds."""

    def __init__(self, count: int) -> None:
        self._frontends = [_Frontend(id=f"f{slot}") for slot in range(count)]
        self._clients_max = clients(count) - 1
        self._next = 1
        self._turn: int | None = None

    # -- what becomes of one

    def begin(self, slot: int) -> int | None:
        """A process is to be started for the slot. Returns its client number; None if there is
        none left."""
        one = self._frontends[slot]
        if self._next > self._clients_max:
            one.state = "failed"
            one.why = f"frontends were started {self._clients_max} times; restart llumnix"
            return None
        one.client, self._next = self._next, self._next + 1
        return one.client

    def greeted(self, client: int, pid: int) -> None:
        """The process has said hello, and is told what the fleet wants from now on."""
        one = self._of(client)
        if one is not None:
            one.pid, one.greeted = pid, True

    def serves(self, client: int, now: float) -> None:
        """It answers requests."""
        one = self._of(client)
        if one is not None:
            one.state, one.served_since_s = "serving", now

    def ended(self, client: int, why: str, now: float) -> RestartAfter | GiveUp | None:
        """Its process has ended. Returns what is to follow; None if it was known already."""
        one = self._of(client)
        if one is None:
            return None
        served_s = 0.0 if one.served_since_s is None else now - one.served_since_s
        one.client = one.pid = one.served_since_s = None
        one.greeted, one.held, one.why = False, Held(version=0), why
        self._pass_turn()
        decided = one.crashes.crashed(served_s)
        if isinstance(decided, GiveUp):
            one.state, one.why = "failed", f"{decided.why}; the last time: {why}"
        else:
            one.state, one.restarts = "restarting", one.restarts + 1
        return decided

    # -- what they say

    def holds(self, client: int, held: Held) -> None:
        """What it has from now on."""
        one = self._of(client)
        if one is not None:
            one.held = held
            self._pass_turn()

    def in_flight(self, engine: EngineIndex) -> int:
        """How many requests an engine owns, of all of them."""
        return sum(one.held.in_flight.get(engine, 0) for one in self._frontends)

    def may_hold(self, engine: EngineIndex, version: int) -> bool:
        """Whether the engine may have a request, or still get one, though since this version it
        takes none."""
        unaware = any(one.greeted and one.held.version < version for one in self._frontends)
        return unaware or self.in_flight(engine) > 0

    def heard_s(self, engine: EngineIndex) -> float | None:
        """When any of them had outputs of the engine last."""
        said = (one.held.heard_s.get(engine) for one in self._frontends)
        return max((s for s in said if s is not None), default=None)

    def _pass_turn(self) -> None:
        wanting = [o.client for o in self._frontends if o.client is not None and o.held.suspects]
        if self._turn not in wanting:
            self._turn = min(wanting, default=None)

    # -- which there are

    @property
    def turn(self) -> int | None:
        """The client that may have suspects computed again; None if no frontend has any."""
        return self._turn

    def greeted_clients(self) -> list[int]:
        """Those that are told what the fleet wants."""
        return [o.client for o in self._frontends if o.client is not None and o.greeted]

    @property
    def serving(self) -> int:
        """How many answer requests."""
        return sum(one.state == "serving" for one in self._frontends)

    @property
    def settled(self) -> bool:
        """Whether each has come up once, or has ended without."""
        return all(one.state != "starting" for one in self._frontends)

    @property
    def all_failed(self) -> bool:
        """Whether none will serve any more."""
        return all(one.state == "failed" for one in self._frontends)

    def name(self, client: int) -> str:
        """The id of the frontend that this client is a process of."""
        one = self._of(client)
        return f"client {client}" if one is None else one.id

    def slot(self, client: int) -> int | None:
        """Its slot; None if it has ended."""
        slots = (slot for slot, one in enumerate(self._frontends) if one.client == client)
        return next(slots, None)

    def status(self) -> Iterable[FrontendStatus]:
        """All of them, in order of their slots."""
        return [
            FrontendStatus(
                id=one.id, state=one.state, pid=one.pid, restarts=one.restarts, why=one.why
            )
            for one in self._frontends
        ]

    def _of(self, client: int) -> _Frontend | None:
        return next((one for one in self._frontends if one.client == client), None)


def clients(frontends: int) -> int:
    """How many clients an engine must know: the frontend in the main process alone; or the office,
    so many frontends, and those that may replace some of them."""
    return 1 if frontends == 1 else 1 + frontends + SPARE_CLIENTS
