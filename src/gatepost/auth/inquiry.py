"""One question to one server: bounded lines, one deadline, one turn.

Why: POP3, IMAP, SMTP and Dovecot's auth protocol are lines, and each login is a connection of its own; what must never
    go wrong with any of them is here: waiting without end, reading without end, believing what nobody asked for.
Trust: the servers belong to the administrator; their octets are bounded and checked like anybody's.
Promise: a question ends within its time, whatever the server does, and its connection with it.  Trouble of any kind is
    ``Unavailable``.  Octets that came before TLS are never read after it.
    Nothing here looks into what is sent, and no text of a failure holds any of it.
Sources: RFC 3207 §4.2, RFC 2595 §2.4 and §4 (what is learned before TLS is forgotten); RFC 7435 (opportunistic TLS).
    Stricter: a line ends with what its protocol says, and with nothing else.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from socket import SOCK_STREAM
from typing import cast

from gatepost.auth import Outcome, Unavailable

LINE_OCTETS_MAX = 8192  # its end included
CONVERSATION_OCTETS_MAX = 1 << 16  # all that a server may say during one login, before TLS and within it
NETWORK_ADDRESSES_MAX = 8  # of one name, tried one after the other
FAREWELL_TIMEOUT_S = 1.0  # for an answer that changes nothing any more

CRLF = b"\r\n"


class Trouble(Exception):
    """Nobody can tell, and this is why; for the operator, without a secret."""


class Inquiries:
    """So many questions at a time to one server, each with its deadline.

    Args:
        peer: the server, for the operator.
        timeout_s: for one question, waiting for its turn included.
        together: so many at a time.
    """

    __slots__ = ("_peer", "_timeout_s", "_turns")

    def __init__(self, peer: str, timeout_s: float, together: int) -> None:
        self._peer = peer
        self._timeout_s = timeout_s
        self._turns = asyncio.Semaphore(together)

    async def ask(self, question: Callable[[asyncio.Timeout], Awaitable[Outcome]]) -> Outcome:
        """The answer; ``Unavailable`` where the question raises ``Trouble`` or takes too long.

        Args:
            question: is given the deadline that it is asked under; once it knows the answer it may lift that, and take
                its leave.
        """
        try:
            async with asyncio.timeout(self._timeout_s) as deadline, self._turns:
                return await question(deadline)
        except TimeoutError:
            return Unavailable(f"{self._peer}: no answer within {self._timeout_s:g} s")
        except Trouble as trouble:
            return Unavailable(f"{self._peer}: {trouble}")


class _Wire(asyncio.Protocol):
    """What a connection has said and nobody has read yet.

    Attributes:
        heard: octets that have come on it, and before TLS on the one below it.
        lost: why it has ended, "" while it has not.
        news: something has come, or it has ended.
    """

    __slots__ = ("buffer", "heard", "lost", "news", "transport")

    def __init__(self, heard: int = 0) -> None:
        self.heard = heard
        self.buffer = bytearray()
        self.lost = ""
        self.news = asyncio.Event()
        self.transport: asyncio.Transport | None = None

    def lose(self, why: str) -> None:
        self.lost = self.lost or why
        if self.transport is not None:
            self.transport.abort()
        self.news.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is one by its methods, not by its class

    def data_received(self, data: bytes) -> None:
        if self.lost:
            return
        self.heard += len(data)
        if self.heard > CONVERSATION_OCTETS_MAX:
            self.buffer.clear()  # of a flood nothing is believed
            self.lose("it says more than a login needs")
            return
        self.buffer += data
        self.news.set()

    def eof_received(self) -> None:
        self.lose("it closed the connection")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lose(_why(exc) if isinstance(exc, OSError) else "the connection ended")


class Lines:
    """One connection, in lines, or in octets where a protocol counts them.

    Args:
        end: what ends a line, of theirs and of ours.
    """

    __slots__ = ("_end", "_wire")

    def __init__(self, wire: _Wire, end: bytes) -> None:
        self._wire = wire
        self._end = end

    async def line(self) -> bytes:
        """The next line, without its end.

        Raises:
            Trouble: it is too long, or the connection has ended before it did.
        """
        wire = self._wire
        while True:
            at = wire.buffer.find(self._end)
            length = at + len(self._end)
            if length > LINE_OCTETS_MAX or (at < 0 and len(wire.buffer) >= LINE_OCTETS_MAX):
                raise Trouble("a line of its answer is too long")
            if at >= 0:
                line = bytes(wire.buffer[:at])
                del wire.buffer[:length]
                return line
            if wire.lost:
                raise Trouble(wire.lost)
            wire.news.clear()
            await wire.news.wait()

    async def octets(self, count: int) -> bytes:
        """The next octets, whatever they are.

        Raises:
            Trouble: the connection has ended before they came.
        """
        wire = self._wire
        while len(wire.buffer) < count:
            if wire.lost:
                raise Trouble(wire.lost)
            wire.news.clear()
            await wire.news.wait()
        octets = bytes(wire.buffer[:count])
        del wire.buffer[:count]
        return octets

    def say(self, octets: bytes) -> None:
        """Send a line.

        Args:
            octets: without its end.

        Raises:
            Trouble: the connection has ended.
        """
        assert self._end not in octets, "what is sent is one line"
        self.send(octets + self._end)

    def send(self, octets: bytes) -> None:
        """Send octets as they are.

        Raises:
            Trouble: the connection has ended.
        """
        if self._wire.lost:
            raise Trouble(self._wire.lost)
        assert self._wire.transport is not None
        self._wire.transport.write(octets)

    async def ask(self, octets: bytes) -> bytes:
        """Send a line whose answer is one line, or begins with one.

        Raises:
            Trouble: the connection has ended, or the server has spoken before it was asked.
        """
        self.expect_silence()
        self.say(octets)
        return await self.line()

    def expect_silence(self) -> None:
        """What is there already answers nothing, and would be taken for the answer to what comes next.

        Raises:
            Trouble: something is there.
        """
        if self._wire.buffer:
            raise Trouble("it speaks before it is asked")

    async def secure(self, context: ssl.SSLContext, host: str) -> None:
        """From here on TLS; what was said before is not read any more.

        Raises:
            Trouble: the handshake failed, or octets are there that TLS did not protect (response injection).
        """
        self.expect_silence()
        outer = self._wire
        if outer.lost:
            raise Trouble(outer.lost)
        assert outer.transport is not None
        inner = _Wire(outer.heard)
        try:
            loop = asyncio.get_running_loop()
            inner.transport = await loop.start_tls(outer.transport, inner, context, server_hostname=host)
        except OSError as error:  # ssl.SSLError is one, TimeoutError too
            raise Trouble(f"the TLS handshake failed: {_why(error)}") from None
        if inner.transport is None:
            raise Trouble("the connection ended in the TLS handshake")
        self._wire = inner

    async def leave(self, farewell: bytes) -> None:
        """Say goodbye, and give the server a moment to hang up."""
        with suppress(Trouble, TimeoutError):
            async with asyncio.timeout(FAREWELL_TIMEOUT_S):
                self.say(farewell)
                while True:
                    await self.line()

    def close(self) -> None:
        """Close at once."""
        self._wire.lose("the connection is closed")


async def connect(host: str, port: int, deadline: asyncio.Timeout, end: bytes = CRLF) -> Lines:
    """A connection to the first network address of a host that takes it.

    What is left of the time is shared by the addresses that are left: one that is dead leaves some to the next.

    Raises:
        Trouble: there is none.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Trouble(f"its name cannot be looked up: {_why(error)}") from None
    trouble = "its name has no address"
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))[:NETWORK_ADDRESSES_MAX]
    for tried, address in enumerate(addresses):
        until = deadline.when()
        share_s = None if until is None else (until - loop.time()) / (len(addresses) - tried)
        try:
            async with asyncio.timeout(share_s):
                _, wire = await loop.create_connection(_Wire, address, port)
        except (OSError, TimeoutError) as error:
            trouble = _why(error)
        else:
            return Lines(wire, end)
    raise Trouble(trouble)


async def connect_unix(path: str, end: bytes = CRLF) -> Lines:
    """A connection to a Unix socket.

    Raises:
        Trouble: nobody takes it.
    """
    try:
        _, wire = await asyncio.get_running_loop().create_unix_connection(_Wire, path)
    except OSError as error:
        raise Trouble(_why(error)) from None
    return Lines(wire, end)


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "no answer in time" if isinstance(error, TimeoutError) else str(error)
