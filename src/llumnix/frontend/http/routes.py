"""Our own routes, under /llumnix/v1."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from llumnix.core.codes import MoveCode
from llumnix.core.scheduling.headroom import freeness_now
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
from llumnix.frontend.door.refusals import refused
from llumnix.frontend.http.control import Control as AnyControl
from llumnix.frontend.own_streams import MoveAsked

TOO_LARGE = 413
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


Seconds = Annotated[float | None, Query(ge=0, allow_inf_nan=False)]
Limit = Annotated[int | None, Query(ge=1)]
DrainTimeout = Annotated[float | None, Query(ge=0, le=DRAIN_TIMEOUT_MAX_S, allow_inf_nan=False)]


class MigrationOrder(BaseModel):
    """What to move, and where to. `copy`: how its KV gets there."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    request_id: str
    destination: str | None = None  # an instance; None: the one with the most free KV memory
    copy_kv: Literal["staged", "blocking", "recompute"] = Field("staged", alias="copy")


# -- handlers


async def _client(request: Request) -> FleetClient:
    client: FleetClient = request.app.state.client
    return client


async def _control(request: Request) -> AnyControl:
    control: AnyControl = request.app.state.control
    return control


# `async`, since FastAPI runs other functions on threads.
Client = Annotated[FleetClient, Depends(_client)]
Control = Annotated[AnyControl, Depends(_control)]
router = APIRouter(prefix="/llumnix/v1")


@router.get("/instances")
async def instances(client: Client, control: Control) -> dict[str, Any]:
    """Every instance with its load. The fields of `LOAD_SHOWN` come from its last report and
    are null while the controller is away; `freeness` is in tokens a request, null too while the
    instance is being emptied. `frontends`: the processes that speak HTTP."""
    loads = await client.link.loads()
    reports = {(r.instance, r.engine_index): r for r in loads or ()}
    freeness = freeness_now(client.priorities, reports.values())
    rows = []
    for each in await control.instances():
        status, report, free = each.status, None, None
        row = {**asdict(status), "in_flight": each.in_flight}
        if status.engine_index is not None:
            report = reports.get((status.id, status.engine_index))
            free = freeness.get((status.id, status.engine_index))
        for name in LOAD_SHOWN:
            row[name] = getattr(report, name, None)
        row["freeness"] = None if free is None else round(free, 1)
        rows.append(row)
    return {
        "controller": "up" if loads is not None else "away",
        "frontends": [asdict(frontend) for frontend in await control.frontends()],
        "instances": rows,
    }


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
    has none. What finds no room elsewhere goes on where it is. What is left after `timeout_s`,
    or at once with `force`, goes on at other instances, which compute its KV again. Called again,
    it changes the time-out."""
    name, why = InstanceId(instance), "a user's order"
    return asdict(await control.drain(name, why, timeout_s=timeout_s, force=force))


@router.post("/instances/{instance}/restart", status_code=202)
async def restart(
    instance: str, control: Control, timeout_s: DrainTimeout = None, force: bool = False
) -> dict[str, Any]:
    """Empties the instance as a drain does, stops it, and starts it again. GET shows it as
    restarting, then as serving with a new `engine_index`. The only instance that serves is
    restarted with `force` alone; its requests wait meanwhile."""
    name, why = InstanceId(instance), "a user's order to restart it"
    row = await control.drain(name, why, timeout_s=timeout_s, force=force, again=True)
    return asdict(row)


@router.post("/instances/{instance}/undrain")
async def undrain(instance: str, control: Control) -> dict[str, Any]:
    """Lets an instance that is being drained serve on."""
    return asdict(await control.undrain(InstanceId(instance)))


def _listed(
    what: str, rows: list[dict[str, Any]], limit: int | None, incomplete: list[str]
) -> dict[str, Any]:
    return {
        what: rows[-limit:] if limit else rows,
        "total": len(rows),
        "incomplete": incomplete,
    }


@router.get("/requests")
async def requests(
    control: Control,
    instance: str | None = None,
    priority_class: Annotated[str | None, Query(alias="class")] = None,
    key: str | None = None,
    older_s: Seconds = None,
    limit: Limit = None,
) -> dict[str, Any]:
    """Every request that is running or waiting, the oldest first. `id` is the client's X-Request-Id
    if it sent one, else the id in vLLM's answer; `n` > 1 gives as many rows. `instance` is null
    while no instance has it, since its own has died. `incomplete` names the frontends that did not
    say theirs in time. The query asks for those of an instance, a class or a key's name, that
    came so many seconds ago or more; `limit` for the newest of them, and `total` says how many
    there are."""
    there = await control.requests()
    rows = [
        row
        for row in sorted(there.rows, key=lambda row: -row["age_s"])
        if instance in (None, row["instance"])
        and priority_class in (None, row["class"])
        and key in (None, row["key"])
        and row["age_s"] >= (older_s or 0.0)
    ]
    return _listed("requests", rows, limit, there.incomplete)


@router.get("/requests/{name:path}")
async def request(name: str, control: Control) -> dict[str, Any]:
    """One of them with its life so far: its class, where it was sent first and why, how long its
    client waited for the first token, and its migrations."""
    return await control.request(name)


@router.post("/migrations")
async def migrate(order: MigrationOrder, control: Control) -> dict[str, Any]:
    """Moves a request to another instance (the one with the most free KV memory if none is
    named); answers when that has ended. `outcome`: migrated, aborted (it goes on where it
    was, or has ended; `reason` says why) or lost."""
    asked = MoveAsked(
        request_id=order.request_id, destination=order.destination, copy=order.copy_kv
    )
    return await control.move(asked)


@router.get("/migrations")
async def migrations(
    control: Control,
    since_s: Seconds = None,
    reason: MoveCode | None = None,
    outcome: Literal["running", "migrated", "aborted", "lost"] | None = None,
    limit: Limit = None,
) -> dict[str, Any]:
    """The last thousand migrations, the oldest first. The query asks for those that began within
    so many seconds, were ordered for that reason (`code`), or ended so; `limit` for the newest
    of them, and `total` says how many there are. `incomplete` names the frontends that did not say
    theirs in time."""
    there = await control.migrations()
    rows = [
        row
        for row in there.rows
        if (since_s is None or row["ago_s"] <= since_s)
        and reason in (None, row["code"])
        and outcome in (None, row["outcome"])
    ]
    return _listed("migrations", rows, limit, there.incomplete)


@router.get("/migrations/{migration}")
async def migration(migration: str, control: Control) -> dict[str, Any]:
    """One migration."""
    return await control.migration(migration)


@router.get("/config")
async def config(request: Request) -> dict[str, Any]:
    """What the server was started with that is not a default, and where each value is from.
    Secrets are masked."""
    return {"settings": request.app.state.settings}


@router.post("/reload")
async def reload(control: Control) -> dict[str, Any]:
    """Reads the file of --keys and the scheduler's settings again. Answers how many keys there are
    now, and the names of those that were added, removed and changed. `settings` has the knobs that
    have changed: those that count `now`, those that count for `engines` that start from now on, and
    what counts from the next `start` of llumnix. `unconfirmed`: frontends that stand still and have
    the new keys once they go on. A bad file changes nothing."""
    return await control.reload()


@router.get("/quarantine")
async def quarantine(control: Control) -> dict[str, Any]:
    """The requests of which instances died, the oldest first. Requests like them are refused:
    with the same prompt, parameters and adapter. `refused` counts those."""
    return {"quarantine": await control.quarantined()}


@router.delete("/quarantine")
async def release_all(control: Control) -> dict[str, Any]:
    """Refuses none of them any longer."""
    return {"released": await control.release(None)}


@router.delete("/quarantine/{name}")
async def release(name: str, control: Control) -> dict[str, Any]:
    """Refuses requests like this one no longer."""
    return {"released": await control.release(name)}


# -- errors


async def _invalid(_: Request, error: Any) -> JSONResponse:
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"] if part not in ("body", "query")]
    where = ".".join(parts) or "the body"
    return openai_error(f"{where}: {first['msg']}", 400, "invalid_request_error")


async def _refused(_: Request, error: Any) -> JSONResponse:
    if error.status_code == TOO_LARGE:
        return refused("too_large", str(error.detail))
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


def control_app(
    client: FleetClient,
    control: AnyControl,
    *,
    docs: bool = True,
    page: APIRouter | None = None,
    settings: Sequence[dict[str, Any]] = (),
) -> FastAPI:
    """The application behind /llumnix, with or without the pages that document it, and with the
    page that shows the deployment (page.py) if there is to be one. `settings`: as
    `settings_shown` has them."""
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
    app.state.settings = list(settings)
    app.include_router(router)
    if page is not None:
        app.include_router(page)
    return app
