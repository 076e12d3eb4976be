"""The console's pages, and the same answers as JSON below /api: what the command line answers, in a browser.

Why: whoever is on the telephone with somebody who was refused should not need a shell.
Trust: requests come from whoever reaches the address.  Nothing is answered without a cookie that a link of
    `gatepost console` brought; the host that a browser names must be ours (a name that an attacker lets point here is
    not), and what changes or costs something must come from our own pages.  Everything that is shown is escaped.
Promise: one question of each kind at a time, each with an end; the event loop stays free, so that /metrics answers.
    No script, nothing from elsewhere, nothing kept by a browser.
Sources: W3C Content Security Policy; Fetch Metadata; RFC 6265 (cookies); RFC 9110 §7.2 (Host).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gatepost.console.login import COOKIE, COOKIE_S, Login
from gatepost.errors import Busy, GatepostError

ANSWER_S: Final = 30.0
SELFTEST_S: Final = 180.0
QUERY_OCTETS_MAX: Final = 8192
POLICY: Final = "default-src 'none'; style-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"

Answer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answers:
    """What the pages ask; each may take its time, and raises GatepostError where it cannot be answered.

    Attributes:
        explain: of a reference or of a message that is described by the members of the form.
        proof: what the configuration allows, and whether that is all.
        selftest: the gate probed now, through the listeners named.
        in_words: an answer to ``explain`` as labelled lines.
        names: host names by which a browser may call this console.
    """

    explain: Callable[[Mapping[str, str]], Answer]
    proof: Callable[[], Answer]
    selftest: Callable[[list[Any]], Answer]
    in_words: Callable[[Answer], list[tuple[str, str]]]
    names: frozenset[str] = frozenset()
    now_s: Callable[[], float] = field(default=lambda: 0.0)


class _Asking:
    """One question of a kind at a time, in a thread, with an end."""

    def __init__(self, what: str, patience_s: float) -> None:
        self._what = what
        self._patience_s = patience_s
        self._running: asyncio.Future[Any] | None = None

    async def ask(self, question: Callable[[], Answer]) -> Answer:
        """The answer.

        Raises:
            GatepostError: it cannot be answered, or not in time, or another one is still being answered.
        """
        if self._running is not None and not self._running.done():
            raise Busy(f"{self._what} is being asked for by somebody else just now; try again in a moment")
        self._running = asyncio.ensure_future(asyncio.to_thread(question))  # noqa: TID251  it is kept, and looked at
        try:
            async with asyncio.timeout(self._patience_s):
                return await asyncio.shield(self._running)
        except TimeoutError:
            self._running.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise GatepostError(f"{self._what} takes longer than {self._patience_s:g} s") from None


def add_pages(
    app: FastAPI, answers: Answers, login: Login, readiness: Callable[[], tuple[bool, Answer]], version: str
) -> None:
    """Put the pages beside what is there.

    Args:
        readiness: what /readyz says.
    """
    here = Path(__file__).parent
    templates = Environment(
        loader=FileSystemLoader(here / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    style = (here / "style.css").read_bytes()
    explaining, proving = _Asking("an explanation", ANSWER_S), _Asking("the proof", ANSWER_S)
    testing = _Asking("a self-test", SELFTEST_S)
    last: dict[str, Answer] = {}

    def page(name: str, status: int = 200, **values: Any) -> HTMLResponse:  # noqa: ANN401
        return HTMLResponse(templates.get_template(name).render(version=version, **values), status)

    def refusal(request: Request, status: int, title: str, text: str) -> Response:
        if request.url.path.startswith("/api/"):
            return JSONResponse({"problems": [text]}, status)
        return page("message.html", status, here="", title=title, text=text)

    @app.middleware("http")
    async def guarded(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if request.url.path in _OPEN:
            return await call_next(request)
        response = await _admitted(request, call_next)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        return response

    async def _admitted(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if not _ours(request.headers.get("host", ""), answers.names):
            return refusal(request, 421, "Not this name", "this console is not known by the name in the address")
        if len(request.url.query) > QUERY_OCTETS_MAX:
            return refusal(request, 414, "Too long", "the question is too long")
        if request.url.path in ("/login", "/style.css"):
            return await call_next(request)
        if not login.knows(request.cookies.get(COOKIE, ""), answers.now_s()):
            return refusal(
                request,
                401,
                "Who are you?",
                "type `gatepost console` on the gate's host, and open the link that it prints",
            )
        if request.method != "GET" and not _from_here(request):
            return refusal(request, 403, "Not from here", "this can be asked for by the console's own pages alone")
        return await call_next(request)

    @app.get("/style.css")
    async def style_sheet() -> Response:
        return Response(style, media_type="text/css")

    @app.get("/login")
    async def enter(token: str = "") -> Response:
        if not login.opens(token, answers.now_s()):
            text = "this link is not good any more; `gatepost console` prints another one"
            return page("message.html", 401, here="", title="Who are you?", text=text)
        response = RedirectResponse("/", 303)
        response.set_cookie(
            COOKIE, login.cookie(answers.now_s()), max_age=COOKIE_S, httponly=True, samesite="strict", path="/"
        )
        return response

    async def explained(request: Request) -> Answer:
        asked = {name: value.strip() for name, value in request.query_params.items() if value.strip()}
        return await explaining.ask(lambda: answers.explain(asked))

    async def tested() -> Answer:
        _, body = readiness()
        told = await testing.ask(lambda: answers.selftest(body["listeners"]))
        last["selftest"] = told
        return told

    # ---- pages

    @app.get("/")
    async def overview() -> Response:
        ready, body = readiness()
        try:
            proof = (await proving.ask(answers.proof))["proof"]
        except GatepostError as error:
            proof = {"problem": str(error)}
        return page("overview.html", here="/", ready=ready, body=body, proof=proof)

    @app.get("/explain")
    async def explain(request: Request) -> Response:
        asked = dict(request.query_params)
        told, problem = None, ""
        if any(value.strip() for value in asked.values()):
            try:
                told = await explained(request)
            except GatepostError as error:
                problem = str(error)
        lines = [] if told is None else answers.in_words(told)
        return page("explain.html", here="/explain", asked=asked, told=told, lines=lines, problem=problem)

    @app.get("/proof")
    async def proof() -> Response:
        try:
            told = await proving.ask(answers.proof)
        except GatepostError as error:
            return page("message.html", here="/proof", title="No proof", text=str(error))
        return page("proof.html", here="/proof", told=told, proof=told["proof"])

    @app.get("/selftest")
    async def selftest() -> Response:
        _, body = readiness()
        return page("selftest.html", here="/selftest", state=body["selftest"], told=last.get("selftest"), problem="")

    @app.post("/selftest")
    async def selftest_now() -> Response:
        problem = ""
        try:
            await tested()
        except GatepostError as error:
            problem = str(error)
        _, body = readiness()
        told = last.get("selftest")
        return page("selftest.html", here="/selftest", state=body["selftest"], told=told, problem=problem)

    # ---- the same as JSON

    async def as_json(answer: Awaitable[Answer]) -> Response:
        try:
            return JSONResponse(await answer)
        except Busy as error:
            return JSONResponse({"problems": [str(error)]}, 503)
        except GatepostError as error:
            return JSONResponse({"problems": str(error).split("\n")}, 422)

    @app.get("/api/explain")
    async def explain_json(request: Request) -> Response:
        return await as_json(explained(request))

    @app.get("/api/proof")
    async def proof_json() -> Response:
        return await as_json(proving.ask(answers.proof))

    @app.get("/api/selftest")
    async def selftest_json() -> Response:
        _, body = readiness()
        return JSONResponse({"state": body["selftest"], "last": last.get("selftest")})

    @app.post("/api/selftest")
    async def selftest_now_json() -> Response:
        return await as_json(tested())


# What needs no login: counts and health, for monitoring.
_OPEN: Final = frozenset({"/metrics", "/healthz", "/readyz"})


def _ours(host: str, names: frozenset[str]) -> bool:
    """Whether a browser that names this host means us: an address, localhost, or a name of this gate's own."""
    name = urlsplit(f"//{host}").hostname if host and not any(c in host for c in "/?#@\\") else None
    if name is None:
        return False
    try:
        ip_address(name.partition("%")[0])
    except ValueError:
        return name == "localhost" or name in names
    return True


def _from_here(request: Request) -> bool:
    """Whether a request that changes something comes from our own pages, as a browser says."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    origin = request.headers.get("origin")
    return origin is not None and urlsplit(origin).netloc == request.headers.get("host", "")
