"""What is proposed is narrow, turns the verdict, and says what helps where no entry does."""

from __future__ import annotations

import tomllib
from datetime import UTC, date, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.store.places import Place, entry, record, refused, session

from gatepost import config
from gatepost.answers import alike
from gatepost.answers.alike import Proposal, Unadvised, Wish
from gatepost.errors import ConfigError, GatepostError
from gatepost.facts import Session
from gatepost.smtp.path import NULL_REVERSE_PATH, ForwardPath, Mailbox, Shape, parse_address_literal
from gatepost.store import Entry
from gatepost.store.journal import Kept, Query

NOW_S = datetime(2026, 11, 26, 12, tzinfo=UTC).timestamp()
DAY_S = 86400.0

CONFIG = """\
# Ours.
[gate]
name = "mx.example.com"

[[listen]]
name = "mx"
address = "0.0.0.0:25"

[[listen]]
name = "submission"
address = "0.0.0.0:587"
role = "submission"
tls = "none"
auth_without_tls = true

[domains]
local = ["example.com"]

[backend.mail]
address = "10.0.0.5:25"

[[trust]]
network = "10.1.0.0/16"
reverse_paths = ["*@example.com"]
why = "office LAN"
owner = "it@example.com"

[[trust]]
network = "10.9.0.9"
expires = 2026-01-31
owner = "it@example.com"

[[trust]]
network = "10.8.0.0/16"
owner = "it@example.com"

[[deny]]
reverse_path = "*@spam.test"
why = "complaint of 12 May"
"""

STRANGER = session(12, client="192.0.2.77")
ANNA = session(11, client="198.51.100.7", account="anna")
RELAY = refused("00000012-1", at=NOW_S - 60)


@pytest.fixture(autouse=True)
def dialects_nowhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def loaded(text: str = CONFIG) -> config.Config:
    return config.load(text.encode(), "gatepost.toml", now=NOW_S)


def kept(what: Entry = RELAY, of: Session = STRANGER) -> Kept:
    return Kept(1, of.reference, of, what, pseudonymous=False)


def allowed(what: Entry = RELAY, of: Session = STRANGER, text: str = CONFIG, **wish: Any) -> Proposal:
    proposed = alike.allow(loaded(text), kept(what, of), Wish(**wish), NOW_S)
    assert isinstance(proposed, Proposal), proposed
    return proposed


def unadvised(what: Entry = RELAY, of: Session = STRANGER, text: str = CONFIG) -> str:
    proposed = alike.allow(loaded(text), kept(what, of), Wish(), NOW_S)
    assert isinstance(proposed, Unadvised), proposed
    return " ".join(proposed.reasons)


def decided(proposed: Proposal | Unadvised, what: Entry = RELAY, of: Session = STRANGER, text: str = CONFIG):
    return alike.decision(loaded(text), text.encode(), kept(what, of), proposed, NOW_S)


# --- Allow ------------------------------------------------------------------------------------------------------------

NARROW = {
    "reverse_paths": ["a@x.example"],
    "forward_paths": ["victim@elsewhere.example"],
    "why": "allowed like 00000012-1 of 2026-11-26",
    "expires": date(2027, 2, 24),
}


def test_a_stranger_is_allowed_by_its_one_address_as_that_one_to_that_one_for_a_while():
    assert allowed().entry == {"network": "192.0.2.77", **NARROW}
    six = session(13, client="2001:db8::77")
    assert allowed(of=six).entry == {"network": "2001:db8::77", **NARROW}


def test_who_logged_in_is_allowed_by_account_and_who_showed_a_certificate_by_that():
    assert allowed(of=ANNA).entry == {"accounts": ["anna"], **NARROW}
    shown = STRANGER._replace(certificate="ab" * 32)
    assert allowed(of=shown).entry == {"certificate": "ab" * 32, **NARROW}


@pytest.mark.parametrize(
    ("wish", "changes"),
    [
        ({"network": "192.0.2.0/24"}, {"network": "192.0.2.0/24"}),
        ({"forward_domain": True}, {"forward_paths": ["*@elsewhere.example"]}),
        ({"any_forward_path": True}, {"forward_paths": None}),
        ({"any_reverse_path": True}, {"reverse_paths": None}),
        ({"why": "asked for"}, {"why": "asked for"}),
        ({"owner": "it@example.com"}, {"owner": "it@example.com"}),
        ({"expires": "30d"}, {"expires": date(2026, 12, 26)}),
        ({"expires": "2026-11-26"}, {"expires": date(2026, 11, 26)}),
        ({"expires": "never"}, {"expires": None}),
    ],
    ids=repr,
)
def test_it_is_widened_by_who_says_so(wish, changes):
    expected = {"network": "192.0.2.77", **NARROW, **changes}
    assert allowed(**wish).entry == {key: value for key, value in expected.items() if value is not None}


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"network": "192.0.3.0/24"}, "does not hold the client 192.0.2.77"),
        ({"network": "192.0.2.77/24"}, "bits beyond its mask"),
        ({"expires": "soon"}, "such as 30d"),
        ({"expires": "2026-11-25"}, "that is over"),
    ],
    ids=repr,
)
def test_a_wish_that_cannot_be_is_said(wish, said):
    with pytest.raises(GatepostError, match=said):
        alike.allow(loaded(), kept(), Wish(**wish), NOW_S)


def test_bounces_are_allowed_as_bounces_alone():
    assert allowed(RELAY._replace(reverse_path=NULL_REVERSE_PATH)).entry["reverse_paths"] == ["<>"]


def test_it_says_that_nobody_answers_for_it_and_when_it_ends():
    notes = allowed().notes
    assert "nobody is named who answers for it: --owner it@example.com" in notes
    assert "it ends with 2027-02-24; --expires says otherwise" in notes
    assert not any("nobody is named" in note for note in allowed(of=ANNA).notes)
    assert any("it never ends" in note for note in allowed(expires="never").notes)


@pytest.mark.parametrize(
    ("client", "said"),
    [
        (
            "10.1.2.3",
            "network 10.1.0.0/16 at gatepost.toml:22 is about this client, too; it is narrowed by reverse_paths",
        ),
        ("10.9.0.9", "network 10.9.0.9/32 at gatepost.toml:28 is about this client, too; it has expired"),
    ],
)
def test_an_entry_that_nearly_let_it_pass_is_named(client, said):
    assert said in " ".join(allowed(of=session(14, client=client)).notes)


PERCENT = ForwardPath(Mailbox("a%b", "elsewhere.example"), Shape.PERCENT)


@pytest.mark.parametrize(
    ("row", "of", "said"),
    [
        (entry(at=NOW_S), STRANGER, "nothing to allow: it was accepted by g.toml:12"),
        (entry(at=NOW_S, verdict="admitted"), STRANGER, "nothing to allow: it was admitted"),
        (
            refused("1", reverse_path=Mailbox("x", "spam.test"), reason="denied"),
            STRANGER,
            "[[deny]] reverse_path *@spam.test at gatepost.toml:37 refuses it (complaint of 12 May), and no [[trust]]",
        ),
        (RELAY, STRANGER._replace(listen="submission"), "takes mail from nobody who did not log in"),
        (RELAY._replace(forward_path=None, stage="mail", reason="auth_required"), STRANGER, "not refused any more"),
        (RELAY._replace(forward_path=PERCENT, reason="routing"), STRANGER, "must write the plain address"),
        (RELAY, session(15, client="10.8.0.1"), "the same passes now, by [[trust]] network 10.8.0.0/16"),
        (RELAY, session(15, client="10.8.0.1", suspended=True), "gatepost trust resume 10.8.0.1"),
        (refused("1", reason="backend", reply="550 5.1.1 No such user"), STRANGER, "the backend refused it"),
        (refused("1", reason="rate", verdict="deferred", by="g.toml:7"), STRANGER, "limit of the entry at g.toml:7"),
        (refused("1", reason="send_as"), ANNA, "a [[send_as]] entry lets it"),
        (refused("1", reason="content", reply="554 5.6.0 Bad content"), STRANGER, "but with: 554 5.6.0 Bad content"),
        (refused("1", reason="delivering"), STRANGER, "not known"),
    ],
    ids=lambda value: getattr(value, "reason", None),
)  # fmt: skip
def test_where_no_entry_helps_it_says_what_does(row, of, said):
    assert said in unadvised(row, of)


def test_what_is_proposed_lets_it_pass_and_is_proven():
    told, old, new, gate = decided(allowed())
    assert (told["advisable"], told["reasons"]) == (True, [])
    assert old == CONFIG.encode()
    assert tomllib.loads(told["toml"]) == {"trust": [allowed().entry]}
    assert told["toml"].strip() in new.decode()
    assert told["where"] == f"gatepost.toml:{new.decode()[: new.decode().index('192.0.2.77')].count(chr(10))}"
    assert told["proof"]["proven"]
    assert told["entry"]["expires"] == "2027-02-24", "as JSON has it"
    assert gate is not None
    assert "+[[trust]]" in told["diff"]


def test_an_open_file_is_never_written():
    proposed = allowed(network="0.0.0.0/0", any_forward_path=True, any_reverse_path=True)
    told, _, new, _ = decided(proposed)
    assert (told["advisable"], new) == (False, b"")
    assert not told["proof"]["proven"]
    assert told["proof"]["dialogue"] is not None
    assert "strangers could relay" in told["reasons"][0]


def test_what_would_not_help_is_not_written():
    """The grant is there, and the connection still is not what it asks for."""
    proposed = allowed()
    elsewhere = proposed._replace(entry=proposed.entry | {"forward_paths": ["*@other.example"]})
    told, _, new, _ = decided(elsewhere)
    assert new == b""
    assert told["reasons"] == ["with this entry it would still not pass: the permission is narrowed by forward_paths"]


def test_what_does_not_load_is_said_with_its_line():
    proposed = allowed()
    with pytest.raises(ConfigError, match=r"gatepost\.toml:[0-9]+: \[\[trust\]\] why"):
        decided(proposed._replace(entry=proposed.entry | {"why": "two\nlines"}))


# --- Deny -------------------------------------------------------------------------------------------------------------

TAKEN = entry(at=NOW_S - 60, message="00000012.1")


def denied(what: Entry = TAKEN, of: Session = STRANGER, text: str = CONFIG, **wish: Any) -> Proposal:
    proposed = alike.deny(loaded(text), kept(what, of), Wish(**wish), NOW_S)
    assert isinstance(proposed, Proposal), proposed
    return proposed


WHY = {"why": "denied like 00000012.1 of 2026-11-26"}


def test_a_stranger_is_denied_by_its_one_address():
    assert denied().entry == {"network": "192.0.2.77", **WHY}


def test_who_is_trusted_is_denied_by_the_reverse_path_unless_it_is_null():
    assert denied(of=ANNA).entry == {"reverse_path": "a@x.example", **WHY}
    assert "gatepost account lock anna" in " ".join(denied(of=ANNA).notes)
    office = session(16, client="10.8.0.1")
    assert denied(of=office).entry == {"reverse_path": "a@x.example", **WHY}
    assert denied(TAKEN._replace(reverse_path=NULL_REVERSE_PATH), of=office).entry == {"network": "10.8.0.1", **WHY}


@pytest.mark.parametrize(
    ("wish", "entry_"),
    [
        ({"by": "reverse-path"}, {"reverse_path": "a@x.example"}),
        ({"by": "forward_path"}, {"forward_path": "bob@example.com"}),
        ({"by": "helo"}, {"helo": "client.test"}),
        ({"by": "host"}, {"host": "mail.spam.test"}),
        ({"network": "192.0.2.0/24"}, {"network": "192.0.2.0/24"}),
        ({"expires": "7d", "owner": "it@example.com"}, {
            "network": "192.0.2.77", "owner": "it@example.com", "expires": date(2026, 12, 3)
        }),
    ],
    ids=repr,
)  # fmt: skip
def test_by_what_may_be_chosen(wish, entry_):
    of = STRANGER._replace(hosts=("mail.spam.test",))
    proposed = denied(of=of, **wish)
    assert proposed.entry == {**entry_, **WHY}
    assert decided(proposed, TAKEN, of).told["reasons"] == []


@pytest.mark.parametrize(
    ("by", "said"), [("colour", "write one of network"), ("host", "the row has none; it has network")]
)
def test_by_what_the_row_does_not_have_is_said(by, said):
    with pytest.raises(GatepostError, match=said):
        denied(by=by)


def test_a_client_whose_other_mail_is_wanted_is_not_denied_by_its_address():
    proposed = alike.deny(loaded(), kept(TAKEN), Wish(), NOW_S, [{"by": "network", "others": 5}])
    assert isinstance(proposed, Proposal)
    assert proposed.entry == {"reverse_path": "a@x.example", **WHY}
    assert proposed.notes[0] == "5 other messages of the same client with other reverse-paths were accepted"
    proposed = alike.deny(loaded(), kept(TAKEN), Wish(), NOW_S, [{"by": "network", "others": 0}])
    assert isinstance(proposed, Proposal)
    assert "network" in proposed.entry


def test_what_is_denied_already_is_said():
    proposed = alike.deny(loaded(), kept(TAKEN._replace(reverse_path=Mailbox("x", "spam.test"))), Wish(), NOW_S)
    assert isinstance(proposed, Unadvised)
    assert "[[deny]] reverse_path *@spam.test at gatepost.toml:37 refuses it already" in proposed.reasons[0]


def test_a_hello_that_no_entry_can_name_is_no_alternative():
    possible = alike.alternatives(kept(TAKEN, STRANGER._replace(hello="*")))
    assert [one.by for one in possible] == ["network", "reverse_path", "forward_path"]


local_parts = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=12)


@settings(max_examples=25)
@given(local_parts, local_parts, st.sampled_from(["x.example", parse_address_literal("[192.0.2.9]")]))
def test_whatever_the_addresses_are_it_names_them_alone(reverse, forward, domain):
    """Quotes, letters in any script: the entry means these two, and turns the verdict."""
    path = ForwardPath(Mailbox(forward, "elsewhere.example"), Shape.PLAIN)
    row = RELAY._replace(reverse_path=Mailbox(reverse, domain), forward_path=path)
    proposed = alike.allow(loaded(), kept(row), Wish(), NOW_S)
    if "*" in reverse + forward:
        assert isinstance(proposed, Unadvised)
        return
    assert decided(proposed, row).told["reasons"] == []
    other = row._replace(forward_path=path._replace(mailbox=Mailbox(f"{forward}x", "elsewhere.example")))
    assert decided(proposed, other).told["reasons"] != []
    for by in ("reverse_path", "forward_path"):
        assert decided(denied(row, by=by), row).told["reasons"] == []


def test_what_looks_like_a_wildcard_is_never_written_as_one():
    star = RELAY._replace(reverse_path=Mailbox("*", "x.example"))
    assert "no pattern means *@x.example alone" in unadvised(star)
    assert allowed(star, any_reverse_path=True).entry["forward_paths"] == ["victim@elsewhere.example"]
    everybody = RELAY._replace(forward_path=ForwardPath(Mailbox("*", "elsewhere.example"), Shape.PLAIN))
    assert "--forward-domain" in unadvised(everybody)
    assert allowed(everybody, forward_domain=True).entry["forward_paths"] == ["*@elsewhere.example"]
    assert [one.by for one in alike.alternatives(kept(everybody))] == ["network", "reverse_path", "helo"]
    assert denied(star, of=ANNA).entry["network"] == "198.51.100.7"


# --- Replay -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path / "data")
    yield place
    place.close()


def test_it_tells_what_would_have_passed(place):
    to_another = RELAY._replace(forward_path=ForwardPath(Mailbox("other", "elsewhere.example"), Shape.PLAIN))
    place.keep(
        record([RELAY._replace(at=NOW_S - 40 * DAY_S)], STRANGER),
        record([RELAY, RELAY._replace(number=2, at=NOW_S - DAY_S), to_another], STRANGER),
        record([RELAY], session(17, client="192.0.2.78")),
    )
    proposed = allowed()
    gate = decided(proposed).gate
    assert gate is not None
    told = alike.replay(place.journal(), loaded().gate, gate, proposed.query, NOW_S)
    assert (told["newly_admitted"], told["newly_refused"], told["refused_for_another_reason"]) == (2, 0, 1)
    assert (told["verdicts"], told["complete"], told["kept_since"]) == (3, True, None)
    like = "such as a@x.example to victim@elsewhere.example, from 192.0.2.77"
    assert alike.replay_text(told) == [
        "in the last 30 days it would have let through 2 recipients",
        f"  {like}: a stranger's mail, refused 2 times on 2 days, would pass",
    ]


def test_it_tells_how_often_each_way_to_deny_would_have_hit(place):
    place.keep(
        record([TAKEN, TAKEN._replace(number=2), RELAY._replace(number=3)], STRANGER),
        record([TAKEN], session(18, client="192.0.2.78", hello="other.test")),
        record([TAKEN._replace(reverse_path=Mailbox("b", "x.example"))], session(19, client="192.0.2.79")),
    )
    told = alike.counted(place.journal(), kept(TAKEN), NOW_S)
    assert [(one["by"], one["messages"], one["accepted"], one["others"], one["complete"]) for one in told] == [
        ("network", 3, 2, 0, True),
        ("reverse_path", 4, 3, 0, True),
        ("forward_path", 4, 4, 1, True),
        ("helo", 4, 3, 1, True),
    ]


def test_a_count_is_bounded_and_says_so(place, monkeypatch):
    monkeypatch.setattr(alike, "ROWS_MAX", 2)
    place.keep(record([TAKEN._replace(number=number) for number in range(1, 5)], STRANGER))
    told = alike.counted(place.journal(), kept(TAKEN), NOW_S)[0]
    assert (told["messages"], told["complete"]) == (2, False)


# --- Which row --------------------------------------------------------------------------------------------------------


def test_a_row_by_reference_message_or_id(place):
    place.keep(record([TAKEN, RELAY], STRANGER))
    journal = place.journal()
    rows = {row.entry.verdict: row for row in journal.search(Query(), 9)}
    by_reference = alike.look_up(journal, "550 5.7.1 Relaying is prohibited [00000012-1]", None)
    assert by_reference is not None
    assert by_reference.entry == rows["refused"].entry
    assert alike.look_up(journal, "00000012.1", None) == rows["accepted"]
    assert alike.look_up(journal, None, rows["accepted"].id) == rows["accepted"]
    assert alike.look_up(journal, "00000012-2", None) is alike.look_up(journal, None, 77) is None
    assert alike.not_found(journal).startswith(f"not found: the journal in {journal.name} begins on 2026-11-26")


@pytest.mark.parametrize(("typed", "row_id"), [(None, None), ("00000012-1", 1), ("printer", None), ("00000012", None)])
def test_what_names_no_row_is_said(place, typed, row_id):
    with pytest.raises(GatepostError, match="K7Q2M9XD"):
        alike.look_up(place.journal(), typed, row_id)
