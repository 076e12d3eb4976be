"""The self-test: whom it asks as, what it makes of the answers, when it runs, and what is told of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from ipaddress import ip_address, ip_network
from types import SimpleNamespace

import pytest
from tests.gate.scripted_gate import PATIENCE_S, Trial, unlimited
from tests.vectors.lenient import LenientBackend

from gatepost.backend.settings import BackendSettings, SmtpAddress
from gatepost.errors import GatepostError
from gatepost.gate import session as session_module
from gatepost.gate.selftest import (
    FIRST_TEST_S,
    Asker,
    Bound,
    Comparison,
    NoAsker,
    Outcome,
    SelfTests,
    asker,
    bound_for_smtp,
    candidates,
    compare,
    judged,
    pause_s,
    together,
)
from gatepost.gate.settings import GateSettings, Limits, ListenSettings, MailboxServer
from gatepost.policy import relay
from gatepost.policy.relay import DenyEntry, LocalPattern, RelayRules, Route, TrustEntry
from gatepost.probe import Attempt, Report, Round, Target, Verdict
from gatepost.probe import Outcome as Seen
from gatepost.probe.round import TAKES_ANY_LOCAL_PART, TAKES_ANYBODY
from gatepost.smtp.path import Pattern
from gatepost.telemetry import SELFTEST
from gatepost.verdict import Admit, AdmittedRecipient, LocalDomain

NOW_S = 1_800_000_000.0
DAY_S = 86_400.0
OURS, ALSO_OURS, HOST = ip_address("127.77.0.1"), ip_address("127.77.0.2"), ip_address("192.0.2.7")
MX = ListenSettings("mx", (("0.0.0.0", 25),), where="g.toml:2")
LOCAL = (LocalPattern("example.com", "g.toml:1"),)


def gate(*trust: TrustEntry, local=LOCAL, deny=(), open_relay=False, **changes) -> GateSettings:
    return GateSettings(
        name="mx.example.com",
        data="/nonexistent",
        workers=1,
        listens=(MX,),
        rules=RelayRules(local=local, trust=trust, deny=deny, default_backend="b", **changes),
        backends=(BackendSettings("b", (SmtpAddress("127.0.0.1", 25),)),),
        limits=unlimited(),
        open_relay=open_relay,
    )


def trusting(network: str, **changes) -> TrustEntry:
    return TrustEntry("g.toml:7", network=ip_network(network), **changes)


def whom(settings: GateSettings, listen: ListenSettings = MX, hosts=lambda address: ()) -> Asker | NoAsker:
    return asker(settings, listen, (OURS, HOST), hosts, NOW_S)


# ---- whom it asks as


def test_a_stranger_is_whom_nothing_trusts():
    assert whom(gate()) == Asker(OURS, admitted=False)
    assert whom(gate(trusting("127.0.0.0/8"))) == Asker(HOST, admitted=False)
    assert whom(gate(trusting("192.0.2.0/24"))) == Asker(OURS, admitted=False)
    assert whom(gate(TrustEntry("g.toml:7", listen="other"))) == Asker(OURS, admitted=False)
    assert whom(gate(TrustEntry("g.toml:7", accounts=("*",)))) == Asker(OURS, admitted=False)


def test_what_has_expired_trusts_nobody():
    assert whom(gate(trusting("0.0.0.0/0", expires_at=NOW_S - 1))) == Asker(OURS, admitted=False)


def test_a_trusted_host_name_is_looked_up():
    settings = gate(TrustEntry("g.toml:7", host="printer.example.com"))
    asker = whom(settings, hosts=lambda address: ("printer.example.com",) if address == OURS else ())
    assert isinstance(asker, Asker)
    assert asker.address == HOST


def test_whoever_is_denied_proves_nothing():
    deny = (DenyEntry("g.toml:9", network=ip_network("127.0.0.0/8")),)
    assert whom(gate(deny=deny)) == Asker(HOST, admitted=False)
    said = (DenyEntry("g.toml:9", helo="[127.77.0.1]"),)
    assert whom(gate(deny=said)) == Asker(HOST, admitted=False)


def test_a_listed_proxy_or_front_end_would_be_somebody_else():
    networks = ("127.0.0.0/8",)
    for listen in (replace(MX, proxy_from=networks), replace(MX, xclient_from=networks)):
        assert whom(gate(), listen) == Asker(HOST, admitted=False)


def test_others_may_have_logged_in_to_their_mailboxes_from_an_address_that_is_not_ours_alone():
    windows = TrustEntry("g.toml:7", pop3_s=1800.0)
    assert whom(gate(windows)) == Asker(OURS, admitted=False)
    nobody = whom(gate(windows, trusting("127.0.0.0/8")))
    assert isinstance(nobody, NoAsker)
    assert nobody.outcome is Outcome.UNKNOWN
    assert nobody.sentence == (
        "not asked: this host has no address that is a stranger here: 127.77.0.1 is trusted (g.toml:7), "
        "192.0.2.7 is trusted (g.toml:7)"
    )


def test_where_every_address_is_somebody_it_is_unknown_and_each_is_named():
    settings = gate(trusting("192.0.2.0/24"), deny=(DenyEntry("g.toml:9", network=ip_network("127.77.0.1/32")),))
    proxied = replace(MX, proxy_from=("127.77.0.2/32",))
    nobody = asker(settings, proxied, (OURS, ALSO_OURS, HOST), lambda _: (), NOW_S)
    assert isinstance(nobody, NoAsker)
    assert nobody.outcome is Outcome.UNKNOWN
    assert nobody.sentence == (
        "not asked: this host has no address that is a stranger here: 127.77.0.1 is denied (g.toml:9), "
        "127.77.0.2 is a listed proxy or front end, 192.0.2.7 is trusted (g.toml:7)"
    )


def test_where_whoever_comes_is_trusted_nobody_is_a_stranger():
    settings = gate(TrustEntry("g.toml:7", listen="mx"))
    sentence = "not asked: whoever comes to this listener is trusted (g.toml:7)"
    assert whom(settings) == NoAsker(Outcome.TRUSTED, sentence)
    # Where AUTH is required, a grant alone is worth nothing.
    assert whom(settings, replace(MX, role="submission", auth="required")) == Asker(OURS, admitted=False)


def test_an_open_relay_that_is_meant_is_asked_as_one():
    assert whom(gate(trusting("0.0.0.0/0"), open_relay=True)) == Asker(OURS, admitted=True)
    assert whom(gate(TrustEntry("g.toml:7", listen="mx"), open_relay=True)) == Asker(OURS, admitted=True)
    for narrowing in ({"reverse_paths": (Pattern.parse("*@example.com"),)}, {"tls_minimum": "1.2"}):
        settings = gate(trusting("0.0.0.0/0", **narrowing), open_relay=True)
        assert whom(settings, replace(MX, tls="starttls")) == Asker(OURS, admitted=True)
    assert whom(gate(local=(LocalPattern("*.invalid", "g.toml:1"),), open_relay=True)) == Asker(OURS, admitted=True)


def test_an_open_relay_that_leads_nowhere_is_not_taken_for_one():
    narrowed = trusting("0.0.0.0/0", forward_paths=(Pattern.parse("*@partner.example"),))
    assert isinstance(whom(gate(narrowed, open_relay=True)), NoAsker)
    route = (Route("g.toml:5", "b", (Pattern.parse("*@example.com"),)),)
    settings = gate(trusting("0.0.0.0/0"), open_relay=True, routes=route)
    nowhere = replace(settings, rules=replace(settings.rules, default_backend=""))
    assert isinstance(whom(nowhere), NoAsker)


def test_each_target_is_asked_from_an_address_of_its_own():
    own = (ip_address("127.0.0.1"), HOST, ip_address("::1"), ip_address("2001:db8::7"), ip_address("fe80::7"))
    target = ip_address("127.0.0.1")
    assert candidates(target, 0, own) == [OURS, ip_address("127.0.0.1"), HOST]
    assert candidates(target, 1, own)[0] == ALSO_OURS
    assert candidates(target, 300, own)[0] == ip_address("127.77.1.45")
    many = {candidates(target, number, ())[0] for number in range(300)}
    assert len(many) == 300
    assert many <= set(ip_network("127.77.0.0/16").hosts())
    assert candidates(target, 1 << 20, ())[0] in ip_network("127.77.0.0/16").hosts()
    assert candidates(ip_address("::1"), 5, own) == [ip_address("::1"), ip_address("2001:db8::7")]


# ---- what is tested


def test_wildcards_are_reached_over_the_loopback_interface():
    assert Bound(MX, "0.0.0.0", 25).target == ip_address("127.0.0.1")
    assert Bound(MX, "::", 25).target == ip_address("::1")
    assert Bound(MX, "192.0.2.7", 25).target == HOST


def test_only_what_takes_mail_is_asked_and_everything_bound():
    pop = ListenSettings("pop", (("127.0.0.1", 0),), role="pop3", server=MailboxServer("127.0.0.1", 110))
    served = [("mx", "127.0.0.1", 40001), ("pop", "127.0.0.1", 40002), ("mx", "::1", 40003)]
    assert bound_for_smtp((MX, pop), served) == [Bound(MX, "127.0.0.1", 40001), Bound(MX, "::1", 40003)]
    with pytest.raises(GatepostError, match="a listener old, the configuration has none; reload it first"):
        bound_for_smtp((MX, pop), [("old", "127.0.0.1", 1)])


@pytest.mark.parametrize(
    ("per_minute", "errors", "seconds"),
    [(300, 10, 0.05), (0, 10, 0.0), (300, 0, 0.05), (300, 2, 0.2), (4, 10, 3.75), (1, 1, 120.0)],
)
def test_connections_cost_at_most_half_of_what_one_client_may_open(per_minute, errors, seconds):
    limits = Limits(sessions_per_minute_per_client=per_minute, errors_per_session=errors)
    assert pause_s(limits) == pytest.approx(seconds)


# ---- the comparison


def attempt(outcome: Seen, note: str = "") -> Attempt:
    return Attempt("a-form", "why", "source", "<>", "<x@y.invalid>", outcome, "250 Ok", note, ("C: MAIL FROM:<>",))


def report(verdict: Verdict, *attempts: Attempt) -> Report:
    opening = ("S: 220 mx.example.com", "C: EHLO [127.77.0.1]", "S: 250 mx.example.com", "C: MAIL FROM:<>", "S: 250 Ok")
    one = Round(OURS, 25, False, "", "", ("example.com",), verdict, (), opening, False, 3, attempts)
    return Report(Target("127.0.0.1"), "x@y.invalid", verdict, ("IPv4: why.",), (one,), None, 1.0)


REFUSED, RELAYED = attempt(Seen.REFUSED), attempt(Seen.ACCEPTED)
ANYBODY, ANY_LOCAL_PART = attempt(Seen.UNCLEAR, TAKES_ANYBODY), attempt(Seen.UNCLEAR, TAKES_ANY_LOCAL_PART)


@pytest.mark.parametrize(
    ("admitted", "seen", "outcome"),
    [
        (False, report(Verdict.CLOSED, REFUSED, REFUSED), Outcome.CLOSED),
        (False, report(Verdict.OPEN, REFUSED, RELAYED), Outcome.DISAGREES),
        (False, report(Verdict.UNKNOWN, REFUSED, ANY_LOCAL_PART), Outcome.UNKNOWN),
        (False, report(Verdict.UNKNOWN, ANYBODY), Outcome.DISAGREES),
        (False, report(Verdict.UNKNOWN), Outcome.UNKNOWN),
        (True, report(Verdict.CLOSED, REFUSED, REFUSED), Outcome.DISAGREES),
        (True, report(Verdict.OPEN, REFUSED, RELAYED), Outcome.OPEN),
        (True, report(Verdict.UNKNOWN, REFUSED, ANY_LOCAL_PART), Outcome.UNKNOWN),
        (True, report(Verdict.UNKNOWN, ANYBODY), Outcome.OPEN),
        (True, report(Verdict.UNKNOWN), Outcome.UNKNOWN),
    ],
)
def test_what_was_seen_beside_what_the_rules_say(admitted, seen, outcome):
    assert judged("mx", "127.0.0.1:25", Asker(OURS, admitted), seen).outcome is outcome


def test_each_comparison_is_told_in_a_sentence():
    def told(admitted: bool, seen: Report) -> str:
        return str(judged("mx", "127.0.0.1:25", Asker(OURS, admitted), seen))

    where = "mx at 127.0.0.1:25:"
    said = "MAIL FROM:<> and RCPT TO:<x@y.invalid>, answered 250 Ok"
    closed, opened = report(Verdict.CLOSED, REFUSED, REFUSED), report(Verdict.OPEN, RELAYED)
    assert told(False, closed) == f"{where} refuses 127.77.0.1 in all 2 forms, as it should"
    assert told(True, closed) == f"{where} refuses 127.77.0.1, though the configuration lets it send anywhere"
    assert told(True, opened) == f"{where} OPEN RELAY, as [gate] open_relay wishes: takes {said} from 127.77.0.1"
    assert told(False, report(Verdict.UNKNOWN)) == f"{where} cannot be told: IPv4: why."
    assert told(False, opened) == (
        f"{where} RELAYS for 127.77.0.1, which nothing in the configuration allows: {said} (a-form)"
    )


def test_a_disagreement_shows_its_dialogue_from_the_greeting_on():
    compared = judged("mx", "127.0.0.1:25", Asker(OURS, admitted=False), report(Verdict.OPEN, RELAYED))
    assert compared.transcript == (
        "S: 220 mx.example.com",
        "C: EHLO [127.77.0.1]",
        "S: 250 mx.example.com",
        "C: MAIL FROM:<>",
    )


def of(*outcomes: Outcome) -> list[Comparison]:
    return [Comparison("mx", "127.0.0.1:25", OURS, outcome, "is so") for outcome in outcomes]


@pytest.mark.parametrize(
    ("outcomes", "overall"),
    [
        ((), Outcome.UNKNOWN),
        ((Outcome.TRUSTED,), Outcome.UNKNOWN),
        ((Outcome.CLOSED, Outcome.TRUSTED), Outcome.CLOSED),
        ((Outcome.CLOSED, Outcome.OPEN), Outcome.OPEN),
        ((Outcome.CLOSED, Outcome.OPEN, Outcome.UNKNOWN), Outcome.UNKNOWN),
        ((Outcome.CLOSED, Outcome.UNKNOWN, Outcome.DISAGREES), Outcome.DISAGREES),
    ],
)
def test_all_together(outcomes, overall):
    assert together(of(*outcomes)) is overall


# ---- against servers that are not what the rules say


async def test_a_server_that_takes_everything_is_an_alarm():
    with LenientBackend("all") as backend:
        bound = Bound(MX, "127.0.0.1", backend.port)
        compared = await compare(gate(), bound, 0, lambda _: (), NOW_S)
        assert backend.transactions() == []
    assert compared.outcome is Outcome.DISAGREES
    assert compared.source == OURS
    assert any(line.startswith("C: RCPT TO:") for line in compared.transcript)


async def test_where_nobody_answers_it_is_unknown(unused_tcp_port):
    compared = await compare(gate(), Bound(MX, "127.0.0.1", unused_tcp_port), 0, lambda _: (), NOW_S)
    assert compared.outcome is Outcome.UNKNOWN
    assert "connection refused" in compared.sentence


async def test_rules_that_leave_no_foreign_address_are_unknown(unused_tcp_port):
    settings = gate(local=(LocalPattern("gatepost-probe.invalid", "g.toml:1"),))
    compared = await compare(settings, Bound(MX, "127.0.0.1", unused_tcp_port), 0, lambda _: (), NOW_S)
    assert compared.outcome is Outcome.UNKNOWN
    assert "is in a local domain" in compared.sentence


# ---- when


def test_the_first_test_comes_some_minutes_after_the_start(trial):
    tests = trial.server._self_tests
    assert not tests.due(DAY_S, 1000.0)
    assert not tests.due(DAY_S, 1000.0 + FIRST_TEST_S - 1)
    assert tests.due(DAY_S, 1000.0 + FIRST_TEST_S)
    assert tests.due(60.0, 1060.0)  # sooner where more are wanted
    assert not tests.due(0.0, 1e9)


async def test_the_next_one_a_day_after_the_end_of_the_last(trial):
    tests = trial.server._self_tests
    begun, goes_on = asyncio.Event(), asyncio.Event()

    async def test() -> Comparison:
        begun.set()
        await goes_on.wait()
        return of(Outcome.CLOSED)[0]

    running = asyncio.create_task(tests.run([test], lambda: True))
    await begun.wait()
    assert not tests.due(DAY_S, 1e9)  # never two at a time
    goes_on.set()
    await running
    assert not tests.due(DAY_S, 2000.0)
    assert not tests.due(DAY_S, 2000.0 + DAY_S - 1)
    assert tests.due(DAY_S, 2000.0 + DAY_S)


async def test_what_was_compared_with_another_configuration_is_not_told(trial):
    tests = trial.server._self_tests

    async def test() -> Comparison:
        return of(Outcome.DISAGREES)[0]

    await tests.run([test, test], lambda: False)
    assert trial.lines("selftest") == []
    assert trial.metrics.read(SELFTEST) == []
    assert not tests.due(DAY_S, 0.0)
    assert tests.due(DAY_S, FIRST_TEST_S)


# ---- what is told


async def told(trial: Trial, *outcomes: Outcome) -> list[float]:
    async def test(outcome: Outcome) -> Comparison:
        return of(outcome)[0]

    await trial.server._self_tests.run([partial(test, one) for one in outcomes], lambda: True)
    return [sample.value for sample in trial.metrics.read(SELFTEST)]


async def test_the_metric_tells_whether_gate_and_rules_agree(trial):
    assert await told(trial, Outcome.UNKNOWN) == []
    assert await told(trial, Outcome.CLOSED, Outcome.TRUSTED) == [1]
    assert await told(trial, Outcome.UNKNOWN) == []
    assert await told(trial, Outcome.OPEN) == [1]
    assert await told(trial, Outcome.CLOSED, Outcome.DISAGREES) == [0]
    assert await told(trial, Outcome.UNKNOWN) == [0]  # an alarm stands until a test says otherwise
    assert await told(trial, Outcome.CLOSED) == [1]


async def test_agreement_is_one_line_and_everything_else_one_each(trial):
    await told(trial, Outcome.CLOSED, Outcome.OPEN, Outcome.CLOSED, Outcome.UNKNOWN, Outcome.TRUSTED, Outcome.DISAGREES)
    events = await trial.logged("selftest", 4)
    assert [(event["level"], len(event["listeners"])) for event in events] == [
        ("warning", 1),
        ("warning", 1),
        ("error", 1),
        ("note", 3),
    ]
    assert events[0]["text"] == "self-test: mx at 127.0.0.1:25: is so"


# ---- the gate


async def swept(trial: Trial) -> None:
    """The test that is due, to its end."""
    trial.sweep()
    trial.sweep(FIRST_TEST_S)
    task = trial.server._self_testing
    assert task is not None
    async with asyncio.timeout(PATIENCE_S):
        await task


async def test_a_closed_gate_in_front_of_a_backend_that_takes_everything(trial):
    await trial.apply(selftest_s=DAY_S)
    await swept(trial)
    (event,) = await trial.logged("selftest")
    assert event["level"] == "note"
    assert event["listeners"][0]["outcome"] == "closed"
    assert [sample.value for sample in trial.metrics.read(SELFTEST)] == [1]
    assert trial.backend().contents == []


async def test_a_gate_that_admits_what_its_rules_refuse_is_an_alarm(trial, monkeypatch):
    def broken(rules, transaction, forward_path, findings=()):
        return Admit(AdmittedRecipient(forward_path, LocalDomain("*", "g.toml:1"), "b"))

    monkeypatch.setattr(session_module, "relay", SimpleNamespace(**{**vars(relay), "decide": broken}))
    await trial.apply(selftest_s=DAY_S)
    await swept(trial)
    (event,) = await trial.logged("selftest")
    assert event["level"] == "error"
    assert "RELAYS for 127.77.0.1, which nothing in the configuration allows" in event["text"]
    (listener,) = event["listeners"]
    assert listener["form"]
    assert "S: 250 2.1.5 Recipient OK" in listener["transcript"]
    assert [sample.value for sample in trial.metrics.read(SELFTEST)] == [0]


async def test_an_open_gate_that_is_meant_to_be_one(trial):
    await trial.apply(selftest_s=DAY_S, open_relay=True, trust=(trusting("0.0.0.0/0"),))
    await swept(trial)
    (event,) = await trial.logged("selftest")
    assert event["level"] == "warning"
    assert "OPEN RELAY, as [gate] open_relay wishes" in event["text"]
    assert [sample.value for sample in trial.metrics.read(SELFTEST)] == [1]


async def test_what_the_self_test_shows_suspends_nobodys_trust_and_bans_nobody(trial):
    await trial.apply(selftest_s=DAY_S, open_relay=True, trust=(trusting("0.0.0.0/0"),))
    for _ in range(3):
        trial.server._self_tests = SelfTests(trial.log, trial.server.metrics.self_test)
        await swept(trial)
    assert trial.server.sources.records.suspensions(trial.now_s) == []
    await trial.logged("selftest", 3)
    assert trial.lines("suspended") == trial.lines("ban") == []


async def test_the_second_worker_does_not_test(trial):
    trial.server.worker, trial.server.workers = 1, 2
    await trial.apply(selftest_s=1.0)
    trial.sweep()
    trial.sweep(DAY_S)
    assert trial.server._self_testing is None


async def test_a_drain_ends_a_test(trial):
    await trial.apply(selftest_s=DAY_S)
    trial.backend().answers_rcpt.clear()  # the backend answers nothing, so that the test hangs
    trial.sweep()
    trial.sweep(FIRST_TEST_S)
    async with asyncio.timeout(PATIENCE_S):
        await trial.backend().asked.wait()
        task, draining = trial.server._self_testing, asyncio.create_task(trial.server.drain())
        assert task is not None
        await asyncio.wait([task])
        trial.backend().answers_rcpt.set()
        await draining
    assert task.cancelled()
    assert trial.lines("selftest") == []
