"""Allow like this, deny like this: a verdict of the journal made into the narrowest entry that turns it.

Why: the rule that somebody writes by hand after a complaint is the one that is too wide.  Here the entry names this
    client, this reverse-path and this forward-path; whoever wants more says so, and sees what more that is.
Trust: paths, hello names and clients in the row came from strangers; they reach the file as TOML text that was read
    back, and only after the whole file has loaded and was proven anew.
Promise: nothing is written here.  What is proposed turns the verdict, as ``relay.decide`` itself says of the file with
    the entry in it; a file that would be open is no proposal.
Sources: RFC 5321 §3.6.2 (relaying).
"""

from __future__ import annotations

import re
import time as clock
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from ipaddress import IPv6Address
from typing import Any, Final, NamedTuple

from gatepost import config
from gatepost.answers import decided, proof, trace
from gatepost.answers import replay as replaying
from gatepost.answers.refused import moment, stamp
from gatepost.config import Config, dialects, edit, exposure, sentences, settings, values
from gatepost.config.document import Document
from gatepost.errors import ConfigError, GatepostError
from gatepost.facts import Session, Transaction
from gatepost.gate.settings import GateSettings
from gatepost.policy import explanation, relay
from gatepost.policy.relay import DenyEntry, IPNetwork, RelayRules
from gatepost.smtp.path import ForwardPath, Mailbox, Pattern, ReversePath, exact_text
from gatepost.store import DELIVERING, reference_of
from gatepost.store.journal import Journal, Kept, Query
from gatepost.verdict import Admit, Defer, LocalDomain, Reason, Refuse, RelayVerdict

DAY_S: Final = 86400.0
REPLAY_DAYS: Final = 30
ALLOWED_DAYS: Final = 90  # unless somebody says otherwise
ROWS_MAX: Final = 100_000  # of the journal, for one count
SCAN_S: Final = 10.0  # for a count that no index helps
EXAMPLES: Final = 5
_MESSAGE: Final = re.compile(r"[0-9A-HJKMNP-TV-Z]{8}\.[0-9]{1,9}")
# RFC 1918, RFC 6598, RFC 1122 §3.2.1.3, RFC 4193, RFC 4291 §2.5.3: addresses that proxies and NAT have on the inside.
_HIDING: Final = tuple(
    map(
        values.network,
        ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "127.0.0.0/8", "fc00::/7", "::1"),
    )
)
BY: Final = ("network", "reverse_path", "forward_path", "helo", "host")


class Wish(NamedTuple):
    """What a person says of the entry, as it was typed.

    Attributes:
        network: in place of the client's one address; by: the key of a [[deny]] entry.
        forward_domain: the forward-path's whole domain; any_*: not narrowed at all.
        expires: how long, a date, or "never".
    """

    network: str | None = None
    forward_domain: bool = False
    any_forward_path: bool = False
    any_reverse_path: bool = False
    by: str | None = None
    why: str | None = None
    owner: str | None = None
    expires: str | None = None


class Proposal(NamedTuple):
    """An entry.

    Attributes:
        query: the rows that it can be about; None where no index leads to them.
        notes: what the person should know.
    """

    table: str
    entry: dict[str, edit.Value]
    query: Query | None
    notes: tuple[str, ...] = ()


class Unadvised(NamedTuple):
    """Why no entry is proposed, and what helps instead."""

    reasons: tuple[str, ...]


class Decision(NamedTuple):
    """A proposal and what it does.

    Attributes:
        told: the answer as an object.
        old, new: the file as it is, and with the entry in it; ``new`` is b"" where it is not to be written.
        gate: what the file with the entry in it says; None where there is no entry.
    """

    told: dict[str, Any]
    old: bytes = b""
    new: bytes = b""
    gate: GateSettings | None = None


# --- Which row --------------------------------------------------------------------------------------------------------


def look_up(journal: Journal, typed: str | None, row_id: int | None) -> Kept | None:
    """The row that is meant; None where the journal does not have it.

    Args:
        typed: the reference in a refusal, or the id of a message; row_id: of a row, as ``gatepost trace --json`` has
            it.

    Raises:
        GatepostError: neither is given, or it is neither; StorageError: the journal cannot be read.
    """
    if (typed is None) == (row_id is None):
        raise GatepostError(
            "say which: the reference in a refusal, such as K7Q2M9XD-1, the id of a message, such as K7Q2M9XD.1, or "
            "--id with that of a row from gatepost trace --json"
        )
    if row_id is not None:
        found = journal.after(row_id - 1, Query(), 1)
        return found[0] if found and found[0].id == row_id else None
    assert typed is not None
    reference = reference_of(typed)
    if reference is not None:
        return journal.refusal(reference)
    message = _MESSAGE.fullmatch(typed.strip().upper())
    if message is None:
        raise GatepostError(
            f'"{typed}" holds no reference: one looks like K7Q2M9XD-1 and stands in brackets at the end of a refusal; '
            "a message's id looks like K7Q2M9XD.1"
        )
    rows = journal.search(Query(message=message[0]), 1)
    return rows[0] if rows else None


def not_found(journal: Journal) -> str:
    """A sentence for who looked for a row that the journal does not have."""
    since = journal.kept_since()
    if since is None:
        return f"not found: the journal in {journal.name} is empty"
    return (
        f"not found: the journal in {journal.name} begins on {moment(since)}, and one of the last moment may not be "
        "written yet"
    )


# --- Allow ------------------------------------------------------------------------------------------------------------


def allow(loaded: Config, kept: Kept, wish: Wish, now: float) -> Proposal | Unadvised:
    """The narrowest [[trust]] entry that lets this pass.

    Raises:
        GatepostError: something in the wish cannot be.
    """
    path = kept.entry.forward_path
    refusal = _not_by_a_grant(loaded.gate, kept, now)
    if refusal or path is None:
        return Unadvised((refusal or "the whole transaction was refused, and not a forward-path",))
    notes: list[str] = []
    entry, query = _who(kept.session, wish)
    if not wish.any_reverse_path:
        pattern = _pattern(kept.entry.reverse_path)
        if pattern is None:
            return Unadvised((f"no pattern means {kept.entry.reverse_path} alone: --any-reverse-path allows all",))
        entry["reverse_paths"] = [str(pattern)]
    if not wish.any_forward_path:
        pattern = _pattern(path, whole_domain=wish.forward_domain)
        if pattern is None:
            return Unadvised((f"no pattern means {path} alone: --forward-domain allows its whole domain",))
        entry["forward_paths"] = [str(pattern)]
    entry["why"] = wish.why or f"allowed like {_name(kept)} of {_day(kept)}"
    if wish.owner:
        entry["owner"] = wish.owner
    elif "accounts" not in entry:
        notes.append("nobody is named who answers for it: --owner it@example.com")
    expires = _expires(wish.expires or f"{ALLOWED_DAYS}d", now)
    if expires is None:
        notes.append("it never ends; see in gatepost trust list whether it is used")
    else:
        entry["expires"] = expires
        notes.append(f"it ends with {expires}; --expires says otherwise")
    return Proposal("trust", entry, query, (*_beside(loaded.gate, kept, now), *notes))


def _who(session: Session, wish: Wish) -> tuple[dict[str, edit.Value], Query | None]:
    """Whom the entry means: what is hardest to forge comes first; and the rows of these."""
    address = session.client.address
    if wish.network is not None:
        network = _network(wish.network, session)
        return {"network": str(network)}, Query(network=network)
    if session.identity is not None:
        return {"accounts": [session.identity.account]}, Query(account=session.identity.account)
    if session.certificate:
        return {"certificate": session.certificate}, None
    return {"network": str(address)}, Query(client=address)


def _network(written: str, session: Session) -> IPNetwork:
    try:
        network = values.network(written)
    except ValueError as error:
        raise GatepostError(f'--network "{written}": {error}') from None
    address = session.client.address
    if address not in network:
        raise GatepostError(f'--network "{written}" does not hold the client {address}, which this is about')
    return network


def _pattern(path: ReversePath | ForwardPath, *, whole_domain: bool = False) -> Pattern | None:
    """The pattern that means this path alone; None where there is none, for its local-part has a "*"."""
    mailbox = path.mailbox if isinstance(path, ForwardPath) else path
    text = exact_text(mailbox) if isinstance(mailbox, Mailbox) else str(mailbox)
    try:
        return Pattern.parse(f"*@{text.rpartition('@')[2]}" if whole_domain and "@" in text else text)
    except ValueError:
        return None


def _expires(written: str, now: float) -> date | None:
    """A day, whose end is meant; None for never."""
    if written.strip().lower() == "never":
        return None
    try:
        day = datetime.fromtimestamp(now + values.duration_s(written.strip()), UTC).date()
    except (ValueError, OverflowError):
        try:
            day = date.fromisoformat(written.strip())
        except ValueError:
            raise GatepostError(
                f'--expires "{written}": write how long, such as 30d, a date such as 2027-06-30, or never'
            ) from None
    if day < datetime.fromtimestamp(now, UTC).date():
        raise GatepostError(f'--expires "{written}": that is over; write a day to come')
    return day


# What helps where no grant does, by the reason of the row.
_INSTEAD: Final = {
    "backend": "the backend refused it, and not the gate: {reply}",
    "backend_down": "the backend was out of reach, and the client tries again: gatepost status says how it is now",
    "rate": "there was too much mail in that hour: raise the limit of the entry at {by}, or let the client try again",
    "send_as": "the account sent as somebody else: a [[send_as]] entry lets it, and no [[trust]]",
    "author": "nobody can tell from its From field as whom the account sends: its program must write a plain one",
    "too_many_recipients": "[limits] recipients_per_message says how many one transaction may have; clients send the "
    "rest in another",
    "other_route": "the client sends this recipient in a transaction of its own, by itself",
    "bare_newline": 'its content has bare CR or LF: bare_newlines = "normalise" in the client\'s [[trust]] takes it',
    "size": "[limits] message_size is smaller than the message",
    "storage": "the gate's disk was full or failed: the client tries again",
    "journal": "the journal could not be written before the reply: the client tries again",
    DELIVERING: "what came of it is not known: the gate was interrupted while the backend had the message",
}


def _not_by_a_grant(gate: GateSettings, kept: Kept, now: float) -> str:
    """Why no [[trust]] entry helps; "" where one does."""
    entry = kept.entry
    if entry.verdict in ("accepted", "admitted"):
        by = f" by {entry.by}" if entry.by else ""
        return f"there is nothing to allow: it was {entry.verdict}{by}"
    words = _INSTEAD.get(entry.reason)
    if words is not None:
        return words.format(reply=entry.reply, by=entry.by)
    if entry.reason.upper() not in Reason.__members__:
        return f"it was not refused by a rule about who may send where, but with: {entry.reply}"
    return _no_grant_helps(gate, kept, _now(gate, kept, now))


def _no_grant_helps(gate: GateSettings, kept: Kept, verdict: RelayVerdict | None) -> str:
    """The same for what the policy says now."""
    if verdict is None:
        return "it is not refused any more; its recipients are decided one by one"
    if isinstance(verdict, Admit):
        authority = verdict.recipient.authority
        return f"the same passes now, by {explanation.rule_text(gate.rules, verdict)} ({authority.where})"
    session = kept.session
    source = session.client.address if session.suspended else session.listen
    rule = explanation.rule_text(gate.rules, verdict)
    detail = f" ({verdict.detail})" if verdict.detail else ""
    sentences_by_reason = {
        Reason.DENIED: f"{rule} at {verdict.where} refuses it{detail}, and no [[trust]] overrules a [[deny]]: the "
        "first refusal counts; narrow that entry, or remove it",
        Reason.AUTH_REQUIRED: f"the listener {session.listen} takes mail from nobody who did not log in: give the "
        "client an account (gatepost account add), or let it come to a listener of role inside",
        Reason.SUSPENDED: f"the trust in {source} is suspended, for strangers were seen there: mend what hides its "
        f"clients (docs/howto/addresses.md), then: gatepost trust resume {source}",
        Reason.ROUTING: "its forward-path can be read as another address by some servers, and no narrow entry lets "
        "such pass: the sender must write the plain address",
        Reason.NO_ROUTE: "no backend takes mail for it: [[route]] says which does",
    }
    return sentences_by_reason.get(verdict.reason, "")


def _now(gate: GateSettings, kept: Kept, now: float) -> RelayVerdict | None:
    """What the same meets now; None where nothing refuses a transaction that names no forward-path yet."""
    transaction = _transaction(gate, kept, now)
    path = kept.entry.forward_path
    if path is not None:
        return relay.decide(gate.rules, transaction, path)
    denial = relay.denied(gate.rules, transaction)
    if denial is None and transaction.session.auth_required and transaction.session.identity is None:
        return Refuse(Reason.AUTH_REQUIRED)
    return denial


def _transaction(gate: GateSettings, kept: Kept, now: float) -> Transaction:
    """The same, as if it happened now, as the first recipient."""
    session, login = kept.session, kept.session.mailbox_login
    if login is not None:
        session = session._replace(mailbox_login=login._replace(at=login.at + now - kept.entry.at))
    for listen in gate.listens:
        if listen.name == session.listen:
            session = session._replace(auth_required=listen.auth == "required")
    return Transaction(session, kept.entry.reverse_path, 0, now)


def _beside(gate: GateSettings, kept: Kept, now: float) -> Iterator[str]:
    """An entry that is there already, and nearly lets it pass."""
    verdict = _now(gate, kept, now)
    if not isinstance(verdict, Refuse) or not verdict.where:
        return
    mend = {
        Reason.EXPIRED_TRUST: "it has expired: a later `expires` there does the same for all that it granted",
        Reason.NARROWED: f"it is narrowed by {verdict.detail}: one more pattern there does the same",
        Reason.MAILBOX_LOGIN: "it asks for a login to the mailbox server, which lets the client send without this",
        Reason.TLS_REQUIRED: f"it asks for {verdict.detail}; this entry does without",
    }.get(verdict.reason)
    if mend is not None:
        yield f"{explanation.rule_text(gate.rules, verdict)} at {verdict.where} is about this client, too; {mend}"


# --- Deny -------------------------------------------------------------------------------------------------------------


class Alternative(NamedTuple):
    """One way to deny.

    Attributes:
        by: the who key; value: as it is written; query: the rows that it can be about, None where no index leads there.
    """

    by: str
    value: str
    entry: DenyEntry
    query: Query | None


def alternatives(kept: Kept) -> list[Alternative]:
    """All by which the row can be denied, in the order of ``BY``."""
    session, reverse, path = kept.session, kept.entry.reverse_path, kept.entry.forward_path
    address = session.client.address
    found = [
        Alternative("network", str(address), DenyEntry("", network=values.network(str(address))), Query(client=address))
    ]
    pattern = _pattern(reverse)
    if pattern is not None:
        query = Query(reverse_path=str(reverse))
        found.append(Alternative("reverse_path", str(pattern), DenyEntry("", reverse_path=pattern), query))
    pattern = None if path is None else _pattern(path)
    if pattern is not None:
        query = Query(forward_path=str(path))
        found.append(Alternative("forward_path", str(pattern), DenyEntry("", forward_path=pattern), query))
    try:
        hello = values.helo_pattern(session.hello)
        found.append(Alternative("helo", hello, DenyEntry("", helo=hello), None))
    except ValueError:
        pass  # no EHLO, or one that no entry can name
    found += [Alternative("host", host, DenyEntry("", host=host), None) for host in session.hosts]
    return found


def deny(
    loaded: Config, kept: Kept, wish: Wish, now: float, counts: Sequence[Mapping[str, Any]] = ()
) -> Proposal | Unadvised:
    """The narrowest [[deny]] entry that refuses this.

    A stranger is denied by address, which nobody can forge who wants an answer.  Of whoever is trusted, by a login or
    by an entry, and of a client whose other mail is accepted, the reverse-path is denied: the address may be that of
    many.

    Args:
        counts: what ``counted`` tells of the alternatives, () where nobody counted.
    """
    verdict = _now(loaded.gate, kept, now)
    if isinstance(verdict, Refuse) and verdict.reason is Reason.DENIED:
        rule = explanation.rule_text(loaded.gate.rules, verdict)
        return Unadvised((f"there is nothing to deny: {rule} at {verdict.where} refuses it already",))
    possible = alternatives(kept)
    named = isinstance(kept.entry.reverse_path, Mailbox) and any(one.by == "reverse_path" for one in possible)
    others = _others_accepted(counts)
    by = _by(wish.by, possible)
    if not by:
        by = "reverse_path" if named and (others or _trusted(loaded.gate, kept, verdict)) else "network"
    chosen = next(one for one in possible if one.by == by)
    entry: dict[str, edit.Value] = {by: chosen.value}
    query = chosen.query
    if wish.network is not None:
        network = _network(wish.network, kept.session)
        entry, query = {"network": str(network)}, Query(network=network)
    entry["why"] = wish.why or f"denied like {_name(kept)} of {_day(kept)}"
    if wish.owner:
        entry["owner"] = wish.owner
    expires = _expires(wish.expires, now) if wish.expires else None
    if expires is not None:
        entry["expires"] = expires
    notes = list(_about_denying(kept, next(iter(entry))))
    if others:
        word = "message" if others == 1 else "messages"
        notes.insert(0, f"{others:,} other {word} of the same client with other reverse-paths were accepted")
    return Proposal("deny", entry, query, tuple(notes))


def _others_accepted(counts: Sequence[Mapping[str, Any]]) -> int:
    """How many messages that nobody complains about would be lost with the client's address."""
    return next((int(one["others"]) for one in counts if one["by"] == "network"), 0)


def _by(written: str | None, possible: Iterable[Alternative]) -> str:
    if written is None:
        return ""
    by = written.strip().lower().replace("-", "_")
    if by not in BY:
        raise GatepostError(f'--by "{written}": write one of {", ".join(BY)}')
    if all(one.by != by for one in possible):
        raise GatepostError(
            f'--by "{written}": the row has none; it has {", ".join(dict.fromkeys(one.by for one in possible))}'
        )
    return by


def _trusted(gate: GateSettings, kept: Kept, verdict: RelayVerdict | None) -> bool:
    """Whether the client may send elsewhere by a login or an entry."""
    if kept.session.identity is not None:
        return True
    if isinstance(verdict, Admit) and not isinstance(verdict.recipient.authority, LocalDomain):
        return True
    return bool(relay.grants(gate.rules, kept.session))


def _about_denying(kept: Kept, by: str) -> Iterator[str]:
    session, address = kept.session, kept.session.client.address
    if by in ("reverse_path", "helo"):
        yield "a client may claim another one at any time; an address is harder to change"
    if by == "reverse_path" and not isinstance(kept.entry.reverse_path, Mailbox):
        yield "the null reverse-path is that of every bounce: none would reach anybody here any more"
    if by == "network" and any(address in network for network in _HIDING):
        yield f"{address} is no public address, and may stand for many clients behind a proxy or NAT"
    if by == "network" and isinstance(address, IPv6Address):
        yield "whoever has one IPv6 address mostly has its /64: --network denies that"
    if session.identity is not None:
        yield f"it came with a login: gatepost account lock {session.identity.account} stops all that the account sends"
    if kept.entry.verdict in ("refused", "deferred"):
        yield f"it was {kept.entry.verdict} without it, too; with it mail for our own domains is refused as well"


# --- What it does -----------------------------------------------------------------------------------------------------


def decision(loaded: Config, octets: bytes, kept: Kept, proposed: Proposal | Unadvised, now: float) -> Decision:
    """The proposal in its file: loaded, proven, and asked about this row.

    Args:
        loaded: what ``octets``, the file, says now.

    Raises:
        GatepostError: the entry cannot be put into the file; ConfigError: the file would not load with it.
    """
    told: dict[str, Any] = {"row": trace.row(kept), "then": then(kept), "why": why(kept)}
    if isinstance(proposed, Unadvised):
        return Decision(told | {"advisable": False, "reasons": list(proposed.reasons)})
    path = loaded.config_path
    new = edit.added(octets, proposed.table, proposed.entry)
    told |= {
        "advisable": True,
        "reasons": [],
        "table": proposed.table,
        "entry": {key: str(value) if isinstance(value, date) else value for key, value in proposed.entry.items()},
        "toml": edit.entry_text(proposed.table, proposed.entry),
        "diff": edit.difference(octets, new, path),
    }
    document = Document(new, path)
    gate = settings.build(document, now, refuse_open=False)
    if document.problems:
        raise ConfigError(document.problems)
    told["where"] = (gate.rules.trust if proposed.table == "trust" else gate.rules.deny)[-1].where
    told["proof"] = _proof(document, gate, now)
    told["notes"] = [*proposed.notes, *_idle(gate, told["where"], now)]
    reasons = list(_wrong(gate, kept, proposed, told, now))
    if not reasons:
        try:
            config.load(new, path, now=now)
        except ConfigError as error:
            reasons = list(error.problems)
    told |= {"advisable": not reasons, "reasons": reasons}
    return Decision(told, octets, b"" if reasons else new, gate)


def _proof(document: Document, gate: GateSettings, now: float) -> dict[str, Any]:
    listeners = settings.smtp_listeners(gate.listens)
    readings = dialects.readings(proof.recalled(gate.data, gate.backends), gate.rules, listeners, now)
    return sentences.proof_facts(settings.prove(document, gate, now), gate.rules, now, readings)


def _idle(gate: GateSettings, where: str, now: float) -> Iterator[str]:
    """What ``gatepost check`` would say of the entry."""
    if not gate.rules.trust or gate.rules.trust[-1].where != where:
        return
    number = len(gate.rules.trust) - 1
    for one in exposure.advice(gate.rules, settings.smtp_listeners(gate.listens), now):
        if one.number == number:
            yield one.sentence


def _wrong(gate: GateSettings, kept: Kept, proposed: Proposal, told: Mapping[str, Any], now: float) -> Iterator[str]:
    """Why the file must not be written with the entry in it."""
    if proposed.table == "trust" and not told["proof"]["proven"]:
        yield "with this entry strangers could relay, or it cannot be proven that they cannot; it is not written"
    verdict = _now(gate, kept, now)
    if proposed.table == "trust" and not isinstance(verdict, Admit) and verdict is not None:
        yield f"with this entry it would still not pass: {decided.why(verdict, past=False)}"
    if proposed.table == "deny" and not (isinstance(verdict, Refuse) and verdict.where == told["where"]):
        yield "with this entry it would not be denied"


def replay(
    journal: Journal, before: GateSettings, gate: GateSettings, query: Query | None, now: float
) -> dict[str, Any]:
    """What the entry would have changed in the last days, as ``gatepost replay`` tells it.

    Args:
        before, gate: without and with the entry; query: the rows that it can be about.

    Raises:
        StorageError: the journal cannot be read.
    """
    since = now - REPLAY_DAYS * DAY_S
    rows = _Rows(journal, query, since, now)
    replayed = replaying.replay(gate, rows, now, before=before)
    return {
        "since": stamp(since),
        "days": REPLAY_DAYS,
        "complete": rows.complete,
        "kept_since": _kept_since(journal, since),
        **replaying.as_object(replayed, EXAMPLES),
    }


def counted(journal: Journal, kept: Kept, now: float) -> list[dict[str, Any]]:
    """How many messages of the last days each way to deny would have hit; "others": accepted, of other reverse-paths.

    Raises:
        StorageError: the journal cannot be read.
    """
    since, told = now - REPLAY_DAYS * DAY_S, []
    for one in alternatives(kept):
        rules = RelayRules(deny=(one.entry,), recipients_max=0)
        rows = _Rows(journal, one.query, since, now)
        hit: dict[tuple[str, int], Kept] = {}
        passed: dict[tuple[str, int], Kept] = {}
        for row in rows:
            if _denies(rules, row):
                message = (row.reference, row.entry.number)
                hit[message] = row
                if row.entry.verdict in ("accepted", "admitted"):
                    passed[message] = row
        others = sum(row.entry.reverse_path != kept.entry.reverse_path for row in passed.values())
        told.append(
            {
                "by": one.by,
                "value": one.value,
                "messages": len(hit),
                "accepted": len(passed),
                "others": others,
                "complete": rows.complete,
            }
        )
    return told


class _Rows:
    """Rows of a time, by an index where one leads to them, else all for as long as there is patience.

    Attributes:
        read: how many there were; complete: none was left out.
    """

    def __init__(self, journal: Journal, query: Query | None, since: float, until: float) -> None:
        self._journal = journal
        self._query = query
        self._since, self._until = since, until
        self.read = 0
        self.complete = True

    def __iter__(self) -> Iterator[Kept]:
        if self._query is not None:
            rows = self._journal.search(self._query._replace(since=self._since, until=self._until), ROWS_MAX + 1)
            self.complete = len(rows) <= ROWS_MAX
            self.read = min(len(rows), ROWS_MAX)
            yield from (kept for kept in rows[:ROWS_MAX] if not kept.pseudonymous)
            return
        end = clock.monotonic() + SCAN_S
        for kept in self._journal.verdicts(self._since, self._until):
            self.read += 1
            if self.read % 1000 == 0 and clock.monotonic() > end:
                self.complete = False
                return
            yield kept


def _denies(rules: RelayRules, kept: Kept) -> bool:
    entry = kept.entry
    transaction = Transaction(kept.session, entry.reverse_path, entry.recipients, entry.at)
    if entry.forward_path is None:
        return relay.denied(rules, transaction) is not None
    verdict = relay.decide(rules, transaction, entry.forward_path)
    return isinstance(verdict, Refuse) and verdict.reason is Reason.DENIED


def _kept_since(journal: Journal, since: float) -> str | None:
    """Where the journal does not reach back so far."""
    oldest = journal.kept_since()
    return stamp(oldest) if oldest is not None and oldest > since else None


# --- In words ---------------------------------------------------------------------------------------------------------


_VERDICTS: Final = {
    "accepted": "ACCEPTED",
    "admitted": "ADMITTED, but no content came:",
    "deferred": "DEFERRED",
    "refused": "REFUSED",
}


def then(kept: Kept) -> str:
    """What became of it, in a sentence."""
    entry, identity = kept.entry, kept.session.identity
    account = f", logged in as {identity.account}" if identity is not None else ""
    to = f" to {entry.forward_path}" if entry.forward_path is not None else ""
    return (
        f"{_VERDICTS[entry.verdict]} {_name(kept)} on {moment(entry.at)}: {entry.reverse_path}{to}, from "
        f"{kept.session.client.address}{account}"
    )


def why(kept: Kept) -> str:
    """By what, in a sentence."""
    entry = kept.entry
    by = f" ({entry.by})" if entry.by else ""
    if entry.verdict in ("deferred", "refused") and entry.reason.upper() in Reason.__members__:
        kind = Defer if entry.verdict == "deferred" else Refuse
        return decided.why(kind(Reason[entry.reason.upper()], entry.by, entry.detail), past=True) + by
    return (entry.reply or entry.reason or "nothing was said") + by


def _name(kept: Kept) -> str:
    return kept.entry.reference or kept.entry.message or f"{kept.reference}, row {kept.id}"


def _day(kept: Kept) -> str:
    return f"{datetime.fromtimestamp(kept.entry.at, UTC):%Y-%m-%d}"


def replay_text(told: Mapping[str, Any]) -> list[str]:
    """What the entry would have changed, in sentences."""
    changes = [
        f"{word} {told[change]:,} {'recipient' if told[change] == 1 else 'recipients'}"
        for word, change in (("let through", "newly_admitted"), ("refused", "newly_refused"))
        if told[change]
    ]
    since = f"in the last {told['days']} days"
    if told["kept_since"]:
        since = f"since {told['kept_since'][:10]}, when the journal begins,"
    more = "" if told["complete"] else f"; only {told['verdicts']:,} rows were read, and there are more"
    out = [f"{since} it would have {' and '.join(changes) or 'changed nothing'}{more}"]
    for group in told["groups"]:
        one = group["example"]
        to = f" to {one['forward_path']}" if one["forward_path"] is not None else ""
        out.append(f"  such as {one['reverse_path']}{to}, from {one['client']}: {group['why']}")
    return [*out, *told["notes"]]
