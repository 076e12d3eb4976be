"""The self-test of a live gate: as it runs by itself, and as ``gatepost selftest``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.gatehouse import Gate, free_port
from tests.real.console import metric, no_faults, readiness
from tests.vectors.lenient import LenientBackend

PATIENCE_S = 120.0

CONFIG = """\
[gate]
name = "mx.example.com"
data = "data"
workers = 2
{gate}

[[listen]]
name = "mx"
address = ["127.0.0.1:0", "[::]:0"]
tls = "starttls"

[[listen]]
name = "smtps"
role = "submission"
address = "127.0.0.1:0"
tls = "implicit"

[[listen]]
name = "proxied"
address = "0.0.0.0:0"
proxy_from = ["127.77.0.0/24"]

[[listen]]
name = "pop"
role = "pop3"
address = "127.0.0.1:0"
server = "127.0.0.1:110"

[domains]
local = ["example.com"]

[limits]
sessions_per_minute_per_client = 0

[console]
address = "127.0.0.1:{console}"

[backend.mail]
{backend}

{more}
"""

EMBEDDED = 'address = "embedded:"'
WORLD = """
[[trust]]
network = "0.0.0.0/0"
why = "a relay for everybody"

[[trust]]
network = "::/0"
why = "a relay for everybody"
"""


def configuration(*, console: int = 0, gate: str = 'selftest = "0s"', backend: str = EMBEDDED, more: str = "") -> str:
    return CONFIG.format(console=console or free_port(), gate=gate, backend=backend, more=more)


def selftest(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gatepost", "selftest", "--config", str(config), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def listeners(said: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(said.stdout)["listeners"]
    return found


def scheduled(gate: Gate) -> dict[str, Any]:
    """The first line of the log about a test that the gate made by itself."""
    event: dict[str, Any] = json.loads(gate.wait_for_line(lambda line: '"event":"selftest"' in line, PATIENCE_S))
    return event


def test_a_closed_gate_says_so_through_each_of_its_listeners(tmp_path):
    with Gate(tmp_path, configuration()) as gate:
        said = selftest(gate.config)
        assert said.returncode == 0, said.stdout + said.stderr
        lines = said.stdout.splitlines()
        assert lines[-1] == "CLOSED, as the rules say"
        assert [line.split(" ")[0] for line in lines[:-1]] == ["mx", "mx", "smtps", "proxied"]
        assert "mx at [::1]:" in said.stdout
        tested = listeners(selftest(gate.config, "--json"))
        assert {one["outcome"] for one in tested} == {"closed"}
        assert tested[0]["source"] == "127.77.0.1"
        assert not tested[3]["source"].startswith("127.77.0.")  # these are the proxy's there
        shown = [session for session in gate.sessions() if session["client"] == tested[0]["source"]]
        assert shown
        assert not any("accepted" in json.dumps(session["transactions"]) for session in shown)
        no_faults(gate)


def test_the_gate_tests_itself(tmp_path):
    with Gate(tmp_path, configuration(gate='selftest = "1s"')) as gate:
        event = scheduled(gate)
        assert event["level"] == "note"
        assert [one["outcome"] for one in event["listeners"]] == ["closed"] * 4
        assert metric(gate, "gatepost_selftest_agrees") == 1
        assert readiness(gate)["selftest"] == "agrees"
        status = subprocess.run(
            [sys.executable, "-m", "gatepost", "status", "--config", str(gate.config)],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert "self-test  the gate does what its rules say\n" in status.stdout
        no_faults(gate)


def test_an_open_gate_that_is_meant_to_be_one_agrees_and_says_so(tmp_path):
    gate_table = 'open_relay = "mx.example.com"\nselftest = "1s"'
    with LenientBackend("strict") as backend:
        address = f'address = "127.0.0.1:{backend.port}"\ntls = "off"'
        with Gate(tmp_path, configuration(gate=gate_table, backend=address, more=WORLD)) as gate:
            event = scheduled(gate)
            assert event["level"] == "warning"
            assert "OPEN RELAY, as [gate] open_relay wishes" in event["text"]
            said = selftest(gate.config)
            assert said.returncode == 1
            assert said.stdout.splitlines()[-1] == "OPEN RELAY, as [gate] open_relay wishes"
            assert {one["outcome"] for one in listeners(selftest(gate.config, "--json"))} == {"open", "closed"}
            assert metric(gate, "gatepost_selftest_agrees") == 1
            assert metric(gate, "gatepost_trust_suspended") == 0
            no_faults(gate)
        assert backend.transactions() == []


def test_a_gate_that_does_not_do_what_its_file_says_is_an_alarm(tmp_path):
    console = free_port()
    closed = tmp_path / "closed.toml"
    closed.write_text(configuration(console=console))
    with LenientBackend("strict") as backend:
        opened = configuration(
            console=console,
            gate='open_relay = "mx.example.com"\nselftest = 0',
            backend=f'address = "127.0.0.1:{backend.port}"\ntls = "off"',
            more=WORLD,
        )
        with Gate(tmp_path, opened):
            said = selftest(closed)
            assert said.returncode == 1
            assert "ALARM: the gate does not do what its rules say" in said.stdout
            assert "RELAYS for 127.77.0.1, which nothing in the configuration allows" in said.stdout
            assert "  S: 220 mx.example.com" in said.stdout
            disagrees = listeners(selftest(closed, "--json"))[0]
            assert disagrees["outcome"] == "disagrees"
            assert any(line.startswith("S: 250") for line in disagrees["transcript"])
        assert backend.transactions() == []


def test_where_this_host_is_no_stranger_it_cannot_be_told(tmp_path):
    inside = '[[trust]]\nnetwork = "127.0.0.0/8"\n[[deny]]\nnetwork = "0.0.0.0/0"\n[[deny]]\nnetwork = "::/0"'
    with Gate(tmp_path, configuration(more=inside)) as gate:
        said = selftest(gate.config)
        assert said.returncode == 2
        assert said.stdout.splitlines()[-1] == "UNKNOWN"
        assert "127.77.0.1 is denied (" in said.stdout


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_where_no_gate_runs_it_cannot_be_told(tmp_path, arguments):
    config = tmp_path / "gatepost.toml"
    config.write_text(configuration())
    said = selftest(config, *arguments)
    assert said.returncode == 2
    assert "no gate's console answers" in said.stderr
