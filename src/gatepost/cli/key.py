"""``gatepost key list`` and ``rotate``: the keys of the tokens in our trace fields.

Trust: the administrator; what stands in the data directory belongs to the gate's user.
Promise: a key's octets are never shown.  What root does here is done as the gate's user.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cyclopts import App

from gatepost import config, control
from gatepost.answers import keys
from gatepost.cli import BAD_NEWS, DONE, NOT_DONE
from gatepost.cli.terminal import ConfigOption, JsonOption, say, say_json
from gatepost.config import Config
from gatepost.control import Reloaded
from gatepost.errors import GatepostError
from gatepost.gate import privileges, trace
from gatepost.gate.trace import KeyFile

key = App(
    name="key",
    help="The keys of the tokens that `gatepost whosent` reads: list them, make a new one. Exit code: as each command "
    "says.",
)


@key.command(name="list")
def list_(*, config_path: ConfigOption = None, as_json: JsonOption = False) -> int:
    """List the keys, the newest first: it seals the token of each message, and all of them read.

    A key reads what it sealed for as long as its file is there. Exit code: 0 listed, 1 one of them cannot be used, 2
    they cannot be looked at.
    """
    loaded = config.load_file(config.find(config_path))
    files = keys.found(loaded)
    bad = any(file.problem for file in files)
    if as_json:
        say_json({"directory": _directory(loaded), "keys": [_object(file, files) for file in files]})
        return BAD_NEWS if bad else DONE
    if not files:
        say(f"there is no key in {_directory(loaded)} yet; the gate makes one when it starts")
    for file in files:
        moment = f"made {_moment(file.made)}" if file.made else "made at no known time"
        say(f"{file.name:<16}{moment:<31}{_does(file, files)}", "bold red" if file.problem else "")
    if files and not _seals(files[0], files):
        say("no gate starts without a key to seal with: put the newest back, or make another: gatepost key rotate")
    return BAD_NEWS if bad else DONE


@key.command
def rotate(*, config_path: ConfigOption = None, as_json: JsonOption = False) -> int:
    """Make a new key, with which the gate seals from now on.

    A gate that runs is asked to reload, and takes the key; sessions that are open use it within a minute. Older keys
    stay, and what they sealed can be read for ever, until their files are removed. Exit code: 0 made, and taken where a
    gate runs, 2 not.
    """
    loaded = config.load_file(config.find(config_path))
    where = loaded.config_path or config.EMBEDDED_DEFAULT_NAME
    privileges.prepare_data(loaded.data, privileges.account_of(loaded.user, where), where)
    with keys.as_owner(loaded.data):
        made = trace.rotate(loaded.data)
    older = [file.name for file in keys.found(loaded) if file.name != made.name]
    outcome = _taken(loaded)
    if as_json:
        say_json(
            {
                "made": str(made.path),
                "older": older,
                "pid": None if outcome is None else outcome.pid,
                "taken": None if outcome is None else outcome.taken,
                "problems": [] if outcome is None else list(outcome.problems),
            }
        )
    else:
        _tell(made, older, outcome)
    return NOT_DONE if outcome is not None and outcome.taken is False else DONE


def _taken(loaded: Config) -> Reloaded | None:
    """What came of asking the running gate; None where none runs."""
    try:
        control.supervisor(loaded.pid_path)
    except GatepostError:
        return None
    return control.reload(loaded.pid_path, loaded.console_address)


def _tell(made: KeyFile, older: list[str], outcome: Reloaded | None) -> None:
    say(f"made: {made.path}")
    if outcome is None:
        say("no gate runs on this data; the next start takes it")
    elif outcome.taken is None:
        say(f"the gate (process {outcome.pid}) was asked to take it; its console did not say what came of it")
    elif outcome.taken:
        say(f"the gate (process {outcome.pid}) seals with it; sessions that are open do within a minute")
    else:
        say(f"the gate (process {outcome.pid}) refused to reload, and seals with the key before it", "bold red")
        for problem in outcome.problems:
            say(f"  {problem}")
    if older:
        say(f"still read, until the file is removed: {', '.join(older)}")


def _directory(loaded: Config) -> str:
    return str(Path(loaded.data) / "keys")


def _seals(file: KeyFile, files: list[KeyFile]) -> bool:
    return file is files[0] and file.number > 0 and not file.problem


def _does(file: KeyFile, files: list[KeyFile]) -> str:
    if file.problem:
        return f"CANNOT BE USED: {file.problem}"
    return "seals and reads" if _seals(file, files) else "reads what it sealed"


def _object(file: KeyFile, files: list[KeyFile]) -> dict[str, Any]:
    made = datetime.fromtimestamp(file.made, UTC).isoformat(timespec="seconds") if file.made else None
    return {
        "file": file.name,
        "made": made,
        "seals": _seals(file, files),
        "reads": not file.problem,
        "problem": file.problem or None,
    }


def _moment(at_s: float) -> str:
    return f"{datetime.fromtimestamp(at_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
