"""The instruments are right: sink, generator and bare trial, the machine's pace, and what is made of the samples."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bench import machine
from bench.calm import FIRST_LOOK, TRIES, WAIT_S, Calm
from bench.ends import Sink, compiled, run_load
from bench.machine import Failed, Ports, pace_s
from bench.programs import ELSEWHERE, Bare
from bench.report import BARE, GATE, GrowthSample, Results, Sample, text

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


# ---- the bare trial


@pytest.fixture
def bare(sink: Sink, tmp_path: Path) -> Iterator[Bare]:
    bare = Bare(tmp_path, PORTS, sink.port)
    try:
        bare.start()  # with the proof that the policy decides
        yield bare
    finally:
        bare.stop()


@pytest.mark.parametrize("options", [[], ["--pipelining"], ["--messages-each", "10"], ["--size", "1048576"]])
def test_the_bare_trial_passes_on_what_it_accepts(sink: Sink, bare: Bare, options: list[str]) -> None:
    before = sink.counts()
    result = run_load(bare.port, ["--sessions", "5", *options], units=50, seconds=20)
    after = sink.counts()
    assert after.messages - before.messages == result.messages >= 50
    assert after.octets - before.octets == result.messages * result.size_octets
    assert after.errors == 0
    assert after.connections - before.connections <= 5 * 2  # each worker keeps its own


def test_the_bare_trial_refuses_by_itself(sink: Sink, bare: Bare) -> None:
    result = run_load(bare.port, ["--recipient", ELSEWHERE, "--refuse", "--sessions", "5"], units=50, seconds=20)
    assert result.units >= 50
    assert sink.counts().refused == 0


# ---- the machine's pace


def state() -> tuple[str, int, set[int]]:
    """Children, open files, blocked signals."""
    files = sum(1 for _ in Path("/proc/self/fd").iterdir())
    kept = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
    return kept, files, signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_the_pace_is_a_time_and_leaves_nothing_behind() -> None:
    before = state()
    assert 0 < pace_s() < 5
    assert state() == before


def test_the_pace_of_one_cpu() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        assert 0 < pace_s() < 5
        assert os.sched_getaffinity(0) == {max(allowed)}
    finally:
        os.sched_setaffinity(0, allowed)


def test_a_child_that_cannot_take_the_pace_goes_no_further(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(_loops: int) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "_spin", interrupted)
    before, parent = state(), os.getpid()
    try:
        with pytest.raises(Failed, match="pace"):
            pace_s()
    finally:
        if os.getpid() != parent:
            (tmp_path / "came this far").touch()
            os._exit(0)
    assert state() == before
    assert not list(tmp_path.iterdir())


def test_without_a_process_for_each_cpu_there_is_no_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, fork, allowed = min(os.sched_getaffinity(0)), os.fork, iter((True, False))

    def runs_out() -> int:
        if next(allowed):
            return fork()
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", runs_out)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {cpu, cpu + 1})
    before = state()
    with pytest.raises(Failed, match=os.strerror(errno.EAGAIN)):
        pace_s()
    assert state() == before


class Script:
    """A machine whose pace is scripted, the last for ever, and whose clock only sleep and measurements move."""

    def __init__(self, *paces: float, patient: bool = True, spare_s: float = 0.0) -> None:
        self.now = 0.0
        self._paces = [1.0] * FIRST_LOOK + list(paces)
        self._measured = 0
        self.calm = Calm(patient=patient, pace_s=self._pace_s, clock=lambda: self.now, sleep=self._sleep)
        self.calm._spare_s = spare_s

    def _pace_s(self) -> float:
        return self._paces.pop(0) if len(self._paces) > 1 else self._paces[0]

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def measure(self) -> int:
        """The number of this measurement; it takes a second."""
        self.now += 1.0
        self._measured += 1
        return self._measured

    def take(self) -> tuple[int, float, int]:
        taken = self.calm.take(self.measure)
        return taken.result, taken.pace_s, taken.tries


def test_what_was_measured_in_calm_counts_at_once() -> None:
    script = Script(1.1, 1.15)
    assert script.take() == (1, 1.15, 1)


def test_what_was_not_is_measured_again() -> None:
    assert Script(1.0, 2.0, 1.1, 1.0).take() == (2, 1.1, 2)


def test_a_noisy_moment_before_is_waited_out() -> None:
    script = Script(2.0, 2.0, 1.0, 1.0, spare_s=10.0)
    began = script.now
    assert script.take() == (1, 1.0, 1)
    assert began + 1.0 < script.now < began + 1.5


def test_the_calmest_counts_where_none_was_calm() -> None:
    assert Script(1.0, 1.9, 1.0, 1.5, *(1.0, 1.7) * TRIES, spare_s=1000.0).take() == (2, 1.5, TRIES)


def test_nothing_is_measured_again_where_no_calm_moment_comes() -> None:
    script = Script(1.0, 1.9, 2.0, spare_s=1000.0)
    began = script.now
    assert script.take() == (1, 1.9, 1)
    assert script.now == pytest.approx(began + 1.0 + WAIT_S, abs=0.1)


def test_calm_is_judged_by_the_best_moment_so_far() -> None:
    assert Script(1.0, 1.1, 0.5, 0.5).take()[0] == 1
    assert Script(0.5, 1.0, 0.5, 0.5).take() == (2, 0.5, 2)


def test_waiting_for_calm_at_most_doubles_the_time() -> None:
    script = Script(2.0)
    began = script.now
    for _ in range(30):
        script.take()
    assert began + 55.0 < script.now < began + 2 * 30 + WAIT_S


def test_no_calm_takes_the_first() -> None:
    script = Script(2.0, 3.0, 1.0, patient=False)
    began = script.now
    assert script.take() == (1, 3.0, 1)
    assert script.now == began + 1.0


# ---- the report


def sample(program: str, cpu_s: float, *, pace_s: float = 0.01, tries: int = 1) -> Sample:
    return Sample(program, "accept-fresh", 0, 100, 100.0 / cpu_s, cpu_s, 1.0, 2.0, 0.0, pace_s=pace_s, tries=tries)


def results(*samples: Sample) -> Results:
    names = {name: name for name in (GATE, BARE, "postfix")}
    return Results("a machine", "", 1, 1.0, names, 0.01, samples=list(samples))


def test_the_report_tells_how_calm_it_was() -> None:
    measured = results(sample(GATE, 1.0, pace_s=0.011), sample("postfix", 2.0, pace_s=0.015, tries=8))
    measured.growth.append(GrowthSample("workers", "1", 0, 1.0, 1.0, pace_s=0.012, tries=2))
    told = measured.calm()
    assert (told["samples"], told["again"], told["not_calm"]) == (3, 2, 1)
    assert told["worst"] == pytest.approx(1.5)
    assert "Of 3 samples 2 were measured again; 1 that count" in text(measured)
    assert [line.split("|")[-2].strip() for line in text(measured).splitlines() if "±" in line and "|" in line] == [
        "1.10",
        "1.50",
    ]
    json = measured.as_json()
    assert json["pace"] == told


def test_the_bare_trial_stands_beside_the_targets_it_was_measured_for() -> None:
    with_bare = results(sample(GATE, 1.0), sample("postfix", 2.0), sample(BARE, 0.5))
    bare = {(j.what, j.bare) for j in with_bare.judgements()}
    assert bare == {
        ("CPU for 1,000 over postfix", 0.25),
        ("throughput over postfix", 4.0),
        ("p99 latency over postfix", None),
    }
    assert "bare trial" in text(with_bare)
    without = results(sample(GATE, 1.0), sample("postfix", 2.0))
    assert all(j.bare is None for j in without.judgements())
    assert "bare trial" not in text(without)
