"""Content framing: one reading, whatever the octets and however they are split."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatepost.smtp.command import Data, Quit
from gatepost.smtp.content import LINE_OCTETS_CEILING, BdatReceiver, ContentLimits, DataReceiver, Defect, stuff
from gatepost.smtp.reply import Reply
from gatepost.smtp.server import NEED_DATA, ContentChunk, ContentEnded, ServerEngine

LONG_LINE = b"x" * 1200 + b"\r\n"
LIMITS = ContentLimits(message_size_octets=10_000, content_line_octets=998, header_section_octets=2_000)


def feed(receiver: DataReceiver | BdatReceiver, octets: bytes, sizes: list[int]) -> tuple[bytes, bytes, bool]:
    """Content, what is left behind its end, and whether it ended; fed in pieces of these sizes, over and over."""
    content, waiting, position, turn = b"", b"", 0, 0
    while True:
        block, taken, ended = receiver.take(waiting)
        waiting = waiting[taken:]
        content += block
        if ended:
            return content, waiting + octets[position:], True
        if position >= len(octets):
            return content, waiting, False
        size = sizes[turn % len(sizes)]
        turn += 1
        waiting += octets[position : position + size]
        position += size


def three_ways(octets: bytes, limits: ContentLimits = LIMITS) -> tuple[bytes, bytes, bool, Defect | None]:
    """Whole, octet by octet, and in pieces: the same result."""
    results = []
    for sizes in ([len(octets) or 1], [1], [3, 1, 7]):
        receiver = DataReceiver(limits)
        content, rest, ended = feed(receiver, octets, sizes)
        results.append((b"" if receiver.defect else content, rest if ended else b"", ended, receiver.defect))
    assert results[0] == results[1] == results[2]
    return results[0]


@pytest.mark.parametrize(
    ("octets", "content"),
    [
        (b".\r\n", b""),
        (b"\r\n.\r\n", b"\r\n"),
        (b"a: b\r\n\r\ntext\r\n.\r\n", b"a: b\r\n\r\ntext\r\n"),
        (b"..\r\n.\r\n", b".\r\n"),
        (b"a\r\n..b\r\n...\r\n.\r\n", b"a\r\n.b\r\n..\r\n"),
        (b".x\r\n.\r\n", b"x\r\n"),
        (b"a.\r\n.\r\n", b"a.\r\n"),
        (b"\xff\x0b\x0c\x85\r\n.\r\n", b"\xff\x0b\x0c\x85\r\n"),
    ],
)
def test_the_end_is_found_and_stuffing_removed(octets: bytes, content: bytes) -> None:
    assert three_ways(octets + b"NEXT\r\n") == (content, b"NEXT\r\n", True, None)


@pytest.mark.parametrize(
    ("octets", "defect"),
    [
        (b"a\n.\nMAIL\r\n.\r\n", Defect.BARE_LF),
        (b"a\n.\r\nMAIL\r\n.\r\n", Defect.BARE_LF),
        (b"a\r\n.\nMAIL\r\n.\r\n", Defect.BARE_LF),
        (b"a\r.\rMAIL\r\n.\r\n", Defect.BARE_CR),
        (b"a\r.\r\nMAIL\r\n.\r\n", Defect.BARE_CR),
        (b"a\r\n.\rMAIL\r\n.\r\n", Defect.BARE_CR),
        (b"a\r\r\n.\r\r\nMAIL\r\n.\r\n", Defect.BARE_CR),
        (b"a\r\n\0.\r\nMAIL\r\n.\r\n", Defect.NUL),
        (b"a\r\0\n.\r\nMAIL\r\n.\r\n", Defect.BARE_CR),
        (b"x" * 999 + b"\r\n.\r\n", Defect.LINE_TOO_LONG),
        (b"\r\n" + b"a\r\n" * 4000 + b".\r\n", Defect.TOO_LARGE),
        (b"a: b\r\n" * 400 + b"\r\n.\r\n", Defect.HEADER_SECTION_TOO_LARGE),
        (b" continued: x\r\n.\r\n", Defect.CONTINUES),
        (b"\tcontinued: x\r\na: b\r\n\r\n.\r\n", Defect.CONTINUES),
    ],
)
def test_a_defect_refuses_the_whole_message_after_its_real_end(octets: bytes, defect: Defect) -> None:
    content, rest, ended, found = three_ways(octets + b"NEXT\r\n")
    assert (content, rest, ended, found) == (b"", b"NEXT\r\n", True, defect)


def test_end_of_octets_is_no_end_of_content() -> None:
    for octets in (b"a\r\n", b"a\r\n.", b"a\r\n.\r", b"a\r\n\n.\r"):
        assert not three_ways(octets)[2]


@pytest.mark.parametrize("length", [997, 998, 999])
def test_line_limit(length: int) -> None:
    for body in (b"x" * length + b"\r\n", b"a\r\n" * 50 + b"x" * length + b"\r\nb\r\n"):
        defect = three_ways(body + b".\r\n")[3]
        assert (defect is Defect.LINE_TOO_LONG) == (length > 998)


@pytest.mark.parametrize("octets", [9_999, 10_000, 10_001])
def test_size_limit(octets: int) -> None:
    lines = b"\r\n" + b"x" * 48 + b"\r\n"
    body = lines + (b"y" * 98 + b"\r\n") * 99
    body += b"z" * (octets - len(body) - 2) + b"\r\n"
    assert len(body) == octets
    content, _, _, defect = three_ways(body + b".\r\n")
    assert (defect is Defect.TOO_LARGE) == (octets > 10_000)
    assert content == (b"" if defect else body)


def test_received_fields_make_a_loop() -> None:
    field = b"Received: by a.test; now\r\n"
    limits = LIMITS._replace(received_fields=5)
    assert three_ways(field * 5 + b"\r\n.\r\n", limits)[3] is None
    assert three_ways(field * 6 + b"\r\n.\r\n", limits)[3] is Defect.LOOP
    assert three_ways(b"a: b\r\n\r\n" + field * 6 + b".\r\n", limits)[3] is None, "the body may quote trace fields"


def test_normalising_gives_crlf_lines_and_the_end_stays_crlf_dot_crlf() -> None:
    limits = LIMITS._replace(normalise=True)
    assert three_ways(b"a\nb\rc\r\n.\r\n", limits)[0] == b"a\r\nb\r\nc\r\n"
    content, rest, ended, defect = three_ways(b"a\n.\nMAIL FROM:<x@y.test>\r\n.\r\nNEXT", limits)
    assert (ended, rest, defect) == (True, b"NEXT", None)
    assert content == b"a\r\n\r\nMAIL FROM:<x@y.test>\r\n"
    assert three_ways(b"a\0\r\n.\r\n", limits)[3] is Defect.NUL


@given(st.lists(st.sampled_from([b"a", b".", b"..", b"", b".x", b"x.", b"\xff" * 70]), max_size=30))
@settings(max_examples=200, deadline=None)
def test_what_was_stuffed_is_received(lines: list[bytes]) -> None:
    body = b"".join(line + b"\r\n" for line in lines)
    assert three_ways(stuff(body) + b".\r\n") == (body, b"", True, None)


@given(st.binary(max_size=200).map(lambda b: bytes(b"\r\n.\0ax"[octet % 6] for octet in b)))
@settings(max_examples=500, deadline=None)
def test_no_octets_are_read_in_two_ways(octets: bytes) -> None:
    content, _, _, _ = three_ways(octets + b"\r\n.\r\n")
    assert b"\0" not in content
    assert content.count(b"\r\n") == content.count(b"\r") == content.count(b"\n")
    sent = stuff(content)
    assert not sent.startswith(b".\r\n")
    assert b"\r\n.\r\n" not in sent


# ---- BDAT


def chunks(parts: list[bytes], limits: ContentLimits = LIMITS) -> tuple[bytes, Defect | None]:
    results = []
    for sizes in ([1 << 20], [1], [2, 5]):
        receiver = BdatReceiver(limits)
        content = b""
        for number, part in enumerate(parts):
            receiver.begin(len(part), last=number == len(parts) - 1)
            block, rest, ended = feed(receiver, part + b"NEXT", sizes)
            assert ended
            assert rest == b"NEXT"
            content += block
        results.append((b"" if receiver.defect else content, receiver.defect))
    assert results[0] == results[1] == results[2]
    return results[0]


def test_bdat_content_is_counted_not_framed() -> None:
    body = b"Subject: x\r\n\r\n.\r\n..\r\nMAIL FROM:<a@b.test>\r\n"
    assert chunks([body]) == (body, None)
    assert chunks([body[:5], body[5:20], b"", body[20:]]) == (body, None), "lines may span chunks"
    assert chunks([b"no line end"]) == (b"no line end", None)
    assert chunks([b""]) == (b"", None)


@pytest.mark.parametrize(
    ("parts", "defect"),
    [
        ([b"a\n.\n\n"], Defect.BARE_LF),
        ([b"a\r", b"b\r\n"], Defect.BARE_CR),
        ([b"a\r"], Defect.BARE_CR),
        ([b"a\0\r\n"], Defect.NUL),
        ([b"x" * 999], Defect.LINE_TOO_LONG),
        ([b"x" * 600, b"x" * 600], Defect.LINE_TOO_LONG),
        ([b"\r\n" + b"a\r\n" * 3000, b"b\r\n" * 3000], Defect.TOO_LARGE),
    ],
)
def test_bdat_has_the_same_discipline(parts: list[bytes], defect: Defect) -> None:
    assert chunks(parts) == (b"", defect)


def test_a_cr_and_its_lf_may_stand_in_two_chunks() -> None:
    assert chunks([b"a\r", b"\nb\r\n"]) == (b"a\r\nb\r\n", None)


def test_flags_say_what_sending_needs() -> None:
    for octets, dotted, eight_bit in (
        (b"a\r\n.\r\n", False, False),
        (b"..a\r\n.\r\n", True, False),
        (b".a\r\n.\r\n", False, False),
        (b"a\r\n..\xff\r\n.\r\n", True, True),
    ):
        receiver = DataReceiver(LIMITS)
        feed(receiver, octets, [4])
        assert (receiver.dotted, receiver.eight_bit) == (dotted, eight_bit)


# ---- limits, whatever the pieces


@pytest.mark.parametrize("length", [997, 998, 999])
@pytest.mark.parametrize("first", [b"", b"a\r\n"])
def test_the_period_of_transparency_does_not_count_in_the_line_limit(first: bytes, length: int) -> None:
    content, _, _, defect = three_ways(first + b"." + b"x" * length + b"\r\n.\r\n")
    assert defect is (Defect.LINE_TOO_LONG if length > 998 else None)
    assert content == (b"" if defect else first + b"x" * length + b"\r\n")


@pytest.mark.parametrize("length", [997, 998, 999])
@pytest.mark.parametrize("end", [b"", b"\r\n"])
def test_bdat_has_the_line_limit(end: bytes, length: int) -> None:
    defect = chunks([b"a\r\n" + b"." + b"x" * (length - 1) + end])[1]
    assert defect is (Defect.LINE_TOO_LONG if length > 998 else None)


def test_a_line_limit_switched_off_is_a_high_one() -> None:
    limits = ContentLimits(message_size_octets=0, content_line_octets=0)
    for length, defect in ((LINE_OCTETS_CEILING, None), (LINE_OCTETS_CEILING + 1, Defect.LINE_TOO_LONG)):
        receiver = DataReceiver(limits)
        _, _, ended = feed(receiver, b"\r\n" + b"x" * length + b"\r\n.\r\n", [1 << 16])
        assert (receiver.defect, ended) == (defect, True)


@pytest.mark.parametrize("surplus", [-1, 0, 1])
def test_header_section_limit(surplus: int) -> None:
    field = b"a: " + b"x" * 95 + b"\r\n"
    header = field * 19 + b"b: " + b"y" * (95 + surplus) + b"\r\n"
    assert len(header) == LIMITS.header_section_octets + surplus
    expected = Defect.HEADER_SECTION_TOO_LARGE if surplus > 0 else None
    for body in (b"\r\n" + b"c: d\r\n" * 100, b""):
        assert three_ways(header + body + b".\r\n")[3] is expected
        assert chunks([header + body])[1] is expected


def test_the_size_counts_as_rfc_1870_says() -> None:
    """CRLFs count, the periods of transparency do not."""
    receiver = DataReceiver(LIMITS)
    feed(receiver, b"ab\r\n...\r\n.\r\n", [100])
    assert receiver.size_octets == len(b"ab\r\n..\r\n")


def test_received_fields_are_counted_in_any_case_and_at_line_starts_only() -> None:
    limits = LIMITS._replace(received_fields=2)
    field = b"rEcEiVeD: by a.test; now\r\n"
    assert three_ways(field * 3 + b"\r\n.\r\n", limits)[3] is Defect.LOOP
    assert three_ways(field * 2 + b"x: received: received:\r\n Received: folded\r\n\r\n.\r\n", limits)[3] is None
    assert chunks([field, field, field[:5], field[5:]], limits)[1] is Defect.LOOP


@pytest.mark.parametrize("junk", [b"x", b"\r", b".", b"\0", b"\n", b".\r", b"\r\n", b"\r\n.\n", b"\r\r\n."])
@pytest.mark.parametrize("normalise", [False, True])
def test_what_waits_for_more_is_bounded(junk: bytes, normalise: bool) -> None:
    receiver = DataReceiver(LIMITS._replace(normalise=normalise))
    waiting = b""
    for octet in junk * 3000:
        waiting += bytes([octet])
        _, taken, ended = receiver.take(waiting)
        waiting = waiting[taken:]
        assert not ended
        assert len(waiting) <= (1000 if receiver.defect is None else 4)
    receiver_of_chunks = BdatReceiver(LIMITS._replace(normalise=normalise))
    receiver_of_chunks.begin(len(junk) * 1000, last=False)
    for octet in junk * 1000:
        _, taken, _ = receiver_of_chunks.take(bytes([octet]))
        assert taken == 1
        assert len(receiver_of_chunks._line) <= 999


# ---- normalising

NORMALISE = LIMITS._replace(normalise=True)


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n"])
def test_lines_that_end_in_anything_are_lines_for_the_limit(end: bytes) -> None:
    body = end + (b"x" * 97 + end) * 30
    normal = b"\r\n" + (b"x" * 97 + b"\r\n") * 30
    assert three_ways(body + b"z\r\n.\r\n", NORMALISE) == (normal + b"z\r\n", b"", True, None)
    assert chunks([body], NORMALISE) == (normal, None)
    assert chunks([body[:700], body[700:701], body[701:]], NORMALISE) == (normal, None)
    for length, defect in ((998, None), (999, Defect.LINE_TOO_LONG)):
        assert three_ways(b"a" + end + b"x" * length + end + b"z\r\n.\r\n", NORMALISE)[3] is defect
        assert chunks([b"a" + end + b"x" * length + end], NORMALISE)[1] is defect


# ---- against a reading of the RFC that is short enough to be right


def rfc_reading(octets: bytes, limits: ContentLimits) -> tuple[bytes, bytes, bool]:
    """Content, what follows, and whether it may pass; of octets that hold an end of content.  RFC 5321 §4.1.1.4."""
    end = (b"\r\n" + octets).index(b"\r\n.\r\n")
    body, rest = octets[:end], octets[end + 3 :]
    if limits.normalise:
        body = re.sub(rb"\r\n|\r|\n", b"\r\n", body)
    lines = body.split(b"\r\n")
    assert lines.pop() == b""
    lines = [line.removeprefix(b".") for line in lines]
    fine = not any(re.search(rb"[\r\n\0]", line) or len(line) > limits.content_line_octets for line in lines)
    return b"".join(line + b"\r\n" for line in lines), rest, fine


SMALL = ContentLimits(message_size_octets=0, content_line_octets=8, header_section_octets=1 << 20)
nasty = st.binary(max_size=120).map(lambda b: bytes(b"\r\n\r\n..\0axxxxxxx\xff"[octet % 16] for octet in b))


@given(nasty, nasty, st.booleans(), st.lists(st.integers(1, 9), min_size=1, max_size=5))
@settings(max_examples=400, deadline=None)
def test_data_is_read_as_the_rfc_says(body: bytes, behind: bytes, normalise: bool, sizes: list[int]) -> None:
    limits = SMALL._replace(normalise=normalise)
    octets = body + b"\r\n.\r\n" + behind
    content, rest, fine = rfc_reading(octets, limits)
    for pieces in (sizes, [1], [len(octets)]):
        receiver = DataReceiver(limits)
        found, found_rest, ended = feed(receiver, octets, pieces)
        assert (ended, found_rest) == (True, rest)
        assert (receiver.defect is None) == fine
        if fine:
            assert found == content
            assert receiver.size_octets == len(content)
            assert receiver.eight_bit == (not content.isascii())
            assert receiver.dotted == (b"\r\n." in b"\r\n" + content)


@given(st.lists(nasty, min_size=1, max_size=5), st.booleans(), st.lists(st.integers(1, 9), min_size=1, max_size=5))
@settings(max_examples=400, deadline=None)
def test_bdat_is_read_as_the_rfc_says(parts: list[bytes], normalise: bool, sizes: list[int]) -> None:
    limits = SMALL._replace(normalise=normalise)
    content = b"".join(parts)
    if normalise:
        content = re.sub(rb"\r\n|\r|\n", b"\r\n", content)
    fine = all(not re.search(rb"[\r\n\0]", line) and len(line) <= 8 for line in content.split(b"\r\n"))
    for pieces in (sizes, [1], [1000]):
        receiver = BdatReceiver(limits)
        found = b""
        for number, part in enumerate(parts):
            receiver.begin(len(part), last=number == len(parts) - 1)
            block, rest, ended = feed(receiver, part + b"NEXT", pieces)
            assert (rest, ended) == (b"NEXT", True)
            found += block
        assert (receiver.defect is None) == fine
        if fine:
            assert found == content
            assert receiver.dotted == (b"\r\n." in b"\r\n" + content)


@given(
    st.lists(st.integers(4000, 9000), min_size=1, max_size=6),
    st.sampled_from([b"", b"ba\nre\r\n", b"x" * 1200 + b"\r\n"]),
)
@settings(max_examples=60, deadline=None)
def test_long_reads_are_joined_at_one_line_only(sizes: list[int], flaw: bytes) -> None:
    lines = [b"." * (n % 4) + b"text %d" % n + b"y" * (n * 37 % 300) for n in range(400)]
    lines[200:200] = [b"."] if not flaw else []
    body = b"\r\n" + b"".join(line + b"\r\n" for line in lines) + flaw
    wire = stuff(body) + b".\r\nQUIT\r\n"

    def play(pieces: list[bytes]) -> tuple[bytes, ContentEnded, object]:
        engine = ServerEngine(frozenset(), LIMITS._replace(message_size_octets=0))
        content = b""
        ended: ContentEnded | None = None
        event: object = None
        for piece in [b"EHLO x\r\nMAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\nDATA\r\n", *pieces]:
            engine.receive(piece)
            while (event := engine.next_event()) is not NEED_DATA and not isinstance(event, Quit):
                if isinstance(event, ContentChunk):
                    content += event.octets
                    continue
                if isinstance(event, ContentEnded):
                    ended = event
                engine.respond(Reply(354 if isinstance(event, Data) else 250, "ok"))
        assert ended is not None
        return content, ended, event

    pieces: list[bytes] = []
    position = 0
    while position < len(wire):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(wire[position : position + size])
        position += size
    content, ended, last = play(pieces)
    assert isinstance(last, Quit), "what follows the content is read as a command"
    assert (ended.defect is not None) == bool(flaw)
    if not flaw:
        assert content == body
        assert ended == play([wire])[1]
