"""What is said before a login in POP3 and IMAP, as values: commands of clients, capabilities and refusals of servers.

Why: the proxy in front of an old mailbox server hands nothing on raw before a login; each command is read here, and
    what the server is told is written here anew.
Trust: clients are anybody; the server belongs to the administrator, and is bounded even so.
Promise: pure; nothing raises on what a peer sent, and no line, literal or list is longer than its limit.  A line with
    NUL or with a CR that ends nothing is refused; one that ends in LF alone is a line, since none is copied.
Sources: RFC 1939 (POP3), RFC 2449 (CAPA, response codes), RFC 3206 (AUTH, SYS), RFC 5034 (AUTH in POP3); RFC 9051 and
    RFC 3501 (IMAP), RFC 7888 (LITERAL+), RFC 4959 (SASL-IR), RFC 5530 (response codes); RFC 2595 (TLS for both).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gatepost.smtp.sasl import Password, client_initial

POP3_COMMAND_OCTETS_MAX = 512  # RFC 2449 §4 has 255; AUTH with its response may be AUTH_OCTETS_MAX (RFC 5034 §4)
IMAP_LINE_OCTETS_MAX = 8192
LITERAL_OCTETS_MAX = 4096
LITERALS_MAX = 4  # of one command; LOGIN has two
TAG_OCTETS_MAX = 64
SERVER_LINE_OCTETS_MAX = 8192
CAPABILITIES_MAX = 64  # lines of CAPA, keywords of CAPABILITY

MECHANISMS = ("PLAIN", "LOGIN")  # those whose account and secret the proxy sees

_POP3 = re.compile(rb"([A-Za-z0-9]{3,8})(?: (.*))?", re.DOTALL)
_TAG = re.compile(rb'[^\x00-\x20(){%%*"\\+\x7f-\xff]{1,%d}(?= |\Z)' % TAG_OCTETS_MAX)  # RFC 9051 §9: tag
_VERB = re.compile(rb" ([A-Za-z]{1,32})(?= |\Z)")
_LITERAL = re.compile(rb"\{([0-9]{1,10})(\+?)\}\Z")  # RFC 7888 §8
_ARGUMENT = re.compile(rb' (?:"((?:[^"\\]|\\["\\])*)"|([^\x00-\x20(){%*"\\\x7f-\xff]+))')  # RFC 9051 §9: astring
_CAPABILITY = re.compile(r"[!-~]{1,64}(?: [!-~]{1,64}){0,16}")
_POP3_CODE = re.compile(rb"-ERR \[([A-Za-z/-]+)")
_IMAP_CODE = re.compile(rb"NO \[([A-Za-z-]+)", re.IGNORECASE)

# What a server says when it did not judge the secret.  RFC 2449 §8.1, RFC 3206 §4; RFC 5530 §3.
_POP3_UNJUDGED = frozenset({b"SYS/TEMP", b"SYS/PERM", b"IN-USE", b"LOGIN-DELAY"})
_IMAP_UNJUDGED = frozenset({b"UNAVAILABLE", b"INUSE", b"LIMIT", b"SERVERBUG", b"CONTACTADMIN", b"PRIVACYREQUIRED"})

# What of a server's capabilities does not hold through the proxy, or is the proxy's own to say.
_POP3_OWN = frozenset({"STLS", "SASL", "USER", "APOP", "RESP-CODES", "AUTH-RESP-CODE", "UTF8", "LANG"})
_IMAP_OWN = re.compile(r"STARTTLS|LOGINDISABLED|AUTH=.*|SASL-IR|COMPRESS=.*|LOGIN-REFERRALS|UNAUTHENTICATE|ID")


class Defect(NamedTuple):
    """What is wrong, for the client to read."""

    text: str


class Lines:
    """Octets of one peer, taken as lines, as counted octets, or as they are.

    Args:
        octets_max: of one line, its end included.
    """

    __slots__ = ("_octets", "_octets_max", "_searched")

    def __init__(self, octets_max: int) -> None:
        self._octets = bytearray()
        self._octets_max = octets_max
        self._searched = 0

    @property
    def unread_octets(self) -> int:
        """Received and not yet taken."""
        return len(self._octets)

    def receive(self, octets: bytes) -> None:
        """Take what the peer sent."""
        self._octets += octets

    def line(self) -> bytes | Defect | None:
        """The next line without its end; None while it is not all there.  After a defect nothing more is a line."""
        end = self._octets.find(b"\n", self._searched)
        if end >= self._octets_max or (end < 0 and len(self._octets) >= self._octets_max):
            return Defect("Line too long")
        if end < 0:
            self._searched = len(self._octets)
            return None
        line = bytes(self._octets[:end]).removesuffix(b"\r")
        if b"\0" in line or b"\r" in line:
            return Defect("NUL or CR inside a line")
        del self._octets[: end + 1]
        self._searched = 0
        return line

    def exactly(self, octets: int) -> bytes | None:
        """So many octets; None while they are not all there."""
        return self._take(octets) if len(self._octets) >= octets else None

    def rest(self) -> bytes:
        """All that is there."""
        return self._take(len(self._octets))

    def _take(self, octets: int) -> bytes:
        taken = bytes(self._octets[:octets])
        del self._octets[:octets]
        self._searched = 0
        return taken


# --- Commands of clients ----------------------------------------------------------------------------------------------


class Pop3Command(NamedTuple):
    """One command.  ``argument``: all behind the first space, spaces included; b"" for none.  RFC 1939 §3."""

    verb: str
    argument: bytes


def pop3_command(line: bytes) -> Pop3Command | Defect:
    """Read a command line, without its end.  RFC 1939 §3, RFC 2449 §4, RFC 5034 §4."""
    match = _POP3.fullmatch(line)
    if match is None:
        return Defect("This is POP3: a command is a word and what it is about")
    verb = match[1].decode("ascii").upper()
    if verb != "AUTH" and len(line) + len(b"\r\n") > POP3_COMMAND_OCTETS_MAX:
        return Defect("Command too long")
    return Pop3Command(verb, match[2] or b"")


class ImapCommand(NamedTuple):
    """One command with its literals.

    Attributes:
        arguments: atoms, quoted strings and literals alike, as plain octets; None where there is something else.
    """

    tag: str
    verb: str
    arguments: tuple[bytes, ...] | None


class LiteralAsked(NamedTuple):
    """The client waits for leave to send a literal: say "+" and go on, or ``refuse``.  RFC 9051 §4.3."""

    tag: str
    verb: str


class ImapDefect(NamedTuple):
    """No command.

    Attributes:
        tag: "*" where none can be made out; fatal: what follows cannot be told from a literal.
    """

    tag: str
    text: str
    fatal: bool = False


class ImapCommands:
    """Reads commands out of lines and literals."""

    __slots__ = ("_expected_octets", "_lines", "_parts", "_tag", "_verb")

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self.refuse()

    def refuse(self) -> None:
        """Forget the command whose literal is refused: the client does not send it."""
        self._tag = self._verb = ""
        self._parts: list[bytes] = []  # text, literal, text, literal, ... text
        self._expected_octets: int | None = None

    def next(self) -> ImapCommand | LiteralAsked | ImapDefect | None:
        """What comes next; None while it is not all there."""
        while True:
            if self._expected_octets is not None:
                literal = self._lines.exactly(self._expected_octets)
                if literal is None:
                    return None
                self._parts.append(literal)
                self._expected_octets = None
            line = self._lines.line()
            if line is None:
                return None
            if isinstance(line, Defect):
                return ImapDefect("*", line.text, fatal=True)
            found = self._take(line)
            if found is not None:
                return found

    def _take(self, line: bytes) -> ImapCommand | LiteralAsked | ImapDefect | None:
        """One line of a command; None where a literal follows that needs no leave."""
        literal = _LITERAL.search(line)
        if not self._parts:
            tag = _TAG.match(line)
            verb = None if tag is None else _VERB.match(line, tag.end())
            if tag is None or verb is None:
                name = "*" if tag is None else tag[0].decode("ascii")
                return ImapDefect(
                    name, "This is IMAP: a tag, a command", fatal=literal is not None and bool(literal[2])
                )
            self._tag, self._verb = tag[0].decode("ascii"), verb[1].decode("ascii").upper()
            line = line[verb.end() :]
        if literal is None:
            command = ImapCommand(self._tag, self._verb, _arguments([*self._parts, line]))
            self.refuse()
            return command
        octets, synchronising = int(literal[1]), not literal[2]
        if octets > LITERAL_OCTETS_MAX or len(self._parts) >= 2 * LITERALS_MAX:
            defect = ImapDefect(self._tag, "Too long or too many literals", fatal=not synchronising)
            self.refuse()
            return defect
        self._parts.append(line[: -len(literal[0])])
        self._expected_octets = octets
        return LiteralAsked(self._tag, self._verb) if synchronising else None


def _arguments(parts: Sequence[bytes]) -> tuple[bytes, ...] | None:
    """Text and literals by turns, to arguments."""
    found: list[bytes] = []
    for text, literal in zip(parts[:-1:2], parts[1::2], strict=True):
        arguments, left = _split(text)
        if left != b" ":
            return None
        found += [*arguments, literal]
    arguments, left = _split(parts[-1])
    return None if left else (*found, *arguments)


def _split(text: bytes) -> tuple[list[bytes], bytes]:
    """The arguments that a text begins with, and what is left of it."""
    found: list[bytes] = []
    position = 0
    while match := _ARGUMENT.match(text, position):
        found.append(match[2] if match[1] is None else re.sub(rb"\\(.)", rb"\1", match[1], flags=re.DOTALL))
        position = match.end()
    return found, text[position:]


# --- Capabilities -----------------------------------------------------------------------------------------------------


def capabilities(words: Iterable[bytes]) -> tuple[str, ...]:
    """What a server lists, as far as it can be shown to a client: printable ASCII, and not too much of it."""
    shown = (word.decode("ascii", "replace") for word in words)
    return tuple(word for word in shown if _CAPABILITY.fullmatch(word))[:CAPABILITIES_MAX]


def pop3_capabilities(server: Iterable[str], *, stls: bool, login: bool) -> tuple[str, ...]:
    """The lines that the proxy answers CAPA with.  RFC 2449 §5.

    Args:
        server: the server's own lines; stls: TLS can be switched on; login: a login is taken as the connection is.
    """
    kept = tuple(line for line in server if line.partition(" ")[0].upper() not in _POP3_OWN)
    ways = ("USER", "SASL " + " ".join(MECHANISMS)) if login else ()
    return (*kept, "RESP-CODES", "AUTH-RESP-CODE", *ways, *(("STLS",) if stls else ()))


def imap_capabilities(server: Iterable[str], *, starttls: bool, login: bool) -> tuple[str, ...]:
    """The keywords that the proxy answers CAPABILITY with.  RFC 9051 §6.1.1, §6.2.1; RFC 2595 §3.2."""
    kept = [word for word in server if not _IMAP_OWN.fullmatch(word.upper())]
    if not any(word.upper() in ("IMAP4REV1", "IMAP4REV2") for word in kept):
        kept.insert(0, "IMAP4rev1")
    ways = ("SASL-IR", *(f"AUTH={name}" for name in MECHANISMS)) if login else ("LOGINDISABLED",)
    return (*kept, "ID", *(("STARTTLS",) if starttls else ()), *ways)


# --- The proxy's own login at the server ------------------------------------------------------------------------------


def pop3_login(password: Password, server: Sequence[str] | None) -> list[bytes] | None:
    """The lines of a login, each to be sent when the server has said yes to the one before; None where there is no way.

    Args:
        server: what it answered CAPA with, None where it does not know CAPA.
    """
    lines = [b"USER " + password.user.encode(), b"PASS " + password.secret.encode()]
    if server is None:
        return lines
    offered = {name: words for name, *words in (line.upper().split() for line in server)}
    plain = "PLAIN" in offered.get("SASL", ())
    ordinary = all(line.isascii() and len(line) + len(b"\r\n") <= 255 for line in lines)  # RFC 2449 §4
    if plain and not (ordinary and "USER" in offered):
        return [b"AUTH PLAIN", base64.b64encode(client_initial("PLAIN", password))]
    return lines if "USER" in offered else None


def imap_login(password: Password, server: Sequence[str]) -> list[bytes] | None:
    """The lines of a login, each but the first to be sent when the server has said "+"; None where there is no way."""
    offered = {word.upper() for word in server}
    user, secret = password.user.encode(), password.secret.encode()
    ascii_only = user.isascii() and secret.isascii()
    if "AUTH=PLAIN" in offered and not (ascii_only and "LOGINDISABLED" not in offered):
        return [b"AUTHENTICATE PLAIN", base64.b64encode(client_initial("PLAIN", password))]
    if "LOGINDISABLED" in offered:
        return None
    if ascii_only:
        return [b"LOGIN %s %s" % (_quoted(user), _quoted(secret))]
    return [
        b"LOGIN {%d}" % len(user),
        b"%s {%d}" % (user, len(secret)),
        secret,
    ]  # RFC 9051 §4.3: a quoted string is ASCII


def _quoted(octets: bytes) -> bytes:
    return b'"' + octets.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'


def pop3_unjudged(line: bytes) -> bool:
    """Whether this -ERR says that the server could not judge the secret."""
    match = _POP3_CODE.match(line)
    return match is not None and match[1].upper() in _POP3_UNJUDGED


def imap_no(status: bytes) -> bool:
    """Whether what stands behind the tag is a no.  BAD says that the server did not understand.  RFC 9051 §7.1."""
    return status[:3].upper() in (b"NO", b"NO ")


def imap_unjudged(status: bytes) -> bool:
    """Whether this NO says that the server could not judge the secret."""
    match = _IMAP_CODE.match(status)
    return match is not None and match[1].upper() in _IMAP_UNJUDGED
