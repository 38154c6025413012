"""Answers what frontends ask the office: of the fleet, of all frontends, and of what they share."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import msgspec

from llumnix.cluster.frontends.office import Office
from llumnix.core.streams.quarantine import Quarantine
from llumnix.core.types import EngineIndex
from llumnix.errors import (
    ConflictError,
    ProtocolError,
    UnknownMigrationError,
    UnknownRequestError,
)
from llumnix.frontend.http.control import InstanceControl, InstanceRow, Rows, fleet_look
from llumnix.frontend.office.adapter import Adapter
from llumnix.frontend.office.adapters import as_request
from llumnix.frontend.office.messages import (
    AdaptersAre,
    AddInstance,
    AllFrontends,
    AllLooks,
    AllMigrations,
    AllQuarantined,
    AllRequests,
    AnyRequest,
    CallAll,
    Condemned,
    DoYouHave,
    DrainOne,
    HowIsTheFleet,
    Instances,
    KeysAre,
    LoadAdapter,
    Message,
    MoveAny,
    MoveYours,
    QuarantineIs,
    Question,
    RefusedOne,
    Release,
    Reload,
    Scrape,
    UndrainOne,
    UnloadAdapter,
    YourLook,
    YourMigrations,
    YourRequest,
    YourRequests,
)
from llumnix.frontend.own_streams import quarantine_rows, release
from llumnix.frontend.streams.look import Cursor, Look, joined
from llumnix.frontend.streams.migration_records import LISTED_MAX
from llumnix.reload.reloading import Reloading

logger = logging.getLogger("llumnix.office")

FOUND_S = 5.0
"""So long a frontend is waited for that may have the request. Without its word nobody knows."""


class Desk:
    """The answers of one office."""

    def __init__(self, office: Office, fleet: InstanceControl, reloading: Reloading) -> None:
        self._office = office
        self._fleet = fleet
        self._reloading = reloading
        self._ring = reloading.ring
        self._engine_client = office.engine_client
        self._quarantine = Quarantine()
        self._adapters: dict[str, Adapter] = {}
        self._numbered = 0
        self._loading = asyncio.Lock()
        office.on_question = self.answer
        office.on_message = self.take
        office.on_greeted = self.greeted

    def greeted(self, client: int) -> None:
        """A frontend is there: it is told what all have in common."""
        self._office.begin(self._tell(client, self._adapters_are))
        self._office.begin(self._tell(client, self._quarantine_is))
        if self._ring:
            self._office.begin(self._tell(client, self._keys_are))

    async def _tell(self, client: int, question: Callable[[], Question]) -> None:
        """Tells it what is so as it is told: a change may have overtaken this."""
        try:
            await self._office.ask(client, question())
        except Exception as error:  # noqa: BLE001 - it is told again with the next change
            logger.warning("A frontend was not told what the others know: %r", error)

    def take(self, message: Message) -> None:
        """What a frontend says that wants no answer."""
        if not isinstance(message, RefusedOne):
            raise ProtocolError(f"not for the office: {message}")
        self._quarantine.note_refused(message.name)

    async def answer(self, client: int, question: Question) -> Any:
        """The answer to a question of a frontend's."""
        fleet = self._fleet
        match question:
            case Instances():
                return self._instances()
            case HowIsTheFleet():
                return fleet.seen()
            case AddInstance():
                return await fleet.add()
            case DrainOne(
                instance=instance, why=why, timeout_s=timeout_s, force=force, again=again
            ):
                return await fleet.drain(
                    instance, why, timeout_s=timeout_s, force=force, again=again
                )
            case UndrainOne(instance=instance):
                return await fleet.undrain(instance)
            case AllFrontends():
                return self._office.roster.status()
            case Scrape():
                return (await fleet.exposition.text()).decode()
            case AllRequests():
                return await self._requests()
            case AllLooks(since=since):
                return await self._look(since)
            case AnyRequest(name=name):
                owner, request = await self._find(name)
                return await self._office.ask(owner, YourRequest(name=request))
            case MoveAny():
                return await self._move(question)
            case AllMigrations(name=name):
                return await self._migrations(name)
            case CallAll(method=method, args=args):
                answers = await self._engine_client.call_joined(method, tuple(args))
                return list(answers.items())
            case _:
                return await self._shared(question)

    async def _shared(self, question: Question) -> Any:
        match question:
            case Reload():
                return await self.reload()
            case AllQuarantined():
                return quarantine_rows(self._quarantine)
            case Release(name=name):
                released = release(self._quarantine, name)
                await self._office.ask_all(self._quarantine_is())
                return released
            case Condemned(quarantined=one):
                self._quarantine.add(one)
                await self._office.ask_all(self._quarantine_is())
            case LoadAdapter(adapter=adapter):
                async with self._loading:
                    return await self.load(adapter)
            case UnloadAdapter(name=name):
                async with self._loading:
                    if (adapter := self._adapters.pop(name, None)) is not None:
                        self._engine_client.shared_state.unloaded(adapter.number)
                    await self._office.ask_all(self._adapters_are())
            case _:
                raise ProtocolError(f"not for the office: {question}")
        return None

    # -- of all frontends

    def _instances(self) -> list[InstanceRow]:
        def in_flight(engine: EngineIndex | None) -> int | None:
            return None if engine is None else self._office.in_flight(engine)

        return [
            InstanceRow(status=status, in_flight=in_flight(status.engine_index))
            for status in self._fleet.status()
        ]

    async def _requests(self) -> Rows:
        gathered = await self._office.ask_all(YourRequests())
        rows = [row for mine in gathered.answers.values() for row in mine]
        return Rows(rows=rows, incomplete=gathered.missing)

    async def _look(self, since: Cursor) -> Look:
        gathered = await self._office.ask_all(YourLook(since=dict(since)))
        looks = [msgspec.convert(each, Look) for each in gathered.answers.values()]
        return joined([*looks, fleet_look(self._fleet.notes, since)])

    async def _find(self, name: str) -> tuple[int, str]:
        """The client and the id of the request that a user means."""
        gathered = await self._office.ask_all(DoYouHave(name=name), FOUND_S)
        return the_one(name, gathered.answers, gathered.missing)

    async def _move(self, order: MoveAny) -> Any:
        client, request = await self._find(order.request_id)
        mine = MoveYours(request_id=request, destination=order.destination, copy=order.copy)
        return await self._office.ask(client, mine, None)

    async def _migrations(self, name: str | None) -> Rows:
        gathered = await self._office.ask_all(YourMigrations(name=name))
        found = sorted(
            (pair for mine in gathered.answers.values() for pair in mine), key=lambda p: p[0]
        )
        if name is not None and not found:
            raise UnknownMigrationError(
                f"no migration {name} among the last {LISTED_MAX} of each frontend"
                f"{_silent(gathered.missing)}; GET /llumnix/v1/migrations"
            )
        rows = [shown for _, shown in found[-LISTED_MAX:]]
        return Rows(rows=rows, incomplete=gathered.missing)

    # -- what all frontends have

    def _quarantine_is(self) -> QuarantineIs:
        return QuarantineIs(quarantined=self._quarantine.all(self._office.now_s()))

    def _keys_are(self) -> KeysAre:
        return KeysAre(keys=list(self._ring.keys))

    async def reload(self) -> dict[str, Any]:
        """Reads keys and settings again, and tells all frontends the keys. Returns what that
        changes, and which frontends have not confirmed it. These stand still, and find it when they
        go on."""
        async with self._reloading.done() as changes:
            gathered = await self._office.ask_all(self._keys_are())
        return {**changes, "unconfirmed": gathered.missing}

    def _adapters_are(self) -> AdaptersAre:
        return AdaptersAre(adapters=list(self._adapters.values()))

    async def load(self, adapter: Adapter) -> int:
        """Loads an adapter on all engines, and makes it known to all frontends. Returns its number,
        by which all processes tell it from others."""
        known = self._adapters.get(adapter.name)
        if known is not None and not adapter.in_place:
            if known.path == adapter.path:
                return known.number
            raise ConflictError(
                f"The lora adapter '{adapter.name}' has already been loaded from {known.path}."
            )
        if known is None:
            self._numbered += 1
        number = self._numbered if known is None else known.number
        adapter = replace(adapter, number=number)
        await self._engine_client.add_lora_async(as_request(adapter))
        self._adapters[adapter.name] = adapter
        await self._office.ask_all(self._adapters_are())
        return number

    async def load_all(self, adapters: Iterable[Adapter]) -> None:
        """Loads those of the command line."""
        for adapter in adapters:
            await self.load(adapter)


def _silent(missing: list[str]) -> str:
    return f" ({', '.join(missing)} did not say which it has)" if missing else ""


def the_one(name: str, named: dict[int, Any], missing: list[str]) -> tuple[int, str]:
    """The client and the id of the request that a user means. `named`: by client, which of its
    requests have the name, and whether that is the id of one. `missing`: who did not say."""
    exact = [(client, ids) for client, (ids, is_id) in named.items() if is_id]
    found = [
        (client, request)
        for client, ids in exact or [(client, ids) for client, (ids, _) in named.items()]
        for request in ids
    ]
    if not found:
        raise UnknownRequestError(
            f"no request {name} is running or waiting{_silent(missing)}; "
            "GET /llumnix/v1/requests lists them"
        )
    if len(found) > 1:
        ids = ", ".join(request for _, request in found)
        raise ConflictError(f"{len(found)} sequences have the id {name}: name one of {ids}")
    return found[0]
