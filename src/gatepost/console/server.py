"""The console's HTTP service: /metrics, /healthz, /readyz for anybody, pages for who has a link.

Trust: requests come from whoever reaches the address; of a request for what is open nothing is used but its path and
    method.
Promise: answers are never cached; nothing is loaded from elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gatepost.console.exposition import CONTENT_TYPE, exposition
from gatepost.console.login import Login
from gatepost.console.pages import Answers, add_pages
from gatepost.console.readiness import JournalState, readiness
from gatepost.telemetry import (
    BACKEND_STATE,
    JOURNAL_DROPPED,
    JOURNAL_STATE,
    JOURNAL_WAITING,
    SELFTEST,
    TRUST_SUSPENDED,
    Metrics,
    StatusBoard,
)

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
CONNECTIONS_MAX = 100


def application(
    metrics: Metrics,
    board: StatusBoard,
    version: str,
    answers: Answers | None = None,
    opened: Callable[[], Login] | None = None,
) -> Starlette:
    """The routes, over the memory that the supervisor shares with us.

    Args:
        answers, opened: for the pages, see there; without them there are none.
    """
    app = Starlette()

    async def metrics_text(_: Request) -> Response:
        return Response(exposition(metrics, version), media_type=CONTENT_TYPE)

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok", "version": version})

    def ready() -> tuple[bool, dict[str, Any]]:
        backends = {sample.labels[0]: sample.value > 0 for sample in metrics.read(BACKEND_STATE)}
        suspended = sum(int(sample.value) for sample in metrics.read(TRUST_SUSPENDED))
        selftest = next((sample.value > 0 for sample in metrics.read(SELFTEST)), None)
        journal = JournalState(
            {sample.labels[0]: sample.value > 0 for sample in metrics.read(JOURNAL_STATE)},
            *(
                sum(int(sample.value) for sample in metrics.read(family))
                for family in (JOURNAL_WAITING, JOURNAL_DROPPED)
            ),
        )
        return readiness(board.read(), backends, suspended, selftest, journal)

    async def readyz(_: Request) -> Response:
        is_ready, body = ready()
        return JSONResponse(body, 200 if is_ready else 503)

    app.add_route("/metrics", metrics_text)
    app.add_route("/healthz", healthz)
    app.add_route("/readyz", readyz)
    app.state.asking = [] if answers is None or opened is None else add_pages(app, answers, opened, ready, version)

    async def headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)  # the pages' own policy lets their style sheet in
        return response

    # Put on last, so that it stands outermost: what the pages refuse has these as well.
    app.add_middleware(BaseHTTPMiddleware, dispatch=headers)
    return app


async def serve(app: Starlette, sock: socket.socket, lifeline: socket.socket) -> None:
    """Answer on this listening socket until the lifeline's other end is closed."""
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS_MAX,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=1,
        )
    )

    async def live() -> None:
        lifeline.setblocking(False)
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_recv(lifeline, 1)
        for asking in app.state.asking:
            asking.end()
        server.should_exit = True

    async with asyncio.TaskGroup() as group:
        living = group.create_task(live())
        await server.serve(sockets=[sock])
        living.cancel()
