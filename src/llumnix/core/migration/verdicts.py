"""What a destination has decided about migrations, for sources that ask again.

Rules
- A verdict is remembered and never changed. A handover that comes again gets the same one, and a
  migration that was declined before its reservation came stays declined.
- The last `REMEMBERED_MAX` verdicts are remembered. A handover whose migration is not among them
  gets an answer too, or its source would ask for ever: `taken` if the request is here; if not, the
  migration is declined, and stays so.
"""

from dataclasses import dataclass

from llumnix.core.codes import AbortCode
from llumnix.core.limits import REMEMBERED_MAX
from llumnix.core.messages import (
    CancelMigration,
    Handover,
    HandoverAnnounced,
    Out,
    Stage,
    ToPeer,
    Verdict,
)
from llumnix.core.migration.port import EnginePort, Phase
from llumnix.core.migration.tables import (
    DestinationAction,
    DestinationEvent,
    DestinationMachine,
    DestinationState,
)
from llumnix.core.types import EngineIndex, MigrationId


@dataclass(slots=True, kw_only=True)
class Decided:
    """One migration that was decided."""

    verdict: Verdict
    machine: DestinationMachine | None = None  # None: its reservation never came
    source: EngineIndex | None = None
    address: str = ""


class Verdicts:
    """The verdicts of one engine."""

    def __init__(self, port: EnginePort, out: list[Out]) -> None:
        self._port = port
        self._out = out
        self._decided: dict[MigrationId, Decided] = {}

    def get(self, migration: MigrationId) -> Verdict | None:
        """The verdict, if it is remembered."""
        decided = self._decided.get(migration)
        return None if decided is None else decided.verdict

    def remember(self, decided: Decided) -> None:
        """Keeps a verdict until `REMEMBERED_MAX` others have come."""
        self._decided[decided.verdict.migration] = decided
        if len(self._decided) > REMEMBERED_MAX:
            del self._decided[next(iter(self._decided))]

    def fate(self, migration: MigrationId) -> str:
        """`taken` or `declined`. A migration that was never heard of is declined from now on."""
        verdict = self.get(migration)
        if verdict is None:
            verdict = Verdict(
                migration=migration, taken=False, why="its source died", code=AbortCode.PEER_LOST
            )
            self.remember(Decided(verdict=verdict))
        return "taken" if verdict.taken else "declined"

    def receive(self, message: Stage | HandoverAnnounced | Handover | CancelMigration) -> None:
        """Takes in a message about a migration that is over, or was never known."""
        if isinstance(message, HandoverAnnounced):
            return
        decided = self._decided.get(message.migration)
        if decided is None:
            decided = self._decide_unknown(message)
        machine = decided.machine
        if machine is None:
            if isinstance(message, Handover):
                self._say(message.source, message.address, decided.verdict)
            return
        if machine.state is DestinationState.COMMITTED and isinstance(message, Stage):
            return  # The message came twice.
        event = {
            Stage: DestinationEvent.STAGE,
            Handover: DestinationEvent.HANDOVER,
            CancelMigration: DestinationEvent.CANCELLED,
        }[type(message)]
        if machine.feed(event) is DestinationAction.SAY_VERDICT and decided.source is not None:
            self._say(decided.source, decided.address, decided.verdict)

    def _decide_unknown(self, message: Stage | Handover | CancelMigration) -> Decided:
        """Its reservation was lost, or will come later, or was forgotten. It will not be made any
        more."""
        phase = Phase.GONE
        if isinstance(message, Handover):
            phase = self._port.progress(message.request).phase
        taken = phase is not Phase.GONE
        why = "" if taken else "it is not known there"
        decided = Decided(verdict=Verdict(migration=message.migration, taken=taken, why=why))
        self.remember(decided)
        return decided

    def _say(self, engine: EngineIndex, address: str, verdict: Verdict) -> None:
        self._out.append(ToPeer(engine=engine, address=address, message=verdict))
