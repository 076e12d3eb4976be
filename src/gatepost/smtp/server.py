"""The SMTP server's side of the protocol, without a socket: octets in, events out; replies in, octets out.

Why: the order of commands, the framing of lines and content, and what a reply changes are one small machine that can
    be read, drawn, tested octet by octet and fuzzed, because nothing else is in it.
Trust: every octet is the client's.  ``receive`` never raises on what a peer sent.
Promise: at most one question is open, so that replies go out in the order of the commands (RFC 2920 §3.2) without any
    bookkeeping; only a positive reply moves the state, by the table below; what is kept in memory is bounded by
    COMMAND_OCTETS_MAX between commands (AUTH_OCTETS_MAX of an AUTH command, where that is offered, and of a line of its
    exchange) and by one line and one block in content, plus what one ``receive`` brought.
    The events do not depend on how the octets were split, but for the size of a ContentChunk; of a message with a
    defect only that it has one is certain, not which of several is named, nor how much was emitted before it.
Sources: RFC 5321 §4.1.4 (order of commands), §4.5.3.1.4 (command line), RFC 3030 (BDAT), RFC 3207 §4.2 (STARTTLS),
    RFC 4954 §4 (AUTH); XCLIENT as Postfix has it.
    Stricter: a line that ends in a bare LF ends the session unless bare newlines are normalised; a line that holds a
    bare CR or NUL is refused as a whole and nothing of it is executed.
"""

from __future__ import annotations

from enum import Enum, unique
from typing import Final, NamedTuple

from gatepost.smtp.command import (
    AUTH_OCTETS_MAX,
    COMMAND_OCTETS_MAX,
    Auth,
    Bdat,
    Command,
    Data,
    Expn,
    Foreign,
    Hello,
    Help,
    Mail,
    Noop,
    Quit,
    Rcpt,
    Rset,
    StartTls,
    Vrfy,
    Xclient,
    parse_command,
)
from gatepost.smtp.content import BdatReceiver, ContentLimits, DataReceiver, Defect
from gatepost.smtp.reply import Reply

JOIN_OCTETS = 1 << 12  # a longer read is not copied just to complete the line that began before it
FLOOD_OCTETS = 1 << 16  # so much of one over-long line is read before the session is given up


@unique
class State(Enum):
    """Where the dialogue stands."""

    START = "nothing said yet"
    READY = "greeted, no transaction"
    MAIL = "a reverse-path is known"
    RCPT = "at least one forward-path is admitted"
    CONTENT = "content after DATA"
    CHUNK = "octets of a BDAT chunk"
    CHUNKED = "between BDAT chunks"
    AUTH = "in an authentication exchange: the next line is a response, whatever it looks like"
    XCLIENT = "XCLIENT answered with 220; this engine hears nothing more"
    TLS = "STARTTLS answered with 220; this engine hears nothing more"
    CLOSED = "no command is read any more"

    __hash__ = object.__hash__  # a member is equal to itself alone; Enum's own is written in Python


# A member has a name of its own here: Python 3.11 finds it so in a sixth of the time that ``State.READY`` takes, and a
# message looks at the state sixty times.
_START: Final = State.START
_READY: Final = State.READY
_MAIL: Final = State.MAIL
_RCPT: Final = State.RCPT
_CONTENT: Final = State.CONTENT
_CHUNK: Final = State.CHUNK
_CHUNKED: Final = State.CHUNKED
_AUTH: Final = State.AUTH
_XCLIENT: Final = State.XCLIENT
_TLS: Final = State.TLS
_CLOSED: Final = State.CLOSED


class ContentChunk(NamedTuple):
    """A block of whole CRLF lines of content, dot-stuffing removed.  Asks nothing."""

    octets: bytes


class ContentEnded(NamedTuple):
    """Content is complete: the question whose positive answer takes responsibility.  RFC 5321 §4.2.5, §6.1.

    Attributes:
        size_octets, eight_bit, dotted: of the content; of content with a defect only of what was read before it, which
            depends on how the octets came.
    """

    size_octets: int
    defect: Defect | None
    eight_bit: bool
    dotted: bool


class ChunkEnded(NamedTuple):
    """A BDAT chunk that is not the last is complete; wants an answer.  RFC 3030 §2."""

    size_octets: int
    defect: Defect | None


class AuthResponse(NamedTuple):
    """A line of the client's in an authentication exchange, without CRLF: base64, or "*".  RFC 4954 §4.

    A question: 334 asks for another one, any other reply ends the exchange.
    """

    octets: bytes

    def __repr__(self) -> str:
        return "AuthResponse()"  # nearly always a secret


class Refused(NamedTuple):
    """The engine itself has answered: bad syntax, bad order, bad framing.  Asks nothing.

    Attributes:
        fatal: the session must end once the reply is sent; the engine reads no further command.
    """

    reply: Reply
    fatal: bool = False


@unique
class Signal(Enum):
    """No event: more octets are needed, or an open question must be answered first."""

    NEED_DATA = "need data"
    PAUSED = "paused"


NEED_DATA: Final = Signal.NEED_DATA
PAUSED: Final = Signal.PAUSED

Event = Command | AuthResponse | ContentChunk | ContentEnded | ChunkEnded | Refused

# RFC 5321 §4.1.4 as a table: in which state a command is in order, and the state after a positive reply to it
# (None: the same state).  What is not listed for a state the engine itself answers with 503.
_ANY_TIME: Final[dict[type, State | None]] = {Noop: None, Help: None, Vrfy: None, Expn: None, Quit: _CLOSED}
_HELLO: Final[dict[type, State | None]] = {**_ANY_TIME, Hello: _READY}
_TABLE: Final[dict[State, dict[type, State | None]]] = {
    _START: {**_HELLO, Rset: None, Xclient: _XCLIENT},
    _READY: {
        **_HELLO,
        Rset: None,
        Mail: _MAIL,
        StartTls: _TLS,
        Auth: _AUTH,
        Xclient: _XCLIENT,
    },
    _MAIL: {**_HELLO, Rset: _READY, Rcpt: _RCPT},
    _RCPT: {**_HELLO, Rset: _READY, Rcpt: None, Data: _CONTENT},  # and BDAT, see _bdat()
    _CHUNKED: {**_HELLO, Rset: _READY},  # RFC 3030 §2: nothing but BDAT, RSET and the harmless
}

_IN_CONTENT: Final = frozenset({_CONTENT, _CHUNK, _CHUNKED})

_HELLO_FIRST = Reply(503, "Say EHLO or HELO first", "5.5.1")
_MAIL_FIRST = Reply(503, "MAIL first", "5.5.1")
_RCPT_FIRST = Reply(503, "RCPT first", "5.5.1")
_BAD_SEQUENCE = Reply(503, "Not now: a transaction is open", "5.5.1")
_NO_VALID_RECIPIENTS = Reply(554, "No valid recipients", "5.5.1")  # RFC 5321 §3.3: 503 or 554
_LINE_TOO_LONG = Reply(500, "Line too long", "5.5.2")
_RESPONSE_TOO_LONG = Reply(500, "Authentication exchange line is too long", "5.5.6")  # RFC 4954 §6
_BARE_LF = Reply(500, "Lines end in CRLF, this one ended in a bare LF; closing", "5.5.2")
_BARE_CR_OR_NUL = Reply(500, "The line holds a bare CR or NUL; nothing of it was executed", "5.5.2")
_NOT_SMTP = Reply(554, "This is an SMTP server; closing", "5.5.1")


def _out_of_order(state: State, command: Command) -> Reply:
    """The 503 that says which command was missing.  RFC 5321 §4.1.4."""
    if state is _START:
        return _HELLO_FIRST
    if isinstance(command, Rcpt) and state is _READY:
        return _MAIL_FIRST
    if isinstance(command, Data | Bdat):
        return _NO_VALID_RECIPIENTS if state is _MAIL else _MAIL_FIRST if state is _READY else _BAD_SEQUENCE
    return _BAD_SEQUENCE


class ServerEngine:
    """One SMTP session's protocol, server side.

    Feed ``receive``; take ``next_event`` until it says NEED_DATA or PAUSED; answer each command, AuthResponse,
    ContentEnded and ChunkEnded with ``respond``; send ``data_to_send``.  After a positive answer to STARTTLS or XCLIENT
    it is spent, and a new one takes its place.

    Args:
        offered: EHLO keywords in force; parameters of others are refused.  May be replaced at each EHLO.
        limits: bounds of content.
    """

    __slots__ = (
        "_begun",
        "_buffer",
        "_content_octets",
        "_ended",
        "_next",
        "_output",
        "_overlong_octets",
        "_position",
        "_receiver",
        "_smtputf8",
        "_swallow_octets",
        "_swallow_reply",
        "limits",
        "offered",
        "question",
        "state",
    )

    def __init__(self, offered: frozenset[str], limits: ContentLimits) -> None:
        self.offered = offered
        self.limits = limits
        self.state = _START
        self.question: object | None = None
        self._next: State | None = None
        self._buffer = b""
        self._begun = b""
        self._position = 0
        self._output: list[bytes] = []
        self._overlong_octets = 0
        self._smtputf8 = False  # the open transaction's; RFC 6531 §3.4 lets its forward-paths hold UTF-8
        self._swallow_octets = 0
        self._swallow_reply: Reply | None = None
        self._ended = False
        self._content_octets = 0
        self._receiver: DataReceiver | BdatReceiver | None = None

    def receive(self, octets: bytes) -> None:
        """Take what the peer sent.  After STARTTLS, XCLIENT or the end of the session it is dropped.  RFC 3207 §4.2."""
        state = self.state
        if state is _TLS or state is _CLOSED or state is _XCLIENT:
            return
        rest = self._buffer[self._position :] if self._position < len(self._buffer) else b""
        self._position = 0
        if not rest:
            self._buffer = octets
        elif self._line_began and not self._begun and len(octets) > JOIN_OCTETS:
            self._begun, self._buffer = rest, octets  # the line that began is joined alone, see _begun_line()
        else:
            self._buffer = rest + octets

    @property
    def _line_began(self) -> bool:
        """What is unread is the beginning of a line of content, and not what came behind the end of content."""
        return self.state is _CONTENT and self.question is None and not self._ended

    @property
    def unread_octets(self) -> int:
        """Received and not yet taken: what a client sent without waiting for replies."""
        return len(self._begun) + len(self._buffer) - self._position

    @property
    def in_content(self) -> bool:
        """A message is on its way: in content, in or between chunks, or in a chunk that is dropped."""
        return self.state in _IN_CONTENT or self._swallow_reply is not None

    def next_event(self) -> Event | Signal:
        """The next thing the peer said, in order."""
        if self.question is not None:
            return PAUSED
        state = self.state
        if state is _CONTENT or state is _CHUNK:
            return self._content()
        if state is _CLOSED or state is _TLS:
            return NEED_DATA
        if self._swallow_reply is not None:
            return self._swallow()
        if self._position >= len(self._buffer):
            return NEED_DATA
        return self._response() if state is _AUTH else self._command()

    def respond(self, reply: Reply) -> None:
        """Answer the open question; only a positive reply moves the state.  RFC 5321 §4.1.4."""
        question = self.question
        if question is None:
            raise RuntimeError("there is no question to answer")
        self.question = None
        self._output.append(reply.octets())
        if self.state is _CLOSED:
            return
        if type(question) is ContentEnded:
            self.state = _READY  # RFC 5321 §4.1.1.4: whatever the answer, the buffers are cleared
            self._receiver = None
        elif type(question) is ChunkEnded:
            self.state = _CHUNKED if reply.positive else _READY
            if not reply.positive:
                self._receiver = None
        elif reply.positive and self._next is not None:
            self.state = self._next
            if type(question) is Mail:
                self._smtputf8 = question.parameters.smtputf8
            elif self._next is _CONTENT:
                self._receiver = DataReceiver(self.limits)
                self._content_octets = 0
            elif self._next is _READY:
                self._receiver = None
            elif self._next is _AUTH and reply.code != 334:
                self.state = _READY  # RFC 4954 §4: 235 ends the exchange
            elif self._next is _TLS or self._next is _CLOSED or self._next is _XCLIENT:
                self._buffer, self._position = b"", 0

    def say(self, reply: Reply) -> None:
        """Send a reply that answers no command: the greeting, or a 421 before hanging up.  RFC 5321 §3.1, §3.8."""
        self._output.append(reply.octets())

    def close(self) -> None:
        """Read no further command; an open question may still be answered."""
        self.state = _CLOSED
        self._buffer, self._begun, self._position = b"", b"", 0

    def data_to_send(self) -> bytes:
        """The octets of all replies since the last call."""
        output = self._output
        octets = output[0] if len(output) == 1 else b"".join(output)
        output.clear()
        return octets

    # ---- commands

    def _command(self) -> Event | Signal:
        line = self._line()
        if not isinstance(line, bytes):
            return line
        command = parse_command(line, self.offered, smtputf8=self._smtputf8)
        kind = type(command)
        if kind is Reply:
            return self._refuse(command, fatal=self._announces_chunk(line))  # type: ignore[arg-type]
        if kind is Bdat:
            return self._bdat(command)  # type: ignore[arg-type]
        if kind is Foreign:
            return self._refuse(_NOT_SMTP, fatal=True)
        allowed = _TABLE[self.state]
        if kind not in allowed:
            return self._refuse(_out_of_order(self.state, command))  # type: ignore[arg-type]
        self._next = allowed[kind]
        self.question = command
        return command  # type: ignore[return-value]

    def _response(self) -> Event | Signal:
        """The next line of an authentication exchange, which is over unless a 334 answers it.  RFC 4954 §4."""
        line = self._line()
        if line is NEED_DATA:
            return NEED_DATA
        if self.state is _AUTH:  # and not CLOSED, by a line that ended in a bare LF
            self.state = _READY
        if not isinstance(line, bytes):
            return line
        self._next = _AUTH
        self.question = response = AuthResponse(line)
        return response

    def _line(self) -> bytes | Event | Signal:
        """The next line without its CRLF: a command, or a response to a challenge.  RFC 5321 §2.3.8, §4.5.3.1.4."""
        buffer, start = self._buffer, self._position
        newline = buffer.find(b"\n", start)
        if newline < 0:
            octets = len(buffer) - start
            if self._overlong_octets or (octets > COMMAND_OCTETS_MAX and octets > self._line_octets_max(start)):
                # The rest of an over-long line must not become a line of its own: drop up to its LF, keep a CR.
                keep = len(buffer) - 1 if buffer.endswith(b"\r") else len(buffer)
                self._overlong_octets += keep - start
                self._position = keep
                if self._overlong_octets > FLOOD_OCTETS:
                    return self._refuse(_LINE_TOO_LONG, fatal=True)
            return NEED_DATA
        self._position = newline + 1
        end = newline - 1 if newline > start and buffer[newline - 1] == 0x0D else newline
        dropped, self._overlong_octets = self._overlong_octets, 0
        length = dropped + end - start
        if length > FLOOD_OCTETS:
            return self._refuse(_LINE_TOO_LONG, fatal=True)
        if end == newline and not self.limits.normalise:
            return self._refuse(_BARE_LF, fatal=True)
        if length + 2 > COMMAND_OCTETS_MAX and (dropped or length + 2 > self._line_octets_max(start)):
            return self._refuse(_RESPONSE_TOO_LONG if self.state is _AUTH else _LINE_TOO_LONG)
        line = buffer[start:end]
        if b"\r" in line or b"\0" in line:
            return self._refuse(_BARE_CR_OR_NUL, fatal=self._announces_chunk(line))
        return line

    def _line_octets_max(self, start: int) -> int:
        """How long the line that begins at ``start`` may be, CRLF included.  RFC 4954 §4."""
        if self.state is _AUTH:
            return AUTH_OCTETS_MAX
        asks = self._buffer[start : start + 5].upper() == b"AUTH " and "AUTH" in self.offered
        return AUTH_OCTETS_MAX if asks else COMMAND_OCTETS_MAX

    def _announces_chunk(self, line: bytes) -> bool:
        """A BDAT that is refused leaves unknown how many octets behind it are no commands.  RFC 3030 §2."""
        return line[:4].upper() == b"BDAT" and "CHUNKING" in self.offered and self.state is not _AUTH

    def _refuse(self, reply: Reply, *, fatal: bool = False) -> Refused:
        self._output.append(reply.octets())
        if fatal:
            self.close()
        return Refused(reply, fatal)

    # ---- content

    def _content(self) -> Event | Signal:
        """Content after DATA or in a BDAT chunk: a block, then the question at its end."""
        receiver = self._receiver
        assert receiver is not None
        if self._ended:
            return self._content_ended(receiver)
        block = self._begun_line(receiver) if self._begun else b""
        if not block and not self._ended:
            octets, start = self._buffer, self._position
            block, self._position, self._ended = receiver.take(octets, start)
            self._content_octets += self._position - start
        if block:
            return ContentChunk(block)
        ceiling = 2 * (self.limits.message_size_octets or self._content_octets) + FLOOD_OCTETS
        if receiver.defect is not None and self._content_octets > ceiling:
            return self._refuse(receiver.defect.reply, fatal=True)
        return self._content_ended(receiver) if self._ended else NEED_DATA

    def _begun_line(self, receiver: DataReceiver | BdatReceiver) -> bytes:
        """The line that began before the last read, alone, so that the read need not be copied to be joined to it."""
        buffer = self._buffer
        end = buffer.find(b"\n") + 1
        line, self._begun = self._begun + buffer[:end], b""
        if not end:
            self._buffer = line + buffer
            return b""
        block, taken, self._ended = receiver.take(line)
        self._content_octets += taken
        if taken < len(line):  # the beginning of an end, perhaps
            self._buffer = line[taken:] + buffer[end:]
        else:
            self._position = end
        return block

    def _content_ended(self, receiver: DataReceiver | BdatReceiver) -> ContentEnded | ChunkEnded:
        self._ended = False
        question: ContentEnded | ChunkEnded
        if type(receiver) is BdatReceiver and not receiver.last:
            question = ChunkEnded(receiver.size_octets, receiver.defect)
        else:
            question = ContentEnded(receiver.size_octets, receiver.defect, receiver.eight_bit, receiver.dotted)
        self.question = question
        return question

    # ---- BDAT: the octets follow the command at once, whatever the answer will be.  RFC 3030 §2

    def _bdat(self, command: Bdat) -> Event | Signal:
        ceiling = 2 * self.limits.message_size_octets + FLOOD_OCTETS
        if self.limits.message_size_octets and command.size_octets > ceiling:
            return self._refuse(Defect.TOO_LARGE.reply, fatal=True)
        if self.state is not _RCPT and self.state is not _CHUNKED:
            self._swallow_octets = command.size_octets
            self._swallow_reply = _out_of_order(self.state, command)
            return self._swallow()
        if self.state is _RCPT:
            self._receiver = BdatReceiver(self.limits)
            self._content_octets = 0
        assert type(self._receiver) is BdatReceiver
        self._receiver.begin(command.size_octets, last=command.last)
        self.state = _CHUNK
        return self._content()

    def _swallow(self) -> Event | Signal:
        """Drop the octets of a chunk that is out of order, then refuse it."""
        dropped = min(self._swallow_octets, self.unread_octets)
        self._position += dropped
        self._swallow_octets -= dropped
        if self._swallow_octets:
            return NEED_DATA
        reply, self._swallow_reply = self._swallow_reply, None
        assert reply is not None
        return self._refuse(reply)
