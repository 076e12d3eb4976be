"""Lines in files of bounded size: several processes append, one reads on from where it was and takes files away.

Why: what workers hand over must outlive them, and must not wait for a database: a file takes it in a few microseconds,
    and whoever writes the database reads it there when it can.
Trust: the directory is the gate's own, and whoever takes a worker over owns it: a link is not followed, and a file that
    is none is not read.
Promise: a batch is in one file, whole, or not at all: a lock is held while it is written and while the next file is
    begun, and it ends with the process that held it.  What a killed process left half written is ended by whoever
    writes next, and costs no other line.  There are at most ``files_max`` files of ``octets_max`` octets; what goes
    beyond is refused, and nothing that is there goes for it.
Sources: open(2), flock(2), write(2), fdatasync(2).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_NAME = re.compile(r"([0-9]{8,18})\.jsonl")


class Position(NamedTuple):
    """How far somebody has read.  segment: the number of a file, 0 before the first; octets: of it."""

    segment: int = 0
    octets: int = 0


class Segments:
    """The files below one directory, which is made by the first who writes.

    Args:
        octets_max: of one file; files_max: how many there may be.
    """

    def __init__(self, directory: Path, *, octets_max: int, files_max: int) -> None:
        self._directory = directory
        self._octets_max = octets_max
        self._files_max = files_max

    # ---- writing

    def append(self, lines: bytes, *, spare_files: int = 0, durable: bool = False) -> None:
        """Write whole lines, no more octets of them than one file may have.

        Args:
            spare_files: so many of the files are kept free for lines that matter more.
            durable: the lines are on the disk when this returns.

        Raises:
            OSError: nothing of them was written, or it is not known to be on the disk; ENOSPC also where
                ``files_max`` files are full.
        """
        assert len(lines) <= self._octets_max
        if not self._directory.exists():
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            descriptor = self._append(lines, self._files_max - spare_files)
        finally:
            os.close(lock)  # and with it the lock
        try:
            if durable:  # behind the lock: nobody waits for this disk but who asked
                os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def _append(self, lines: bytes, files_max: int) -> int:
        numbers = self.numbers()  # looked up anew: others write, too
        number = numbers[-1] if numbers else 1
        descriptor = self._open(number)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                lines = b"\n" + lines  # the half line of a process that was killed
            if size and size + len(lines) > self._octets_max:
                if len(numbers) >= files_max:
                    raise OSError(errno.ENOSPC, "it has as many files as it may have")  # noqa: TRY301
                os.close(descriptor)
                descriptor = -1
                descriptor, size, lines = self._open(number + 1), 0, lines.removeprefix(b"\n")
            _write_whole(descriptor, size, lines)
        except BaseException:
            if descriptor >= 0:
                os.close(descriptor)
            raise
        return descriptor

    def _open(self, number: int) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self._path(number), flags, 0o600)

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:08}.jsonl"

    # ---- reading

    def numbers(self) -> list[int]:
        """The numbers of the files that are there, the oldest first.

        Raises:
            OSError: the directory cannot be read; where it is not there, it is empty.
        """
        try:
            names = map(_NAME.fullmatch, os.listdir(self._directory))  # noqa: PTH208  names are all that is wanted
        except FileNotFoundError:
            return []
        return sorted(int(name[1]) for name in names if name is not None)

    def octets_after(self, position: Position) -> int:
        """How much stands behind this position."""
        octets = 0
        for number in self.numbers():
            if number >= position.segment:
                with contextlib.suppress(FileNotFoundError):
                    size = self._path(number).lstat().st_size
                    octets += max(size - position.octets, 0) if number == position.segment else size
        return octets

    def read(self, position: Position, octets_max: int) -> tuple[list[bytes], Position]:
        """The lines behind this position, without their line ends, and the position behind them.

        Args:
            octets_max: about so much is read at once, all of it from one file.

        Raises:
            OSError: something cannot be read.
        """
        numbers = self.numbers()
        if numbers and position.segment > numbers[-1]:
            position = Position()  # other files stand here now than when we last read
        for number in numbers:
            if number < position.segment:
                continue
            start = position.octets if number == position.segment else 0
            octets = self._read(number, start, octets_max)
            end = octets.rfind(b"\n") + 1
            if end:
                return octets[: end - 1].split(b"\n"), Position(number, start + end)
            if octets and (number != numbers[-1] or len(octets) == octets_max):
                # Nobody will end it: the half line of a process that was killed, or a line beyond all measure.
                return [], Position(number, start + len(octets))
        return [], position

    def forget_before(self, position: Position) -> None:
        """Take away the files that were read to their ends; the last one stays, for it may be written.

        Raises:
            OSError: one cannot be taken away.
        """
        numbers = self.numbers()
        for number in numbers[:-1]:
            if number < position.segment:
                self._path(number).unlink(missing_ok=True)

    def lines_with(self, octets: bytes) -> Iterator[bytes]:
        """The lines that hold these octets, the newest first, without their line ends; one file is read at a time.

        Raises:
            OSError: something cannot be read.
        """
        for number in reversed(self.numbers()):
            content = self._read(number, 0, self._octets_max)
            end = len(content)
            while (found := content.rfind(octets, 0, end)) >= 0:
                end, behind = content.rfind(b"\n", 0, found) + 1, content.find(b"\n", found)
                yield content[end : behind if behind >= 0 else None]

    def _read(self, number: int, start: int, octets: int) -> bytes:
        """A part of one file; nothing where it went in the meantime, or is none."""
        try:
            descriptor = os.open(self._path(number), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return b""
        try:
            return os.pread(descriptor, octets, start) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
        finally:
            os.close(descriptor)


def _write_whole(descriptor: int, size: int, lines: bytes) -> None:
    """Behind what is there, or not at all."""
    view = memoryview(lines)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        raise
