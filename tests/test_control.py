"""Status and reload, against a stand-in for the gate's process and console."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from gatepost import control
from gatepost.errors import GatepostError

METRICS = """\
# HELP gatepost_sessions_total Sessions begun.
# TYPE gatepost_sessions_total counter
gatepost_sessions_total{role="mx"} 120.0
gatepost_sessions_total{role="inside"} 3.0
gatepost_sessions{role="mx"} 2.0
gatepost_messages_total{verdict="accepted"} 100.0
gatepost_messages_total{verdict="refused"} 1.7e+01
gatepost_reloads_total{result="ok"} 1.0
gatepost_reloads_total{result="refused"} 0.0
gatepost_backend_seconds_bucket{backend="mail",le="+Inf"} NaN
nonsense
"""


class Console:
    """Answers GET as told; ``pages`` may be changed while it runs."""

    def __init__(self):
        self.pages = {"/readyz": (200, b'{"ready": true}'), "/metrics": (200, METRICS.encode())}
        pages = self.pages

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                code, body = pages[self.path]
                self.send_response(code)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format, *args):  # noqa: A002  the name is the library's
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = ("127.0.0.1", self._server.server_address[1])

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()


HOLDER = """
import fcntl, os, signal, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644)
fcntl.flock(file, fcntl.LOCK_EX)
os.write(file, sys.argv[2].encode() if len(sys.argv) > 2 else f"{os.getpid()}\\n".encode())
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])  # one that comes at once is not lost
print("ready", flush=True)
while True:
    signal.sigwait([signal.SIGHUP])
    print("HUP", flush=True)
"""


@contextlib.contextmanager
def supervisor(path, *text):
    """A process that holds the lock as the gate's supervisor does, and says so when it is asked to reload."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), *text], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def nothing_listens():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()


def test_the_status_is_what_the_console_says():
    with Console() as console:
        seen = control.status(console.address)
    assert seen == control.Status(True, {"ready": True}, 2, 123, {"accepted": 100, "refused": 17})


def test_a_gate_that_is_not_ready_is_no_error():
    with Console() as console:
        console.pages["/readyz"] = (503, json.dumps({"ready": False, "problems": ["draining"]}).encode())
        seen = control.status(console.address)
    assert not seen.ready
    assert seen.answer["problems"] == ["draining"]


@pytest.mark.parametrize(("code", "body"), [(200, b"hello"), (200, b"[1]"), (404, b"{}"), (200, b"\xff")])
def test_what_is_no_console_is_said(code, body):
    with Console() as console:
        console.pages["/readyz"] = (code, body)
        with pytest.raises(GatepostError, match="is not a gate's console"):
            control.status(console.address)


def test_where_nothing_listens_there_is_no_status():
    host, port = nothing_listens()
    with pytest.raises(GatepostError) as error:
        control.status((host, port))
    assert str(error.value) == f"no gate's console answers at 127.0.0.1:{port}: Connection refused"


def test_a_port_that_nobody_can_know_is_said():
    with pytest.raises(GatepostError, match="has port 0, so that nobody can know it; give it a port"):
        control.status(("127.0.0.1", 0))


def test_a_console_on_every_address_is_asked_on_loopback():
    with Console() as console:
        assert control.status(("0.0.0.0", console.address[1])).ready


def test_the_process_that_holds_the_lock_is_the_gate(tmp_path):
    path = tmp_path / "gatepost.pid"
    with supervisor(path) as process:
        assert control.supervisor(str(path)) == process.pid


def test_a_file_left_behind_counts_for_nothing(tmp_path):
    path = tmp_path / "gatepost.pid"
    path.write_text(f"{os.getpid()}\n")
    with pytest.raises(GatepostError, match="was left behind by one that ended"):
        control.supervisor(str(path))


def test_where_there_is_no_file_there_is_no_gate(tmp_path):
    with pytest.raises(GatepostError, match=r"no gate runs here: .*: No such file or directory"):
        control.supervisor(str(tmp_path / "gatepost.pid"))


@pytest.mark.parametrize("text", ["", "1", "-5", "0", "abc", "99999999999999999999999999"])
def test_a_held_file_without_a_process_of_its_own_is_not_signalled(tmp_path, text):
    path = tmp_path / "gatepost.pid"
    with supervisor(path, text), pytest.raises(GatepostError):
        control.reload(str(path), nothing_listens(), patience_s=0)


def test_a_link_is_not_followed(tmp_path):
    with supervisor(tmp_path / "other.pid"):
        (tmp_path / "gatepost.pid").symlink_to(tmp_path / "other.pid")
        with pytest.raises(GatepostError):
            control.supervisor(str(tmp_path / "gatepost.pid"))


def test_a_reload_is_a_hup_and_its_outcome_the_consoles(tmp_path):
    path = tmp_path / "gatepost.pid"
    with supervisor(path) as process, Console() as console:

        def take(result):
            assert process.stdout is not None
            assert process.stdout.readline() == "HUP\n"
            console.pages["/readyz"] = (200, json.dumps({"warnings": ["port 25: in use"]}).encode())
            text = METRICS.replace(
                f'result="{result}"}} {"1.0" if result == "ok" else "0.0"}', f'result="{result}"}} 2'
            )
            console.pages["/metrics"] = (200, text.encode())

        for result, taken, problems in (("ok", True, ()), ("refused", False, ("port 25: in use",))):
            console.pages["/metrics"] = (200, METRICS.encode())
            taker = threading.Thread(target=take, args=(result,))
            taker.start()
            assert control.reload(str(path), console.address) == control.Reloaded(process.pid, taken, problems)
            taker.join()


def test_a_reload_whose_outcome_nobody_tells(tmp_path):
    path = tmp_path / "gatepost.pid"
    with supervisor(path) as process:
        assert control.reload(str(path), nothing_listens()) == control.Reloaded(process.pid, None)
        with Console() as console:
            outcome = control.reload(str(path), console.address, patience_s=0.3)
            assert outcome == control.Reloaded(process.pid, None)


def test_another_users_gate_cannot_be_asked(tmp_path, monkeypatch):
    def refuse(pid, number):
        assert number is signal.SIGHUP
        raise PermissionError(1, "Operation not permitted")

    path = tmp_path / "gatepost.pid"
    with supervisor(path):
        monkeypatch.setattr("os.kill", refuse)
        with pytest.raises(GatepostError, match="cannot be asked: Operation not permitted"):
            control.reload(str(path), nothing_listens())
        monkeypatch.undo()  # the process is to be ended with the true one
