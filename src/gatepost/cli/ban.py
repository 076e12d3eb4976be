"""``gatepost ban list``, ``add`` and ``remove``: clients that the gate turns away, whether it runs or not."""

from __future__ import annotations

import contextlib
import math
import os
import pwd
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated

from cyclopts import App, Parameter

from gatepost import config
from gatepost.answers import records
from gatepost.cli import BAD_NEWS, DONE
from gatepost.cli.terminal import ConfigOption, JsonOption, say, say_json, warn
from gatepost.config import values
from gatepost.counters import Ban, Bans, Digests, state_directory
from gatepost.errors import GatepostError
from gatepost.policy.relay import IPNetwork

COLUMNS = ("client", "account", "until", "made by", "why")

Client = Annotated[str, Parameter(help="A network or one address; of IPv6 a /64 at least.")]
Account = Annotated[str, Parameter(name="--account", help="Only with this account. Default: whatever it would do.")]

ban = App(
    name="ban",
    help="Clients that the gate turns away: list them, ban one, let one in again. Exit code: as each command says.",
)


@ban.command(name="list")
def list_(*, config_path: ConfigOption = None, as_json: JsonOption = False) -> int:
    """List the bans in force, the gate's own and yours.

    Exit code: 0 also where there is none, 2 they cannot be read.
    """
    now_s = _now_s()
    with _bans(config_path, make=False) as bans:
        found = [] if bans is None else bans.all(now_s)
    if as_json:
        say_json({"bans": [_object(one) for one in found]})
    elif not found:
        say("nobody is banned")
    else:
        _table([_row(one) for one in found])
    return DONE


@ban.command
def add(
    client: Client,
    /,
    *,
    account: Account = "",
    lasting: Annotated[str, Parameter(name="--for", help='How long, such as "2h". Default: until removed.')] = "",
    why: Annotated[str, Parameter(help="Why, for whoever reads the list.")] = "",
    config_path: ConfigOption = None,
    as_json: JsonOption = False,
) -> int:
    """Turn a client away from now on.

    A running gate heeds it with the next connection, or with the next login where --account is given. Bans may be lost
    with the gate's counters; what must never be let in belongs into a [[deny]] table. Exit code: 0 it is banned, 2 it
    could not be done.
    """
    now_s = _now_s()
    until_s = now_s + _duration_s(lasting) if lasting else math.inf
    wanted = Ban(_network(client), account, until_s, why, _operator())
    with _bans(config_path, make=True) as bans:
        assert bans is not None, "it was made"
        made = bans.add(wanted, now_s)
    if as_json:
        say_json({"ban": _object(made)})
    else:
        say(f"banned: {_words(made)}, {_until(made)}")
    return DONE


@ban.command
def remove(
    client: Client, /, *, account: Account = "", config_path: ConfigOption = None, as_json: JsonOption = False
) -> int:
    """Let a client in again.

    The client is named as `gatepost ban list` shows it. Exit code: 0 the ban is removed, 1 there was no such ban, 2 it
    could not be done.
    """
    named = Ban(_network(client), account, math.inf, "", "")
    with _bans(config_path, make=False) as bans:
        removed = bans is not None and bans.remove(named.network, account, _now_s())
    if as_json:
        say_json({"removed": removed, "client": client, "account": account})
    elif removed:
        say(f"no longer banned: {_words(named)}")
    else:
        say(f"there is no ban of {_words(named)}", "bold red")
    return DONE if removed else BAD_NEWS


@contextlib.contextmanager
def _bans(config_path: str | None, *, make: bool) -> Iterator[Bans | None]:
    """The bans of the configuration's gate; None where nothing was ever kept and nothing is to be made."""
    loaded = config.load_file(config.find(config_path))
    with records.opened(loaded, make=make, said=warn) as store:
        yield None if store is None else Bans(store, Digests.in_directory(state_directory(loaded.data)))


def _network(written: str) -> IPNetwork:
    try:
        return values.network(written)
    except ValueError as error:
        raise GatepostError(f'"{written}": {error}') from None


def _duration_s(written: str) -> float:
    try:
        seconds = values.duration_s(written)
    except ValueError as error:
        raise GatepostError(f'--for "{written}": {error}') from None
    if not seconds:
        raise GatepostError(f'--for "{written}": that is no time at all; write it as "2h", or leave it out')
    return seconds


def _operator() -> str:
    """The user who typed it."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"user {os.getuid()}"


def _now_s() -> float:
    return datetime.now(UTC).timestamp()


def _client(one: Ban) -> str:
    network = one.network
    return str(network.network_address if network.prefixlen == network.max_prefixlen else network)


def _until(one: Ban) -> str:
    if one.until_s == math.inf:
        return "until removed"
    return f"until {datetime.fromtimestamp(one.until_s, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _words(one: Ban) -> str:
    return f"{_client(one)} with account {one.account}" if one.account else _client(one)


def _object(one: Ban) -> dict[str, object]:
    until = None if one.until_s == math.inf else datetime.fromtimestamp(one.until_s, UTC).isoformat(timespec="seconds")
    return {
        "client": _client(one),
        "account": one.account or None,
        "until": until,
        "why": one.why,
        "made_by": one.by,
    }


def _row(one: Ban) -> tuple[str, ...]:
    until = "no end" if one.until_s == math.inf else _until(one).removeprefix("until ")
    return _client(one), one.account or "any", until, one.by, one.why


def _table(rows: list[tuple[str, ...]]) -> None:
    """Columns as wide as what stands in them."""
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for number, row in enumerate([COLUMNS, *rows]):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        say(line, "bold" if number == 0 else "")
