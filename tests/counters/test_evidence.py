"""What is kept of trusted sources: bounded, for a while, for all workers; and suspensions until they are ended."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from tests.counters.conftest import NOW

from gatepost.counters import EmbeddedStore, MemoryStore, Sources, Suspension
from gatepost.counters.evidence import (
    EVIDENCE_S_MAX,
    FORGIVEN_S_MAX,
    MEMBER_OCTETS_MAX,
    MEMBERS_MAX,
    NOTED_MAX,
    REFRESH_S,
    SENTENCES_OCTETS_MAX,
)
from gatepost.counters.store import EVIDENCE, SUSPENSION, VALUE_OCTETS_MAX
from gatepost.facts import Evidence

BRIDGE = ip_address("172.17.0.1")
ONE, TWO = Evidence(hellos=("a.net",), public_names=("a.net",)), Evidence(hellos=("b.net",), reverse_domains=("c.net",))


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    made = MemoryStore() if request.param == "memory" else EmbeddedStore(tmp_path / "state")
    yield made
    made.close()


def test_evidence_gathers(store):
    sources = Sources(store)
    assert sources.note(BRIDGE, ONE, NOW) == ONE
    assert sources.note(BRIDGE, TWO, NOW + 1) == Evidence(("a.net", "b.net"), ("a.net",), ("c.net",))
    assert sources.note(ip_address("172.17.0.2"), TWO, NOW) == TWO, "each address by itself"
    assert sources.note(ip_address("::ac11:1"), TWO, NOW) == TWO


def test_what_is_known_is_nothing_new(store):
    sources, worker = Sources(store), Sources(store)
    assert sources.note(BRIDGE, ONE, NOW)
    assert sources.note(BRIDGE, ONE, NOW + REFRESH_S - 1) is None
    assert worker.note(BRIDGE, ONE, NOW + 1) is None, "nor to another worker"
    assert worker.note(BRIDGE, Evidence(), NOW) is None
    assert sources.note(BRIDGE, ONE, NOW + REFRESH_S + 1) == ONE, "but it is kept longer"


def test_it_ages(store):
    sources = Sources(store)
    sources.note(BRIDGE, ONE, NOW)
    assert sources.note(BRIDGE, TWO, NOW + EVIDENCE_S_MAX - 1) == Evidence(("a.net", "b.net"), ("a.net",), ("c.net",))
    late = Evidence(bounces=("d.net",))
    assert sources.note(BRIDGE, late, NOW + EVIDENCE_S_MAX + 1) == Evidence(
        hellos=("b.net",), reverse_domains=("c.net",), bounces=("d.net",)
    )


@pytest.mark.parametrize("number", [MEMBERS_MAX - 1, MEMBERS_MAX, MEMBERS_MAX + 1])
def test_sets_are_bounded_and_forget_what_was_seen_longest_ago(store, number):
    sources = Sources(store)
    known = None
    for at in range(number):
        known = sources.note(BRIDGE, Evidence(public_names=(f"{at:03}.net",)), NOW + at)
    assert known is not None
    assert known.public_names == tuple(f"{at:03}.net" for at in range(max(number - MEMBERS_MAX, 0), number))


def test_the_greatest_record_fits(store):
    """Whatever strangers say, as long as it can be."""
    sources = Sources(store)
    known = None
    for at in range(MEMBERS_MAX + 5):
        word = f"{at:03}" + "x" * 300
        known = sources.note(BRIDGE, Evidence(*((word,) for _ in Evidence._fields)), NOW + at)
        assert sources.note(BRIDGE, Evidence(*((word,) for _ in Evidence._fields)), NOW + at) is None
    assert known is not None
    assert all(len(words) == MEMBERS_MAX for words in known)
    assert {len(word) for words in known for word in words} == {MEMBER_OCTETS_MAX}
    assert all(len(item.value) <= VALUE_OCTETS_MAX for item in store.items(EVIDENCE, NOW, 9))
    assert sources.suspend(BRIDGE, ('"' * 300,) * 100, NOW + 20)
    assert sources.resume(BRIDGE, NOW + 20)
    assert sources.note(BRIDGE, ONE, NOW + 20) == ONE


def test_a_process_remembers_only_so_much(store):
    sources = Sources(store)
    for number in range(NOTED_MAX + 10):
        sources.note(ip_address(number), ONE, NOW)
    assert len(sources._noted) <= NOTED_MAX


def test_a_suspension_holds_until_it_is_ended(store):
    sources, worker = Sources(store), Sources(store)
    assert sources.suspended(BRIDGE, "mx", NOW) == (False, False)
    assert sources.suspend(BRIDGE, ("this", "and that"), NOW)
    assert not worker.suspend(BRIDGE, ("other",), NOW + 1), "one tells the operator"
    for years in (0, 10):
        assert worker.suspended(BRIDGE, "mx", NOW + years * 365 * 86_400) == (True, False)
    assert worker.suspended(ip_address("172.17.0.2"), "mx", NOW) == (False, False)
    assert sources.suspend("mx", ("public",), NOW + 5)
    assert worker.suspended(ip_address("172.17.0.2"), "mx", NOW) == (False, True)
    assert worker.suspensions(NOW + 6) == [
        Suspension(BRIDGE, NOW, ("this", "and that")),
        Suspension("mx", NOW + 5, ("public",)),
    ]
    assert worker.resume(BRIDGE, NOW + 7)
    assert not worker.resume(BRIDGE, NOW + 7)
    assert worker.resume("mx", NOW + 7)
    assert sources.suspended(BRIDGE, "mx", NOW + 8) == (False, False)
    assert sources.suspensions(NOW + 8) == []


def test_a_listener_with_the_longest_name_and_an_address_are_never_confused(store):
    sources = Sources(store)
    for source in ("x" * 64, "x" * 63, "172.17.0.1", "4abc", BRIDGE, ip_address("::1"), ip_address("::ffff:1")):
        assert sources.suspend(source, ("",), NOW)
    assert len(store.items(SUSPENSION, NOW, 99)) == 7
    assert {one.source for one in sources.suspensions(NOW)} >= {"172.17.0.1", BRIDGE}


def test_long_evidence_is_cut(store):
    sources = Sources(store)
    sources.suspend(BRIDGE, ("x" * SENTENCES_OCTETS_MAX, "y"), NOW)
    assert sources.suspensions(NOW)[0].why == ("x" * SENTENCES_OCTETS_MAX,)


def test_what_an_operator_has_looked_at_counts_no_more_for_a_while(store):
    sources = Sources(store)
    sources.note(BRIDGE, ONE, NOW)
    sources.suspend(BRIDGE, ("why",), NOW)
    assert sources.resume(BRIDGE, NOW)
    assert sources.note(BRIDGE, TWO, NOW + 1) == TWO
    later = NOW + FORGIVEN_S_MAX - 1
    assert sources.note(BRIDGE, ONE, later) == Evidence()
    sources.note(BRIDGE, TWO, later)
    assert sources.note(BRIDGE, ONE, NOW + FORGIVEN_S_MAX + REFRESH_S) == Evidence(
        ("a.net", "b.net"), ("a.net",), ("c.net",)
    )


def test_to_resume_what_is_not_suspended_forgives_nothing(store):
    sources = Sources(store)
    sources.note(BRIDGE, ONE, NOW)
    assert not sources.resume(BRIDGE, NOW)
    assert sources.note(BRIDGE, TWO, NOW) == Evidence(("a.net", "b.net"), ("a.net",), ("c.net",))


def test_it_outlives_the_process(tmp_path):
    for turn in range(2):
        store = EmbeddedStore(tmp_path)
        sources = Sources(store)
        if turn == 0:
            sources.note(BRIDGE, ONE, NOW)
            sources.suspend(BRIDGE, ("why",), NOW)
        else:
            assert sources.suspended(BRIDGE, "mx", NOW + 60) == (True, False)
            assert sources.note(BRIDGE, TWO, NOW + 60) == Evidence(("a.net", "b.net"), ("a.net",), ("c.net",))
        store.close()
