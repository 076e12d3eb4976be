"""The watch over trusted addresses: a busy hour of our own machines, and the world behind one of them."""

from __future__ import annotations

import json
from ipaddress import ip_address, ip_network
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.policy import lan

from gatepost.counters import MemoryStore
from gatepost.facts import Client, Session
from gatepost.gate.interfaces import Interfaces, look
from gatepost.gate.sources import SIGNS_PER_SESSION, Sources, Watch
from gatepost.policy import sources
from gatepost.policy.relay import LocalPattern, RelayRules, TrustEntry
from gatepost.smtp.path import (
    ForwardPath,
    PathDefect,
    ReversePath,
    parse_forward_path,
    parse_reverse_path,
)
from gatepost.telemetry import SessionLog, Style

NOW = 1_800_000_000.0
RULES = RelayRules(
    local=(LocalPattern(lan.OURS, "f:1"),),
    trust=(TrustEntry("f:2", network=ip_network("10.0.0.0/8")), TrustEntry("f:3", listen="inside")),
    postmaster_domain=lan.OURS,
)


class Clock:
    now_s = NOW

    def __call__(self) -> float:
        return self.now_s


class Nowhere(Interfaces):
    """A host with this default route, and with nothing else."""

    def __init__(self, route: str = "") -> None:
        self.route = route

    def what_is(self, address) -> str:
        return "this host's default route" if str(address) == self.route else ""


class Gate(NamedTuple):
    sources: Sources
    clock: Clock
    log: list[dict[str, Any]]


class Log(SessionLog):
    """A log whose events are looked at."""

    def __init__(self, events: list[dict[str, Any]]) -> None:
        super().__init__(1, Style())
        self._events = events

    def event(self, name, text, level=None, **fields) -> None:
        self._events.append({"event": name, "text": text, "level": level and level.value, **fields})


def gate(store=None, rules: RelayRules = RULES, route: str = "") -> Gate:
    events: list[dict[str, Any]] = []
    clock = Clock()
    watching = Sources(
        store or MemoryStore(), rules, "mx.example.com", log=Log(events), interfaces=Nowhere(route), now_s=clock
    )
    return Gate(watching, clock, events)


def reverse(text: str) -> ReversePath:
    path = parse_reverse_path(f"<{text}>".encode(), smtputf8=False)
    assert not isinstance(path, PathDefect)
    return path


def forward(text: str) -> ForwardPath:
    path = parse_forward_path(f"<{text}>".encode(), smtputf8=False)
    assert isinstance(path, ForwardPath)
    return path


def session(address: str, hello: str, listen: str = "mx") -> Session:
    return Session("REF", Client(ip_address(address), 1), listen, "mx", hello=hello)


def send(
    at: Gate, address: str, hello: str, reverse_path: str, forward_path: str, fingerprint: str = "", listen: str = "mx"
) -> Session:
    """One session with one recipient; the facts on which its verdict rests."""
    facts = session(address, hello, listen)
    watch = at.sources.watch(facts)
    assert watch is not None
    facts = watch.recipient(watch.standing(facts), fingerprint, reverse(reverse_path), forward(forward_path))
    watch.ended(facts, fingerprint)
    return facts


def test_the_recording_is_of_a_busy_lan():
    recording = lan.record()
    assert recording == lan.record(), "the same each time"
    assert len({said.address for said in recording}) >= lan.DEVICES
    assert len(recording) > 5000
    assert len({said.hello for said in recording}) > 200
    assert recording[-1].at_s <= lan.HOUR_S


MANY_BEHIND = {"": 0, **{str(lan.address_of(number)): number for number in range(lan.DEVICES - 5, lan.DEVICES)}}


@pytest.mark.parametrize(("route", "seed"), MANY_BEHIND.items())
def test_an_hour_of_a_busy_lan_never_trips_it(seed, route):
    """Not even where the branch office, the smarthost, the farm and so on come through the default route."""
    at = gate(route=route)
    for said in lan.record(seed):
        at.clock.now_s = NOW + said.at_s
        facts = send(at, str(said.address), said.hello, said.reverse_path, said.forward_path, said.fingerprint)
        assert not facts.suspended, said
    assert at.log == []


def test_nor_do_three_days_of_it():
    """Habits do not change, guests do: the evidence of three days is more than that of an hour."""
    at = gate()
    for hour in (0, 9, 24, 33, 48, 57, 71):
        for said in lan.record(hour):
            at.clock.now_s = NOW + hour * lan.HOUR_S + said.at_s
            send(at, str(said.address), said.hello, said.reverse_path, said.forward_path, said.fingerprint)
    assert at.log == []


@pytest.mark.parametrize("kind", ["inbound", "relaying", "addresses", "bots"])
def test_the_world_behind_a_device_of_the_lan_trips_it(kind):
    """Within five connections, whatever was seen there before, and nobody else's trust is touched."""
    at = gate()
    recording = lan.record()
    for said in recording:
        send(at, str(said.address), said.hello, said.reverse_path, said.forward_path, said.fingerprint)
    victim = str(recording[0].address)
    facts = session(victim, "")
    for number in range(1, 6):
        hello, sent_by, to = {
            "inbound": (f"mx.world{number}.org", f"a@world{number}.org", f"bob@{lan.OURS}"),
            "relaying": (f"host{number}.provider{number}.net", f"boss@{lan.OURS}", "v@elsewhere.net"),
            "addresses": (f"[203.{number}.113.9]", f"boss@{lan.OURS}", "v@elsewhere.net"),
            "bots": (f"dsl-{number}.provider{number}.com.br", "", "v@elsewhere.net"),
        }[kind]
        facts = send(at, victim, hello, sent_by, to)
    assert facts.suspended, "the fifth is refused already"
    (told,) = at.log
    assert (told["event"], told["level"], told["source"]) == ("suspended", "error", victim)
    assert told["score"] >= told["threshold"] == sources.THRESHOLD
    assert json.dumps(told)
    neighbour = str(recording[1].address)
    assert neighbour != victim
    assert not send(at, neighbour, "pc", f"a@{lan.OURS}", "v@elsewhere.net").suspended


def test_a_session_that_names_no_recipient_shows_its_name():
    at = gate()
    for number in range(5):
        facts = session("10.1.2.3", f"mx.world{number}.org")
        watch = at.sources.watch(facts)
        assert watch is not None
        watch.ended(facts, "")
    assert [told["source"] for told in at.log] == ["10.1.2.3"]


def test_workers_share_what_they_see_and_one_of_them_tells():
    store = MemoryStore()
    workers = [gate(store), gate(store)]
    for number in range(8):
        send(workers[number % 2], "10.1.2.3", f"mx.world{number}.org", f"a@world{number}.org", "v@elsewhere.net")
    assert sum(len(at.log) for at in workers) == 1
    for at in workers:
        watch = at.sources.watch(session("10.1.2.3", ""))
        assert watch is not None
        assert watch.standing(session("10.1.2.3", "")).suspended


def test_an_operator_resumes_and_the_same_strangers_count_no_more():
    at = gate()

    def strangers(numbers) -> bool:
        facts = session("10.1.2.3", "")
        for number in numbers:
            facts = send(at, "10.1.2.3", f"mx.world{number}.org", f"a@world{number}.org", f"bob@{lan.OURS}")
        return facts.suspended

    assert strangers(range(5))
    assert at.sources.records.resume(ip_address("10.1.2.3"), NOW + 1)
    at.clock.now_s = NOW + 2
    assert not strangers(range(5))
    at.clock.now_s = NOW + 2 * 86_400
    assert not strangers(range(5))
    assert strangers(range(5, 10)), "others do"
    assert len(at.log) == 2


@given(st.text(max_size=300), st.text(max_size=60))
def test_whatever_a_client_says_is_kept_and_told_in_one_line(hello, fingerprint):
    at = gate()
    for number in range(5):
        facts = session("10.1.2.3", hello)
        at.sources.show(facts, fingerprint, reverse(f"a@world{number}.org"), inbound=True)
        at.sources.show(facts._replace(hello=f"mx.world{number}.org"), fingerprint, None, inbound=False)
    (told,) = at.log
    assert told["text"].isprintable()
    assert told["text"].isascii()


def test_who_is_no_trusted_client_is_not_watched():
    assert gate().sources.watch(session("203.0.113.9", "mx.world.org")) is None


def test_a_long_session_shows_only_so_much():
    at = gate()
    facts = session("10.1.2.3", "mx.world.org")
    watch = Watch(at.sources)
    for number in range(SIGNS_PER_SESSION + 5):
        watch.recipient(facts, "", reverse(f"a@d{number}.net"), forward("v@elsewhere.net"))
    known = at.sources.records.note(ip_address("10.1.2.3"), sources.shown(facts, frozenset(), "new"), NOW)
    assert known is not None
    assert f"d{SIGNS_PER_SESSION - 1}.net" in known.reverse_domains
    assert f"d{SIGNS_PER_SESSION}.net" not in known.reverse_domains


def test_a_listener_for_the_inside_is_disarmed_by_the_first_public_address():
    at = gate()
    assert not send(at, "10.1.2.3", "pc", f"a@{lan.OURS}", "v@elsewhere.net", listen="inside").listen_suspended
    seen = at.sources.watch(session("203.0.113.9", "", "inside"))
    assert seen is not None
    assert seen.standing(session("203.0.113.9", "", "inside")).listen_suspended
    assert not seen.standing(session("203.0.113.9", "", "inside")).suspended
    assert send(at, "10.1.2.3", "pc", f"a@{lan.OURS}", "v@elsewhere.net", listen="inside").listen_suspended
    assert not send(at, "10.1.2.3", "pc", f"a@{lan.OURS}", "v@elsewhere.net", listen="mx").listen_suspended
    (told,) = at.log
    assert told["source"] == "inside"
    assert "203.0.113.9" in told["text"]
    assert at.sources.records.resume("inside", NOW)
    again = at.sources.watch(session("203.0.113.9", "", "inside"))
    assert again is not None
    assert not again.standing(session("203.0.113.9", "", "inside")).listen_suspended, "this one was looked at"
    other = at.sources.watch(session("203.0.113.10", "", "inside"))
    assert other is not None
    assert other.standing(session("203.0.113.10", "", "inside")).listen_suspended


def test_what_this_host_knows_of_addresses():
    known = dict(look())
    assert known[ip_address("127.0.0.1")] == "the address of this host's interface lo"
    now = [0.0]
    interfaces = Interfaces(lambda: now[0])
    assert interfaces.what_is(ip_address("127.0.0.1")) == "this host itself"
    assert interfaces.what_is(ip_address("203.0.113.9")) == ""
