"""Replies: whatever the text, what goes over the wire is a well-formed reply of bounded lines."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatepost.smtp.reply import LINE_OCTETS_MAX, LINES_MAX, EnhancedStatus, Reply, from_backend


@pytest.mark.parametrize(
    ("reply", "octets"),
    [
        (Reply(250, "OK"), b"250 OK\r\n"),
        (Reply(250, "OK", "2.0.0"), b"250 2.0.0 OK\r\n"),
        (Reply(250, "OK", (1, 5)), b"250 2.1.5 OK\r\n"),
        (Reply(550, "No", "5.7.1"), b"550 5.7.1 No\r\n"),
        (Reply(354, "Go on"), b"354 Go on\r\n"),
        (Reply(250, ""), b"250 \r\n"),
        (Reply(250, "mx\nSIZE 10\nHELP"), b"250-mx\r\n250-SIZE 10\r\n250 HELP\r\n"),
        (Reply(550, "a\nb", "5.1.1"), b"550-5.1.1 a\r\n550 5.1.1 b\r\n"),
        (Reply(250, "a\n"), b"250-a\r\n250 \r\n"),
        (Reply(250, "a\r\n354 b"), b"250-a?\r\n250 354 b\r\n"),
        (Reply(250, "a\rb\x00c\x1bd\x7fe\x85f\tg"), b"250 a?b?c?d?e?f?g\r\n"),
        (Reply(550, "ren\u00e9"), b"550 ren\xc3\xa9\r\n"),
        (Reply(550, "\ud800"), b"550 ?\r\n"),
    ],
)
def test_a_reply_has_these_octets(reply: Reply, octets: bytes) -> None:
    assert reply.octets() == octets
    assert reply.octets() is reply.octets()  # rendered once


def test_the_class_of_the_status_is_the_codes() -> None:
    assert Reply(550, "x", "5.7.1").status == EnhancedStatus(7, 1)
    for code, status in ((450, "5.7.1"), (250, "5.0.0"), (550, "4.7.1"), (354, "2.0.0")):
        with pytest.raises(ValueError, match="does not belong"):
            Reply(code, "x", status)


@pytest.mark.parametrize(
    ("code", "positive", "transient"),
    [
        (200, True, False),
        (250, True, False),
        (354, True, False),
        (421, False, True),
        (499, False, True),
        (500, False, False),
        (554, False, False),
    ],
)
def test_a_reply_knows_what_it_means(code: int, positive: bool, transient: bool) -> None:
    reply = Reply(code, "x")
    assert (reply.positive, reply.transient) == (positive, transient)


def test_replies_are_equal_by_what_they_say_on_the_wire() -> None:
    assert Reply(250, "OK", "2.0.0") == Reply(250, "OK", (0, 0))
    assert len({Reply(250, "OK"), Reply(250, "OK"), Reply(250, "ok")}) == 2
    assert Reply(250, "OK") != b"250 OK\r\n"
    assert repr(Reply(250, "OK")) == "Reply(b'250 OK\\r\\n')"


@pytest.mark.parametrize("status", [None, "5.7.1", "5.700.100"])
@pytest.mark.parametrize("character", ["x", "\u00e9", "\U0001f600"])
def test_a_line_is_cut_at_512_octets_between_characters(status: str | None, character: str) -> None:
    start = f"550 {status} " if status else "550 "
    room = LINE_OCTETS_MAX - len("\r\n") - len(start)
    width = len(character.encode())
    for count in (room // width - 1, room // width, room // width + 1, 10_000):
        octets = Reply(550, character * count, status).octets()
        assert octets == (start + character * min(count, room // width) + "\r\n").encode()
        assert len(octets) <= LINE_OCTETS_MAX


def test_lines_are_bounded_in_number() -> None:
    for lines in (LINES_MAX - 1, LINES_MAX, LINES_MAX + 1, 10 * LINES_MAX):
        octets = Reply(250, "\n".join("x" * lines)).octets()
        assert octets == b"250-x\r\n" * (min(lines, LINES_MAX) - 1) + b"250 x\r\n"


# --- From a backend --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "lines", "octets", "status"),
    [
        (250, [b"OK"], b"250 OK\r\n", None),
        (250, [], b"250 \r\n", None),
        (250, [b""], b"250 \r\n", None),
        (550, [b"5.1.1 No such user"], b"550 5.1.1 No such user\r\n", (1, 1)),
        (550, [b"5.1.1"], b"550 5.1.1 \r\n", (1, 1)),
        (550, [b"5.1.1 a", b"5.1.1 b"], b"550-5.1.1 a\r\n550 5.1.1 b\r\n", (1, 1)),
        (550, [b"5.1.1 a", b"b"], b"550-5.1.1 a\r\n550 5.1.1 b\r\n", (1, 1)),
        (550, [b"5.1.1", b"5.1.1 b"], b"550-5.1.1 \r\n550 5.1.1 b\r\n", (1, 1)),
        (550, [b"5.1.1 a", b"5.1.10 b"], b"550-5.1.1 a\r\n550 5.1.1 5.1.10 b\r\n", (1, 1)),
        (550, [b"a", b"5.1.1 b"], b"550-a\r\n550 5.1.1 b\r\n", None),
        (450, [b"5.1.1 wrong class"], b"450 5.1.1 wrong class\r\n", None),
        (550, [b"5.1.1no space"], b"550 5.1.1no space\r\n", None),
        (550, [b"5.1.1234 x"], b"550 5.1.1234 x\r\n", None),
        (550, ["5.\u0661.1 x".encode()], "550 5.\u0661.1 x\r\n".encode(), None),
        (550, [b"5.1.1\n x"], b"550-5.1.1\r\n550  x\r\n", None),
        (250, [b"a\r\n354 go"], b"250-a?\r\n250 354 go\r\n", None),
        (250, [b"a\x00\x1b[2Jb"], b"250 a??[2Jb\r\n", None),
        (250, [b"ren\xe9"], "250 ren\ufffd\r\n".encode(), None),
        (250, [b"ren\xc3\xa9"], b"250 ren\xc3\xa9\r\n", None),
    ],
)
def test_what_a_backend_says_is_passed_on_made_safe(
    code: int, lines: list[bytes], octets: bytes, status: tuple[int, int] | None
) -> None:
    reply = from_backend(code, lines)
    assert (reply.octets(), reply.status) == (octets, status)


def test_a_backends_flood_is_cut() -> None:
    reply = from_backend(250, [b"x" * 1_000_000] * 1_000)
    assert len(reply.octets()) <= LINES_MAX * LINE_OCTETS_MAX
    assert len(reply.text) <= LINES_MAX * (LINE_OCTETS_MAX + 1)


WELL_FORMED = re.compile(rb"(?:[0-9]{3}-[ -~\x80-\xff]*\r\n)*[0-9]{3} [ -~\x80-\xff]*\r\n")


def assert_well_formed(octets: bytes, code: int) -> None:
    assert WELL_FORMED.fullmatch(octets)
    octets.decode("utf-8")
    lines = octets.split(b"\r\n")[:-1]
    assert len(lines) <= LINES_MAX
    assert all(len(line) + 2 <= LINE_OCTETS_MAX and line[:3] == b"%d" % code for line in lines)


@given(st.integers(200, 599), st.text(max_size=700), st.none() | st.tuples(st.integers(0, 999), st.integers(0, 999)))
def test_any_text_makes_a_well_formed_reply(code: int, text: str, status: tuple[int, int] | None) -> None:
    assert_well_formed(Reply(code, text, status).octets(), code)


@given(st.integers(200, 599), st.lists(st.binary(max_size=600) | st.sampled_from([b"5.1.1 x", b"5.1.1"]), max_size=5))
def test_any_backend_makes_a_well_formed_reply(code: int, lines: list[bytes]) -> None:
    reply = from_backend(code, lines)
    assert_well_formed(reply.octets(), code)
    # What we sent, read as a backend's reply, is what we sent.
    sent = [line[4:] for line in reply.octets().split(b"\r\n")[:-1]]
    assert from_backend(code, sent).octets() == reply.octets()
