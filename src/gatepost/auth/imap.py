"""Verify by a login to an IMAP server.

Why: as ``auth.pop3``, for servers where IMAP is what is open.
Trust: as in ``auth.login``; user names and passwords are any octets, which a string of IMAP can hold but for NUL.
Promise: a tagged OK to LOGIN or AUTHENTICATE is yes, and nothing else is: no greeting, and nothing untagged.
Sources: RFC 3501 and RFC 9051 §4.3 (strings), §6.1.1 (CAPABILITY), §6.2 (STARTTLS, AUTHENTICATE, LOGIN), §7.1 (status
    responses); RFC 2595 §3.2 (LOGINDISABLED), RFC 5530 (response codes), RFC 2221 (REFERRAL).
    Stricter: a server that sends a literal before the answer to a login is not read further.
"""

from __future__ import annotations

import base64
import re
from typing import ClassVar, NamedTuple

from gatepost.auth import Denied, Outcome, Unavailable, Verified
from gatepost.auth.inquiry import CRLF, Lines, Trouble
from gatepost.auth.login import LoginVerifier
from gatepost.smtp.sasl import Password, client_initial

# RFC 9051 §7.1: a status response, with its code; text that is not looked at may follow.
_STATUS = re.compile(
    rb"(OK|NO|BAD|BYE|PREAUTH)(?: (?:\[([A-Za-z0-9-]{1,32})(?: [^\]\r\n]*)?\])?[^\r\n]*)?", re.IGNORECASE
)
_CAPABILITY = re.compile(rb"\* CAPABILITY ([^\r\n]*)", re.IGNORECASE)
_LITERAL = re.compile(rb"\{[0-9]+\+?\}\Z")
_SPECIAL = re.compile(rb'(["\\])')

# RFC 5530 §3, RFC 2221: NO that is not about the login.
_NOT_THE_LOGIN = {
    b"UNAVAILABLE": "a part of it is out of order",
    b"PRIVACYREQUIRED": "it takes no password without TLS",
    b"CONTACTADMIN": "it asks that its administrator be told",
    b"INUSE": "the mailbox is in use",
    b"SERVERBUG": "it has met a fault of its own",
    b"CLIENTBUG": "it takes what we said for a fault",
    b"LIMIT": "one of its limits is reached",
    b"OVERQUOTA": "the mailbox is over its quota",
    b"REFERRAL": "the mailbox is on another server",
}
_WHY_DENIED = {b"EXPIRED": "the password has expired", b"AUTHORIZATIONFAILED": "the user may not log in"}


class _Status(NamedTuple):
    """word, code: upper case, the code without its arguments, b"" for none."""

    word: bytes
    code: bytes


class _Dialogue:
    """Commands and their tagged answers on one connection."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._number = 0
        self.capabilities: frozenset[bytes] = frozenset()

    async def greeting(self) -> None:
        """RFC 9051 §7.1: OK.  PREAUTH means that somebody else is logged in already, whoever that may be."""
        line = await self._lines.line()
        if _status(line.removeprefix(b"* ") if line.startswith(b"* ") else b"").word != b"OK":
            raise Trouble("it does not serve us now, or takes us for somebody")

    async def learn(self) -> None:
        """CAPABILITY; again after STARTTLS, and what was said before then counts for nothing.  RFC 9051 §6.2.1."""
        self.capabilities = frozenset()
        if (await self.command(b"CAPABILITY")).word != b"OK":
            raise Trouble("it does not tell its capabilities")

    async def command(self, *parts: bytes) -> _Status:
        """Send a command and get its tagged answer.

        Args:
            parts: what it is made of.  Between two parts the server says whether it wants more: behind a literal's head
                (RFC 9051 §4.3), and before a response (§6.2.2).
        """
        self._number += 1
        tag = b"g%d" % self._number
        self._lines.send(tag + b" " + parts[0] + CRLF)
        for part in parts[1:]:
            status = await self._answer(tag)
            if status is not None:
                return status  # it does not want more
            self._lines.send(part + CRLF)
        status = await self._answer(tag)
        if status is None:
            raise Trouble("it wants more when all is said")
        return status

    async def _answer(self, tag: bytes) -> _Status | None:
        """The tagged status, or None where the server asks for more."""
        while True:
            line = await self._lines.line()
            if _LITERAL.search(line):
                raise Trouble("it sends a literal before it answers")
            if line.startswith(tag + b" "):
                return _status(line[len(tag) + 1 :])
            if line == b"+" or line.startswith(b"+ "):
                return None
            if not line.startswith(b"* "):
                raise Trouble("its answer is no IMAP response")
            listed = _CAPABILITY.fullmatch(line)
            if listed is not None:
                self.capabilities = frozenset(listed[1].upper().split())


class ImapVerifier(LoginVerifier):
    """[auth.imap]."""

    name: ClassVar[str] = "imap"
    farewell: ClassVar[bytes] = b"g0 LOGOUT"

    async def _log_in(self, lines: Lines, login: Password, yes: Verified) -> Outcome:
        dialogue = _Dialogue(lines)
        await dialogue.greeting()
        await dialogue.learn()
        if self._asks_for_tls:
            agreed = b"STARTTLS" in dialogue.capabilities and (await dialogue.command(b"STARTTLS")).word == b"OK"
            await self._start_tls(lines, agreed=agreed)
            if agreed:
                await dialogue.learn()
        if b"LOGINDISABLED" not in dialogue.capabilities:
            return _judged(await dialogue.command(*_login(login)), yes)
        if b"AUTH=PLAIN" not in dialogue.capabilities:
            raise Trouble("it offers neither LOGIN nor AUTHENTICATE PLAIN")
        response = base64.b64encode(client_initial("PLAIN", login))
        return _judged(await dialogue.command(b"AUTHENTICATE PLAIN", response), yes)


def _login(login: Password) -> list[bytes]:
    """LOGIN with two strings, in the parts that ``command`` sends: what is 7-bit is quoted, the rest is a literal."""
    parts = [b"LOGIN"]
    for text in (login.user, login.secret):
        octets = text.encode()
        if octets.isascii():
            parts[-1] += b' "' + _SPECIAL.sub(rb"\\\1", octets) + b'"'
        else:
            parts[-1] += b" {%d}" % len(octets)
            parts.append(octets)
    return parts


def _status(text: bytes) -> _Status:
    match = _STATUS.fullmatch(text)
    if match is None:
        raise Trouble("its answer is no IMAP response")
    return _Status(match[1].upper(), (match[2] or b"").upper())


def _judged(status: _Status, yes: Verified) -> Outcome:
    """What the answer to LOGIN or AUTHENTICATE says about the login."""
    if status.word == b"OK":
        return yes
    if status.word != b"NO":
        raise Trouble("it does not understand the login")
    if status.code in _NOT_THE_LOGIN:
        return Unavailable(_NOT_THE_LOGIN[status.code])
    return Denied(_WHY_DENIED.get(status.code, "wrong user name or password"))
