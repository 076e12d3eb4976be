"""How many sessions a client has, and began in the last minute, counted over all workers without a lock.

Why: SO_REUSEPORT spreads one client's connections over the workers, so a limit that each worker counted alone would be
    as many times too wide.  The answer is needed before the greeting, so it may cost a few microseconds and no wait.
Trust: addresses are chosen by whoever attacks.  Places are chosen by a keyed hash whose key is new at each start, so
    that nobody can aim at another client's places.  An IPv6 client is its /64, which one customer owns as a whole.
Promise: each worker writes its own row only.  The counts are never too low but for the race named below, and too high
    only by strangers that share *both* places of a client:

    - Sessions: two places among 32,768 each; the smaller count is the answer (a count-min sketch).  With H clients at
      their limit at once, an innocent client is refused with a probability of about (H / 32,768)^2: 80 clients with 50
      sessions each (the default 4,000 sessions): 6 in a million.
    - Begun in the last minute: two places among 16,384 each, two buckets a place (this minute and the one before).  The
      estimate weighs the minute before by the part of it that is still within sixty seconds; it is exact for a steady
      client and at most the count of both minutes.  With N sessions a minute from clients of few sessions, the estimate
      is too high by about N / 16,384.
    - Two workers that admit a client at the same instant may each miss the other's: a limit is overrun by at most
      the number of workers less one.

Sources: Cormode and Muthukrishnan, "An improved data stream summary: the count-min sketch" (2005).
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address

_PLACES = 32_768
_RATE_PLACES = 16_384
_ROW_OCTETS = 8 + 2 * _PLACES * 4 + 2 * _RATE_PLACES * 8  # sessions in all, sessions by client, begun by client
_KEY_OCTETS = 16
_HEADER_OCTETS = _KEY_OCTETS  # then the rows; how many there are, the memory's sealed size says
_COUNT_MAX = 0xFFFF
_MINUTE_S = 60.0
_PLACES_OF = struct.Struct("<4H").unpack


class Occupancy:
    """The table, with one row to write.

    Args:
        memory: ``size_octets(workers)`` octets, laid out by ``format``.
        row: the row this worker writes.
    """

    __slots__ = (
        "_begun",
        "_counts",
        "_hasher",
        "_memory",
        "_other_begun",
        "_other_counts",
        "_places",
        "_rows",
        "_total",
        "_totals",
    )

    def __init__(self, memory: memoryview, row: int) -> None:
        self._memory = memory
        self._rows, rest = divmod(len(memory) - _HEADER_OCTETS, _ROW_OCTETS)
        if rest:
            raise ValueError("Gatepost was replaced on disk while it ran: restart it as a whole")
        if not 0 <= row < self._rows:
            raise ValueError(f"there is no row {row}, there are {self._rows}")
        self._hasher = hashlib.blake2b(key=bytes(memory[:_KEY_OCTETS]), digest_size=8)
        # One session asks three times.
        self._places = lru_cache(maxsize=4096)(self._hash)
        rows = [self._row(number) for number in range(self._rows)]
        totals = [octets[:8].cast("Q") for octets in rows]
        counts = [octets[8 : 8 + 2 * _PLACES * 4].cast("I") for octets in rows]
        begun = [octets[8 + 2 * _PLACES * 4 :].cast("Q") for octets in rows]
        self._total, self._counts, self._begun = totals[row], counts[row], begun[row]
        self._totals = tuple(totals)
        self._other_counts = tuple(view for number, view in enumerate(counts) if number != row)
        self._other_begun = tuple(view for number, view in enumerate(begun) if number != row)

    @staticmethod
    def size_octets(workers: int) -> int:
        """Memory for so many workers."""
        return _HEADER_OCTETS + workers * _ROW_OCTETS

    @staticmethod
    def format(memory: memoryview) -> None:
        """Lay out zeroed memory with a new key; the supervisor calls this before anybody else sees it."""
        memory[:_KEY_OCTETS] = secrets.token_bytes(_KEY_OCTETS)

    @classmethod
    def private(cls, workers: int = 1, row: int = 0) -> Occupancy:
        """A table in memory of this process's own, for tests and tools."""
        memory = memoryview(bytearray(cls.size_octets(workers)))
        cls.format(memory)
        return cls(memory, row)

    def _row(self, row: int) -> memoryview:
        start = _HEADER_OCTETS + row * _ROW_OCTETS
        return self._memory[start : start + _ROW_OCTETS]

    def _hash(self, prefix: bytes) -> tuple[int, int, int, int]:
        hasher = self._hasher.copy()
        hasher.update(prefix)
        first, second, third, fourth = _PLACES_OF(hasher.digest())
        return first % _PLACES, _PLACES + second % _PLACES, third % _RATE_PLACES, _RATE_PLACES + fourth % _RATE_PLACES

    def enter(self, address: IPv4Address | IPv6Address) -> int:
        """A session begins; each ``enter`` has its ``leave``, also where the session is refused.

        Args:
            address: the client's, mapped addresses already IPv4 (facts.client_address).

        Returns:
            The client's sessions in all workers, this one included.
        """
        a, b, _, _ = self._places(address.packed[:8])  # four octets of IPv4, or the /64
        counts = self._counts
        self._total[0] += 1
        here, there = counts[a] + 1, counts[b] + 1
        counts[a] = here
        counts[b] = there
        for row in self._other_counts:
            here += row[a]
            there += row[b]
        return min(here, there)

    def leave(self, address: IPv4Address | IPv6Address) -> None:
        """A session that entered has ended."""
        a, b, _, _ = self._places(address.packed[:8])  # four octets of IPv4, or the /64
        counts = self._counts
        if self._total[0] and counts[a] and counts[b]:  # never below nothing, whatever else went wrong
            self._total[0] -= 1
            counts[a] -= 1
            counts[b] -= 1

    def sessions(self) -> int:
        """Sessions in all workers, this moment."""
        return sum([total[0] for total in self._totals])

    def arrive(self, address: IPv4Address | IPv6Address, now_s: float) -> int:
        """A session begins: counted against the client's rate, also where it is then refused.

        Args:
            now_s: the monotonic clock, which all processes of a machine share.

        Returns:
            Sessions the client began in the last sixty seconds in all workers, this one included.
        """
        _, _, c, d = self._places(address.packed[:8])  # four octets of IPv4, or the /64
        minute, second = divmod(now_s, _MINUTE_S)
        now = int(minute) & 0xFFFFFFFF
        share = 1.0 - second / _MINUTE_S
        estimate = float("inf")
        for place in (c, d):
            before, here = _buckets(self._begun[place], now)
            here = min(here + 1, _COUNT_MAX)
            self._begun[place] = now << 32 | before << 16 | here  # one word, so that no reader sees half of it
            for row in self._other_begun:
                theirs_before, theirs = _buckets(row[place], now)
                before += theirs_before
                here += theirs
            estimate = min(estimate, here + before * share)
        return int(estimate)

    def clear(self, row: int) -> None:
        """A worker died: its sessions are over.  Its part in the rates stays.  The supervisor alone calls this."""
        octets = self._row(row)
        octets[: 8 + 2 * _PLACES * 4] = bytes(8 + 2 * _PLACES * 4)


def _buckets(word: int, now: int) -> tuple[int, int]:
    """(minute before, this minute) of one place, as seen in minute ``now``."""
    age = (now - (word >> 32)) & 0xFFFFFFFF
    if age == 0:
        return word >> 16 & _COUNT_MAX, word & _COUNT_MAX
    if age == 1:
        return word & _COUNT_MAX, 0
    return 0, 0
