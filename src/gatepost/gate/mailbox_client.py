"""What clients of the POP3 and IMAP proxy say before a login, and what they hear.

Why: two languages for one session: each dialogue here reads its commands and words its answers, and what they have in
    common, from counting to asking the mailbox server, is the session's in ``mailbox_proxy``.
Trust: clients are anybody; their commands come from ``mailbox_lines``, parsed and bounded.
Promise: no secret is taken where TLS must come first, and a client that waits with one hears so before it sends it.
    A ban, a user whom nobody knows and a wrong secret are refused with the same words.
Sources: RFC 1939 (POP3), RFC 2449 (CAPA), RFC 5034 (AUTH), RFC 9051 (IMAP), RFC 4959 (SASL-IR), RFC 2595 (STLS,
    STARTTLS), RFC 3206 and RFC 5530 (response codes).
    Stricter: no APOP, whose digest hides from the proxy what was guessed.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Protocol

from gatepost.gate.mailbox_lines import (
    MECHANISMS,
    Defect,
    ImapCommand,
    ImapCommands,
    ImapDefect,
    LiteralAsked,
    Pop3Command,
    imap_capabilities,
    pop3_capabilities,
    pop3_command,
)
from gatepost.gate.mailbox_server import Judgement
from gatepost.smtp import sasl
from gatepost.smtp.reply import Reply
from gatepost.smtp.sasl import Challenge, Password, Token

if TYPE_CHECKING:
    from gatepost.gate.mailbox_proxy import MailboxSession

_INVALID = Reply(535, "Authentication credentials invalid", "5.7.8")


class Dialogue(Protocol):
    """The proxy's part of a conversation before login, from its greeting or from behind a TLS handshake."""

    def greeting(self) -> bytes:
        """The first octets."""
        ...

    async def converse(self) -> bool:
        """Answer commands.

        Returns:
            True when TLS is to begin, and another dialogue behind it; False when the session is closing or logged in.
        """
        ...

    def farewell(self, text: str) -> bytes:
        """The last words, before the proxy closes of its own will."""
        ...


# --- POP3 -------------------------------------------------------------------------------------------------------------


class Pop3:
    """The authorisation state.  RFC 1939 §4."""

    __slots__ = ("_session", "_user")

    def __init__(self, session: MailboxSession) -> None:
        self._session = session
        self._user: bytes | None = None

    def greeting(self) -> bytes:
        # Without a timestamp: there is no APOP.  RFC 1939 §7.
        return f"+OK {self._session.name} POP3 Gatepost\r\n".encode()

    def farewell(self, text: str) -> bytes:
        return f"-ERR {text}; closing\r\n".encode()

    async def converse(self) -> bool:
        session = self._session
        while session.open:
            line = await session.line()
            if line is None:
                return False
            command = pop3_command(line)
            if isinstance(command, Defect):
                session.error(f"-ERR {command.text}\r\n".encode())
            elif command.verb == "STLS" and session.tls_possible:
                return session.begin_tls(b"+OK Begin TLS\r\n")
            elif command.verb in ("USER", "PASS", "AUTH"):
                await self._authorise(command)
            elif command.verb == "CAPA":
                offered = await session.link.capabilities()
                ways = pop3_capabilities(offered, stls=session.tls_possible, login=session.login_allowed)
                session.say(_multiline("Capabilities follow", ways))
            elif command.verb == "QUIT":
                session.close("quit", b"+OK Bye\r\n")
            else:
                session.error(b"-ERR Log in first\r\n")
        return False

    async def _authorise(self, command: Pop3Command) -> None:
        """USER, PASS, AUTH.  RFC 1939 §7, RFC 5034 §4."""
        session = self._session
        if not session.login_allowed:
            session.error(b"-ERR [AUTH] Say STLS first: no login in plain text\r\n")
        elif command.verb == "USER":
            self._user = command.argument.strip(b" ")
            session.say(b"+OK Password?\r\n")  # whoever it is
        elif command.verb == "PASS":
            user, self._user = self._user, None
            if user is None:
                session.error(b"-ERR Say USER first\r\n")
            else:
                await self._answer("USER", _password(user, command.argument))
        elif not command.argument:  # RFC 1734: what some programs still ask
            session.say(_multiline("Mechanisms follow", MECHANISMS))
        else:
            mechanism, _, initial = command.argument.partition(b" ")
            name = mechanism.decode("ascii", "replace").upper()
            if name not in MECHANISMS:
                session.error(b"-ERR No such mechanism\r\n")
            else:
                await self._answer(name, await _credentials(session, name, initial or None))

    async def _answer(self, mechanism: str, found: Password | Reply | None) -> None:
        session = self._session
        if found is None:
            return
        if isinstance(found, Reply) and found.code == 501:  # cancelled, or no message of the mechanism
            session.error(f"-ERR {found.text}\r\n".encode())
            return
        answer = await session.log_in(mechanism, found)
        if answer.lines:
            session.say(answer.lines[-1] + b"\r\n")
        elif answer.judgement is Judgement.DENIED:
            session.say(b"-ERR [AUTH] Authentication failed\r\n")  # RFC 3206 §4
        else:
            session.say(b"-ERR [SYS/TEMP] The mailbox server cannot be asked now, try again later\r\n")
        session.refused_often()


def _multiline(first: str, lines: tuple[str, ...]) -> bytes:
    """A multi-line response; no line of ours begins with a period, and the server's are as it sent them.  RFC 1939."""
    return "".join(f"{line}\r\n" for line in (f"+OK {first}", *lines, ".")).encode()


# --- IMAP -------------------------------------------------------------------------------------------------------------


class Imap:
    """The not authenticated state.  RFC 9051 §3.1, §6.1, §6.2."""

    __slots__ = ("_commands", "_session")

    def __init__(self, session: MailboxSession) -> None:
        self._session = session
        self._commands = ImapCommands(session.lines)

    def greeting(self) -> bytes:
        return f"* OK {self._session.name} IMAP Gatepost\r\n".encode()

    def farewell(self, text: str) -> bytes:
        return f"* BYE {text}\r\n".encode()

    async def _next(self) -> ImapCommand | LiteralAsked | ImapDefect | None:
        while (found := self._commands.next()) is None:
            if not await self._session.more():
                return None
        return found if self._session.count_command() else None

    async def converse(self) -> bool:
        session = self._session
        while session.open:
            found = await self._next()
            if found is None:
                return False
            if isinstance(found, ImapDefect):
                session.error(f"{found.tag} BAD {found.text}\r\n".encode())
                if found.fatal:
                    session.close("protocol error", self.farewell("What follows cannot be read"))
            elif isinstance(found, LiteralAsked):
                self._asked(found)
            elif found.verb == "STARTTLS" and session.tls_possible:
                return session.begin_tls(f"{found.tag} OK Begin TLS\r\n".encode())
            else:
                await self._command(found)
        return False

    def _asked(self, literal: LiteralAsked) -> None:
        """A client waits with a literal: before anything secret is sent it hears that it may not.  RFC 9051 §4.3."""
        if literal.verb == "LOGIN" and self._session.login_allowed:
            self._session.say(b"+ OK\r\n")
            return
        self._commands.refuse()
        if literal.verb == "LOGIN":
            self._privacy(literal.tag)
        else:
            self._session.error(f"{literal.tag} BAD Log in first\r\n".encode())

    def _privacy(self, tag: str) -> None:
        self._session.error(f"{tag} NO [PRIVACYREQUIRED] Say STARTTLS first: no login in plain text\r\n".encode())

    async def _command(self, command: ImapCommand) -> None:
        session, tag = self._session, command.tag
        match command.verb:
            case "CAPABILITY":
                offered = await session.link.capabilities()
                ways = imap_capabilities(offered, starttls=session.tls_possible, login=session.login_allowed)
                session.say(f"* CAPABILITY {' '.join(ways)}\r\n{tag} OK Done\r\n".encode())
            case "NOOP":
                session.say(f"{tag} OK Done\r\n".encode())
            case "ID":
                session.say(f"* ID NIL\r\n{tag} OK Done\r\n".encode())  # RFC 2971 §3.2
            case "LOGOUT":
                session.close("quit", f"* BYE Logging out\r\n{tag} OK Done\r\n".encode())
            case "LOGIN" | "AUTHENTICATE" if not session.login_allowed:
                self._privacy(tag)
            case "LOGIN":
                if command.arguments is None or len(command.arguments) != 2:
                    session.error(f"{tag} BAD LOGIN wants a user name and a password\r\n".encode())
                else:
                    await self._answer(tag, "LOGIN", _password(*command.arguments))
            case "AUTHENTICATE":
                await self._authenticate(command)
            case _:
                session.error(f"{tag} BAD Log in first\r\n".encode())

    async def _authenticate(self, command: ImapCommand) -> None:
        """RFC 9051 §6.2.2."""
        session = self._session
        mechanism, *initial = command.arguments or (b"",)
        name = mechanism.decode("ascii", "replace").upper()
        if name not in MECHANISMS or len(initial) > 1:
            session.error(f"{command.tag} NO No such mechanism\r\n".encode())
        else:
            await self._answer(command.tag, name, await _credentials(session, name, initial[0] if initial else None))

    async def _answer(self, tag: str, mechanism: str, found: Password | Reply | None) -> None:
        session = self._session
        if found is None:
            return
        if isinstance(found, Reply) and found.code == 501:  # RFC 9051 §6.2.2: cancelled, or what cannot be decoded
            session.error(f"{tag} BAD {found.text}\r\n".encode())
            return
        answer = await session.log_in(mechanism, found)
        if answer.lines:
            *untagged, last = answer.lines
            session.say(b"".join(line + b"\r\n" for line in (*untagged, f"{tag} ".encode() + last)))
        elif answer.judgement is Judgement.DENIED:
            session.say(f"{tag} NO [AUTHENTICATIONFAILED] Authentication failed\r\n".encode())  # RFC 5530 §3
        else:
            session.say(f"{tag} NO [UNAVAILABLE] The mailbox server cannot be asked now, try again later\r\n".encode())
        session.refused_often()


# --- Credentials ------------------------------------------------------------------------------------------------------


def _password(user: bytes, secret: bytes) -> Password | Reply:
    """What USER and PASS, or LOGIN, say; a name or a secret that nobody can have is a wrong one."""
    try:
        prepared = sasl.prepare_user(user.decode("utf-8")), sasl.prepare_secret(secret.decode("utf-8"))
    except UnicodeDecodeError:
        prepared = None, None
    if prepared[0] is None or prepared[1] is None:
        return _INVALID
    return Password(prepared[0], prepared[1])


async def _credentials(session: MailboxSession, mechanism: str, initial: bytes | None) -> Password | Reply | None:
    """The exchange of PLAIN or LOGIN.  RFC 5034 §4, RFC 9051 §6.2.2, RFC 4959.

    Args:
        initial: base64, "=" for an empty one, None for none.

    Returns:
        Credentials, what is wrong in the words of SMTP, or None when the session is over.
    """
    exchange = sasl.exchange(mechanism)
    assert exchange is not None
    response: bytes | Reply | None = None
    if initial is not None:
        response = b"" if initial == b"=" else sasl.decode(initial)
    while not isinstance(response, Reply):
        step = exchange.step(response)
        assert not isinstance(step, Token), "neither PLAIN nor LOGIN makes a token"
        if not isinstance(step, Challenge):
            return step
        session.say(b"+ " + base64.b64encode(step.octets) + b"\r\n")
        line = await session.line()
        if line is None:
            return None
        response = sasl.decode(line)
    return response
