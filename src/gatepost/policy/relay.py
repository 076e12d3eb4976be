"""May this forward-path pass, and by what authority: the heart of the product.

Why: a server that relays for strangers is found within hours.  The whole answer stands in this file.
Trust: the facts come from the network, but parsed; the rules come from the administrator.
Promise: pure and total; the first refusal or exactly one authority; the default is no.  Reverse-paths never confer a
    right, they only narrow one.  Nothing that a backend may read as another address passes for a stranger.
Sources: RFC 5321 §3.6.2 (relaying is optional), §7.9 and appendix C (source routes), RFC 2505 §2.1 (anti-relay).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Generic, TypeVar

from gatepost.facts import Session, Transaction
from gatepost.smtp.path import AddressLiteral, ForwardPath, Mailbox, NullReversePath, Pattern, ReversePath, Shape
from gatepost.smtp.reply import Reply
from gatepost.verdict import (
    Admit,
    AdmittedRecipient,
    Defer,
    Finding,
    LocalDomain,
    Reason,
    Refuse,
    RelayVerdict,
    Result,
    Trust,
)

IPNetwork = IPv4Network | IPv6Network
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class LocalPattern:
    """One entry of [domains] local: "example.com", "*.example.com" (below it, not itself) or "[192.0.2.1]"."""

    pattern: str
    where: str


@dataclass(frozen=True, slots=True)
class TrustEntry:
    """One [[trust]] table: exactly one of the who keys is set.

    Attributes:
        reverse_paths, forward_paths: narrowing; empty means any.
        expires_at: seconds since the epoch, None for never.
    """

    where: str
    why: str = ""
    owner: str = ""
    network: IPNetwork | None = None
    host: str = ""
    listen: str = ""
    accounts: tuple[str, ...] = ()
    certificate: str = ""
    pop3_s: float = 0.0
    expires_at: float | None = None
    reverse_paths: tuple[Pattern, ...] = ()
    forward_paths: tuple[Pattern, ...] = ()
    messages_per_hour: int = 0
    recipients_per_hour: int = 0
    tls_minimum: str = ""
    bare_newlines: str = "refuse"


@dataclass(frozen=True, slots=True)
class DenyEntry:
    """One [[deny]] table: exactly one of the who keys is set.

    Attributes:
        helo: compared without case; may begin with "*." for any name below a domain.
    """

    where: str
    why: str = ""
    network: IPNetwork | None = None
    host: str = ""
    helo: str = ""
    reverse_path: Pattern | None = None
    forward_path: Pattern | None = None
    reply: Reply | None = None
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """One [[route]] table: which backend takes which forward-paths; first match wins.

    Attributes:
        forward_paths: patterns; ``local`` is True where the word "local" stands among them.
    """

    where: str
    backend: str
    forward_paths: tuple[Pattern, ...] = ()
    local: bool = False


@dataclass(frozen=True, slots=True)
class RelayRules:
    """Everything a relay decision depends on besides the facts.

    Attributes:
        default_backend: takes what no route takes; "" where there is none.
        postmaster_domain: where bare <postmaster> goes (RFC 5321 §4.5.1), "" refuses it.
        index: the same rules arranged for lookup; a decision costs the same with ten entries and ten thousand.
    """

    local: tuple[LocalPattern, ...] = ()
    trust: tuple[TrustEntry, ...] = ()
    deny: tuple[DenyEntry, ...] = ()
    routes: tuple[Route, ...] = ()
    recipients_max: int = 100
    default_backend: str = ""
    postmaster_domain: str = ""
    index: RuleIndex = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", RuleIndex(self))


def rate_check(where: str) -> str:
    """The name of the finding that tells whether a trust entry's rates are used up."""
    return f"rate {where}"


MAILBOX_RATE = "rate mailbox"


def decide(
    rules: RelayRules, transaction: Transaction, forward_path: ForwardPath, findings: Iterable[Finding] = ()
) -> RelayVerdict:
    """One forward-path: admitted with an authority, deferred, or refused.  RFC 5321 §3.3, §3.6.2.

    Args:
        findings: rates that are used up (``rate_check``, ``MAILBOX_RATE``) as FAIL; others are ignored.

    Returns:
        The first refusal in this order: denied, not authenticated where the listener demands it, too many recipients,
        routing characters, not ours and not trusted, no backend; else Admit with exactly one authority.
    """
    refusal = denied(rules, transaction) or _denied_forward_path(rules, transaction, forward_path)
    if refusal is not None:
        return refusal
    session = transaction.session
    if session.auth_required and session.identity is None:
        return Refuse(Reason.AUTH_REQUIRED)
    if rules.recipients_max and transaction.recipients >= rules.recipients_max:
        return Defer(Reason.TOO_MANY_RECIPIENTS)  # RFC 5321 §4.5.3.1.10
    failed = {finding.check for finding in findings if finding.result is Result.FAIL}
    if forward_path.shape is Shape.NO_DOMAIN:
        if not rules.postmaster_domain:
            return Refuse(Reason.NO_ROUTE)
        # Bare <postmaster> is the postmaster of our first local domain.  RFC 5321 §4.1.1.3, §4.5.1
        forward_path = ForwardPath(Mailbox("postmaster", rules.postmaster_domain), Shape.PLAIN)
    local = local_domain(rules, forward_path)
    if local is not None and not forward_path.shape.routing:
        if MAILBOX_RATE in failed:
            return Defer(Reason.RATE, local.where)
        return _admit(rules, forward_path, local, is_local=True)
    verdict = _by_trust(rules, transaction, forward_path, failed)
    if isinstance(verdict, Trust):
        return _admit(rules, forward_path, verdict, is_local=local is not None)
    if verdict.reason is Reason.RELAYING and forward_path.shape.routing:
        # To a backend that trusts us the address may mean another one: "a%b@ours", "b!a@ours", "@ours:a@b".
        return Refuse(Reason.ROUTING, detail=forward_path.shape.name.lower())
    return verdict


def denied(rules: RelayRules, transaction: Transaction) -> Refuse | None:
    """Whether a [[deny]] entry refuses this client, its HELO or its reverse-path, whatever else is allowed."""
    index = rules.index
    if not index.denies:
        return None
    session = transaction.session
    candidates = [
        *index.deny_networks.matching(session.client.address),
        *(entry for host in session.hosts for entry in index.deny_hosts.get(host, ())),
        *(entry for name in _names_above(session.hello.lower()) for entry in index.deny_helos.get(name, ())),
        *index.deny_reverse_paths.matching(transaction.reverse_path),
    ]
    return _first_in_force(candidates, transaction.now)


def _denied_forward_path(rules: RelayRules, transaction: Transaction, forward_path: ForwardPath) -> Refuse | None:
    if not rules.index.denies:
        return None
    return _first_in_force(list(rules.index.deny_forward_paths.matching(forward_path.mailbox)), transaction.now)


def _first_in_force(candidates: list[DenyEntry], now: float) -> Refuse | None:
    for entry in candidates:
        if entry.expires_at is None or now < entry.expires_at:
            return Refuse(Reason.DENIED, entry.where, entry.why, entry.reply)
    return None


def local_domain(rules: RelayRules, forward_path: ForwardPath) -> LocalDomain | None:
    """The local pattern that the forward-path's domain matches."""
    mailbox = forward_path.mailbox
    if not isinstance(mailbox, Mailbox):
        return None
    domain = mailbox.domain
    index = rules.index
    if isinstance(domain, AddressLiteral):
        return index.local_exact.get(literal_text(domain))
    found = index.local_exact.get(domain)
    if found is not None or not index.local_below:
        return found
    for parent in _parents(domain):
        found = index.local_below.get(parent)
        if found is not None:
            return found
    return None


def grants(rules: RelayRules, session: Session) -> list[TrustEntry]:
    """The trust entries whose ``who`` matches this session, in the order of the file; expiry is not looked at."""
    index = rules.index
    found = [
        *index.trust_networks.matching(session.client.address),
        *(entry for host in session.hosts for entry in index.trust_hosts.get(host, ())),
        *index.trust_listens.get(session.listen, ()),
    ]
    if session.identity is not None:
        found += index.trust_accounts.get(session.identity.account, ())
        found += index.trust_accounts.get("*", ())
    if len(found) > 1:
        found.sort(key=lambda entry: index.order[id(entry)])
    return found


def _by_trust(
    rules: RelayRules, transaction: Transaction, forward_path: ForwardPath, failed: set[str]
) -> Trust | Refuse | Defer:
    """The first grant that covers this forward-path, or why none does."""
    refusal: Refuse | Defer = Refuse(Reason.RELAYING)
    for entry in grants(rules, transaction.session):
        if entry.expires_at is not None and transaction.now >= entry.expires_at:
            refusal = Refuse(Reason.EXPIRED_TRUST, entry.where, entry.why)
        elif entry.reverse_paths and not any(p.matches(transaction.reverse_path) for p in entry.reverse_paths):
            refusal = Refuse(Reason.NARROWED, entry.where, "reverse_paths")
        elif entry.forward_paths and not _within(entry, forward_path):
            refusal = Refuse(Reason.NARROWED, entry.where, "forward_paths")
        elif rate_check(entry.where) in failed:
            refusal = Defer(Reason.RATE, entry.where, entry.why)
        else:
            return Trust(who(entry), entry.why, entry.owner, entry.where)
    return refusal


def _within(entry: TrustEntry, forward_path: ForwardPath) -> bool:
    """A narrowed grant covers a forward-path only if no backend can read it as another one."""
    if all(str(pattern) == "*" for pattern in entry.forward_paths):
        return True
    return not forward_path.shape.routing and any(p.matches(forward_path.mailbox) for p in entry.forward_paths)


def who(entry: TrustEntry) -> str:
    """The entry's who key and value, as in the configuration."""
    if entry.network is not None:
        return f"network {entry.network}"
    if entry.host:
        return f"host {entry.host}"
    if entry.listen:
        return f"listen {entry.listen}"
    if entry.accounts:
        return f"accounts {', '.join(entry.accounts)}"
    if entry.certificate:
        return f"certificate {entry.certificate}"
    return "pop3"


def _admit(
    rules: RelayRules, forward_path: ForwardPath, authority: LocalDomain | Trust, *, is_local: bool
) -> RelayVerdict:
    backend = rules.default_backend
    for route in rules.routes:
        if (route.local and is_local) or any(p.matches(forward_path.mailbox) for p in route.forward_paths):
            backend = route.backend
            break
    if not backend:
        return Refuse(Reason.NO_ROUTE)
    return Admit(AdmittedRecipient(forward_path, authority, backend))


def literal_text(literal: AddressLiteral) -> str:
    """An address literal as [domains] local writes it; an IPv4-mapped one is the IPv4 one."""
    address = literal.address
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return f"[{address}]"


def _parents(domain: str) -> Iterator[str]:
    """example.com and com for mail.example.com."""
    dot = domain.find(".")
    while dot >= 0:
        domain = domain[dot + 1 :]
        yield domain
        dot = domain.find(".")


def _names_above(name: str) -> Iterator[str]:
    """The keys under which a HELO name may be denied: itself, then "*.parent" for each parent."""
    yield name
    for parent in _parents(name):
        yield f"*.{parent}"


class NetworkTable(Generic[_T]):
    """Values by network; a lookup costs one step for each prefix length in use, however many networks there are."""

    __slots__ = ("_v4", "_v6")

    def __init__(self) -> None:
        self._v4: dict[int, dict[int, list[_T]]] = {}
        self._v6: dict[int, dict[int, list[_T]]] = {}

    def add(self, network: IPNetwork, value: _T) -> None:
        """Keep a value under a network."""
        table = self._v4 if network.version == 4 else self._v6
        shift = network.max_prefixlen - network.prefixlen
        prefix = int(network.network_address) >> shift
        table.setdefault(shift, {}).setdefault(prefix, []).append(value)

    def matching(self, address: IPv4Address | IPv6Address) -> list[_T]:
        """The values of all networks that hold the address."""
        table = self._v4 if address.version == 4 else self._v6
        if not table:
            return []
        number = int(address)
        return [value for shift, prefixes in table.items() for value in prefixes.get(number >> shift, ())]


class PathTable:
    """Deny entries by address pattern: a lookup costs a few dictionary reads, however many patterns there are."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: dict[str, list[DenyEntry]] = {}

    def add(self, pattern: Pattern, entry: DenyEntry) -> None:
        """Keep an entry under a pattern."""
        self._entries.setdefault(str(pattern).lower(), []).append(entry)

    def matching(self, path: ReversePath | object) -> Iterator[DenyEntry]:
        """The entries whose pattern matches the path."""
        if not self._entries:
            return
        for key in _pattern_keys(path):
            yield from self._entries.get(key, ())


def _pattern_keys(path: object) -> Iterator[str]:
    """Every pattern, as text, that could match this path."""
    yield "*"
    if isinstance(path, NullReversePath):
        yield "<>"
    elif isinstance(path, Mailbox):
        local_part = path.local_part.lower()
        if isinstance(path.domain, AddressLiteral):
            yield f"{local_part}@{literal_text(path.domain)}"
            yield f"*@{literal_text(path.domain)}"
        else:
            yield f"{local_part}@{path.domain}"
            yield f"*@{path.domain}"
            for parent in _parents(path.domain):
                yield f"*@*.{parent}"


class RuleIndex:
    """The rules of a RelayRules arranged for lookup; holds nothing that the rules do not."""

    __slots__ = (
        "denies",
        "deny_forward_paths",
        "deny_helos",
        "deny_hosts",
        "deny_networks",
        "deny_reverse_paths",
        "local_below",
        "local_exact",
        "order",
        "trust_accounts",
        "trust_hosts",
        "trust_listens",
        "trust_networks",
    )

    def __init__(self, rules: RelayRules) -> None:
        self.local_exact: dict[str, LocalDomain] = {}
        self.local_below: dict[str, LocalDomain] = {}
        for local in rules.local:
            if local.pattern.startswith("*."):
                self.local_below[local.pattern[2:]] = LocalDomain(local.pattern, local.where)
            else:
                self.local_exact[local.pattern] = LocalDomain(local.pattern, local.where)
        self.trust_networks: NetworkTable[TrustEntry] = NetworkTable()
        self.trust_hosts: dict[str, list[TrustEntry]] = {}
        self.trust_listens: dict[str, list[TrustEntry]] = {}
        self.trust_accounts: dict[str, list[TrustEntry]] = {}
        self.order = {id(entry): number for number, entry in enumerate(rules.trust)}
        for entry in rules.trust:
            if entry.network is not None:
                self.trust_networks.add(entry.network, entry)
            elif entry.host:
                self.trust_hosts.setdefault(entry.host, []).append(entry)
            elif entry.listen:
                self.trust_listens.setdefault(entry.listen, []).append(entry)
            for account in entry.accounts:
                self.trust_accounts.setdefault(account, []).append(entry)
        self.denies = bool(rules.deny)
        self.deny_networks: NetworkTable[DenyEntry] = NetworkTable()
        self.deny_hosts: dict[str, list[DenyEntry]] = {}
        self.deny_helos: dict[str, list[DenyEntry]] = {}
        self.deny_reverse_paths = PathTable()
        self.deny_forward_paths = PathTable()
        for deny in rules.deny:
            if deny.network is not None:
                self.deny_networks.add(deny.network, deny)
            elif deny.host:
                self.deny_hosts.setdefault(deny.host, []).append(deny)
            elif deny.helo:
                self.deny_helos.setdefault(deny.helo.lower(), []).append(deny)
            elif deny.reverse_path is not None:
                self.deny_reverse_paths.add(deny.reverse_path, deny)
            elif deny.forward_path is not None:
                self.deny_forward_paths.add(deny.forward_path, deny)
