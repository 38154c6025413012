"""`llumnix ui`: the page of a running server, over an event log."""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llumnix.errors import UnknownRequestError, UsageError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from llumnix.frontend.ui.past import Past

HOST, PORT = "127.0.0.1", 8080
STEP_S = 0.2
WARM_UP_STEPS = 10
"""Rates are those of the seconds before."""
SPEED_MAX = 100.0


def ui(argv: list[str]) -> int:
    """Serves the page until Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="llumnix ui",
        description="Shows what an event log tells on the page of a running server, at any time of "
        "it and at any pace. For this host alone.",
    )
    parser.add_argument("log", metavar="LOG", type=Path, help="what `serve --event-log` wrote")
    parser.add_argument("--port", type=int, default=PORT, help=f"default: {PORT}")
    args = parser.parse_args(argv)
    from llumnix.observe.console import say

    past = read(args.log)
    took_s = past.end_s - past.begin_s
    say(f"{args.log} tells of {len(past.streams)} requests in {took_s:.0f} s")
    _serve(application(past, args.log.name), args.port)
    return 0


def read(log: Path) -> "Past":
    """What the log tells. `UsageError` if it is none."""
    import msgspec

    from llumnix.frontend.ui.past import Reader
    from llumnix.observe.log_files import lines_of

    try:
        return Reader().read(lines_of(log))
    except (KeyError, TypeError, ValueError, msgspec.ValidationError) as error:
        raise UsageError(
            f"{log} has a line that cannot be shown ({type(error).__name__}: {error}); give a log "
            "that the same llumnix wrote"
        ) from error


def _serve(app: "FastAPI", port: int) -> None:
    import socket

    import uvicorn

    from llumnix.observe.console import say

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UsageError(f"port {port} cannot be used ({error}); give another --port") from None
        say(f"open http://{HOST}:{listener.getsockname()[1]}/llumnix/ui")
        config = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=0, lifespan="off"
        )
        uvicorn.Server(config).run([listener])


def application(past: "Past", name: str) -> "FastAPI":
    """The page over a log of that name. Each page that is open walks through the past by itself."""
    from fastapi import FastAPI, Query
    from fastapi.responses import JSONResponse, StreamingResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from llumnix.frontend.http.page import EVENTS_PATH, HEADERS, files_router

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # No other site may have its name lead here and read the log.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    app.include_router(files_router())

    @app.get(EVENTS_PATH)
    async def events(
        at: float | None = None, speed: Annotated[float, Query(ge=0, le=SPEED_MAX)] = 1.0
    ) -> StreamingResponse:
        at_s = past.begin_s if at is None else min(max(at, past.begin_s), past.end_s)
        return StreamingResponse(
            play(past, name, at_s, speed), media_type="text/event-stream", headers=HEADERS
        )

    @app.get("/llumnix/v1/requests/{request}")
    async def one(request: str) -> JSONResponse:
        try:
            return JSONResponse(life(past, request))
        except UnknownRequestError as error:
            return JSONResponse({"error": {"message": str(error)}}, status_code=404)

    return app


def life(past: "Past", name: str) -> dict[str, Any]:
    """A request's life, as `GET /llumnix/v1/requests/{id}` of a running server tells it."""
    one = past.by_name.get(name)
    if one is None:
        raise UnknownRequestError(f"the event log has no request {name}")
    return {
        "why": one.why,
        "first_token_s": one.first_token_s,
        "lives_used": one.lives,
        "migrations": one.moves,
    }


async def play(past: "Past", name: str, at_s: float, speed: float) -> AsyncIterator[bytes]:
    """The feed from then on, so many times as fast as it was; 0: that moment alone. It does not
    end, since the page would ask again."""
    from llumnix.frontend.ui.feed import encoded
    from llumnix.frontend.ui.past import Moment
    from llumnix.frontend.ui.picture import Picture, greeting

    moment, picture = Moment(past), Picture(past.priorities)
    for step in reversed(range(WARM_UP_STEPS)):
        t = at_s - step / 2
        picture.take(*moment.at(t), t)
    log = {"begin": past.begin_s, "end": past.end_s, "at": at_s, "speed": speed}
    hello = greeting(past.priorities, model=name, policy=past.settings.policy, log=log)
    yield encoded([hello, picture.history(at_s), *picture.whole(at_s)])
    began_s, t = time.monotonic(), at_s
    while speed and t < past.end_s:
        await asyncio.sleep(STEP_S)
        t = min(past.end_s, at_s + (time.monotonic() - began_s) * speed)
        changed = picture.take(*moment.at(t), t)
        if t == past.end_s:  # The page is to come to it, though nothing may have changed.
            changed += picture.whole(t)
        if changed:
            yield encoded(changed)
    await asyncio.Event().wait()
