"""What the journal says: a session's facts, its verdicts, its end; as values, and as one line each.

Why: because decisions are functions of facts and findings, these are all that must be kept to explain a verdict later,
    or to decide it again under other rules.
Trust: hello names, paths and what was decided on them are a stranger's; they are kept as JSON in printable ASCII and
    read back through the parsers they came from.  A line may be damaged, or written by a worker that was taken over:
    one that does not say exactly what it should is None.
Promise: never content, never a secret.  A line has the key "schema" in every version; a greater one is not guessed at.
    What has its default is left out of a line.
Sources: RFC 8259 (JSON), RFC 5321 §4.1.2 (paths).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeVar

from gatepost.errors import StorageError
from gatepost.facts import Client, Identity, MailboxLogin, Session, client_address
from gatepost.smtp.path import (
    ForwardPath,
    Mailbox,
    PathDefect,
    ReversePath,
    Shape,
    parse_forward_path,
    parse_reverse_path,
)
from gatepost.telemetry import LoginRecord, json_line
from gatepost.verdict import Finding, Result

T = TypeVar("T")

SCHEMA: Final = 1
DAMAGED: Final = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
MILLISECONDS_MAX: Final = 253402300799999  # the end of the year 9999

DELIVERING: Final = "delivering"  # the reason of an entry that was kept before its message went to the backend
STAGES: Final = ("mail", "rcpt", "content")
VERDICTS: Final = ("accepted", "admitted", "deferred", "refused")


class Entry(NamedTuple):
    """One verdict: on a forward-path, or on a transaction as a whole.

    Attributes:
        at: seconds since the epoch.
        number: of the transaction in its session, from 1.
        stage: "mail", "rcpt" or "content": where the verdict fell.
        forward_path: None where the whole transaction was refused.
        recipients: how many were admitted before it in the transaction.
        verdict: "accepted": the backend has the message; "admitted": a recipient of a transaction that brought no
            content; "deferred"; "refused".
        reason: a member of ``verdict.Reason`` in lower case, or the gate's own word ("backend", "content", "storage");
            ``DELIVERING``.
        reference: the one in the reply, "" where it carries none.
        by: file and line of the rule or of the authority, "" for the gate's own default.
        detail, hint: as in ``verdict.Refuse``.
        reply: the first line of what the client was told.
        message: the id in our trace field; message_id: what the message calls itself in Message-ID.
        size: octets of content.
        backend: which the transaction went to, "" before its first recipient.
        would: what a rule that is only watched would have done.
        settles: it takes the place of the entries of its message that said "delivering".
        authors: whom the From field names, where the content was refused for it.
    """

    at: float
    number: int
    stage: str
    reverse_path: ReversePath
    forward_path: ForwardPath | None
    recipients: int
    verdict: str
    reason: str = ""
    reference: str = ""
    by: str = ""
    detail: str = ""
    hint: str = ""
    reply: str = ""
    message: str = ""
    message_id: str = ""
    size: int = 0
    backend: str = ""
    would: str = ""
    settles: bool = False
    findings: tuple[Finding, ...] = ()
    authors: tuple[Mailbox, ...] = ()


class End(NamedTuple):
    """How a session ended.

    Attributes:
        started, ended: seconds since the epoch; how: in a word, as in the log.
        reply: the one that ended or refused the whole session.
        real_client: whose XCLIENT said who the client is.
    """

    started: float
    ended: float
    how: str
    errors: int = 0
    reply: str = ""
    real_client: str = ""
    logins: tuple[LoginRecord, ...] = ()


class Record(NamedTuple):
    """What a worker hands over at once: verdicts on the same facts, and the session's end where it is over."""

    session: Session
    entries: Sequence[Entry]
    end: End | None = None


# --- To a line --------------------------------------------------------------------------------------------------------


def encode(record: Record) -> bytes:
    """The line of a record, without its line end."""
    line: dict[str, Any] = {"schema": SCHEMA, "session": session_object(record.session)}
    if record.entries:
        line["entries"] = [_entry_object(entry) for entry in record.entries]
    end = record.end
    if end is not None:
        line["end"] = _end_object(end)
    return json_line(line)


def _end_object(end: End) -> dict[str, Any]:
    told: dict[str, Any] = {"started": _ms(end.started), "ended": _ms(end.ended), "how": end.how}
    if end.errors:
        told["errors"] = end.errors
    if end.reply:
        told["reply"] = end.reply
    if end.real_client:
        told["real_client"] = end.real_client
    if end.logins:
        told["logins"] = end.logins
    return told


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def session_object(session: Session) -> dict[str, Any]:
    """The facts as JSON has them."""
    address, port = session.client
    facts: dict[str, Any] = {
        "reference": session.reference,
        "client": str(address),
        "port": port,
        "listen": session.listen,
        "role": session.role,
        "hello": session.hello,
        "esmtp": session.esmtp,
    }
    if session.tls:
        facts["tls"] = session.tls
    if session.identity is not None:
        facts["identity"] = session.identity._asdict()
    if session.hosts:
        facts["hosts"] = session.hosts
    if session.auth_required:
        facts["auth_required"] = True
    if session.certificate:
        facts["certificate"] = session.certificate
    if session.mailbox_login is not None:
        facts["mailbox_login"] = {"account": session.mailbox_login.account, "at": _ms(session.mailbox_login.at)}
    if session.suspended:
        facts["suspended"] = True
    if session.listen_suspended:
        facts["listen_suspended"] = True
    return facts


# The members of an Entry that are texts, and are left out where they are empty.
_TEXTS: Final = (
    "reason", "reference", "by", "detail", "hint", "reply", "message", "message_id", "backend", "would",
)  # fmt: skip
_TEXT_PLACES: Final = tuple((name, Entry._fields.index(name)) for name in _TEXTS)


def _entry_object(entry: Entry) -> dict[str, Any]:
    told: dict[str, Any] = {
        "at": _ms(entry.at),
        "number": entry.number,
        "stage": entry.stage,
        "reverse_path": str(entry.reverse_path),
        "verdict": entry.verdict,
    }
    path = entry.forward_path
    if path is not None:
        told["forward_path"] = str(path)
        if path.shape is not Shape.PLAIN:
            told["shape"] = path.shape.value
    for name, place in _TEXT_PLACES:
        text = entry[place]
        if text:
            told[name] = text
    if entry.recipients:
        told["recipients"] = entry.recipients
    if entry.size:
        told["size"] = entry.size
    if entry.settles:
        told["settles"] = True
    if entry.findings:
        told["findings"] = [[found.check, found.result.value, found.evidence] for found in entry.findings]
    if entry.authors:
        told["authors"] = [str(author) for author in entry.authors]
    return told


# --- From a line ------------------------------------------------------------------------------------------------------


def parse(line: bytes) -> dict[str, Any] | None:
    """A line's JSON object; None where it is damaged.

    Raises:
        StorageError: a newer version wrote it.
    """
    try:
        record = json.loads(line)
        schema = typed(record["schema"], int)
    except DAMAGED:
        return None
    if schema > SCHEMA:
        raise StorageError(
            f"a newer version of Gatepost wrote this record (schema {schema}, this version reads {SCHEMA}): "
            "ask that version"
        )
    return typed(record, dict)


def decode(line: bytes) -> Record | None:
    """The record in a line, None where the line is damaged.

    Raises:
        StorageError: a newer version wrote it.
    """
    record = parse(line)
    if record is None:
        return None
    try:
        entries = [entry_of(told) for told in typed(record.get("entries", []), list)]
        end = record.get("end")
        return Record(session_of(record["session"]), entries, None if end is None else _end_of(end))
    except DAMAGED:
        return None


def session_of(facts: Mapping[str, Any]) -> Session:
    """From JSON.

    Raises:
        one of ``DAMAGED``.
    """
    identity, login = facts.get("identity"), facts.get("mailbox_login")
    return Session(
        reference=text(facts["reference"]),
        client=Client(client_address(text(facts["client"])), number(facts["port"])),
        listen=text(facts["listen"]),
        role=text(facts["role"]),
        hello=text(facts["hello"]),
        esmtp=typed(facts["esmtp"], bool),
        tls=text(facts.get("tls", "")),
        identity=None
        if identity is None
        else Identity(
            text(identity["account"]),
            text(identity["mechanism"]),
            text(identity["verifier"]),
            text(identity["device"]),
            _texts(identity["addresses"]),
        ),
        hosts=_texts(facts.get("hosts", [])),
        auth_required=typed(facts.get("auth_required", False), bool),
        certificate=text(facts.get("certificate", "")),
        mailbox_login=None if login is None else MailboxLogin(text(login["account"]), seconds(login["at"])),
        suspended=typed(facts.get("suspended", False), bool),
        listen_suspended=typed(facts.get("listen_suspended", False), bool),
    )


def entry_of(told: Mapping[str, Any]) -> Entry:
    """From JSON.

    Raises:
        one of ``DAMAGED``.
    """
    path = told.get("forward_path")
    return Entry(
        at=seconds(told["at"]),
        number=number(told["number"]),
        stage=one_of(told["stage"], STAGES),
        reverse_path=reverse_path(text(told["reverse_path"])),
        forward_path=None if path is None else forward_path(text(path), text(told.get("shape", Shape.PLAIN.value))),
        recipients=number(told.get("recipients", 0)),
        verdict=one_of(told["verdict"], VERDICTS),
        **{name: text(told.get(name, "")) for name in _TEXTS},
        size=number(told.get("size", 0)),
        settles=typed(told.get("settles", False), bool),
        findings=findings(told.get("findings", [])),
        authors=authors(told.get("authors", [])),
    )


def _end_of(told: Mapping[str, Any]) -> End:
    return End(
        seconds(told["started"]),
        seconds(told["ended"]),
        text(told["how"]),
        number(told.get("errors", 0)),
        text(told.get("reply", "")),
        text(told.get("real_client", "")),
        tuple(typed(told.get("logins", []), list)),
    )


def typed(value: object, kind: type[T]) -> T:
    """The value, if it is exactly of this type; else TypeError."""
    if type(value) is not kind:
        raise TypeError
    return value


def text(value: object) -> str:
    """As ``typed``."""
    return typed(value, str)


def number(value: object) -> int:
    """As ``typed``; not negative, and no greater than a database holds."""
    counted = typed(value, int)
    if not 0 <= counted < 1 << 62:
        raise ValueError(counted)
    return counted


def milliseconds(value: object) -> int:
    """A point in time that a calendar has."""
    counted = number(value)
    if counted > MILLISECONDS_MAX:
        raise ValueError(counted)
    return counted


def seconds(value: object) -> float:
    """As ``milliseconds``, in seconds."""
    return milliseconds(value) / 1000


def one_of(value: object, words: tuple[str, ...]) -> str:
    """A word that is known."""
    word = text(value)
    if word not in words:
        raise ValueError(word)
    return word


def _texts(value: object) -> tuple[str, ...]:
    return tuple(map(text, typed(value, list)))


def findings(value: object) -> tuple[Finding, ...]:
    """From JSON."""
    return tuple(Finding(text(check), Result(result), text(evidence)) for check, result, evidence in typed(value, list))


def authors(value: object) -> tuple[Mailbox, ...]:
    """From JSON."""
    paths = [reverse_path(text(author)) for author in typed(value, list)]
    return tuple(path for path in paths if isinstance(path, Mailbox))


@lru_cache(maxsize=65536)  # who reads a million entries meets the same paths again and again
def reverse_path(written: str) -> ReversePath:
    """From the text of one; TypeError where it is none."""
    path = parse_reverse_path((written if written == "<>" else f"<{written}>").encode(), smtputf8=True)
    if isinstance(path, PathDefect):
        raise TypeError(written)
    return path


@lru_cache(maxsize=65536)
def forward_path(written: str, shape: str) -> ForwardPath:
    """As ``reverse_path``; a source route was dropped from the path, but its shape tells of it."""
    path = parse_forward_path(f"<{written}>".encode(), smtputf8=True)
    if isinstance(path, PathDefect):
        raise TypeError(written)
    return ForwardPath(path.mailbox, Shape(shape))
