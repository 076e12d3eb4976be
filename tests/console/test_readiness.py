"""When the gate counts as ready, and what it says when it does not."""

from __future__ import annotations

from typing import Any

import pytest

from gatepost.console.readiness import JournalState, readiness


def state(**changes: Any) -> dict[str, Any]:
    worker = {"index": 0, "ready": True, "current": True, "answers": True, "restarts": 0, "problem": ""}
    base = {
        "serving": True,
        "draining": False,
        "listeners": [{"name": "mx", "address": "127.0.0.1:25"}],
        "workers": [worker, {**worker, "index": 1}],
        "reload": {},
    }
    return {**base, **changes}


def worker(**changes: Any) -> dict[str, Any]:
    return {**state()["workers"][0], **changes}


def test_ready():
    ready, body = readiness(state(), {"mail": True})
    assert ready
    assert body == {
        "ready": True,
        "problems": [],
        "listeners": [{"name": "mx", "address": "127.0.0.1:25"}],
        "workers": 2,
        "backends": {"mail": "up"},
        "journal": {"waiting_octets": 0, "dropped": 0},
        "selftest": "unknown",
        "warnings": [],
    }


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"serving": False}, "starting: not every listener accepts yet"),
        ({"draining": True}, "draining: no new session is taken"),
        (
            {"workers": [worker(ready=False, problem="was killed by SIGKILL")]},
            "worker 0 does not serve: was killed by SIGKILL",
        ),
        ({"workers": [worker(index=3, answers=False)]}, "worker 3 does not answer"),
    ],
)
def test_not_ready(changes, problem):
    ready, body = readiness(state(**changes), {})
    assert not ready
    assert body["ready"] is False
    assert body["problems"] == [problem]


def test_nothing_known_is_not_ready():
    assert readiness({}, {})[0] is False


def test_a_worker_that_takes_a_new_configuration_still_serves_by_the_old_one():
    assert readiness(state(workers=[worker(current=False)]), {})[0]


def test_a_backend_that_is_down_is_told_and_leaves_the_gate_ready():
    ready, body = readiness(state(), {"mail": True, "sales": False})
    assert ready
    assert body["backends"] == {"mail": "up", "sales": "down"}
    assert body["warnings"] == ["backend sales was last seen down: its mail is deferred with 451"]


def test_a_refused_reload_is_told():
    ready, body = readiness(state(reload={"result": "refused", "problems": ["g.toml:1: bad"]}), {})
    assert ready
    assert body["warnings"] == ["the configuration on disk was refused, the one before it is in force", "g.toml:1: bad"]
    assert readiness(state(reload={"result": "ok", "problems": []}), {})[1]["warnings"] == []


def test_suspended_trust_is_told():
    ready, body = readiness(state(), {}, 1)
    assert ready
    assert body["warnings"] == [
        "the trust in 1 address or listener is suspended: strangers were seen there; see gatepost trust list"
    ]
    assert "2 addresses or listeners" in readiness(state(), {}, 2)[1]["warnings"][0]


def test_a_gate_that_does_not_do_what_its_rules_say_is_told_and_stays_ready():
    ready, body = readiness(state(), {}, selftest=False)
    assert ready
    assert body["selftest"] == "disagrees"
    assert body["warnings"] == [
        "ALARM: a listener does not do what the rules say; gatepost selftest shows how, and so does the log"
    ]
    assert readiness(state(), {}, selftest=True)[1]["selftest"] == "agrees"
    assert readiness(state(), {}, selftest=True)[1]["warnings"] == []


def test_a_journal_that_is_not_kept_makes_no_gate_unready_and_is_told():
    journal = JournalState({"backlog": True, "database": False}, 4711, 3)
    ready, body = readiness(state(), {"mail": True}, journal=journal)
    assert ready
    assert body["journal"] == {"backlog": "up", "database": "down", "waiting_octets": 4711, "dropped": 3}
    assert body["warnings"] == [
        "the journal's database does not take what comes: 4711 octets wait on the disk; the log says why",
        "3 records of the journal were dropped since the start",
    ]
    _, body = readiness(state(), {"mail": True}, journal=JournalState({"backlog": False}))
    assert body["warnings"] == ["the journal cannot be written: what comes is dropped and counted; the log says why"]
