"""Counts that may be lost: how many messages and recipients in the last hour, over all workers, without a lock.

Why: a trusted machine that was taken over, or a mail bomb to one mailbox, is stopped by a number.  The number is looked
    at for each recipient, so it costs about a microsecond and never waits.
Trust: keys hold what clients chose; their places are chosen by a keyed hash, so that nobody can aim at another's.
Promise: a file mapped by all workers, where each writes its own row only.  A count-min sketch: within one hour of the
    clock a count is never too low (but for workers that count at the same instant) and too high only by keys that share
    both places: with N counted in an hour by about N / WIDTH.  Two buckets of an hour give a sliding hour: the hour
    before counts by the part of it that is still within sixty minutes, as if its messages had come evenly.
Sources: Cormode and Muthukrishnan, "An improved data stream summary: the count-min sketch" (2005).
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import secrets
from functools import lru_cache
from pathlib import Path

from gatepost.errors import StorageError

WINDOW_S = 3600
WIDTH = 1 << 16  # places; each key has two, in two halves of a bucket
_BUCKET_CELLS = 2 * WIDTH
KEYS_REMEMBERED = 8192
_ROW_CELLS = 2 + 2 * _BUCKET_CELLS  # the hour of each bucket, then the buckets; cells are 32-bit
_COUNT_MAX = 0xFFFFFFFF
_KEY_OCTETS = 16


class HourlyCounts:
    """The counts of one worker, and the sum over all of them.

    Args:
        path: the file, shared by all workers; made when it is missing.
        row: the row this worker writes; rows: how many workers there are.

    Raises:
        StorageError: the file cannot be made or mapped.
    """

    __slots__ = ("_cells", "_hasher", "_map", "_places", "_row", "_rows")

    def __init__(self, path: Path, row: int, rows: int) -> None:
        size = _KEY_OCTETS + rows * _ROW_CELLS * 4
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # workers start together, and must agree on one key
                # Its room is taken now: to write into a hole of a mapped file on a full disk would kill the process.
                os.posix_fallocate(descriptor, 0, size)
                self._map = mmap.mmap(descriptor, size)
                if not any(self._map[:_KEY_OCTETS]):
                    self._map[:_KEY_OCTETS] = secrets.token_bytes(_KEY_OCTETS)
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # the map keeps the file open, and the lock with it
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError(f"cannot use the counters {path}: {error.strerror}") from error
        memory = memoryview(self._map)
        self._hasher = hashlib.blake2b(key=self._map[:_KEY_OCTETS], digest_size=8)
        cells = memory[_KEY_OCTETS:].cast("I")
        self._cells = [cells[number * _ROW_CELLS : (number + 1) * _ROW_CELLS] for number in range(rows)]
        self._row = self._cells[row]
        self._places = lru_cache(maxsize=KEYS_REMEMBERED)(self._hash)
        self._rows = rows

    def _hash(self, key: str) -> tuple[int, int]:
        hasher = self._hasher.copy()
        hasher.update(key.encode("utf-8", "surrogatepass"))
        digest = hasher.digest()
        return digest[0] << 8 | digest[1], WIDTH + (digest[2] << 8 | digest[3])

    def count(self, key: str, now_s: float) -> int:
        """How much was added under this key in the last hour, by all workers; not too low, hardly ever too high."""
        hour, second = divmod(int(now_s), WINDOW_S)
        share = 1.0 - second / WINDOW_S
        now, before = hour & 1, (hour - 1) & 1
        this_hour, last_hour = 2 + now * _BUCKET_CELLS, 2 + before * _BUCKET_CELLS
        first, second_place = self._places(key)
        one = other = 0.0
        for row in self._cells:
            if row[now] == hour:
                one += row[this_hour + first]
                other += row[this_hour + second_place]
            if row[before] == hour - 1:
                one += row[last_hour + first] * share
                other += row[last_hour + second_place] * share
        return int(min(one, other))

    def add(self, key: str, now_s: float, amount: int = 1) -> None:
        """Count under this key."""
        hour = int(now_s) // WINDOW_S
        bucket = hour & 1
        row = self._row
        start = 2 + bucket * _BUCKET_CELLS
        if row[bucket] != hour:
            row[start : start + _BUCKET_CELLS] = memoryview(bytes(_BUCKET_CELLS * 4)).cast("I")
            row[bucket] = hour
        for place in self._places(key):
            row[start + place] = min(row[start + place] + amount, _COUNT_MAX)

    def close(self) -> None:
        """Let go of the file."""
        for row in self._cells:
            row.release()
        self._cells = []
        self._map.close()
