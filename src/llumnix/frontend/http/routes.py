"""Our own routes, under /llumnix/v1."""

import time
from dataclasses import asdict
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from llumnix.core.scheduling.load import derive
from llumnix.core.streams.quarantine import REFUSED_FOR_S
from llumnix.core.supervision.lifecycle import InstanceStatus
from llumnix.core.types import InstanceId
from llumnix.errors import (
    CapacityError,
    ConflictError,
    LastInstanceError,
    UnknownInstanceError,
    UnknownMigrationError,
    UnknownQuarantineError,
    UnknownRequestError,
    UsageError,
)
from llumnix.frontend.client import FleetClient
from llumnix.frontend.engines.directory import EngineTarget
from llumnix.frontend.streams.info import find


class InstanceControl(Protocol):
    """Starts and stops instances."""

    def status(self) -> list[InstanceStatus]:
        """All instances, in order of id."""
        ...

    async def add(self) -> InstanceStatus:
        """Begins to start one more. `CapacityError` if nothing can hold it."""
        ...

    async def drain(
        self, instance: InstanceId, why: str, *, timeout_s: float | None = None, force: bool = False
    ) -> InstanceStatus:
        """Stops its intake, has its requests moved away, and stops it once it has none; what it
        still holds after `timeout_s` (None: a default), or at once with `force`, is cut off. Called
        again, it changes the time-out."""
        ...

    async def undrain(self, instance: InstanceId) -> InstanceStatus:
        """Lets an instance that is being drained serve on."""
        ...


DRAIN_TIMEOUT_MAX_S = 86_400.0
STATUS: dict[type[Exception], int] = {
    UnknownInstanceError: 404,
    UnknownRequestError: 404,
    UnknownMigrationError: 404,
    UnknownQuarantineError: 404,
    LastInstanceError: 409,
    CapacityError: 409,
    ConflictError: 409,
}
"""HTTP statuses of the errors that a user can mend; 400 for the others."""
LOAD_SHOWN = (
    "kv_tokens_used",
    "kv_tokens_total",
    "running",
    "waiting",
    "head_tokens",
    "preemptions",
    "stalled_s",
)


DrainTimeout = Annotated[float | None, Query(ge=0, le=DRAIN_TIMEOUT_MAX_S, allow_inf_nan=False)]


class MigrationOrder(BaseModel):
    """What to move, and where to. `copy`: how its KV gets there."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    request_id: str
    destination: str | None = None  # an instance; None: the one with the most free KV memory
    copy_kv: Literal["staged", "blocking", "recompute"] = Field("staged", alias="copy")


async def _destination(client: FleetClient, order: MigrationOrder) -> EngineTarget:
    """The engine of the named instance, or of the one with the most free KV memory."""
    stream, wanted = find(client.streams, order.request_id), order.destination
    targets = client.engines.targets()
    if wanted is not None:
        for target in targets:
            if target.instance == wanted:
                return target
        names = ", ".join(t.instance for t in targets) or "none"
        raise UnknownInstanceError(f"no instance {wanted} takes requests; there are: {names}")
    others = [t for t in targets if t.engine_index != stream.owner]
    if not others:
        raise ConflictError(
            "there is no other instance to move it to; POST /llumnix/v1/instances first"
        )
    reports = {r.engine_index: r for r in await client.link.loads() or ()}

    def free(target: EngineTarget) -> tuple[int, int]:
        report = reports.get(target.engine_index)
        tokens = report.kv_tokens_total - report.kv_tokens_used if report else 0
        return tokens, -client.in_flight(target.engine_index)

    return max(others, key=free)


# -- handlers


async def _client(request: Request) -> FleetClient:
    client: FleetClient = request.app.state.client
    return client


async def _control(request: Request) -> InstanceControl:
    control: InstanceControl = request.app.state.control
    return control


# `async`, since FastAPI runs other functions on threads.
Client = Annotated[FleetClient, Depends(_client)]
Control = Annotated[InstanceControl, Depends(_control)]
router = APIRouter(prefix="/llumnix/v1")


@router.get("/instances")
async def instances(client: Client, control: Control) -> dict[str, Any]:
    """Every instance with its load. The fields of `LOAD_SHOWN` come from its last report and
    are null while the controller is away; `freeness` is in tokens a request, null too while the
    instance is being emptied."""
    loads = await client.link.loads()
    reports = {(r.instance, r.engine_index): r for r in loads or ()}
    rows = []
    for status in control.status():
        row = asdict(status)
        report = None
        if status.engine_index is not None:
            row["in_flight"] = client.in_flight(status.engine_index)
            report = reports.get((status.id, status.engine_index))
        for name in LOAD_SHOWN:
            row[name] = getattr(report, name, None)
        row["freeness"] = None
        if report is not None and report.accepting:
            load = derive(report, (), 0)
            row["freeness"] = round(load.freeness(client.priorities), 1)
        rows.append(row)
    return {"controller": "up" if loads is not None else "away", "instances": rows}


@router.post("/instances", status_code=202)
async def add_instance(control: Control) -> dict[str, Any]:
    """Starts one more instance; it serves once GET says so."""
    return asdict(await control.add())


@router.delete("/instances/{instance}", status_code=202)
@router.post("/instances/{instance}/drain", status_code=202)
async def drain(
    instance: str, control: Control, timeout_s: DrainTimeout = None, force: bool = False
) -> dict[str, Any]:
    """Stops the instance's intake, moves its requests to other instances and stops it once it
    has none. What finds no room elsewhere ends where it is. What is left after `timeout_s`, or
    at once with `force`, is cut off with an error. Called again, it changes the time-out."""
    name, why = InstanceId(instance), "a user's order"
    return asdict(await control.drain(name, why, timeout_s=timeout_s, force=force))


@router.post("/instances/{instance}/undrain")
async def undrain(instance: str, control: Control) -> dict[str, Any]:
    """Lets an instance that is being drained serve on."""
    return asdict(await control.undrain(InstanceId(instance)))


@router.get("/requests")
async def requests(client: Client) -> dict[str, Any]:
    """Every request that is running or waiting. `id` is the client's X-Request-Id if it sent
    one, else the id in vLLM's answer; `n` > 1 gives as many rows. `instance` is null while no
    instance has it, since its own has died."""
    return {
        "requests": [
            {
                "id": stream.info.client_id,
                "request": stream.request,
                "instance": (None if stream.owner is None else client.engines.name(stream.owner)),
                "prompt_tokens": stream.info.prompt_tokens,
                "output_tokens": stream.outputs,
                "priority": stream.info.priority,
                "age_s": round(stream.info.age_s, 3),
            }
            for stream in client.streams
            if stream.last_owner is not None
        ]
    }


@router.post("/migrations")
async def migrate(order: MigrationOrder, client: Client) -> dict[str, Any]:
    """Moves a request to another instance (the one with the most free KV memory if none is
    named); answers when that has ended. `outcome`: migrated, aborted (it goes on where it
    was, or has ended; `reason` says why) or lost."""
    target = await _destination(client, order)
    stream = find(client.streams, order.request_id)  # It may have ended meanwhile.
    return (await client.migrate(stream, target, order.copy_kv)).shown()


@router.get("/migrations")
async def migrations(client: Client) -> dict[str, Any]:
    """The last thousand migrations, the oldest first."""
    return {"migrations": client.migrations.recent()}


@router.get("/migrations/{migration}")
async def migration(migration: str, client: Client) -> dict[str, Any]:
    """One migration."""
    return client.migrations.get(migration)


@router.get("/quarantine")
async def quarantine(client: Client) -> dict[str, Any]:
    """The requests of which instances died, the oldest first. Requests like them are refused:
    with the same prompt, parameters and adapter. `refused` counts those."""
    now = time.monotonic()
    return {
        "quarantine": [
            {
                "id": one.id,
                "client_id": one.client_id,
                "prompt_tokens": one.prompt_tokens,
                "output_tokens": one.output_tokens,
                "refused": one.refused,
                "seconds_left": round(one.since_s + REFUSED_FOR_S - now, 1),
            }
            for one in client.quarantine.all(now)
        ]
    }


@router.delete("/quarantine")
async def release_all(client: Client) -> dict[str, Any]:
    """Refuses none of them any longer."""
    return {"released": client.quarantine.release(None)}


@router.delete("/quarantine/{name}")
async def release(name: str, client: Client) -> dict[str, Any]:
    """Refuses requests like this one no longer."""
    released = client.quarantine.release(name)
    if not released:
        raise UnknownQuarantineError(
            f"no request is quarantined as {name}; GET /llumnix/v1/quarantine lists them"
        )
    return {"released": released}


# -- errors


async def _invalid(_: Request, error: Any) -> JSONResponse:
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"] if part not in ("body", "query")]
    where = ".".join(parts) or "the body"
    return openai_error(f"{where}: {first['msg']}", 400, "invalid_request_error")


async def _refused(_: Request, error: Any) -> JSONResponse:
    return openai_error(str(error.detail), error.status_code, "invalid_request_error")


async def _usage_error(_: Request, error: Exception) -> JSONResponse:
    return openai_error(str(error), STATUS.get(type(error), 400), "invalid_request_error")


def openai_error(
    message: str, status: int, kind: str, *, code: int | str | None = None
) -> JSONResponse:
    """An error in the form that OpenAI's clients read. `code`: for programs, by default the
    status."""
    error = {"message": message, "type": kind, "param": None, "code": code or status}
    return JSONResponse({"error": error}, status_code=status)


# -- the application


def control_app(client: FleetClient, control: InstanceControl, *, docs: bool = True) -> FastAPI:
    """The application behind /llumnix, with or without the pages that document it."""
    app = FastAPI(
        title="llumnix",
        docs_url="/llumnix/docs" if docs else None,
        redoc_url=None,
        openapi_url="/llumnix/openapi.json" if docs else None,
        exception_handlers={
            RequestValidationError: _invalid,
            HTTPException: _refused,
            UsageError: _usage_error,
        },
    )
    app.state.client = client
    app.state.control = control
    app.include_router(router)
    return app
