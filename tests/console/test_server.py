"""The console over real HTTP, on a socket that was bound elsewhere."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gatepost.console.server import application, serve
from gatepost.gate.listeners import bind_one
from gatepost.telemetry import (
    BACKEND_SECONDS,
    LOG_DROPPED,
    MESSAGES,
    REPLIES,
    SESSIONS,
    Metrics,
    StatusBoard,
)


class Console:
    def __init__(self) -> None:
        memory = memoryview(bytearray(Metrics.size_octets(2)))
        Metrics.format(memory)
        self.workers = [Metrics(memory, 0), Metrics(memory, 1)]
        board = memoryview(bytearray(StatusBoard.SIZE_OCTETS))
        self.board = StatusBoard(board)
        self.app = application(Metrics(memory, 2), StatusBoard(board), "1.2.3")
        self.socket = bind_one("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]

    @contextmanager
    def served(self) -> Iterator[None]:
        ours, theirs = socket.socketpair()
        thread = Thread(target=lambda: asyncio.run(serve(self.app, self.socket, theirs)))
        thread.start()
        try:
            yield
        finally:
            ours.close()
            thread.join(20)
            theirs.close()
            self.socket.close()
            assert not thread.is_alive()

    def ask(self, path: str, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path)
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response, body


@pytest.fixture(scope="module")
def console() -> Iterator[Console]:
    console = Console()
    with console.served():
        yield console


def samples(body: bytes) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_metrics_are_prometheus_text_summed_over_the_workers(console):
    first, second = console.workers
    first.name_backends(('ma"il\\',))
    first.inc(first.cell(SESSIONS, "mx"), 2)
    second.inc(second.cell(SESSIONS, "mx"), 3)
    second.inc(second.cell(REPLIES, "rcpt", "relaying"))
    first.inc(first.cell(MESSAGES, "accepted"))
    first.inc(LOG_DROPPED.at(), 4)
    first.observe(first.cell(BACKEND_SECONDS, 'ma"il\\'), 0.02)
    first.backend_state('ma"il\\', up=True)
    response, body = console.ask("/metrics")
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = samples(body)
    assert found["gatepost_info", ("1.2.3",)] == 1
    assert found["gatepost_sessions_total", ("mx",)] == 5
    assert found["gatepost_sessions_total", ("inside",)] == 0
    assert found["gatepost_replies_total", ("relaying", "rcpt")] == 1  # sorted by label name
    assert found["gatepost_messages_total", ("accepted",)] == 1
    assert found["gatepost_log_dropped_total", ()] == 4
    assert found["gatepost_backend_up", ('ma"il\\',)] == 1
    assert found["gatepost_backend_seconds_count", ('ma"il\\',)] == 1
    assert found["gatepost_backend_seconds_sum", ('ma"il\\',)] == pytest.approx(0.02)
    assert found["gatepost_backend_seconds_bucket", ('ma"il\\', "0.01")] == 0
    assert found["gatepost_backend_seconds_bucket", ('ma"il\\', "0.025")] == 1
    assert found["gatepost_backend_seconds_bucket", ('ma"il\\', "+Inf")] == 1
    assert b"# HELP gatepost_sessions_total Sessions begun.\n# TYPE gatepost_sessions_total counter\n" in body


def test_healthz_is_200_while_the_process_runs(console):
    response, body = console.ask("/healthz")
    assert (response.status, json.loads(body)) == (200, {"status": "ok", "version": "1.2.3"})


def test_readyz_says_what_is_wrong(console):
    worker = {"index": 0, "ready": False, "current": False, "answers": True, "restarts": 1, "problem": "was killed"}
    console.board.write({"serving": True, "draining": False, "workers": [worker], "listeners": []})
    response, body = console.ask("/readyz")
    assert (response.status, json.loads(body)["problems"]) == (503, ["worker 0 does not serve: was killed"])
    console.board.write({"serving": True, "workers": [{**worker, "ready": True}], "listeners": []})
    response, body = console.ask("/readyz")
    assert (response.status, json.loads(body)["ready"]) == (200, True)


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz"])
def test_heads_and_headers(console, path):
    response, body = console.ask(path, "HEAD")
    assert response.status in (200, 503)
    assert body == b""
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert "server" not in response.headers


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/", "/../etc/passwd"])
def test_there_is_nothing_else(console, path):
    assert console.ask(path)[0].status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_changed(console, method):
    assert console.ask("/readyz", method)[0].status == 405


def test_the_console_ends_with_its_lifeline_also_while_a_client_holds_a_connection():
    console = Console()
    with console.served():
        assert console.ask("/healthz")[0].status == 200
        idle = socket.create_connection(("127.0.0.1", console.port))
    idle.close()
