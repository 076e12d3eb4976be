"""What is read before a login in POP3 and IMAP, and what is written for the server: values in, values out."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest

from gatepost.gate.mailbox_lines import (
    CAPABILITIES_MAX,
    IMAP_LINE_OCTETS_MAX,
    LITERAL_OCTETS_MAX,
    LITERALS_MAX,
    POP3_COMMAND_OCTETS_MAX,
    TAG_OCTETS_MAX,
    Defect,
    ImapCommand,
    ImapCommands,
    ImapDefect,
    Lines,
    LiteralAsked,
    Pop3Command,
    capabilities,
    imap_capabilities,
    imap_login,
    imap_no,
    imap_unjudged,
    pop3_capabilities,
    pop3_command,
    pop3_login,
    pop3_unjudged,
)
from gatepost.smtp.command import AUTH_OCTETS_MAX
from gatepost.smtp.sasl import Password

ALICE = Password("alice", "s3cret-of-alice")


def b64(octets: bytes) -> bytes:
    return base64.b64encode(octets)


PLAIN = b64(b"\0alice\0s3cret-of-alice")


# ---- lines


def feed_three_ways(octets: bytes, take: Callable[[Lines], list[Any]], octets_max: int = 100) -> list[Any]:
    """What is taken from these octets, however they come; a tail behind them changes nothing of it."""
    whole = Lines(octets_max)
    whole.receive(octets)
    found = take(whole)
    bits = Lines(octets_max)
    pieces = []
    for position in range(len(octets)):
        bits.receive(octets[position : position + 1])
        pieces += take(bits)
    assert pieces == found
    tailed = Lines(octets_max)
    tailed.receive(octets + b"tail")
    assert take(tailed) == found
    return found


def all_lines(lines: Lines) -> list[Any]:
    found: list[Any] = []
    while (line := lines.line()) is not None and not isinstance(line, Defect):
        found.append(line)
    return [*found, line] if line is not None else found


@pytest.mark.parametrize(
    ("octets", "found"),
    [
        (b"one\r\ntwo\r\n", [b"one", b"two"]),
        (b"bare\nLF\n", [b"bare", b"LF"]),
        (b"\r\n\n", [b"", b""]),
        (b"not yet", []),
        (b"not yet\r", []),
    ],
)
def test_lines_however_they_come(octets, found):
    assert feed_three_ways(octets, all_lines) == found


@pytest.mark.parametrize("octets", [b"a\0b\r\n", b"a\rb\r\n", b"a\r\r\n", b"\0\n"])
def test_nul_and_cr_inside_a_line_are_refused(octets):
    assert feed_three_ways(octets, lambda lines: [Defect] if isinstance(lines.line(), Defect) else [])[:1] == [Defect]


@pytest.mark.parametrize("octets_max", [POP3_COMMAND_OCTETS_MAX, IMAP_LINE_OCTETS_MAX, AUTH_OCTETS_MAX])
def test_a_line_at_its_limit(octets_max):
    for octets, good in ((octets_max - 1, True), (octets_max, True), (octets_max + 1, False)):
        for end in (b"\r\n", b""):
            lines = Lines(octets_max)
            lines.receive(b"x" * (octets - len(end)) + end)
            line = lines.line()
            if end:
                assert isinstance(line, bytes) is good
            else:  # a line that does not end is refused when its end can no longer come in time
                assert isinstance(line, Defect) is (octets >= octets_max)


def test_counted_octets_and_the_rest():
    lines = Lines(100)
    lines.receive(b"abc")
    assert lines.exactly(4) is None
    lines.receive(b"d\nrest")
    assert (lines.exactly(4), lines.line(), lines.rest(), lines.unread_octets) == (b"abcd", b"", b"rest", 0)


# ---- commands


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b"USER alice", Pop3Command("USER", b"alice")),
        (b"pass  two  spaces ", Pop3Command("PASS", b" two  spaces ")),
        (b"QUIT", Pop3Command("QUIT", b"")),
        (b"", None),
        (b" USER alice", None),
        (b"GET / HTTP/1.1", Pop3Command("GET", b"/ HTTP/1.1")),
        (b"\xffUSER x", None),
        (b"VERYLONGVERB", None),
        (b"USER " + b"x" * (POP3_COMMAND_OCTETS_MAX - 8), Pop3Command("USER", b"x" * (POP3_COMMAND_OCTETS_MAX - 8))),
        (b"USER " + b"x" * (POP3_COMMAND_OCTETS_MAX - 7), Pop3Command("USER", b"x" * (POP3_COMMAND_OCTETS_MAX - 7))),
        (b"USER " + b"x" * (POP3_COMMAND_OCTETS_MAX - 6), None),
        (b"AUTH PLAIN " + b"x" * 600, Pop3Command("AUTH", b"PLAIN " + b"x" * 600)),
    ],
)
def test_commands_of_pop3(line, found):
    command = pop3_command(line)
    assert isinstance(command, Defect) if found is None else command == found


def read(octets: bytes) -> list[Any]:
    """What is read from these octets, however they come, with leave for every literal."""
    one, bits, tailed = Lines(IMAP_LINE_OCTETS_MAX), Lines(IMAP_LINE_OCTETS_MAX), Lines(IMAP_LINE_OCTETS_MAX)
    one.receive(octets)
    found = all_commands(ImapCommands(one))
    commands = ImapCommands(bits)
    pieces: list[Any] = []
    for position in range(len(octets)):
        bits.receive(octets[position : position + 1])
        if not (pieces and getattr(pieces[-1], "fatal", False)):  # nobody reads on behind it
            pieces += all_commands(commands)
    assert pieces == found
    tailed.receive(octets + b"tail")
    assert all_commands(ImapCommands(tailed)) == found
    return found


def all_commands(commands: ImapCommands) -> list[Any]:
    found: list[Any] = []
    while (one := commands.next()) is not None:
        found.append(one)
        if isinstance(one, ImapDefect) and one.fatal:
            break
    return found


@pytest.mark.parametrize(
    ("octets", "found"),
    [
        (b"a NOOP\r\n", [ImapCommand("a", "NOOP", ())]),
        (b"a1 login alice pw\n", [ImapCommand("a1", "LOGIN", (b"alice", b"pw"))]),
        (b'a LOGIN "al ice" "p\\"w\\\\"\r\n', [ImapCommand("a", "LOGIN", (b"al ice", b'p"w\\'))]),
        (b'a LOGIN "" ""\r\n', [ImapCommand("a", "LOGIN", (b"", b""))]),
        (b"a LOGIN {5+}\r\nalice {2+}\r\npw\r\n", [ImapCommand("a", "LOGIN", (b"alice", b"pw"))]),
        (
            b"a LOGIN {5}\r\nalice {3}\r\np\r\n\r\n",
            [LiteralAsked("a", "LOGIN"), LiteralAsked("a", "LOGIN"), ImapCommand("a", "LOGIN", (b"alice", b"p\r\n"))],
        ),
        (b"a LOGIN alice {0+}\r\n\r\n", [ImapCommand("a", "LOGIN", (b"alice", b""))]),
        (b"a LOGIN {5+}\r\nalicepw\r\n", [ImapCommand("a", "LOGIN", None)]),
        (b"a LOGIN alice{2+}\r\npw\r\n", [ImapCommand("a", "LOGIN", None)]),
        (b"a LOGIN  alice pw\r\n", [ImapCommand("a", "LOGIN", None)]),
        (b'a LOGIN "alice pw\r\n', [ImapCommand("a", "LOGIN", None)]),
        (b'a LOGIN "al\\ice" pw\r\n', [ImapCommand("a", "LOGIN", None)]),
        (b"a LOGIN alice p*w\r\n", [ImapCommand("a", "LOGIN", None)]),
        (b'a ID ("name" "x")\r\n', [ImapCommand("a", "ID", None)]),
        (b"a AUTHENTICATE PLAIN AGEAYg==\r\n", [ImapCommand("a", "AUTHENTICATE", (b"PLAIN", b"AGEAYg=="))]),
        (b"\r\n", [ImapDefect("*", "This is IMAP: a tag, a command")]),
        (b"+a NOOP\r\n", [ImapDefect("*", "This is IMAP: a tag, a command")]),
        (b"a*b NOOP\r\n", [ImapDefect("*", "This is IMAP: a tag, a command")]),
        (b"a\r\n", [ImapDefect("a", "This is IMAP: a tag, a command")]),
        (b"a (x)\r\n", [ImapDefect("a", "This is IMAP: a tag, a command")]),
        (b"a (x {3+}\r\n", [ImapDefect("a", "This is IMAP: a tag, a command", fatal=True)]),
        (b"a\0 NOOP\r\n", [ImapDefect("*", "NUL or CR inside a line", fatal=True)]),
    ],
)
def test_commands_of_imap_however_they_come(octets, found):
    assert read(octets) == found


@pytest.mark.parametrize("sign", [b"", b"+"])
def test_a_literal_at_its_limit(sign):
    for octets, good in ((LITERAL_OCTETS_MAX - 1, True), (LITERAL_OCTETS_MAX, True), (LITERAL_OCTETS_MAX + 1, False)):
        found = read(b"a LOGIN alice {%d%b}\r\n" % (octets, sign) + (b"x" * octets + b"\r\n" if good else b""))
        if good:
            assert found[-1] == ImapCommand("a", "LOGIN", (b"alice", b"x" * octets))
        else:
            # One that is not waited for comes all the same, and cannot be told from commands.
            assert found == [ImapDefect("a", "Too long or too many literals", fatal=bool(sign))]


def test_so_many_literals_and_no_more():
    for literals, good in ((LITERALS_MAX - 1, True), (LITERALS_MAX, True), (LITERALS_MAX + 1, False)):
        found = read(b"a X" + b" {1+}\r\nx" * literals + b"\r\n")
        assert found[0] == (
            ImapCommand("a", "X", (b"x",) * literals)
            if good
            else ImapDefect("a", "Too long or too many literals", fatal=True)
        )


def test_a_tag_at_its_limit():
    for octets, good in ((TAG_OCTETS_MAX - 1, True), (TAG_OCTETS_MAX, True), (TAG_OCTETS_MAX + 1, False)):
        assert isinstance(read(b"t" * octets + b" NOOP\r\n")[0], ImapCommand) is good


def test_a_refused_literal_is_forgotten():
    lines = Lines(100)
    commands = ImapCommands(lines)
    lines.receive(b"a LOGIN {5}\r\n")
    assert commands.next() == LiteralAsked("a", "LOGIN")
    commands.refuse()
    lines.receive(b"b NOOP\r\n")
    assert commands.next() == ImapCommand("b", "NOOP", ())


# ---- capabilities and logins as they are written


def test_capabilities_that_can_be_shown():
    words = [b"TOP", b"BAD\xff", b"", b"x" * 65, b"LOGIN-DELAY 900", b"EVIL\x1b[31m"]
    assert capabilities(words) == ("TOP", "LOGIN-DELAY 900")
    assert len(capabilities([b"X"] * (CAPABILITIES_MAX + 1))) == CAPABILITIES_MAX


def test_only_what_holds_through_the_proxy_is_offered_by_pop3():
    server = ("TOP", "USER", "SASL GSSAPI", "STLS", "UTF8 USER", "LANG", "UIDL")
    codes = ("RESP-CODES", "AUTH-RESP-CODE")
    assert pop3_capabilities(server, stls=False, login=True) == ("TOP", "UIDL", *codes, "USER", "SASL PLAIN LOGIN")
    assert pop3_capabilities(server, stls=True, login=False) == ("TOP", "UIDL", *codes, "STLS")


def test_only_what_holds_through_the_proxy_is_offered_by_imap():
    server = ("IMAP4rev1", "STARTTLS", "auth=gssapi", "LOGINDISABLED", "COMPRESS=DEFLATE", "IDLE", "UNAUTHENTICATE")
    assert imap_capabilities(server, starttls=False, login=True) == (
        *("IMAP4rev1", "IDLE", "ID", "SASL-IR", "AUTH=PLAIN", "AUTH=LOGIN"),
    )
    assert imap_capabilities((), starttls=True, login=False) == ("IMAP4rev1", "ID", "STARTTLS", "LOGINDISABLED")


@pytest.mark.parametrize(
    ("password", "server", "lines"),
    [
        (ALICE, None, [b"USER alice", b"PASS s3cret-of-alice"]),
        (ALICE, ("USER", "SASL PLAIN"), [b"USER alice", b"PASS s3cret-of-alice"]),
        (ALICE, ("SASL CRAM-MD5 PLAIN",), [b"AUTH PLAIN", PLAIN]),
        (ALICE, ("TOP", "SASL GSSAPI"), None),
        (Password("jörg", "pässword"), ("USER", "SASL PLAIN"), [b"AUTH PLAIN", b64("\0jörg\0pässword".encode())]),
        (Password("jörg", "p"), ("USER",), ["USER jörg".encode(), b"PASS p"]),
        (Password("a", "p" * 248), ("USER", "SASL PLAIN"), [b"USER a", b"PASS " + b"p" * 248]),
        (Password("a", "p" * 249), ("USER", "SASL PLAIN"), [b"AUTH PLAIN", b64(b"\0a\0" + b"p" * 249)]),
    ],
)
def test_a_login_is_written_anew_for_pop3(password, server, lines):
    assert pop3_login(password, server) == lines


@pytest.mark.parametrize(
    ("password", "server", "lines"),
    [
        (ALICE, ("AUTH=PLAIN",), [b'LOGIN "alice" "s3cret-of-alice"']),
        (Password('a"b\\', "p w"), (), [b'LOGIN "a\\"b\\\\" "p w"']),
        (ALICE, ("LOGINDISABLED", "auth=plain"), [b"AUTHENTICATE PLAIN", PLAIN]),
        (ALICE, ("LOGINDISABLED",), None),
        (Password("jörg", "p"), ("AUTH=PLAIN",), [b"AUTHENTICATE PLAIN", b64("\0jörg\0p".encode())]),
        (Password("jörg", "pw"), (), [b"LOGIN {5}", "jörg {2}".encode(), b"pw"]),
    ],
)
def test_a_login_is_written_anew_for_imap(password, server, lines):
    assert imap_login(password, server) == lines


def test_which_refusals_judge_the_secret():
    assert not pop3_unjudged(b"-ERR [AUTH] no")
    assert not pop3_unjudged(b"-ERR no [SYS/TEMP]")
    assert all(pop3_unjudged(b"-ERR [%b] x" % code) for code in (b"SYS/TEMP", b"sys/perm", b"IN-USE", b"LOGIN-DELAY"))
    assert not imap_unjudged(b"NO")
    assert not imap_unjudged(b"no [AUTHENTICATIONFAILED] x")
    assert all(imap_unjudged(b"NO [%b] x" % code) for code in (b"UNAVAILABLE", b"inuse", b"LIMIT", b"SERVERBUG"))
    assert [imap_no(status) for status in (b"NO", b"no [X] y", b"NOT", b"BAD what?", b"")] == [True, True, *[False] * 3]
