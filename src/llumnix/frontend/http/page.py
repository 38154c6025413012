"""`GET /llumnix/v1/events`: what happens in the deployment, for the page that shows it."""

from argparse import Namespace
from collections.abc import Callable

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

import llumnix
from llumnix.frontend.client import FleetClient
from llumnix.frontend.http.control import Control
from llumnix.frontend.ui import feed as ui
from llumnix.frontend.ui.picture import Deployment, Picture, greeting

EVENTS_PATH = "/llumnix/v1/events"
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Events(StreamingResponse):
    """The feed, as one watcher gets it."""

    def __init__(self, feed: ui.Feed) -> None:
        self._feed = feed
        self._watcher = feed.join()
        # A proxy that collects what passes would hold the events back.
        headers = {**HEADERS, "x-accel-buffering": "no"}
        super().__init__(self._watcher.stream(), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._feed.leave(self._watcher)


def page_router(
    client: FleetClient, control: Control, args: Namespace, *, stopping: Callable[[], bool]
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
    return router_of(ui.Feed(source, lambda: Picture(client.priorities), hello))


def router_of(feed: ui.Feed) -> APIRouter:
    """The feed's route."""
    router = APIRouter()

    @router.get(EVENTS_PATH)
    async def events() -> Response:
        """What happens in the deployment, as server-sent events (docs/operating.md)."""
        try:
            return Events(feed)
        except ui.TooManyWatchersError as error:
            raise HTTPException(429, str(error)) from error

    return router
