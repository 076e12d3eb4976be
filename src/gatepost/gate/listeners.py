"""The listening sockets of all workers: bound once, kept for the supervisor's whole life.

Why: each worker has its own socket for each address (SO_REUSEPORT; the kernel spreads the connections), but the
    supervisor owns them, so that a worker that dies leaves its backlog to its successor and no connection is lost.
Trust: addresses are the administrator's, IP literals already.
Promise: all addresses of a configuration are bound, or none of its new ones: ``extend`` changes nothing when it fails.
    Another program, or another gate, that listens on an address is found out: SO_REUSEPORT alone would share the port
    with it in silence.  "[::]" is IPv6 alone; IPv4 is "0.0.0.0".
Sources: socket(7) SO_REUSEPORT, ipv6(7) IPV6_V6ONLY, ip(7).
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

from gatepost.errors import ConfigError
from gatepost.gate.channel import LISTENERS_MAX, Listening
from gatepost.gate.settings import ListenSettings

BACKLOG = 4096  # the kernel cuts it to net.core.somaxconn
_TRY_AGAIN_S = 0.1


class _Key(NamedTuple):
    """An address as configured; ``repeat`` tells several with port 0 apart."""

    host: str
    port: int
    repeat: int


class _Bound(NamedTuple):
    """One address: the port it really has, and one socket a worker."""

    port: int
    sockets: tuple[socket.socket, ...]


class Planned(NamedTuple):
    """One address of one [[listen]] table."""

    key: _Key
    listen: ListenSettings


def _plan(listens: Sequence[ListenSettings]) -> list[Planned]:
    seen: dict[tuple[str, int], int] = {}
    planned = []
    for listen in listens:
        for host, port in listen.addresses:
            repeat = seen.get((host, port), 0)
            seen[host, port] = repeat + 1
            planned.append(Planned(_Key(host, port, repeat), listen))
    return planned


class Listeners:
    """All listening sockets of all workers."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._bound: dict[_Key, _Bound] = {}

    def extend(self, listens: Sequence[ListenSettings], *, privileged: bool = True, patience_s: float = 0.0) -> None:
        """Bind what these settings name and is not bound yet.

        Args:
            privileged: False after privileges were dropped, which is said where a port is refused.
            patience_s: ports that are taken may become free for so long: workers of a gate that was killed close
                theirs when they find that out.  The thread waits.

        Raises:
            ConfigError: with a sentence for each address that cannot be had; nothing has changed.
        """
        planned = _plan(listens)
        until_s = time.monotonic() + patience_s
        problems: list[str] = []
        if len(planned) > LISTENERS_MAX:
            problems.append(f"{len(planned)} addresses to listen on are too many: at most {LISTENERS_MAX}")
        new: dict[_Key, _Bound] = {}
        for key, listen in planned:
            if key in self._bound:
                continue
            ours = any(bound.port == key.port for bound in self._bound.values())  # as 0.0.0.0:25 beside 127.0.0.1:25
            try:
                if key.port and not ours:
                    _alone(key.host, key.port, until_s)
                new[key] = _bind(key.host, key.port, self._workers)
            except OSError as error:
                mend = _mend(error, key.host, key.port, privileged=privileged, ours=ours)
                where = f"{listen.where}: " if listen.where else ""
                problems.append(f"{where}cannot listen on {endpoint(key.host, key.port)}: {mend}")
        if problems:
            for bound in new.values():
                _close(bound)
            raise ConfigError(problems)
        self._bound |= new

    def prune(self, listens: Sequence[ListenSettings]) -> None:
        """Close what these settings no longer name; for after the workers closed theirs."""
        named = {planned.key for planned in _plan(listens)}
        for key in [key for key in self._bound if key not in named]:
            _close(self._bound.pop(key))

    def of_worker(self, index: int, listens: Sequence[ListenSettings]) -> list[tuple[Listening, socket.socket]]:
        """What one worker serves."""
        served = []
        for key, listen in _plan(listens):
            bound = self._bound[key]
            served.append((Listening(listen.name, key.host, bound.port), bound.sockets[index]))
        return served

    def close(self) -> None:
        """Accept no more; connections that wait in a backlog are refused by the kernel."""
        for bound in self._bound.values():
            _close(bound)
        self._bound = {}


def endpoint(host: str, port: int) -> str:
    """Address and port as people write them: "127.0.0.1:25", "[::1]:25"."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind_one(host: str, port: int) -> socket.socket:
    """One listening socket that shares its port with nobody.

    Raises:
        OSError: the address cannot be had.
    """
    sock = _bound_socket(host, port, share=False)
    sock.listen(BACKLOG)
    return sock


def _bound_socket(host: str, port: int, *, share: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            host, _, zone = host.partition("%")
            sock.bind((host, port, 0, _zone_index(zone)))
        else:
            sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _zone_index(zone: str) -> int:
    if not zone:
        return 0
    return int(zone) if zone.isascii() and zone.isdigit() else socket.if_nametoindex(zone)


def _bind(host: str, port: int, workers: int) -> _Bound:
    sockets: list[socket.socket] = []
    try:
        for _ in range(workers):
            sock = _bound_socket(host, port, share=True)
            sockets.append(sock)
            port = sock.getsockname()[1]  # port 0: the first chooses, the others follow
        for sock in sockets:
            sock.listen(BACKLOG)
            sock.setblocking(False)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return _Bound(port, tuple(sockets))


def _alone(host: str, port: int, until_s: float) -> None:
    """Nobody else listens here: bound once without sharing, which fails beside any other listener."""
    while True:
        try:
            _bound_socket(host, port, share=False).close()
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() >= until_s:
                raise
        time.sleep(_TRY_AGAIN_S)


def _mend(error: OSError, host: str, port: int, *, privileged: bool, ours: bool) -> str:
    if error.errno == errno.EADDRINUSE and ours:
        return "this gate listens on that port already, in another way; restart it"
    if error.errno == errno.EADDRINUSE:
        return (
            f"another program listens there; stop it (`ss -ltnp 'sport = :{port}'` names it), "
            "or write another address or port"
        )
    if error.errno == errno.EACCES and port < 1024:
        if not privileged:
            return "a port below 1024 needs privileges that were dropped after the start; restart the gate"
        return (
            'a port below 1024 needs privileges; start as root with [gate] user = "gatepost", or under the systemd '
            "unit in deploy/, or write a port above 1023"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return f"this host has no address {host}; `ip address` shows those it has"
    if error.errno == errno.EAFNOSUPPORT:
        return "this host has IPv6 switched off; write an IPv4 address"
    return f"{error.strerror or error}; write another address or port"


def _close(bound: _Bound) -> None:
    for sock in bound.sockets:
        sock.close()
