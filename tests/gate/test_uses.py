"""Grants that nobody uses: from which day on, in which words, and where the gate learns that one was used."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from gatepost.counters import EmbeddedStore, HourlyCounts, MemoryStore, Uses
from gatepost.facts import Client, Session, Transaction
from gatepost.gate.server import Rates
from gatepost.gate.settings import GateSettings
from gatepost.gate.uses import UNUSED_DAYS, unused
from gatepost.policy import relay
from gatepost.policy.relay import LocalPattern, RelayRules, TrustEntry, decide
from gatepost.smtp.path import NULL_REVERSE_PATH, ForwardPath, Pattern, parse_forward_path
from gatepost.verdict import Admit

NOW = 1_800_000_000.0
DAY_S = 86_400.0
LAN = TrustEntry("gatepost.toml:9", network=ip_network("10.1.0.0/16"))
PRINTER = TrustEntry("gatepost.toml:14", host="printer.test", expires_at=NOW + 1000 * DAY_S)


def rules(*trust):
    return RelayRules((LocalPattern("example.com", "gatepost.toml:5"),), trust, default_backend="mail")


def watched(given, now_s=NOW):
    uses = Uses(MemoryStore())
    uses.watch(map(relay.sense, given.trust), now_s)
    return uses


@pytest.mark.parametrize(("days", "told"), [(0, False), (89, False), (90, True), (91, True)])
def test_a_grant_that_was_never_used_is_told_once_it_was_watched_long_enough(days, told):
    given = rules(LAN)
    uses = watched(given)
    warning = (
        f"gatepost.toml:9: [[trust]]: network 10.1.0.0/16 is unused for {days} days, as long as it is watched; "
        "remove it, or say when it expires"
    )
    assert unused(given, uses, NOW + days * DAY_S + 1) == [warning] * told


@pytest.mark.parametrize(("days", "told"), [(89, False), (90, True), (91, True)])
def test_a_use_begins_the_count_anew(days, told):
    given = rules(LAN)
    uses = watched(given)
    uses.used(relay.sense(LAN), NOW + 80 * DAY_S)
    found = unused(given, uses, NOW + (80 + days) * DAY_S)
    assert [f": network 10.1.0.0/16 is unused for {days} days; remove" in one for one in found] == [True] * told


def test_a_new_gate_and_a_new_entry_are_not_told():
    assert unused(rules(LAN), Uses(MemoryStore()), NOW) == []
    uses = watched(rules(LAN))
    uses.watch([relay.sense(PRINTER)], NOW + 60 * DAY_S)
    (found,) = unused(rules(LAN, PRINTER), uses, NOW + 100 * DAY_S)
    assert found.startswith("gatepost.toml:9: ")


def test_the_mend_fits_the_entry():
    given = rules(PRINTER)
    (found,) = unused(given, watched(given), NOW + UNUSED_DAYS * DAY_S)
    assert found.endswith(": host printer.test is unused for 90 days, as long as it is watched; remove it")
    assert unused(given, watched(given), NOW + 1000 * DAY_S) == [], "what has expired is told as that"


def test_an_entry_is_known_by_what_it_grants_and_not_by_its_line():
    uses = watched(rules(LAN))
    moved = TrustEntry("gatepost.toml:99", "another reason", "it@example.com", network=LAN.network, messages_per_hour=9)
    later_s = NOW + 100 * DAY_S
    assert unused(rules(moved), uses, later_s)[0].startswith(
        "gatepost.toml:99: [[trust]]: network 10.1.0.0/16 is unused for 100 days"
    )
    uses.used(relay.sense(moved), later_s)
    assert unused(rules(LAN), uses, later_s) == []
    narrower = TrustEntry("gatepost.toml:9", network=LAN.network, forward_paths=(Pattern.parse("*@partner.test"),))
    assert unused(rules(narrower), uses, later_s + 90 * DAY_S) == [], "another grant, that is not watched yet"


def test_after_a_restart_the_count_goes_on(tmp_path):
    given = rules(LAN)
    for days, told in ((0, 0), (89, 0), (90, 1)):
        store = EmbeddedStore(tmp_path / "state")
        uses = Uses(store)
        uses.watch(map(relay.sense, given.trust), NOW + days * DAY_S)
        assert len(unused(given, uses, NOW + days * DAY_S)) == told
        store.close()


def test_what_a_backend_took_is_a_use_of_the_grant_that_admitted_it_whichever_worker_it_was(tmp_path):
    given = rules(LAN, PRINTER)
    store = MemoryStore()
    settings = GateSettings(name="mx.example.com", data="data", workers=2, listens=(), rules=given, backends=())
    workers = [Uses(store), Uses(store)]
    workers[0].watch(map(relay.sense, given.trust), NOW)
    later_s = NOW + 95 * DAY_S
    session = Session("", Client(ip_address("10.1.0.5"), 0), listen="mx", role="mx")
    transaction = Transaction(session, NULL_REVERSE_PATH, 0, later_s)
    counts = HourlyCounts(tmp_path / "hourly", 0, 1)

    def take(path):
        forward_path = parse_forward_path(path, smtputf8=False)
        assert isinstance(forward_path, ForwardPath)
        verdict = decide(given, transaction, forward_path)
        assert isinstance(verdict, Admit)
        Rates(counts, workers[1], settings).admitted(verdict.recipient, transaction, set())

    take(b"<bob@example.com>")
    assert len(unused(given, workers[0], later_s)) == 2, "mail for us needs no grant"
    take(b"<bob@elsewhere.test>")
    (found,) = unused(given, workers[0], later_s)
    assert "host printer.test" in found
