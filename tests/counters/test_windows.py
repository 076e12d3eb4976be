"""POP-before-SMTP's windows: of one address, not of a shared one, and over in time."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from tests.counters.conftest import NOW

from gatepost.counters import MailboxWindows
from gatepost.counters.distinct import MEMBERS_MAX
from gatepost.counters.windows import MAILBOX_WINDOW_S_MAX
from gatepost.facts import MailboxLogin
from gatepost.gate.settings import MailboxServer

ACCOUNTS_MAX = MailboxServer("x", 1).accounts_max
CLIENT = ip_address("192.0.2.7")


@pytest.fixture
def windows(store, digests):
    return MailboxWindows(store, digests)


def test_the_default_is_that_of_the_setting(windows):
    for number in range(ACCOUNTS_MAX):
        assert windows.logged_in(f"user{number}", CLIENT, NOW)
    assert not windows.logged_in("one-more", CLIENT, NOW)


def test_a_login_opens_a_window_for_its_address_alone(windows):
    assert windows.last(CLIENT, NOW) is None
    assert windows.logged_in("bob", CLIENT, NOW)
    assert windows.last(CLIENT, NOW + 60) == MailboxLogin("bob", NOW)
    assert windows.last(ip_address("192.0.2.8"), NOW) is None


def test_an_ipv6_window_is_of_one_address_too(windows):
    assert windows.logged_in("bob", ip_address("2001:db8::7"), NOW)
    assert windows.last(ip_address("2001:db8::7"), NOW) == MailboxLogin("bob", NOW)
    assert windows.last(ip_address("2001:db8::8"), NOW) is None


@pytest.mark.parametrize("later_s", [-1, 0, 1])
def test_what_is_kept_ends(windows, later_s):
    windows.logged_in("bob", CLIENT, NOW)
    found = windows.last(CLIENT, NOW + MAILBOX_WINDOW_S_MAX + later_s)
    assert found == (MailboxLogin("bob", NOW) if later_s < 0 else None)


def test_the_last_login_counts(windows):
    windows.logged_in("bob", CLIENT, NOW)
    windows.logged_in("alice", CLIENT, NOW + 100.5)
    windows.logged_in("bob", CLIENT, NOW + 200)
    assert windows.last(CLIENT, NOW + 300) == MailboxLogin("bob", NOW + 200)


@pytest.mark.parametrize("limit", [1, 3, MEMBERS_MAX - 1])
def test_an_address_of_many_has_no_window_and_the_one_it_had_is_closed(store, digests, limit):
    windows = MailboxWindows(store, digests, accounts_max=limit)
    for number in range(limit):
        assert windows.logged_in(f"user{number}", CLIENT, NOW + number)
        assert windows.logged_in("USER0", CLIENT, NOW + number), "the same account again, in other letters"
    assert windows.last(CLIENT, NOW + limit) is not None
    assert not windows.logged_in("one-more", CLIENT, NOW + limit)
    assert windows.last(CLIENT, NOW + limit) is None
    assert not windows.logged_in("user0", CLIENT, NOW + limit + 1)
    assert windows.last(CLIENT, NOW + limit + 1) is None


@pytest.mark.parametrize(("later_s", "shared"), [(86_399, True), (86_400, False), (86_401, False)])
def test_an_address_is_shared_for_a_day(windows, later_s, shared):
    for number in range(ACCOUNTS_MAX + 1):
        windows.logged_in(f"user{number}", CLIENT, NOW)
    assert windows.logged_in("user0", CLIENT, NOW + later_s) is not shared


def test_a_thousand_accounts_of_one_address_are_bounded(windows, store):
    for number in range(1000):
        windows.logged_in(f"user{number}", CLIENT, NOW + number)
    assert len(store.items(b"m", NOW + 1000, 9)[0].value) < 600


@pytest.mark.parametrize("account", ["", "\x00" * 9999, "ü" * 9999, "\ud800"])
def test_accounts_of_any_kind(windows, account):
    assert windows.logged_in(account, CLIENT, NOW)
    assert windows.last(CLIENT, NOW) is not None


def test_a_clock_that_jumps_back(windows):
    windows.logged_in("bob", CLIENT, NOW)
    assert windows.last(CLIENT, NOW - 3600) == MailboxLogin("bob", NOW), "the policy sees that it is in the future"
    assert windows.last(CLIENT, NOW - 10 * 86_400) is None
