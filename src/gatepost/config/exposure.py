"""Do these rules, taken together, let strangers relay?

Why: the commonest open relay is no bug but a grant that is wider than its author saw; so a file that grants to the
    Internet does not load.
Trust: rules from an administrator's file.
Promise: pure.  An opening is a way in which a stranger without AUTH may send anywhere; a doubt is one that depends on
    what stands around this host.
Sources: RFC 6890 (special addresses), RFC 4291 §2.4, RFC 6177 (one site), RFC 6761 and RFC 8375 (inside names).
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_address

from gatepost.facts import IPAddress, client_address
from gatepost.gate.settings import ListenSettings
from gatepost.policy.relay import IPNetwork, RelayRules, TrustEntry
from gatepost.smtp.path import Pattern

Opening = tuple[str, int, str]
"""The rule ("local" or the who key of a grant), its index among the rules of its kind, and how it opens the gate."""

# RFC 6890 and its registry: addresses that no stranger on the public Internet can have.
_NOT_PUBLIC_IPV4 = [
    IPv4Network("10.0.0.0/8"),
    IPv4Network("100.64.0.0/10"),
    IPv4Network("127.0.0.0/8"),
    IPv4Network("169.254.0.0/16"),
    IPv4Network("172.16.0.0/12"),
    IPv4Network("192.0.2.0/24"),
    IPv4Network("192.168.0.0/16"),
    IPv4Network("198.18.0.0/15"),
    IPv4Network("198.51.100.0/24"),
    IPv4Network("203.0.113.0/24"),
    IPv4Network("224.0.0.0/3"),
]
_PUBLIC_IPV6 = IPv6Network("2000::/3")  # RFC 4291 §2.4: all the unicast addresses that are given out
_DOCUMENTATION_IPV6 = IPv6Network("2001:db8::/32")
_SITE_BITS = 48  # RFC 6177: what one site gets

# RFC 6761, RFC 8375 and names in use inside: "*.lan" takes in no stranger's domain.
_INSIDE_TOP_LEVELS = frozenset({"example", "invalid", "localhost", "test"}) | frozenset(
    {"corp", "home", "internal", "intranet", "lan", "local", "private"}
)


def openings(rules: RelayRules, listens: tuple[ListenSettings, ...], public_most: int, now: float) -> list[Opening]:
    """Every way in which strangers may send anywhere.

    Args:
        public_most: how many public addresses may be trusted in all.
        now: seconds since the epoch; what has expired opens nothing.
    """
    return [*_open_domains(rules), *_open_networks(rules, public_most, now), *_open_listeners(rules, listens)]


def doubts(rules: RelayRules, listens: tuple[ListenSettings, ...]) -> list[Opening]:
    """Grants that are safe only behind a firewall."""
    out: list[Opening] = []
    for index, entry in enumerate(rules.trust):
        listen = _listen(entry, listens)
        if listen is not None and listen.role == "inside" and _any_address(listen):
            out.append(
                (
                    "listen",
                    index,
                    (
                        "all clients of this listener may send anywhere, and it listens on every interface here; "
                        "give it an inside address, or let a firewall keep strangers out"
                    ),
                )
            )
    return out


def _listen(entry: TrustEntry, listens: Iterable[ListenSettings]) -> ListenSettings | None:
    return next((listen for listen in listens if listen.name == entry.listen), None)


def _open_domains(rules: RelayRules) -> list[Opening]:
    out: list[Opening] = []
    for index, entry in enumerate(rules.local):
        below = entry.pattern.removeprefix("*.")
        if below != entry.pattern and "." not in below and below not in _INSIDE_TOP_LEVELS:
            out.append(("local", index, f'"{entry.pattern}" is all of "{below}"; name your own domains'))
    return out


def _open_networks(rules: RelayRules, most: int, now: float) -> list[Opening]:
    """The networks that may send anywhere hold more public addresses than anybody has clients."""
    counted = [
        (index, trust.network)
        for index, trust in enumerate(rules.trust)
        if trust.network is not None
        and (trust.expires_at is None or trust.expires_at > now)
        and not _names_domains(trust.forward_paths)
    ]
    alone = [
        (index, network)
        for index, network in counted
        if network.num_addresses > most and _public_addresses([network]) > most
    ]
    out: list[Opening] = [
        (
            "network",
            index,
            (
                f"{network} holds {_public_addresses([network]):,} public addresses, whose users may send anywhere; "
                f"name your own networks ([gate] public_trust allows {most:,})"
            ),
        )
        for index, network in alone
    ]
    if not alone:
        total = _public_addresses([network for _, network in counted])
        if total > most:
            widest, _ = max(counted, key=lambda item: _public_addresses([item[1]]))
            out.append(
                (
                    "network",
                    widest,
                    (
                        f"the networks in [[trust]] hold {total:,} public addresses together; "
                        f"name your own networks ([gate] public_trust allows {most:,})"
                    ),
                )
            )
    return out


def _names_domains(forward_paths: tuple[Pattern, ...]) -> bool:
    """Whether every pattern stays within a domain somebody owns: no "*", no top-level domain."""
    return bool(forward_paths) and all(
        "." in str(pattern).rpartition("@")[2].removeprefix("*.") or str(pattern) in ("<>", "postmaster")
        for pattern in forward_paths
    )


def _public_addresses(networks: list[IPNetwork]) -> int:
    """How many public addresses these hold; an IPv6 /48 counts as one."""
    total = 0
    for four in collapse_addresses([network for network in networks if isinstance(network, IPv4Network)]):
        total += four.num_addresses
        for special in _NOT_PUBLIC_IPV4:
            if special.subnet_of(four):
                total -= special.num_addresses
            elif four.subnet_of(special):
                total -= four.num_addresses
    for six in collapse_addresses([network for network in networks if isinstance(network, IPv6Network)]):
        if six.subnet_of(_DOCUMENTATION_IPV6) or not six.overlaps(_PUBLIC_IPV6):
            continue
        bits = max(six.prefixlen, _PUBLIC_IPV6.prefixlen)
        total += 1 << max(_SITE_BITS - bits, 0)
    return total


def _open_listeners(rules: RelayRules, listens: Iterable[ListenSettings]) -> list[Opening]:
    """Listeners whose every client is trusted, though strangers come there."""
    out: list[Opening] = []
    for index, entry in enumerate(rules.trust):
        listen = _listen(entry, listens)
        if listen is None or listen.auth == "required" or _names_domains(entry.forward_paths):
            continue
        strangers = listen.role == "mx" and (listen.proxy_from or not _loopback(listen))
        if strangers or any(_is_public(host) for host, _ in listen.addresses):
            out.append(
                (
                    "listen",
                    index,
                    (
                        f'strangers reach the listener "{entry.listen}" at {listen.where}; '
                        'trust a listener of role "inside" at an inside address, or networks'
                    ),
                )
            )
    return out


def _any_address(listen: ListenSettings) -> bool:
    return any(ip_address(host).is_unspecified for host, _ in listen.addresses)


def _loopback(listen: ListenSettings) -> bool:
    return all(ip_address(host).is_loopback for host, _ in listen.addresses)


def _is_public(host: str) -> bool:
    address = client_address(host)
    return not address.is_unspecified and _public_addresses([_host_network(address)]) > 0


def _host_network(address: IPAddress) -> IPNetwork:
    return IPv4Network(address) if address.version == 4 else IPv6Network(address)
