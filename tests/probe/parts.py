"""Servers under test: one that plays a part, and the lenient backend with users that it knows."""

from __future__ import annotations

import asyncio
import http.server
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

from tests.vectors import lenient
from tests.vectors.readings import domain_of, every_reading, plain

from gatepost.probe import Outcome, ProbeSettings, Report, Target, probe

OURS = "example.com"
USERS = (b"alice@example.com", b"postmaster@example.com")
QUICK = ProbeSettings(local_domains=(OURS,), pause_s=0.0, timeout_s=20.0, budget_s=100.0)
DENIED = "550 5.7.1 Relaying denied"
UNKNOWN_USER = "550 5.1.1 No such user here"

Answer = Callable[[str], str | None]


def closed(argument: str) -> str:
    """How a closed server answers RCPT: it knows its users, and nobody else's."""
    address = plain(argument.encode())
    if address in USERS:
        return "250 2.1.5 Ok"
    return UNKNOWN_USER if domain_of(address) == OURS else DENIED


def outcomes(report: Report) -> dict[str, Outcome]:
    """What came of each form, in the first round."""
    return {attempt.id: attempt.outcome for attempt in report.rounds[0].attempts}


def accepted(report: Report) -> list[str]:
    return [attempt.id for one in report.rounds for attempt in one.accepted]


@dataclass
class Scripted:
    """A server that plays its part in the test's own event loop.

    Args:
        rcpt, mail: the reply to a command's argument; None hangs up, "" says nothing, "..." never comes to an end.
        content: the reply to the octets of a message.
        forgets: RCPT is answered whatever became of MAIL.
        errors: so many refusals on a connection, and it ends it with 421.
        connections: the greeting of each connection by its number, from 0; None does not greet but hangs up.
        tls: STARTTLS is offered; implicit_tls: TLS from the first octet.
        over: set when a connection has ended.
        injected: what an attacker in between adds to the reply to STARTTLS.
    """

    rcpt: Answer = closed
    mail: Answer = lambda argument: "250 2.1.0 Ok"
    content: Answer = lambda content: "250 2.0.0 Ok: queued"
    ehlo: str = "250-mx.example.com\r\n250-PIPELINING\r\n250 8BITMIME"
    forgets: bool = False
    errors: int = 1000
    connections: Callable[[int], str | None] = lambda number: "220 mx.example.com ESMTP"
    tls: ssl.SSLContext | None = None
    implicit_tls: ssl.SSLContext | None = None
    over: asyncio.Event | None = None
    injected: bytes = b""
    host: str = "127.0.0.1"
    heard: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    opened: int = 0
    port: int = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self.host, self.port, ssl=self.implicit_tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    @property
    def target(self) -> Target:
        return Target(self.host, self.port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, self.opened = self.opened, self.opened + 1
        try:
            await self._converse(number, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            writer.close()
            if self.over is not None:
                self.over.set()

    async def _converse(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        greeting = self.connections(number)
        if greeting is None:
            return
        writer.write(f"{greeting}\r\n".encode())
        errors, in_mail, under_tls = 0, False, False
        while line := (await reader.readline()).decode("utf-8", "replace").rstrip("\r\n"):
            self.heard.append(line)
            verb, _, argument = line.partition(" ") if ":" not in line else line.partition(":")
            reply: str | None
            match verb.upper():
                case "EHLO" | "HELO":
                    reply = self.ehlo
                    if self.tls and not under_tls:
                        reply = f"{reply.replace('250 ', '250-', 1)}\r\n250 STARTTLS"
                case "MAIL FROM":
                    reply = self.mail(argument)
                    in_mail = bool(reply and reply.startswith("2"))
                case "RCPT TO":
                    reply = self.rcpt(argument) if in_mail or self.forgets else "503 5.5.1 MAIL first"
                case "DATA":
                    writer.write(b"354 Go ahead\r\n")
                    content = (await reader.readuntil(b"\r\n.\r\n")).decode()
                    self.messages.append(content)
                    reply = self.content(content)
                case "STARTTLS":
                    assert self.tls is not None
                    writer.write(b"220 Go ahead\r\n" + self.injected)
                    await writer.start_tls(self.tls)
                    under_tls = True
                    continue
                case "QUIT":
                    writer.write(b"221 2.0.0 Bye\r\n")
                    return
                case _:
                    reply, in_mail = "250 2.0.0 Ok", False
            if reply is None:
                return
            if reply == "":
                continue
            while reply == "...":
                writer.write(b"2")
                await writer.drain()
                await asyncio.sleep(0.02)
            errors += reply.startswith("5")
            writer.write(f"{reply}\r\n".encode())
            if errors >= self.errors:
                writer.write(b"421 4.7.0 Too many errors\r\n")
                return


class Choosy(lenient.LenientSession):
    """The lenient backend as a server that knows its users and refuses strangers, but for what it misreads."""

    def _rcpt_command(self, argument: bytes) -> None:
        match = re.match(rb"TO\s*:\s*(.*)", argument, re.IGNORECASE | re.DOTALL)
        if match is None:
            self._say("501 5.5.4 RCPT TO:<address>")
            return
        address = plain(match[1])
        domain = domain_of(address)
        here = domain in ("", OURS, "[127.0.0.1]", "localhost", "lenient.test")
        misread = {domain_of(reading) for reading, rules in every_reading(match[1], self._habits).items() if rules}
        routed = address.startswith(b"@") and "source-route" in self._habits
        if address in USERS or (here and misread - {"", OURS, domain}) or routed:
            super()._rcpt_command(argument)
        else:
            self._say(UNKNOWN_USER if domain == OURS else DENIED)


@contextmanager
def choosy(mode: str, monkeypatch) -> Iterator[lenient.LenientBackend]:
    monkeypatch.setattr(lenient, "LenientSession", Choosy)
    with lenient.LenientBackend(mode) as backend:
        yield backend


class _Inbox(http.server.BaseHTTPRequestHandler):
    backend: lenient.LenientBackend

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"".join(transaction.octets for transaction in self.backend.transactions()))

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def inbox(backend: lenient.LenientBackend) -> Iterator[str]:
    """A URL that shows what the backend has got."""
    handler = type("Inbox", (_Inbox,), {"backend": backend})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


async def probed(port: int, settings: ProbeSettings = QUICK) -> Report:
    return await probe(Target("127.0.0.1", port), settings)
