"""A worker for the supervisor's tests: it greets each connection with who it is, and holds it while it is "in content".

What the configuration's text asks of it: "refuse", "die", "hang", "garble".
A client that sends "content" is answered "go", and "done" when it sends "end"; a drain waits for it.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import signal
import socket
import time

from gatepost.gate.channel import Channel, Configure, Drain, Drained, Ready, Refused, Status


class FakeWorker:
    def __init__(self, index: int, channel: Channel) -> None:
        self.index = index
        self.channel = channel
        self.generation = 0
        self.servers: list[asyncio.Server] = []
        self.in_content = 0
        self.idle: set[asyncio.StreamWriter] = set()

    async def run(self) -> None:
        self.alive = asyncio.get_running_loop().create_task(self.say_so())
        while (received := await self.channel.receive()) is not None:
            if isinstance(received.message, Configure):
                await self.configure(received.message, received.descriptors)
            elif isinstance(received.message, Drain):
                await self.drain(received.message.patience_s)
                return

    async def say_so(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            await self.channel.send(Status(self.in_content))

    async def configure(self, message: Configure, descriptors: list[int]) -> None:
        words = os.pread(descriptors[0], 1000, 0).decode().split()
        os.close(descriptors[0])
        sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors[1:]]
        if "die" in words:
            os._exit(3)
        if "hang" in words:
            time.sleep(30)  # noqa: ASYNC251  as a worker does that hangs
        if "garble" in words:
            self.channel._socket.send(b'["ready",{"generation":"soon"}]')
        if "refuse" in words:
            await self.channel.send(Refused(message.generation, "gatepost.toml:7: not like this"))
            return
        for server in self.servers:
            server.close()
        self.generation = message.generation
        self.servers = [
            await asyncio.start_server(functools.partial(self.serve, listening.name), sock=sock)
            for listening, sock in zip(message.listeners, sockets, strict=True)
        ]
        await self.channel.send(Ready(message.generation))

    async def serve(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.idle.add(writer)
        try:
            writer.write(f"{self.index} {os.getpid()} {self.generation} {name}\n".encode())
            if (await reader.readline()) == b"content\n":
                self.idle.discard(writer)
                self.in_content += 1
                await self.channel.send(Status(self.in_content))
                writer.write(b"go\n")
                if (await reader.readline()) == b"end\n":
                    writer.write(b"done\n")
                    await writer.drain()
                self.in_content -= 1
        except ConnectionError:
            pass
        finally:
            self.idle.discard(writer)
            writer.close()

    async def drain(self, patience_s: float) -> None:
        for server in self.servers:
            server.close()
        for writer in list(self.idle):
            writer.close()
        shorter = asyncio.get_running_loop().create_task(self.channel.receive())
        end_s = time.monotonic() + patience_s
        while self.in_content and time.monotonic() < end_s and not shorter.done():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        shorter.cancel()
        await self.channel.send(Drained(self.in_content))


async def main() -> None:
    parser = argparse.ArgumentParser()
    for option in ("--channel", "--metrics", "--occupancy", "--index", "--workers"):
        parser.add_argument(option, type=int, required=True)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    await FakeWorker(options.index, Channel(socket.socket(fileno=options.channel))).run()
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
