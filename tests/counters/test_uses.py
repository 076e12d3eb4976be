"""When grants were used: kept for all workers, by what they grant, and written once an hour."""

from __future__ import annotations

import pytest
from tests.counters.conftest import NOW

from gatepost.counters import EmbeddedStore, Use, Uses
from gatepost.counters.uses import REFRESH_S, USE_S_MAX

LAN, PRINTER = "network 10.1.0.0/16 [] []", "network 10.1.2.3/32 [] ['*@partner.test']"


def test_what_is_watched_is_known_from_the_first_time_on(store):
    uses = Uses(store)
    assert uses.of([LAN], NOW) == [None]
    uses.watch([LAN], NOW)
    uses.watch([LAN, PRINTER, PRINTER], NOW + 60)
    assert uses.of([PRINTER, LAN], NOW + 60) == [Use(int(NOW) + 60, None), Use(int(NOW), None)]


def test_a_use_is_known_to_every_worker(store):
    one, other = Uses(store), Uses(store)
    one.watch([LAN], NOW)
    other.used(LAN, NOW + 5)
    assert one.of([LAN], NOW + 6) == [Use(int(NOW), int(NOW) + 5)]
    one.used(LAN, NOW + 7)
    assert other.of([LAN], NOW + 8) == [Use(int(NOW), int(NOW) + 7)]


def test_what_was_never_watched_is_watched_from_its_first_use_on(store):
    Uses(store).used(LAN, NOW)
    assert Uses(store).of([LAN], NOW) == [Use(int(NOW), int(NOW))]


@pytest.mark.parametrize(("later_s", "written"), [(REFRESH_S - 2, False), (REFRESH_S, True), (-2, True)])
def test_a_use_is_written_once_an_hour(store, later_s, written):
    """Where the clock was set back it is written again: what was written is from a time that has not come yet."""
    uses = Uses(store)
    uses.used(LAN, NOW)
    uses.used(LAN, NOW + later_s)
    uses.used(LAN, NOW + later_s + 1)
    assert uses.of([LAN], NOW + later_s) == [Use(int(NOW), int(NOW + later_s) if written else int(NOW))]


@pytest.mark.parametrize(("later_s", "known"), [(USE_S_MAX - 1, True), (USE_S_MAX, False)])
def test_what_nobody_loads_any_more_is_forgotten(store, later_s, known):
    Uses(store).watch([LAN], NOW)
    assert (Uses(store).of([LAN], NOW + later_s) != [None]) is known


def test_each_load_keeps_it_for_longer(store):
    uses = Uses(store)
    uses.watch([LAN], NOW)
    uses.watch([LAN], NOW + USE_S_MAX - 1)
    assert uses.of([LAN], NOW + USE_S_MAX + 1) == [Use(int(NOW), None)]


def test_it_outlives_the_process(tmp_path):
    first = EmbeddedStore(tmp_path / "state")
    Uses(first).watch([LAN], NOW)
    Uses(first).used(LAN, NOW + 1)
    first.close()
    second = EmbeddedStore(tmp_path / "state")
    Uses(second).watch([LAN], NOW + 10)
    assert Uses(second).of([LAN], NOW + 10) == [Use(int(NOW), int(NOW) + 1)]
    second.close()
