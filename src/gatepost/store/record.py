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
import socket
from collections.abc import Mapping, Sequence
from functools import lru_cache
from ipaddress import IPv4Address
from typing import Annotated, Any, Final, NamedTuple, TypeVar

import msgspec

from gatepost.errors import StorageError
from gatepost.facts import Client, Identity, IPAddress, MailboxLogin, Session, client_address
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
DAMAGED: Final = (
    ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, msgspec.MsgspecError,
)  # fmt: skip
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


# --- What a line holds ------------------------------------------------------------------------------------------------

# Compiled code makes a line of these and a line into these, and finds what is of a wrong type or out of its bounds.

_Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]  # no greater than a database holds
_Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=MILLISECONDS_MAX)]  # a point in time that a calendar has


class IdentityLine(msgspec.Struct, gc=False):
    """As ``facts.Identity``."""

    account: str
    mechanism: str
    verifier: str
    device: str
    addresses: Sequence[str]


class LoginLine(msgspec.Struct, gc=False):
    """As ``facts.MailboxLogin``."""

    account: str
    at: _Milliseconds


class SessionLine(msgspec.Struct, omit_defaults=True, gc=False):
    """As ``facts.Session``."""

    reference: str
    client: str
    port: _Number
    listen: str
    role: str
    hello: str
    esmtp: bool
    tls: str = ""
    identity: IdentityLine | None = None
    hosts: Sequence[str] = ()
    auth_required: bool = False
    certificate: str = ""
    mailbox_login: LoginLine | None = None
    suspended: bool = False
    listen_suspended: bool = False


class EntryLine(msgspec.Struct, omit_defaults=True, gc=False):
    """As ``Entry``.  shape: "" for a plain forward-path."""

    at: _Milliseconds
    number: _Number
    stage: str
    reverse_path: str
    verdict: str
    forward_path: str | None = None
    shape: str = ""
    reason: str = ""
    reference: str = ""
    by: str = ""
    detail: str = ""
    hint: str = ""
    reply: str = ""
    message: str = ""
    message_id: str = ""
    backend: str = ""
    would: str = ""
    recipients: _Number = 0
    size: _Number = 0
    settles: bool = False
    findings: Sequence[Any] = ()
    authors: Sequence[Any] = ()


class EndLine(msgspec.Struct, omit_defaults=True, gc=False):
    """As ``End``."""

    started: _Milliseconds
    ended: _Milliseconds
    how: str
    errors: _Number = 0
    reply: str = ""
    real_client: str = ""
    logins: Sequence[Any] = ()


# --- To a line --------------------------------------------------------------------------------------------------------


def encode(record: Record) -> bytes:
    """The line of a record, without its line end."""
    line: dict[str, Any] = {"schema": SCHEMA, "session": _session_line(record.session)}
    if record.entries:
        line["entries"] = [_entry_line(entry) for entry in record.entries]
    if record.end is not None:
        started, ended, how, errors, reply, real_client, logins = record.end
        line["end"] = EndLine(_ms(started), _ms(ended), how, errors, reply, real_client, logins)
    return json_line(line)


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _address_text(address: IPAddress) -> str:
    return socket.inet_ntoa(address.packed) if isinstance(address, IPv4Address) else str(address)  # in half the time


def _session_line(session: Session) -> SessionLine:
    (
        reference, (address, port), listen, role, hello, esmtp, tls, identity, hosts, auth_required, certificate, login,
        suspended, listen_suspended,
    ) = session  # fmt: skip
    return SessionLine(
        reference,
        _address_text(address),
        port,
        listen,
        role,
        hello,
        esmtp,
        tls,
        None if identity is None else IdentityLine(*identity),
        hosts,
        auth_required,
        certificate,
        None if login is None else LoginLine(login.account, _ms(login.at)),
        suspended,
        listen_suspended,
    )


def _entry_line(entry: Entry) -> EntryLine:
    (
        at, number, stage, reverse_path, forward_path, recipients, verdict, reason, reference, by, detail, hint, reply,
        message, message_id, size, backend, would, settles, findings, authors,
    ) = entry  # fmt: skip
    return EntryLine(
        _ms(at),
        number,
        stage,
        str(reverse_path),
        verdict,
        None if forward_path is None else str(forward_path.mailbox),
        "" if forward_path is None or forward_path.shape is Shape.PLAIN else forward_path.shape.value,
        reason,
        reference,
        by,
        detail,
        hint,
        reply,
        message,
        message_id,
        backend,
        would,
        recipients,
        size,
        settles,
        findings,
        [str(author) for author in authors] if authors else (),
    )


# --- From a line ------------------------------------------------------------------------------------------------------

_parsed = msgspec.json.Decoder().decode


def parse(line: bytes) -> dict[str, Any] | None:
    """A line's JSON object; None where it is damaged.

    Raises:
        StorageError: a newer version wrote it.
    """
    try:
        record = _loaded(line)
        schema = _typed(record["schema"], int)
    except DAMAGED:
        return None
    if schema > SCHEMA:
        raise StorageError(
            f"a newer version of Gatepost wrote this record (schema {schema}, this version reads {SCHEMA}): "
            "ask that version"
        )
    return _typed(record, dict)


def _loaded(line: bytes) -> Any:  # noqa: ANN401  JSON
    """Any JSON that the standard library takes: half a surrogate pair as well."""
    try:
        return _parsed(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return json.loads(line)


def decode(line: bytes) -> Record | None:
    """The record in a line, None where the line is damaged.

    Raises:
        StorageError: a newer version wrote it.
    """
    record = parse(line)
    if record is None:
        return None
    try:
        session, entries, end = lines(record)
        return Record(session_of(session), [_entry_of(told) for told in entries], None if end is None else _end_of(end))
    except DAMAGED:
        return None


def lines(record: Mapping[str, Any]) -> tuple[SessionLine, list[EntryLine], EndLine | None]:
    """What a line's object holds, its types and bounds judged.

    Raises:
        one of ``DAMAGED``.
    """
    return (
        msgspec.convert(record["session"], SessionLine),
        msgspec.convert(record.get("entries", []), list[EntryLine]),
        msgspec.convert(record.get("end"), EndLine | None),
    )


def session_of(facts: SessionLine) -> Session:
    """The facts.

    Raises:
        one of ``DAMAGED``.
    """
    identity, login = facts.identity, facts.mailbox_login
    return Session(
        facts.reference,
        Client(client_address(facts.client), facts.port),
        facts.listen,
        facts.role,
        facts.hello,
        facts.esmtp,
        facts.tls,
        None
        if identity is None
        else Identity(
            identity.account, identity.mechanism, identity.verifier, identity.device, tuple(identity.addresses)
        ),
        tuple(facts.hosts),
        facts.auth_required,
        facts.certificate,
        None if login is None else MailboxLogin(login.account, login.at / 1000),
        facts.suspended,
        facts.listen_suspended,
    )


def _entry_of(told: EntryLine) -> Entry:
    path = told.forward_path
    return Entry(
        at=told.at / 1000,
        number=told.number,
        stage=_one_of(told.stage, STAGES),
        reverse_path=reverse_path(told.reverse_path),
        forward_path=None if path is None else forward_path(path, told.shape or Shape.PLAIN.value),
        recipients=told.recipients,
        verdict=_one_of(told.verdict, VERDICTS),
        reason=told.reason,
        reference=told.reference,
        by=told.by,
        detail=told.detail,
        hint=told.hint,
        reply=told.reply,
        message=told.message,
        message_id=told.message_id,
        size=told.size,
        backend=told.backend,
        would=told.would,
        settles=told.settles,
        findings=findings(told.findings),
        authors=authors(told.authors),
    )


def _end_of(told: EndLine) -> End:
    return End(
        told.started / 1000,
        told.ended / 1000,
        told.how,
        told.errors,
        told.reply,
        told.real_client,
        tuple(told.logins),
    )


def _typed(value: object, kind: type[T]) -> T:
    """The value, if it is exactly of this type; else TypeError."""
    if type(value) is not kind:
        raise TypeError
    return value


def _text(value: object) -> str:
    """As ``typed``."""
    return _typed(value, str)


def _one_of(word: str, words: tuple[str, ...]) -> str:
    """A word that is known."""
    if word not in words:
        raise ValueError(word)
    return word


def findings(value: Sequence[Any]) -> tuple[Finding, ...]:
    """From JSON."""
    return tuple(Finding(_text(check), Result(result), _text(evidence)) for check, result, evidence in value)


def authors(value: Sequence[Any]) -> tuple[Mailbox, ...]:
    """From JSON."""
    paths = [reverse_path(_text(author)) for author in value]
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
