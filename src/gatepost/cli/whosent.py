"""``gatepost whosent``: which account or client sent what a complaint complains of, verified, or "not ours".

Trust: the complaint is hostile text; whatever is shown of it is shown as text.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from gatepost import config
from gatepost.answers import whosent as answers
from gatepost.cli import BAD_NEWS, DONE
from gatepost.cli.terminal import ConfigOption, JsonOption, say, say_json, warn
from gatepost.complaint import COMPLAINT_OCTETS_MAX
from gatepost.errors import GatepostError
from gatepost.telemetry.log import printable

_STYLES = {
    answers.OURS: "bold green",
    answers.BY_JOURNAL: "bold green",
    answers.IN_DOUBT: "bold yellow",
    answers.NOT_OURS: "bold red",
}
_MARKS = {"ours": "OURS", "forged": "FORGED", "damaged": "DAMAGED"}
_LINE_STYLES = {"ours": "green", "forged": "red", "damaged": "yellow"}
_TEXT_MAX = 300
_LONG_WORD = re.compile(r"([A-Za-z0-9_-]{8})[A-Za-z0-9_-]{32,}")  # tokens; --json has them whole
_LISTED_MAX = 5  # recipients of one message


def whosent(
    file: Annotated[
        str,
        Parameter(
            help='The complaint, as it came; "-" reads standard input, to which it may be pasted.',
            allow_leading_hyphen=True,
        ),
    ],
    /,
    *,
    kind: Annotated[
        Literal["complaint", "message"] | None,
        Parameter(
            help="What the file is: a complaint with the message in it, or the message itself. Default: guessed."
        ),
    ] = None,
    config_path: ConfigOption = None,
    as_json: JsonOption = False,
) -> int:
    """Say who sent what a complaint complains of: by the token in our trace field, which only this gate could seal.

    Takes what people send: a forwarded message, an attachment, pasted header fields, a feedback report (ARF), the text
    of a screenshot. Says which account or client it was, what let it through and whose entry that is, what else was
    sent on that day, which Received lines are forged, and drafts a reply. The journal is asked besides; the token
    answers without it. Exit code: 0 ours, 1 not ours or in doubt, 2 it cannot be told.
    """
    loaded = config.load_file(config.find(config_path))
    answer = answers.answer(loaded, _read(file), datetime.now(UTC).timestamp(), kind or "")
    if as_json:
        say_json(answer)
    else:
        _tell(answer)
    return DONE if answer["verdict"] in (answers.OURS, answers.BY_JOURNAL) else BAD_NEWS


def _read(file: str) -> bytes:
    """One octet more than is looked at, so that it can be said that there are more."""
    if file == "-":
        if sys.stdin.isatty():
            warn("waiting for the complaint: paste it, then press Return and Ctrl-D")
        return sys.stdin.buffer.read(COMPLAINT_OCTETS_MAX + 1)
    try:
        with Path(file).open("rb") as opened:
            return opened.read(COMPLAINT_OCTETS_MAX + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "this is no name of a file"
        raise GatepostError(f"cannot read the complaint {file}: {why}") from None


# --- In words ---------------------------------------------------------------------------------------------------------


def _tell(answer: dict[str, Any]) -> None:
    say(_headline(answer), _STYLES[answer["verdict"]])
    for label, text in _facts(answer):
        say(f"{label:<8}{printable(text)}")
    for doubt in answer["doubts"]:
        say(f"doubt   {printable(doubt)}", "yellow")
    for note in answer["notes"]:
        say(f"note    {printable(note)}", "yellow")
    _tell_day(answer)
    if answer["received"]:
        say("\nReceived lines, the newest first", "bold")
        for line in answer["received"]:
            _tell_line(line)
        if any(line["mark"] == "not ours" for line in answer["received"]):
            say('  "not ours" were there when the message came to us: whoever sent it may have forged them')
    say("\nDraft of a reply", "bold")
    for line in answer["reply"].split("\n"):
        say(f"  {line}" if line else "")


def _headline(answer: dict[str, Any]) -> str:
    verdict, why = answer["verdict"], answer["why"]
    if verdict == answers.NOT_OURS:
        so_far = ", as far as can be told" if answer["reason"] in answers.UNTOLD else ""
        return f"NOT OURS{so_far}: {printable(why)}"
    who = (
        f"the account {answer['account']}"
        if answer["account"] is not None
        else f"the client {answer['client']}, without a login"
    )
    return printable(f"{verdict.upper()}: {'perhaps ' if verdict == answers.IN_DOUBT else ''}{who}; {why}")


def _facts(answer: dict[str, Any]) -> Iterator[tuple[str, str]]:
    complaint = answer["complaint"]
    if complaint["from"] is not None:
        yield "asked", f"by {complaint['from']}" + (f": {complaint['subject']}" if complaint["subject"] else "")
    if answer["verdict"] == answers.NOT_OURS:
        return
    yield "when", answers.moment_of(answer["time"])
    client = answer["client"] + (f" at listener {answer['listen']} (role {answer['role']})" if answer["listen"] else "")
    yield "client", client + "".join(f", {part}" for part in (_hello(answer), answer["tls"]) if part)
    if answer["account"] is not None:
        ways = (
            answer["mechanism"],
            answer["verifier"] and f"verified by {answer['verifier']}",
            answer["device"] and f"device {answer['device']}",
        )
        how = ", ".join(part for part in ways if part)
        yield "account", answer["account"] + (f" ({how})" if how else "")
    what = f"session {answer['session']}" + (f", message {answer['message']}" if answer["message"] else "")
    yield "mail", what + (f", Message-ID {answer['message_id']}" if answer["message_id"] else "")
    yield from _deliveries(answer["deliveries"])
    yield from _proof(answer["proof"])
    yield from _trust(answer)
    for one in answer["passes"]:
        who = one["account"] or one["client"]
        yield (
            "before",
            f"it had passed this gate on {answers.moment_of(one['time'])}, session {one['session']}, by {who}",
        )


def _hello(answer: dict[str, Any]) -> str:
    return f"which called itself {answer['helo']}" if answer["helo"] else ""


def _deliveries(deliveries: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for number, one in enumerate(deliveries[:_LISTED_MAX]):
        yield "" if number else "went", f"from {one['reverse_path']} to {one['forward_path']}, backend {one['backend']}"
    if len(deliveries) > _LISTED_MAX:
        yield "", f"and to {len(deliveries) - _LISTED_MAX} more"


def _proof(proof: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    if proof is None:
        return
    text = f"token {proof['token']}, sealed with {proof['key']}"
    if proof["key_retired"] is not None:
        text += f", which was replaced on {answers.moment_of(proof['key_retired'])}"
    if proof["repaired"]:
        text += f"; repaired in {'1 place' if proof['repaired'] == 1 else str(proof['repaired']) + ' places'}"
    yield "proof", text


def _trust(answer: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for number, one in enumerate(answer["trust"]):
        yield "" if number else "trust", _trust_text(one)
    if not answer["trust"]:
        yield "trust", "no [[trust]] entry means it now; mail for the local domains needs none"
    if answer["trust_then"]:
        yield "then", f"it was let through by {', '.join(answer['trust_then'])}"


def _trust_text(one: dict[str, Any]) -> str:
    reasons = ", ".join(part for part in (one["why"], one["owner"] and f"owner {one['owner']}") if part)
    rule = " ".join(part for part in (one["rule"], f"({one['where']})" if one["where"] else "") if part)
    text = ": ".join(part for part in (rule, reasons) if part)
    match one["verdict"]:
        case "admit":
            return f"let through now by {text}"
        case "expired":
            return f"expired: {text}"
        case "may":
            return text
    return f"would not be let through now ({one['reason'].replace('_', ' ')})" + (f": {text}" if text else "")


def _tell_day(answer: dict[str, Any]) -> None:
    day = answer["day"]
    if day is None:
        return
    who = answer["account"] if day["by"] == "account" else answer["client"]
    number = f"{'at least ' if day['more'] else ''}{day['messages']}"
    noun = "message" if day["messages"] == 1 else "messages"
    say(f"\n{number} other {noun} of {printable(who)} on {day['date']} (UTC)", "bold")
    for one in day["shown"]:
        to = ", ".join(one["forward_paths"][:2])
        to += f" and {one['recipients'] - 2} more" if one["recipients"] > 2 else ""
        say(printable(f"  {one['time'][11:19]}  {one['message'] or '-'}  from {one['reverse_path']} to {to}"))
    if day["messages"] > len(day["shown"]):
        say(f"  and {day['messages'] - len(day['shown'])} more: gatepost trace --{day['by']} {printable(who)}")
    if day["refused"]:
        say(f"  {day['refused']} {'recipient was' if day['refused'] == 1 else 'recipients were'} refused on that day")


def _tell_line(line: dict[str, Any]) -> None:
    text = _LONG_WORD.sub(r"\1...", line["text"])
    text = text if len(text) <= _TEXT_MAX else f"{text[:_TEXT_MAX]}..."
    mark = line["mark"]
    say(f"  {_MARKS.get(mark, mark):<15}{printable(text)}", _LINE_STYLES.get(mark, ""))
    for why in line["why"]:
        say(f"{'':<17}{printable(why)}")
