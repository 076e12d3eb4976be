"""What a configuration expects of the host it runs on, files and a user; and what stands around that host.

Why: a missing certificate or user is found when the gate starts; better found when the file is checked.  And the
    commonest open relay has a configuration that is right: it trusts a private address behind which a router, a
    container runtime or a proxy hides the whole Internet.
Trust: an administrator's file; what it names is looked at, never changed.  The kernel's tables of routes.
Promise: warnings, not problems: a file may be checked on another host than the one it is for.
Sources: proc(5) (/proc/net/route); the kernel's ipv6_route_seq_show() (/proc/net/ipv6_route).
"""

from __future__ import annotations

import contextlib
import pwd
import re
import ssl
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from gatepost.backend.settings import EmbeddedMailboxes, LmtpSocket
from gatepost.config import Config
from gatepost.config.settings import smtp_listeners
from gatepost.facts import IPAddress
from gatepost.gate.settings import CertificateFiles
from gatepost.policy.relay import IPNetwork, TrustEntry, expired

_ROUTES_READ = 100_000  # a host that holds all routes of the Internet shall not slow its gate down
_BRIDGE = re.compile(
    r"docker\d+|br-[0-9a-f]{12}|cni\d+|(?:cni-)?podman\d+"
)  # as Docker, Kubernetes and Podman name them
_UP = 1  # RTF_UP


class Neighbourhood(NamedTuple):
    """What stands around this host.

    Attributes:
        gateways: of the default routes.
        bridges: interface and network of each container bridge.
    """

    gateways: tuple[IPAddress, ...] = ()
    bridges: tuple[tuple[str, IPNetwork], ...] = ()


def look(config: Config) -> list[str]:
    """What is missing on this host, each "file:line: ..."."""
    return [*_user(config), *_certificate(config), *_backends(config)]


# --- What stands around this host -------------------------------------------------------------------------------------


def around(config: Config, neighbourhood: Neighbourhood, now: float) -> list[str]:
    """Trusted networks whose addresses others may come to have, each "file:line: ...".

    Args:
        now: seconds since the epoch; what has expired trusts nobody.
    """
    entries = [entry for entry in config.gate.rules.trust if entry.network is not None and not expired(entry, now)]
    return [warning for entry in entries for warning in _behind(config, entry, neighbourhood)]


def _behind(config: Config, entry: TrustEntry, neighbourhood: Neighbourhood) -> Iterator[str]:
    network = entry.network
    assert network is not None
    holds = f"{entry.where}: [[trust]] network: {network} holds"
    for gateway in neighbourhood.gateways:
        if gateway in network:
            yield (
                f"{holds} {gateway}, this host's default gateway. If it rewrites source addresses (NAT, a container "
                "bridge, a load balancer), the whole Internet comes from there and may send; use the PROXY protocol "
                f"and proxy_from, host networking, or externalTrafficPolicy: Local, or leave {gateway} out"
            )
    for interface, bridge in neighbourhood.bridges:
        if network.version == bridge.version and network.overlaps(bridge):
            yield (
                f"{holds} addresses of the container bridge {interface} ({bridge}). What a container runtime forwards "
                f"comes from there, whoever sent it; run the gate with host networking, or leave {bridge} out"
            )
    for listen, proxy in _listed_proxies(config):
        astray = [one.name for one in smtp_listeners(config.gate.listens) if one.name not in listen]
        if astray and network.version == proxy.version and network.overlaps(proxy):
            yield (
                f"{holds} the proxy {proxy} of the listener {listen[0]}. What it forwards to the listener {astray[0]} "
                f"passes as its own; name it in proxy_from there, too, or leave {proxy} out"
            )


def _listed_proxies(config: Config) -> Iterator[tuple[list[str], IPNetwork]]:
    """Each proxy, with the names of the listeners that ask it who the client is."""
    listeners: dict[str, list[str]] = {}
    for listen in config.gate.listens:
        for proxy in listen.proxy_from:
            listeners.setdefault(proxy, []).append(listen.name)
    for proxy, names in listeners.items():
        yield names, ip_network(proxy)


def neighbourhood(root: str = "/proc/net") -> Neighbourhood:
    """What the kernel knows of this host's neighbours; nothing where it does not say.

    Args:
        root: the directory with the kernel's tables.
    """
    gateways: dict[IPAddress, None] = {}
    bridges: dict[tuple[str, IPNetwork], None] = {}
    for interface, network, gateway in (*_ipv4_routes(Path(root, "route")), *_ipv6_routes(Path(root, "ipv6_route"))):
        if network.prefixlen == 0:
            if not gateway.is_unspecified:
                gateways[gateway] = None
        elif _BRIDGE.fullmatch(interface) and gateway.is_unspecified and not network.is_link_local:
            bridges[interface, network] = None
    return Neighbourhood(tuple(gateways), tuple(bridges))


_Route = tuple[str, IPNetwork, IPAddress]


def _lines(path: Path) -> list[list[str]]:
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            return [line.split() for line in islice(file, _ROUTES_READ)]
    except OSError:  # another system than Linux, or a container that hides it
        return []


def _ipv4_routes(path: Path) -> Iterator[_Route]:
    """Addresses stand there as 32-bit numbers in the order of octets that the CPU has."""
    for fields in _lines(path)[1:]:
        with contextlib.suppress(ValueError, IndexError):
            interface, destination, gateway, flags = fields[:4]
            if int(flags, 16) & _UP:
                mask = _native(fields[7])
                yield interface, IPv4Network((int(_native(destination)), str(mask))), _native(gateway)


def _native(number: str) -> IPv4Address:
    return IPv4Address(int(number, 16).to_bytes(4, sys.byteorder))


def _ipv6_routes(path: Path) -> Iterator[_Route]:
    for fields in _lines(path):
        with contextlib.suppress(ValueError, IndexError):
            destination, bits, gateway, flags, interface = fields[0], fields[1], fields[4], fields[8], fields[9]
            if int(flags, 16) & _UP and interface != "lo":
                network = IPv6Network((int(destination, 16), int(bits, 16)))
                yield interface, network, IPv6Address(int(gateway, 16))


# --- What the file names ----------------------------------------------------------------------------------------------


def _user(config: Config) -> list[str]:
    if config.user:
        try:
            pwd.getpwnam(config.user)
        except KeyError:
            at = config.sources.at(("gate", "user"))
            return [f'{at}: [gate] user = "{config.user}": this host has no such user; make it before the gate starts']
    return []


def _certificate(config: Config) -> list[str]:
    tls = config.gate.tls
    if not tls.certificates:
        if any(listen.tls != "none" for listen in config.gate.listens):
            at = config.sources.at(("tls",)) if ("tls",) in config.sources else config.config_path
            return [f"{at}: no [tls] certificate: the gate makes a self-signed one, which strict clients refuse"]
        return []
    return [found for number, files in enumerate(tls.certificates) for found in _pair(config, number, files)]


def _pair(config: Config, number: int, files: CertificateFiles) -> list[str]:
    at = config.sources.at(("tls", "certificate", number))
    for path in dict.fromkeys(files):
        try:
            with Path(path).open("rb"):
                pass
        except OSError as error:
            return [f"{at}: [tls] {path}: {error.strerror} on this host"]
    with contextlib.suppress(OSError):  # ssl.SSLError is one, and says less than we do
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*files, password="")
        return []
    names = f"{files.certificate} and {files.key}"
    return [f"{at}: [tls] {names}: these are no certificate in PEM and its key, without password"]


def _backends(config: Config) -> list[str]:
    missing = []
    for backend in config.gate.backends:
        for number, address in enumerate(backend.addresses):
            if isinstance(address, LmtpSocket) and not Path(address.path).is_socket():
                at = config.sources.at(("backend", backend.name, "address", number))
                missing.append(f"{at}: [backend.{backend.name}] address: this host has no socket {address.path} now")
            if isinstance(address, EmbeddedMailboxes) and Path(address.directory).is_file():
                at = config.sources.at(("backend", backend.name, "address", number))
                missing.append(f"{at}: [backend.{backend.name}] address: {address.directory} is a file, no directory")
    return missing
