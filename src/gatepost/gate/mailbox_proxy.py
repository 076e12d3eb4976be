"""POP before SMTP: a proxy in front of an old POP3 or IMAP server, with TLS added, that sees who logs in.

Why: devices and programs that know no SMTP AUTH do fetch mail first.  A login that the old server accepts opens a
    window for the client's address, and ``[[trust]] pop3`` lets its mail pass while the window is open.
Trust: clients are anybody.  The server is the administrator's, perhaps old and odd: whatever it says that is neither
    yes nor no is a server that is out of reach.
Promise: nothing of a client reaches the server before its login, but the login itself, written anew.  A window is
    opened on one line of this file, after the server's own yes.  A client that is banned hears what a wrong password
    hears, and the server is not asked.  No secret is in a log line, and none is kept once the server has answered.
Sources: RFC 1939 (POP3), RFC 2449 (CAPA), RFC 5034 (AUTH), RFC 9051 (IMAP), RFC 4959 (SASL-IR), RFC 2595 (STLS,
    STARTTLS), RFC 8314 (implicit TLS), RFC 3206 and RFC 5530 (response codes).
    Stricter: no APOP, whose digest hides from the proxy what was guessed.  A refusal is worded here, so that a ban, a
    user whom nobody knows and a wrong secret look the same.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from enum import Enum, unique
from functools import lru_cache
from socket import SOCK_STREAM
from typing import NamedTuple, Protocol, cast

from gatepost.auth.login import unjudged
from gatepost.errors import BackendUnavailable
from gatepost.facts import Client, IPAddress
from gatepost.facts import Session as SessionFacts
from gatepost.gate.connection import READ_HIGH_OCTETS, Connection, Ended
from gatepost.gate.mailbox_lines import (
    CAPABILITIES_MAX,
    IMAP_LINE_OCTETS_MAX,
    MECHANISMS,
    SERVER_LINE_OCTETS_MAX,
    Defect,
    ImapCommand,
    ImapCommands,
    ImapDefect,
    Lines,
    LiteralAsked,
    Pop3Command,
    capabilities,
    imap_capabilities,
    imap_login,
    imap_no,
    imap_unjudged,
    pop3_capabilities,
    pop3_command,
    pop3_login,
    pop3_unjudged,
)
from gatepost.gate.settings import GateSettings, ListenSettings, MailboxServer
from gatepost.gate.tls import AskingContext, TlsContext
from gatepost.smtp import sasl
from gatepost.smtp.command import AUTH_OCTETS_MAX
from gatepost.smtp.reply import Reply
from gatepost.smtp.sasl import Challenge, Password, Token
from gatepost.telemetry import LoginRecord, SessionRecord, rfc3339

LOGIN_S = 60.0  # for a login, and for the next one after a refusal
POP3_IDLE_S = 900.0  # RFC 1939 §3: ten minutes at least
IMAP_IDLE_S = 2100.0  # RFC 9051 §5.4: thirty minutes at least; clients renew IDLE within 29 (RFC 2177 §3)
SERVER_STALL_S = 300.0  # for a server to take what its client sends
HALF_CLOSED_S = 10.0  # for a server to say something more, when its client has said all
COMMANDS_MAX = 50  # lines of a client before its login
REFUSALS_MAX = 5  # logins of a session
UNTAGGED_MAX = 64  # lines that an IMAP server says in between
NETWORK_ADDRESSES_MAX = 8  # of the server's name, tried one after the other


# --- What a session needs of the gate ---------------------------------------------------------------------------------


class Look(Protocol):
    """What is known of a user's and a client's guesses before they guess again."""

    @property
    def banned(self) -> bool:
        """Neither is asked about."""
        ...

    @property
    def delay_s(self) -> float:
        """How long the answer is put off."""
        ...


class Guesses(Protocol):
    """The counts of wrong secrets."""

    def look(self, user: str, client: IPAddress, now_s: float) -> Look:
        """Ask before a login."""
        ...

    def wrong(self, user: str, client: IPAddress, secret: str, now_s: float) -> None:
        """Count a wrong secret."""
        ...

    def right(self, user: str, client: IPAddress, now_s: float) -> None:
        """Remember a good login."""
        ...


class ReplyCounts(Protocol):
    """The worker's metrics."""

    def reply(self, stage: str, reason: str) -> None:
        """A reply was given."""
        ...


class Door(Protocol):
    """The listener that the client came to."""

    @property
    def settings(self) -> ListenSettings:
        """Its [[listen]] table."""
        ...

    def tls_context(self, facts: SessionFacts) -> TlsContext | AskingContext | None:
        """For this client; None where no TLS is offered."""
        ...


class Gate(Protocol):
    """The worker's part of the gate."""

    @property
    def settings(self) -> GateSettings:
        """For the host's name and the time a TLS handshake may take."""
        ...

    @property
    def guesses(self) -> Guesses:
        """Shared by all workers."""
        ...

    @property
    def metrics(self) -> ReplyCounts:
        """The worker's metrics."""
        ...

    def now_s(self) -> float:
        """Seconds since the epoch."""
        ...

    def new_reference(self) -> str:
        """A session's reference."""
        ...

    def login_opened(self, account: str, client: IPAddress, accounts_max: int, now_s: float) -> bool:
        """Open a window for this address; False where it is shared by more accounts than that, and opens none."""
        ...

    def close(self, connection: Connection) -> None:
        """Close when all is sent."""
        ...

    def ended(self, session: MailboxSession) -> None:
        """The session is over: log its record."""
        ...


def turned_away(role: str, text: str) -> bytes:
    """What a client hears instead of a greeting, where a client of SMTP hears 421."""
    words = f"-ERR [SYS/TEMP] {text}" if role == "pop3" else f"* BYE [UNAVAILABLE] {text}"
    return words.encode("ascii") + b"\r\n"


# --- The session ------------------------------------------------------------------------------------------------------


@unique
class Judgement(Enum):
    """What became of a login, as the log has it."""

    VERIFIED = "verified"
    DENIED = "denied"
    UNAVAILABLE = "unavailable"


class Answer(NamedTuple):
    """The answer to a login.

    Attributes:
        lines: what the server said and the client is to hear: the last is about the login itself, without tag; empty
            where the dialogue has its own words.
        why: for the operator, in our words: what a server says may repeat the secret.
    """

    judgement: Judgement
    lines: tuple[bytes, ...] = ()
    why: str = ""


_DENIED = Answer(Judgement.DENIED, why="the server refused it")
_BANNED = Answer(Judgement.DENIED, why="banned")
_FOR_ANOTHER = Answer(Judgement.DENIED, why="to act for another account is for nobody here")
_UNJUDGED = "the server says that it cannot judge it now"
_NOBODY = Answer(Judgement.DENIED, why="no user name or no password that anybody can have")
_REASONS = {Judgement.VERIFIED: "accepted", Judgement.DENIED: "credentials", Judgement.UNAVAILABLE: "unavailable"}
_LAST_WORDS = {Ended.TIMEOUT: "Autologout; idle for too long", Ended.DRAINED: "This server is going down"}


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


class MailboxSession:
    """One client, from the greeting to the end of its connection.

    Args:
        listener: of role "pop3" or "imap", with a mailbox server.
    """

    __slots__ = (
        "_account",
        "_closing",
        "_commands",
        "_dialogue",
        "_end",
        "_errors",
        "_logins",
        "_mailbox",
        "_refusals",
        "_started_s",
        "_wire",
        "_window",
        "connection",
        "facts",
        "lines",
        "listener",
        "logged_in",
        "server",
    )

    def __init__(self, server: Gate, listener: Door, connection: Connection, client: Client) -> None:
        settings = listener.settings
        assert settings.server is not None
        self.server = server
        self.listener = listener
        self.connection = connection
        self.facts = SessionFacts(server.new_reference(), client, settings.name, settings.role)
        self.logged_in = False
        self.lines: Lines
        self._mailbox: MailboxServer = settings.server
        self._wire: _Wire | None = None
        self._started_s = server.now_s()
        self._account = self._window = self._end = ""
        self._logins: list[LoginRecord] = []
        self._commands = self._errors = self._refusals = 0
        self._closing = False
        self._dialogue = self._new_dialogue()

    def _new_dialogue(self) -> Dialogue:
        """A dialogue from nothing: at the start, and again behind TLS.  RFC 2595 §2.1, §3.1, §4."""
        pop3 = self.facts.role == "pop3"
        self.connection.reader = self.lines = Lines(AUTH_OCTETS_MAX if pop3 else IMAP_LINE_OCTETS_MAX)
        return _Pop3(self) if pop3 else _Imap(self)

    async def run(self, octets: bytes = b"") -> None:
        """Hold the conversation until it ends; whatever happens, both connections are closed and the line is logged.

        Args:
            octets: what came behind a PROXY header in plain text.
        """
        try:
            early = self.connection.take_kept(self.lines)
            if early is not None:  # implicit TLS.  RFC 8314 §3.2, §3.3
                await self._handshake(early)
            elif octets:
                self.lines.receive(octets)
            self.say(self._dialogue.greeting())
            while self.open and await self._dialogue.converse():
                self._dialogue = self._new_dialogue()
                await self._handshake()
            if self.logged_in and self._wire is not None:
                await self._pump(self._wire)
            self._hang_up()
        except asyncio.CancelledError:
            self._end = self._end or "cut"
            raise
        except Exception:
            self._end = "internal error"  # ours: it ends one session, and the server logs what became of its task
            raise
        finally:
            if self._wire is not None:
                self._wire.close()
            self.server.close(self.connection)
            self.server.ended(self)

    # ---- for the dialogues

    @property
    def open(self) -> bool:
        """Commands are taken."""
        return not self._closing and not self.logged_in and self.connection.ended is not Ended.LOST

    @property
    def tls_possible(self) -> bool:
        """TLS can be switched on."""
        return self.listener.settings.tls != "none" and not self.facts.tls

    @property
    def login_allowed(self) -> bool:
        """A secret may come on this connection as it is."""
        return not self.tls_possible or self.listener.settings.auth_without_tls

    @property
    def name(self) -> str:
        """The host's name, for the greeting."""
        return self.server.settings.name

    def say(self, octets: bytes) -> None:
        """Send to the client."""
        self.connection.send(octets)

    def error(self, octets: bytes) -> None:
        """Refuse a command."""
        self._errors += 1
        self.say(octets)

    def close(self, why: str, octets: bytes = b"") -> None:
        """Say the last, and take no more commands."""
        self.say(octets)
        self._closing = True
        self._end = why

    async def more(self) -> bool:
        """Wait for octets of the client; False when the session is over."""
        await self.connection.drained()
        return await self.connection.more()

    def count_command(self) -> bool:
        """Whether the client may say one more line."""
        self._commands += 1
        if self._commands > COMMANDS_MAX:
            self.close("too many commands", self._dialogue.farewell("Too many commands"))
        return not self._closing

    async def line(self) -> bytes | None:
        """The client's next line; None when there is none and the session is over."""
        while True:
            line = self.lines.line()
            if isinstance(line, bytes):
                return line if self.count_command() else None
            if isinstance(line, Defect):
                self._errors += 1
                self.close("protocol error", self._dialogue.farewell(line.text))
                return None
            if not await self.more():
                return None

    def begin_tls(self, go_ahead: bytes) -> bool:
        """Say that TLS may begin; False where octets came behind the command, which ends the session.

        Source: RFC 2595 §2.1; commands injected there are neither executed nor fed to TLS.
        """
        if self.lines.unread_octets:
            self._errors += 1
            farewell = self._dialogue.farewell("Octets came behind the command that begins TLS")
            self.close("octets behind STARTTLS", farewell)
            return False
        self.connection.hold_reading()
        self.say(go_ahead)
        return True

    async def sasl(self, mechanism: str, initial: bytes | None) -> Password | Reply | None:
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
            self.say(b"+ " + base64.b64encode(step.octets) + b"\r\n")
            line = await self.line()
            if line is None:
                return None
            response = sasl.decode(line)
        return response

    async def log_in(self, mechanism: str, found: Password | Reply) -> Answer:
        """Ask the server, unless there is nothing to ask or this client has guessed too often; a yes opens the window.

        Args:
            mechanism: of SASL, or the command; found: credentials, or what is wrong with them.
        """
        if isinstance(found, Reply):
            return self._judged(mechanism, "", _NOBODY)
        server, address, account = self.server, self.facts.client.address, found.user.lower()
        look = server.guesses.look(account, address, server.now_s())
        if look.delay_s > 0:
            await asyncio.sleep(look.delay_s)
        if look.banned:
            return self._judged(mechanism, account, _BANNED)
        if found.authzid:
            return self._judged(mechanism, account, _FOR_ANOTHER)
        answer = await self._ask(found)
        if answer.judgement is Judgement.DENIED:
            server.guesses.wrong(account, address, found.secret, server.now_s())
        elif answer.judgement is Judgement.VERIFIED:
            server.guesses.right(account, address, server.now_s())
            # The one line where a window is opened: the yes is the server's own.
            opened = server.login_opened(account, address, self._mailbox.accounts_max, server.now_s())
            self._window = "opened" if opened else "not opened: many accounts log in from this address"
            self._account = account
            self.logged_in = True
        return self._judged(mechanism, account, answer)

    def _judged(self, mechanism: str, account: str, answer: Answer) -> Answer:
        record: LoginRecord = {"account": account, "mechanism": mechanism, "verdict": answer.judgement.value}
        if answer.why:
            record["why"] = answer.why
        self._logins.append(record)
        self.server.metrics.reply("auth", "banned" if answer is _BANNED else _REASONS[answer.judgement])
        self.connection.progress()
        if answer.judgement is Judgement.DENIED:
            self._errors += 1
            self._refusals += 1
        return answer

    def refused_often(self) -> None:
        """Close, where the client has been refused too often; called when it has heard the last refusal."""
        if self._refusals >= REFUSALS_MAX and self.open:
            self.close("too many errors", self._dialogue.farewell("Too many refused logins"))

    async def server_capabilities(self) -> tuple[str, ...]:
        """What the server offers; nothing where it is out of reach."""
        try:
            async with asyncio.timeout(self._mailbox.timeout_s):
                return (await self._connected()).speech.offered or ()
        except (OSError, BackendUnavailable):
            self._drop_wire()
            return ()

    async def _ask(self, password: Password) -> Answer:
        try:
            async with asyncio.timeout(self._mailbox.timeout_s):
                return await (await self._connected()).speech.log_in(password)
        except (OSError, BackendUnavailable) as error:  # TimeoutError is an OSError
            self._drop_wire()
            why = f"{self._mailbox.host}:{self._mailbox.port}: {_why(error)}"
            return Answer(Judgement.UNAVAILABLE, why=why)

    async def _connected(self) -> _Wire:
        """The connection to the server, made where there is none or where the server has closed it."""
        if self._wire is None or self._wire.ended:
            self._wire = await _connect(self._mailbox, self.facts.role)
        return self._wire

    def _drop_wire(self) -> None:
        """The server is out of reach, silent or odd: its connection is not used again."""
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    # ---- TLS, the pump, the end

    async def _handshake(self, early: bytes = b"") -> None:
        """The TLS handshake; a client that fails it hears nothing more."""
        context = self.listener.tls_context(self.facts)
        assert context is not None
        try:
            secured = await self.connection.start_tls(context, self.server.settings.timeouts.tls_handshake_s, early)
        except OSError as error:
            self.server.metrics.reply("tls", "error")
            self.close(f"TLS handshake failed: {error}")
            self.connection.abort()
            return
        self.facts = self.facts._replace(tls=secured.version, certificate=secured.certificate)

    async def _pump(self, wire: _Wire) -> None:
        """Hand octets both ways until one side ends."""
        self.connection.progress()
        async with asyncio.TaskGroup() as both:
            up = both.create_task(self._upwards(wire))
            down = both.create_task(self._downwards(wire))
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
            if up.done() and self.connection.ended is Ended.EOF:
                wire.write_eof()
                moved_s = -1.0
                while not down.done() and moved_s != self.connection.since:  # as long as there is more for the client
                    moved_s = self.connection.since
                    await asyncio.wait((down,), timeout=HALF_CLOSED_S)
            up.cancel()
            down.cancel()

    async def _upwards(self, wire: _Wire) -> None:
        """From the client to the server."""
        while True:
            octets = self.lines.rest()
            if octets:
                self.connection.progress()
                wire.write(octets)
                try:
                    async with asyncio.timeout(SERVER_STALL_S):
                        await wire.drained()
                except TimeoutError:
                    self._end = "the server takes no more"
                    return
            elif not await self.connection.more():
                return

    async def _downwards(self, wire: _Wire) -> None:
        """From the server to the client."""
        while True:
            octets = wire.lines.rest()
            if octets:
                self.connection.progress()
                wire.at_line_end = octets.endswith(b"\n")
                self.say(octets)
                await self.connection.drained()
            elif not await wire.more():
                if self.connection.ended is Ended.NO:
                    self._end = self._end or "server closed"
                return

    def _hang_up(self) -> None:
        """Why it ends, and a last word where it cannot be taken for mail.  RFC 1939 §3: POP3 has none."""
        ended = self.connection.ended
        if self._end:
            return
        self._end = ended.value
        between_lines = self._wire is None or self._wire.at_line_end
        if self.facts.role == "imap" and ended in _LAST_WORDS and between_lines:
            self.say(self._dialogue.farewell(_LAST_WORDS[ended]))

    # ---- for the gate

    def patience_s(self, command_s: float) -> float:
        """How long this client may be silent, where a client of SMTP may be for so long."""
        if self.logged_in:
            return POP3_IDLE_S if self.facts.role == "pop3" else IMAP_IDLE_S
        return min(command_s, LOGIN_S)

    def record(self) -> SessionRecord:
        """The session's one log line."""
        facts = self.facts
        now_s = self.server.now_s()
        record: SessionRecord = {
            "time": rfc3339(now_s),
            "event": "session",
            "reference": facts.reference,
            "listen": facts.listen,
            "client": str(facts.client.address),
            "hello": "",
            "tls": facts.tls,
            "seconds": round(now_s - self._started_s, 3),
            "transactions": [],
            "errors": self._errors,
            "end": self._end,
        }
        if self._logins:
            record["logins"] = self._logins
        if self.logged_in:
            record["account"], record["window"] = self._account, self._window
        return record


# --- The client's side: POP3 ------------------------------------------------------------------------------------------


class _Pop3:
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
                offered = await session.server_capabilities()
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
                await self._answer(name, await session.sasl(name, initial or None))

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
    """A multi-line response; no line of ours begins with a period.  RFC 1939 §3."""
    return "".join(f"{line}\r\n" for line in (f"+OK {first}", *lines, ".")).encode()


def _password(user: bytes, secret: bytes) -> Password | Reply:
    """What USER and PASS, or LOGIN, say; a name or a secret that nobody can have is a wrong one."""
    try:
        prepared = sasl.prepare_user(user.decode("utf-8")), sasl.prepare_secret(secret.decode("utf-8"))
    except UnicodeDecodeError:
        prepared = None, None
    if prepared[0] is None or prepared[1] is None:
        return _INVALID
    return Password(prepared[0], prepared[1])


_INVALID = Reply(535, "Authentication credentials invalid", "5.7.8")


# --- The client's side: IMAP ------------------------------------------------------------------------------------------


class _Imap:
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
                offered = await session.server_capabilities()
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
            await self._answer(command.tag, name, await session.sasl(name, initial[0] if initial else None))

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


# --- The server's side ------------------------------------------------------------------------------------------------


class _Wire(asyncio.Protocol):
    """The connection to the mailbox server.

    Attributes:
        speech: POP3 or IMAP over it.
        ended: nothing more will come.
        at_line_end: the last octet that the client was given ended a line.
    """

    __slots__ = ("_drained", "_loop", "_paused", "_transport", "_waiter", "at_line_end", "ended", "lines", "speech")

    def __init__(self, loop: asyncio.AbstractEventLoop, role: str) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._paused = False
        self.ended = False
        self.at_line_end = True
        self.lines = Lines(SERVER_LINE_OCTETS_MAX)
        self.speech: _Pop3Server | _ImapServer = _Pop3Server(self) if role == "pop3" else _ImapServer(self)

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.lines.receive(data)
        if not self._paused and self.lines.unread_octets > READ_HIGH_OCTETS and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        self._wake()
        self.resume_writing()

    def pause_writing(self) -> None:
        self._drained = self._loop.create_future()

    def resume_writing(self) -> None:
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # ---- for the session

    async def more(self) -> bool:
        """Wait for octets; False when none will come."""
        if not self.lines.unread_octets and not self.ended:
            await self._arrival()
        return self.lines.unread_octets > 0

    async def _arrival(self) -> None:
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        self._waiter = self._loop.create_future()
        await self._waiter

    async def line(self) -> bytes:
        """The next line, without its end.

        Raises:
            BackendUnavailable: the server ended the connection, or says what is no line.
        """
        while (line := self.lines.line()) is None:
            if self.ended:
                raise BackendUnavailable("the server closed the connection")
            await self._arrival()
        if isinstance(line, Defect):
            raise BackendUnavailable(f"the server says what is no line: {line.text}")
        return line

    def write(self, octets: bytes) -> None:
        """Send to the server."""
        if self._transport is not None and not self.ended:
            self._transport.write(octets)

    async def drained(self) -> None:
        """Wait until the server has taken most of what was sent, or is gone."""
        if self._drained is not None:
            await self._drained

    def write_eof(self) -> None:
        """Say that the client has said all, where that can be said: not under TLS."""
        if self._transport is not None and not self.ended and self._transport.can_write_eof():
            self._transport.write_eof()

    async def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """The handshake, as client.

        Raises:
            BackendUnavailable: octets came behind the server's leave, in plain text.
            OSError: the handshake failed.
        """
        if self.lines.unread_octets:
            raise BackendUnavailable("the server talks in plain text where TLS begins")
        assert self._transport is not None
        transport = await self._loop.start_tls(self._transport, self, context, server_hostname=host)
        if transport is None:
            raise BackendUnavailable("the server closed the connection in the TLS handshake")
        self._transport = transport

    def close(self) -> None:
        """Close when all is sent."""
        if self._transport is not None:
            self._transport.close()


class _Pop3Server:
    """POP3 as a client.

    Attributes:
        offered: the lines of CAPA, None where the server does not know it.
    """

    __slots__ = ("_wire", "offered")

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire
        self.offered: tuple[str, ...] | None = None

    async def greeted(self) -> None:
        """The greeting and the capabilities.  RFC 1939 §4."""
        if not _ok(await self._wire.line()):
            raise BackendUnavailable("the server greets with a refusal")
        await self._ask_capabilities()

    async def start_tls(self, context: ssl.SSLContext, host: str) -> bool:
        """STLS; False where the server does not have it.  RFC 2595 §4."""
        if "STLS" not in map(str.upper, self.offered or ()) or not _ok(await self._say(b"STLS")):
            return False
        await self._wire.start_tls(context, host)
        await self._ask_capabilities()
        return True

    async def log_in(self, password: Password) -> Answer:
        """USER and PASS, or AUTH PLAIN."""
        lines = pop3_login(password, self.offered)
        if lines is None:
            raise BackendUnavailable("the server takes no login as this connection is")
        answer = b""
        for number, line in enumerate(lines, 1):
            answer = await self._say(line)
            if answer.startswith(b"-ERR"):
                return Answer(Judgement.UNAVAILABLE, (answer,), _UNJUDGED) if pop3_unjudged(answer) else _DENIED
            # "+ " asks for a response, and only for the last; it is no yes.  RFC 5034 §4.
            asked = number < len(lines) and lines[0].startswith(b"AUTH")
            if not (answer.startswith(b"+ ") or answer == b"+" if asked else _ok(answer)):
                raise BackendUnavailable("the server's answer to a login is neither yes nor no")
        return Answer(Judgement.VERIFIED, (answer,))

    async def _say(self, line: bytes) -> bytes:
        """One command, and the first line of its response."""
        if self._wire.lines.unread_octets:
            raise BackendUnavailable("the server talks when it was not asked")
        self._wire.write(line + b"\r\n")
        return await self._wire.line()

    async def _ask_capabilities(self) -> None:
        self.offered = None
        if _ok(await self._say(b"CAPA")):
            lines: list[bytes] = []
            while (line := await self._wire.line()) != b".":
                lines.append(line)
                if len(lines) > CAPABILITIES_MAX:
                    raise BackendUnavailable("the server's capabilities do not end")
            self.offered = capabilities(lines)


def _ok(line: bytes) -> bool:
    return line == b"+OK" or line.startswith(b"+OK ")


class _ImapServer:
    """IMAP as a client.

    Attributes:
        offered: the keywords of CAPABILITY.
    """

    __slots__ = ("_number", "_wire", "offered")

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire
        self._number = 0
        self.offered: tuple[str, ...] = ()

    async def greeted(self) -> None:
        """The greeting and the capabilities.  PREAUTH would be a login that nobody made.  RFC 9051 §7.1."""
        if not (await self._wire.line()).upper().startswith(b"* OK"):
            raise BackendUnavailable("the server does not greet with OK")
        await self._ask_capabilities()

    async def start_tls(self, context: ssl.SSLContext, host: str) -> bool:
        """STARTTLS; False where the server does not have it.  RFC 9051 §6.2.1."""
        if "STARTTLS" not in map(str.upper, self.offered):
            return False
        _, status = await self._say([b"STARTTLS"])
        if not _tagged_ok(status):
            return False
        await self._wire.start_tls(context, host)
        await self._ask_capabilities()
        return True

    async def log_in(self, password: Password) -> Answer:
        """LOGIN, or AUTHENTICATE PLAIN; what the server says in between is for the client, if it may come in."""
        lines = imap_login(password, self.offered)
        if lines is None:
            raise BackendUnavailable("the server takes no login as this connection is")
        untagged, status = await self._say(lines)
        if _tagged_ok(status):
            return Answer(Judgement.VERIFIED, (*untagged, status))
        if not imap_no(status):
            raise BackendUnavailable("the server's answer to a login is neither yes nor no")
        return Answer(Judgement.UNAVAILABLE, (status,), _UNJUDGED) if imap_unjudged(status) else _DENIED

    async def _say(self, lines: list[bytes]) -> tuple[list[bytes], bytes]:
        """One command, in lines that each but the first wait for "+"; what was said without our tag, and with it."""
        self._number += 1
        tag = b"g%d " % self._number
        untagged: list[bytes] = []
        for left, line in zip(range(len(lines) - 1, -1, -1), (tag + lines[0], *lines[1:]), strict=True):
            self._wire.write(line + b"\r\n")
            while not (heard := await self._wire.line()).startswith(b"+"):
                if heard.startswith(tag):
                    return untagged, heard[len(tag) :]
                untagged.append(heard)
                if not heard.startswith(b"* ") or heard.endswith(b"}") or len(untagged) > UNTAGGED_MAX:
                    raise BackendUnavailable("the server says what it was not asked")
            if not left:
                break
        raise BackendUnavailable("the server waits for more, and there is no more")

    async def _ask_capabilities(self) -> None:
        untagged, _ = await self._say([b"CAPABILITY"])
        words = [word for line in untagged if line.upper().startswith(b"* CAPABILITY ") for word in line.split()[2:]]
        self.offered = capabilities(words)


def _tagged_ok(status: bytes) -> bool:
    return status[:3].upper() in (b"OK", b"OK ")  # and not "OKAY"


async def _connect(settings: MailboxServer, role: str) -> _Wire:
    """A connection that has been greeted, under TLS as the settings say.

    Raises:
        BackendUnavailable: nobody answers, TLS that is required cannot be had, or what answers is no such server.
        OSError: the handshake failed.
    """
    wire = await _open(settings, role)
    try:
        if settings.tls == "implicit":
            await wire.start_tls(_context(judged=True), settings.host)
        await wire.speech.greeted()
        required = settings.tls == "required"
        secured = settings.tls in ("off", "implicit") or await wire.speech.start_tls(
            _context(judged=required), settings.host
        )
    except BaseException:
        wire.close()
        raise
    if required and not secured:
        wire.close()
        raise BackendUnavailable("the server does not offer TLS, and server_tls is required")
    return wire


async def _open(settings: MailboxServer, role: str) -> _Wire:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(settings.host, settings.port, type=SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise BackendUnavailable(f"the name cannot be looked up: {_why(error)}") from error
    trouble = "the name has no address"
    for host in list(dict.fromkeys(str(entry[4][0]) for entry in found))[:NETWORK_ADDRESSES_MAX]:
        try:
            _, wire = await loop.create_connection(lambda: _Wire(loop, role), host, settings.port)
        except OSError as error:
            trouble = _why(error)
        else:
            return wire
    raise BackendUnavailable(trouble)


@lru_cache(maxsize=2)
def _context(*, judged: bool) -> ssl.SSLContext:
    """For the server's side: its certificate judged by the system's authorities, or not at all."""
    return ssl.create_default_context() if judged else unjudged()


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
