"""The journal decided again under other rules: what would change, the most surprising first.

Why: whoever changes rules wants to know whose mail stops, and whose begins to pass, before it does.
Trust: what is read back from the journal came from strangers, and was parsed again.  Strangers choose how many
    networks and domains there are.
Promise: nothing here judges but ``relay`` and ``admission``, as the gate does.  Memory is bounded: where there are more
    than ``GROUPS_MAX`` groups, the least surprising are counted together, so that a flood hides nothing that matters.
    What the same mail would meet tomorrow is told: entries that have expired by now grant and deny nothing, the
    listener asks for a login as it is configured now, a client of POP before SMTP has read its mail as long before as
    it had then, and rates are taken for what they were.  What the backend refused, and content, was admitted.

How much a group surprises is a weight times (days + log2(1 + times)), so that what happens every day counts most:
    3   mail that the backend accepted would be refused, and nothing of that client and domain was refused before
    2   mail that the backend accepted would be refused; or a stranger's mail would pass that did not
    1   mail would be refused that the backend did not want either; or an account's mail would pass that did not
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from enum import Enum, unique
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final, NamedTuple

from gatepost.answers.refused import stamp
from gatepost.facts import IPAddress, Session, Transaction
from gatepost.gate.settings import GateSettings, ListenSettings
from gatepost.policy import admission, relay
from gatepost.policy.relay import RelayRules
from gatepost.policy.replay import Classes
from gatepost.smtp.path import Mailbox
from gatepost.store.journal import Kept
from gatepost.store.record import Entry
from gatepost.verdict import Admit, Defer, Reason, Refuse, RelayVerdict

GROUPS_MAX: Final = 10_000
ACTORS_MAX: Final = 100_000
DECIDED_MAX: Final = 200_000
TOLD_EVERY: Final = 2000
_DAY_S: Final = 86400
_DAYS_COUNTED: Final = 31

_REASONS: Final = frozenset(reason.name.lower() for reason in Reason)
# But for the hour, and for the recipients before it, these were admitted.
_PASSING: Final = frozenset({Reason.RATE.name.lower(), Reason.OTHER_ROUTE.name.lower()})


@unique
class Change(Enum):
    """What a verdict becomes."""

    SAME = "same"
    REFUSED = "newly refused"
    DEFERRED = "newly deferred"
    ADMITTED = "newly admitted"
    REASON = "refused for another reason"


class Now(NamedTuple):
    """What one verdict would be.  word: "admitted", "refused" or "deferred"; by: the rule's file and line."""

    word: str
    reason: str
    by: str


class Group(NamedTuple):
    """Changes of one kind, of one client and domain.

    Attributes:
        actor: an account, or the network that the client stands in (/24, /64); stranger: nobody had logged in.
        transactions: refused at MAIL then, or admitted there now, and nothing is known of their recipients.
        times: how many.
        domain: the other side's: of the forward-path, or of the reverse-path where the forward-path is ours.
        accepted: how many of them the backend had accepted.
        first, last: seconds since the epoch; days: on how many days.
        then, now: why, with the rule; of the example.
        surprise: see above; why: the same in words.
    """

    change: Change
    actor: str
    stranger: bool
    domain: str
    transactions: bool
    times: int
    accepted: int
    first: float
    last: float
    days: int
    then: str
    now: str
    example: Kept
    surprise: float
    why: str


class Replayed(NamedTuple):
    """The whole.

    Attributes:
        verdicts: how many were decided again; changes: how many of each kind.
        groups: the most surprising first; others: changes of groups that were too many, and surprised least.
        notes: what could not be told.
    """

    verdicts: int
    changes: dict[Change, int]
    groups: list[Group]
    others: int
    notes: list[str]

    @property
    def same(self) -> bool:
        """Nothing is admitted or refused that was not."""
        return not any(self.changes[change] for change in (Change.REFUSED, Change.DEFERRED, Change.ADMITTED))


def replay(
    gate: GateSettings,
    verdicts: Iterable[Kept],
    now_s: float,
    *,
    before: GateSettings | None = None,
    known: GateSettings | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Replayed:
    """Decide all of them again.

    Args:
        gate: the new rules; now_s: seconds since the epoch.
        before: the rules to compare with, instead of what was decided then.
        known: the settings by which the gate gathered what it knows of its clients; by default ``before``.
        progress: told every ``TOLD_EVERY`` verdicts how many there were.
    """
    again = _Again(gate, now_s)
    compared = None if before is None else _Again(before, now_s)
    folded = _Folded(gate)
    number = 0
    for kept in _told(verdicts, progress):
        number += 1
        now = again.decided(kept.session, kept.entry)
        then = _then(kept.entry) if compared is None else compared.decided(kept.session, kept.entry)
        folded.add(kept, then, now)
    progress(number)
    changes = {change: folded.changes.get(change, 0) for change in Change} | {Change.SAME: folded.same}
    return Replayed(number, changes, folded.groups(), folded.others, list(_notes(gate, known or before)))


def _told(verdicts: Iterable[Kept], progress: Callable[[int], None]) -> Iterator[Kept]:
    for number, kept in enumerate(verdicts):
        if number % TOLD_EVERY == 0:
            progress(number)
        yield kept


def _then(entry: Entry) -> Now:
    """What the policy said; what the backend or the content was refused for had been admitted by it."""
    refused = entry.verdict in ("refused", "deferred") and entry.reason in _REASONS and entry.reason not in _PASSING
    # That an account's From names somebody else is told of the transaction, and its recipients had been admitted.
    if refused and (entry.stage != "content" or entry.forward_path is None):
        return Now(entry.verdict, entry.reason, entry.by)
    return Now("admitted", "", entry.by)


class _Again:
    """Verdicts under one configuration; what its rules cannot tell apart is decided once."""

    def __init__(self, gate: GateSettings, now_s: float) -> None:
        self._gate = gate
        self._rules = gate.rules
        self._now_s = now_s
        self._listens = {listen.name: listen for listen in gate.listens}
        self._classes = Classes(gate.rules)
        # By identity, which the journal gives to what is equal; the value keeps alive what the key stands for.
        self._sessions: dict[int, tuple[Session, Session, ListenSettings | None, int]] = {}
        self._numbers: dict[Hashable, int] = {}
        self._decided: dict[tuple[Hashable, ...], Now] = {}

    def decided(self, session: Session, entry: Entry) -> Now:
        path, reverse = entry.forward_path, entry.reverse_path
        if path is None and entry.stage == "content":
            return _in_words(self._author(session, entry))
        classes, rules = self._classes, self._rules
        key = (
            self._session(session)[3],
            reverse if session.identity is not None else classes.reverse_path(reverse),
            None if path is None else classes.forward_path(path),
            bool(rules.recipients_max) and entry.recipients >= rules.recipients_max,
            classes.login(session, entry.at),
        )
        found = self._decided.get(key)
        if found is None:
            if len(self._decided) >= DECIDED_MAX:
                self._decided.clear()
            found = self._decided[key] = _in_words(self._decide(session, entry))
        return found

    def _session(self, session: Session) -> tuple[Session, Session, ListenSettings | None, int]:
        """The session as it would be now, its listener, and the number of its class."""
        known = self._sessions.get(id(session))
        if known is None:
            if len(self._sessions) >= DECIDED_MAX:
                self._sessions.clear()
            if len(self._numbers) >= DECIDED_MAX:
                self._numbers.clear()
                self._sessions.clear()
                self._decided.clear()
            listen = self._listens.get(session.listen)
            asks = session.auth_required if listen is None else listen.auth == "required"
            facts = session if asks is session.auth_required else session._replace(auth_required=asks)
            number = self._numbers.setdefault(self._classes.session(facts), len(self._numbers))
            known = self._sessions[id(session)] = (session, facts, listen, number)
        return known

    def _now(self, session: Session, entry: Entry) -> tuple[Transaction, ListenSettings | None]:
        """The same transaction, were it to happen now."""
        _, facts, listen, _ = self._session(session)
        login = facts.mailbox_login
        if login is not None:
            facts = facts._replace(mailbox_login=login._replace(at=self._now_s - (entry.at - login.at)))
        return Transaction(facts, entry.reverse_path, entry.recipients, self._now_s), listen

    def _decide(self, session: Session, entry: Entry) -> RelayVerdict | None:
        transaction, listen = self._now(session, entry)
        if entry.forward_path is None or session.identity is not None:
            refusal = self._at_mail(transaction, listen)
            if refusal is not None or entry.forward_path is None:
                return refusal
        return relay.decide(self._rules, transaction, entry.forward_path)

    def _at_mail(self, transaction: Transaction, listen: ListenSettings | None) -> Refuse | None:
        session = transaction.session
        refusal = relay.denied(self._rules, transaction)
        if refusal is None and session.identity is None and session.auth_required:
            return Refuse(Reason.AUTH_REQUIRED)
        if refusal is None and session.identity is not None and (listen is None or listen.send_as == "enforce"):
            return admission.send_as(self._gate.send_as, session.identity, transaction.reverse_path, self._now_s)
        return refusal

    def _author(self, session: Session, entry: Entry) -> RelayVerdict | None:
        """A message that was refused for its From field."""
        transaction, listen = self._now(session, entry)
        refusal = self._at_mail(transaction, listen)
        identity = session.identity
        if refusal is not None or identity is None or (listen is not None and listen.send_as != "enforce"):
            return refusal
        if entry.reason == Reason.AUTHOR.name.lower():
            return Refuse(Reason.AUTHOR)
        return admission.author(self._gate.send_as, identity, entry.authors, self._now_s)


def _in_words(verdict: RelayVerdict | None) -> Now:
    if verdict is None:
        return Now("admitted", "", "")
    if isinstance(verdict, Admit):
        return Now("admitted", "", verdict.recipient.authority.where)
    word = "deferred" if isinstance(verdict, Defer) else "refused"
    return Now(word, verdict.reason.name.lower(), verdict.where)


_CHANGES: Final = {"admitted": Change.ADMITTED, "refused": Change.REFUSED, "deferred": Change.DEFERRED}


class _Sum:
    """A group while it grows."""

    __slots__ = ("accepted", "count", "days", "example", "first", "last", "now", "then")

    def __init__(self, kept: Kept, then: Now, now: Now) -> None:
        self.count = self.accepted = 0
        self.first = self.last = kept.entry.at
        self.days: set[int] = set()
        self.example, self.then, self.now = kept, then, now

    def add(self, entry: Entry) -> None:
        self.count += 1
        self.accepted += entry.verdict == "accepted"
        self.first, self.last = min(self.first, entry.at), max(self.last, entry.at)
        if len(self.days) < _DAYS_COUNTED:
            self.days.add(int(entry.at // _DAY_S))


class _Key(NamedTuple):
    change: Change
    actor: str
    stranger: bool
    domain: str
    transactions: bool


class _Folded:
    """Changes by kind, client and domain."""

    def __init__(self, gate: GateSettings) -> None:
        self._rules = gate.rules
        self.changes: dict[Change, int] = {}
        self.same = self.others = 0
        self._sums: dict[_Key, _Sum] = {}
        self._refused_before: dict[tuple[str, str], int] = {}
        self._actors: dict[int, tuple[Session, str]] = {}

    def add(self, kept: Kept, then: Now, now: Now) -> None:
        entry = kept.entry
        if then.word != "admitted":
            before = (self._actor(kept.session), self._domain(entry))
            if before in self._refused_before or len(self._refused_before) < ACTORS_MAX:
                self._refused_before[before] = self._refused_before.get(before, 0) + 1
        if then.word == now.word:
            if then.reason == now.reason:
                self.same += 1
            else:
                self.changes[Change.REASON] = self.changes.get(Change.REASON, 0) + 1
            return
        change = _CHANGES[now.word]
        self.changes[change] = self.changes.get(change, 0) + 1
        stranger, transactions = kept.session.identity is None, entry.forward_path is None and entry.stage == "mail"
        key = _Key(change, self._actor(kept.session), stranger, self._domain(entry), transactions)
        found = self._sums.get(key)
        if found is None:
            if len(self._sums) >= GROUPS_MAX:
                self._keep_the_most_surprising()
            found = self._sums[key] = _Sum(kept, then, now)
        found.add(entry)

    def _keep_the_most_surprising(self) -> None:
        ordered = sorted(self._sums.items(), key=lambda item: -self._surprise(*item))
        self._sums = dict(ordered[: GROUPS_MAX // 2])
        self.others += sum(summed.count for _, summed in ordered[GROUPS_MAX // 2 :])

    def _actor(self, session: Session) -> str:
        known = self._actors.get(id(session))
        if known is None:
            if len(self._actors) >= ACTORS_MAX:
                self._actors.clear()
            name = session.identity.account if session.identity is not None else _network(session.client.address)
            known = self._actors[id(session)] = (session, name)
        return known[1]

    def _domain(self, entry: Entry) -> str:
        path = entry.forward_path
        if path is not None and isinstance(path.mailbox, Mailbox) and relay.local_domain(self._rules, path) is None:
            return str(path.mailbox.domain)
        reverse = entry.reverse_path
        return str(reverse.domain) if isinstance(reverse, Mailbox) else "<>"

    def groups(self) -> list[Group]:
        found = [self._group(key, summed) for key, summed in self._sums.items()]
        return sorted(found, key=lambda group: (-group.surprise, -group.times, group.actor, group.domain))

    def _group(self, key: _Key, summed: _Sum) -> Group:
        return Group(
            *key,
            summed.count,
            summed.accepted,
            summed.first,
            summed.last,
            len(summed.days),
            _why(summed.then),
            _why(summed.now),
            summed.example,
            self._surprise(key, summed),
            _words(key, summed, self._refusals_of(key)),
        )

    def _surprise(self, key: _Key, summed: _Sum) -> float:
        if key.change is Change.ADMITTED:
            weight = 2 if key.stranger else 1
        elif summed.accepted:
            weight = 2 if self._refusals_of(key) else 3
        else:
            weight = 1
        return weight * (len(summed.days) + math.log2(1 + summed.count))

    def _refusals_of(self, key: _Key) -> int | None:
        """How often mail of the same client and domain was refused; None where that was not counted to the end."""
        found = self._refused_before.get((key.actor, key.domain))
        return found or (0 if len(self._refused_before) < ACTORS_MAX else None)


def _network(address: IPAddress) -> str:
    if isinstance(address, IPv4Address):
        return f"{IPv4Address(int(address) >> 8 << 8)}/24"
    return f"{IPv6Address(int(address) >> 64 << 64)}/64"


def _words(key: _Key, summed: _Sum, refused_before: int | None) -> str:
    """What is surprising about a group."""
    often = f"{_times(summed.count)} on {_days(len(summed.days))}"
    whose = "a stranger's" if key.stranger else "an account's"
    if key.change is Change.ADMITTED:
        if key.transactions:
            return f"{whose} MAIL, refused {often}, would pass; of the recipients behind it nothing is known"
        return f"{whose} mail, {summed.then.word} {often}, would pass"
    word = "deferred" if key.change is Change.DEFERRED else "refused"
    if summed.then.word != "admitted":
        return f"{whose} mail, {summed.then.word} {often}, would be {word}"
    if summed.accepted:
        often = f"{_times(summed.accepted)} on {_days(len(summed.days))}"
        before = "" if refused_before is None else " and never refused"
        if refused_before:
            before = f", and refused {_times(refused_before)}"
        return f"accepted {often}{before}, it would be {word}"
    return f"admitted {often}, but the backend took none of it: it would be {word}"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _days(number: int) -> str:
    return "one day" if number == 1 else f"{number}{'' if number < _DAYS_COUNTED else ' or more'} days"


def _why(verdict: Now) -> str:
    said = verdict.reason.replace("_", " ") or verdict.word
    return f"{said} ({verdict.by})" if verdict.by else said


def _notes(gate: GateSettings, known: GateSettings | None) -> Iterator[str]:
    """What the journal cannot tell, for nobody asked for it then."""
    rules, then = gate.rules, RelayRules() if known is None else known.rules
    names = _hosts(rules) - _hosts(then)
    if names:
        listed = ", ".join(sorted(names))
        yield f"clients are known by the host names of the rules in force then; where these are new, not: {listed}"
    if _any_certificate(rules) and not _any_certificate(then):
        yield "nobody was asked for a certificate, so that no client passes by one here"
    if rules.index.trust_mailbox_logins and not then.index.trust_mailbox_logins:
        yield "logins to the mailbox server were not looked at, so that no client passes by one here"
    if known is not None and _rates(gate) != _rates(known):
        yield "mail is not counted again: a rate that is changed changes nothing here"
    if known is not None and _enforcing(gate) - _enforcing(known):
        yield "From fields of mail that passed are not kept: only MAIL FROM is held against [[send_as]] here"


def _hosts(rules: RelayRules) -> set[str]:
    return {entry.host for entry in rules.trust if entry.host} | {entry.host for entry in rules.deny if entry.host}


def _any_certificate(rules: RelayRules) -> bool:
    return any(entry.certificate for entry in rules.trust)


def _rates(gate: GateSettings) -> tuple[int, set[tuple[str, int, int]]]:
    entries = (entry for entry in gate.rules.trust if entry.messages_per_hour or entry.recipients_per_hour)
    return gate.limits.messages_per_hour_per_mailbox, {
        (relay.sense(entry), entry.messages_per_hour, entry.recipients_per_hour) for entry in entries
    }


def _enforcing(gate: GateSettings) -> set[str]:
    return {listen.name for listen in gate.listens if listen.send_as == "enforce" and listen.auth != "off"}


def as_object(replayed: Replayed, limit: int) -> dict[str, Any]:
    """For a program."""
    return {
        "verdicts": replayed.verdicts,
        **{change.value.replace(" ", "_"): number for change, number in replayed.changes.items()},
        "groups": [
            {
                "change": group.change.value,
                "actor": group.actor,
                "stranger": group.stranger,
                "domain": group.domain,
                "transactions": group.transactions,
                "count": group.times,
                "accepted": group.accepted,
                "first": stamp(group.first),
                "last": stamp(group.last),
                "days": group.days,
                "then": group.then,
                "now": group.now,
                "why": group.why,
                "surprise": round(group.surprise, 1),
                "example": {
                    "time": stamp(group.example.entry.at),
                    "session": group.example.reference,
                    "reference": group.example.entry.reference or None,
                    "message": group.example.entry.message or None,
                    "client": str(group.example.session.client.address),
                    "reverse_path": str(group.example.entry.reverse_path),
                    "forward_path": None
                    if group.example.entry.forward_path is None
                    else str(group.example.entry.forward_path),
                },
            }
            for group in replayed.groups[:limit]
        ],
        "other_groups": max(len(replayed.groups) - limit, 0),
        "other_changes": replayed.others,
        "notes": replayed.notes,
    }
