"""``gatepost replay``: what another configuration would have done with the mail of the last days."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gatepost import config
from gatepost.answers import records, trace
from gatepost.answers import replay as answers
from gatepost.answers.refused import moment
from gatepost.answers.replay import Change, Group, Replayed
from gatepost.cli import BAD_NEWS, DONE
from gatepost.cli.terminal import JsonOption, say, say_json
from gatepost.config import Config
from gatepost.errors import GatepostError

_STYLES = {Change.REFUSED: "red", Change.DEFERRED: "yellow", Change.ADMITTED: "bold"}


def replay(
    *,
    config_path: Annotated[str | None, Parameter(name="--config", help="The new configuration file.")] = None,
    since: Annotated[
        str, Parameter(help='From when: how long ago, such as "7d" or "12h", or a day, such as 2026-11-20.')
    ] = "7d",
    until: Annotated[str, Parameter(help="Up to when, written so as well. Default: now.")] = "",
    against: Annotated[
        str | None,
        Parameter(help="Compare with what this configuration would say now, instead of what was decided then."),
    ] = None,
    journal_of: Annotated[
        str | None,
        Parameter(
            help="The configuration whose journal is read. Default: ./gatepost.toml, then /etc/gatepost/gatepost.toml, "
            "then the new one."
        ),
    ] = None,
    limit: Annotated[int, Parameter(help="So many groups of changes are told, at most 10,000.")] = 20,
    as_json: JsonOption = False,
) -> int:
    """Decide the journal's verdicts again under another configuration, and tell what would change.

    Newly refused and newly admitted mail, grouped by client and domain, the most surprising first. Nothing is changed.
    Exit code: 0 nothing would change, 1 something would, 2 it could not be told.
    """
    if config_path is None:
        raise GatepostError("--config is missing: the new configuration, to be tried on what the journal remembers")
    now_s = datetime.now(UTC).timestamp()
    begin, end = _times(since, until, now_s)
    new = config.load_file(config_path)
    before = None if against is None else config.load_file(against).gate
    owner = _journal_of(journal_of, new)
    limit = max(limit, 0)
    with records.journal(owner) as journal:
        if journal.kept_since() is None:
            # Not "nothing would change": it may be another gate's data directory.
            raise GatepostError(
                f"the journal in {journal.name} is empty, so that nothing can be told; --journal-of names the "
                "configuration of the gate whose journal it is"
            )
        total = journal.count_between(begin, end)
        with _progress(total, quiet=as_json) as progress:
            verdicts = journal.verdicts(begin, end)
            replayed = answers.replay(new.gate, verdicts, now_s, before=before, known=owner.gate, progress=progress)
        name, left_out = journal.name, max(total - replayed.verdicts, 0)
    if as_json:
        say_json({**answers.as_object(replayed, limit), "left_out": left_out})
    else:
        _tell(replayed, name, begin, limit)
        if left_out:
            say(
                f"{_count(left_out, 'verdict')} of that time cannot be decided again: of pseudonyms, or damaged",
                "yellow",
            )
    return DONE if replayed.same else BAD_NEWS


def _times(since: str, until: str, now_s: float) -> tuple[float, float]:
    (query,) = trace.understood(trace.Asked(since=since, until=until), now_s).queries
    return query.since or 0.0, now_s if query.until is None else query.until


def _journal_of(named: str | None, new: Config) -> Config:
    """The configuration whose journal it is."""
    found = config.find(named)
    return new if found is None or found == new.config_path else config.load_file(found)


@contextmanager
def _progress(total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing in a pipe."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = (TextColumn("deciding again"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=total)
        yield lambda done: shown.update(task, completed=done)


def _tell(replayed: Replayed, name: str, begin: float, limit: int) -> None:
    changes = replayed.changes
    say(f"{_count(replayed.verdicts, 'verdict')} since {moment(begin)} decided again, from {name}")
    if not replayed.verdicts:
        say("there is nothing in the journal of that time", "yellow")
        return
    if replayed.same:
        say("nothing would be refused or admitted that was not", "bold green")
    for change in (Change.REFUSED, Change.DEFERRED, Change.ADMITTED):
        if changes[change]:
            say(f"{changes[change]:>9}  {change.value}", _STYLES[change])
    if changes[Change.REASON]:
        say(f"{changes[Change.REASON]:>9}  {Change.REASON.value}")
    for group in replayed.groups[:limit]:
        say("")
        _tell_group(group)
    left = len(replayed.groups) - limit
    if left > 0:
        say(f"\n{_count(left, 'group')} more; --limit shows them")
    if replayed.others:
        say(f"{_count(replayed.others, 'change')} more, of too many clients and domains to tell one by one")
    for note in replayed.notes:
        say(f"note: {note}", "yellow")


def _tell_group(group: Group) -> None:
    entry = group.example.entry
    say(f"{group.change.value}: {group.actor}, {group.domain}: {group.why}", _STYLES[group.change])
    say(f"  then {group.then}; now {group.now}")
    path = "" if entry.forward_path is None else f" to {entry.forward_path}"
    reference = entry.reference or entry.message or group.example.reference
    client = group.example.session.client.address
    say(f"  such as {reference} of {moment(entry.at)}: {client}, from {entry.reverse_path}{path}")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
