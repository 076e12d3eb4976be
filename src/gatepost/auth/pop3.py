"""Verify by a login to a POP3 server.

Why: an Exchange 5.0 or an hMailServer knows its users, and lets them in at its POP3 port, whatever its SMTP port can.
Trust: as in ``auth.login``; a reply is one line, and of what follows PASS only a known response code is repeated.
Promise: +OK to PASS or AUTH is yes, and nothing else is.  -ERR is no, unless it says that something other than the
    login is wrong.
Sources: RFC 1939 §4, §7 (USER, PASS), RFC 2449 §5, §8 (CAPA, response codes), RFC 3206 (SYS, AUTH), RFC 2595 §4 (STLS),
    RFC 5034 §4 (AUTH).
    Stricter: [IN-USE] is unknown, although RFC 2449 §8.1.2 promises that it is said of a right password only: a server
    that locks before it compares would let everybody in as whoever reads mail just now.  STLS is tried and not looked
    up, so that it is found on servers without CAPA.
"""

from __future__ import annotations

import base64
import re
from typing import ClassVar

from gatepost.auth import Denied, Outcome, Unavailable, Verified
from gatepost.auth.inquiry import Lines, Trouble
from gatepost.auth.login import LoginVerifier
from gatepost.smtp.sasl import Password, client_initial

CAPABILITIES_MAX = 100  # lines of CAPA

_REPLY = re.compile(rb"(\+OK|-ERR)(?: (?:\[([A-Za-z0-9/_.-]{1,32})\] ?)?([^\r\n]*))?")
# RFC 1939 §7: "-ERR maildrop already locked", "-ERR unable to lock maildrop"; others say mailbox.
_LOCKED = re.compile(
    rb"(?:maildrop|mail ?box) (?:is )?(?:already |currently )?locked|lock (?:the |your )?(?:maildrop|mail ?box)",
    re.IGNORECASE,
)

# RFC 2449 §8, RFC 3206 §4.  Whatever stands below SYS says that the server, and not the login, is at fault.
_NOT_THE_LOGIN = {
    b"IN-USE": "the mailbox is in use",
    b"LOGIN-DELAY": "too soon after the last login",
    b"SYS": "its system is out of order",
}


class Pop3Verifier(LoginVerifier):
    """[auth.pop3]."""

    name: ClassVar[str] = "pop3"
    farewell: ClassVar[bytes] = b"QUIT"

    async def _log_in(self, lines: Lines, login: Password, yes: Verified) -> Outcome:
        greeting = await lines.line()
        if not _positive(greeting):
            raise Trouble("it does not serve us now")
        if self._asks_for_tls:
            await self._start_tls(lines, agreed=_positive(await lines.ask(b"STLS")))
        user = await lines.ask(b"USER " + login.user.encode())
        if _positive(user):
            return _judged(await lines.ask(b"PASS " + login.secret.encode()), yes)
        refused = _judged(user, yes)
        if isinstance(refused, Unavailable):
            return refused
        capabilities = await _capabilities(lines)
        if b"PLAIN" in capabilities.get(b"SASL", ()):
            return _judged(await _plain(lines, login), yes)
        # RFC 1939 §7: USER is refused for a name that is not known.  Where it is not to be used, CAPA does not list it.
        if capabilities and b"USER" not in capabilities:
            raise Trouble("it offers neither USER nor SASL PLAIN")
        return Denied("no such user")


async def _plain(lines: Lines, login: Password) -> bytes:
    """AUTH PLAIN, in two steps: not every server takes an initial response, and none in a long line.  RFC 5034 §4."""
    if (await lines.ask(b"AUTH PLAIN")).rstrip() != b"+":
        raise Trouble("it offers SASL PLAIN, and refuses it")
    return await lines.ask(base64.b64encode(client_initial("PLAIN", login)))


async def _capabilities(lines: Lines) -> dict[bytes, list[bytes]]:
    """CAPA: each capability with its arguments, in upper case; empty where the server knows none.  RFC 2449 §5."""
    found: dict[bytes, list[bytes]] = {}
    if not _positive(await lines.ask(b"CAPA")):
        return found
    for _ in range(CAPABILITIES_MAX):
        words = (await lines.line()).upper().split()
        if words == [b"."]:
            return found
        if words:
            found[words[0]] = words[1:]
    raise Trouble("its list of capabilities is too long")


def _positive(line: bytes) -> bool:
    return _parts(line)[0] == b"+OK"


def _judged(line: bytes, yes: Verified) -> Outcome:
    """What a reply to USER, PASS or AUTH says about the login."""
    indicator, code, text = _parts(line)
    if indicator == b"+OK":
        return yes
    kind = code.partition(b"/")[0]  # RFC 2449 §8: below a code that is not known, the one above it is
    if kind in _NOT_THE_LOGIN:
        return Unavailable(_NOT_THE_LOGIN[kind])
    if not code and _LOCKED.search(text):
        return Unavailable("the mailbox is locked")
    return Denied("wrong user name or password")


def _parts(line: bytes) -> tuple[bytes, bytes, bytes]:
    """A reply's status indicator, its response code in upper case, its text.  RFC 1939 §3, RFC 2449 §8."""
    match = _REPLY.fullmatch(line)
    if match is None:
        raise Trouble("its answer is no POP3 reply")
    return match[1], (match[2] or b"").upper(), match[3] or b""
