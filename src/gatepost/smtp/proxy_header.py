"""The PROXY header that begins a connection to a server: whose connection it really is.

Why: a backend that takes it sees the client's address instead of the gate's, before SMTP begins.
Trust: the addresses are values that were parsed; nothing that a client wrote gets in here.
Promise: pure; a header is at most 107 octets in version 1 and 52 in version 2, and both of its ends are of one family.
Sources: The PROXY protocol, versions 1 and 2 (HAProxy, 2020-03-05), §2.1 and §2.2.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

# §2.1: "UNKNOWN" where there is no TCP connection to tell of.
UNKNOWN_V1: Final = b"PROXY UNKNOWN\r\n"
_SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
# §2.2: version 2, command LOCAL: the sender speaks for itself; no addresses.
LOCAL_V2: Final = _SIGNATURE + b"\x20\x00\x00\x00"
# §2.2: version 2, command PROXY; TCP over IPv4 and 12 octets of addresses and ports, TCP over IPv6 and 36.
_TCP4: Final = _SIGNATURE + b"\x21\x11\x00\x0c"
_TCP6: Final = _SIGNATURE + b"\x21\x21\x00\x24"


class Endpoint(NamedTuple):
    """One end of a TCP connection."""

    address: IPv4Address | IPv6Address
    port: int


def proxy_v1(source: Endpoint, destination: Endpoint | None) -> bytes:
    """§2.1: one line of text.

    Args:
        source: the client.
        destination: what it is connected to, as far as known; one of another family is told as the unspecified address.
    """
    destination = _beside(source, destination)
    family = "TCP4" if source.address.version == 4 else "TCP6"
    line = f"PROXY {family} {source.address} {destination.address} {source.port} {destination.port}\r\n"
    return line.encode("ascii")


def proxy_v2(source: Endpoint, destination: Endpoint | None) -> bytes:
    """§2.2: the same, binary."""
    destination = _beside(source, destination)
    return b"".join(
        (
            _TCP4 if source.address.version == 4 else _TCP6,
            source.address.packed,
            destination.address.packed,
            source.port.to_bytes(2, "big"),
            destination.port.to_bytes(2, "big"),
        )
    )


def _beside(source: Endpoint, destination: Endpoint | None) -> Endpoint:
    """A destination of the source's family: a header has room for one family only."""
    if destination is not None and destination.address.version == source.address.version:
        return destination
    unspecified = IPv4Address(0) if source.address.version == 4 else IPv6Address(0)
    return Endpoint(unspecified, destination.port if destination is not None else 0)
