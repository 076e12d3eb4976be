"""What was seen behind trusted addresses and at trusted listeners, and which of them are suspended.

Why: strangers behind one address meet different workers, and an operator wants to see and end a suspension from another
    process.  What the evidence comes to is for the policy to say; here it is kept.
Trust: all that is kept was said by clients: printable, bounded here, and told as theirs.
Promise: of each kind at most ``MEMBERS_MAX`` words are kept, for ``EVIDENCE_S_MAX``; beyond that the one seen longest
    ago is forgotten.  A suspension holds until an operator ends it, over restarts; with the counters it may be lost,
    and then the evidence is gathered again.  What was known when an operator resumed the trust counts no more, for
    ``FORGIVEN_S_MAX``: it does not suspend again what the operator has looked at.
    A session that shows what this process has noted lately costs no look at the store.
Sources: none.
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import lru_cache
from ipaddress import ip_address
from typing import NamedTuple

from gatepost.counters.digests import cut
from gatepost.counters.distinct import seconds
from gatepost.counters.store import EVIDENCE, RECORDS_MAX, RESUMED, SUSPENSION, Store
from gatepost.facts import Evidence, IPAddress

EVIDENCE_S_MAX = 3 * 86_400.0
FORGIVEN_S_MAX = 90 * 86_400.0
MEMBERS_MAX = 10
MEMBER_OCTETS_MAX = 48
SENTENCES_OCTETS_MAX = 3072
OPERATOR_OCTETS_MAX = 64
NOTED_MAX = 4096
REFRESH_S = 3600.0  # a word that is seen again is written again after so long
_LISTENER_DIGEST_OCTETS = 16

Source = IPAddress | str
"""A trusted address, or the name of a trusted listener."""


class Suspension(NamedTuple):
    """The trust in a source does not hold, until an operator ends this.

    Attributes:
        since_s: seconds since the epoch.
        why: the evidence at that time, in sentences.
    """

    source: Source
    since_s: float
    why: tuple[str, ...]


class Sources:
    """The evidence and the suspensions in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._noted: dict[tuple[Source, Evidence], float] = {}

    def note(self, source: Source, seen: Evidence, now_s: float) -> Evidence | None:
        """Add what one session showed.

        Returns:
            All that counts of what is known now, or None where nothing in ``seen`` was new.
        """
        noted_s = self._noted.get((source, seen))
        if noted_s is not None and now_s - REFRESH_S < noted_s <= now_s:
            return None
        if len(self._noted) >= NOTED_MAX:
            self._noted.clear()
        self._noted[source, seen] = now_s
        key = _key(source)
        old, forgiven = self._store.read((EVIDENCE + key, RESUMED + key), now_s)
        known = _known(old, now_s, EVIDENCE_S_MAX)
        if all(
            known[part].get(_word(word), 0) > now_s - REFRESH_S for part, words in enumerate(seen) for word in words
        ):
            return None
        total: list[dict[str, int]] = []

        def change(value: bytes | None) -> tuple[bytes, float]:
            nonlocal total
            total = _known(value, now_s, EVIDENCE_S_MAX)
            for part, words in enumerate(seen):
                total[part] = _latest({**total[part], **dict.fromkeys(map(_word, words), seconds(now_s))})
            return _octets(total), EVIDENCE_S_MAX

        self._store.update(EVIDENCE + key, now_s, change)
        looked_at = _known(forgiven, now_s, FORGIVEN_S_MAX)
        return Evidence(*(tuple(sorted(words.keys() - looked_at[part])) for part, words in enumerate(total)))

    def suspended(self, address: IPAddress, listen: str, now_s: float) -> tuple[bool, bool]:
        """Whether the trust in the address is suspended, and that in the listener; one read of the store."""
        found = self._store.read((SUSPENSION + _key(address), SUSPENSION + _key(listen)), now_s)
        return found[0] is not None, found[1] is not None

    def suspend(self, source: Source, why: tuple[str, ...], now_s: float) -> bool:
        """Trust this source no more.

        Returns:
            Whether this is new: who suspends tells the operator.
        """
        new = False
        sentences = cut("\n".join(why), SENTENCES_OCTETS_MAX)

        def change(old: bytes | None) -> tuple[bytes, float] | None:
            nonlocal new
            new = old is None
            head = json.dumps([isinstance(source, str), str(source), now_s])
            return (f"{head}\n{sentences}".encode(), math.inf) if new else None

        self._store.update(SUSPENSION + _key(source), now_s, change)
        return new

    def resume(self, source: Source, now_s: float) -> bool:
        """Trust this source again, and let what is known of it now count no more.

        Returns:
            Whether its trust was suspended.
        """
        key = _key(source)
        suspension, known = self._store.read((SUSPENSION + key, EVIDENCE + key), now_s)
        if suspension is None:
            return False

        def change(old: bytes | None) -> tuple[bytes, float]:
            looked_at = _known(old, now_s, FORGIVEN_S_MAX)
            for part, words in enumerate(_known(known, now_s, EVIDENCE_S_MAX)):
                looked_at[part].update(dict.fromkeys(words, seconds(now_s)))
            return _octets(looked_at), FORGIVEN_S_MAX

        self._store.update(RESUMED + key, now_s, change)  # first: else the same evidence could suspend it in between
        return self._store.remove(SUSPENSION + key, now_s)

    def suspensions(self, now_s: float) -> list[Suspension]:
        """Every suspension in force, the oldest first."""
        items = self._store.items(SUSPENSION, now_s, RECORDS_MAX)
        return sorted((_suspension(item.value) for item in items), key=lambda one: one.since_s)


@lru_cache(maxsize=4096)  # the same come again and again
def _key(source: Source) -> bytes:
    """Behind the kind: of addresses the version and the octets, of listeners a digest of the name."""
    if isinstance(source, str):
        return b"@" + hashlib.blake2b(source.encode(), digest_size=_LISTENER_DIGEST_OCTETS).digest()
    return b"%d" % source.version + source.packed


def _word(text: str) -> str:
    return cut(text, MEMBER_OCTETS_MAX)


def _latest(words: dict[str, int]) -> dict[str, int]:
    return dict(sorted(words.items(), key=lambda word: word[1])[-MEMBERS_MAX:])


def _octets(parts: list[dict[str, int]]) -> bytes:
    """One line for each part of the evidence: the words with their times, which hold no space."""
    return "\n".join(" ".join(f"{at:x} {word}" for word, at in _latest(words).items()) for words in parts).encode()


def _known(octets: bytes | None, now_s: float, window_s: float) -> list[dict[str, int]]:
    """The words seen within the window, each with its time, for each part of the evidence."""
    if octets is None:
        return [{} for _ in Evidence._fields]
    oldest = now_s - window_s
    parts = []
    for line in octets.decode().split("\n"):
        columns = line.split(" ") if line else []
        pairs = zip(columns[1::2], columns[::2], strict=True)
        parts.append({word: int(at, 16) for word, at in pairs if int(at, 16) > oldest})
    return parts


def _suspension(octets: bytes) -> Suspension:
    head, *why = octets.decode().split("\n")
    is_listener, source, since_s = json.loads(head)
    return Suspension(source if is_listener else ip_address(source), since_s, tuple(why))
