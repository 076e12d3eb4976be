"""Grants that load, and are wider or do less than whoever wrote them thinks.

Why: what is open is proven by ``policy.prover`` and does not load; but a grant to a whole /16 is no open relay and may
    still be a slip, and an entry that another one makes idle protects nothing.
Trust: rules from an administrator's file.
Promise: pure.  A warning names the entry and the mend; a grant that fits its purpose gets none.
Sources: RFC 1918 (private addresses), RFC 6177 (one site).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple

from gatepost.policy.extent import inside, public_extent
from gatepost.policy.prover import Listener
from gatepost.policy.relay import IPNetwork, RelayRules, TrustEntry, expired
from gatepost.smtp.path import Pattern

_COMPANY_BITS = 24  # a public IPv4 network shorter than this is rarely one company's
_SITE_BITS = 48  # RFC 6177: a whole site, where one network of it is a /64
_WHOLE_PRIVATE = (IPv4Network("10.0.0.0/8"), IPv4Network("172.16.0.0/12"))  # RFC 1918; 192.168.0.0/16 is one office
_LISTED = 8  # lines named in one warning
_BELOW_LISTENERS = ("1.0", "1.1")  # a tls_minimum that lowers the listener's for this client


class Advice(NamedTuple):
    """Something about one rule that its author should know.

    Attributes:
        rule: "local", or the key of a [[trust]] entry that is meant, "" for the entry as a whole.
        number: of the rule among those of its kind.
    """

    rule: str
    number: int
    sentence: str


def advice(rules: RelayRules, listeners: Iterable[Listener], now: float, told: Iterable[int] = ()) -> list[Advice]:
    """What is too wide, idle, or safe behind a firewall only.

    Args:
        now: seconds since the epoch; what has expired is warned of elsewhere.
        told: [[trust]] entries that are known to open the gate, which is worse.
    """
    force = [(n, entry) for n, entry in enumerate(rules.trust) if not expired(entry, now)]
    opening = set(told)
    return [
        *_everywhere(force, {listener.name: listener for listener in listeners}),
        *_too_wide((n, entry) for n, entry in force if n not in opening),
        *_idle(rules, force),
        *_idle_domains(rules),
    ]


def without_owner(rules: RelayRules, now: float) -> list[str]:
    """One warning for all grants to machines that nobody answers for, none where there are none.

    Whoever logs in answers for it; a network, a name, a listener or a certificate cannot be asked.
    """
    wheres = [
        entry.where
        for entry in rules.trust
        if not (entry.owner or entry.accounts or entry.pop3_s or expired(entry, now))
    ]
    if not wheres:
        return []
    lines = [where.rpartition(":")[2] for where in wheres]
    which = "the entry names" if len(wheres) == 1 else f"{len(wheres):,} entries (lines {_listed(lines)}) name"
    return [f'{wheres[0]}: [[trust]]: {which} no owner; write owner = "it@example.com", so that somebody can be asked']


def _listed(lines: list[str]) -> str:
    if len(lines) > _LISTED:
        return f"{', '.join(lines[:_LISTED])} and others"
    return f"{', '.join(lines[:-1])} and {lines[-1]}"


# --- Too wide ---------------------------------------------------------------------------------------------------------


def _everywhere(force: list[tuple[int, TrustEntry]], listeners: dict[str, Listener]) -> Iterator[Advice]:
    for n, entry in force:
        listener = listeners.get(entry.listen)
        if listener is not None and listener.role == "inside" and listener.everywhere:
            yield Advice(
                "listen",
                n,
                "all clients of this listener may send anywhere, and it listens on every interface here; "
                "give it an inside address, or let a firewall keep strangers out",
            )


def _too_wide(force: Iterable[tuple[int, TrustEntry]]) -> Iterator[Advice]:
    """Grants to more machines than one usually has, unless they are narrowed to named forward-paths."""
    for n, entry in force:
        network = entry.network
        if network is None or entry.forward_texts:
            continue
        public = public_extent(network)
        private = any(inside(one, network) for one in _WHOLE_PRIVATE)
        if isinstance(network, IPv4Network) and network.prefixlen < _COMPANY_BITS and public.addresses:
            yield Advice("network", n, f"{network} holds {public}, all of which may send; name those that are yours")
        elif private:
            yield Advice(
                "network",
                n,
                f"{network} holds a whole block of private addresses, and VPNs, containers and NAT use such, too; "
                "name the networks that are yours",
            )
        elif isinstance(network, IPv6Network) and network.prefixlen <= _SITE_BITS and public.sites:
            yield Advice(
                "network",
                n,
                f"{network} holds {1 << (64 - network.prefixlen):,} networks of /64, all of which may send; "
                "name the /64 that is meant",
            )


# --- Idle -------------------------------------------------------------------------------------------------------------


def _idle(rules: RelayRules, force: list[tuple[int, TrustEntry]]) -> Iterator[Advice]:
    """Entries without which everything would be as it is."""
    live = dict(force)
    for n, entry in force:
        denied = _denied_at(rules, entry.network, entry.expires_at)
        if denied:
            yield Advice("", n, f"the [[deny]] entry at {denied} refuses all of its clients; remove one of the two")
            continue
        for number in _at_least_as_wide(rules, entry):
            other = live.get(number)
            if number == n or other is None or not _covers(other, entry):
                continue
            twins = n in _at_least_as_wide(rules, other) and _covers(entry, other)
            if number < n or not twins:  # of two alike the second is idle
                yield Advice("", n, f"the entry at {other.where} grants all of this already; remove one of the two")
                break


def _denied_at(rules: RelayRules, network: IPNetwork | None, expires_at: float | None) -> str:
    """Where all of a network is denied for as long as it is trusted, "" for nowhere."""
    if network is None:
        return ""
    for number in rules.index.deny_networks.matching(network.network_address):
        deny = rules.deny[number]
        if deny.network is not None and inside(network, deny.network) and _lasts(deny.expires_at, expires_at):
            return deny.where
    return ""


def _lasts(expires_at: float | None, as_long_as: float | None) -> bool:
    return expires_at is None or (as_long_as is not None and expires_at >= as_long_as)


def _at_least_as_wide(rules: RelayRules, entry: TrustEntry) -> list[int]:
    """The entries that mean all the clients of this one, itself included."""
    index = rules.index
    if entry.network is not None:
        found = index.trust_networks.matching(entry.network.network_address)
        networks = ((n, rules.trust[n].network) for n in found)
        return [n for n, network in networks if network is not None and inside(entry.network, network)]
    if entry.host:
        return index.trust_hosts[entry.host]
    if entry.listen:
        return index.trust_listens[entry.listen]
    if entry.certificate:
        return index.trust_certificates[entry.certificate]
    if entry.pop3_s:
        return [n for n in index.trust_mailbox_logins if rules.trust[n].pop3_s >= entry.pop3_s]
    everybody = index.trust_accounts.get("*", [])
    named = index.trust_accounts.get(entry.accounts[0], []) if entry.accounts else []
    return [*everybody, *(n for n in named if set(entry.accounts) <= set(rules.trust[n].accounts))]


def _covers(wide: TrustEntry, entry: TrustEntry) -> bool:
    """Whether whatever the one lets its clients do, the other lets them, too.

    An entry with rates of its own covers nothing: once they are used up, the next entry counts.
    """
    shared = entry.shared and not wide.shared
    lowers = entry.tls_minimum in _BELOW_LISTENERS and entry.tls_minimum != wide.tls_minimum
    normalises = entry.bare_newlines == "normalise" and wide.bare_newlines != "normalise"
    return (
        not (wide.messages_per_hour or wide.recipients_per_hour or shared or lowers or normalises)
        and _lasts(wide.expires_at, entry.expires_at)
        and wide.tls_minimum <= entry.tls_minimum  # "" and "1.0" to "1.3" sort as they are meant
        and _hold(wide.reverse_paths, entry.reverse_paths)
        and _hold(wide.forward_paths, entry.forward_paths)
    )


def _hold(wide: tuple[Pattern, ...], narrow: tuple[Pattern, ...]) -> bool:
    """Whether whatever the ones match, one of the others matches; none at all means any."""
    anything = not narrow or "*" in map(str, narrow)
    if not wide or "*" in map(str, wide):
        return True
    return not anything and all(any(_within(one, other) for other in wide) for one in narrow)


def _within(narrow: Pattern, wide: Pattern) -> bool:
    if narrow == wide:
        return True
    if narrow.special is not None or wide.special is not None:
        return False
    if wide.local_part is not None and wide.local_part != narrow.local_part:
        return False
    if wide.domain is None:
        return True
    if not (isinstance(wide.domain, str) and isinstance(narrow.domain, str)):
        return wide.domain == narrow.domain
    if wide.below:
        return narrow.domain.endswith(f".{wide.domain}") or (narrow.below and narrow.domain == wide.domain)
    return not narrow.below and narrow.domain == wide.domain


def _idle_domains(rules: RelayRules) -> Iterator[Advice]:
    """Local domains below another one that has them all."""
    below = {local.pattern[2:]: local.where for local in rules.local if local.pattern.startswith("*.")}
    for n, local in enumerate(rules.local):
        _, dot, parent = local.pattern.removeprefix("*.").partition(".")
        while dot and not local.pattern.startswith("[") and local.pattern != rules.postmaster_domain:
            if parent in below:
                yield Advice("local", n, f'"*.{parent}" at {below[parent]} takes it in already; remove one of the two')
                break
            _, dot, parent = parent.partition(".")
