"""``gatepost allow`` and ``gatepost deny``: a verdict of the journal made into an entry of gatepost.toml.

Promise: what is written was shown before, loads, and is proven; nobody is asked in a pipe, and nothing is written there
    without ``--write``.  A running gate takes it at once; where it refuses the file, the old one is put back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

from cyclopts import Parameter
from rich.prompt import Confirm

from gatepost import config, control
from gatepost.answers import alike, records
from gatepost.answers.alike import Decision, Proposal, Unadvised, Wish
from gatepost.cli import BAD_NEWS, DONE, NOT_DONE
from gatepost.cli.terminal import ConfigOption, JsonOption, say, say_json
from gatepost.config import Config, edit, sentences
from gatepost.errors import ConfigError, GatepostError
from gatepost.store.journal import Kept

Counts = list[dict[str, Any]]

Reference = Annotated[
    str | None,
    Parameter(help="The reference in a refusal, such as K7Q2M9XD-1, or the id of a message, such as K7Q2M9XD.1."),
]
RowId = Annotated[int | None, Parameter(name="--id", help="The id of a row, as gatepost trace --json has it.")]
Network = Annotated[
    str | None, Parameter(help="This network, which holds the client, in place of the client alone: 10.1.2.0/24.")
]
Why = Annotated[str | None, Parameter(help="Why, for whoever reads the file later.")]
Owner = Annotated[str | None, Parameter(help="Whom to ask about it, such as it@example.com.")]
Write = Annotated[bool, Parameter(help="Write it without asking.")]
DryRun = Annotated[bool, Parameter(help="Show it, and neither ask nor write.")]


def allow(
    reference: Reference = None,
    /,
    *,
    row_id: RowId = None,
    network: Network = None,
    forward_domain: Annotated[bool, Parameter(help="To the forward-path's whole domain, not to it alone.")] = False,
    any_forward_path: Annotated[bool, Parameter(help="To anybody.")] = False,
    any_reverse_path: Annotated[bool, Parameter(help="As anybody.")] = False,
    why: Why = None,
    owner: Owner = None,
    expires: Annotated[str | None, Parameter(help="30d, 2027-06-30 or never. Default: 90d.")] = None,
    write: Write = False,
    dry_run: DryRun = False,
    config_path: ConfigOption = None,
    as_json: JsonOption = False,
) -> int:
    """Let mail like this pass: the narrowest [[trust]] entry for a message that was refused.

    Shows the entry, what it would have changed in the last 30 days and the proof of the file with it in, and asks
    before it writes; all else in the file stays as it is. Exit code: 0 written, or shown where it was not to be
    written, 1 there is nothing to allow, no entry helps, or you said no, 2 it cannot be done.
    """
    wish = Wish(network, forward_domain, any_forward_path, any_reverse_path, None, why, owner, expires)
    asked = _Asked("allow", reference, row_id, write=write, dry_run=dry_run, as_json=as_json)
    return _decide(asked, config_path, lambda loaded, kept, now, _: alike.allow(loaded, kept, wish, now))


def deny(
    reference: Reference = None,
    /,
    *,
    row_id: RowId = None,
    by: Annotated[
        str | None,
        Parameter(help="By which of these: network, reverse_path, forward_path, helo or host. Default: the safest."),
    ] = None,
    network: Network = None,
    why: Why = None,
    owner: Owner = None,
    expires: Annotated[str | None, Parameter(help="30d, 2027-06-30 or never. Default: never.")] = None,
    write: Write = False,
    dry_run: DryRun = False,
    config_path: ConfigOption = None,
    as_json: JsonOption = False,
) -> int:
    """Refuse mail like this from now on: the narrowest [[deny]] entry for a message of the journal.

    Shows the entry, each other way to deny it with how many messages of the last 30 days it would have hit, and asks
    before it writes; all else in the file stays as it is. Exit code: 0 written, or shown where it was not to be
    written, 1 it is denied already, or you said no, 2 it cannot be done.
    """
    if by is not None and network is not None and by != "network":
        raise GatepostError("--network says by what to deny: leave --by out")
    wish = Wish(network, by=by, why=why, owner=owner, expires=expires)
    asked = _Asked("deny", reference, row_id, write=write, dry_run=dry_run, as_json=as_json)
    return _decide(asked, config_path, lambda loaded, kept, now, counts: alike.deny(loaded, kept, wish, now, counts))


class _Asked:
    """How it was asked."""

    def __init__(
        self, decision: str, reference: str | None, row_id: int | None, *, write: bool, dry_run: bool, as_json: bool
    ) -> None:
        if write and dry_run:
            raise GatepostError("--write and --dry-run exclude each other: leave one of them out")
        self.decision = decision
        self.reference = reference
        self.row_id = row_id
        self.write = write
        self.dry_run = dry_run
        self.as_json = as_json
        self.asks = not (write or dry_run or as_json) and sys.stdin.isatty() and sys.stdout.isatty()


def _decide(
    asked: _Asked,
    config_path: str | None,
    propose: Callable[[Config, Kept, float, Counts], Proposal | Unadvised],
) -> int:
    now = datetime.now(UTC).timestamp()
    path = config.find(config_path)
    if path is None:
        raise ConfigError(
            ["there is no configuration file for an entry to be written into: gatepost init writes one; see --config"]
        )
    octets = config.read(path)
    loaded = config.load(octets, path)
    with records.journal(loaded) as journal:
        kept = alike.look_up(journal, asked.reference, asked.row_id)
        nothing = alike.not_found(journal) if kept is None else ""
        counts: Counts = []
        if asked.decision == "deny" and kept is not None and not kept.pseudonymous:
            counts = alike.counted(journal, kept, now)
    if kept is None:
        return _not_found(asked, nothing)
    if kept.pseudonymous:
        raise GatepostError(
            "the row is so old that its names and its client are pseudonyms by now: nothing can be told by it"
        )
    proposed = propose(loaded, kept, now, counts)
    # Outside of the journal, within which root is another user: the file may name secrets that only root reads.
    decision = alike.decision(loaded, octets, kept, proposed, now)
    told = {"decision": asked.decision, **decision.told}
    if isinstance(proposed, Proposal) and decision.gate is not None:
        with records.journal(loaded) as journal:
            told["replay"] = alike.replay(journal, loaded.gate, decision.gate, proposed.query, now)
    if counts:
        told["alternatives"] = counts
    if not asked.as_json:
        _tell(told)
    if not decision.new:
        if asked.as_json:
            say_json(told | {"written": False})
        return BAD_NEWS
    return _finish(asked, loaded, decision, told)


def _not_found(asked: _Asked, nothing: str) -> int:
    if asked.as_json:
        say_json({"decision": asked.decision, "advisable": False, "reasons": [nothing], "written": False})
    else:
        say(nothing, "bold red")
    return BAD_NEWS


def _finish(asked: _Asked, loaded: Config, decision: Decision, told: dict[str, Any]) -> int:
    path = loaded.config_path
    if not asked.write and not (asked.asks and Confirm.ask(f"Write this into {path}?", default=False)):
        if asked.as_json:
            say_json(told | {"written": False})
        elif asked.asks:
            say("nothing is written")
        else:
            say("nothing is written; --write does")
        return BAD_NEWS if asked.asks else DONE
    edit.write(path, decision.old, decision.new)
    outcome = _reload(loaded, decision)
    if asked.as_json:
        say_json(told | {"written": outcome["taken"] is not False, "reload": outcome})
    elif outcome["taken"] is False:
        say(f"the gate refused {path}, and the old file is back in its place", "bold red")
        for problem in outcome["problems"]:
            say(f"  {problem}")
    else:
        say(f"written into {told['where']}", "bold green")
        say(outcome["words"])
    return NOT_DONE if outcome["taken"] is False else DONE


def _reload(loaded: Config, decision: Decision) -> dict[str, Any]:
    """Let the gate take the file; where it refuses it, put the old one back."""
    try:
        outcome = control.reload(loaded.pid_path, loaded.console_address)
    except GatepostError as error:
        return {"pid": None, "taken": None, "problems": [], "words": f"no gate was told: {error}"}
    told = {"pid": outcome.pid, "taken": outcome.taken, "problems": list(outcome.problems)}
    if outcome.taken is False:
        edit.write(loaded.config_path, decision.new, decision.old)
        return told | {"words": "the gate refused it"}
    if outcome.taken is None:
        words = f"the gate (process {outcome.pid}) was asked to read it; its console did not say what came of it"
        return told | {"words": words}
    return told | {"words": f"the gate (process {outcome.pid}) runs on it"}


# --- In words ---------------------------------------------------------------------------------------------------------


def _tell(told: dict[str, Any]) -> None:
    say(told["then"], "bold")
    say(f"why     {told['why']}")
    if "toml" not in told:
        for reason in told["reasons"]:
            say(f"no      {reason}", "bold red")
        return
    say(f"\nTo be added at {told['where']}\n")
    for line in told["toml"].splitlines():
        say(f"  {line}", "cyan")
    say("")
    for line in alike.replay_text(told["replay"]):
        say(line)
    if "alternatives" in told:
        _tell_alternatives(told)
    for note in told["notes"]:
        say(f"note    {note}", "yellow")
    say("")
    say(sentences.proof_text(told["proof"]), "bold green" if told["proof"]["proven"] else "bold red")
    for reason in told["reasons"]:
        say(f"no      {reason}", "bold red")


def _tell_alternatives(told: dict[str, Any]) -> None:
    say(f"what each way would have hit in the last {alike.REPLAY_DAYS} days (--by chooses)")
    for one in told["alternatives"]:
        mark = "*" if told["entry"].get(one["by"]) == one["value"] else " "
        at_least = "" if one["complete"] else "at least "
        hit = f"{at_least}{one['messages']:,} {'message' if one['messages'] == 1 else 'messages'}"
        say(f" {mark} {one['by']:<13} {one['value']}: {hit}, {one['accepted']:,} of them accepted")
