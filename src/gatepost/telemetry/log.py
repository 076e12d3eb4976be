"""The log: one line a session, one line an event; JSON in a pipe, a calm table on a terminal.

Why: a busy gate ends thousands of sessions a second and its log reader may be slow or gone.  The event loop formats a
    line and appends it to a queue (a few microseconds), which a thread empties (``batches``).
Trust: hello names, paths and replies in a record come from strangers.  In JSON everything but printable ASCII is
    escaped; on a terminal everything that is not printable (controls, escape sequences, bidirectional overrides,
    zero-width characters, line separators) is shown as an escape, so a line is one line and says what it says.
Promise: never blocks the event loop; the queue is bounded and what it drops is counted and said; lines of several
    processes on one pipe stay whole (a lock around each batch); what was logged before ``close`` is written, if anybody
    reads.  A reader that goes away does not stop the gate.
Sources: RFC 8259 (JSON), RFC 3339 (time), no-color.org, Unicode general categories.
"""

from __future__ import annotations

import fcntl
import os
import select
import time
import unicodedata
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import Enum, unique
from json import JSONEncoder
from typing import Any, NamedTuple, NotRequired, TypedDict

import msgspec

from gatepost.telemetry.batches import CLOSE_S, Batches

BATCH_OCTETS = 64 << 10
QUEUE_OCTETS_MAX = 4 << 20
_COLUMNS = 100  # of a terminal that does not say

_plain = msgspec.json.Encoder().encode  # escapes what JSON demands, and nothing else
_escaped = JSONEncoder(separators=(",", ":"), check_circular=False).encode  # ensure_ascii: see Trust


class RecipientRecord(TypedDict):
    """One RCPT and what became of it.

    verdict: "admitted", "deferred" or "refused".  reason: the member of verdict.Reason in lower case, or the gate's own
    word for it ("backend", "syntax"), "" where admitted.  reply: what the client was told.  reference: of the refusal.
    by: the authority or the rule with its file and line.  would: what the verdict would be if the entries that are only
    watched were acted on.
    """

    forward_path: str
    verdict: str
    reason: NotRequired[str]
    reply: NotRequired[str]
    reference: NotRequired[str]
    by: NotRequired[str]
    would: NotRequired[str]


class LoginRecord(TypedDict):
    """One AUTH, or one login to the mailbox server through our proxy, and what became of it.

    verdict: "verified", "denied" or "unavailable".  account: as the client named it, or as the verifier did where it
    said yes.  why: for the operator; a secret never stands there.
    """

    account: str
    mechanism: str
    verdict: str
    why: NotRequired[str]
    verifier: NotRequired[str]
    device: NotRequired[str]


class TransactionRecord(TypedDict):
    """One MAIL and what became of it.

    verdict: "accepted", "deferred" or "refused" by the final reply to content; "" where none was given.
    reply: that reply, or the one that refused MAIL.  reference, by: of a refusal at MAIL.  message: the id in the trace
    field.  would: what would have been refused, where the listener only logs it, or an entry is only watched.
    """

    reverse_path: str
    recipients: list[RecipientRecord]
    size: int
    verdict: str
    reply: str
    reason: NotRequired[str]
    reference: NotRequired[str]
    by: NotRequired[str]
    message: NotRequired[str]
    would: NotRequired[str]


class SessionRecord(TypedDict):
    """One session, as logged when it ends.

    time: RFC 3339, UTC, of the end; event: "session"; errors: commands refused as errors; end: "quit", "lost",
    "timeout", "refused", ... in a word; reply: the one that ended or refused the whole session, "" where none did;
    account: who logged in; certificate: SHA-256 of the client's; logins: the last of them, good and bad; real_client:
    whose XCLIENT said who the client is; window: of a mailbox proxy, whether the login lets its client send.
    """

    time: str
    event: str
    reference: str
    listen: str
    client: str
    hello: str
    tls: str
    seconds: float
    transactions: list[TransactionRecord]
    errors: int
    end: str
    reply: NotRequired[str]
    account: NotRequired[str]
    certificate: NotRequired[str]
    logins: NotRequired[list[LoginRecord]]
    real_client: NotRequired[str]
    window: NotRequired[str]


@unique
class Level(Enum):
    """How loud an event is."""

    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


class Style(NamedTuple):
    """How lines look.

    Attributes:
        terminal: a person reads; else a program does and gets JSON.
        colour: ANSI colours, on a terminal only.
    """

    terminal: bool = False
    colour: bool = False

    @classmethod
    def of(cls, descriptor: int, environment: Mapping[str, str]) -> Style:
        """What suits this output: NO_COLOR and dumb terminals are obeyed."""
        terminal = os.isatty(descriptor)
        colour = terminal and not environment.get("NO_COLOR") and environment.get("TERM", "dumb") not in ("", "dumb")
        return cls(terminal, colour)


class _Second:
    """The formatted text of the second last asked for."""

    number = -1
    text = ""


def rfc3339(now_s: float) -> str:
    """Seconds since the epoch as "2026-11-23T06:20:01.123Z".  RFC 3339 §5.6."""
    second = int(now_s)
    if second != _Second.number:
        _Second.text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        _Second.number = second
    return f"{_Second.text}.{int((now_s - second) * 1000):03d}Z"


def json_line(record: Mapping[str, Any]) -> bytes:
    """JSON on one line, without its line end: printable ASCII, whatever stands in it.  RFC 8259.

    Args:
        record: of JSON's own types, and of msgspec's structs.
    """
    try:
        line = _plain(record)
    except UnicodeEncodeError:  # half a surrogate pair
        line = b""
    if not line or not line.isascii():
        line = _escaped(msgspec.to_builtins(record)).encode()
    # The one control character that neither JSON nor ensure_ascii escapes.
    return line.replace(b"\x7f", b"\\u007f") if b"\x7f" in line else line


def _utc_s() -> float:
    return datetime.now(UTC).timestamp()


class SessionLog:
    """The log of one process.

    Args:
        descriptor: where lines go; stays open.
        lock: a descriptor of memory that all processes on this output share, locked around a batch; None without.
        dropped: called with the number of lines dropped (counts a metric).
        now: seconds since the epoch, for events.
        queue_octets_max: lines that wait to be written.
    """

    def __init__(
        self,
        descriptor: int,
        style: Style,
        *,
        lock: int | None = None,
        dropped: Callable[[int], None] | None = None,
        now: Callable[[], float] = _utc_s,
        queue_octets_max: int = QUEUE_OCTETS_MAX,
    ) -> None:
        self._descriptor = descriptor
        self._style = style
        self._lock = lock
        self._now = now
        self._columns = _COLUMNS
        if style.terminal:
            self._measure()
        self._batches = Batches(
            self._write_batch,
            size_max=queue_octets_max,
            batch_size=BATCH_OCTETS,
            name="log",
            dropped=dropped,
            caught_up=self._say_dropped,
        )

    # ---- the event loop's side

    def session(self, record: SessionRecord) -> None:
        """Log a session that ended.  On the hot path."""
        if self._style.terminal:
            self._append(human_session(record, self._columns, colour=self._style.colour).encode("utf-8", "replace"))
        else:
            self._append(json_line(record))

    def event(self, name: str, text: str, level: Level = Level.NOTE, **fields: Any) -> None:  # noqa: ANN401  JSON
        """Log what happened to the gate itself.

        Args:
            name: for programs, such as "reload".
            text: a sentence for a person.
            fields: JSON values for programs.
        """
        now_s = self._now()
        if self._style.terminal:
            self._append(human_event(now_s, text, level, colour=self._style.colour).encode("utf-8", "replace"))
        else:
            record = {"time": rfc3339(now_s), "event": name, "level": level.value, "text": text, **fields}
            self._append(json_line(record))

    def line(self, text: str) -> None:
        """Write a line as it is, in either style; ours alone, never a stranger's text."""
        self._append(text.encode("utf-8", "replace"))

    def _append(self, line: bytes) -> None:
        self._batches.append(line, len(line) + 1)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Write what waits, for at most ``timeout_s`` (nobody may be reading)."""
        self._batches.close(timeout_s)

    # ---- the writing thread's side

    def _write_batch(self, lines: list[bytes]) -> int:
        if self._style.terminal:
            self._measure()
        return self._write(b"\n".join([*lines, b""]))

    def _say_dropped(self, lines: int) -> None:
        self._write(self._drop_notice(lines))

    def _drop_notice(self, lines: int) -> bytes:
        text = f"{lines} lines of this log were dropped: its reader is too slow"
        if self._style.terminal:
            return (human_event(self._now(), text, Level.WARNING, colour=self._style.colour) + "\n").encode()
        record = {
            "time": rfc3339(self._now()),
            "event": "log_dropped",
            "level": "warning",
            "text": text,
            "lines": lines,
        }
        return json_line(record) + b"\n"

    def _write(self, octets: bytes) -> int:
        """One batch, whole.  A reader that went away costs the batch, not the gate.

        Returns:
            How many lines were lost.
        """
        if self._lock is not None:
            # A POSIX lock: it belongs to the process and ends with it, also with SIGKILL in the middle of a batch.
            fcntl.lockf(self._lock, fcntl.LOCK_EX)
        try:
            view = memoryview(octets)
            while view:
                try:
                    view = view[os.write(self._descriptor, view) :]
                except BlockingIOError:  # somebody else made this pipe non-blocking
                    writable = select.poll()
                    writable.register(self._descriptor, select.POLLOUT)
                    writable.poll(1000)
        except OSError:
            return octets.count(b"\n")
        finally:
            if self._lock is not None:
                fcntl.lockf(self._lock, fcntl.LOCK_UN)
        return 0

    def _measure(self) -> None:
        try:
            self._columns = os.get_terminal_size(self._descriptor).columns or _COLUMNS
        except OSError:
            self._columns = _COLUMNS


# ---- for a person's eyes

_COLOURS = {"accepted": "32", "deferred": "33", "refused": "31", "warning": "33", "error": "31", "faint": "2"}
_ELLIPSIS = "…"
_WHY_COLUMNS_MAX = 240


def printable(text: str) -> str:
    """Text of a stranger, safe on a terminal: what is not printable is shown as \\x1b, \\u202e or \\U000e0001."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escape(character) for character in text)


def _escape(character: str) -> str:
    number = ord(character)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _width(character: str) -> int:
    if character.isascii():
        return 1
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _fit(text: str, columns: int, *, pad: bool = True) -> str:
    """Printable text in so many columns of a terminal: cut with an ellipsis, or padded."""
    # Marks that stack without end are cut as well: no more than four characters a column.
    text = printable(text[: 4 * columns + 1])
    if text.isascii() and len(text) <= columns:
        return text.ljust(columns) if pad else text
    used, end = 0, 0
    for character in text[: 4 * columns]:
        width = _width(character)
        if used + width > columns:
            break
        used += width
        end += 1
    if end < len(text):
        while end and used > columns - 1:
            end -= 1
            used -= _width(text[end])
        text = text[:end] + _ELLIPSIS
        used += 1
    return text + " " * (columns - used) if pad else text


def _paint(text: str, colour: str, *, on: bool) -> str:
    code = _COLOURS.get(colour)
    return f"\x1b[{code}m{text}\x1b[0m" if on and code else text


def _clock(stamp: str) -> str:
    """The time of day from an RFC 3339 text: "12:00:01"."""
    return stamp[11:19]


_END_WORDS = {"quit": "", "lost": "connection lost", "timeout": "timed out"}


def human_session(record: SessionRecord, columns: int, *, colour: bool) -> str:
    """One session as one line: time, client, reverse-path, forward-path, verdict, why."""
    transactions = record["transactions"]
    recipients = [recipient for transaction in transactions for recipient in transaction["recipients"]]
    words = [_outcome(transaction) for transaction in transactions]
    verdict = next((word for word in ("refused", "deferred", "accepted") if word in words), "")
    if not verdict:
        verdict = "refused" if record["end"] == "refused" else "no mail"
    from_path = f"<{transactions[0]['reverse_path']}>" if transactions else "-"
    to_path = f"<{recipients[0]['forward_path']}>" if recipients else "-"
    more = f" +{len(recipients) - 1}" if len(recipients) > 1 else ""
    client_columns = 15 if len(record["client"]) <= 15 else 39  # an IPv6 address may push the others aside
    path_columns = min(max((columns - 35 - 40) // 2, 18), 40)  # 35: time, client, verdict; 40: the reason's share
    return " ".join(
        [
            _paint(_clock(record["time"]), "faint", on=colour),
            _fit(record["client"], client_columns),
            _fit(from_path, path_columns),
            _fit(_fit(to_path, path_columns - len(more), pad=False) + more, path_columns),
            _paint(_fit(verdict, 8), verdict, on=colour),
            # The reason comes last: a narrow terminal wraps it rather than lose it.
            _fit(_why(record, words, verdict), _WHY_COLUMNS_MAX, pad=False),
        ]
    ).rstrip()


def _outcome(transaction: TransactionRecord) -> str:
    """The word for a transaction: of its content where there was one, else of its recipients, else of MAIL."""
    if transaction["verdict"]:
        return transaction["verdict"]
    verdicts = {recipient["verdict"] for recipient in transaction["recipients"]}
    if "refused" in verdicts or transaction["reply"][:1] == "5":
        return "refused"
    if "deferred" in verdicts or transaction["reply"][:1] == "4":
        return "deferred"
    return ""


def _why(record: SessionRecord, words: list[str], verdict: str) -> str:
    """The reason behind the verdict that the line shows, and how many of each there were."""
    parts = [_login_why(record)]
    for transaction, word in zip(record["transactions"], words, strict=True):
        if word == verdict:
            parts.append(_transaction_why(transaction, verdict))
            break
    else:
        parts.append(record.get("reply", ""))
    if len(words) > 1:
        counts = {word: words.count(word) for word in ("accepted", "deferred", "refused") if word in words}
        parts.insert(1, ", ".join(f"{count} {word}" for word, count in counts.items()))
    end = _END_WORDS.get(record["end"], record["end"])
    if end and end != "refused":
        parts.append(end)
    return "; ".join(part for part in parts if part)


def _login_why(record: SessionRecord) -> str:
    """Who logged in, or who could not."""
    account = record.get("account")
    if account:
        return account
    logins = record.get("logins", [])
    return f"login as {logins[-1]['account'] or 'nobody'} {logins[-1]['verdict']}" if logins else ""


def _transaction_why(transaction: TransactionRecord, verdict: str) -> str:
    if verdict != "accepted":
        for recipient in transaction["recipients"]:
            if recipient["verdict"] in ("refused", "deferred") and not transaction["verdict"]:
                where = recipient.get("by", "")
                reply = recipient.get("reply", "") or recipient.get("reason", "")
                return f"{reply} ({where})" if where else reply
        return transaction["reply"]
    return next((recipient["by"] for recipient in transaction["recipients"] if recipient.get("by")), "")


def human_event(now_s: float, text: str, level: Level, *, colour: bool) -> str:
    """One event as one line, or several where its text has them."""
    lead = "" if level is Level.NOTE else f"{level.value}: "
    stamp = _paint(_clock(rfc3339(now_s)), "faint", on=colour)
    # A traceback has lines; they are indented, so that none looks like a line of its own.
    lines = [_paint(printable(line), level.value, on=colour) for line in (lead + text.rstrip("\n")).split("\n")]
    return f"{stamp} " + "\n         ".join(lines)
