"""Verify by a login to another SMTP server.

Why: a provider's or an old server's SMTP AUTH knows the users, and the gate in front of another server asks it.
Trust: as in ``auth.login``; replies go through ``smtp.client``, and of those that follow a secret the code is repeated.
Promise: 235 is yes, 535 is no, everything else is unknown.
Sources: RFC 4954 §4 (AUTH), §6 (its replies), RFC 3207 §4.2, RFC 5321 §4.1.1.1, draft-murchison-sasl-login.
    Wider: a 5yz whose enhanced status is 5.7.8 is no as well.
"""

from __future__ import annotations

import base64
import ssl
from typing import ClassVar, Final

from gatepost.auth import Denied, Outcome, Verified
from gatepost.auth.inquiry import CRLF, Lines, Trouble
from gatepost.auth.login import LoginVerifier
from gatepost.auth.settings import LoginServer
from gatepost.smtp import client
from gatepost.smtp.client import BackendDefect, Capabilities, ClientEngine
from gatepost.smtp.reply import Reply
from gatepost.smtp.sasl import Password, client_initial, client_secret

COMMAND_OCTETS_MAX = 512  # RFC 4954 §4: AUTH with a longer initial response is not understood everywhere

_INVALID: Final = (7, 8)  # RFC 4954 §6: authentication credentials invalid


class _Dialogue:
    """Commands and replies on one connection, before or within TLS."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._engine = ClientEngine()

    async def reply(self) -> Reply:
        """The reply that is due."""
        engine = self._engine
        engine.expect(1)
        while True:
            engine.receive(await self._lines.line() + CRLF)
            reply = engine.next_reply()
            if isinstance(reply, BackendDefect):
                raise Trouble(reply.text)
            if reply is not None:
                return reply

    async def command(self, octets: bytes) -> Reply:
        """Send one command line, and get its reply."""
        self._lines.expect_silence()
        self._lines.say(octets.removesuffix(CRLF))
        return await self.reply()

    async def hello(self, name: str) -> Capabilities:
        """EHLO.  Without it there is no AUTH.  RFC 4954 §3."""
        reply = await self.command(client.hello("EHLO", name))
        if not 200 <= reply.code < 300:
            raise Trouble(f"it answers EHLO with {reply.code}")
        return client.parse_ehlo(reply)


class SmtpVerifier(LoginVerifier):
    """[auth.smtp].

    Args:
        hello: our own name, for EHLO.
    """

    name: ClassVar[str] = "smtp"
    farewell: ClassVar[bytes] = b"QUIT"

    def __init__(self, server: LoginServer, *, judged: ssl.SSLContext | None = None, hello: str = "localhost") -> None:
        super().__init__(server, judged=judged)
        self._hello = hello

    async def _log_in(self, lines: Lines, login: Password, yes: Verified) -> Outcome:
        dialogue = _Dialogue(lines)
        greeting = await dialogue.reply()
        if greeting.code != 220:
            raise Trouble(f"it greets us with {greeting.code}")
        capabilities = await dialogue.hello(self._hello)
        if self._asks_for_tls:
            offered = "STARTTLS" in capabilities.keywords
            agreed = offered and (await dialogue.command(client.STARTTLS)).code == 220
            await self._start_tls(lines, agreed=agreed)
            if agreed:
                dialogue = _Dialogue(lines)
                capabilities = await dialogue.hello(self._hello)
        if "PLAIN" in capabilities.mechanisms:
            return _judged(await _plain(dialogue, login), yes)
        if "LOGIN" in capabilities.mechanisms:
            return _judged(await _login(dialogue, login), yes)
        raise Trouble("it offers neither AUTH PLAIN nor AUTH LOGIN")


async def _plain(dialogue: _Dialogue, login: Password) -> Reply:
    response = base64.b64encode(client_initial("PLAIN", login))
    command = b"AUTH PLAIN " + response
    if len(command) + len(CRLF) <= COMMAND_OCTETS_MAX:
        return await dialogue.command(command)
    reply = await dialogue.command(b"AUTH PLAIN")
    return await dialogue.command(response) if reply.code == 334 else reply


async def _login(dialogue: _Dialogue, login: Password) -> Reply:
    """What the challenges say is not looked at: every server words them in its own way."""
    reply = await dialogue.command(b"AUTH LOGIN")
    for answer in (client_initial("LOGIN", login), client_secret(login)):
        if reply.code != 334:
            break
        reply = await dialogue.command(base64.b64encode(answer))
    return reply


def _judged(reply: Reply, yes: Verified) -> Outcome:
    """RFC 4954 §6."""
    if reply.code == 235:
        return yes
    if reply.code == 535 or (reply.code >= 500 and reply.status == _INVALID):
        return Denied("wrong user name or password")
    raise Trouble(f"it answers AUTH with {reply.code}")
