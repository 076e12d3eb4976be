"""``gatepost probe``: is a server, ours or anybody's, an open relay?"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from itertools import takewhile
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from gatepost import probe as tester
from gatepost.cli import BAD_NEWS, DONE, NOT_DONE
from gatepost.cli.terminal import JsonOption, UnusedConfigOption, say, say_json
from gatepost.errors import GatepostError
from gatepost.probe import Attempt, Delivery, Outcome, Progress, Report, Round, Verdict
from gatepost.probe.report import Address, StartTls

REPLY_SHOWN_CHARACTERS = 72  # of each reply in the table

_CODES = {Verdict.CLOSED: DONE, Verdict.OPEN: BAD_NEWS, Verdict.UNKNOWN: NOT_DONE}
_HEADLINES = {
    Verdict.CLOSED: ("CLOSED", "bold green", "it refused every form of relaying"),
    Verdict.OPEN: ("OPEN RELAY", "bold red", "it takes mail from strangers for strangers"),
    Verdict.UNKNOWN: ("UNKNOWN", "bold yellow", "it cannot be told whether it relays"),
}
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
    with _progress() as progress:
        report = asyncio.run(tester.probe(target, settings, progress))
    if as_json:
        say_json(_report_object(report))
    else:
        _tell(report, verbose=verbose)
    return _CODES[report.verdict]


def _source(written: str) -> Address | None:
    try:
        return ip_address(written) if written else None
    except ValueError:
        raise GatepostError(f'--source "{written}": this is not an IP address') from None


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """One line on a terminal that says how far it is; nothing in a pipe."""
    console = Console(stderr=True, highlight=False)
    if not sys.stderr.isatty() or console.is_dumb_terminal:
        yield None
        return
    with console.status("") as status:
        yield lambda what, done, planned: status.update(f"{what}: {done} of {planned}")


# ---- for a person


def _tell(report: Report, *, verbose: bool) -> None:
    word, style, sentence = _HEADLINES[report.verdict]
    say(f"{word}: {report.target}: {sentence}", style)
    for one in report.rounds:
        under = f"under {one.tls_version}" if one.tls_version else "under TLS" if one.tls else "in plain"
        say(f"{one.name:<9} {one.address} {under}: {one.verdict.value}; local {', '.join(one.local_domains)}")
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
            _transcript(f"{one.name}: {_title(attempt)}", attempt.transcript)
    if not verbose and report.first_accepted is not None:
        one, attempt = report.first_accepted
        greeting = takewhile(lambda line: not line.startswith("C: MAIL"), one.opening)
        _transcript(_title(attempt), (*greeting, *attempt.transcript))


def _title(attempt: Attempt) -> str:
    return f"{attempt.id}: {attempt.why} ({attempt.source})"


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
    if delivery.taken:
        say(f"message   taken by the form {delivery.form}: {delivery.reply}")
        say(f"          look for {delivery.token} in the mailbox of {delivery.address}: there it is proof", "bold")
    else:
        say(f"message   not taken, last by the form {delivery.form}: {delivery.reply}")


def _table(report: Report) -> None:
    """A row a form, a column a round."""
    rounds = [one for one in report.rounds if one.attempts]
    if not rounds:
        return
    columns = [{attempt.id: attempt for attempt in one.attempts} for one in rounds]
    names = list(dict.fromkeys(name for column in columns for name in column))
    width = max(map(len, names))
    say("")
    head = "".join(f"{one.name:<9} " for one in rounds)
    say(f"{'form':<{width}}  {head}reply", "bold")
    for name in names:
        row = [column.get(name) for column in columns]
        worst = min((attempt for attempt in row if attempt is not None), key=_rank)
        cells = "".join(f"{attempt.outcome.value if attempt else '-':<9} " for attempt in row)
        reply = worst.reply
        if len(reply) > REPLY_SHOWN_CHARACTERS:
            reply = reply[: REPLY_SHOWN_CHARACTERS - 3] + "..."
        say(f"{name:<{width}}  {cells}{reply}".rstrip(), _STYLES[worst.outcome])


def _rank(attempt: Attempt) -> int:
    return (Outcome.ACCEPTED, Outcome.UNCLEAR, Outcome.REFUSED).index(attempt.outcome)


def _transcript(title: str, lines: tuple[str, ...]) -> None:
    say("")
    say(title, "bold")
    for line in lines:
        say(f"  {line}")


# ---- for a program


def _report_object(report: Report) -> dict[str, Any]:
    return {
        "target": str(report.target),
        "verdict": report.verdict.value,
        "why": list(report.why),
        "outside": report.outside,
        "seconds": report.seconds,
        "delivery": None if report.delivery is None else _delivery_object(report.delivery),
        "rounds": [_round_object(one) for one in report.rounds],
    }


def _delivery_object(delivery: Delivery) -> dict[str, Any]:
    return {
        "token": delivery.token,
        "address": delivery.address,
        "form": delivery.form,
        "taken": delivery.taken,
        "reply": delivery.reply,
        "transcript": list(delivery.transcript),
    }


def _round_object(one: Round) -> dict[str, Any]:
    return {
        "address": str(one.address),
        "port": one.port,
        "tls": one.tls_version or one.tls,
        "greeting": one.greeting,
        "local_domains": list(one.local_domains),
        "verdict": one.verdict.value,
        "why": list(one.why),
        "takes_anybody": one.takes_anybody,
        "forms": one.planned,
        "opening": list(one.opening),
        "attempts": [_attempt_object(attempt) for attempt in one.attempts],
    }


def _attempt_object(attempt: Attempt) -> dict[str, Any]:
    return {
        "form": attempt.id,
        "why": attempt.why,
        "source": attempt.source,
        "reverse_path": attempt.reverse_path,
        "forward_path": attempt.forward_path,
        "outcome": attempt.outcome.value,
        "reply": attempt.reply,
        "note": attempt.note,
        "transcript": list(attempt.transcript),
    }
