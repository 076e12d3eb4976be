"""``gatepost selftest``: does the running gate do what its configuration says?"""

from __future__ import annotations

import asyncio

from gatepost import config, control
from gatepost.answers import tried
from gatepost.cli import BAD_NEWS, DONE, NOT_DONE
from gatepost.cli.terminal import ConfigOption, JsonOption, say, say_json
from gatepost.gate.selftest import Comparison, Outcome, together

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
    comparisons = asyncio.run(tried.compared(loaded.gate, listeners, _nothing if as_json else _say))
    overall = together(comparisons)
    if as_json:
        say_json(tried.as_object(comparisons))
        return _CODES[overall]
    say(*_HEADLINES[overall])
    for one in comparisons:
        if one.outcome is Outcome.DISAGREES and one.transcript:
            say("")
            say(f"{one.listen} at {one.address}: {one.form}", "bold")
            for line in one.transcript:
                say(f"  {line}")
    return _CODES[overall]


def _say(one: Comparison) -> None:
    say(str(one), _STYLES.get(one.outcome, ""))


def _nothing(_: Comparison) -> None:
    """A program reads the whole at once."""
