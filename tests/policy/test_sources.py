"""The lost source address: what a client shows, and what it comes to.  Pure; no gate, no store."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from tests.policy.test_relay import SEVERITY, World, often, worlds

from gatepost.facts import Client, Evidence, Session
from gatepost.policy import sources
from gatepost.policy.relay import LocalPattern, RelayRules, Route, TrustEntry, decide
from gatepost.policy.sources import THRESHOLD, Watched, judge, judge_listener, organisation, shown, watched
from gatepost.smtp.path import NULL_REVERSE_PATH, Mailbox, Pattern

BRIDGE = ip_address("172.17.0.1")
RULES = RelayRules(
    local=(
        LocalPattern("example.com", "f:1"),
        LocalPattern("*.example.co.uk", "f:2"),
        LocalPattern("[192.0.2.1]", "f:3"),
    ),
    trust=(
        TrustEntry("f:4", network=ip_network("172.16.0.0/12")),
        TrustEntry("f:5", host="gw.partner.org", reverse_paths=(Pattern.parse("*@*.customer.net"),)),
        TrustEntry("f:6", listen="inside"),
        TrustEntry("f:7", accounts=("*",)),
        TrustEntry("f:8", network=ip_network("10.9.0.0/16"), shared=True),
    ),
    routes=(Route("f:9", "mail", (Pattern.parse("*@routed.info"),)),),
)
OURS = sources.our_organisations(RULES, "mx.example-gate.com")


def session(address: str = "172.17.0.1", hello: str = "", listen: str = "mx", **more) -> Session:
    return Session("REF", Client(ip_address(address), 1), listen, "mx", hello=hello, **more)


# ---- names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mail.sender.com", "sender.com"),
        ("MAIL.Sender.COM.", "sender.com"),
        ("sender.com", "sender.com"),
        ("a.b.c.sender.co.uk", "sender.co.uk"),
        ("co.uk", "co.uk"),
        ("web1.db.de", "db.de"),  # a short name is no registry
        ("mx.xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("mail.sender.xn--p1ai", "sender.xn--p1ai"),
        ("srv_1.sender.com", "sender.com"),
        # of the inside, or of nobody
        ("pc7", ""),
        ("", ""),
        ("localhost.localdomain", ""),
        ("printer.office.lan", ""),
        ("pc.branch.internal", ""),
        ("sip.fritz.box", ""),
        ("1.0.168.192.in-addr.arpa", ""),
        ("10.1.2.3", ""),
        ("[10.1.2.3]", ""),
        ("sender..com", ""),
        ("-a.com", ""),
        ("a b.com", ""),
        ("x." * 120 + "com", "x.com"),
    ],
)
def test_whose_a_name_is(name, expected):
    assert organisation(name) == expected


def test_ours_is_what_the_operator_named():
    assert sorted(OURS) == [
        "customer.net",
        "example-gate.com",
        "example.co.uk",
        "example.com",
        "partner.org",
        "routed.info",
    ]


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("10.0.0.0", True), ("10.255.255.255", True), ("9.255.255.255", False), ("11.0.0.0", False),
        ("172.15.255.255", False), ("172.16.0.0", True), ("172.31.255.255", True), ("172.32.0.0", False),
        ("192.168.0.1", True), ("192.167.255.255", False), ("100.64.0.1", True), ("100.128.0.0", False),
        ("127.0.0.1", True), ("169.254.1.1", True), ("203.0.113.9", False), ("8.8.8.8", False),
        ("::1", True), ("fd00::1", True), ("fe80::1", True), ("2001:db8::1", False), ("::ffff:10.0.0.1", True),
    ],
)  # fmt: skip
def test_addresses_that_no_stranger_has(address, private):
    assert sources.is_private(ip_address(address)) is private


# ---- what one session shows


@pytest.mark.parametrize(
    ("hello", "who", "foreign"),
    [
        ("mx1.sender.com", "sender.com", True),
        ("pc7.example.com", "example.com", False),
        ("mail.EXAMPLE.co.uk", "example.co.uk", False),
        ("PC7", "pc7", False),
        ("pc7.office.lan", "pc7.office.lan", False),
        ("[10.1.2.3]", "[10.1.2.3]", False),
        ("[IPv6:fd00::7]", "[ipv6:fd00::7]", False),
        # a public address, said from a private one: by provider, for customers' addresses change
        ("[203.0.113.9]", "[203.0.0.0/16]", True),
        ("[203.0.77.1]", "[203.0.0.0/16]", True),
        ("[IPv6:2001:db8:1::9]", "[2001:db8::/32]", True),
        ("[IPv6:::ffff:203.0.113.9]", "[203.0.0.0/16]", True),
        ("[nonsense]", "[nonsense]", False),
        ("a\tb\u202ec", "a?b?c", False),
    ],
)
def test_whom_a_client_says_to_be(hello, who, foreign):
    seen = shown(session(hello=hello), OURS)
    assert seen.hellos == (who,)
    assert seen.public_names == ((who,) if foreign else ())


def test_what_paths_show():
    one = session(hello="mx.sender.com")
    stranger, own = Mailbox("a", "news.sender.org"), Mailbox("a", "sales.example.com")
    assert shown(one, OURS, reverse_path=stranger).reverse_domains == ("sender.org",)
    assert shown(one, OURS, reverse_path=stranger).inbound_domains == ()
    assert shown(one, OURS, reverse_path=stranger, inbound=True).inbound_domains == ("sender.org",)
    assert shown(one, OURS, reverse_path=own, inbound=True).reverse_domains == ()
    assert shown(one, OURS, reverse_path=own, inbound=True).inbound_domains == ()
    assert shown(one, OURS, reverse_path=NULL_REVERSE_PATH, inbound=True).bounces == ("sender.com",)
    assert shown(one, OURS, reverse_path=NULL_REVERSE_PATH).bounces == ()
    assert shown(one, OURS, "TLSv1.3/X").fingerprints == ("TLSv1.3/X",)
    assert shown(session(), OURS) == Evidence()


def test_what_a_listener_is_shown():
    assert sources.public_client(ip_address("10.1.2.3")) == Evidence()
    seen = sources.public_client(ip_address("203.0.113.9"))
    assert seen.public_clients == ("203.0.113.9",)
    assert judge_listener(seen).suspicious
    assert not judge_listener(Evidence()).suspicious
    assert "203.0.113.9" in judge_listener(seen).sentences[0]


# ---- who is watched


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (session("172.17.0.1"), Watched(address=True, listen=False)),
        (session("203.0.113.9"), Watched(address=False, listen=False)),
        (session("203.0.113.9", hosts=("gw.partner.org",)), Watched(address=True, listen=False)),
        (session("203.0.113.9", listen="inside"), Watched(address=True, listen=True)),
        (session("10.9.0.1"), Watched(address=False, listen=False)),  # known to be shared
        (session("172.17.0.1", suspended=True, listen_suspended=True), Watched(address=True, listen=False)),
    ],
)
def test_only_trust_in_where_a_client_comes_from_is_watched(one, expected):
    assert watched(RULES, one) == expected


# ---- what it comes to


def evidence(hellos: int = 0, names: int = 0, reverse: int = 0, inbound: int = 0, tls: int = 0, bounces: int = 0):
    def words(kind: str, number: int) -> tuple[str, ...]:
        return tuple(f"{kind}{one}.net" for one in range(number))

    return Evidence(
        hellos=words("inner", hellos) + words("name", names),
        public_names=words("name", names),
        reverse_domains=words("reverse", reverse),
        inbound_domains=words("reverse", inbound),
        fingerprints=words("tls", tls),
        bounces=words("name", bounces),
    )


ROUTE = "this host's default route"


@pytest.mark.parametrize(
    ("seen", "stands_for", "suspended"),
    [
        # five strangers, whatever they do; fewer where they bring the world's mail, or at a known place of loss
        (evidence(names=4), "", False),
        (evidence(names=5), "", True),
        (evidence(names=4, reverse=4, inbound=4), "", True),
        (evidence(names=3, reverse=3, inbound=3), "", False),
        (evidence(names=3, reverse=3, inbound=3, tls=3), "", True),
        (evidence(names=4), ROUTE, True),
        (evidence(names=3), ROUTE, False),
        (evidence(names=3, reverse=3, inbound=3), ROUTE, True),
        (evidence(names=2, reverse=2, inbound=2), ROUTE, False),
        # strangers with inner names (worms have them) show by what they bring
        (evidence(hellos=10, reverse=10, inbound=10), "", True),
        (evidence(hellos=9, reverse=10, inbound=10), "", False),
        # one machine of one organisation, however much it sends
        (evidence(names=1, reverse=10, inbound=10, tls=10, bounces=1), "", False),
        (evidence(names=1, reverse=10, inbound=10, tls=10, bounces=1), ROUTE, False),
        # thirty machines with inner names
        (evidence(hellos=10, reverse=10, tls=10), "", False),
        (evidence(hellos=10, reverse=4, inbound=4, tls=4, bounces=1), ROUTE, False),
        # the place alone
        (evidence(), ROUTE, False),
        # a guest behind the router, and the router
        (evidence(hellos=3, names=2, reverse=2, inbound=1), ROUTE, False),
    ],
)
def test_threshold(seen, stands_for, suspended):
    assert judge(seen, BRIDGE, stands_for).suspicious is suspended


def test_the_evidence_is_told_in_words_the_weightiest_first():
    found = judge(evidence(names=6, reverse=2, inbound=3, tls=2, bounces=1), BRIDGE, ROUTE)
    assert found.score == 125 + 24 + 8 + 4 + 5 + 5 + 30
    first, *rest = found.sentences
    assert "public names of 6 organisations" in first
    assert "name0.net, name1.net, name2.net, name3.net, name4.net and 1 more" in first
    text = "; ".join(rest)
    for words in ("for our domains", "SPF", "TLS", "bounces", "private address", ROUTE):
        assert words in text
    for knob in ("proxy_from", "host's network", "externalTrafficPolicy: Local", "userland-proxy"):
        assert knob in found.mend
    assert judge(Evidence(), BRIDGE) == (0, (), found.mend)


def test_a_public_address_is_not_called_private():
    assert judge(evidence(names=5), ip_address("203.0.113.9")).score == THRESHOLD
    assert not any("private" in sentence for sentence in judge(evidence(names=5), ip_address("203.0.113.9")).sentences)


@often
@given(worlds)
def test_a_suspension_never_makes_a_verdict_milder(world: World):
    one = world.transaction.session
    for suspended in (one._replace(suspended=True), one._replace(listen_suspended=True)):
        facts = world.transaction._replace(session=suspended)
        before = world.decide()
        after = decide(world.rules, facts, world.path, world.findings)
        assert SEVERITY[type(after)] >= SEVERITY[type(before)]
        shared = replace(world.rules, trust=tuple(replace(entry, shared=True) for entry in world.rules.trust))
        assert decide(shared, facts, world.path, world.findings) == before
