"""What every store does with records: they hold, end, give way, and nothing raises."""

from __future__ import annotations

import math

import pytest
from tests.counters.conftest import NOW

from gatepost.counters import MemoryStore, embedded
from gatepost.counters import store as store_module
from gatepost.counters.store import BAN, CLOCK_BACK_S_MAX, KEY_OCTETS_MAX, LOGIN, PAIR, VALUE_OCTETS_MAX


def put(store, key, value, ttl_s=60.0, now_s=NOW):
    store.update(key, now_s, lambda _: (value, ttl_s))


def get(store, key, now_s=NOW):
    return store.read((key,), now_s)[0]


@pytest.mark.parametrize(("later_s", "found"), [(0.0, b"v"), (59.0, b"v"), (60.0, None), (61.0, None)])
def test_a_record_ends(store, later_s, found):
    put(store, PAIR + b"a", b"v")
    assert get(store, PAIR + b"a", NOW + later_s) == found
    assert [item.value for item in store.items(PAIR, NOW + later_s, 9)] == ([found] if found else [])


def test_a_record_without_an_end_stays(store):
    put(store, BAN + b"a", b"v", math.inf)
    assert get(store, BAN + b"a", NOW + 1e9) == b"v"
    assert get(store, BAN + b"a", NOW - 1e9) == b"v"
    assert store.items(BAN, NOW, 9)[0].until_s == math.inf


def test_a_record_is_read_back_by_its_key(store):
    put(store, PAIR + b"a", b"1")
    put(store, LOGIN + b"a", b"2")
    put(store, PAIR + b"", b"")
    assert store.read((PAIR + b"a", PAIR + b"b", LOGIN + b"a", PAIR), NOW) == [b"1", None, b"2", b""]


def test_an_update_sees_what_holds(store):
    seen = []

    def change(old):
        seen.append(old)
        return (old or b"") + b"x", 60.0

    store.update(PAIR + b"a", NOW, change)
    store.update(PAIR + b"a", NOW + 59, change)
    store.update(PAIR + b"a", NOW + 118, change)
    store.update(PAIR + b"a", NOW + 178, change)
    assert seen == [None, b"x", b"xx", None]


def test_an_update_may_leave_all_as_it_is(store):
    put(store, PAIR + b"a", b"v")
    store.update(PAIR + b"a", NOW + 30, lambda _: None)
    store.update(PAIR + b"b", NOW + 30, lambda _: None)
    assert store.read((PAIR + b"a", PAIR + b"b"), NOW + 59) == [b"v", None]
    assert get(store, PAIR + b"a", NOW + 60) is None


def test_an_update_that_fails_changes_nothing(store):
    put(store, PAIR + b"a", b"v")
    with pytest.raises(ZeroDivisionError):
        store.update(PAIR + b"a", NOW, lambda _: (b"w", 1 / 0))
    assert get(store, PAIR + b"a") == b"v"
    put(store, PAIR + b"a", b"x")
    assert get(store, PAIR + b"a") == b"x"


def test_a_record_is_removed_once(store):
    put(store, PAIR + b"a", b"v")
    assert store.remove(PAIR + b"a", NOW)
    assert not store.remove(PAIR + b"a", NOW)
    put(store, PAIR + b"b", b"v")
    assert not store.remove(PAIR + b"b", NOW + 60), "it was over already"
    assert store.items(PAIR, NOW, 9) == []


def test_a_list_is_in_order_and_bounded(store):
    for letter in b"cab":
        put(store, PAIR + bytes([letter]), b"v")
    assert [item.key for item in store.items(PAIR, NOW, 9)] == [b"pa", b"pb", b"pc"]
    assert [item.key for item in store.items(PAIR, NOW, 2)] == [b"pa", b"pb"]
    assert store.items(BAN, NOW, 9) == []


@pytest.mark.parametrize(
    ("back_s", "holds"),
    [
        (3600.0, True),
        (CLOCK_BACK_S_MAX - 1, True),
        (CLOCK_BACK_S_MAX, True),
        (CLOCK_BACK_S_MAX + 1, False),
        (1e8, False),
    ],
)
def test_a_clock_that_jumps_back(store, back_s, holds):
    """An hour back opens nothing; from a clock that was years ahead nothing is left to hold for years."""
    put(store, PAIR + b"a", b"v")
    assert (get(store, PAIR + b"a", NOW - back_s) == b"v") is holds
    put(store, PAIR + b"a", b"new", 60.0, NOW - back_s)
    assert get(store, PAIR + b"a", NOW - back_s) == b"new"
    assert get(store, PAIR + b"a", NOW - back_s + 60) is None


@pytest.mark.parametrize("now_s", [0.0, -5.0, 1e18])
def test_a_clock_that_is_nonsense_raises_nothing(store, now_s):
    put(store, PAIR + b"a", b"v", 60.0, now_s)
    put(store, PAIR + b"b", b"v", 60.0, now_s)
    store.read((PAIR + b"a",), now_s)
    store.remove(PAIR + b"a", now_s)
    store.items(PAIR, now_s, 9)


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        (PAIR + bytes(KEY_OCTETS_MAX - 1), b"v", True),
        (PAIR + bytes(KEY_OCTETS_MAX), b"v", False),
        (PAIR, bytes(VALUE_OCTETS_MAX), True),
        (PAIR, bytes(VALUE_OCTETS_MAX + 1), False),
    ],
)
def test_keys_and_values_are_bounded(store, key, value, kept):
    if kept:
        put(store, key, value)
        assert get(store, key) == value
    else:
        with pytest.raises(ValueError, match="no record"):
            put(store, key, value)


def test_beyond_the_greatest_number_of_a_kind_the_oldest_goes(store, monkeypatch):
    for module in (store_module, embedded):
        monkeypatch.setattr(module, "RECORDS_MAX", 100)
    put(store, BAN + b"a", b"v")
    for number in range(150):
        put(store, PAIR + b"%03d" % number, b"v", 1000.0, NOW + number)
        assert len(store.items(PAIR, NOW + number, 999)) == min(number + 1, 100)
    assert store.items(PAIR, NOW + 150, 1)[0].key == PAIR + b"050"
    put(store, PAIR + b"149", b"again", 1000.0, NOW + 150)
    assert len(store.items(PAIR, NOW + 150, 999)) == 100, "one that is there needs no room"
    assert get(store, BAN + b"a"), "no kind drives out another"


def test_what_is_over_is_swept_by_who_writes(store):
    for number in range(40):
        put(store, PAIR + b"%03d" % number, b"v", 10.0)
    for number in range(12):
        put(store, PAIR + b"x%03d" % number, b"v", 10.0, NOW + 20)
    # Looked at from before their end: what is not there any more was swept.
    assert sum(not item.key.startswith(b"px") for item in store.items(PAIR, NOW, 99)) == 0


def test_a_memory_store_is_empty_after_its_end():
    store = MemoryStore()
    put(store, PAIR + b"a", b"v")
    store.close()
    assert get(store, PAIR + b"a") is None
