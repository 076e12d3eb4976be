"""What would have changed a relay verdict.

Why: whoever is refused asks what it would take, and whoever is admitted should know by how little.  A list of reasons
    written by hand goes wrong with the first rule that is added; so nothing here judges: changes are proposed, decided
    by ``relay.decide`` itself, and told only if the verdict then falls the other way.
Trust: as ``relay``.
Promise: pure.  Every change told has been decided; the smallest come first; at most ``CHANGES_MAX`` are told.
Sources: RFC 5737 and RFC 6761 §6.4 (addresses and names that are nobody's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address
from itertools import combinations
from typing import NamedTuple

from gatepost.facts import Identity, IPAddress, MailboxLogin, Session, Transaction
from gatepost.policy.relay import IPNetwork, RelayRules, TrustEntry, decide, grants, routing, who, withheld
from gatepost.smtp.path import AddressLiteral, ForwardPath, Mailbox, NullReversePath, Pattern, Postmaster, Shape
from gatepost.verdict import Admit, LocalDomain, Reason, Refuse, RelayVerdict

CHANGES_MAX = 5

_STRANGER = IPv4Address("192.0.2.213")
_ELSEWHERE = "elsewhere.invalid"


class Change(NamedTuple):
    """What would have turned the verdict.

    Attributes:
        condition: what would have had to be so: "the client were in 10.1.0.0/16".
        where: the rule's file and line, "" where no rule stands behind it.
    """

    condition: str
    where: str


class Explanation(NamedTuple):
    """A verdict and what would have turned it."""

    verdict: RelayVerdict
    changes: tuple[Change, ...]


class _Question(NamedTuple):
    """What ``decide`` is asked."""

    rules: RelayRules
    transaction: Transaction
    forward_path: ForwardPath

    @property
    def admitted(self) -> bool:
        return isinstance(decide(*self), Admit)


class _Mend(NamedTuple):
    """One proposed change to a question."""

    condition: str
    apply: Callable[[_Question], _Question]


def explain(rules: RelayRules, transaction: Transaction, forward_path: ForwardPath) -> Explanation:
    """Decide, and find what would have turned the verdict."""
    asked = _Question(rules, transaction, forward_path)
    verdict = decide(*asked)
    admitted = isinstance(verdict, Admit)
    proposals = _against(asked, verdict) if isinstance(verdict, Admit) else _in_favour(asked, verdict)
    found: list[tuple[int, Change]] = []
    for where, mends in proposals:
        turning = _fewest(asked, mends, admitted=admitted)
        if turning:
            found.append((len(turning), Change(" and ".join(mend.condition for mend in turning), where)))
    found.sort(key=lambda change: change[0])
    told: dict[str, Change] = {}
    for _, change in found:
        if not told.setdefault(change.condition, change).where:
            told[change.condition] = change  # of two that say the same the one with a rule behind it
    return Explanation(verdict, tuple(told.values())[:CHANGES_MAX])


def _fewest(asked: _Question, mends: list[_Mend], *, admitted: bool) -> tuple[_Mend, ...]:
    """The fewest of these changes that turn the verdict; none where all of them together do not."""
    for number in range(1, len(mends) + 1):
        for chosen in combinations(mends, number):
            question = asked
            for mend in chosen:
                question = mend.apply(question)
            if question.admitted is not admitted:
                return chosen
    return ()


# --- In favour of who was refused -------------------------------------------------------------------------------------


def _in_favour(asked: _Question, verdict: RelayVerdict) -> Iterator[tuple[str, list[_Mend]]]:
    rules, session = asked.rules, asked.transaction.session
    if isinstance(verdict, Refuse) and verdict.reason is Reason.DENIED:
        yield verdict.where, [_without_denial(verdict.where)]
    if session.auth_required and session.identity is None:
        yield "", [_logged_in("anybody", "the client had logged in")]
    if isinstance(asked.forward_path.mailbox, Mailbox) and routing(rules, asked.forward_path):
        plain = Mailbox("user", asked.forward_path.mailbox.domain)
        yield "", [_sent_to(plain, "the local-part held no routing characters")]
    matching = {entry.where for entry in grants(rules, session)}
    suspended = {entry.where for entry in withheld(rules, session)}
    for entry in rules.trust:
        mends = _narrowings(entry, asked.transaction.now)
        if entry.where in suspended:
            mends = [_resumed(session), *mends]
        elif entry.where not in matching:
            mends = [*_client_of(entry), *mends]
        yield entry.where, mends
    for local in rules.local:
        domain = local.pattern.removeprefix("*.")
        if not domain.startswith("["):
            ours = Mailbox("user", domain if domain == local.pattern else f"mail.{domain}")
            yield local.where, [_sent_to(ours, f"the forward-path were at a local domain, such as {local.pattern}")]
            return


def _client_of(entry: TrustEntry) -> list[_Mend]:
    """The client were one that the grant means."""
    if entry.network is not None:
        return [_coming_from(_host_in(entry.network), f"the client were in {entry.network}")]
    if entry.host:
        return [_in_session(f"the client were {entry.host}", lambda session: session._replace(hosts=(entry.host,)))]
    if entry.listen:
        return [
            _in_session(
                f"the client came to the listener {entry.listen}", lambda session: session._replace(listen=entry.listen)
            )
        ]
    if entry.accounts:
        account = entry.accounts[0]
        if account == "*":
            return [_logged_in("anybody", "the client had logged in")]
        return [_logged_in(account, f"the client had logged in as {account}")]
    if entry.certificate:
        shown = f"the client had shown the certificate {entry.certificate}"
        return [_in_session(shown, lambda session: session._replace(certificate=entry.certificate))]
    if entry.pop3_s:
        return [_read_its_mail("somebody had read mail from the client's address in time")]
    return []


def _resumed(session: Session) -> _Mend:
    """The trust in where the client comes from held again."""
    source = str(session.client.address) if session.suspended else session.listen
    return _in_session(
        f"the trust in {source} were not suspended (gatepost trust resume {source})",
        lambda session: session._replace(suspended=False, listen_suspended=False),
    )


def _narrowings(entry: TrustEntry, now: float) -> list[_Mend]:
    """All that a grant asks for besides its client."""
    mends = []
    if entry.expires_at is not None and now >= entry.expires_at:
        mends.append(_at("the entry had not expired", entry.expires_at - 1))
    if entry.pop3_s:
        mends.append(_read_its_mail("the last login to the mailbox had been later"))
    if entry.tls_minimum:
        mends.append(_speaking(f"TLSv{entry.tls_minimum}", f"the client spoke TLS {entry.tls_minimum} or newer"))
    if entry.reverse_paths:
        sample = _sample(entry.reverse_paths[0])
        if not isinstance(sample, Postmaster):
            mends.append(_sent_by(sample, f"the reverse-path were {_alternatives(entry.reverse_paths)}"))
    if entry.forward_paths:
        sample = _sample(entry.forward_paths[0])
        if not isinstance(sample, NullReversePath):
            mends.append(_sent_to(sample, f"the forward-path were {_alternatives(entry.forward_paths)}"))
    return mends


# --- Against who was admitted -----------------------------------------------------------------------------------------


def _against(asked: _Question, verdict: Admit) -> Iterator[tuple[str, list[_Mend]]]:
    authority = verdict.recipient.authority
    elsewhere = Mailbox("user", _ELSEWHERE)
    if isinstance(authority, LocalDomain):
        yield authority.where, [_sent_to(elsewhere, f"the forward-path were not at {authority.pattern}")]
        if isinstance(asked.forward_path.mailbox, Mailbox):
            percent = ForwardPath(Mailbox(f"user%{_ELSEWHERE}", asked.forward_path.mailbox.domain), Shape.PERCENT)
            yield "", [_Mend("the local-part held routing characters", lambda q: q._replace(forward_path=percent))]
        return
    for entry in asked.rules.trust:
        if entry.where != authority.where:
            continue
        yield entry.where, [_stranger(entry)]
        if entry.reverse_paths:
            yield entry.where, [_sent_by(elsewhere, f"the reverse-path were not {_alternatives(entry.reverse_paths)}")]
        if entry.forward_paths:
            yield entry.where, [_sent_to(elsewhere, f"the forward-path were not {_alternatives(entry.forward_paths)}")]
        if entry.tls_minimum:
            yield entry.where, [_speaking("", f"the client did not speak TLS {entry.tls_minimum} or newer")]
        if entry.expires_at is not None:
            yield entry.where, [_at("the entry had expired", entry.expires_at)]


def _stranger(entry: TrustEntry) -> _Mend:
    if entry.network is not None:
        condition = f"the client were not in {entry.network}"
    elif entry.host:
        condition = f"the client were not {entry.host}"
    elif entry.listen:
        condition = f"the client came to another listener than {entry.listen}"
    elif entry.certificate:
        condition = "the client had not shown its certificate"
    elif entry.pop3_s:
        condition = "nobody had read mail from the client's address in time"
    else:
        condition = "the client had not logged in"

    def change(session: Session) -> Session:
        client = session.client._replace(address=_STRANGER)
        return session._replace(client=client, hosts=(), listen="", identity=None, certificate="", mailbox_login=None)

    return _in_session(condition, change)


# --- Single changes ---------------------------------------------------------------------------------------------------


def _in_session(condition: str, change: Callable[[Session], Session]) -> _Mend:
    def apply(question: _Question) -> _Question:
        transaction = question.transaction
        return question._replace(transaction=transaction._replace(session=change(transaction.session)))

    return _Mend(condition, apply)


def _coming_from(address: IPAddress, condition: str) -> _Mend:
    return _in_session(
        condition,
        lambda session: session._replace(client=session.client._replace(address=address), hosts=(), suspended=False),
    )


def _speaking(tls: str, condition: str) -> _Mend:
    return _in_session(condition, lambda session: session._replace(tls=tls))


def _read_its_mail(condition: str) -> _Mend:
    def apply(question: _Question) -> _Question:
        transaction = question.transaction
        session = transaction.session._replace(mailbox_login=MailboxLogin("somebody", transaction.now))
        return question._replace(transaction=transaction._replace(session=session))

    return _Mend(condition, apply)


def _logged_in(account: str, condition: str) -> _Mend:
    return _in_session(condition, lambda session: session._replace(identity=Identity(account, "PLAIN")))


def _at(condition: str, now: float) -> _Mend:
    return _Mend(condition, lambda question: question._replace(transaction=question.transaction._replace(now=now)))


def _sent_by(reverse_path: Mailbox | NullReversePath, condition: str) -> _Mend:
    return _Mend(
        condition,
        lambda question: question._replace(transaction=question.transaction._replace(reverse_path=reverse_path)),
    )


def _sent_to(mailbox: Mailbox | Postmaster, condition: str) -> _Mend:
    if isinstance(mailbox, Postmaster):
        shape = Shape.NO_DOMAIN
    else:
        shape = Shape.LITERAL if isinstance(mailbox.domain, AddressLiteral) else Shape.PLAIN
    forward_path = ForwardPath(mailbox, shape)
    return _Mend(condition, lambda question: question._replace(forward_path=forward_path))


def _without_denial(where: str) -> _Mend:
    def apply(question: _Question) -> _Question:
        deny = tuple(entry for entry in question.rules.deny if entry.where != where)
        return question._replace(rules=replace(question.rules, deny=deny))

    return _Mend("this entry did not stand there", apply)


def _host_in(network: IPNetwork) -> IPAddress:
    """Some host of a network: not its first address, where there is another."""
    return network[1] if network.num_addresses > 1 else network[0]


def _sample(pattern: Pattern) -> Mailbox | NullReversePath | Postmaster:
    """Some path that the pattern matches."""
    if pattern.special is not None:
        return pattern.special
    domain = pattern.domain if pattern.domain is not None else _ELSEWHERE
    if isinstance(domain, str) and pattern.below:
        domain = f"mail.{domain}"
    return Mailbox(pattern.local_part or "user", domain)


def _alternatives(patterns: tuple[Pattern, ...]) -> str:
    return " or ".join(map(str, patterns))


# --- In the client's words --------------------------------------------------------------------------------------------


def reply_text(verdict: RelayVerdict) -> str:
    """The reply that a client sees, without CRLF and reference; "" for an admitted one, who sees the backend's own."""
    if isinstance(verdict, Admit):
        return ""
    own = verdict.reply if isinstance(verdict, Refuse) else None
    reply = own if own is not None else verdict.reason.reply()
    return reply.octets().decode("utf-8").rstrip("\r\n")


def rule_text(rules: RelayRules, verdict: RelayVerdict) -> str:
    """The rule behind the verdict as it stands in the file; "" where it is the gate's own default."""
    if isinstance(verdict, Admit):
        authority = verdict.recipient.authority
        if isinstance(authority, LocalDomain):
            return f"[domains] local {authority.pattern}"
        return f"[[trust]] {authority.who}"
    for entry in rules.trust:
        if verdict.where and entry.where == verdict.where:
            return f"[[trust]] {who(entry)}"
    for denial in rules.deny:
        if verdict.where and denial.where == verdict.where:
            keys = ("network", "host", "helo", "reverse_path", "forward_path")
            key = next(key for key in keys if getattr(denial, key) not in (None, ""))
            return f"[[deny]] {key} {getattr(denial, key)}"
    return ""
