"""POP before SMTP: a proxy in front of an old POP3 or IMAP server, with TLS added, that sees who logs in.

Why: devices and programs that know no SMTP AUTH do fetch mail first.  A login that the old server accepts opens a
    window for the client's address, and ``[[trust]] pop3`` lets its mail pass while the window is open.
Trust: clients are anybody; what they say is read in ``mailbox_client``, and the server is asked in ``mailbox_server``.
Promise: nothing of a client reaches the server before its login, but the login itself, written anew.  A window is
    opened on one line of this file, after the server's own yes.  A client that is banned, or that tries a bait account,
    hears what a wrong password hears, and the server is not asked.  No secret is in a log line, and none is kept once
    the server has answered.
Sources: RFC 1939 (POP3), RFC 9051 (IMAP), RFC 2595 (STLS, STARTTLS), RFC 8314 (implicit TLS), RFC 3206 and RFC 5530
    (response codes).
    Stricter: a refusal is worded here, so that a ban, a user whom nobody knows and a wrong secret look the same.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from gatepost.facts import Client, IPAddress
from gatepost.facts import Session as SessionFacts
from gatepost.gate.connection import Connection, Ended
from gatepost.gate.mailbox_client import Dialogue, Imap, Pop3
from gatepost.gate.mailbox_lines import IMAP_LINE_OCTETS_MAX, Defect, Lines
from gatepost.gate.mailbox_server import Answer, Judgement, Link
from gatepost.gate.settings import GateSettings, ListenSettings
from gatepost.gate.tls import AskingContext, TlsContext
from gatepost.smtp.command import AUTH_OCTETS_MAX
from gatepost.smtp.reply import Reply
from gatepost.smtp.sasl import Password
from gatepost.store import Backlog, End, Record
from gatepost.telemetry import LoginRecord, SessionRecord, rfc3339

LOGIN_S = 60.0  # for a login, and for the next one after a refusal
POP3_IDLE_S = 900.0  # RFC 1939 §3: ten minutes at least
IMAP_IDLE_S = 2100.0  # RFC 9051 §5.4: thirty minutes at least; clients renew IDLE within 29 (RFC 2177 §3)
COMMANDS_MAX = 50  # lines of a client before its login
REFUSALS_MAX = 5  # logins of a session


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

    def bait(self, user: str, client: IPAddress, now_s: float) -> None:
        """Ban who used an account that nobody uses."""
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

    async def is_bait(self, user: str) -> bool:
        """Whether this is an account that nobody uses: whoever tries it is an attacker."""
        ...

    def login_opened(self, account: str, client: IPAddress, accounts_max: int, now_s: float) -> bool:
        """Open a window for this address; False where it is shared by more accounts than that, and opens none."""
        ...

    def close(self, connection: Connection) -> None:
        """Close when all is sent."""
        ...

    def failed(self, facts: SessionFacts) -> None:
        """A fault of ours ends a session: count it, and log its traceback."""
        ...

    def ended(self, session: MailboxSession) -> None:
        """The session is over: log its record."""
        ...


def turned_away(role: str, text: str) -> bytes:
    """What a client hears instead of a greeting, where a client of SMTP hears 421."""
    words = f"-ERR [SYS/TEMP] {text}" if role == "pop3" else f"* BYE [UNAVAILABLE] {text}"
    return words.encode("ascii") + b"\r\n"


# --- The session ------------------------------------------------------------------------------------------------------


_BANNED = Answer(Judgement.DENIED, why="banned")
_BAIT = Answer(Judgement.DENIED, why="a bait account")
_FOR_ANOTHER = Answer(Judgement.DENIED, why="to act for another account is for nobody here")
_NOBODY = Answer(Judgement.DENIED, why="no user name or no password that anybody can have")
_REASONS = {Judgement.VERIFIED: "accepted", Judgement.DENIED: "credentials", Judgement.UNAVAILABLE: "unavailable"}
_LAST_WORDS = {Ended.TIMEOUT: "Autologout; idle for too long", Ended.DRAINED: "This server is going down"}


class MailboxSession:
    """One client, from the greeting to the end of its connection.

    Args:
        listener: of role "pop3" or "imap", with a mailbox server.
    """

    __slots__ = (
        "_account",
        "_accounts_max",
        "_closing",
        "_commands",
        "_dialogue",
        "_end",
        "_errors",
        "_logins",
        "_refusals",
        "_started_s",
        "_window",
        "connection",
        "facts",
        "lines",
        "link",
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
        self._accounts_max = settings.server.accounts_max
        self.link = Link(settings.server, settings.role)
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
        return Pop3(self) if pop3 else Imap(self)

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
            if self.logged_in:
                self._end = await self.link.pump(self.connection, self.lines)
            self._hang_up()
        except asyncio.CancelledError:
            self._end = self._end or "cut"
            raise
        except Exception:  # noqa: BLE001 - one of the places that tests/test_architecture.py names
            # Ours: a fault in this program ends one session and is seen in the log; it lets nobody in.
            self._end = "internal error"
            self.server.failed(self.facts)
            if not self.logged_in:  # or the words might be taken for mail
                self.say(turned_away(self.facts.role, "Internal error; closing, try again later"))
        finally:
            self.link.close()
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
        if await server.is_bait(account):
            server.guesses.bait(account, address, server.now_s())
            server.guesses.wrong(account, address, found.secret, server.now_s())
            return self._judged(mechanism, account, _BAIT)
        if found.authzid:
            return self._judged(mechanism, account, _FOR_ANOTHER)
        answer = await self.link.log_in(found)
        if answer.judgement is Judgement.DENIED:
            server.guesses.wrong(account, address, found.secret, server.now_s())
        elif answer.judgement is Judgement.VERIFIED:
            server.guesses.right(account, address, server.now_s())
            # The one line where a window is opened: the yes is the server's own.
            opened = server.login_opened(account, address, self._accounts_max, server.now_s())
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

    # ---- TLS, the end

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

    def _hang_up(self) -> None:
        """Why it ends, and a last word where it cannot be taken for mail.  RFC 1939 §3: POP3 has none."""
        if self._end:
            return
        ended = self.connection.ended
        self._end = ended.value
        if self.facts.role == "imap" and ended in _LAST_WORDS and self.link.at_line_end:
            self.say(self._dialogue.farewell(_LAST_WORDS[ended]))

    # ---- for the gate

    def patience_s(self, command_s: float) -> float:
        """How long this client may be silent, where a client of SMTP may be for so long."""
        if self.logged_in:
            return POP3_IDLE_S if self.facts.role == "pop3" else IMAP_IDLE_S
        return min(command_s, LOGIN_S)

    def hand_over(self, journal: Backlog, end: End | None = None) -> None:
        """What the journal is to know: the session's end."""
        if end is not None:
            journal.keep(Record(self.facts, (), end), end.ended)

    def ending(self) -> End:
        """How the session ended, for the journal."""
        return End(self._started_s, self.server.now_s(), self._end, self._errors, logins=tuple(self._logins))

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
