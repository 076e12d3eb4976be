"""One client's transport: octets, waiting, back-pressure, the TLS switch.

Why: the conversation should read like RFC 5321 and not like event handling; everything that a socket can do to it
    stands here.
Trust: the peer may be slow, silent, deaf or gone, at any octet.
Promise: no octet is kept beyond READ_HIGH_OCTETS plus one read while the conversation is busy; a peer that does not
    read its replies stops being read; nothing received before the TLS handshake reaches the session after it.
Sources: RFC 5321 §4.5.3.2 (timeouts), RFC 3207 §4 (TLS).
"""

from __future__ import annotations

import asyncio
from enum import Enum, unique
from typing import TYPE_CHECKING, Protocol, cast

from gatepost.gate.certificates import AskingTransport
from gatepost.gate.tls import AskingContext, Secured, TlsContext, secured

if TYPE_CHECKING:
    from gatepost.gate.server import Listener

READ_HIGH_OCTETS = 1 << 17


@unique
class Ended(Enum):
    """Why no more octets will come."""

    NO = "not ended"
    EOF = "client closed"
    LOST = "connection lost"
    TIMEOUT = "timeout"
    DRAINED = "draining"


class Reader(Protocol):
    """Whoever takes the octets of a connection."""

    @property
    def unread_octets(self) -> int:
        """Received and not yet taken."""
        ...

    def receive(self, octets: bytes) -> None:
        """Take what the peer sent."""
        ...


class _Nobody:
    """Before anybody reads, and after."""

    unread_octets = 0

    def receive(self, octets: bytes) -> None:
        """Drop it."""


_NOBODY = _Nobody()


class _Keeper:
    """Before the handshake of implicit TLS: what comes is for TLS and for nobody else."""

    __slots__ = ("octets",)

    def __init__(self, octets: bytes) -> None:
        self.octets = octets

    @property
    def unread_octets(self) -> int:
        return len(self.octets)

    def receive(self, octets: bytes) -> None:
        self.octets += octets


class Connection(asyncio.Protocol):
    """One accepted TCP connection.

    Attributes:
        reader: where octets go: the parser of a PROXY header, then the engine.
        ended: set once; the conversation finds it at its next wait.
        since: loop time at which the present wait for progress began; in_content: the block timeout applies.
    """

    __slots__ = (
        "_drained",
        "_fresh",
        "_half_closable",
        "_listener",
        "_loop",
        "_paused",
        "_waiter",
        "_write_blocked",
        "content_since",
        "ended",
        "in_content",
        "reader",
        "since",
        "task",
        "transport",
    )

    def __init__(self, listener: Listener, loop: asyncio.AbstractEventLoop) -> None:
        self._listener = listener
        self._loop = loop
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._fresh = False
        self._half_closable = True
        self._paused = False
        self._write_blocked = False
        self.reader: Reader = _NOBODY
        self.ended = Ended.NO
        self.since = 0.0
        self.content_since = 0.0
        self.in_content = False
        self.task: asyncio.Task[None] | None = None
        self.transport: asyncio.Transport = cast("asyncio.Transport", None)

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called for the TCP connection, and again for the TLS one that takes its place."""
        self.transport = cast("asyncio.Transport", transport)
        if self.task is None:
            self.since = self._loop.time()
            self._listener.accepted(self)

    def data_received(self, data: bytes) -> None:
        """Hand octets to whoever reads now; stop reading when it has too many."""
        self.reader.receive(data)
        if self._waiter is not None:
            self._wake()
        else:
            self._fresh = True
            if not self._paused and self.reader.unread_octets > READ_HIGH_OCTETS:
                self._paused = True
                self.transport.pause_reading()

    def eof_received(self) -> bool:
        """A half-closed client may still wait for its replies; the end of octets is no end of content."""
        self._end(Ended.EOF)
        return self._half_closable

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing can be read or written any more."""
        self._end(Ended.LOST)
        self._write_blocked = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def pause_writing(self) -> None:
        """The peer does not read its replies."""
        self._write_blocked = True

    def resume_writing(self) -> None:
        """It reads again."""
        self._write_blocked = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    # ---- for the conversation

    def take_fresh(self) -> bool:
        """Whether octets came since the last look; asked before waiting."""
        fresh, self._fresh = self._fresh, False
        return fresh

    def arrival(self) -> asyncio.Future[None]:
        """Done when octets came or the connection ended; for the one coroutine that holds the conversation."""
        if self._paused:
            self._paused = False
            self.transport.resume_reading()
        self._waiter = self._loop.create_future()
        return self._waiter

    async def more(self) -> bool:
        """Wait for octets; False when none will come (``ended`` says why)."""
        if self.take_fresh():
            return True
        if self.ended is not Ended.NO:
            return False
        await self.arrival()
        return True

    def progress(self) -> None:
        """The client completed a command or a block: its time begins anew.  RFC 5321 §4.5.3.2."""
        self.since = self._loop.time()

    def content_goes_on(self) -> None:
        """Content is waited for: the block timeout applies, and a ceiling on all of it."""
        self.since = self._loop.time()
        if not self.in_content:
            self.in_content = True
            self.content_since = self.since

    def send(self, octets: bytes) -> bool:
        """Send; True when the peer does not take what was sent, and ``drained`` should be awaited."""
        if octets and self.ended is not Ended.LOST and not self.transport.is_closing():
            self.transport.write(octets)
        return self._write_blocked

    async def drained(self) -> None:
        """Wait until the peer has taken most of what was sent, or is gone."""
        if self._write_blocked:
            self._drained = self._loop.create_future()
            try:
                await self._drained
            finally:
                self._drained = None

    def keep(self, octets: bytes) -> None:
        """Keep these and all that come until ``take_kept``."""
        self.reader = _Keeper(octets)

    def take_kept(self, reader: Reader) -> bytes | None:
        """What was kept, None where nothing had to be; what comes behind the handshake is for this reader."""
        kept = self.reader
        if not isinstance(kept, _Keeper):
            return None
        self.hold_reading()
        self.reader = reader
        return kept.octets

    def hold_reading(self) -> None:
        """Read nothing more in plain text: called before the 220 that answers STARTTLS."""
        if not self._paused:
            self._paused = True
            self.transport.pause_reading()

    async def start_tls(self, context: TlsContext | AskingContext, timeout_s: float, early: bytes = b"") -> Secured:
        """The TLS handshake as server; the context says whether the client is asked for a certificate.

        Args:
            early: the beginning of the client's part, where the loop has read it already.

        Raises:
            OSError: the handshake failed or took too long (ssl.SSLError and ConnectionError are OSErrors).
        """
        self._fresh = False
        if isinstance(context, AskingContext):
            asking = AskingTransport(self._loop, self.transport, self, context)
            gained = await asking.handshake(timeout_s, early)
            self.transport = asking
            asking.resume_reading()
        else:
            self.transport = await self._start_loop_tls(context, timeout_s, early)
            gained = secured(self.transport.get_extra_info("ssl_object"))
        self._paused = False
        self.since = self._loop.time()
        return gained

    async def _start_loop_tls(self, context: TlsContext, timeout_s: float, early: bytes) -> asyncio.Transport:
        """The loop's own TLS, which asks for no certificate, and knows no half close."""
        self._half_closable = False  # the end may come with the handshake's last octets, before the await below is over
        handshake = self._loop.create_task(
            self._loop.start_tls(self.transport, self, context, server_side=True, ssl_handshake_timeout=timeout_s)
        )
        try:
            if early:
                await asyncio.sleep(0)  # the protocol of TLS is in its place, and begins in the loop's next round
                self._loop.call_soon(_feed, self.transport, early)
            transport = await handshake
        except TimeoutError as error:
            raise ConnectionAbortedError("TLS handshake took too long") from error
        if transport is None:
            raise ConnectionAbortedError("connection lost in the TLS handshake")
        return transport

    def close(self) -> bool:
        """Close after what was written is sent; False while the peer has not taken all of it."""
        if self.ended is Ended.LOST:
            return True
        if self.transport.is_closing():  # TLS closes by itself behind close_notify; asyncio's tells no size any more
            return False
        self.transport.close()
        return self.transport.get_write_buffer_size() == 0

    def abort(self) -> None:
        """Close at once."""
        self._end(Ended.LOST)
        self.transport.abort()

    # ---- for the server's sweep and drain

    @property
    def waiting(self) -> bool:
        """The conversation waits for its client, to send or to read."""
        return self._waiter is not None or self._drained is not None

    def expire(self, reason: Ended) -> None:
        """End the wait: the conversation says its 421 and closes; one that cannot even write is cut."""
        if self._drained is not None:
            self.abort()
        elif self._waiter is not None:
            self._end(reason)

    def _end(self, reason: Ended) -> None:
        if self.ended is Ended.NO or reason is Ended.LOST:
            self.ended = reason
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def _feed(transport: asyncio.Transport, octets: bytes) -> None:
    """Hand octets to the transport's buffered protocol as the loop does; neither loop has a word for it."""
    protocol = cast("asyncio.BufferedProtocol", transport.get_protocol())  # uvloop's is one by its methods
    while octets and not transport.is_closing():
        room = memoryview(protocol.get_buffer(len(octets)))
        taken = min(len(room), len(octets))
        room[:taken] = octets[:taken]
        protocol.buffer_updated(taken)
        octets = octets[taken:]
