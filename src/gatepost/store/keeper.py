"""The process that writes the journal: one step after the other, whatever the database does.

Why: a database is away, a disk is full, a file is damaged, and each of these ends some day: this process tries again,
    says once what is wrong, and says when it is over.  No session notices.
Promise: the backlog is not touched while the database does not take it.  At the end of the gate it takes over what the
    workers left, for END_S at most; what it does not get done waits for the next start.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable
from typing import Final

from gatepost.errors import StorageError
from gatepost.store.backlog import backlog_directory, segments
from gatepost.store.database import Database
from gatepost.store.segments import Position
from gatepost.store.settings import JournalSettings
from gatepost.store.writer import Step, Writer
from gatepost.telemetry import (
    JOURNAL_DAMAGED,
    JOURNAL_RECORDS,
    JOURNAL_STATE,
    JOURNAL_WAITING,
    Level,
    Metrics,
    SessionLog,
)
from gatepost.telemetry.metrics import STATE_DOWN, STATE_UP

IDLE_S: Final = 0.1
GATHER_S: Final = 0.4  # after each step: a commit costs as much as a hundred rows
FULL_RECORDS: Final = 2000  # and after a step with so many there is no time for that
AGAIN_S: Final = (1.0, 2.0, 5.0, 10.0, 15.0)  # after a failure, and the next
TIDY_S: Final = 60.0
CROWDED_SAID_S: Final = 86400.0
END_S: Final = 2.0


class Keeper:
    """The loop.

    Args:
        metrics: with this process's block.
    """

    def __init__(
        self, data: str, settings: JournalSettings, metrics: Metrics, log: SessionLog, now_s: Callable[[], float]
    ) -> None:
        self._data = data
        self._settings = settings
        self._metrics = metrics
        self._log = log
        self._now_s = now_s
        self._database = Database(data, settings.url, writes=True)
        self._writer: Writer | None = None
        self._segments = segments(backlog_directory(data), settings.backlog_octets)
        self._position = Position()
        self._trouble = ""
        self._failures = 0
        self._tidy_at_s = self._crowded_said_s = 0.0

    def run(self, lifeline: socket.socket) -> None:
        """Until the lifeline's other end is closed."""
        wait_s = 0.0
        while not select.select([lifeline], [], [], wait_s)[0]:
            wait_s = self.work()
        end_s = time.monotonic() + END_S
        while self.work() in (0.0, GATHER_S) and time.monotonic() < end_s:  # neither idle nor in trouble
            pass
        self._database.close()

    def work(self) -> float:
        """One step.

        Returns:
            How long to wait before the next, in seconds.
        """
        try:
            step = self._step()
        except StorageError as error:
            return self._failed(str(error))
        self._went_well(step)
        if step.records + step.damaged >= FULL_RECORDS:
            return 0.0
        return GATHER_S if step.records or step.damaged else IDLE_S

    def _step(self) -> Step:
        if self._writer is None:
            self._writer = Writer(self._data, self._settings, self._database, self._now_s)
        step = self._writer.step()
        if not step.records and time.monotonic() >= self._tidy_at_s and not self._writer.tidy():
            self._tidy_at_s = time.monotonic() + TIDY_S
        return step

    def _went_well(self, step: Step) -> None:
        assert self._writer is not None
        if self._trouble:
            self._log.event("journal", "the journal's database takes what comes again", Level.NOTE)
        self._trouble, self._failures = "", 0
        metrics = self._metrics
        metrics.put(metrics.cell(JOURNAL_STATE, "database"), STATE_UP)
        metrics.inc(metrics.cell(JOURNAL_RECORDS), step.records)
        self._position = self._writer.position
        self._tell_waiting()
        if step.damaged or step.newer:
            metrics.inc(metrics.cell(JOURNAL_DAMAGED), step.damaged + step.newer)
            why = "damaged" if step.damaged else "written by a newer version of Gatepost"
            self._log.event(
                "journal",
                f"{step.damaged + step.newer} lines of the journal's backlog are passed over: {why}",
                Level.WARNING,
            )
        if step.crowded_out and time.monotonic() >= self._crowded_said_s:
            self._crowded_said_s = time.monotonic() + CROWDED_SAID_S
            self._log.event(
                "journal",
                f"the journal holds {self._settings.entries_max} verdicts or sessions: the oldest go before their "
                "time; [journal] entries allows more",
                Level.WARNING,
            )
        if step.clock_back_s:
            self._log.event(
                "journal",
                f"the clock went back by {step.clock_back_s:.0f} s: entries of the journal are in the order of their "
                "times, and those of before stand behind those of now",
                Level.WARNING,
            )

    def _failed(self, trouble: str) -> float:
        # A connection that broke, or tables that went away, are looked for anew.
        self._database.close()
        self._writer = None
        self._metrics.put(self._metrics.cell(JOURNAL_STATE, "database"), STATE_DOWN)
        self._tell_waiting()
        if trouble != self._trouble:
            self._trouble = trouble
            self._log.event("journal", trouble, Level.ERROR)
        wait_s = AGAIN_S[min(self._failures, len(AGAIN_S) - 1)]
        self._failures += 1
        return wait_s

    def _tell_waiting(self) -> None:
        with contextlib.suppress(OSError):
            waiting_octets = self._segments.octets_after(self._position)
            self._metrics.put(self._metrics.cell(JOURNAL_WAITING), waiting_octets)
