"""A login to a server that knows its users' passwords: what POP3, IMAP and SMTP have in common.

Why: an old server keeps its accounts where they are, and whoever may log in there may send through the gate.
Trust: user name and secret are a stranger's: nothing that a line cannot carry gets into one, so that no login says two
    commands.  What the server answers once it has the secret may hold the secret: of that no word is repeated.
Promise: yes is what the protocol says for yes, on a connection as secure as the settings want it; no is what it says
    for a wrong login; everything else is unknown.  Nothing is kept between two logins.
Sources: RFC 2595 (STLS, STARTTLS), RFC 8314 §3 (implicit TLS), RFC 7435 §3 (opportunistic TLS), RFC 9525 (names in
    certificates).
"""

from __future__ import annotations

import asyncio
import re
import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import closing
from typing import ClassVar

from gatepost.auth import Credentials, Denied, Outcome, Verified
from gatepost.auth.inquiry import Inquiries, Lines, Trouble, connect
from gatepost.auth.settings import LoginServer
from gatepost.smtp.sasl import Password

_PLACEHOLDER = re.compile(r"\{(user|local_part|domain)\}")
_NOT_IN_A_LINE = re.compile(r"[\r\n\0]")

NOT_A_PASSWORD = Denied("it takes passwords, and the client sent a token")
NOT_CARRIED = Denied("the protocol cannot carry this user name or password")


def expand(template: str, user: str, escape: Callable[[str], str] = str) -> str:
    """A template with the user's name in it, in one pass: what a name brings along is no placeholder.

    Args:
        template: may hold {user}, {local_part} and {domain}.
        user: hostile; a name without "@" is all local-part.
        escape: what makes a part harmless where it is put.
    """
    local_part, at, domain = user.rpartition("@")
    parts = {"user": user, "local_part": local_part if at else user, "domain": domain if at else ""}
    return _PLACEHOLDER.sub(lambda match: escape(parts[match[1]]), template)


def carried(*texts: str) -> bool:
    """Each can be said in a line: it is not empty, and has no CR, LF or NUL that would say more than one thing."""
    return all(text and _NOT_IN_A_LINE.search(text) is None for text in texts)


def unjudged() -> ssl.SSLContext:
    """TLS with whoever answers, as old as it may be: for those who would otherwise have plain text.  RFC 7435 §3."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    return context


class LoginVerifier(ABC):
    """One [auth] table of a server to log in to.

    Args:
        judged: how a certificate is judged, where it is; None for the system's authorities.
    """

    name: ClassVar[str]
    farewell: ClassVar[bytes]

    def __init__(self, server: LoginServer, *, judged: ssl.SSLContext | None = None) -> None:
        self._server = server
        self._context: ssl.SSLContext | None = None
        if server.tls == "opportunistic":
            self._context = unjudged()
        elif server.tls != "off":
            self._context = judged if judged is not None else ssl.create_default_context()
        self._inquiries = Inquiries(f"{server.host}:{server.port}", server.timeout_s, server.connections)

    async def verify(self, credentials: Credentials) -> Outcome:
        if not isinstance(credentials, Password):
            return NOT_A_PASSWORD
        login = Password(expand(self._server.login, credentials.user), credentials.secret)
        if not carried(login.user, login.secret):
            return NOT_CARRIED
        yes = Verified(credentials.user.lower())
        return await self._inquiries.ask(lambda deadline: self._ask(login, yes, deadline))

    async def close(self) -> None:  # noqa: B027 - there is nothing to let go of
        """Nothing is kept between logins."""

    async def _ask(self, login: Password, yes: Verified, deadline: asyncio.Timeout) -> Outcome:
        with closing(await connect(self._server.host, self._server.port, deadline)) as lines:
            if self._server.tls == "implicit":
                await self._start_tls(lines, agreed=True)
            outcome = await self._log_in(lines, login, yes)
            deadline.reschedule(None)  # the answer is known
            await lines.leave(self.farewell)
            return outcome

    async def _start_tls(self, lines: Lines, *, agreed: bool) -> None:
        """TLS where the server agrees to it; plain text where that will do.

        Raises:
            Trouble: plain text will not do, or the handshake failed.
        """
        if agreed:
            assert self._context is not None
            await lines.secure(self._context, self._server.host)
        elif self._server.tls == "required":
            raise Trouble("it does not offer TLS, and tls is required")

    @property
    def _asks_for_tls(self) -> bool:
        return self._server.tls in ("opportunistic", "required")

    @abstractmethod
    async def _log_in(self, lines: Lines, login: Password, yes: Verified) -> Outcome:
        """From the greeting to the answer, TLS included where ``_asks_for_tls``.

        Args:
            login: what the server is told; nothing in it ends a line.
            yes: what to return where the server says yes.

        Raises:
            Trouble: nobody can tell.
        """
