"""One line of the journal: what is written comes back, and what is damaged does not."""

from __future__ import annotations

import contextlib
import json
import re
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.store.places import NOON_S, entry, record, refused

from gatepost.errors import StorageError
from gatepost.facts import Client, Identity, MailboxLogin, Session
from gatepost.smtp.path import NULL_REVERSE_PATH, POSTMASTER, AddressLiteral, ForwardPath, Mailbox, Shape
from gatepost.store.record import SCHEMA, End, Entry, Record, decode, encode
from gatepost.verdict import Finding, Reason, Result

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
BARE = Session("K7Q2M9XD", Client(ip_address("192.0.2.1"), 0), "mx", "mx")
WHOLE = Entry(
    at=NOON_S,
    number=3,
    stage="rcpt",
    reverse_path=Mailbox("a", "x.example"),
    forward_path=ForwardPath(Mailbox("b%c", "y.example"), Shape.ROUTE),
    recipients=3,
    verdict="refused",
    reason="narrowed",
    reference="K7Q2M9XD-1",
    by="g.toml:7",
    detail="reverse_paths",
    hint="a hint",
    reply="550 5.7.1 No [K7Q2M9XD-1]",
    message="K7Q2M9XD.1",
    message_id="<m@x.example>",
    size=4711,
    backend="mail",
    would="refuse: denied (g.toml:9)",
    settles=True,
    findings=(Finding("rate g.toml:7", Result.FAIL, "60 messages in this hour"),),
    authors=(Mailbox("boss", "example.com"), Mailbox('q"@', "example.com")),
)
END = End(
    NOON_S - 5,
    NOON_S + 1,
    "quit",
    2,
    "421 4.7.0 Too many errors; closing",
    "192.0.2.7",
    ({"account": "anna", "mechanism": "PLAIN", "verdict": "denied"},),
)


def test_every_fact_of_a_session_every_member_of_an_entry_and_of_an_end_is_kept():
    """One that is added and not kept is found here: each is set to what is not its default."""
    for value in (FULL, WHOLE, END):
        for name, default in value._field_defaults.items():
            assert getattr(value, name) != default, f"set {name} in this test"
    assert decode(encode(Record(FULL, [WHOLE], END))) == Record(FULL, [WHOLE], END)


@pytest.mark.parametrize(
    "kept",
    [
        Record(BARE, []),
        Record(BARE, [], END),
        record([entry(), refused("K7Q2M9XD-1")], BARE),
        record([entry(reverse_path=NULL_REVERSE_PATH)], BARE),
        record([entry(forward_path=None, stage="mail")], BARE),
        record([entry(forward_path=ForwardPath(POSTMASTER, Shape.NO_DOMAIN))], BARE),
        record(
            [entry(forward_path=ForwardPath(Mailbox("a b", AddressLiteral(ip_address("192.0.2.1"))), Shape.SPECIAL))]
        ),
        record([entry(forward_path=ForwardPath(Mailbox("ü", "xn--bcher-kva.example"), Shape.PLAIN))]),
        *(record([refused("K7Q2M9XD-1", reason=reason.name.lower())]) for reason in Reason),
    ],
)
def test_what_was_decided_on_comes_back(kept):
    assert decode(encode(kept)) == kept


@given(st.text(max_size=50))
def test_a_line_is_printable_ascii_whatever_a_stranger_says(text):
    hostile = text + '\x7f\x1b[2J\u202e\ud800\n","reference":"ZZZZZZZZ-1"'
    kept = record([refused("K7Q2M9XD-1")], FULL._replace(hello=hostile))
    line = encode(kept)
    assert re.fullmatch(rb"[\x20-\x7e]+", line)
    assert line.count(b'"reference":"Z') == 0
    assert decode(line) == kept


def test_every_damage_to_a_line_is_passed_over():
    line = encode(Record(FULL, [WHOLE], END))
    for cut in range(len(line)):
        assert decode(line[:cut]) is None
    for json_text in (b"1", b"[]", b"{}", b'{"schema":"1"}', b'{"schema":true}', b"[" * 500_000, b"\0" * 100):
        assert decode(json_text) is None


@given(st.data())
def test_no_damage_raises(data):
    line = bytearray(encode(Record(FULL, [WHOLE], END)))
    for _ in range(data.draw(st.integers(1, 3))):
        line[data.draw(st.integers(0, len(line) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(StorageError):  # the schema became a greater one
        decode(bytes(line))


def test_a_wrong_value_anywhere_damages_the_line():
    parsed = json.loads(encode(Record(FULL, [WHOLE], END)))
    for part in (parsed["session"], parsed["entries"][0], parsed["end"]):
        for key in list(part):
            if key == "logins":
                continue
            right = part[key]
            for wrong in ({"x": 1}, 1.5, -1, [1]):
                part[key] = wrong
                assert decode(json.dumps(parsed).encode()) is None, (key, wrong)
            part[key] = right
    assert decode(json.dumps(parsed).encode()) == Record(FULL, [WHOLE], END)


def test_a_newer_schema_is_said():
    line = encode(Record(BARE, [])).replace(b'"schema":%d' % SCHEMA, b'"schema":%d' % (SCHEMA + 1))
    with pytest.raises(StorageError, match=r"a newer version .* \(schema 2, this version reads 1\)"):
        decode(line)
