"""A backend that is as careless as the worst servers a gate may stand in front of, and remembers what it understood.

Why: whether an attack worked is decided by what arrives behind the gate and how it is read there, never by the reply
    codes in front.  So this server takes mail for anybody, misreads line ends, ends of content and addresses in the
    ways that real servers are known for, and writes each command, recipient and message as it understood them.
Trust: it listens on 127.0.0.1 only and sends nothing anywhere; what it is fed is hostile and bounded.
Promise: one mode is one family of servers (see MODES); ``strict`` reads as RFC 5321 says.
Sources: the advisories that cases.jsonl names; RFC 5321 §2.3.8, §4.1.1.4; RFC 3030 (BDAT); RFC 3207 (STARTTLS).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Self

from tests.vectors.readings import ALL_RULES, every_reading, plain

CONTENT_OCTETS_MAX = 80 << 20
LINE_OCTETS_MAX = 4 << 20
CR_PATIENCE_S = 0.05  # how long a CR waits for its LF before it counts as a line end of its own

_UNICODE_LINE_END = rb"(?:\r\n|[\n\r\x0b\x0c\x1c-\x1e]|\xc2?\x85|\xe2\x80[\xa8\xa9])"

# What else than CRLF.CRLF ends content, by the name of the habit.
CONTENT_ENDS = {
    "lf-dot-lf": (rb"\n\.\n",),
    "lf-dot-crlf": (rb"\n\.\r\n",),
    "crlf-dot-lf": (rb"\r\n\.\n",),
    "cr-dot-cr": (rb"\r\.\r\n?",),
    "cr-dot-crlf": (rb"\r\.\r\n",),
    "cr-dot-lf": (rb"\r\.\n",),
    "lf-dot-cr": (rb"\n\.\r\n?",),
    "crlf-dot-cr": (rb"\r\n\.\r\n?",),
    "crcrlf": (rb"\r\n\.\r\r\n", rb"\r\r\n\.\r\r\n", rb"\n\.\r\r\n"),
    # Two families that break on text which is legal in a message; no gate can shield them (docs/threat-model.md).
    "unicode-lines": (b"%b\\.%b" % (_UNICODE_LINE_END, _UNICODE_LINE_END),),
    "dot-and-blanks": (rb"\r\n[ \t\x0b\x0c]*\.[ \t\x0b\x0c]*\r\n",),
}
LINE_ENDS = {
    "bare-lf": rb"\n",
    "bare-cr": rb"\r",
    "unicode-lines": rb"[\n\x0b\x0c\x1c-\x1e]|\xc2\x85|\xe2\x80[\xa8\xa9]",
}

_ENDS = frozenset(CONTENT_ENDS) - {"unicode-lines", "dot-and-blanks"}
MODES: dict[str, frozenset[str]] = {
    "strict": frozenset(),
    "lf-dot-lf": frozenset({"lf-dot-lf", "bare-lf"}),
    "lf-dot-crlf": frozenset({"lf-dot-crlf", "bare-lf"}),
    "crlf-dot-lf": frozenset({"crlf-dot-lf", "bare-lf"}),
    "cr-dot-cr": frozenset({"cr-dot-cr", "cr-dot-crlf", "bare-cr"}),
    "crcrlf": frozenset({"crcrlf"}),
    "nul": frozenset({"nul-dropped"}),
    "c-string": frozenset({"nul-ends-line", "nul", "line-cut", "bare-lf"}),
    "percent-hack": frozenset({"percent-hack", "bang", "unquote", "backslash"}),
    "source-route": frozenset({"source-route"}),
    "7bit": frozenset({"seven-bit", "high-bit"}),
    "linesplit": frozenset({"long-lines-folded"}),
    "chunking": frozenset({"chunking"}),
    "chunking-broken": frozenset({"chunking", "chunk-dot", "chunk-size-sloppy"}),
    "xclient": frozenset({"xclient"}),
    "resp-inject": frozenset({"replies-injected"}),
    "old-unix": frozenset(
        {"lf-dot-lf", "lf-dot-crlf", "crlf-dot-lf", "bare-lf", "long-lines-folded", "blanks-trimmed", "send-verbs"}
        | {"percent-hack", "source-route", "bang", "unquote", "backslash", "comments", "many", "angle-last"}
    ),
    "all": frozenset(
        _ENDS | ALL_RULES | {"bare-lf", "bare-cr", "blanks-trimmed", "send-verbs", "xclient", "chunking", "nul-dropped"}
    ),
    "beyond": frozenset({"unicode-lines", "dot-and-blanks", "bare-lf"}),
}

_MAIL = re.compile(rb"FROM\s*:\s*(?P<argument>.*)", re.IGNORECASE | re.DOTALL)
_RCPT = re.compile(rb"TO\s*:\s*(?P<argument>.*)", re.IGNORECASE | re.DOTALL)
_CHUNK = re.compile(rb"(?P<size>\d+)(?:\s+(?P<last>LAST))?", re.IGNORECASE)
_CHUNK_SLOPPY = re.compile(rb"[+\s]*(?P<size>\d*)[^ ]*(?:\s+(?P<last>LAST).*)?", re.IGNORECASE | re.DOTALL)
_CHUNK_DOT = re.compile(rb"(?:\A|\r\n)\.\r\n")
_STUFFED = re.compile(rb"(\A|\r\n)\.")
_TRIMMED = re.compile(rb"\A(?:\xef\xbb\xbf|[\x00-\x20\x7f])+")


@dataclass(frozen=True)
class Heard:
    """One command line as this server understood it."""

    session: int
    line: bytes
    tls: bool


@dataclass(frozen=True)
class Recipient:
    """One RCPT that was accepted, whether or not a message follows."""

    session: int
    reverse_path: bytes
    argument: bytes
    readings: dict[bytes, tuple[str, ...]]


@dataclass(frozen=True)
class Transaction:
    """One message that was accepted.

    Attributes:
        peer: the address of the SMTP client: the gate's, or an attacker's where there is no gate in between.
        octets: the content, dot-stuffing removed.
    """

    session: int
    peer: str
    hello: bytes
    mail_argument: bytes
    reverse_path: bytes
    recipients: tuple[Recipient, ...]
    octets: bytes
    verb: str


@dataclass(frozen=True)
class Happened:
    """Something else worth knowing: "opened", "closed", "content cut short", "xclient", "believed injected replies"."""

    session: int
    what: str
    detail: bytes = b""


Record = Heard | Recipient | Transaction | Happened


class _Hangup(Exception):
    """This server ends the connection."""


class LenientSession:
    """One session without its socket: octets in, replies out, records to the journal.

    It is a generator that asks for octets with ``yield``; ``feed`` resumes it.  ``wants_patience`` is True while the
    meaning of a last CR depends on whether an LF follows soon.
    """

    def __init__(self, habits: frozenset[str], number: int, peer: str, record: Callable[[Record], None]) -> None:
        self._habits = habits
        self._number = number
        self._peer = peer
        self._record = record
        self._buffer = bytearray()
        self._out = bytearray()
        self._hello = b""
        self._injected = False
        self._clear()
        ends = [rb"\r\n", *(pattern for habit, pattern in LINE_ENDS.items() if habit in habits)]
        self._line_end = re.compile(b"|".join(ends))
        stops = [stop for habit, more in CONTENT_ENDS.items() if habit in habits for stop in more]
        stops.append(rb"\r\n\.\r\n")
        stops.sort(key=len, reverse=True)  # at one place the longest counts
        self._content_end = re.compile(b"|".join(stops))
        self.offers_tls = "replies-injected" in habits
        self.wants_patience = False
        self.wants_tls = False
        self.tls = False
        self.closed = False
        self._dialogue = self._run()
        next(self._dialogue)

    def feed(self, octets: bytes) -> bytes:
        """Take octets (b"" when a patient wait is over); returns what to send."""
        if "nul-dropped" in self._habits:
            octets = octets.replace(b"\0", b"")
        if "seven-bit" in self._habits:
            octets = bytes(octet & 0x7F for octet in octets)
        self._buffer += octets
        if not self.closed:
            try:
                next(self._dialogue)
            except (StopIteration, _Hangup):
                self.closed = True
        return self.replies()

    def replies(self) -> bytes:
        """What is to be sent now."""
        out, self._out = bytes(self._out), bytearray()
        return out

    def tls_started(self) -> None:
        """The handshake is over: nothing said before it counts.  RFC 3207 §4.2."""
        self.tls = True
        self.wants_tls = False
        self.offers_tls = False
        self._buffer.clear()
        self._clear()

    # ---- the dialogue

    def _clear(self) -> None:
        self._mail: bytes | None = None
        self._mail_argument = b""
        self._recipients: list[Recipient] = []
        self._chunks: bytearray | None = None

    def _say(self, *lines: str) -> None:
        self._out += b"".join(line.encode() + b"\r\n" for line in lines)

    def _run(self) -> Iterator[None]:
        self._say("220 lenient.test ESMTP")
        while True:
            line = yield from self._line()
            self._record(Heard(self._number, line, self.tls))
            self._judge_belief(line)
            yield from self._command(line)

    def _judge_belief(self, line: bytes) -> None:
        """After injected replies: using what only they offered, or going on without a new EHLO, is belief."""
        if not self._injected:
            return
        verb = line[:8].upper()
        if verb.startswith((b"EHLO", b"HELO")):
            self._injected = False
        if verb.startswith((b"AUTH", b"XCLIENT", b"XFORWARD", b"MAIL")):
            self._record(Happened(self._number, "believed injected replies", line))

    def _line(self) -> Generator[None, None, bytes]:
        """One command line, by the habits of this server."""
        limit = 512 if "long-lines-folded" in self._habits else LINE_OCTETS_MAX
        patient = False
        searched = 0
        while True:
            end = self._line_end.search(self._buffer, searched)
            if end and end[0] == b"\r" and end.end() == len(self._buffer) and not patient:
                patient = True
                yield from self._wait()
                continue
            if limit == 512 and (end.start() if end else len(self._buffer)) > limit:
                line = bytes(self._buffer[:limit])
                del self._buffer[:limit]
                return line
            if end:
                line = bytes(self._buffer[: end.start()])
                del self._buffer[: end.end()]
                return line.rstrip(b"\r") if "bare-lf" in self._habits else line
            if len(self._buffer) > LINE_OCTETS_MAX:
                raise _Hangup
            searched = max(0, len(self._buffer) - 4)
            patient = False
            yield

    def _wait(self) -> Iterator[None]:
        self.wants_patience = True
        yield
        self.wants_patience = False

    def _command(self, line: bytes) -> Iterator[None]:
        habits = self._habits
        if "nul-ends-line" in habits:
            line = line.partition(b"\0")[0]
        if "line-cut" in habits:
            line = line[:510]
        if "blanks-trimmed" in habits:
            line = _TRIMMED.sub(b"", line, count=1)
        if not habits and re.search(rb"[\r\n\0]", line):
            self._say("500 5.5.2 bare CR, LF or NUL")
            return
        line = line.strip()
        word = re.split(rb"[ \t:]", line, maxsplit=1)[0]
        verb, argument = word.upper().decode("latin-1"), line[len(word) :].strip()
        if verb in ("EHLO", "HELO", "LHLO"):
            self._hello = argument
            self._clear()
            self._say(*self._greeting(verb))
        elif verb == "MAIL" or (verb in ("SEND", "SOML", "SAML") and "send-verbs" in habits):
            self._mail_command(argument)
        elif verb == "RCPT":
            self._rcpt_command(argument)
        elif verb == "DATA":
            if self._recipients:
                self._say("354 go ahead")
                yield from self._content()
            else:
                self._say("503 5.5.1 RCPT first")
        elif verb == "BDAT" and "chunking" in habits:
            yield from self._chunk(argument)
        elif verb == "RSET":
            self._clear()
            self._say("250 2.0.0 cleared")
        elif verb in ("NOOP", "VRFY"):
            self._say("250 2.0.0 fine" if verb == "NOOP" else "252 2.0.0 perhaps")
        elif verb == "QUIT":
            self._say("221 2.0.0 bye")
            raise _Hangup
        elif verb in ("XCLIENT", "XFORWARD"):
            self._record(Happened(self._number, verb.lower(), argument))
            offered = "xclient" in habits
            self._say(
                "500 5.5.1 unknown" if not offered else "220 2.0.0 so be it" if verb == "XCLIENT" else "250 2.0.0 ok"
            )
        elif verb == "STARTTLS" and self.offers_tls and not self.tls:
            # NO STARTTLS (USENIX Security 21): what follows the 220 in plain text must not be taken for a reply.
            self._say("220 go ahead", "250-injected.test", "250-XCLIENT ADDR LOGIN", "250 AUTH PLAIN LOGIN")
            self._injected = True
            self.wants_tls = True
            yield
        else:
            self._say("500 5.5.1 unknown command")

    def _greeting(self, verb: str) -> list[str]:
        if verb == "HELO":
            return ["250 lenient.test"]
        keywords = ["PIPELINING", "SIZE 52428800", "ENHANCEDSTATUSCODES", "DSN"]
        if "seven-bit" not in self._habits:
            keywords += ["8BITMIME", "SMTPUTF8"]
        if "chunking" in self._habits:
            keywords.append("CHUNKING")
        if "xclient" in self._habits:
            keywords += ["XCLIENT NAME ADDR PORT PROTO HELO LOGIN", "XFORWARD NAME ADDR PROTO HELO SOURCE"]
        if self.offers_tls:
            keywords.append("STARTTLS")
        return ["250-lenient.test", *(f"250-{keyword}" for keyword in keywords), "250 HELP"]

    def _mail_command(self, argument: bytes) -> None:
        match = _MAIL.match(argument)
        if not match:
            self._say("501 5.5.4 MAIL FROM:<address>")
        elif self._mail is not None and not self._habits:
            self._say("503 5.5.1 MAIL was said already")
        else:
            self._clear()
            self._mail_argument = match["argument"]
            self._mail = plain(match["argument"])
            self._say("250 2.1.0 ok")

    def _rcpt_command(self, argument: bytes) -> None:
        match = _RCPT.match(argument)
        if self._mail is None:
            self._say("503 5.5.1 MAIL first")
        elif not match:
            self._say("501 5.5.4 RCPT TO:<address>")
        elif plain(match["argument"]).startswith(b"reject-"):
            self._say("550 5.1.1 no such user")
        elif plain(match["argument"]).startswith(b"defer-"):
            self._say("450 4.2.1 later")
        else:
            readings = every_reading(match["argument"], self._habits)
            recipient = Recipient(self._number, self._mail, match["argument"], readings)
            self._recipients.append(recipient)
            self._record(recipient)
            self._say("250 2.1.5 ok")

    def _content(self) -> Iterator[None]:
        """What follows 354, up to whatever ends content for this server."""
        self._buffer[:0] = b"\r\n"  # the CRLF of the DATA line: a lone dot at once ends empty content
        searched = folded = 0
        patient = False
        while True:
            if "long-lines-folded" in self._habits:
                folded = self._fold(folded)
            end = self._content_end.search(self._buffer, searched)
            if end and end[0].endswith(b"\r") and end.end() == len(self._buffer) and not patient:
                patient = True
                yield from self._wait()
                continue
            if end:
                break
            if len(self._buffer) > CONTENT_OCTETS_MAX:
                raise _Hangup
            searched = max(0, len(self._buffer) - 16)
            patient = False
            yield
        # The line end before the dot belongs to the content; a bare one is kept as it came.
        before = end[0].partition(b".")[0].rstrip(b" \t\x0b\x0c")
        octets = bytes(self._buffer[2 : end.start()] + before) if end.start() >= 2 else b""
        del self._buffer[: end.end()]
        self._accept(_STUFFED.sub(rb"\1", octets), "DATA")

    def _fold(self, at: int) -> int:
        """Break lines of more than 1,000 octets; returns where the unfinished last line begins."""
        while True:
            newline = self._buffer.find(b"\n", at)
            end = newline if newline >= 0 else len(self._buffer)
            while end - at > 1000:
                self._buffer[at + 1000 : at + 1000] = b"\r\n"
                at += 1002
                end += 2
            if newline < 0:
                return at
            at = end + 1

    def _chunk(self, argument: bytes) -> Iterator[None]:
        """BDAT.  RFC 3030 §2."""
        match = _CHUNK.fullmatch(argument)
        if match is None and "chunk-size-sloppy" in self._habits:
            match = _CHUNK_SLOPPY.fullmatch(argument)
        if match is None:
            self._say("501 5.5.4 BDAT size [LAST]")
            return
        size = int(match["size"] or 0)
        if size > CONTENT_OCTETS_MAX:
            raise _Hangup
        while len(self._buffer) < size:
            yield
        chunk = bytes(self._buffer[:size])
        del self._buffer[:size]
        if not self._recipients:
            self._say("503 5.5.1 RCPT first")
            return
        self._chunks = self._chunks or bytearray()
        dot = _CHUNK_DOT.search(chunk) if "chunk-dot" in self._habits else None
        if dot:  # CVE-2017-16944: a lone dot ends content inside a chunk, the rest is read as commands
            self._buffer[:0] = chunk[dot.end() :]
            self._accept(bytes(self._chunks) + chunk[: dot.start()] + b"\r\n", "BDAT")
            return
        self._chunks += chunk
        if match["last"]:
            self._accept(bytes(self._chunks), "BDAT")
        else:
            self._say(f"250 2.0.0 {size} octets")

    def _accept(self, octets: bytes, verb: str) -> None:
        assert self._mail is not None
        self._record(
            Transaction(
                self._number,
                self._peer,
                self._hello,
                self._mail_argument,
                self._mail,
                tuple(self._recipients),
                octets,
                verb,
            )
        )
        self._clear()
        self._say("250 2.0.0 taken")

    def lost(self) -> None:
        """The connection is gone."""
        if self._buffer and not self.closed:
            self._record(Happened(self._number, "cut short", bytes(self._buffer[-80:])))
        self.closed = True


class _Connection(asyncio.Protocol):
    """The socket of one LenientSession."""

    def __init__(self, backend: LenientBackend) -> None:
        self._backend = backend
        self._timer: asyncio.TimerHandle | None = None
        self._upgrade: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._backend.connections.add(transport)
        peer = transport.get_extra_info("peername")[0]
        number = self._backend.next_session()
        self._session = LenientSession(self._backend.habits, number, peer, self._backend.record)
        self._number = number
        self._backend.record(Happened(number, "opened", peer.encode()))
        transport.write(self._session.replies())

    def data_received(self, data: bytes) -> None:
        self._backend.touched = time.monotonic()
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._upgrade is None or self._session.tls:
            self._feed(data)

    def _feed(self, data: bytes) -> None:
        out = self._session.feed(data)
        if out:
            self._transport.write(out)
        if self._session.closed:
            self._transport.close()
        elif self._session.wants_patience:
            self._timer = asyncio.get_running_loop().call_later(CR_PATIENCE_S, self._feed, b"")
        elif self._session.wants_tls and self._upgrade is None:
            self._upgrade = asyncio.get_running_loop().create_task(self._start_tls())

    async def _start_tls(self) -> None:
        context = self._backend.tls_context
        assert context is not None, "this mode needs a certificate"
        try:
            transport = await asyncio.get_running_loop().start_tls(self._transport, self, context, server_side=True)
        except (OSError, ssl.SSLError):
            self._transport.abort()
            return
        assert transport is not None
        self._backend.connections.discard(self._transport)
        self._transport = transport
        self._backend.connections.add(transport)
        self._session.tls_started()
        self._backend.record(Happened(self._number, "tls"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()
        self._backend.connections.discard(self._transport)
        self._session.lost()
        self._backend.record(Happened(self._number, "closed"))


@dataclass
class LenientBackend:
    """A lenient server in a thread of its own.

    with LenientBackend("all") as backend:
        ... backend.port, backend.transactions() ...

    Args:
        mode: a name out of MODES.
        tls_context: for the modes that offer STARTTLS.
    """

    mode: str
    tls_context: ssl.SSLContext | None = None
    port: int = 0
    journal: list[Record] = field(default_factory=list)
    connections: set[asyncio.Transport] = field(default_factory=set)
    touched: float = 0.0

    def __post_init__(self) -> None:
        self.habits = MODES[self.mode]
        self._sessions = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name=f"lenient {self.mode}", daemon=True)
        self._listening = socket.create_server(("127.0.0.1", self.port), backlog=512)
        self.port = self._listening.getsockname()[1]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            self._loop.create_server(lambda: _Connection(self), sock=self._listening)
        )
        try:
            self._loop.run_forever()
        finally:
            server.close()
            for transport in list(self.connections):
                transport.abort()
            self._loop.run_until_complete(asyncio.sleep(0.05))
            self._loop.close()

    def record(self, record: Record) -> None:
        """Add to the journal.  Appending to a list is atomic; readers take slices."""
        self.touched = time.monotonic()
        self.journal.append(record)

    def next_session(self) -> int:
        self._sessions += 1
        return self._sessions

    def transactions(self, since: int = 0) -> list[Transaction]:
        return [record for record in self.journal[since:] if isinstance(record, Transaction)]

    def recipients(self, since: int = 0) -> list[Recipient]:
        return [record for record in self.journal[since:] if isinstance(record, Recipient)]

    def heard(self, since: int = 0) -> list[Heard]:
        return [record for record in self.journal[since:] if isinstance(record, Heard)]

    def happened(self, what: str) -> list[Happened]:
        return [record for record in self.journal if isinstance(record, Happened) and record.what == what]

    def wait_quiet(self, quiet_s: float, at_most_s: float) -> None:
        """Return when nothing has arrived for a while, or the time is over."""
        end = time.monotonic() + at_most_s
        while (now := time.monotonic()) < end and now - self.touched < quiet_s:
            with contextlib.suppress(ValueError):
                time.sleep(min(quiet_s - (now - self.touched), end - now) + 0.001)
