"""The relay policy: decision tables, and what must hold for any rules and any paths.

The tables are tests/decisions/relay.txt, to be read by whoever wants to know who may send where.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatepost.facts import Client, Identity, MailboxLogin, Session, Transaction
from gatepost.policy import relay
from gatepost.policy.relay import (
    MAILBOX_RATE,
    DenyEntry,
    LocalPattern,
    NetworkTable,
    RelayRules,
    Reread,
    Route,
    TrustEntry,
    decide,
    literal_text,
    local_domain,
    rate_check,
    who,
)
from gatepost.smtp.path import (
    NULL_REVERSE_PATH,
    POSTMASTER,
    ForwardPath,
    Mailbox,
    PathDefect,
    Pattern,
    ReversePath,
    Shape,
    parse_address_literal,
    parse_domain,
    parse_forward_path,
    parse_reverse_path,
)
from gatepost.smtp.reply import Reply
from gatepost.verdict import (
    Admit,
    AdmittedRecipient,
    Defer,
    Finding,
    LocalDomain,
    Reason,
    Refuse,
    RelayVerdict,
    Result,
    Trust,
)

T = TypeVar("T")

TABLES = Path(__file__).parent.parent / "decisions" / "relay.txt"


# ---- reading the tables


class Case(NamedTuple):
    """One line of a table."""

    rules: RelayRules
    client: str
    keys: dict[str, str]
    reverse_path: str
    forward_path: str
    expected: str


def patterns(text: str) -> tuple[Pattern, ...]:
    return tuple(Pattern.parse(one) for one in text.split(","))


def local_pattern(text: str) -> str:
    if text.startswith("["):
        return literal_text(parse_address_literal(text))
    return f"*.{parse_domain(text[2:])}" if text.startswith("*.") else parse_domain(text)


def trust_entry(words: list[str], where: str) -> TrustEntry:
    entry: dict[str, Any] = {}
    for key, value in (word.split("=", 1) for word in words):
        match key:
            case "network":
                entry[key] = ip_network(value)
            case "accounts":
                entry[key] = tuple(value.split(","))
            case "reverse_paths" | "forward_paths":
                entry[key] = patterns(value)
            case "expires":
                entry["expires_at"] = float(value)
            case "pop3":
                entry["pop3_s"] = float(value)
            case "shared":
                entry[key] = value == "true"
            case _:
                entry[key] = value
    return TrustEntry(where, **entry)


def deny_entry(words: list[str], where: str) -> DenyEntry:
    entry: dict[str, Any] = {}
    for key, value in (word.split("=", 1) for word in words):
        match key:
            case "network":
                entry[key] = ip_network(value)
            case "reverse_path" | "forward_path":
                entry[key] = Pattern.parse(value)
            case "expires":
                entry["expires_at"] = float(value)
            case "reply":
                code, status, wording = value.split("_", 2)
                entry[key] = Reply(int(code), wording.replace("_", " "), status)
            case _:
                entry[key] = value
    return DenyEntry(where, **entry)


def add_rule(rules: RelayRules, line: str) -> RelayRules:
    kind, *words = line.split()
    where = words.pop()[1:] if words and words[-1].startswith("@") else ""
    match kind:
        case "local":
            pattern = local_pattern(words[0])
            first = rules.postmaster_domain or (pattern if pattern[0] not in "*[" else "")
            return replace(rules, local=(*rules.local, LocalPattern(pattern, where)), postmaster_domain=first)
        case "trust":
            return replace(rules, trust=(*rules.trust, trust_entry(words, where)))
        case "deny":
            return replace(rules, deny=(*rules.deny, deny_entry(words, where)))
        case "route":
            texts, to, backend = words
            assert to == "to"
            named = ",".join(text for text in texts.split(",") if text != "local")
            route = Route(where, backend, patterns(named) if named else (), local="local" in texts.split(","))
            return replace(rules, routes=(*rules.routes, route))
        case "reread":
            backend, characters = words
            return replace(rules, reread=(*rules.reread, Reread(backend, characters)))
        case "recipients":
            return replace(rules, recipients_max=int(words[0]))
        case "backend":
            return replace(rules, default_backend=words[0] if words else "")
        case _:
            raise AssertionError(f"no such rule: {line}")


def cases() -> Iterator[Any]:
    rules = RelayRules()
    for number, written in enumerate(TABLES.read_text("utf-8").splitlines(), 1):
        line = written.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("rules:"):
            rules = RelayRules(default_backend="mail")
        elif "->" not in line:
            rules = add_rule(rules, line)
        else:
            said, expected = line.split(" -> ")
            facts, reverse_path, forward_path = (part.strip() for part in said.split("|", 2))
            client, *words = facts.split()
            keys = {key: value for key, _, value in (word.partition("=") for word in words)}
            case = Case(rules, client, keys, reverse_path, forward_path, expected.strip())
            yield pytest.param(case, id=f"{number}-{re.sub(r' +', ' ', expected)}")


def transaction_of(case: Case) -> Transaction:
    keys = case.keys
    session = Session(
        reference="REF",
        client=Client(ip_address(case.client), 4321),
        listen=keys.get("listen", "mx"),
        role="mx",
        hello=keys.get("helo", "client.test"),
        esmtp=True,
        tls=keys.get("tls", ""),
        identity=Identity(keys["account"], "PLAIN") if "account" in keys else None,
        hosts=tuple(keys["host"].split(",")) if "host" in keys else (),
        auth_required="auth" in keys,
        certificate=keys.get("certificate", ""),
        mailbox_login=MailboxLogin("alice", float(keys["login"])) if "login" in keys else None,
        suspended="suspended" in keys,
        listen_suspended="listen_suspended" in keys,
    )
    reverse_path = parse_reverse_path(case.reverse_path.encode(), smtputf8="utf8" in keys)
    assert not isinstance(reverse_path, PathDefect), case.reverse_path
    return Transaction(session, reverse_path, int(keys.get("recipients", "0")), float(keys.get("now", "0")))


def forward(text: str, *, smtputf8: bool = False) -> ForwardPath:
    path = parse_forward_path(text.encode(), smtputf8=smtputf8)
    assert not isinstance(path, PathDefect), text
    return path


def findings_of(case: Case) -> list[Finding]:
    used_up = case.keys["rate"].split(",") if "rate" in case.keys else []
    return [
        Finding(MAILBOX_RATE if one == "mailbox" else rate_check(one), Result.FAIL, "1000 in this hour")
        for one in used_up
    ]


def described(verdict: RelayVerdict) -> str:
    """A verdict in the words of the tables."""
    match verdict:
        case Admit(AdmittedRecipient(_, authority, backend)):
            kind = "local" if isinstance(authority, LocalDomain) else "trust"
            return f"admit {kind}@{authority.where} {backend}"
        case Defer(reason, where, _):
            return f"defer {reason.name.lower()}" + (f" @{where}" if where else "")
        case Refuse(reason, where, detail, reply):
            words = ["refuse", reason.name.lower(), f"@{where}" if where else "", detail]
            return " ".join([*filter(None, words), *([f"reply={reply.code}"] if reply else [])])


@pytest.mark.parametrize("case", list(cases()))
def test_decision(case: Case) -> None:
    path = forward(case.forward_path, smtputf8="utf8" in case.keys)
    verdict = decide(case.rules, transaction_of(case), path, findings_of(case))
    assert described(verdict) == case.expected
    # A finding that nobody asks for changes nothing; one that could not be made is not taken for a yes.
    others = [Finding("spf", Result.FAIL, ""), *(f._replace(result=Result.PASS) for f in findings_of(case))]
    assert decide(case.rules, transaction_of(case), path, [*findings_of(case), *others]) == verdict
    unknown = [finding._replace(result=Result.TEMPERROR) for finding in findings_of(case)]
    assert decide(case.rules, transaction_of(case), path, unknown) == verdict


@pytest.mark.parametrize("case", list(cases()))
def test_what_is_admitted_is_what_was_named(case: Case) -> None:
    path = forward(case.forward_path, smtputf8="utf8" in case.keys)
    verdict = decide(case.rules, transaction_of(case), path, findings_of(case))
    if isinstance(verdict, Admit):
        named = path.mailbox
        if named is POSTMASTER:
            named = Mailbox("postmaster", case.rules.postmaster_domain)
        assert verdict.recipient.forward_path.mailbox == named


def test_the_tables_name_every_reason_of_the_relay_policy() -> None:
    told = {case.values[0].expected.split()[1] for case in cases() if not case.values[0].expected.startswith("admit")}
    others = {"other_route", "send_as", "author"}  # the gate's, and those of policy/admission.py
    assert told == {reason.name.lower() for reason in Reason} - others
    shapes = {case.values[0].expected.split()[-1] for case in cases() if " routing " in case.values[0].expected}
    assert shapes == {"reread", *(shape.name.lower() for shape in Shape if shape.routing)}


def test_a_verdict_says_why() -> None:
    rules = RelayRules(
        local=(LocalPattern("*.example.com", "gatepost.toml:3"),),
        trust=(TrustEntry("gatepost.toml:9", "office LAN", "it@example.com", network=ip_network("10.1.0.0/16")),),
        default_backend="mail",
    )
    transaction = Transaction(session("10.1.2.3"), NULL_REVERSE_PATH, 0, 0.0)
    local = decide(rules, transaction, forward("<bob@mx.example.com>"))
    assert isinstance(local, Admit)
    assert local.recipient.authority == LocalDomain("*.example.com", "gatepost.toml:3")
    trusted = decide(rules, transaction, forward("<v@elsewhere.test>"))
    assert isinstance(trusted, Admit)
    assert trusted.recipient.authority == Trust(
        "network 10.1.0.0/16", "office LAN", "it@example.com", "gatepost.toml:9"
    )


def test_who_is_named_as_in_the_configuration() -> None:
    for entry, text in (
        (TrustEntry("x", network=ip_network("10.0.0.1/32")), "network 10.0.0.1/32"),
        (TrustEntry("x", host="home.dyn.test"), "host home.dyn.test"),
        (TrustEntry("x", listen="inside"), "listen inside"),
        (TrustEntry("x", accounts=("a", "b")), "accounts a, b"),
        (TrustEntry("x", certificate="ab" * 32), f"certificate {'ab' * 32}"),
        (TrustEntry("x", pop3_s=1800.0), "pop3 1800s"),
    ):
        assert who(entry) == text


def test_a_grant_that_the_client_does_not_claim_grants_nothing() -> None:
    rules = RelayRules(
        trust=(TrustEntry("1", certificate="ab" * 32), TrustEntry("2", pop3_s=60.0), TrustEntry("3")),
        default_backend="mail",
    )
    for address in ("10.0.0.1", "127.0.0.1", "::1"):
        one = session(address, account="", listen="", hosts=("",))
        assert decide(rules, Transaction(one, NULL_REVERSE_PATH, 0, 0.0), forward("<v@elsewhere.test>")) == Refuse(
            Reason.RELAYING
        )


def test_an_entry_with_two_who_keys_is_never_wider_than_its_first() -> None:
    rules = RelayRules(
        trust=(TrustEntry("1", network=ip_network("10.0.0.0/8"), accounts=("*",), listen="mx", host="h"),),
        default_backend="mail",
    )
    one = session("198.51.100.7", account="alice", listen="mx", hosts=("h",))
    assert relay.grants(rules, one) == []


# ---- what must hold for any rules and any paths

# A world is made from one number: quick to draw, and the number makes it again.
LOCALS = ["example.com", "*.example.com", "example.net", "*.sub.example.net", "[192.0.2.25]", "xn--mnchen-3ya.example"]
DOMAINS = [
    "example.com", "mx.example.com", "example.net", "a.sub.example.net", "sub.example.net", "elsewhere.test", "com",
    "net", "example.com.elsewhere.test", "[192.0.2.25]", "[192.0.2.26]", "[IPv6:::ffff:192.0.2.25]", "münchen.example",
    "xn--mnchen-3ya.example", "EXAMPLE.COM", "notexample.com",
]  # fmt: skip
LOCAL_PARTS = [
    "bob", "Bob", "v", "a%b", "b!a", '"a@elsewhere.test"', '"|x"', "postmaster", "bob+x", "=?x?q?y?=", "übel", "v＠x",
    '"*"', '"<>"', "imceasmtp-a+40b",
]  # fmt: skip
PATTERNS = [
    Pattern.parse(text)
    for text in (
        "*", "<>", "postmaster",
        *(f"{left}@{right}" for left in ("*", "bob", "v", "postmaster") for right in (
            "*", "example.com", "*.example.com", "elsewhere.test", "*.test", "[192.0.2.25]", "münchen.example")),
    )
]  # fmt: skip
ADDRESSES = list(map(ip_address, ["10.1.2.3", "198.51.100.7", "::1", "::ffff:10.1.2.3", "2001:db8::7"]))
NETWORKS = list(
    map(
        ip_network,
        ["10.0.0.0/8", "10.1.0.0/16", "198.51.100.7", "2001:db8::/32", "0.0.0.0/0", "::/0", "::ffff:10.0.0.0/104"],
    )
)
HOSTS = ["home.dyn.test", "bad.dyn.test"]
LINES = ["1", "2", "3"]
REVERSE_PATHS = ["<>", "<bob@example.com>", "<v@elsewhere.test>", '<"x y"@a.test>', "<a@[192.0.2.25]>", "<v@mx.x.test>"]
ALL_FINDINGS = [Finding(name, Result.FAIL, "") for name in (MAILBOX_RATE, *map(rate_check, LINES))]
SEVERITY = {Admit: 0, Defer: 1, Refuse: 2}


def session(address: str, account: str | None = None, **keys: Any) -> Session:
    identity = None if account is None else Identity(account, "PLAIN")
    return Session("REF", Client(ip_address(address), 1), **{"listen": "mx", "role": "mx", **keys}, identity=identity)


def parsed_reverse(text: str) -> ReversePath:
    path = parse_reverse_path(text.encode(), smtputf8=True)
    assert not isinstance(path, PathDefect)
    return path


class World:
    """Rules, a transaction, a forward-path and findings."""

    def __init__(self, seed: int, *, strangers: bool = False) -> None:
        self._random = Random(seed)
        self._strangers = strangers
        choice = self._random.choice
        self.rules = RelayRules(
            local=tuple(LocalPattern(choice(LOCALS), "9") for _ in range(choice(range(5)))),
            trust=self._several(self._trust),
            deny=self._several(self.deny) if choice((True, False)) else (),
            routes=self._several(self._route),
            recipients_max=choice((0, 1, 100)),
            default_backend=choice(("mail", "mail", "")),
            postmaster_domain=choice(("", "example.com")),
        )
        self.transaction = Transaction(
            session(
                str(choice(ADDRESSES)),
                choice((None, None, "alice", "*")),
                listen=choice(("mx", "inside")),
                hosts=tuple(self._random.sample(HOSTS, choice((0, 0, 1, 2)))),
                hello=choice(("", "spam.test", "a.x.test", "[10.1.2.3]", "x.test.", "A.X.TEST", ".", "\u0130")),
                tls=choice(("", "TLSv1.1", "TLSv1.3", "nonsense")),
                auth_required=choice((False, False, True)),
            ),
            parsed_reverse(choice(REVERSE_PATHS)),
            choice((0, 0, 1, 100)),
            choice((0.0, 5.0, 10.0)),
        )
        self.path = self._path()
        self.findings = self._random.sample(ALL_FINDINGS, choice((0, 0, 1, 3)))

    def _several(self, make: Callable[[], T]) -> tuple[T, ...]:
        return tuple(make() for _ in range(self._random.choice(range(4))))

    def _patterns(self) -> tuple[Pattern, ...]:
        return tuple(self._random.choice(PATTERNS) for _ in range(self._random.choice((0, 0, 1, 2))))

    def _expiry(self) -> float | None:
        return self._random.choice((None, None, 0.0, 5.0, 7.0))

    def _who(self) -> dict[str, Any]:
        choice = self._random.choice
        return choice(
            (
                {"network": choice(NETWORKS)},
                {"host": choice(HOSTS)},
                {"listen": choice(("mx", "inside"))},
                {"accounts": choice((("*",), ("alice",), ("bob", "alice")))},
            )
        )

    def _somebody_else(self) -> dict[str, Any]:
        return self._random.choice(
            (
                {"network": ip_network("10.99.0.0/16")},
                {"host": "other.dyn.test"},
                {"listen": "submission"},
                {"accounts": ("dave",)},
                {"certificate": "ab" * 32},
                {"pop3_s": 60.0},
            )
        )

    def _trust(self) -> TrustEntry:
        return TrustEntry(
            self._random.choice(LINES),
            expires_at=self._expiry(),
            reverse_paths=self._patterns(),
            forward_paths=self._patterns(),
            tls_minimum=self._random.choice(("", "", "1.2")),
            **(self._somebody_else() if self._strangers else self._who()),
        )

    def deny(self) -> DenyEntry:
        choice = self._random.choice
        who_: dict[str, Any] = choice(
            (
                {"network": choice(NETWORKS)},
                {"host": choice(HOSTS)},
                {"helo": choice(("spam.test", "*.test", "x.test"))},
                {"reverse_path": choice(PATTERNS)},
                {"forward_path": choice(PATTERNS)},
            )
        )
        return DenyEntry(str(self._random.randrange(1000)), expires_at=self._expiry(), **who_)

    def _route(self) -> Route:
        return Route(
            "7", self._random.choice(("one", "two")), self._patterns(), local=self._random.choice((True, False))
        )

    def _path(self) -> ForwardPath:
        choice = self._random.choice
        if self._random.random() < 0.1:
            return forward("<postmaster>")
        while True:
            octets = f"<{choice(('', '', '@x.test:'))}{choice(LOCAL_PARTS)}@{choice(DOMAINS)}>".encode()
            path = parse_forward_path(octets, smtputf8=True)
            if not isinstance(path, PathDefect):
                return path

    def decide(self, **changes: Any) -> RelayVerdict:
        rules = replace(self.rules, **changes)
        return decide(rules, self.transaction, self.path, self.findings)


worlds = st.integers(0, (1 << 48) - 1).map(World)
worlds_of_strangers = st.integers(0, (1 << 48) - 1).map(lambda seed: World(seed, strangers=True))
seeds = st.integers(0, (1 << 48) - 1)
often = settings(max_examples=400, deadline=None)


def test_the_worlds_are_rich() -> None:
    """Nothing below is vacuous: every outcome comes up among a few thousand."""
    told = {described(World(seed).decide()).split(" @")[0].split("@")[0] for seed in range(4000)}
    assert {"admit local", "admit trust", "refuse denied", "refuse relaying", "refuse narrowed"} <= told
    assert {"refuse expired_trust", "defer rate", "refuse no_route", "defer too_many_recipients"} <= told


@often
@given(seeds)
def test_a_decision_is_always_made_and_made_again(seed: int) -> None:
    world = World(seed)
    verdict = world.decide()
    assert isinstance(verdict, Admit | Defer | Refuse)
    assert World(seed).decide() == verdict
    if isinstance(verdict, Admit):
        backends = {world.rules.default_backend, *(route.backend for route in world.rules.routes)} - {""}
        assert verdict.recipient.backend in backends


@often
@given(seeds, st.binary(max_size=40), st.sampled_from(DOMAINS))
def test_a_decision_is_made_on_whatever_the_parser_lets_through(seed: int, local_part: bytes, domain: str) -> None:
    world = World(seed, strangers=True)
    for octets in (local_part, b'"' + local_part.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'):
        path = parse_forward_path(b"<" + octets + b"@" + domain.encode() + b">", smtputf8=True)
        if not isinstance(path, PathDefect):
            world.path = path
            verdict = world.decide()
            if isinstance(verdict, Admit):
                assert isinstance(path.mailbox, Mailbox)
                assert is_ours(world.rules, path.mailbox)
                assert not re.search(r"[%!@|,;:<>()\\\[\]\x00-\x20\x7f]", path.mailbox.local_part)


def is_ours(rules: RelayRules, mailbox: Mailbox) -> bool:
    """Whether an address is local, in the most literal reading of the configuration."""
    if not isinstance(mailbox.domain, str):
        address = mailbox.domain.address
        if isinstance(address, IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        return any(local.pattern == f"[{address}]" for local in rules.local)
    for local in rules.local:
        if local.pattern.startswith("*."):
            if mailbox.domain.endswith(local.pattern[1:]) and mailbox.domain != local.pattern[2:]:
                return True
        elif mailbox.domain == local.pattern:
            return True
    return False


@often
@given(worlds_of_strangers)
def test_a_stranger_is_admitted_to_our_domains_alone(world: World) -> None:
    verdict = world.decide()
    if isinstance(verdict, Admit):
        recipient = verdict.recipient
        assert isinstance(recipient.authority, LocalDomain)
        assert isinstance(recipient.forward_path.mailbox, Mailbox)
        assert is_ours(world.rules, recipient.forward_path.mailbox)
        assert not world.path.shape.routing


@often
@given(worlds)
def test_what_is_ours_is_found_as_it_is_read(world: World) -> None:
    mailbox = world.path.mailbox
    if isinstance(mailbox, Mailbox):
        assert (local_domain(world.rules, world.path) is not None) == is_ours(world.rules, mailbox)


@often
@given(worlds)
def test_a_reverse_path_confers_no_right(world: World) -> None:
    """Whatever passes with some reverse-path passes with any, once grants look at none and nothing is denied."""
    if isinstance(world.decide(deny=()), Admit):
        free = tuple(replace(entry, reverse_paths=()) for entry in world.rules.trust)
        for text in REVERSE_PATHS:
            world.transaction = world.transaction._replace(reverse_path=parsed_reverse(text))
            assert isinstance(world.decide(deny=(), trust=free), Admit)


@often
@given(worlds, st.integers(0, 3))
def test_a_deny_entry_never_lets_anything_through(world: World, at: int) -> None:
    before = world.decide()
    denies = world.rules.deny
    after = world.decide(deny=(*denies[:at], world.deny(), *denies[at:]))
    assert SEVERITY[type(after)] >= SEVERITY[type(before)]
    # A denied forward-path takes the routing characters from everybody: a backend might read it out of them.
    assert after == before or (isinstance(after, Refuse) and after.reason in (Reason.DENIED, Reason.ROUTING))


@often
@given(worlds, st.sampled_from(ALL_FINDINGS), st.sampled_from(Result))
def test_a_finding_never_makes_a_verdict_milder(world: World, finding: Finding, result: Result) -> None:
    before = world.decide()
    world.findings.append(finding._replace(result=result))
    assert SEVERITY[type(world.decide())] >= SEVERITY[type(before)]


@often
@given(worlds)
def test_narrowing_every_grant_to_nothing_leaves_our_domains(world: World) -> None:
    nobody = (Pattern.parse("nobody@nowhere.test"),)
    for how in ({"reverse_paths": nobody}, {"forward_paths": nobody}, {"expires_at": 0.0}):
        trust = tuple(replace(entry, **how) for entry in world.rules.trust)
        verdict = world.decide(trust=trust)
        assert verdict == world.decide(trust=()) or isinstance(verdict, Refuse | Defer)
        if isinstance(verdict, Admit):
            assert isinstance(verdict.recipient.authority, LocalDomain)


@often
@given(worlds)
def test_rules_are_found_as_a_walk_through_the_file_finds_them(world: World) -> None:
    rules, transaction, path = world.rules, world.transaction, world.path
    one = transaction.session
    hello = one.hello.lower().rstrip(".")

    def in_force(expires_at: float | None) -> bool:
        return expires_at is None or transaction.now < expires_at

    def names_client(entry: TrustEntry | DenyEntry) -> bool:
        if entry.network is not None:
            return plain(one.client.address) in unmapped(entry.network)
        return entry.host in one.hosts

    def denies(entry: DenyEntry) -> bool:
        if entry.helo:
            return hello.endswith(entry.helo[1:]) if entry.helo.startswith("*.") else hello == entry.helo
        if entry.reverse_path is not None:
            return entry.reverse_path.matches(transaction.reverse_path)
        return names_client(entry)

    def trusts(entry: TrustEntry) -> bool:
        if entry.listen:
            return entry.listen == one.listen
        if entry.accounts:
            return one.identity is not None and bool({one.identity.account, "*"} & set(entry.accounts))
        return names_client(entry)

    first = next((entry for entry in rules.deny if denies(entry) and in_force(entry.expires_at)), None)
    found = relay.denied(rules, transaction)
    assert (found and found.where) == (first and first.where)
    assert relay.grants(rules, one) == [entry for entry in rules.trust if trusts(entry)]
    verdict = world.decide()
    if any(d.forward_path and d.forward_path.matches(path) and in_force(d.expires_at) for d in rules.deny):
        assert isinstance(verdict, Refuse)
        assert verdict.reason is Reason.DENIED
    if isinstance(verdict, Admit):
        recipient = verdict.recipient
        is_local = local_domain(rules, recipient.forward_path) is not None
        way = next(
            (
                route.backend
                for route in rules.routes
                if (route.local and is_local) or any(p.matches(recipient.forward_path) for p in route.forward_paths)
            ),
            rules.default_backend,
        )
        assert recipient.backend == way


# ---- networks


def unmapped(network: relay.IPNetwork) -> relay.IPNetwork:
    """::ffff:10.0.0.0/104 is 10.0.0.0/8."""
    if isinstance(network, IPv6Network) and network.subnet_of(IPv6Network("::ffff:0:0/96")):
        return IPv4Network((int(network.network_address) & 0xFFFFFFFF, network.prefixlen - 96))
    return network


def plain(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """::ffff:10.0.0.1 is 10.0.0.1."""
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


addresses4 = st.integers(0, (1 << 32) - 1).map(IPv4Address)
addresses6 = st.one_of(
    st.integers(0, (1 << 128) - 1), st.integers(0, 1 << 34).map(lambda n: 0xFFFF00000000 + n - (1 << 33))
).map(IPv6Address)


def around(address: IPv4Address | IPv6Address, length: int) -> relay.IPNetwork:
    return (
        ip_network((int(address), length), strict=False)
        if address.version == 4
        else ip_network(f"{address}/{length}", strict=False)
    )


networks = st.one_of(
    st.builds(around, addresses4, st.integers(0, 32)), st.builds(around, addresses6, st.integers(0, 128))
)


@settings(max_examples=200, deadline=None)
@given(st.lists(networks, max_size=12), st.lists(st.one_of(addresses4, addresses6), max_size=5), st.data())
def test_a_network_table_finds_what_a_walk_finds(
    all_networks: list[relay.IPNetwork], addresses: list[IPv4Address | IPv6Address], data: st.DataObject
) -> None:
    table: NetworkTable[int] = NetworkTable()
    for number, one in enumerate(all_networks):
        table.add(one, number)
    if all_networks:  # addresses at the edges of the networks, not only beside all of them
        one = data.draw(st.sampled_from(all_networks))
        edges = {int(one.network_address), int(one.broadcast_address)}
        kind = IPv4Address if one.version == 4 else IPv6Address
        top = (1 << one.max_prefixlen) - 1
        addresses = [*addresses, *(kind(n) for e in edges for n in (e - 1, e, e + 1) if 0 <= n <= top)]
    for address in addresses:
        expected = [number for number, one in enumerate(all_networks) if plain(address) in unmapped(one)]
        assert sorted(table.matching(address)) == expected


@pytest.mark.parametrize("kind", ["trust", "deny", "route", "local", "narrowing"])
def test_a_decision_looks_at_as_many_rules_among_ten_thousand_as_among_ten(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not timed: which rules and patterns a decision touches."""
    touched = 0

    def rules_with(count: int) -> RelayRules:
        many = range(count)
        rules = RelayRules((LocalPattern("example.com", "1"),), default_backend="mail")
        match kind:
            case "trust":
                return replace(rules, trust=tuple(TrustEntry(str(n), network=ip_network((n << 8, 24))) for n in many))
            case "deny":
                return replace(
                    rules,
                    deny=tuple(DenyEntry(str(n), reverse_path=Pattern.parse(f"*@d{n}.test")) for n in many)
                    + tuple(DenyEntry(str(n), network=ip_network((n << 8, 24))) for n in many),
                )
            case "route":
                return replace(rules, routes=tuple(Route(str(n), "x", patterns(f"*@d{n}.test")) for n in many))
            case "local":
                return replace(rules, local=tuple(LocalPattern(f"*.d{n}.test", str(n)) for n in many))
            case _:
                wide = tuple(Pattern.parse(f"*@d{n}.test") for n in many)
                return replace(rules, trust=(TrustEntry("2", network=ip_network("0.0.0.0/0"), forward_paths=wide),))

    class Counting(dict[Any, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            nonlocal touched
            touched += 1
            return super().get(key, default)

    def counted(rules: RelayRules) -> tuple[int, str]:
        nonlocal touched
        index = rules.index
        for table in (index.trust_networks, index.deny_networks):
            table._v4 = Counting({shift: Counting(prefixes) for shift, prefixes in table._v4.items()})
        for paths in (index.deny_reverse_paths, index.deny_forward_paths, index.routes):
            paths._numbers = Counting(paths._numbers)
        index.local_exact, index.local_below = Counting(index.local_exact), Counting(index.local_below)
        touched = 0
        transaction = Transaction(session("198.51.100.7"), parsed_reverse("<a@sender.test>"), 0, 0.0)
        return touched, described(decide(rules, transaction, forward("<v@mx.d7.test>")))

    def no_walk(_pattern: Pattern, _path: object) -> bool:
        raise AssertionError("a pattern was compared by itself")

    monkeypatch.setattr(Pattern, "matches", no_walk)
    few, many = rules_with(10), rules_with(10_000)
    assert counted(few)[1] == counted(many)[1]
    touched_by_few = (counted(few), touched)[1]
    touched_by_many = (counted(many), touched)[1]
    assert touched_by_few == touched_by_many < 40


# ---- the file itself


def test_the_policy_has_one_place_that_says_yes() -> None:
    tree = ast.parse(Path(relay.__file__).read_text("utf-8"))
    makers = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "AdmittedRecipient"]
    assert len(makers) == 1
