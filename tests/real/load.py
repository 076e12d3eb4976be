"""Clients that bring numbered messages until each was answered 250, and remember every doubt on the way.

Why: "nothing was lost" is a sum: what was answered 250, what arrived, and what a client could not know.
Promise: a message is sent again only where no 250 came for it; each end of content without a reply is counted, for
    that alone may make a duplicate (RFC 1047).
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Self

from tests.real.wire import PATIENCE_S, HungUp, Wire

NUMBER = re.compile(rb"^Subject: load (\d+)\r?$", re.MULTILINE)


class Load:
    """Threads that deliver messages.

    Args:
        numbers: of the messages.
        per_session: so many messages, then QUIT and a new session; 0 for one session all along.

    Attributes:
        answered: how often each message was answered 250.
        doubts: how often a message's content was ended and no reply came.
        hangups: sessions that the gate ended without our QUIT.
        deferred: 4yz replies.
        wrong: what must not happen: other refusals.
    """

    def __init__(
        self, port: int, numbers: Iterable[int], *, threads: int = 12, per_session: int = 10, recipient: str
    ) -> None:
        self.port = port
        self.recipient = recipient
        self.per_session = per_session
        self.answered: Counter[int] = Counter()
        self.doubts: Counter[int] = Counter()
        self.hangups: list[str] = []
        self.deferred: list[str] = []
        self.wrong: list[str] = []
        self._numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in numbers:
            self._numbers.put(number)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._client, args=(index,), name=f"client {index}") for index in range(threads)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def join(self) -> None:
        """Wait until every message was answered 250, or a client has given up."""
        for thread in self._threads:
            thread.join(3 * PATIENCE_S)
        assert not self.wrong, self.wrong[:5]

    # ---- one client

    def _client(self, index: int) -> None:
        try:
            self._deliver_all(f"127.3.0.{index + 1}")
        except Exception as error:  # noqa: BLE001  a thread's failure is the test's
            self.wrong.append(repr(error))

    def _deliver_all(self, source: str) -> None:
        pending: list[int] = []
        while self._take(pending):
            with self._connected(source) as wire:
                try:
                    self._session(wire, pending)
                except (HungUp, OSError) as error:
                    with self._lock:
                        self.hangups.append(str(error))

    def _take(self, pending: list[int]) -> bool:
        """Whether there is a message to deliver: the one that is pending, or else the next."""
        if not pending and not self._stop.is_set():
            with suppress(queue.Empty):
                pending.append(self._numbers.get_nowait())
        return bool(pending)

    def _session(self, wire: Wire, pending: list[int]) -> None:
        in_session = 0
        while self._take(pending):
            if self._deliver(wire, pending[0]):
                pending.clear()
                in_session += 1
                if in_session == self.per_session:
                    break
        wire.say("QUIT")

    def _connected(self, source: str) -> Wire:
        end = time.monotonic() + PATIENCE_S
        while True:
            wire: Wire | None = None
            try:
                wire = Wire(self.port, source=source)
                wire.hello("gate-under-test")
                return wire
            except (HungUp, OSError):
                # A worker died while this connection waited for its greeting.
                if wire is not None:
                    wire.close()
                if self._stop.is_set() or time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def _deliver(self, wire: Wire, number: int) -> bool:
        """One attempt; True when it was answered 250."""
        del wire.said[:]
        reply = wire.envelope(self.recipient)
        if reply.startswith("250"):
            reply = wire.say("DATA")
            if reply.startswith("354"):
                content = f"Subject: load {number}\r\n\r\n{'x' * 70}\r\n".encode() + b"y" * 500 + b"\r\n"
                try:
                    wire.send(content + b".\r\n")
                    reply = wire.reply()
                except (HungUp, OSError):
                    with self._lock:
                        self.doubts[number] += 1
                    raise
                if reply.startswith("250"):
                    with self._lock:
                        self.answered[number] += 1
                    return True
        with self._lock:
            (self.deferred if reply.startswith("4") else self.wrong).append(reply)
        if not reply.startswith("4"):
            raise AssertionError(reply)
        wire.say("RSET")
        time.sleep(0.05)
        return False

    @property
    def done(self) -> int:
        """So many messages were answered 250."""
        return len(self.answered)

    def has_done(self, count: int) -> bool:
        """Whether so many were; fails where a client has given up."""
        assert not self.wrong, self.wrong[:5]
        return self.done >= count


def numbers_in(octets: bytes) -> list[int]:
    """The numbers of the load's messages in a text that holds any of them."""
    return [int(number) for number in NUMBER.findall(octets)]
