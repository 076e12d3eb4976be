"""The instruments are right: the sink's dialogue and counts however octets arrive, the generator's judgement."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from bench.ends import Sink, compiled, run_load
from bench.machine import Failed, Ports

PORTS = Ports()
DIALOGUE = (
    b"EHLO client.test\r\n"
    b"MAIL FROM:<a@b.test> SIZE=3\r\nRCPT TO:<x@elsewhere.test>\r\n"
    b"RCPT TO:<c@example.com>\r\nrcpt to:<d@example.com>\r\n"
    b"DATA\r\n"
    b"Subject: x\r\n\r\n..\r\n...\r\n.x\r\na.\r\n.\r\r\n\n.\n\r.\r\n.\n\r\n.\r\n"
    b"RSET\r\n"
    b"MAIL FROM:<>\r\nRSET\r\nMAIL FROM:<>\r\nRCPT TO:<c@example.com>\r\nDATA\r\n"
    b".\r\n"
    b"DATA\r\nMAIL FROM:<>\r\nDATA\r\nNOOP\r\nBOGUS\r\n"
    b"QUIT\r\n"
)
# A dot is removed at the start of each of six lines: "..", "...", ".x", ".\r\r\n" (which ends no content), ".\n".
CONTENT_OCTETS = len(b"Subject: x\r\n\r\n.\r\n..\r\nx\r\na.\r\n\r\r\n\n.\n\r.\r\n\n\r\n")
CODES = [220, 250, 250, 550, 250, 250, 354, 250, 250, 250, 250, 250, 250, 354, 250, 503, 250, 554, 250, 500, 221]


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = Sink(PORTS.free())
    yield sink
    sink.stop()


def codes(replies: bytes) -> list[int]:
    return [int(line[:3]) for line in replies.split(b"\r\n") if line[3:4] == b" "]


def converse(port: int, pieces: list[bytes]) -> list[int]:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        replies = connection.recv(1000)
        for piece in pieces:
            connection.sendall(piece)
        while octets := connection.recv(65536):
            replies += octets
    return codes(replies)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_the_sink_reads_the_same_however_the_octets_arrive(sink: Sink, size: int) -> None:
    pieces = [DIALOGUE[i : i + size] for i in range(0, len(DIALOGUE), size)]
    assert converse(sink.port, pieces) == CODES
    counts = sink.counts()
    assert (counts.messages, counts.recipients, counts.refused, counts.resets) == (2, 3, 1, 2)
    assert counts.octets == CONTENT_OCTETS
    assert counts.errors == 1


def test_the_sink_ends_a_command_line_without_crlf_or_end(sink: Sink) -> None:
    assert converse(sink.port, [b"NOOP\nQUIT\r\n"]) == [220, 500]
    with socket.create_connection(("127.0.0.1", sink.port), timeout=20) as connection:
        connection.sendall(b"x" * 4096)
        assert codes(connection.recv(1000)) == [220]
        connection.sendall(b"x" * 10)
        assert codes(connection.recv(1000)) == [500]
    assert sink.counts().errors == 2


def test_a_client_that_reads_nothing_is_not_read_from(sink: Sink) -> None:
    count = 200_000
    with socket.create_connection(("127.0.0.1", sink.port), timeout=20) as connection:
        sender = threading.Thread(target=connection.sendall, args=(b"NOOP\r\n" * count + b"QUIT\r\n",))
        sender.start()
        replies = b""
        while octets := connection.recv(65536):
            replies += octets
        sender.join()
    assert codes(replies) == [220] + [250] * count + [221]


@pytest.mark.parametrize("pipelining", [[], ["--pipelining"]])
@pytest.mark.parametrize("size", [512, 4096, 4097, 1 << 20])
def test_what_the_generator_says_it_sent_has_arrived(sink: Sink, pipelining: list[str], size: int) -> None:
    options = ["--size", str(size), "--sessions", "3", "--messages-each", "4", *pipelining]
    result = run_load(sink.port, options, units=30, seconds=10)
    counts = sink.counts()
    assert result.units == result.messages == counts.messages >= 30
    assert counts.octets == result.messages * size
    assert result.connections == counts.connections
    assert (counts.open, counts.errors) == (0, 0)
    assert 0 < result.p50_ms <= result.p99_ms <= result.max_ms


def test_a_refusal_counts_as_a_unit_only_where_it_is_expected(sink: Sink) -> None:
    options = ["--recipient", "x@elsewhere.test", "--sessions", "2"]
    result = run_load(sink.port, [*options, "--refuse"], units=10, seconds=10)
    assert (result.units, result.messages, sink.counts().refused) == (10, 0, 10)
    with pytest.raises(Failed, match=r"RCPT was not answered 250[\s\S]*C RCPT TO:<x@elsewhere.test>\s+S 550 5.7.1"):
        run_load(sink.port, options, units=10, seconds=10)
    with pytest.raises(Failed, match="RCPT was not refused"):
        run_load(sink.port, ["--refuse"], units=10, seconds=10)


@contextmanager
def saying(*replies: bytes) -> Iterator[int]:
    """A server that sends the first at once, each other after the client's next segment; b"": it closes instead."""
    with socket.create_server(("127.0.0.1", PORTS.free())) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(ConnectionError):
                for reply in replies:
                    if not reply:
                        break
                    connection.sendall(reply)
                    connection.recv(1000)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


@pytest.mark.parametrize(
    ("replies", "why"),
    [
        ([b"421 4.3.2 Busy\r\n"], "the greeting is not 220"),
        ([b"220 a\r\n", b"250-a\r\n250 b\r\n", b"450 no\r\n"], "MAIL was not answered 250"),
        ([b"220 a\r\n", b"250-a\r\n250 b\r\n", b""], "closed the connection"),
        ([b"220 a\r\n", b"250 b\r\n250 c\r\n250 d\r\n"], "RCPT|DATA"),
        ([b"220 a\n"], "a reply line is not one"),
        ([b"220-" + b"a" * 9000], "without an end"),
    ],
)
def test_an_unexpected_reply_ends_the_run_with_its_transcript(replies: list[bytes], why: str) -> None:
    with saying(*replies) as port, pytest.raises(Failed, match=why):
        run_load(port, ["--sessions", "1"], units=1, seconds=5)


def test_a_server_that_says_nothing_fails_the_unit() -> None:
    with socket.create_server(("127.0.0.1", PORTS.free())) as server, pytest.raises(Failed, match="no reply in time"):
        run_load(server.getsockname()[1], ["--sessions", "1", "--unit-seconds", "0.2"], units=1, seconds=5)


@pytest.mark.parametrize("address", ["192.0.2.1:25", "128.0.0.1:25", "localhost:25", "127.0.0.1:0", "127.0.0.1"])
def test_nothing_but_loopback(address: str) -> None:
    for mode, option in (("load", "--to"), ("sink", "--listen")):
        run = subprocess.run([compiled(), mode, option, address], capture_output=True, check=False, timeout=10)
        assert run.returncode == 2


def test_the_sink_ends_with_its_parent_or_at_term(sink: Sink) -> None:
    last = sink.stop()
    assert last is not None
    assert last.messages == 0
    with pytest.raises(ProcessLookupError):
        os.kill(sink._process.pid, 0)
