"""What an address is to this host: its default route, the address of a bridge, its own.

Why: where one of these is the client's address, something on this host or right beside it has most likely put it in the
    place of the client's own: a container's bridge and its userland proxy, a router that masquerades.
Trust: the kernel's own tables; what cannot be read is not known, and then no address is anything special.
Promise: a look costs some ten system calls and is repeated after ``LOOK_S`` at the earliest: bridges come and go.
Sources: route(8) and proc(5) for /proc/net/route, ipv6_route and if_inet6; netdevice(7) for SIOCGIFCONF.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import socket
import struct
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from gatepost.facts import IPAddress

LOOK_S = 60.0
TABLE_OCTETS_MAX = 1 << 20  # of a kernel's table; a router with the routes of the Internet has longer ones
INTERFACES_MAX = 1024

_PROC, _SYS = Path("/proc/net"), Path("/sys/class/net")
_SIOCGIFCONF = 0x8912
_IFCONF = struct.Struct("iP")
_IFREQ_OCTETS = 40 if struct.calcsize("P") == 8 else 32
_IFREQ = struct.Struct("16sHH4s")  # name, family, port, IPv4 address; the rest is not looked at


class Interfaces:
    """What is known of this host's network.

    Args:
        now: seconds of a clock that does not go back.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._looked_at: float | None = None
        self._known: dict[IPAddress, str] = {}

    def what_is(self, address: IPAddress) -> str:
        """In words, such as "the address of this host's bridge docker0"; "" for an address like any other."""
        now = self._now()
        if self._looked_at is None or now - self._looked_at >= LOOK_S:
            self._looked_at, self._known = now, dict(look())
        if address.is_loopback:
            return "this host itself"
        return self._known.get(address, "")


def look() -> Iterator[tuple[IPAddress, str]]:
    """Each special address with what it is; where it is more than one thing, the one that tells most comes last."""
    for name, address in (*_ipv4_addresses(), *_ipv6_addresses()):
        kind = "bridge" if (_SYS / name.partition(":")[0] / "bridge").is_dir() else "interface"
        yield address, f"the address of this host's {kind} {name}"
    for router in (*_ipv4_routers(), *_ipv6_routers()):
        yield router, "this host's default route"


def own_addresses() -> list[IPAddress]:
    """Of this host's interfaces, those of the loopback interface among them."""
    return [address for _, address in (*_ipv4_addresses(), *_ipv6_addresses())]


def _ipv4_addresses() -> list[tuple[str, IPAddress]]:
    """Of all interfaces that are up, labels of second addresses included."""
    buffer = array.array("B", bytes(INTERFACES_MAX * _IFREQ_OCTETS))
    where, _ = buffer.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            answer = fcntl.ioctl(asked.fileno(), _SIOCGIFCONF, _IFCONF.pack(len(buffer), where))
        except OSError:
            return []
    octets = buffer.tobytes()[: _IFCONF.unpack(answer)[0]]
    found = (_IFREQ.unpack_from(octets, at) for at in range(0, len(octets), _IFREQ_OCTETS))
    return [(name.rstrip(b"\0").decode(), IPv4Address(address)) for name, _, _, address in found]


def _ipv6_addresses() -> Iterator[tuple[str, IPAddress]]:
    for columns in _table("if_inet6"):
        with contextlib.suppress(ValueError, IndexError):
            yield columns[5], IPv6Address(bytes.fromhex(columns[0]))


def _ipv4_routers() -> Iterator[IPAddress]:
    """Interface, destination, router: the latter in hexadecimal of this machine's order of octets."""
    for columns in _table("route"):
        with contextlib.suppress(ValueError, IndexError, struct.error):
            if columns[1] == "00000000" and columns[7] == "00000000" and int(columns[2], 16):
                yield IPv4Address(struct.pack("=I", int(columns[2], 16)))


def _ipv6_routers() -> Iterator[IPAddress]:
    """Destination and its length, source and its length, router."""
    for columns in _table("ipv6_route"):
        with contextlib.suppress(ValueError, IndexError):
            if columns[1] == "00" and int(columns[0], 16) == 0 and int(columns[4], 16):
                yield IPv6Address(bytes.fromhex(columns[4]))


def _table(name: str) -> list[list[str]]:
    try:
        with (_PROC / name).open("rb") as file:
            return [line.split() for line in file.read(TABLE_OCTETS_MAX).decode("ascii", "replace").splitlines()]
    except OSError:
        return []
