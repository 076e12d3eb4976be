"""``gatepost account``: the gate's own accounts, and the passwords of their devices.

Trust: the administrator; names may be copied from mail, and what stands in the directory belongs to the gate's user.
Promise: a password is asked for without an echo or read from standard input, and never an argument, which every user of
    the host could see.  A change is in force at the next login; the gate is not told.  What root changes is done as the
    gate's user.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from getpass import GetPassWarning, getpass
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from gatepost import config
from gatepost.auth.account import Account, account_name, why_weak
from gatepost.auth.accounts import AccountStore
from gatepost.auth.scram import load_library
from gatepost.cli import BAD_NEWS, DONE, printable
from gatepost.cli.terminal import ConfigOption, JsonOption, say, say_json
from gatepost.errors import GatepostError, StorageError
from gatepost.gate import privileges
from gatepost.smtp.sasl import SECRET_OCTETS_MAX

account = App(
    name="account",
    help="Add, change and list the gate's own accounts. Exit code: 0 done, 1 there is no such account, 2 not done.",
)
device = App(
    name="device",
    help="Give a phone, printer or script a password of its own, and take it back. Exit code: 0 done, 1 there is no "
    "such account or device, 2 not done.",
)

NameArgument = Annotated[str, Parameter(help="An address, or a word of letters and digits.")]
LabelArgument = Annotated[str, Parameter(help='What the device is called, such as "printer 2nd floor".')]
PasswordOption = Annotated[
    bool, Parameter(name="--password-stdin", help="Read the password from the first line of standard input.")
]

_NEVER = "never"


@account.command
def add(
    name: NameArgument,
    /,
    *,
    bait: Annotated[
        bool, Parameter(help="An account that nobody uses and nobody knows a password of: whoever tries it is banned.")
    ] = False,
    password_stdin: PasswordOption = False,
    config_path: ConfigOption = None,
    as_json: JsonOption = False,
) -> int:
    """Add an account.

    The password is asked for twice. Exit code: 0 added, 2 not: it is there already, or its password is weak.
    """
    name = _name(name)
    with _store(config_path, make=True) as store:
        if store.read(name) is not None:
            raise GatepostError(f"there is an account {name} already; `gatepost account passwd` changes its password")
        store.add(name, "" if bait else _password(name, stdin=password_stdin), bait=bait)
    what = f"{name} is added; whoever tries it is an attacker" if bait else f"{name} is added, and may log in at once"
    return _done(what, {"account": name, "added": True, "bait": bait}, as_json=as_json)


@account.command
def passwd(
    name: NameArgument,
    /,
    *,
    password_stdin: PasswordOption = False,
    config_path: ConfigOption = None,
    as_json: JsonOption = False,
) -> int:
    """Give an account a new password; its devices keep theirs.

    Exit code: 0 changed, 1 there is no such account, 2 not changed.
    """
    name = _name(name)
    with _store(config_path) as store:
        if store.read(name) is None:
            return _not_found(f"there is no account {name}", as_json=as_json)
        store.set_password(name, _password(name, stdin=password_stdin))
    return _done(f"{name} has a new password", {"account": name, "changed": True}, as_json=as_json)


@account.command(name="list")
def list_(*, config_path: ConfigOption = None, as_json: JsonOption = False) -> int:
    """List the accounts: their state, their devices, and when each was last used.

    On a terminal a table; in a pipe one line for each account and device, its columns separated by tabs. Exit code: 0
    listed, 1 there is an account that cannot be read.
    """
    accounts: list[Account] = []
    problems: list[str] = []
    with _store(config_path) as store:
        for file in store.names():
            try:
                found = store.read_file(file)
            except StorageError as error:
                problems.append(str(error))
            else:
                accounts += [found] if found is not None else []
    accounts.sort(key=lambda one: one.name)
    if as_json:
        say_json({"accounts": [_json(one) for one in accounts], "problems": problems})
        return BAD_NEWS if problems else DONE
    _show([row for one in accounts for row in _rows(one)])
    for problem in problems:
        sys.stderr.write(f"gatepost: {printable(problem)}\n")
    return BAD_NEWS if problems else DONE


@account.command
def lock(name: NameArgument, /, *, config_path: ConfigOption = None, as_json: JsonOption = False) -> int:
    """Let nobody in on this account, with whatever password.

    Exit code: 0 locked, 1 there is no such account, 2 not locked.
    """
    name = _name(name)
    try:
        with _store(config_path) as store:
            store.set_locked(name, locked=True)
    except LookupError as error:
        return _not_found(str(error), as_json=as_json)
    return _done(
        f"{name} is locked; sessions that are open stay open", {"account": name, "locked": True}, as_json=as_json
    )


@account.command
def unlock(name: NameArgument, /, *, config_path: ConfigOption = None, as_json: JsonOption = False) -> int:
    """Let an account be used again, with the passwords that it had.

    Exit code: 0 unlocked, 1 there is no such account, 2 not unlocked.
    """
    name = _name(name)
    try:
        with _store(config_path) as store:
            store.set_locked(name, locked=False)
    except LookupError as error:
        return _not_found(str(error), as_json=as_json)
    return _done(f"{name} is unlocked", {"account": name, "locked": False}, as_json=as_json)


@account.command
def remove(name: NameArgument, /, *, config_path: ConfigOption = None, as_json: JsonOption = False) -> int:
    """Remove an account and its devices for good.

    Exit code: 0 removed, 1 there is no such account, 2 not removed.
    """
    name = _name(name)
    try:
        with _store(config_path) as store:
            store.remove(name)
    except LookupError as error:
        return _not_found(str(error), as_json=as_json)
    return _done(f"{name} is removed", {"account": name, "removed": True}, as_json=as_json)


account.command(device)


@device.command(name="add")
def add_device(
    name: NameArgument, label: LabelArgument, /, *, config_path: ConfigOption = None, as_json: JsonOption = False
) -> int:
    """Make a password for a device, and show it this once.

    The device logs in with the account's name and this password. Exit code: 0 made, 1 there is no such account, 2 not
    made.
    """
    name = _name(name)
    try:
        with _store(config_path) as store:
            password = store.add_device(name, label)
    except LookupError as error:
        return _not_found(str(error), as_json=as_json)
    if as_json:
        say_json({"account": name, "device": label, "password": password})
        return DONE
    say(f"{label} logs in as {name} with the password")
    say(f"    {password}", "bold")
    say("which nobody can show again")
    return DONE


@device.command(name="remove")
def remove_device(
    name: NameArgument, label: LabelArgument, /, *, config_path: ConfigOption = None, as_json: JsonOption = False
) -> int:
    """Take a device's password from it; the account's own and those of other devices stay.

    Exit code: 0 removed, 1 there is no such account or device, 2 not removed.
    """
    name = _name(name)
    try:
        with _store(config_path) as store:
            store.remove_device(name, label)
    except LookupError as error:
        return _not_found(str(error), as_json=as_json)
    return _done(
        f"{label} cannot log in as {name} any more",
        {"account": name, "device": label, "removed": True},
        as_json=as_json,
    )


def _name(text: str) -> str:
    name = account_name(text)
    if name is None:
        raise GatepostError(
            f'"{text}" cannot be an account\'s name: write an address such as alice@example.com, or a word of letters, '
            "digits and inner periods, hyphens, underscores and plus signs"
        )
    return name


@contextmanager
def _store(config_path: str | None, *, make: bool = False) -> Iterator[AccountStore]:
    """The accounts of the gate that is configured, as its user; what it cannot do becomes a sentence.

    Args:
        make: the data directory where it is missing.
    """
    path = config.find(config_path)
    loaded = config.load_file(path)
    where = path or config.EMBEDDED_DEFAULT_NAME
    owner = privileges.account_of(loaded.user, where)
    if make:
        privileges.prepare_data(loaded.data, owner, where)
    load_library()
    with privileges.acting_as(owner):
        try:
            yield AccountStore(loaded.gate.auth.accounts)
        except ValueError as error:
            raise GatepostError(str(error)) from None


def _password(name: str, *, stdin: bool) -> str:
    """The new password, which is not weak."""
    password = _first_line() if stdin else _asked(name)
    weakness = why_weak(name, password)
    if weakness:
        raise GatepostError(f"{weakness}; nothing is changed")
    return password


def _first_line() -> str:
    octets = sys.stdin.buffer.readline(SECRET_OCTETS_MAX + 2).removesuffix(b"\n").removesuffix(b"\r")
    try:
        return octets.decode("utf-8")
    except UnicodeDecodeError:
        raise GatepostError("the password on standard input is not UTF-8; nothing is changed") from None


def _asked(name: str) -> str:
    if not sys.stdin.isatty():
        raise GatepostError("there is no terminal to ask for the password at; --password-stdin reads it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", GetPassWarning)  # it would go on, and show what is typed
            password = getpass(f"Password for {name}: ")
            again = getpass("The same again: ")
    except EOFError:
        raise GatepostError("no password was typed; nothing is changed") from None
    except GetPassWarning:
        raise GatepostError("this terminal cannot hide what is typed; --password-stdin reads the password") from None
    if password != again:
        raise GatepostError("the two passwords are not the same; nothing is changed")
    return password


def _done(words: str, answer: dict[str, Any], *, as_json: bool) -> int:
    if as_json:
        say_json(answer)
    else:
        say(words)
    return DONE


def _not_found(words: str, *, as_json: bool) -> int:
    if as_json:
        say_json({"found": False, "problems": [words]})
    sys.stderr.write(f"gatepost: {printable(words)}\n")
    return BAD_NEWS


def _state(one: Account) -> str:
    return "bait" if one.bait else "locked" if one.locked else "open"


def _day(seconds: int | None) -> str:
    """A day as people write it, of UTC."""
    return _NEVER if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _hour(seconds: int | None) -> str:
    """The hour is as exact as a last use is kept."""
    return _NEVER if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:00 UTC")


def _rows(one: Account) -> list[tuple[str, str, str, str, str]]:
    own = (one.name, _state(one), _day(one.created), "", "")
    return [own, *((one.name, _state(one), _day(d.created), d.label, _hour(d.last_used)) for d in one.devices)]


def _show(rows: list[tuple[str, str, str, str, str]]) -> None:
    if not sys.stdout.isatty():
        sys.stdout.writelines("\t".join(map(printable, row)) + "\n" for row in rows)
        return
    if not rows:
        say("there are no accounts; `gatepost account add NAME` makes one")
        return
    table = Table("account", "state", "since", "device", "last use", box=None, pad_edge=False, header_style="bold")
    shown = ""
    for name, state, since, label, used in rows:
        first = name != shown
        table.add_row(
            *(printable(cell) for cell in (name if first else "", state if first else "", since, label, used))
        )
        shown = name
    Console(highlight=False, markup=False, emoji=False).print(table)


def _json(one: Account) -> dict[str, Any]:
    return {
        "name": one.name,
        "state": _state(one),
        "created": _stamp(one.created),
        "devices": [
            {"label": d.label, "created": _stamp(d.created), "last_used": _stamp(d.last_used)} for d in one.devices
        ],
    }


def _stamp(seconds: int | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
