"""Reads *.smtp transcripts and plays them: at the sans-I/O engine and at a live gate alike.

One file is one dialogue, commented, with the section of the RFC it shows.  Its lines:

    # text              a comment
    @ client 127.0.0.2  where the client comes from; default a stranger's address
    @ listen tls        which listener it talks to: mx (default), tls, inside, submission (STARTTLS), submissions (TLS
                        at once); there alice@example.com may log in, with the password "correct horse"
    @ only gate         not for the bare engine, because the gate itself answers; says why behind a dash
    C: text             the client sends the text and CRLF; \\r \\n \\0 \\t \\\\ \\xNN stand for octets
    C> text             the client sends these octets and no more
    C* 70000 text       the client sends the text so many times
    C; TLS              the client starts TLS
    C; close            the client hangs up
    S: 250 2.1.0 OK     one whole reply: its code, and how the rest of its first line begins
    S+ SIZE             the same reply has a line that begins so
    S- AUTH             it has none
    S; closed           the server hangs up
    S; nothing          the server says nothing more for now
    B: MAIL FROM:<a@b>  the backend heard a command that begins so, after those named before
    B! elsewhere        the backend heard nothing with this in it
    B= Subject: x\\r\\n   the backend took a message with exactly this content, our trace field apart
    B; nothing          the backend took no message

Lines of the client that follow each other go out in one segment: pipelining.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

HERE = Path(__file__).parent
STRANGER = "127.9.254.1"

_LINE = re.compile(r"(?P<who>[CSB@])(?P<how>[:>*+!=;-]|(?= ))(?: (?P<text>.*))?")
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|([rnt0\\]))")
_SIMPLE = {"r": "\r", "n": "\n", "t": "\t", "0": "\0", "\\": "\\"}
_REPLY = re.compile(rb"(?:\d{3}-[^\n]*\n)*\d{3}(?: [^\n]*)?\n")
_TRACE_FIELD = re.compile(rb"Received:[^\r\n\0]*\r\n(?:[ \t][^\r\n\0]*\r\n)*")
_KINDS = {"C:", "C>", "C*", "C;", "S:", "S+", "S-", "S;", "B:", "B!", "B=", "B;"}


class Step(NamedTuple):
    """One line of a transcript: what it is ("C:", "S+" ...) and its text."""

    line: int
    kind: str
    text: str


@dataclass
class Dialogue:
    """One transcript."""

    name: str
    client: str = STRANGER
    listen: str = "mx"
    only: str = ""
    steps: list[Step] = field(default_factory=list)


def octets_of(text: str) -> bytes:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)) if match[1] else _SIMPLE[match[2]], text).encode("latin-1")


def load(path: Path) -> Dialogue:
    """Read one file; a line that is not understood is an error, not a comment."""
    dialogue = Dialogue(path.stem)
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        text = (match["text"] or "") if match else ""
        if match and match["who"] == "@":
            key, _, value = text.partition(" ")
            if key not in ("client", "listen", "only"):
                raise ValueError(f"{path.name}:{number}: unknown directive {key}")
            setattr(dialogue, key, value)
        elif match and (kind := match["who"] + match["how"]) in _KINDS:
            dialogue.steps.append(Step(number, kind, text))
        else:
            raise ValueError(f"{path.name}:{number}: not understood: {line}")
    return dialogue


def load_all() -> list[Dialogue]:
    return [load(path) for path in sorted(HERE.glob("*.smtp"))]


class Peer(Protocol):
    """What a dialogue is played at."""

    def send(self, octets: bytes) -> None:
        """Octets from the client, in one piece."""

    def receive(self) -> bytes:
        """What the server has to say next; b"" when it has hung up; TimeoutError when it stays silent."""

    def silent(self) -> bytes:
        """What the server says although nothing is expected of it."""

    def start_tls(self) -> None: ...

    def close(self) -> None: ...

    def heard(self) -> list[bytes]:
        """The commands the backend heard in this dialogue so far."""

    def messages(self) -> list[bytes]:
        """The contents the backend took in this dialogue so far."""


class Disagreement(AssertionError):
    """The server did not say what the transcript says."""


class Player:
    """Plays one dialogue at one peer."""

    def __init__(self, dialogue: Dialogue, peer: Peer) -> None:
        self._dialogue = dialogue
        self._peer = peer
        self._buffer = b""
        self._reply = b""
        self._said: list[str] = []
        self._heard = 0
        self._taken = 0

    def play(self) -> None:
        for group in self._groups():
            if isinstance(group, bytes):
                self._said.append(f"C  {group[:300]!r}")
                self._peer.send(group)
            else:
                self._step(group)

    def _groups(self) -> Iterator[Step | bytes]:
        """The steps, with neighbouring lines of the client joined."""
        waiting = b""
        for step in self._dialogue.steps:
            if step.kind == "C:":
                waiting += octets_of(step.text) + b"\r\n"
            elif step.kind == "C>":
                waiting += octets_of(step.text)
            elif step.kind == "C*":
                times, _, text = step.text.partition(" ")
                waiting += octets_of(text) * int(times)
            else:
                if waiting:
                    yield waiting
                waiting = b""
                yield step
        if waiting:
            yield waiting

    def _step(self, step: Step) -> None:
        text = octets_of(step.text)
        match step.kind:
            case "S:":
                self._expect_reply(step, text)
            case "S+":
                self._judge(step, any(line[4:].startswith(text) for line in self._reply.splitlines()))
            case "S-":
                self._judge(step, not any(line[4:].startswith(text) for line in self._reply.splitlines()))
            case "S;" if step.text == "closed":
                self._judge(step, self._next_reply(step) == b"")
            case "S;" if step.text == "nothing":
                self._judge(step, not self._buffer and not self._peer.silent())
            case "C;" if step.text == "TLS":
                self._peer.start_tls()
            case "C;" if step.text == "close":
                self._peer.close()
            case "B:":
                self._expect_heard(step, text)
            case "B!":
                self._judge(step, not any(text in line for line in self._peer.heard()))
            case "B=":
                messages = self._peer.messages()
                self._judge(step, len(messages) > self._taken and _without_trace(messages[self._taken]) == text)
                self._taken += 1
            case "B;" if step.text == "nothing":
                self._judge(step, len(self._peer.messages()) == self._taken)
            case _:
                raise ValueError(f"{self._dialogue.name}:{step.line}: not understood")

    def _expect_reply(self, step: Step, text: bytes) -> None:
        self._reply = self._next_reply(step)
        self._said.append(f"S  {self._reply!r}")
        first = self._reply.partition(b"\n")[0].rstrip(b"\r")
        self._judge(step, (first[:3] + b" " + first[4:]).startswith(text))

    def _next_reply(self, step: Step) -> bytes:
        while True:
            match = _REPLY.match(self._buffer)
            if match:
                self._buffer = self._buffer[match.end() :]
                return match[0]
            try:
                octets = self._peer.receive()
            except TimeoutError:
                self._judge(step, fine=False)
            else:
                if not octets:
                    self._judge(step, not self._buffer)
                    return b""
                self._buffer += octets

    def _expect_heard(self, step: Step, text: bytes) -> None:
        heard = self._peer.heard()
        for index in range(self._heard, len(heard)):
            if heard[index].startswith(text):
                self._heard = index + 1
                return
        self._judge(step, fine=False)

    def _judge(self, step: Step, fine: bool) -> None:
        if fine:
            return
        heard = [f"B  {line!r}" for line in self._peer.heard()] + [f"B= {text!r}" for text in self._peer.messages()]
        raise Disagreement(
            "\n".join(
                [
                    f"{self._dialogue.name}.smtp:{step.line}: {step.kind} {step.text}",
                    *self._said,
                    f"unread {self._buffer!r}",
                    *heard,
                ]
            )
        )


def _without_trace(octets: bytes) -> bytes:
    match = _TRACE_FIELD.match(octets)
    return octets[match.end() :] if match else octets
