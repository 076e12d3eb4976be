"""What a running gate says of itself: its console, asked as a monitoring system asks it, and its log."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from tests.gatehouse import Gate
from tests.real.wire import PATIENCE_S


def get(gate: Gate, path: str) -> tuple[int, str]:
    """Status code and body."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{gate.console_port}{path}", timeout=PATIENCE_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def readiness(gate: Gate) -> dict[str, Any]:
    """The body of /readyz."""
    body: dict[str, Any] = json.loads(get(gate, "/readyz")[1])
    return body


def metric(gate: Gate, name: str, *labels: str) -> float:
    """The sum of the samples of one metric whose labels hold all of these, such as 'verdict="accepted"'."""
    text = get(gate, "/metrics")[1]
    assert f"\n# TYPE {name} " in text, f"/metrics has no {name}"
    samples = [line for line in text.splitlines() if line.startswith((name + "{", name + " "))]
    return sum(float(line.split()[-1]) for line in samples if all(label in line for label in labels))


def events(gate: Gate, name: str) -> list[dict[str, Any]]:
    """The log's events of this name so far."""
    return [record for record in gate.log() if record.get("event") == name]


def no_faults(gate: Gate) -> None:
    """It has met no fault of its own: nothing in the log, and nothing on standard error."""
    assert not events(gate, "fault"), gate.said()
    assert not gate.errors, gate.errors
