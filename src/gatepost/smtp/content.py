"""Message content on the wire: CRLF discipline, dot transparency and BDAT, receiving and sending side by side.

Why: whoever can make two servers disagree where content ends can put words (commands) into the mouth of the first.
    So content has one reading here: lines end in CRLF, only CRLF.CRLF ends DATA, and what fails that is refused as a
    whole after its real end; the text behind a false end is never read as commands, by us or by the backend.
Trust: every octet is the client's.
Promise: bounded in memory (one line and one block); emitted blocks are whole CRLF lines without dot-stuffing, without
    bare CR, bare LF or NUL; a message with a defect emits nothing more after the defect was seen.
Sources: RFC 5321 §2.3.8 (lines), §4.1.1.4 (end of mail data), §4.5.2 (transparency), §4.5.3.1.6 (text line),
    §6.3 (loops); RFC 3030 §2 and §3 (BDAT).
    Stricter: a bare LF, bare CR or NUL refuses the message (RFC 5321 §2.3.8 forbids sending them); with "normalise"
    bare CR and LF become CRLF after framing was decided on the octets as received, NUL is refused all the same.
"""

from __future__ import annotations

import re
from enum import Enum, unique
from typing import NamedTuple

from gatepost.smtp.reply import Reply

LINE_OCTETS_CEILING = 1 << 16  # a content line with the limit switched off is still bounded
_BARE = re.compile(rb"\r(?!\n)|(?<!\r)\n|\0")
_ANY_NEWLINE = re.compile(rb"\r\n|\r|\n")


@unique
class Defect(Enum):
    """What is wrong with a message's content, and the reply that says so after its real end."""

    BARE_LF = (550, "5.6.0", "The message holds a bare LF: lines end in CRLF (RFC 5321 2.3.8)")
    BARE_CR = (550, "5.6.0", "The message holds a bare CR: lines end in CRLF (RFC 5321 2.3.8)")
    NUL = (550, "5.6.0", "The message holds a NUL octet")
    LINE_TOO_LONG = (550, "5.6.0", "The message holds a line that is too long (RFC 5321 4.5.3.1.6)")
    TOO_LARGE = (552, "5.3.4", "The message is larger than this server takes")
    HEADER_SECTION_TOO_LARGE = (552, "5.3.4", "The header section is larger than this server takes")
    CONTINUES = (550, "5.6.0", "The message begins with a space or tab: it would continue the field put before it")
    LOOP = (554, "5.4.6", "Too many Received fields: this message goes round in circles")

    def __init__(self, code: int, status: str, wording: str) -> None:
        self.reply = Reply(code, wording, status)


class ContentLimits(NamedTuple):
    """Bounds on one message's content; 0 means none for message_size_octets and content_line_octets.

    Attributes:
        message_size_octets: content as counted by RFC 1870 §6.1: CRLFs counted, dot-stuffing not.
        content_line_octets: one line without its CRLF.
        header_section_octets: with line ends.
        received_fields: so many make a loop.  RFC 5321 §6.3 (at least 100).
        normalise: bare CR and LF become CRLF instead of refusing the message.
    """

    message_size_octets: int = 50 << 20
    content_line_octets: int = 998
    header_section_octets: int = 256 << 10
    received_fields: int = 100
    normalise: bool = False


class _Inspector:
    """What DATA and BDAT have in common: judging blocks of whole lines, and the tally of what passed."""

    __slots__ = (
        "_header_octets",
        "_in_header",
        "_line_max",
        "_limits",
        "_received",
        "_size_max",
        "defect",
        "dotted",
        "eight_bit",
        "size_octets",
    )

    def __init__(self, limits: ContentLimits) -> None:
        self._limits = limits
        self._line_max = min(limits.content_line_octets or LINE_OCTETS_CEILING, LINE_OCTETS_CEILING)
        self._size_max = limits.message_size_octets
        self._in_header = True
        self._header_octets = 0
        self._received = 0
        self.size_octets = 0
        self.defect: Defect | None = None
        self.eight_bit = False
        self.dotted = False

    def _whole_lines(self, octets: bytes, start: int = 0) -> int:
        """Where the whole lines that begin at ``start`` end; ``start`` if there is none."""
        cut = octets.rfind(b"\n", start) + 1
        if self._limits.normalise:
            # A bare CR ends a line, too; what the CR at the very end is, the next octet tells.
            cut = max(cut, octets.rfind(b"\r", start, -1) + 1)
        return cut or start

    def _judge(self, block: bytes) -> Defect | None:
        """What forbids this block to pass, if anything; else it is counted.

        Args:
            block: starts at the start of a line; whole lines, the last line of a BDAT message may lack its end.
        """
        # Every CR LF is taken out: a CR or LF that is left was bare, also where two of them have become neighbours.
        text = block.replace(b"\r\n", b"")
        if b"\r" in text or b"\n" in text or b"\0" in text:
            return _classify(block)
        size = len(block)
        if size > self._line_max and self._has_long_line(block):
            return Defect.LINE_TOO_LONG
        if not self.size_octets and block.startswith((b" ", b"\t")):
            # RFC 5322 §2.2.3: white space folds a field.  The field before this one is ours, or the next server's.
            return Defect.CONTINUES
        if self._in_header:
            defect = self._judge_header(block)
            if defect is not None:
                return defect
        self.size_octets += size
        if self._size_max and self.size_octets > self._size_max:
            return Defect.TOO_LARGE
        if not self.eight_bit and not block.isascii():
            self.eight_bit = True
        return None

    def _has_long_line(self, block: bytes) -> bool:
        """Jump from line to line, each time over the last LF that lines of legal length allow.  RFC 5321 §4.5.3.1.6."""
        window = self._line_max + 2
        start, size = 0, len(block)
        while size - start > window:
            newline = block.rfind(b"\n", start, start + window)
            if newline < 0:
                return True
            start = newline + 1
        return size - start > self._line_max and block.find(b"\n", start) < 0

    def _judge_header(self, block: bytes) -> Defect | None:
        """Bound the header section and count its Received fields."""
        end = 0 if block.startswith(b"\r\n") else block.find(b"\r\n\r\n") + 2
        if end == 1:  # the blank line is not here yet
            header = block
        else:
            header = block[:end]
            self._in_header = False
        self._header_octets += len(header)
        if self._header_octets > self._limits.header_section_octets:
            return Defect.HEADER_SECTION_TOO_LARGE
        folded = header.lower()
        self._received += folded.count(b"\nreceived:") + folded.startswith(b"received:")
        return Defect.LOOP if self._received > self._limits.received_fields else None  # RFC 5321 §6.3


def _classify(block: bytes) -> Defect:
    """Name the first thing wrong with a block's line ends."""
    bare = _BARE.search(block)
    assert bare is not None
    return {b"\0": Defect.NUL, b"\n": Defect.BARE_LF, b"\r": Defect.BARE_CR}[bare[0]]


class DataReceiver(_Inspector):
    """Content after DATA: up to CRLF.CRLF, dot-stuffing removed.  RFC 5321 §4.1.1.4, §4.5.2."""

    __slots__ = ("_after_crlf",)

    def __init__(self, limits: ContentLimits) -> None:
        super().__init__(limits)
        self._after_crlf = True  # the CRLF of the DATA line counts: "." at once ends an empty message

    def take(self, octets: bytes, start: int = 0) -> tuple[bytes, int, bool]:
        """Take what can be taken.

        Args:
            octets: all octets received and not yet taken begin at ``start``.

        Returns:
            A block of whole lines (possibly empty; always empty once there is a defect), where the octets not taken
            begin, and whether content has ended; after the end the octets not taken are commands.
        """
        if self.defect is not None:
            return self._skip(octets, start)
        # RFC 5321 §4.5.3.1.6: a text line, its CR, and the period that transparency may have put before it.
        pending_max = self._line_max + 2
        cut = self._whole_lines(octets, start)
        if cut == start:
            if len(octets) - start > pending_max:
                self.defect = Defect.LINE_TOO_LONG
                return self._skip(octets, start)
            return b"", start, False
        body, taken, ended, plain = self._frame(octets, start, cut)
        if not body:
            return b"", taken, ended
        if self._limits.normalise:
            body = _ANY_NEWLINE.sub(b"\r\n", body)
            plain = False  # what ended in a bare CR or LF may have put a period at the start of a line
        if not plain:
            if body.startswith(b"."):  # RFC 5321 §4.5.2: the first octet goes if it is a period
                body = body[1:]
            body = body.replace(b"\r\n.", b"\r\n")
            if not self.dotted:
                self.dotted = body.startswith(b".") or b"\r\n." in body
        self.defect = self._judge(body)
        if not ended and len(octets) - taken > pending_max:
            self.defect = self.defect or Defect.LINE_TOO_LONG
        if self.defect is not None:
            return (b"", taken, True) if ended else self._skip(octets, taken)
        return body, taken, ended

    def _frame(self, octets: bytes, start: int, cut: int) -> tuple[bytes, int, bool, bool]:
        """Split at the end of content if it is there.

        Only CRLF.CRLF on the octets as received ends content, whatever else is tolerated afterwards.

        Args:
            cut: behind the last whole line.

        Returns:
            A block, where the octets not taken begin, whether content ended, and whether the block is known to hold no
            line that begins with a period.
        """
        if self._after_crlf and octets.startswith(b".", start):
            if octets.startswith(b".\r\n", start):
                return b"", start + 3, True, True
        else:
            at = octets.find(b"\r\n.", start, cut)
            if at < 0:
                self._after_crlf = octets.endswith(b"\r\n", start, cut)
                return octets[start:cut], cut, False, True
            if octets.startswith(b"\r\n.\r\n", at):
                return octets[start : at + 2], at + 5, True, True
        end = octets.find(b"\r\n.\r\n", start)
        if end >= 0:
            return octets[start : end + 2], end + 5, True, False
        self._after_crlf = octets.endswith(b"\r\n", start, cut)
        return octets[start:cut], cut, False, False

    def _skip(self, octets: bytes, start: int) -> tuple[bytes, int, bool]:
        """Refused already: look for the real end only, leave nothing but what could be the beginning of it."""
        if self._after_crlf:
            if octets.startswith(b".\r\n", start):
                return b"", start + 3, True
            if octets[start : start + 3] in (b"", b".", b".\r"):
                return b"", start, False
        end = octets.find(b"\r\n.\r\n", start)
        if end >= 0:
            return b"", end + 5, True
        self._after_crlf = False
        for tail in (b"\r\n.\r", b"\r\n.", b"\r\n", b"\r"):
            if octets.endswith(tail, start):
                return b"", len(octets) - len(tail), False
        return b"", len(octets), False


class BdatReceiver(_Inspector):
    """Content in BDAT chunks: counted, not framed; the same discipline inside.  RFC 3030 §2, §3.

    BINARYMIME is not offered, so that the content is lines and can go on by DATA to any backend.
    """

    __slots__ = ("_line", "_remaining", "last")

    def __init__(self, limits: ContentLimits) -> None:
        super().__init__(limits)
        self._line = b""  # the unfinished line at the end of the octets so far; a line may span chunks
        self._remaining = 0
        self.last = False

    def begin(self, size_octets: int, *, last: bool) -> None:
        """A BDAT command: so many octets follow it.  RFC 3030 §2."""
        self._remaining = size_octets
        self.last = last
        if self._size_max and self.size_octets + len(self._line) + size_octets > self._size_max:
            self.defect = self.defect or Defect.TOO_LARGE

    def take(self, octets: bytes, start: int = 0) -> tuple[bytes, int, bool]:
        """Like ``DataReceiver.take``; ended means that this chunk has ended.

        The last line of the last chunk may lack its CRLF; it is emitted all the same and sending ends it.
        """
        taken = min(start + self._remaining, len(octets))
        self._remaining -= taken - start
        ended = not self._remaining
        if self.defect is not None:
            return b"", taken, ended
        pending = self._line + octets[start:taken]
        cut = len(pending) if ended and self.last else self._whole_lines(pending)
        block, self._line = pending[:cut], pending[cut:]
        if block:
            if self._limits.normalise:
                block = _ANY_NEWLINE.sub(b"\r\n", block)
            self.defect = self._judge(block)
            if not self.dotted:
                self.dotted = block.startswith(b".") or b"\r\n." in block  # a chunk may begin in a line: no matter
        if self.defect is None and len(self._line) > self._line_max + 1:
            self.defect = Defect.LINE_TOO_LONG
        if self.defect is not None:
            self._line = b""
            return b"", taken, ended
        return block, taken, ended


def stuff(block: bytes) -> bytes:
    """Dot transparency for sending: a period before each line that begins with one.  RFC 5321 §4.5.2.

    Args:
        block: whole CRLF lines without bare CR or LF, beginning at the start of a line.
    """
    stuffed = block.replace(b"\r\n.", b"\r\n..")
    return b"." + stuffed if stuffed.startswith(b".") else stuffed
