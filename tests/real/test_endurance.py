"""What a gate must bear: dying workers, reloads and the end under load, slow clients, lost backends, a full disk.

Each test counts messages: what was answered 250 is behind the gate, once, whatever happened meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
from tests.gatehouse import Gate
from tests.real.console import events, get, metric, no_faults, readiness
from tests.real.load import Load, numbers_in
from tests.real.mounts import mounted, seen_by, small_disk
from tests.real.wire import PATIENCE_S, Wire, message, until
from tests.servers import Postfix
from tests.vectors.lenient import LenientBackend, Transaction

LOCAL = "bob@example.com"
OUTSIDE = "victim@elsewhere.test"

CONFIG = """
[gate]
name = "mx.example.com"
workers = {workers}

[[listen]]
name = "mx"
address = "127.0.0.1:0"

[domains]
local = ["example.com"]

[backend.mail]
address = "127.0.0.1:{backend}"
connections = {connections}

[limits]
sessions_per_client = 0
sessions_per_minute_per_client = 0
messages_per_hour_per_mailbox = 0
memory = "{memory}"

[console]
address = "127.0.0.1:0"
"""

TRUST = """
[[trust]]
network = "127.0.0.2"
why = "comes and goes"
owner = "it@example.com"
"""


def configuration(backend: int, *, workers: int = 2, connections: int = 100, memory: str = "64 MiB") -> str:
    return CONFIG.format(backend=backend, workers=workers, connections=connections, memory=memory)


def arrived(backend: LenientBackend, subject: str) -> list[Transaction]:
    """The messages with this subject that the backend took."""
    return [taken for taken in backend.transactions() if f"Subject: {subject}\r\n".encode() in taken.octets]


@pytest.fixture(scope="module")
def postfix() -> Iterator[Postfix]:
    with Postfix() as server:
        yield server


# ---- a worker that dies


def test_a_thousand_messages_outlive_two_workers(postfix, tmp_path):
    """What was answered 250 is in the mailbox, once; twice at most where the client never heard the reply."""
    numbers = range(1000)
    with Gate(tmp_path, configuration(postfix.port)) as gate:
        port = gate.port
        before = gate.workers()
        assert len(before) == 2
        with Load(port, numbers, threads=12, recipient=LOCAL) as load:
            for worker, answered in zip(before, (200, 500), strict=True):
                until(partial(load.has_done, answered), f"{answered} messages answered")
                assert load.done < 1000
                os.kill(worker, signal.SIGKILL)
            load.join()
        assert load.answered == Counter(numbers)  # each of them, and each once
        assert load.hangups, "nobody noticed that workers died: the test has tested nothing"

        until(lambda: len(set(gate.workers()) - set(before)) == 2, "both workers are started again")
        until(lambda: readiness(gate)["ready"], "/readyz says so")
        with Wire(port) as later:
            later.hello()
            assert later.mail(LOCAL, message("load 1000")).startswith("250")
        died = events(gate, "worker_died")
        assert [record["how"] for record in died] == ["was killed by SIGKILL"] * 2
        assert metric(gate, "gatepost_workers_restarted_total") == 2
        no_faults(gate)

    texts = postfix.arrived("bob", 1001)
    kept = Counter(number for text in texts for number in numbers_in(text))
    lost = [number for number in range(1001) if not kept[number]]
    unexplained = {number: count for number, count in kept.items() if count > 1 + load.doubts[number]}
    assert not lost
    assert not unexplained


# ---- reload

EXPIRED = """
[[deny]]
reverse_path = "*@gone.test"
expires = 2020-01-31
"""


class Versions:
    """Makes each version of a configuration known by a warning in the log, which names a line that no other has.

    Counting reloads would not do: the gate may see the changed file before it hears the HUP, and reload twice.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._number = 0

    def mark(self, text: str) -> str:
        """The text as its next version."""
        self._number += 1
        return text + "\n" * (20 * self._number) + EXPIRED

    def in_force(self, text: str) -> bool:
        """Whether the log says so of this version."""
        place = f"gatepost.toml:{text.count(chr(10))}: "
        return any(place in record["text"] for record in events(self._gate, "warning"))


def test_rules_change_under_load_and_no_session_is_dropped(tmp_path):
    with LenientBackend("strict") as backend:
        plain = configuration(backend.port)
        with (
            Gate(tmp_path, plain) as gate,
            Load(gate.port, range(100_000), threads=8, per_session=0, recipient=LOCAL) as load,
            Wire(gate.port, source="127.0.0.2") as watcher,
        ):
            versions = Versions(gate)

            def reloaded(text: str) -> None:
                version = versions.mark(text)
                gate.reload(version)
                until(partial(versions.in_force, version), "the new version is in force")

            def goes_on() -> None:
                """More messages pass, in the sessions of before."""
                done = load.done
                until(partial(load.has_done, done + 50), "the load goes on")

            goes_on()
            assert watcher.rcpt(OUTSIDE).startswith("550 5.7.1 Relaying is prohibited [")
            for _ in range(3):
                reloaded(plain + TRUST)
                assert watcher.say(f"RCPT TO:<{OUTSIDE}>").startswith("250"), "the very next command"
                goes_on()
                reloaded(plain)
                assert watcher.say(f"RCPT TO:<{OUTSIDE}>").startswith("550 5.7.1 Relaying is prohibited [")
                goes_on()

            # A configuration that does not load changes nothing, and says where it is wrong.
            gate.reload(plain + TRUST.replace("127.0.0.2", "127.0.0.300"))
            wrong = until(lambda: events(gate, "reload_refused"), "the refusal is logged")
            line = plain.count("\n") + 3
            assert f"gatepost.toml:{line}:" in wrong[0]["text"]
            assert "127.0.0.300" in wrong[0]["text"]
            refused = until(lambda: events(gate, "reload_refused")[1:], "what is in force is logged")
            assert refused[0]["text"] == "the configuration before this one stays in force"
            assert watcher.say(f"RCPT TO:<{OUTSIDE}>").startswith("550 5.7.1 ")
            assert watcher.say(f"RCPT TO:<{LOCAL}>").startswith("250")
            until(lambda: any("refused" in text for text in readiness(gate)["warnings"]), "/readyz warns")
            goes_on()

            # The file changes and nobody says so.
            version = versions.mark(plain + TRUST)
            gate.config.write_text(version)
            until(partial(versions.in_force, version), "the change was found")
            assert watcher.say(f"RCPT TO:<{OUTSIDE}>").startswith("250")
            until(lambda: not readiness(gate)["warnings"], "/readyz warns no more")
            goes_on()

            # Listeners come and go; those who are in a session stay in it.
            reloaded(plain.replace('"127.0.0.1:0"', '["127.0.0.1:0", "127.0.0.1:0"]', 1))
            [second] = until(lambda: readiness(gate)["listeners"][1:], "/readyz names the second listener")
            port = int(second["address"].rpartition(":")[2])
            assert port != gate.port
            with Wire(port, source="127.0.0.3") as guest:
                assert guest.rcpt(LOCAL).startswith("250")
                reloaded(plain)
                until(lambda: refuses_connections(port), "nobody listens there any more")
                assert guest.content(message("through a listener that is gone")).startswith("250")
            goes_on()

        assert not load.wrong, load.wrong[:3]
        assert load.hangups == []
        assert load.deferred == []
        assert set(load.answered.values()) == {1}
        kept = Counter(number for taken in backend.transactions() for number in numbers_in(taken.octets))
        assert kept == load.answered
        assert len(arrived(backend, "through a listener that is gone")) == 1
        no_faults(gate)


def refuses_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), PATIENCE_S).close()
    except OSError:
        return True
    return False


# ---- the end


def test_term_lets_content_end_and_nothing_begin(tmp_path):
    with LenientBackend("strict") as backend, Gate(tmp_path, configuration(backend.port)) as gate, ExitStack() as stack:
        in_data, in_bdat, between, idle = (stack.enter_context(Wire(gate.port)) for _ in range(4))
        for wire in (in_data, in_bdat, between):
            assert wire.rcpt(LOCAL).startswith("250")
        idle.hello()
        assert in_data.say("DATA").startswith("354")
        in_data.send(b"Subject: in content when TERM came\r\n\r\nfirst half\r\n")
        chunk = b"Subject: in a chunk when TERM came\r\n\r\n"
        in_bdat.send(b"BDAT %d\r\n" % (len(chunk) + 5) + chunk)
        until(lambda: metric(gate, "gatepost_sessions") == 4, "the sessions are seen")
        gate.terminate()
        assert idle.reply() == "421 4.3.2 This server is going down, try again later"
        assert between.reply() == "421 4.3.2 This server is going down, try again later"
        assert idle.end() == between.end() == b""
        until(lambda: refuses_connections(gate.port), "no new session is taken")
        gate.signal(signal.SIGHUP)  # means nothing now

        in_data.send(b"second half\r\n.\r\n")
        assert in_data.reply().startswith("250")
        in_bdat.send(b"one\r\n")
        assert in_bdat.reply().startswith("250")
        in_bdat.send(b"BDAT 5 LAST\r\ntwo\r\n")
        assert in_bdat.reply().startswith("250")
        assert gate.process is not None
        assert in_data.end() == in_bdat.end() == b"421 4.3.2 This server is going down, try again later\r\n"
        assert gate.process.wait(PATIENCE_S) == 0
        no_faults(gate)
        [taken] = arrived(backend, "in content when TERM came")
        assert taken.octets.endswith(b"\r\n\r\nfirst half\r\nsecond half\r\n")
        [taken] = arrived(backend, "in a chunk when TERM came")
        assert taken.octets.endswith(b"\r\n\r\none\r\ntwo\r\n")
        assert [record["end"] for record in gate.sessions()].count("draining") == 4


# ---- clients that are slow on purpose

SLOW = 1000
SENT_OCTETS = 64 << 10  # by each of them, before it stalls
HELD_OCTETS = 2 << 20  # of content, in the memory of one worker
# What the gate may grow by: content held in memory, and a session in content, its temporary file included.
GROWTH_OCTETS = 2 * HELD_OCTETS + SLOW * (32 << 10)


def memory_octets(gate: Gate) -> int:
    """The proportional set size of all its processes: what they share is counted once."""
    total = 0
    for pid in gate.processes():
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        found = re.search(r"^Pss:\s+(\d+) kB$", rollup, re.MULTILINE)
        assert found is not None, rollup
        total += int(found[1]) << 10
    return total


def temporary_files(gate: Gate) -> int:
    """Files without a name that its workers hold."""
    where = str(gate.directory / "gatepost-data" / "tmp")
    count = 0
    for pid in gate.workers():
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                count += str(link.readlink()).startswith(where)
    return count


@pytest.fixture
def many_sockets() -> None:
    """Two thousand connections begin or end in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard == resource.RLIM_INFINITY or hard >= 4096, "open files are limited too tightly to try this"
    if soft != resource.RLIM_INFINITY and soft < 4096:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))


def test_a_thousand_slow_clients_cost_little_and_keep_nobody_out(many_sockets, tmp_path):
    lines = (b"z" * 62 + b"\r\n") * (SENT_OCTETS // 64)

    def stall(number: int) -> Wire:
        wire = Wire(gate.port, source=f"127.4.{number // 250}.{number % 250 + 1}")
        assert wire.rcpt(LOCAL).startswith("250"), wire.said
        assert wire.say("DATA").startswith("354"), wire.said
        wire.send(f"Subject: slow {number}\r\n\r\n".encode() + lines + b"unfinis")
        return wire

    with LenientBackend("strict") as backend, ExitStack() as stack:
        config = configuration(backend.port, connections=400, memory=f"{HELD_OCTETS >> 20} MiB")
        gate = stack.enter_context(Gate(tmp_path, config))
        with Wire(gate.port) as warm:
            warm.hello()
            assert warm.mail(LOCAL, message("before")).startswith("250")
        until(lambda: metric(gate, "gatepost_journal_records_total") >= 1, "the journal's writer has begun its work")
        before = memory_octets(gate)
        with ThreadPoolExecutor(8) as pool:
            wires = list(pool.map(stall, range(SLOW)))
        for wire in wires:
            stack.callback(wire.close)
        enough = SLOW - 2 * HELD_OCTETS // SENT_OCTETS
        until(lambda: temporary_files(gate) >= enough, "content beyond the bound is in files")
        assert metric(gate, "gatepost_sessions") == SLOW
        grown = memory_octets(gate) - before
        print(f"{SLOW} slow clients: {grown >> 20} MiB")
        assert grown < GROWTH_OCTETS < SLOW * SENT_OCTETS, f"{grown >> 10} KiB"

        with Wire(gate.port, source="127.0.0.10") as bystander:
            bystander.hello()
            for number in range(20):
                assert bystander.mail(LOCAL, message(f"bystander {number}")).startswith("250")
        assert all(len(arrived(backend, f"bystander {number}")) == 1 for number in range(20))

        # Some go on after all: their mail is whole.  The others never do, and leave nothing behind.
        for wire in wires[::100]:
            wire.send(b"hed\r\n.\r\n")
        for number in range(0, SLOW, 100):
            assert wires[number].reply().startswith("250"), wires[number].said
            [taken] = arrived(backend, f"slow {number}")
            assert taken.octets.endswith(b"\r\n\r\n" + lines + b"unfinished\r\n")
        for wire in wires:
            wire.close()
        until(lambda: metric(gate, "gatepost_sessions") == 0, "their sessions ended")
        until(lambda: temporary_files(gate) == 0, "their files are gone")
        assert len(backend.transactions()) == 1 + 20 + SLOW // 100
        assert not events(gate, "worker_died")
        no_faults(gate)


# ---- a backend that is lost, killed, or stalls


def test_a_backend_out_of_reach_defers_and_comes_back_by_itself(postfix, tmp_path):
    postfix.stop()
    until(lambda: refuses_connections(postfix.port), "Postfix is down")
    rcpt = f"RCPT TO:<{LOCAL}>"
    try:
        with Gate(tmp_path, configuration(postfix.port)) as gate, Wire(gate.port) as wire:
            assert wire.rcpt(LOCAL) == "451 4.4.1 The server behind this one does not answer, try again later"
            until(lambda: readiness(gate)["backends"] == {"mail": "down"}, "/readyz says so")
            status, body = get(gate, "/readyz")
            assert status == 200  # a gate that defers serves
            assert "its mail is deferred with 451" in body
            assert metric(gate, "gatepost_backend_up", 'backend="mail"') == 0
            postfix.start()
            until(lambda: wire.say(rcpt).startswith("250"), "the next try passes")
            assert wire.content(message("after it came back")).startswith("250")
            until(lambda: readiness(gate)["backends"] == {"mail": "up"}, "/readyz says so")

            # Killed between RCPT and DATA: a deferral, and the message is the client's to send again.
            assert wire.envelope(LOCAL).startswith("250")
            postfix.stop()
            until(lambda: refuses_connections(postfix.port), "Postfix is down")
            assert wire.content(message("while it was down")).startswith("451 4.4.")
            assert wire.envelope(LOCAL).startswith("451 4.4.1 ")
            until(lambda: readiness(gate)["backends"] == {"mail": "down"}, "/readyz says so")
            postfix.start()
            until(lambda: wire.say(rcpt).startswith("250"), "the next try passes")
            assert wire.content(message("sent again")).startswith("250")
            no_faults(gate)
    finally:
        if refuses_connections(postfix.port):
            postfix.start()
    until(lambda: subjects(postfix, "sent again") == 1, "the message that was sent again arrives")
    assert subjects(postfix, "after it came back") == 1
    assert subjects(postfix, "while it was down") == 0


def subjects(server: Postfix, subject: str) -> int:
    """So many messages with this subject are in bob's mailbox now."""
    return sum(f"\r\nSubject: {subject}\r\n".encode() in octets for octets in server.arrived("bob", 0))


def test_connections_that_died_are_replaced_unseen(tmp_path):
    """Idle ones, and one with a transaction on it whose content has not been sent."""

    def cut() -> None:
        connections = list(backend.connections)
        assert connections
        for connection in connections:
            backend._loop.call_soon_threadsafe(connection.abort)
        until(lambda: not set(connections) & backend.connections, "the backend's connections are cut")

    with LenientBackend("strict") as backend, Gate(tmp_path, configuration(backend.port)) as gate:
        with Wire(gate.port) as wire:
            wire.hello()
            for number in range(10):
                assert wire.envelope(LOCAL).startswith("250")
                assert wire.say("RCPT TO:<alice@example.com>").startswith("250")
                cut()
                assert wire.content(message(f"cut in {number}")).startswith("250")
                cut()
        assert len(backend.transactions()) == 10
        for number in range(10):
            [taken] = arrived(backend, f"cut in {number}")
            assert [recipient.argument.split()[0] for recipient in taken.recipients] == [
                b"<bob@example.com>",
                b"<alice@example.com>",
            ]
        no_faults(gate)


ROUTED = """
[backend.other]
address = "127.0.0.1:{other}"

[[route]]
forward_paths = ["*@other.example.com"]
backend = "other"
"""


@contextmanager
def stalled(server: Postfix) -> Iterator[None]:
    """All its processes stand still."""
    master = int((server.directory / "queue" / "pid" / "master.pid").read_text())
    os.killpg(master, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(master, signal.SIGCONT)


def test_a_backend_that_stalls_holds_up_its_own_mail_alone(postfix, tmp_path):
    with LenientBackend("strict") as other, ExitStack() as stack:
        config = configuration(postfix.port, workers=1).replace('["example.com"]', '["example.com", "*.example.com"]')
        gate = stack.enter_context(Gate(tmp_path, config + ROUTED.format(other=other.port)))
        at_rcpt, at_end, gone, beside = (stack.enter_context(Wire(gate.port)) for _ in range(4))
        assert at_end.rcpt(LOCAL).startswith("250")
        for wire in (at_rcpt, gone, beside):
            wire.hello()
            assert wire.say("MAIL FROM:<sender@sender.test>").startswith("250")
        with stalled(postfix):
            assert at_end.say("DATA").startswith("354")
            at_end.send(message("stalled at its end") + b".\r\n")
            at_rcpt.send(f"RCPT TO:<{LOCAL}>\r\n".encode())
            gone.send(f"RCPT TO:<{LOCAL}>\r\n".encode())
            assert beside.say("RCPT TO:<jane@other.example.com>").startswith("250")
            assert beside.content(message("not held up")).startswith("250")
            assert len(arrived(other, "not held up")) == 1
            gone.close()
            assert at_end.quiet()
            assert at_rcpt.quiet()
        assert at_end.reply().startswith("250")
        assert at_rcpt.reply().startswith("250")
        assert at_rcpt.content(message("stalled at RCPT")).startswith("250")
        for subject in ("stalled at its end", "stalled at RCPT"):
            until(partial(subjects, postfix, subject), f"{subject!r} arrives")
        assert subjects(postfix, "stalled at its end") == subjects(postfix, "stalled at RCPT") == 1
        for wire in (at_end, at_rcpt, beside):
            assert wire.say("QUIT").startswith("221")
        until(lambda: metric(gate, "gatepost_sessions") == 0, "who hung up meanwhile is gone, too")
        no_faults(gate)


# ---- a full disk

FULL = """
[gate]
name = "mx.example.com"
workers = 1
data = "{disk}"

[[listen]]
name = "mx"
address = "127.0.0.1:0"

[domains]
local = ["example.com", "kept.example.com"]

[backend.mail]
address = "127.0.0.1:{mail}"

[backend.kept]
address = "embedded:"

[[route]]
forward_paths = ["*@kept.example.com"]
backend = "kept"

[limits]
memory = "1 MiB"

[console]
address = "127.0.0.1:0"
"""
KEPT = "archive@kept.example.com"


def fill(file: Path) -> None:
    """Take what room the disk has left, to the last octet."""
    with file.open("ab", buffering=0) as ballast:
        for size in (1 << 16, 1 << 9, 1):
            with contextlib.suppress(OSError):
                while ballast.write(bytes(size)) == size:
                    pass


def test_a_full_disk_defers_and_loses_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    large = message("large", ("x" * 70 + "\r\n") * (2 << 20 >> 6))  # more than may be in memory
    with (
        LenientBackend("strict") as backend,
        Gate(tmp_path, FULL.format(disk=disk, mail=backend.port), within=mounted(small_disk(disk, "12m"))) as gate,
        Wire(gate.port) as wire,
    ):
        workers = gate.workers()
        seen = seen_by(gate.pid, disk)
        maildir = seen / "mail" / "kept.example.com" / "archive"
        wire.hello()

        # The embedded mailbox: what was answered 250 is there, whole; of the rest there is nothing.
        kept: list[bytes] = []
        reply = ""
        for number in range(100):
            octets = message(f"kept {number}", ("y" * 70 + "\r\n") * 5000)
            reply = wire.mail(KEPT, octets)
            if not reply.startswith("250"):
                break
            kept.append(octets)
        assert reply.startswith("452 4.3.1 "), reply
        assert len(kept) > 5

        def check_mailbox() -> None:
            files = [file.read_bytes() for file in (maildir / "new").iterdir()]
            assert all(any(file.endswith(octets) for file in files) for octets in kept)
            assert len(files) == len(kept)
            assert not list((maildir / "tmp").iterdir())

        check_mailbox()

        # Temporary files: what does not fit into memory is deferred, what does fit passes.
        fill(seen / "ballast")
        assert wire.mail(LOCAL, large).startswith("452 4.3.1 ")
        assert wire.envelope(LOCAL).startswith("250")
        half = len(large) // 2
        wire.send(b"BDAT %d\r\n" % half + large[:half])
        assert wire.reply().startswith("452 4.3.1 ")
        wire.send(b"BDAT %d LAST\r\n" % (len(large) - half) + large[half:])
        assert wire.reply().startswith("503 ")  # the transaction is over, and its last chunk is passed over
        assert wire.mail(KEPT, message("no room")).startswith("452 4.3.1 ")
        assert wire.mail(LOCAL, message("small")).startswith("250")
        assert not arrived(backend, "large")
        assert len(arrived(backend, "small")) == 1
        check_mailbox()

        # Somebody makes room: the same session goes on.
        (seen / "ballast").unlink()
        for file in (maildir / "new").iterdir():
            file.unlink()
        assert wire.mail(LOCAL, large).startswith("250")
        [taken] = arrived(backend, "large")
        assert taken.octets.endswith(large)
        kept = [message("room again")]
        assert wire.mail(KEPT, kept[0]).startswith("250")
        check_mailbox()
        assert wire.say("QUIT").startswith("221")
        assert any("deferred with 452" in record["text"] for record in events(gate, "storage"))
        assert gate.workers() == workers
        no_faults(gate)
