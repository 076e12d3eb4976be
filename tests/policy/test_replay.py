"""What the rules cannot tell apart is decided alike: held against ``relay`` with random rules and questions."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatepost.facts import Client, Identity, MailboxLogin, Session, Transaction
from gatepost.policy import relay
from gatepost.policy.relay import DenyEntry, LocalPattern, RelayRules, Reread, Route, TrustEntry
from gatepost.policy.replay import Classes
from gatepost.smtp.path import (
    NULL_REVERSE_PATH,
    POSTMASTER,
    AddressLiteral,
    ForwardPath,
    Mailbox,
    Pattern,
    ReversePath,
    Shape,
    parse_forward_path,
)
from gatepost.verdict import Admit

NOW_S = 1_000_000.0
LOCAL_PARTS = ["ann", "Ann", "bob", "a=b", "kelvin", "\u212aelvin", "a%b", "\u2163"]
DOMAINS = ["example.com", "mail.example.com", "x.test", "y.test"]

patterns = st.one_of(
    st.sampled_from(["*", "<>", "postmaster", "*@example.com", "*@*.example.com", "*@x.test", "ann@*"]),
    st.builds("{}@{}".format, st.sampled_from(["ann", "BOB", "kelvin"]), st.sampled_from(DOMAINS)),
).map(Pattern.parse)
several = st.lists(patterns, max_size=2).map(tuple)
networks = st.sampled_from(["10.0.0.0/8", "10.1.0.0/16", "192.0.2.1/32", "2001:db8::/32"]).map(ip_network)
grants = st.builds(
    TrustEntry,
    where=st.just("g:1"),
    reverse_paths=several,
    forward_paths=several,
    tls_minimum=st.sampled_from(["", "1.2"]),
    expires_at=st.sampled_from([None, NOW_S - 1, NOW_S + 1]),
)
grants = st.one_of(
    st.builds(lambda base, value: _with(base, network=value), grants, networks),
    st.builds(lambda base, value: _with(base, host=value), grants, st.sampled_from(["branch.test", "other.test"])),
    st.builds(lambda base, value: _with(base, accounts=(value,)), grants, st.sampled_from(["*", "ann"])),
    st.builds(lambda base, value: _with(base, certificate=value), grants, st.just("ab" * 32)),
    st.builds(lambda base, value: _with(base, listen=value), grants, st.just("inside")),
    st.builds(lambda base, value: _with(base, pop3_s=value), grants, st.sampled_from([600.0, 1800.0])),
)
denials = st.one_of(
    st.builds(DenyEntry, where=st.just("g:2"), network=networks),
    st.builds(DenyEntry, where=st.just("g:2"), helo=st.sampled_from(["bad.test", "*.bad.test"])),
    st.builds(DenyEntry, where=st.just("g:2"), reverse_path=patterns),
    st.builds(DenyEntry, where=st.just("g:2"), forward_path=patterns),
    st.builds(DenyEntry, where=st.just("g:2"), host=st.just("branch.test")),
)
rule_sets = st.builds(
    RelayRules,
    local=st.sampled_from([(), (LocalPattern("example.com", "g:3"),), (LocalPattern("*.example.com", "g:3"),)]),
    trust=st.lists(grants, max_size=3).map(tuple),
    deny=st.lists(denials, max_size=2).map(tuple),
    routes=st.lists(st.builds(Route, st.just("g:4"), st.just("other"), several, st.booleans()), max_size=1).map(tuple),
    default_backend=st.sampled_from(["", "mail"]),
    postmaster_domain=st.sampled_from(["", "example.com"]),
    reread=st.sampled_from([(), (), (Reread("mail", "="),)]),
    recipients_max=st.just(0),
)
sessions = st.builds(
    Session,
    reference=st.sampled_from(["K7Q2M9XD", "00000000"]),
    client=st.builds(
        Client,
        st.sampled_from(["10.1.2.3", "10.2.0.1", "192.0.2.1", "192.0.2.2", "2001:db8::1"]).map(ip_address),
        st.just(1),
    ),
    listen=st.sampled_from(["mx", "inside"]),
    role=st.sampled_from(["mx", "submission"]),
    hello=st.sampled_from(["bad.test", "host.bad.test", "HOST.BAD.TEST.", "good.test"]),
    esmtp=st.booleans(),
    tls=st.sampled_from(["", "TLSv1.1", "TLSv1.3"]),
    identity=st.sampled_from([None, None, Identity("ann", "PLAIN"), Identity("bob", "PLAIN")]),
    hosts=st.sampled_from([(), ("branch.test",), ("branch.test", "other.test")]),
    auth_required=st.booleans(),
    certificate=st.sampled_from(["", "ab" * 32]),
    mailbox_login=st.sampled_from([None, *(MailboxLogin("ann", NOW_S - age) for age in (-5, 0, 599, 600, 1799, 1800))]),
    suspended=st.booleans(),
    listen_suspended=st.booleans(),
)
mailboxes = st.builds(
    Mailbox, st.sampled_from(LOCAL_PARTS), st.sampled_from([*DOMAINS, AddressLiteral(ip_address("192.0.2.9"))])
)
reverse_paths = st.one_of(st.just(NULL_REVERSE_PATH), mailboxes)


def _with(entry: TrustEntry, **who: object) -> TrustEntry:
    fields = {name: getattr(entry, name) for name in ("where", "reverse_paths", "forward_paths", "tls_minimum")}
    return TrustEntry(**fields, expires_at=entry.expires_at, **who)  # type: ignore[arg-type]


def _parsed(written: Mailbox | str) -> ForwardPath:
    path = parse_forward_path(f"<{written}>".encode(), smtputf8=True)
    assert isinstance(path, ForwardPath)
    return path


forward_paths = st.one_of(st.just(ForwardPath(POSTMASTER, Shape.NO_DOMAIN)), mailboxes.map(_parsed))


def _decided(rules: RelayRules, session: Session, reverse: ReversePath, forward: ForwardPath) -> tuple[object, ...]:
    transaction = Transaction(session, reverse, 0, NOW_S)
    denied, verdict = relay.denied(rules, transaction), relay.decide(rules, transaction, forward)
    at_mail = None if denied is None else denied.where
    if isinstance(verdict, Admit):
        return at_mail, verdict.recipient.authority, verdict.recipient.backend
    return at_mail, type(verdict), verdict.reason, verdict.where


questions = st.tuples(sessions, reverse_paths, forward_paths)


@given(rule_sets, st.lists(questions, min_size=2, max_size=60))
def test_questions_of_the_same_classes_get_the_same_verdict(rules, asked):
    classes = Classes(rules)
    known: dict[object, object] = {}
    for session, reverse, forward in asked:
        key = (
            classes.session(session),
            classes.login(session, NOW_S),
            classes.reverse_path(reverse),
            classes.forward_path(forward),
        )
        verdict = _decided(rules, session, reverse, forward)
        assert known.setdefault(key, verdict) == verdict


@given(rule_sets, sessions, reverse_paths, forward_paths, questions)
def test_one_fact_that_differs_is_seen_where_it_counts(rules, session, reverse, forward, other):
    classes = Classes(rules)
    verdict = _decided(rules, session, reverse, forward)
    for name, value in other[0]._asdict().items():
        changed = session._replace(**{name: value})
        if _decided(rules, changed, reverse, forward) != verdict:
            assert (classes.session(changed), classes.login(changed, NOW_S)) != (
                classes.session(session),
                classes.login(session, NOW_S),
            )
    if _decided(rules, session, other[1], forward) != verdict:
        assert classes.reverse_path(other[1]) != classes.reverse_path(reverse)
    if _decided(rules, session, reverse, other[2]) != verdict:
        assert classes.forward_path(other[2]) != classes.forward_path(forward)


BASE = Session("K7Q2M9XD", Client(ip_address("192.0.2.1"), 1), "mx", "mx", tls="TLSv1.3")
OFFICE = TrustEntry("g:1", network=ip_network("192.0.2.0/24"))
POP = RelayRules(trust=(TrustEntry("g:1", pop3_s=600), TrustEntry("g:2", pop3_s=1800)), default_backend="b")
REREAD = RelayRules(local=(LocalPattern("x.test", "g:1"),), reread=(Reread("b", "="),), default_backend="b")


def _ago(age: float) -> Session:
    return BASE._replace(mailbox_login=MailboxLogin("ann", NOW_S - age))


@pytest.mark.parametrize(
    ("rules", "one", "another"),
    [
        (RelayRules(trust=(OFFICE,)), BASE, BASE._replace(client=Client(ip_address("198.51.100.1"), 1))),
        (
            RelayRules(deny=(DenyEntry("g:1", network=OFFICE.network),)),
            BASE,
            BASE._replace(client=Client(ip_address("::1"), 1)),
        ),
        (RelayRules(deny=(DenyEntry("g:1", helo="*.bad.test"),)), BASE, BASE._replace(hello="a.bad.test")),
        (RelayRules(trust=(TrustEntry("g:1", listen="inside"),)), BASE, BASE._replace(listen="inside")),
        (RelayRules(trust=(replace(OFFICE, tls_minimum="1.2"),)), BASE, BASE._replace(tls="")),
        (
            RelayRules(trust=(TrustEntry("g:1", accounts=("ann",)),)),
            BASE,
            BASE._replace(identity=Identity("ann", "PLAIN")),
        ),
        (RelayRules(trust=(TrustEntry("g:1", host="h.test"),)), BASE, BASE._replace(hosts=("h.test",))),
        (RelayRules(deny=(DenyEntry("g:1", host="h.test"),)), BASE, BASE._replace(hosts=("h.test",))),
        (RelayRules(trust=(OFFICE,)), BASE, BASE._replace(auth_required=True)),
        (RelayRules(trust=(TrustEntry("g:1", certificate="ab"),)), BASE, BASE._replace(certificate="ab")),
        (RelayRules(trust=(OFFICE,)), BASE, BASE._replace(suspended=True)),
        (RelayRules(trust=(TrustEntry("g:1", listen="mx"),)), BASE, BASE._replace(listen_suspended=True)),
        (POP, BASE, _ago(599)),
        (POP, _ago(599), _ago(600)),
        (POP, _ago(1799), _ago(1800)),
        (POP, _ago(599), _ago(-2)),
    ],
)
def test_each_fact_that_decides_makes_a_class(rules, one, another):
    classes, path = Classes(rules), ForwardPath(Mailbox("a", "x.test"), Shape.PLAIN)
    rules = replace(rules, default_backend="b")
    verdicts = [_decided(rules, session, NULL_REVERSE_PATH, path) for session in (one, another)]
    assert verdicts[0] != verdicts[1]
    found = [(classes.session(session), classes.login(session, NOW_S)) for session in (one, another)]
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("rules", "one", "another"),
    [
        (REREAD, "a@x.test", "a=b@x.test"),
        (replace(REREAD, reread=()), "a@x.test", "a%b@x.test"),
        (REREAD, "a@x.test", "a@y.test"),
        (RelayRules(deny=(DenyEntry("g:1", forward_path=Pattern.parse("ann@*")),)), "bob@x.test", "ANN@x.test"),
        (
            RelayRules(deny=(DenyEntry("g:1", forward_path=Pattern.parse("\u00e4nn@*")),)),
            "bob@x.test",
            "\u00c4nn@x.test",
        ),
        (
            RelayRules(trust=(replace(OFFICE, forward_paths=(Pattern.parse("ann@x.test"),)),)),
            "bob@x.test",
            "Ann@x.test",
        ),
        (
            RelayRules(trust=(OFFICE,), routes=(Route("g:4", "other", (Pattern.parse("ann@x.test"),)),)),
            "bob@x.test",
            "ann@x.test",
        ),
        (REREAD, "a@x.test", "a@[192.0.2.9]"),
    ],
)
def test_each_forward_path_that_decides_makes_a_class(rules, one, another):
    rules = replace(rules, default_backend="b")
    classes = Classes(rules)
    paths = [_parsed(written) for written in (one, another)]
    verdicts = [_decided(rules, BASE, NULL_REVERSE_PATH, path) for path in paths]
    assert verdicts[0] != verdicts[1]
    assert classes.forward_path(paths[0]) != classes.forward_path(paths[1])


@pytest.mark.parametrize("pattern", ["ann@x.test", "ann@*", "ann@*.test", "\u00c4nn@x.test"])
def test_each_reverse_path_that_decides_makes_a_class(pattern):
    rules = RelayRules(trust=(replace(OFFICE, reverse_paths=(Pattern.parse(pattern),)),))
    classes = Classes(rules)
    named = Mailbox(pattern.partition("@")[0].upper(), "x.test")
    assert classes.reverse_path(named) != classes.reverse_path(Mailbox("bob", "x.test"))
    assert classes.reverse_path(NULL_REVERSE_PATH) != classes.reverse_path(Mailbox("bob", "x.test"))


def test_what_no_rule_names_is_one_class():
    rules = RelayRules(
        trust=(TrustEntry("g:1", network=ip_network("10.0.0.0/8"), reverse_paths=(Pattern.parse("ann@x.test"),)),)
    )
    classes = Classes(rules)
    strangers = [
        Session(f"{number:08}", Client(ip_address(f"192.0.2.{number}"), number), "mx", "mx", f"h{number}.test")
        for number in range(9)
    ]
    assert len({classes.session(one) for one in strangers}) == 1
    assert len({classes.forward_path(_parsed(Mailbox(f"user{number}", "x.test"))) for number in range(9)}) == 1
    assert len({classes.reverse_path(Mailbox(name, "x.test")) for name in ("ann", "ANN", "bob", "eve")}) == 3
