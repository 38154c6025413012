"""Makes what a frontend knows of engines the same as what the office says."""

from llumnix.core.supervision.frontends import Held
from llumnix.core.types import EngineIndex
from llumnix.frontend.llm import FleetLLM
from llumnix.frontend.office.messages import EngineDied, EngineWanted, FleetWants


class Mirror:
    """The engines of one frontend's client, as the office wants them."""

    def __init__(self, llm: FleetLLM) -> None:
        self._llm = llm
        self._client = llm.engine_core
        self._version = 0

    async def apply(self, wants: FleetWants) -> None:
        """Makes the client's engines these."""
        client = self._client
        self._llm.grow_metrics(wants.slots)
        wanted = {each.engine_index: each for each in wants.engines}
        for engine_index in [e for e in client.engines.by_index if e not in wanted]:
            await client.lose(engine_index)
        for each in wants.engines:
            self._apply_one(each)
        self._version = wants.version

    def _apply_one(self, each: EngineWanted) -> None:
        client, index = self._client, each.engine_index
        if index not in client.engines:
            client.expect(each.instance, index, each.slot)
        client.engines.locate(index, each.address)
        client.engines.accept(index, each.accepting)
        if each.joined:
            client.shared_state.joined.add(index)
        client.shared_state.note_silent(index, each.silent)

    async def died(self, death: EngineDied) -> int:
        """Takes an engine out that has died. Returns how many streams ended."""
        suspects = None if death.suspects is None else frozenset(death.suspects)
        return await self._client.lose(death.engine_index, blamed=death.blamed, suspects=suspects)

    def held(self) -> Held:
        """What this frontend has."""
        client = self._client
        engines = list(client.engines.by_index)
        heard: dict[EngineIndex, float] = {}
        for engine in engines:
            if (heard_s := client.engines.heard_s(engine)) is not None:
                heard[engine] = heard_s
        return Held(
            version=self._version,
            in_flight={e: n for e in engines if (n := client.in_flight(e))},
            heard_s=heard,
            suspects=client.orphans.probation.any,
        )
