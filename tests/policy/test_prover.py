"""The prover: what counts as open, the dialogue that shows it, and the partition held against random questions."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from random import Random
from typing import Any

import pytest
from tests.policy.test_relay import described

from gatepost.facts import Client, Identity, MailboxLogin, Session, Transaction
from gatepost.policy import prover
from gatepost.policy.extent import Extent, public_extent
from gatepost.policy.partition import NOBODY, Partition
from gatepost.policy.prover import Listener, Proof, openings, prove, replay
from gatepost.policy.relay import DenyEntry, LocalPattern, RelayRules, Reread, Route, TrustEntry, decide
from gatepost.smtp.path import (
    NULL_REVERSE_PATH,
    ForwardPath,
    PathDefect,
    Pattern,
    ReversePath,
    Shape,
    parse_forward_path,
    parse_reverse_path,
)
from gatepost.verdict import Admit, Reason, Refuse

ALLOWED = 65536
MX = Listener("mx", "gatepost.toml:3", "mx", (ip_address("0.0.0.0"),), tls="starttls")
INSIDE = Listener("inside", "gatepost.toml:7", "inside", (ip_address("10.1.0.1"),))


def patterns(*texts: str) -> tuple[Pattern, ...]:
    return tuple(map(Pattern.parse, texts))


def network(text: str, where: str = "t:1", **keys: Any) -> TrustEntry:
    return TrustEntry(where, network=ip_network(text), **keys)


def rules(*trust: TrustEntry, local: tuple[str, ...] = ("example.com",), **keys: Any) -> RelayRules:
    return RelayRules(
        local=tuple(LocalPattern(pattern, f"l:{n}") for n, pattern in enumerate(local)),
        trust=trust,
        default_backend="mail",
        postmaster_domain="example.com",
        **keys,
    )


def found(given: RelayRules, *listeners: Listener, allowed: int = ALLOWED) -> tuple[prover.Opening, ...]:
    return openings(given, listeners or (MX,), allowed, 0.0)


# --- What is open -----------------------------------------------------------------------------------------------------

HELLO = "EHLO stranger.invalid"
NULL = "MAIL FROM:<>"
ELSEWHERE = "RCPT TO:<user@elsewhere.invalid>"

OPEN = {
    "all of IPv4": (rules(network("0.0.0.0/0")), (MX,), "1.0.0.1", (HELLO, NULL, ELSEWHERE)),
    "all of IPv4 in two halves": (
        rules(network("0.0.0.0/1"), network("128.0.0.0/1")), (MX,), "1.0.0.1", (HELLO, NULL, ELSEWHERE),
    ),
    "all of IPv4 as mapped addresses": (
        rules(network("::ffff:0:0/96")), (MX,), "1.0.0.1", (HELLO, NULL, ELSEWHERE),
    ),
    "mapped addresses in two halves": (
        rules(network("::ffff:0:0/97"), network("::ffff:128.0.0.0/97")), (MX,), "1.0.0.1", (HELLO, NULL, ELSEWHERE),
    ),
    "all of IPv6": (rules(network("::/0")), (MX,), "2000::1", (HELLO, NULL, ELSEWHERE)),
    "all of IPv6 in two halves": (
        rules(network("::/1"), network("8000::/1")), (MX,), "2000::1", (HELLO, NULL, ELSEWHERE),
    ),
    "more than a /32 of IPv6": (
        rules(network("2a00::/32"), network("2a01::/48")), (MX,), "2a00::1", (HELLO, NULL, ELSEWHERE),
    ),
    "more than 65,536 addresses in pieces": (
        rules(network("8.0.0.0/16"), network("9.1.1.1/32")), (MX,), "8.0.0.1", (HELLO, NULL, ELSEWHERE),
    ),
    "behind a narrowing of the reverse-path": (
        rules(network("0.0.0.0/0", reverse_paths=patterns("*@example.com"))),
        (MX,),
        "1.0.0.1",
        (HELLO, "MAIL FROM:<user@example.com>", ELSEWHERE),
    ),
    "behind a narrowing to bounces": (
        rules(network("0.0.0.0/0", reverse_paths=patterns("<>"))), (MX,), "1.0.0.1", (HELLO, NULL, ELSEWHERE),
    ),
    "behind TLS": (
        rules(network("0.0.0.0/0", tls_minimum="1.2")), (MX,), "1.0.0.1", (HELLO, "STARTTLS", HELLO, NULL, ELSEWHERE),
    ),
    "to one mailbox of every domain": (
        rules(network("0.0.0.0/0", forward_paths=patterns("anna@*"))),
        (MX,),
        "1.0.0.1",
        (HELLO, NULL, "RCPT TO:<anna@elsewhere.invalid>"),
    ),
    "to a whole top-level domain": (
        rules(network("0.0.0.0/0", forward_paths=patterns("*@*.com"))),
        (MX,),
        "1.0.0.1",
        (HELLO, NULL, "RCPT TO:<user@elsewhere.com>"),
    ),
    "with a piece that is denied": (
        rules(network("0.0.0.0/0"), deny=(DenyEntry("d:1", network=ip_network("1.0.0.0/8")),)),
        (MX,),
        "2.0.0.1",
        (HELLO, NULL, ELSEWHERE),
    ),
    "with all of it denied for a while": (
        rules(
            network("0.0.0.0/0"),
            deny=(DenyEntry("d:1", network=ip_network("0.0.0.0/0"), expires_at=9.0), DenyEntry("d:2", helo="x.test")),
        ),
        (MX,),
        "1.0.0.1",
        (HELLO, NULL, ELSEWHERE),
    ),
    "with the usual names of strangers denied": (
        rules(
            network("0.0.0.0/0"),
            deny=(DenyEntry("d:1", helo="*.invalid"), DenyEntry("d:2", reverse_path=Pattern.parse("<>"))),
        ),
        (MX,),
        "1.0.0.1",
        ("EHLO stranger.nowhere", "MAIL FROM:<user@elsewhere.invalid>", ELSEWHERE),
    ),
    "a top-level domain as ours": (
        rules(local=("example.com", "*.com")), (MX,), "1.0.0.1", (HELLO, NULL, "RCPT TO:<user@elsewhere.com>"),
    ),
    "routing characters alone, where other domains have no backend": (
        replace(rules(network("0.0.0.0/0"), routes=(Route("r:1", "mail", local=True),)), default_backend=""),
        (MX,),
        "1.0.0.1",
        (HELLO, NULL, "RCPT TO:<user%hop.invalid@example.com>"),
    ),
    "a trusted listener at every address": (
        rules(TrustEntry("t:1", listen="mx")), (MX,), "1.0.0.1", (HELLO, NULL, ELSEWHERE),
    ),
    "a trusted listener of ours at a public address": (
        rules(TrustEntry("t:1", listen="inside")),
        (INSIDE._replace(addresses=(ip_address("8.8.8.8"),)),),
        "1.0.0.1",
        (HELLO, NULL, ELSEWHERE),
    ),
    "a trusted listener behind a proxy": (
        rules(TrustEntry("t:1", listen="mx")),
        (MX._replace(addresses=(ip_address("127.0.0.1"),), proxied=True),),
        "1.0.0.1",
        (HELLO, NULL, ELSEWHERE),
    ),
    "a trusted listener while another one demands a login": (
        rules(TrustEntry("t:1", listen="mx")),
        (INSIDE._replace(auth_required=True), MX),
        "1.0.0.1",
        (HELLO, NULL, ELSEWHERE),
    ),
    "a trusted listener that speaks TLS from the first octet": (
        rules(TrustEntry("t:1", listen="mx", tls_minimum="1.3")),
        (MX._replace(tls="implicit"),),
        "1.0.0.1",
        (HELLO, NULL, ELSEWHERE),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPEN)
def test_what_is_open_is_shown_by_a_dialogue_that_relays(name):
    given, listeners, client, commands = OPEN[name]
    opened = found(given, *listeners)
    assert opened
    proof = prove(given, listeners, ALLOWED, 0.0)
    for opening in opened:
        played = replay(proof.opened, opening.dialogue, 0.0)
        assert [exchange.command for exchange in played] == list(opening.dialogue.commands)
        assert played[-1].reply.startswith("250 "), played
    assert not proof.proven
    assert proof.openings == opened
    assert proof.shortest is not None
    assert (str(proof.shortest.client), proof.shortest.commands) == (client, commands)
    assert proof.shortest.listener in listeners


CLOSED = {
    "nobody is trusted": (rules(), (MX,)),
    "a company's /24": (rules(network("8.8.8.0/24")), (MX,)),
    "exactly as much as is allowed": (rules(network("8.0.0.0/16"), network("2a00::/32")), (MX,)),
    "the same addresses twice": (rules(network("8.0.0.0/16"), network("8.0.0.0/17")), (MX,)),
    "many pieces of one site": (rules(*(network(f"2a00:0:0:{n:x}::/64") for n in range(70))), (MX,)),
    "addresses that no stranger has": (
        rules(*map(network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "fc00::/7", "fe80::/10"))),
        (MX,),
    ),
    "what has expired": (rules(network("0.0.0.0/0", expires_at=0.0)), (MX,)),
    "named domains alone": (
        rules(network("0.0.0.0/0", forward_paths=patterns("*@partner.test", "*@*.partner.test"))), (MX,),
    ),
    "a listener narrowed to named domains": (
        rules(TrustEntry("t:1", listen="mx", forward_paths=patterns("*@partner.test"))), (MX,),
    ),
    "a trusted listener inside": (rules(TrustEntry("t:1", listen="inside")), (MX, INSIDE)),
    "a trusted listener on the loopback": (
        rules(TrustEntry("t:1", listen="mx")), (MX._replace(addresses=(ip_address("127.0.0.1"), ip_address("::1"))),),
    ),
    "a trusted listener that demands a login": (
        rules(TrustEntry("t:1", listen="mx")), (MX._replace(auth_required=True), INSIDE),
    ),
    "the world, which must log in": (rules(network("0.0.0.0/0")), (MX._replace(auth_required=True),)),
    "the world over TLS, which nothing here speaks": (
        rules(network("0.0.0.0/0", tls_minimum="1.2")), (MX._replace(tls="none"),),
    ),
    "the world, all of it denied": (
        rules(network("0.0.0.0/0"), deny=(DenyEntry("d:1", network=ip_network("0.0.0.0/0")),)), (MX,),
    ),
    "whoever logged in, shows a certificate, has read mail or a name": (
        rules(
            TrustEntry("t:1", accounts=("*",)),
            TrustEntry("t:2", certificate="ab" * 32),
            TrustEntry("t:3", pop3_s=1800.0),
            TrustEntry("t:4", host="home.dyn.test"),
        ),
        (MX,),
    ),
    "names inside": (rules(local=("example.com", "*.lan", "localhost")), (MX,)),
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSED)
def test_what_is_closed_is_proven(name):
    given, listeners = CLOSED[name]
    assert found(given, *listeners) == ()
    proof = prove(given, listeners, ALLOWED, 0.0)
    assert proof.proven
    assert proof.shortest is None
    assert proof.decisions > 0


def test_the_bound_is_kept_at_one_below_at_and_one_above():
    for text, size in (("8.0.0.0/24", 256), ("2a00::/40", 256)):
        given = rules(network(text))
        assert len(found(given, allowed=size - 1)) == 1
        assert found(given, allowed=size) == ()
        assert found(given, allowed=size + 1) == ()


def test_each_network_that_is_too_wide_is_told_and_the_widest_where_none_is():
    each = found(rules(network("0.0.0.0/1"), network("8.8.8.0/24"), network("2000::/3")))
    assert [(one.rule, one.number) for one in each] == [("network", 0), ("network", 2)]
    assert each[0].sentence == (
        f"0.0.0.0/1 holds {(1 << 31) - (3 << 24) - (1 << 22):,} public addresses, whose users may send anywhere; "
        "name your own networks ([gate] public_trust allows 65,536)"
    )
    assert "2000::/3 holds 35,184,372,023,296 public IPv6 sites (/48), whose users" in each[1].sentence
    (together,) = found(rules(network("8.0.0.0/17"), network("9.0.0.0/16")))
    assert together.number == 1
    assert together.sentence.startswith("the networks in [[trust]] hold 98,304 public addresses together; ")
    (narrow,) = found(rules(network("0.0.0.0/0", forward_paths=patterns("*@partner.test")), network("8.0.0.0/8")))
    assert narrow.number == 1, "the wide one leads to one partner only"


def test_a_denial_that_expires_is_no_proof():
    (opening,) = found(OPEN["with all of it denied for a while"][0])
    assert opening.sentence.endswith("; what keeps strangers out now is a [[deny]] entry that expires")
    (unkept,) = found(rules(network("0.0.0.0/0"), deny=(DenyEntry("d:1", helo="x.test", expires_at=9.0),)))
    assert "expires" not in unkept.sentence
    assert found(rules(deny=(DenyEntry("d:1", helo="x.test", expires_at=9.0),))) == ()


def test_a_dialogue_is_the_shortest_and_fits_its_listener():
    given = rules(network("0.0.0.0/0", tls_minimum="1.2"), network("2000::/3"))
    proof = prove(given, (INSIDE, MX), ALLOWED, 0.0)
    assert [len(one.dialogue.commands) for one in proof.openings] == [5, 3]
    assert proof.shortest == proof.openings[1].dialogue
    assert {one.dialogue.listener for one in proof.openings} == {MX}


def test_a_dialogue_in_utf8_says_so():
    given = rules(network("0.0.0.0/0", forward_paths=patterns("überall@*")))
    (opening,) = found(given)
    assert opening.dialogue.commands[1:] == ("MAIL FROM:<> SMTPUTF8", "RCPT TO:<überall@elsewhere.invalid>")
    assert replay(given, opening.dialogue, 0.0)[-1].reply == "250 2.1.5 Recipient OK"


def test_a_replay_tells_a_refusal_as_the_client_sees_it():
    (opening,) = found(rules(network("0.0.0.0/0")))
    assert [exchange.reply for exchange in replay(rules(), opening.dialogue, 0.0)] == [
        "250 Hello",
        "250 2.1.0 Sender OK",
        "550 5.7.1 Relaying is prohibited",
    ]
    assert replay(rules(), opening.dialogue._replace(hello="x" * 5000), 0.0)[0].reply == "500 5.5.2 Line too long"
    routed = parse_forward_path(b"<@hop.test:user@example.com>", smtputf8=False)
    assert isinstance(routed, ForwardPath)
    assert opening.dialogue._replace(forward_path=routed).commands[-1] == "RCPT TO:<@hop.invalid:user@example.com>"


# --- How much is public -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "addresses", "sites"),
    [
        ("8.8.8.8/32", 1, 0),
        ("8.8.8.0/24", 256, 0),
        ("10.0.0.0/8", 0, 0),
        ("8.0.0.0/6", 3 << 24, 0),
        ("::ffff:8.8.8.0/120", 256, 0),
        ("2a00::/32", 0, 65536),
        ("2a00::/49", 0, 1),
        ("2a00::1/128", 0, 1),
        ("2a00::/47", 0, 2),
        ("2001:db8::/32", 0, 0),
        ("2001:db8::/31", 0, 65536),
        ("fd00::/8", 0, 0),
    ],
)
def test_public_space_is_counted_in_addresses_and_sites(text, addresses, sites):
    assert public_extent(ip_network(text)) == Extent(addresses, sites)


def test_an_extent_in_words():
    assert str(Extent(1, 0)) == "1 public address"
    assert str(Extent(0, 1)) == "1 public IPv6 site (/48)"
    assert str(Extent(2, 3)) == "2 public addresses and 3 public IPv6 sites (/48)"
    assert str(Extent()) == "0 public addresses"


# --- The partition ----------------------------------------------------------------------------------------------------


def test_every_shape_is_asked_and_the_parser_gives_it():
    asked = Partition(rules(local=("example.com", "[192.0.2.25]", "*.example.net")), 0.0).forwards
    assert {one.path.shape for one in asked} == set(Shape)
    for one in asked:
        route = b"@hop.invalid:" if one.path.shape is Shape.ROUTE else b""
        assert parse_forward_path(b"<%b%b>" % (route, one.path.octets), smtputf8=True) == one.path


def test_strangers_are_asked_for_each_domain_in_each_shape():
    proof = prove(rules(local=tuple(f"d{n}.test" for n in range(50))), (MX,), ALLOWED, 0.0)
    # 50 domains, a foreign one and a foreign literal in 7 shapes each, and bare postmaster.
    assert proof.forward_paths == 52 * 7 + 1
    assert proof.decisions >= proof.forward_paths


def test_domains_that_could_be_mistaken_for_a_witness_are_no_witness():
    given = rules(
        network("0.0.0.0/0", forward_paths=patterns("user@elsewhere.invalid", "*@*.invalid", "user2@partner.test")),
        local=("stranger.invalid", "elsewhere.invalid", "elsewhere.example.com", "*.example.com", "[192.0.2.213]"),
    )
    assert [(one.rule, one.number) for one in found(given)] == []
    named = Partition(given, 0.0)
    assert any(not one.kind.named for one in named.forwards)


def test_a_wrong_partition_is_never_a_proof(monkeypatch):
    """Were two questions of one class to have two answers, nobody would be told that all is well."""
    answers = iter(range(10**9))
    real = decide

    def moody(*question):
        return real(*question) if next(answers) % 2 else Refuse(Reason.RELAYING)

    monkeypatch.setattr(prover, "decide", moody)
    with pytest.raises(RuntimeError, match="two questions of one class have two answers"):
        prove(rules(), (MX,), ALLOWED, 0.0)


def test_classes_with_the_same_entries_are_one():
    """The work is bounded in decisions: 1,000 grants and 1,000 domains."""
    local = tuple(f"d{n}.example.com" for n in range(1000))
    plain = rules(*(network(f"10.{n % 250}.{n // 250}.0/24") for n in range(1000)), local=local)
    proof = prove(plain, (MX, INSIDE), ALLOWED, 0.0)
    assert (proof.standings, proof.forward_paths) == (1001, 1002 * 7 + 1)
    assert proof.decisions < 15_000
    narrowed = rules(
        *(
            network(
                f"10.{n % 250}.{n // 250}.0/24",
                reverse_paths=patterns(f"*@d{n}.example.com"),
                forward_paths=patterns(f"*@p{n}.test", f"*@*.p{n}.test"),
            )
            for n in range(1000)
        ),
        local=local,
    )
    assert prove(narrowed, (MX, INSIDE), ALLOWED, 0.0).decisions < 60_000


# --- Against random questions -----------------------------------------------------------------------------------------

QUESTIONS = 100_000
CONFIGURATIONS = 500

LOCALS = ("example.com", "*.example.com", "example.net", "*.sub.example.net", "[192.0.2.25]", "*.test", "com")
RIGHTS = ("*", "example.com", "*.example.com", "partner.test", "*.test", "*.partner.test", "[192.0.2.25]", "*.com")
LEFTS = ("*", "*", "bob", "anna", "postmaster", '"a%b"', "a+b")
PATTERNS = [Pattern.parse(text) for text in ("*", "<>", "postmaster", *(f"{a}@{b}" for a in LEFTS for b in RIGHTS))]
NETWORKS = [
    ip_network(text)
    for text in (
        "10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "198.51.100.7", "8.0.0.0/5", "0.0.0.0/0", "0.0.0.0/1",
        "128.0.0.0/1", "::/0", "2001:db8::/32", "2a00::/16", "2a00:1::/48", "::ffff:10.0.0.0/104", "::ffff:0:0/96",
        "::fffe:0:0/95",
    )
]  # fmt: skip
HOSTS = ("home.dyn.test", "bad.dyn.test")
ACCOUNTS = ("alice", "bob", "carol")
CERTIFICATES = ("ab" * 32, "cd" * 32)
LISTENERS = (MX, INSIDE, Listener("submission", "gatepost.toml:11", "submission", MX.addresses, auth_required=True))
DOMAINS = (
    "example.com", "mx.example.com", "a.b.example.com", "example.net", "x.sub.example.net", "sub.example.net", "com",
    "partner.test", "mx.partner.test", "other.test", "foreign.org", "notexample.com", "other.com", "[192.0.2.25]",
    "[192.0.2.26]", "[IPv6:::ffff:192.0.2.25]", "[IPv6:2001:db8::1]",
)  # fmt: skip
LOCAL_PARTS = (
    "bob", "Bob", "v", "anna", "a%b", "v%x", "b!a", '"a@b"', '"|x"', "postmaster", "=?x?q?y?=", '"*"', "user", "-x",
    "a+b", "v=x.test", "x/v",
)  # fmt: skip
FORWARDS: list[ForwardPath] = []
for _route in ("", "@x.test:"):
    for _left in LOCAL_PARTS:
        for _right in DOMAINS:
            _path = parse_forward_path(f"<{_route}{_left}@{_right}>".encode(), smtputf8=True)
            assert not isinstance(_path, PathDefect)
            FORWARDS.append(_path)
_path = parse_forward_path(b"<postmaster>", smtputf8=False)
assert isinstance(_path, ForwardPath)
FORWARDS += [_path] * 20
REVERSES: list[ReversePath] = [NULL_REVERSE_PATH]
for _right in DOMAINS:
    for _left in ("bob", "v", '"*"', "postmaster"):
        _reverse = parse_reverse_path(f"<{_left}@{_right}>".encode(), smtputf8=False)
        assert not isinstance(_reverse, PathDefect)
        REVERSES.append(_reverse)
NOW = 1000.0


class Dice:
    """Random configurations and random questions, from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.choice = self.random.choice

    def patterns(self) -> tuple[Pattern, ...]:
        return tuple(self.choice(PATTERNS) for _ in range(self.choice((0, 0, 1, 2))))

    def expiry(self) -> float | None:
        return self.choice((None, None, None, 500.0, 1000.0, 1500.0))

    def rules(self) -> RelayRules:
        choice = self.choice
        return RelayRules(
            local=tuple(LocalPattern(choice(LOCALS), f"l:{n}") for n in range(choice(range(4)))),
            trust=tuple(self.trust(n) for n in range(choice(range(7)))),
            deny=tuple(self.deny(n) for n in range(choice((0, 0, 1, 2, 4)))),
            routes=tuple(
                Route(f"r:{n}", choice(("one", "two")), self.patterns(), local=choice((True, False)))
                for n in range(choice((0, 0, 1, 2)))
            ),
            recipients_max=choice((0, 100)),
            default_backend=choice(("mail", "mail", "")),
            postmaster_domain=choice(("", "example.com", "example.com", "partner.test")),
            reread=tuple(
                Reread(choice(("mail", "mail", "one")), choice(("+", "=", "=+/"))) for _ in range(choice((0, 0, 1, 2)))
            ),
        )

    def trust(self, number: int) -> TrustEntry:
        choice = self.choice
        who: dict[str, Any] = choice(
            (
                {"network": choice(NETWORKS)},
                {"network": choice(NETWORKS)},
                {"host": choice(HOSTS)},
                {"listen": choice(LISTENERS).name},
                {"accounts": choice((("*",), ("alice",), ("bob", "alice")))},
                {"certificate": choice(CERTIFICATES)},
                {"pop3_s": choice((60.0, 600.0))},
            )
        )
        return TrustEntry(
            f"t:{number}",
            expires_at=self.expiry(),
            reverse_paths=self.patterns(),
            forward_paths=self.patterns(),
            tls_minimum=choice(("", "", "", "1.0", "1.2", "1.3")),
            **who,
        )

    def deny(self, number: int) -> DenyEntry:
        choice = self.choice
        who: dict[str, Any] = choice(
            (
                {"network": choice(NETWORKS)},
                {"host": choice(HOSTS)},
                {"helo": choice(("spam.test", "*.test", "*.x.test", "[10.1.2.3]"))},
                {"reverse_path": choice(PATTERNS)},
                {"forward_path": choice(PATTERNS)},
            )
        )
        return DenyEntry(f"d:{number}", expires_at=self.expiry(), **who)

    def address(self) -> IPv4Address | IPv6Address:
        """Near the edges more often than not."""
        if self.random.random() < 0.2:
            size = self.choice((32, 128))
            number = self.random.getrandbits(size)
            return IPv4Address(number) if size == 32 else IPv6Address(number)
        one = self.choice(NETWORKS)
        edge = int(self.choice((one.network_address, one.broadcast_address))) + self.choice((-1, 0, 1))
        edge = min(max(edge, 0), int(one.broadcast_address) if one.prefixlen == 0 else (1 << one.max_prefixlen) - 1)
        return IPv4Address(edge) if one.version == 4 else IPv6Address(edge)

    def transaction(self) -> Transaction:
        choice = self.choice
        listener = choice(LISTENERS)
        known = self.random.random() < 0.5
        session = Session(
            "REF",
            Client(self.address(), 1),
            listen=listener.name,
            role=listener.role,
            hello=choice(("", "spam.test", "a.x.test", "x.test.", "[10.1.2.3]", "A.X.TEST", "mail.foreign.org", ".")),
            tls=choice(("", "TLSv1.0", "TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3", "nonsense")),
            identity=choice((None, Identity(choice((*ACCOUNTS, "*")), "PLAIN"))) if known else None,
            hosts=tuple(self.random.sample(HOSTS, choice((0, 0, 1, 2)))) if known else (),
            certificate=choice(("", *CERTIFICATES, "ef" * 32)) if known else "",
            mailbox_login=choice((None, MailboxLogin("x", NOW - choice((-9, -1, 0, 59, 60, 599, 600)))))
            if known
            else None,
            auth_required=listener.auth_required,
        )
        return Transaction(session, choice(REVERSES), 0, NOW)


def predicted(proof: Proof, partition: Partition, transaction: Transaction, forward_path: ForwardPath) -> bool:
    """What the proof says of a question: each fact's class was decided, grants add up, whatever bars takes away."""
    session = transaction.session
    listener = partition.listener(session.listen)
    standings = [
        NOBODY,
        partition.address(session.client.address),
        partition.hello(session.hello),
        listener._replace(barred=session.auth_required and session.identity is None),
        *map(partition.host, session.hosts),
    ]
    if session.identity is not None:
        standings.append(partition.account(session.identity.account))
    if session.certificate:
        standings.append(partition.certificate(session.certificate))
    if session.mailbox_login is not None:
        standings.append(partition.mailbox_login(transaction.now - session.mailbox_login.at))
    reverse = partition.reverse_class(transaction.reverse_path)
    forward = partition.forward_class(forward_path)
    answers = [
        proof.admitted[standing][partition.asked(standing, session.tls, reverse, forward)] for standing in standings
    ]
    return any(answers) and not any(standing.barred for standing in standings)


def test_the_proof_answers_every_random_question_as_the_policy_does():
    """Every class was decided (or there is a KeyError here), and every question is answered as its class was."""
    outcomes: Counter[str] = Counter()
    for seed in range(CONFIGURATIONS):
        dice = Dice(seed)
        given = dice.rules()
        proof = prove(given, LISTENERS, ALLOWED, NOW)
        partition = Partition(given, NOW)
        for _ in range(QUESTIONS // CONFIGURATIONS):
            transaction, path = dice.transaction(), dice.choice(FORWARDS)
            verdict = decide(given, transaction, path)
            assert predicted(proof, partition, transaction, path) is isinstance(verdict, Admit), (
                seed,
                transaction,
                path,
            )
            outcomes[" ".join(described(verdict).split("@")[0].split()[:2])] += 1
            if isinstance(verdict, Admit) and proof.proven and transaction.session[7:9] == (None, ()):
                outcomes["proven"] += 1
    assert sum(count for name, count in outcomes.items() if name != "proven") == QUESTIONS
    for outcome in (
        "admit local",
        "admit trust",
        "refuse denied",
        "refuse relaying",
        "refuse routing",
        "refuse narrowed",
    ):
        assert outcomes[outcome] > 1000, outcomes


def test_in_a_proven_configuration_no_random_stranger_gets_beyond_what_is_allowed():
    """Whoever gets through to a domain that is not named is at one of few trusted addresses or a listener inside."""
    escaped = 0
    for seed in range(300):
        dice = Dice(seed)
        given = dice.rules()
        opened = found(given, *LISTENERS)
        partition = Partition(given, NOW)
        for _ in range(100):
            transaction, path = dice.transaction(), dice.choice(FORWARDS)
            session = transaction.session._replace(identity=None, hosts=(), certificate="", mailbox_login=None)
            transaction = transaction._replace(session=session, now=0.0)
            verdict = decide(given, transaction, path)
            if isinstance(verdict, Admit) and partition.forward_class(path).kind.elsewhere:
                escaped += 1
                where = verdict.recipient.authority.where
                entry = next((one for one in given.trust if one.where == where), None)
                inside = entry is not None and entry.listen == INSIDE.name
                allowed = entry is not None and entry.network is not None
                if allowed:
                    assert entry is not None
                    assert entry.network is not None
                    allowed = not public_extent(entry.network).exceeds(ALLOWED)
                assert opened or inside or allowed, (seed, transaction, path)
    assert escaped > 100
