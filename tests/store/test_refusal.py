"""The reference in a reply, as people read it."""

from __future__ import annotations

import pytest
from tests.store.places import Place, entry, record, refused, session

from gatepost.store import backlog_directory, reference_of, refusal_of, waiting
from gatepost.verdict import Defer, Reason, Refuse


@pytest.mark.parametrize(
    "typed",
    [
        "K7Q2M0X1-1",
        "k7q2m0x1-1",
        " K7Q2M0X1-1\n",
        "[K7Q2M0X1-1]",
        "K7Q2MOXI-L",
        "k7q2moxl-i",
        "K7Q2M0X1\N{EN DASH}1",
        "K7Q2M0X1\N{NON-BREAKING HYPHEN}1",
        "550 5.7.1 Relaying is prohibited [K7Q2M0X1-1]",
        "550 5.7.1 [x] Relaying is prohibited: [K7Q2M0X1-1] and so on",
    ],
)
def test_a_reference_as_people_write_it(typed):
    assert reference_of(typed) == "K7Q2M0X1-1"


@pytest.mark.parametrize(
    "typed", ["", "-", "K7Q2M0X1", "K7Q2M0X-1", "K7Q2M0X1-", "K7Q2M0U1-1", "K7Q2M0X1-1234567890", "[]", "x" * 10000]
)
def test_what_is_none(typed):
    assert reference_of(typed) is None


def test_a_refusal_is_found_in_the_backlog(tmp_path):
    place = Place(tmp_path, "")
    for number in (1, 2):
        place.wait(record([refused(f"K7Q2M9XD-{number}", recipients=number)]))
    found = waiting(backlog_directory(place.data), "K7Q2M9XD-2")
    assert found is not None
    assert found[1].recipients == 2
    assert waiting(backlog_directory(place.data), "K7Q2M9XD-3") is None
    assert waiting(tmp_path / "none", "K7Q2M9XD-1") is None


def test_an_entry_tells_of_a_refusal_or_of_none():
    facts = session(7)
    refusal = refusal_of(facts, refused("K7Q2M9XD-1", by="g.toml:7", detail="why", hint="a hint"))
    assert refusal is not None
    assert refusal.verdict == Refuse(Reason.RELAYING, "g.toml:7", "why", None, "a hint")
    assert refusal.transaction.session == facts
    deferred = refusal_of(facts, refused("K7Q2M9XD-1", verdict="deferred", reason="rate"))
    assert deferred is not None
    assert isinstance(deferred.verdict, Defer)
    assert refusal_of(facts, entry()) is None
    assert refusal_of(facts, entry(verdict="refused", reason="backend")) is None
