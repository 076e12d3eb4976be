"""Bans: who is met by them, who is not, and how they are listed and ended."""

from __future__ import annotations

import math
from ipaddress import ip_address, ip_network

import pytest
from tests.counters.conftest import NOW

from gatepost.counters import Ban, Bans
from gatepost.counters.bans import AUTOMATIC, BY_OCTETS_MAX, WHY_OCTETS_MAX, good_address_key, good_pair_key
from gatepost.counters.digests import NAME_OCTETS_MAX

CLIENT = ip_address("192.0.2.7")


@pytest.fixture
def bans(store, digests):
    return Bans(store, digests)


def ban(network, account="", until_s=NOW + 3600, by="root"):
    return Ban(ip_network(network), account, until_s, "because", by)


def test_nobody_is_banned_at_first(bans):
    assert bans.client(CLIENT, NOW) is None
    assert bans.account(CLIENT, "bob", NOW) is None
    assert bans.all(NOW) == []


@pytest.mark.parametrize(
    ("network", "met", "spared"),
    [
        ("192.0.2.7/32", "192.0.2.7", "192.0.2.8"),
        ("192.0.2.0/24", "192.0.2.255", "192.0.3.0"),
        ("192.0.0.0/22", "192.0.3.255", "192.0.4.0"),
        ("0.0.0.0/0", "203.0.113.9", "2001:db8::1"),
        ("2001:db8:0:1::/64", "2001:db8:0:1:ffff::", "2001:db8:0:2::"),
        ("2001:db8:0:1::5/128", "2001:db8:0:1::6", "2001:db8:0:2::5"),
        ("2001:db8::/32", "2001:db8:ffff::1", "2001:db9::"),
        ("::/0", "2001:db8::1", "192.0.2.7"),
    ],
)
def test_a_network_is_banned_and_its_neighbours_are_not(bans, network, met, spared):
    bans.add(ban(network), NOW)
    assert bans.client(ip_address(met), NOW) is not None
    assert bans.client(ip_address(spared), NOW) is None


@pytest.mark.parametrize(("later_s", "banned"), [(0, True), (3599, True), (3600, False), (3601, False)])
def test_a_ban_ends(bans, later_s, banned):
    bans.add(ban("192.0.2.7"), NOW)
    assert (bans.client(CLIENT, NOW + later_s) is not None) is banned
    assert bool(bans.all(NOW + later_s)) is banned


def test_a_ban_until_it_is_removed(bans):
    bans.add(ban("192.0.2.7", until_s=math.inf), NOW)
    assert bans.client(CLIENT, NOW + 1e9) == ban("192.0.2.7", until_s=math.inf)
    assert bans.remove(ip_network("192.0.2.7"), "", NOW + 1e9)
    assert bans.client(CLIENT, NOW + 1e9) is None
    assert not bans.remove(ip_network("192.0.2.7"), "", NOW + 1e9)


def test_a_ban_with_one_account_is_of_nobody_else(bans):
    bans.add(ban("192.0.2.0/24", "Bob@Example.com"), NOW)
    assert bans.client(CLIENT, NOW) is None
    assert bans.account(CLIENT, "alice@example.com", NOW) is None
    assert bans.account(ip_address("192.0.3.7"), "bob@example.com", NOW) is None
    assert bans.account(CLIENT, "bob@example.com", NOW) == ban("192.0.2.0/24", "Bob@Example.com")
    assert not bans.remove(ip_network("192.0.2.0/24"), "", NOW)
    assert bans.remove(ip_network("192.0.2.0/24"), "bob@example.COM", NOW)
    assert bans.account(CLIENT, "bob@example.com", NOW) is None


def test_a_ban_of_everything_is_one_with_every_account(bans):
    bans.add(ban("192.0.2.7"), NOW)
    assert bans.account(CLIENT, "bob", NOW) == ban("192.0.2.7")


def test_of_several_bans_the_longest_is_told(bans):
    bans.add(ban("192.0.2.7", until_s=NOW + 10), NOW)
    bans.add(ban("192.0.2.0/24", until_s=NOW + 30), NOW)
    bans.add(ban("192.0.0.0/16", until_s=NOW + 20), NOW)
    assert bans.client(CLIENT, NOW) == ban("192.0.2.0/24", until_s=NOW + 30)
    assert bans.client(CLIENT, NOW + 29) is not None
    assert bans.client(CLIENT, NOW + 30) is None


def test_a_longer_ban_takes_the_place_of_a_shorter_one_and_the_reverse(bans):
    bans.add(ban("192.0.2.7", until_s=NOW + 10), NOW)
    bans.add(ban("192.0.2.7", until_s=NOW + 99), NOW)
    assert bans.client(CLIENT, NOW + 98) is not None
    bans.add(ban("192.0.2.7", until_s=NOW + 10), NOW)
    assert bans.client(CLIENT, NOW + 10) is None
    assert len(bans.all(NOW)) == 1


def test_a_ban_begins_once(bans):
    assert bans.begin(ban("192.0.2.7"), NOW)
    assert not bans.begin(ban("192.0.2.7", until_s=NOW + 9999), NOW)
    assert bans.client(CLIENT, NOW) == ban("192.0.2.7")
    assert bans.begin(ban("192.0.2.7", until_s=NOW + 9999), NOW + 3600)


def test_the_list_is_in_order(bans):
    for network, account in [
        ("2001:db8::/64", ""),
        ("192.0.2.9/32", ""),
        ("192.0.2.9/32", "bob"),
        ("10.0.0.0/8", "zoe"),
    ]:
        bans.add(ban(network, account), NOW)
    assert [(str(one.network), one.account) for one in bans.all(NOW)] == [
        ("10.0.0.0/8", "zoe"),
        ("192.0.2.9/32", ""),
        ("192.0.2.9/32", "bob"),
        ("2001:db8::/64", ""),
    ]


def test_no_ban_of_ipv6_is_narrower_than_a_customer(bans):
    kept = bans.add(ban("2001:db8::5/128"), NOW)
    assert kept.network == ip_network("2001:db8::/64")
    assert bans.remove(ip_network("2001:db8::77/128"), "", NOW)


def test_texts_are_cut(bans):
    hostile = "ä\x00\ud800" * 9999
    kept = bans.add(Ban(ip_network("192.0.2.0/24"), hostile, NOW + 60, hostile, hostile), NOW)
    assert (len(kept.account.encode()), len(kept.why.encode()), len(kept.by.encode())) <= (
        NAME_OCTETS_MAX,
        WHY_OCTETS_MAX,
        BY_OCTETS_MAX,
    )
    assert bans.all(NOW) == [kept]
    assert bans.account(CLIENT, hostile, NOW) == kept
    worst = "\x00" * 9999
    bans.add(Ban(ip_network("192.0.2.0/24"), worst, NOW + 60, worst, worst), NOW)
    assert len(bans.all(NOW)) == 2


def test_whom_the_gate_never_bans(store, digests):
    spared = Bans(store, digests, spared=lambda address: address == CLIENT)
    spared.add(ban("192.0.2.0/24", by=AUTOMATIC), NOW)
    assert spared.client(CLIENT, NOW) is None
    assert spared.client(ip_address("192.0.2.8"), NOW) is not None
    spared.add(ban("192.0.0.0/16"), NOW)
    assert spared.client(CLIENT, NOW) == ban("192.0.0.0/16"), "what an operator bans is banned"


def test_a_good_login_lately_ends_what_the_gate_banned(bans, store, digests):
    bans.add(ban("192.0.2.7", by=AUTOMATIC), NOW)
    bans.add(ban("192.0.2.0/24", "bob", by=AUTOMATIC), NOW)
    store.update(good_address_key(CLIENT), NOW, lambda _: (b"", 60.0))
    assert bans.client(CLIENT, NOW) is None
    assert bans.account(CLIENT, "bob", NOW) is not None, "somebody else's login makes nobody a friend of bob's"
    store.update(good_pair_key(CLIENT, digests.name("bob")), NOW, lambda _: (b"", 60.0))
    assert bans.account(CLIENT, "bob", NOW) is None
    assert bans.client(CLIENT, NOW + 60) is not None


def test_the_question_costs_one_read_without_a_ban(bans, store, monkeypatch):
    reads: list[int] = []
    read = store.read

    def counted(keys, now_s):
        reads.append(len(keys))
        return read(keys, now_s)

    monkeypatch.setattr(store, "read", counted)
    bans.client(CLIENT, NOW)
    assert reads == [1]
    reads.clear()
    for network in ("10.0.0.0/8", "10.0.0.1", "10.0.0.2", "2001:db8::/64"):
        bans.add(ban(network), NOW)
    bans.client(CLIENT, NOW)
    assert reads == [1, 2]
    reads.clear()
    bans.client(CLIENT, NOW + 3600)
    assert reads == [1], "when the last ban is over"
