"""``gatepost selftest``: does the running gate do what its configuration says?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime

from gatepost import config, control
from gatepost.cli import BAD_NEWS, DONE, NOT_DONE
from gatepost.cli.terminal import ConfigOption, JsonOption, say, say_json
from gatepost.errors import GatepostError
from gatepost.gate.selftest import Bound, Comparison, Outcome, as_object, bound_for_smtp, compare, together
from gatepost.gate.settings import GateSettings
from gatepost.resolver import HostFollower

_CODES = {Outcome.CLOSED: DONE, Outcome.OPEN: BAD_NEWS, Outcome.DISAGREES: BAD_NEWS, Outcome.UNKNOWN: NOT_DONE}
_HEADLINES = {
    Outcome.CLOSED: ("CLOSED, as the rules say", "bold green"),
    Outcome.OPEN: ("OPEN RELAY, as [gate] open_relay wishes", "bold red"),
    Outcome.DISAGREES: ("ALARM: the gate does not do what its rules say", "bold red"),
    Outcome.UNKNOWN: ("UNKNOWN", "bold yellow"),
}
_STYLES = {Outcome.DISAGREES: "red", Outcome.OPEN: "red", Outcome.UNKNOWN: "yellow"}


def selftest(*, config_path: ConfigOption = None, as_json: JsonOption = False) -> int:
    """Probe the running gate through each of its listeners, and compare with its configuration.

    From this host, as a stranger: from an address that the configuration trusts for nothing. Asks the gate's console
    where it listens, and takes some seconds for each address. The gate does the same by itself, see [gate] selftest.
    Exit code: 0 closed, as the rules say; 1 open, or not what the rules say; 2 it could not be told.
    """
    loaded = config.load_file(config.find(config_path))
    listeners = control.status(loaded.console_address).answer.get("listeners", [])
    bound = bound_for_smtp(loaded.gate.listens, _served(listeners))
    comparisons = asyncio.run(_compared(loaded.gate, bound, quiet=as_json))
    overall = together(comparisons)
    if as_json:
        say_json({"outcome": overall.value, "listeners": [as_object(one) for one in comparisons]})
        return _CODES[overall]
    say(*_HEADLINES[overall])
    for one in comparisons:
        if one.outcome is Outcome.DISAGREES and one.transcript:
            say("")
            say(f"{one.listen} at {one.address}: {one.form}", "bold")
            for line in one.transcript:
                say(f"  {line}")
    return _CODES[overall]


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


async def _compared(gate: GateSettings, bound: list[Bound], *, quiet: bool) -> list[Comparison]:
    rules = gate.rules
    trusted = {entry.host for entry in rules.trust if entry.host}
    hosts = HostFollower(trusted, denied={entry.host for entry in rules.deny if entry.host})
    await hosts.start()
    try:
        comparisons = []
        for number, at in enumerate(bound):
            one = await compare(gate, at, number, hosts.names, datetime.now(UTC).timestamp())
            if not quiet:
                say(str(one), _STYLES.get(one.outcome, ""))
            comparisons.append(one)
        return comparisons
    finally:
        await hosts.close()
