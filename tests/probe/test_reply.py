"""Replies of foreign servers: how they are read, and what each says about relaying."""

from __future__ import annotations

import pytest

from gatepost.probe.reply import (
    REPLY_OCTETS_MAX,
    SHOWN_CHARACTERS_MAX,
    Heard,
    Outcome,
    ReplyReader,
    bad_syntax,
    judge,
)

READ = {
    b"250 Ok\r\n": Heard(250, "Ok"),
    b"250\r\n": Heard(250, ""),
    b"250 Ok\n": Heard(250, "Ok"),
    b"250-mx.example.com\r\n250-SIZE 1\r\n250 HELP\r\n": Heard(250, "mx.example.com\nSIZE 1\nHELP"),
    b"220-banner\r\n250 of another code\r\n": Heard(250, "banner\nof another code"),
    b"250 \x1b[2Jcleared \x07\xff\r\n": Heard(250, "?[2Jcleared ?\ufffd"),
    b"250 right\xe2\x80\xae-to-left\r\n": Heard(250, "right?-to-left"),
    b"HTTP/1.1 400 Bad Request\r\n": Heard(0, "not an SMTP reply: HTTP/1.1 400 Bad Request"),
    b"+OK POP3\r\n": Heard(0, "not an SMTP reply: +OK POP3"),
    b"\r\n": Heard(0, "not an SMTP reply: "),
    b"199 too low\r\n": Heard(0, "not an SMTP reply: 199 too low"),
    b"600 too high\r\n": Heard(0, "not an SMTP reply: 600 too high"),
}


@pytest.mark.parametrize("octets", READ, ids=ascii)
def test_a_reply_is_read_whole_octet_by_octet_and_with_a_tail(octets):
    whole, slowly, tailed = ReplyReader(), ReplyReader(), ReplyReader()
    whole.feed(octets)
    assert whole.next() == READ[octets]
    for at in range(len(octets)):
        if at + 1 < len(octets) and b"\n" not in octets[: at + 1]:
            assert slowly.next() is None
        slowly.feed(octets[at : at + 1])
    assert slowly.next() == READ[octets]
    tailed.feed(octets + b"354 Go ahead\r\n22")
    assert tailed.next() == READ[octets]
    if READ[octets].code:
        assert tailed.next() == Heard(354, "Go ahead")
        assert tailed.next() is None


@pytest.mark.parametrize(("octets", "fits"), [(-1, True), (0, True), (1, False)])
def test_a_reply_has_a_length(octets, fits):
    reader = ReplyReader()
    reader.feed(b"250 " + b"x" * (REPLY_OCTETS_MAX + octets - 6) + b"\r\n")
    heard = reader.next()
    assert heard is not None
    assert (heard.code == 250) is fits
    assert len(heard.text) <= SHOWN_CHARACTERS_MAX


@pytest.mark.parametrize("endless", [b"2", b"250-line\r\n"])
def test_a_reply_without_end_is_given_up(endless):
    reader = ReplyReader()
    heard = None
    for _ in range(REPLY_OCTETS_MAX + 1):
        reader.feed(endless)
        heard = reader.next()
        if heard is not None:
            break
    assert heard == Heard(0, f"a reply of more than {REPLY_OCTETS_MAX} octets")


YES, NO, NOTHING = Outcome.ACCEPTED, Outcome.REFUSED, Outcome.UNCLEAR

# As these servers word it, the addresses shortened.
FOREIGN = [
    ("250 OK - Recipient <victim@elsewhere.test>", YES),  # Exchange 5.5
    ("250 victim@elsewhere.test... Recipient ok", YES),  # Sendmail
    ("250 2.1.5 victim@elsewhere.test ", YES),  # Exchange 2003
    ("250 victim@elsewhere.test OK", YES),  # Domino
    ("250 2.1.5 Ok", YES),  # Postfix
    ("250 Accepted", YES),  # Exim
    ("250 ok", YES),  # qmail
    ("251 User not local; will forward to <victim@elsewhere.test>", YES),
    ("252 Cannot VRFY user, but will accept message and attempt delivery", YES),
    ("550 Relaying is prohibited", NO),  # Exchange 5.5
    ("550 5.7.1 Unable to relay for victim@elsewhere.test", NO),  # Exchange 2003
    ("550 5.7.54 SMTP; Unable to relay recipient in non-accepted domain", NO),  # Exchange 2013
    ("554 Relay rejected for policy reasons.", NO),  # Domino
    ("550 5.7.1 victim@elsewhere.test... Relaying denied", NO),  # Sendmail
    ("550 5.7.1 victim@elsewhere.test... Relaying denied. IP name lookup failed [192.0.2.7]", NO),
    ("550 5.7.1 victim@elsewhere.test... Relaying denied. Proper authentication required.", NO),
    ("554 5.7.1 <victim@elsewhere.test>: Relay access denied", NO),  # Postfix
    ("454 4.7.1 <victim@elsewhere.test>: Relay access denied", NO),  # Postfix, defer_unauth_destination
    ("550 relay not permitted", NO),  # Exim
    ("553 sorry, that domain isn't in my list of allowed rcpthosts (#5.7.1)", NO),  # qmail
    ("550 Invalid recipient: <victim@elsewhere.test>", NO),  # OpenSMTPD
    ("550 5.7.1 Relaying is prohibited [Q7NT2K]", NO),  # ours
    ("530 5.7.0 Authentication required", NO),
    ("550 5.1.1 <victim@elsewhere.test>: Recipient address rejected: User unknown", NO),
    ("501 5.1.3 Bad recipient address syntax", NO),
    ("503 5.5.1 Error: need MAIL command", NO),
    ("501 <x@[192.0.2.1]>: domain literals not allowed\nToo many syntax or protocol errors", NO),  # Exim
    ("450 4.2.0 <victim@elsewhere.test>: Recipient address rejected: Greylisted", NOTHING),
    ("451 4.7.1 Greylisting in action, please come back later", NOTHING),
    ("451 Temporary local problem - please try later", NOTHING),
    ("452 4.3.1 Insufficient system storage", NOTHING),
    ("421 4.7.0 Too many errors", NOTHING),
    ("450 4.1.2 <victim@elsewhere.test>: Recipient address rejected: Domain not found", NOTHING),
    ("550 5.1.2 <victim@elsewhere.test>: Recipient address rejected: Domain not found", NOTHING),
    ("556 5.1.10 <victim@example.com>: Recipient address rejected: Domain does not accept mail (nullMX)", NOTHING),
    ("550 Unrouteable address", NOTHING),  # Exim
    ("554 5.7.1 Service unavailable; Client host [192.0.2.7] blocked using zen.spamhaus.org", NOTHING),
    ("450 4.7.25 Client host rejected: cannot find your hostname, [192.0.2.7]", NOTHING),
    ("504 5.5.2 <[x]>: Helo command rejected: need fully-qualified hostname", NOTHING),
    ("354 Go ahead", NOTHING),
]


@pytest.mark.parametrize(("reply", "outcome"), FOREIGN, ids=[reply[:60] for reply, _ in FOREIGN])
def test_what_a_foreign_reply_says(reply, outcome):
    said, note = judge(Heard(int(reply[:3]), reply[4:]))
    assert said is outcome
    assert bool(note) is (outcome is NOTHING)


def test_no_reply_says_nothing():
    assert judge(Heard(0, "it hung up without a reply"))[0] is NOTHING


@pytest.mark.parametrize(
    ("reply", "syntax"),
    [("501 what", True), ("553 5.1.3 what", True), ("553 5.7.1 what", False), ("550 what", False), ("250 ok", False)],
)
def test_a_refusal_of_the_form_is_told_from_one_of_the_address(reply, syntax):
    assert bad_syntax(Heard(int(reply[:3]), reply[4:])) is syntax
