"""The console's pages, and the same answers as JSON below /api: what the command line answers, in a browser.

Why: whoever is on the telephone with somebody who was refused should not need a shell.
Trust: requests come from whoever reaches the address.  Nothing is answered without a cookie that a link of
    `gatepost console` brought; the host that a browser names must be ours (a name that an attacker lets point here is
    not), and what changes or costs something must come from our own pages.  Everything that is shown is escaped.
Promise: few questions of a kind at a time, each with an end; the event loop stays free, so that /metrics answers.
    No script, nothing from elsewhere, nothing kept by a browser.
Sources: W3C Content Security Policy; Fetch Metadata; RFC 6265 (cookies); RFC 9110 §7.2 (Host).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from gatepost.console.login import COOKIE, COOKIE_S, Login
from gatepost.errors import Busy, GatepostError, StorageError

ANSWER_S: Final = 30.0
SELFTEST_S: Final = 180.0
EXPLANATIONS_MAX: Final = 4
QUERY_OCTETS_MAX: Final = 8192
POLICY: Final = "default-src 'none'; style-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"

Answer = dict[str, Any]
Page = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Answers:
    """What the pages ask; each may take its time, and raises GatepostError where it cannot be answered.

    Attributes:
        explain: of a reference or of a message that is described by the members of the form.
        in_words: an answer to ``explain`` as labelled lines; at once.
        proof: what the configuration allows, and whether that is all.
        selftest: the gate probed now, through the listeners named.
        names: host names by which a browser may call this console.
        tls_versions: that a message may be described with.
        now_s: seconds since the epoch.
    """

    explain: Callable[[Mapping[str, str]], Answer]
    in_words: Callable[[Answer], list[tuple[str, str]]]
    proof: Callable[[], Answer]
    selftest: Callable[[list[Any]], Answer]
    names: frozenset[str] = frozenset()
    tls_versions: tuple[str, ...] = ()
    now_s: Callable[[], float] = field(default=lambda: 0.0)


class Asking:
    """Questions of one kind: so many at once, in threads, each with an end.

    Args:
        what: they ask for.
        patience_s: for an answer, waiting for a thread included.
        at_once: how many; what comes then waits.
    """

    def __init__(self, what: str, patience_s: float, at_once: int = 1) -> None:
        self._what = what
        self._patience_s = patience_s
        self._threads = ThreadPoolExecutor(at_once)
        self._last: Future[Answer] | None = None
        self._ended: asyncio.Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether the question that came last has no answer yet."""
        return self._last is not None and not self._last.done()

    async def ask(self, question: Callable[[], Answer]) -> Answer:
        """The answer.

        Raises:
            Busy: others are being answered all the time, or the console ends.
            GatepostError: it cannot be answered, or not in time.
        """
        self._ended = self._ended or asyncio.get_running_loop().create_future()
        self._last = asked = self._threads.submit(question)
        answer = asyncio.wrap_future(asked)
        try:
            await asyncio.wait((answer, self._ended), timeout=self._patience_s, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
        finally:
            answer.cancel()
        if self._ended.done():
            raise Busy("the gate has another configuration or ends; ask again in a moment")
        if asked.cancel():  # it did not even begin, and will not
            raise Busy(f"{self._what} is being asked for by others just now; ask again in a moment")
        raise GatepostError(f"{self._what} takes longer than {self._patience_s:g} s")

    def end(self) -> None:
        """Tell whoever waits that there will be no answer."""
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)


def add_pages(
    app: Starlette,
    answers: Answers,
    opened: Callable[[], Login],
    readiness: Callable[[], tuple[bool, Answer]],
    version: str,
) -> list[Asking]:
    """Put the pages beside what is there.

    Args:
        opened: the login under the key as it is now; raises StorageError.
        readiness: what /readyz says.

    Returns:
        What is to be ended before the server is.
    """
    here = Path(__file__).parent
    templates = Environment(
        loader=FileSystemLoader(here / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    style = (here / "style.css").read_bytes()
    explaining = Asking("an explanation", ANSWER_S, EXPLANATIONS_MAX)
    proving = Asking("the proof", ANSWER_S)
    testing = Asking("a self-test", SELFTEST_S)
    nav: dict[str, str] = {}
    last: Answer = {"last": None, "last_at": None}  # self-test that was asked for here

    def at(path: str, method: str = "GET") -> Callable[[Page], Page]:
        def route(handler: Page) -> Page:
            app.add_route(path, handler, methods=[method])
            return handler

        return route

    def shown(path: str, name: str) -> Callable[[Page], Page]:
        """A page of the navigation; all that there is to adding one."""
        nav[path] = name
        return at(path)

    def page(name: str, status: int = 200, *, here: str = "", **values: Any) -> HTMLResponse:  # noqa: ANN401
        text = templates.get_template(name).render(version=version, nav=nav, here=here, **values)
        return HTMLResponse(text, status)

    def refusal(request: Request, status: int, title: str, text: str, again: str = "") -> Response:
        if request.url.path.startswith("/api/") or request.url.path in _OPEN:
            return JSONResponse({"problems": [text]}, status)
        return page("message.html", status, title=title, text=text, again=again)

    async def guarded(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if request.url.path in _OPEN:
            return await call_next(request)
        response = await _admitted(request, call_next)
        response.headers["Content-Security-Policy"] = POLICY
        # Not "no-referrer": with it a browser calls the origin of our own form "null".
        response.headers["Referrer-Policy"] = "same-origin"
        response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        return response

    async def _admitted(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if not _ours(request.headers.get("host", ""), answers.names):
            return refusal(request, 421, "Not this name", "this console is not known by the name in the address")
        if len(request.url.query) > QUERY_OCTETS_MAX:
            return refusal(request, 414, "Too long", "the question is too long")
        if request.url.path == "/style.css":
            return await call_next(request)
        try:
            login = opened()
        except StorageError as error:
            return refusal(request, 503, "Nobody can be known", str(error))
        if request.url.path == "/login":
            request.state.login = login
            return await call_next(request)
        if not login.knows(request.cookies.get(COOKIE, ""), answers.now_s()):
            text = "type `gatepost console` on the gate's host, and open the link that it prints"
            # The cookie does not come along where another site's page led here; from our own page it does.
            again = f"{request.url.path}?{request.url.query}" if request.url.path in nav else ""
            return refusal(request, 401, "Who are you?", text, again)
        if request.method not in ("GET", "HEAD") and not _from_here(request):
            return refusal(request, 403, "Not from here", "this can be asked for by the console's own pages alone")
        return await call_next(request)

    async def no_such_page(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = refusal(request, error.status_code, HTTPStatus(error.status_code).phrase, "there is nothing here")
        response.headers.update(error.headers or {})
        return response

    app.add_middleware(BaseHTTPMiddleware, dispatch=guarded)
    app.add_exception_handler(HTTPException, no_such_page)

    @at("/style.css")
    async def style_sheet(_: Request) -> Response:
        return Response(style, media_type="text/css")

    @at("/login")
    async def enter(request: Request) -> Response:
        login: Login = request.state.login
        if not login.opens(request.query_params.get("token", ""), answers.now_s()):
            return refusal(
                request, 401, "Who are you?", "this link is not good any more; `gatepost console` prints another one"
            )
        response = RedirectResponse("/", 303)
        response.set_cookie(
            COOKIE, login.cookie(answers.now_s()), max_age=COOKIE_S, httponly=True, samesite="strict", path="/"
        )
        return response

    async def explained(request: Request) -> Answer:
        asked = {name: value.strip() for name, value in request.query_params.items() if value.strip()}
        return await explaining.ask(lambda: answers.explain(asked))

    async def tested() -> Answer:
        if testing.busy:  # it takes its time, and whoever asks twice need not wait for two
            raise Busy("a self-test runs just now; ask again in a moment")
        _, body = readiness()
        told = await testing.ask(lambda: answers.selftest(body["listeners"]))
        at = datetime.fromtimestamp(answers.now_s(), UTC)
        last.update(last=told, last_at=at.isoformat(timespec="seconds").replace("+00:00", "Z"))
        return told

    # ---- pages

    @shown("/", "Overview")
    async def overview(_: Request) -> Response:
        ready, body = readiness()
        told, proof = None, None
        try:
            told = await proving.ask(answers.proof)
            proof = told["proof"]
        except GatepostError as error:
            proof = {"problem": str(error)}
        return page("overview.html", here="/", ready=ready, body=body, told=told, proof=proof, **last)

    @shown("/explain", "Explain")
    async def explain(request: Request) -> Response:
        asked = dict(request.query_params)
        told, problem = None, ""
        if any(value.strip() for value in asked.values()):
            try:
                told = await explained(request)
            except GatepostError as error:
                problem = str(error)
        _, body = readiness()
        return page(
            "explain.html",
            here="/explain",
            asked=asked,
            told=told,
            lines=[] if told is None else answers.in_words(told),
            problem=problem,
            listeners=list(dict.fromkeys(listener["name"] for listener in body["listeners"])),
            tls_versions=answers.tls_versions,
        )

    @shown("/proof", "Proof")
    async def proof(_: Request) -> Response:
        try:
            told = await proving.ask(answers.proof)
        except GatepostError as error:
            return page("message.html", here="/proof", title="No proof", text=str(error), again="")
        return page("proof.html", here="/proof", told=told, proof=told["proof"])

    def selftest_page(problem: str = "") -> Response:
        _, body = readiness()
        return page("selftest.html", here="/selftest", state=body["selftest"], problem=problem, **last)

    @shown("/selftest", "Self-test")
    async def selftest(_: Request) -> Response:
        return selftest_page()

    @at("/selftest", "POST")
    async def selftest_now(_: Request) -> Response:
        try:
            await tested()
        except GatepostError as error:
            return selftest_page(str(error))
        return selftest_page()

    # ---- the same as JSON

    async def as_json(answer: Awaitable[Answer]) -> Response:
        try:
            return JSONResponse(await answer)
        except Busy as error:
            return JSONResponse({"problems": [str(error)]}, 503)
        except GatepostError as error:
            return JSONResponse({"problems": str(error).split("\n")}, 422)

    @at("/api/explain")
    async def explain_json(request: Request) -> Response:
        return await as_json(explained(request))

    @at("/api/proof")
    async def proof_json(_: Request) -> Response:
        return await as_json(proving.ask(answers.proof))

    @at("/api/selftest")
    async def selftest_json(_: Request) -> Response:
        body = readiness()[1]
        return JSONResponse({"state": body["selftest"], **last})

    @at("/api/selftest", "POST")
    async def selftest_now_json(_: Request) -> Response:
        return await as_json(tested())

    return [explaining, proving, testing]


# What needs no login: counts and health, for monitoring.
_OPEN: Final = frozenset({"/metrics", "/healthz", "/readyz"})


def _ours(host: str, names: frozenset[str]) -> bool:
    """Whether a browser that names this host means us: an address, localhost, or a name of this gate's own."""
    try:
        name = urlsplit(f"//{host}").hostname if host and not any(c in host for c in "/?#@\\") else None
    except ValueError:  # brackets that hold no address
        return False
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
    return origin is not None and origin.partition("://")[2] == request.headers.get("host", "")
