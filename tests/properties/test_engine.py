"""The engine on octets that nobody meant to send; for a few seconds here, longer with fuzz/engine.py."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.properties.engine_judge import LIMITS, judge, run
from tests.vectors.player import Play, Target, load_cases

from gatepost.smtp.content import ContentLimits
from gatepost.smtp.sasl import Password, Token
from gatepost.smtp.server import State

TARGET = Target("127.0.0.1", 25, frozenset({"example.com"}))


def said_in(case) -> bytes:
    """All octets a published attack sends, without waiting for any reply."""
    play = Play(case, TARGET, frozenset())
    return b"".join(play.fill(step["say"]) for step in case.steps if "say" in step and "load" not in step)


ATTACKS = {case.id: octets for case in load_cases() if 0 < len(octets := said_in(case)) < 20_000}

HELLO = b"EHLO x\r\n"
MAIL = b"MAIL FROM:<a@sender.test>\r\n"
RCPT = b"RCPT TO:<bob@example.com>\r\n"
FRAGMENTS = [
    HELLO,
    b"HELO x\r\n",
    MAIL,
    b"MAIL FROM:<a@sender.test> BODY=8BITMIME SIZE=100 SMTPUTF8\r\n",
    RCPT,
    b"RCPT TO:<bob%elsewhere.test@example.com>\r\n",
    b"RCPT TO:<victim@elsewhere.test>\r\n",
    b'RCPT TO:<"b o\\"b"@example.com> NOTIFY=NEVER ORCPT=rfc822;x+40y\r\n',
    "RCPT TO:<rené@example.com>\r\n".encode(),
    b"DATA\r\n",
    b".\r\n",
    b"\r\n.\r\n",
    b"RSET\r\n",
    b"STARTTLS\r\n",
    b"AUTH PLAIN AGEAYg==\r\n",
    b"AUTH PLAIN AGEAd3Jvbmc=\r\n",
    b"AUTH PLAIN\r\n",
    b"auth login\r\n",
    b"AUTH LOGIN YQ==\r\n",
    b"AUTH XOAUTH2 dXNlcj1hAWF1dGg9QmVhcmVyIHdyb25nAQE=\r\n",
    b"AUTH OAUTHBEARER bixhPWEsAWF1dGg9QmVhcmVyIHgBAQ==\r\n",
    b"AGEAYg==\r\n",
    b"YQ==\r\n",
    b"*\r\n",
    b"\r\n",
    b"AUTH PLAIN " + b"A" * 2500,
    b"XCLIENT ADDR=192.0.2.1 LOGIN=a\r\n",
    b"XCLIENT NAME=[UNAVAILABLE] ADDR=[UNAVAILABLE]\r\n",
    b"BDAT 10\r\n",
    b"BDAT 3 LAST\r\n",
    b"BDAT 0 LAST\r\n",
    b"BDAT 99999\r\n",
    b"Subject: x\r\n",
    b"Received: from a\r\n",
    b"X" * LIMITS.content_line_octets,
    b"A" * 700,
    b"\r",
    b"\n",
    b".",
    b"\0",
    b"\x85",
    b"\xff",
    b" ",
    b"<",
    b"@",
    b"VRFY a\r\n",
    b"QUIT\r\n",
    b"GET / HTTP/1.1\r\n",
]
fragments = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=20)), max_size=30).map(b"".join)
openings = st.sampled_from(
    [b"", HELLO, HELLO + MAIL + RCPT, HELLO + MAIL + RCPT + b"DATA\r\n", HELLO + b"AUTH LOGIN\r\n"]
)
cuts = st.lists(st.integers(0, 5000), max_size=12)
modes = st.fixed_dictionaries({"normalise": st.booleans(), "trusted": st.booleans(), "login": st.booleans()})

quickly = settings(suppress_health_check=[HealthCheck.too_slow])  # how many examples: the profile says (conftest.py)


@quickly
@given(openings, fragments, cuts, modes)
@example(HELLO + MAIL + RCPT, b"DATA\r\n.\r\nBDAT 3 LAST\r\na\nbNOOP\r\n", [9], {"normalise": True})
@example(HELLO, MAIL + RCPT + b"BDAT 3\r\na\r\nBDAT 1\r\nbBDAT 1 LAST\r\n.", [1], {})
@example(HELLO, b"AUTH LOGIN\r\nYQ==\r\n" + b"A" * 13000 + b"\r\nMAIL FROM:<>\r\n", [5000, 9000], {"login": True})
def test_whatever_comes_in_whatever_pieces(opening, octets, places, mode):
    judge(opening + octets, places, **mode)


@quickly
@given(st.binary(max_size=200), st.binary(max_size=200), cuts, st.booleans())
def test_any_content_at_all(before, after, places, normalise):
    octets = HELLO + MAIL + RCPT + b"DATA\r\n" + before + b"\r\n.\r\n" + after
    judge(octets, places, normalise=normalise)


@quickly
@given(st.binary(max_size=60).filter(lambda octets: b"\n" not in octets), st.booleans())
def test_any_recipient_at_all(octets, utf8):
    mail = b"MAIL FROM:<> SMTPUTF8\r\n" if utf8 else b"MAIL FROM:<>\r\n"
    judge(HELLO + mail + b"RCPT TO:<" + octets + b"@example.com>\r\n", [])


local_parts = st.text(
    st.one_of(
        st.sampled_from('@%!"\\(),:;<>[]|/=?+.- \t＠％！﹫﹪﹗@'),
        st.characters(codec="utf-8", exclude_characters="\r\n"),
    ),
    max_size=30,
)


@quickly
@given(local_parts, st.sampled_from(["example.com", "EXAMPLE.com", "elsewhere.test", "example.com.elsewhere.test"]))
def test_a_recipient_with_routing_characters(local_part, domain):
    octets = f"{local_part}@{domain}".encode()
    judge(HELLO + b"MAIL FROM:<> SMTPUTF8\r\nRCPT TO:<" + octets + b">\r\n", [])
    judge(HELLO + b'MAIL FROM:<> SMTPUTF8\r\nRCPT TO:<"' + octets.replace(b"@", b'"@', 1) + b">\r\n", [])


@pytest.mark.parametrize("name", ATTACKS)
def test_published_attacks_sent_blindly(name):
    octets = ATTACKS[name]
    judge(octets, [len(octets) // 2, 7, 1])
    judge(octets, [len(octets) // 3], normalise=True)
    judge(octets, [len(octets) // 2], login=True)


@quickly
@given(st.sampled_from(sorted(ATTACKS)), st.data())
def test_published_attacks_damaged(name, data):
    octets = bytearray(ATTACKS[name][:3000])
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(octets)))
        octets[at : at + data.draw(st.integers(0, 3))] = data.draw(st.sampled_from([*FRAGMENTS, b""]))
    judge(bytes(octets), [len(octets) // 2], login=data.draw(st.booleans()))


large_content = st.lists(
    st.tuples(
        st.sampled_from([b"line\r\n", b"..dot\r\n", b"x" * 998 + b"\r\n", b"\xff" * 70 + b"\r\n"]), st.integers(1, 9000)
    ),
    min_size=1,
    max_size=4,
).map(lambda runs: b"".join(line * min(times, 100_000 // len(line)) for line, times in runs))


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], max_examples=40)
@given(large_content, st.lists(st.integers(1, 200_000), max_size=6), st.sampled_from([b"", b"bare\nLF\r\n", b"\0\r\n"]))
def test_much_content_in_large_pieces(content, sizes, end):
    """As a fast network delivers it: pieces larger than any line, cut anywhere in a line."""
    octets = HELLO + MAIL + RCPT + b"DATA\r\n" + content + end + b".\r\nNOOP\r\n"
    pieces, at = [], 0
    for size in sizes:
        pieces.append(octets[at : at + size])
        at += size
    pieces.append(octets[at:])
    small = [octets[at : at + 1400] for at in range(0, len(octets), 1400)]
    limits = ContentLimits(header_section_octets=len(octets))  # most of it has no empty line
    result = run(pieces, limits=limits)
    assert result == run(small, limits=limits)
    unstuffed = content.replace(b"\r\n.", b"\r\n").removeprefix(b".")
    assert result.messages == (() if end else (unstuffed,))


def test_the_cases_are_seeds_too():
    """Nothing above is vacuous: the attacks are there and some fragments do lead to messages."""
    assert len(ATTACKS) > 350
    result = judge(HELLO + MAIL + RCPT + b"DATA\r\nSubject: x\r\n\r\n..\r\n.\r\n", [])
    assert result.messages == (b"Subject: x\r\n\r\n.\r\n",)


def test_the_fragments_do_log_in_and_do_lead_to_another_client():
    """Nor are the exchanges."""
    octets = HELLO + b"AUTH LOGIN\r\nYQ==\r\nYg==\r\nAUTH XOAUTH2 dXNlcj1hAWF1dGg9QmVhcmVyIHdyb25nAQE=\r\n\r\n"
    result = judge(octets + b"AUTH OAUTHBEARER bixhPWEsAWF1dGg9QmVhcmVyIHgBAQ==\r\n", [3], login=True)
    assert result.logins == (Password("a", "b"), Token("a", "x"))
    assert [reply[:3] for reply in result.replies[2:]] == [b"334", b"334", b"235", b"334", b"535", b"235"]
    for attribute, state in ((b"192.0.2.1", State.XCLIENT), (b"[UNAVAILABLE]", State.READY)):
        assert judge(HELLO + b"XCLIENT ADDR=" + attribute + b"\r\nNOOP\r\n", [], login=True).state is state
