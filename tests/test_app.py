"""All the parts joined: the gate as it is started, watched, reloaded and ended, over its real processes."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import smtplib
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.gatehouse import Gate

from gatepost import app

CONFIG = """\
[gate]
name = "mx.example.com"
workers = {workers}
[[listen]]
name = "mx"
address = "127.0.0.1:0"
[domains]
local = ["example.com"]
[backend.mailbox]
address = "embedded:"
[console]
address = "127.0.0.1:0"
"""


def ask(gate: Gate, path: str) -> tuple[int, bytes]:
    """The console's answer, at the address that the line ``ready`` names."""
    ready = gate.wait_for_line(lambda line: line.startswith("ready"))
    connection = http.client.HTTPConnection(ready.rpartition("http://")[2].rstrip("/"), timeout=20)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def send(gate: Gate, to: str = "joe@example.com") -> None:
    with smtplib.SMTP("127.0.0.1", gate.port, timeout=20) as client:
        client.sendmail("a@b.example", to, "Subject: hello\r\n\r\nbody\r\n")


def event(name: str):
    return lambda line: line.startswith("{") and json.loads(line)["event"] == name


def test_mail_passes_is_logged_and_counted_and_the_gate_is_ready(tmp_path):
    with Gate(tmp_path, CONFIG.format(workers=2)) as gate:
        send(gate)
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            send(gate, "victim@stranger.test")
        # Two workers may have served the two sessions: their lines come in any order.
        record = gate.wait_for_session(lambda session: "accepted" in json.dumps(session))
        assert record["time"].endswith("Z")
        assert record["transactions"][0]["verdict"] == "accepted"
        gate.wait_for_session(lambda session: "relaying" in json.dumps(session))
        status, body = ask(gate, "/readyz")
        assert (status, json.loads(body)["problems"]) == (200, [])
        assert json.loads(body)["listeners"] == [{"name": "mx", "address": f"127.0.0.1:{gate.port}"}]
        assert ask(gate, "/healthz")[0] == 200
        metrics = ask(gate, "/metrics")[1].decode()
        assert 'gatepost_sessions_total{role="mx"} 2.0\n' in metrics
        assert 'gatepost_messages_total{verdict="accepted"} 1.0\n' in metrics
        assert 'gatepost_replies_total{reason="relaying",stage="rcpt"} 1.0\n' in metrics
        assert 'gatepost_backend_seconds_count{backend="mailbox"} 1.0\n' in metrics
    assert gate.process is not None
    assert gate.process.returncode == 0
    assert gate.errors == []


def test_a_worker_killed_under_a_session_is_replaced_and_its_counts_stay(tmp_path):
    with Gate(tmp_path, CONFIG.format(workers=1)) as gate:
        send(gate)
        gate.wait_for_session(lambda _: True)
        with socket.create_connection(("127.0.0.1", gate.port), timeout=20) as client:
            assert client.recv(100).startswith(b"220 ")
            os.kill(gate.workers()[0], signal.SIGKILL)
            send(gate)  # waits in the backlog until the next worker is there
            gate.wait_for_line(event("worker_died"))
        metrics = ask(gate, "/metrics")[1].decode()
        assert "gatepost_workers_restarted_total 1.0\n" in metrics
        assert 'gatepost_sessions_total{role="mx"} 3.0\n' in metrics


def test_hup_puts_new_rules_in_force_and_a_bad_file_does_not(tmp_path):
    config = CONFIG.format(workers=2)
    with Gate(tmp_path, config) as gate:
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            send(gate, "joe@new.example")
        gate.reload(config.replace('["example.com"]', '["example.com", "new.example"]'))
        gate.wait_for_line(event("reload"))
        send(gate, "joe@new.example")
        gate.reload(config.replace("[domains]", "[domain]").replace('"mx.example.com"', "5"))
        gate.wait_for_line(lambda line: event("reload_refused")(line) and "stays in force" in line)
        problems = [record["text"] for record in gate.log() if record["event"] == "reload_refused"]
        assert any(problem.startswith(f"{gate.config}:2: ") for problem in problems)
        assert any("unknown table" in problem for problem in problems)
        send(gate, "joe@new.example")
        status, body = ask(gate, "/readyz")
        assert status == 200
        assert json.loads(body)["warnings"][0].startswith("the configuration on disk was refused")


def test_a_drain_lets_content_in_flight_end(tmp_path):
    with Gate(tmp_path, CONFIG.format(workers=1)) as gate:
        client = smtplib.SMTP("127.0.0.1", gate.port, timeout=20)
        client.ehlo()
        client.mail("a@b.example")
        client.rcpt("joe@example.com")
        client.putcmd("data")
        assert client.getreply()[0] == 354
        gate.terminate()
        gate.wait_for_line(event("drain"))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", gate.port))
        assert ask(gate, "/readyz")[0] == 503
        client.send(b"Subject: late\r\n\r\nbut whole\r\n.\r\n")
        assert client.getreply()[0] == 250
        client.close()
        assert gate.stop() == 0


def test_without_its_supervisor_nothing_stays(tmp_path):
    with Gate(tmp_path, CONFIG.format(workers=2)) as gate:
        children = gate.processes()[1:]
        assert len(children) == 4
        os.kill(gate.pid, signal.SIGKILL)
        descriptors = [os.pidfd_open(pid) for pid in children if Path(f"/proc/{pid}").exists()]
        for descriptor in descriptors:
            assert ended(descriptor)
            os.close(descriptor)


def ended(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(30_000))


def run(directory: Path, config: str) -> subprocess.CompletedProcess[str]:
    (directory / "gatepost.toml").write_text(config)
    return subprocess.run(
        [sys.executable, "-m", "gatepost", "run"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_configuration_with_mistakes_is_exit_2_with_all_of_them(tmp_path):
    ran = run(tmp_path, CONFIG.format(workers=1).replace("mx.example.com", "-").replace("embedded:", "x:y:z"))
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert "gatepost.toml:2: " in ran.stderr
    assert "gatepost.toml:10: " in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_port_that_is_taken_is_exit_2_with_its_place_and_mend(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ran = run(tmp_path, CONFIG.format(workers=1).replace("127.0.0.1:0", f"127.0.0.1:{port}", 1))
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"gatepost.toml:4: cannot listen on 127.0.0.1:{port}: another program listens there; ")
    assert ran.stdout == ""


def test_the_embedded_default_says_what_it_is():
    plan = app._plan(None)
    assert [listen.addresses for listen in plan.listens] == [(("127.0.0.1", 2525),)]
    assert plan.console == ("127.0.0.1", 8025)
    text = " ".join(plan.introduction)
    assert "embedded default" in text
    assert "`gatepost init` writes a real configuration" in text
    assert "example.com" in text
    assert plan.warnings == ()
    assert plan.watch == ()


def test_closed_standard_descriptors_do_not_end_up_in_a_socket():
    program = (
        "import os, sys; os.close(0); os.close(1); from gatepost import app; app._open_standard_descriptors();"
        "sys.exit(0 if [os.fstat(n).st_rdev for n in (0, 1)] == [os.stat(os.devnull).st_rdev] * 2 else 1)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
