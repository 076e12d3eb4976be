"""``gatepost trace``: search the journal, or watch it."""

from __future__ import annotations

import json
import select
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from io import UnsupportedOperation
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gatepost import config
from gatepost.answers import records
from gatepost.answers import trace as answers
from gatepost.answers.refused import moment
from gatepost.cli import BAD_NEWS, DONE, printable
from gatepost.cli.terminal import ConfigOption, JsonOption, warn
from gatepost.config import Config
from gatepost.errors import GatepostError, StorageError
from gatepost.store.journal import Journal, Kept, KeptSession, Query

FOLLOW_S = 0.3
LIMIT_MAX = 1_000_000

_STYLES = {"accepted": "green", "refused": "red", "deferred": "yellow", "admitted": ""}
WIDE_COLUMNS = 120
_FOLLOWED_COLUMNS = {False: (8, 15, 18, 18, 8), True: (8, 24, 32, 32, 8)}  # the second where the terminal is wide


def trace(
    text: Annotated[
        str,
        Parameter(
            help="An address, a domain, a client or network, a reference, a Message-ID, an account: it is guessed."
        ),
    ] = "",
    /,
    *,
    reverse_path: Annotated[str, Parameter(help='Who the mail claimed to come from; "<>" for bounces.')] = "",
    forward_path: Annotated[str, Parameter(help="Whom it was for.")] = "",
    domain: Annotated[str, Parameter(help="Of either of the two.")] = "",
    client: Annotated[str, Parameter(help="The client's IP address, or a network: 192.0.2.0/24.")] = "",
    account: Annotated[str, Parameter(help="The account that the client logged in to.")] = "",
    reference: Annotated[
        str, Parameter(help="Of a refusal, a message or a session: K7Q2M9XD-1, K7Q2M9XD.1, K7Q2M9XD.")
    ] = "",
    message: Annotated[str, Parameter(help='What stands behind "id" in our Received field: K7Q2M9XD.1.')] = "",
    message_id: Annotated[str, Parameter(help="What the message calls itself in Message-ID.")] = "",
    verdict: Annotated[str, Parameter(help="accepted, admitted (but no content came), deferred or refused.")] = "",
    reason: Annotated[str, Parameter(help="Why, in a word, as in the log: relaying, denied, rate, backend, ...")] = "",
    since: Annotated[
        str, Parameter(help='How long ago, such as "2h" or "7d"; or 2026-11-20, 2026-11-20T14:30 (UTC).')
    ] = "",
    until: Annotated[str, Parameter(help="As --since; a day means its end.")] = "",
    limit: Annotated[int, Parameter(help="So many, the newest; they are shown with the newest last.")] = 50,
    sessions: Annotated[
        bool,
        Parameter(help="Sessions instead of verdicts, also those without mail; by client, account, reference, time."),
    ] = False,
    follow: Annotated[bool, Parameter(alias="-f", help="Go on, and show what comes.")] = False,
    config_path: ConfigOption = None,
    as_json: JsonOption = False,
) -> int:
    """Search the journal: who sent what to whom, when, and what became of it.

    All that is given must hold. A table on a terminal; in a pipe, or with --json, one JSON object a line. Exit code:
    0 found, 1 nothing found, 2 the journal cannot be asked.
    """
    loaded = config.load_file(config.find(config_path))
    asked = answers.Asked(
        text, reverse_path, forward_path, domain, client, account, reference, message, message_id, verdict, reason,
        since, until,
    )  # fmt: skip
    understood = answers.understood(asked, datetime.now(UTC).timestamp())
    as_lines = as_json or not sys.stdout.isatty()
    if understood.taken_for and not as_json:
        warn(f'"{text}" is taken for {understood.taken_for}')
    if not (0 if follow else 1) <= limit <= LIMIT_MAX:
        raise GatepostError(f"--limit {limit}: write a number from 1 to {LIMIT_MAX:,}; 0 goes with --follow")
    if sessions and follow:
        raise GatepostError("--follow shows verdicts as they fall: leave --sessions out, or read the gate's log")
    with records.journal(loaded) as journal:
        _refuse_where_none_is_kept(loaded, journal, follow=follow)
        if sessions:
            return _sessions(journal, understood.queries, limit, as_lines=as_lines)
        last = journal.last_id() if follow else 0  # before the search: what comes meanwhile is in either
        found = answers.find(journal, understood.queries, limit + 1)
        more, found = len(found) > limit, found[-limit:] if limit else []
        if as_lines:
            _lines(found)
        else:
            _table(found)
        if follow:
            told = (kept.id for kept in found)
            _follow(journal, answers.Following(journal, understood.queries, last, told), as_lines=as_lines)
        if more:
            _say_more(limit)
        if not found:
            _nothing(journal)
    return DONE if found else BAD_NEWS


def _refuse_where_none_is_kept(loaded: Config, journal: Journal, *, follow: bool) -> None:
    """A journal that is switched off; what it has from before is found all the same."""
    if loaded.gate.journal.enabled:
        return
    where = loaded.sources.at(("journal", "enabled"))
    if journal.empty or follow:
        raise GatepostError(
            f"there is no journal to {'follow' if follow else 'search'}: [journal] enabled = false ({where}); remove "
            "that, and the gate keeps one from its next reload on"
        )
    warn(f"the journal is switched off, [journal] enabled = false ({where}): what comes now is not in it")


def _say_more(limit: int) -> None:
    warn(f"these are the {limit:,} newest, and there are more: --limit and --until show others")


def _nothing(journal: Journal) -> None:
    since = journal.kept_since()
    if since is None:
        warn(f"nothing is found: the journal in {journal.name} is empty")
    else:
        warn(f"nothing is found in the journal in {journal.name}, which begins on {moment(since)}")


def _follow(journal: Journal, following: answers.Following, *, as_lines: bool) -> None:
    """Until somebody has seen enough.  A database that goes away is waited for."""
    wait, away = _waiting(), False
    while True:
        try:
            found = following.step()
        except StorageError as error:
            if not away:
                warn(f"{error}; waiting for it")
            away = True
        else:
            if away:
                warn(f"the journal in {journal.name} answers again")
            away = False
            if as_lines:
                _lines(found)
            else:
                for kept in found:
                    _line(kept)
        wait()


def _waiting() -> Callable[[], None]:
    """Waits a moment.  Where whoever reads us went away it is known at once, though nothing may come for hours."""
    try:
        descriptor = sys.stdout.fileno()
    except (UnsupportedOperation, AttributeError):
        return lambda: time.sleep(FOLLOW_S)
    poll = select.poll()
    poll.register(descriptor, 0)

    def wait() -> None:
        if poll.poll(FOLLOW_S * 1000):
            raise BrokenPipeError

    return wait


# --- Verdicts ---------------------------------------------------------------------------------------------------------


def _lines(found: Iterable[Kept]) -> None:
    for kept in found:
        sys.stdout.write(json.dumps(answers.row(kept)) + "\n")
    sys.stdout.flush()


def _cells(kept: Kept) -> tuple[str, str, str, str, str]:
    entry, identity = kept.entry, kept.session.identity
    who = answers.client_text(kept) if identity is None else identity.account
    to = "-" if entry.forward_path is None else str(entry.forward_path)
    return who, str(entry.reverse_path), to, entry.verdict, answers.why(kept)


def _table(found: Sequence[Kept]) -> None:
    if not found:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    console = Console(highlight=False, markup=False, emoji=False)
    wide = console.width >= WIDE_COLUMNS
    days = len({kept.entry.at // 86400 for kept in found}) > 1
    for heading, most in (
        ("time UTC", 0),
        ("who", 24 if wide else 16),
        ("from", 34 if wide else 18),
        ("to", 34 if wide else 18),
    ):
        table.add_column(heading, no_wrap=True, overflow="ellipsis", max_width=most or None)
    table.add_column("verdict", no_wrap=True)
    table.add_column("why", overflow="fold")
    for kept in found:
        at = f"{datetime.fromtimestamp(kept.entry.at, UTC):{'%m-%d %H:%M:%S' if days else '%H:%M:%S'}}"
        *cells, verdict, why = _cells(kept)
        table.add_row(
            at, *(Text(printable(cell)) for cell in cells), Text(verdict, _STYLES[verdict]), Text(printable(why))
        )
    console.print(table)


def _line(kept: Kept) -> None:
    """One more, in columns of its own: what is still to come is not known."""
    *cells, why = _cells(kept)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    widths = _FOLLOWED_COLUMNS[console.width >= WIDE_COLUMNS]
    at = f"{datetime.fromtimestamp(kept.entry.at, UTC):%H:%M:%S}"
    shown = [_fit(cell, columns) for cell, columns in zip((at, *cells), widths, strict=True)]
    text = Text(printable(" ".join(shown[:-1]))).append(f" {shown[-1]}", _STYLES[kept.entry.verdict])
    console.print(text.append(f" {printable(why)}"))


def _fit(cell: str, columns: int) -> str:
    text = Text(printable(cell))
    text.truncate(columns, overflow="ellipsis", pad=True)
    return text.plain


# --- Sessions ---------------------------------------------------------------------------------------------------------


def _sessions(journal: Journal, queries: Sequence[Query], limit: int, *, as_lines: bool) -> int:
    found = answers.find_sessions(journal, queries, limit + 1)
    ordered = found[-limit:]
    if as_lines:
        for one in ordered:
            sys.stdout.write(json.dumps(answers.session_row(one)) + "\n")
    elif ordered:
        _session_table(ordered)
    if len(found) > limit:
        _say_more(limit)
    if not ordered:
        _nothing(journal)
    return DONE if ordered else BAD_NEWS


def _session_table(found: Sequence[KeptSession]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("ended UTC", "session", "client", "listener", "hello", "account", "end"):
        table.add_column(heading, no_wrap=heading != "end", overflow="ellipsis" if heading != "end" else "fold")
    for one in found:
        failed = sum(login.get("verdict") != "verified" for login in one.logins)
        end = ", ".join(
            part
            for part in (
                one.how,
                f"{one.ended - one.started:.1f} s",
                _count(one.errors, "error"),
                _count(failed, "failed login"),
                one.reply,
            )
            if part
        )
        at = f"{datetime.fromtimestamp(one.ended, UTC):%m-%d %H:%M:%S}"
        cells = (at, one.reference, str(one.client), one.listen, one.hello, one.account or "-", end)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    Console(highlight=False, markup=False, emoji=False).print(table)


def _count(number: int, noun: str) -> str:
    return "" if not number else f"1 {noun}" if number == 1 else f"{number} {noun}s"
