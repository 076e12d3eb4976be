"""``gatepost probe``: is a server, ours or anybody's, an open relay?"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from cyclopts import Parameter
from rich.console import Console

from gatepost import __version__
from gatepost import probe as tester
from gatepost.cli import BAD_NEWS, DONE, NOT_DONE
from gatepost.cli.report_file import ReportFile
from gatepost.cli.terminal import JsonOption, UnusedConfigOption, say, say_json
from gatepost.errors import GatepostError
from gatepost.probe import Delivery, Outcome, Report, Verdict
from gatepost.probe.evidence import (
    SENTENCES,
    WORDS,
    Circumstances,
    by_form,
    evidence_object,
    first_dialogue,
    manner,
    title,
    worst,
)
from gatepost.probe.report import Address, StartTls

Show = Callable[[str], None]

REPLY_SHOWN_CHARACTERS = 72  # of each reply in the table

_CODES = {Verdict.CLOSED: DONE, Verdict.OPEN: BAD_NEWS, Verdict.UNKNOWN: NOT_DONE}
_VERDICT_STYLES = {Verdict.CLOSED: "bold green", Verdict.OPEN: "bold red", Verdict.UNKNOWN: "bold yellow"}
_STYLES = {Outcome.ACCEPTED: "red", Outcome.UNCLEAR: "yellow", Outcome.REFUSED: ""}


def probe(
    host: Annotated[str, Parameter(help="HOST or HOST:PORT, one a run; IPv6 with a port as [2001:db8::1]:25.")],
    /,
    *,
    local_domain: Annotated[
        tuple[str, ...],
        Parameter(help="A domain that the server takes mail for; repeatable. Default: guessed from its name."),
    ] = (),
    outside: Annotated[
        str, Parameter(help=f"A foreign address that is asked for. Default: {tester.DEFAULT_OUTSIDE}.")
    ] = tester.DEFAULT_OUTSIDE,
    deliver: Annotated[
        str,
        Parameter(
            name=("--deliver", "--deliver-to"),
            help="Your own address elsewhere: one marked message is sent to it where the server takes it.",
        ),
    ] = "",
    reverse_path: Annotated[
        str, Parameter(name="--from", help='MAIL FROM where a form leaves it open. Default: "<>".')
    ] = "",
    hello: Annotated[str, Parameter(help="Our name in EHLO. Default: our address, in brackets.")] = "",
    port: Annotated[int | None, Parameter(help="Default: what HOST says, or 25.")] = None,
    ipv4: Annotated[bool, Parameter(help="Test over IPv4 alone. Default: over each family that HOST has.")] = False,
    ipv6: Annotated[bool, Parameter(help="Test over IPv6 alone.")] = False,
    starttls: Annotated[
        StartTls, Parameter(help='"auto": in plain, and under TLS where it is offered; or "never" or "require".')
    ] = "auto",
    source: Annotated[str, Parameter(help="The IP address to speak from.")] = "",
    pause: Annotated[float, Parameter(help="Seconds between two forms. Default: 0.2.")] = 0.2,
    timeout: Annotated[float, Parameter(help="Seconds for a connection and for each reply. Default: 30.")] = 30.0,
    inbox: Annotated[
        str, Parameter(help="A URL that shows the inbox of --deliver-to: the mark of the message is looked for there.")
    ] = "",
    inbox_stdin: Annotated[bool, Parameter(help="Read that URL from the first line of standard input.")] = False,
    inbox_wait: Annotated[float, Parameter(help="Seconds that it is looked for. Default: 120.")] = 120.0,
    report_file: Annotated[
        Path | None, Parameter(name="--report", help="Also write a report to hand on: FILE.html or FILE.json.")
    ] = None,
    force: Annotated[bool, Parameter(help="The report may replace a file.")] = False,
    verbose: Annotated[bool, Parameter(help="The transcript of every form, and why it is asked.")] = False,
    _config_path: UnusedConfigOption = None,
    as_json: JsonOption = False,
) -> int:
    """Test whether a server relays for strangers.

    Asks it some sixty forms of the question, up to the reply to RCPT, and takes each back: no mail is sent, unless
    --deliver names an address of yours. Some servers refuse only after the content; what they say to RCPT is worth
    nothing, and --deliver tells. Test from an address that the server does not trust. Exit code: 0 closed, 1 open, 2
    it could not be told.
    """
    if ipv4 and ipv6:
        raise GatepostError("--ipv4 and --ipv6 exclude each other; without them both are tested")
    settings = tester.ProbeSettings(
        local_domains=local_domain,
        outside=outside,
        deliver=deliver,
        reverse_path=reverse_path,
        hello=hello,
        families=(4,) if ipv4 else (6,) if ipv6 else (4, 6),
        starttls=starttls,
        source=_source(source),
        pause_s=pause,
        timeout_s=timeout,
    )
    target = tester.target_of(host, port)
    inbox = _inbox(inbox, inbox_wait, deliver, stdin=inbox_stdin)
    file = None if report_file is None else ReportFile(report_file, force=force)
    circumstances = Circumstances(datetime.now(UTC), __version__)
    with _status_line() as show:
        progress = None if show is None else partial(_show_progress, show)
        report = asyncio.run(tester.probe(target, settings, progress))
        if inbox and report.delivery is not None and report.delivery.taken:
            report = _looked_at(report, inbox, inbox_wait, show)
    if as_json:
        say_json(evidence_object(report, circumstances))
    else:
        _tell(report, verbose=verbose)
    if file is not None:
        file.write(report, circumstances)
        if not as_json:
            say(f"\nreport    {file.path}")
    return _CODES[report.verdict]


def _inbox(url: str, wait_s: float, deliver: str, *, stdin: bool) -> str:
    """The URL to look at; "" for none."""
    if not url and not stdin:
        return ""
    from gatepost.probe.inbox import INBOX_WAIT_S_MAX, URL_CHARACTERS_MAX, inbox_host

    if not deliver:
        raise GatepostError("--inbox: there is nothing to look for unless --deliver-to names an address")
    if not 0 <= wait_s <= INBOX_WAIT_S_MAX:
        raise GatepostError(f"--inbox-wait: from 0 to {INBOX_WAIT_S_MAX} seconds can be waited")
    if stdin:
        url = sys.stdin.readline(URL_CHARACTERS_MAX + 2).strip()
    inbox_host(url)
    if not stdin and urlsplit(url).password is not None:
        raise GatepostError("--inbox: others see the password in it; say --inbox-stdin, and give the URL that way")
    return url


def _looked_at(report: Report, inbox: str, wait_s: float, show: Show | None) -> Report:
    """The report, with what the inbox says of the message."""
    from gatepost.probe.inbox import arrived, inbox_host, with_arrival

    assert report.delivery is not None
    host = inbox_host(inbox)
    looking = None if show is None else partial(show, f"looking for {report.delivery.token} at {host}")
    try:
        found = asyncio.run(arrived(inbox, report.delivery.token, wait_s, looking))
    except KeyboardInterrupt:  # who waits no longer still wants the report
        found = False
    return with_arrival(report, found=found, host=host)


def _source(written: str) -> Address | None:
    try:
        return ip_address(written) if written else None
    except ValueError:
        raise GatepostError(f'--source "{written}": this is not an IP address') from None


@contextmanager
def _status_line() -> Iterator[Show | None]:
    """One line on a terminal that says how far it is; nothing in a pipe."""
    console = Console(stderr=True, highlight=False)
    if not sys.stderr.isatty() or console.is_dumb_terminal:
        yield None
        return
    with console.status("") as status:
        yield status.update


def _show_progress(show: Show, what: str, done: int, planned: int) -> None:
    show(f"{what}: {done} of {planned}")


# ---- for a person


def _tell(report: Report, *, verbose: bool) -> None:
    say(f"{WORDS[report.verdict]}: {report.target}: {SENTENCES[report.verdict]}", _VERDICT_STYLES[report.verdict])
    for one in report.rounds:
        say(f"{one.name:<9} {one.address} {manner(one)}: {one.verdict.value}; local {', '.join(one.local_domains)}")
        say(f"{'':<9} {one.greeting or 'no greeting'}")
    for sentence in report.why:
        say(f"why       {sentence}")
    for hint in _hints(report):
        say(f"next      {hint}", "yellow")
    if report.delivery is not None:
        _tell_delivery(report.delivery)
    _table(report)
    for one in report.rounds:
        if verbose:
            _transcript(f"{one.name}: what it says of itself, and to made-up users", one.opening)
        for attempt in one.attempts if verbose else ():
            _transcript(f"{one.name}: {title(attempt)}", attempt.transcript)
    dialogue = first_dialogue(report)
    if not verbose and dialogue is not None:
        _transcript(*dialogue)


def _hints(report: Report) -> Iterator[str]:
    """What the person can do about what is not known."""
    if report.verdict is not Verdict.UNKNOWN:
        return
    attempts = [attempt for one in report.rounds for attempt in one.attempts if attempt.outcome is Outcome.UNCLEAR]
    if any(attempt.reply.startswith("2") for attempt in attempts) and report.delivery is None:
        yield "--deliver you@elsewhere.example sends one message, and is certain; --local-domain, if it guessed wrong"
    if any("DNS" in attempt.note for attempt in attempts):
        yield "--outside with an address whose domain is in DNS: one of your own elsewhere"
    if any(attempt.reply.startswith("4") for attempt in attempts):
        yield "try again in ten minutes"
    if any("refuses us" in attempt.note for attempt in attempts):
        yield "test from another address, one that is on no list and has a name in DNS; --hello with that name"
    families = {one.address.version for one in report.rounds}
    if len(families) == 2 and {one.address.version for one in report.rounds if not one.attempts} != families:
        yield from (
            f"--ipv{10 - one.address.version} tests IPv{10 - one.address.version} alone"
            for one in report.rounds
            if not one.attempts and not one.tls
        )


def _tell_delivery(delivery: Delivery) -> None:
    if delivery.arrived:
        say(f"message   taken by the form {delivery.form}, and arrived: {delivery.token} is in the inbox", "bold red")
    elif delivery.taken:
        say(f"message   taken by the form {delivery.form}: {delivery.reply}")
        if delivery.inbox:
            say(f"          not seen at {delivery.inbox} yet; it may still come")
        say(f"          look for {delivery.token} in the mailbox of {delivery.address}: there it is proof", "bold")
    else:
        say(f"message   not taken, last by the form {delivery.form}: {delivery.reply}")


def _table(report: Report) -> None:
    """A row a form, a column a round."""
    rounds = [one for one in report.rounds if one.attempts]
    if not rounds:
        return
    rows = by_form(rounds)
    width = max(map(len, rows))
    say("")
    head = "".join(f"{one.name:<9} " for one in rounds)
    say(f"{'form':<{width}}  {head}reply", "bold")
    for name, row in rows.items():
        telling = worst(attempt for attempt in row if attempt is not None)
        cells = "".join(f"{attempt.outcome.value if attempt else '-':<9} " for attempt in row)
        reply = telling.reply
        if len(reply) > REPLY_SHOWN_CHARACTERS:
            reply = reply[: REPLY_SHOWN_CHARACTERS - 3] + "..."
        say(f"{name:<{width}}  {cells}{reply}".rstrip(), _STYLES[telling.outcome])


def _transcript(title: str, lines: tuple[str, ...]) -> None:
    say("")
    say(title, "bold")
    for line in lines:
        say(f"  {line}")
