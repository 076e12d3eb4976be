"""What a person types is understood, or it is said how it is written."""

from __future__ import annotations

import contextlib
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.store.places import NOON_S, Place, entry, record, refused, session

from gatepost.answers.trace import Asked, Following, find, find_sessions, row, understood, why
from gatepost.errors import GatepostError
from gatepost.store.journal import Query
from gatepost.verdict import Finding, Result


@pytest.mark.parametrize(
    ("typed", "queries", "taken_for"),
    [
        ("K7Q2M9XD-1", [{"reference": "K7Q2M9XD-1"}], "a reference"),
        ("[k7q2m9xd-l]", [{"reference": "K7Q2M9XD-1"}], "a reference"),
        ("550 5.7.1 Relaying is prohibited [K7Q2M9XD-1]", [{"reference": "K7Q2M9XD-1"}], "a reference"),
        ("k7q2m9xd.1", [{"message": "K7Q2M9XD.1"}], "a reference"),
        ("K7Q2M9XD", [{"session": "K7Q2M9XD"}], "a reference"),
        ("192.0.2.1", [{"client": ip_address("192.0.2.1")}], "a client"),
        ("[::ffff:192.0.2.1]", [{"client": ip_address("192.0.2.1")}], "a client"),
        ("192.0.2.0/24", [{"network": ip_network("192.0.2.0/24")}], "a client"),
        (
            "a@X.Example",
            [{"reverse_path": "a@x.example"}, {"forward_path": "a@x.example"}, {"account": "a@x.example"}],
            "an address",
        ),
        ("branches", [{"account": "branches"}], "an account"),
        ("BRANCHES", [{"session": "BRANCHES"}], "a reference"),
        ("k7q2m9xo", [{"session": "K7Q2M9X0"}], "a reference"),
        (
            "<m@x.example>",
            [{"reverse_path": "m@x.example"}, {"forward_path": "m@x.example"}, {"message_id": "<m@x.example>"}],
            "an address, or a Message-ID",
        ),
        ("bücher.example", [{"domain": "xn--bcher-kva.example"}], "a domain"),
        ("Anna", [{"account": "anna"}], "an account"),
    ],
)
def test_a_text_is_taken_for(typed, queries, taken_for):
    found = understood(Asked(typed), NOON_S)
    assert list(found.queries) == [Query(**query) for query in queries]
    assert found.taken_for == taken_for


@pytest.mark.parametrize(
    ("options", "query"),
    [
        ({"reverse_path": "<>"}, {"reverse_path": "<>"}),
        ({"reverse_path": "<a@x.example>"}, {"reverse_path": "a@x.example"}),
        ({"message_id": "m@x.example"}, {"message_id": "<m@x.example>"}),
        ({"reference": "K7Q2M9XD.1"}, {"message": "K7Q2M9XD.1"}),
        ({"since": "2h"}, {"since": NOON_S - 7200}),
        ({"since": "2026-11-20"}, {"since": 1795132800.0}),
        ({"until": "2026-11-20"}, {"until": 1795219200.0}),
        ({"domain": "[IPv6:2001:DB8::1]"}, {"domain": "[ipv6:2001:db8::1]"}),
        ({"domain": "Bücher.example"}, {"domain": "xn--bcher-kva.example"}),
        ({"message": "k7q2m9xl.1"}, {"message": "K7Q2M9X1.1"}),
        ({"until": "2026-11-20T01:00"}, {"until": 1795136400.0}),
        ({"until": "2026-11-20T01:00+01:00"}, {"until": 1795132800.0}),
        ({"verdict": "refused", "reason": "relaying"}, {"verdict": "refused", "reason": "relaying"}),
    ],
)
def test_options(options, query):
    assert understood(Asked(**options), NOON_S).queries == (Query(**query),)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"client": "x"}, '--client "x": this is not an IP address; write 192.0.2.1'),
        ({"client": "10.0.0.1/8"}, "the address has bits beyond its mask"),
        ({"reference": "x"}, "it looks like K7Q2M9XD-1 in a refusal"),
        ({"message": "x"}, 'stands behind "id" in our Received field'),
        ({"reverse_path": "a b@x"}, "this is no address; write user@example.com"),
        ({"domain": "a@x.example"}, '--domain "a@x.example": '),
        ({"verdict": "no"}, "there are accepted, admitted, deferred, refused"),
        ({"reason": "no"}, "there are relaying, "),
        ({"since": "1h", "until": "2h"}, "is not before --until"),
        ({"since": "yesterday"}, 'write how long ago, such as "2h" or "7d"'),
        ({"text": "x" * 300}, "say by an option what it is"),
    ],
)
def test_what_cannot_be_understood_is_said_with_the_way_to_write_it(options, said):
    with pytest.raises(GatepostError) as error:
        understood(Asked(**options), NOON_S)
    assert said in str(error.value)


@given(st.fixed_dictionaries({name: st.text(max_size=30) for name in Asked._fields}))
def test_whatever_is_typed_is_understood_or_refused(options: dict[str, Any]):
    with contextlib.suppress(GatepostError):
        assert understood(Asked(**options), NOON_S).queries


def test_a_row_says_everything(tmp_path):
    place = Place(tmp_path)
    anna = session(7, account="anna", client="10.0.0.5")
    place.keep(
        record([entry(message="00000007.1", would="refuse: denied (g.toml:9)")], anna),
        record([refused("00000007-2", findings=(Finding("c", Result.FAIL, "e"),))], anna),
    )
    no, yes = place.journal().search(Query(), 5)
    place.close()
    told = row(yes)
    assert (told["account"], told["client"], told["verdict"], told["message"]) == (
        "anna",
        "10.0.0.5",
        "accepted",
        "00000007.1",
    )
    assert (told["time"], told["reason"], told["by"]) == ("2027-01-15T08:00:00.250Z", None, "g.toml:12")
    assert why(yes) == "00000007.1 g.toml:12; would refuse: denied (g.toml:9)"
    told = row(no)
    assert told["findings"] == [{"check": "c", "result": "fail", "evidence": "e"}]
    assert why(no) == "[00000007-2] relaying"
    assert told.keys() == row(yes).keys(), "every row has the same"
    facts = {
        "esmtp",
        "hosts",
        "auth_required",
        "suspended",
        "listen_suspended",
        "mailbox_login",
        "addresses",
        "recipients",
    }
    assert facts <= told.keys()


# --- Found ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    yield place
    place.close()


def test_a_refusal_that_waits_in_the_backlog_is_found_by_its_reference_alone(place):
    place.keep(record([entry()]))
    place.wait(record([refused("00000012-1")], session(12)))
    journal = place.journal()
    queries = understood(Asked("00000012-1"), NOON_S).queries
    assert [kept.entry.reference for kept in find(journal, queries, 5)] == ["00000012-1"]
    queries = understood(Asked("00000012-1", verdict="accepted"), NOON_S).queries
    assert find(journal, queries, 5) == []


def test_a_reference_and_a_message_mean_their_session_where_sessions_are_asked_for(place):
    place.keep(record([refused("00000012-1")], session(12), ended=True), record([entry()], session(13), ended=True))
    journal = place.journal()
    for typed in ("00000012-1", "00000012.1", "00000012", "[00000012-7]"):
        queries = understood(Asked(typed), NOON_S).queries
        assert [one.reference for one in find_sessions(journal, queries, 5)] == ["00000012"], typed
    for asked in (Asked("x.example"), Asked(verdict="refused"), Asked("00000012", reason="rate")):
        with pytest.raises(GatepostError, match="sessions are found by client, account, reference and time"):
            find_sessions(journal, understood(asked, NOON_S).queries, 5)


def test_what_comes_is_shown_once_whatever_comes_in_between(place, monkeypatch):
    """Rows that come between two questions of one step, and more rows than one question brings."""
    place.keep(record([entry(at=NOON_S)]))
    journal = place.journal()
    last = journal.last_id()
    place.keep(record([entry(at=NOON_S + 1)]))
    (_, second) = find(journal, [Query()], 5)
    queries = [Query(verdict="accepted"), Query(reverse_path="a@x.example")]
    following = Following(journal, queries, last, [second.id])
    ask = journal.last_id

    def while_another_comes():
        newest = ask()
        place.keep(record([entry(at=NOON_S + 2)]))
        return newest

    monkeypatch.setattr(journal, "last_id", while_another_comes)
    assert [kept.entry.at - NOON_S for kept in following.step()] == [2]
    monkeypatch.setattr(journal, "last_id", ask)
    assert following.step() == []
    monkeypatch.setattr(Following, "ROWS_MAX", 3)
    place.keep(
        record([entry(at=NOON_S + number, verdict="refused" if number % 2 else "accepted") for number in range(9)])
    )
    shown = [round(kept.entry.at - NOON_S) for _ in range(9) for kept in following.step()]
    assert shown == list(range(9))


def test_a_database_in_the_place_of_another_is_followed_from_its_beginning(place, tmp_path):
    place.keep(record([entry()] * 5))
    following = Following(place.journal(), [Query()], 5)
    other = Place(tmp_path / "other")
    other.keep(record([refused("00000012-1")], session(12)))
    other.close()
    for path in (tmp_path / "journal").glob("journal.sqlite*"):
        path.unlink()
    (tmp_path / "other" / "journal" / "journal.sqlite").rename(tmp_path / "journal" / "journal.sqlite")
    assert [kept.entry.reference for kept in following.step()] == ["00000012-1"]
    assert following.step() == []
