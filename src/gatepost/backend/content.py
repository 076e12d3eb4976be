"""Content between its client and its backend: in memory to a bound, then in a temporary file.

Why: content is taken whole before the backend's DATA, so that a slow client never holds a backend in content, a refused
    message never reaches one, and a pooled connection that died can be replaced before anything was sent.
Trust: blocks come from ``smtp.content``: whole CRLF lines, no bare CR, LF or NUL.
Promise: memory is bounded twice, for a message and for all messages of the process; a temporary file has no name, so
    that nothing of it is left when the process dies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO, cast

from gatepost.errors import StorageError

READ_OCTETS = 1 << 18
FILE_BUFFER_OCTETS = 1 << 13  # the default of newer Pythons is 128 KiB, for each of a thousand slow clients
OVERHEAD_OCTETS = 64  # what a bytes object costs besides its octets: many tiny blocks are counted honestly


class Memory:
    """How much content this process holds in memory, all messages together.

    Args:
        total_octets: beyond it blocks go to files at once.
        message_octets: one message holds no more in memory.
        directory: where the temporary files are made; None for the system's.
    """

    __slots__ = ("directory", "held_octets", "message_octets", "total_octets")

    def __init__(self, total_octets: int, message_octets: int, directory: str | None = None) -> None:
        self.total_octets = total_octets
        self.message_octets = message_octets
        self.directory = directory
        self.held_octets = 0


class Content:
    """One message's content.

    Attributes:
        size_octets: what was added so far.
        eight_bit: some octet is above 127; dotted: some line begins with a period.  Set when content has ended.
    """

    __slots__ = ("_blocks", "_file", "_held_octets", "_memory", "dotted", "eight_bit", "size_octets")

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._blocks: list[bytes] = []
        self._held_octets = 0
        self._file: BinaryIO | None = None
        self.size_octets = 0
        self.eight_bit = False
        self.dotted = False

    def add(self, block: bytes) -> None:
        """Keep one more block of whole lines.

        Raises:
            StorageError: the temporary file could not be written (disk full, most likely).
        """
        self.size_octets += len(block)
        memory = self._memory
        if self._file is None:
            cost = len(block) + OVERHEAD_OCTETS
            if self._held_octets + cost <= memory.message_octets and memory.held_octets + cost <= memory.total_octets:
                self._blocks.append(block)
                self._held_octets += cost
                memory.held_octets += cost
                return
            self._to_file()
        assert self._file is not None
        try:
            self._file.write(block)
        except OSError as error:
            raise StorageError(f"cannot write content to a temporary file: {error.strerror}") from error

    def _to_file(self) -> None:
        try:
            file = tempfile.TemporaryFile(dir=self._memory.directory, buffering=FILE_BUFFER_OCTETS)
            self._file = cast("BinaryIO", file)
            for block in self._blocks:
                self._file.write(block)
        except OSError as error:
            raise StorageError(f"cannot make a temporary file for content: {error.strerror}") from error
        self._release()

    def _release(self) -> None:
        self._blocks = []
        self._memory.held_octets -= self._held_octets
        self._held_octets = 0

    def chunks(self) -> Iterator[bytes]:
        """The content from its beginning, as often as asked, once at a time; each chunk is whole CRLF lines.

        The very last line may lack its CRLF (BDAT).

        Raises:
            StorageError: the file cannot be read, or the last of it not be written.
        """
        if self._file is None:
            yield from self._blocks
            return
        rest = b""
        try:
            self._file.seek(0)  # flushes what was written
            while octets := self._file.read(READ_OCTETS):
                cut = octets.rfind(b"\n") + 1
                if cut:
                    yield rest + octets[:cut]
                    rest = octets[cut:]
                else:
                    rest += octets
        except OSError as error:
            raise StorageError(f"cannot read content back from its temporary file: {error.strerror}") from error
        if rest:
            yield rest

    def header_section(self) -> bytes:
        """What stands before the first empty line, each line with its CRLF; no longer than it was let in.

        Source: RFC 5322 §2.1.

        Raises:
            StorageError: as ``chunks``.
        """
        parts: list[bytes] = []
        for chunk in self.chunks():  # whole lines, so that an empty one is never cut in two
            end = 0 if chunk.startswith(b"\r\n") else chunk.find(b"\r\n\r\n") + 2
            if end != 1:
                parts.append(chunk[:end])
                break
            parts.append(chunk)
        return b"".join(parts)

    def close(self) -> None:
        """Forget the content."""
        self._release()
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # a full disk: what was still to be written is not wanted any more
                file.close()
