"""The lenient backend is an instrument: each of its habits is shown to misread, and ``strict`` not to."""

from __future__ import annotations

import smtplib

import pytest
from tests.vectors.lenient import MODES, Heard, LenientBackend, LenientSession, Record, Transaction
from tests.vectors.readings import ALL_RULES, READINGS_MAX, every_reading

OURS = b"MAIL FROM:<a@sender.test>\r\nRCPT TO:<bob@example.com>\r\nDATA\r\n"
SMUGGLED = b"MAIL FROM:<smuggled@example.com>\r\nRCPT TO:<victim@elsewhere.test>\r\nDATA\r\nx\r\n.\r\n"


def dialogue(mode: str, *pieces: bytes) -> list[Record]:
    """The journal of a session that is fed these octets one right after the other."""
    journal: list[Record] = []
    session = LenientSession(MODES[mode], 1, "127.0.0.1", journal.append)
    session.replies()
    for piece in pieces:
        session.feed(piece)
    while session.wants_patience:
        session.feed(b"")
    session.lost()
    return journal


def messages(journal: list[Record]) -> list[Transaction]:
    return [record for record in journal if isinstance(record, Transaction)]


def by_octets(octets: bytes) -> list[bytes]:
    return [octets[at : at + 1] for at in range(len(octets))]


FALSE_ENDS = {
    "lf-dot-lf": b"\n.\n",
    "lf-dot-crlf": b"\n.\r\n",
    "crlf-dot-lf": b"\r\n.\n",
    "cr-dot-cr": b"\r.\r",
    "crcrlf": b"\r\n.\r\r\n",
    "nul": b"\r\n\0.\r\n",
    "7bit": b"\x8d\x8a.\x8d\x8a",
    "linesplit": b"\r\n" + b"A" * 1000 + b".\r\n",
    "beyond": b"\xe2\x80\xa8.\xe2\x80\xa8",
}


@pytest.mark.parametrize("mode", FALSE_ENDS)
def test_a_careless_server_takes_a_false_end_of_content_for_the_end(mode):
    octets = OURS + b"Subject: x\r\n\r\nfirst" + FALSE_ENDS[mode] + SMUGGLED
    for journal in (dialogue(mode, octets), dialogue(mode, *by_octets(octets))):
        assert [message.reverse_path for message in messages(journal)] == [b"a@sender.test", b"smuggled@example.com"]


@pytest.mark.parametrize("mode", FALSE_ENDS)
def test_strict_reads_on_to_the_true_end(mode):
    octets = OURS + b"Subject: x\r\n\r\nfirst" + FALSE_ENDS[mode] + SMUGGLED
    for journal in (dialogue("strict", octets), dialogue("strict", *by_octets(octets))):
        (message,) = messages(journal)
        assert message.octets.endswith(b"DATA\r\nx\r\n")


@pytest.mark.parametrize("mode", sorted(set(MODES) - {"beyond", "7bit", "linesplit", "old-unix"}))
def test_every_mode_keeps_honest_content_as_it_is(mode):
    text = b"Subject: x\r\n\r\n..dotted\r\n..\r\n\xff\x01 end\r\n"
    for octets in ([OURS + text + b".\r\n"], by_octets(OURS + text + b".\r\n")):
        (message,) = messages(dialogue(mode, *octets))
        assert message.octets == b"Subject: x\r\n\r\n.dotted\r\n.\r\n\xff\x01 end\r\n"
        assert [recipient.argument for recipient in message.recipients] == [b"<bob@example.com>"]


def test_empty_content():
    (message,) = messages(dialogue("strict", OURS + b".\r\n"))
    assert message.octets == b""


def heard(mode: str, octets: bytes) -> list[bytes]:
    return [record.line for record in dialogue(mode, octets) if isinstance(record, Heard)]


@pytest.mark.parametrize(
    ("mode", "octets", "lines"),
    [
        ("strict", b"NOOP\nRSET\r\n", [b"NOOP\nRSET"]),
        ("lf-dot-lf", b"NOOP\nRSET\r\n", [b"NOOP", b"RSET"]),
        ("cr-dot-cr", b"NOOP\rRSET\r\n", [b"NOOP", b"RSET"]),
        ("linesplit", b"NOOP " + b"A" * 507 + b"RSET\r\n", [b"NOOP " + b"A" * 507, b"RSET"]),
        ("beyond", b"NOOP\xc2\x85RSET\r\n", [b"NOOP", b"RSET"]),
    ],
)
def test_where_a_command_line_ends(mode, octets, lines):
    assert heard(mode, octets) == lines


def test_a_c_string_ends_at_nul():
    journal = dialogue(
        "c-string", b"MAIL FROM:<>\r\nRCPT TO:<victim@elsewhere.test>\0@example.com>\r\nDATA\r\n\r\n.\r\n"
    )
    (message,) = messages(journal)
    assert message.recipients[0].argument == b"<victim@elsewhere.test>"


def test_a_chunk_is_counted_and_a_broken_one_ends_at_a_dot():
    text = b"Subject: x\r\n\r\n.\r\n" + SMUGGLED
    octets = OURS.removesuffix(b"DATA\r\n") + b"BDAT %d LAST\r\n" % len(text) + text
    (message,) = messages(dialogue("chunking", octets))
    assert message.octets == text
    assert [message.reverse_path for message in messages(dialogue("chunking-broken", octets))] == [
        b"a@sender.test",
        b"smuggled@example.com",
    ]


def test_a_sloppy_chunk_size_is_counted_as_strtol_counts():
    octets = OURS.removesuffix(b"DATA\r\n") + b"BDAT +10x LAST\r\nSubject: x"
    assert messages(dialogue("chunking", octets)) == []
    assert [message.octets for message in messages(dialogue("chunking-broken", octets))] == [b"Subject: x"]


def test_the_outdated_verb_send_opens_a_transaction_on_an_old_unix():
    octets = b"SEND FROM:<a@sender.test>\r\nRCPT TO:<bob@example.com>\r\nDATA\r\nx\r\n.\r\n"
    assert messages(dialogue("strict", octets)) == []
    assert len(messages(dialogue("old-unix", octets))) == 1


READINGS = {
    b"<victim%elsewhere.test@example.com>": b"victim@elsewhere.test",
    b"<elsewhere.test!victim@example.com>": b"victim@elsewhere.test",
    b"<@example.com:victim@elsewhere.test>": b"victim@elsewhere.test",
    b"<@elsewhere.test:bob@example.com>": b"hop@elsewhere.test",
    b'<"victim@elsewhere.test"@example.com>': b"victim@elsewhere.test",
    b'<"victim%elsewhere.test"@example.com>': b"victim@elsewhere.test",
    b'<"victim\\@elsewhere.test"@example.com>': b"victim@elsewhere.test",
    b"<victim\\@elsewhere.test@example.com>": b"victim@elsewhere.test",
    b"<victim@elsewhere.test@example.com>": b"victim@elsewhere.test",
    b"<victim@elsewhere.test(@example.com)>": b"victim@elsewhere.test",
    b"<victim @elsewhere.test @example.com>": b"victim@elsewhere.test@example.com",
    b"<bob@example.com,victim@elsewhere.test>": b"victim@elsewhere.test",
    b"<bob@example.com> <victim@elsewhere.test>": b"victim@elsewhere.test",
    b"<bob@example.com <victim@elsewhere.test>>": b"victim@elsewhere.test",
    b'<"victim@elsewhere.test>"@example.com>': b"victim@elsewhere.test",
    b"<victim@elsewhere.test\0@example.com>": b"victim@elsewhere.test",
    b"<victim@elsewhere.test\x0b@example.com>": b"victim@elsewhere.test",
    b"<victim\xef\xbc\xa0elsewhere.test@example.com>": b"victim@elsewhere.test",
    b"<victim\xc1\x80elsewhere.test@example.com>": b"victim@elsewhere.test",
    b"<victim\xc0elsewhere.test@example.com>": b"victim@elsewhere.test",
    b"<victim%40elsewhere.test@example.com>": b"victim@elsewhere.test",
    b"<victim&#64;elsewhere.test@example.com>": b"victim@elsewhere.test",
    b"<=?utf-8?q?victim=40elsewhere.test?=@example.com>": b"victim@elsewhere.test",
    b"<IMCEASMTP-victim+40elsewhere+2Etest@example.com>": b"victim@elsewhere.test",
    b'<"|/bin/cat"@example.com>': b"program@pipe.invalid",
}


@pytest.mark.parametrize("argument", READINGS, ids=ascii)
def test_a_careless_server_reads_another_address(argument):
    readings = every_reading(argument, ALL_RULES)
    assert READINGS[argument] in readings
    assert readings[READINGS[argument]] != ()


@pytest.mark.parametrize("argument", [b"<bob@example.com>", b"<bob+tag@example.com>", b"<o'bob.x-1_2=y@example.com>"])
def test_an_honest_address_has_one_reading(argument):
    assert every_reading(argument, ALL_RULES) == {argument[1:-1]: ()}


def test_readings_are_bounded():
    hostile = b'<"' + b"a!b%c@d,(e" * 60 + b'\\"@x">@y <z'
    assert len(every_reading(hostile, ALL_RULES)) < READINGS_MAX + 200


def test_over_a_socket_with_a_common_client():
    with LenientBackend("all") as backend, smtplib.SMTP("127.0.0.1", backend.port) as client:
        client.sendmail("a@sender.test", ["bob@example.com", "x%y@example.com"], b"Subject: x\r\n\r\n.y\r\n")
        (message,) = backend.transactions()
    assert message.octets == b"Subject: x\r\n\r\n.y\r\n"
    assert [sorted(recipient.readings) for recipient in message.recipients] == [
        [b"bob@example.com"],
        [b"x%y@example.com", b"x@y"],
    ]
