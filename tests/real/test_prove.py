"""`gatepost check` in the three situations of docs/howto/prove.md: closed, open, and right in a network that is wrong.

Two hosts in network namespaces of their own, as a container engine makes them:

    world 198.51.100.1 ... ---- 198.51.100.254 host, bridge docker0 172.17.0.1 ---- 172.17.0.2 container: gate

The host forwards port 25 with a userland proxy: the gate sees each client as 172.17.0.1.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.gatehouse import Gate
from tests.real.namespaces import Namespace, join, namespaces
from tests.real.test_lost_source import BACKEND, FORWARDER, PATIENCE_S, PORT, Client, program

CONFIG = """\
[gate]
name = "mx.example.com"
data = "data"
workers = 1

[[listen]]
name = "mx"
address = "{address}"

[domains]
local = ["example.com"]

[[trust]]
network = "{network}"
why = "{why}"
owner = "it@example.com"

[backend.mail]
address = "127.0.0.1:2526"
tls = "off"
"""


class Network(NamedTuple):
    world: Namespace
    host: Namespace
    container: Namespace


@pytest.fixture
def network() -> Iterator[Network]:
    with namespaces("world", "host", "container") as (world, host, container):
        outer, host_outer = join(world, host)
        world.address(outer, *(f"198.51.100.{number}/24" for number in range(1, 30)))
        host.address(host_outer, "198.51.100.254/24")
        host.route("default", "via", "198.51.100.1")
        host.bridge("docker0")
        host.address("docker0", "172.17.0.1/16")
        port, inner = join(host, container)
        host.plug(port, "docker0")
        container.address(inner, "172.17.0.2/16")
        container.route("default", "via", "172.17.0.1")
        yield Network(world, host, container)


def configure(directory: Path, network: str, why: str, address: str = "0.0.0.0:25") -> str:
    text = CONFIG.format(network=network, why=why, address=address)
    (directory / "gatepost.toml").write_text(text)
    return text


def checked(directory: Path, place: Namespace | None = None, *words: str) -> tuple[int, str]:
    """What `gatepost check` says there, its lines as wide as they are."""
    done = subprocess.run(
        [*(place.within if place else ()), sys.executable, "-m", "gatepost", "check", *words],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def warnings(directory: Path, place: Namespace) -> list[str]:
    code, said = checked(directory, place, "--json")
    assert code == 0
    facts = json.loads(said)
    assert facts["proof"]["proven"], "the file is right: the network is not"
    return [warning for warning in facts["warnings"] if "[[trust]]" in warning]


def test_a_good_configuration_is_proven(tmp_path):
    configure(tmp_path, "10.1.0.0/16", "office LAN")
    code, said = checked(tmp_path)
    assert code == 0
    assert "\nMay send elsewhere\n  10.1.0.0/16 may send anywhere: office LAN, it@example.com\n" in said
    assert "\nPROVEN: nobody else may send elsewhere; " in said


def test_an_open_one_does_not_load_and_shows_the_dialogue(tmp_path):
    configure(tmp_path, "0.0.0.0/1", "office LAN")
    code, said = checked(tmp_path)
    assert code == 1
    flat = " ".join(said.split())
    assert flat.startswith("gatepost.toml does not load Problems gatepost.toml:14: ")
    assert "this would be an open relay" in flat
    assert "  C: MAIL FROM:<>\n  S: 250 2.1.0 Sender OK\n" in said
    assert said.endswith("  C: RCPT TO:<user@elsewhere.invalid>\n  S: 250 2.1.5 Recipient OK\n")


def test_behind_a_bridge_the_file_is_right_and_the_network_is_told(network, tmp_path):
    configure(tmp_path, "172.17.0.0/16", "containers")
    (warning,) = warnings(tmp_path, network.container)
    assert warning.startswith(
        "gatepost.toml:13: [[trust]] network: 172.17.0.0/16 holds 172.17.0.1, this host's default route. "
    )
    (warning,) = warnings(tmp_path, network.host)
    assert "172.17.0.0/16 holds 172.17.0.1, the address of this host's bridge docker0. " in warning
    for mend in ("the PROXY protocol and proxy_from", "host networking", "externalTrafficPolicy: Local"):
        assert mend in warning
    configure(tmp_path, "172.17.0.3", "one container")
    assert warnings(tmp_path, network.container) == []


def test_what_was_not_heeded_is_suspended_once_strangers_come(network, tmp_path):
    text = configure(tmp_path, "172.17.0.0/16", "containers", f"172.17.0.2:{PORT}")
    with (
        program(network.container, BACKEND),
        program(network.host, FORWARDER, "198.51.100.254", str(PORT), "172.17.0.2"),
        Gate(tmp_path, text, within=network.container.within) as gate,
    ):
        assert any("holds 172.17.0.1, this host's default route" in line for line in gate.output), "said at the start"
        codes = []
        for number, name in enumerate(("alpha-travel.com", "beta-print.de", "gamma-shop.co.uk", "delta-news.fr"), 1):
            with Client(network.world, f"198.51.100.{number}", "198.51.100.254", f"mx.{name}") as stranger:
                stranger.rcpt_code(f"news@{name}", "bob@example.com")
                codes.append(stranger.rcpt("v@elsewhere.test")[0])
        assert codes[-1] == 550
        gate.wait_for_line(lambda line: '"event":"suspended"' in line, PATIENCE_S)
    listed = subprocess.run(
        [sys.executable, "-m", "gatepost", "trust", "list"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert listed.returncode == 1
    assert listed.stdout.startswith("172.17.0.1 since ")
