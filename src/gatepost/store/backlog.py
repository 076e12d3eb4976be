"""The backlog: what workers handed over to the journal and its database does not have yet.

Why: no session may wait for a database, and no record of an accepted message may be lost with a worker or while a
    database is away.  So a worker writes files, and the one process that writes the database reads them.
Trust: the files are the gate's own; see ``record`` and ``segments``.
Promise: ``keep`` never waits and never raises.  What was kept is on the disk FLUSH_S later at the latest, unless the
    disk is slower than that.  ``keep_durably`` says True only once the record is on the disk.  What the disk or the
    queue does not take is dropped, counted and said; of records that a bound drops, those of refusals go first.
Sources: fdatasync(2).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from gatepost.errors import StorageError
from gatepost.store.record import Record, decode, encode
from gatepost.store.segments import Segments
from gatepost.telemetry import Batches

SEGMENT_OCTETS_MAX: Final = 8 << 20
SEGMENTS_MIN: Final = 4
LINE_OCTETS_MAX: Final = (
    1 << 20
)  # an account may have a thousand addresses; most lines have less than a thousand octets
QUEUE_RECORDS_MAX: Final = 8192
TROUBLE_SAID_S: Final = 60.0
_BATCH_RECORDS: Final = 128
_BATCH_OCTETS: Final = 256 << 10

_Item = tuple[Record, "asyncio.Future[bool] | None"]


def backlog_directory(data: str) -> Path:
    """Where it lies, below the gate's data directory."""
    return Path(data) / "journal" / "backlog"


def segments(directory: Path, octets_max: int) -> Segments:
    """The files of a backlog.

    Args:
        octets_max: of all of them together.
    """
    files_max = max(octets_max // SEGMENT_OCTETS_MAX, SEGMENTS_MIN)
    return Segments(directory, octets_max=SEGMENT_OCTETS_MAX, files_max=files_max)


class Backlog:
    """What one worker adds to it.

    Args:
        octets_max: of the whole backlog, all workers together.
        dropped: called with the number of records dropped; state: with whether the disk took the last batch, whenever
            that changes; said: takes a sentence for the log.
    """

    def __init__(
        self,
        directory: Path,
        octets_max: int,
        *,
        dropped: Callable[[int], None] = lambda _: None,
        state: Callable[[bool], None] = lambda _: None,
        said: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._directory = directory
        self._segments = segments(directory, octets_max)
        # An eighth is for records of accepted messages alone.
        self._spare = max(octets_max // SEGMENT_OCTETS_MAX, SEGMENTS_MIN) // 8 or 1
        self._count_dropped = dropped
        self._tell_state = state
        self._said = said
        self._said_at_s = float("-inf")
        self._now_s = 0.0
        self._taken = True
        self._told_taken: bool | None = None
        self._trouble = "the disk is too slow"  # the last; written by the writing thread alone
        self._batches: Batches[_Item] = Batches(
            self._write,
            size_max=QUEUE_RECORDS_MAX,
            batch_size=_BATCH_RECORDS,
            name="journal",
            dropped=self._dropped,
        )

    def keep(self, record: Record, now_s: float) -> None:
        """Hand over a record; it is made into a line where no session waits for it.

        Args:
            now_s: seconds since the epoch.
        """
        self._now_s = now_s
        self._batches.append((record, None), 1)
        if self._taken is not self._told_taken:
            self._told_taken = self._taken
            self._tell_state(self._taken)

    async def keep_durably(self, record: Record, now_s: float, patience_s: float) -> bool:
        """Hand over a record and wait until it is on the disk.

        Returns:
            False where the disk did not take it in time: it may then be there or not.
        """
        loop = asyncio.get_running_loop()
        kept: asyncio.Future[bool] = loop.create_future()
        self._now_s = now_s
        if not self._batches.append((record, kept), 1):
            return False
        self._batches.flush()
        try:
            async with asyncio.timeout(patience_s):
                return await kept
        except TimeoutError:
            return False

    def _dropped(self, records: int) -> None:
        self._count_dropped(records)
        if abs(self._now_s - self._said_at_s) >= TROUBLE_SAID_S:
            self._said_at_s = self._now_s
            self._said(
                f"the journal cannot be written in {self._directory} ({self._trouble}): what is dropped will be found "
                "neither by `gatepost trace` nor by `gatepost explain`"
            )

    def close(self) -> None:
        """Write what waits; it takes as long as ``telemetry.batches.CLOSE_S`` at most."""
        self._batches.close()

    # ---- the writing thread's side

    def _write(self, batch: list[_Item]) -> int:
        lost = 0
        part: list[tuple[bytes, _Item]] = []
        octets = 0
        for item in batch:
            line = encode(item[0]) + b"\n"
            if len(line) > LINE_OCTETS_MAX:
                self._trouble = "a record is too long"
                _tell(item, kept=False)
                lost += 1
                continue
            part.append((line, item))
            octets += len(line)
            if octets >= _BATCH_OCTETS:
                lost += self._append(part)
                part, octets = [], 0
        return lost + self._append(part)

    def _append(self, part: list[tuple[bytes, _Item]]) -> int:
        """One batch.  Returns how many records were lost."""
        if not part:
            return 0
        precious = [(line, item) for line, item in part if _matters(item)]
        lost = 0
        if len(precious) < len(part):
            if self._taken_by_disk(part, spare_files=self._spare, durable=bool(precious)):
                return 0
            lost, part = len(part) - len(precious), precious
        if part and not self._taken_by_disk(part, spare_files=0, durable=True):
            lost += len(part)
        return lost

    def _taken_by_disk(self, part: list[tuple[bytes, _Item]], *, spare_files: int, durable: bool) -> bool:
        try:
            self._segments.append(b"".join(line for line, _ in part), spare_files=spare_files, durable=durable)
        except OSError as error:
            self._trouble = error.strerror or str(error)
            kept = False
        else:
            kept = True
        self._taken = kept
        if kept or spare_files == 0:
            for _, item in part:
                _tell(item, kept=kept)
        return kept


def _matters(item: _Item) -> bool:
    """Whether a message stands behind it that somebody answered 250 for, or is about to."""
    record, waiting = item
    return waiting is not None or any(entry.verdict == "accepted" for entry in record.entries)


def _tell(item: _Item, *, kept: bool) -> None:
    waiting = item[1]
    if waiting is None:
        return

    def tell() -> None:
        if not waiting.done():
            waiting.set_result(kept)

    with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
        waiting.get_loop().call_soon_threadsafe(tell)


def find(directory: Path, octets: bytes) -> list[Record]:
    """The records in a backlog whose lines hold these octets, the newest first.

    Raises:
        StorageError: the files cannot be read, or a newer version wrote a line.
    """
    try:
        lines = list(segments(directory, 0).lines_with(octets))
    except OSError as error:
        raise StorageError(
            f"cannot read the journal's backlog in {directory}: {error.strerror}; it is for the gate's user and root"
        ) from error
    return [record for record in map(decode, lines) if record is not None]
