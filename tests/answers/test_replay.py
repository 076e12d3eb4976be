"""The journal under other rules: what changes, and what surprises most."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.store.places import NOON_S, entry, refused, session

from gatepost.answers import replay as replay_module
from gatepost.answers.replay import Change, as_object, replay
from gatepost.facts import Client, Identity, MailboxLogin, Session, Transaction
from gatepost.gate.settings import GateSettings, ListenSettings
from gatepost.policy import relay
from gatepost.policy.admission import SendAsEntry, SendAsRules
from gatepost.policy.relay import DenyEntry, LocalPattern, RelayRules, TrustEntry
from gatepost.smtp.path import NULL_REVERSE_PATH, ForwardPath, Mailbox, Pattern, Shape
from gatepost.store import Entry
from gatepost.store.journal import Kept
from gatepost.verdict import Admit, Defer

LOCAL = (LocalPattern("example.com", "g.toml:1"),)
OFFICE = TrustEntry("g.toml:2", network=ip_network("10.1.0.0/16"))
PEOPLE = TrustEntry("g.toml:3", accounts=("*",))
RULES = RelayRules(local=LOCAL, trust=(OFFICE, PEOPLE), default_backend="b")
ELSEWHERE = ForwardPath(Mailbox("b", "elsewhere.example"), Shape.PLAIN)


def gate(rules: RelayRules = RULES, **changes: object) -> GateSettings:
    listens = (ListenSettings("mx", (("127.0.0.1", 0),), send_as="off"),)
    base = GateSettings("mx.example.com", "data", 1, listens, rules, ())
    return replace(base, **changes)  # type: ignore[arg-type]


def kept(entries: Iterable[Entry], of: Session) -> list[Kept]:
    return [Kept(number, of.reference, of, one, pseudonymous=False) for number, one in enumerate(entries, 1)]


STRANGER, ANNA, CLERK = session(1), session(2, account="anna"), session(3, client="10.1.0.5")


def test_nothing_changes_under_the_same_rules():
    verdicts = [
        *kept([entry(), refused("00000001-1")], STRANGER),
        *kept([entry(forward_path=ELSEWHERE, reverse_path=Mailbox("anna", "example.com"))], ANNA),
        *kept([entry(verdict="refused", reason="backend"), entry(verdict="refused", reason="content")], STRANGER),
        *kept([entry(verdict="deferred", reason="rate")], STRANGER),
    ]
    found = replay(gate(), verdicts, NOON_S)
    assert found.same
    assert (found.verdicts, found.changes[Change.SAME], found.groups) == (6, 6, [])


def test_newly_refused_and_newly_admitted_grouped_by_client_and_domain():
    rules = replace(RULES, trust=(TrustEntry("n.toml:5", network=ip_network("192.0.2.0/24")),))
    verdicts = [
        *kept([entry(forward_path=ELSEWHERE, at=NOON_S + day * 86400) for day in range(5) for _ in range(2)], CLERK),
        *kept([refused(f"00000001-{number}") for number in range(3)], STRANGER),
    ]
    told: list[int] = []
    found = replay(gate(rules), verdicts, NOON_S, progress=told.append)
    assert not found.same
    assert (found.changes[Change.REFUSED], found.changes[Change.ADMITTED], told[-1]) == (10, 3, 13)
    first, second = found.groups
    assert (first.change, first.actor, first.domain) == (Change.REFUSED, "10.1.0.0/24", "elsewhere.example")
    assert (first.times, first.accepted, first.days) == (10, 10, 5)
    assert first.why == "accepted 10 times on 5 days and never refused, it would be refused"
    assert (first.then, first.now) == ("admitted (g.toml:12)", "relaying")
    assert (second.change, second.actor, second.stranger) == (Change.ADMITTED, "192.0.2.0/24", True)
    assert second.why == "a stranger's mail, refused 3 times on one day, would pass"
    assert second.now == "admitted (n.toml:5)"
    told_object = as_object(found, 1)
    assert (told_object["newly_refused"], told_object["other_groups"]) == (10, 1)
    assert told_object["groups"][0]["example"]["client"] == "10.1.0.5"


def test_the_most_surprising_first():
    rules = replace(RULES, deny=(DenyEntry("n.toml:9", network=ip_network("198.51.0.0/16")),), trust=(OFFICE,))
    mail = [entry(forward_path=ELSEWHERE, reverse_path=Mailbox("a", "y.example"))]
    verdicts = [
        *kept([entry(verdict="refused", reason="backend")] * 50, session(4, client="198.51.100.1")),
        *kept([refused("1", forward_path=entry().forward_path), *[entry()] * 5], session(5, client="198.51.101.1")),
        *kept([entry()] * 5, session(6, client="198.51.102.1")),
        *kept(mail * 5, ANNA),
    ]
    assert [(group.actor, group.why) for group in replay(gate(rules), verdicts, NOON_S).groups] == [
        ("198.51.102.0/24", "accepted 5 times on one day and never refused, it would be refused"),
        ("anna", "accepted 5 times on one day and never refused, it would be refused"),
        ("198.51.101.0/24", "accepted 5 times on one day, and refused once, it would be refused"),
        ("198.51.100.0/24", "admitted 50 times on one day, but the backend took none of it: it would be refused"),
    ]


def test_what_has_expired_by_now_grants_nothing():
    rules = replace(RULES, trust=(replace(OFFICE, expires_at=NOON_S + 10),))
    verdicts = kept([entry(forward_path=ELSEWHERE)], CLERK)
    assert replay(gate(rules), verdicts, NOON_S + 5).same
    assert not replay(gate(rules), verdicts, NOON_S + 15).same


def test_the_listener_asks_for_a_login_as_it_is_configured_now():
    listens = (ListenSettings("mx", (("127.0.0.1", 0),), auth="required"),)
    found = replay(gate(listens=listens), kept([entry()], STRANGER), NOON_S)
    assert [group.now for group in found.groups] == ["auth required"]


def test_a_transaction_as_a_whole():
    spam = DenyEntry("n.toml:9", reverse_path=Pattern.parse("*@x.example"))
    denied = entry(forward_path=None, stage="mail", verdict="refused", reason="denied", by="g.toml:7")
    assert replay(gate(replace(RULES, deny=(spam,))), kept([denied], STRANGER), NOON_S).same
    found = replay(gate(), kept([denied], STRANGER), NOON_S)
    assert found.changes[Change.ADMITTED] == 1
    assert [group.why for group in found.groups] == [
        "a stranger's MAIL, refused once on one day, would pass; of the recipients behind it nothing is known"
    ]


def test_two_configurations_are_compared_with_each_other(monkeypatch):
    verdicts = kept([refused("1")], STRANGER)  # whatever was decided then
    rules = replace(RULES, trust=(*RULES.trust, TrustEntry("n.toml:5", network=ip_network("192.0.2.1"))))
    assert replay(gate(rules), verdicts, NOON_S, before=gate(rules)).same
    assert replay(gate(rules), verdicts, NOON_S, before=gate()).changes[Change.ADMITTED] == 1
    monkeypatch.setattr(replay_module, "DECIDED_MAX", 1)
    assert replay(gate(rules), verdicts * 3, NOON_S, before=gate()).changes[Change.ADMITTED] == 3


def test_host_names_that_are_new_are_said_not_to_be_known():
    rules = replace(RULES, trust=(TrustEntry("n.toml:5", host="branch.example"),))
    (note,) = replay(gate(rules), [], NOON_S).notes
    assert note.endswith("where these are new, not: branch.example")
    assert replay(gate(rules), [], NOON_S, before=gate(rules)).notes == []
    assert replay(gate(rules), [], NOON_S, before=gate(), known=gate(rules)).notes == []


def test_what_nobody_asked_for_then_is_said_not_to_be_known():
    trust = (TrustEntry("1", certificate="ab" * 32), TrustEntry("2", pop3_s=600), TrustEntry("3", messages_per_hour=5))
    listens = (ListenSettings("mx", (("127.0.0.1", 0),), auth="required"),)
    new = gate(RelayRules(trust=trust), listens=listens)
    notes = replay(new, [], NOON_S, known=gate()).notes
    assert [note.partition(",")[0].partition(":")[0] for note in notes] == [
        "nobody was asked for a certificate",
        "logins to the mailbox server were not looked at",
        "mail is not counted again",
        "From fields of mail that passed are not kept",
    ]
    assert replay(new, [], NOON_S, known=new).notes == []


def test_groups_have_an_end(monkeypatch):
    monkeypatch.setattr(replay_module, "GROUPS_MAX", 3)
    rules = replace(RULES, local=())
    verdicts = [one for number in range(5) for one in kept([entry()], session(9, client=f"198.51.{number}.1"))]
    found = replay(gate(rules), verdicts, NOON_S)
    assert (len(found.groups), found.others, found.changes[Change.REFUSED]) == (3, 2, 5)
    (first, *_) = found.groups
    assert (first.actor, first.times) == ("198.51.0.0/24", 1)


clients = st.sampled_from(["192.0.2.1", "10.1.0.5", "10.2.0.5", "2001:db8::1"])
paths = st.sampled_from(
    [
        ELSEWHERE,
        ForwardPath(Mailbox("bob", "example.com"), Shape.PLAIN),
        ForwardPath(Mailbox("a%b", "example.com"), Shape.PERCENT),
    ]
)
reverses = st.sampled_from([NULL_REVERSE_PATH, Mailbox("a", "x.example"), Mailbox("spam", "spam.example")])
rule_sets = st.builds(
    RelayRules,
    local=st.sampled_from([(), LOCAL]),
    trust=st.lists(st.sampled_from([OFFICE, PEOPLE]), unique=True).map(tuple),
    deny=st.sampled_from([(), (DenyEntry("g.toml:9", reverse_path=Pattern.parse("*@spam.example")),)]),
    default_backend=st.just("b"),
    recipients_max=st.sampled_from([0, 1, 2]),
)


@given(rule_sets, clients, st.booleans(), paths, reverses, st.integers(0, 3))
def test_under_the_same_rules_every_verdict_is_the_same(rules, client, logged_in, path, reverse, recipients):
    of = Session(
        "K7Q2M9XD",
        Client(ip_address(client), 1),
        "mx",
        "mx",
        identity=Identity("a@x.example", "PLAIN") if logged_in else None,
    )
    verdict = relay.decide(rules, Transaction(of, reverse, recipients, NOON_S), path)
    if isinstance(verdict, Admit):
        told = entry(reverse_path=reverse, forward_path=path, recipients=recipients)
    else:
        word = "deferred" if isinstance(verdict, Defer) else "refused"
        told = refused("1", reverse_path=reverse, forward_path=path, recipients=recipients, verdict=word)
        told = told._replace(reason=verdict.reason.name.lower(), by=verdict.where)
    settings = gate(rules, listens=(ListenSettings("mx", (("127.0.0.1", 0),), send_as="off"),))
    assert replay(settings, kept([told], of), NOON_S).changes[Change.SAME] == 1


@given(st.integers(0, 4000), st.sampled_from([(600,), (1800,), (600, 1800), (1800, 600)]))
def test_a_client_that_had_read_its_mail_has_read_it(age, windows):
    trust = tuple(
        TrustEntry(f"g.toml:{number}", pop3_s=window, forward_paths=(Pattern.parse("*@elsewhere.example"),) * number)
        for number, window in enumerate(windows)
    )
    rules = RelayRules(local=LOCAL, trust=trust, default_backend="b")
    of = session(7, mailbox_login=MailboxLogin("anna", NOON_S - age))
    passes = isinstance(relay.decide(rules, Transaction(of, NULL_REVERSE_PATH, 0, NOON_S), ELSEWHERE), Admit)
    told = entry(forward_path=ELSEWHERE) if passes else refused("1", forward_path=ELSEWHERE, reason="mailbox_login")
    at_once = entry(forward_path=ELSEWHERE, at=NOON_S - age)
    before_it = refused("1", forward_path=ELSEWHERE, at=NOON_S - age - 100, reason="mailbox_login")
    found = replay(gate(rules), kept([told, before_it, at_once], of), NOON_S + 5 * 86400)
    assert found.changes[Change.SAME] == 3


def test_what_the_gate_put_off_for_the_client_s_sake_is_the_same():
    verdicts = kept(
        [entry(stage="rcpt", verdict="deferred", reason=reason) for reason in ("rate", "other_route")], ANNA
    )
    assert replay(gate(send_as=SendAsRules(domains=("x.example",))), verdicts, NOON_S).changes[Change.ADMITTED] == 0
    anna = [one._replace(entry=one.entry._replace(reverse_path=NULL_REVERSE_PATH)) for one in verdicts]
    assert replay(gate(), anna, NOON_S).changes[Change.SAME] == 2


def test_a_from_field_that_was_refused_is_held_against_the_grants_of_now():
    boss, own = Mailbox("boss", "example.com"), Mailbox("anna", "example.com")
    whole = entry(forward_path=None, reverse_path=own, verdict="refused", reason="send_as", authors=(boss,), by="")
    of_it = entry(reverse_path=own, verdict="refused", reason="send_as")
    unreadable = whole._replace(reason="author", authors=())
    rules = SendAsRules(domains=("example.com",))
    verdicts = kept([whole, of_it, unreadable], ANNA)
    enforced = gate(send_as=rules, listens=(ListenSettings("mx", (("127.0.0.1", 0),)),))
    assert replay(enforced, verdicts, NOON_S).changes[Change.SAME] == 3
    granted = replace(rules, entries=(SendAsEntry("n.toml:1", ("anna",), (Pattern.parse("boss@example.com"),)),))
    found = replay(replace(enforced, send_as=granted), verdicts, NOON_S)
    assert (found.changes[Change.SAME], found.changes[Change.ADMITTED]) == (2, 1)
    assert found.groups[0].why == "an account's mail, refused once on one day, would pass"
    assert replay(gate(send_as=rules), verdicts, NOON_S).changes[Change.ADMITTED] == 2


def test_what_was_deferred_and_what_was_refused_is_told_so():
    few = refused("1", verdict="deferred", reason="too_many_recipients", recipients=2, forward_path=ELSEWHERE)
    found = replay(gate(replace(RULES, trust=(), recipients_max=0)), kept([few], CLERK), NOON_S)
    assert [group.why for group in found.groups] == ["a stranger's mail, deferred once on one day, would be refused"]
    found = replay(gate(replace(RULES, recipients_max=0)), kept([few], CLERK), NOON_S)
    assert [group.why for group in found.groups] == ["a stranger's mail, deferred once on one day, would pass"]


def test_a_flood_of_groups_hides_nothing_that_matters(monkeypatch):
    monkeypatch.setattr(replay_module, "GROUPS_MAX", 10)
    rules = replace(RULES, trust=(TrustEntry("n.toml:5", network=ip_network("192.0.2.0/24")),))
    flood = [
        refused(str(number), forward_path=ForwardPath(Mailbox("v", f"d{number}.example"), Shape.PLAIN))
        for number in range(50)
    ]
    ours = kept([entry(forward_path=ELSEWHERE)] * 2, CLERK)
    verdicts = [*kept(flood[:30], STRANGER), *ours, *kept(flood[30:], STRANGER), *ours]
    found = replay(gate(rules), verdicts, NOON_S)
    assert len(found.groups) <= 10
    assert (found.groups[0].actor, found.groups[0].times) == ("10.1.0.0/24", 4)
    assert found.others + sum(group.times for group in found.groups) == 54


def test_what_is_not_counted_to_the_end_is_not_said(monkeypatch):
    monkeypatch.setattr(replay_module, "ACTORS_MAX", 1)
    found = replay(
        gate(replace(RULES, trust=())),
        [*kept([refused("1")], STRANGER), *kept([entry(forward_path=ELSEWHERE)], CLERK)],
        NOON_S,
    )
    assert [group.why for group in found.groups] == ["accepted once on one day, it would be refused"]


@pytest.mark.parametrize("mailbox", ["anna@example.com", "boss@example.com"])
def test_sending_as_another_is_decided_too(mailbox):
    verdicts = kept([entry(reverse_path=Mailbox(*mailbox.split("@")))], ANNA)
    listens = (ListenSettings("mx", (("127.0.0.1", 0),)),)
    found = replay(gate(send_as=SendAsRules(domains=("example.com",)), listens=listens), verdicts, NOON_S)
    assert found.same == mailbox.startswith("anna")
