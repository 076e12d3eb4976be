"""What would have changed a verdict: every change that is told has been decided, and reads as an answer."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatepost.facts import Client, Identity, Session, Transaction
from gatepost.policy.explanation import CHANGES_MAX, Change, explain, reply_text, rule_text
from gatepost.policy.relay import DenyEntry, LocalPattern, RelayRules, TrustEntry, decide
from gatepost.smtp.path import ForwardPath, PathDefect, Pattern, parse_forward_path, parse_reverse_path
from gatepost.smtp.reply import Reply
from gatepost.verdict import Admit, Reason

NOW = 1_800_000_000.0
LOCAL = (LocalPattern("example.com", "f:1"), LocalPattern("*.example.com", "f:1"), LocalPattern("[192.0.2.1]", "f:2"))
OFFICE = TrustEntry(where="f:10", network=ip_network("10.1.0.0/16"), why="office LAN", owner="it@example.com")


def rules(*trust, deny=(), local=LOCAL):
    return RelayRules(local=local, trust=trust, deny=deny, default_backend="mail", postmaster_domain="example.com")


def ask(
    of,
    forward_path="b@elsewhere.example",
    *,
    client="203.0.113.9",
    reverse_path="a@stranger.example",
    tls="",
    account=None,
    listen="mx",
    **session,
):
    reverse = parse_reverse_path(f"<{reverse_path}>".encode(), smtputf8=False)
    forward = parse_forward_path(f"<{forward_path}>".encode(), smtputf8=False)
    assert not isinstance(reverse, PathDefect)
    assert isinstance(forward, ForwardPath)
    identity = None if account is None else Identity(account, "PLAIN")
    facts = Session("", Client(ip_address(client), 0), listen, "mx", tls=tls, identity=identity, **session)
    return explain(of, Transaction(facts, reverse, 0, NOW), forward)


def changes(explanation):
    return [f"{condition} ({where})" if where else condition for condition, where in explanation.changes]


# --- Refused ----------------------------------------------------------------------------------------------------------


def test_a_stranger_learns_what_the_rules_let_pass():
    assert changes(ask(rules(OFFICE))) == [
        "the client were in 10.1.0.0/16 (f:10)",
        "the forward-path were at a local domain, such as example.com (f:1)",
    ]


def test_where_nothing_is_trusted_nothing_is_promised():
    explanation = ask(rules(local=()))
    assert not isinstance(explanation.verdict, Admit)
    assert explanation.changes == ()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (TrustEntry(where="f:10", network=ip_network("192.0.2.7/32")), "the client were in 192.0.2.7/32"),
        (TrustEntry(where="f:10", network=ip_network("2001:db8::/32")), "the client were in 2001:db8::/32"),
        (TrustEntry(where="f:10", host="dyn.example.com"), "the client were dyn.example.com"),
        (TrustEntry(where="f:10", listen="inside"), "the client came to the listener inside"),
        (TrustEntry(where="f:10", accounts=("anna", "ben")), "the client had logged in as anna"),
        (TrustEntry(where="f:10", accounts=("*",)), "the client had logged in"),
        (TrustEntry(where="f:10", certificate="ab" * 32), f"the client had shown the certificate {'ab' * 32}"),
        (
            TrustEntry(where="f:10", pop3_s=1800.0),
            "somebody had read mail from the client's address in time",
        ),
    ],
)
def test_every_kind_of_grant_is_named(entry, said):
    assert changes(ask(rules(entry, local=()))) == [f"{said} (f:10)"]


def test_a_grant_that_nobody_can_meet_is_not_told():
    assert changes(ask(rules(TrustEntry(where="f:10"), local=()))) == []


@pytest.mark.parametrize(
    ("narrowing", "said"),
    [
        ({"expires_at": NOW - 1}, "the entry had not expired"),
        ({"tls_minimum": "1.2"}, "the client spoke TLS 1.2 or newer"),
        ({"reverse_paths": (Pattern.parse("*@example.com"),)}, "the reverse-path were *@example.com"),
        ({"reverse_paths": (Pattern.parse("<>"),)}, "the reverse-path were <>"),
        (
            {"forward_paths": (Pattern.parse("anna@*.partner.example"), Pattern.parse("*@other.example"))},
            "the forward-path were anna@*.partner.example or *@other.example",
        ),
        ({"forward_paths": (Pattern.parse("ben@[192.0.2.9]"),)}, "the forward-path were ben@[192.0.2.9]"),
    ],
)
def test_a_narrowed_grant_tells_what_it_lacks(narrowing, said):
    entry = TrustEntry(where="f:10", network=ip_network("10.1.0.0/16"), **narrowing)
    assert changes(ask(rules(entry, local=()), client="10.1.2.3")) == [f"{said} (f:10)"]
    assert changes(ask(rules(entry, local=()))) == [f"the client were in 10.1.0.0/16 and {said} (f:10)"]


def test_a_suspension_is_named_with_its_end():
    suspended = {"client": "10.1.2.3", "suspended": True}
    explanation = ask(rules(OFFICE), **suspended)
    assert not isinstance(explanation.verdict, Admit)
    assert explanation.verdict.reason is Reason.SUSPENDED
    assert explanation.verdict.where == "f:10"
    assert changes(explanation) == [
        "the trust in 10.1.2.3 were not suspended (gatepost trust resume 10.1.2.3) (f:10)",
        "the forward-path were at a local domain, such as example.com (f:1)",
    ]
    # Who logs in is known by more than an address; another client of another network is another client.
    anybody, branch = (
        TrustEntry(where="f:20", accounts=("*",)),
        TrustEntry(where="f:21", network=ip_network("10.2.0.0/16")),
    )
    said = changes(ask(rules(OFFICE, anybody, branch), **suspended))
    assert "the client had logged in (f:20)" in said
    assert "the client were in 10.2.0.0/16 (f:21)" in said
    narrowed = TrustEntry(where="f:10", listen="inside", reverse_paths=(Pattern.parse("*@example.com"),))
    assert changes(ask(rules(narrowed), client="10.1.2.3", listen="inside", listen_suspended=True))[-1] == (
        "the trust in inside were not suspended (gatepost trust resume inside) and the reverse-path were *@example.com"
        " (f:10)"
    )


def test_what_a_grant_does_not_lack_is_not_asked_for():
    entry = TrustEntry(
        where="f:10",
        network=ip_network("10.1.0.0/16"),
        expires_at=NOW + 1,
        tls_minimum="1.2",
        reverse_paths=(Pattern.parse("*@example.com"),),
    )
    found = ask(rules(entry, local=()), client="10.1.2.3", reverse_path="a@example.com")
    assert changes(found) == ["the client spoke TLS 1.2 or newer (f:10)"]


def test_a_denial_tells_that_it_is_the_hindrance():
    deny = DenyEntry(where="f:20", reverse_path=Pattern.parse("*@stranger.example"), why="complaint")
    found = ask(rules(OFFICE, deny=(deny,)), "b@example.com")
    assert changes(found) == ["this entry did not stand there (f:20)"]
    assert rule_text(rules(OFFICE, deny=(deny,)), found.verdict) == "[[deny]] reverse_path *@stranger.example"
    assert changes(ask(rules(OFFICE, deny=(deny,)))) == [], "without it the mail would still be refused"


def test_routing_characters_are_named():
    found = ask(rules(OFFICE), "victim%elsewhere.example@example.com")
    assert changes(found)[0] == "the local-part held no routing characters"
    assert "the client were in 10.1.0.0/16 (f:10)" in changes(found)


def test_a_listener_that_requires_auth_says_so():
    found = ask(rules(OFFICE), "b@example.com", auth_required=True)
    assert changes(found) == ["the client had logged in"]
    assert reply_text(found.verdict) == "530 5.7.0 Authentication required"


def test_the_changes_are_few_and_the_smallest_first():
    narrow = TrustEntry(where="f:5", network=ip_network("10.9.0.0/16"), tls_minimum="1.3")
    many = [TrustEntry(where=f"f:{n}", network=ip_network(f"10.{n}.0.0/16")) for n in range(20, 40)]
    found = ask(rules(narrow, *many))
    assert len(found.changes) == CHANGES_MAX
    assert found.changes[0] == Change("the client were in 10.20.0.0/16", "f:20")


# --- Admitted ---------------------------------------------------------------------------------------------------------


def test_mail_for_us_tells_what_would_make_it_foreign():
    assert changes(ask(rules(OFFICE), "b@example.com")) == [
        "the forward-path were not at example.com (f:1)",
        "the local-part held routing characters",
    ]


def test_mail_for_us_from_a_trusted_client_hangs_on_nothing():
    assert changes(ask(rules(OFFICE), "b@example.com", client="10.1.2.3")) == []


def test_a_trusted_client_learns_by_how_little():
    entry = TrustEntry(
        where="f:10",
        network=ip_network("10.1.0.0/16"),
        expires_at=NOW + 1,
        tls_minimum="1.2",
        reverse_paths=(Pattern.parse("*@example.com"),),
        forward_paths=(Pattern.parse("*@elsewhere.example"),),
    )
    found = ask(rules(entry), client="10.1.2.3", reverse_path="a@example.com", tls="TLSv1.3")
    assert isinstance(found.verdict, Admit)
    assert changes(found) == [
        "the client were not in 10.1.0.0/16 (f:10)",
        "the reverse-path were not *@example.com (f:10)",
        "the forward-path were not *@elsewhere.example (f:10)",
        "the client did not speak TLS 1.2 or newer (f:10)",
        "the entry had expired (f:10)",
    ]
    assert rule_text(rules(entry), found.verdict) == "[[trust]] network 10.1.0.0/16"


@pytest.mark.parametrize(
    ("entry", "facts", "said"),
    [
        (TrustEntry(where="f:10", host="dyn.example.com"), {"hosts": ("dyn.example.com",)}, "were not dyn.example.com"),
        (TrustEntry(where="f:10", listen="mx"), {}, "came to another listener than mx"),
        (TrustEntry(where="f:10", accounts=("anna",)), {"account": "anna"}, "had not logged in"),
    ],
)
def test_every_kind_of_admitted_client(entry, facts, said):
    assert changes(ask(rules(entry), **facts)) == [f"the client {said} (f:10)"]


def test_bare_postmaster_is_explained():
    assert isinstance(ask(rules(OFFICE), "postmaster").verdict, Admit)
    assert changes(ask(rules(OFFICE), "postmaster")) == ["the forward-path were not at example.com (f:1)"]


# --- In words, and in general -----------------------------------------------------------------------------------------


def test_replies_are_the_clients_view():
    assert reply_text(ask(rules(OFFICE)).verdict) == "550 5.7.1 Relaying is prohibited"
    deny = DenyEntry(where="f:20", helo="x", reply=Reply(550, "Not from there", "5.7.1"))
    assert reply_text(ask(rules(deny=(deny,)), hello="x").verdict) == "550 5.7.1 Not from there"
    assert reply_text(ask(rules(OFFICE), "b@example.com").verdict) == ""


def test_the_gates_own_default_names_no_rule():
    assert rule_text(rules(OFFICE), ask(rules(OFFICE)).verdict) == ""
    assert rule_text(rules(OFFICE), ask(rules(OFFICE), "b@example.com").verdict) == "[domains] local example.com"


@given(
    st.sampled_from(["10.1.2.3", "203.0.113.9", "2001:db8::1"]),
    st.sampled_from(["b@example.com", "b@elsewhere.example", "a%b@example.com", "postmaster", "a@[192.0.2.1]"]),
    st.sampled_from(["a@example.com", "", "a@stranger.example"]),
    st.lists(
        st.builds(
            TrustEntry,
            where=st.sampled_from(["f:10", "f:11", "f:12"]),
            network=st.sampled_from([ip_network("10.1.0.0/16"), ip_network("0.0.0.0/0"), ip_network("::/0")]),
            expires_at=st.sampled_from([None, NOW - 1, NOW, NOW + 1]),
            tls_minimum=st.sampled_from(["", "1.2"]),
            reverse_paths=st.sampled_from([(), (Pattern.parse("*@example.com"),), (Pattern.parse("<>"),)]),
            forward_paths=st.sampled_from([(), (Pattern.parse("*@elsewhere.example"),), (Pattern.parse("*"),)]),
        ),
        max_size=3,
        unique_by=lambda entry: entry.where,
    ),
)
def test_the_verdict_is_that_of_the_policy_whatever_is_asked(client, forward_path, reverse_path, trust):
    of = rules(*trust)
    found = ask(of, forward_path, client=client, reverse_path=reverse_path)
    forward = parse_forward_path(f"<{forward_path}>".encode(), smtputf8=False)
    reverse = parse_reverse_path(f"<{reverse_path}>".encode(), smtputf8=False)
    assert not isinstance(reverse, PathDefect)
    assert isinstance(forward, ForwardPath)
    transaction = Transaction(Session("", Client(ip_address(client), 0), "mx", "mx"), reverse, 0, NOW)
    assert found.verdict == decide(of, transaction, forward)
    assert len(found.changes) <= CHANGES_MAX
