"""Network namespaces of a test's own, joined by veth pairs: hosts that know of nothing else.

Why: what a gate sees of a client depends on the network between them, and the loopback interface has none.
Promise: what is made here is gone at the end, with everything that runs in it; no address, route or interface of the
    host that runs the tests is changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.servers import CI

_CLONE_NEWNET = 0x40000000
_NAMED = Path("/run/netns")


def _ip(*words: str) -> str:
    """Run ip(8).

    Raises:
        OSError, subprocess.SubprocessError: it is not there, or it refuses.
    """
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise subprocess.SubprocessError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Namespace:
    """One of them, by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def within(self) -> tuple[str, ...]:
        """What runs the command behind it in here."""
        return ("ip", "netns", "exec", self.name)

    def address(self, interface: str, *addresses: str) -> None:
        """Give an interface its addresses, and bring it up."""
        for address in addresses:
            _ip("-n", self.name, "address", "add", address, "dev", interface)
        _ip("-n", self.name, "link", "set", interface, "up")

    def route(self, *words: str) -> None:
        _ip("-n", self.name, "route", "add", *words)

    def bridge(self, name: str) -> None:
        """Make a bridge, such as a container engine's."""
        _ip("-n", self.name, "link", "add", name, "type", "bridge")

    def plug(self, interface: str, bridge: str) -> None:
        """Put an interface into a bridge, and bring it up."""
        _ip("-n", self.name, "link", "set", interface, "master", bridge, "up")

    def connect(self, address: str, port: int, source: str, timeout_s: float) -> socket.socket:
        """A connection from in here.  A thread goes in, makes the socket, which stays there, and ends."""
        outcome: list[socket.socket | OSError] = []

        def enter() -> None:
            with (_NAMED / self.name).open("rb") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                    outcome.append(OSError(ctypes.get_errno(), "setns"))
                    return
            try:
                outcome.append(socket.create_connection((address, port), timeout_s, (source, 0)))
            except OSError as error:
                outcome.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if isinstance(outcome[0], OSError):
            raise outcome[0]
        return outcome[0]


@contextlib.contextmanager
def namespaces(*names: str) -> Iterator[list[Namespace]]:
    """Make them; where that is not allowed the test is skipped, under CI it fails: there it is allowed."""
    made: list[Namespace] = []
    try:
        try:
            for name in names:
                one = Namespace(f"{name}-{secrets.token_hex(4)}")
                _ip("netns", "add", one.name)
                made.append(one)
                one.address("lo")
        except (OSError, subprocess.SubprocessError) as error:
            why = f"this host gives no network namespaces: {error}"
            pytest.fail(why) if CI else pytest.skip(why)
        yield made
    finally:
        for one in made:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                for pid in _ip("netns", "pids", one.name).split():
                    os.kill(int(pid), signal.SIGKILL)  # only what was started in here is in here
                _ip("netns", "delete", one.name)


def join(one: Namespace, other: Namespace) -> tuple[str, str]:
    """A cable between two of them.

    Returns:
        The interface at either end.
    """
    ends = f"ve{secrets.token_hex(4)}", f"ve{secrets.token_hex(4)}"
    _ip("link", "add", ends[0], "netns", one.name, "type", "veth", "peer", "name", ends[1], "netns", other.name)
    return ends
