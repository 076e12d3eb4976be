"""The journal decided again under other rules: what would change, the most surprising first.

Why: whoever changes rules wants to know whose mail stops, and whose begins to pass, before it does.
Trust: what is read back from the journal came from strangers, and was parsed again.
Promise: nothing here judges but ``relay.decide`` and ``admission.send_as``, as the gate does.  Memory is bounded:
    beyond ``GROUPS_MAX`` groups changes are counted together.
    What the same mail would meet tomorrow is told: entries that have expired by now grant and deny nothing, the
    listener asks for a login as it is configured now, and rates are taken for what they were.

What surprises, from most to least, each time the more often and on the more days it happened:
    3   mail that the backend accepted would be refused, and nothing of that client and domain was refused before
    2   mail that the backend accepted would be refused; or a stranger's mail would pass that did not
    1   mail would be refused that the backend did not want either; or an account's mail would pass that did not
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from enum import Enum, unique
from ipaddress import IPv4Address, ip_network
from typing import Any, Final, NamedTuple

from gatepost.answers.refused import stamp
from gatepost.facts import Session, Transaction
from gatepost.gate.settings import GateSettings, ListenSettings
from gatepost.policy import admission, relay
from gatepost.smtp.path import ForwardPath, Mailbox, ReversePath
from gatepost.store.journal import Kept
from gatepost.store.record import Entry
from gatepost.verdict import Admit, Defer, Reason, Refuse, RelayVerdict

GROUPS_MAX: Final = 10_000
ACTORS_MAX: Final = 100_000
DECIDED_MAX: Final = 200_000
TOLD_EVERY: Final = 2000
_DAY_S: Final = 86400
_DAYS_COUNTED: Final = 31

_POLICY: Final = {reason.name.lower(): reason for reason in Reason}


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
        groups: the most surprising first; others: changes beyond ``GROUPS_MAX`` groups.
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
    progress: Callable[[int], None] = lambda _: None,
) -> Replayed:
    """Decide all of them again.

    Args:
        gate: the new rules; now_s: seconds since the epoch.
        before: the rules to compare with, instead of what was decided then.
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
    changes = {change: folded.changes.get(change, 0) for change in Change}
    return Replayed(number, changes, folded.groups(), folded.others, _notes(gate, before))


def _told(verdicts: Iterable[Kept], progress: Callable[[int], None]) -> Iterator[Kept]:
    for number, kept in enumerate(verdicts):
        if number % TOLD_EVERY == 0:
            progress(number)
        yield kept


def _then(entry: Entry) -> Now:
    """What the policy said; what the backend or the content was refused for had been admitted by it."""
    reason = _POLICY.get(entry.reason)
    if entry.verdict in ("refused", "deferred") and reason is not None and reason is not Reason.AUTHOR:
        if reason is Reason.RATE:
            return Now("admitted", "", entry.by)  # but for the hour, it was
        return Now(entry.verdict, entry.reason, entry.by)
    return Now("admitted", "", entry.by)


class _Again:
    """Verdicts under one configuration; the same facts and paths are decided once."""

    def __init__(self, gate: GateSettings, now_s: float) -> None:
        self._gate = gate
        self._rules = gate.rules
        self._now_s = now_s
        self._listens = {listen.name: listen for listen in gate.listens}
        self._sessions: dict[int, tuple[Session, Session, ListenSettings | None]] = {}
        # By identity, which the journal gives to what is equal; the values keep alive what the keys stand for.
        self._decided: dict[tuple[int, int, int, bool], tuple[Session, ReversePath, ForwardPath | None, Now]] = {}

    def decided(self, session: Session, entry: Entry) -> Now:
        path = entry.forward_path
        many = bool(self._rules.recipients_max) and entry.recipients >= self._rules.recipients_max
        key = (id(session), id(entry.reverse_path), id(path), many)
        found = self._decided.get(key)
        if found is None:
            if len(self._decided) >= DECIDED_MAX:
                self._decided.clear()
                self._sessions.clear()
            now = _in_words(self._decide(session, entry))
            found = self._decided[key] = (session, entry.reverse_path, path, now)
        return found[3]

    def _decide(self, session: Session, entry: Entry) -> RelayVerdict | None:
        known = self._sessions.get(id(session))
        if known is None:
            listen = self._listens.get(session.listen)
            asks = session.auth_required if listen is None else listen.auth == "required"
            known = self._sessions[id(session)] = (session, session._replace(auth_required=asks), listen)
        _, session, listen = known
        transaction = Transaction(session, entry.reverse_path, entry.recipients, self._now_s)
        identity, path = session.identity, entry.forward_path
        if path is None or identity is not None:
            refusal = relay.denied(self._rules, transaction)
            if refusal is None and identity is None and session.auth_required:
                refusal = Refuse(Reason.AUTH_REQUIRED)
            if refusal is None and identity is not None and (listen is None or listen.send_as == "enforce"):
                refusal = admission.send_as(self._gate.send_as, identity, entry.reverse_path, self._now_s)
            if refusal is not None or path is None:
                return refusal
        return relay.decide(self._rules, transaction, path)


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


class _Folded:
    """Changes by kind, client and domain."""

    def __init__(self, gate: GateSettings) -> None:
        self._rules = gate.rules
        self.changes: dict[Change, int] = {}
        self.others = 0
        self._sums: dict[tuple[Change, str, bool, str], _Sum] = {}
        self._refused_before: dict[tuple[str, str], int] = {}
        self._actors: dict[int, tuple[Session, str]] = {}

    def add(self, kept: Kept, then: Now, now: Now) -> None:
        entry = kept.entry
        if then.word != "admitted":
            before = (self._actor(kept.session), self._domain(entry))
            if before in self._refused_before or len(self._refused_before) < ACTORS_MAX:
                self._refused_before[before] = self._refused_before.get(before, 0) + 1
        if then.word == now.word:
            change = Change.SAME if then.reason == now.reason else Change.REASON
            self.changes[change] = self.changes.get(change, 0) + 1
            return
        change = _CHANGES[now.word]
        self.changes[change] = self.changes.get(change, 0) + 1
        key = (change, self._actor(kept.session), kept.session.identity is None, self._domain(entry))
        found = self._sums.get(key)
        if found is None:
            if len(self._sums) >= GROUPS_MAX:
                self.others += 1
                return
            found = self._sums[key] = _Sum(kept, then, now)
        found.count += 1
        found.accepted += entry.verdict == "accepted"
        found.first, found.last = min(found.first, entry.at), max(found.last, entry.at)
        if len(found.days) < _DAYS_COUNTED:
            found.days.add(int(entry.at // _DAY_S))

    def _actor(self, session: Session) -> str:
        known = self._actors.get(id(session))
        if known is None:
            if len(self._actors) >= ACTORS_MAX:
                self._actors.clear()
            address = session.client.address
            length = 24 if isinstance(address, IPv4Address) else 64
            name = str(ip_network(f"{address}/{length}", strict=False))
            known = self._actors[id(session)] = (session, session.identity.account if session.identity else name)
        return known[1]

    def _domain(self, entry: Entry) -> str:
        path = entry.forward_path
        if path is not None and isinstance(path.mailbox, Mailbox) and relay.local_domain(self._rules, path) is None:
            return str(path.mailbox.domain)
        reverse = entry.reverse_path
        return str(reverse.domain) if isinstance(reverse, Mailbox) else "<>"

    def groups(self) -> list[Group]:
        found = [self._group(*key, summed) for key, summed in self._sums.items()]
        return sorted(found, key=lambda group: (-group.surprise, -group.times, group.actor, group.domain))

    def _group(self, change: Change, actor: str, stranger: bool, domain: str, summed: _Sum) -> Group:
        before = self._refused_before.get((actor, domain), 0)
        weight, why = _surprise(change, summed, stranger=stranger, refused_before=before)
        return Group(
            change,
            actor,
            stranger,
            domain,
            summed.count,
            summed.accepted,
            summed.first,
            summed.last,
            len(summed.days),
            _why(summed.then),
            _why(summed.now),
            summed.example,
            weight * (len(summed.days) + math.log2(1 + summed.count)),
            why,
        )


def _surprise(change: Change, summed: _Sum, *, stranger: bool, refused_before: int) -> tuple[int, str]:
    """How much a change weighs, and why."""
    often = f"{_times(summed.count)} on {_days(len(summed.days))}"
    if change is Change.ADMITTED:
        whose = "a stranger's" if stranger else "an account's"
        return (2 if stranger else 1), f"{whose} mail, refused {often}, would pass"
    word = "deferred" if change is Change.DEFERRED else "refused"
    if summed.accepted:
        often = f"{_times(summed.accepted)} on {_days(len(summed.days))}"
        if not refused_before:
            return 3, f"accepted {often} and never refused, it would be {word}"
        return 2, f"accepted {often}, and refused {_times(refused_before)}, it would be {word}"
    return 1, f"admitted {often}, but the backend took none of it: it would be {word}"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _days(number: int) -> str:
    return "one day" if number == 1 else f"{number}{'' if number < _DAYS_COUNTED else ' or more'} days"


def _why(verdict: Now) -> str:
    said = verdict.reason.replace("_", " ") or verdict.word
    return f"{said} ({verdict.by})" if verdict.by else said


def _notes(gate: GateSettings, before: GateSettings | None) -> list[str]:
    """What the journal cannot tell."""
    names = _hosts(gate) - (set() if before is None else _hosts(before))
    if not names:
        return []
    listed = ", ".join(sorted(names))
    return [f"clients are known by the host names of the rules in force then; where these are new, not: {listed}"]


def _hosts(gate: GateSettings) -> set[str]:
    rules = gate.rules
    return {entry.host for entry in rules.trust if entry.host} | {entry.host for entry in rules.deny if entry.host}


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
