"""What a probe found, as a report to hand on: an object for programs, and one page of HTML for people.

Why: whoever lists or delists a relay decides on a dialogue, not on an assertion.  The report says what was asked, when,
    from where, and what the server said to it, word for word; and as plainly what was not tested.
Trust: each word of the server is hostile, and the page is opened by people who are attacked for a living: all text is
    escaped, nothing is loaded, nothing runs, and the page itself forbids it (Content-Security-Policy).
Promise: pure; both forms say the same, and no password of the person who tested.
Sources: RFC 3339 §5.6 (times); CSP Level 3 §6 (what the page may do); WCAG 2.2 §1.4.1 (no meaning by colour alone).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from html import escape
from itertools import takewhile
from typing import Any

from gatepost.probe.reply import Outcome
from gatepost.probe.report import Attempt, Delivery, Report, Round, Verdict

SENTENCES = {
    Verdict.CLOSED: "it refused every form of relaying",
    Verdict.OPEN: "it takes mail from strangers for strangers",
    Verdict.UNKNOWN: "it cannot be told whether it relays",
}
WORDS = {Verdict.CLOSED: "CLOSED", Verdict.OPEN: "OPEN RELAY", Verdict.UNKNOWN: "UNKNOWN"}


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What a report does not know of itself.

    Attributes:
        begun: when the first question was asked, in UTC.
        version: of Gatepost.
    """

    begun: datetime
    version: str


def evidence_object(report: Report, circumstances: Circumstances) -> dict[str, Any]:
    """Everything, for a program."""
    return {
        "target": str(report.target),
        "verdict": report.verdict.value,
        "sentence": f"{report.target}: {SENTENCES[report.verdict]}",
        "why": list(report.why),
        "rests_on": _grounds(report),
        "not_tested": list(not_tested(report)),
        "begun": _time(circumstances.begun),
        "ended": _time(circumstances.begun + timedelta(seconds=report.seconds)),
        "seconds": report.seconds,
        "version": f"gatepost {circumstances.version}",
        "outside": report.outside,
        "delivery": None if report.delivery is None else _delivery_object(report.delivery),
        "rounds": [_round_object(one) for one in report.rounds],
    }


def not_tested(report: Report) -> Iterator[str]:
    """What nothing follows for from this report, as sentences."""
    for version in (4, 6):
        if version not in {one.address.version for one in report.rounds}:
            yield f"IPv{version}: no address of this server was asked over it."
    for address in dict.fromkeys(one.address for one in report.rounds):
        modes = {one.tls for one in report.rounds if one.address == address}
        if modes != {False, True}:
            yield f"{address} {'in plain' if False not in modes else 'under TLS'}: not asked, or not offered."
    for one in report.rounds:
        if len(one.attempts) < one.planned:
            yield f"{one.name}: {one.planned - len(one.attempts)} of {one.planned} forms were not asked."
    if report.delivery is None:
        yield "Delivery: no message was sent. What a server says to RCPT it may take back after the content."
    elif report.delivery.taken and not report.delivery.arrived:
        yield "Delivery: the message was taken; that it arrived was not seen by this program."
    yield f"Foreign addresses other than {report.outside}, and local domains other than those named here."
    yield "What the server allows to clients at addresses that it trusts, and to users who log in."


def first_dialogue(report: Report) -> tuple[str, tuple[str, ...]] | None:
    """The first form that relays: what it is, and the whole dialogue from the greeting; None where none does."""
    if report.first_accepted is None:
        return None
    one, attempt = report.first_accepted
    greeting = takewhile(lambda line: not line.startswith("C: MAIL"), one.opening)
    return title(attempt), (*greeting, *attempt.transcript)


def title(attempt: Attempt) -> str:
    """A form in a line."""
    return f"{attempt.id}: {attempt.why} ({attempt.source})"


def worst(attempts: Iterable[Attempt]) -> Attempt:
    """The one of a form's attempts that speaks most for a relay."""
    order = (Outcome.ACCEPTED, Outcome.UNCLEAR, Outcome.REFUSED)
    return min(attempts, key=lambda attempt: order.index(attempt.outcome))


def by_form(rounds: Iterable[Round]) -> dict[str, list[Attempt | None]]:
    """Of each form its attempt in each round; None where it was not asked."""
    columns = [{attempt.id: attempt for attempt in one.attempts} for one in rounds]
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name) for column in columns] for name in names}


def manner(one: Round) -> str:
    """How the server was spoken to."""
    return f"under {one.tls_version}" if one.tls_version else "under TLS" if one.tls else "in plain"


def _time(when: datetime) -> str:
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---- for a program


def _delivery_object(delivery: Delivery) -> dict[str, Any]:
    return {
        "token": delivery.token,
        "address": delivery.address,
        "form": delivery.form,
        "taken": delivery.taken,
        "arrived": delivery.arrived,
        "inbox": delivery.inbox,
        "reply": delivery.reply,
        "transcript": list(delivery.transcript),
    }


def _round_object(one: Round) -> dict[str, Any]:
    return {
        "address": str(one.address),
        "port": one.port,
        "from": one.own_address,
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


# ---- for a person

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f3f4f6; color: #1b1f24; font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; background: #fff; padding: 2rem 2.5rem 3rem; }
header { border-left: .5rem solid; padding-left: 1.1rem; }
header p { margin: 0; }
.open { border-color: #b3261e; } .closed { border-color: #1a7f37; } .unknown { border-color: #9a6700; }
.open .verdict { color: #b3261e; } .closed .verdict { color: #1a7f37; } .unknown .verdict { color: #9a6700; }
.verdict { font-weight: 700; font-size: 1.15rem; letter-spacing: .06em; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .7rem; padding-bottom: .25rem; border-bottom: 1px solid #d0d7de; font-size: 1.2rem; }
h3 { margin: 1.4rem 0 .4rem; font-size: 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #eaeef2; }
.facts th { width: 11rem; font-weight: 600; }
td, li, p { overflow-wrap: anywhere; }
code, pre { font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
pre { margin: 0; padding: .7rem .9rem; background: #f6f8fa; border: 1px solid #d0d7de; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.c { font-weight: 600; } .s { color: #444d56; }
.accepts { color: #b3261e; font-weight: 700; } .unclear { color: #9a6700; font-weight: 600; }
.refuses { color: #444d56; }
.forms th, .forms td { font-size: 13px; white-space: nowrap; } .forms td:last-child { white-space: normal; }
.forms a { color: inherit; }
.note { color: #57606a; margin: .2rem 0 .4rem; } ul { margin: .4rem 0; padding-left: 1.2rem; }
a { color: #0550ae; }
footer { margin-top: 2.5rem; color: #57606a; font-size: 13px; }
@media print {
  @page { margin: 16mm; }
  body { background: #fff; font-size: 10pt; } main { max-width: none; padding: 0; } code, pre { font-size: 8.5pt; }
  h2, h3 { break-after: avoid; } tr, .dialogue { break-inside: avoid; } thead { display: table-header-group; }
  a { color: inherit; text-decoration: none; }
}
"""


def evidence_page(report: Report, circumstances: Circumstances) -> str:
    """One page that needs nothing but itself."""
    return "".join(f"{line}\n" for line in _page(report, circumstances))


def _page(report: Report, circumstances: Circumstances) -> Iterator[str]:
    word = WORDS[report.verdict]
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield '<meta name="referrer" content="no-referrer">'
    yield f"<title>{escape(f'Relay test of {report.target}: {word}')}</title>"
    yield f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>"
    yield f'<header class="{report.verdict.value}">\n<p>Relay test of a mail server</p>'
    yield f"<h1>{escape(str(report.target))}</h1>"
    sentence = SENTENCES[report.verdict]
    yield f'<p><span class="verdict">{word}</span>: {escape(sentence)}.</p>\n</header>'
    yield from _facts(report, circumstances)
    yield from _reasons(report)
    dialogue = first_dialogue(report)
    if dialogue is not None:
        yield "<h2>The dialogue that shows it</h2>"
        yield "<p>The whole dialogue of the first form that was accepted. C is the tester, S the server.</p>"
        yield f"<h3>{escape(dialogue[0])}</h3>"
        yield _dialogue(dialogue[1])
    if report.delivery is not None:
        yield from _delivery(report.delivery)
    yield "<h2>What was not tested</h2>"
    yield _list(not_tested(report))
    yield from _forms(report)
    yield from _dialogues(report)
    yield f"<footer>Written by gatepost {escape(circumstances.version)}, <code>gatepost probe</code>."
    yield "Replies are shown as they came, with a question mark for each character that cannot be printed.</footer>"
    yield "</main>\n</body>\n</html>"


def _facts(report: Report, circumstances: Circumstances) -> Iterator[str]:
    began = circumstances.begun.astimezone(UTC)
    ended = began + timedelta(seconds=report.seconds)
    same_day = began.date() == ended.date()
    rows = [
        ("Server tested", [str(report.target)]),
        ("Its addresses", [f"{one.address} port {one.port}, {manner(one)}" for one in report.rounds] or ["none"]),
        ("Its greeting", dict.fromkeys(one.greeting or "none" for one in report.rounds)),
        ("Its local domains", dict.fromkeys(domain for one in report.rounds for domain in one.local_domains)),
        ("Tested from", dict.fromkeys(one.own_address for one in report.rounds if one.own_address)),
        ("Tested", [f"{began:%Y-%m-%d %H:%M:%S} to {ended:{'%H:%M:%S' if same_day else '%Y-%m-%d %H:%M:%S'}} UTC"]),
        ("Asked to relay to", [report.outside]),
        ("Forms asked", [f"{one.name}: {len(one.attempts)} of {one.planned}" for one in report.rounds]),
        ("Tested with", [f"gatepost {circumstances.version}"]),
        ("Rests on", [_grounds(report)]),
    ]
    yield '<h2>The test</h2>\n<table class="facts">'
    for name, values in rows:
        yield f'<tr><th scope="row">{name}</th><td>{"<br>".join(map(escape, values))}</td></tr>'
    yield "</table>"


def _grounds(report: Report) -> str:
    """How strong the evidence is."""
    if report.delivery is not None and report.delivery.arrived:
        return "a message that arrived: proof"
    if report.delivery is not None and report.delivery.taken:
        return "a message that the server took to hand on, and its replies to RCPT"
    return "the server's replies to RCPT: its word that it would, or would not"


def _reasons(report: Report) -> Iterator[str]:
    yield "<h2>What was found</h2>"
    yield _list(report.why)
    yield (
        "<p>Each form below is one way to ask the server to hand mail on from a stranger to a stranger. It was asked up"
        " to the reply to RCPT and then taken back. <b>Accepts</b>: the server said that it would hand the mail on."
        " <b>Refuses</b>: it said that it would not. <b>Unclear</b>: the reply says nothing about relaying.</p>"
    )


def _delivery(delivery: Delivery) -> Iterator[str]:
    yield "<h2>Delivery</h2>"
    to = f"One message with the mark <code>{escape(delivery.token)}</code> was sent to {escape(delivery.address)}"
    by = f"by the form {escape(delivery.form)}"
    if not delivery.taken:
        yield f"<p>{to}, last {by}. The server did not take it.</p>"
    elif delivery.arrived:
        found = f"the mark was found in the inbox at {escape(delivery.inbox)}"
        yield f"<p>{to} {by}. The server took it, and <b>it arrived</b>: {found}.</p>"
    else:
        seen = (
            f" While this program looked, it was not in the inbox at {escape(delivery.inbox)}."
            if delivery.inbox
            else ""
        )
        yield f"<p>{to} {by}. The server took it.{seen} Where a message with this mark is found, it was relayed.</p>"
    yield _dialogue(delivery.transcript)


def _forms(report: Report) -> Iterator[str]:
    rounds = [one for one in report.rounds if one.attempts]
    if not rounds:
        return
    yield '<h2>Every form</h2>\n<table class="forms">\n<thead><tr><th scope="col">Form</th>'
    yield "".join(f'<th scope="col">{escape(one.name)}</th>' for one in rounds)
    yield '<th scope="col">Reply</th></tr></thead>\n<tbody>'
    numbers = [report.rounds.index(one) for one in rounds]
    for name, row in by_form(rounds).items():
        cells = "".join(
            f'<td class="{attempt.outcome.value}"><a href="#{_anchor(number, name)}">{attempt.outcome.value}</a></td>'
            if attempt
            else "<td>not asked</td>"
            for number, attempt in zip(numbers, row, strict=True)
        )
        reply = worst(attempt for attempt in row if attempt is not None).reply
        yield f'<tr><th scope="row">{escape(name)}</th>{cells}<td><code>{escape(reply)}</code></td></tr>'
    yield "</tbody>\n</table>"


def _dialogues(report: Report) -> Iterator[str]:
    for number, one in enumerate(report.rounds):
        yield f"<h2>Every dialogue: {escape(str(one.address))} port {one.port}, {escape(manner(one))}</h2>"
        if one.opening:
            yield "<h3>What it says of itself, and to made-up users</h3>"
            yield _dialogue(one.opening)
        for attempt in one.attempts:
            yield f'<section class="dialogue" id="{_anchor(number, attempt.id)}">'
            yield f'<h3>{escape(attempt.id)}: <span class="{attempt.outcome.value}">{attempt.outcome.value}</span></h3>'
            yield f'<p class="note">{escape(attempt.why)} ({escape(attempt.source)})'
            yield f". Nothing can be concluded: {escape(attempt.note)}.</p>" if attempt.note else "</p>"
            yield f"{_dialogue(attempt.transcript)}</section>"


def _anchor(number: int, name: str) -> str:
    return escape(f"r{number}-{name}")


def _list(sentences: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"


def _dialogue(lines: Iterable[str]) -> str:
    shown = (f'<span class="{"c" if line.startswith("C") else "s"}">{escape(line)}</span>' for line in lines)
    return f"<pre>{chr(10).join(shown)}</pre>"
