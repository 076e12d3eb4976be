"""The trace field: one field, whatever the client calls itself; a token that tells its own gate everything."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gatepost.errors import StorageError
from gatepost.facts import Client, Identity, Session, client_address
from gatepost.gate.trace import (
    KEY_OCTETS,
    Dates,
    TraceKey,
    TraceReader,
    TraceRecord,
    key_files,
    rotate,
    trace_field,
    trace_head,
)

SECONDS = 1_767_225_599  # Wed, 31 Dec 2025 23:59:59 +0000
DATE = "Wed, 31 Dec 2025 23:59:59 +0000"
KEY = TraceKey(bytes(range(KEY_OCTETS)))


def session(address: str = "192.0.2.7", account: str = "", **changes: Any) -> Session:
    identity = Identity(account, "PLAIN") if account else None
    made = Session("K7Q2M9XA", Client(ip_address(address), 4321), "mx", "mx", hello="mail.sender.test", esmtp=True)
    return made._replace(identity=identity, **changes)


# ---- the token


@pytest.mark.parametrize("account", ["", "alice", "zoë@example.com", "a" * 64])
@pytest.mark.parametrize("address", ["192.0.2.7", "255.255.255.255", "2001:db8::7", "::1"])
def test_a_token_tells_its_own_gate_what_it_says(address: str, account: str) -> None:
    token = KEY.seal(session(address, account), SECONDS)
    assert KEY.read(token) == TraceRecord(SECONDS, ip_address(address), "K7Q2M9XA", account)
    assert re.fullmatch(r"[A-Za-z0-9_-]{40,200}", token)


def test_an_account_is_cut_to_what_a_header_can_bear() -> None:
    record = KEY.read(KEY.seal(session(account="é" * 500), SECONDS))
    assert record is not None
    assert record.account.startswith("é" * 31)
    assert len(KEY.seal(session(account="é" * 500), SECONDS)) < 160


def test_a_token_tells_nobody_else_anything() -> None:
    other = TraceKey(bytes(reversed(range(KEY_OCTETS))))
    token = KEY.seal(session(account="alice"), SECONDS)
    assert other.read(token) is None
    for secret in ("alice", "192.0.2.7", "K7Q2M9XA"):
        assert secret not in token
    assert token != KEY.seal(session(account="alicf"), SECONDS)
    assert token != KEY.seal(session(account="alice"), SECONDS + 1)


@given(st.integers(0, 200), st.sampled_from("AZaz09-_"))
def test_a_changed_token_is_none_of_ours(at: int, letter: str) -> None:
    token = KEY.seal(session(account="alice"), SECONDS)
    at %= len(token) - 1  # the very last letter holds spare bits
    if token[at] != letter:
        assert KEY.read(token[:at] + letter + token[at + 1 :]) is None
    assert KEY.read(token[:at]) is None
    assert KEY.read(token + token) is None


@given(st.one_of(st.text(max_size=100), st.text("AZaz09-_=", max_size=100)))
@example("")
@example("=")
@example("A")
@example("é")
@example("AAAA\n")
def test_any_text_may_be_asked_about(text: str) -> None:
    assert KEY.read(text) is None


# ---- the key


def test_the_key_is_made_once_and_is_private(tmp_path: Path) -> None:
    first = TraceKey.in_data(str(tmp_path))
    path = tmp_path / "keys" / "trace.key"
    octets = path.read_bytes()
    assert len(octets) == KEY_OCTETS
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["trace.key"]
    again = TraceKey.in_data(str(tmp_path))
    assert path.read_bytes() == octets
    assert again.read(first.seal(session(), SECONDS)) is not None


def test_a_key_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "trace.key"
    path.parent.mkdir()
    path.write_bytes(b"short")
    with pytest.raises(StorageError, match="cannot use the trace key"):
        TraceKey.in_data(str(tmp_path))
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match="cannot use the trace key"):
        TraceKey.in_data(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot use the trace key"):
        TraceKey.in_data(str(tmp_path / "file"))


# ---- several keys


def keys_in(data: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (data / "keys").iterdir()}


def test_the_newest_key_seals_and_all_of_them_read(tmp_path: Path) -> None:
    data = str(tmp_path)
    sealed = []
    for number in range(11):
        made = rotate(data)
        assert made.name == ("trace.key" if number == 0 else f"trace-{number + 1}.key")
        assert made.path.stat().st_mode & 0o777 == 0o600
        sealed.append((made.name, TraceKey.in_data(data).seal(session(account="alice"), SECONDS)))
    assert len({token for _, token in sealed}) == 11
    assert [file.name for file in key_files(data)] == [name for name, _ in reversed(sealed)], "10 is newer than 9"
    for name, token in sealed:
        said = TraceRecord(SECONDS, ip_address("192.0.2.7"), "K7Q2M9XA", "alice", name)
        assert TraceKey.in_data(data).read(token) == TraceReader.in_data(data).read(token) == said
    (tmp_path / "keys" / "trace-5.key").unlink()
    read = [TraceKey.in_data(data).read(token) for _, token in sealed]
    assert [number for number, record in enumerate(read, 1) if record is None] == [5], "its file is how long it reads"


def test_a_token_of_the_first_key_that_a_gate_ever_had_is_read_after_others_were_made(tmp_path: Path) -> None:
    """As written before there was a second key: base64url of AES-SIV under trace.key, and nothing in front of it."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "trace.key").write_bytes(bytes(range(KEY_OCTETS)))
    old = "znwz8kyY877LVHz5sgU_XiLTEwYxj0IZJt98XqJQ7pE7Qoduzaz7psNDQzEHLul4xA"
    rotate(str(tmp_path))
    record = TraceKey.in_data(str(tmp_path)).read(old)
    assert record == TraceRecord(SECONDS, ip_address("192.0.2.7"), "K7Q2M9XA", "alice", "trace.key")


def test_a_key_that_was_removed_is_not_made_again_while_there_is_a_newer_one(tmp_path: Path) -> None:
    rotate(str(tmp_path))
    rotate(str(tmp_path))
    (tmp_path / "keys" / "trace.key").unlink()
    TraceKey.in_data(str(tmp_path))
    assert list(keys_in(tmp_path)) == ["trace-2.key"]
    assert rotate(str(tmp_path)).name == "trace-3.key"


@pytest.mark.parametrize("octets", [b"", b"x" * (KEY_OCTETS - 1), b"x" * (KEY_OCTETS + 1)])
def test_an_older_key_that_cannot_be_used_costs_what_it_sealed_and_no_more(tmp_path: Path, octets: bytes) -> None:
    data = str(tmp_path)
    first = rotate(data)
    lost = TraceKey.in_data(data).seal(session(), SECONDS)
    rotate(data)
    first.path.write_bytes(octets)
    key = TraceKey.in_data(data)
    assert key.read(lost) is None
    assert key.read(key.seal(session(), SECONDS)) is not None
    assert [bool(file.problem) for file in key_files(data)] == [False, True]
    first.path.write_bytes(b"y" * KEY_OCTETS)
    assert TraceReader.in_data(data).keys == 2


def test_the_newest_that_cannot_be_used_is_said_and_another_mends_it(tmp_path: Path) -> None:
    data = str(tmp_path)
    rotate(data)
    rotate(data).path.write_bytes(b"short")
    with pytest.raises(StorageError, match=r"cannot use the trace key .*trace-2\.key: .*gatepost key rotate"):
        TraceKey.in_data(data)
    assert rotate(data).name == "trace-3.key"
    TraceKey.in_data(data)


def test_what_is_no_key_is_let_be_and_what_waits_for_a_writer_is_not_waited_for(tmp_path: Path) -> None:
    data = str(tmp_path)
    rotate(data)
    for name in ("journal.key", "trace.key.old", ".trace.key.17", "trace"):
        (tmp_path / "keys" / name).write_bytes(b"z" * KEY_OCTETS)
    os.mkfifo(tmp_path / "keys" / "trace-2.key")
    assert {file.name: bool(file.problem) for file in key_files(data)} == {"trace-2.key": True, "trace.key": False}


def test_the_key_of_another_gate_is_read_with_and_never_seals(tmp_path: Path) -> None:
    other = TraceKey(bytes(reversed(range(KEY_OCTETS))))
    (tmp_path / "keys").mkdir()
    for name in ("trace-mx9.key", "trace-0.key", "trace-01.key", "trace-1.key"):
        (tmp_path / "keys" / name).write_bytes(bytes(reversed(range(KEY_OCTETS))))
    key = TraceKey.in_data(str(tmp_path))
    assert key_files(str(tmp_path))[0].name == "trace.key", "the gate's own was made"
    assert key.read(other.seal(session(), SECONDS)) is not None
    assert other.read(key.seal(session(), SECONDS)) is None


def test_two_who_rotate_at_once_make_one_key_and_the_loser_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(tmp_path)
    rotate(data)
    seen = key_files(data)
    winner = rotate(data)
    monkeypatch.setattr("gatepost.gate.trace.key_files", lambda _: seen)
    with pytest.raises(StorageError, match="at the same moment"):
        rotate(data)
    assert winner.path.read_bytes() == winner.key
    assert sorted(keys_in(tmp_path)) == ["trace-2.key", "trace.key"]


def test_when_a_key_was_retired(tmp_path: Path) -> None:
    data = str(tmp_path)
    for number in (1, 2, 3):
        os.utime(rotate(data).path, (number * 1000, number * 1000))
    (tmp_path / "keys" / "trace-other.key").write_bytes(bytes(KEY_OCTETS))
    reader = TraceReader.in_data(data)
    names = ("trace.key", "trace-2.key", "trace-3.key", "trace-other.key", "")
    assert [reader.retired(name) for name in names] == [2000, 3000, None, None, None]


def test_a_directory_that_cannot_be_looked_at_is_said(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("")
    for asked in (key_files, TraceReader.in_data, TraceKey.in_data, rotate):
        with pytest.raises(StorageError, match="trace key"):
            asked(str(tmp_path))
    assert key_files(str(tmp_path / "elsewhere")) == [], "and looking makes nothing"
    assert not (tmp_path / "elsewhere").exists()


# ---- the date


def test_dates_are_utc() -> None:
    dates = Dates()
    assert dates.text(SECONDS) == DATE
    assert dates.text(SECONDS) is dates.text(SECONDS), "made once a second"
    assert dates.text(SECONDS + 1) == "Thu, 01 Jan 2026 00:00:00 +0000"
    assert dates.text(SECONDS) == DATE
    assert dates.text(0) == "Thu, 01 Jan 1970 00:00:00 +0000"


@given(st.integers(0, 4_000_000_000))
def test_a_date_reads_as_the_second_it_was_made_of(seconds: int) -> None:
    assert parsedate_to_datetime(Dates().text(seconds)) == datetime.fromtimestamp(seconds, UTC)


# ---- the field.  RFC 5321 §4.4

FIELD = re.compile(
    rb"Received: from [A-Za-z0-9.:_\[\]?-]{1,255} \(\[[0-9A-Fa-fIPv.:]+\]\)\r\n"
    rb"\tby mx\.example\.com \(Gatepost\) with (?:SMTP|ESMTPS?A?|UTF8SMTPS?A?) id K7Q2M9XA\.1\r\n"
    rb"\t\(token [A-Za-z0-9_-]+\);\r\n"
    rb"\t[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d \+0000\r\n"
)


def field_of(one: Session, *, utf8: bool = False) -> bytes:
    return trace_field(trace_head(one, "mx.example.com", utf8=utf8), "K7Q2M9XA.1", KEY.seal(one, SECONDS), DATE)


def test_the_field_as_a_whole() -> None:
    one = session()
    assert field_of(one) == (
        b"Received: from mail.sender.test ([192.0.2.7])\r\n"
        b"\tby mx.example.com (Gatepost) with ESMTP id K7Q2M9XA.1\r\n"
        b"\t(token " + KEY.seal(one, SECONDS).encode() + b");\r\n"
        b"\tWed, 31 Dec 2025 23:59:59 +0000\r\n"
    )
    assert b"from [192.0.2.9] ([IPv6:2001:db8::7])" in field_of(session("2001:db8::7", hello="[192.0.2.9]"))
    assert b"from unknown (" in field_of(session(hello=""))


@pytest.mark.parametrize(
    ("changes", "utf8", "protocol"),
    [
        ({"esmtp": False}, False, b"SMTP"),
        ({"esmtp": False, "tls": "TLSv1.3"}, False, b"SMTP"),
        ({}, False, b"ESMTP"),
        ({"tls": "TLSv1.3"}, False, b"ESMTPS"),
        ({"account": "alice"}, False, b"ESMTPA"),
        ({"tls": "TLSv1.3", "account": "alice"}, False, b"ESMTPSA"),
        ({}, True, b"UTF8SMTP"),
        ({"tls": "TLSv1.2"}, True, b"UTF8SMTPS"),
        ({"account": "alice"}, True, b"UTF8SMTPA"),
        ({"tls": "TLSv1.2", "account": "alice"}, True, b"UTF8SMTPSA"),
    ],
)
def test_the_protocol_is_named_as_registered(changes: dict[str, str], utf8: bool, protocol: bytes) -> None:
    """RFC 3848 §1, RFC 6531 §4.3."""
    assert b" with " + protocol + b" id " in field_of(session(**changes), utf8=utf8)


HOSTILE = [
    "x\r\nBcc: victim@elsewhere.test",
    "x\r\n.\r\nMAIL FROM:<a@b.test>",
    "x) (by mx.example.com",
    "x;\tMon, 01 Jan 2001 00:00:00 +0000",
    "\0\x7f\x85\u2028\u2029",
    'a"\\b',
    "=?utf-8?q?x?=",
    "é" * 300,
    "a" * 5000,
    '()<>@,;:\\"/[]?= \t',
    "\udc80",
]


@given(st.text())
@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::7"])
def test_whatever_the_client_calls_itself_it_is_one_field(address: str, hello: str) -> None:
    field = field_of(session(address, hello=hello))
    assert FIELD.fullmatch(field)
    assert max(map(len, field.split(b"\r\n"))) <= 998


@pytest.mark.parametrize("hello", HOSTILE)
def test_a_hello_made_to_break_out_does_not(hello: str) -> None:
    field = field_of(session(hello=hello), utf8=True)
    assert FIELD.fullmatch(field)
    assert (field.count(b"("), field.count(b")"), field.count(b";")) == (3, 3, 1)
    assert b"=?" not in field


def test_a_mapped_client_is_named_as_the_ipv4_client_it_is() -> None:
    one = session()._replace(client=Client(client_address("::ffff:192.0.2.7"), 1))
    assert b"([192.0.2.7])" in field_of(one)
    mapped = KEY.read(KEY.seal(session()._replace(client=Client(IPv6Address("::ffff:192.0.2.7"), 1)), SECONDS))
    assert mapped is not None
    assert mapped.client == ip_address("192.0.2.7")
