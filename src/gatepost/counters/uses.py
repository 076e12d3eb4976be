"""When each grant last let mail through, and since when that is watched.

Why: a grant that nobody uses any more is a door that nobody looks after.  A gate that has just been set up must not say
    so of all its grants, so that the beginning of the watch is kept as well.
Trust: keys are made of what the administrator wrote; nothing that a client said is kept.
Promise: a use is written at most once in ``REFRESH_S`` for each grant and worker; otherwise it costs one look into a
    dictionary.  With the counters it may be lost: then the watch begins anew, and a warning comes later, never sooner.
Sources: none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

from gatepost.counters.distinct import seconds
from gatepost.counters.store import USE, Store

USE_S_MAX = 400 * 86_400.0
REFRESH_S = 3600.0
_DIGEST_OCTETS = 16


class Use(NamedTuple):
    """What is known of one grant.

    Attributes:
        watched_s, used_s: seconds since the epoch: since when it is watched, and when it let mail through last, to
            within ``REFRESH_S``; None for not since then.
    """

    watched_s: int
    used_s: int | None


class Uses:
    """The uses in a store.  A grant is known by a text that says what it grants, wherever it stands."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._noted: dict[str, float] = {}

    def watch(self, grants: Iterable[str], now_s: float) -> None:
        """These grants are there now: watch those that are new, and keep for longer what is known of the others."""

        def change(old: bytes | None) -> tuple[bytes, float]:
            return old or _octets(Use(seconds(now_s), None)), USE_S_MAX

        for grant in dict.fromkeys(grants):
            self._store.update(_key(grant), now_s, change)

    def used(self, grant: str, now_s: float) -> None:
        """The grant let mail through."""
        noted_s = self._noted.get(grant)
        if noted_s is not None and now_s - REFRESH_S < noted_s <= now_s:
            return
        self._noted[grant] = now_s

        def change(old: bytes | None) -> tuple[bytes, float]:
            watched_s = seconds(now_s) if old is None else _use(old).watched_s
            return _octets(Use(watched_s, seconds(now_s))), USE_S_MAX

        self._store.update(_key(grant), now_s, change)

    def of(self, grants: Iterable[str], now_s: float) -> list[Use | None]:
        """What is known of each of these grants, in their order; None where it is not watched yet."""
        found = self._store.read([_key(grant) for grant in grants], now_s)
        return [None if octets is None else _use(octets) for octets in found]


def _key(grant: str) -> bytes:
    return USE + hashlib.blake2b(grant.encode(), digest_size=_DIGEST_OCTETS).digest()


def _octets(use: Use) -> bytes:
    return b"%d %d" % (use.watched_s, use.used_s or 0)


def _use(octets: bytes) -> Use:
    watched_s, used_s = map(int, octets.split())
    return Use(watched_s, used_s or None)
