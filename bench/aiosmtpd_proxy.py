"""A small proxy on aiosmtpd's Proxy handler with the benchmark's policy: aiosmtpd_proxy.py PORT SINK_PORT."""

from __future__ import annotations

import asyncio
import signal
import sys

from aiosmtpd.handlers import Proxy
from aiosmtpd.smtp import SMTP


class Policy(Proxy):
    async def handle_RCPT(self, server, session, envelope, address, rcpt_options):  # noqa: N802
        if session.peer[0] != "127.0.0.2" and not address.lower().endswith("@example.com"):
            return "550 5.7.1 Relaying is prohibited"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 Ok"


async def main(port: int, sink_port: int) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    server = await loop.create_server(
        lambda: SMTP(Policy("127.0.0.1", sink_port), hostname="aiosmtpd.bench.test", data_size_limit=100 << 20),
        "127.0.0.1",
        port,
        backlog=4096,
    )
    async with server:
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
