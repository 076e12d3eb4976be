"""May this forward-path pass, and by what authority: the heart of the product.

Why: a server that relays for strangers is found within hours.  The whole answer stands in this file.
Trust: the facts come from the network, but parsed; the rules come from the administrator, and ``config`` has made names
    and domains in them canonical.
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
from gatepost.smtp.path import (
    AddressLiteral,
    ForwardPath,
    Mailbox,
    Pattern,
    Postmaster,
    ReversePath,
    Shape,
    may_be_read_with,
    pattern_texts,
)
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
        tls_minimum: "1.2" grants nothing to a session in plain text or older TLS; "" is any.
        pop3_s: so long after a login to the mailbox server through our proxy the client may send; 0 for no such grant.
        shared: several clients are known to stand behind one address; the entry is never suspended.
        reverse_texts, forward_texts: the same patterns for lookup; empty means any, for "*" among them narrows nothing.
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
    shared: bool = False
    reverse_texts: frozenset[str] = field(init=False, repr=False, compare=False)
    forward_texts: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reverse_texts", _narrowing(self.reverse_paths))
        object.__setattr__(self, "forward_texts", _narrowing(self.forward_paths))


def _narrowing(patterns: tuple[Pattern, ...]) -> frozenset[str]:
    texts = frozenset(map(str, patterns))
    return frozenset() if "*" in texts else texts


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
class Reread:
    """What a backend was found to do with local-parts that every other server takes as they are written.

    Attributes:
        characters: with one of these in it the backend may read a local-part as another address, as in
            "user=elsewhere.net@ours".
    """

    backend: str
    characters: str


@dataclass(frozen=True, slots=True)
class RelayRules:
    """Everything a relay decision depends on besides the facts.

    Attributes:
        default_backend: takes what no route takes; "" where there is none.
        postmaster_domain: where bare <postmaster> goes (RFC 5321 §4.5.1), "" refuses it.
        reread: what backends were found to read as another address besides what has a routing shape.
        index: the same rules arranged for lookup; a decision costs the same with ten entries and ten thousand.
    """

    local: tuple[LocalPattern, ...] = ()
    trust: tuple[TrustEntry, ...] = ()
    deny: tuple[DenyEntry, ...] = ()
    routes: tuple[Route, ...] = ()
    recipients_max: int = 100
    default_backend: str = ""
    postmaster_domain: str = ""
    reread: tuple[Reread, ...] = ()
    index: RuleIndex = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", RuleIndex(self))


def rate_check(where: str) -> str:
    """The name of the finding that tells whether a trust entry's rates are used up."""
    return f"rate {where}"


MAILBOX_RATE = "rate mailbox"
CLOCK_SLACK_S = (
    1.0  # a login may seem so much later than now; where the clock was set back further, it must be made again
)


def decide(
    rules: RelayRules, transaction: Transaction, forward_path: ForwardPath, findings: Iterable[Finding] = ()
) -> RelayVerdict:
    """One forward-path: admitted with an authority, deferred, or refused.  RFC 5321 §3.3, §3.6.2.

    Args:
        findings: rates that are used up (``rate_check``, ``MAILBOX_RATE``) as FAIL, and those that nobody could tell as
            TEMPERROR, which never means yes; others are ignored.

    Returns:
        The first refusal in this order: denied, not authenticated where the listener demands it, too many recipients,
        routing characters, not ours and not trusted, no backend, too much in this hour; else Admit with one authority.
    """
    addressed = with_domain(rules, forward_path)
    refusal = denied(rules, transaction) or _denied_forward_path(rules, transaction, forward_path, addressed)
    if refusal is not None:
        return refusal
    session = transaction.session
    if session.auth_required and session.identity is None:
        return Refuse(Reason.AUTH_REQUIRED)
    if rules.recipients_max and transaction.recipients >= rules.recipients_max:
        return Defer(Reason.TOO_MANY_RECIPIENTS)  # RFC 5321 §4.5.3.1.10
    if addressed is None:
        return Refuse(Reason.NO_ROUTE)
    failed = {finding.check for finding in findings if finding.result in (Result.FAIL, Result.TEMPERROR)}
    local = local_domain(rules, addressed)
    authority: LocalDomain | Trust | Refuse | Defer
    routed = routing(rules, addressed)
    if local is not None and not routed:
        authority = Defer(Reason.RATE, local.where) if MAILBOX_RATE in failed else local
    else:
        authority = _by_trust(rules, transaction, addressed, failed)
    if isinstance(authority, Refuse):
        if authority.reason is Reason.RELAYING and routed:
            # To a backend that trusts us the address may mean another one: "a%b@ours", "b!a@ours", "@ours:a@b".
            return Refuse(Reason.ROUTING, detail=routed)
        return authority
    backend = _backend(rules, addressed, is_local=local is not None)
    if not backend:
        return Refuse(Reason.NO_ROUTE)
    if isinstance(authority, Defer):
        return authority
    return Admit(AdmittedRecipient(addressed, authority, backend))


def would(
    rules: RelayRules,
    shadowed: RelayRules,
    transaction: Transaction,
    forward_path: ForwardPath | None,
    findings: Iterable[Finding] = (),
) -> str:
    """What the verdict would be if the entries that are only watched were acted on; "" where it is the same.

    Args:
        shadowed: the rules with those entries; forward_path: None for the transaction as a whole.
    """
    now: RelayVerdict | None
    then: RelayVerdict | None
    if forward_path is None:
        now, then = denied(rules, transaction), denied(shadowed, transaction)
    else:
        found = tuple(findings)
        now, then = (decide(each, transaction, forward_path, found) for each in (rules, shadowed))
    if _outcome(now) == _outcome(then):
        return ""
    if then is None:
        return "admit"
    if isinstance(then, Admit):
        authority = then.recipient.authority
        rule = authority.pattern if isinstance(authority, LocalDomain) else authority.who
        return f"admit: {rule} ({authority.where})"
    word = "defer" if isinstance(then, Defer) else "refuse"
    return f"{word}: {then.reason.name.lower()}" + (f" ({then.where})" if then.where else "")


def _outcome(verdict: RelayVerdict | None) -> object:
    return Admit if verdict is None or isinstance(verdict, Admit) else (type(verdict), verdict.reason)


def routing(rules: RelayRules, forward_path: ForwardPath) -> str:
    """How a backend may read the forward-path as another address: its shape, or "reread"; "" where none may.

    Args:
        forward_path: with its domain, as ``with_domain`` gives it; one without a domain is read as it stands.
    """
    if forward_path.shape.routing:
        return forward_path.shape.name.lower()
    if not rules.reread or not isinstance(forward_path.mailbox, Mailbox):
        return ""
    backend = _backend(rules, forward_path, is_local=local_domain(rules, forward_path) is not None)
    characters = rules.index.reread.get(backend, "")
    return "reread" if characters and may_be_read_with(forward_path.mailbox.local_part, characters) else ""


def with_domain(rules: RelayRules, forward_path: ForwardPath) -> ForwardPath | None:
    """The forward-path that is decided on and counted: bare <postmaster> is the postmaster of our first local domain.

    Source: RFC 5321 §4.1.1.3, §4.5.1.

    Returns:
        None where there is no such domain.
    """
    if not isinstance(forward_path.mailbox, Postmaster):
        return forward_path
    if not rules.postmaster_domain:
        return None
    return ForwardPath(Mailbox("postmaster", rules.postmaster_domain), Shape.PLAIN)


def denied(rules: RelayRules, transaction: Transaction) -> Refuse | None:
    """Whether a [[deny]] entry refuses this client, its HELO or its reverse-path, whatever else is allowed."""
    if not rules.deny:
        return None
    index, session = rules.index, transaction.session
    numbers = index.deny_networks.matching(session.client.address)
    for host in session.hosts:
        numbers += index.deny_hosts.get(host, ())
    for name in _names_above(session.hello.lower().rstrip(".")):
        numbers += index.deny_helos.get(name, ())
    numbers += index.deny_reverse_paths.matching(transaction.reverse_path)
    return _first_in_force(rules, numbers, transaction.now)


def _denied_forward_path(
    rules: RelayRules, transaction: Transaction, named: ForwardPath, addressed: ForwardPath | None
) -> Refuse | None:
    if not rules.deny:
        return None
    table = rules.index.deny_forward_paths
    numbers = table.matching(named)
    if addressed is not None and addressed is not named:
        numbers += table.matching(addressed)
    refusal = _first_in_force(rules, numbers, transaction.now)
    if refusal is None and transaction.now < rules.index.forward_paths_denied_until:
        # What is denied must not pass under a name that a backend may read as the denied one.
        routed = routing(rules, named)
        refusal = Refuse(Reason.ROUTING, detail=routed) if routed else None
    return refusal


def _first_in_force(rules: RelayRules, numbers: list[int], now: float) -> Refuse | None:
    for number in sorted(numbers):
        entry = rules.deny[number]
        if not expired(entry, now):
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
    """The trust entries whose ``who`` matches this session, in the order of the file; expiry is not looked at.

    What is suspended is left out: who logged in, shows a certificate or read its mail keeps what that gives.
    """
    found = _matching(rules, session)
    if session.suspended or session.listen_suspended:
        return [entry for entry in found if not _suspended(entry, session)]
    return found


def withheld(rules: RelayRules, session: Session) -> list[TrustEntry]:
    """The trust entries that would match, were the client's address or its listener not suspended."""
    if session.suspended or session.listen_suspended:
        return [entry for entry in _matching(rules, session) if _suspended(entry, session)]
    return []


def suspendable(entry: TrustEntry) -> bool:
    """Whether the entry trusts where a client comes from, which may be lost on the way."""
    return not entry.shared and (entry.network is not None or bool(entry.host) or bool(entry.listen))


def _suspended(entry: TrustEntry, session: Session) -> bool:
    return suspendable(entry) and (session.suspended or bool(entry.listen))


def _matching(rules: RelayRules, session: Session) -> list[TrustEntry]:
    if not rules.trust:
        return []
    index = rules.index
    numbers = index.trust_networks.matching(session.client.address)
    for host in session.hosts:
        numbers += index.trust_hosts.get(host, ())
    numbers += index.trust_listens.get(session.listen, ())
    if session.identity is not None:
        numbers += index.trust_accounts.get(session.identity.account, ())
        numbers += index.trust_accounts.get("*", ())
    if session.certificate:
        numbers += index.trust_certificates.get(session.certificate, ())
    if session.mailbox_login is not None:
        numbers += index.trust_mailbox_logins
    return [rules.trust[number] for number in sorted(set(numbers))]


def _by_trust(
    rules: RelayRules, transaction: Transaction, forward_path: ForwardPath, failed: set[str]
) -> Trust | Refuse | Defer:
    """The first grant that covers this forward-path, or why none does.

    Of several reasons a rate that is used up is told, for it passes; else that of the first entry in the file.
    """
    refusal: Refuse | Defer | None = None
    texts = _Texts(transaction.reverse_path), _Texts(forward_path)
    for entry in withheld(rules, transaction.session):
        if _missing(rules, entry, transaction, forward_path, texts) is None:
            refusal = Refuse(Reason.SUSPENDED, entry.where, entry.why)
            break
    for entry in grants(rules, transaction.session):
        missing = _missing(rules, entry, transaction, forward_path, texts)
        if missing is None:
            if rate_check(entry.where) not in failed:
                return Trust(who(entry), entry.why, entry.owner, entry.where)
            missing = Defer(Reason.RATE, entry.where, entry.why)
        if refusal is None or (isinstance(refusal, Refuse) and isinstance(missing, Defer)):
            refusal = missing
    return refusal or Refuse(Reason.RELAYING)


def expired(entry: TrustEntry | DenyEntry, now: float) -> bool:
    """Whether the entry is out of force at this time (seconds since the epoch)."""
    return entry.expires_at is not None and now >= entry.expires_at


class _Texts:
    """The texts of the patterns that match a path: made when the first narrowed grant is looked at, for all of them."""

    __slots__ = ("_path", "_texts")

    def __init__(self, path: ReversePath | ForwardPath) -> None:
        self._path = path
        self._texts: tuple[str, ...] = ()

    def outside(self, wanted: frozenset[str]) -> bool:
        """Whether none of these patterns matches."""
        if not self._texts:
            self._texts = tuple(pattern_texts(self._path))
        return wanted.isdisjoint(self._texts)


def _missing(
    rules: RelayRules,
    entry: TrustEntry,
    transaction: Transaction,
    forward_path: ForwardPath,
    texts: tuple[_Texts, _Texts],
) -> Refuse | Defer | None:
    """Why this grant does not cover the forward-path, whatever its rates; ``texts`` are those of the two paths."""
    reverse_texts, forward_texts = texts
    if expired(entry, transaction.now):
        return Refuse(Reason.EXPIRED_TRUST, entry.where, entry.why)
    login = transaction.session.mailbox_login
    if entry.pop3_s and (login is None or not -CLOCK_SLACK_S <= transaction.now - login.at < entry.pop3_s):
        return Refuse(Reason.MAILBOX_LOGIN, entry.where, entry.why)
    if entry.tls_minimum and _tls_version(transaction.session.tls) < _tls_version(f"TLSv{entry.tls_minimum}"):
        return Refuse(Reason.TLS_REQUIRED, entry.where, f"tls_minimum {entry.tls_minimum}")
    if entry.reverse_texts and reverse_texts.outside(entry.reverse_texts):
        return Refuse(Reason.NARROWED, entry.where, "reverse_paths")
    # A narrowed grant covers a forward-path only if no backend can read it as another one.
    if entry.forward_texts and (routing(rules, forward_path) or forward_texts.outside(entry.forward_texts)):
        return Refuse(Reason.NARROWED, entry.where, "forward_paths")
    return None


_TLS_VERSIONS = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")


def _tls_version(name: str) -> int:
    """Comparable; 0 for plain text and whatever else is no version."""
    name = name.removesuffix(".0")
    return 1 + _TLS_VERSIONS.index(name) if name in _TLS_VERSIONS else 0


def sense(entry: TrustEntry) -> str:
    """What the entry grants to whom, by which its counts are kept: an edit of the file above it forgets nothing."""
    return f"{who(entry)} {sorted(entry.reverse_texts)} {sorted(entry.forward_texts)}"


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
    return f"pop3 {entry.pop3_s:.0f}s"


def _backend(rules: RelayRules, forward_path: ForwardPath, *, is_local: bool) -> str:
    """The backend of the first route that matches, "" where there is none."""
    if rules.routes:
        numbers = rules.index.routes.matching(forward_path)
        if is_local:
            numbers += rules.index.local_routes
        if numbers:
            return rules.routes[min(numbers)].backend
    return rules.default_backend


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


_V4_BITS = 0xFFFFFFFF
_V4_MAPPED = 0xFFFF  # the first 96 bits of ::ffff:0:0/96.  RFC 4291 §2.5.5.2


class NetworkTable(Generic[_T]):
    """Values by network; a lookup costs one step for each prefix length in use, however many networks there are.

    ::ffff:192.0.2.1 is 192.0.2.1 here, too, whoever forgot to say so.
    """

    __slots__ = ("_v4", "_v6")

    def __init__(self) -> None:
        self._v4: dict[int, dict[int, list[_T]]] = {}
        self._v6: dict[int, dict[int, list[_T]]] = {}

    def add(self, network: IPNetwork, value: _T) -> None:
        """Keep a value under a network."""
        table, number = self._v6, int(network.network_address)
        shift = network.max_prefixlen - network.prefixlen
        if network.version == 4 or (number >> 32 == _V4_MAPPED and shift <= 32):
            table, number = self._v4, number & _V4_BITS
        table.setdefault(shift, {}).setdefault(number >> shift, []).append(value)

    def matching(self, address: IPv4Address | IPv6Address) -> list[_T]:
        """The values of all networks that hold the address."""
        table, number = self._v4, int(address)
        if address.version == 6:
            if number >> 32 == _V4_MAPPED:
                number &= _V4_BITS
            else:
                table = self._v6
        return [value for shift, prefixes in table.items() for value in prefixes.get(number >> shift, ())]


class PathTable:
    """Numbers of rules by address pattern: a lookup costs a few dictionary reads, however many patterns there are."""

    __slots__ = ("_numbers",)

    def __init__(self) -> None:
        self._numbers: dict[str, list[int]] = {}

    def add(self, pattern: Pattern, number: int) -> None:
        """Keep a number under a pattern."""
        self._numbers.setdefault(str(pattern), []).append(number)

    def matching(self, path: ReversePath | ForwardPath) -> list[int]:
        """The numbers of the rules whose pattern matches the path."""
        if not self._numbers:
            return []
        return [number for text in pattern_texts(path) for number in self._numbers.get(text, ())]


class RuleIndex:
    """The rules of a RelayRules arranged for lookup: by what is looked up, the places of rules in their tuples."""

    __slots__ = (
        "deny_forward_paths",
        "deny_helos",
        "deny_hosts",
        "deny_networks",
        "deny_reverse_paths",
        "forward_paths_denied_until",
        "local_below",
        "local_exact",
        "local_routes",
        "reread",
        "routes",
        "trust_accounts",
        "trust_certificates",
        "trust_hosts",
        "trust_listens",
        "trust_mailbox_logins",
        "trust_networks",
    )

    def __init__(self, rules: RelayRules) -> None:
        self.local_exact: dict[str, LocalDomain] = {}
        self.local_below: dict[str, LocalDomain] = {}
        for local in rules.local:
            below = local.pattern.startswith("*.")
            table = self.local_below if below else self.local_exact
            table.setdefault(local.pattern[2:] if below else local.pattern, LocalDomain(local.pattern, local.where))
        self.trust_networks: NetworkTable[int] = NetworkTable()
        self.trust_hosts: dict[str, list[int]] = {}
        self.trust_listens: dict[str, list[int]] = {}
        self.trust_accounts: dict[str, list[int]] = {}
        self.trust_certificates: dict[str, list[int]] = {}
        self.trust_mailbox_logins: list[int] = []
        for number, entry in enumerate(rules.trust):
            if entry.network is not None:
                self.trust_networks.add(entry.network, number)
            elif entry.host:
                self.trust_hosts.setdefault(entry.host, []).append(number)
            elif entry.listen:
                self.trust_listens.setdefault(entry.listen, []).append(number)
            elif entry.certificate:
                self.trust_certificates.setdefault(entry.certificate, []).append(number)
            elif entry.pop3_s:
                self.trust_mailbox_logins.append(number)
            else:
                for account in entry.accounts:
                    self.trust_accounts.setdefault(account, []).append(number)
        self.deny_networks: NetworkTable[int] = NetworkTable()
        self.deny_hosts: dict[str, list[int]] = {}
        self.deny_helos: dict[str, list[int]] = {}
        self.deny_reverse_paths = PathTable()
        self.deny_forward_paths = PathTable()
        self.forward_paths_denied_until = float("-inf")
        for number, deny in enumerate(rules.deny):
            if deny.network is not None:
                self.deny_networks.add(deny.network, number)
            elif deny.host:
                self.deny_hosts.setdefault(deny.host, []).append(number)
            elif deny.helo:
                self.deny_helos.setdefault(deny.helo.lower().rstrip("."), []).append(number)
            elif deny.reverse_path is not None:
                self.deny_reverse_paths.add(deny.reverse_path, number)
            elif deny.forward_path is not None:
                self.deny_forward_paths.add(deny.forward_path, number)
                until = float("inf") if deny.expires_at is None else deny.expires_at
                self.forward_paths_denied_until = max(self.forward_paths_denied_until, until)
        self.reread: dict[str, str] = {}
        for one in rules.reread:
            self.reread[one.backend] = self.reread.get(one.backend, "") + one.characters
        self.routes = PathTable()
        self.local_routes: list[int] = []
        for number, route in enumerate(rules.routes):
            if route.local:
                self.local_routes.append(number)
            for pattern in route.forward_paths:
                self.routes.add(pattern, number)
