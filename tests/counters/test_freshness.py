"""The last good secret of a user, seen by all workers."""

from __future__ import annotations

import pytest
from tests.counters.conftest import NOW

from gatepost.auth import authenticator
from gatepost.counters import Digests, EmbeddedStore, Freshness
from gatepost.counters.freshness import FRESH_S


class Clock:
    now_s = NOW

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def freshness(store, digests, clock):
    return Freshness(store, digests, clock)


def test_it_is_what_the_authenticator_asks_for(freshness):
    fits: authenticator.Freshness = freshness
    assert len(fits.key) == 32


def test_the_last_mark_is_the_one(freshness):
    assert freshness.last_good("bob") is None
    freshness.set_last_good("bob", b"1234")
    assert freshness.last_good("bob") == b"1234"
    assert freshness.last_good("alice") is None
    freshness.set_last_good("bob", b"5678")
    assert freshness.last_good("bob") == b"5678"


@pytest.mark.parametrize(("later_s", "known"), [(FRESH_S - 1, True), (FRESH_S, False), (FRESH_S + 1, False)])
def test_it_is_forgotten(freshness, clock, later_s, known):
    freshness.set_last_good("bob", b"1234")
    clock.now_s = NOW + later_s
    assert (freshness.last_good("bob") is not None) is known


def test_it_outlives_a_worker_and_so_does_the_key(tmp_path, clock):
    directory = tmp_path / "state"
    keys = []
    for _ in range(2):
        store = EmbeddedStore(directory)
        freshness = Freshness(store, Digests.in_directory(directory), clock)
        keys.append(freshness.key)
        freshness.set_last_good("bob", b"1234") if len(keys) == 1 else None
        assert freshness.last_good("bob") == b"1234"
        store.close()
    assert keys[0] == keys[1]
    assert keys[0] not in (directory / "key").read_bytes()
