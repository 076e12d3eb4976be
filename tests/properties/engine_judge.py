"""What must hold for the engine on any octets at all; used by the property tests and by the longer fuzzing in fuzz/.

1. No exception, whatever came.
2. The same replies, the same envelope and the same content however the octets were split.
3. What is kept between two reads is bounded, whatever came.
4. Replies are well-formed lines; what goes on has one reading: no bare CR, bare LF or NUL, no end of content inside.
5. A stranger's recipient that goes on is local, and reads as the same address when it is parsed again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from tests.dialogues.engine import LOCAL, EnginePeer
from tests.vectors.readings import ALL_RULES, domain_of, every_reading

from gatepost.smtp.command import COMMAND_OCTETS_MAX
from gatepost.smtp.content import BdatReceiver, ContentLimits, Defect, stuff
from gatepost.smtp.path import PathDefect, parse_forward_path
from gatepost.smtp.server import State

# Small enough that fuzzing meets every one of them.
LIMITS = ContentLimits(message_size_octets=3000, content_line_octets=120, header_section_octets=1000, received_fields=3)
_REPLIES = re.compile(rb"(?:[2-5]\d\d-[^\r\n\0]*\r\n)*[2-5]\d\d(?: [^\r\n\0]*)?\r\n")
_BARE = re.compile(rb"\r(?!\n)|(?<!\r)\n|\0")
_RECIPIENT = re.compile(rb"RCPT TO:(<(?:[^\">]|\"(?:[^\"\\]|\\.)*\")*>)", re.DOTALL)
_REFUSED = frozenset(defect.reply.octets() for defect in Defect)


class Result(NamedTuple):
    """What came of some octets: what the client hears and what the backend would get."""

    replies: tuple[bytes, ...]
    heard: tuple[bytes, ...]
    messages: tuple[bytes, ...]
    tallies: tuple[tuple[int, bool, bool], ...]
    state: State


def run(
    pieces: Iterable[bytes], *, normalise: bool = False, trusted: bool = False, limits: ContentLimits = LIMITS
) -> Result:
    """Feed the engine piece by piece; after each piece what it keeps is measured."""
    peer = EnginePeer(trusted=trusted, tls=True, normalise=normalise, limits=limits)
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
        peer.engine.state,
    )


def _judge_memory(peer: EnginePeer, limits: ContentLimits) -> None:
    engine = peer.engine
    line = limits.content_line_octets
    assert engine.unread_octets <= max(COMMAND_OCTETS_MAX, line) + 2, f"{engine.unread_octets} octets kept"
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


def judge(octets: bytes, cuts: Iterable[int], *, normalise: bool = False, trusted: bool = False) -> Result:
    """Hold the engine to its promises on these octets; AssertionError names the one that is broken.

    Args:
        cuts: places at which the octets are split for the second run.
    """
    whole = run([octets], normalise=normalise, trusted=trusted)
    places = [0, *sorted({cut % (len(octets) + 1) for cut in cuts}), len(octets)]
    split = [octets[a:b] for a, b in pairwise(places) if a < b]
    assert run(split, normalise=normalise, trusted=trusted) == whole, f"another result when split at {places}"
    single = [octets[at : at + 1] for at in range(len(octets))]
    assert run(single, normalise=normalise, trusted=trusted) == whole, "another result octet by octet"
    for message, (size, eight_bit, dotted) in zip(whole.messages, whole.tallies, strict=True):
        assert not _BARE.search(message), f"content with a bare CR, LF or NUL: {message[:200]!r}"
        assert size <= LIMITS.message_size_octets
        assert all(len(line) <= LIMITS.content_line_octets for line in message.split(b"\r\n"))
        assert eight_bit is (not message.isascii())
        assert dotted is (message.startswith(b".") or b"\r\n." in message)
        assert b"\r\n.\r\n" not in b"\r\n" + stuff(message), "an end of content inside the content"
    for command in whole.heard:
        assert not re.search(rb"[\r\n\0]", command), f"a command of two lines: {command!r}"
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
