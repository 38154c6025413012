"""What a frontend gets done by asking the office."""

from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from vllm.exceptions import GracefulHTTPError
from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from llumnix.core.streams.quarantine import Quarantined
from llumnix.core.supervision.frontends import FrontendStatus
from llumnix.core.supervision.lifecycle import InstanceStatus
from llumnix.core.supervision.readiness import FleetSeen
from llumnix.core.types import EngineIndex, InstanceId
from llumnix.errors import LlumnixError
from llumnix.frontend.http.control import InstanceRow, Rows
from llumnix.frontend.office.adapters import of_request
from llumnix.frontend.office.asking import AskedError, LineClosedError
from llumnix.frontend.office.link import OfficeLink
from llumnix.frontend.office.messages import (
    AddInstance,
    AllFrontends,
    AllLooks,
    AllMigrations,
    AllQuarantined,
    AllRequests,
    AnyRequest,
    CallAll,
    Condemned,
    DrainOne,
    HowIsTheFleet,
    Instances,
    LoadAdapter,
    MoveAny,
    Question,
    RefusedOne,
    Release,
    Reload,
    Scrape,
    UndrainOne,
    UnloadAdapter,
)
from llumnix.frontend.own_streams import MoveAsked, OwnStreams
from llumnix.frontend.streams.look import Cursor, Look

ANSWER_S = 15.0
"""For what the office may have to ask Ray."""
GATHER_S = 10.0
"""For what the office asks the other frontends. It waits for them no longer than a second, but may
be late itself where cores are short."""

LATE_ADD = (
    "The main process has not answered yet, and may add the instance all the same: look at "
    "GET /llumnix/v1/instances before you ask again."
)

UNANSWERED = frozenset(e.__name__ for e in (TimeoutError, LineClosedError, LlumnixError))
"""Errors of the office over a frontend that hangs, or has ended."""


class OfficeControl:
    """`Control` (http/control.py): the office has the fleet, and asks the other frontends. `mine`:
    what this one has."""

    def __init__(self, link: OfficeLink, mine: OwnStreams) -> None:
        self._link = link
        self._mine = mine

    async def _as(
        self,
        kind: Any,
        question: Question,
        timeout_s: float | None = GATHER_S,
        late: str = "The main process does not answer; try again.",
    ) -> Any:
        try:
            return msgspec.convert(await self._link.ask(question, timeout_s), kind)
        except (TimeoutError, LineClosedError) as error:
            raise HTTPException(503, late) from error
        except AskedError as error:
            if error.failure.kind not in UNANSWERED:
                raise
            raise HTTPException(
                503, "The frontend that has it does not answer; try again."
            ) from error

    async def instances(self) -> list[InstanceRow]:
        """See `Control`, as for all below."""
        rows: list[InstanceRow] = await self._as(list[InstanceRow], Instances())
        return rows

    async def frontends(self) -> list[FrontendStatus]:
        rows: list[FrontendStatus] = await self._as(list[FrontendStatus], AllFrontends())
        return rows

    async def fleet(self) -> FleetSeen:
        seen: FleetSeen = await self._as(FleetSeen, HowIsTheFleet())
        return seen

    async def metrics(self) -> bytes:
        text: str = await self._as(str, Scrape())
        return text.encode()

    async def add(self) -> InstanceStatus:
        status: InstanceStatus = await self._as(InstanceStatus, AddInstance(), ANSWER_S, LATE_ADD)
        return status

    async def drain(
        self,
        instance: InstanceId,
        why: str,
        *,
        timeout_s: float | None = None,
        force: bool = False,
        again: bool = False,
    ) -> InstanceStatus:
        order = DrainOne(instance=instance, why=why, timeout_s=timeout_s, force=force, again=again)
        status: InstanceStatus = await self._as(InstanceStatus, order, ANSWER_S)
        return status

    async def undrain(self, instance: InstanceId) -> InstanceStatus:
        status: InstanceStatus = await self._as(InstanceStatus, UndrainOne(instance=instance))
        return status

    async def requests(self) -> Rows:
        rows: Rows = await self._as(Rows, AllRequests())
        return rows

    async def request(self, name: str) -> dict[str, Any]:
        row: dict[str, Any] = await self._as(dict[str, Any], AnyRequest(name=name))
        return row

    async def look(self, since: Cursor) -> Look:
        seen: Look = await self._as(Look, AllLooks(since=dict(since)))
        return seen

    async def move(self, order: MoveAsked) -> dict[str, Any]:
        _, is_id = self._mine.named(order.request_id)
        if is_id:  # No other frontend has a request of that id.
            return await self._mine.move(order)
        question = MoveAny(
            request_id=order.request_id, destination=order.destination, copy=order.copy
        )
        migration: dict[str, Any] = await self._as(dict[str, Any], question, None)
        return migration

    async def migrations(self) -> Rows:
        rows: Rows = await self._as(Rows, AllMigrations())
        return rows

    async def migration(self, name: str) -> dict[str, Any]:
        found: Rows = await self._as(Rows, AllMigrations(name=name))
        (one,) = found.rows
        return one

    async def reload(self) -> dict[str, Any]:
        changes: dict[str, Any] = await self._as(dict[str, Any], Reload(), ANSWER_S)
        return changes

    async def quarantined(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = await self._as(list[dict[str, Any]], AllQuarantined())
        return rows

    async def release(self, name: str | None) -> int:
        released: int = await self._as(int, Release(name=name))
        return released


class OfficeOthers:
    """`Others` (engines/others.py) of a frontend's client."""

    def __init__(self, link: OfficeLink) -> None:
        self._link = link

    async def call_all(self, method: str, args: tuple[Any, ...]) -> dict[EngineIndex, Any]:
        """See `Others`, as for all below."""
        question = CallAll(method=method, args=list(args))
        answers = await self._ask(question)
        return {EngineIndex(engine): answer for engine, answer in answers}

    async def load_adapter(self, request: LoRARequest) -> None:
        number: int = await self._ask(LoadAdapter(adapter=of_request(request)))
        request.lora_int_id = number

    async def unload_adapter(self, name: str) -> None:
        """This adapter is to go from all frontends."""
        await self._ask(UnloadAdapter(name=name))

    async def condemned(self, one: Quarantined) -> None:
        await self._link.ask(Condemned(quarantined=one), GATHER_S)

    def refused(self, name: str) -> None:
        self._link.send(RefusedOne(name=name))

    async def _ask(self, question: Question) -> Any:
        """The answer, without a limit, since the office has one for each call. Errors are those of
        a call that is made here."""
        try:
            return await self._link.ask(question, None)
        except AskedError as error:
            failure = error.failure
            if failure.kind == EngineDeadError.__name__:
                raise EngineDeadError() from error
            if failure.status is not None:
                raise GracefulHTTPError(failure.text, failure.status) from error
            raise Exception(failure.text) from error  # vLLM's own for a call that failed.
