"""The lost source address, as it happens: a forwarder in front of the gate hides the whole world behind one address.

Three hosts in network namespaces of their own:

    world 198.51.100.1 ... ---- 198.51.100.254 proxy 10.203.77.1 ---- 10.203.77.2 gate

The proxy takes connections and makes each anew, as a container engine's userland proxy does: the gate sees 10.203.77.1,
which its administrator trusts.
"""

from __future__ import annotations

import contextlib
import json
import smtplib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.gatehouse import Gate
from tests.real.namespaces import Namespace, join, namespaces

PATIENCE_S = 60.0
PORT = 2525

CONFIG = """\
[gate]
name = "mx.example.com"
data = "data"
workers = 2

[[listen]]
name = "mx"
address = "10.203.77.2:2525"
tls = "starttls"

[[listen]]
name = "inside"
address = "10.203.77.3:2525"
role = "inside"

[domains]
local = ["example.com"]

[[trust]]
{trusted}
why = "the office"

[backend.mail]
address = "127.0.0.1:2526"
tls = "off"
"""

OFFICE = 'network = "10.203.77.0/24"'

# A userland proxy: it opens a connection of its own for each that it takes, and copies octets.
FORWARDER = """
import asyncio, sys
here, port, there = sys.argv[1], int(sys.argv[2]), sys.argv[3]

async def copy(reader, writer):
    try:
        while octets := await reader.read(65536):
            writer.write(octets)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()

async def taken(reader, writer):
    try:
        inside, outside = await asyncio.open_connection(there, port)
    except OSError:
        writer.close()
        return
    await asyncio.gather(copy(reader, outside), copy(inside, writer))

async def main():
    async with await asyncio.start_server(taken, here, port) as server:
        print("ready", flush=True)
        await server.serve_forever()

asyncio.run(main())
"""


# The server behind the gate takes everything from it: what a stranger gets through is relayed.
BACKEND = """
import asyncio

async def taken(reader, writer):
    writer.write(b"220 backend ESMTP\\r\\n")
    while line := await reader.readline():
        code = {b"DATA": b"354", b"QUIT": b"221"}.get(line[:4].upper().strip(), b"250")
        writer.write(code + b" OK\\r\\n")
    writer.close()

async def main():
    async with await asyncio.start_server(taken, "127.0.0.1", 2526) as server:
        print("ready", flush=True)
        await server.serve_forever()

asyncio.run(main())
"""


class Network(NamedTuple):
    world: Namespace
    proxy: Namespace
    gate: Namespace


@pytest.fixture
def network() -> Iterator[Network]:
    with namespaces("world", "proxy", "gate") as (world, proxy, gate):
        outer, proxy_outer = join(world, proxy)
        world.address(outer, *(f"198.51.100.{number}/24" for number in range(1, 30)))
        proxy.address(proxy_outer, "198.51.100.254/24")
        proxy_inner, inner = join(proxy, gate)
        proxy.address(proxy_inner, "10.203.77.1/24", "10.203.77.9/24")
        gate.address(inner, "10.203.77.2/24", "10.203.77.3/24")
        with program(gate, BACKEND):
            yield Network(world, proxy, gate)


@contextlib.contextmanager
def program(place: Namespace, text: str, *arguments: str) -> Iterator[None]:
    """A Python program that runs there, and is ready."""
    command = [*place.within, sys.executable, "-c", text, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield
        finally:
            process.kill()


@pytest.fixture
def forwarder(network: Network) -> Iterator[None]:
    with program(network.proxy, FORWARDER, "198.51.100.254", str(PORT), "10.203.77.2"):
        yield


class Client(smtplib.SMTP):
    """A client at some address of some host."""

    def __init__(self, host: Namespace, source: str, address: str, hello: str) -> None:
        self._place, self._from = host, source
        super().__init__(address, PORT, hello, PATIENCE_S)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        return self._place.connect(host, port, self._from, timeout)

    def rcpt_code(self, reverse_path: str, forward_path: str) -> int:
        self.ehlo_or_helo_if_needed()
        assert self.mail(reverse_path)[0] == 250
        return self.rcpt(forward_path)[0]


def stranger(network: Network, number: int, hello: str = "") -> Client:
    """A foreign mail server, through the forwarder."""
    name = hello or f"mx{number}.stranger{number}.net"
    return Client(network.world, f"198.51.100.{number}", "198.51.100.254", name)


def gate(network: Network, directory: Path, trusted: str = OFFICE) -> Gate:
    directory.mkdir(exist_ok=True)
    return Gate(directory, CONFIG.format(trusted=trusted), within=network.gate.within)


def command(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gatepost", *words, "--config", str(directory / "gatepost.toml")],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def suspensions(running: Gate) -> list[dict[str, object]]:
    return [record for record in running.log() if record.get("event") == "suspended"]


def suspension(running: Gate) -> dict[str, object]:
    """The one that is told, once it is."""
    running.wait_for_line(lambda line: '"event":"suspended"' in line, PATIENCE_S)
    (told,) = suspensions(running)
    return told


@pytest.mark.usefixtures("forwarder")
def test_inbound_mail_trips_it_within_five_connections(network, tmp_path):
    """The mail of the world comes in; then who would relay is refused, and the log says why and what to do."""
    with gate(network, tmp_path / "g") as running:
        with stranger(network, 1) as first:  # before anything is known the address is what its administrator says
            assert first.rcpt_code("a@stranger1.net", "v@elsewhere.org") == 250
            for number in range(2, 6):
                with stranger(network, number) as client:
                    assert client.rcpt_code(f"a@stranger{number}.net", "bob@example.com") == 250
            # From here on: whoever comes, and who is there already.
            assert first.mail("a@stranger1.net")[0] == 503
            first.rset()
            assert first.rcpt_code("a@stranger1.net", "v@elsewhere.org") == 550
        for number in range(6, 9):
            with stranger(network, number) as client:
                code, text = client.ehlo()
                assert code == 250
                client.mail("a@example.com")
                code, text = client.rcpt("v@elsewhere.org")
                assert code == 550
                assert b"the trust in this address is suspended" in text
                assert client.rcpt("bob@example.com")[0] == 250, "mail for us goes on"
        told = suspension(running)
        assert told["level"] == "error"
        assert told["source"] == "10.203.77.1"
        said = str(told["text"])
        for words in (
            "stranger2.net",
            "proxy_from",
            "host's network",
            "externalTrafficPolicy: Local",
            "userland-proxy",
        ):
            assert words in said
        assert "gatepost trust resume 10.203.77.1" in said
        # One machine beside the proxy is another address, and nothing was seen behind it.
        with Client(network.proxy, "10.203.77.9", "10.203.77.2", "printer.office.lan") as printer:
            assert printer.rcpt_code("printer@example.com", "v@elsewhere.org") == 250


@pytest.mark.usefixtures("forwarder")
@pytest.mark.parametrize("default_route", [False, True])
def test_relay_attempts_alone_trip_it_within_five_connections(network, tmp_path, default_route):
    """Nobody sends mail for us; each pretends to be one of us.  A default route is known for losing addresses."""
    if default_route:
        network.gate.route("default", "via", "10.203.77.1")
    with gate(network, tmp_path / "g") as running:
        codes = []
        for number in range(1, 8):
            with stranger(network, number) as client:
                codes.append(client.rcpt_code("boss@example.com", "v@elsewhere.org"))
        refused_from = codes.index(550) + 1
        assert refused_from <= (4 if default_route else 5)
        assert set(codes[refused_from - 1 :]) == {550}
        told = suspension(running)
        assert ("default route" in str(told["evidence"])) == default_route


@pytest.mark.usefixtures("forwarder")
def test_it_is_listed_survives_a_restart_and_is_resumed(network, tmp_path):
    directory = tmp_path / "g"
    with gate(network, directory) as running:
        for number in range(1, 6):
            with stranger(network, number) as client:
                client.rcpt_code(f"a@stranger{number}.net", "bob@example.com")
        suspension(running)
        wait_for(lambda: "gatepost_trust_suspended 1.0" in metrics(network, running))
        assert "the trust in 1 address or listener is suspended" in http(network, running, "/readyz")
    listed = command(directory, "trust", "list", "--json")
    assert listed.returncode == 1
    (one,) = json.loads(listed.stdout)["suspended"]
    assert one["source"] == "10.203.77.1"
    assert "stranger3.net" in " ".join(one["evidence"])
    checked = command(directory, "check")
    assert "the trust in 10.203.77.1 is suspended" in " ".join(checked.stdout.split())
    with gate(network, directory):
        with stranger(network, 1) as client:
            assert client.rcpt_code("a@stranger1.net", "v@elsewhere.org") == 550
            # A running session, and all workers, heed it at once; what the operator has seen counts no more.
            resumed = command(directory, "trust", "resume", "10.203.77.1")
            assert (resumed.returncode, resumed.stdout) == (0, "trusted again: 10.203.77.1\n")
            assert client.rcpt("v@elsewhere.org")[0] == 250
        for number in range(1, 4):
            with stranger(network, number) as client:
                assert client.rcpt_code(f"a@stranger{number}.net", "v@elsewhere.org") == 250
        # Nothing was mended: other strangers suspend it again.
        codes = []
        for number in range(11, 16):
            with stranger(network, number) as client:
                codes.append(client.rcpt_code(f"a@stranger{number}.net", "v@elsewhere.org"))
        assert codes[-1] == 550
    assert command(directory, "trust", "resume", "10.203.77.1").returncode == 0
    assert command(directory, "trust", "list").stdout.startswith("no trust is suspended\n")


@pytest.mark.usefixtures("forwarder")
def test_what_is_known_to_be_shared_is_never_suspended(network, tmp_path):
    with gate(network, tmp_path / "g", f"{OFFICE}\nshared = true") as running:
        for number in range(1, 12):
            with stranger(network, number) as client:
                assert client.rcpt_code(f"a@stranger{number}.net", "v@elsewhere.org") == 250
        assert not suspensions(running)


def test_a_trusted_listener_is_disarmed_by_the_first_public_client(network, tmp_path):
    """Somebody routed the world to the inside interface."""
    network.gate.route("198.51.100.0/24", "via", "10.203.77.1")
    network.world.route("10.203.77.0/24", "via", "198.51.100.254")
    forward = ("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    subprocess.run([*network.proxy.within, *forward], check=True, timeout=30)
    directory = tmp_path / "g"
    with gate(network, directory, 'listen = "inside"') as running:
        with Client(network.proxy, "10.203.77.9", "10.203.77.3", "pc7") as inside:
            assert inside.rcpt_code("pc7@example.com", "v@elsewhere.org") == 250
            with Client(network.world, "198.51.100.7", "10.203.77.3", "mx.stranger.net") as outside:
                assert outside.rcpt_code("a@stranger.net", "v@elsewhere.org") == 550
                assert outside.rcpt("bob@example.com")[0] == 250
            assert inside.rcpt("w@elsewhere.org")[0] == 550
        told = suspension(running)
        assert told["source"] == "inside"
        assert "198.51.100.7" in str(told["text"])
        assert command(directory, "trust", "resume", "inside").returncode == 0
        with Client(network.proxy, "10.203.77.9", "10.203.77.3", "pc7") as inside:
            assert inside.rcpt_code("pc7@example.com", "v@elsewhere.org") == 250
        with Client(network.world, "198.51.100.8", "10.203.77.3", "mx.stranger.net") as outside:
            assert outside.rcpt_code("a@stranger.net", "v@elsewhere.org") == 550


def wait_for(true) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def http(network: Network, running: Gate, path: str) -> str:
    """What the gate's console says, in its namespace."""
    with network.gate.connect("127.0.0.1", running.console_port, "127.0.0.1", PATIENCE_S) as console:
        console.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        octets = b""
        with contextlib.suppress(ConnectionError):
            while more := console.recv(65536):
                octets += more
    return octets.decode()


def metrics(network: Network, running: Gate) -> str:
    return http(network, running, "/metrics")
