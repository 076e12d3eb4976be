"""Is the gate ready?  The answer of /readyz, from the state that the supervisor wrote.

Why: a load balancer asks this before it sends mail here.  A backend out of reach does not make the gate unready: the
    gate then says 451, which keeps the mail where it is as well as a refused connection does, and says why; all gates
    of a site would otherwise be taken out at once.  It is told in the answer all the same.
Promise: pure; what is unknown is not ready.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class JournalState(NamedTuple):
    """How the journal is.

    Attributes:
        parts: of "backlog" and "database", whether it took what was written last; one that never was is missing.
        waiting_octets: of the backlog that the database does not have.
        dropped: records since the start.
    """

    parts: Mapping[str, bool]
    waiting_octets: int = 0
    dropped: int = 0


def readiness(
    state: Mapping[str, Any],
    backends: Mapping[str, bool],
    suspended: int = 0,
    selftest: bool | None = None,
    journal: JournalState | None = None,
) -> tuple[bool, dict[str, Any]]:
    """The verdict, and the body that explains it.

    Args:
        state: what the supervisor wrote last; {} when it wrote nothing.
        backends: of each backend that was ever asked, whether it answered when a worker last asked it.
        suspended: trusted addresses and listeners whose trust is suspended.
        selftest: whether the last self-test found what the rules say; None where none could tell.
        journal: None where nobody knows.  Mail passes without it, so that it never makes the gate unready.
    """
    kept = journal or JournalState({})
    problems = list(_problems(state))
    down = sorted(name for name, up in backends.items() if not up)
    body = {
        "ready": not problems,
        "problems": problems,
        "listeners": state.get("listeners", []),
        "workers": len(state.get("workers", [])),
        "backends": {name: "up" if up else "down" for name, up in sorted(backends.items())},
        "journal": {
            **{part: "up" if up else "down" for part, up in sorted(kept.parts.items())},
            "waiting_octets": kept.waiting_octets,
            "dropped": kept.dropped,
        },
        "selftest": "unknown" if selftest is None else "agrees" if selftest else "disagrees",
        "warnings": [
            *(f"backend {name} was last seen down: its mail is deferred with 451" for name in down),
            *_journal_warnings(kept),
            *_suspension_warnings(suspended),
            *_selftest_warnings(selftest),
            *_reload_warnings(state),
        ],
    }
    return not problems, body


def _problems(state: Mapping[str, Any]) -> list[str]:
    if not state:
        return ["the supervisor has not said anything yet"]
    if state.get("draining"):
        return ["draining: no new session is taken"]
    problems = []
    for worker in state.get("workers", []):
        if not worker["ready"]:
            why = f": {worker['problem']}" if worker["problem"] else ""
            problems.append(f"worker {worker['index']} does not serve{why}")
        elif not worker["answers"]:
            problems.append(f"worker {worker['index']} does not answer")
    if not problems and not state.get("serving"):
        problems.append("starting: not every listener accepts yet")
    return problems


def _journal_warnings(journal: JournalState) -> list[str]:
    warnings = []
    if journal.parts.get("database") is False:
        warnings.append(
            f"the journal's database does not take what comes: {journal.waiting_octets} octets wait on the disk; the "
            "log says why"
        )
    if journal.parts.get("backlog") is False:
        warnings.append("the journal cannot be written: what comes is dropped and counted; the log says why")
    if journal.dropped:
        warnings.append(f"{journal.dropped} records of the journal were dropped since the start")
    return warnings


def _suspension_warnings(suspended: int) -> list[str]:
    if not suspended:
        return []
    whose = "1 address or listener" if suspended == 1 else f"{suspended} addresses or listeners"
    return [f"the trust in {whose} is suspended: strangers were seen there; see gatepost trust list"]


def _selftest_warnings(selftest: bool | None) -> list[str]:
    if selftest is not False:
        return []
    return ["ALARM: a listener does not do what the rules say; gatepost selftest shows how, and so does the log"]


def _reload_warnings(state: Mapping[str, Any]) -> list[str]:
    reload = state.get("reload") or {}
    if reload.get("result") != "refused":
        return []
    return ["the configuration on disk was refused, the one before it is in force", *reload.get("problems", [])]
