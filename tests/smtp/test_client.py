"""The client side of the protocol: replies taken apart strictly, commands built from values."""

from __future__ import annotations

import re
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatepost.smtp import client
from gatepost.smtp.client import (
    LINE_OCTETS_MAX,
    REPLY_OCTETS_MAX,
    XCLIENT_VALUE_OCTETS_MAX,
    BackendDefect,
    Capabilities,
    ClientEngine,
    Introduction,
    parse_ehlo,
)
from gatepost.smtp.command import NO_MAIL_PARAMETERS, NO_RCPT_PARAMETERS, MailParameters, RcptParameters
from gatepost.smtp.path import NULL_REVERSE_PATH, ForwardPath, Mailbox, Shape
from gatepost.smtp.reply import LINES_MAX, Reply

Heard = list[Reply | BackendDefect]


def hear(octets: bytes, *, expected: int = 1, step: int = 0) -> Heard:
    """All that the engine makes of the octets, received in pieces of ``step`` (0: whole)."""
    engine = ClientEngine()
    engine.expect(expected)
    heard: Heard = []
    for start in range(0, len(octets), step or len(octets) or 1):
        engine.receive(octets[start : start + step] if step else octets)
        while (reply := engine.next_reply()) is not None:
            heard.append(reply)
            if isinstance(reply, BackendDefect):
                return heard
    return heard


def three_ways(octets: bytes, *, expected: int = 1) -> Heard:
    """The same, whole, octet by octet, and with a tail that does not belong to it."""
    client._KNOWN.clear()
    whole = hear(octets, expected=expected)
    assert hear(octets, expected=expected, step=1) == whole
    assert hear(octets, expected=expected, step=7) == whole
    assert hear(octets, expected=expected) == whole, "and again, now that the replies are known"
    if whole and not isinstance(whole[-1], BackendDefect) and len(whole) == expected:
        assert hear(octets + b"250 more\r\n", expected=expected) == [*whole, BackendDefect("it spoke unasked")]
        assert hear(octets + b"250 more\r\n", expected=expected + 1)[:-1] == whole
    return whole


def defective(octets: bytes, *, expected: int = 1) -> str:
    client._KNOWN.clear()
    heard = hear(octets, expected=expected)
    assert isinstance(heard[-1], BackendDefect)
    by_octet = hear(octets, expected=expected, step=1)
    assert isinstance(by_octet[-1], BackendDefect)
    assert by_octet[:-1] == heard[:-1]
    return heard[-1].text


# ---- replies


@pytest.mark.parametrize(
    ("octets", "code", "text"),
    [
        (b"250 2.1.0 Ok\r\n", 250, "Ok"),
        (b"250 Ok\r\n", 250, "Ok"),
        (b"250\r\n", 250, ""),
        (b"250 \r\n", 250, ""),
        (b"354 End data with <CR><LF>.<CR><LF>\r\n", 354, "End data with <CR><LF>.<CR><LF>"),
        (b"571 5.7.1 Relaying denied\r\n", 571, "Relaying denied"),  # Exchange, GroupWise
        (b"550-5.1.1 No such user\r\n550 5.1.1 here\r\n", 550, "No such user\nhere"),
        (b"250-\r\n250 \r\n", 250, "\n"),
        (b"220 mail \xff\x00\x1b[31m\r\n", 220, None),
    ],
)
def test_reply(octets, code, text):
    (reply,) = three_ways(octets)
    assert isinstance(reply, Reply)
    assert reply.code == code
    if text is not None:
        assert reply.text == text


def test_what_a_backend_says_reaches_a_client_as_printable_text_only():
    (reply,) = three_ways(b"550 5.1.1 \x1b[31m\x00 no \xff\r\n")
    assert isinstance(reply, Reply)
    assert reply.octets() == "550 5.1.1 ?[31m? no \N{REPLACEMENT CHARACTER}\r\n".encode()


def test_replies_in_one_segment_are_told_apart():
    heard = three_ways(b"250 2.1.0 Ok\r\n550-5.1.1 no\r\n550 5.1.1 user\r\n250 2.1.5 Ok\r\n", expected=3)
    assert [reply.code for reply in heard if isinstance(reply, Reply)] == [250, 550, 250]


@pytest.mark.parametrize(
    ("octets", "text"),
    [
        (b"250 Ok\n", "a line is no SMTP reply"),  # RFC 5321 §2.3.8
        (b"250 Ok\r250 Ok\r\n", "a line is no SMTP reply"),
        (b"250-Ok\n250 Ok\r\n", "a line is no SMTP reply"),
        (b"250 O\nk\r\n", "a line is no SMTP reply"),
        (b"\r\n", "a line is no SMTP reply"),
        (b"Ok\r\n", "a line is no SMTP reply"),
        (b"25 Ok\r\n", "a line is no SMTP reply"),
        (b"2500 Ok\r\n", "a line is no SMTP reply"),
        (b"250Ok\r\n", "a line is no SMTP reply"),
        (b"250_Ok\r\n", "a line is no SMTP reply"),
        (b" 250 Ok\r\n", "a line is no SMTP reply"),
        (b"100 Ok\r\n", "a line is no SMTP reply"),
        (b"600 Ok\r\n", "a line is no SMTP reply"),
        ("٢٥٠ Ok\r\n".encode(), "a line is no SMTP reply"),
        (b"HTTP/1.1 400 Bad Request\r\n", "a line is no SMTP reply"),
        (b"250-Ok\r\n251 Ok\r\n", "the lines of a reply have different codes"),  # RFC 5321 §4.2.1
        (b"550-no\r\n250 yes\r\n", "the lines of a reply have different codes"),
        (b"250-Ok\r\n\r\n", "a line is no SMTP reply"),
    ],
)
def test_defect(octets, text):
    assert defective(octets) == text


def test_nothing_is_heard_after_a_defect():
    engine = ClientEngine()
    engine.expect(2)
    engine.receive(b"what\r\n250 Ok\r\n")
    defect = engine.next_reply()
    assert isinstance(defect, BackendDefect)
    engine.receive(b"250 Ok\r\n")
    assert engine.next_reply() is defect


def test_a_reply_that_nobody_asked_for_is_a_defect():
    assert hear(b"250 Ok\r\n", expected=0) == [BackendDefect("it spoke unasked")]
    assert hear(b"2", expected=0) == [BackendDefect("it spoke unasked")]
    assert hear(b"220 Go ahead\r\n250 injected\r\n") == [Reply(220, "Go ahead"), BackendDefect("it spoke unasked")]


def test_silence_is_no_reply():
    engine = ClientEngine()
    engine.expect(1)
    assert engine.next_reply() is None
    engine.receive(b"")
    assert engine.next_reply() is None


# ---- limits, at n-1, n and n+1


@pytest.mark.parametrize("octets", [LINE_OCTETS_MAX - 1, LINE_OCTETS_MAX])
@pytest.mark.parametrize("before", [b"", b"250-\r\n"])
def test_a_long_line_is_taken(octets, before):
    (reply,) = three_ways(before + b"250 " + b"x" * (octets - 6) + b"\r\n")
    assert isinstance(reply, Reply)


@pytest.mark.parametrize("before", [b"", b"250-\r\n"])
def test_a_line_too_long_is_a_defect(before):
    assert defective(before + b"250 " + b"x" * (LINE_OCTETS_MAX - 5) + b"\r\n") == "a reply line is too long"


def test_a_line_that_does_not_end_is_a_defect_before_it_grows():
    assert defective(b"250 " + b"x" * (LINE_OCTETS_MAX - 4)) == "a reply line is too long"
    assert hear(b"250 " + b"x" * (LINE_OCTETS_MAX - 5), step=1) == []


@pytest.mark.parametrize("lines", [LINES_MAX - 1, LINES_MAX])
def test_a_reply_of_many_lines_is_taken(lines):
    (reply,) = three_ways(b"250-x\r\n" * (lines - 1) + b"250 x\r\n")
    assert isinstance(reply, Reply)


def test_a_reply_of_too_many_lines_is_a_defect():
    assert defective(b"250-x\r\n" * LINES_MAX + b"250 x\r\n") == "a reply is too long"
    assert defective(b"250-x\r\n" * (LINES_MAX + 1)) == "a reply is too long"


@pytest.mark.parametrize("octets", [REPLY_OCTETS_MAX - 1, REPLY_OCTETS_MAX])
def test_a_large_reply_is_taken(octets):
    (reply,) = three_ways(large_reply(octets))
    assert isinstance(reply, Reply)


def test_a_reply_too_large_is_a_defect():
    assert defective(large_reply(REPLY_OCTETS_MAX + 1)) == "a reply is too long"


def large_reply(octets: int) -> bytes:
    line = b"250-" + b"x" * 1018 + b"\r\n"
    count, rest = divmod(octets, len(line))
    if rest < 6:
        count, rest = count - 1, rest + len(line)
    return line * count + b"250 " + b"x" * (rest - 6) + b"\r\n"


def test_what_is_remembered_is_bounded():
    for number in range(3 * client.KNOWN_MAX):
        hear(b"250 2.0.0 Queued as %d\r\n" % number)
        assert len(client._KNOWN) <= client.KNOWN_MAX
    client._KNOWN.clear()
    hear(b"250 " + b"x" * client.KNOWN_OCTETS_MAX + b"\r\n")
    assert not client._KNOWN


@given(st.binary(max_size=300), st.integers(0, 5))
def test_any_octets_give_replies_or_a_defect_however_they_are_split(octets, expected):
    whole = hear(octets, expected=expected)
    for step in (1, 2, 3):
        heard = hear(octets, expected=expected, step=step)
        assert [type(item) for item in heard] == [type(item) for item in whole]
        assert [item for item in heard if isinstance(item, Reply)] == [x for x in whole if isinstance(x, Reply)]
    assert len([item for item in whole if isinstance(item, Reply)]) <= expected


pieces = st.sampled_from(
    [b"250", b"-", b" ", b"\r\n", b"\n", b"\r", b"Ok", b"251", b"2.1.0 ", b"\x00", b"x" * 2040, b"354 "]
)


@given(st.lists(pieces, max_size=40).map(b"".join), st.integers(0, 3))
def test_what_looks_like_replies_is_judged_alike_however_it_is_split(octets, expected):
    client._KNOWN.clear()
    whole = hear(octets, expected=expected)
    again = hear(octets, expected=expected)
    by_octet = hear(octets, expected=expected, step=1)
    assert again == whole
    assert [type(item) for item in by_octet] == [type(item) for item in whole]
    assert [item for item in by_octet if isinstance(item, Reply)] == [x for x in whole if isinstance(x, Reply)]


# ---- EHLO


def ehlo(*lines: str) -> Capabilities:
    return parse_ehlo(Reply(250, "\n".join(("mail.example.com at your service", *lines))))


def test_capabilities():
    found = ehlo("PIPELINING", "SIZE 52428800", "8bitmime", "AUTH PLAIN Login SCRAM-SHA-256", "X-ODD a=b", "STARTTLS")
    assert found.keywords == {"PIPELINING", "SIZE", "8BITMIME", "AUTH", "X-ODD", "STARTTLS"}
    assert found.size_octets == 52428800
    assert found.mechanisms == {"PLAIN", "LOGIN", "SCRAM-SHA-256"}


def test_the_first_line_is_a_greeting_and_no_keyword():
    assert parse_ehlo(Reply(250, "PIPELINING")).keywords == frozenset()
    assert parse_ehlo(Reply(250, "STARTTLS\n8BITMIME")).keywords == {"8BITMIME"}


@pytest.mark.parametrize("line", ["SIZE", "SIZE 0", "SIZE x", "SIZE -1", "SIZE 1_0", "SIZE ١٠", "SIZE 1" + "0" * 20])
def test_a_size_that_is_none(line):
    found = ehlo(line)
    assert found.size_octets is None


@pytest.mark.parametrize("line", ["", " ", "-X", "PIPE\tLINING x\x00", "ſTARTTLS", "8BITMIME\x0bX", "X" * 64, "A=B"])
def test_a_line_that_is_no_keyword_is_passed_over(line):
    assert "PIPELINING" in ehlo(line, "PIPELINING").keywords
    assert ehlo(line).keywords == frozenset()


def test_keywords_are_compared_without_case_in_ascii_only():
    assert ehlo("ſize 10").keywords == frozenset()
    assert ehlo("Pipelining").keywords == {"PIPELINING"}


def test_mechanisms_are_bounded():
    assert len(ehlo("AUTH " + " ".join(f"M{n}" for n in range(80))).mechanisms) == client.MECHANISMS_MAX
    assert ehlo("AUTH " + "M" * 21 + " PLAIN").mechanisms == {"PLAIN"}


@given(st.text(max_size=600))
def test_any_text_gives_capabilities(text):
    found = parse_ehlo(Reply(250, text))
    assert all(keyword.isascii() and keyword == keyword.upper() for keyword in found.keywords)


# ---- commands


def test_commands_from_values():
    offered = frozenset({"SIZE", "8BITMIME", "SMTPUTF8", "DSN"})
    alice = Mailbox("alice", "example.com")
    assert client.mail(alice, NO_MAIL_PARAMETERS, offered) == b"MAIL FROM:<alice@example.com>\r\n"
    assert client.mail(NULL_REVERSE_PATH, MailParameters(size_octets=5), offered) == b"MAIL FROM:<> SIZE=5\r\n"
    assert client.mail(NULL_REVERSE_PATH, MailParameters(size_octets=5), frozenset()) == b"MAIL FROM:<>\r\n"
    path = ForwardPath(alice, Shape.PLAIN)
    assert client.rcpt(path, NO_RCPT_PARAMETERS, offered) == b"RCPT TO:<alice@example.com>\r\n"
    parameters = RcptParameters(notify=("NEVER",))
    assert client.rcpt(path, parameters, offered) == b"RCPT TO:<alice@example.com> NOTIFY=NEVER\r\n"
    assert client.rcpt(path, parameters, frozenset()) == b"RCPT TO:<alice@example.com>\r\n"
    assert client.hello("EHLO", "gate.example.com") == b"EHLO gate.example.com\r\n"
    assert client.hello("LHLO", "[192.0.2.1]") == b"LHLO [192.0.2.1]\r\n"
    assert client.hello("EHLO", "[IPv6:2001:db8::1]") == b"EHLO [IPv6:2001:db8::1]\r\n"


@pytest.mark.parametrize("name", ["", "a b", "a\r\nMAIL FROM:<>", "a\x00", "ä.example", "x" * 256])
def test_a_name_that_is_none_is_not_said(name):
    with pytest.raises(ValueError, match="no name to say"):
        client.hello("EHLO", name)


@given(st.text(min_size=1, max_size=30))
def test_a_command_is_one_line_whatever_the_local_part(text):
    try:
        octets = client.rcpt(ForwardPath(Mailbox(text, "example.com"), Shape.PLAIN), NO_RCPT_PARAMETERS, frozenset())
    except (ValueError, UnicodeEncodeError):
        return  # a value that no parser gives
    assert octets.endswith(b"\r\n")
    assert not set(b"\r\n\0") & set(octets[:-2])


# ---- XCLIENT

EVERY = frozenset({"ADDR", "PORT", "NAME", "REVERSE_NAME", "HELO", "PROTO", "LOGIN"})
SOMEBODY = Introduction(ip_address("192.0.2.7"), 40000, "client.test", esmtp=True, account="anna@example.com")


@pytest.mark.parametrize(
    ("line", "attributes"),
    [
        ("XCLIENT NAME ADDR PROTO HELO REVERSE_NAME PORT LOGIN DESTADDR DESTPORT", EVERY),
        ("xclient name addr", {"NAME", "ADDR"}),
        ("XCLIENT ADDR SESSION TTL", {"ADDR"}),
        ("XCLIENT NAME PORT", set()),  # without the address the rest would tell of nobody
        ("XCLIENT", set()),
        ("XFORWARD ADDR", set()),
    ],
)
def test_attributes_of_xclient(line, attributes):
    (reply,) = three_ways(f"250-mail\r\n250-{line}\r\n250 SIZE\r\n".encode())
    assert isinstance(reply, Reply)
    assert parse_ehlo(reply).xclient == attributes


@pytest.mark.parametrize(
    ("changes", "attributes", "line"),
    [
        (
            {},
            EVERY,
            (
                "XCLIENT ADDR=192.0.2.7 PORT=40000 NAME=[UNAVAILABLE] REVERSE_NAME=[UNAVAILABLE] HELO=client.test "
                "PROTO=ESMTP LOGIN=anna@example.com"
            ),
        ),
        ({"address": ip_address("2001:db8::7")}, {"ADDR", "PORT"}, "XCLIENT ADDR=IPV6:2001:db8::7 PORT=40000"),
        ({"account": ""}, {"ADDR", "LOGIN"}, "XCLIENT ADDR=192.0.2.7 LOGIN=[UNAVAILABLE]"),
        (
            {"hello": "", "esmtp": False},
            {"ADDR", "HELO", "PROTO"},
            "XCLIENT ADDR=192.0.2.7 HELO=[UNAVAILABLE] PROTO=SMTP",
        ),
        ({"hello": "a+b=c ü\r\nRSET"}, {"HELO"}, "XCLIENT HELO=a+2Bb+3Dc+20+C3+BC+0D+0ARSET"),
        ({"account": "x y"}, {"LOGIN"}, "XCLIENT LOGIN=x+20y"),
    ],
)
def test_xclient_says_each_attribute_that_is_offered(changes, attributes, line):
    assert client.xclient(SOMEBODY._replace(**changes), frozenset(attributes)) == f"{line}\r\n".encode()


@pytest.mark.parametrize(
    "octets", [XCLIENT_VALUE_OCTETS_MAX - 1, XCLIENT_VALUE_OCTETS_MAX, XCLIENT_VALUE_OCTETS_MAX + 1]
)
def test_a_value_that_is_too_long_is_not_cut(octets):
    value = "=" * octets
    line = client.xclient(SOMEBODY._replace(hello=value, account=value), EVERY)
    assert len(line) < LINE_OCTETS_MAX
    told = "[UNAVAILABLE]" if octets > XCLIENT_VALUE_OCTETS_MAX else "+3D" * octets
    assert f" HELO={told} ".encode() in line
    assert line.endswith(f" LOGIN={told}\r\n".encode())


@given(hello=st.text(), account=st.text())
def test_xclient_is_one_line_of_as_many_words_whatever_the_client_said(hello, account):
    line = client.xclient(SOMEBODY._replace(hello=hello, account=account), EVERY)
    assert re.fullmatch(rb"XCLIENT(?: [A-Z_]+=[!-<>-~]+){7}\r\n", line)


@given(name=st.text())
def test_a_name_is_said_in_ehlo_only_if_it_can_be(name):
    if client.is_hello_name(name):
        assert client.hello("EHLO", name) == f"EHLO {name}\r\n".encode()
    else:
        with pytest.raises(ValueError, match="no name to say"):
            client.hello("EHLO", name)
