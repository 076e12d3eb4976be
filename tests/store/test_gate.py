"""The journal of a live gate: several workers, one that is killed, a disk that is full, a database that is away."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import smtplib
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.gatehouse import Gate
from tests.real.mounts import mounted, small_disk
from tests.servers import PostgreSQL
from tests.store.places import new_database

from gatepost.errors import StorageError
from gatepost.store import JournalSettings, backlog_directory, waiting
from gatepost.store.database import sqlite_path
from gatepost.store.journal import Journal, Kept, Query

PATIENCE_S = 30.0

CONFIG = """\
[gate]
name = "mx.example.com"
data = "data"
workers = 2

[[listen]]
name = "mx"
address = "127.0.0.1:0"

[domains]
local = ["example.com"]

[backend.mailbox]
address = "embedded:"

[limits]
sessions_per_minute_per_client = 0
errors_per_session = 0

[console]
address = "127.0.0.1:0"
"""


def refused(gate: Gate, number: int) -> list[str]:
    """So many relay attempts in one session: the references in the replies."""
    with smtplib.SMTP("127.0.0.1", gate.port, timeout=PATIENCE_S) as client:
        client.helo("client.test")
        client.mail("a@stranger.test")
        replies = [client.rcpt("victim@elsewhere.test") for _ in range(number)]
    assert {code for code, _ in replies} == {550}
    return [re.findall(r"\[(.*)\]$", text.decode())[0] for _, text in replies]


def kept(gate: Gate, reference: str) -> bool:
    return waiting(backlog_directory(str(gate.directory / "data")), reference) is not None


def until_kept(gate: Gate, references: list[str]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not all(kept(gate, reference) for reference in references):
        assert time.monotonic() < end, gate.said()
        time.sleep(0.02)


def test_all_workers_write_to_the_same_files(tmp_path):
    with Gate(tmp_path, CONFIG) as gate:
        references = [reference for _ in range(20) for reference in refused(gate, 10)]
        until_kept(gate, references)
    assert all(kept(gate, reference) for reference in references)
    backlog = backlog_directory(str(tmp_path / "data"))
    assert sorted(path.name for path in backlog.iterdir()) == ["00000001.jsonl", "id", "lock"]


def test_what_was_refused_before_the_gate_ended_is_kept(tmp_path):
    with Gate(tmp_path, CONFIG) as gate:
        references = refused(gate, 50)
        assert gate.stop() == 0
    assert all(kept(gate, reference) for reference in references)


def test_workers_that_are_killed_take_no_more_along_than_their_last_moment(tmp_path):
    with Gate(tmp_path, CONFIG) as gate:
        before = [reference for _ in range(10) for reference in refused(gate, 10)]
        until_kept(gate, before)
        killed = set(gate.workers())
        refused(gate, 100)
        for worker in killed:
            os.kill(worker, signal.SIGKILL)
        after: list[str] = []
        end = time.monotonic() + PATIENCE_S
        while not after:
            assert time.monotonic() < end, gate.said()
            with contextlib.suppress(OSError, smtplib.SMTPException):  # until the new workers are there
                after = refused(gate, 10)
        until_kept(gate, before + after)


def dropped(gate: Gate) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{gate.console_port}/metrics", timeout=PATIENCE_S) as answer:
        text = answer.read().decode()
    return float(re.findall(r"^gatepost_journal_dropped_total (.*)$", text, re.MULTILINE)[0])


@pytest.mark.real
def test_a_full_disk_costs_entries_and_no_session(tmp_path):
    small = tmp_path / "data" / "journal" / "backlog"
    small.mkdir(parents=True)
    with Gate(tmp_path, CONFIG, within=mounted(small_disk(small, "64k"))) as gate:
        end = time.monotonic() + PATIENCE_S
        while not dropped(gate):
            assert time.monotonic() < end, gate.said()
            refused(gate, 50)
        gate.wait_for_line(
            lambda line: "the journal cannot be written in" in line and "No space left on device" in line
        )
        assert refused(gate, 1)
        view = Path(f"/proc/{gate.workers()[0]}/root{small}/00000001.jsonl").read_bytes()
    assert view.endswith(b"}\n"), "no half line is left"
    assert 20_000 < len(view) <= 65_536


# --- What stands in the journal ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def journal_of(gate: Gate, url: str = "") -> Iterator[Journal]:
    journal = Journal(str(gate.directory / "data"), JournalSettings(url=url))
    try:
        yield journal
    finally:
        journal.close()


def entries(gate: Gate, query: Query = Query(), wanted: int = 0, url: str = "") -> list[Kept]:  # noqa: B008  a value
    """What the journal has, the oldest first, once there are so many."""
    end = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(StorageError), journal_of(gate, url) as journal:
            found = journal.search(query, 100_000)[::-1]
            if len(found) >= wanted:
                return found
        assert time.monotonic() < end, gate.said()
        time.sleep(0.02)


def ready(gate: Gate) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{gate.console_port}/readyz", timeout=PATIENCE_S) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def until_ready(gate: Gate, wanted: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    end = time.monotonic() + PATIENCE_S
    while not wanted(body := ready(gate)):
        assert time.monotonic() < end, (body, gate.said())
        time.sleep(0.05)
    return body


def message(number: int) -> bytes:
    return b"Subject: %d\r\nMESSAGE-id:\r\n <%d@client.test>\r\n\r\nBody\r\n" % (number, number)


def sent(gate: Gate, number: int = 1, recipients: Sequence[str] = ("bob@example.com",)) -> tuple[int, bytes]:
    with smtplib.SMTP("127.0.0.1", gate.port, timeout=PATIENCE_S) as client:
        client.ehlo("client.test")
        client.mail("a@stranger.test")
        for recipient in recipients:
            client.rcpt(recipient)
        return client.data(message(number))


def test_every_session_transaction_and_verdict_is_there(tmp_path):
    denied = '\n[[deny]]\nreverse_path = "*@spam.test"\n'
    with Gate(tmp_path, CONFIG + denied) as gate:
        with smtplib.SMTP("127.0.0.1", gate.port, timeout=PATIENCE_S) as client:
            client.ehlo("client.test")
            client.mail("x@spam.test")
            client.mail("a@stranger.test")
            client.rcpt("Bob@example.com")
            client.rcpt("victim@elsewhere.test")
            client.rset()
            client.mail("<>")
            client.rcpt("bob@example.com")
            client.rcpt("carol@example.com")
            assert client.data(message(7))[0] == 250
            client.mail("a@stranger.test")
            client.rcpt("bob@example.com")
            assert client.docmd("DATA")[0] == 354
            client.send(b"bare\nnewline\r\n.\r\n")
            assert client.getreply()[0] == 550
        found = entries(gate, wanted=6)
        line = gate.wait_for_session(lambda line: line["end"] == "quit")
        with journal_of(gate) as journal:
            (session,) = journal.sessions(Query(session=line["reference"]), 5)
    told = [
        (one.entry.number, one.entry.stage, str(one.entry.reverse_path), str(one.entry.forward_path), one.entry.verdict)
        for one in sorted(found, key=lambda one: (one.entry.number, str(one.entry.forward_path)))
    ]
    assert told == [
        (1, "mail", "x@spam.test", "None", "refused"),
        (2, "rcpt", "a@stranger.test", "Bob@example.com", "admitted"),
        (2, "rcpt", "a@stranger.test", "victim@elsewhere.test", "refused"),
        (3, "content", "<>", "bob@example.com", "accepted"),
        (3, "content", "<>", "carol@example.com", "accepted"),
        (4, "content", "a@stranger.test", "bob@example.com", "refused"),
    ]
    by_path = {(one.entry.number, str(one.entry.forward_path)): one.entry for one in found}
    accepted = by_path[3, "bob@example.com"]
    assert (accepted.message, accepted.message_id) == (f"{line['reference']}.1", "<7@client.test>")
    assert accepted.size == len(message(7))
    assert accepted.by.endswith("gatepost.toml:11")
    assert accepted.reply.startswith("250 ")
    refused_ = by_path[2, "victim@elsewhere.test"]
    assert (refused_.reason, refused_.reference) == ("relaying", f"{line['reference']}-2")
    assert by_path[4, "bob@example.com"].reason == "content"
    assert (session.how, session.hello, str(session.client), session.errors) == ("quit", "client.test", "127.0.0.1", 3)
    assert {one.session.hello for one in found} == {"client.test"}


def test_no_content_and_no_secret_is_in_it(tmp_path):
    with Gate(tmp_path, CONFIG) as gate:
        assert sent(gate)[0] == 250
        entries(gate, wanted=1)
    there = b"".join(path.read_bytes() for path in (tmp_path / "data" / "journal").rglob("*") if path.is_file())
    assert b"Body" not in there
    assert b"Subject" not in there


def test_who_watches_the_journal_reads_a_refusal_while_its_session_is_open(tmp_path):
    with Gate(tmp_path, CONFIG) as gate, smtplib.SMTP("127.0.0.1", gate.port, timeout=PATIENCE_S) as client:
        client.helo("client.test")
        client.mail("a@stranger.test")
        client.rcpt("victim@elsewhere.test")
        (found,) = entries(gate, wanted=1)
        assert found.entry.reason == "relaying"


# --- Before the reply -------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_where_the_record_must_be_there_first_a_full_disk_defers_and_nothing_is_delivered(tmp_path):
    small = tmp_path / "data" / "journal" / "backlog"
    small.mkdir(parents=True)
    (small / "ballast").write_bytes(b"")
    config = CONFIG + "\n[journal]\nbefore_reply = true\n"
    with Gate(tmp_path, config, within=mounted(small_disk(small, "64k"))) as gate:
        assert sent(gate)[0] == 250
        ballast = Path(f"/proc/{gate.workers()[0]}/root{small}/more")
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(b"x" * 512):
                pass
        answers = [sent(gate, number) for number in range(50)]
        refusing = [text for code, text in answers if code == 451]
        assert refusing
        assert b"4.3.0 The journal cannot be written, try again later" in refusing[0]
        taken = sum(code == 250 for code, _ in answers) + 1
        assert len(list((tmp_path / "data").rglob("new/*"))) == taken, "what was deferred was not delivered"
        ballast.unlink()
        assert sent(gate)[0] == 250


def test_every_message_that_was_answered_250_is_there_whatever_is_killed(tmp_path):
    config = CONFIG + "\n[journal]\nbefore_reply = true\n"
    answered: list[int] = []
    lock = threading.Lock()
    over = threading.Event()

    def send(first: int) -> None:
        number = first
        while not over.is_set():
            number += 10
            with contextlib.suppress(OSError, smtplib.SMTPException):
                if sent(gate, number)[0] == 250:
                    with lock:
                        answered.append(number)

    with Gate(tmp_path, config) as gate:
        senders = [threading.Thread(target=send, args=(first,)) for first in range(6)]
        for sender in senders:
            sender.start()
        for wanted in (100, 200, 300):
            end = time.monotonic() + PATIENCE_S
            while len(answered) < wanted:
                assert time.monotonic() < end, gate.said()
                time.sleep(0.01)
            for pid in gate.processes()[1:]:
                if "console" not in gate._descendants(gate.pid).get(pid, ""):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        over.set()
        for sender in senders:
            sender.join()
        wanted_ids = {f"<{number}@client.test>" for number in answered}
        end = time.monotonic() + PATIENCE_S
        while True:
            found = entries(gate)
            if wanted_ids <= {one.entry.message_id for one in found}:
                break
            assert time.monotonic() < end, wanted_ids - {one.entry.message_id for one in found}
            time.sleep(0.05)
    final = [one.entry.message for one in found if one.entry.verdict == "accepted"]
    assert len(final) == len(set(final)), "none twice"


# --- A database that is not as it should be ---------------------------------------------------------------------------


def test_mail_passes_while_the_database_is_damaged_and_once_it_is_moved_away_nothing_is_missing(tmp_path):
    path = sqlite_path(str(tmp_path / "data"))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no database " * 1000)
    with Gate(tmp_path, CONFIG) as gate:
        assert sent(gate)[0] == 250
        gate.wait_for_line(lambda line: "is damaged (file is not a database)" in line)
        body = until_ready(gate, lambda body: body["journal"].get("database") == "down")
        assert body["ready"]
        assert any("the journal's database does not take what comes" in warning for warning in body["warnings"])
        path.rename(tmp_path / "away")
        assert len(entries(gate, wanted=1)) == 1
        until_ready(gate, lambda body: body["journal"].get("database") == "up" and not body["warnings"])


def test_a_journal_that_is_switched_off_and_on(tmp_path):
    off = CONFIG + "\n[journal]\nenabled = false\n"
    with Gate(tmp_path, off) as gate:
        assert sent(gate, 1)[0] == 250
        refused(gate, 1)
        assert not (tmp_path / "data" / "journal").exists()
        gate.reload(CONFIG)
        gate.wait_for_line(lambda line: '"event":"reload"' in line)
        assert sent(gate, 2)[0] == 250
        (found,) = entries(gate, wanted=1)
        assert found.entry.message_id == "<2@client.test>"
        gate.reload(off)
        gate.wait_for_line(lambda line: '"generation":3' in line)
        assert sent(gate, 3)[0] == 250
        assert len(entries(gate)) == 1


@pytest.mark.real
def test_a_postgresql_that_stops_and_returns_costs_nothing(tmp_path):
    with PostgreSQL() as server:
        url = new_database(server)
        config = CONFIG + f'\n[store]\nurl = "{url}"\n'
        with Gate(tmp_path, config) as gate:
            assert sent(gate, 1)[0] == 250
            entries(gate, wanted=1, url=url)
            server.stop()
            for number in range(2, 52):
                assert sent(gate, number)[0] == 250
            body = until_ready(gate, lambda body: body["journal"].get("database") == "down")
            assert body["ready"]
            assert body["journal"]["waiting_octets"] > 0
            gate.wait_for_line(lambda line: "the journal in PostgreSQL at 127.0.0.1" in line)
            server.start()
            found = entries(gate, wanted=51, url=url)
            assert len(found) == 51
            until_ready(gate, lambda body: body["journal"].get("database") == "up")
        assert server.password not in gate.said()
