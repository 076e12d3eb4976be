"""Which questions the relay policy cannot tell apart: classes of clients, reverse-paths and forward-paths.

Why: a rule model is decided for good only if nothing is left out; so the space of all questions is cut at every edge
    that the rules name, and a witness of each piece stands for it.  docs/proof.md has the argument.
Trust: rules from an administrator's file; nothing that a peer sent comes here, but any question may be classified.
Promise: pure.  Two questions in the same class get the same answer, and every question is in a class that has a witness
    here (tests/policy/test_prover.py holds both against random questions).
Sources: RFC 4291 §2.5.5.2 (mapped addresses), RFC 6761 and RFC 8375 (inside names), RFC 5321 §4.1.2, §4.1.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import chain, pairwise, product
from typing import NamedTuple

from gatepost.facts import IPAddress
from gatepost.policy.extent import IPV4_END, IPV6_END, MAPPED, Range, inside, public_parts, range_of
from gatepost.policy.relay import CLOCK_SLACK_S, RelayRules, expired, local_domain, routing, with_domain
from gatepost.smtp.path import (
    DOMAIN_OCTETS_MAX,
    NULL_REVERSE_PATH,
    POSTMASTER,
    AddressLiteral,
    Domain,
    ForwardPath,
    Mailbox,
    PathDefect,
    Pattern,
    ReversePath,
    Shape,
    parse_forward_path,
    pattern_texts,
)

# RFC 6761, RFC 8375 and names in use inside: "*.lan" takes in no stranger's domain.
_INSIDE_TOP_LEVELS = frozenset({"example", "invalid", "localhost", "test"}) | frozenset(
    {"corp", "home", "internal", "intranet", "lan", "local", "private"}
)


class Standing(NamedTuple):
    """What one fact about a client is worth.  Facts of the same worth are one class.

    Attributes:
        grants: the [[trust]] entries in force that ask for it, by number.
        barred: nothing passes, whatever is granted: a [[deny]] entry says so, or the listener demands a login.
    """

    grants: frozenset[int]
    barred: bool = False


class Kind(NamedTuple):
    """All that a decision reads of a forward-path, but for the narrowing of grants.

    Attributes:
        addressed: it has a domain, or bare postmaster has one here.
        routing: some backend may read it as another address.
        named: the configuration names its domain.
    """

    denied: bool
    addressed: bool
    local: bool
    backend: bool
    routing: bool
    named: bool

    @property
    def elsewhere(self) -> bool:
        """Mail to it may go where nobody said: to a domain that is not named, or in another reading."""
        return self.routing or not self.named


class Asked(NamedTuple):
    """What is asked by a client of one standing: all that a decision reads of the transaction and the forward-path.

    Attributes:
        covering: the grants of the standing that hold both the reverse-path and the forward-path.  Which of the two is
            missing of another grant changes the words of a refusal, and not that it is one.
        reverse_denied: by a [[deny]] entry.
    """

    tls: str
    covering: frozenset[int]
    reverse_denied: bool
    kind: Kind


class ForwardClass(NamedTuple):
    """A forward-path, and all that decides about it; grants: those whose forward_paths hold it."""

    path: ForwardPath
    kind: Kind
    grants: frozenset[int]


class ReverseClass(NamedTuple):
    """A reverse-path, and all that decides about it; grants: those whose reverse_paths hold it."""

    path: ReversePath
    denied: bool
    grants: frozenset[int]


class AddressClass(NamedTuple):
    """All addresses of one standing."""

    standing: Standing
    ranges: list[Range]

    @property
    def witness(self) -> IPAddress:
        """A public address where there is one, and not the first of a network where there is another."""
        version, first, end = next(iter(public_parts(self.ranges)), self.ranges[0])
        number = first + 1 if end - first > 1 else first
        return IPv4Address(number) if version == 4 else IPv6Address(number)


Question = tuple[str, ReverseClass, ForwardClass]
"""TLS version, reverse-path and forward-path: what a client says in one transaction."""

TLS_VERSIONS = ("", "TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
_FUTURE_S = -3600.0  # a mailbox login that the clock cannot explain
HOP = "hop.invalid"
NOBODY = Standing(frozenset())


class Partition:
    """The classes of all questions under these rules at this time, and a witness of each.

    Args:
        now: seconds since the epoch; what has expired makes no class.
    """

    def __init__(self, rules: RelayRules, now: float) -> None:
        self.rules = rules
        self.now = now
        self._trust = frozenset(n for n, entry in enumerate(rules.trust) if not expired(entry, now))
        self._deny = frozenset(n for n, entry in enumerate(rules.deny) if not expired(entry, now))
        trust = [(n, rules.trust[n]) for n in sorted(self._trust)]
        deny = [rules.deny[n] for n in sorted(self._deny)]
        self._narrowed_to = _by_text((n, entry.forward_texts) for n, entry in trust)
        self._narrowed_from = _by_text((n, entry.reverse_texts) for n, entry in trust)
        self._to_anybody = frozenset(n for n, entry in trust if not entry.forward_texts)
        self._from_anybody = frozenset(n for n, entry in trust if not entry.reverse_texts)
        self._lowest_tls = {n for n, entry in trust if entry.tls_minimum}
        leading = [
            *(pattern for _, entry in trust for pattern in entry.forward_paths),
            *(pattern for route in rules.routes for pattern in route.forward_paths),
        ]
        forward_patterns = [*leading, *(entry.forward_path for entry in deny if entry.forward_path is not None)]
        reverse_patterns = [
            *(pattern for _, entry in trust for pattern in entry.reverse_paths),
            *(entry.reverse_path for entry in deny if entry.reverse_path is not None),
        ]
        self._names = _Names(rules, leading)
        self._reread = sorted({character for one in rules.reread for character in one.characters})
        self.forwards = list(self._forward_classes(forward_patterns))
        self.reverses = list(self._reverse_classes(reverse_patterns))
        self.addresses = self._address_classes()
        self._forwards_by_kind: dict[Kind, list[ForwardClass]] = {}
        self._forwards_by_grant: dict[int, list[ForwardClass]] = {}
        self._reverses_by_denied: dict[bool, list[ReverseClass]] = {}
        self._reverses_by_grant: dict[int, list[ReverseClass]] = {}
        self._reverses_known: dict[frozenset[int], list[ReverseClass]] = {}
        for reverse in self.reverses:
            self._reverses_by_denied.setdefault(reverse.denied, []).append(reverse)
            for n in reverse.grants:
                self._reverses_by_grant.setdefault(n, []).append(reverse)
        for one in self.forwards:
            self._forwards_by_kind.setdefault(one.kind, []).append(one)
            for n in one.grants:
                self._forwards_by_grant.setdefault(n, []).append(one)

    # ---- The class of a fact

    def address(self, address: IPAddress) -> Standing:
        """What an address is worth."""
        index = self.rules.index
        return self._standing(index.trust_networks.matching(address), index.deny_networks.matching(address))

    def host(self, name: str) -> Standing:
        """What it is worth that a name resolves to the client's address."""
        index = self.rules.index
        return self._standing(index.trust_hosts.get(name, ()), index.deny_hosts.get(name, ()))

    def listener(self, name: str) -> Standing:
        """What it is worth to come to a listener."""
        return self._standing(self.rules.index.trust_listens.get(name, ()))

    def account(self, account: str) -> Standing:
        """What an account is worth."""
        accounts = self.rules.index.trust_accounts
        return self._standing((*accounts.get(account, ()), *accounts.get("*", ())))

    def certificate(self, fingerprint: str) -> Standing:
        """What a client certificate is worth."""
        return self._standing(self.rules.index.trust_certificates.get(fingerprint, ()))

    def mailbox_login(self, age_s: float) -> Standing:
        """What a login to a mailbox from the same address is worth, so long after it."""
        return self._standing(
            n for n in self.rules.index.trust_mailbox_logins if -CLOCK_SLACK_S <= age_s < self.rules.trust[n].pop3_s
        )

    def hello(self, name: str) -> Standing:
        """What a name in EHLO is worth: nothing, or less."""
        helos = self.rules.index.deny_helos
        name = name.lower().rstrip(".")
        keys = [name, *(f"*.{parent}" for parent in _parents(name))]
        return self._standing((), (n for key in keys for n in helos.get(key, ())))

    def asked(self, standing: Standing, tls: str, reverse: ReverseClass, forward: ForwardClass) -> Asked:
        """The class of a question of a client of this standing."""
        grants = standing.grants
        tls = tls.removesuffix(".0") if self._lowest_tls & grants else ""
        covering = self._holding(grants, forward) & (reverse.grants | self._from_anybody)
        return Asked(tls if tls in TLS_VERSIONS else "", covering, reverse.denied, forward.kind)

    def _holding(self, grants: frozenset[int], forward: ForwardClass) -> frozenset[int]:
        """Which of these grants hold a forward-path; a narrowed one never holds what a backend may read as another."""
        return grants & (self._to_anybody if forward.kind.routing else forward.grants | self._to_anybody)

    def _standing(self, trust: Iterable[int], deny: Iterable[int] = ()) -> Standing:
        return Standing(self._trust.intersection(trust), not self._deny.isdisjoint(deny))

    def forward_class(self, path: ForwardPath) -> ForwardClass:
        """The class of a forward-path."""
        rules, index = self.rules, self.rules.index
        addressed = with_domain(rules, path)
        denying = index.deny_forward_paths.matching(path)
        if addressed is None:
            kind = Kind(
                denied=not self._deny.isdisjoint(denying),
                addressed=False,
                local=False,
                backend=False,
                routing=bool(routing(rules, path)),
                named=True,
            )
            return ForwardClass(path, kind, frozenset())
        if addressed is not path:
            denying += index.deny_forward_paths.matching(addressed)
        local = local_domain(rules, addressed) is not None
        routes = index.routes.matching(addressed) + (index.local_routes if local else [])
        backend = rules.routes[min(routes)].backend if routes else rules.default_backend
        kind = Kind(
            denied=not self._deny.isdisjoint(denying),
            addressed=True,
            local=local,
            backend=bool(backend),
            routing=bool(routing(rules, addressed)),
            named=self._names.hold(addressed),
        )
        return ForwardClass(path, kind, _found(self._narrowed_to, addressed))

    def reverse_class(self, path: ReversePath) -> ReverseClass:
        """The class of a reverse-path."""
        denying = self.rules.index.deny_reverse_paths.matching(path)
        return ReverseClass(path, not self._deny.isdisjoint(denying), _found(self._narrowed_from, path))

    # ---- A witness of each class

    def _address_classes(self) -> list[AddressClass]:
        """Between two neighbouring edges of the networks that are named, all addresses are worth the same."""
        edges: dict[int, set[int]] = {4: {0, IPV4_END}, 6: {0, IPV6_END}}
        mapped, mapped_end = range_of(MAPPED)[1:]
        edges[6] |= {mapped, mapped_end}
        trusted = (self.rules.trust[n].network for n in self._trust)
        denied = (self.rules.deny[n].network for n in self._deny)
        for network in chain(trusted, denied):
            if network is not None:
                version, first, end = range_of(network)
                edges[version] |= {first, end}
                if inside(network, MAPPED):
                    edges[4] |= {first - mapped, end - mapped}
        classes: dict[Standing, list[Range]] = {}
        for version, numbers in edges.items():
            ordered = sorted(numbers)
            for first, end in pairwise(ordered):
                if version == 6 and mapped <= first < mapped_end:
                    continue  # such a client is the IPv4 client, whose class is there
                address = IPv4Address(first) if version == 4 else IPv6Address(first)
                classes.setdefault(self.address(address), []).append((version, first, end))
        return [AddressClass(standing, ranges) for standing, ranges in classes.items()]

    def _forward_classes(self, patterns: list[Pattern]) -> Iterator[ForwardClass]:
        named = _Mailboxes(patterns, [local.pattern for local in self.rules.local])
        for domain in named.domains:
            plain = ForwardPath(Mailbox(named.fresh, domain), _plain_shape(domain))
            found = self.forward_class(plain)
            yield found
            # No pattern names any of these local-parts, so that they differ from the first in their shape alone.
            kind = found.kind._replace(routing=True)
            for local_part, shape in _routing_forms(named.fresh):
                yield found._replace(path=ForwardPath(Mailbox(local_part, domain), shape), kind=kind)
            # What the backend of this domain was found to read as another address is one more shape.
            for character in self._reread:
                local_part = f"{named.fresh}{character}{HOP}"
                yield self.forward_class(ForwardPath(Mailbox(local_part, domain), _plain_shape(domain)))
        for mailbox in named.mailboxes:
            for octets in (mailbox.octets, b"@%b:%b" % (HOP.encode(), mailbox.octets)):
                path = parse_forward_path(b"<%b>" % octets, smtputf8=True)
                if not isinstance(path, PathDefect):  # too long with a route: nobody can say it
                    yield self.forward_class(path)
        yield self.forward_class(ForwardPath(POSTMASTER, Shape.NO_DOMAIN))

    def _reverse_classes(self, patterns: list[Pattern]) -> Iterator[ReverseClass]:
        named = _Mailboxes(patterns, [])
        yield self.reverse_class(NULL_REVERSE_PATH)
        for domain in named.domains:
            yield self.reverse_class(Mailbox(named.fresh, domain))
        for mailbox in named.mailboxes:
            yield self.reverse_class(mailbox)

    def hellos(self) -> list[str]:
        """A name of each class: one that nobody denies first."""
        helos = [entry.helo.lower().rstrip(".") for entry in self.rules.deny if entry.helo]
        exact = {name for name in helos if not name.startswith("*.")}
        below = {name[2:] for name in helos if name.startswith("*.")}
        return [_nowhere(exact, below, "stranger"), *exact, *(_fresh_below(parent, exact, below) for parent in below)]

    def mailbox_login_ages_s(self) -> list[float]:
        """An age of each class: a mailbox login is worth less as it gets older."""
        return [_FUTURE_S, 0.0, *sorted({entry.pop3_s for entry in self.rules.trust if entry.pop3_s})]

    def questions(self, standing: Standing, *, elsewhere: bool = False) -> Iterator[Question]:
        """A witness of everything that a client of this standing can ask; or only of what leads ``elsewhere``."""
        forwards = self._forwards_for(standing.grants)
        return self._product(standing, [one for one in forwards if one.kind.elsewhere or not elsewhere])

    def questions_of_strangers(self) -> Iterator[Question]:
        """Every forward-path that the rules name, and each shape of it, whether it differs from others or not."""
        return self._product(NOBODY, self.forwards)

    def _product(self, standing: Standing, forwards: list[ForwardClass]) -> Iterator[Question]:
        versions = TLS_VERSIONS if self._lowest_tls & standing.grants else ("",)
        for forward in forwards:
            # Of a grant that does not hold the forward-path it does not matter whether it holds the reverse-path.
            holding = self._holding(standing.grants, forward)
            yield from product(versions, self._reverses_for(holding), (forward,))

    def _reverses_for(self, grants: frozenset[int]) -> list[ReverseClass]:
        """One of each class: those that narrowed ones among these grants name, and one that none of them names."""
        found = self._reverses_known.get(grants)
        if found is None:
            classes: dict[tuple[bool, frozenset[int]], ReverseClass] = {}
            for n in grants:
                for one in self._reverses_by_grant.get(n, ()):
                    classes.setdefault((one.denied, one.grants & grants), one)
            for denied, members in self._reverses_by_denied.items():
                other = next((one for one in members if grants.isdisjoint(one.grants)), None)
                if other is not None:
                    classes.setdefault((denied, frozenset()), other)
            found = self._reverses_known[grants] = list(classes.values())
        return found

    def leads_elsewhere(self, number: int) -> bool:
        """Whether a grant reaches beyond the domains that are named."""
        return not self.rules.trust[number].forward_texts or any(
            not one.kind.named for one in self._forwards_by_grant.get(number, ())
        )

    def _forwards_for(self, grants: frozenset[int]) -> list[ForwardClass]:
        """One of each class: those that narrowed grants of this standing name, and one of each kind that none names."""
        found: dict[object, ForwardClass] = {}
        for n in grants:
            for one in self._forwards_by_grant.get(n, ()):
                found.setdefault((one.kind, one.grants & grants), one)
        for kind, members in self._forwards_by_kind.items():
            other = next((one for one in members if grants.isdisjoint(one.grants)), None)
            if other is not None:
                found.setdefault((kind, frozenset()), other)
        return list(found.values())


def _by_text(entries: Iterable[tuple[int, frozenset[str]]]) -> dict[str, list[int]]:
    """Numbers of entries by the patterns that narrow them."""
    out: dict[str, list[int]] = {}
    for n, texts in entries:
        for text in texts:
            out.setdefault(text, []).append(n)
    return out


def _found(numbers: dict[str, list[int]], path: ReversePath | ForwardPath) -> frozenset[int]:
    if not numbers:
        return frozenset()
    return frozenset(n for text in pattern_texts(path) for n in numbers.get(text, ()))


class _Names:
    """The domains that a configuration names: in full, or as everything below a domain that somebody can own."""

    def __init__(self, rules: RelayRules, patterns: Iterable[Pattern]) -> None:
        self._exact: set[Domain | AddressLiteral] = set()
        self._below: set[str] = set()
        for local in rules.local:
            if local.pattern.startswith("*."):
                self._add_below(local.pattern[2:])
            else:
                self._exact.add(_local_domain_value(local.pattern))
        for pattern in patterns:
            domain = pattern.domain
            if isinstance(domain, str) and pattern.below:
                self._add_below(domain)
            elif isinstance(domain, AddressLiteral) or (isinstance(domain, str) and "." in domain):
                self._exact.add(domain)

    def _add_below(self, parent: str) -> None:
        if "." in parent or parent in _INSIDE_TOP_LEVELS:
            self._below.add(parent)

    def hold(self, path: ForwardPath) -> bool:
        """Whether the domain of this forward-path is named."""
        mailbox = path.mailbox
        if not isinstance(mailbox, Mailbox):
            return True
        domain = mailbox.domain
        if isinstance(domain, AddressLiteral):
            return _unmapped(domain) in self._exact
        return domain in self._exact or any(parent in self._below for parent in _parents(domain))


class _Mailboxes:
    """A domain and a mailbox of every class that patterns make.

    Attributes:
        fresh: a local-part that no pattern names.
        domains: each domain that is named, one below each that is named with "*.", one that nothing names, literals.
        mailboxes: each local-part that is named, at each of these domains where the patterns name it.
    """

    def __init__(self, patterns: Iterable[Pattern], local: Iterable[str]) -> None:
        exact: set[str] = set()
        below: set[str] = set()
        literals: set[AddressLiteral] = set()
        local_parts: dict[str, set[str]] = {}
        for pattern in patterns:
            if isinstance(pattern.domain, AddressLiteral):
                literals.add(pattern.domain)
            elif pattern.domain is not None:
                (below if pattern.below else exact).add(pattern.domain)
            if pattern.local_part is not None:
                right = "*" if pattern.domain is None else f"{'*.' if pattern.below else ''}{pattern.domain}"
                local_parts.setdefault(right, set()).add(pattern.local_part)
        for text in local:
            if text.startswith("*."):
                below.add(text[2:])
            else:
                value = _local_domain_value(text)
                if isinstance(value, AddressLiteral):
                    literals.add(value)
                else:
                    exact.add(value)
        taken = {local_part for named in local_parts.values() for local_part in named}
        self.fresh = next(
            word
            for word in _words("user")
            if taken.isdisjoint({word, *(local_part.lower() for local_part, _ in _routing_forms(word))})
        )
        self.domains: list[Domain | AddressLiteral] = [
            _nowhere(exact, below, "elsewhere"),
            *exact,
            *(
                name
                for name in (_fresh_below(parent, exact, below) for parent in below)
                if len(name) <= DOMAIN_OCTETS_MAX  # else there is none
            ),
            _literal_nowhere(literals),
            *literals,
        ]
        self.mailboxes = [
            Mailbox(local_part, domain)
            for domain in (self.domains if local_parts else ())
            for local_part in set().union(*(local_parts.get(right, ()) for right in _rights(domain)))
        ]


def _rights(domain: Domain | AddressLiteral) -> list[str]:
    """What may stand behind the "@" of a pattern that means this domain."""
    if isinstance(domain, AddressLiteral):
        return ["*", str(domain)]
    return ["*", domain, *(f"*.{parent}" for parent in _parents(domain))]


def _parents(name: str) -> Iterator[str]:
    _, dot, parent = name.partition(".")
    while dot:
        yield parent
        _, dot, parent = parent.partition(".")


def _words(word: str) -> Iterator[str]:
    """The word, then words like it."""
    yield word
    number = 2
    while True:
        yield f"{word}{number}"
        number += 1


def _nowhere(exact: set[str], below: set[str], word: str) -> str:
    """A domain that nothing names, in a top-level domain that is nobody's."""
    top = next(top for top in chain(("invalid",), _words("nowhere")) if top not in below)
    return next(name for name in (f"{one}.{top}" for one in _words(word)) if name not in exact and name not in below)


def _fresh_below(parent: str, exact: set[str], below: set[str]) -> str:
    """A name below this one that nothing else names."""
    words = _words("elsewhere" if len(parent) + 10 <= DOMAIN_OCTETS_MAX else "x")
    return next(name for name in (f"{word}.{parent}" for word in words) if name not in exact and name not in below)


def _literal_nowhere(literals: set[AddressLiteral]) -> AddressLiteral:
    number = int(IPv4Address("192.0.2.213"))
    while AddressLiteral(IPv4Address(number)) in literals:
        number += 1
    return AddressLiteral(IPv4Address(number))


def _local_domain_value(pattern: str) -> Domain | AddressLiteral:
    """The domain that an exact entry of [domains] local means; a literal stands there as ``relay.literal_text``."""
    return AddressLiteral(ip_address(pattern[1:-1])) if pattern.startswith("[") else pattern


def _unmapped(literal: AddressLiteral) -> AddressLiteral:
    address = literal.address
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return literal if mapped is None else AddressLiteral(mapped)


def _plain_shape(domain: Domain | AddressLiteral) -> Shape:
    return Shape.LITERAL if isinstance(domain, AddressLiteral) else Shape.PLAIN


def _routing_forms(word: str) -> tuple[tuple[str, Shape], ...]:
    """A local-part of each shape that routes; of a source route only the shape is left."""
    return (
        (f"{word}%{HOP}", Shape.PERCENT),
        (f"{HOP}!{word}", Shape.BANG),
        (f"{word}@{HOP}", Shape.QUOTED_AT),
        (word, Shape.ROUTE),
        (f"=?us-ascii?q?{word}?=", Shape.ENCODED),
        (f"|{word}", Shape.SPECIAL),
    )
