"""One connection to the server under test, and the transcript of what was said on it.

Why: asking is a dialogue of lines; what the server does to the connection (silence, a cut, a drip of octets) is part of
    its answer.
Trust: everything read is hostile.  A reply has one deadline, however slowly it drips; what is not read yet is bounded
    by pausing the transport; what came before a TLS handshake is not believed after it.
Promise: nothing raises on what the server does: every outcome is a ``Heard``, with code 0 and the reason where there
    was no reply.  Certificates are not checked: who relays is asked here, not who the server is.
Sources: RFC 5321 §4.2, §4.5.3.2 (timeouts); RFC 3207 §4.2 (nothing survives STARTTLS), §6.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable
from typing import cast

from gatepost.probe.reply import SHOWN_CHARACTERS_MAX, Heard, ReplyReader, shown
from gatepost.probe.report import Address

UNREAD_HIGH_OCTETS = 65_536  # beyond it the server is not read any further
TRANSCRIPT_LINES_MAX = 2_000  # of one connection


class Deadline:
    """A point in time that all waits of a probe share."""

    def __init__(self, clock: Callable[[], float], budget_s: float) -> None:
        self._clock = clock
        self._end = clock() + budget_s

    @property
    def over(self) -> bool:
        return self._clock() >= self._end

    def at_most(self, seconds: float) -> float:
        """So long may a wait be that would take this long."""
        return max(0.0, min(seconds, self._end - self._clock()))


class Wire(asyncio.Protocol):
    """One connection.  Made by ``dial``.

    Attributes:
        transcript: what was said, a line each.
        closed: the connection is of no more use.
        silent: because a reply did not come in time; hung_up: because the server ended it instead of a reply.
    """

    def __init__(self, timeout_s: float, deadline: Deadline) -> None:
        self._timeout_s = timeout_s
        self._deadline = deadline
        self._reader = ReplyReader()
        self._unread = bytearray()
        self._arrived = asyncio.Event()
        self._lost = ""
        self._transport: asyncio.Transport | None = None
        self.transcript: list[str] = []
        self.closed = False
        self.silent = False
        self.hung_up = False

    # ---- from the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._unread += data
        if len(self._unread) > UNREAD_HIGH_OCTETS and self._transport is not None:
            self._transport.pause_reading()
        self._arrived.set()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = self._lost or "it hung up without a reply"
        self._arrived.set()

    # ---- the dialogue

    async def reply(self) -> Heard:
        """The next reply."""
        if self.closed:
            return Heard(0, "the connection is closed")
        limit_s = self._deadline.at_most(self._timeout_s)
        try:
            async with asyncio.timeout(limit_s):
                heard = await self._next()
        except TimeoutError:
            whose = "the time for the whole test is over" if self._deadline.over else f"no reply in {limit_s:.3g} s"
            heard = Heard(0, whose)
            self.silent = True
        self._note("S: ", heard)
        if heard.code in (0, 421):  # RFC 5321 §3.8: it closes the channel
            self.abort()
        return heard

    async def command(self, line: str, *, shown_as: str = "") -> Heard:
        """Say one line, and hear the reply to it.

        Args:
            line: without CRLF; sent as UTF-8.
            shown_as: what the transcript has instead.
        """
        self.say(line, shown_as=shown_as)
        return await self.reply()

    def say(self, *lines: str, shown_as: str = "") -> None:
        """Send lines in one go."""
        if self.closed or self._transport is None:
            return
        for line in lines:
            self._write(f"C: {shown_as or shown(line.encode())}")
        self._transport.write("".join(f"{line}\r\n" for line in lines).encode())

    async def start_tls(self, server_name: str) -> str:
        """The handshake, after STARTTLS was answered 220.

        Args:
            server_name: for SNI; "" where the server is known by address only.

        Returns:
            The version, such as "TLSv1.3"; or "" where it failed, and ``closed`` is set.
        """
        if self._transport is None or self._lost:
            self.abort()
            return ""
        # CVE-2021-38371 and its kin: what an attacker put in before the handshake is not heard after it.
        self._unread.clear()
        self._reader = ReplyReader()
        limit_s = max(self._deadline.at_most(self._timeout_s), 0.001)
        try:
            transport = await asyncio.get_running_loop().start_tls(
                self._transport, self, _any_tls(), server_hostname=server_name or None, ssl_handshake_timeout=limit_s
            )
        except (OSError, ssl.SSLError) as error:  # a timeout is a ConnectionAbortedError
            self._write(f"S: (the TLS handshake failed: {shown(str(error).encode())})")
            self.abort()
            return ""
        if transport is None:
            self.abort()
            return ""
        self._transport = transport
        version = str(transport.get_extra_info("ssl_object").version())
        self._write(f"S: ({version} from here on)")
        return version

    async def quit(self) -> None:
        """Leave politely."""
        if not self.closed:
            await self.command("QUIT")
        self.abort()

    def abort(self) -> None:
        """Leave at once."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    @property
    def own_address(self) -> str:
        """The address that we speak from."""
        assert self._transport is not None
        return str(self._transport.get_extra_info("sockname")[0])

    # ---- within

    async def _next(self) -> Heard:
        while True:
            heard = self._reader.next()
            if heard is not None:
                return heard
            if self._unread:
                self._reader.feed(bytes(self._unread))
                self._unread.clear()
                if self._transport is not None:
                    self._transport.resume_reading()
                continue
            if self._lost:
                self.hung_up = True
                return Heard(0, self._lost)
            self._arrived.clear()
            await self._arrived.wait()

    def _note(self, who: str, heard: Heard) -> None:
        lines = heard.text.split("\n")
        if not heard.code:
            self._write(f"{who}({lines[0]})")
            return
        for number, line in enumerate(lines, 1):
            self._write(f"{who}{heard.code}{' ' if number == len(lines) else '-'}{line}".rstrip())

    def _write(self, line: str) -> None:
        if len(self.transcript) < TRANSCRIPT_LINES_MAX:
            self.transcript.append(line[: SHOWN_CHARACTERS_MAX + 8])


async def dial(address: Address, port: int, source: Address | None, timeout_s: float, deadline: Deadline) -> Wire | str:
    """A connection; or why there is none, as a clause."""
    loop = asyncio.get_running_loop()
    local = None if source is None else (str(source), 0)
    limit_s = deadline.at_most(timeout_s)
    try:
        async with asyncio.timeout(limit_s):
            _, wire = await loop.create_connection(
                lambda: Wire(timeout_s, deadline), str(address), port, local_addr=local
            )
    except TimeoutError:
        return f"no connection in {limit_s:.3g} s"
    except OSError as error:
        return _reason(error)
    return wire


def _reason(error: OSError) -> str:
    """What the system says, without what the event loop puts around it."""
    return (os.strerror(error.errno) if error.errno else shown(str(error).encode())).lower()


def _any_tls() -> ssl.SSLContext:
    """TLS with any server, however old: a relay over TLS 1.0 is a relay."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    return context
