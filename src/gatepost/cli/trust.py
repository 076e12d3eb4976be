"""``gatepost trust list`` and ``resume``: trusted addresses behind which strangers were seen, and the end of it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from cyclopts import App, Parameter

from gatepost import config
from gatepost.cli import BAD_NEWS, DONE, records
from gatepost.cli.terminal import ConfigOption, JsonOption, say, say_json
from gatepost.config import Config
from gatepost.counters import Source, Sources, Suspension
from gatepost.errors import StorageError
from gatepost.facts import client_address

Named = Annotated[str, Parameter(help="The address, or the name of the listener, as `gatepost trust list` shows it.")]

trust = App(
    name="trust",
    help="Trusted addresses and listeners whose trust is suspended, because strangers were seen there: list them, "
    "trust one again. Exit code: as each command says.",
)


@trust.command(name="list")
def list_(*, config_path: ConfigOption = None, as_json: JsonOption = False) -> int:
    """List what is suspended, each with the evidence.

    Exit code: 0 nothing is suspended, 1 something is, 2 it cannot be read.
    """
    found = _suspensions(config.load_file(config.find(config_path)))
    if as_json:
        say_json({"suspended": [_object(one) for one in found]})
    elif not found:
        say("no trust is suspended")
    else:
        for one in found:
            say(f"{one.source} since {_moment(one.since_s)}", "bold red")
            for sentence in one.why:
                say(f"  {sentence}")
    return BAD_NEWS if found else DONE


@trust.command
def resume(source: Named, /, *, config_path: ConfigOption = None, as_json: JsonOption = False) -> int:
    """Trust an address or a listener again, once what hid its clients is mended.

    A running gate heeds it with the next command of each session. What was seen until now does not suspend it again;
    further strangers do. Where an address hides several clients of yours, and you know it, write `shared = true` into
    its [[trust]] table. Exit code: 0 it is trusted again, 1 it was not suspended, 2 it could not be done.
    """
    named = _source(source)
    with records.opened(config.load_file(config.find(config_path)), make=False) as store:
        resumed = store is not None and Sources(store).resume(named, _now_s())
    if as_json:
        say_json({"resumed": resumed, "source": str(named)})
    elif resumed:
        say(f"trusted again: {named}")
    else:
        say(f"the trust in {named} is not suspended", "bold red")
    return DONE if resumed else BAD_NEWS


def warnings(loaded: Config) -> list[str]:
    """What is suspended at the configuration's gate, for ``gatepost check``."""
    try:
        found = _suspensions(loaded)
    except StorageError as error:
        return [f"whether any trust is suspended cannot be told: {error}"]
    return [
        f"the trust in {one.source} is suspended since {_moment(one.since_s)}: {'; '.join(one.why)}; mend what hides "
        f"its clients (docs/howto/addresses.md), then: gatepost trust resume {one.source}"
        for one in found
    ]


def _suspensions(loaded: Config) -> list[Suspension]:
    with records.opened(loaded, make=False) as store:
        return [] if store is None else Sources(store).suspensions(_now_s())


def _source(written: str) -> Source:
    try:
        return client_address(written)
    except ValueError:
        return written


def _now_s() -> float:
    return datetime.now(UTC).timestamp()


def _moment(at_s: float) -> str:
    return f"{datetime.fromtimestamp(at_s, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _object(one: Suspension) -> dict[str, object]:
    since = datetime.fromtimestamp(one.since_s, UTC).isoformat(timespec="seconds")
    return {"source": str(one.source), "since": since, "evidence": list(one.why)}
