"""Who may send as whom: own addresses, grants, and what a name of an account can never become."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatepost.facts import Identity
from gatepost.policy.admission import EXPECTED_MAX, SendAsEntry, SendAsRules, author, send_as
from gatepost.smtp.path import NULL_REVERSE_PATH, Mailbox, PathDefect, Pattern, parse_reverse_path
from gatepost.verdict import Reason

NOW = 1_000_000.0


def patterns(*texts: str) -> tuple[Pattern, ...]:
    return tuple(map(Pattern.parse, texts))


RULES = SendAsRules(
    (
        SendAsEntry("g.toml:5", ("alice", "bob@example.com"), patterns("sales@example.com"), "shared mailbox"),
        SendAsEntry("g.toml:9", ("newsletter",), patterns("*@news.example.com"), expires_at=NOW),
        SendAsEntry("g.toml:13", ("*",), patterns("all@example.com")),
        SendAsEntry("g.toml:17", ("erp",), patterns("*@*.example.com", "<>")),
    ),
    ("example.com", "example.net"),
)


def identity(account: str, *addresses: str) -> Identity:
    return Identity(account, "PLAIN", "accounts", "", addresses)


def mailbox(text: str) -> Mailbox:
    path = parse_reverse_path(f"<{text}>".encode(), smtputf8=True)
    assert isinstance(path, Mailbox), text
    return path


@pytest.mark.parametrize(
    ("account", "addresses", "sender", "now", "passes"),
    [
        ("alice", (), "alice@example.com", NOW, True),
        ("alice", (), "ALICE@Example.COM", NOW, True),
        ("alice", (), "alice@example.net", NOW, True),
        ("alice", (), "alice@sub.example.com", NOW, False),
        ("alice", (), "bob@example.com", NOW, False),
        ("alice", (), "alice@elsewhere.test", NOW, False),
        ("alice", (), '"alice"@example.com', NOW, True),
        ("alice", (), "sales@example.com", NOW, True),
        ("alice", (), "all@example.com", NOW, True),
        ("carol", (), "sales@example.com", NOW, False),
        ("carol", (), "all@example.com", NOW, True),
        # an account that is an address is that address, and nothing at our other domains
        ("bob@example.com", (), "bob@example.com", NOW, True),
        ("bob@example.com", (), "bob@example.net", NOW, False),
        ("bob@example.com", (), "sales@example.com", NOW, True),
        ("bob@partner.test", (), "bob@partner.test", NOW, True),
        # what the verifier says belongs to the account
        ("u1234", ("Dora@Example.com", "dora@partner.test"), "dora@example.com", NOW, True),
        ("u1234", ("Dora@Example.com", "dora@partner.test"), "dora@partner.test", NOW, True),
        ("u1234", ("Dora@Example.com",), "dora@example.net", NOW, False),
        # grants end
        ("newsletter", (), "x@news.example.com", NOW - 1, True),
        ("newsletter", (), "x@news.example.com", NOW, False),
        ("newsletter", (), "x@news.example.com", NOW + 1, False),
        ("erp", (), "robot@mail.example.com", NOW, True),
        ("erp", (), "robot@example.com", NOW, False),
        # names of accounts are never patterns
        ("*", (), "boss@example.com", NOW, False),
        ("*@example.com", (), "boss@example.com", NOW, False),
        ("x", ("*@example.com", "*"), "boss@example.com", NOW, False),
        ("alice@example.com> SIZE=1", (), "alice@example.com", NOW, False),
        ("domain\\alice", (), "alice@example.com", NOW, False),
    ],
)
def test_who_may_send_as_whom(account, addresses, sender, now, passes):
    refusal = send_as(RULES, identity(account, *addresses), mailbox(sender), now)
    assert (refusal is None) is passes
    if refusal is not None:
        assert refusal.reason is Reason.SEND_AS
        assert account in refusal.detail


def test_the_null_reverse_path_names_nobody():
    assert send_as(RULES, identity("carol"), NULL_REVERSE_PATH, NOW) is None


def test_the_refusal_says_which_address_was_expected():
    refusal = send_as(RULES, identity("carol"), mailbox("boss@example.com"), NOW)
    assert refusal is not None
    assert refusal.hint == "expected carol@example.com or carol@example.net or all@example.com"
    assert refusal.reason.reply("K7Q2M9XD-1", refusal.hint).octets() == (
        b"550 5.7.1 Sending as this address is prohibited: expected carol@example.com or carol@example.net or "
        b"all@example.com [K7Q2M9XD-1]\r\n"
    )
    more = send_as(RULES, identity("alice"), mailbox("boss@example.com"), NOW)
    assert more is not None
    assert more.hint.count("@") == EXPECTED_MAX
    assert more.hint.endswith(" or others")


def test_an_account_without_any_address_is_told_so():
    refusal = send_as(SendAsRules(), identity("carol"), mailbox("boss@example.com"), NOW)
    assert refusal is not None
    assert refusal.hint == "nothing is granted to this account"


def test_every_author_must_be_the_accounts_own():
    carol = identity("carol")
    own, other = mailbox("carol@example.com"), mailbox("boss@example.com")
    assert author(RULES, carol, (), NOW) is None
    assert author(RULES, carol, (own, own), NOW) is None
    assert author(RULES, carol, (own, other), NOW) is not None
    assert author(RULES, carol, (other, own), NOW) is not None


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_name_of_an_account_opens_an_address_that_is_not_its_own(account: str, local_part: str) -> None:
    rules = replace(RULES, entries=())
    sender = parse_reverse_path(f"<{local_part}@example.com>".encode("utf-8", "replace"), smtputf8=True)
    if isinstance(sender, PathDefect) or not isinstance(sender, Mailbox):
        return
    refusal = send_as(rules, identity(account.lower()), sender, NOW)
    same = account.lower() in (sender.local_part.lower(), str(sender).lower(), f"{local_part.lower()}@example.com")
    assert refusal is not None or same or f"{account.lower()}@example.com" == str(sender).lower()
