"""Lines in files of bounded size: several processes append, the oldest file goes.

Why: what is written all day must end somewhere, and a file that another process is writing cannot be cut at its head.
Trust: the directory is the gate's own, and whoever takes a worker over owns it: a link is not followed, and a file that
    is none is not read.
Promise: a batch is in one file, whole, or not at all: a lock is held while it is written and while the next file is
    begun, and it ends with the process that held it.  What a killed process left half written is ended by whoever
    writes next, and costs no other line.  There are at most ``files_max`` files of ``octets_max`` octets.
Sources: open(2), flock(2), write(2).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

_NAME = re.compile(r"([0-9]{8,18})\.jsonl")


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

    def append(self, lines: bytes) -> None:
        """Write whole lines, no more octets of them than one file may have.

        Raises:
            OSError: nothing of them was written.
        """
        assert len(lines) <= self._octets_max
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._append(lines)
        finally:
            os.close(lock)  # and with it the lock

    def _append(self, lines: bytes) -> None:
        numbers = self._numbers()  # looked up anew: others write, too
        number = numbers[-1] if numbers else 1
        descriptor = self._open(number)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                lines = b"\n" + lines  # the half line of a process that was killed
            if size and size + len(lines) > self._octets_max:
                for old in numbers[: max(len(numbers) - self._files_max + 1, 0)]:
                    self._path(old).unlink()  # first: on a full disk it makes the room
                os.close(descriptor)
                descriptor, size, lines = self._open(number + 1), 0, lines.removeprefix(b"\n")
            _write_whole(descriptor, size, lines)
        finally:
            os.close(descriptor)

    def _open(self, number: int) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self._path(number), flags, 0o600)

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:08}.jsonl"

    def _numbers(self) -> list[int]:
        """The numbers of the files that are there, the oldest first."""
        names = map(_NAME.fullmatch, os.listdir(self._directory))  # noqa: PTH208  names are all that is wanted
        return sorted(int(name[1]) for name in names if name is not None)

    # ---- reading

    def lines_with(self, octets: bytes) -> Iterator[bytes]:
        """The lines that hold these octets, the newest first, without their line ends; one file is read at a time.

        Raises:
            OSError: something cannot be read.
        """
        try:
            numbers = self._numbers()
        except FileNotFoundError:
            return
        for number in reversed(numbers):
            content = self._read(number)
            end = len(content)
            while (found := content.rfind(octets, 0, end)) >= 0:
                end, behind = content.rfind(b"\n", 0, found) + 1, content.find(b"\n", found)
                yield content[end : behind if behind >= 0 else None]

    def first_line(self) -> bytes:
        """The oldest line that is there, without its line end; empty where there is none.

        Raises:
            OSError: it cannot be read.
        """
        try:
            numbers = self._numbers()
        except FileNotFoundError:
            return b""
        return self._read(numbers[0]).partition(b"\n")[0] if numbers else b""

    def _read(self, number: int) -> bytes:
        """One file; nothing where it went in the meantime, or is none."""
        try:
            descriptor = os.open(self._path(number), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return b""
        with os.fdopen(descriptor, "rb") as file:
            return file.read(self._octets_max) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""


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
