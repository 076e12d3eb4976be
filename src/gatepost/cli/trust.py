"""``gatepost trust list`` and ``resume``: trusted addresses behind which strangers were seen, and the use of grants."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from cyclopts import App, Parameter

from gatepost import config
from gatepost.answers import records
from gatepost.answers.trust import known, moment
from gatepost.cli import BAD_NEWS, DONE
from gatepost.cli.terminal import ConfigOption, JsonOption, say, say_json, warn
from gatepost.counters import Source, Sources, Suspension, Use
from gatepost.facts import client_address
from gatepost.policy import relay
from gatepost.policy.relay import TrustEntry

Named = Annotated[str, Parameter(help="The address, or the name of the listener, as `gatepost trust list` shows it.")]

trust = App(
    name="trust",
    help="Trusted addresses and listeners whose trust is suspended, because strangers were seen there: list them, "
    "trust one again. Exit code: as each command says.",
)


@trust.command(name="list")
def list_(*, config_path: ConfigOption = None, as_json: JsonOption = False) -> int:
    """List what is suspended, each with the evidence, and when each [[trust]] entry last let mail through.

    Exit code: 0 nothing is suspended, 1 something is, 2 it cannot be read.
    """
    state = known(config.load_file(config.find(config_path)), _now_s(), warn)
    if as_json:
        uses = [_use_object(entry, use) for entry, use in state.uses]
        say_json({"suspended": [_object(one) for one in state.suspensions], "uses": uses})
        return BAD_NEWS if state.suspensions else DONE
    if not state.suspensions:
        say("no trust is suspended")
    for one in state.suspensions:
        say(f"{one.source} since {moment(one.since_s)}", "bold red")
        for sentence in one.why:
            say(f"  {sentence}")
    if state.uses:
        say("\nlast used, to within an hour")
    for entry, use in state.uses:
        when = f"not since {moment(use.watched_s)}" if use.used_s is None else moment(use.used_s)
        say(f"  {relay.who(entry)} ({entry.where}): {when}")
    return BAD_NEWS if state.suspensions else DONE


@trust.command
def resume(source: Named, /, *, config_path: ConfigOption = None, as_json: JsonOption = False) -> int:
    """Trust an address or a listener again, once what hid its clients is mended.

    A running gate heeds it with the next command of each session. What was seen until now does not suspend it again;
    further strangers do. Where an address hides several clients of yours, and you know it, write `shared = true` into
    its [[trust]] table. Exit code: 0 it is trusted again, 1 it was not suspended, 2 it could not be done.
    """
    named = _source(source)
    with records.opened(config.load_file(config.find(config_path)), make=False, said=warn) as store:
        resumed = store is not None and Sources(store).resume(named, _now_s())
    if as_json:
        say_json({"resumed": resumed, "source": str(named)})
    elif resumed:
        say(f"trusted again: {named}")
    else:
        say(f"the trust in {named} is not suspended", "bold red")
    return DONE if resumed else BAD_NEWS


def _source(written: str) -> Source:
    try:
        return client_address(written)
    except ValueError:
        return written


def _now_s() -> float:
    return datetime.now(UTC).timestamp()


def _object(one: Suspension) -> dict[str, object]:
    since = datetime.fromtimestamp(one.since_s, UTC).isoformat(timespec="seconds")
    return {"source": str(one.source), "since": since, "evidence": list(one.why)}


def _use_object(entry: TrustEntry, use: Use) -> dict[str, object]:
    watched, used = (
        None if at_s is None else datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds") for at_s in use
    )
    return {"who": relay.who(entry), "where": entry.where, "watched_since": watched, "last_used": used}
