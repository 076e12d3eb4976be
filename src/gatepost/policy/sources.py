"""Does one trusted address hide many clients: the lost source address, found by what such clients say.

Why: the commonest open relay is a right rule about a wrong address.  A container bridge, a NAT rule or a proxy replaces
    the address of every client by its own, which is private and trusted; then strangers may do what the office may.
    The premise that only our own machines come from there is therefore tested, not assumed.
Trust: everything here was said by clients, and anybody can say anything.  A stranger who says little stays unseen
    longer; a client that may relay can get its own trust suspended, and nobody else's.
Promise: pure.  What counts is how many different organisations speak from one address, for that a machine, a branch
    office, a smarthost or a sender of newsletters does not have: how many messages, reverse-paths or inner names there
    are counts nothing.  No sign alone, however often it is seen, reaches the threshold from one machine.
Sources: RFC 5321 §4.1.1.1 (EHLO) and §4.1.3 (address literals), §4.5.5 (null reverse-path); RFC 1918, RFC 4193,
    RFC 6598 (addresses that strangers cannot have); RFC 6761, RFC 6762, RFC 8375 and custom (names used inside).

An organisation is told by the last two labels of a name, three below a country's "co.uk".  No list of public suffixes
is asked: where two organisations are taken for one, a stranger is seen a little later, and nobody is suspended wrongly.
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network
from typing import NamedTuple

from gatepost.facts import Evidence, IPAddress, Session
from gatepost.policy.relay import NetworkTable, RelayRules, grants, suspendable, withheld
from gatepost.smtp.path import Mailbox, NullReversePath, ReversePath

THRESHOLD = 100

# What each organisation more than the first is worth; one organisation may stand behind any address.
PUBLIC_NAME = 25  # a public name that is not ours, in EHLO
INBOUND_DOMAIN = 12  # mail for us as from a stranger; counts no more often than there are different clients
REVERSE_DOMAIN = 8  # a stranger's reverse-path; counts no more often than there are public names
FINGERPRINT = 4  # of TLS; counts no more often than there are public names
# What counts once.
ON_THE_WAY = 30  # the address is one at which sources are commonly lost: default route, bridge, own interface
PRIVATE_ADDRESS = 5  # public names are said from an address that no stranger has
BOUNCES = 5  # to us, with the null reverse-path

NAMES_SHOWN = 5

_INSIDE: NetworkTable[bool] = NetworkTable()
# fmt: off
for _network in (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16",
    "::/127", "fc00::/7", "fe80::/10",
):
    _INSIDE.add(ip_network(_network), True)
_INSIDE_TOP_LEVELS = frozenset({
    "arpa", "corp", "domain", "gateway", "home", "internal", "intranet", "ip", "lab", "lan", "local", "localdomain",
    "localhost", "mshome", "office", "private", "router", "workgroup",
})
_INSIDE_ORGANISATIONS = frozenset({"fritz.box"})
# Second labels under which a country registers names.
_REGISTRIES = frozenset({
    "ac", "asn", "asso", "co", "com", "edu", "gob", "gouv", "gov", "go", "gv", "id", "in", "ind", "info", "ltd", "me",
    "mil", "mod", "ne", "net", "nhs", "nic", "nom", "or", "org", "plc", "sch", "web",
})
# fmt: on
_NAME = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)+(?:xn--[a-z0-9-]{1,59}|[a-z]{2,63})")
_PLAIN = re.compile(r"[^!-~]")  # what a word of evidence must not hold
_IPV4_POOL_BITS, _IPV6_POOL_BITS = 16, 32  # addresses of one provider's customers, which change daily

_MEND = (
    "Most likely something on the way (a container's userland proxy, NAT, a load balancer) puts its own address in the "
    "place of each client's: let it say who comes (PROXY protocol, and its address in proxy_from of the listener), or "
    "run the gate on the host's network, or set externalTrafficPolicy: Local in Kubernetes, or turn the container "
    "engine's userland-proxy off; docs/howto/addresses.md tells how"
)
_MEND_LISTENER = (
    "The listener can be reached from outside: give it an address that only the inside reaches, or trust networks in "
    "the place of the listener; docs/howto/addresses.md tells how"
)


class Judgement(NamedTuple):
    """What the evidence comes to.

    Attributes:
        score: of ``THRESHOLD``; sentences: the evidence, each sign in words, that weighs most first.
        mend: what to do about it, for the operator.
    """

    score: int
    sentences: tuple[str, ...]
    mend: str

    @property
    def suspicious(self) -> bool:
        """Whether the trust is to be suspended."""
        return self.score >= THRESHOLD


# ---- who is watched


class Watched(NamedTuple):
    """What of a session's trust rests on where its client comes from: the address itself, the listener it came to."""

    address: bool
    listen: bool


def watched(rules: RelayRules, session: Session) -> Watched:
    """Whether some grant trusts the client's address or its listener, and may be suspended."""
    entries = [entry for entry in (*grants(rules, session), *withheld(rules, session)) if suspendable(entry)]
    return Watched(bool(entries), any(entry.listen for entry in entries))


def is_private(address: IPAddress) -> bool:
    """Whether no stranger on the Internet can have this address."""
    return bool(_INSIDE.matching(address))


# ---- what one session shows


def our_organisations(rules: RelayRules, name: str) -> frozenset[str]:
    """Whose names are no strangers': of the local domains, of this host, of whatever the operator named in rules."""
    domains: list[str] = [name, *(local.pattern.removeprefix("*.") for local in rules.local)]
    domains += [entry.host for entry in rules.trust if entry.host]
    for patterns in (*(e.reverse_paths for e in rules.trust), *(route.forward_paths for route in rules.routes)):
        domains += [pattern.domain for pattern in patterns if isinstance(pattern.domain, str)]
    return frozenset(filter(None, map(organisation, domains)))


@lru_cache(maxsize=4096)  # the same clients say the same again
def organisation(name: str) -> str:
    """Whose name this is: "example.com" for mail.example.com; "" where it is not a public name."""
    name = name.lower().rstrip(".")
    if not _NAME.fullmatch(name):
        return ""
    labels = name.split(".")
    if labels[-1] in _INSIDE_TOP_LEVELS:
        return ""
    length = 3 if len(labels) > 2 and len(labels[-1]) == 2 and labels[-2] in _REGISTRIES else 2
    found = ".".join(labels[-length:])
    return "" if found in _INSIDE_ORGANISATIONS else found


def shown(
    session: Session,
    ours: frozenset[str],
    fingerprint: str = "",
    reverse_path: ReversePath | None = None,
    *,
    inbound: bool = False,
) -> Evidence:
    """The signs in a session, whose client comes from a trusted address.

    A reverse-path of a public domain from a private address is what makes SPF fail: no domain lists private addresses,
    so each such message of a stranger fails it, whatever DNS would say.  Many of them are "SPF failing en masse",
    without a question to DNS.  A smarthost's and a device's own fail as well, which is why they count only together
    with different public names.

    Args:
        ours: from ``our_organisations``; fingerprint: "" without TLS.
        reverse_path: of the transaction, None where there is none yet; inbound: its forward-path is local.
    """
    who, foreign = _claimed(session.hello, ours)
    sent_by = ""
    if isinstance(reverse_path, Mailbox) and isinstance(reverse_path.domain, str):
        sent_by = organisation(reverse_path.domain)
        sent_by = "" if sent_by in ours else sent_by
    return Evidence(
        hellos=_word(who),
        public_names=_word(who if foreign else ""),
        reverse_domains=_word(sent_by),
        inbound_domains=_word(sent_by if inbound else ""),
        bounces=_word(who if inbound and isinstance(reverse_path, NullReversePath) else ""),
        fingerprints=_word(fingerprint),
    )


def public_client(address: IPAddress) -> Evidence:
    """The sign at a listener that is meant for the inside; nothing where the client is inside."""
    return Evidence() if is_private(address) else Evidence(public_clients=(str(address),))


def _claimed(hello: str, ours: frozenset[str]) -> tuple[str, bool]:
    """Whom a client says to be, as one word for all machines of an organisation, and whether that is a stranger."""
    name = hello.lower().rstrip(".")
    if name.startswith("["):
        try:
            address = ip_address(name.strip("[]").removeprefix("ipv6:"))
        except ValueError:
            return name, False
        return (name, False) if is_private(address) else (_pool(address), True)
    found = organisation(name)
    return (found, found not in ours) if found else (name, False)


def _pool(address: IPAddress) -> str:
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    bits = _IPV4_POOL_BITS if address.version == 4 else _IPV6_POOL_BITS
    network = ip_network((address, bits), strict=False)
    return f"[{network}]"


def _word(text: str) -> tuple[str, ...]:
    return (_PLAIN.sub("?", text),) if text else ()


# ---- what it comes to


def judge(evidence: Evidence, address: IPAddress, stands_for: str = "") -> Judgement:
    """Weigh what was seen from one trusted address.

    Args:
        stands_for: what the address is to this host, such as "this host's default route"; "" for nothing special.
    """
    names, clients = len(evidence.public_names), len(evidence.hellos)
    inbound = min(len(evidence.inbound_domains), clients)
    reverse = min(len(evidence.reverse_domains), names)
    ways = min(len(evidence.fingerprints), names)
    told = {
        f"clients called themselves by public names of {names} organisations that are not ours: "
        f"{_some(evidence.public_names)}": PUBLIC_NAME * _more_than_one(names),
        "mail for our domains came with strangers' reverse-paths, as it comes from outside: "
        f"{_some(evidence.inbound_domains)}": INBOUND_DOMAIN * _more_than_one(inbound),
        "their reverse-paths were of strangers' domains, whose SPF such an address fails: "
        f"{_some(evidence.reverse_domains)}": REVERSE_DOMAIN * _more_than_one(reverse),
        f"they spoke TLS in different ways: {_some(evidence.fingerprints)}": FINGERPRINT * _more_than_one(ways),
        "bounces came for our domains": BOUNCES * bool(evidence.bounces),
        "public names were said from a private address": PRIVATE_ADDRESS * bool(names and is_private(address)),
        f"the address is {stands_for}, where those of clients are commonly lost": ON_THE_WAY * bool(stands_for),
    }
    return _judgement(told, _MEND)


def judge_listener(evidence: Evidence) -> Judgement:
    """A listener whose clients are all trusted is for the inside: one public address there is one too many."""
    seen = evidence.public_clients
    return _judgement(
        {f"clients came to it from public addresses: {_some(seen)}": THRESHOLD * bool(seen)}, _MEND_LISTENER
    )


def _judgement(points: dict[str, int], mend: str) -> Judgement:
    """Args: points: of each sign in words."""
    weighed = sorted((sentence for sentence in points if points[sentence]), key=lambda sentence: -points[sentence])
    return Judgement(sum(points.values()), tuple(weighed), mend)


def _more_than_one(number: int) -> int:
    return max(number - 1, 0)


def _some(words: tuple[str, ...]) -> str:
    more = f" and {len(words) - NAMES_SHOWN} more" if len(words) > NAMES_SHOWN else ""
    return ", ".join(words[:NAMES_SHOWN]) + more
