"""A queue that one thread empties in batches: the event loop hands over and goes on.

Why: a disk may be slow and a reader of the log may be gone, and neither may hold up a session.  To hand something over
    costs about a microsecond; a thread writes what has gathered, some times a second.
Promise: ``append`` never waits; what waits is bounded, and what is dropped or could not be written is counted; what was
    appended before ``close`` is written, if it can be in time.  A process that is killed takes along what came in the
    last FLUSH_S.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

FLUSH_S = 0.05
CLOSE_S = 2.0

T = TypeVar("T")


class Batches(Generic[T]):
    """The queue and its thread, which starts with the first item.

    Args:
        write: called by the thread with one batch; returns how many of its items were lost.
        size_max: what may wait; batch_size: what is written at once.  Both in the unit of ``append``.
        name: of the thread.
        dropped: called by whoever appends, with the number of items dropped or lost since the last time.
        caught_up: called by the thread with the number of items dropped for want of room, once there is room again.
    """

    def __init__(
        self,
        write: Callable[[list[T]], int],
        *,
        size_max: int,
        batch_size: int,
        name: str,
        dropped: Callable[[int], None] | None = None,
        caught_up: Callable[[int], None] | None = None,
    ) -> None:
        self._write = write
        self._size_max = size_max
        self._batch_size = batch_size
        self._name = name
        self._count_dropped = dropped
        self._caught_up = caught_up
        self._queue: deque[tuple[T, int]] = deque()
        self._queued = 0  # written by whoever appends alone
        self._written = 0  # written by the thread alone
        self._dropped = 0  # written by whoever appends alone
        self._lost = 0  # written by the thread alone
        self._lost_counted = 0
        self._wake = threading.Event()
        self._full = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None

    def append(self, item: T, size: int) -> bool:
        """Hand over one item.  On the hot path; from one thread only.

        Returns:
            False where it was dropped for want of room.
        """
        if self._lost != self._lost_counted:
            lost = self._lost
            self._tell_dropped(lost - self._lost_counted)
            self._lost_counted = lost
        waiting = self._queued - self._written
        if waiting + size > self._size_max:
            self._dropped += 1
            self._tell_dropped(1)
            return False
        self._queued += size
        self._queue.append((item, size))
        if not self._wake.is_set():
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_batches, name=self._name, daemon=True)
                self._thread.start()
            self._wake.set()
        if waiting > self._batch_size and not self._full.is_set():
            self._full.set()
        return True

    def flush(self) -> None:
        """Write what waits now: somebody waits for it."""
        self._full.set()

    def _tell_dropped(self, items: int) -> None:
        if self._count_dropped is not None:
            self._count_dropped(items)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Write what waits, for at most ``timeout_s`` (nobody may be reading), and end the thread."""
        self._closing = True
        self._full.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    # ---- the thread's side

    def _write_batches(self) -> None:
        noticed = 0
        while True:
            self._wake.wait()
            if not self._closing:
                self._full.wait(FLUSH_S)  # let a batch gather
            self._full.clear()
            closing = self._closing  # before the queue is emptied: what came before close() is written
            self._wake.clear()
            while self._queue:
                batch: list[T] = []
                size = 0
                while self._queue and size < self._batch_size:
                    item, its_size = self._queue.popleft()
                    batch.append(item)
                    size += its_size
                self._lost += self._write(batch)
                self._written += size
            if self._dropped != noticed:
                items, noticed = self._dropped - noticed, self._dropped
                if self._caught_up is not None:
                    self._caught_up(items)
            if closing:
                return
