"""Replies of any server in the world, read with a reader of our own, and what each says about relaying.

Why: the tester is a witness against the gate too, so it shares no parser with it; and foreign servers speak in many
    ways.  "250 OK - Recipient <x>" is a yes, "454 4.7.1 Relay access denied" a no in spite of its 4, and "550 Domain
    not found" says nothing about relaying.
Trust: hostile octets: bounded in length and number, and shown as printable text only.
Promise: ``ReplyReader`` never raises on octets; ``judge`` says ACCEPTED only to a 2yz reply, and REFUSED only where the
    server's answer would be the same to every stranger.
Sources: RFC 5321 §4.2 (replies), §4.3.2 (which mean what), RFC 3463 §3.2, §3.5, §3.8 (X.1.2, X.4.4, X.7.1), RFC 7505
    §4 (X.1.10); the refusals as Postfix, Exim, Sendmail, qmail, Exchange and Domino word them.
"""

from __future__ import annotations

import re
from enum import Enum, unique
from typing import NamedTuple

REPLY_OCTETS_MAX = 65_536  # of one reply, all lines together
SHOWN_CHARACTERS_MAX = 512  # kept of each line

_LINE = re.compile(rb"([2-5][0-9][0-9])(-?)[ \t]?(.*)", re.DOTALL)

# A no to relaying itself, whatever its code: Postfix says 454 where its administrator has not decided.
_RELAYING = re.compile(
    r"\brelay(?:ing)?\b.{0,40}\b(?:denied|prohibited|rejected|refused|disallowed|disabled|forbidden|restricted|blocked)"
    r"|\brelay(?:ing)?\b.{0,40}\bnot\b"
    r"|\b(?:not|no|never|cannot|can't|won't|unable|denied|refus\w+)\b.{0,40}\brelay"
    r"|\brcpthosts\b|\brelayhosts?\b|\bnot (?:a )?local\b"
)
# A no to the client's address or name, whatever it asks for.
_CLIENT = re.compile(
    r"\bblock(?:ed)? (?:using|by|list)|\bblocklist|\bblack[ -]?list|\bdnsbl\b|\brbl\b|spamhaus|spamcop|barracuda"
    r"|\bclient host\b|\breputation\b|\blisted (?:in|at|on|by)\b|\bbanned\b|\brate limit"
    r"|\btoo many (?:concurrent |simultaneous )?(?:connections|sessions|messages)"
    r"|\bhelo command\b|\bhelo\b.{0,30}\b(?:invalid|rejected)|\b(?:invalid|bad) (?:helo|ehlo)\b"
)
# A no to a domain that DNS does not know, or that takes no mail.
_DOMAIN = re.compile(
    r"\bdomain (?:name )?(?:not found|does not exist|doesn't exist|unknown|is invalid)"
    r"|\b(?:unknown|no such|invalid|non-?existent|unresolvable) (?:recipient |sender |destination )?(?:domain|host)\b"
    r"|\bunroute?able\b|\bnullmx\b|\bnull mx\b|\b(?:can ?not|can't|could not) (?:be )?(?:resolve|route|find)"
    r"|\bhost (?:or domain name )?not found|\bno (?:valid )?mx\b|\bdoes not accept (?:e-?)?mail"
)
_STATUS = re.compile(r"(?<![0-9.])[45]\.([0-9])\.([0-9]{1,3})(?![0-9.])")
_DOMAIN_STATUS = {"1.2", "1.8", "1.10", "4.4"}


class Heard(NamedTuple):
    """What came back.

    Attributes:
        code: 200 to 599; 0 where no reply came, and ``text`` says why.
        text: the lines without their code, separated by "\\n"; printable.
    """

    code: int
    text: str

    @property
    def positive(self) -> bool:
        return 200 <= self.code < 300

    @property
    def line(self) -> str:
        """On one line, for a table."""
        text = self.text.replace("\n", " / ")
        return f"{self.code} {text}".rstrip() if self.code else text


@unique
class Outcome(Enum):
    """What a reply says about relaying."""

    ACCEPTED = "accepts"
    REFUSED = "refuses"
    UNCLEAR = "unclear"


def shown(octets: bytes) -> str:
    """Octets of the server as text that can be shown anywhere."""
    text = octets[: SHOWN_CHARACTERS_MAX * 4].decode("utf-8", "replace")[:SHOWN_CHARACTERS_MAX]
    return "".join(character if character.isprintable() else "?" for character in text)


class ReplyReader:
    """Octets in, replies out.  After a reply with code 0 it is of no more use."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._lines: list[str] = []
        self._octets = 0

    def feed(self, octets: bytes) -> None:
        """Take what arrived."""
        self._buffer += octets

    def next(self) -> Heard | None:
        """The next complete reply, or None while more is needed."""
        while True:
            end = self._buffer.find(b"\n")
            if self._octets + (len(self._buffer) if end < 0 else end + 1) > REPLY_OCTETS_MAX:
                return Heard(0, f"a reply of more than {REPLY_OCTETS_MAX} octets")
            if end < 0:
                return None
            line = bytes(self._buffer[:end]).rstrip(b"\r")
            del self._buffer[: end + 1]
            self._octets += end + 1
            match = _LINE.fullmatch(line)
            if match is None:
                return Heard(0, f"not an SMTP reply: {shown(line)}")
            self._lines.append(shown(match[3]))
            if not match[2]:
                heard = Heard(int(match[1]), "\n".join(self._lines))
                self._lines, self._octets = [], 0
                return heard


def judge(heard: Heard) -> tuple[Outcome, str]:
    """What a reply to MAIL or RCPT says about relaying, and where it says nothing, why not.

    Returns:
        The outcome; and for UNCLEAR a clause for a person, else "".
    """
    words = heard.text.lower()
    if heard.positive:  # 250, 251 "will forward", 252 "cannot verify, but will try"
        return Outcome.ACCEPTED, ""
    if heard.code < 400:
        return Outcome.UNCLEAR, f"no answer to the question: {heard.line}"
    if denies_relaying(heard):
        return Outcome.REFUSED, ""
    if _CLIENT.search(words):
        return Outcome.UNCLEAR, "it refuses us, not the address: it would refuse anything from here"
    if unknown_domain(heard):
        return Outcome.UNCLEAR, "it refuses the domain because DNS does not know it, not because it would relay"
    if heard.code < 500:
        return Outcome.UNCLEAR, "it puts us off until later (greylisting, a limit, or a fault of its own)"
    return Outcome.REFUSED, ""


def denies_relaying(heard: Heard) -> bool:
    """Whether it refuses, now or for good, because it would have to relay."""
    return heard.code >= 400 and _RELAYING.search(heard.text.lower()) is not None


def unknown_domain(heard: Heard) -> bool:
    """Whether it refuses a domain because DNS does not know it, or because it takes no mail."""
    if heard.code < 400:
        return False
    statuses = {f"{match[1]}.{match[2]}" for match in _STATUS.finditer(heard.text)}
    return bool(statuses & _DOMAIN_STATUS or _DOMAIN.search(heard.text.lower()))


def bad_syntax(heard: Heard) -> bool:
    """Whether it refuses the form of an address, whoever it belongs to.  RFC 5321 §4.2.2: 500 to 504, 553, 555."""
    return heard.code in (500, 501, 502, 503, 504, 555) or (heard.code == 553 and "1.3" in heard.text)
