"""Command lines: what each asks for, and the reply to each that asks for nothing we do."""

from __future__ import annotations

import re
from ipaddress import ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gatepost.smtp.command import (
    AUTH_OCTETS_MAX,
    BDAT_DIGITS_MAX,
    COMMAND_OCTETS_MAX,
    ENVID_OCTETS_MAX,
    HELLO_OCTETS_MAX,
    MECHANISM_OCTETS_MAX,
    NO_MAIL_PARAMETERS,
    NO_RCPT_PARAMETERS,
    ORCPT_OCTETS_MAX,
    SIZE_DIGITS_MAX,
    XCLIENT_ATTRIBUTES,
    XCLIENT_VALUE_OCTETS_MAX,
    Auth,
    Bdat,
    Data,
    Expn,
    Foreign,
    Hello,
    Help,
    Mail,
    MailParameters,
    Noop,
    Quit,
    Rcpt,
    RcptParameters,
    Rset,
    StartTls,
    Vrfy,
    Xclient,
    parse_command,
)
from gatepost.smtp.path import NULL_REVERSE_PATH, POSTMASTER, AddressLiteral, ForwardPath, Mailbox, Shape
from gatepost.smtp.reply import Reply
from gatepost.smtp.sasl import USER_OCTETS_MAX

ALL = frozenset({"SIZE", "8BITMIME", "SMTPUTF8", "DSN", "CHUNKING", "STARTTLS", "AUTH", "PIPELINING", "HELP"})
NOTHING: frozenset[str] = frozenset()
ALICE = Mailbox("alice", "example.com")
TO_ALICE = ForwardPath(ALICE, Shape.PLAIN)


def refusal(line: bytes, offered: frozenset[str] = ALL) -> str:
    """Code and status of the reply that refuses the line."""
    reply = parse_command(line, offered)
    assert isinstance(reply, Reply), reply
    assert len(reply.octets()) <= 512
    return reply.octets()[:9].decode()


# --- Verbs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "command"),
    [
        (b"EHLO mail.example.org", Hello("EHLO", "mail.example.org")),
        (b"ehlo MAIL.example.org", Hello("EHLO", "MAIL.example.org")),
        (b"HELO  some words ", Hello("HELO", "some words")),
        (b"HELO [192.0.2.1]", Hello("HELO", "[192.0.2.1]")),
        (b"EHLO x)(by(evil;x", Hello("EHLO", "x)(by(evil;x")),
        ("EHLO \u00f1aca.test".encode(), Hello("EHLO", "\u00f1aca.test")),
        (b"MAIL FROM:<alice@example.com>", Mail(ALICE, NO_MAIL_PARAMETERS)),
        (b"mail from:<alice@EXAMPLE.com>", Mail(ALICE, NO_MAIL_PARAMETERS)),
        (b"Mail From:  <alice@example.com>  ", Mail(ALICE, NO_MAIL_PARAMETERS)),
        (b"MAIL FROM:alice@example.com", Mail(ALICE, NO_MAIL_PARAMETERS)),
        (b"MAIL FROM:<@a.test:alice@example.com>", Mail(ALICE, NO_MAIL_PARAMETERS)),
        (b"MAIL FROM:<>", Mail(NULL_REVERSE_PATH, NO_MAIL_PARAMETERS)),
        (b"MAIL FROM: <> SIZE=1", Mail(NULL_REVERSE_PATH, MailParameters(size_octets=1))),
        (b"RCPT TO:<alice@example.com>", Rcpt(TO_ALICE, NO_RCPT_PARAMETERS)),
        (b"rcpt to: <alice@example.com>", Rcpt(TO_ALICE, NO_RCPT_PARAMETERS)),
        (b"RCPT TO:alice@example.com ", Rcpt(TO_ALICE, NO_RCPT_PARAMETERS)),
        (b"RCPT TO:<postmaster>", Rcpt(ForwardPath(POSTMASTER, Shape.NO_DOMAIN), NO_RCPT_PARAMETERS)),
        (
            b'RCPT TO:<"a> b"@example.com> NOTIFY=NEVER',
            Rcpt(ForwardPath(Mailbox("a> b", "example.com"), Shape.SPECIAL), RcptParameters(("NEVER",))),
        ),
        (b"DATA", Data()),
        (b"data  ", Data()),
        (b"BDAT 0", Bdat(0, last=False)),
        (b"bdat 86 last", Bdat(86, last=True)),
        (b"BDAT 007  LAST ", Bdat(7, last=True)),
        (b"RSET", Rset()),
        (b"rset ", Rset()),
        (b"NOOP", Noop()),
        (b"NOOP <victim@elsewhere.test>", Noop()),
        (b"HELP", Help("")),
        (b"HELP  RCPT ", Help("RCPT")),
        (b"VRFY alice", Vrfy("alice")),
        ("VRFY \u00fcnal".encode(), Vrfy("\u00fcnal")),
        (b"STARTTLS", StartTls()),
        (b"StartTLS ", StartTls()),
        (b"AUTH PLAIN", Auth("PLAIN", None)),
        (b"auth plain =", Auth("PLAIN", b"")),
        (b"AUTH SCRAM-SHA-256 biwsbj1hbGljZQ==", Auth("SCRAM-SHA-256", b"biwsbj1hbGljZQ==")),
        (b"AUTH PLAIN AGFsaWNlAHB3", Auth("PLAIN", b"AGFsaWNlAHB3")),
        (b"QUIT", Quit()),
        (b"quit  ", Quit()),
        (b"GET / HTTP/1.1", Foreign("HTTP")),
        (b"POST /", Foreign("HTTP")),
        (b"CONNECT mx.example.com:25 HTTP/1.1", Foreign("HTTP")),
        (b"PROXY TCP4 127.0.0.2 127.0.0.1 40000 25", Foreign("PROXY")),
    ],
)
def test_a_line_says_what_it_asks_for(line: bytes, command: object) -> None:
    parsed = parse_command(line, ALL)
    assert parsed == command
    assert type(parsed) is type(command)
    assert parse_command(line, ALL) == parsed


def test_commands_without_argument_are_told_apart() -> None:
    """Values that are tuples are equal where their fields are; these must not be."""
    values: list[Data | Rset | Noop | StartTls | Quit] = [Data(), Rset(), Noop(), StartTls(), Quit()]
    assert len(set(values)) == len(values)
    assert all(values)
    assert [value.verb for value in values] == ["DATA", "RSET", "NOOP", "STARTTLS", "QUIT"]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b" ",
        b"XYZZY",
        b" EHLO x",
        b"EHLO\tx",
        b"EHLO\x00",
        b"EHLO\rRSET",
        b"RCPTX TO:<alice@example.com>",
        b"RCPTTO:<alice@example.com>",
        b"MAILFROM:<alice@example.com>",
        b"RCP",
        b"LHLO x",
        b"DEBUG",
        b"WIZ",
        b"XEXCH50 2 2",
        b"X-LINK2STATE FIRST CHUNK=x",
        "QU\u0131T".encode(),  # upper() of the dotless i is I
        "RSET\u00a0".encode(),
        b"\xd1CPT TO:<a@b.test>",
        b"\x16\x03\x01\x02",
        b"\xff" * 100,
    ],
)
def test_an_unknown_verb_is_500(line: bytes) -> None:
    assert refusal(line) == "500 5.5.1"


@pytest.mark.parametrize(
    "line",
    [
        b"EXPN staff",
        b"ETRN elsewhere.test",
        b"TURN",
        b"ATRN elsewhere.test",
        b"SEND FROM:<x@sender.test>",
        b"SOML FROM:<x@sender.test>",
        b"SAML FROM:<x@sender.test>",
        b"BURL imap://x LAST",
        b"XCLIENT ADDR=127.0.0.2 NAME=localhost",
        b"XFORWARD ADDR=127.0.0.2",
    ],
)
def test_a_verb_that_we_know_and_never_do_is_502(line: bytes) -> None:
    assert refusal(line) == "502 5.5.1"


@pytest.mark.parametrize("line", [b"STARTTLS", b"STARTTLS x", b"AUTH PLAIN", b"AUTH", b"BDAT 5 LAST", b"BDAT x"])
def test_what_is_not_offered_is_502_whatever_follows(line: bytes) -> None:
    assert refusal(line, NOTHING) == "502 5.5.1"


def test_expn_and_lhlo_exist_only_where_they_are_offered() -> None:
    assert parse_command(b"EXPN staff", ALL | {"EXPN"}) == Expn("staff")
    assert refusal(b"EXPN", ALL | {"EXPN"}) == "501 5.5.4"
    assert refusal(b"EXPN \xff", ALL | {"EXPN"}) == "501 5.5.4"
    assert parse_command(b"LHLO x.test", ALL | {"LHLO"}) == Hello("LHLO", "x.test")
    assert refusal(b"LHLO", ALL | {"LHLO"}) == "501 5.5.4"


@pytest.mark.parametrize(
    "line",
    [
        b"EHLO",
        b"EHLO ",
        b"HELO   ",
        b"EHLO a\x00b",
        b"EHLO a\nX-Inject: y",
        b"EHLO a\rX-Inject: y",
        b"EHLO a\tb",
        b"EHLO a\x7f",
        b"HELO \xff",
        b"HELO a\xc2\x85b",
        b"HELO a\xe2\x80\xaeb",
        b"MAIL",
        b"MAIL FROM",
        b"MAIL FROM:",
        b"MAIL TO:<alice@example.com>",
        b"MAIL  FROM:<alice@example.com>",
        b"MAIL FROM :<alice@example.com>",
        b"MAIL FROM<alice@example.com>",
        b"MAIL FROM:<alice@example.com>SIZE=1",
        b"RCPT",
        b"RCPT TO",
        b"RCPT TO:",
        b"RCPT TO :<alice@example.com>",
        b"RCPT  TO : <alice@example.com>",
        b"RCPT FROM:<alice@example.com>",
        b"DATA x",
        b"DATA \t",
        b"RSET x",
        b"QUIT x",
        b"STARTTLS x",
        b"NOOP \x01",
        b"NOOP \xff",
        b"HELP \x01",
        b"HELP \xc3\xa9",
        b"VRFY",
        b"VRFY  ",
        b"VRFY a\x00",
        b"VRFY \xff",
        b"BDAT",
        b"BDAT ",
        b"BDAT -5",
        b"BDAT +5",
        b"BDAT 1_0",
        b"BDAT 0x10",
        b"BDAT 5LAST",
        b"BDAT 5 LASTLY",
        b"BDAT 5 LAST LAST",
        b"BDAT LAST",
        "BDAT \u0661".encode(),
        "BDAT \u00b2".encode(),
        "BDAT 5 LA\u017fT".encode(),
        b"AUTH",
        b"AUTH ",
        b"AUTH  PLAIN",
        b"AUTH ../../PLAIN AAAA",
        b"AUTH X\x00PLAIN AAAA",
        b"AUTH PLAIN *",
        b"AUTH PLAIN !!!!",
        b"AUTH PLAIN AAA",
        b"AUTH PLAIN AAAA=",
        b"AUTH PLAIN AA==AA==",
        b"AUTH PLAIN ==",
        b"AUTH PLAIN AGFsaWNl*AGNv",
        b"AUTH PLAIN AGFsaWNl AGNvcnJl",
        b"AUTH PLAIN A-_A",
    ],
)
def test_a_malformed_argument_is_501(line: bytes) -> None:
    assert refusal(line) == "501 5.5.4"


def test_utf8_needs_smtputf8_in_every_text() -> None:
    for line in ("EHLO \u00f1aca.test", "VRFY \u00fcnal"):
        assert refusal(line.encode(), ALL - {"SMTPUTF8"}) == "501 5.5.4"


def test_no_verb_in_any_case_but_ascii() -> None:
    for verb in (b"EHLO x", b"MAIL FROM:<a@b.test>", b"STARTTLS", b"QUIT", b"BDAT 1 LAST"):
        mixed = bytes(c ^ 0x20 if i % 2 and 65 <= c <= 90 else c for i, c in enumerate(verb))
        assert parse_command(mixed, ALL) == parse_command(verb, ALL)


# --- XCLIENT ---------------------------------------------------------------------------------------------------------

FRONT_END = frozenset({"XCLIENT", "SMTPUTF8"})


@pytest.mark.parametrize(
    ("attributes", "command"),
    [
        (b"ADDR=192.0.2.1", Xclient(address=ip_address("192.0.2.1"))),
        (b"addr=192.0.2.1 ", Xclient(address=ip_address("192.0.2.1"))),
        (b"ADDR=IPV6:2001:db8::1", Xclient(address=ip_address("2001:db8::1"))),
        (b"ADDR=IPv6:::FFFF:192.0.2.1", Xclient(address=ip_address("192.0.2.1"))),
        (b"NAME=Mail.Example.ORG", Xclient(name="mail.example.org")),
        (b"NAME=a_b.example", Xclient(name="a_b.example")),
        (b"PORT=0", Xclient(port=0)),
        (b"PORT=65535", Xclient(port=65535)),
        (b"PROTO=esmtp", Xclient(protocol="ESMTP")),
        (b"PROTO=SMTP", Xclient(protocol="SMTP")),
        (b"HELO=[192.0.2.1]", Xclient(hello="[192.0.2.1]")),
        (b"HELO=some+20words", Xclient(hello="some words")),
        (b"HELO=+C3+B1aca", Xclient(hello="\u00f1aca")),
        (b"LOGIN=DOMAIN\\alice", Xclient(login="DOMAIN\\alice")),
        (b"LOGIN=e+CC+81va+20b", Xclient(login="\u00e9va b")),
        (b"DESTADDR=198.51.100.1", Xclient(destination_address=ip_address("198.51.100.1"))),
        (b"DESTADDR=IPV6:::1", Xclient(destination_address=ip_address("::1"))),
        (b"DESTPORT=25", Xclient(destination_port=25)),
        (b"ADDR=[UNAVAILABLE]", Xclient(unavailable=frozenset({"ADDR"}))),
        (b"NAME=[tempunavail] PORT=[UNAVAILABLE]", Xclient(unavailable=frozenset({"NAME", "PORT"}))),
        (
            b"LOGIN=alice  ADDR=192.0.2.1 NAME=[UNAVAILABLE] HELO=x",
            Xclient(
                address=ip_address("192.0.2.1"), hello="x", login="alice", unavailable=frozenset({"NAME"})
            ),
        ),
        (
            b"NAME=a.test ADDR=192.0.2.1 PORT=1 PROTO=ESMTP HELO=b LOGIN=c DESTADDR=192.0.2.2 DESTPORT=2",
            Xclient(
                "a.test", ip_address("192.0.2.1"), 1, "ESMTP", "b", "c", ip_address("192.0.2.2"), 2
            ),
        ),
    ],
)  # fmt: skip
def test_xclient_says_who_the_client_is(attributes: bytes, command: Xclient) -> None:
    assert parse_command(b"XCLIENT " + attributes, FRONT_END) == command
    assert refusal(b"XCLIENT " + attributes, ALL) == "502 5.5.1"


@pytest.mark.parametrize(
    "attributes",
    [
        b"", b" ", b"ADDR", b"ADDR=", b"=192.0.2.1", b"ADDR 192.0.2.1", b"ADDR=192.0.2.1 addr=192.0.2.1",
        b"SOURCE=LOCAL",
        b"ADDR=192.0.2", b"ADDR=192.0.2.256", b"ADDR=192.0.2.01", b"ADDR=0300.0.2.1", b"ADDR=3221225985",
        b"ADDR=2001:db8::1", b"ADDR=[192.0.2.1]", b"ADDR=IPV6:", b"ADDR=IPV6:192.0.2.1", b"ADDR=IPV6:fe80::1+25eth0",
        b"ADDR=IPV6:fe80::1%eth0", b"ADDR=IPV6:[::1]", b"ADDR=localhost", b"ADDR=127.0.0.1+00", b"ADDR=+D9+A1.0.2.1",
        b"ADDR=127.0.0.1,127.0.0.2", b"ADDR=UNAVAILABLE", b"ADDR=[UNAVAILABLE", b"ADDR=[UNAVAILABLE]x",
        b"PORT=", b"PORT=-1", b"PORT=+1", b"PORT=65536", b"PORT=025", b"PORT=1_0", b"PORT=999999", b"PORT=+D9+A1",
        b"NAME=-", b"NAME=a..b", b"NAME=a+20b", b"NAME=a+0D+0AMAIL", b"NAME=127.0.0.1", b"NAME=+C3+B1", b"NAME=a.b.",
        b"PROTO=LMTP", b"PROTO=ESMTP+00", b"PROTO=HTTP",
        b"HELO=+0D+0AMAIL", b"HELO=+00", b"HELO=+20", b"HELO=+FF", b"HELO=+C2+AD",
        b"LOGIN=+00", b"LOGIN=a+00b", b"LOGIN=+20alice", b"LOGIN=alice+0A", b"LOGIN=+FF", b"LOGIN=+EF+BD+81",
        b"NAME=a+2", b"NAME=a+", b"NAME=a+GG", b"LOGIN=a=b", b"LOGIN=a\tb", b"LOGIN=\xc3\xa9",
    ],
)  # fmt: skip
def test_xclient_is_exact_or_refused(attributes: bytes) -> None:
    assert refusal(b"XCLIENT " + attributes, FRONT_END).startswith("501 5.5.4")


def test_a_hello_in_utf8_needs_smtputf8_in_xclient_too() -> None:
    assert refusal(b"XCLIENT HELO=+C3+B1aca", frozenset({"XCLIENT"})) == "501 5.5.4"


@pytest.mark.parametrize("keyword", XCLIENT_ATTRIBUTES)
def test_each_attribute_that_ehlo_lists_is_taken_and_may_be_unknown(keyword: str) -> None:
    line = f"xclient {keyword.lower()}=[unavailable]".encode()
    assert parse_command(line, FRONT_END) == Xclient(unavailable=frozenset({keyword}))


def test_values_of_xclient_are_bounded_before_and_after_decoding() -> None:
    for keyword, most in ((b"LOGIN", USER_OCTETS_MAX), (b"HELO", HELLO_OCTETS_MAX)):
        for written in (b"x", b"+78"):
            for count in (most - 1, most):
                assert isinstance(parse_command(b"XCLIENT " + keyword + b"=" + written * count, FRONT_END), Xclient)
            assert refusal(b"XCLIENT " + keyword + b"=" + written * (most + 1), FRONT_END) == "501 5.5.4"
    assert 3 * USER_OCTETS_MAX == XCLIENT_VALUE_OCTETS_MAX


# --- Parameters of MAIL ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "parameters", "sent"),
    [
        (b"", NO_MAIL_PARAMETERS, b""),
        (b"SIZE=0", MailParameters(size_octets=0), b" SIZE=0"),
        (b"size=00012", MailParameters(size_octets=12), b" SIZE=12"),
        (b"BODY=7bit", MailParameters(body="7BIT"), b" BODY=7BIT"),
        (b"Body=8BitMime", MailParameters(body="8BITMIME"), b" BODY=8BITMIME"),
        (b"SMTPUTF8", MailParameters(smtputf8=True), b" SMTPUTF8"),
        (b"smtputf8   SIZE=3 ", MailParameters(size_octets=3, smtputf8=True), b" SIZE=3 SMTPUTF8"),
        (b"RET=hdrs", MailParameters(ret="HDRS"), b" RET=HDRS"),
        (b"RET=FULL ENVID=QQ314159", MailParameters(ret="FULL", envid="QQ314159"), b" RET=FULL ENVID=QQ314159"),
        (b"ENVID=a+2bb+3D+20c", MailParameters(envid="a+b= c"), b" ENVID=a+2Bb+3D+20c"),
        (b"ENVID=a+41b", MailParameters(envid="aAb"), b" ENVID=aAb"),
        (b"AUTH=<>", MailParameters(auth=""), b""),
        (b"AUTH=+3C+3E", MailParameters(auth=""), b""),
        (b"AUTH=e+3Dmc2@EXAMPLE.com", MailParameters(auth="e=mc2@example.com"), b""),
    ],
)
def test_parameters_of_mail_are_read_and_written(written: bytes, parameters: MailParameters, sent: bytes) -> None:
    for path in (b"<alice@example.com>", b"<al#ice@example.com>", b" <>", b"alice@example.com"):
        command = parse_command(b"MAIL FROM:" + path + b" " + written, ALL)
        assert isinstance(command, Mail)
        assert command.parameters == parameters
    assert parameters.octets(ALL) == sent
    assert parameters.octets(NOTHING) == b""
    again = parse_command(b"MAIL FROM:<>" + sent, ALL)
    assert isinstance(again, Mail)
    assert again.parameters == parameters._replace(auth=None)


def test_binarymime_is_read_only_where_it_is_offered() -> None:
    assert refusal(b"MAIL FROM:<> BODY=BINARYMIME") == "555 5.5.4"
    command = parse_command(b"MAIL FROM:<> BODY=BINARYMIME", ALL | {"BINARYMIME"})
    assert isinstance(command, Mail)
    assert command.parameters.octets(ALL) == b""
    assert command.parameters.octets(frozenset({"BINARYMIME"})) == b" BODY=BINARYMIME"


@pytest.mark.parametrize(
    "parameter",
    [
        b"SIZE", b"SIZE=", b"SIZE=rabbit", b"SIZE=-1", b"SIZE=+10", b"SIZE=1_000", b"SIZE=0x10", b"SIZE=1.5",
        b"SIZE==1",
        "SIZE=\u0661".encode(), "SIZE=\u00b2".encode(), b"SIZE=1\n", b"SIZE=1\x00", b"SIZE=1\x0bBODY=7BIT",
        b"BODY", b"BODY=", b"BODY=RABIIT", b"BODY=8BIT", "BODY=8B\u0131TMIME".encode(), b"BODY=7BIT;",
        b"SMTPUTF8=", b"SMTPUTF8=YES",
        b"RET", b"RET=", b"RET=ALL", b"RET=FULL,HDRS",
        b"ENVID", b"ENVID=", b"ENVID=a+b", b"ENVID=a+2", b"ENVID=a+GG", b"ENVID=a=b", b"ENVID=a+0D+0Ab", b"ENVID=+00",
        b"ENVID=+7F", b"ENVID=+80", b"ENVID=\xc3\xa9", b"ENVID=a\x01",
        b"AUTH", b"AUTH=", b"AUTH=alice", b"AUTH=a+0D+0A@b.test", b"AUTH=+FF@b.test", b"AUTH=a@b@c.test",
        b"AUTH=<a@b.test>",
    ],
)  # fmt: skip
def test_a_bad_value_of_a_parameter_is_501(parameter: bytes) -> None:
    assert refusal(b"MAIL FROM:<alice@example.com> " + parameter) == "501 5.5.4"


@pytest.mark.parametrize(
    "parameter",
    [
        b"FOO",
        b"FOO=BAR",
        b"XVERP=+=",
        b"NOTIFY=NEVER",
        b"ORCPT=rfc822;a@b.test",
        b"MT-PRIORITY=9",
        b"BY=1;R",
        b"A" * 900,
    ],
)
def test_a_parameter_that_mail_does_not_have_is_555(parameter: bytes) -> None:
    assert refusal(b"MAIL FROM:<alice@example.com> " + parameter) == "555 5.5.4"


@pytest.mark.parametrize("parameter", [b"SIZE=1", b"BODY=7BIT", b"SMTPUTF8", b"RET=FULL", b"ENVID=x", b"AUTH=<>"])
def test_a_parameter_that_is_not_offered_is_555(parameter: bytes) -> None:
    assert refusal(b"MAIL FROM:<alice@example.com> " + parameter, NOTHING) == "555 5.5.4"


@pytest.mark.parametrize(
    "rest",
    [
        b"SIZE=10 SIZE=10",
        b"SIZE=10 size=99999",
        b"SMTPUTF8 SMTPUTF8",
        b"RCPT TO:<victim@elsewhere.test>",
        b"TO:<victim@elsewhere.test>",
        b"<victim@elsewhere.test>",
        b"=1",
        b"-SIZE=1",
        b"SI_ZE=1",
        b"SIZE=10\nRCPT TO:<victim@elsewhere.test>",
        b"\tSIZE=1",
        b"\xc3\xa9=1",
        "\u017fize=1".encode(),
    ],
)
def test_parameters_out_of_form_are_501(rest: bytes) -> None:
    for start in (b"MAIL FROM:<alice@example.com> ", b"RCPT TO:<alice@example.com> "):
        assert refusal(start + rest) in ("501 5.5.4", "555 5.5.4")
        assert not isinstance(parse_command(start + rest, ALL), Mail | Rcpt)


# --- Parameters of RCPT ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "parameters", "sent"),
    [
        (b"NOTIFY=never", RcptParameters(("NEVER",)), b" NOTIFY=NEVER"),
        (b"NOTIFY=DELAY,Failure", RcptParameters(("FAILURE", "DELAY")), b" NOTIFY=FAILURE,DELAY"),
        (
            b"NOTIFY=DELAY,SUCCESS,FAILURE",
            RcptParameters(("SUCCESS", "FAILURE", "DELAY")),
            b" NOTIFY=SUCCESS,FAILURE,DELAY",
        ),
        (
            b"ORCPT=rfc822;victim@elsewhere.test",
            RcptParameters(orcpt=("rfc822", "victim@elsewhere.test")),
            b" ORCPT=rfc822;victim+40elsewhere.test",
        ),
        (b"ORCPT=RFC822;a+2bb+3Dc", RcptParameters(orcpt=("rfc822", "a+b=c")), b" ORCPT=rfc822;a+2Bb+3Dc"),
        (
            b"ORCPT=rfc822;+22a+20b+22@c.d",
            RcptParameters(orcpt=("rfc822", '"a b"@c.d')),
            b" ORCPT=rfc822;+22a+20b+22+40c.d",
        ),
        (b"ORCPT=x-y;z", RcptParameters(orcpt=("x-y", "z")), b" ORCPT=x-y;z"),
        (b"ORCPT=utf-8;a\\x{2B}b", RcptParameters(orcpt=("rfc822", "a+b")), b" ORCPT=rfc822;a+2Bb"),
        (
            b"ORCPT=UTF-8;\\x{FC}\\x{1f600}\\x{2B}@b.test",
            RcptParameters(orcpt=("utf-8", "\u00fc\U0001f600+@b.test")),
            b" ORCPT=utf-8;\\x{FC}\\x{1F600}\\x{2B}\\x{40}b.test",
        ),
        (
            b"NOTIFY=NEVER ORCPT=rfc822;a",
            RcptParameters(("NEVER",), ("rfc822", "a")),
            b" NOTIFY=NEVER ORCPT=rfc822;a",
        ),
    ],
)
def test_parameters_of_rcpt_are_read_and_written(written: bytes, parameters: RcptParameters, sent: bytes) -> None:
    for path in (b"<alice@example.com>", b"<al#ice@example.com>", b" <alice@[127.0.0.1]>"):
        command = parse_command(b"RCPT TO:" + path + b" " + written, ALL)
        assert isinstance(command, Rcpt)
        assert command.parameters == parameters
    assert parameters.octets(ALL) == sent
    assert parameters.octets(ALL - {"DSN"}) == b""
    again = parse_command(b"RCPT TO:<alice@example.com>" + sent, ALL)
    assert isinstance(again, Rcpt)
    assert again.parameters == parameters


@pytest.mark.parametrize(
    "parameter",
    [
        b"NOTIFY", b"NOTIFY=", b"NOTIFY=NEVER,SUCCESS", b"NOTIFY=SUCCESS,NEVER", b"NOTIFY=SUCCESS,SUCCESS",
        b"NOTIFY=,",
        b"NOTIFY=SUCCESS,", b"NOTIFY=ALWAYS", b"NOTIFY=\xff", "NOTIFY=\u017fUCCESS".encode(),
        b"ORCPT", b"ORCPT=", b"ORCPT=a@b.test", b"ORCPT=;a@b.test", b"ORCPT=rfc822;", b"ORCPT=rfc 822;a",
        b"ORCPT=rfc_822;a",
        b"ORCPT=rfc822;x+0D+0ARCPT+20TO:<victim@elsewhere.test>", b"ORCPT=rfc822;x+00", b"ORCPT=rfc822;x+",
        b"ORCPT=rfc822;x+2", b"ORCPT=rfc822;+C3+A9", b"ORCPT=rfc822;\xc3\xa9", b"ORCPT=rfc822;a=b",
        b"ORCPT=rfc822;a\x01",
        b"ORCPT=utf-8;", b"ORCPT=utf-8;a+2Bb", b"ORCPT=utf-8;\\x{D}", b"ORCPT=utf-8;\\x{0D}\\x{0A}",
        b"ORCPT=utf-8;\\x{00}",
        b"ORCPT=utf-8;\\x{85}", b"ORCPT=utf-8;\\x{2028}", b"ORCPT=utf-8;\\x{D800}", b"ORCPT=utf-8;\\x{110000}",
        b"ORCPT=utf-8;\\x{1234567}", b"ORCPT=utf-8;\\x41", b"ORCPT=utf-8;a\\b", b"ORCPT=utf-8;\xff",
        b"ORCPT=utf-8;a\x7f",
    ],
)  # fmt: skip
def test_a_bad_value_at_rcpt_is_501(parameter: bytes) -> None:
    assert refusal(b"RCPT TO:<alice@example.com> " + parameter) == "501 5.5.4"


@pytest.mark.parametrize("parameter", [b"FOO=BAR", b"SIZE=1", b"RET=FULL", b"SMTPUTF8", b"BODY=8BITMIME"])
def test_a_parameter_that_rcpt_does_not_have_is_555(parameter: bytes) -> None:
    assert refusal(b"RCPT TO:<alice@example.com> " + parameter) == "555 5.5.4"


@pytest.mark.parametrize("parameter", [b"NOTIFY=NEVER", b"ORCPT=rfc822;a"])
def test_dsn_not_offered_is_555(parameter: bytes) -> None:
    assert refusal(b"RCPT TO:<alice@example.com> " + parameter, ALL - {"DSN"}) == "555 5.5.4"


# --- UTF-8 in paths --------------------------------------------------------------------------------------------------


def test_the_reverse_path_may_hold_utf8_if_this_mail_says_so() -> None:
    line = "MAIL FROM:<z\u00fcrich@sender.test>".encode()
    assert refusal(line) == "553 5.6.7"
    assert refusal(line + b" SMTPUTF8", ALL - {"SMTPUTF8"}) == "555 5.5.4"
    assert parse_command(line + b" SMTPUTF8", ALL) == Mail(
        Mailbox("z\u00fcrich", "sender.test"), MailParameters(smtputf8=True)
    )


def test_a_forward_path_may_hold_utf8_if_the_transaction_does() -> None:
    line = "RCPT TO:<ren\u00e9@b\u00fccher.example> ORCPT=utf-8;\u00e9@x.test".encode()
    reply = parse_command(line, ALL, smtputf8=False)
    assert isinstance(reply, Reply)
    assert reply.octets().startswith(b"553 5.6.7 ")
    for smtputf8 in (True, None):
        command = parse_command(line, ALL, smtputf8=smtputf8)
        assert isinstance(command, Rcpt)
        assert command.forward_path.mailbox == Mailbox("ren\u00e9", "xn--bcher-kva.example")
        assert command.parameters.octets(ALL) == b" ORCPT=utf-8;\\x{E9}\\x{40}x.test"
    assert isinstance(parse_command(line, ALL - {"SMTPUTF8"}), Reply)
    raw = b"RCPT TO:<alice@example.com> ORCPT=utf-8;\xc3\xa9@x.test"
    assert isinstance(parse_command(raw, ALL, smtputf8=False), Reply)


def test_a_literal_passes_as_a_value() -> None:
    command = parse_command(b"RCPT TO:<alice@[127.0.0.1]>", ALL)
    assert isinstance(command, Rcpt)
    assert isinstance(command.forward_path.mailbox.octets, bytes)
    assert isinstance(command.forward_path.mailbox, Mailbox)
    assert isinstance(command.forward_path.mailbox.domain, AddressLiteral)


# --- Limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "room"),
    [(b"NOOP ", COMMAND_OCTETS_MAX), (b"VRFY ", COMMAND_OCTETS_MAX), (b"HELP ", COMMAND_OCTETS_MAX)],
)
def test_a_line_is_bounded(start: bytes, room: int) -> None:
    for octets in (room - 1, room):
        assert not isinstance(parse_command(start.ljust(octets - 2, b"x"), ALL), Reply)
    assert refusal(start.ljust(room - 1, b"x")) == "500 5.5.2"
    assert refusal(b"X" * room) == "500 5.5.2"


def test_a_line_of_auth_is_bounded_by_its_own_limit() -> None:
    start = b"AUTH PLAIN "
    most = (AUTH_OCTETS_MAX - 2 - len(start)) // 4 * 4
    assert parse_command(start + b"A" * most, ALL) == Auth("PLAIN", b"A" * most)
    assert refusal(start + b"A" * (most + 4)) == "500 5.5.2"
    assert refusal(b"auth X ".ljust(AUTH_OCTETS_MAX - 2, b"=")) == "501 5.5.4"
    assert refusal(b"auth X ".ljust(AUTH_OCTETS_MAX - 1, b"=")) == "500 5.5.2"


@pytest.mark.parametrize("character", ["h", "\u00f1"])
def test_a_hello_name_is_bounded_in_octets(character: str) -> None:
    most = character * (HELLO_OCTETS_MAX // len(character.encode()))
    for name in (most[1:], most):
        assert parse_command(f"EHLO {name} ".encode(), ALL) == Hello("EHLO", name)
    assert refusal(f"EHLO {most}hh".encode()) == "501 5.5.4"


def test_numbers_are_bounded_in_digits() -> None:
    for digits in (SIZE_DIGITS_MAX - 1, SIZE_DIGITS_MAX):
        assert parse_command(b"MAIL FROM:<> SIZE=" + b"9" * digits, ALL) == Mail(
            NULL_REVERSE_PATH, MailParameters(size_octets=10**digits - 1)
        )
    assert refusal(b"MAIL FROM:<> SIZE=" + b"9" * (SIZE_DIGITS_MAX + 1)) == "501 5.5.4"
    for digits in (BDAT_DIGITS_MAX - 1, BDAT_DIGITS_MAX):
        assert parse_command(b"BDAT " + b"9" * digits, ALL) == Bdat(10**digits - 1, last=False)
    assert refusal(b"BDAT " + b"9" * (BDAT_DIGITS_MAX + 1)) == "501 5.5.4"


def test_values_are_bounded_in_octets_as_they_come() -> None:
    for octets in (ENVID_OCTETS_MAX - 1, ENVID_OCTETS_MAX):
        command = parse_command(b"MAIL FROM:<> ENVID=" + b"e" * octets, ALL)
        assert isinstance(command, Mail)
        assert command.parameters.envid == "e" * octets
    assert refusal(b"MAIL FROM:<> ENVID=" + b"e" * (ENVID_OCTETS_MAX + 1)) == "501 5.5.4"
    for octets in (ORCPT_OCTETS_MAX - 1, ORCPT_OCTETS_MAX):
        command = parse_command(b"RCPT TO:<a@b.test> ORCPT=" + b"rfc822;".ljust(octets, b"o"), ALL)
        assert isinstance(command, Rcpt)
        assert command.parameters.octets(ALL) == b" ORCPT=" + b"rfc822;".ljust(octets, b"o")
    assert refusal(b"RCPT TO:<a@b.test> ORCPT=" + b"rfc822;".ljust(ORCPT_OCTETS_MAX + 1, b"o")) == "501 5.5.4"


def test_what_grows_over_its_limit_is_not_sent_on() -> None:
    """What every character costs in our encoding: the client kept its limit, so its message is not refused for it."""
    fits = (ORCPT_OCTETS_MAX - len("utf-8;")) // len("\\x{E9}")
    for count in (fits - 1, fits, fits + 1):
        command = parse_command(b"RCPT TO:<a@b.test> ORCPT=utf-8;" + b"\xc3\xa9" * count, ALL)
        assert isinstance(command, Rcpt)
        assert command.parameters.orcpt == ("utf-8", "\u00e9" * count)
        assert command.parameters.octets(ALL) == (b" ORCPT=utf-8;" + b"\\x{E9}" * count if count <= fits else b"")
    fits = ENVID_OCTETS_MAX // len("+40")
    for count in (fits - 1, fits, fits + 1):
        command = parse_command(b"MAIL FROM:<> RET=FULL ENVID=" + b"@" * count, ALL)
        assert isinstance(command, Mail)
        assert command.parameters.envid == "@" * count
        sent = b" ENVID=" + b"+40" * count if count <= fits else b""
        assert command.parameters.octets(ALL) == b" RET=FULL" + sent


def test_a_mechanism_is_bounded() -> None:
    assert parse_command(b"AUTH " + b"M" * MECHANISM_OCTETS_MAX, ALL) == Auth("M" * MECHANISM_OCTETS_MAX, None)
    assert refusal(b"AUTH " + b"M" * (MECHANISM_OCTETS_MAX + 1)) == "501 5.5.4"


# --- Any line --------------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    [
        b"EHLO", b"HELO", b"MAIL", b"RCPT", b"FROM:", b"TO:", b"DATA", b"BDAT", b"AUTH", b"VRFY", b"EXPN", b"NOOP",
        b"HELP",
        b"QUIT", b"RSET", b"STARTTLS", b"LHLO", b"GET", b"<a@b.test>", b"<>", b"a@b.test", b"<\xc3\xa9@b.test>",
        b"<", b">",
        b'<"a b"@c.test>', b"SIZE=", b"SIZE", b"1", b"00", b"BODY=8BITMIME", b"SMTPUTF8", b"RET=FULL", b"ENVID=",
        b"AUTH=",
        b"NOTIFY=", b"NEVER", b"SUCCESS", b",", b"ORCPT=", b"rfc822;", b"utf-8;", b"+41", b"+0D", b"\\x{41}",
        b"\\x{0A}",
        b"XCLIENT", b"ADDR=", b"NAME=", b"HELO=", b"LOGIN=", b"PORT=", b"[UNAVAILABLE]", b"IPV6:", b"192.0.2.1",
        b"=", b"LAST", b"PLAIN", b"AAAA", b" ", b" ", b" ", b"  ", b"\t", b"\x00", b"\r", b"\n", b"\x7f", b"\xff",
        "\u00e9".encode(), "\u0131".encode(), "\u2028".encode(), "\u0661".encode(),
    ]
)  # fmt: skip
LINES = st.one_of(
    st.lists(WORDS, max_size=10).map(b"".join),
    st.lists(WORDS, max_size=6).map(b" ".join),
    st.builds(lambda words: b"MAIL FROM:<a@b.test> " + b"".join(words), st.lists(WORDS, max_size=6)),
    st.builds(lambda words: b"RCPT TO:<a@b.test> " + b"".join(words), st.lists(WORDS, max_size=6)),
    st.builds(lambda words: b"XCLIENT " + b"".join(words), st.lists(WORDS, max_size=6)),
    st.binary(max_size=60),
)
KEYWORDS = st.frozensets(st.sampled_from([*sorted(ALL), "EXPN", "LHLO", "BINARYMIME", "XCLIENT"]))


def texts(value: object) -> list[str]:
    """Every text in a command, however deep."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, bytes):
        return [value.decode("latin-1")]
    if isinstance(value, tuple):
        return [text for part in value for text in texts(part)]
    return []


@pytest.mark.parametrize("address", ["victim@elsewhere.test", "a%b!c", '"<a@b>"', "a:b,c;d(e)", "\u00fc@b.test"])
def test_no_parameter_that_is_sent_on_holds_what_looks_like_an_address(address: str) -> None:
    kind = "rfc822" if address.isascii() else "utf-8"
    sent = RcptParameters(orcpt=(kind, address)).octets(ALL)
    assert sent
    if address.isascii():
        sent += MailParameters(envid=address).octets(ALL)
    assert re.fullmatch(rb"(?: [A-Z]+=(?:rfc822;|utf-8;)?[A-Za-z0-9._+\\{}-]+)+", sent)


@given(LINES, KEYWORDS, st.sampled_from([None, True, False]))
@example(b"", frozenset(), None)
def test_any_line_gives_a_safe_value_or_a_refusal(line: bytes, offered: frozenset[str], smtputf8: bool | None) -> None:
    command = parse_command(line, offered, smtputf8=smtputf8)
    if isinstance(command, Reply):
        assert command.code in (500, 501, 502, 553, 555)
        assert command.status is not None
        return
    assert not any(re.search(r"[\x00-\x1f\x7f\x85\u2028\u2029]", text) for text in texts(command))
    if isinstance(command, Mail | Rcpt):
        sent = command.parameters.octets(offered)
        assert re.fullmatch(rb"(?: [!-~]+)*", sent)
        start = b"MAIL FROM:<>" if isinstance(command, Mail) else b"RCPT TO:<a@b.test>"
        again = parse_command(start + sent, offered)
        assert isinstance(again, Mail | Rcpt)
        assert again.parameters.octets(offered) == sent
        assert again.parameters.octets(NOTHING) == b""


@given(
    st.builds(
        MailParameters,
        size_octets=st.none() | st.integers(0, 10**SIZE_DIGITS_MAX - 1),
        body=st.sampled_from([None, "7BIT", "8BITMIME"]),
        smtputf8=st.booleans(),
        ret=st.sampled_from([None, "FULL", "HDRS"]),
        envid=st.none() | st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=33),
        auth=st.none(),
    )
)
def test_parameters_of_mail_go_round(parameters: MailParameters) -> None:
    assert parse_command(b"MAIL FROM:<>" + parameters.octets(ALL), ALL) == Mail(NULL_REVERSE_PATH, parameters)


ADDRESSES = st.one_of(
    st.tuples(
        st.sampled_from(["rfc822", "x400", "unknown"]),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=160),
    ),
    st.tuples(
        st.just("utf-8"),
        st.text(
            st.characters(min_codepoint=32, exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=45
        ).filter(lambda text: not text.isascii()),
    ),
)


@given(
    st.sampled_from([(), ("NEVER",), ("SUCCESS",), ("FAILURE", "DELAY"), ("SUCCESS", "FAILURE", "DELAY")]),
    st.none() | ADDRESSES,
)
def test_parameters_of_rcpt_go_round(notify: tuple[str, ...], orcpt: tuple[str, str] | None) -> None:
    parameters = RcptParameters(notify, orcpt)
    assert parse_command(b"RCPT TO:<alice@example.com>" + parameters.octets(ALL), ALL) == Rcpt(TO_ALICE, parameters)
