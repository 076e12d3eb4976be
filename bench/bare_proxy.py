"""A bare trial of the gate's shape, on uvloop: bare_proxy.py PORT SINK_PORT.

Why: it shows what Python costs here at the least for a coroutine a session, two workers on one port, a policy at RCPT
    and a transaction passed on live.  No log, no journal, no limits, no timeouts, no grammar, no safety: all that a
    gate of this shape does for anybody comes on top.
Trust: the benchmark's own generator and sink, on loopback.  Never put it before a mail server.
Promise: MAIL is answered here; MAIL and RCPT go to a kept connection of the sink at the RCPT, DATA and the content when
    they come, and every 250 after RCPT and content is the sink's own.  The workers end with the first process.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
from typing import cast

import uvloop

WORKERS = 2
BACKLOG = 4096


class Peer(asyncio.Protocol):
    """One connection, whichever side: octets wait until the one coroutine that reads asks for them."""

    transport: asyncio.Transport
    host = ""

    def __init__(self) -> None:
        self.closed = False
        self.received = bytearray()
        self._loop = asyncio.get_running_loop()
        self._mark = b""
        self._waiter: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is one by its methods, not by its class

    def data_received(self, data: bytes) -> None:
        start = max(0, len(self.received) - len(self._mark) + 1)
        self.received += data
        if self._waiter is not None and (at := self.received.find(self._mark, start)) >= 0:
            waiter, self._waiter = self._waiter, None
            waiter.set_result(at)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            waiter.set_exception(ConnectionResetError())

    async def until(self, mark: bytes) -> bytearray:
        """What was received up to the mark and with it."""
        if (at := self.received.find(mark)) < 0:
            if self.closed:
                raise ConnectionResetError
            self._mark, self._waiter = mark, self._loop.create_future()
            at = await self._waiter
        end = at + len(mark)
        if end == len(self.received):
            taken, self.received = self.received, bytearray()
        else:
            taken = self.received[:end]
            del self.received[:end]
        return taken

    async def reply(self) -> bytearray:
        """The last line of one."""
        while (line := await self.until(b"\r\n"))[3:4] == b"-":
            pass
        return line


class Client(Peer):
    """One session: a coroutine from the greeting to the end."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self._pool = pool

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.host = transport.get_extra_info("peername")[0]
        self._task = self._loop.create_task(self._session())

    async def _session(self) -> None:
        backend: Peer | None = None
        mail = bytearray()
        say = self.transport.write
        try:
            say(b"220 bare.bench.test ESMTP\r\n")
            while True:
                line = await self.until(b"\r\n")
                verb = line[:4].upper()
                if verb == b"MAIL":
                    mail = line
                    say(b"250 2.1.0 Ok\r\n")
                elif verb == b"RCPT":
                    domain = line[line.find(b"@") + 1 : line.find(b">")].lower()
                    if domain != b"example.com" and self.host != "127.0.0.2":
                        say(b"550 5.7.1 Relaying is prohibited\r\n")
                        continue
                    if backend is None:
                        backend = await self._pool.take()
                        backend.transport.write(mail + line)
                        await backend.reply()
                    else:
                        backend.transport.write(line)
                    say(await backend.reply())
                elif verb == b"DATA" and backend is not None:
                    backend.transport.write(line)
                    say(await backend.reply())
                    backend.transport.write(await self.until(b"\r\n.\r\n"))
                    say(await backend.reply())
                    self._pool.kept.append(backend)
                    backend = None
                elif verb == b"EHLO":
                    say(b"250-bare.bench.test\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 ENHANCEDSTATUSCODES\r\n")
                elif verb == b"NOOP":
                    say(b"250 2.0.0 Ok\r\n")
                elif verb == b"QUIT":
                    say(b"221 2.0.0 Bye\r\n")
                    break
                else:
                    say(b"502 5.5.1 Not in this trial\r\n")
        except ConnectionError:
            pass
        if backend is not None:  # in the middle of a transaction
            backend.transport.close()
        self.transport.close()


class Pool:
    """Connections to the sink after EHLO: as many as there were transactions at once."""

    def __init__(self, port: int) -> None:
        self.kept: list[Peer] = []
        self._port = port

    async def take(self) -> Peer:
        while self.kept:
            if not (kept := self.kept.pop()).closed:
                return kept
        _, fresh = await asyncio.get_running_loop().create_connection(Peer, "127.0.0.1", self._port)
        await fresh.reply()
        fresh.transport.write(b"EHLO bare.bench.test\r\n")
        await fresh.reply()
        return fresh


async def work(port: int, sink_port: int, parent: int) -> None:
    """One worker, until the first process closes its end of the pipe."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_reader(parent, stop.set)
    pool = Pool(sink_port)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", port))
    await loop.create_server(lambda: Client(pool), sock=listener, backlog=BACKLOG)
    gc.freeze()
    await stop.wait()


def main(port: int, sink_port: int) -> None:
    gc.set_threshold(50_000, 20, 50)  # as the gate
    parent, held = os.pipe()
    for _ in range(WORKERS):
        if os.fork() == 0:
            os.close(held)
            uvloop.run(work(port, sink_port, parent))
            return
    os.wait()  # one that ended takes the others with it


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
