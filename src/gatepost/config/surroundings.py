"""What a configuration expects of the host it runs on, files and a user; and what stands around that host.

Why: a missing certificate or user is found when the gate starts; better found when the file is checked.  And the
    commonest open relay has a configuration that is right: it trusts a private address behind which a router, a
    container runtime or a proxy hides the whole Internet.
Trust: an administrator's file; what it names is looked at, never changed.  What the kernel says of its neighbours.
Promise: warnings, not problems: a file may be checked on another host than the one it is for.
Sources: none.
"""

from __future__ import annotations

import contextlib
import pwd
import re
import ssl
from collections.abc import Iterable, Iterator
from ipaddress import ip_network
from pathlib import Path

from gatepost.backend.settings import EmbeddedMailboxes, LmtpSocket
from gatepost.config import Config
from gatepost.config.settings import smtp_listeners
from gatepost.facts import IPAddress
from gatepost.gate.settings import CertificateFiles
from gatepost.policy.relay import IPNetwork, expired

# Where source addresses are rewritten, in the words of ``gate.interfaces``; container bridges by their usual names.
_BRIDGE = r"docker\d+|br-[0-9a-f]{12}|cni\d+|(?:cni-)?podman\d+"
_ON_THE_WAY = re.compile(rf"this host's default route|the address of this host's bridge (?:{_BRIDGE})")


def look(config: Config) -> list[str]:
    """What is missing on this host, each "file:line: ..."."""
    return [*_user(config), *_certificate(config), *_backends(config)]


# --- What stands around this host -------------------------------------------------------------------------------------


def around(config: Config, neighbours: Iterable[tuple[IPAddress, str]], now: float) -> list[str]:
    """Trusted networks whose addresses others may come to have, each "file:line: ...".

    Args:
        neighbours: addresses of this host and beside it, and what each is, as ``gate.interfaces.look`` tells.
        now: seconds since the epoch; what has expired trusts nobody.
    """
    on_the_way = [(address, what) for address, what in neighbours if _ON_THE_WAY.fullmatch(what)]
    warnings = []
    for entry in config.gate.rules.trust:
        if entry.network is not None and not expired(entry, now):
            at = f"{entry.where}: [[trust]] network: {entry.network} holds"
            warnings += [f"{at} {hidden}" for hidden in _hidden_behind(config, entry.network, on_the_way)]
    return warnings


def _hidden_behind(config: Config, network: IPNetwork, on_the_way: list[tuple[IPAddress, str]]) -> Iterator[str]:
    for address, what in on_the_way:
        if address in network:
            yield (
                f"{address}, {what}. Where source addresses are rewritten there (NAT, a container runtime, a load "
                "balancer), the whole Internet comes from it and may send; use the PROXY protocol and proxy_from, host "
                f"networking, or externalTrafficPolicy: Local, or leave {address} out"
            )
    for names, proxy in _listed_proxies(config):
        astray = [listener.name for listener in smtp_listeners(config.gate.listens) if listener.name not in names]
        if astray and network.version == proxy.version and network.overlaps(proxy):
            yield (
                f"the proxy {proxy} of the listener {names[0]}. What it forwards to the listener {astray[0]} passes as "
                f"its own; name it in proxy_from there, too, or leave {proxy} out"
            )


def _listed_proxies(config: Config) -> Iterator[tuple[list[str], IPNetwork]]:
    """Each proxy, with the names of the listeners that ask it who the client is."""
    listeners: dict[str, list[str]] = {}
    for listen in config.gate.listens:
        for proxy in listen.proxy_from:
            listeners.setdefault(proxy, []).append(listen.name)
    for proxy, names in listeners.items():
        yield names, ip_network(proxy)


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
