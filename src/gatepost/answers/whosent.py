"""Who sent what a complaint complains of: by the token in our trace field, and by what the journal knows besides.

Why: "someone is e-mailing from our company" asks for a name, for what let it through, for what else was sent, and for
    an answer to whoever complained.
Trust: the complaint is a stranger's, and holds what another stranger wrote; only what a key of ours sealed is proven.
    The journal can contradict a token that was copied from another message, and then the answer is no yes.
Promise: a token answers without the journal.  The draft of a reply holds no account, no client and no rule.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from gatepost.answers import decided, keys, records
from gatepost.answers.refused import moment, stamp
from gatepost.answers.trace import client_text
from gatepost.complaint import (
    COMPLAINT_OCTETS_MAX,
    Complaint,
    Judged,
    Line,
    Mark,
    Seal,
    Sealed,
    judge,
    read_complaint,
)
from gatepost.config import Config
from gatepost.errors import GatepostError, StorageError
from gatepost.facts import Client, Identity, Session, Transaction
from gatepost.gate.trace import TraceReader
from gatepost.policy import relay
from gatepost.store.journal import Journal, Kept, KeptSession, Query
from gatepost.telemetry.log import printable

OURS: Final = "ours"
BY_JOURNAL: Final = "ours, by the journal only"
IN_DOUBT: Final = "in doubt"
NOT_OURS: Final = "not ours"

UNTOLD: Final = ("no_header", "complaint_only", "damaged")  # reasons of which more of the message may make another

SHOWN_MAX: Final = 50  # other messages of the day
DAY_ROWS_MAX: Final = 5000  # verdicts that are read to tell messages apart
ROWS_MAX: Final = 200  # of one message or session
IDS_TRIED_MAX: Final = 20
DAY_S: Final = 86400
SLACK_S: Final = 600  # between a date in a field and the verdict in the journal
ACCOUNT_OCTETS_MAX: Final = 64  # a token has no more of an account's name

_MESSAGE: Final = re.compile(r"[0-9A-HJKMNP-TV-Z]{8}\.[1-9][0-9]{0,8}")
_MISREAD: Final = str.maketrans("OIL", "011")
_ADDRESS: Final = re.compile(r"[^\s<>\"(),:;@]{1,64}@[^\s<>\"(),:;@]{1,255}")


class _Known(NamedTuple):
    """What the journal has on the message.

    Attributes:
        rows: of the message, or of its whole session where nobody knows which it was.
        message: its id, "" for not known.
        session: that held it, None for not known.
        doubts: what contradicts the complaint; fatal: it cannot be this message.
    """

    rows: Sequence[Kept]
    message: str
    session: KeptSession | None
    doubts: tuple[str, ...] = ()
    fatal: bool = False


class _Actor(NamedTuple):
    """Who sent it.

    Attributes:
        account: "" where nobody logged in; client: as text, a pseudonym where the journal has no more.
        facts: None where only pseudonyms are left.
        seconds: since the epoch.
    """

    account: str
    client: str
    facts: Session | None
    seconds: float


class _Asked(NamedTuple):
    """A complaint, read.

    Attributes:
        doubts: what makes it uncertain which message is complained of.
    """

    loaded: Config
    complaint: Complaint
    judged: Judged
    reader: TraceReader
    now_s: float
    doubts: tuple[str, ...]


def answer(loaded: Config, octets: bytes, now_s: float, kind: str = "") -> dict[str, Any]:
    """Who sent it, verified; what let it through, what else was sent, and what to reply.

    Args:
        octets: the complaint, whatever it is; behind ``COMPLAINT_OCTETS_MAX`` nothing is looked at.
        now_s: seconds since the epoch.
        kind: "complaint", "message" for what is complained of itself, "" to be guessed.

    Raises:
        GatepostError: nobody can tell, for no key can be used; StorageError: nor which there are.
    """
    notes: list[str] = []
    if len(octets) > COMPLAINT_OCTETS_MAX:
        notes.append(f"only the first {COMPLAINT_OCTETS_MAX >> 20} MiB were looked at")
    reader = TraceReader(keys.found(loaded))
    notes += [
        f"the key {file.name} cannot be used: {file.problem}; what it sealed is not known for ours"
        for file in reader.files
        if file.problem
    ]
    complaint = read_complaint(octets)
    judged = judge(complaint, reader.read, loaded.gate.name, kind)
    doubts: list[str] = []
    if not kind:
        judged = _as_it_may_be_meant(loaded, complaint, judged, reader, doubts, notes)
    asked = _Asked(loaded, complaint, judged, reader, now_s, tuple(doubts))
    try:
        with records.journal(loaded) as journal:
            told = _told(asked, journal, notes)
    except StorageError as error:
        notes.append(f"the journal was not asked: {error}")
        told = _told(asked, None, notes)
    if told["verdict"] == NOT_OURS and not reader.keys:
        raise GatepostError(
            f"there is no key that can be used in {loaded.data}/keys, so that nobody can tell: keys are made by the "
            "gate when it starts, and stand in its data directory ([gate] data)"
        )
    told["received"] = [_line_object(line) for line in judged.lines]
    told["around"] = [_line_object(line) for line in judged.around]
    told["complaint"] = _heads(judged.enclosing.fields if judged.enclosing is not None else {})
    told["mail"] = _heads(judged.section.fields)
    told["notes"] = notes
    told["reply"] = _reply(loaded, told)
    return told


def _as_it_may_be_meant(
    loaded: Config, complaint: Complaint, judged: Judged, reader: TraceReader, doubts: list[str], notes: list[str]
) -> Judged:
    """What seems to be a complaint may be the message itself, with a message or lines of one in its content."""
    seal = next((line.seal for line in judged.around if line.mark is Mark.OURS and line.seal is not None), None)
    if seal is None:
        return judged
    record = seal.record
    who = f"the account {record.account}" if record.account else f"the client {record.client}"
    passed = f"what seems to be the complaint passed this gate itself on {moment(record.seconds)}, sent by {who}"
    if not record.account and not relay.grants(loaded.gate.rules, _facts(record)):
        # It could write to us alone.
        notes.append(f"{passed}; if it is the message complained of, say so: --kind message")
        return judged
    if judged.seals:
        doubts.append(f"{passed}; say which it is: --kind complaint or --kind message")
        return judged
    doubts.append(f"{passed}; it is taken for the message complained of: say --kind complaint, or --kind message")
    return judge(complaint, reader.read, loaded.gate.name, "message")


def _told(asked: _Asked, journal: Journal | None, notes: list[str]) -> dict[str, Any]:
    """The answer without what is quoted from the complaint."""
    loaded, complaint, judged = asked.loaded, asked.complaint, asked.judged
    if judged.seals:
        return _by_token(asked, journal, notes)
    found = None if journal is None else _by_journal(journal, complaint, judged)
    if journal is not None and found is not None:
        known, how = found
        verdict = IN_DOUBT if known.fatal else BY_JOURNAL
        actor = _actor_of_row(known.rows[0])
        named = _named(loaded, verdict, how, known, actor, journal, asked.now_s, notes)
        return named | {"proof": None, "passes": []}
    return _not_ours(complaint, judged, journal, loaded)


# --- By the token -----------------------------------------------------------------------------------------------------


def _by_token(asked: _Asked, journal: Journal | None, notes: list[str]) -> dict[str, Any]:
    loaded, complaint, judged, reader = asked.loaded, asked.complaint, asked.judged, asked.reader
    seal = judged.seals[0]
    message = _message_of(seal, complaint, judged)
    known = _Known((), message, None)
    if journal is not None:
        known = _known_session(journal, seal.record, message, judged, notes)
        if not known.rows:
            notes.append(_unknown(loaded, journal, seal.record.seconds))
    doubts = [*asked.doubts, *known.doubts]
    fatal = known.fatal or bool(asked.doubts)
    if judged.loose:
        doubts.insert(0, "the token stands in no Received field: whoever has seen one may have put it there")
        fatal = fatal or bool(judged.lines)  # a header section without our field
    if judged.overshadowed:
        doubts.insert(0, "a line above it claims to be ours, and cannot be verified: the token may be copied")
        fatal = True
    if seal.repaired:
        places = "1 place" if seal.repaired == 1 else f"{seal.repaired} places"
        notes.append(f"the token was misread in {places} and was repaired; what it says is proven all the same")
    if judged.nested:
        doubts.insert(0, "it stands within another message, which has no field of ours: give the true one alone")
        fatal = True
    retired = reader.retired(seal.record.key)
    late = False
    if retired is not None and seal.record.seconds > retired + DAY_S and not known.rows:
        late = fatal = True
        when = f"its key {seal.record.key} had been replaced on {moment(retired)}, before it was sealed"
        doubts.insert(0, f"{when}: whoever got hold of that key may have made it")
    how = "the token in its Received field was sealed by this gate"
    if late:
        how = "the token was sealed with a key of this gate that was out of use by then"
    if known.fatal:
        how = "the journal contradicts it: the token is true, and may be copied from another message"
    elif not late and (fatal or judged.loose):
        how = "the token was sealed by this gate, but may be that of another message"
    known = known._replace(doubts=tuple(doubts), fatal=fatal)
    actor = _actor_of_token(seal.record, known.rows)
    told = _named(loaded, IN_DOUBT if fatal else OURS, how, known, actor, journal, asked.now_s, notes)
    told["proof"] = {
        "token": seal.token,
        "key": seal.record.key or None,
        "key_retired": None if retired is None else stamp(retired),
        "sealed": stamp(seal.record.seconds),
        "repaired": seal.repaired,
        "trials": judged.trials,
        "in_received": not judged.loose,
    }
    told["session"] = seal.record.reference
    told["passes"] = [
        {
            "time": stamp(one.record.seconds),
            "session": one.record.reference,
            "account": one.record.account or None,
            "client": str(one.record.client),
        }
        for one in judged.seals[1:]
    ]
    return told


def _message_of(seal: Seal, complaint: Complaint, judged: Judged) -> str:
    """The id that stands beside the token, "" where it cannot be one of its session."""
    shown = [line.received.id for line in judged.lines if line.mark is Mark.OURS and line.seal == seal]
    for one in shown or list(complaint.ids):
        written = one.upper().translate(_MISREAD)
        if _MESSAGE.fullmatch(written) and written.startswith(f"{seal.record.reference}."):
            return written
    return ""


def _known_session(journal: Journal, record: Sealed, message: str, judged: Judged, notes: list[str]) -> _Known:
    """What the journal has on a token, and whether that agrees with what the complaint shows."""
    query = Query(session=record.reference)
    everything = [kept for kept in journal.search(query, ROWS_MAX) if _is_of(kept, record)]
    sessions = [one for one in journal.sessions(query, 1) if one.client == record.client]
    session = sessions[0] if sessions else None
    if not everything:
        if journal.count(query):
            notes.append(f"the journal has another session under the reference {record.reference}; it is left out here")
        return _Known((), message, session)
    ids = {kept.entry.message for kept in everything} - {""}
    if not message:
        if len(ids) != 1:
            return _Known(everything, "", session)
        message = next(iter(ids))
    rows = [kept for kept in everything if kept.entry.message == message]
    rows = rows or [kept for kept in journal.search(Query(message=message), ROWS_MAX) if _is_of(kept, record)]
    if not rows:
        doubt = f"the journal has no message {message} in this session, but {_ids_text(ids)}: the id may be made up"
        return _Known(everything, "", session, (doubt,))
    doubts, fatal = _contradictions(journal, rows, judged)
    return _Known(rows, message, session, doubts, fatal)


def _is_of(kept: Kept, record: Sealed) -> bool:
    """References of sessions are short: another gate may have had the same, or we ourselves years ago."""
    if abs(kept.entry.at - record.seconds) > 2 * DAY_S:
        return False
    return kept.pseudonymous or kept.session.client.address == record.client


def _ids_text(ids: Iterable[str]) -> str:
    some = sorted(ids, key=lambda one: (len(one), one))
    return ", ".join(some[:5]) + (f" and {len(some) - 5} more" if len(some) > 5 else "") if some else "none at all"


def _contradictions(journal: Journal, rows: Sequence[Kept], judged: Judged) -> tuple[tuple[str, ...], bool]:
    """What in the complaint is not as the journal has it, and whether that makes it another message."""
    doubts: list[str] = []
    shown = judged.section.fields.get("message-id", "").strip()
    kept = rows[0]
    fatal = bool(shown and kept.entry.message_id) and not _same_message_id(journal, kept, shown)
    if fatal:
        was = "another one" if kept.pseudonymous else kept.entry.message_id
        doubts.append(f"its Message-ID is {shown}, and that of the message {kept.entry.message} was {was}")
    paths = {str(row.entry.forward_path).lower() for row in rows if row.entry.forward_path is not None}
    named = _recipients(judged)
    if named and paths and not kept.pseudonymous and len(rows) < ROWS_MAX and not named & paths:
        doubts.append(
            f"it names {_some(sorted(named))}, and the message {kept.entry.message} went to {_some(sorted(paths))}: "
            "it was forwarded, or the token is copied"
        )
    return tuple(doubts), fatal


def _same_message_id(journal: Journal, kept: Kept, shown: str) -> bool:
    if not kept.pseudonymous:
        return kept.entry.message_id.strip("<>") == shown.strip("<>")
    query = Query(message=kept.entry.message)
    return any(journal.count(query._replace(message_id=one)) for one in (shown, f"<{shown.strip('<>')}>"))


def _recipients(judged: Judged) -> set[str]:
    """Whom the complaint says the message was for; an ARF report has it from the receiver's own envelope."""
    enclosing = judged.enclosing.fields if judged.enclosing is not None else {}
    texts = [judged.section.fields.get("to", ""), judged.section.fields.get("original-rcpt-to", "")]
    texts += [enclosing.get("original-rcpt-to", ""), enclosing.get("from", "")]
    return {found.lower() for text in texts for found in _ADDRESS.findall(text)}


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


def _unknown(loaded: Config, journal: Journal, seconds: float) -> str:
    since = journal.kept_since()
    if not loaded.gate.journal.enabled:
        return "the journal is switched off ([journal] enabled = false): the token alone answers"
    if since is None:
        return f"the journal in {journal.name} is empty: the token alone answers"
    if since > seconds:
        return f"the journal begins on {moment(since)}, after the message: the token alone answers"
    return f"the journal in {journal.name} does not know the session: the token alone answers"


# --- By the journal ---------------------------------------------------------------------------------------------------


def _by_journal(journal: Journal, complaint: Complaint, judged: Judged) -> tuple[_Known, str] | None:
    """A message that the journal knows by what no key proves; None where it knows none.

    What anybody may have written is enough only where more than one thing agrees, and nothing contradicts.
    """
    claims = {
        line.received.id.upper().translate(_MISREAD): line
        for line in judged.lines
        if line.mark in (Mark.DAMAGED, Mark.FORGED) and line.seal is None
    }
    copied = {line.received.id.upper() for line in judged.lines if line.seal is not None}
    around = {line.received.id.upper() for line in judged.around}
    ids = [one for one in dict.fromkeys((*claims, *complaint.ids)) if _MESSAGE.fullmatch(one)]
    for message in [one for one in ids if one not in copied | around][:IDS_TRIED_MAX]:
        rows = [kept for kept in journal.search(Query(message=message), ROWS_MAX) if kept.entry.verdict == "accepted"]
        line = claims.get(message)
        if not rows or (line is not None and not _agrees(line, rows[0])):
            continue
        doubts, fatal = _contradictions(journal, rows, judged)
        if fatal:
            continue
        confirmed = bool(judged.section.fields.get("message-id") and rows[0].entry.message_id)
        proven = (
            "what is written beside the id agrees with the journal" if line is not None else "the id alone is known"
        )
        if confirmed:
            proven = "its id and its Message-ID are those of one message in the journal"
        if line is None or line.mark is Mark.FORGED:
            doubts = (*doubts, "no token proves it: whoever has seen the message may have written its id")
        sessions = journal.sessions(Query(session=rows[0].reference), 1)
        doubtful = not confirmed and (line is None or line.mark is Mark.FORGED)
        return _Known(rows, message, sessions[0] if sessions else None, doubts, doubtful), proven
    shown = judged.section.fields.get("message-id", "").strip()
    if not shown or "@" not in shown:
        return None
    rows = journal.search(Query(message_id=f"<{shown.strip('<>')}>", verdict="accepted"), ROWS_MAX)
    rows = [kept for kept in rows if kept.entry.message == rows[0].entry.message]
    if not rows:
        return None
    doubts, _ = _contradictions(journal, rows, judged)
    # A header section without our field did not pass here, whatever it calls itself.
    without = bool(judged.lines) and not any(line.mark is Mark.DAMAGED for line in judged.lines)
    doubts = (*doubts, "no token proves it: whoever has seen the message may have written its Message-ID")
    sessions = journal.sessions(Query(session=rows[0].reference), 1)
    known = _Known(rows, rows[0].entry.message, sessions[0] if sessions else None, doubts, without)
    return known, "its Message-ID is that of a message in the journal"


def _agrees(line: Line, kept: Kept) -> bool:
    """Whether what can be seen in a field is what the journal has."""
    received = line.received
    if received.seconds is not None and abs(received.seconds - kept.entry.at) > SLACK_S:
        return False
    return kept.pseudonymous or received.client in (None, kept.session.client.address)


# --- Who, and what let it through -------------------------------------------------------------------------------------


def _actor_of_token(record: Sealed, rows: Sequence[Kept]) -> _Actor:
    """What the token says; the journal adds what it has no room for."""
    account = record.account
    for kept in rows:
        identity = kept.session.identity
        if (account or identity is not None) and not kept.pseudonymous:
            named = "" if identity is None else identity.account
            whole = len(account.encode()) >= ACCOUNT_OCTETS_MAX - 3 and named.startswith(account.rstrip("\ufffd"))
            if named == account or whole:  # a session may have sent before it logged in
                return _Actor(named, str(record.client), kept.session, record.seconds)
        elif not kept.pseudonymous:
            return _Actor("", str(record.client), kept.session, record.seconds)
    return _Actor(account, str(record.client), _facts(record), record.seconds)


def _facts(record: Sealed) -> Session:
    """As much as a token says."""
    identity = Identity(record.account, "") if record.account else None
    return Session(record.reference, Client(record.client, 0), "", "", identity=identity)


def _actor_of_row(kept: Kept) -> _Actor:
    identity = kept.session.identity
    account = "" if identity is None else identity.account
    return _Actor(account, client_text(kept), None if kept.pseudonymous else kept.session, kept.entry.at)


def _named(
    loaded: Config,
    verdict: str,
    why: str,
    known: _Known,
    actor: _Actor,
    journal: Journal | None,
    now_s: float,
    notes: list[str],
) -> dict[str, Any]:
    facts, rows = actor.facts, [kept for kept in known.rows if kept.entry.verdict == "accepted"]
    identity = None if facts is None else facts.identity
    session = known.session
    return {
        "verdict": verdict,
        "reason": None,
        "why": why,
        "doubts": list(known.doubts),
        "account": actor.account or None,
        "client": actor.client,
        "time": stamp(actor.seconds),
        "session": known.rows[0].reference if known.rows else None,
        "message": known.message or None,
        "listen": (facts.listen if facts is not None else "")
        or (session.listen if session is not None else "")
        or None,
        "role": (facts.role if facts is not None else "") or (session.role if session is not None else "") or None,
        "helo": (facts.hello if facts is not None else "") or None,
        "tls": (facts.tls if facts is not None else "") or None,
        "device": None if identity is None else identity.device or None,
        "mechanism": None if identity is None else identity.mechanism or None,
        "verifier": None if identity is None else identity.verifier or None,
        "deliveries": [_delivery(kept) for kept in rows],
        "message_id": next((kept.entry.message_id for kept in known.rows if kept.entry.message_id), None)
        if known.message
        else None,
        "trust": _trust(loaded, facts, rows, now_s, notes),
        "trust_then": list(dict.fromkeys(kept.entry.by for kept in rows if kept.entry.by)),
        "day": None if journal is None else _day(journal, actor, known.message),
    }


def _delivery(kept: Kept) -> dict[str, Any]:
    entry = kept.entry
    return {
        "time": stamp(entry.at),
        "message": entry.message or None,
        "reverse_path": str(entry.reverse_path),
        "forward_path": None if entry.forward_path is None else str(entry.forward_path),
        "by": entry.by or None,
        "backend": entry.backend or None,
        "size": entry.size,
        "pseudonymous": kept.pseudonymous,
    }


def _trust(
    loaded: Config, facts: Session | None, rows: Sequence[Kept], now_s: float, notes: list[str]
) -> list[dict[str, Any]]:
    """What of the configuration as it is now lets this through: for the recipients, where they are known."""
    if facts is None:
        notes.append("what would let it through now cannot be told: the journal has only pseudonyms of it")
        return []
    rules = loaded.gate.rules
    hosts, unknown = asyncio.run(decided.hosts(rules, facts.client.address))
    notes += unknown
    facts = facts._replace(hosts=tuple(dict.fromkeys((*facts.hosts, *hosts))))
    if not facts.listen and any(entry.listen for entry in rules.trust):
        notes.append(
            "which listener it came to is not known, so that a [[trust]] entry by listener may be missing here"
        )
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for kept in rows:
        path, login = kept.entry.forward_path, facts.mailbox_login
        if path is None or kept.pseudonymous:
            continue
        then = (
            facts
            if login is None
            else facts._replace(mailbox_login=login._replace(at=login.at + now_s - kept.entry.at))
        )
        transaction = Transaction(then, kept.entry.reverse_path, 0, now_s)
        told = decided.verdict(rules, relay.decide(rules, transaction, path), ())
        rule = told["rule"] or {"rule": "", "where": "", "why": told["detail"], "owner": ""}
        found.setdefault(
            (told["verdict"], rule["where"]), {"verdict": told["verdict"], "reason": told["reason"], **rule}
        )
    if found:
        return list(found.values())
    return [
        {
            "verdict": "expired" if relay.expired(entry, now_s) else "may",
            "reason": None,
            "rule": f"[[trust]] {relay.who(entry)}",
            "where": entry.where,
            "why": entry.why,
            "owner": entry.owner,
        }
        for entry in relay.grants(rules, facts)
    ]


# --- The day ----------------------------------------------------------------------------------------------------------


def _day(journal: Journal, actor: _Actor, message: str) -> dict[str, Any] | None:
    """What else the same account, or else the same client, sent on that day (UTC)."""
    since, kept_since = actor.seconds // DAY_S * DAY_S, journal.kept_since()
    if actor.facts is None or kept_since is None or kept_since >= since + DAY_S:
        return None
    query = Query(since=since, until=since + DAY_S)
    query = (
        query._replace(account=actor.account) if actor.account else query._replace(client=actor.facts.client.address)
    )
    rows = journal.search(query._replace(verdict="accepted"), DAY_ROWS_MAX)
    messages: dict[object, list[Kept]] = {}
    for kept in rows:
        if not message or kept.entry.message != message:
            messages.setdefault(kept.entry.message or (kept.reference, kept.entry.number), []).append(kept)
    return {
        "by": "account" if actor.account else "client",
        "date": stamp(since)[:10],
        "messages": len(messages),
        "more": len(rows) == DAY_ROWS_MAX,
        "recipients": sum(map(len, messages.values())),
        "refused": journal.count(query._replace(verdict="refused")),
        "shown": [_other(some) for some in list(messages.values())[:SHOWN_MAX]],
    }


def _other(rows: Sequence[Kept]) -> dict[str, Any]:
    entry = rows[0].entry
    return {
        "time": stamp(entry.at),
        "message": entry.message or None,
        "message_id": entry.message_id or None,
        "client": client_text(rows[0]),
        "reverse_path": str(entry.reverse_path),
        "forward_paths": [str(kept.entry.forward_path) for kept in reversed(rows)][:10],
        "recipients": len(rows),
        "size": entry.size,
    }


# --- Not ours ---------------------------------------------------------------------------------------------------------


def _not_ours(complaint: Complaint, judged: Judged, journal: Journal | None, loaded: Config) -> dict[str, Any]:
    reason, why = _reason(complaint, judged, journal, loaded.gate.name)
    return {"verdict": NOT_OURS, "reason": reason, "why": why, "doubts": [], "proof": None, "passes": []} | {
        **dict.fromkeys(("account", "client", "time", "session", "message", "listen", "role", "helo", "tls", "device")),
        **dict.fromkeys(("mechanism", "verifier", "message_id", "day")),
        "deliveries": [],
        "trust": [],
        "trust_then": [],
    }


def _reason(complaint: Complaint, judged: Judged, journal: Journal | None, name: str) -> tuple[str, str]:
    marks = [line.mark for line in judged.lines]
    forged = marks.count(Mark.FORGED)
    if forged:
        gone = any(line.mark is Mark.FORGED and line.seal is None and line.received.candidates for line in judged.lines)
        which = "a Received field claims" if forged == 1 else f"{forged} Received fields claim"
        return "forged", f"{which} to be ours, and {'is' if forged == 1 else 'are'} not" + (
            "; a token whose key was removed would look the same" if gone else ""
        )
    if Mark.DAMAGED in marks:
        return "damaged", "a Received field names this gate, and its token is not all there: ask for all header fields"
    if Mark.OTHER_GATE in marks:
        other = next(line.received.by for line in judged.lines if line.mark is Mark.OTHER_GATE)
        return "other_gate", f"it passed another gate, {other}, whose operator can tell"
    refusal = None if journal is None else _refusal(journal, complaint)
    if refusal is not None:
        return "refused", (
            f"this gate refused it ({refusal}), and did not pass it on; gatepost explain {refusal} tells why"
        )
    if any(line.seal is not None for line in judged.around):
        return "complaint_only", (
            "the only token of ours in it is that of the complaint itself; of the message that it complains of it has "
            "no field of ours: ask for all header fields of that message"
        )
    if complaint.loose:
        return "damaged", "something like a token stands in it, and no key of ours sealed it, nor what it may have been"
    if not judged.lines:
        return "no_header", "it holds no Received field: ask for the message with all its header fields"
    number = (
        "its only Received field is"
        if len(judged.lines) == 1
        else f"none of its {len(judged.lines)} Received fields is"
    )
    return "no_token", f"{number} {'not ' if len(judged.lines) == 1 else ''}by {name}"


def _refusal(journal: Journal, complaint: Complaint) -> str | None:
    """The reference of a refusal in it that the journal knows."""
    for reference in complaint.references[:IDS_TRIED_MAX]:
        if journal.refusal(reference) is not None:
            return reference
    return None


# --- What is quoted ---------------------------------------------------------------------------------------------------


def _line_object(line: Line) -> dict[str, Any]:
    received = line.received
    return {
        "mark": line.mark.value,
        "why": list(line.why),
        "client": None if received.client is None else str(received.client),
        "by": received.by or None,
        "id": received.id or None,
        "time": None if received.seconds is None else stamp(received.seconds),
        "text": received.text,
    }


def _heads(fields: Mapping[str, str]) -> dict[str, str | None]:
    return {
        name.replace("-", "_"): fields.get(name) for name in ("from", "reply-to", "to", "date", "subject", "message-id")
    }


# --- The reply --------------------------------------------------------------------------------------------------------


def _reply(loaded: Config, told: dict[str, Any]) -> str:
    """A draft to whoever complained: nothing in it that they did not know, but that it is ours or not."""
    return "\n".join([*_reply_head(told), "", "Hello,", "", *_reply_body(loaded.gate.name, told), "", "Postmaster"])


def _reply_head(told: dict[str, Any]) -> Iterator[str]:
    complaint = told["complaint"]
    to = _ADDRESS.search(complaint["reply_to"] or "") or _ADDRESS.search(complaint["from"] or "")
    yield f"To: {printable(to[0]) if to is not None else '(whoever complained)'}"
    subject = printable(complaint["subject"] or "Your complaint")[:200]
    yield f"Subject: {subject if subject.lower().startswith('re:') else f'Re: {subject}'}"


def _reply_body(name: str, told: dict[str, Any]) -> list[str]:
    if told["verdict"] == NOT_OURS:
        return _reply_not_ours(name, told)
    when = moment_of(told["time"])
    reference = told["message"] or told["session"]
    if told["verdict"] == IN_DOUBT:
        return [
            "thank you for writing to us. What you sent names our mail gateway",
            f"{name}, but parts of it do not agree with what we know.",
            "Please send us the message once more with all its header fields,",
            "best as an attachment, so that we can find its sender.",
            "",
            f"Our reference: {reference}",
        ]
    if told["account"] is not None:
        who = "It was sent by a user of ours, whom we know."
    elif any(entry["rule"].startswith("[[trust]]") for entry in told["trust"]):
        who = "It was sent by a computer that may send through us, and we know which."
    else:
        who = "It came to us from elsewhere, and we know from which address."
    return [
        "thank you for writing to us. The message you complain of passed our mail",
        f"gateway {name} on {when}.",
        who,
        "",
        "[What was done about it.]",
        "",
        "If you get another one, please send it to us with all its header fields.",
        f"Our reference: {reference}",
    ]


def _reply_not_ours(name: str, told: dict[str, Any]) -> list[str]:
    begin = "thank you for writing to us."
    again = [
        "Please send us the message once more with all its header fields, best as",
        "an attachment: only these tell where it came from.",
    ]
    match told["reason"]:
        case reason if reason in UNTOLD:
            return [
                f"{begin} What you sent does not tell us whether the message",
                f"passed our mail gateway {name}.",
                *again,
            ]
        case "forged":
            return [
                f"{begin} The message you complain of did not come from us.",
                f"A line in its header names our mail gateway {name}, but it",
                "was forged: it does not carry the mark that our gateway puts on each message.",
                "Its true origin stands in the uppermost lines that begin with",
                '"Received:", which your own provider wrote.',
            ]
        case "refused":
            return [
                f"{begin} Our mail gateway {name} refused the message, and did",
                "not pass it on. The refusal says why, and what its sender can do.",
            ]
    return [
        f"{begin} The message you complain of did not pass our mail",
        f"gateway {name}: it does not carry the mark that our gateway",
        "puts on each message. Its true origin stands in the uppermost lines that",
        'begin with "Received:", which your own provider wrote.',
    ]


def moment_of(written: str) -> str:
    """A time of the answer, for a person."""
    return f"{written[:10]} {written[11:19]} UTC"
