"""The last good secret of each user, as a digest that all workers share.

Why: a worker believes a good login again for a while without asking the server that knows; when the user has changed
    the secret, and another worker has seen that, the old one is not to be believed any more.
Trust: marks are made by whoever verified a secret, of secrets that were right.
Promise: a mark is some octets of a digest under ``key``, which is of this directory alone; the secret is not seen here.
    Where nothing is kept (it is over, or was lost), nothing is known, and the verifier is asked.
"""

from __future__ import annotations

from collections.abc import Callable

from gatepost.counters.digests import Digests
from gatepost.counters.store import LAST_GOOD, Store

FRESH_S = 86_400.0  # longer than any login is believed without asking


class Freshness:
    """The mark of each user's secret when it was last right, over all workers of the gate.

    Args:
        now: the clock, seconds since the epoch.
    """

    def __init__(self, store: Store, digests: Digests, now: Callable[[], float]) -> None:
        self._store = store
        self._digests = digests
        self._now = now

    @property
    def key(self) -> bytes:
        """What marks are made with, the same in all workers."""
        return self._digests.mark_key

    def last_good(self, user: str) -> bytes | None:
        """The mark of the secret that was last right; None where nobody knows."""
        return self._store.read((self._key_of(user),), self._now())[0]

    def set_last_good(self, user: str, mark: bytes) -> None:
        """The secret of this mark was right just now."""
        self._store.update(self._key_of(user), self._now(), lambda _: (mark, FRESH_S))

    def _key_of(self, user: str) -> bytes:
        return LAST_GOOD + self._digests.name(user)
