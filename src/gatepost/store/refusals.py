"""The refusals and deferrals of the last time, each with all that it was decided on, by the reference in its reply.

Why: a person reads "[K7Q2M9XD-1]" over the telephone, and the operator must be able to say which rule it was, what was
    known of the client, and whether the same would pass now.  Because decisions are functions of facts and findings,
    these are all that must be kept.
Trust: hello names, paths and what was decided on them are a stranger's; they are kept as JSON in printable ASCII and
    read back through the parsers they came from.  The files are the gate's own, and may be damaged: a line that does
    not say what it should is passed over.
Promise: no secret is among the facts.  ``keep`` never waits and never raises; what the disk or the queue does not take
    is dropped, counted and said.  Bounded: ``SEGMENTS_MAX`` files of ``SEGMENT_OCTETS_MAX``, of which the oldest goes.
    A process that is killed takes along what it refused in its last moment (``telemetry.batches``).
    One line has the keys "schema" and "reference" in every version; a greater schema is not guessed at.
Sources: RFC 8259 (JSON), RFC 3339 (time).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from gatepost.errors import StorageError
from gatepost.facts import Client, Identity, MailboxLogin, Session, Transaction, client_address
from gatepost.smtp.path import (
    ForwardPath,
    Mailbox,
    PathDefect,
    ReversePath,
    Shape,
    parse_forward_path,
    parse_reverse_path,
)
from gatepost.store.segments import Segments
from gatepost.telemetry import Batches, json_line, rfc3339
from gatepost.verdict import Defer, Finding, Reason, Refuse, Result

T = TypeVar("T")

SCHEMA: Final = 1
SEGMENT_OCTETS_MAX = 8 << 20
SEGMENTS_MAX = 8
LINE_OCTETS_MAX = 1 << 20  # an account may have a thousand addresses; most lines have less than a thousand octets
QUEUE_REFUSALS_MAX = 4096
TROUBLE_SAID_S = 60.0
_BATCH_REFUSALS = 64
_BATCH_OCTETS = 64 << 10

_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)

# As the gate makes them: no I, L, O or U, so that a reference can be read out over the telephone.
_REFERENCE = re.compile(r"[0-9A-HJKMNP-TV-Z]{8}-[0-9]{1,9}")
_BRACKETED = re.compile(r"\[([^\[\]]*)\]")
_MISREAD = str.maketrans("OIL\u2010\u2011\u2012\u2013\u2212", "011-----")


class Refusal(NamedTuple):
    """One refusal or deferral that carried a reference.

    Attributes:
        stage: "mail", "rcpt" or "content".
        transaction: the facts, its session's among them.
        forward_path: None where the whole transaction was refused.
        authors: whom the From field names, where the content was refused for it.
        backend: which the transaction went to, "" before its first recipient.
        verdict: an administrator's own wording is not in it when it was read back; ``reply`` has it.
        reply: its first line.
    """

    reference: str
    stage: str
    transaction: Transaction
    forward_path: ForwardPath | None
    authors: tuple[Mailbox, ...]
    backend: str
    findings: tuple[Finding, ...]
    verdict: Refuse | Defer
    reply: str


def refusals_directory(data: str) -> Path:
    """Where they lie, below the gate's data directory."""
    return Path(data) / "refusals"


def reference_of(typed: str) -> str | None:
    """The reference in what a person typed or copied; None where there is none.

    Args:
        typed: in any case, with or without brackets, or the whole reply around it; O for 0 and I or L for 1 are
            understood, and the dashes that a text program makes of a hyphen.
    """
    bracketed = _BRACKETED.findall(typed)
    reference = (bracketed[-1] if bracketed else typed).strip().upper().translate(_MISREAD)
    return reference if _REFERENCE.fullmatch(reference) else None


class Refusals:
    """What one worker adds to the files.

    Args:
        dropped: called with the number of refusals dropped; said: takes a sentence for the log.
    """

    def __init__(
        self,
        directory: Path,
        *,
        dropped: Callable[[int], None] = lambda _: None,
        said: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._directory = directory
        self._segments = _segments(directory)
        self._count_dropped = dropped
        self._said = said
        self._said_at_s = float("-inf")
        self._now_s = 0.0
        self._trouble = "the disk is too slow"  # the last; written by the writing thread alone
        self._batches = Batches(
            self._write,
            size_max=QUEUE_REFUSALS_MAX,
            batch_size=_BATCH_REFUSALS,
            name="refusals",
            dropped=self._dropped,
        )

    def keep(self, refusal: Refusal) -> None:
        """Hand over a refusal; it is made into a line where no session waits for it."""
        self._now_s = refusal.transaction.now
        self._batches.append(refusal, 1)

    def _dropped(self, refusals: int) -> None:
        self._count_dropped(refusals)
        if abs(self._now_s - self._said_at_s) >= TROUBLE_SAID_S:
            self._said_at_s = self._now_s
            self._said(
                f"refusals cannot be kept in {self._directory} ({self._trouble}): `gatepost explain` will not find them"
            )

    def close(self) -> None:
        """Write what waits; it takes as long as ``telemetry.batches.CLOSE_S`` at most."""
        self._batches.close()

    # ---- the writing thread's side

    def _write(self, batch: list[Refusal]) -> int:
        lost = 0
        lines: list[bytes] = []
        octets = 0
        for refusal in batch:
            line = encode(refusal) + b"\n"
            if len(line) > LINE_OCTETS_MAX:
                self._trouble = "one is too long"
                lost += 1
                continue
            lines.append(line)
            octets += len(line)
            if octets >= _BATCH_OCTETS:
                lost += self._append(lines)
                lines, octets = [], 0
        return lost + self._append(lines)

    def _append(self, lines: list[bytes]) -> int:
        """One batch.  Returns how many lines were lost."""
        if not lines:
            return 0
        try:
            self._segments.append(b"".join(lines))
        except OSError as error:
            self._trouble = error.strerror or str(error)
            return len(lines)
        return 0


def find(directory: Path, reference: str) -> Refusal | None:
    """The refusal that carried this reference, None where it is not kept (any more).

    Raises:
        StorageError: the files cannot be read, or a newer version wrote the line.
    """
    with _reading(directory) as segments:
        for line in segments.lines_with(f'"reference":"{reference}"'.encode()):
            found = decode(line)
            if found is not None and found.reference == reference:
                return found
    return None


def kept_since(directory: Path) -> float | None:
    """When the oldest refusal that is kept was given, seconds since the epoch; None where nobody can tell.

    Raises:
        StorageError: the files cannot be read.
    """
    with _reading(directory) as segments:
        line = segments.first_line()
    try:
        return _seconds(json.loads(line)["time"])
    except _DAMAGED:
        return None


@contextlib.contextmanager
def _reading(directory: Path) -> Iterator[Segments]:
    try:
        yield _segments(directory)
    except OSError as error:
        raise StorageError(
            f"cannot read the refusals in {directory}: {error.strerror}; they are for the gate's user and root"
        ) from error


def _segments(directory: Path) -> Segments:
    return Segments(directory, octets_max=SEGMENT_OCTETS_MAX, files_max=SEGMENTS_MAX)


# --- One line ---------------------------------------------------------------------------------------------------------


def encode(refusal: Refusal) -> bytes:
    """The line of a refusal, without its line end."""
    transaction, verdict, path = refusal.transaction, refusal.verdict, refusal.forward_path
    session = transaction.session
    identity, login = session.identity, session.mailbox_login
    return json_line(
        {
            "schema": SCHEMA,
            "reference": refusal.reference,
            "time": rfc3339(transaction.now),
            "stage": refusal.stage,
            "session": session.reference,
            "client": str(session.client.address),
            "port": session.client.port,
            "listen": session.listen,
            "role": session.role,
            "hello": session.hello,
            "esmtp": session.esmtp,
            "tls": session.tls,
            "identity": None if identity is None else identity._asdict(),
            "hosts": session.hosts,
            "auth_required": session.auth_required,
            "certificate": session.certificate,
            "mailbox_login": None if login is None else {"account": login.account, "at": rfc3339(login.at)},
            "suspended": session.suspended,
            "listen_suspended": session.listen_suspended,
            "reverse_path": str(transaction.reverse_path),
            "recipients": transaction.recipients,
            "forward_path": None if path is None else str(path),
            "shape": None if path is None else path.shape.value,
            "authors": [str(author) for author in refusal.authors],
            "backend": refusal.backend,
            "findings": [
                {"check": found.check, "result": found.result.value, "evidence": found.evidence}
                for found in refusal.findings
            ],
            "verdict": "refuse" if isinstance(verdict, Refuse) else "defer",
            "reason": verdict.reason.name.lower(),
            "where": verdict.where,
            "detail": verdict.detail,
            "hint": verdict.hint if isinstance(verdict, Refuse) else "",
            "reply": refusal.reply,
        }
    )


def decode(line: bytes) -> Refusal | None:
    """The refusal in a line, None where the line is damaged.

    Raises:
        StorageError: a newer version wrote it.
    """
    try:
        record = json.loads(line)
        schema = _typed(record["schema"], int)
        if schema <= SCHEMA:
            return _refusal(record)
    except _DAMAGED:
        return None
    raise StorageError(
        f"a newer version of Gatepost wrote this refusal (schema {schema}, this version reads {SCHEMA}): "
        "ask that version's `gatepost explain`"
    )


def _refusal(record: dict[str, Any]) -> Refusal:
    """From JSON.  Raises one of ``_DAMAGED``."""
    now = _seconds(record["time"])
    transaction = Transaction(_session(record), _reverse_path(record["reverse_path"]), _count(record), now)
    reason, where, detail = Reason[_text(record["reason"]).upper()], _text(record["where"]), _text(record["detail"])
    verdict: Refuse | Defer
    if _text(record["verdict"]) == "refuse":
        verdict = Refuse(reason, where, detail, None, _text(record["hint"]))
    else:
        verdict = Defer(reason, where, detail)
    authors = tuple(map(_reverse_path, _typed(record["authors"], list)))
    return Refusal(
        reference=_text(record["reference"]),
        stage=_text(record["stage"]),
        transaction=transaction,
        forward_path=None if record["forward_path"] is None else _forward_path(record),
        authors=tuple(author for author in authors if isinstance(author, Mailbox)),
        backend=_text(record["backend"]),
        findings=tuple(
            Finding(_text(found["check"]), Result(found["result"]), _text(found["evidence"]))
            for found in _typed(record["findings"], list)
        ),
        verdict=verdict,
        reply=_text(record["reply"]),
    )


def _session(record: dict[str, Any]) -> Session:
    identity, login = record["identity"], record["mailbox_login"]
    return Session(
        reference=_text(record["session"]),
        client=Client(client_address(_text(record["client"])), _typed(record["port"], int)),
        listen=_text(record["listen"]),
        role=_text(record["role"]),
        hello=_text(record["hello"]),
        esmtp=_typed(record["esmtp"], bool),
        tls=_text(record["tls"]),
        identity=None
        if identity is None
        else Identity(
            _text(identity["account"]),
            _text(identity["mechanism"]),
            _text(identity["verifier"]),
            _text(identity["device"]),
            _texts(identity["addresses"]),
        ),
        hosts=_texts(record["hosts"]),
        auth_required=_typed(record["auth_required"], bool),
        certificate=_text(record["certificate"]),
        mailbox_login=None if login is None else MailboxLogin(_text(login["account"]), _seconds(login["at"])),
        suspended=_typed(record["suspended"], bool),
        listen_suspended=_typed(record["listen_suspended"], bool),
    )


def _typed(value: object, kind: type[T]) -> T:
    if type(value) is not kind:
        raise TypeError
    return value


def _text(value: object) -> str:
    return _typed(value, str)


def _texts(value: object) -> tuple[str, ...]:
    return tuple(map(_text, _typed(value, list)))


def _seconds(value: object) -> float:
    text = _text(value)
    if not text.endswith("Z"):
        raise ValueError(text)
    return datetime.fromisoformat(text).timestamp()


def _count(record: dict[str, Any]) -> int:
    return _typed(record["recipients"], int)


def _reverse_path(value: object) -> ReversePath:
    text = _text(value)
    path = parse_reverse_path((text if text == "<>" else f"<{text}>").encode(), smtputf8=True)
    if isinstance(path, PathDefect):
        raise TypeError(text)
    return path


def _forward_path(record: dict[str, Any]) -> ForwardPath:
    text = _text(record["forward_path"])
    path = parse_forward_path(f"<{text}>".encode(), smtputf8=True)
    if isinstance(path, PathDefect):
        raise TypeError(text)
    return ForwardPath(path.mailbox, Shape(record["shape"]))  # a source route was dropped from the path
