"""Is the gate ready?  The answer of /readyz, from the state that the supervisor wrote.

Why: a load balancer asks this before it sends mail here.  A backend out of reach does not make the gate unready: the
    gate then says 451, which keeps the mail where it is as well as a refused connection does, and says why; all gates
    of a site would otherwise be taken out at once.  It is told in the answer all the same.
Promise: pure; what is unknown is not ready.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def readiness(
    state: Mapping[str, Any], backends: Mapping[str, bool], suspended: int = 0, selftest: bool | None = None
) -> tuple[bool, dict[str, Any]]:
    """The verdict, and the body that explains it.

    Args:
        state: what the supervisor wrote last; {} when it wrote nothing.
        backends: of each backend that was ever asked, whether it answered when a worker last asked it.
        suspended: trusted addresses and listeners whose trust is suspended.
        selftest: whether the last self-test found what the rules say; None where none could tell.
    """
    problems = list(_problems(state))
    down = sorted(name for name, up in backends.items() if not up)
    body = {
        "ready": not problems,
        "problems": problems,
        "listeners": state.get("listeners", []),
        "workers": len(state.get("workers", [])),
        "backends": {name: "up" if up else "down" for name, up in sorted(backends.items())},
        "selftest": "unknown" if selftest is None else "agrees" if selftest else "disagrees",
        "warnings": [
            *(f"backend {name} was last seen down: its mail is deferred with 451" for name in down),
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
