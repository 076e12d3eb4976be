"""Every key leads to its rows, on SQLite and on PostgreSQL, and by an index."""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.store.places import NOON_S, Place, entry, record, refused, session

from gatepost.smtp.path import NULL_REVERSE_PATH, ForwardPath, Mailbox, Shape
from gatepost.store import journal as journal_module
from gatepost.store.journal import Query
from gatepost.verdict import Finding, Result

ANNA = session(11, client="10.0.0.5", account="anna")
STRANGER = session(12, client="192.0.2.77")
SIX = session(13, client="2001:db8::77")
ENTRIES = [
    record([entry(message="00000011.1", message_id="<one@x.example>", at=NOON_S)], ANNA),
    record([refused("00000012-1", at=NOON_S + 1), refused("00000012-2", at=NOON_S + 2, reason="rate")], STRANGER),
    record([entry(at=NOON_S + 3, reverse_path=Mailbox("Büro", "xn--bcher-kva.example"))], SIX),
    record([entry(at=NOON_S + 4, reverse_path=NULL_REVERSE_PATH, verdict="admitted", stage="rcpt")], SIX),
    record([entry(at=NOON_S + 5, forward_path=None, verdict="refused", reason="denied", stage="mail")], STRANGER),
    record([entry(at=NOON_S + 6, forward_path=ForwardPath(Mailbox("Carol", "sub.example.com"), Shape.PLAIN))], ANNA),
]
FOUND = [
    ({}, [6, 5, 4, 3, 2, 1, 0]),
    ({"session": "00000012"}, [5, 2, 1]),
    ({"reference": "00000012-2"}, [2]),
    ({"reference": "00000012-9"}, []),
    ({"message": "00000011.1"}, [0]),
    ({"message_id": "<one@x.example>"}, [0]),
    ({"client": ip_address("192.0.2.77")}, [5, 2, 1]),
    ({"client": ip_address("2001:db8::77")}, [4, 3]),
    ({"network": ip_network("192.0.0.0/16")}, [5, 2, 1]),
    ({"network": ip_network("0.0.0.0/0")}, [6, 5, 2, 1, 0]),
    ({"network": ip_network("2001:db8::/32")}, [4, 3]),
    ({"account": "anna"}, [6, 0]),
    ({"reverse_path": "A@x.Example"}, [6, 5, 2, 1, 0]),
    ({"reverse_path": "<>"}, [4]),
    ({"forward_path": "carol@SUB.example.com"}, [6]),
    ({"domain": "x.example"}, [6, 5, 2, 1, 0]),
    ({"domain": "elsewhere.example"}, [2, 1]),
    ({"domain": "sub.example.com"}, [6]),
    ({"verdict": "refused"}, [5, 2, 1]),
    ({"reason": "relaying"}, [1]),
    ({"since": NOON_S + 3, "until": NOON_S + 5}, [4, 3]),
    ({"verdict": "refused", "client": ip_address("192.0.2.77"), "reason": "rate"}, [2]),
    ({"account": "anna", "domain": "sub.example.com"}, [6]),
    ({"domain": "x.example", "verdict": "refused", "until": NOON_S + 2}, [1]),
    ({"network": ip_network("10.0.0.0/8"), "forward_path": "bob@example.com"}, [0]),
    ({"message_id": "<one@x.example>", "account": "ben"}, []),
    ({"reverse_path": "a@x.example", "forward_path": "victim@elsewhere.example", "reason": "relaying"}, [1]),
]


@pytest.fixture
def kept(place: Place) -> Place:
    place.keep(*ENTRIES)
    return place


@pytest.mark.parametrize(("query", "numbers"), FOUND, ids=repr)
def test_found_by(kept, query, numbers):
    journal = kept.journal()
    found = journal.search(Query(**query), 100)
    assert [round(each.entry.at - NOON_S) for each in found] == numbers
    assert journal.count(Query(**query)) == len(numbers)
    assert [each.id for each in journal.after(0, Query(**query), 100)] == sorted(each.id for each in found)
    assert journal.search(Query(**query), 1) == found[:1]


def test_what_is_found_is_what_was_kept(kept):
    journal = kept.journal()
    (found,) = journal.search(Query(reference="00000012-1"), 5)
    assert (found.session, found.entry) == (STRANGER, ENTRIES[1].entries[0])
    whole = entry(
        recipients=3, detail="d", hint="h", would="w", findings=(Finding("c", Result.FAIL, "e"),),
        authors=(Mailbox("boss", "example.com"),), forward_path=ForwardPath(Mailbox("b%c", "y.example"), Shape.PERCENT),
        message_id="<two@x.example>",
    )  # fmt: skip
    kept.keep(record([whole], ANNA))
    (found,) = journal.search(Query(message_id="<two@x.example>"), 5)
    assert (found.reference, found.session, found.entry) == ("00000011", ANNA, whole)


def test_a_refusal_by_its_reference_be_it_in_the_database_or_not(place):
    place.wait(record([refused("00000012-1")], STRANGER))
    assert place.journal().refusal("00000012-1") is not None, "no database is there yet"
    place.keep(record([refused("00000012-2")], STRANGER))
    journal = place.journal()
    for reference in ("00000012-1", "00000012-2"):
        found = journal.refusal(reference)
        assert found is not None
        assert (found.session, found.entry.reference) == (STRANGER, reference)
    assert journal.refusal("00000012-3") is None
    assert journal.kept_since() == NOON_S


def test_a_journal_that_was_never_written_is_empty(place):
    journal = place.journal()
    assert journal.empty
    assert journal.search(Query(), 5) == journal.after(0, Query(), 5) == journal.sessions(Query(), 5) == []
    assert (journal.count(Query()), journal.last_id(), journal.kept_since()) == (0, 0, None)
    assert list(journal.verdicts(0, NOON_S * 2)) == []
    place.keep(record([entry()]))
    assert len(journal.after(0, Query(), 5)) == 1, "who follows it sees the first entry"


def test_an_address_beyond_ascii_is_found_by_whatever_way(place):
    place.keep(record([entry(reverse_path=Mailbox("Ärger", "x.example"))], ANNA))
    journal = place.journal()
    for query in (Query(reverse_path="Ärger@x.example"), Query(reverse_path="Ärger@X.example", account="anna")):
        assert len(journal.search(query, 5)) == len(journal.after(0, query, 5)) == 1, query


def test_follow(kept):
    journal = kept.journal()
    last = journal.last_id()
    assert journal.after(last, Query(), 5) == []
    kept.keep(record([entry(at=NOON_S - 100)]), record([refused("00000012-3")], STRANGER))
    assert [each.entry.verdict for each in journal.after(last, Query(), 5)] == ["accepted", "refused"]
    assert [each.entry.verdict for each in journal.after(last, Query(verdict="refused"), 5)] == ["refused"]


def test_all_verdicts_of_a_time_in_order_sharing_their_sessions(place, monkeypatch):
    monkeypatch.setattr(journal_module, "READ_ROWS", 7)
    times = [NOON_S + number // 3 for number in range(50)]  # three at the same moment
    place.keep(*(record([entry(at=at, message=f"00000011.{number}")], ANNA) for number, at in enumerate(times)))
    found = list(place.journal().verdicts(NOON_S + 1, NOON_S + 10))
    assert [each.entry.message for each in found] == [f"00000011.{number}" for number in range(3, 30)]
    assert len({id(each.session) for each in found}) == 1
    assert found[0].session == ANNA._replace(reference="", client=ANNA.client._replace(port=0))
    assert place.journal().count_between(NOON_S + 1, NOON_S + 10) == 27


def test_sessions(place):
    place.keep(
        *(record([entry(at=NOON_S + number)], of, ended=True) for number, of in enumerate((ANNA, STRANGER, SIX)))
    )
    journal = place.journal()
    for query, references in (
        (Query(), ["00000013", "00000012", "00000011"]),
        (Query(session="00000012"), ["00000012"]),
        (Query(account="anna"), ["00000011"]),
        (Query(client=SIX.client.address), ["00000013"]),
        (Query(network=ip_network("192.0.2.0/24")), ["00000012"]),
        (Query(since=NOON_S + 1), ["00000013", "00000012"]),
    ):
        assert [each.reference for each in journal.sessions(query, 10)] == references, query


def test_a_network_with_very_many_rows_is_read_back_in_time(kept, monkeypatch):
    wide = Query(network=ip_network("0.0.0.0/0"))
    before = kept.journal().search(wide, 3)
    monkeypatch.setattr(journal_module, "DENSE_ROWS", 2)
    assert kept.journal().search(wide, 3) == before


# --- How the database goes about it -----------------------------------------------------------------------------------

INDEXES = {
    "session": "entries_session",
    "reference": "entries_session",
    "message": "entries_session",
    "message_id": "entries_message_id",
    "client": "entries_client",
    "network": "entries_client",
    "account": "entries_account",
    "reverse_path": "entries_reverse_path",
    "forward_path": "entries_forward_path",
    "domain": "entries_reverse_domain|entries_forward_domain",
    "verdict": "entries_verdict",
    "reason": "entries_reason",
}


@pytest.mark.parametrize(("query", "numbers"), FOUND, ids=repr)
def test_sqlite_looks_every_key_up_by_its_own_index_and_sorts_none(sqlite_place, query, numbers):
    sqlite_place.keep(*ENTRIES)
    plan = sqlite_place.journal().plan(Query(**query), 100)
    keys = [name for name in INDEXES if name in query]
    wanted = INDEXES[next(name for name in journal_module._KEYS if name in query)] if keys else "entries_at|SCAN"
    looked_up = [step for step in plan if re.match(r"(SEARCH|SCAN) entries(?!.*PRIMARY KEY)", step)]
    assert looked_up
    assert all(re.search(wanted, step) for step in looked_up), plan
    if "network" not in query and not {"session", "reference", "message"} & query.keys():
        # What is found by one key comes in order; what is merged from several is cut to the limit before.
        inner = [step for step in plan if "TEMP B-TREE FOR ORDER BY" in step]
        assert len(inner) <= (1 if len(looked_up) > 1 else 0), plan


names = st.sampled_from(["", "anna", "x' OR 1=1 --", "%", "_", "\ud800", "\0", "ü", "p-aaaaaaaaaaaaaaaa"])


@settings(max_examples=50)
@given(
    query=st.builds(
        Query,
        reference=names, message_id=names, account=names, reverse_path=names, domain=names, session=names,
        client=st.none(), network=st.none(), since=st.none() | st.floats(), until=st.none() | st.floats(),
    )
)  # fmt: skip
def test_whatever_is_looked_for_is_a_value(tmp_path_factory, query):
    place = Place(tmp_path_factory.getbasetemp() / "one journal for all examples")
    if not place.directory.exists():
        place.keep(*ENTRIES)
    journal = place.journal()
    found = journal.search(query, 5)
    assert {each.entry.verdict for each in found} <= {"accepted", "admitted", "refused"}
    assert journal.count(query) >= len(found)
    journal.after(0, query, 5)
    journal.sessions(query, 5)
    place.close()
