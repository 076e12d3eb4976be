"""What a backend is configured to be.

Why: one frozen value a backend; ``config`` builds it, ``backend`` uses it, nobody else interprets addresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class SmtpAddress(NamedTuple):
    """host: DNS name or IP address; a DNS name is looked up at each new connection."""

    host: str
    port: int
    lmtp: bool = False


class LmtpSocket(NamedTuple):
    """A Unix socket that speaks LMTP.  RFC 2033."""

    path: str


class EmbeddedMailboxes(NamedTuple):
    """Gatepost's own Maildirs below this directory."""

    directory: str


BackendAddress = SmtpAddress | LmtpSocket | EmbeddedMailboxes


@dataclass(frozen=True, slots=True)
class BackendSettings:
    """One [backend.NAME] table.

    Attributes:
        addresses: tried in order.  An embedded mailbox stands alone.
        tls: "off", "opportunistic" (STARTTLS where offered, certificate not judged) or "required" (judged).
        connections: at most so many at once, in this process.
        hello: the name we say in EHLO.
        connect_timeout_s: TCP and TLS, each address; greeting_timeout_s, command_timeout_s, data_timeout_s,
            block_timeout_s, final_timeout_s: RFC 5321 §4.5.3.2.1 to .6.
        idle_s: a pooled connection unused for so long is closed with QUIT.
        deliveries: after so many transactions a connection is closed with QUIT.
        waiters: so many transactions wait for a connection at most; wait_timeout_s: for so long at most.
        park_after_s: a transaction that has held a connection for so long while its client dawdles must lend it to
            one that waits.
        xclient: tell the backend of each transaction's client by XCLIENT, where it offers that.
        proxy: "off", or the version of the PROXY header ("v1", "v2") that begins each connection and names the client
            whose connection it is.  Not beside xclient.
    """

    name: str
    addresses: tuple[BackendAddress, ...]
    where: str = ""
    tls: str = "opportunistic"
    connections: int = 100
    hello: str = "localhost"
    connect_timeout_s: float = 10.0
    greeting_timeout_s: float = 60.0
    command_timeout_s: float = 300.0
    data_timeout_s: float = 120.0
    block_timeout_s: float = 180.0
    final_timeout_s: float = 600.0
    idle_s: float = 30.0
    deliveries: int = 1000
    waiters: int = 10_000
    wait_timeout_s: float = 30.0
    park_after_s: float = 1.0
    xclient: bool = False
    proxy: str = "off"
