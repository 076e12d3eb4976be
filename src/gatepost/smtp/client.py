"""The SMTP client's side of the protocol, without a socket: octets in, replies out; values in, commands out.

Why: what the gate says to a backend is built from values alone, and what a backend says is taken apart in one place.
Trust: a backend is believed about mail, not about framing: its octets are bounded and checked like anybody's.
Promise: every reply belongs to a command; what comes unasked, too long or malformed is a BackendDefect, after which the
    engine hears nothing more, so that a reply can never be taken for the answer to another command.  Memory is bounded
    by REPLY_OCTETS_MAX and what one ``receive`` brought.  The replies do not depend on how the octets were split.
Sources: RFC 5321 §4.2 (replies), §4.2.1 (multiline replies), §4.5.3.1.5 (reply line), §4.1.1.1 (EHLO response),
    RFC 2033 §4.1 (LHLO), RFC 3207 §4.2 (after STARTTLS), RFC 1870 §4 (SIZE), RFC 4954 §3 (AUTH),
    RFC 3461 §4 (xtext); Postfix's XCLIENT_README (XCLIENT).
    Stricter: a bare LF does not end a reply line (§2.3.8: nothing but CRLF is to be recognised; no server that needs
    it was found).  Wider: lines up to 2048 octets and second digits 6 to 9 (571, 591), for real servers send them;
    a client acts on the first digit (§4.3.2).
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

from gatepost.smtp.command import MailParameters, RcptParameters
from gatepost.smtp.path import ForwardPath, ReversePath
from gatepost.smtp.reply import LINES_MAX, Reply, from_backend

LINE_OCTETS_MAX = 2048  # CRLF included; RFC 5321 §4.5.3.1.5 asks for 512 at least
REPLY_OCTETS_MAX = 1 << 16
MECHANISMS_MAX = 32
KNOWN_MAX = 256
KNOWN_OCTETS_MAX = 80
XCLIENT_VALUE_OCTETS_MAX = 255  # before xtext; Postfix takes no longer HELO, and all fit in a line of 2048 octets

DATA: Final = b"DATA\r\n"
RSET: Final = b"RSET\r\n"
QUIT: Final = b"QUIT\r\n"
STARTTLS: Final = b"STARTTLS\r\n"

# RFC 5321 §4.2: Reply-code [ SP textstring ]; the text may hold any octet but the line ends.
_LINE = re.compile(rb"([2-5][0-9][0-9])(?:([ -])([^\r\n]*+))?\r\n")
# RFC 5321 §4.1.1.1: ehlo-keyword, and ehlo-params separated by SP.
_EHLO_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]{0,62})(?:[ \t]+([\x21-\x7e \t]{0,480}))?")
_SIZE = re.compile(r"[0-9]{1,20}")  # RFC 1870 §4
_MECHANISM = re.compile(r"[A-Z0-9_-]{1,20}")  # RFC 4422 §3.1
# Replies of one line seen before, by the whole line: nearly all that a backend says are "250 2.1.5 Ok" and its like.
_KNOWN: dict[bytes, Reply] = {}
_HELLO_NAME = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}")
# RFC 3461 §4: xchar is any ASCII character from "!" to "~" but "+" and "=".
_NOT_XCHAR = re.compile(rb"[^!-*,-<>-~]")
_UNAVAILABLE = "[UNAVAILABLE]"
# XCLIENT_README: what we can tell.  DESTADDR and DESTPORT stay those of our own connection.
_XCLIENT_ATTRIBUTES: Final = ("ADDR", "PORT", "NAME", "REVERSE_NAME", "HELO", "PROTO", "LOGIN")


class BackendDefect(NamedTuple):
    """The backend broke the protocol; ``text`` says how, for the operator.  The connection is of no more use."""

    text: str


class Capabilities(NamedTuple):
    """What a backend said in its answer to EHLO or LHLO.

    Attributes:
        keywords: upper case; empty after HELO.
        size_octets: the SIZE it takes; None where it names none (SIZE 0, or no number at all).
        mechanisms: of AUTH, upper case.
        xclient: the attributes of XCLIENT that it takes and we can tell; none where ADDR is not among them.
    """

    keywords: frozenset[str] = frozenset()
    size_octets: int | None = None
    mechanisms: frozenset[str] = frozenset()
    xclient: frozenset[str] = frozenset()


class Introduction(NamedTuple):
    """Whom a backend is told that the mail comes from.

    Attributes:
        hello: the client's claim, "" where it made none; esmtp: in EHLO.
        account: "" where nobody has authenticated.
    """

    address: IPv4Address | IPv6Address
    port: int
    hello: str
    esmtp: bool
    account: str


def parse_ehlo(reply: Reply) -> Capabilities:
    """The capabilities in a positive answer to EHLO; lines that are none are passed over.  RFC 5321 §4.1.1.1."""
    keywords = set()
    size_octets: int | None = None
    mechanisms: frozenset[str] = frozenset()
    xclient: frozenset[str] = frozenset()
    for line in reply.text.split("\n")[1:]:  # the first line holds the backend's name and its greeting
        match = _EHLO_LINE.fullmatch(line.rstrip(" \t"))
        if match is None:
            continue
        keyword, parameters = match[1].upper(), match[2] or ""
        keywords.add(keyword)
        if keyword == "SIZE" and _SIZE.fullmatch(parameters):
            size_octets = int(parameters) or None  # RFC 1870 §4: 0 is no fixed maximum
        elif keyword == "AUTH":
            words = parameters.upper().split()[:MECHANISMS_MAX]
            mechanisms |= {word for word in words if _MECHANISM.fullmatch(word)}
        elif keyword == "XCLIENT":
            attributes = frozenset(parameters.upper().split()).intersection(_XCLIENT_ATTRIBUTES)
            xclient = attributes if "ADDR" in attributes else frozenset()
    return Capabilities(frozenset(keywords), size_octets, mechanisms, xclient)


class ClientEngine:
    """One connection's protocol, client side.

    Announce with ``expect`` how many replies the octets about to be sent ask for; feed ``receive``; take ``next_reply``
    until it returns None.  After a handshake (RFC 3207 §4.2) a new engine takes the place of the old one.
    """

    __slots__ = ("_at", "_buffer", "_code", "_defect", "_lines", "_octets", "expected")

    def __init__(self) -> None:
        self.expected = 0
        self._buffer = b""
        self._at = 0
        self._code = b""
        self._lines: list[bytes] = []
        self._octets = 0
        self._defect: BackendDefect | None = None

    def expect(self, replies: int) -> None:
        """So many replies more are due."""
        self.expected += replies

    def receive(self, octets: bytes) -> None:
        """Take what the backend sent; never raises."""
        if self._at < len(self._buffer):
            self._buffer = self._buffer[self._at :] + octets
        else:
            self._buffer = octets
        self._at = 0

    def next_reply(self) -> Reply | BackendDefect | None:
        """The next complete reply, a defect, or None when more octets are needed."""
        buffer = self._buffer
        if self._defect is not None or self._at >= len(buffer):
            return self._defect
        if not self.expected:
            # Covers response injection too: octets behind the 220 to STARTTLS were asked by nobody.
            return self._end("it spoke unasked")
        if not self._lines:
            end = buffer.find(b"\n", self._at) + 1
            known = _KNOWN.get(buffer[self._at : end])
            if known is not None:
                self._at = end
                self.expected -= 1
                return known
        while True:
            start = self._at
            match = _LINE.match(buffer, start)
            if match is None:
                return self._incomplete()
            length = match.end() - start
            if length > LINE_OCTETS_MAX:
                return self._end("a reply line is too long")
            self._at = match.end()
            code, separator, text = match.groups()
            if separator != b"-" and not self._lines:
                self.expected -= 1
                reply = from_backend(int(code), [text or b""])
                if length <= KNOWN_OCTETS_MAX:
                    if len(_KNOWN) >= KNOWN_MAX:
                        _KNOWN.clear()
                    _KNOWN[match[0]] = reply
                return reply
            defect = self._continue(code, text or b"", length)
            if defect is not None:
                return defect
            if separator != b"-":
                lines, self._lines, self._octets = self._lines, [], 0
                self.expected -= 1
                return from_backend(int(code), lines)

    def _continue(self, code: bytes, text: bytes, length: int) -> BackendDefect | None:
        """One line of a reply of several.  RFC 5321 §4.2.1: the same code on every line."""
        if self._lines and code != self._code:
            return self._end("the lines of a reply have different codes")
        self._code = code
        self._lines.append(text)
        self._octets += length
        if len(self._lines) > LINES_MAX or self._octets > REPLY_OCTETS_MAX:
            return self._end("a reply is too long")
        return None

    def _incomplete(self) -> BackendDefect | None:
        """No whole line at the start of the buffer: wait for its rest, unless it cannot become one."""
        pending = len(self._buffer) - self._at
        if self._buffer.find(b"\n", self._at) >= 0:
            return self._end("a line is no SMTP reply")
        if pending >= LINE_OCTETS_MAX:
            return self._end("a reply line is too long")
        return None

    def _end(self, text: str) -> BackendDefect:
        self._buffer, self._at, self._lines = b"", 0, []
        self._defect = BackendDefect(text)
        return self._defect


# ---- commands, built from values alone: nothing that a client sent is ever passed through


def hello(verb: str, name: str) -> bytes:
    """EHLO, HELO or LHLO.

    Args:
        name: our own, from the configuration: a domain or an address literal.

    Raises:
        ValueError: when the name could be anything else.
    """
    if _HELLO_NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is no name to say in {verb}: a host name or [address] is")
    return f"{verb} {name}\r\n".encode()


def is_hello_name(name: str) -> bool:
    """``hello`` takes it."""
    return _HELLO_NAME.fullmatch(name) is not None


def xclient(introduction: Introduction, attributes: frozenset[str]) -> bytes:
    """XCLIENT with each of the attributes: what is left out would stay what it was for the client before.

    Args:
        attributes: of ``Capabilities.xclient``.

    Source: XCLIENT_README, "XCLIENT Command syntax".
    """
    address = introduction.address
    values = {
        "ADDR": f"IPV6:{address}" if address.version == 6 else str(address),
        "PORT": str(introduction.port),
        # We look up no names; left out, the gate's own name would stay.
        "NAME": _UNAVAILABLE,
        "REVERSE_NAME": _UNAVAILABLE,
        "HELO": _attribute_value(introduction.hello),
        "PROTO": "ESMTP" if introduction.esmtp else "SMTP",
        "LOGIN": _attribute_value(introduction.account),
    }
    words = [f"{name}={values[name]}" for name in _XCLIENT_ATTRIBUTES if name in attributes]
    return f"XCLIENT {' '.join(words)}\r\n".encode("ascii")


def _attribute_value(text: str) -> str:
    """In xtext, RFC 3461 §4.  What is missing or too long is told as not available, never cut."""
    octets = text.encode()
    if not 0 < len(octets) <= XCLIENT_VALUE_OCTETS_MAX:
        return _UNAVAILABLE
    return _NOT_XCHAR.sub(lambda match: b"+%02X" % match[0][0], octets).decode("ascii")


def mail(reverse_path: ReversePath, parameters: MailParameters, offered: frozenset[str]) -> bytes:
    """MAIL, with those parameters that this backend offers.  RFC 5321 §4.1.1.2."""
    return b"MAIL FROM:<%b>%b\r\n" % (reverse_path.octets, parameters.octets(offered))


def rcpt(forward_path: ForwardPath, parameters: RcptParameters, offered: frozenset[str]) -> bytes:
    """RCPT, with those parameters that this backend offers.  RFC 5321 §4.1.1.3."""
    return b"RCPT TO:<%b>%b\r\n" % (forward_path.octets, parameters.octets(offered))
