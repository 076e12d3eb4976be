"""Records with an end, and the few things one can do to them.

Why: guesses, bans, logins and digests differ in meaning only.  Behind these five primitives they may lie in a file that
    the workers of one machine share (``embedded``), in this process's memory (below), or on a server of records.
Trust: keys and values are made by this package from what strangers chose; both are bounded here once more.
Promise: no method raises because the store is full or broken: what must go is over already, or would be over first.
    Each kind of record has room of its own, so that no flood of one kind drives out another.
Sources: none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

KEY_OCTETS_MAX = 64
VALUE_OCTETS_MAX = 4096
SWEEP_RECORDS = 4  # how many that are over a write takes away, so that it stays short
CLOCK_BACK_S_MAX = 86_400.0  # a record from further in the future was written by a clock that was wrong

RECORDS_MAX = 65_536  # of each kind

# Kinds of record: the first octet of a key.
PAIR, USER, PREFIX = b"p", b"u", b"c"  # wrong secrets of (user, prefix) and of a user; users tried from a prefix
GOOD_ADDRESS, GOOD_PAIR = b"g", b"h"  # good logins: from an address; of a user, from a place
BAN, ACCOUNT_BAN, LENGTHS = b"b", b"x", b"l"  # of a client; of a client with one account; prefix lengths in use
LOGIN, LAST_GOOD = b"m", b"f"  # to the mailbox server, from an address; the mark of a user's last good secret
EVIDENCE, SUSPENSION, RESUMED = b"e", b"s", b"r"  # of a trusted source: what was seen, until when it is not trusted
USE = b"t"  # of a grant: since when it is watched, and when it let mail through last
KINDS = (
    PAIR,
    USER,
    PREFIX,
    GOOD_ADDRESS,
    GOOD_PAIR,
    BAN,
    ACCOUNT_BAN,
    LENGTHS,
    LOGIN,
    LAST_GOOD,
    EVIDENCE,
    SUSPENSION,
    RESUMED,
    USE,
)


class Item(NamedTuple):
    """A record as it is listed.

    Attributes:
        until_s: when it is over, seconds since the epoch; infinity for never.
    """

    key: bytes
    value: bytes
    until_s: float


Change = Callable[[bytes | None], tuple[bytes, float] | None]


class Store(Protocol):
    """Records by key.  A key begins with the octet of its kind.

    Times are seconds since the epoch, as the caller's clock has them.  A record holds from ``CLOCK_BACK_S_MAX`` before
    it was written until its end: a clock that is set back an hour opens nothing, one that was years ahead leaves
    nothing behind.  What has no end holds whatever the clock says.
    """

    def read(self, keys: Sequence[bytes], now_s: float) -> list[bytes | None]:
        """The values that hold, in the order of the keys; all of one moment."""
        ...

    def update(self, key: bytes, now_s: float, change: Change) -> None:
        """Replace one value by what ``change`` makes of it, with no other change in between.

        Args:
            change: takes the value that holds, or None; gives the new one and how long it holds (seconds, infinity for
                ever), or None to leave all as it is.  It may be called more than once, and only the last time counts.
        """
        ...

    def remove(self, key: bytes, now_s: float) -> bool:
        """Take a record away.

        Returns:
            Whether there was one that held.
        """
        ...

    def items(self, kind: bytes, now_s: float, limit: int) -> list[Item]:
        """Records of this kind that hold, in the order of their keys, at most so many."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


def holds(written_s: float, until_s: float, now_s: float) -> bool:
    """Whether a record written then, to end then, holds now."""
    return until_s == math.inf or written_s - CLOCK_BACK_S_MAX <= now_s < until_s


def checked(key: bytes, value: bytes) -> bytes:
    """The value, where both are of a size that can be kept: what makes them bounds them.

    Raises:
        ValueError: a fault of ours.
    """
    if key[:1] not in KINDS or len(key) > KEY_OCTETS_MAX or len(value) > VALUE_OCTETS_MAX:
        raise ValueError(f"no record: key of {len(key)} octets, value of {len(value)} octets")
    return value


class MemoryStore:
    """Records in the memory of this process: what is left when the shared file fails.

    Beyond the greatest number of a kind the record that was written longest ago goes.
    """

    def __init__(self) -> None:
        self._kinds: dict[bytes, dict[bytes, tuple[bytes, float, float]]] = {kind: {} for kind in KINDS}

    def read(self, keys: Sequence[bytes], now_s: float) -> list[bytes | None]:
        return [self._value(key, now_s) for key in keys]

    def _value(self, key: bytes, now_s: float) -> bytes | None:
        record = self._kinds[key[:1]].get(key)
        return record[0] if record is not None and holds(record[1], record[2], now_s) else None

    def update(self, key: bytes, now_s: float, change: Change) -> None:
        made = change(self._value(key, now_s))
        if made is None:
            return
        value, ttl_s = checked(key, made[0]), made[1]
        records = self._kinds[key[:1]]
        records.pop(key, None)  # the order of the dictionary is that of writing
        for old in [old for old in islice(records, SWEEP_RECORDS) if not holds(*records[old][1:], now_s)]:
            del records[old]
        while len(records) >= RECORDS_MAX:
            del records[next(iter(records))]
        records[key] = (value, now_s, now_s + ttl_s)

    def remove(self, key: bytes, now_s: float) -> bool:
        record = self._kinds[key[:1]].pop(key, None)
        return record is not None and holds(record[1], record[2], now_s)

    def items(self, kind: bytes, now_s: float, limit: int) -> list[Item]:
        live = (
            Item(key, value, until_s)
            for key, (value, written_s, until_s) in sorted(self._kinds[kind].items())
            if holds(written_s, until_s, now_s)
        )
        return list(islice(live, limit))

    def close(self) -> None:
        self._kinds = {kind: {} for kind in KINDS}
