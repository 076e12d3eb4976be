"""What must hold for the engine on any octets at all; used by the property tests and by the longer fuzzing in fuzz/.

1. No exception, whatever came.
2. The same replies, the same envelope and the same content however the octets were split.
3. What is kept between two reads is bounded, whatever came.
4. Replies are well-formed lines; what goes on has one reading: no bare CR, bare LF or NUL, no end of content inside.
5. A stranger's recipient that goes on is local, and reads as the same address when it is parsed again.
6. The same logins however the octets were split; what is said in an exchange is heard nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from tests.dialogues.engine import LOCAL, EnginePeer
from tests.vectors.readings import ALL_RULES, domain_of, every_reading

from gatepost.smtp.command import AUTH_OCTETS_MAX, COMMAND_OCTETS_MAX, XCLIENT_ATTRIBUTES, Auth, Xclient
from gatepost.smtp.content import BdatReceiver, ContentLimits, Defect, stuff
from gatepost.smtp.path import PathDefect, parse_forward_path
from gatepost.smtp.reply import Reply
from gatepost.smtp.sasl import Challenge, Exchange, Password, Token, decode, exchange
from gatepost.smtp.server import AuthResponse, State

# Small enough that fuzzing meets every one of them.
LIMITS = ContentLimits(message_size_octets=3000, content_line_octets=120, header_section_octets=1000, received_fields=3)
_REPLIES = re.compile(rb"(?:[2-5]\d\d-[^\r\n\0]*\r\n)*[2-5]\d\d(?: [^\r\n\0]*)?\r\n")
_BARE = re.compile(rb"\r(?!\n)|(?<!\r)\n|\0")
_RECIPIENT = re.compile(rb"RCPT TO:(<(?:[^\">]|\"(?:[^\"\\]|\\.)*\")*>)", re.DOTALL)
_REFUSED = frozenset(defect.reply.octets() for defect in Defect)


class LoginPeer(EnginePeer):
    """A gate that offers AUTH and XCLIENT: "wrong" is a wrong secret, and a client without an address is refused."""

    logins: tuple[Password | Token, ...] = ()
    _exchange: Exchange | None = None

    def _keywords(self) -> list[str]:
        return [
            *super()._keywords(),
            "AUTH PLAIN LOGIN XOAUTH2 OAUTHBEARER",
            " ".join(("XCLIENT", *XCLIENT_ATTRIBUTES)),
        ]

    def _answer(self, event: object) -> Reply:
        match event:
            case Auth(mechanism, initial):
                self._exchange = exchange(mechanism)
                if self._exchange is None:
                    return Reply(504, "Unknown mechanism", "5.5.4")
                return self._step(initial)
            case AuthResponse(octets):
                return self._step(octets)
            case Xclient(_, address):
                return Reply(550, "Without an address", "5.7.1") if address is None else Reply(220, "mx.example.com")
        return super()._answer(event)

    def _step(self, line: bytes | None) -> Reply:
        assert self._exchange is not None
        response = None if line is None else decode(line)
        if isinstance(response, Reply):
            return response
        step = self._exchange.step(response)
        if isinstance(step, Password | Token):
            if (step.secret if isinstance(step, Password) else step.token) != "wrong":
                self.logins += (step,)
                return Reply(235, "Welcome", "2.7.0")
            step = self._exchange.denied() or Reply(535, "Wrong", "5.7.8")
        return step.reply if isinstance(step, Challenge) else step


class Result(NamedTuple):
    """What came of some octets: what the client hears and what the backend would get."""

    replies: tuple[bytes, ...]
    heard: tuple[bytes, ...]
    messages: tuple[bytes, ...]
    tallies: tuple[tuple[int, bool, bool], ...]
    logins: tuple[Password | Token, ...]
    state: State


def run(
    pieces: Iterable[bytes],
    *,
    normalise: bool = False,
    trusted: bool = False,
    login: bool = False,
    limits: ContentLimits = LIMITS,
) -> Result:
    """Feed the engine piece by piece; after each piece what it keeps is measured."""
    kind = LoginPeer if login else EnginePeer
    peer = kind(trusted=trusted, tls=True, normalise=normalise, limits=limits)
    output = peer.receive()
    for piece in pieces:
        peer.send(piece)
        _judge_memory(peer, limits)
        output += peer.silent()
        if peer.silent():
            peer.receive()
    replies = _split_replies(output)
    return Result(
        # Which of several defects of one message is named depends on which was seen first; that it is refused does not.
        tuple(b"(content refused)" if reply in _REFUSED else reply for reply in replies),
        tuple(peer.heard()),
        tuple(peer.messages()),
        tuple((end.size_octets, end.eight_bit, end.dotted) for end in peer.ended if end.defect is None),
        peer.logins if isinstance(peer, LoginPeer) else (),
        peer.engine.state,
    )


def _judge_memory(peer: EnginePeer, limits: ContentLimits) -> None:
    engine = peer.engine
    line = limits.content_line_octets
    command = AUTH_OCTETS_MAX if isinstance(peer, LoginPeer) else COMMAND_OCTETS_MAX
    assert engine.unread_octets <= max(command, line) + 2, f"{engine.unread_octets} octets kept"
    receiver = engine._receiver
    if isinstance(receiver, BdatReceiver):
        assert len(receiver._line) <= line + 1, f"{len(receiver._line)} octets of a line kept"


def _split_replies(output: bytes) -> list[bytes]:
    replies = []
    at = 0
    while at < len(output):
        match = _REPLIES.match(output, at)
        assert match, f"no reply: {output[at : at + 80]!r}"
        replies.append(match[0])
        at = match.end()
    return replies


def judge(
    octets: bytes, cuts: Iterable[int], *, normalise: bool = False, trusted: bool = False, login: bool = False
) -> Result:
    """Hold the engine to its promises on these octets; AssertionError names the one that is broken.

    Args:
        cuts: places at which the octets are split for the second run.
    """
    whole = run([octets], normalise=normalise, trusted=trusted, login=login)
    places = [0, *sorted({cut % (len(octets) + 1) for cut in cuts}), len(octets)]
    split = [octets[a:b] for a, b in pairwise(places) if a < b]
    assert run(split, normalise=normalise, trusted=trusted, login=login) == whole, (
        f"another result when split at {places}"
    )
    single = [octets[at : at + 1] for at in range(len(octets))]
    assert run(single, normalise=normalise, trusted=trusted, login=login) == whole, "another result octet by octet"
    for message, (size, eight_bit, dotted) in zip(whole.messages, whole.tallies, strict=True):
        assert not _BARE.search(message), f"content with a bare CR, LF or NUL: {message[:200]!r}"
        assert size <= LIMITS.message_size_octets
        assert all(len(line) <= LIMITS.content_line_octets for line in message.split(b"\r\n"))
        assert eight_bit is (not message.isascii())
        assert dotted is (message.startswith(b".") or b"\r\n." in message)
        assert b"\r\n.\r\n" not in b"\r\n" + stuff(message), "an end of content inside the content"
    for command in whole.heard:
        assert not re.search(rb"[\r\n\0]", command), f"a command of two lines: {command!r}"
        assert command.startswith((b"MAIL ", b"RCPT ", b"DATA")), f"not for a backend: {command!r}"
        match = _RECIPIENT.match(command)
        if match and not trusted:
            _judge_recipient(match[1])
    return whole


def _judge_recipient(path: bytes) -> None:
    parsed = parse_forward_path(path, smtputf8=True)
    assert not isinstance(parsed, PathDefect), f"sent on, but it does not parse: {path!r}"
    assert b"<" + parsed.octets + b">" == path, f"not canonical: {path!r}"
    # A backend that takes UTF-8 and yet drops the eighth bit is a residual risk (docs/threat-model.md).
    rules = ALL_RULES if path.isascii() else ALL_RULES - {"high-bit"}
    readings = {domain_of(reading) for reading in every_reading(path, rules)}
    assert readings <= {LOCAL, ""}, f"read in another way by somebody: {path!r} as {readings}"
