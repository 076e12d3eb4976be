"""The mailbox server behind the POP3 and IMAP proxy: asked about logins, and then left to talk with its client.

Why: the proxy's own conversation with its client is one thing, and what an old server wants to hear is another; here
    is the second: POP3 and IMAP as a client, TLS towards the server, and the pump once it has said yes.
Trust: the server is the administrator's, perhaps old and odd: whatever it says that is neither yes nor no is a server
    that is out of reach.  All that it may say before its yes is bounded in octets, lines and time.
Promise: a yes is made on one line for each protocol, after the server's own.  A connection on which something odd was
    heard is never used again, and nothing that came before TLS is read after it.  What the server says about a login is
    in no text for the operator: it may repeat the secret.
Sources: RFC 1939 (POP3), RFC 2449 (CAPA), RFC 5034 (AUTH), RFC 9051 (IMAP), RFC 2595 (STLS, STARTTLS), RFC 8314
    (implicit TLS), RFC 3206 and RFC 5530 (response codes), RFC 7435 (opportunistic TLS).
"""

from __future__ import annotations

import asyncio
import ssl
from enum import Enum, unique
from functools import lru_cache
from socket import SOCK_STREAM
from typing import NamedTuple, cast

from gatepost.auth.login import unjudged
from gatepost.errors import BackendUnavailable
from gatepost.gate.connection import READ_HIGH_OCTETS, Connection, Ended
from gatepost.gate.mailbox_lines import (
    CAPABILITIES_MAX,
    SERVER_LINE_OCTETS_MAX,
    Defect,
    Lines,
    capabilities,
    imap_login,
    imap_no,
    imap_unjudged,
    pop3_login,
    pop3_unjudged,
)
from gatepost.gate.settings import MailboxServer
from gatepost.smtp.sasl import Password

SERVER_STALL_S = 300.0  # for a server to take what its client sends
HALF_CLOSED_S = 10.0  # for a server to say something more, when its client has said all
UNTAGGED_MAX = 64  # lines that an IMAP server says in between
NETWORK_ADDRESSES_MAX = 8  # of the server's name, tried one after the other


@unique
class Judgement(Enum):
    """What became of a login, as the log has it."""

    VERIFIED = "verified"
    DENIED = "denied"
    UNAVAILABLE = "unavailable"


class Answer(NamedTuple):
    """The answer to a login.

    Attributes:
        lines: what the server said and the client is to hear: the last is about the login itself, without tag; empty
            where the dialogue has its own words.
        why: for the operator, in our words: what a server says may repeat the secret.
    """

    judgement: Judgement
    lines: tuple[bytes, ...] = ()
    why: str = ""


_DENIED = Answer(Judgement.DENIED, why="the server refused it")
_UNJUDGED = "the server says that it cannot judge it now"


class Link:
    """One session's connection to the mailbox server: made when it is needed, and made anew where it was lost.

    Args:
        role: "pop3" or "imap".

    Attributes:
        at_line_end: the last octet that the client was given by ``pump`` ended a line.
    """

    __slots__ = ("_role", "_settings", "_wire", "at_line_end")

    def __init__(self, settings: MailboxServer, role: str) -> None:
        self._settings = settings
        self._role = role
        self._wire: _Wire | None = None
        self.at_line_end = True

    async def capabilities(self) -> tuple[str, ...]:
        """What the server offers; nothing where it is out of reach."""
        try:
            async with asyncio.timeout(self._settings.timeout_s) as deadline:
                return (await self._connected(deadline)).speech.offered or ()
        except (OSError, BackendUnavailable):
            self.close()
            return ()

    async def log_in(self, password: Password) -> Answer:
        """Ask whether this is a user and their secret."""
        try:
            async with asyncio.timeout(self._settings.timeout_s) as deadline:
                return await (await self._connected(deadline)).speech.log_in(password)
        except (OSError, BackendUnavailable) as error:  # TimeoutError is an OSError
            self.close()
            why = f"{self._settings.host}:{self._settings.port}: {_why(error)}"
            return Answer(Judgement.UNAVAILABLE, why=why)

    async def pump(self, client: Connection, unread: Lines) -> str:
        """Hand octets both ways until one side ends; only after a login that was verified.

        Args:
            unread: where the client's octets arrive.

        Returns:
            Why it ended; "" where the client's connection says that (``Connection.ended``).
        """
        wire = self._wire
        assert wire is not None
        client.progress()
        async with asyncio.TaskGroup() as both:
            up = both.create_task(self._upwards(client, unread, wire))
            down = both.create_task(self._downwards(client, wire))
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
            if up.done() and client.ended is Ended.EOF:
                wire.write_eof()
                moved_s = -1.0
                while not down.done() and moved_s != client.since:  # as long as there is more for the client
                    moved_s = client.since
                    await asyncio.wait((down,), timeout=HALF_CLOSED_S)
            up.cancel()
            down.cancel()
        reasons = [task.result() for task in (up, down) if not task.cancelled()]
        return next(filter(None, reasons), "")

    def close(self) -> None:
        """Close when all is sent; a connection to a server that is silent or odd is not used again."""
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    async def _connected(self, deadline: asyncio.Timeout) -> _Wire:
        """The connection to the server, made where there is none or where the server has closed it."""
        if self._wire is None or self._wire.ended:
            self._wire = await _connect(self._settings, self._role, deadline)
        return self._wire

    async def _upwards(self, client: Connection, unread: Lines, wire: _Wire) -> str:
        """From the client to the server; why it ended, as ``pump``."""
        while True:
            octets = unread.rest()
            if octets:
                client.progress()
                wire.write(octets)
                try:
                    async with asyncio.timeout(SERVER_STALL_S):
                        await wire.drained()
                except TimeoutError:
                    return "the server takes no more"
            elif not await client.more():
                return ""

    async def _downwards(self, client: Connection, wire: _Wire) -> str:
        """From the server to the client; why it ended, as ``pump``."""
        while True:
            octets = wire.lines.rest()
            if octets:
                client.progress()
                self.at_line_end = octets.endswith(b"\n")
                client.send(octets)
                await client.drained()
            elif not await wire.more():
                return "server closed" if client.ended is Ended.NO else ""


# --- The wire, and the two languages over it --------------------------------------------------------------------------


class _Wire(asyncio.Protocol):
    """The connection to the mailbox server.

    Attributes:
        speech: POP3 or IMAP over it.
        ended: nothing more will come.
    """

    __slots__ = ("_drained", "_loop", "_paused", "_transport", "_waiter", "ended", "lines", "speech")

    def __init__(self, loop: asyncio.AbstractEventLoop, role: str) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._paused = False
        self.ended = False
        self.lines = Lines(SERVER_LINE_OCTETS_MAX)
        self.speech: _Pop3Server | _ImapServer = _Pop3Server(self) if role == "pop3" else _ImapServer(self)

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.lines.receive(data)
        if not self._paused and self.lines.unread_octets > READ_HIGH_OCTETS and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        self._wake()
        self.resume_writing()

    def pause_writing(self) -> None:
        self._drained = self._loop.create_future()

    def resume_writing(self) -> None:
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # ---- for the link

    async def more(self) -> bool:
        """Wait for octets; False when none will come."""
        if not self.lines.unread_octets and not self.ended:
            await self._arrival()
        return self.lines.unread_octets > 0

    async def _arrival(self) -> None:
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        self._waiter = self._loop.create_future()
        await self._waiter

    async def line(self) -> bytes:
        """The next line, without its end.

        Raises:
            BackendUnavailable: the server ended the connection, or says what is no line.
        """
        while (line := self.lines.line()) is None:
            if self.ended:
                raise BackendUnavailable("the server closed the connection")
            await self._arrival()
        if isinstance(line, Defect):
            raise BackendUnavailable(f"the server says what is no line: {line.text}")
        return line

    def write(self, octets: bytes) -> None:
        """Send to the server."""
        if self._transport is not None and not self.ended:
            self._transport.write(octets)

    async def drained(self) -> None:
        """Wait until the server has taken most of what was sent, or is gone."""
        if self._drained is not None:
            await self._drained

    def write_eof(self) -> None:
        """Say that the client has said all, where that can be said: not under TLS."""
        if self._transport is not None and not self.ended and self._transport.can_write_eof():
            self._transport.write_eof()

    async def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """The handshake, as client.

        Raises:
            BackendUnavailable: octets came behind the server's leave, in plain text.
            OSError: the handshake failed.
        """
        if self.lines.unread_octets:
            raise BackendUnavailable("the server talks in plain text where TLS begins")
        assert self._transport is not None
        transport = await self._loop.start_tls(self._transport, self, context, server_hostname=host)
        if transport is None:
            raise BackendUnavailable("the server closed the connection in the TLS handshake")
        self._transport = transport

    def close(self) -> None:
        """Close when all is sent."""
        if self._transport is not None:
            self._transport.close()


class _Pop3Server:
    """POP3 as a client.

    Attributes:
        offered: the lines of CAPA, None where the server does not know it.
    """

    __slots__ = ("_wire", "offered")

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire
        self.offered: tuple[str, ...] | None = None

    async def greeted(self) -> None:
        """The greeting and the capabilities.  RFC 1939 §4."""
        if not _ok(await self._wire.line()):
            raise BackendUnavailable("the server greets with a refusal")
        await self._ask_capabilities()

    async def start_tls(self, context: ssl.SSLContext, host: str) -> bool:
        """STLS; False where the server does not have it.  RFC 2595 §4."""
        if "STLS" not in map(str.upper, self.offered or ()) or not _ok(await self._say(b"STLS")):
            return False
        await self._wire.start_tls(context, host)
        await self._ask_capabilities()
        return True

    async def log_in(self, password: Password) -> Answer:
        """USER and PASS, or AUTH PLAIN."""
        lines = pop3_login(password, self.offered)
        if lines is None:
            raise BackendUnavailable("the server takes no login as this connection is")
        answer = b""
        for number, line in enumerate(lines, 1):
            answer = await self._say(line)
            if answer.startswith(b"-ERR"):
                return Answer(Judgement.UNAVAILABLE, (answer,), _UNJUDGED) if pop3_unjudged(answer) else _DENIED
            # "+ " asks for a response, and only for the last; it is no yes.  RFC 5034 §4.
            asked = number < len(lines) and lines[0].startswith(b"AUTH")
            if not (answer.startswith(b"+ ") or answer == b"+" if asked else _ok(answer)):
                raise BackendUnavailable("the server's answer to a login is neither yes nor no")
        return Answer(Judgement.VERIFIED, (answer,))

    async def _say(self, line: bytes) -> bytes:
        """One command, and the first line of its response."""
        if self._wire.lines.unread_octets:
            raise BackendUnavailable("the server talks when it was not asked")
        self._wire.write(line + b"\r\n")
        return await self._wire.line()

    async def _ask_capabilities(self) -> None:
        self.offered = None
        if _ok(await self._say(b"CAPA")):
            lines: list[bytes] = []
            while (line := await self._wire.line()) != b".":
                lines.append(line)
                if len(lines) > CAPABILITIES_MAX:
                    raise BackendUnavailable("the server's capabilities do not end")
            self.offered = capabilities(lines)


def _ok(line: bytes) -> bool:
    return line == b"+OK" or line.startswith(b"+OK ")


class _ImapServer:
    """IMAP as a client.

    Attributes:
        offered: the keywords of CAPABILITY.
    """

    __slots__ = ("_number", "_wire", "offered")

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire
        self._number = 0
        self.offered: tuple[str, ...] = ()

    async def greeted(self) -> None:
        """The greeting and the capabilities.  PREAUTH would be a login that nobody made.  RFC 9051 §7.1."""
        if not (await self._wire.line()).upper().startswith(b"* OK"):
            raise BackendUnavailable("the server does not greet with OK")
        await self._ask_capabilities()

    async def start_tls(self, context: ssl.SSLContext, host: str) -> bool:
        """STARTTLS; False where the server does not have it.  RFC 9051 §6.2.1."""
        if "STARTTLS" not in map(str.upper, self.offered):
            return False
        _, status = await self._say([b"STARTTLS"])
        if not _tagged_ok(status):
            return False
        await self._wire.start_tls(context, host)
        await self._ask_capabilities()
        return True

    async def log_in(self, password: Password) -> Answer:
        """LOGIN, or AUTHENTICATE PLAIN; what the server says in between is for the client, if it may come in."""
        lines = imap_login(password, self.offered)
        if lines is None:
            raise BackendUnavailable("the server takes no login as this connection is")
        untagged, status = await self._say(lines)
        if _tagged_ok(status):
            return Answer(Judgement.VERIFIED, (*untagged, status))
        if not imap_no(status):
            raise BackendUnavailable("the server's answer to a login is neither yes nor no")
        return Answer(Judgement.UNAVAILABLE, (status,), _UNJUDGED) if imap_unjudged(status) else _DENIED

    async def _say(self, lines: list[bytes]) -> tuple[list[bytes], bytes]:
        """One command, in lines that each but the first wait for "+"; what was said without our tag, and with it."""
        self._number += 1
        tag = b"g%d " % self._number
        untagged: list[bytes] = []
        for line in (tag + lines[0], *lines[1:]):
            self._wire.write(line + b"\r\n")
            while not (heard := await self._wire.line()).startswith(b"+"):
                if heard.startswith(tag):
                    return untagged, heard[len(tag) :]
                untagged.append(heard)
                if not heard.startswith(b"* ") or heard.endswith(b"}") or len(untagged) > UNTAGGED_MAX:
                    raise BackendUnavailable("the server says what it was not asked")
        raise BackendUnavailable("the server waits for more, and there is no more")

    async def _ask_capabilities(self) -> None:
        untagged, _ = await self._say([b"CAPABILITY"])
        words = [word for line in untagged if line.upper().startswith(b"* CAPABILITY ") for word in line.split()[2:]]
        self.offered = capabilities(words)


def _tagged_ok(status: bytes) -> bool:
    return status[:3].upper() in (b"OK", b"OK ")  # and not "OKAY"


# --- Connecting -------------------------------------------------------------------------------------------------------


async def _connect(settings: MailboxServer, role: str, deadline: asyncio.Timeout) -> _Wire:
    """A connection that has been greeted, under TLS as the settings say.

    Raises:
        BackendUnavailable: nobody answers, TLS that is required cannot be had, or what answers is no such server.
        OSError: the handshake failed.
    """
    wire = await _open(settings, role, deadline)
    try:
        if settings.tls == "implicit":
            await wire.start_tls(_context(judged=True), settings.host)
        await wire.speech.greeted()
        if settings.tls in ("opportunistic", "required"):
            await _ask_for_tls(wire, settings.host, required=settings.tls == "required")
    except BaseException:
        wire.close()
        raise
    return wire


async def _ask_for_tls(wire: _Wire, host: str, *, required: bool) -> None:
    """TLS where the server has it; plain text where it has not, and that will do."""
    if not await wire.speech.start_tls(_context(judged=required), host) and required:
        raise BackendUnavailable("the server does not offer TLS, and server_tls is required")


async def _open(settings: MailboxServer, role: str, deadline: asyncio.Timeout) -> _Wire:
    """A connection to the first network address that takes it.

    What is left of the time is shared by the addresses that are left: one that is dead leaves some to the next.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(settings.host, settings.port, type=SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise BackendUnavailable(f"the name cannot be looked up: {_why(error)}") from error
    trouble = "the name has no address"
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))[:NETWORK_ADDRESSES_MAX]
    for tried, address in enumerate(addresses):
        until = deadline.when()
        assert until is not None
        try:
            async with asyncio.timeout((until - loop.time()) / (len(addresses) - tried)):
                _, wire = await loop.create_connection(lambda: _Wire(loop, role), address, settings.port)
        except OSError as error:  # TimeoutError is one
            trouble = _why(error)
        else:
            return wire
    raise BackendUnavailable(trouble)


@lru_cache(maxsize=2)
def _context(*, judged: bool) -> ssl.SSLContext:
    """For the server's side: its certificate judged by the system's authorities, or not at all."""
    return ssl.create_default_context() if judged else unjudged()


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
