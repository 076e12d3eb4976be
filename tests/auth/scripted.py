"""A server of lines that behaves as a test tells it to, and remembers what it was told.

    async with Scripted(b"+OK hello\\r\\n", {"USER": b"+OK\\r\\n", "PASS": silent}) as server:
        ...
        assert server.heard == [b"USER alice", b"PASS wonder"]

An answer is octets, or a coroutine function that is given the peer.  It is found by a line's first word, or its second
as in IMAP; ELSE answers every other line.  In octets %T is the tag that IMAP's last command began with.  ``HAZARDS``
are answers after which nobody can tell whether a login is good; ``patience_s`` is how long to wait with each.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from gatepost.auth.inquiry import CONVERSATION_OCTETS_MAX, LINE_OCTETS_MAX


@dataclass
class Peer:
    """Who is connected."""

    server: Scripted
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    tag: bytes = b""
    tls: bool = False

    async def say(self, octets: bytes) -> None:
        self.writer.write(octets.replace(b"%T", self.tag))
        await self.writer.drain()


Answer = bytes | Callable[[Peer], Awaitable[None]]


class _Gone(Exception):
    pass


class Scripted:
    """The server.  ``end`` ends a line; ``tls`` is for ``start_tls`` and, where ``implicit``, from the first octet."""

    def __init__(
        self,
        greeting: Answer = b"",
        answers: Mapping[str, Answer] | None = None,
        *,
        end: bytes = b"\r\n",
        tls: ssl.SSLContext | None = None,
        implicit: bool = False,
        path: Path | None = None,
    ) -> None:
        self.greeting = greeting
        self.answers = dict(answers or {})
        self.end = end
        self.tls = tls
        self.implicit = implicit
        self.path = path
        self.port = 0
        self.heard: list[bytes] = []
        self.connections = 0
        self.open_now = 0
        self.open_max = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        if self.path is not None:
            self._server = await asyncio.start_unix_server(self._connected, self.path)
        else:
            tls = self.tls if self.implicit else None
            self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=tls)
            self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

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
        self.connections += 1
        self.open_now += 1
        self.open_max = max(self.open_max, self.open_now)
        try:
            await self._talk(Peer(self, reader, writer, tls=self.implicit))
        except (_Gone, OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.open_now -= 1
            self._tasks.discard(task)
            if not writer.is_closing():
                writer.transport.abort()
            with suppress(asyncio.CancelledError):
                await self._notify()

    async def _talk(self, peer: Peer) -> None:
        await self._answer(peer, self.greeting)
        while True:
            line = (await peer.reader.readuntil(self.end)).removesuffix(self.end)
            self.heard.append(line)
            await self._notify()
            words = line.decode("latin-1").replace("\t", " ").split(" ")[:2]
            known = [word for word in (word.upper() for word in words) if word in self.answers]
            if len(words) == 2 and known and known[0] == words[1]:
                peer.tag = words[0].encode()
            await self._answer(peer, self.answers[known[0]] if known else self.answers.get("ELSE", b""))

    @staticmethod
    async def _answer(peer: Peer, answer: Answer) -> None:
        if isinstance(answer, bytes):
            await peer.say(answer)
        else:
            await answer(peer)


# ---- answers


def start_tls(octets: bytes, *, behind: bytes = b"") -> Answer:
    """Agree to TLS and begin it; ``behind`` is said in plain text after the agreement."""

    async def answer(peer: Peer) -> None:
        await peer.say(octets + behind)
        assert peer.server.tls is not None
        await peer.writer.start_tls(peer.server.tls)
        peer.tls = True

    return answer


def and_hang_up(octets: bytes) -> Answer:
    """The last that is said."""

    async def answer(peer: Peer) -> None:
        await peer.say(octets)
        peer.writer.close()
        raise _Gone

    return answer


def one_by_one(octets: bytes) -> Answer:
    """Octet by octet, each a segment of its own."""

    async def answer(peer: Peer) -> None:
        for octet in octets.replace(b"%T", peer.tag):
            await peer.say(bytes([octet]))
            await asyncio.sleep(0)

    return answer


def within_tls(inside: Answer, outside: Answer) -> Answer:
    """One answer under TLS, another in plain text."""

    async def answer(peer: Peer) -> None:
        chosen = inside if peer.tls else outside
        if isinstance(chosen, bytes):
            await peer.say(chosen)
        else:
            await chosen(peer)

    return answer


async def silent(peer: Peer) -> None:
    """Say nothing, for as long as the other side waits."""
    await peer.reader.read(-1)


async def hang_up(peer: Peer) -> None:
    peer.writer.transport.abort()
    raise _Gone


async def half_close(peer: Peer) -> None:
    """Close our side only, and wait."""
    peer.writer.write_eof()
    await peer.reader.read(-1)


async def flood(peer: Peer) -> None:
    """Lines without end."""
    while not peer.writer.is_closing():
        await peer.say(b"* +OK 250-what a day\r\n" * 1000)
    raise _Gone


async def half_a_line(peer: Peer) -> None:
    await peer.say(b"+O")
    await hang_up(peer)


HAZARDS: dict[str, Answer] = {
    "silent": silent,
    "hangs up": hang_up,
    "closes its side": half_close,
    "floods": flood,
    "hangs up in a line": half_a_line,
    "line too long": b"+OK " + b"x" * LINE_OCTETS_MAX + b"\r\n",
    "line without end": b"x" * LINE_OCTETS_MAX,
    "too much": (b"x" * 1000 + b"\r\n") * (CONVERSATION_OCTETS_MAX // 1000 + 1),
    "empty line": b"\r\n",
    "rubbish": b"\x00\xff\x80\x15\x03\x01\x00\x02\x02\x28\r\n",
    "another protocol": b"HTTP/1.1 400 Bad Request\r\n",
    "bare LF": b"+OK\n%T OK\n250 Ok\n235 2.7.0 Ok\n",
    "bare LF within": b"+OK\n+OK\r\n",
}


def patience_s(hazard: str) -> float:
    return 0.2 if hazard in ("silent", "bare LF") else 20.0
