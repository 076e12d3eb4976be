"""Who is banned: a network, for everybody or for one account, until when, why, and who said so.

Why: what a guesser may no longer do stands where an operator can see it, end it, and add to it, while the gate runs.
Trust: account names in automatic bans were typed by strangers: bounded here, made printable where they are shown.
Promise: the question "is this client banned" costs one read of the store where there is no ban, and one more where
    there is any.  An IPv6 client is its /64, which one customer owns as a whole: no ban is narrower.
    An automatic ban holds for nobody who is never banned: whom ``spared`` names, and addresses with good logins lately.
    What an operator bans is banned.
Sources: none.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_network
from typing import NamedTuple

from gatepost.counters.digests import NAME_OCTETS_MAX, Digests, cut
from gatepost.counters.store import ACCOUNT_BAN, BAN, GOOD_ADDRESS, GOOD_PAIR, LENGTHS, RECORDS_MAX, Store
from gatepost.facts import IPAddress

IPNetwork = IPv4Network | IPv6Network

AUTOMATIC = "the gate"  # made these bans itself; no user of a system has a name with a space
WHY_OCTETS_MAX = 300
BY_OCTETS_MAX = 64
IPV6_CLIENT_BITS = 64

_LENGTH = struct.Struct(">Bd")  # a prefix length in use, and until when
_IPV6_LENGTHS = 33  # lengths 0 to 32 are of IPv4, from here on of IPv6
_LENGTHS_KEY = LENGTHS


class Ban(NamedTuple):
    """One ban.

    Attributes:
        network: of IPv6 at least a /64.
        account: "" for every account, and for sessions without one.
        until_s: seconds since the epoch; infinity until it is removed.
        by: ``AUTOMATIC``, or the operator.
    """

    network: IPNetwork
    account: str
    until_s: float
    why: str
    by: str


def client_network(address: IPAddress) -> IPNetwork:
    """The client that an address stands for: the IPv4 address itself, the IPv6 /64."""
    return ip_network((address, 32 if isinstance(address, IPv4Address) else IPV6_CLIENT_BITS), strict=False)


class Bans:
    """The bans in a store.

    Args:
        spared: whether a client is never banned by the gate itself: its proxies, its own addresses, trusted clients.
    """

    def __init__(
        self, store: Store, digests: Digests, *, spared: Callable[[IPAddress], bool] = lambda _: False
    ) -> None:
        self._store = store
        self._digests = digests
        self.spared = spared

    def any(self, now_s: float) -> bool:
        """Whether anybody is banned, now or a moment ago: where not, nobody need be looked for."""
        return self._store.read((_LENGTHS_KEY,), now_s)[0] is not None

    def client(self, address: IPAddress, now_s: float) -> Ban | None:
        """The ban of this client, whatever account it would use; asked once a connection."""
        return self._first(BAN, address, b"", now_s)

    def account(self, address: IPAddress, account: str, now_s: float) -> Ban | None:
        """The ban of this client, or of this client with this account."""
        return self.client(address, now_s) or self._first(ACCOUNT_BAN, address, self._digests.name(account), now_s)

    def _first(self, kind: bytes, address: IPAddress, whose: bytes, now_s: float) -> Ban | None:
        lengths = self._store.read((_LENGTHS_KEY,), now_s)[0]
        if lengths is None:
            return None
        keys = [
            _key(kind, code, _masked(address, bits), whose)
            for code, until_s in _LENGTH.iter_unpack(lengths)
            if until_s > now_s and (bits := _bits(code, address)) is not None
        ]
        found = [_ban(value) for value in self._store.read(keys, now_s) if value is not None]
        found = [ban for ban in found if ban.by != AUTOMATIC or not self._never(address, whose, now_s)]
        return max(found, key=lambda ban: ban.until_s, default=None)

    def _never(self, address: IPAddress, whose: bytes, now_s: float) -> bool:
        return self.spared(address) or self.known(address, whose, now_s)

    def known(self, address: IPAddress, whose: bytes, now_s: float) -> bool:
        """Whether there was a good login lately from this client: of anybody, or of the one with this name's digest."""
        key = good_pair_key(address, whose) if whose else good_address_key(address)
        return self._store.read((key,), now_s)[0] is not None

    def add(self, ban: Ban, now_s: float) -> Ban:
        """Ban, in the place of what was banned so before.

        Returns:
            The ban as it is kept: an IPv6 network as a /64 at least, texts cut to their bounds.
        """
        ban = _kept(ban)
        ttl_s = ban.until_s - now_s
        self._store.update(self._key_of(ban), now_s, lambda _: (_octets(ban), ttl_s))
        self._use_length(ban, now_s)
        return ban

    def begin(self, ban: Ban, now_s: float) -> bool:
        """Ban, unless it is banned so already.

        Returns:
            Whether this ban is new.
        """
        new = False

        def change(old: bytes | None) -> tuple[bytes, float] | None:
            nonlocal new
            new = old is None
            return (_octets(kept), kept.until_s - now_s) if new else None

        kept = _kept(ban)
        self._store.update(self._key_of(kept), now_s, change)
        if new:
            self._use_length(kept, now_s)
        return new

    def remove(self, network: IPNetwork, account: str, now_s: float) -> bool:
        """End a ban.

        Args:
            network: exactly as it was banned; account: "" for the ban of every account.

        Returns:
            Whether there was one.
        """
        return self._store.remove(self._key_of(_kept(Ban(network, account, math.inf, "", ""))), now_s)

    def all(self, now_s: float) -> list[Ban]:
        """Every ban in force, by network and account."""
        items = self._store.items(BAN, now_s, RECORDS_MAX)
        items += self._store.items(ACCOUNT_BAN, now_s, RECORDS_MAX)
        return sorted((_ban(item.value) for item in items), key=_order)

    def _key_of(self, ban: Ban) -> bytes:
        address, length = ban.network.network_address, ban.network.prefixlen
        code = length if isinstance(address, IPv4Address) else _IPV6_LENGTHS + length
        if ban.account:
            return _key(ACCOUNT_BAN, code, address.packed, self._digests.name(ban.account))
        return _key(BAN, code, address.packed, b"")

    def _use_length(self, ban: Ban, now_s: float) -> None:
        """Let the question be asked with this prefix length as long as the ban holds."""
        code = self._key_of(ban)[1]

        def change(old: bytes | None) -> tuple[bytes, float] | None:
            lengths = {code: until_s for code, until_s in _LENGTH.iter_unpack(old or b"") if until_s > now_s}
            if lengths.get(code, 0.0) >= ban.until_s:
                return None
            lengths[code] = ban.until_s
            return b"".join(_LENGTH.pack(*length) for length in lengths.items()), max(lengths.values()) - now_s

        self._store.update(_LENGTHS_KEY, now_s, change)


def good_address_key(address: IPAddress) -> bytes:
    """Of the record that somebody logged in well from this client."""
    return GOOD_ADDRESS + _client_octets(address)


def good_pair_key(address: IPAddress, whose: bytes) -> bytes:
    """Of the record that this user (the digest of the name) logged in well from this client."""
    return GOOD_PAIR + _client_octets(address) + whose


def _client_octets(address: IPAddress) -> bytes:
    return address.packed[: IPV6_CLIENT_BITS // 8]  # four octets of IPv4, or the /64


def _bits(code: int, address: IPAddress) -> int | None:
    """The prefix length that a code stands for, where it is of the address's version."""
    if isinstance(address, IPv4Address):
        return code if code < _IPV6_LENGTHS else None
    return code - _IPV6_LENGTHS if code >= _IPV6_LENGTHS else None


def _masked(address: IPAddress, bits: int) -> bytes:
    rest = address.max_prefixlen - bits
    return (int(address) >> rest << rest).to_bytes(address.max_prefixlen // 8, "big")


def _key(kind: bytes, code: int, network: bytes, whose: bytes) -> bytes:
    return kind + bytes((code,)) + network + whose


def _kept(ban: Ban) -> Ban:
    network = ban.network
    if isinstance(network, IPv6Network) and network.prefixlen > IPV6_CLIENT_BITS:
        network = network.supernet(new_prefix=IPV6_CLIENT_BITS)
    account = cut(ban.account, NAME_OCTETS_MAX)
    return Ban(network, account, ban.until_s, cut(ban.why, WHY_OCTETS_MAX), cut(ban.by, BY_OCTETS_MAX))


def _octets(ban: Ban) -> bytes:
    return json.dumps([str(ban.network), ban.account, ban.until_s, ban.why, ban.by]).encode()


def _ban(octets: bytes) -> Ban:
    network, account, until_s, why, by = json.loads(octets)
    return Ban(ip_network(network), account, until_s, why, by)


def _order(ban: Ban) -> tuple[int, int, int, str]:
    network = ban.network
    return network.version, int(network.network_address), network.prefixlen, ban.account
