"""Password guessing: counted by distinct wrong secrets and distinct users, slowed, then banned.

Why: log readers that ban whoever fails often ban the office, the proxy and the telephone with last year's password, and
    miss who tries one secret on each of a thousand accounts.  What tells a guesser is that the secrets differ, or the
    users do.
Trust: user names and secrets are a stranger's; no secret is kept, see ``digests``.
Promise:
    - The same wrong secret again and again counts once.
    - A right secret is never refused because of what strangers did elsewhere: a ban is of a client, or of a client
      prefix with one user, never of an account.
    - First the user's attempts from a prefix are slowed, then (prefix, user) is banned, then the address from which
      too many users were tried.  By prefix (IPv4 /24, IPv6 /64) attempts are counted together; banned as a whole is
      the address that tried once more than the bound allows, so that its neighbours may go on.
    - An address with good logins lately is not banned, nor is one that ``Bans.spared`` names; both are slowed.  The ban
      of (prefix, user) spares an address only where that very user logged in well from it: else the owner of one
      account could try secrets of all others without end.
    - One account attacked from many prefixes: its attempts are slowed, up to a bound, from prefixes where it never
      logged in well.
    - A mechanism that shows no secret (SCRAM) lets nobody see that a wrong secret is the same again: each failure
      counts as one more, up to the bound of a set.  The telephone with an old password is then known by its good
      logins of the last days.
Sources: RFC 4954 §4 and §6, RFC 5802 §9.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_network
from typing import NamedTuple

from gatepost.counters import distinct
from gatepost.counters.bans import (
    AUTOMATIC,
    IPV6_CLIENT_BITS,
    Ban,
    Bans,
    IPNetwork,
    client_network,
    good_address_key,
    good_pair_key,
)
from gatepost.counters.digests import Digests
from gatepost.counters.store import GOOD_PAIR, PAIR, PREFIX, USER, Store
from gatepost.facts import IPAddress

IPV4_PREFIX_BITS = 24
_SEEN = b"good"  # the one member of a record of good logins, for its time


@dataclass(frozen=True, slots=True)
class GuessLimits:
    """How much guessing is borne.

    Attributes:
        secrets_per_user: distinct wrong secrets of a user from one prefix, with which (prefix, user) is banned; at most
            ``distinct.MEMBERS_MAX``, as the two below.
        users_per_client: distinct users tried with wrong secrets from one prefix, with which the address is banned.
        secrets_from_everywhere: distinct wrong secrets of a user from all prefixes, from which its attempts are slowed
            where it never logged in well.
        window_s: how long an attempt counts.
        ban_s: how long a ban lasts; bait_ban_s: after the use of a bait account.
        good_s: how long a good login is remembered.
        delays_s: before the answer, by distinct wrong secrets of (prefix, user): none, one, two ...; the last for all
            beyond.  The longest is also that for an account attacked from everywhere.
    """

    secrets_per_user: int = 10
    users_per_client: int = 10
    secrets_from_everywhere: int = 20
    window_s: float = 3600.0
    ban_s: float = 3600.0
    bait_ban_s: float = 86_400.0
    good_s: float = 7 * 86_400.0
    delays_s: tuple[float, ...] = (0.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0)


class Look(NamedTuple):
    """What to do with an attempt before its secret is verified.

    Attributes:
        banned: refuse it as a wrong one, without asking anybody.
        delay_s: wait so long before the answer, whatever the answer.
    """

    banned: bool
    delay_s: float


class _Names(NamedTuple):
    """Of one attempt."""

    user: bytes
    pair: bytes
    prefix: bytes
    good_pair: bytes
    good_prefix: bytes


class Guesses:
    """The attempts at one gate, over all its workers."""

    def __init__(self, store: Store, digests: Digests, bans: Bans, limits: GuessLimits) -> None:
        for bound in (limits.secrets_per_user, limits.users_per_client, limits.secrets_from_everywhere):
            if not 1 <= bound <= distinct.MEMBERS_MAX:
                raise ValueError(f"a bound of distinct attempts is 1 to {distinct.MEMBERS_MAX}, not {bound}")
        self._store = store
        self._digests = digests
        self._bans = bans
        self._limits = limits

    def _names(self, user: str, client: IPAddress) -> _Names:
        whose, prefix = self._digests.name(user), _prefix(client).network_address.packed
        return _Names(
            user=USER + whose,
            pair=PAIR + prefix + whose,
            prefix=PREFIX + prefix,
            good_pair=good_pair_key(client, whose),
            good_prefix=GOOD_PAIR + b"*" + prefix + whose,
        )

    def look(self, user: str, client: IPAddress, now_s: float) -> Look:
        """Before a secret is verified.

        Args:
            user: as the client typed it; now_s: seconds since the epoch.
        """
        if self._bans.account(client, user, now_s) is not None:
            return Look(True, 0.0)
        names = self._names(user, client)
        pair, everywhere, good = self._store.read((names.pair, names.user, names.good_prefix), now_s)
        limits = self._limits
        delay_s = limits.delays_s[min(self._count(pair, now_s), len(limits.delays_s) - 1)]
        if good is None and self._count(everywhere, now_s) >= limits.secrets_from_everywhere:
            delay_s = max(limits.delays_s)
        return Look(False, delay_s)

    def wrong(self, user: str, client: IPAddress, secret: str | None, now_s: float) -> list[Ban]:
        """A secret was wrong, or there is no such user.

        Args:
            secret: None where the mechanism shows none.

        Returns:
            Bans that begin now, for the log.
        """
        names = self._names(user, client)
        guess = (
            self._digests.secret(user, secret) if secret is not None else secrets.token_bytes(distinct.MEMBER_OCTETS)
        )
        known = self._store.read((names.pair,), now_s)[0]
        if guess in distinct.members(known, now_s, self._limits.window_s):
            return []  # a telephone with an old password comes every few minutes, and costs one read
        limits, spared = self._limits, self._bans.spared(client)
        tried = self._note(names.pair, guess, now_s)
        self._note(names.user, guess, now_s)
        users = 0 if spared else self._note(names.prefix, names.user[1 : 1 + distinct.MEMBER_OCTETS], now_s)
        good_pair, good_address = self._store.read((names.good_pair, good_address_key(client)), now_s)
        found = []
        if tried >= limits.secrets_per_user and good_pair is None and not spared:
            why = f"{tried} wrong secrets for this account"
            found.append(Ban(_prefix(client), user, now_s + limits.ban_s, why, AUTOMATIC))
        if users >= limits.users_per_client and good_address is None:
            why = f"wrong secrets for {users} accounts from {_prefix(client)}"
            found.append(Ban(client_network(client), "", now_s + limits.ban_s, why, AUTOMATIC))
        return [ban for ban in found if self._bans.begin(ban, now_s)]

    def right(self, user: str, client: IPAddress, now_s: float) -> None:
        """The secret was right: the attempts before it were the user's own."""
        names = self._names(user, client)
        good_s = self._limits.good_s
        seen = distinct.packed({_SEEN: distinct.seconds(now_s)})

        def remembered(_: bytes | None) -> tuple[bytes, float]:
            return seen, good_s

        keys = (good_address_key(client), names.good_pair, names.good_prefix)
        tried, users, *good = self._store.read((names.pair, names.prefix, *keys), now_s)
        for key, value in zip(keys, good, strict=True):
            # Who logs in every minute is written down once in a while, not each time.
            if not distinct.members(value, now_s, good_s / 8):
                self._store.update(key, now_s, remembered)
        if tried is not None:
            self._store.remove(names.pair, now_s)
            self._forget(names.prefix, names.user[1 : 1 + distinct.MEMBER_OCTETS], users, now_s)

    def bait(self, user: str, client: IPAddress, now_s: float) -> Ban | None:
        """Somebody used a bait account: no honest client knows its name.

        Returns:
            The ban, for the log; None where the client is banned already, or never.
        """
        why = f"used the bait account {user}"
        ban = Ban(client_network(client), "", now_s + self._limits.bait_ban_s, why, AUTOMATIC)
        if self._bans.spared(client) or self._bans.known(client, b"", now_s):
            return None
        return ban if self._bans.begin(ban, now_s) else None

    def _count(self, value: bytes | None, now_s: float) -> int:
        return 0 if value is None else len(distinct.members(value, now_s, self._limits.window_s))

    def _note(self, key: bytes, member: bytes, now_s: float) -> int:
        """Put a member into the set.

        Returns:
            How many it has.
        """
        window_s, count = self._limits.window_s, 0

        def change(old: bytes | None) -> tuple[bytes, float]:
            nonlocal count
            found = distinct.members(old, now_s, window_s)
            found[member] = distinct.seconds(now_s)
            value = distinct.packed(found)
            count = len(value) // distinct.OCTETS_PER_MEMBER
            return value, window_s

        self._store.update(key, now_s, change)
        return count

    def _forget(self, key: bytes, member: bytes, old: bytes | None, now_s: float) -> None:
        """Take a member out of the set."""
        window_s = self._limits.window_s
        if member not in distinct.members(old, now_s, window_s):
            return

        def change(old: bytes | None) -> tuple[bytes, float]:
            found = distinct.members(old, now_s, window_s)
            found.pop(member, None)
            return distinct.packed(found), window_s

        self._store.update(key, now_s, change)


def _prefix(client: IPAddress) -> IPNetwork:
    """The network whose attempts are counted together."""
    return ip_network((client, IPV4_PREFIX_BITS if isinstance(client, IPv4Address) else IPV6_CLIENT_BITS), strict=False)
