"""What the journal has on a question: who sent what to whom, and what became of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

from gatepost import store
from gatepost.answers.refused import stamp
from gatepost.auth.account import account_name
from gatepost.config import values
from gatepost.errors import GatepostError
from gatepost.facts import client_address
from gatepost.policy.relay import IPNetwork
from gatepost.smtp.path import PathDefect, Shape, parse_address_literal, parse_reverse_path
from gatepost.store.journal import Journal, Kept, KeptSession, Query
from gatepost.store.record import VERDICTS
from gatepost.telemetry import REASONS

_SESSION: Final = re.compile(r"[0-9A-HJKMNP-TV-Z]{8}")
_MESSAGE: Final = re.compile(r"[0-9A-HJKMNP-TV-Z]{8}\.[0-9]{1,9}")
_MISREAD: Final = str.maketrans("OIL", "011")  # references have none of these

_OF_SESSIONS: Final = frozenset(("session", "client", "network", "account", "since", "until"))


class Asked(NamedTuple):
    """A question as it was typed: each member "" where it was not.

    Attributes:
        text: whatever it is: an address, a domain, a client, a reference, the id of a message.
    """

    text: str = ""
    reverse_path: str = ""
    forward_path: str = ""
    domain: str = ""
    client: str = ""
    account: str = ""
    reference: str = ""
    message: str = ""
    message_id: str = ""
    verdict: str = ""
    reason: str = ""
    since: str = ""
    until: str = ""


class Understood(NamedTuple):
    """What is looked for.

    Attributes:
        queries: whatever one of them means is found; two where an address may stand on either side.
        taken_for: what the text without an option was taken for, "" where there was none.
    """

    queries: tuple[Query, ...]
    taken_for: str


def understood(asked: Asked, now_s: float) -> Understood:
    """The question as the journal is asked.

    Args:
        now_s: seconds since the epoch, for "2h" and "7d".

    Raises:
        GatepostError: something in it cannot be what it is said to be; with how it is written.
    """
    query = Query(
        reverse_path=_path(asked.reverse_path, "--reverse-path"),
        forward_path=_path(asked.forward_path, "--forward-path"),
        domain=_domain(asked.domain, "--domain"),
        account=(account_name(asked.account) or asked.account.lower()) if asked.account else "",
        message=_message(asked.message),
        message_id=_message_id(asked.message_id),
        verdict=_one_of(asked.verdict, "--verdict", VERDICTS),
        reason=_one_of(asked.reason, "--reason", (*REASONS, store.DELIVERING)),
        since=_moment(asked.since, "--since", now_s),
        until=_moment(asked.until, "--until", now_s, end=True),
    )
    if query.since is not None and query.until is not None and query.since >= query.until:
        raise GatepostError(f'--since "{asked.since}" is not before --until "{asked.until}"; exchange them')
    query = _reference(_client(query, asked.client, "--client"), asked.reference, "--reference")
    if not asked.text.strip():
        return Understood((query,), "")
    return _guessed(query, asked.text.strip())


def _guessed(query: Query, typed: str) -> Understood:
    """What a person typed without saying what it is."""
    upper = _read_out(typed)
    # Eight letters without a digit may be a name, unless they are written as references are.
    session = _SESSION.fullmatch(upper) and (typed.isupper() or any(map(str.isdigit, typed)))
    if store.reference_of(typed) is not None or session or _MESSAGE.fullmatch(upper):
        return Understood((_reference(query, typed, "the reference"),), "a reference")
    try:
        return Understood((_client(query, typed, "the client"),), "a client")
    except GatepostError:
        pass
    if "@" in typed:
        path = parse_reverse_path(f"<{typed.strip('<>')}>".encode("utf-8", "replace"), smtputf8=True)
        if isinstance(path, PathDefect):
            return Understood((query._replace(message_id=_message_id(typed)),), "a Message-ID")
        either: tuple[Query, ...] = (query._replace(reverse_path=str(path)), query._replace(forward_path=str(path)))
        if typed.startswith("<"):
            return Understood((*either, query._replace(message_id=typed)), "an address, or a Message-ID")
        account = account_name(str(path))
        if account is not None and not query.account:
            either = (*either, query._replace(account=account))
        return Understood(either, "an address")
    if "." in typed:
        try:
            return Understood((query._replace(domain=_domain(typed, "the domain")),), "a domain")
        except GatepostError:
            pass
    name = account_name(typed)
    if name is None:
        raise GatepostError(
            f'"{typed}" is no address, domain, client, reference, Message-ID or account; say by an option what it is'
        )
    return Understood((query._replace(account=name),), "an account")


def _client(query: Query, written: str, option: str) -> Query:
    if not written:
        return query
    if "/" in written:
        network: IPNetwork = _value(values.network, option, written)
        return query._replace(network=network)
    try:
        return query._replace(client=client_address(written.strip("[]")))
    except ValueError:
        raise GatepostError(
            f'{option} "{written}": this is not an IP address; write 192.0.2.1, 2001:db8::1 or a network, 192.0.2.0/24'
        ) from None


def _reference(query: Query, written: str, option: str) -> Query:
    """Of a refusal, of a session, or of a message."""
    if not written:
        return query
    reference = store.reference_of(written)
    if reference is not None:
        return query._replace(reference=reference)
    upper = _read_out(written)
    if _MESSAGE.fullmatch(upper):
        return query._replace(message=upper)
    if _SESSION.fullmatch(upper):
        return query._replace(session=upper)
    raise GatepostError(
        f'{option} "{written}": it looks like K7Q2M9XD-1 in a refusal, K7Q2M9XD.1 in our Received field, K7Q2M9XD in '
        "the log"
    )


def _read_out(written: str) -> str:
    """A reference as the gate makes it, of one that was typed."""
    return written.strip().strip("[]").upper().translate(_MISREAD)


def _message(written: str) -> str:
    upper = _read_out(written)
    if written and not _MESSAGE.fullmatch(upper):
        raise GatepostError(
            f'--message "{written}": it looks like K7Q2M9XD.1 and stands behind "id" in our Received field'
        )
    return upper


def _message_id(written: str) -> str:
    written = written.strip()
    return f"<{written}>" if written and not written.startswith("<") else written


def _path(written: str, option: str) -> str:
    if not written:
        return ""
    path = parse_reverse_path(f"<{written.strip('<>')}>".encode("utf-8", "replace"), smtputf8=True)
    if isinstance(path, PathDefect):
        raise GatepostError(f'{option} "{written}": this is no address; write user@example.com, or "<>" for bounces')
    return str(path)


def _domain(written: str, option: str) -> str:
    if not written:
        return ""
    if written.startswith("["):
        return str(_value(lambda text: parse_address_literal(str(text)), option, written)).lower()
    return str(_value(values.domain, option, written.lower()))


def _one_of(written: str, option: str, known: tuple[str, ...]) -> str:
    if written and written not in known:
        raise GatepostError(f'{option} "{written}": there is no such one; there are {", ".join(known)}')
    return written


def _moment(written: str, option: str, now_s: float, *, end: bool = False) -> float | None:
    """A point in time: so long ago, a day, or a moment; UTC where it names no offset.

    Args:
        end: of a day, its end is meant.
    """
    if not written:
        return None
    try:
        return now_s - values.duration_s(written)
    except ValueError:
        pass
    try:
        day = datetime.combine(date.fromisoformat(written), time(), UTC)
        return (day + timedelta(days=1 if end else 0)).timestamp()
    except (ValueError, OverflowError):
        pass
    try:
        moment = datetime.fromisoformat(written)
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise GatepostError(
            f'{option} "{written}": write how long ago, such as "2h" or "7d", a day, 2026-11-20, or 2026-11-20T14:30'
        ) from None


def _value(read: Callable[[object], Any], option: str, written: str) -> Any:  # noqa: ANN401  what it reads
    try:
        return read(written)
    except ValueError as error:
        raise GatepostError(f'{option} "{written}": {error}') from None


# --- Found ------------------------------------------------------------------------------------------------------------


def find(journal: Journal, queries: Sequence[Query], limit: int) -> list[Kept]:
    """The newest verdicts that any of the queries means, the newest last.

    Raises:
        StorageError: the journal cannot be read.
    """
    found = {kept.id: kept for query in queries for kept in journal.search(query, limit)}
    (first, *others) = queries
    if not found and not others and first.reference and first == Query(reference=first.reference):
        waiting = journal.refusal(first.reference)  # in the backlog yet, as one may be that a caller reads out
        return [] if waiting is None else [waiting]
    return sorted(found.values(), key=lambda kept: (kept.entry.at, kept.id))[-limit:] if limit else []


def find_sessions(journal: Journal, queries: Sequence[Query], limit: int) -> list[KeptSession]:
    """As ``find``, for sessions; a reference or the id of a message means its session.

    Raises:
        GatepostError: sessions cannot be found by this; StorageError: the journal cannot be read.
    """
    possible = [query for query in map(_its_session, queries) if _asked_for(query) <= _OF_SESSIONS]
    if not possible:
        raise GatepostError(
            "sessions are found by client, account, reference and time alone: leave the rest out, or leave --sessions "
            "out to find what became of messages"
        )
    found = {one.id: one for query in possible for one in journal.sessions(query, limit)}
    return sorted(found.values(), key=lambda one: (one.ended, one.id))[-limit:]


def _its_session(query: Query) -> Query:
    session = query.session or query.reference.partition("-")[0] or query.message.partition(".")[0]
    return query._replace(session=session, reference="", message="")


def _asked_for(query: Query) -> set[str]:
    return {name for name, value in query._asdict().items() if value not in ("", None)}


class Following:
    """What comes into the journal from a moment on; nothing twice, and nothing left out.

    Args:
        last_id: of the newest row at that moment; told: ids of rows that were shown already.
    """

    ROWS_MAX: Final = 1000

    def __init__(self, journal: Journal, queries: Sequence[Query], last_id: int, told: Iterable[int] = ()) -> None:
        self._journal = journal
        self._queries = queries
        self._last = last_id
        self._told = {row_id for row_id in told if row_id > last_id}

    def step(self) -> list[Kept]:
        """What came since the last step, the oldest first.

        Raises:
            StorageError: the journal cannot be read now; a later step finds what came in the meantime.
        """
        newest = self._journal.last_id()  # first: what comes between this and the next line is found once more
        if 0 < newest < self._last:
            self._last = 0  # another database took the place of the one before
        found: dict[int, Kept] = {}
        reached = []
        for query in self._queries:
            rows = self._journal.after(self._last, query, self.ROWS_MAX)
            found.update((row.id, row) for row in rows)
            if len(rows) == self.ROWS_MAX:
                reached.append(rows[-1].id)
        # Where one query has more, what others found behind it is found again, in order.
        end = min(reached, default=max([newest, *found]))
        fresh = [found[row_id] for row_id in sorted(found) if row_id <= end and row_id not in self._told]
        self._last = max(self._last, end)
        self._told = {row_id for row_id in self._told if row_id > self._last}
        return fresh


# --- As objects -------------------------------------------------------------------------------------------------------


def row(kept: Kept) -> dict[str, Any]:
    """One verdict, with the facts it fell on; the same keys in every row."""
    entry, session = kept.entry, kept.session
    identity, login, path = session.identity, session.mailbox_login, entry.forward_path
    return {
        "id": kept.id,
        "time": stamp(entry.at),
        "session": kept.reference,
        "transaction": entry.number,
        "stage": entry.stage,
        "client": client_text(kept),
        "port": session.client.port,
        "listen": session.listen,
        "role": session.role,
        "helo": session.hello,
        "esmtp": session.esmtp,
        "tls": session.tls,
        "account": None if identity is None else identity.account,
        "mechanism": None if identity is None else identity.mechanism or None,
        "verifier": None if identity is None else identity.verifier or None,
        "device": None if identity is None else identity.device or None,
        "addresses": [] if identity is None else list(identity.addresses),
        "auth_required": session.auth_required,
        "certificate": session.certificate or None,
        "hosts": list(session.hosts),
        "mailbox_login": None if login is None else {"account": login.account, "time": stamp(login.at)},
        "suspended": session.suspended,
        "listen_suspended": session.listen_suspended,
        "reverse_path": str(entry.reverse_path),
        "forward_path": None if path is None else str(path),
        "shape": None if path is None or path.shape is Shape.PLAIN else path.shape.value,
        "recipients": entry.recipients,
        "verdict": entry.verdict,
        "reason": entry.reason or None,
        "reference": entry.reference or None,
        "by": entry.by or None,
        "detail": entry.detail or None,
        "hint": entry.hint or None,
        "reply": entry.reply or None,
        "message": entry.message or None,
        "message_id": entry.message_id or None,
        "size": entry.size,
        "backend": entry.backend or None,
        "would": entry.would or None,
        "findings": [
            {"check": found.check, "result": found.result.value, "evidence": found.evidence} for found in entry.findings
        ],
        "authors": [str(author) for author in entry.authors],
        "pseudonymous": kept.pseudonymous,
    }


def session_row(session: KeptSession) -> dict[str, Any]:
    """One session, with mail or without."""
    told = session._asdict()
    told |= {
        "started": stamp(session.started),
        "ended": stamp(session.ended),
        "client": str(session.client),
        "end": told.pop("how"),
        "logins": [dict(login) for login in session.logins],
    }
    return {name: None if value == "" else value for name, value in told.items()}


def client_text(kept: Kept) -> str:
    """The client's address; of an old entry, a pseudonym."""
    address = kept.session.client.address
    return f"p-{address.packed[8:].hex()}" if kept.pseudonymous else str(address)


def why(kept: Kept) -> str:
    """What a person wants to know beside the verdict, in a few words."""
    entry = kept.entry
    said = entry.reply if entry.reason in ("backend", "content") else ""
    reason = entry.reason.replace("_", " ")
    rule = Path(entry.by).name
    parts = [f"[{entry.reference}]" if entry.reference else entry.message, said or reason, rule, entry.detail]
    return " ".join(part for part in parts if part) + (f"; would {entry.would}" if entry.would else "")
