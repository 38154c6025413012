"""The page at /llumnix/ui and its feed, `GET /llumnix/v1/events`.

The page's files hold no data. They open without a key, and the page sends a key with what it asks
for. The headers forbid it everything but this server.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

import llumnix
from llumnix.core.types import InstanceId
from llumnix.errors import UnknownInstanceError
from llumnix.frontend.http.access import PAGE_PATH, Access
from llumnix.frontend.ui import feed as ui
from llumnix.frontend.ui.picture import Deployment, Picture, greeting

if TYPE_CHECKING:  # `llumnix ui` goes without vLLM.
    from llumnix.frontend.client import FleetClient
    from llumnix.frontend.http.control import Control

EVENTS_PATH = "/llumnix/v1/events"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


class Events(StreamingResponse):
    """The feed, as one watcher gets it, for as long as it is `welcome`."""

    def __init__(
        self, feed: ui.Feed, wish: ui.Wish, since: int | None, welcome: Callable[[], bool]
    ) -> None:
        self._feed = feed
        self._watcher = feed.join(wish, since)
        self._watcher.welcome = welcome
        if not welcome():  # Its key has gone since the gate looked.
            self._watcher.put(None)
        # A proxy that collects what passes would hold the events back.
        headers = {**HEADERS, "x-accel-buffering": "no"}
        super().__init__(self._watcher.stream(), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._feed.leave(self._watcher)


def page_router(
    client: "FleetClient", control: "Control", args: Namespace, *, stopping: Callable[[], bool]
) -> APIRouter:
    """The page of a server that was started with these arguments."""

    async def deployment() -> Deployment:
        reports = await client.link.loads()
        return Deployment([row.status for row in await control.instances()], reports)

    hello = greeting(
        client.priorities,
        model=(args.served_model_name or [args.model])[0],
        policy=args.policy,
        version=llumnix.__version__,
    )
    source = ui.Source(look=control.look, deployment=deployment, stopping=stopping)
    feed = ui.Feed(source, lambda: Picture(client.priorities), hello)
    args.access.ring.on_change = feed.turn_out
    return router_of(feed, args.access)


def router_of(feed: ui.Feed, access: Access | None = None) -> APIRouter:
    """The page's files, and its feed, which ends for those who lose their `access`."""
    router = files_router()

    @router.get(EVENTS_PATH)
    async def events(
        request: Request,
        since: Annotated[int | None, Query(ge=0)] = None,
        instance: str | None = None,
        rate: Annotated[int, Query(ge=1, le=ui.RATE_MAX)] = ui.RATE_MAX,
    ) -> Response:
        """What happens in the deployment, as server-sent events (docs/operating.md). `since`: the
        `seq` of the last event that the caller has. `instance`: of this one alone. `rate`: so many
        times a second at most."""
        if instance is not None and instance not in (there := await feed.instances()):
            raise UnknownInstanceError(f"no instance {instance}; there are: {', '.join(there)}")
        one = None if instance is None else InstanceId(instance)

        def welcome() -> bool:
            if access is None:
                return True
            caller = access.caller(request.headers)
            return access.refusal("GET", EVENTS_PATH, request.headers, caller) is None

        try:
            return Events(feed, ui.Wish(rate=rate, instance=one), since, welcome)
        except ui.TooManyWatchersError as error:
            raise HTTPException(429, str(error)) from error

    return router


def files_router() -> APIRouter:
    """The page's files."""
    files = _files()
    router = APIRouter()

    @router.get(PAGE_PATH, include_in_schema=False)
    async def page() -> Response:
        return _answer(files["index.html"])

    @router.get(PAGE_PATH + "/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "the page has no such file")
        return _answer(files[name])

    return router


def _files() -> dict[str, tuple[bytes, str]]:
    """The page's files and their types, by name. They are some 60 kB."""
    folder = Path(ui.__file__).parent
    return {
        path.name: (path.read_bytes(), KINDS[path.suffix])
        for path in folder.iterdir()
        if path.suffix in KINDS
    }


def _answer(file: tuple[bytes, str]) -> Response:
    body, kind = file
    return Response(body, media_type=kind, headers=HEADERS)
