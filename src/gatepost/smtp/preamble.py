"""What comes before SMTP: the PROXY header, by which a listed proxy tells who the client really is.

Why: behind a load balancer every client has the balancer's address.  Whoever decides on that address relays for all.
Trust: the caller feeds octets of listed proxies only; a proxy may still be misconfigured, or be spoken through.
Promise: never more than a header's worth of octets is held; nothing is guessed: a header is exact or a defect, and the
    octets behind it come back untouched.  A mapped IPv6 address is the IPv4 address.
Sources: The PROXY protocol, versions 1 and 2 (HAProxy, 2020-03-05), §2.1 and §2.2.
    Stricter: one space between words, no datagrams, at most 4096 octets.  Type-length-values are passed over.
"""

from __future__ import annotations

import re
from enum import Enum
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

V1_OCTETS_MAX = 107  # §2.1, CRLF included
V2_OCTETS_MAX = 4096  # header, addresses (216 octets at most) and type-length-values

_V1_SIGNATURE = b"PROXY "
_V2_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
_V2_HEADER_OCTETS = 16
_PORT = rb"(0|[1-9][0-9]{0,4})"  # digits without leading zeros, in ASCII
_V1_TCP4 = re.compile(rb"PROXY TCP4 ([0-9.]{7,15}) ([0-9.]{7,15}) " + _PORT + rb" " + _PORT)
_V1_TCP6 = re.compile(rb"PROXY TCP6 ([0-9A-Fa-f:.]{2,45}) ([0-9A-Fa-f:.]{2,45}) " + _PORT + rb" " + _PORT)
_V1_UNKNOWN = re.compile(rb"PROXY UNKNOWN(?: [^\r\n]*)?")

# §2.2: family and transport to the length of the address block.
_V2_ADDRESS_OCTETS: Final = {0x00: 0, 0x11: 12, 0x21: 36, 0x31: 216}


class Need(Enum):
    """The type of NEED, its only value: the header is not complete, feed more."""

    NEED = "need"


NEED: Final = Need.NEED


class ProxyHeader(NamedTuple):
    """A complete header.

    Attributes:
        address: the client's address, None where the proxy does not tell.
        port: the client's port, 0 where ``address`` is None.
        rest: octets behind the header: they are the client's.
        relayed: False where the proxy speaks for itself (LOCAL, as health checks do).  Where it is True and ``address``
            is None, a client is connected whose address is lost: it must not inherit the proxy's own rights.
    """

    address: IPv4Address | IPv6Address | None
    port: int
    rest: bytes
    relayed: bool = True


class ProxyDefect(NamedTuple):
    """No acceptable header: close the connection.  §2: the receiver must not guess.  ``text`` is for the log."""

    text: str


class _Wrong(ValueError):
    """Why the header is refused."""


class ProxyParser:
    """Reads one header from octets in whatever pieces they come; spent once it gave an answer other than NEED."""

    __slots__ = ("_octets",)

    def __init__(self) -> None:
        self._octets = bytearray()

    def feed(self, octets: bytes) -> Need | ProxyHeader | ProxyDefect:
        """Take octets in, and say what they make.

        Args:
            octets: from the proxy; may hold the whole header, a piece of it, or more than it.
        """
        self._octets += octets
        held = self._octets
        try:
            if held.startswith(_V2_SIGNATURE[: len(held)]):
                return _read_v2(held)
            if held.startswith(_V1_SIGNATURE[: len(held)]):
                return _read_v1(held)
        except ValueError as error:
            return ProxyDefect(str(error))
        return ProxyDefect("the connection does not begin with a PROXY header")


def _read_v1(held: bytearray) -> Need | ProxyHeader:
    """§2.1: one line of text."""
    end = held.find(b"\n", 0, V1_OCTETS_MAX)
    if end < 0:
        if len(held) >= V1_OCTETS_MAX:
            raise _Wrong(f"the PROXY line is longer than {V1_OCTETS_MAX} octets")
        return NEED
    if held[end - 1] != 0x0D:
        raise _Wrong("the PROXY line ends in a bare LF")
    line, rest = bytes(held[: end - 1]), bytes(held[end + 1 :])
    if _V1_UNKNOWN.fullmatch(line):
        return ProxyHeader(None, 0, rest)  # §2.1: whatever stands behind UNKNOWN is ignored
    match = _V1_TCP4.fullmatch(line)
    if match is not None:
        source: IPv4Address | IPv6Address = IPv4Address(match[1].decode("ascii"))
        IPv4Address(match[2].decode("ascii"))
    else:
        match = _V1_TCP6.fullmatch(line)
        if match is None:
            raise _Wrong("the PROXY line is malformed")
        source = IPv6Address(match[1].decode("ascii"))
        IPv6Address(match[2].decode("ascii"))
    port = int(match[3])
    if max(port, int(match[4])) > 65535:
        raise _Wrong("a port of the PROXY line is above 65535")
    return ProxyHeader(unmapped(source), port, rest)


def _read_v2(held: bytearray) -> Need | ProxyHeader:
    """§2.2: signature, version and command, family and transport, length, addresses, type-length-values."""
    if len(held) > 12 and held[12] not in (0x20, 0x21):
        raise _Wrong(f"PROXY version and command {held[12]:#04x} are not known")
    if len(held) < _V2_HEADER_OCTETS:
        return NEED
    local = held[12] == 0x20
    length = int.from_bytes(held[14:16], "big")
    end = _V2_HEADER_OCTETS + length
    if end > V2_OCTETS_MAX:
        raise _Wrong(f"the PROXY header is longer than {V2_OCTETS_MAX} octets")
    if not local:  # §2.2: of LOCAL, family and addresses are ignored
        address_octets = _V2_ADDRESS_OCTETS.get(held[13])
        if address_octets is None:
            raise _Wrong(f"PROXY family and transport {held[13]:#04x} are not a stream's")
        if length < address_octets:
            raise _Wrong("the PROXY header is shorter than its addresses")
    if len(held) < end:
        return NEED
    rest = bytes(held[end:])
    if local:
        return ProxyHeader(None, 0, rest, relayed=False)
    block = bytes(held[_V2_HEADER_OCTETS:end])
    if held[13] == 0x11:
        return ProxyHeader(IPv4Address(block[:4]), int.from_bytes(block[8:10], "big"), rest)
    if held[13] == 0x21:
        return ProxyHeader(unmapped(IPv6Address(block[:16])), int.from_bytes(block[32:34], "big"), rest)
    return ProxyHeader(None, 0, rest)  # unspecified, or a Unix socket


def unmapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """::ffff:192.0.2.1 is 192.0.2.1: rules about networks must see the client as it is."""
    return address if isinstance(address, IPv4Address) else address.ipv4_mapped or address
