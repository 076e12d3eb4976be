"""The last good secret of each user, as a digest that all workers share.

Why: a worker believes a good login again for a while without asking the server that knows; when the user has changed
    the secret, and another worker has seen that, the old one is not to be believed any more.
Trust: only secrets that a verifier said yes to come here.
Promise: see ``digests`` for what is kept of a secret.  Where nothing is kept (it is over, or was lost), nothing is
    known, and the verifier is asked.
"""

from __future__ import annotations

from collections.abc import Callable

from gatepost.counters.digests import Digests
from gatepost.counters.store import LAST_GOOD, Store

FRESH_S = 86_400.0  # longer than any login is believed without asking


class Freshness:
    """What each user's secret was when it was last right, over all workers of the gate.

    Args:
        now: the clock, seconds since the epoch.
    """

    def __init__(self, store: Store, digests: Digests, now: Callable[[], float]) -> None:
        self._store = store
        self._digests = digests
        self._now = now

    def last_good(self, user: str) -> bytes | None:
        """The digest of the secret that was last right, where one is known."""
        return self._store.read((self._key(user),), self._now())[0]

    def set_last_good(self, user: str, secret: str) -> None:
        """This secret was right just now."""
        digest = self.digest(user, secret)
        self._store.update(self._key(user), self._now(), lambda _: (digest, FRESH_S))

    def digest(self, user: str, secret: str) -> bytes:
        """What ``last_good`` gives where this was the secret: compare the two with ``hmac.compare_digest``."""
        return self._digests.secret(user, secret)

    def _key(self, user: str) -> bytes:
        return LAST_GOOD + self._digests.name(user)
