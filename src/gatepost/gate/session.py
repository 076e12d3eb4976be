"""THE CONVERSATION: one method for each command, in the order of an SMTP dialogue.  Start reading here.

Why: whoever wants to know what happens at RCPT finds it in ``rcpt``.  Each method is the same few lines: facts,
    findings, verdict, answer.  Wire grammar is in ``smtp``, decisions are in ``policy``, delivery is in ``backend``.
Trust: events come from the engine, parsed and bounded; their text is the client's all the same.
Promise: 250 for content is written on one line of this file, after the backend's own 250.  Every other way out of
    ``content_ended`` is a refusal.  A recipient reaches the backend only inside an Admit of ``relay.decide``.
Sources: RFC 5321 §3 (the dialogue), §4.1.1 (commands), §4.2.5 (replies after DATA), §4.5.3.2 (timeouts);
    RFC 3207 §4 (STARTTLS), RFC 4954 (AUTH), RFC 6409 §6.1 (who may send as whom); XCLIENT as Postfix has it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from gatepost.backend.content import Content
from gatepost.errors import StorageError
from gatepost.facts import Client, Identity
from gatepost.facts import Session as SessionFacts
from gatepost.facts import Transaction as TransactionFacts
from gatepost.gate.connection import Connection, Ended
from gatepost.gate.trace import trace_field, trace_head
from gatepost.policy import admission, relay
from gatepost.policy.relay import RelayRules, TrustEntry
from gatepost.smtp import header, sasl
from gatepost.smtp.command import (
    NAMELESS,
    Auth,
    Data,
    Expn,
    Hello,
    Help,
    Mail,
    Noop,
    Quit,
    Rcpt,
    Rset,
    StartTls,
    Vrfy,
    Xclient,
)
from gatepost.smtp.header import HeaderDefect, author_addresses
from gatepost.smtp.path import ForwardPath, Mailbox, ReversePath
from gatepost.smtp.reply import Reply
from gatepost.smtp.server import (
    NEED_DATA,
    AuthResponse,
    ChunkEnded,
    ContentChunk,
    ContentEnded,
    Refused,
    ServerEngine,
    State,
)
from gatepost.store import DELIVERING, Backlog, End, Entry, Record
from gatepost.telemetry import LoginRecord, RecipientRecord, SessionRecord, TransactionRecord, rfc3339
from gatepost.verdict import Admit, AdmittedRecipient, Defer, Finding, Reason, Refuse

if TYPE_CHECKING:
    from gatepost.backend import Backend, Delivery
    from gatepost.gate.logins import Exchange, LoginEnd
    from gatepost.gate.server import Listener, Server
    from gatepost.gate.sources import Watch
    from gatepost.gate.tls import Secured
    from gatepost.smtp.content import ContentLimits

OTHER = "other"
BEFORE_REPLY_S = 10.0  # for the disk to take a record, where the configuration asks for it before the 250
TOKEN_S = 60  # a session's trace token tells the time to the minute
RECIPIENTS_LOGGED = 200  # of one transaction
TRANSACTIONS_LOGGED = 100  # in one line; a longer session gets several lines
LOGINS_LOGGED = 10  # the last of a session
REPLIES_UNSENT = 100  # replies are collected while the client pipelines, but no more than so many

_NOTHING: Final[frozenset[str]] = frozenset()
_NAMELESS: Final = frozenset({NAMELESS})
_AUTH: Final = frozenset({"AUTH"})
_XCLIENT: Final = frozenset({"XCLIENT"})

_OK = Reply(250, "OK", "2.0.0")
_RESET = Reply(250, "Forgotten", "2.0.0")
_SENDER_OK = Reply(250, "Sender OK", "2.1.0")
_GO_AHEAD = Reply(354, "End the message with CRLF.CRLF")
_CHUNK_OK = Reply(250, "Chunk taken", "2.0.0")
_VRFY = Reply(252, "Send some mail and see", "2.5.2")  # RFC 5321 §3.5.3, §7.3
_EXPN = Reply(502, "There are no lists to expand here", "5.5.1")
_HELP = Reply(214, "EHLO HELO MAIL RCPT DATA BDAT RSET NOOP VRFY STARTTLS HELP QUIT (RFC 5321)", "2.0.0")
_READY_FOR_TLS = Reply(220, "Go ahead", "2.0.0")
_NO_TLS = Reply(502, "TLS is not offered on this connection", "5.5.1")
_TLS_IS_ON = Reply(503, "TLS is on already", "5.5.1")
_NO_AUTH = Reply(502, "AUTH is not offered on this connection", "5.5.1")
_NO_MECHANISM = Reply(504, "This mechanism is not offered here", "5.5.4")  # RFC 4954 §4
_EHLO_FIRST = Reply(503, "Say EHLO first", "5.5.1")
_AUTHENTICATED = Reply(503, "You are authenticated already", "5.5.1")  # RFC 4954 §4
_NO_CLIENT = Reply(550, "XCLIENT must say who the client is; closing", "5.7.1")
_NO_XCLIENT = Reply(502, "XCLIENT is not offered on this connection", "5.5.1")
_NO_LMTP = Reply(500, "This is SMTP: say EHLO", "5.5.1")
_UNSYNCHRONISED = Reply(554, "Commands were sent without waiting for the reply (RFC 2920 3.1); closing", "5.5.0")
_TOO_LARGE = Reply(552, "The message is larger than this server takes", "5.3.4")
_ERRORS = Reply(421, "Too many errors; closing", "4.7.0")
_TIMEOUT = Reply(421, "Timeout; closing", "4.4.2")
_DRAINED = Reply(421, "This server is going down, try again later", "4.3.2")
_INTERNAL = Reply(421, "Internal error; closing, try again later", "4.3.0")
_NO_JOURNAL = Reply(451, "The journal cannot be written, try again later", "4.3.0")
_NO_SPACE = Reply(452, "Not enough room for the message, try again later", "4.3.1")


class _Noted(NamedTuple):
    """A recipient that policy admitted, for the journal; by: the authority's place, reply: the backend's own."""

    at: float
    reverse_path: ReversePath
    forward_path: ForwardPath
    recipients: int
    by: str
    reply: str
    backend: str
    would: str


_NO_MESSAGE = ("", "", 0)  # the id in the trace field, Message-ID, octets of content


class Session:
    """One client, from the greeting to the end of its connection."""

    __slots__ = (
        "_admitted",
        "_backend",
        "_closing",
        "_content",
        "_counted",
        "_delivery",
        "_end",
        "_entries",
        "_errors",
        "_exchange",
        "_front",
        "_head",
        "_head_of",
        "_head_utf8",
        "_lax",
        "_logins",
        "_mail",
        "_message",
        "_message_number",
        "_number",
        "_refusals",
        "_rules",
        "_sealed_at",
        "_sealed_for",
        "_secured",
        "_started",
        "_storage_failed",
        "_token",
        "_transaction_record",
        "_transactions",
        "_watch",
        "connection",
        "counted",
        "engine",
        "facts",
        "listener",
        "server",
        "transaction",
    )

    def __init__(self, server: Server, listener: Listener, connection: Connection, client: Client) -> None:
        self.server = server
        self.listener = listener
        self.connection = connection
        self.counted = client.address  # as whom the server counted this session
        self.facts = self._facts_of(client, server.new_reference())
        self._watch: Watch | None = None  # over the trust in where the client comes from, where there is any
        self._rules: RelayRules
        self._front: Client | None = None  # a listed front end, once it said by XCLIENT who its client is
        self.engine = self._new_engine(tls=listener.settings.tls == "implicit")
        self._secured: Secured | None = None
        self._exchange: tuple[str, Exchange] | None = None
        self._logins: list[LoginRecord] = []
        self.transaction: TransactionFacts | None = None
        self._started = time.time()  # noqa: TID251 - the gate is where the clock enters
        self._mail: Mail | None = None
        self._backend: Backend | None = None
        self._delivery: Delivery | None = None
        self._content: Content | None = None
        self._storage_failed = False
        self._counted: set[str] = set()
        self._errors = 0
        self._refusals = 0
        self._message_number = 0
        self._number = 0
        self._entries: list[tuple[SessionFacts, Entry]] = []
        self._admitted: list[_Noted] = []
        self._message = _NO_MESSAGE
        self._transactions: list[TransactionRecord] = []
        self._transaction_record: TransactionRecord
        self._closing = False
        self._end = ""
        self._sealed_at = 0
        self._sealed_for: Identity | None = None
        self._token = ""
        self._head_of: SessionFacts | None = None
        self._head_utf8 = False
        self._head = ""

    def _facts_of(self, client: Client, reference: str) -> SessionFacts:
        """What is known of a client before it said anything."""
        server, settings = self.server, self.listener.settings
        return SessionFacts(
            reference=reference,
            client=client,
            listen=settings.name,
            role=settings.role,
            hosts=server.hosts_of(client.address),
            auth_required=settings.auth == "required",
            mailbox_login=server.mailbox_login(client.address),
        )

    def _new_engine(self, *, tls: bool) -> ServerEngine:
        """Protocol state from nothing: at the start, and again behind TLS (RFC 3207 §4.2).

        Args:
            tls: the client's first command will come over TLS.
        """
        grants = self._in_force()
        # A device that somebody named here, or that stands inside, need not know its own name.
        named = self.facts.role == "inside" or any(entry.network is not None or entry.host for entry in grants)
        self._lax = _NAMELESS if named else _NOTHING
        # Before EHLO nothing is offered, but these verbs have a place in the dialogue, and are told so.
        offered = self._lax
        if self.listener.takes_logins(tls=tls):
            offered |= _AUTH
        if self._is_front:
            offered |= _XCLIENT
        self.connection.reader = engine = ServerEngine(offered, self._content_limits(grants))
        return engine

    def _content_limits(self, grants: list[TrustEntry]) -> ContentLimits:
        """How this client may end its lines: as its listener says, or one of the grants that cover it."""
        normalise = self.listener.settings.bare_newlines == "normalise" or any(
            entry.bare_newlines == "normalise" for entry in grants
        )
        return self.server.content_limits[normalise]

    def _in_force(self) -> list[TrustEntry]:
        """The grants that cover this client and have not expired."""
        granted = self._granted()
        if not granted:  # a stranger's way, at the beginning of every session
            return granted
        now = time.time()  # noqa: TID251
        return [entry for entry in granted if not relay.expired(entry, now)]

    def _granted(self) -> list[TrustEntry]:
        """The grants that cover this client; what it shows is watched where they trust its address or its listener."""
        self._rules = rules = self.server.settings.rules
        granted = relay.grants(rules, self.facts)
        if granted or self._watch is not None:  # for a stranger nothing is looked up
            self._watch = self.server.sources.watch(self.facts)
            if self._watch is not None:
                self.facts = self._watch.standing(self.facts)
                granted = relay.grants(rules, self.facts)
        return granted

    # ---- the loop

    async def run(self, octets: bytes = b"") -> None:
        """Hold the conversation until it ends; whatever happens, the transaction is given up and the line logged.

        Args:
            octets: what came behind a PROXY header in plain text.
        """
        try:
            early = self.connection.take_kept(self.engine)
            if early is not None:  # implicit TLS.  RFC 8314 §3.3
                await self._handshake(early)
            elif octets:
                self.engine.receive(octets)
            await asyncio.sleep(0)  # one look at what came in with the connection
            if self._closing:
                pass
            elif self.engine.unread_octets:  # RFC 5321 §4.3.1: the client waits for the greeting
                self.server.metrics.reply("connect", "sequence")
                self._close("talked before the greeting")
                self.engine.say(_UNSYNCHRONISED)
            else:
                self.engine.say(self.server.greeting)
                await self._converse()
        except asyncio.CancelledError:
            self._end = self._end or "cut"
            raise
        except Exception:
            # Ours: a fault in this program ends one session and is seen in the log; it never reaches a 250.
            self._end = "internal error"
            self.server.failed(self.facts)
            self.engine.say(_INTERNAL)
        finally:
            try:
                self._forget_transaction()
                if self._watch is not None:
                    self._watch.ended(self.facts, self._fingerprint)
                if self.connection.send(self.engine.data_to_send()):
                    await self.connection.drained()
            finally:
                self.server.close(self.connection)  # whatever happened: nothing sweeps it once the session has ended
                self.server.ended(self)

    async def _converse(self) -> None:
        connection = self.connection
        unsent = 0
        moved = True
        while True:
            engine = self.engine
            event = engine.next_event()
            if event is NEED_DATA:
                if connection.send(engine.data_to_send()):
                    await connection.drained()
                unsent = 0
                if self._closing:
                    return
                if engine.in_content:
                    connection.content_goes_on()  # refused content makes no events, but it comes
                else:
                    connection.in_content = False
                    if moved:
                        connection.progress()
                moved = False
                if connection.take_fresh():
                    continue
                if connection.ended is not Ended.NO:
                    self._hang_up()
                    return
                await connection.arrival()
                continue
            moved = True
            kind = type(event)
            if self._exchange is not None and kind is not AuthResponse:  # the engine refused a response
                self._exchange = None
            if kind is ContentChunk:
                self.content_chunk(event.octets)  # type: ignore[union-attr]
                continue
            unsent += 1
            if unsent >= REPLIES_UNSENT:
                unsent = 0
                if connection.send(self.engine.data_to_send()):
                    await connection.drained()
                await asyncio.sleep(0)  # a client that pipelines without end is not alone here
            if kind is Refused:
                self._refused(event)  # type: ignore[arg-type]
                continue
            answer = _ANSWERS[kind](self, event)
            reply = answer if isinstance(answer, Reply) else await answer
            engine.respond(reply)
            if reply.code >= 500:
                self._count_error()
            if kind is StartTls and engine.state is State.TLS:
                await self._begin_tls()
            elif kind is Xclient and engine.state is State.XCLIENT:
                self._begin_anew()

    def _hang_up(self) -> None:
        """No more octets will come: say why, where the client can still hear it.  RFC 5321 §3.8, §4.5.3.2."""
        ended = self.connection.ended
        self._end = self._end or ended.value
        if ended is Ended.TIMEOUT:
            self.engine.say(_TIMEOUT)
        elif ended is Ended.DRAINED:
            self.engine.say(_DRAINED)

    def _refused(self, event: Refused) -> None:
        """The engine has answered already."""
        self.server.metrics.reply(OTHER, "syntax")
        if event.fatal:
            self._close("protocol error")
        elif event.reply.code >= 500:
            self._count_error()

    def _count_error(self) -> None:
        limit = self.server.settings.limits.errors_per_session
        self._errors += 1
        if limit and self._errors >= limit and not self._closing:
            self.engine.say(_ERRORS)
            self._close("too many errors")

    def _close(self, why: str) -> None:
        self.engine.close()
        self._closing = True
        self._end = why

    # ---- the dialogue

    def hello(self, command: Hello) -> Reply:
        """EHLO or HELO: who the client says it is, which is evidence of nothing.  RFC 5321 §4.1.1.1."""
        if command.verb == "LHLO":
            return _NO_LMTP
        if self.engine.unread_octets:  # RFC 2920 §3.1: EHLO is the last of a group
            self._close("unsynchronised")
            return _UNSYNCHRONISED
        self._forget_transaction()
        esmtp = command.verb == "EHLO"
        self.facts = self.facts._replace(hello=command.name, esmtp=esmtp)
        tls = bool(self.facts.tls)
        mechanisms = self.server.logins.mechanisms(self._bindings) if self.listener.takes_logins(tls=tls) else ()
        reply, self.engine.offered = self.server.hello_reply(
            self.listener, esmtp=esmtp, tls=tls, mechanisms=mechanisms, front=self._is_front
        )
        if self._lax:
            self.engine.offered |= self._lax
        return reply

    @property
    def _bindings(self) -> Mapping[str, bytes]:
        """What ties a SCRAM login to this very TLS connection."""
        return self._secured.bindings if self._secured is not None else {}

    @property
    def _fingerprint(self) -> str:
        """How the client speaks TLS, "" where it does not."""
        return f"{self._secured.version}/{self._secured.cipher}" if self._secured is not None else ""

    @property
    def _is_front(self) -> bool:
        """Whether this end may say by XCLIENT who its client is: by its own address, whatever it said before."""
        fronts = self.listener.fronts
        return fronts is not None and bool(fronts.matching((self._front or self.facts.client).address))

    def xclient(self, command: Xclient) -> Reply:
        """A listed front end says who its client is; all that was known before is forgotten."""
        if not self._is_front:
            return _NO_XCLIENT
        if self.engine.unread_octets:  # commands behind it would be the front end's, not the client's
            self._close("octets behind XCLIENT")
            return _UNSYNCHRONISED
        if "ADDR" in command.unavailable:
            # A client whose address is lost must not inherit what the front end itself may do.
            self._close("XCLIENT without an address")
            return _NO_CLIENT
        self._forget_transaction()
        front, here = self._front or self.facts.client, self.facts.client
        client = Client(command.address or here.address, here.port if command.port is None else command.port)
        refusal = self.server.recount(self.counted, client.address)
        if refusal is not None:
            self._close("too many sessions")
            return refusal
        self.counted, self._front = client.address, front
        self._sealed_at = 0  # the token names another client from here on
        # LOGIN is read and not believed: an identity is made from what was verified here, and from nothing else.
        facts = self._facts_of(client, self.facts.reference)
        self.facts = facts._replace(hello=command.hello or "", tls=self.facts.tls)
        self._watch = None
        return self.server.greeting

    def _begin_anew(self) -> None:
        """Behind the 220 that answers XCLIENT: the client is greeted, and says EHLO."""
        self.connection.send(self.engine.data_to_send())
        self.engine = self._new_engine(tls=bool(self.facts.tls))

    def starttls(self, _: StartTls) -> Reply:
        """TLS from here on; all that was said before is forgotten.  RFC 3207 §4."""
        if self.facts.tls:
            return _TLS_IS_ON
        if self.listener.tls is None:
            return _NO_TLS
        if self.engine.unread_octets:  # commands injected behind STARTTLS: neither executed nor fed to TLS
            self._close("octets behind STARTTLS")
            return _UNSYNCHRONISED
        self.connection.hold_reading()
        return _READY_FOR_TLS

    async def _begin_tls(self) -> None:
        self.connection.send(self.engine.data_to_send())
        # RFC 3207 §4.2: new facts and a new engine, so that nothing learned before can linger.
        self.facts = self.facts._replace(hello="", esmtp=False, identity=None)
        self.engine = self._new_engine(tls=True)
        await self._handshake()

    async def _handshake(self, early: bytes = b"") -> None:
        """The TLS handshake; a client that fails it hears nothing more.

        Args:
            early: of implicit TLS, where no octet is anything but TLS; behind STARTTLS there is none (RFC 3207 §4).
        """
        context = self.listener.tls_context(self.facts)
        assert context is not None
        try:
            secured = await self.connection.start_tls(context, self.server.settings.timeouts.tls_handshake_s, early)
        except OSError as error:
            self.server.metrics.reply("tls", "error")
            self._close(f"TLS handshake failed: {error}")
            self.connection.abort()
            return
        self.facts = self.facts._replace(tls=secured.version, certificate=secured.certificate)
        self._secured = secured
        if secured.certificate:  # it may be a grant's, and bring that grant's line ends
            self.engine.limits = self._content_limits(self._in_force())

    async def auth(self, command: Auth) -> Reply:
        """AUTH: who is it?  RFC 4954 §4."""
        if not self.listener.takes_logins(tls=bool(self.facts.tls)):
            return _NO_AUTH
        if not self.facts.esmtp:  # RFC 4954 §4: HELO offers nothing
            return _EHLO_FIRST
        if self.facts.identity is not None:
            return _AUTHENTICATED
        exchange = self.server.logins.exchange(command.mechanism, self.facts.client.address, self._bindings)
        if exchange is None:
            return _NO_MECHANISM
        self._exchange = (command.mechanism, exchange)
        initial = command.initial
        response = None if initial is None else sasl.decode(initial)
        return await self._authenticate(response)

    async def auth_response(self, event: AuthResponse) -> Reply:
        """The client's answer to a challenge.  RFC 4954 §4."""
        assert self._exchange is not None
        return await self._authenticate(sasl.decode(event.octets))

    async def _authenticate(self, response: bytes | Reply | None) -> Reply:
        """One step of the exchange: a challenge, a refusal, or the end of the login."""
        assert self._exchange is not None
        mechanism, exchange = self._exchange
        if isinstance(response, Reply):  # cancelled, or not base64
            self._exchange = None
            self.server.metrics.reply("auth", "syntax")
            return response
        outcome = await exchange.step(response)
        if isinstance(outcome, sasl.Challenge):
            return outcome.reply
        self._exchange = None
        if isinstance(outcome, Reply):
            self.server.metrics.reply("auth", "syntax")
            return outcome
        return self._logged_in(mechanism, outcome)

    def _logged_in(self, mechanism: str, login: LoginEnd) -> Reply:
        """A login has ended, one way or the other."""
        record: LoginRecord = {"account": login.account, "mechanism": mechanism, "verdict": login.verdict}
        if login.why:
            record["why"] = login.why
        if login.identity is not None:
            record["verifier"] = login.identity.verifier
            if login.identity.device:
                record["device"] = login.identity.device
            self.facts = self.facts._replace(identity=login.identity)
            self.engine.limits = self._content_limits(self._in_force())
        self._logins = [*self._logins[1 - LOGINS_LOGGED :], record]
        self.server.metrics.reply("auth", login.reason)
        return login.reply

    def mail(self, command: Mail) -> Reply:
        """A reverse-path opens a transaction.  It confers no right.  RFC 5321 §3.3, §4.1.1.2."""
        settings = self.server.settings
        if self.server.draining:
            self._close("draining")
            return _DRAINED
        size_octets = command.parameters.size_octets
        limit_octets = settings.limits.message_size_octets
        if size_octets and limit_octets and size_octets > limit_octets:  # RFC 1870 §6.1
            return _TOO_LARGE
        self._look_again()
        self._number += 1
        transaction = TransactionFacts(self.facts, command.reverse_path, 0, time.time())  # noqa: TID251
        record: TransactionRecord = {
            "reverse_path": str(command.reverse_path),
            "recipients": [],
            "size": 0,
            "verdict": "",
            "reply": "",
        }
        refusal = relay.denied(settings.rules, transaction)
        if settings.shadowed is not None:
            self._would(record, relay.would(settings.rules, settings.shadowed, transaction, None))
        identity = self.facts.identity
        if refusal is None and identity is None and self.facts.auth_required:
            refusal = Refuse(Reason.AUTH_REQUIRED)
        if refusal is None and identity is not None:
            refusal = self._send_as(
                record, admission.send_as(settings.send_as, identity, command.reverse_path, transaction.now)
            )
        if refusal is not None:
            self._transactions.append(record)
            reply = self._refuse("mail", refusal, record, transaction)
            self._log_many()
            return reply
        self.transaction = transaction
        self._transaction_record = record
        self._mail = command
        self._transactions.append(record)
        return _SENDER_OK

    async def rcpt(self, command: Rcpt) -> Reply:
        """One forward-path: admitted with an authority, deferred, or refused.  RFC 5321 §3.3, §4.1.1.3."""
        server, transaction, mail = self.server, self.transaction, self._mail
        assert transaction is not None and mail is not None
        self._look_again()
        if self._watch is not None:
            self.facts = self._watch.recipient(self.facts, self._fingerprint, mail.reverse_path, command.forward_path)
        transaction = TransactionFacts(
            self.facts,
            mail.reverse_path,
            transaction.recipients,
            time.time(),  # noqa: TID251
        )
        record: RecipientRecord = {"forward_path": str(command.forward_path), "verdict": ""}
        recipients = self._transaction_record["recipients"]
        if len(recipients) < RECIPIENTS_LOGGED:
            recipients.append(record)
        findings = server.rates.findings(transaction, command.forward_path, self._counted)
        settings = server.settings
        verdict = relay.decide(settings.rules, transaction, command.forward_path, findings)
        if settings.shadowed is not None:
            told = relay.would(settings.rules, settings.shadowed, transaction, command.forward_path, findings)
            self._would(record, told)
        if not isinstance(verdict, Admit):
            return self._refuse("rcpt", verdict, record, transaction, command.forward_path, findings)
        recipient = verdict.recipient
        record["by"] = recipient.authority.where
        if self._delivery is None or self._backend is None:
            self._backend = server.backends[recipient.backend]
            self._delivery = self._backend.begin(mail.reverse_path, mail.parameters, self.facts)
        elif self._backend.name != recipient.backend:
            # Two backends may answer differently and one reply cannot say so: RFC 5321 §4.5.3.1.10 lets us split.
            return self._refuse("rcpt", Defer(Reason.OTHER_ROUTE), record, transaction, command.forward_path, findings)
        reply = await self._delivery.rcpt(recipient, command.parameters)
        if server.journal is not None:
            self._note_recipient(recipient, transaction, reply, record.get("would", ""))
        if reply.positive:
            self.transaction = TransactionFacts(
                self.facts, mail.reverse_path, transaction.recipients + 1, transaction.now
            )
            server.rates.admitted(recipient, transaction, self._counted)
        server.metrics.reply("rcpt", "accepted" if reply.positive else "backend")
        return self._answered(record, reply)

    def data(self, command: Data) -> Reply:
        """Content may come.  RFC 5321 §4.1.1.4."""
        if self.engine.unread_octets:  # content before our 354: whoever does that would be talking to a relay
            self._close("unsynchronised")
            return _UNSYNCHRONISED
        return _GO_AHEAD

    def content_chunk(self, block: bytes) -> None:
        """A block of content, kept until all of it is there."""
        content = self._content
        if content is None:
            content = self._content = Content(self.server.memory)
            self._storage_failed = False
        if self._storage_failed:
            return
        try:
            content.add(block)
        except StorageError as error:
            self._storage_failed = True
            self.server.storage_failed(error)

    def chunk_ended(self, chunk: ChunkEnded) -> Reply:
        """A BDAT chunk that is not the last.  RFC 3030 §2."""
        if chunk.defect is not None:
            return self._finish(chunk.defect.reply, "content")
        if self._storage_failed:
            return self._finish(_NO_SPACE, "storage")
        return _CHUNK_OK

    async def content_ended(self, ended: ContentEnded) -> Reply:
        """All content is there: refuse it, or hand it on and say what the backend says.  RFC 5321 §4.2.5, §6.1."""
        server, delivery, backend = self.server, self._delivery, self._backend
        assert delivery is not None and backend is not None and self._mail is not None
        content = self._content or Content(server.memory)
        record = self._transaction_record
        record["size"] = ended.size_octets
        if ended.defect is not None:
            return self._finish(ended.defect.reply, "content")
        if self._storage_failed:
            return self._finish(_NO_SPACE, "storage")
        content.eight_bit, content.dotted = ended.eight_bit, ended.dotted
        if self.facts.identity is not None and self.listener.settings.send_as != "off":
            try:
                author = author_addresses(content.header_section())
            except StorageError as error:
                server.storage_failed(error)
                return self._finish(_NO_SPACE, "storage")
            refusal = self._send_as(record, self._author(author, self.facts.identity))
            if refusal is not None:
                assert self.transaction is not None
                transaction = self.transaction._replace(now=time.time())  # noqa: TID251
                authors = () if isinstance(author, HeaderDefect) else author
                reply = self._refuse("content", refusal, record, transaction, authors=authors)
                return self._finish(reply, refusal.reason.name.lower(), counted=True)
        self._message_number += 1
        message = f"{self.facts.reference}.{self._message_number}"
        record["message"] = message
        now = int(time.time())  # noqa: TID251
        journal = server.journal
        if journal is not None:
            self._message = message, self._message_id(content), ended.size_octets
            if server.settings.journal.before_reply and not await self._known_before_delivery(journal):
                return self._finish(_NO_JOURNAL, "journal")
        field = trace_field(
            self._trace_head(utf8=self._mail.parameters.smtputf8),
            message,
            self._trace_token(now),
            server.dates.text(now),
        )
        began = server.loop.time()
        self._delivery = None  # from here on it is the backend's, to the end
        reply = await delivery.deliver(content, field)
        server.metrics.delivered(backend.name, server.loop.time() - began)
        settled = self._settled(reply) if journal is not None else None
        if settled is not None and server.settings.journal.before_reply and journal is not None:
            await journal.keep_durably(settled, settled.entries[0].at, BEFORE_REPLY_S)  # that it was sent is known
            settled = None
        # The one line where content is answered with 250: the reply is the backend's own.
        return self._finish(reply, "accepted" if reply.positive else "backend", settled=settled)

    def _author(self, author: tuple[Mailbox, ...] | HeaderDefect, identity: Identity) -> Refuse | None:
        """Whether the account may not be the author that readers of this message will see."""
        if isinstance(author, HeaderDefect):
            return Refuse(Reason.AUTHOR, detail=author.value, hint=author.value)
        now = time.time()  # noqa: TID251
        return admission.author(self.server.settings.send_as, identity, author, now)

    def _send_as(self, record: TransactionRecord, refusal: Refuse | None) -> Refuse | None:
        """The refusal of an account that sends as another, as far as this listener is to act on it."""
        what = self.listener.settings.send_as
        if refusal is None or what == "off":
            return None
        if what == "enforce":
            return refusal
        self._would(record, f"refuse: {refusal.reason.name.lower()}: {refusal.detail}")
        return None

    @staticmethod
    def _would(record: RecipientRecord | TransactionRecord, told: str) -> None:
        """What would have been, were all acted on that is only watched."""
        if told:
            record["would"] = told

    def _trace_head(self, *, utf8: bool) -> str:
        if self._head_of is not self.facts or self._head_utf8 is not utf8:
            self._head_of, self._head_utf8 = self.facts, utf8
            self._head = trace_head(self.facts, self.server.settings.name, utf8=utf8)
        return self._head

    def _trace_token(self, seconds: int) -> str:
        """What tells the operator which session this was; made again where it says something else."""
        if self._sealed_at + TOKEN_S < seconds or self._sealed_for is not self.facts.identity:
            self._sealed_at, self._sealed_for = seconds, self.facts.identity
            self._token = self.server.trace_key.seal(self.facts, seconds)
        return self._token

    def rset(self, _: Rset) -> Reply:
        """Forget the transaction.  RFC 5321 §4.1.1.5."""
        self._forget_transaction()
        return _RESET

    def noop(self, _: Noop) -> Reply:
        """RFC 5321 §4.1.1.9."""
        return _OK

    def help(self, _: Help) -> Reply:
        """RFC 5321 §4.1.1.8."""
        return _HELP

    def vrfy(self, _: Vrfy) -> Reply:
        """Nobody learns who has a mailbox.  RFC 5321 §3.5.3, §7.3."""
        return _VRFY

    def expn(self, _: Expn) -> Reply:
        """RFC 5321 §3.5.2."""
        return _EXPN

    def quit(self, _: Quit) -> Reply:
        """RFC 5321 §4.1.1.10."""
        self._closing = True
        self._end = "quit"
        return self.server.goodbye

    def _look_again(self) -> None:
        """What was known at the beginning may have changed: names of the client's address, a login, trust and rules."""
        facts = self.facts
        hosts = self.server.hosts_of(facts.client.address)
        login = self.server.mailbox_login(facts.client.address)
        changed = hosts != facts.hosts or login != facts.mailbox_login
        if changed:
            self.facts = facts._replace(hosts=hosts, mailbox_login=login)
        if changed or self._rules is not self.server.settings.rules:
            self._granted()

    # ---- answers

    def _refuse(
        self,
        stage: str,
        verdict: Refuse | Defer,
        record: RecipientRecord | TransactionRecord,
        transaction: TransactionFacts,
        forward_path: ForwardPath | None = None,
        findings: Sequence[Finding] = (),
        authors: tuple[Mailbox, ...] = (),
    ) -> Reply:
        """The reply that refuses, with a reference by which the operator finds the evidence."""
        self._refusals += 1
        reference = f"{self.facts.reference}-{self._refusals}"
        record["reason"] = verdict.reason.name.lower()
        record["reference"] = reference
        if verdict.where:
            record["by"] = verdict.where
        self.server.metrics.reply(stage, record["reason"])
        if isinstance(verdict, Refuse):
            reply = verdict.reply or verdict.reason.reply(reference, verdict.hint)
        else:
            reply = verdict.reason.reply(reference)
        if self.server.journal is not None:
            self._note(
                Entry(
                    transaction.now,
                    self._number,
                    stage,
                    transaction.reverse_path,
                    forward_path,
                    transaction.recipients,
                    "refused" if isinstance(verdict, Refuse) else "deferred",
                    record["reason"],
                    reference,
                    verdict.where,
                    verdict.detail,
                    verdict.hint if isinstance(verdict, Refuse) else "",
                    reply.line,
                    backend=self._backend.name if self._backend is not None else "",
                    would=record.get("would", ""),
                    findings=tuple(findings),
                    authors=authors,
                )
            )
        return self._answered(record, reply)

    @staticmethod
    def _answered(record: RecipientRecord | TransactionRecord, reply: Reply) -> Reply:
        record["verdict"] = "admitted" if reply.positive else "deferred" if reply.transient else "refused"
        if not reply.positive:
            record["reply"] = reply.line
        return reply

    def _finish(self, reply: Reply, why: str, *, counted: bool = False, settled: Record | None = None) -> Reply:
        """The transaction is over, one way or the other.

        Args:
            counted: the metrics have the reply; settled: what the journal is to know of a message that was delivered.
        """
        record = self._transaction_record
        now = time.time()  # noqa: TID251
        if self._admitted:
            word = "deferred" if reply.transient else "refused"
            for noted in self._admitted:
                self._note(self._entry(noted, "content", word, why, now, reply.line))
            self._admitted = []
        if settled is not None and self.server.journal is not None:
            self.server.journal.keep(settled, now)
        record["verdict"] = verdict = "accepted" if reply.positive else "deferred" if reply.transient else "refused"
        record["reply"] = reply.line
        if not reply.positive:
            record["reason"] = why
        if not counted:
            self.server.metrics.reply("content", "accepted" if reply.positive else why)
        self.server.metrics.message(verdict, record["size"])
        self._forget_transaction()
        return reply

    def _forget_transaction(self) -> None:
        """Give back all that a transaction holds: a new one begins from nothing."""
        delivery, self._delivery = self._delivery, None  # first: an abort that fails is not tried again
        if delivery is not None:
            delivery.abort()
        self._backend = None
        self.connection.in_content = False  # a message that is pipelined behind this one has a time of its own
        if self._content is not None:
            self._content.close()
            self._content = None
        self._storage_failed = False
        for noted in self._admitted:  # nothing came of it
            self._note(self._entry(noted, "rcpt", "admitted", ""))
        self._admitted = []
        self._message = _NO_MESSAGE
        self.transaction = None
        self._mail = None
        self._counted = set()
        self._log_many()

    # ---- the journal

    def _note(self, entry: Entry) -> None:
        """Something for the journal, with the facts as they are now."""
        self._entries.append((self.facts, entry))
        if len(self._entries) == 1:
            self.server.noted(self)

    def _note_recipient(
        self, recipient: AdmittedRecipient, transaction: TransactionFacts, reply: Reply, would: str
    ) -> None:
        """What policy admitted, and what the backend says of it."""
        noted = _Noted(
            transaction.now,
            transaction.reverse_path,
            recipient.forward_path,
            transaction.recipients,
            recipient.authority.where,
            reply.line,
            recipient.backend,
            would or self._transaction_record.get("would", ""),
        )
        if reply.positive:
            self._admitted.append(noted)
        else:
            self._note(self._entry(noted, "rcpt", "deferred" if reply.transient else "refused", "backend"))

    def _entry(
        self,
        noted: _Noted,
        stage: str,
        verdict: str,
        reason: str,
        at: float | None = None,
        reply: str | None = None,
        *,
        settles: bool = False,
    ) -> Entry:
        """A recipient's verdict; by default of the moment and with the reply of its RCPT."""
        message, message_id, size_octets = self._message
        return Entry(
            noted.at if at is None else at,
            self._number,
            stage,
            noted.reverse_path,
            noted.forward_path,
            noted.recipients,
            verdict,
            reason,
            "",
            noted.by,
            "",
            "",
            noted.reply if reply is None else reply,
            message,
            message_id,
            size_octets,
            noted.backend,
            noted.would,
            settles,
        )

    async def _known_before_delivery(self, journal: Backlog) -> bool:
        """Whether the disk has what the journal must have before the backend may take the message."""
        told = [self._entry(noted, "content", "admitted", DELIVERING, reply="") for noted in self._admitted]
        return await journal.keep_durably(Record(self.facts, told), time.time(), BEFORE_REPLY_S)  # noqa: TID251

    def _message_id(self, content: Content) -> str:
        try:
            return header.message_id(content.header_section())
        except StorageError:  # what cannot be read here cannot be delivered either, and is answered there
            return ""

    def _settled(self, reply: Reply) -> Record | None:
        """What became of a message that went to its backend; None where the journal was not kept when it came."""
        admitted, self._admitted = self._admitted, []
        if not admitted:
            return None
        now, line = time.time(), reply.line  # noqa: TID251
        word = "accepted" if reply.positive else "deferred" if reply.transient else "refused"
        settles, reason = self.server.settings.journal.before_reply, "" if reply.positive else "backend"
        return Record(
            self.facts,
            [self._entry(noted, "content", word, reason, now, line, settles=settles) for noted in admitted],
        )

    def hand_over(self, journal: Backlog, end: End | None = None) -> None:
        """Give the journal what was noted, and the session's end."""
        noted, self._entries = self._entries, []
        facts = self.facts
        while noted and noted[0][0] is not facts and noted[0][0] != facts:
            # What was known has changed since: these go with what was known then.
            then = noted[0][0]
            same = [entry for known, entry in noted if known is then or known == then]
            noted = [(known, entry) for known, entry in noted if known is not then and known != then]
            journal.keep(Record(then, same), same[-1].at)
        if noted or end is not None:
            entries = [entry for _, entry in noted]
            journal.keep(Record(facts, entries, end), end.ended if end is not None else entries[-1].at)

    def ending(self) -> End:
        """How the session ended, for the journal."""
        return End(
            self._started,
            time.time(),  # noqa: TID251
            self._end,
            self._errors,
            real_client=str(self._front.address) if self._front is not None else "",
            logins=tuple(self._logins),
        )

    # ---- the log

    def _log_many(self) -> None:
        """A session that goes on and on gets a line now and then; what is remembered of it is bounded."""
        if len(self._transactions) >= TRANSACTIONS_LOGGED:
            self.server.log.session(self.record())
            self._transactions = []

    def record(self) -> SessionRecord:
        """The session's one log line."""
        facts = self.facts
        now = time.time()  # noqa: TID251
        record: SessionRecord = {
            "time": rfc3339(now),
            "event": "session",
            "reference": facts.reference,
            "listen": facts.listen,
            "client": str(facts.client.address),
            "hello": facts.hello,
            "tls": facts.tls,
            "seconds": round(now - self._started, 3),
            "transactions": self._transactions,
            "errors": self._errors,
            "end": self._end,
        }
        if facts.identity is not None:
            record["account"] = facts.identity.account
        if facts.certificate:
            record["certificate"] = facts.certificate
        if self._logins:
            record["logins"] = self._logins
        if self._front is not None:
            record["real_client"] = str(self._front.address)
        return record


# Those that wait for a backend are coroutines.
_Answer = Callable[[Session, Any], Reply | Awaitable[Reply]]
_ANSWERS: Final[dict[type, _Answer]] = cast(
    "dict[type, _Answer]",
    {
        Hello: Session.hello,
        StartTls: Session.starttls,
        Xclient: Session.xclient,
        Auth: Session.auth,
        AuthResponse: Session.auth_response,
        Mail: Session.mail,
        Rcpt: Session.rcpt,
        Data: Session.data,
        ChunkEnded: Session.chunk_ended,
        ContentEnded: Session.content_ended,
        Rset: Session.rset,
        Noop: Session.noop,
        Help: Session.help,
        Vrfy: Session.vrfy,
        Expn: Session.expn,
        Quit: Session.quit,
    },
)
