"""The mark in the inbox: found is proof, and nothing else is."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from tests.probe.parts import QUICK, Scripted

from gatepost.errors import GatepostError
from gatepost.probe import Delivery, Verdict, inbox, probe
from gatepost.probe.inbox import INBOX_OCTETS_MAX, REDIRECTS_MAX, URL_CHARACTERS_MAX, arrived, inbox_host, with_arrival

TOKEN = "0123456789abcdef"


@asynccontextmanager
async def mailbox(answer: Callable[[int], web.StreamResponse]) -> AsyncIterator[str]:
    """An inbox on the web; its URL."""
    asked = 0

    async def show(_request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        return answer(asked)

    app = web.Application()
    app.router.add_get("/{any:.*}", show)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    try:
        yield f"http://you:secret@127.0.0.1:{port}/inbox"
    finally:
        await runner.cleanup()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(inbox, "LOOKS_APART_S", 0.01)


async def test_a_mark_that_is_there_is_found():
    async with mailbox(lambda _: web.Response(text=f"Subject: Relay test {TOKEN}")) as url:
        assert await arrived(url, TOKEN, 0)


async def test_a_mark_that_comes_late_is_found():
    looks = []
    async with mailbox(lambda number: web.Response(text=TOKEN if number == 3 else "")) as url:
        assert await arrived(url, TOKEN, 60, lambda: looks.append(1))
    assert len(looks) == 3


async def test_a_mark_that_never_comes_is_not_found():
    async with mailbox(lambda _: web.Response(text=TOKEN[:-1])) as url:
        assert not await arrived(url, TOKEN, 0.05)


@pytest.mark.parametrize("status", [204, 401, 404, 500])
async def test_an_answer_that_is_no_page_proves_nothing(status):
    async with mailbox(lambda _: web.Response(text=None if status == 204 else TOKEN, status=status)) as url:
        assert not await arrived(url, TOKEN, 0)


async def test_faults_of_the_inbox_are_borne():
    """No connection, a redirect without end, one to what is no web at all: looked at again, until the time is over."""

    def turn(number: int) -> web.StreamResponse:
        if number <= REDIRECTS_MAX:
            return web.Response(status=302, headers={"Location": "/again"})
        if number == REDIRECTS_MAX + 1:
            return web.Response(status=302, headers={"Location": "file:///etc/passwd"})
        return web.Response(text=TOKEN)

    async with mailbox(turn) as url:
        assert await arrived(url, TOKEN, 60)
    assert not await arrived(url, TOKEN, 0)


@pytest.mark.parametrize(("before", "found"), [(-16, True), (-15, False), (0, False)])
async def test_an_inbox_is_read_up_to_a_bound(before, found):
    body = b"x" * (INBOX_OCTETS_MAX + before) + TOKEN.encode()
    async with mailbox(lambda _: web.Response(body=body)) as url:
        assert await arrived(url, TOKEN, 0) is found


async def test_a_silent_inbox_does_not_hold_us(monkeypatch):
    monkeypatch.setattr(inbox, "LOOK_S", 0.1)
    held = asyncio.Event()

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await held.wait()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    begun = time.monotonic()
    assert not await arrived(f"http://127.0.0.1:{port}/", TOKEN, 0)
    assert time.monotonic() - begun < 30
    held.set()
    server.close()


@pytest.mark.parametrize(
    "url",
    [
        "", "you.example", "ftp://you.example/", "file:///etc/passwd", "https:///inbox/you", "http://[::1", "http://x:99999/",
        "http://x/\r\nHost: y", "http://x/a b", "http://bücher.example/", "javascript:alert(1)",
        "http://x/".ljust(URL_CHARACTERS_MAX + 1, "y"),
    ],
)  # fmt: skip
def test_what_is_no_url_is_refused_without_being_repeated(url):
    with pytest.raises(GatepostError) as refusal:
        inbox_host(url)
    assert not url or url not in str(refusal.value)


def test_a_url_has_a_host():
    assert inbox_host("https://you:secret@Mail.Example.NET:8443/inbox?a=b") == "mail.example.net"
    for length in (URL_CHARACTERS_MAX - 1, URL_CHARACTERS_MAX):
        assert inbox_host("http://x/".ljust(length, "y")) == "x"


async def test_a_message_that_arrived_is_proof_where_nothing_else_was():
    """Such a server takes everything at RCPT, so that nothing follows from it."""
    async with Scripted(rcpt=lambda _: "250 Ok") as server:
        report = await probe(server.target, QUICK)
    assert report.verdict is Verdict.UNKNOWN
    assert with_arrival(report, found=True, host="x") is report, "no message was sent"
    sent = Delivery(TOKEN, "me@x.test", "null-sender", taken=True, reply="250 Ok", transcript=())
    report = dataclasses.replace(report, delivery=sent)
    missed = with_arrival(report, found=False, host="x")
    assert missed.verdict is Verdict.UNKNOWN
    assert missed.delivery == dataclasses.replace(sent, inbox="x")
    proven = with_arrival(report, found=True, host="mail.example.net")
    assert proven.verdict is Verdict.OPEN
    assert proven.why[0] == f"The message marked {TOKEN} arrived: its mark was found in the inbox at mail.example.net."
    assert proven.delivery is not None
    assert (proven.delivery.arrived, proven.delivery.inbox) == (True, "mail.example.net")
