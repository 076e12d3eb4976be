"""A backend that behaves as a test tells it to, and remembers what it was told.

    async with Scripted() as server:
        server.on["RCPT"] = lambda session, argument: b"550 5.1.1 No such user"
        ...
        assert server.messages[0].content == ...

By default it is a well-behaved ESMTP server.  A rule in ``on`` is asked instead of the default for one verb; besides
the verbs of commands there are GREETING, BLOCK (some octets of content came) and CONTENT (all of it is there).  A rule
returns the octets of the reply, to which CRLF is added unless they end in LF, or None for no reply; it may be a
coroutine function; it may call ``session.hang_up()``.
"""

from __future__ import annotations

import asyncio
import inspect
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

KEYWORDS = ("PIPELINING", "SIZE 52428800", "8BITMIME", "SMTPUTF8", "DSN", "ENHANCEDSTATUSCODES")

Answer = bytes | None
Rule = Callable[["Session", bytes], Answer | Awaitable[Answer]]


class _HungUp(Exception):
    pass


@dataclass
class Message:
    """One message that was accepted."""

    mail: bytes
    recipients: list[bytes]
    content: bytes
    session: Session


@dataclass
class Session:
    """One connection, as the backend saw it."""

    server: Scripted
    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    commands: list[bytes] = field(default_factory=list)
    together: list[int] = field(default_factory=list)
    """How many whole commands had arrived when the first of them was read."""
    mail: bytes | None = None
    recipients: list[bytes] = field(default_factory=list)
    content: bytes = b""
    tls: bool = False
    ended: bool = False
    """The client has closed its side."""

    def hang_up(self) -> None:
        """Close at once; nothing more is read or sent."""
        self.writer.transport.abort()
        raise _HungUp

    def hang_up_soon(self) -> None:
        """Close when what was sent has gone out; nothing more is read."""
        self.writer.close()
        raise _HungUp

    def send(self, octets: bytes) -> None:
        self.writer.write(octets)

    @property
    def verbs(self) -> list[str]:
        return [command.split(b" ")[0].decode() for command in self.commands]


class Scripted:
    """The server.  ``lmtp``: LHLO, and one reply a recipient."""

    def __init__(
        self,
        *,
        keywords: tuple[str, ...] = KEYWORDS,
        lmtp: bool = False,
        tls: ssl.SSLContext | None = None,
        path: Path | None = None,
    ) -> None:
        self.keywords = keywords
        self.lmtp = lmtp
        self.tls = tls
        self.path = path
        self.port = 0
        self.on: dict[str, Rule] = {}
        self.sessions: list[Session] = []
        self.messages: list[Message] = []
        self.open = 0
        self.open_max = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; again on the same port after ``stop``."""
        if self.path is not None:
            self._server = await asyncio.start_unix_server(self._connected, self.path, limit=1 << 20)
        else:
            self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port, limit=1 << 20)
            self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse connections, and cut those there are."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        for session in self.sessions:
            session.writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something to have happened here."""
        async with asyncio.timeout(20), self._changed:
            await self._changed.wait_for(condition)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        session = Session(self, len(self.sessions), reader, writer)
        self.sessions.append(session)
        self.open += 1
        self.open_max = max(self.open_max, self.open)
        try:
            await self._talk(session)
        except (_HungUp, OSError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            pass  # stop()
        finally:
            self.open -= 1
            session.ended = True
            self._tasks.discard(task)
            if not writer.is_closing():
                writer.transport.abort()
            await self._notify()

    async def _answer(self, session: Session, name: str, argument: bytes, default: bytes) -> bytes:
        rule = self.on.get(name)
        answer: Answer = default
        if rule is not None:
            found = rule(session, argument)
            answer = await found if inspect.isawaitable(found) else found
        await self._notify()
        if not answer:
            return b""
        session.send(answer if answer.endswith(b"\n") else answer + b"\r\n")
        await session.writer.drain()
        return answer

    async def _talk(self, session: Session) -> None:
        await self._answer(session, "GREETING", b"", b"220 scripted ESMTP")
        while True:
            line = await session.reader.readuntil(b"\r\n")
            waiting = bytes(session.reader._buffer)  # type: ignore[attr-defined]
            session.together.append(1 + waiting.count(b"\r\n"))
            line = line[:-2]
            session.commands.append(line)
            verb, _, argument = line.partition(b" ")
            name = verb.decode("latin-1")
            handler = getattr(self, f"_{name.lower()}", None)
            if handler is None:
                await self._answer(session, name, argument, b"500 5.5.1 What?")
            else:
                await handler(session, argument)

    async def _ehlo(self, session: Session, argument: bytes) -> None:
        if self.lmtp:
            await self._answer(session, "EHLO", argument, b"500 5.5.1 This is LMTP")
        else:
            await self._hello(session, "EHLO", argument)

    async def _lhlo(self, session: Session, argument: bytes) -> None:
        if self.lmtp:
            await self._hello(session, "LHLO", argument)
        else:
            await self._answer(session, "LHLO", argument, b"500 5.5.1 This is SMTP")

    async def _hello(self, session: Session, name: str, argument: bytes) -> None:
        keywords = list(self.keywords)
        if self.tls is not None and not session.tls:
            keywords.append("STARTTLS")
        lines = ["scripted", *keywords]
        text = "".join(f"250{'-' if n < len(lines) else ' '}{line}\r\n" for n, line in enumerate(lines, 1))
        session.mail, session.recipients = None, []
        await self._answer(session, name, argument, text.encode())

    async def _helo(self, session: Session, argument: bytes) -> None:
        await self._answer(session, "HELO", argument, b"250 scripted")

    async def _mail(self, session: Session, argument: bytes) -> None:
        if session.mail is not None:
            session.send(b"503 5.5.1 A transaction is open\r\n")
        elif (await self._answer(session, "MAIL", argument, b"250 2.1.0 Ok")).startswith(b"2"):
            session.mail = argument

    async def _rcpt(self, session: Session, argument: bytes) -> None:
        if session.mail is None:
            session.send(b"503 5.5.1 MAIL first\r\n")
        elif (await self._answer(session, "RCPT", argument, b"250 2.1.5 Ok")).startswith(b"2"):
            session.recipients.append(argument)

    async def _data(self, session: Session, argument: bytes) -> None:
        if not session.recipients:
            session.send(b"554 5.5.1 No valid recipients\r\n")
            return
        if not (await self._answer(session, "DATA", argument, b"354 Go ahead")).startswith(b"354"):
            return
        octets = bytearray()
        while octets != b".\r\n" and not octets.endswith(b"\r\n.\r\n"):
            block = await session.reader.read(1 << 16)
            if not block:
                session.hang_up()
            octets += block
            session.content = bytes(octets[:1000])
            await self._answer(session, "BLOCK", block, b"")
        lines = bytes(octets[:-3]).split(b"\r\n")
        content = b"\r\n".join(line[1:] if line.startswith(b".") else line for line in lines)
        message = Message(session.mail or b"", session.recipients, content, session)
        session.mail, session.recipients = None, []
        queued = b"250 2.0.0 Queued as %d" % (len(self.messages) + 1)
        if self.lmtp:
            queued = b"\r\n".join(b"250 2.0.0 Stored for " + recipient for recipient in message.recipients)
        if (await self._answer(session, "CONTENT", content, queued)).startswith(b"2"):
            self.messages.append(message)
            await self._notify()

    async def _rset(self, session: Session, argument: bytes) -> None:
        session.mail, session.recipients = None, []
        await self._answer(session, "RSET", argument, b"250 2.0.0 Ok")

    async def _noop(self, session: Session, argument: bytes) -> None:
        await self._answer(session, "NOOP", argument, b"250 2.0.0 Ok")

    async def _quit(self, session: Session, argument: bytes) -> None:
        await self._answer(session, "QUIT", argument, b"221 2.0.0 Bye")
        await session.writer.drain()
        raise _HungUp

    async def _starttls(self, session: Session, argument: bytes) -> None:
        answer = await self._answer(session, "STARTTLS", argument, b"220 2.0.0 Go ahead")
        if not answer.startswith(b"220"):
            return
        assert self.tls is not None
        await session.writer.start_tls(self.tls)
        session.tls = True
        session.mail, session.recipients = None, []
