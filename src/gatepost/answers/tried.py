"""Does the running gate do what its configuration says?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from gatepost.errors import GatepostError
from gatepost.gate import selftest
from gatepost.gate.selftest import Comparison, bound_for_smtp, compare, together
from gatepost.gate.settings import GateSettings
from gatepost.resolver import HostFollower


def as_object(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """All of them, and what they say together."""
    return {
        "outcome": together(comparisons).value,
        "listeners": [selftest.as_object(one) for one in comparisons],
    }


def _served(listeners: Iterable[object]) -> list[tuple[str, str, int]]:
    """Name, host and port of each listener, from what the console says."""
    served = []
    for listener in listeners:
        if not isinstance(listener, dict):
            raise GatepostError("the gate's console does not say where it listens")
        host, _, port = str(listener.get("address")).rpartition(":")
        if not port.isdigit():
            raise GatepostError("the gate's console does not say where it listens")
        served.append((str(listener.get("name")), host.strip("[]"), int(port)))
    return served


async def compared(
    gate: GateSettings, listeners: Iterable[object], done: Callable[[Comparison], None]
) -> list[Comparison]:
    """Ask through every address of every listener, as a stranger.

    Args:
        listeners: name and address of each, as /readyz of the running gate tells them.
        done: called with each comparison as it is over.

    Raises:
        GatepostError: it is not told where the gate listens.
    """
    bound = bound_for_smtp(gate.listens, _served(listeners))
    rules = gate.rules
    trusted = {entry.host for entry in rules.trust if entry.host}
    hosts = HostFollower(trusted, denied={entry.host for entry in rules.deny if entry.host})
    await hosts.start()
    try:
        comparisons = []
        for number, at in enumerate(bound):
            one = await compare(gate, at, number, hosts.names, datetime.now(UTC).timestamp())
            done(one)
            comparisons.append(one)
        return comparisons
    finally:
        await hosts.close()
