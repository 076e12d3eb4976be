"""How much of the public Internet is it: address space counted as people count it.

Why: a grant to the office and a grant to the world differ in nothing but their size.
Trust: networks from an administrator's file.
Promise: pure.  An address that no stranger can have counts for nothing; no address counts twice.
Sources: RFC 6890 (special addresses), RFC 4291 §2.4 and §2.5.5.2, RFC 6177 (one site).
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple

IPNetwork = IPv4Network | IPv6Network

Range = tuple[int, int, int]
"""IP version, first address and the one behind the last, as numbers."""

_NOT_PUBLIC_IPV4 = (
    IPv4Network("0.0.0.0/8"),
    IPv4Network("10.0.0.0/8"),
    IPv4Network("100.64.0.0/10"),
    IPv4Network("127.0.0.0/8"),
    IPv4Network("169.254.0.0/16"),
    IPv4Network("172.16.0.0/12"),
    IPv4Network("192.0.0.0/24"),
    IPv4Network("192.0.2.0/24"),
    IPv4Network("192.168.0.0/16"),
    IPv4Network("198.18.0.0/15"),
    IPv4Network("198.51.100.0/24"),
    IPv4Network("203.0.113.0/24"),
    IPv4Network("224.0.0.0/3"),
)
_PUBLIC_IPV6 = IPv6Network("2000::/3")  # RFC 4291 §2.4: all the unicast addresses that are given out
_DOCUMENTATION_IPV6 = IPv6Network("2001:db8::/32")
MAPPED = IPv6Network("::ffff:0:0/96")  # RFC 4291 §2.5.5.2
_SITE_SHIFT = 80  # RFC 6177: one site gets a /48
IPV4_END, IPV6_END = 1 << 32, 1 << 128


def range_of(network: IPNetwork) -> Range:
    """All addresses of a network."""
    return network.version, int(network.network_address), int(network.broadcast_address) + 1


def inside(network: IPNetwork, other: IPNetwork) -> bool:
    """Whether every address of a network is in another one."""
    family, first, end = range_of(network)
    version, begin, behind = range_of(other)
    return family == version and begin <= first and end <= behind


def _public_space() -> tuple[Range, ...]:
    """The public addresses, in order."""
    out: list[Range] = []
    first = 0
    for special in _NOT_PUBLIC_IPV4:
        _, begin, end = range_of(special)
        if first < begin:
            out.append((4, first, begin))
        first = end
    _, begin, end = range_of(_PUBLIC_IPV6)
    _, hole, hole_end = range_of(_DOCUMENTATION_IPV6)
    return (*out, (6, begin, hole), (6, hole_end, end))


_PUBLIC_SPACE = _public_space()


def public_parts(ranges: Iterable[Range]) -> list[Range]:
    """The public parts of these."""
    return [
        (version, max(first, begin), min(end, behind))
        for version, first, end in ranges
        for family, begin, behind in _PUBLIC_SPACE
        if family == version and first < behind and begin < end
    ]


class Extent(NamedTuple):
    """How much public address space there is: IPv4 addresses, and IPv6 sites (/48), each counted once."""

    addresses: int = 0
    sites: int = 0

    def exceeds(self, public_trust: int) -> bool:
        """Whether it is more than the configuration allows: so many addresses, and as many sites."""
        return self.addresses > public_trust or self.sites > public_trust

    def __str__(self) -> str:
        """Such as "131,072 public addresses"; an IPv6 site is a /48."""
        parts = []
        if self.addresses or not self.sites:
            parts.append(f"{self.addresses:,} public addresses" if self.addresses != 1 else "1 public address")
        if self.sites:
            parts.append(f"{self.sites:,} public IPv6 sites (/48)" if self.sites != 1 else "1 public IPv6 site (/48)")
        return " and ".join(parts)


def extent(ranges: Iterable[Range]) -> Extent:
    """The public addresses in ranges that do not overlap."""
    public = public_parts(ranges)
    addresses = sum(end - first for version, first, end in public if version == 4)
    sites, counted = 0, -1
    for first, last in sorted(
        (begin >> _SITE_SHIFT, (end - 1) >> _SITE_SHIFT) for six, begin, end in public if six == 6
    ):
        if last > counted:
            sites += last - max(first, counted + 1) + 1
            counted = last
    return Extent(addresses, sites)


def public_extent(network: IPNetwork) -> Extent:
    """The public addresses in a network; one of mapped addresses means IPv4."""
    version, first, end = range_of(network)
    if inside(network, MAPPED):
        version, first, end = 4, first & (IPV4_END - 1), ((end - 1) & (IPV4_END - 1)) + 1
    return extent([(version, first, end)])
