"""SMTP replies: one value, formatted for a client and parsed from a backend.

Why: every answer the gate gives, and every answer it gets, is a Reply; its octets are made once.
Trust: what a backend sends is bounded and re-serialised here; its text reaches clients as printable text only.
Promise: ``Reply.octets()`` is always well-formed: CRLF lines, one code, no control characters, no line over 512 octets.
Sources: RFC 5321 §4.2 (replies), §4.5.3.1.5 (512 octets a line); RFC 2034 and RFC 3463 (enhanced status codes).
"""

from __future__ import annotations

import re
from typing import NamedTuple

LINE_OCTETS_MAX = 512  # RFC 5321 §4.5.3.1.5, CRLF included
LINES_MAX = 128

_UNPRINTABLE = re.compile(r"[^\x20-\x7e\xa0-\U0010ffff]")
_STATUS = re.compile(r"([245])\.([0-9]{1,3})\.([0-9]{1,3})(?: |\Z)")


class EnhancedStatus(NamedTuple):
    """Subject and detail of an enhanced status code; its class is the reply code's first digit.  RFC 3463 §2."""

    subject: int
    detail: int


class Reply:
    """One complete SMTP reply.  Immutable by habit: nothing assigns to it after construction.

    Args:
        code: 200 to 599.
        text: the text after code and status; several lines are separated by "\\n".
        status: enhanced status as "5.7.1" or (7, 1); None where RFC 2034 §4 has none (greeting, EHLO, 354).
    """

    __slots__ = ("_octets", "code", "status", "text")

    def __init__(self, code: int, text: str, status: str | tuple[int, int] | None = None) -> None:
        self.code = code
        self.text = text
        if isinstance(status, str):
            klass, subject, detail = status.split(".")
            if klass != str(code // 100):
                raise ValueError(f"status {status} does not belong to code {code}")
            self.status: EnhancedStatus | None = EnhancedStatus(int(subject), int(detail))
        else:
            self.status = status if status is None or isinstance(status, EnhancedStatus) else EnhancedStatus(*status)
        self._octets: bytes | None = None

    @property
    def positive(self) -> bool:
        """2yz, or 3yz: the command took effect.  RFC 5321 §4.2.1."""
        return self.code < 400

    @property
    def transient(self) -> bool:
        """4yz: the client may try the same again later.  RFC 5321 §4.2.1."""
        return 400 <= self.code < 500

    def octets(self) -> bytes:
        """The reply as it goes over the wire, CRLF included; rendered once."""
        if self._octets is None:
            self._octets = self._render()
        return self._octets

    @property
    def line(self) -> str:
        """The first line as text, for logs."""
        return self.octets().partition(b"\r\n")[0].decode("utf-8", "replace")

    def _render(self) -> bytes:
        prefix = f"{self.code // 100}.{self.status.subject}.{self.status.detail} " if self.status else ""
        text = self.text
        room = LINE_OCTETS_MAX - 2 - 4 - len(prefix)
        if len(text) <= room and text.isascii() and text.isprintable():  # nearly all of them
            return f"{self.code} {prefix}{text}\r\n".encode()
        lines = text.split("\n")[:LINES_MAX]
        out = []
        for number, line in enumerate(lines, 1):
            octets = _UNPRINTABLE.sub("?", line).encode("utf-8", "replace")
            if len(octets) > room:
                octets = octets[:room].decode("utf-8", "ignore").encode()
            separator = " " if number == len(lines) else "-"
            out.append(f"{self.code}{separator}{prefix}".encode() + octets)
        return b"\r\n".join(out) + b"\r\n"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reply) and self.octets() == other.octets()

    def __hash__(self) -> int:
        return hash(self.octets())

    def __repr__(self) -> str:
        return f"Reply({self.octets()!r})"


def from_backend(code: int, lines: list[bytes]) -> Reply:
    """A reply as a backend gave it, safe to pass on.

    Args:
        code: 200 to 599, already checked to be the same on every line.
        lines: the octets after "code-" or "code " of each line, without CRLF; hostile.

    Returns:
        The reply with its enhanced status separated where the first line carries one of the right class.
    """
    texts = [line[:LINE_OCTETS_MAX].decode("utf-8", "replace") for line in lines[:LINES_MAX]]
    status: EnhancedStatus | None = None
    first = _STATUS.match(texts[0]) if texts else None
    if first and first[1] == str(code // 100):
        status = EnhancedStatus(int(first[2]), int(first[3]))
        # RFC 2034 §4: the same status on every line; it is rendered again on every line.
        for number, text in enumerate(texts):
            match = _STATUS.match(text)
            if match and match.groups() == first.groups():
                texts[number] = text[match.end() :]
    return Reply(code, "\n".join(texts), status)
