"""Guessing: what is counted, who is slowed, who is banned, and who never is."""

from __future__ import annotations

import random
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from tests.counters.conftest import NOW

from gatepost.counters import Bans, EmbeddedStore, Guesses, GuessLimits
from gatepost.counters.bans import AUTOMATIC
from gatepost.counters.distinct import MEMBERS_MAX
from gatepost.counters.store import PAIR, PREFIX, RECORDS_MAX, USER

CLIENT = ip_address("192.0.2.7")
NEIGHBOUR = ip_address("192.0.2.8")
ELSEWHERE = ip_address("198.51.100.1")
IPV6 = ip_address("2001:db8:1:2::3")
LIMITS = GuessLimits()
SLOWEST_S = max(LIMITS.delays_s)


@pytest.fixture
def bans(store, digests):
    return Bans(store, digests)


@pytest.fixture
def guesses(store, digests, bans):
    return Guesses(store, digests, bans, LIMITS)


def try_secrets(guesses, count, user="bob", client=CLIENT, first=0, now_s=NOW):
    """Distinct wrong secrets; the bans that began."""
    return [ban for number in range(first, first + count) for ban in guesses.wrong(user, client, f"s{number}", now_s)]


def try_users(guesses, count, client=CLIENT, first=0, now_s=NOW):
    return [
        ban
        for number in range(first, first + count)
        for ban in guesses.wrong(f"user{number}", client, "Spring26", now_s)
    ]


def test_at_first_nobody_waits(guesses):
    assert guesses.look("bob", CLIENT, NOW) == (False, 0.0)


@pytest.mark.parametrize(
    ("tried", "delay_s"), [(0, 0.0), (1, 0.0), (2, 0.5), (3, 1.0), (4, 2.0), (5, 4.0), (6, 8.0), (7, 8.0), (9, 8.0)]
)
def test_each_distinct_secret_slows_the_next(guesses, tried, delay_s):
    try_secrets(guesses, tried)
    assert guesses.look("bob", CLIENT, NOW) == (False, delay_s)


def test_the_same_wrong_secret_counts_once(guesses, bans):
    """A telephone with last year's password."""
    for minute in range(1000):
        assert guesses.wrong("bob", CLIENT, "old", NOW + minute * 60) == []
        assert guesses.look("bob", CLIENT, NOW + minute * 60) == (False, 0.0)
    assert bans.all(NOW + 60_000) == []


@pytest.mark.parametrize("client", [CLIENT, IPV6])
@pytest.mark.parametrize("limit", [1, 2, 5, 10, MEMBERS_MAX])
def test_with_the_last_secret_the_prefix_is_banned_with_the_user(store, digests, bans, limit, client):
    guesses = Guesses(store, digests, bans, replace(LIMITS, secrets_per_user=limit))
    assert try_secrets(guesses, limit - 1, client=client) == []
    assert not guesses.look("bob", client, NOW).banned
    (ban,) = try_secrets(guesses, 1, client=client, first=limit)
    assert (ban.account, ban.until_s, ban.by) == ("bob", NOW + LIMITS.ban_s, AUTOMATIC)
    assert ban.network == ip_network("192.0.2.0/24" if client == CLIENT else "2001:db8:1:2::/64")
    assert guesses.look("bob", client, NOW).banned
    assert guesses.look("BOB", client, NOW).banned
    assert try_secrets(guesses, 3, client=client, first=90) == [], "a ban begins once"


def test_a_ban_of_a_user_is_of_no_other_user_and_no_other_place(guesses, bans):
    try_secrets(guesses, 20)
    assert guesses.look("bob", NEIGHBOUR, NOW).banned, "of the same prefix"
    assert not guesses.look("bob", ELSEWHERE, NOW).banned
    assert not guesses.look("alice", CLIENT, NOW).banned
    assert bans.client(CLIENT, NOW) is None


@pytest.mark.parametrize(("later_s", "banned"), [(3599, True), (3600, False), (3601, False)])
def test_a_ban_is_over_after_its_time(guesses, later_s, banned):
    try_secrets(guesses, 10)
    assert guesses.look("bob", CLIENT, NOW + later_s).banned is banned


@pytest.mark.parametrize(("later_s", "delay_s"), [(3599, 0.5), (3600, 0.0), (3601, 0.0)])
def test_a_secret_counts_for_the_window(guesses, later_s, delay_s):
    try_secrets(guesses, 2)
    assert guesses.look("bob", CLIENT, NOW + later_s).delay_s == delay_s


def test_slow_guessing_is_counted_as_far_as_the_window_reaches(guesses):
    """Each secret has its own time: what is older than the window has gone, what is younger counts."""
    for number in range(40):
        guesses.wrong("bob", CLIENT, f"s{number}", NOW + number * 1000)
    assert guesses.look("bob", CLIENT, NOW + 39_000).delay_s == LIMITS.delays_s[4]


@pytest.mark.parametrize("limit", [1, 5, 10])
def test_with_the_last_user_the_address_is_banned(store, digests, bans, limit):
    guesses = Guesses(store, digests, bans, replace(LIMITS, users_per_client=limit))
    assert try_users(guesses, limit - 1) == []
    assert bans.client(CLIENT, NOW) is None
    (ban,) = try_users(guesses, 1, first=limit)
    assert (ban.network, ban.account, ban.until_s) == (ip_network(CLIENT), "", NOW + LIMITS.ban_s)
    assert bans.client(CLIENT, NOW) is not None
    assert guesses.look("anybody", CLIENT, NOW).banned
    assert try_users(guesses, 3, first=90) == []


def test_the_same_user_again_is_no_other_user(guesses, bans):
    for number in range(9):
        guesses.wrong("bob" if number % 2 else "BOB", CLIENT, f"s{number}", NOW)
    try_users(guesses, 8)
    assert bans.client(CLIENT, NOW) is None


def test_users_are_counted_by_prefix_and_who_goes_on_is_banned(guesses, bans):
    for number in range(9):
        assert guesses.wrong(f"user{number}", ip_address(f"192.0.2.{number}"), "x", NOW) == []
    assert guesses.wrong("user9", ip_address("192.0.2.99"), "x", NOW)[0].network == ip_network("192.0.2.99")
    assert bans.client(ip_address("192.0.2.1"), NOW) is None
    assert guesses.wrong("user1", ip_address("192.0.3.1"), "x", NOW) == []


def test_an_ipv6_customer_is_one_client(guesses, bans):
    for number in range(10):
        guesses.wrong(f"user{number}", ip_address(f"2001:db8:1:2::{number}"), "x", NOW)
    assert bans.client(IPV6, NOW) is not None
    assert bans.client(ip_address("2001:db8:1:3::1"), NOW) is None


def test_the_pair_is_banned_before_the_client(guesses):
    try_users(guesses, 9)
    found = try_secrets(guesses, 10, user="user3")
    assert [ban.account for ban in found] == ["user3"]
    found = guesses.wrong("user77", CLIENT, "x", NOW)
    assert [ban.account for ban in found] == [""]


def test_a_mechanism_that_shows_no_secret_counts_each_failure(guesses):
    for _ in range(9):
        assert guesses.wrong("bob", CLIENT, None, NOW) == []
    assert [ban.account for ban in guesses.wrong("bob", CLIENT, None, NOW)] == ["bob"]


# ---- whom it must not meet


def test_strangers_lock_nobody_out(guesses):
    """However many try secrets of bob's elsewhere, bob's own goes through where he is."""
    guesses.right("bob", CLIENT, NOW)
    for number in range(300):
        guesses.wrong("bob", ip_address(f"203.0.{number % 250}.9"), f"s{number}", NOW)
    assert guesses.look("bob", CLIENT, NOW) == (False, 0.0)
    assert guesses.look("bob", ELSEWHERE, NOW) == (False, SLOWEST_S), "slowed where he never was, and not banned"


@pytest.mark.parametrize(("tried", "delay_s"), [(19, 0.0), (20, SLOWEST_S), (21, SLOWEST_S)])
def test_one_account_attacked_from_everywhere_is_slowed(guesses, tried, delay_s):
    for number in range(tried):
        guesses.wrong("bob", ip_address(f"203.0.{number}.9"), f"s{number}", NOW)
    assert guesses.look("bob", ELSEWHERE, NOW) == (False, delay_s)
    assert guesses.look("alice", ELSEWHERE, NOW) == (False, 0.0)
    guesses.right("bob", ELSEWHERE, NOW)
    assert guesses.look("bob", ip_address("198.51.100.99"), NOW) == (False, 0.0), "his network is known now"


@pytest.mark.parametrize(
    ("later_s", "spared"), [(0, True), (7 * 86400 - 1, True), (7 * 86400, False), (7 * 86400 + 1, False)]
)
def test_an_address_with_a_good_login_lately_is_slowed_and_not_banned(guesses, bans, later_s, spared):
    guesses.right("bob", CLIENT, NOW)
    now_s = NOW + later_s
    assert (try_secrets(guesses, 20, now_s=now_s) == []) is spared
    assert guesses.look("bob", CLIENT, now_s) == ((False, SLOWEST_S) if spared else (True, 0.0))
    assert (try_users(guesses, 20, now_s=now_s) == []) is spared
    assert (bans.client(CLIENT, now_s) is None) is spared


def test_a_good_login_is_remembered_by_being_repeated(guesses):
    for day in range(30):
        guesses.right("bob", CLIENT, NOW + day * 86400)
    assert try_secrets(guesses, 20, now_s=NOW + 35 * 86400) == []


def test_the_owner_of_one_account_cannot_guess_the_others(guesses, bans):
    guesses.right("mallory", CLIENT, NOW)
    assert [ban.account for ban in try_secrets(guesses, 20)] == ["bob"]
    assert guesses.look("bob", CLIENT, NOW).banned
    assert not guesses.look("mallory", CLIENT, NOW).banned
    assert bans.client(CLIENT, NOW) is None


def test_a_neighbour_of_a_good_login_is_nobody(guesses, bans):
    guesses.right("bob", CLIENT, NOW)
    assert try_users(guesses, 10, client=NEIGHBOUR) != []
    assert bans.client(NEIGHBOUR, NOW) is not None


def test_whom_the_gate_is_told_to_spare(store, digests):
    bans = Bans(store, digests, spared=lambda address: address == CLIENT)
    guesses = Guesses(store, digests, bans, LIMITS)
    assert try_secrets(guesses, 20) == []
    assert try_users(guesses, 20) == []
    assert guesses.bait("trap", CLIENT, NOW) is None
    assert guesses.look("bob", CLIENT, NOW) == (False, SLOWEST_S)
    assert try_users(guesses, 10, client=NEIGHBOUR, first=50) != []


def test_the_right_secret_ends_what_was_counted(guesses):
    try_secrets(guesses, 9)
    guesses.right("bob", CLIENT, NOW)
    assert guesses.look("bob", CLIENT, NOW) == (False, 0.0)
    assert try_secrets(guesses, 9, first=20) == []


def test_the_right_secret_takes_the_user_off_the_clients_account(guesses, bans):
    """A mail program with ten accounts, one wrong letter each."""
    for number in range(30):
        guesses.wrong(f"user{number}", CLIENT, "typo", NOW)
        guesses.right(f"user{number}", NEIGHBOUR, NOW)
    assert bans.client(CLIENT, NOW) is None


# ---- bait


def test_bait_bans_at_once(guesses, bans):
    ban = guesses.bait("trap", CLIENT, NOW)
    assert ban is not None
    assert (ban.network, ban.account, ban.until_s) == (ip_network(CLIENT), "", NOW + LIMITS.bait_ban_s)
    assert "trap" in ban.why
    assert bans.client(CLIENT, NOW + LIMITS.bait_ban_s - 1) is not None
    assert bans.client(CLIENT, NOW + LIMITS.bait_ban_s) is None
    assert bans.client(NEIGHBOUR, NOW) is None
    assert guesses.bait("trap", CLIENT, NOW) is None, "told once"


def test_bait_is_no_way_to_ban_who_is_known(guesses, bans):
    guesses.right("bob", CLIENT, NOW)
    assert guesses.bait("trap", CLIENT, NOW) is None
    assert bans.client(CLIENT, NOW) is None


# ---- bounds, clocks, and what is kept


@pytest.mark.parametrize("name", ["secrets_per_user", "users_per_client", "secrets_from_everywhere"])
@pytest.mark.parametrize(("bound", "fits"), [(0, False), (1, True), (MEMBERS_MAX, True), (MEMBERS_MAX + 1, False)])
def test_a_bound_must_fit_into_a_set(store, digests, bans, name, bound, fits):
    limits = replace(LIMITS, **{name: bound})
    if fits:
        Guesses(store, digests, bans, limits)
    else:
        with pytest.raises(ValueError, match="distinct attempts"):
            Guesses(store, digests, bans, limits)


def test_the_default_bounds_fit(store, digests, bans):
    Guesses(store, digests, bans, GuessLimits())


def test_a_clock_that_jumps_back_lets_nobody_out_and_locks_nobody_up(guesses):
    try_secrets(guesses, 10)
    assert guesses.look("bob", CLIENT, NOW - 3600).banned
    assert not guesses.look("bob", CLIENT, NOW - 10 * 86_400).banned, "that clock was days ahead"
    try_secrets(guesses, 10, now_s=NOW - 10 * 86_400)
    assert guesses.look("bob", CLIENT, NOW - 10 * 86_400).banned


@pytest.mark.parametrize("now_s", [0.0, -1e6, 1e12])
def test_a_clock_that_is_nonsense_raises_nothing(guesses, now_s):
    guesses.look("bob", CLIENT, now_s)
    try_secrets(guesses, 12, now_s=now_s)
    guesses.right("bob", CLIENT, now_s)
    guesses.bait("bob", CLIENT, now_s)


@pytest.mark.parametrize("name", ["", "\x00" * 300, "ü" * 5000, "\ud800", "a" * 100_000])
def test_names_and_secrets_of_any_kind(guesses, name):
    for number in range(10):
        guesses.wrong(name, CLIENT, f"{name}{number}", NOW)
    assert guesses.look(name, CLIENT, NOW).banned
    guesses.right(name, ELSEWHERE, NOW)


def test_a_set_does_not_grow(guesses, store):
    guesses.right("bob", CLIENT, NOW)
    for number in range(1000):
        guesses.wrong("bob", CLIENT, f"s{number}", NOW + number / 1000)
        guesses.wrong(f"user{number}", CLIENT, "x", NOW + number / 1000)
    for kind in (PAIR, USER, PREFIX):
        assert all(len(item.value) <= MEMBERS_MAX * 8 for item in store.items(kind, NOW, 9999))
    assert guesses.look("bob", CLIENT, NOW + 1).delay_s == SLOWEST_S


@pytest.mark.slow
def test_a_hundred_thousand_strangers_fill_nothing(tmp_path, digests):
    said: list[str] = []
    store = EmbeddedStore(tmp_path / "state", said.append)
    guesses = Guesses(store, digests, Bans(store, digests), LIMITS)
    dice = random.Random(7)
    guesses.right("bob", CLIENT, NOW)
    try_secrets(guesses, 10, client=ELSEWHERE)
    for number in range(100_000):
        stranger = ip_address(dice.getrandbits(32)) if number % 2 else ip_address(dice.getrandbits(128))
        guesses.wrong(f"{dice.getrandbits(64):x}", stranger, "x", NOW + number / 1000)
    for kind in (PAIR, USER, PREFIX):
        assert len(store.items(kind, NOW + 100, 10**6)) <= RECORDS_MAX
    assert guesses.look("bob", ELSEWHERE, NOW + 100).banned, "no flood of guesses ends a ban"
    assert try_secrets(guesses, 20, now_s=NOW + 100) == [], "nor makes a good login forgotten"
    assert (tmp_path / "state" / "data.mdb").stat().st_size < 100 << 20
    assert not said
    store.close()


def test_no_secret_is_in_the_file(tmp_path, digests):
    store = EmbeddedStore(tmp_path / "state")
    guesses = Guesses(store, digests, Bans(store, digests), LIMITS)
    for number in range(9):
        guesses.wrong("bob-the-user", CLIENT, f"marked-secret-{number}", NOW)
    store.close()
    for path in (tmp_path / "state").iterdir():
        octets = path.read_bytes()
        assert b"marked-secret" not in octets
        assert b"bob-the-user" not in octets
