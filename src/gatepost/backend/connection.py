"""One connection to a backend: octets, replies, back-pressure, deadlines, the TLS switch.

Why: an ``asyncio.Protocol`` with one future for each group of replies is the shortest way between two awaits; streams,
    a task a command or a timer a command would each cost more than the rest of the work.
Trust: the backend's octets go through ``smtp.client``, which bounds them; its host name and certificate are judged by
    the context that ``open_connection`` is given.
Promise: a reply answers the group it was asked for or ends the connection; once lost or closed a connection is never
    used again; the final octets of content are written in one place, and ``committed`` says whether they were.
Sources: RFC 5321 §4.5.3.2 (timeouts), §3.8 (421), §4.1.1.10 (QUIT); RFC 2920 §3.1 (groups); RFC 3207 §4, §6;
    RFC 7435 (opportunistic TLS); Postfix's XCLIENT_README; The PROXY protocol, versions 1 and 2 (HAProxy, 2020-03-05).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Hashable, Iterator
from ipaddress import ip_address
from math import inf
from socket import SOCK_STREAM
from typing import cast

from gatepost.backend.content import Content
from gatepost.backend.settings import BackendSettings, LmtpSocket, SmtpAddress
from gatepost.errors import BackendUnavailable
from gatepost.facts import Client
from gatepost.smtp import client
from gatepost.smtp.client import BackendDefect, Capabilities, ClientEngine, Introduction
from gatepost.smtp.content import stuff
from gatepost.smtp.proxy_header import LOCAL_V2, UNKNOWN_V1, Endpoint, proxy_v1, proxy_v2
from gatepost.smtp.reply import Reply

JOIN_OCTETS = 1 << 17  # content up to this size goes out in one write
WRITE_OCTETS = 1 << 16  # smaller blocks of larger content are joined up to this size
QUIT_TIMEOUT_S = 5.0
NETWORK_ADDRESSES_MAX = 8  # of one name, tried one after the other

# A connection that has seen refusals and no message gets QUIT instead of another user: servers slow down, and hang up,
# on a client that errs (Postfix: 10 and 20 errors, 100 RSETs), and nobody pays for a stranger's guesses.
BLEMISHES_MAX = 80
REFUSAL_BLEMISHES = 10
EXIM_DELIVERIES = 10  # smtp_accept_queue_per_connection: what comes after waits for Exim's next queue run

# The parameters of MAIL and RCPT that are handed on.  AUTH= is not: we vouch for nobody's identity (RFC 4954 §5).
_PARAMETER_KEYWORDS = frozenset({"SIZE", "8BITMIME", "SMTPUTF8", "DSN"})


class ConnectionLost(BackendUnavailable):
    """The connection ended before its replies came.

    Attributes:
        reply: the 421 that announced it, if one did.
        expired: the backend kept us waiting for as long as one waits; a second attempt would make it twice as long.
        defect: the backend broke the protocol, and we ended it: it spoke unasked, or what it said was no reply.
    """

    def __init__(self, text: str, reply: Reply | None = None, *, expired: bool = False, defect: bool = False) -> None:
        super().__init__(text)
        self.reply = reply
        self.expired = expired
        self.defect = defect


class ConnectFailed(BackendUnavailable):
    """No usable connection to one address.

    Attributes:
        busy: the backend answered, with a 4yz before any command: it takes no more connections now.
        tls: the handshake failed, or TLS that is required is not offered.
    """

    def __init__(self, text: str, *, busy: bool = False, tls: bool = False) -> None:
        super().__init__(text)
        self.busy = busy
        self.tls = tls


class ClientRefused(BackendUnavailable):
    """The backend refused to be told of a client, or to greet it.  The connection is of no more use."""


class Connection(asyncio.Protocol):
    """A connection that has been greeted, once ``open_connection`` returns it.

    Attributes:
        alive: it may be used.
        capabilities: what the backend offers on this very connection; offered: the parameters among it.
        client: whom the backend was told to be at the other end, None for us; told: the attributes of XCLIENT it was
            told by.
        committed: the octets that end content were handed to the transport: from then on the message may have been
            taken, and is not sent again by us.
        deadline: when ``expire`` is due, on the loop's clock.
        deliveries: contents sent; idle_since: when it came back to the pool.
        blemishes: refusals and RSETs since a message was accepted, weighed.
        tls: protocol version, "" in plain text.
    """

    __slots__ = (
        "_drained",
        "_due",
        "_engine",
        "_future",
        "_greeting",
        "_lmtp",
        "_loop",
        "_lost",
        "_on_closed",
        "_paused",
        "_replies",
        "_settings",
        "_then",
        "_transport",
        "alive",
        "blemishes",
        "capabilities",
        "client",
        "committed",
        "deadline",
        "deliveries",
        "deliveries_max",
        "idle_since",
        "offered",
        "peer",
        "pipelining",
        "smtputf8",
        "tls",
        "told",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, settings: BackendSettings, peer: str) -> None:
        self._loop = loop
        self._settings = settings
        self._engine = ClientEngine()
        self._transport: asyncio.Transport | None = None
        self._on_closed: Callable[[Connection], None] | None = None
        self._future: asyncio.Future[list[Reply]] | None
        self._then: Callable[[Connection, Reply | None], None] | None = None
        self._replies: list[Reply] = []
        self._due = 0
        self._lmtp = False
        self._paused = False
        self._drained: asyncio.Future[None] | None = None
        self._lost: ConnectionLost | None = None
        self.alive = True
        self.blemishes = 0
        self.capabilities = Capabilities()
        self.client: Hashable = None
        self.committed = False
        self.deadline = inf
        self.deliveries = 0
        self.deliveries_max = settings.deliveries
        self.idle_since = 0.0
        self.offered: frozenset[str] = frozenset()
        self.peer = peer
        self.pipelining = False
        self.smtputf8 = False
        self.tls = ""
        self.told: frozenset[str] = frozenset()
        self._greeting: asyncio.Future[list[Reply]] = loop.create_future()  # due without being asked for
        self._future = self._greeting
        self._ask(1)

    # ---- what the pool and a delivery do

    @property
    def worn(self) -> bool:
        """It has served long enough, or has been refused too often, to serve somebody else."""
        return self.deliveries >= self.deliveries_max or self.blemishes >= BLEMISHES_MAX

    def exchange(self, octets: bytes, replies: int, timeout_s: float) -> asyncio.Future[list[Reply]]:
        """Send commands and get their replies.

        Raises:
            ConnectionLost: here or from the future.
        """
        if self._lost is not None:
            raise self._lost  # as _check(), without the call: this is the hot path
        future: asyncio.Future[list[Reply]] = self._loop.create_future()
        self._future = future
        self._ask(replies)
        self.deadline = self._loop.time() + timeout_s
        self._write(octets)
        return future

    async def send_content(self, trace_field: bytes, content: Content) -> Reply:
        """Send content behind a 354, and get the reply to it.  RFC 5321 §4.1.1.4.

        A refusal that comes before the end of content is returned too; the connection is closed then, since nobody can
        tell what the backend makes of the rest.

        Raises:
            ConnectionLost: whether the message may have been taken says ``committed``.
            StorageError: the content could not be read; the connection must be closed without its end being sent.
        """
        self._check()
        if not trace_field.endswith(b"\r\n") or b"\r\n." in trace_field:
            raise RuntimeError("a trace field is whole lines, and none of them begins with a period")
        future: asyncio.Future[list[Reply]] = self._loop.create_future()
        self._future = future
        self._ask(1)
        settings = self._settings
        try:
            if content.size_octets <= JOIN_OCTETS:
                octets = b"".join((trace_field, *_lines(content), b".\r\n"))
                self.committed = True
                self._write(octets)
            else:
                self._write(trace_field)
                for octets in _joined(_lines(content)):
                    self.deadline = self._loop.time() + settings.block_timeout_s  # RFC 5321 §4.5.3.2.5
                    self._write(octets)
                    if self._paused and not future.done():
                        self._drained = self._loop.create_future()
                        await self._drained
                    if future.done():
                        return self._early(future)
                self.committed = True
                self._write(b".\r\n")
        except BaseException:
            future.cancel()  # nobody will ask for it
            raise
        self.deadline = self._loop.time() + settings.final_timeout_s  # RFC 5321 §4.5.3.2.6
        return (await future)[0]

    def reset(self, then: Callable[[Connection, Reply | None], None]) -> None:
        """RSET.  ``then`` is called with the reply, or with None when the connection was lost.  RFC 5321 §4.1.1.5."""
        if self._future is not None or self._then is not None:
            # A reply is due to somebody who is gone; whatever came next would be taken for it.
            self.close()
        if not self.alive:
            then(self, None)
            return
        self._then = then
        self._ask(1)
        self.blemishes += 1
        self.deadline = self._loop.time() + self._settings.command_timeout_s
        self._write(client.RSET)

    def quit(self) -> None:
        """Say QUIT and close when the backend has answered, or after a short time.  RFC 5321 §4.1.1.10."""
        if not self.alive:
            return
        if self._future is not None or self._then is not None:
            self.close()
            return
        self._then = Connection._bye
        self._ask(1)
        self.deadline = self._loop.time() + min(QUIT_TIMEOUT_S, self._settings.command_timeout_s)
        self._write(client.QUIT)

    def _bye(self, _reply: Reply | None) -> None:
        self.close()

    def close(self) -> None:
        """Close at once, without a word; unfinished content stays unfinished."""
        self._lose(ConnectionLost(f"{self.peer}: closed by us"))

    def expire(self) -> None:
        """The deadline has passed.  RFC 5321 §4.5.3.2."""
        self._lose(ConnectionLost(f"{self.peer}: no answer in time", expired=True))

    def adopted(self, on_closed: Callable[[Connection], None]) -> None:
        """From now on tell its owner, once, when it is closed or lost."""
        self._on_closed = on_closed

    # ---- inside

    def _check(self) -> None:
        if self._lost is not None:
            raise self._lost

    def _ask(self, replies: int) -> None:
        if self._due:
            raise RuntimeError("one group of replies at a time")
        self._due = replies
        self._replies = []
        self._engine.expect(replies)

    def _write(self, octets: bytes) -> None:
        assert self._transport is not None
        self._transport.write(octets)

    def _early(self, future: asyncio.Future[list[Reply]]) -> Reply:
        """The backend spoke, or hung up, in the middle of content."""
        reply = future.result()[0]  # raises ConnectionLost
        lost = ConnectionLost(f"{self.peer}: it answered {reply.code} before the end of content")
        self._lose(lost)
        if reply.code < 400:
            self.committed = True  # it may believe it has the message: not sent again
            raise lost
        return reply

    def _lose(self, lost: ConnectionLost) -> None:
        if self._lost is not None:
            return
        self._lost = lost
        self.alive = False
        self.deadline = inf
        if self._transport is not None:
            self._transport.abort()
        future, self._future = self._future, None
        if future is not None and not future.done():
            future.set_exception(lost)
        self._wake()
        then, self._then = self._then, None
        on_closed, self._on_closed = self._on_closed, None
        if on_closed is not None:
            on_closed(self)
        if then is not None and then is not Connection._bye:
            then(self, None)

    def _wake(self) -> None:
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)

    def _finish(self) -> None:
        """All replies of the group are there."""
        self.deadline = inf
        future, self._future = self._future, None
        if future is not None:
            if future.done():
                # Whoever asked was cancelled: the transaction is in an unknown state.
                self.close()
                return
            future.set_result(self._replies)
            self._wake()
            return
        then, self._then = self._then, None
        if then is not None:
            then(self, self._replies[0])

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one by its methods, not by its class
        if self._lost is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._lost is not None:
            return
        engine = self._engine
        engine.receive(data)
        while (reply := engine.next_reply()) is not None:
            if isinstance(reply, BackendDefect):
                self._lose(ConnectionLost(f"{self.peer}: {reply.text}", defect=True))
                return
            if reply.code >= 400:
                if reply.code == 421:
                    # RFC 5321 §3.8: the backend closes; replies still due never come.
                    self._lose(ConnectionLost(f"{self.peer}: {reply!r}", reply))
                    return
                self.blemishes += REFUSAL_BLEMISHES
            self._replies.append(reply)
            self._due -= 1
            if not self._due:
                self._finish()
                if not self.alive:
                    return

    def eof_received(self) -> None:
        self._lose(ConnectionLost(f"{self.peer}: it closed the connection"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose(ConnectionLost(f"{self.peer}: {exc or 'the connection ended'}"))

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._wake()

    # ---- setting up

    async def greeting(self) -> Reply:
        """The reply that opens the connection.  RFC 5321 §3.1."""
        replies = await self._greeting
        return replies[0]

    async def hello(self, *, lmtp: bool, name: str = "") -> None:
        """EHLO, HELO where EHLO is refused, or LHLO; learns the capabilities.  RFC 5321 §3.2, RFC 2033 §4.1.

        Args:
            name: to say instead of our own.

        Raises:
            ConnectFailed: refused.
            ConnectionLost: the connection ended.
        """
        self._lmtp = lmtp
        name, timeout_s = name or self._settings.hello, self._settings.command_timeout_s
        reply = (await self.exchange(client.hello("LHLO" if lmtp else "EHLO", name), 1, timeout_s))[0]
        if 200 <= reply.code < 300:
            self.capabilities = client.parse_ehlo(reply)
        elif reply.code >= 500 and not lmtp and self._settings.proxy == "off":
            # RFC 5321 §4.1.4: a server that does not know EHLO.  One that was sent a PROXY header and does not know
            # that may mean the header: every answer from now on would be taken for that to the command behind it.
            reply = (await self.exchange(client.hello("HELO", name), 1, timeout_s))[0]
            self.capabilities = Capabilities()
        if not 200 <= reply.code < 300:
            raise ConnectFailed(f"{self.peer} refuses our greeting: {reply!r}", busy=reply.transient)
        keywords = self.capabilities.keywords
        self.offered = keywords & _PARAMETER_KEYWORDS
        self.pipelining = "PIPELINING" in keywords
        self.smtputf8 = "SMTPUTF8" in keywords

    def announce(self, told: Client | None) -> None:
        """Begin the connection with a PROXY header.  §2.1, §2.2.

        Args:
            told: the client whose connection it is; None for a look of our own.
        """
        assert self._transport is not None
        here = _endpoint(self._transport.get_extra_info("sockname"))
        there = _endpoint(self._transport.get_extra_info("peername"))
        v2 = self._settings.proxy == "v2"
        if told is not None:
            header = (proxy_v2 if v2 else proxy_v1)(Endpoint(*told), there)
        elif v2:
            header = LOCAL_V2
        else:
            header = UNKNOWN_V1 if here is None else proxy_v1(here, there)  # not every server knows UNKNOWN
        self.client = told
        self._write(header)

    @property
    def transferable(self) -> bool:
        """XCLIENT can make it any client's: everything that was told of the last one can be told anew."""
        return self.told <= self.capabilities.xclient

    async def introduce(self, introduction: Introduction) -> None:
        """XCLIENT, then EHLO again, which the backend answers as it would answer that client.

        The name in this EHLO is the client's, too: servers take it for the name in XCLIENT, or know only this one.

        Raises:
            ClientRefused: it is of no more use to anybody.
            ConnectionLost: the connection ended.
        """
        attributes = self.capabilities.xclient
        line = client.xclient(introduction, attributes)
        reply = (await self.exchange(line, 1, self._settings.command_timeout_s))[0]
        if not 200 <= reply.code < 300:
            raise ClientRefused(f"{self.peer} refuses XCLIENT: {reply!r}")
        self.blemishes += 1  # a server may count a further EHLO, as it counts RSET
        self.told = attributes
        self.client = introduction
        name = introduction.hello if client.is_hello_name(introduction.hello) else ""
        try:
            await self.hello(lmtp=self._lmtp, name=name)
        except ConnectFailed as failure:
            raise ClientRefused(f"{failure}, after XCLIENT") from failure

    async def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """STARTTLS and the handshake; everything learned before is forgotten.  RFC 3207 §4.2.

        Raises:
            ConnectFailed: the backend refused; ``alive`` says that the connection is still good in plain text.
            ConnectionLost: the connection ended.
        """
        settings = self._settings
        reply = (await self.exchange(client.STARTTLS, 1, settings.command_timeout_s))[0]
        if reply.code != 220:
            raise ConnectFailed(f"{self.peer} refuses STARTTLS: {reply!r}", tls=True)
        self._check()  # octets behind the 220 (response injection) have ended it.  RFC 3207 §6
        assert self._transport is not None
        try:
            transport = await self._loop.start_tls(
                self._transport,
                self,
                context,
                server_hostname=host,
                ssl_handshake_timeout=settings.connect_timeout_s,
            )
        except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
            self.close()
            raise ConnectFailed(f"{self.peer}: TLS handshake failed: {error}", tls=True) from error
        if transport is None or not self.alive:
            # It spoke inside TLS before it was asked, or is gone.
            if transport is not None:
                transport.abort()
            self._check()
            raise ConnectionLost(f"{self.peer}: the connection ended in the TLS handshake")
        self._transport = transport
        self._engine = ClientEngine()
        self.capabilities = Capabilities()
        self.tls = str(transport.get_extra_info("ssl_object").version())


def make_context(*, required: bool) -> ssl.SSLContext:
    """What TLS is spoken by with a backend.

    Args:
        required: judge the certificate by the system's authorities; else any will do, for plain text would do, too.
    """
    if required:
        return ssl.create_default_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # TLS 1.2 at least
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def open_connection(
    address: SmtpAddress | LmtpSocket,
    settings: BackendSettings,
    context: ssl.SSLContext | None,
    answered: str = "",
    told: Client | None = None,
) -> tuple[Connection, str]:
    """A connection that is ready for MAIL.

    Args:
        context: for STARTTLS; None to stay in plain text.  Whether plain text will do where TLS cannot be had is for
            settings.tls to say.
        answered: that network address of the name is tried first.
        told: the client to name in the PROXY header, where settings.proxy asks for one.

    Returns:
        The connection, and the network address it goes to.

    Raises:
        ConnectFailed: with the reason, for the operator.
    """
    connection, network_address = await _connect(address, settings, answered)
    lmtp = isinstance(address, LmtpSocket) or address.lmtp
    try:
        if settings.proxy != "off":
            connection.announce(told)
        async with asyncio.timeout(settings.greeting_timeout_s):  # RFC 5321 §4.5.3.2.1
            greeting = await connection.greeting()
        _check_greeting(connection, greeting)
        async with asyncio.timeout(settings.command_timeout_s):
            await connection.hello(lmtp=lmtp)
            if isinstance(address, SmtpAddress) and settings.tls != "off" and context is not None:
                await _secure(connection, settings, context, address)
    except TimeoutError:
        connection.close()
        raise ConnectFailed(f"{connection.peer}: no answer in time") from None
    except ConnectionLost as lost:
        raise ConnectFailed(str(lost), busy=lost.reply is not None) from lost
    except BaseException:
        connection.close()
        raise
    return connection, network_address


def _check_greeting(connection: Connection, greeting: Reply) -> None:
    """RFC 5321 §3.1: 220, or the server does not serve us."""
    if greeting.code != 220:
        raise ConnectFailed(f"{connection.peer} greets us with {greeting!r}", busy=greeting.transient)
    if " Exim " in greeting.text:
        connection.deliveries_max = min(connection.deliveries_max, EXIM_DELIVERIES)


async def _secure(
    connection: Connection, settings: BackendSettings, context: ssl.SSLContext, address: SmtpAddress
) -> None:
    """Switch to TLS where the backend offers it; insist where the settings do."""
    required = settings.tls == "required"
    if "STARTTLS" not in connection.capabilities.keywords:
        if required:
            raise ConnectFailed(f"{connection.peer} does not offer STARTTLS, and tls is required", tls=True)
        return
    try:
        await connection.start_tls(context, address.host)
    except ConnectFailed:
        if required or not connection.alive:
            raise
        return  # RFC 3207 §4: refused before anything changed; opportunistic means that plain text will do
    await connection.hello(lmtp=address.lmtp)  # RFC 3207 §4.2


async def _connect(
    address: SmtpAddress | LmtpSocket, settings: BackendSettings, answered: str
) -> tuple[Connection, str]:
    loop = asyncio.get_running_loop()
    if isinstance(address, LmtpSocket):
        peer = f"lmtp:{address.path}"
        connection = Connection(loop, settings, peer)
        try:
            async with asyncio.timeout(settings.connect_timeout_s):
                await loop.create_unix_connection(lambda: connection, address.path)
        except (OSError, TimeoutError) as error:
            raise ConnectFailed(f"{peer}: {_why(error)}") from error
        return connection, ""
    peer = f"[{address.host}]:{address.port}" if ":" in address.host else f"{address.host}:{address.port}"
    try:
        async with asyncio.timeout(settings.connect_timeout_s):
            found = await loop.getaddrinfo(address.host, address.port, type=SOCK_STREAM)
    except (OSError, TimeoutError, UnicodeError) as error:
        raise ConnectFailed(f"{peer}: the name cannot be looked up: {_why(error)}") from error
    hosts = list(dict.fromkeys(str(entry[4][0]) for entry in found))[:NETWORK_ADDRESSES_MAX]
    hosts.sort(key=lambda host: host != answered)
    trouble = "the name has no address"
    for host in hosts:
        connection = Connection(loop, settings, peer)
        try:
            async with asyncio.timeout(settings.connect_timeout_s):
                await loop.create_connection(lambda it=connection: it, host, address.port)  # type: ignore[misc]
        except (OSError, TimeoutError) as error:
            trouble = _why(error)
        else:
            return connection, host
    raise ConnectFailed(f"{peer}: {trouble}")


def _endpoint(name: object) -> Endpoint | None:
    """From what a socket says of an end; None for a Unix socket."""
    if not isinstance(name, tuple):
        return None
    return Endpoint(ip_address(str(name[0]).partition("%")[0]), int(name[1]))


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "no answer in time" if isinstance(error, TimeoutError) else str(error)


def _lines(content: Content) -> Iterator[bytes]:
    """The content as it goes over the wire: dot-stuffed where needed, its last line ended.  RFC 5321 §4.5.2.

    Raises:
        RuntimeError: a chunk is not whole lines.  A CRLF cut in two could hide a line that begins with a period.
    """
    dotted = content.dotted
    whole = True
    for chunk in content.chunks():
        if not whole:
            raise RuntimeError("content came in pieces that are not whole lines")
        whole = chunk.endswith(b"\r\n")
        yield stuff(chunk) if dotted else chunk
    if not whole:
        yield b"\r\n"


def _joined(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The same octets in fewer, larger blocks; large ones are not copied."""
    small: list[bytes] = []
    octets = 0
    for block in blocks:
        if len(block) >= WRITE_OCTETS:
            if small:
                yield b"".join(small)
                small, octets = [], 0
            yield block
            continue
        small.append(block)
        octets += len(block)
        if octets >= WRITE_OCTETS:
            yield b"".join(small)
            small, octets = [], 0
    if small:
        yield b"".join(small)
