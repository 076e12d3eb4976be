"""What is kept of a refusal, and found by its reference."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatepost.errors import StorageError
from gatepost.facts import Client, Identity, MailboxLogin, Session, Transaction
from gatepost.smtp.path import NULL_REVERSE_PATH, POSTMASTER, AddressLiteral, ForwardPath, Mailbox, Shape
from gatepost.smtp.reply import Reply
from gatepost.store import Refusal, Refusals, find, kept_since, reference_of, refusals_directory
from gatepost.store import refusals as refusals_module
from gatepost.store.refusals import (
    LINE_OCTETS_MAX,
    QUEUE_REFUSALS_MAX,
    SEGMENTS_MAX,
    TROUBLE_SAID_S,
    decode,
    encode,
)
from gatepost.verdict import Defer, Finding, Reason, Refuse, Result

NOON_S = 1_800_000_000.25

FULL = Session(
    reference="K7Q2M9XD",
    client=Client(ip_address("2001:db8::9"), 4711),
    listen="submission",
    role="submission",
    hello="mail.example.net",
    esmtp=True,
    tls="TLSv1.3",
    identity=Identity("anna", "SCRAM-SHA-256", "accounts", "phone", ("anna@example.com", "büro@example.com")),
    hosts=("branch.example.net",),
    auth_required=True,
    certificate="ab" * 32,
    mailbox_login=MailboxLogin("ben", NOON_S - 60),
    suspended=True,
    listen_suspended=True,
)


def refusal(number: int = 1, **changes: Any) -> Refusal:
    base = Refusal(
        reference=f"K7Q2M9XD-{number}",
        stage="rcpt",
        transaction=Transaction(FULL, Mailbox("a", "x.example"), 3, NOON_S),
        forward_path=ForwardPath(Mailbox("b%c", "y.example"), Shape.ROUTE),
        authors=(),
        backend="mail",
        findings=(Finding("rate g.toml:7", Result.FAIL, "60 messages in this hour"),),
        verdict=Refuse(Reason.NARROWED, "g.toml:7", "reverse_paths", None, "a hint"),
        reply="550 5.7.1 No [K7Q2M9XD-1]",
    )
    return base._replace(**changes)


def said_by(session: Session) -> Transaction:
    return Transaction(session, NULL_REVERSE_PATH, 0, NOON_S)


# --- A line -----------------------------------------------------------------------------------------------------------


def test_every_fact_of_a_session_is_kept():
    """A fact that is added and not kept is found here: the value above sets each to what is not its default."""
    for name, default in Session._field_defaults.items():
        assert getattr(FULL, name) != default, f"set {name} in this test"
    assert decode(encode(refusal())) == refusal()


@pytest.mark.parametrize(
    "changes",
    [
        {"transaction": said_by(Session("K7Q2M9XD", Client(ip_address("192.0.2.1"), 0), "mx", "mx"))},
        {"forward_path": None, "stage": "mail", "findings": (), "backend": ""},
        {"forward_path": ForwardPath(POSTMASTER, Shape.NO_DOMAIN)},
        {"forward_path": ForwardPath(Mailbox("a b", AddressLiteral(ip_address("192.0.2.1"))), Shape.SPECIAL)},
        {"forward_path": ForwardPath(Mailbox("ü", "xn--bcher-kva.example"), Shape.PLAIN)},
        {"authors": (Mailbox("boss", "example.com"), Mailbox('q"@', "example.com")), "stage": "content"},
        {"verdict": Defer(Reason.RATE, "g.toml:7", "the branch")},
    ],
)
def test_what_was_decided_on_comes_back(changes):
    assert decode(encode(refusal(**changes))) == refusal(**changes)


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_comes_back(reason):
    assert decode(encode(refusal(verdict=Refuse(reason)))) == refusal(verdict=Refuse(reason))


def test_an_administrators_wording_is_in_the_reply_alone():
    own = refusal(verdict=Refuse(Reason.DENIED, "g.toml:9", "", Reply(550, "Not from there", "5.7.1")))
    assert decode(encode(own)) == own._replace(verdict=Refuse(Reason.DENIED, "g.toml:9"))


@given(st.text(max_size=50))
def test_a_line_is_printable_ascii_whatever_a_stranger_says(text):
    hostile = text + '\x7f\x1b[2J\u202e\ud800\n","reference":"ZZZZZZZZ-1"'
    kept = refusal(transaction=said_by(FULL._replace(hello=hostile)))
    line = encode(kept)
    assert re.fullmatch(rb"[\x20-\x7e]+", line)
    assert line.count(b'"reference":"') == 1
    assert decode(line) == kept


def test_every_damage_to_a_line_is_passed_over():
    line = encode(refusal())
    for cut in range(len(line)):
        assert decode(line[:cut]) is None
    for json_text in (b"1", b"[]", b"{}", b'{"schema":"1"}', b'{"schema":true}', b"[" * 500_000, b"\0" * 100):
        assert decode(json_text) is None


@given(st.data())
def test_no_damage_raises(data):
    line = bytearray(encode(refusal()))
    for _ in range(data.draw(st.integers(1, 3))):
        line[data.draw(st.integers(0, len(line) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(StorageError):  # the schema became a greater one
        decode(bytes(line))


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00", "9999-12-31T23:59:59", "2026-11-23", "20261123T000000Z", ""])
def test_a_time_is_in_utc(time):
    record = json.loads(encode(refusal()))
    kept = decode(json.dumps({**record, "time": time}).encode())
    assert (kept is not None) == (time == "20261123T000000Z")


def test_a_wrong_value_anywhere_damages_the_line():
    record = json.loads(encode(refusal()))
    may_be_null = {"identity", "mailbox_login", "forward_path"}
    for key in record.keys() - {"shape"}:
        assert decode(json.dumps({**record, key: {"x": 1}}).encode()) is None, key
        assert decode(json.dumps({name: record[name] for name in record.keys() - {key}}).encode()) is None, key
        if key not in may_be_null:
            assert decode(json.dumps({**record, key: None}).encode()) is None, key


# --- Kept and found ---------------------------------------------------------------------------------------------------


def test_kept_and_found(tmp_path):
    directory = refusals_directory(str(tmp_path))
    kept = Refusals(directory)
    for number in range(1000):
        kept.keep(refusal(number))
    kept.close()
    for number in (0, 1, 500, 999):
        assert find(directory, f"K7Q2M9XD-{number}") == refusal(number)
    assert find(directory, "K7Q2M9XD-1000") is None
    assert kept_since(directory) == NOON_S


def test_two_workers(tmp_path):
    workers = [Refusals(tmp_path), Refusals(tmp_path)]
    for number in range(500):
        workers[number % 2].keep(refusal(number))
    for worker in workers:
        worker.close()
    assert all(find(tmp_path, f"K7Q2M9XD-{number}") == refusal(number) for number in range(500))


@pytest.mark.parametrize("files", [SEGMENTS_MAX - 1, SEGMENTS_MAX, SEGMENTS_MAX + 1])
def test_the_oldest_is_rotated_away(tmp_path, monkeypatch, files):
    monkeypatch.setattr(refusals_module, "SEGMENT_OCTETS_MAX", len(encode(refusal(10))) + 1)  # one refusal a file
    kept = Refusals(tmp_path)
    for number in range(10, 10 + files):
        assert kept._write([refusal(number)]) == 0
    there = [number for number in range(10, 10 + files) if find(tmp_path, f"K7Q2M9XD-{number}")]
    assert there == list(range(10, 10 + files))[-SEGMENTS_MAX:]


def test_a_damaged_line_hides_no_other(tmp_path):
    kept = Refusals(tmp_path)
    kept.keep(refusal(1))
    kept.close()
    with (tmp_path / "00000001.jsonl").open("ab") as file:
        file.write(b'{"schema":1,"reference":"K7Q2M9XD-1","time":"\n')
        file.write(b'{"schema":1,"reference":"K7Q2M9XD-2"')
    assert find(tmp_path, "K7Q2M9XD-1") == refusal(1)
    assert find(tmp_path, "K7Q2M9XD-2") is None
    again = Refusals(tmp_path)
    again.keep(refusal(2))
    again.close()
    assert find(tmp_path, "K7Q2M9XD-2") == refusal(2)


def test_a_newer_schema_is_said(tmp_path):
    (tmp_path / "00000001.jsonl").write_bytes(b'{"schema":2,"reference":"K7Q2M9XD-1","what":"ever"}\n')
    with pytest.raises(StorageError, match=r"a newer version .* \(schema 2, this version reads 1\)"):
        find(tmp_path, "K7Q2M9XD-1")
    assert find(tmp_path, "K7Q2M9XD-2") is None


def test_what_cannot_be_read_is_said(tmp_path):
    (tmp_path / "00000001.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(StorageError, match=r"cannot read the refusals in .*; they are for the gate's user and root"):
        find(tmp_path, "K7Q2M9XD-1")
    with pytest.raises(StorageError, match="cannot read"):
        kept_since(tmp_path)


def test_nothing_is_known_of_what_was_never_kept(tmp_path):
    assert find(tmp_path / "none", "K7Q2M9XD-1") is None
    assert kept_since(tmp_path / "none") is None


# --- What cannot be kept ----------------------------------------------------------------------------------------------


def in_the_way(directory: Path) -> Path:
    """Where no directory can be made."""
    directory.write_bytes(b"")
    return directory


def test_a_disk_that_takes_nothing_is_counted_and_said_and_not_more_often_than_that(tmp_path):
    dropped: list[int] = []
    said: list[str] = []
    kept = Refusals(in_the_way(tmp_path / "file"), dropped=dropped.append, said=said.append)
    assert kept._write([refusal(1)]) == 1
    for after_s in (0.0, 1.0, TROUBLE_SAID_S - 1, TROUBLE_SAID_S, TROUBLE_SAID_S + 1):
        kept._now_s = NOON_S + after_s
        kept._dropped(2)
    assert dropped == [2] * 5
    assert len(said) == 2
    assert said[0] == f"refusals cannot be kept in {tmp_path}/file (File exists): `gatepost explain` will not find them"


def test_after_the_disk_has_room_again_refusals_are_kept(tmp_path):
    kept = Refusals(in_the_way(tmp_path / "file"))
    assert kept._write([refusal(1)]) == 1
    (tmp_path / "file").unlink()
    assert kept._write([refusal(2)]) == 0
    kept.keep(refusal(3))
    kept.close()
    assert [find(tmp_path / "file", f"K7Q2M9XD-{number}") for number in (1, 2, 3)] == [None, refusal(2), refusal(3)]


@pytest.mark.parametrize(("beyond", "lost"), [(-1, 0), (0, 0), (1, 1)])
def test_a_line_beyond_all_measure_is_lost_and_its_neighbours_are_not(tmp_path, beyond, lost):
    def with_evidence(octets: int) -> Refusal:
        return refusal(2, findings=(Finding("check", Result.NONE, "x" * octets),))

    room = LINE_OCTETS_MAX - len(encode(with_evidence(0))) - 1
    kept = Refusals(tmp_path)
    assert kept._write([refusal(1), with_evidence(room + beyond), refusal(3)]) == lost
    found = [number for number in (1, 2, 3) if find(tmp_path, f"K7Q2M9XD-{number}")]
    assert found == ([1, 3] if lost else [1, 2, 3])


@pytest.mark.parametrize(("refusals", "lost"), [(QUEUE_REFUSALS_MAX, 0), (QUEUE_REFUSALS_MAX + 1, 1)])
def test_a_disk_that_stands_still_costs_refusals_and_no_session_waits(tmp_path, monkeypatch, refusals, lost):
    dropped: list[int] = []
    held, let_go = threading.Event(), threading.Event()
    kept = Refusals(tmp_path, dropped=dropped.append)
    append = kept._segments.append

    def stands_still(lines: bytes) -> None:
        held.set()
        assert let_go.wait(60)
        append(lines)

    monkeypatch.setattr(kept._segments, "append", stands_still)
    kept.keep(refusal(0))
    assert held.wait(60)  # what is being written counts until it is
    for number in range(1, refusals):
        kept.keep(refusal(number))
    assert sum(dropped) == lost
    let_go.set()
    kept._batches.close(60.0)
    assert find(tmp_path, f"K7Q2M9XD-{QUEUE_REFUSALS_MAX - 1}") is not None
    assert find(tmp_path, f"K7Q2M9XD-{QUEUE_REFUSALS_MAX}") is None


KILLED = """
import os, sys, time
from pathlib import Path
from tests.store.test_refusals import refusal
from gatepost.store import Refusals, find
kept = Refusals(Path(sys.argv[1]))
for number in range(int(sys.argv[2])):
    kept.keep(refusal(number))
while find(Path(sys.argv[1]), f"K7Q2M9XD-{number}") is None:
    time.sleep(0.01)
for number in range(int(sys.argv[2]), 2 * int(sys.argv[2])):
    kept.keep(refusal(number))
os.kill(os.getpid(), 9)
"""


def test_a_worker_that_is_killed_takes_its_last_moment_along_and_damages_nothing(tmp_path):
    root = Path(__file__).parent.parent.parent
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "200"], cwd=root, check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert all(find(tmp_path, f"K7Q2M9XD-{number}") == refusal(number) for number in range(200))
    kept = Refusals(tmp_path)
    kept.keep(refusal(1000))
    kept.close()
    assert find(tmp_path, "K7Q2M9XD-1000") == refusal(1000)


# --- References -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "typed",
    [
        "K7Q2M0X1-1",
        "k7q2m0x1-1",
        " K7Q2M0X1-1\n",
        "[K7Q2M0X1-1]",
        "K7Q2MOXI-L",
        "k7q2moxl-i",
        "K7Q2M0X1\u20131",
        "550 5.7.1 Relaying is prohibited [K7Q2M0X1-1]",
        "550 [x] Relaying is prohibited [k7q2m0x1-1].",
    ],
)
def test_a_reference_as_people_type_it(typed):
    assert reference_of(typed) == "K7Q2M0X1-1"


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "K7Q2M0X1",
        "K7Q2M0X1-",
        "K7Q2M0X1.1",
        "K7Q2M0XU-1",
        "K7Q2M0X-1",
        "K7Q2M0X11-1",
        "K7Q2M0X1-1234567890",
        "K7Q2M0X1-1 K7Q2M0X1-2",
        "../../etc/passwd",
        "\ud800\x00",
    ],
)
def test_what_is_no_reference(typed):
    assert reference_of(typed) is None
