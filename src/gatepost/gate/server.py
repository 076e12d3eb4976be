"""Listeners, limits on connections, and what all sessions of one worker share.

Why: one worker serves many sessions; what they have in common (settings, backends, TLS, counts) is here, so that a
    reload replaces it in one place and running sessions go on with the new rules at their next command.
Trust: connections come from anybody; each is counted before anything is allocated for it.
Promise: at most ``sessions`` conversations and ``sessions_per_client`` from one client (an IPv6 /64 is one client);
    a drain cuts no session in content.
Sources: RFC 5321 §3.1 (greeting), §3.8 (421), §4.5.3.2 (timeouts); the PROXY protocol, versions 1 and 2.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
import traceback
from collections.abc import Coroutine
from datetime import UTC, datetime
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import Any

from gatepost.auth.authenticator import Authenticator
from gatepost.auth.settings import AuthSettings
from gatepost.backend import Backend, make_backend
from gatepost.backend.content import Memory
from gatepost.counters import (
    Ban,
    Bans,
    Digests,
    EmbeddedStore,
    Freshness,
    Guesses,
    HourlyCounts,
    MailboxWindows,
    Store,
    Uses,
    state_directory,
)
from gatepost.errors import StorageError
from gatepost.facts import Client, IPAddress, MailboxLogin, Transaction, client_address
from gatepost.facts import Session as SessionFacts
from gatepost.gate.connection import Connection, Ended
from gatepost.gate.interfaces import Interfaces
from gatepost.gate.logins import Guard, Logins
from gatepost.gate.mailbox_proxy import MailboxSession, turned_away
from gatepost.gate.selftest import SelfTests, bound_for_smtp, compare
from gatepost.gate.session import Session
from gatepost.gate.settings import GateSettings, Limits, ListenSettings
from gatepost.gate.sources import Sources
from gatepost.gate.tls import AskingContext, Tls, TlsContext
from gatepost.gate.trace import Dates, TraceKey
from gatepost.gate.uses import unused
from gatepost.policy import relay
from gatepost.policy.relay import NetworkTable, RelayRules
from gatepost.resolver import HostFollower
from gatepost.smtp.client import Capabilities
from gatepost.smtp.content import ContentLimits
from gatepost.smtp.path import ForwardPath
from gatepost.smtp.preamble import ProxyDefect, ProxyHeader, ProxyParser
from gatepost.smtp.reply import Reply
from gatepost.store import Backlog, backlog_directory
from gatepost.telemetry import (
    BACKEND_SECONDS,
    BACKEND_STATE,
    JOURNAL_DROPPED,
    JOURNAL_STATE,
    MESSAGE_OCTETS,
    MESSAGES,
    REPLIES,
    SELFTEST,
    SESSIONS,
    SESSIONS_OPEN,
    TRUST_SUSPENDED,
    Level,
    Metrics,
    Occupancy,
    SessionLog,
)
from gatepost.telemetry.metrics import ROLES, STATE_DOWN, STATE_UNKNOWN, STATE_UP
from gatepost.verdict import AdmittedRecipient, Finding, LocalDomain, Result

REFERENCE_OCTETS = 5
SWEEP_S = 1.0
NOTED_S = 0.05
LINGER_S = 10.0  # for a peer to take the last reply
PROBE_SWEEPS = 5  # a backend that is down is asked again so often
SUSPENSION_SWEEPS = 5  # suspensions are counted so often, by the first worker for all
BUSY_SHARE = 0.8  # of the sessions allowed: beyond it silence is tolerated for a shorter time
EHLO_SIZE_ROOM_OCTETS = 2048  # our trace field must fit below the backend's own SIZE limit

_ORDER = (
    "PIPELINING",
    "SIZE",
    "8BITMIME",
    "SMTPUTF8",
    "CHUNKING",
    "DSN",
    "ENHANCEDSTATUSCODES",
    "STARTTLS",
    "AUTH",
    "XCLIENT",
    "HELP",
)
# What a listed front end may say of its client.  LOGIN is not among it: whoever logs in does so here.
_XCLIENT = "XCLIENT NAME ADDR PORT PROTO HELO"

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # no I, L, O, U: a reference can be read out over the telephone
_PAIRS = [a + b for a in _ALPHABET for b in _ALPHABET]

_TOO_MANY_SESSIONS = Reply(421, "Too many sessions, try again later", "4.3.2")
_TOO_MANY_FROM_CLIENT = Reply(421, "Too many sessions from your address, try again later", "4.7.0")
# A 4yz: whose address was somebody else's yesterday comes again when the ban is over, and no mail is lost.
_BANNED = Reply(421, "Your address is banned here for a while, for guessing passwords or by the administrator", "4.7.0")
_NO_PROXY = Reply(421, "The PROXY header is missing or wrong; closing", "4.3.0")
_DRAINING = Reply(421, "This server is going down, try again later", "4.3.2")

AnySession = Session | MailboxSession


class _Preamble:
    """Reads the PROXY header in front of a session, and keeps what came behind it."""

    __slots__ = ("_parser", "outcome", "rest")

    def __init__(self) -> None:
        self._parser = ProxyParser()
        self.outcome: ProxyHeader | ProxyDefect | None = None
        self.rest = b""

    @property
    def unread_octets(self) -> int:
        return len(self.rest)

    def receive(self, octets: bytes) -> None:
        if self.outcome is not None:
            self.rest += octets
            return
        fed = self._parser.feed(octets)
        if isinstance(fed, ProxyHeader | ProxyDefect):
            self.outcome = fed


class Listener:
    """One [[listen]] table in service: its sockets and what its sessions need.

    Attributes:
        tls: None where the listener speaks no TLS.
        proxies: who must send a PROXY header; fronts: who may say XCLIENT, None where nobody may.
    """

    def __init__(self, server: Server, settings: ListenSettings, tls: Tls | None) -> None:
        self.server = server
        self.settings: ListenSettings
        self.tls: Tls | None
        self.proxies: NetworkTable[bool]
        self.fronts: NetworkTable[bool] | None
        self.configure(settings, tls)
        self._servers: dict[object, asyncio.Server] = {}

    def configure(self, settings: ListenSettings, tls: Tls | None) -> None:
        """Take new settings; running sessions see them at their next command."""
        self.settings = settings
        self.tls = tls
        self.proxies = NetworkTable()
        for text in settings.proxy_from:
            self.proxies.add(ip_network(text), True)
        self.fronts = NetworkTable() if settings.xclient_from else None
        for text in settings.xclient_from:
            assert self.fronts is not None
            self.fronts.add(ip_network(text), True)

    def takes_logins(self, *, tls: bool) -> bool:
        """Whether AUTH is offered to a client that speaks TLS, or does not.  RFC 4954 §4."""
        settings = self.settings
        return settings.auth != "off" and (tls or settings.auth_without_tls)

    def tls_context(self, facts: SessionFacts) -> TlsContext | AskingContext | None:
        """The context for this client: a named old device may speak what nobody else may."""
        if self.tls is None:
            return None
        minimum = self.settings.tls_minimum
        if self.server.some_old_tls:
            now = time.time()  # noqa: TID251 - the gate is where the clock enters
            for entry in relay.grants(self.server.settings.rules, facts):
                named = entry.network is not None or entry.host
                if named and entry.tls_minimum and entry.tls_minimum < minimum and not relay.expired(entry, now):
                    minimum = entry.tls_minimum
        if self.server.asks_for_certificates and self.settings.server is None:
            return self.tls.asking(minimum)
        return self.tls.context(minimum)

    async def open(self, sockets: list[socket.socket]) -> None:
        """Accept on these bound sockets, and on no other; one that is in service already stays so."""
        loop = self.server.loop
        wanted = {sock.getsockname(): sock for sock in sockets}
        for address in [address for address in self._servers if address not in wanted]:
            self._servers.pop(address).close()
        for address, sock in wanted.items():
            if address in self._servers:
                sock.close()
                continue
            # The TLS context is looked up for each connection, so that a new certificate serves at once.
            self._servers[address] = await loop.create_server(
                lambda: Connection(self, loop), sock=sock, backlog=socket.SOMAXCONN
            )

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Host and port of each socket, as bound."""
        return [server.sockets[0].getsockname()[:2] for server in self._servers.values()]

    def close(self) -> None:
        """Accept no more; running sessions go on."""
        for server in self._servers.values():
            server.close()
        self._servers = {}

    def accepted(self, connection: Connection) -> None:
        """A new connection: count it, learn who it is, begin the conversation."""
        peer = connection.transport.get_extra_info("peername")
        if not peer:
            connection.abort()
            return
        client = Client(client_address(peer[0]), peer[1])
        if self.settings.proxy_from and self.proxies.matching(client.address):
            # The reader first: the header may come with the connection, before the task's first step.
            connection.reader = preamble = _Preamble()
            connection.task = self.server.spawn(self._after_preamble(connection, client, preamble))
        else:
            self.begin(connection, client)

    async def _after_preamble(self, connection: Connection, proxy: Client, preamble: _Preamble) -> None:
        """A listed proxy says first who the client is.  What it does not say is not guessed: the session ends."""
        try:
            async with asyncio.timeout(self.server.settings.timeouts.proxy_header_s):
                while preamble.outcome is None and await connection.more():
                    pass
        except TimeoutError:
            pass
        outcome = preamble.outcome
        if not isinstance(outcome, ProxyHeader) or (outcome.address is None and outcome.relayed):
            # A client whose address is lost must not inherit what the proxy itself may do.
            self.server.metrics.reply("proxy", "proxy")
            if outcome is None:
                why = "none came in time"
            else:
                why = outcome.text if isinstance(outcome, ProxyDefect) else "it does not say who the client is"
            text = f"{proxy.address} is in proxy_from of {self.settings.name}, its PROXY header is refused: {why}"
            self.server.log.event("proxy", text, Level.WARNING)
            connection.send(self._turned_away(_NO_PROXY))
            connection.close()
            return
        client = proxy if outcome.address is None else Client(outcome.address, outcome.port)
        self.begin(connection, client, outcome.rest + preamble.rest)

    def begin(self, connection: Connection, client: Client, octets: bytes = b"") -> None:
        """Start a session, or say 421 where there are too many."""
        server = self.server
        refusal = server.admit(client.address)
        if refusal is not None:
            connection.transport.write(self._turned_away(refusal))
            connection.close()
            return
        session: AnySession
        if self.settings.server is None:
            session = Session(server, self, connection, client)
        else:
            session = MailboxSession(server, self, connection, client)
        if self.settings.tls == "implicit":
            connection.keep(octets)  # a ClientHello may be there before the session's first step
        server.begun(session)
        connection.task = server.spawn(session.run(octets))

    def _turned_away(self, refusal: Reply) -> bytes:
        """The refusal of a whole session, in the words of the listener's protocol."""
        role = self.settings.role
        return refusal.octets() if self.settings.server is None else turned_away(role, refusal.text)


class Rates:
    """What is used up in this hour, as findings for the relay policy; and the counting of what was admitted."""

    def __init__(self, counts: HourlyCounts, uses: Uses, settings: GateSettings) -> None:
        self._counts = counts
        self._uses = uses
        self._rules = settings.rules
        self._per_mailbox = settings.limits.messages_per_hour_per_mailbox
        self._senses = {entry.where: relay.sense(entry) for entry in settings.rules.trust}
        self._limited = {
            entry.where: self._senses[entry.where]
            for entry in settings.rules.trust
            if entry.messages_per_hour or entry.recipients_per_hour
        }

    def findings(self, transaction: Transaction, forward_path: ForwardPath, counted: set[str]) -> list[Finding]:
        """The rates that this recipient would exceed.

        Args:
            counted: the grants under which this transaction was counted as a message already.
        """
        found: list[Finding] = []
        now = transaction.now
        if self._per_mailbox:
            addressed = relay.with_domain(self._rules, forward_path)
            if addressed is not None and relay.local_domain(self._rules, addressed) is not None:
                count = self._counts.count(_mailbox_key(addressed), now)
                if count >= self._per_mailbox:
                    found.append(Finding(relay.MAILBOX_RATE, Result.FAIL, f"{count} messages in this hour"))
        if self._limited:
            for entry in relay.grants(self._rules, transaction.session):
                key = self._limited.get(entry.where)
                if key is None:
                    continue
                messages = self._counts.count(f"messages {key}", now) if entry.messages_per_hour else 0
                recipients = self._counts.count(f"recipients {key}", now) if entry.recipients_per_hour else 0
                full = messages >= entry.messages_per_hour > 0 and key not in counted
                if full or recipients >= entry.recipients_per_hour > 0:
                    evidence = f"{messages} messages and {recipients} recipients in this hour"
                    found.append(Finding(relay.rate_check(entry.where), Result.FAIL, evidence))
        return found

    def admitted(self, recipient: AdmittedRecipient, transaction: Transaction, counted: set[str]) -> None:
        """The backend took this recipient: count it, and the message under each grant once."""
        now = transaction.now
        authority = recipient.authority
        if isinstance(authority, LocalDomain):
            if self._per_mailbox:
                self._counts.add(_mailbox_key(recipient.forward_path), now)
            return
        self._uses.used(self._senses[authority.where], now)
        key = self._limited.get(authority.where)
        if key is not None:
            if key not in counted:
                counted.add(key)
                self._counts.add(f"messages {key}", now)
            self._counts.add(f"recipients {key}", now)


def _mailbox_key(forward_path: ForwardPath) -> str:
    return f"mailbox {forward_path}".lower()


class Counts:
    """The worker's metrics, each cell looked up once."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._replies: dict[tuple[str, str], int] = {}
        self._messages = {verdict: metrics.cell(MESSAGES, verdict) for verdict in ("accepted", "deferred", "refused")}
        self._octets = metrics.cell(MESSAGE_OCTETS)
        self._journal_dropped = metrics.cell(JOURNAL_DROPPED)
        self._journal_state = metrics.cell(JOURNAL_STATE, "backlog")
        self._suspended = metrics.cell(TRUST_SUSPENDED)
        self._backends: dict[str, int] = {}
        self._sessions = {role: metrics.cell(SESSIONS, role) for role in ROLES}
        self._open = {role: metrics.cell(SESSIONS_OPEN, role) for role in ROLES}

    def reply(self, stage: str, reason: str) -> None:
        """A reply was given."""
        cell = self._replies.get((stage, reason))
        if cell is None:
            cell = self._replies[stage, reason] = self._metrics.cell(REPLIES, stage, reason)
        self._metrics.inc(cell)

    def begun(self, role: str) -> None:
        """A session begins."""
        self._metrics.inc(self._sessions[role])
        self._metrics.inc(self._open[role])

    def ended(self, role: str) -> None:
        """A session ends."""
        self._metrics.inc(self._open[role], -1)

    def message(self, verdict: str, size_octets: int) -> None:
        """A message had its final reply."""
        self._metrics.inc(self._messages[verdict])
        self._metrics.inc(self._octets, size_octets)

    def backend(self, name: str, *, up: bool) -> None:
        """A backend was seen up or down."""
        self._metrics.put(self._metrics.cell(BACKEND_STATE, name), STATE_UP if up else STATE_DOWN)

    def suspended(self, sources: int) -> None:
        """So many trusted addresses and listeners are suspended."""
        self._metrics.put(self._suspended, sources)

    def self_test(self, agrees: bool | None) -> None:
        """A self-test is over; None where it could not tell."""
        state = STATE_UNKNOWN if agrees is None else STATE_UP if agrees else STATE_DOWN
        self._metrics.put(self._metrics.cell(SELFTEST), state)

    def journal_dropped(self, records: int) -> None:
        """So many records are not in the journal."""
        self._metrics.inc(self._journal_dropped, records)

    def journal_state(self, up: bool) -> None:
        """Whether the disk took what was written of the journal last."""
        self._metrics.put(self._journal_state, STATE_UP if up else STATE_DOWN)

    def delivered(self, backend: str, seconds: float) -> None:
        """A backend gave its final reply to content."""
        cell = self._backends.get(backend)
        if cell is None:
            cell = self._backends[backend] = self._metrics.cell(BACKEND_SECONDS, backend)
        self._metrics.observe(cell, seconds)


class Server:
    """One worker's part of the gate.

    Args:
        worker: this worker's number, from 0; workers: how many there are.
        log: where the sessions' lines go.
    """

    def __init__(self, *, worker: int, workers: int, metrics: Metrics, log: SessionLog, occupancy: Occupancy) -> None:
        self.worker = worker
        self.workers = workers
        self.loop = asyncio.get_running_loop()
        self.metrics = Counts(metrics)
        self.log = log
        self.occupancy = occupancy
        self.dates = Dates()
        self.sessions: set[AnySession] = set()
        self.settings: GateSettings
        self.backends: dict[str, Backend] = {}
        self.greeting = self.goodbye = Reply(421, "starting")
        self.memory: Memory
        self.content_limits: list[ContentLimits] = []
        self.some_old_tls = False
        self.asks_for_certificates = False
        self.rates: Rates
        self.trace_key: TraceKey
        self.logins: Logins
        self.sources: Sources
        self.journal: Backlog | None = None
        self._journal_octets = 0
        self._noted: set[AnySession] = set()
        self.draining = False
        self._store: Store | None = None
        self._digests: Digests
        self._bans: Bans
        self._some_banned = True  # until it was looked at: a session without any ban should not pay for the look-up
        self._windows: MailboxWindows | None = None
        self._authenticator: tuple[AuthSettings, Authenticator] | None = None
        self._counts: HourlyCounts | None = None
        self._hosts: HostFollower | None = None
        self._interfaces = Interfaces(self.loop.time)
        self._listeners: dict[str, Listener] = {}
        self._hello_replies: dict[tuple[str, bool, tuple[str, ...], bool], tuple[Reply, frozenset[str]]] = {}
        self._hello_capabilities: list[Capabilities | None] = []
        self._probing: set[str] = set()
        self._self_tests = SelfTests(log, self.metrics.self_test)
        self._self_testing: asyncio.Task[None] | None = None
        self._lingering: dict[Connection, float] = {}
        self._sweeps = 0
        self._random = b""
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()

    # ---- life

    async def apply(self, settings: GateSettings, sockets: dict[str, list[socket.socket]]) -> None:
        """Start, or go on under new settings: whole or not at all.

        Args:
            sockets: bound sockets by the name of their listener; listeners not named are closed.

        Raises:
            ConfigError, StorageError: something in the settings cannot be used; the old ones are still in force.
        """
        tls = self._tls(settings)
        trace_key = TraceKey.in_data(settings.data)
        self._open_store(settings.data)
        authenticator = self._authenticator_for(settings.auth)
        if self._counts is None:
            self._counts = HourlyCounts(Path(settings.data) / "counters" / "hourly", self.worker, self.workers)
        # All that can fail comes first: settings are taken whole or not at all.
        temporary = _temporary(settings.data)
        backends = await self._backends_for(settings)
        old_backends = [backend for name, backend in self.backends.items() if backends.get(name) is not backend]
        self.settings, self.backends, self.trace_key = settings, backends, trace_key
        assert self._store is not None
        uses = Uses(self._store)
        self.rates = Rates(self._counts, uses, settings)
        self._keep_journal(settings)
        self.memory = Memory(settings.limits.memory_octets, settings.limits.message_memory_octets, temporary)
        self.content_limits = [_content_limits(settings.limits, normalise=normalise) for normalise in (False, True)]
        self._take_logins(settings, authenticator)
        if self.worker == 0:
            self._watch_grants(settings.rules, uses)
        self.sources = Sources(
            self._store, settings.rules, settings.name, log=self.log, interfaces=self._interfaces, now_s=self.now_s
        )
        self.greeting = Reply(220, f"{settings.name} ESMTP Gatepost")
        self.goodbye = Reply(221, f"{settings.name} closing", "2.0.0")
        self._hello_replies.clear()
        await self._follow_hosts(settings)
        await self._listen(settings, tls, sockets)
        for backend in old_backends:
            self.spawn(backend.close())
        for backend in backends.values():
            if backend.capabilities is None:
                self.spawn(self._probe(backend))
        if self._sweeper is None:
            self._sweep()

    def _tls(self, settings: GateSettings) -> Tls | None:
        """Every context that this configuration can need, so that a bad certificate is found before it is in force."""
        minimums = {listen.tls_minimum for listen in settings.listens if listen.tls != "none"}
        if not minimums:
            return None
        tls = Tls(settings.tls, settings.name, settings.data)
        minimums |= {entry.tls_minimum for entry in settings.rules.trust if entry.tls_minimum}
        asks = any(entry.certificate for entry in settings.rules.trust)
        for minimum in minimums:
            tls.context(minimum)
            if asks:
                tls.asking(minimum)
        for warning in tls.warnings(datetime.now(UTC)) if self.worker == 0 else ():
            self.log.event("certificate", warning, Level.WARNING)
        return tls

    def _open_store(self, data: str) -> None:
        """What all workers remember together; opened once in the life of a process."""
        if self._store is None:
            self._store = EmbeddedStore(
                state_directory(data), lambda text: self.log.event("counters", text, Level.WARNING)
            )
            self._digests = Digests.in_directory(state_directory(data))

    def _keep_journal(self, settings: GateSettings) -> None:
        """As the settings say; what was handed over until now is written all the same."""
        wanted = settings.journal
        before, octets = self.journal, wanted.backlog_octets if wanted.enabled else 0
        if octets == self._journal_octets:
            return
        if before is not None:
            self._hand_over()
            self.loop.run_in_executor(None, before.close)
        self._journal_octets = octets
        self.journal = None
        if octets:
            self.journal = Backlog(
                backlog_directory(settings.data),
                octets,
                dropped=self.metrics.journal_dropped,
                state=self.metrics.journal_state,
                said=lambda text: self.log.event("journal", text, Level.WARNING),
            )

    def _authenticator_for(self, auth: AuthSettings) -> Authenticator:
        """Where [auth] did not change, its connections and what was verified a moment ago are kept."""
        if self._authenticator is not None and self._authenticator[0] == auth:
            return self._authenticator[1]
        assert self._store is not None
        return Authenticator(auth, freshness=Freshness(self._store, self._digests, self.now_s), now=self.now_s)

    def _take_logins(self, settings: GateSettings, authenticator: Authenticator) -> None:
        """Who verifies logins from here on, who is never banned, and what grants ask of the TLS handshake."""
        assert self._store is not None
        rules = settings.rules
        lowest = min((listen.tls_minimum for listen in settings.listens), default="1.2")
        self.some_old_tls = any(entry.tls_minimum and entry.tls_minimum < lowest for entry in rules.trust) or any(
            listen.tls_minimum != lowest for listen in settings.listens
        )
        self.asks_for_certificates = any(entry.certificate for entry in rules.trust)
        never: NetworkTable[bool] = NetworkTable()
        for listen in settings.listens:
            for text in (*listen.proxy_from, *listen.xclient_from):
                never.add(ip_network(text), True)
        for address in (IPv4Address("127.0.0.1"), IPv6Address("::1"), *settings.own_addresses):
            never.add(ip_network(address), True)
        self._bans = Bans(self._store, self._digests, spared=lambda client: bool(never.matching(client)))
        guesses = Guesses(self._store, self._digests, self._bans, settings.guesses)
        replaced, self._authenticator = self._authenticator, (settings.auth, authenticator)
        if replaced is not None and replaced[1] is not authenticator:
            self.spawn(replaced[1].close())
        self.logins = Logins(authenticator, Guard(guesses, self._banned), self.now_s)
        self._windows = (
            MailboxWindows(self._store, self._digests) if any(entry.pop3_s for entry in rules.trust) else None
        )

    def _banned(self, ban: Ban) -> None:
        self._some_banned = True
        whom = f"{ban.network} with the account {ban.account}" if ban.account else str(ban.network)
        until = datetime.fromtimestamp(ban.until_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
        self.log.event("ban", f"{whom} is banned until {until}: {ban.why}", Level.WARNING)

    def _watch_grants(self, rules: RelayRules, uses: Uses) -> None:
        """Watch whether they are used, and say which were not."""
        now_s = self.now_s()
        uses.watch(map(relay.sense, rules.trust), now_s)
        for warning in unused(rules, uses, now_s):
            self.log.event("unused", warning, Level.WARNING)

    async def _backends_for(self, settings: GateSettings) -> dict[str, Backend]:
        """The backends of these settings; one whose table did not change keeps its connections."""
        return {
            table.name: self.backends[table.name]
            if table.name in self.backends and self.backends[table.name].settings == table
            else make_backend(table, log=self._backend_said)
            for table in settings.backends
        }

    async def _probe(self, backend: Backend) -> None:
        """Ask the backend what it can do, so that EHLO offers it; until it answers, every few seconds again."""
        if backend.name in self._probing:
            return
        self._probing.add(backend.name)
        try:
            await backend.probe()
        finally:
            self._probing.discard(backend.name)
        self.metrics.backend(backend.name, up=backend.healthy)

    async def _follow_hosts(self, settings: GateSettings) -> None:
        """Know the addresses of the host names in the rules; one resolver serves as long as there are such names."""
        rules = settings.shadowed or settings.rules
        trusted = {entry.host for entry in rules.trust if entry.host}
        denied = {entry.host for entry in rules.deny if entry.host}
        if self._hosts is not None:
            await self._hosts.follow(trusted, denied=denied)
        elif trusted or denied:
            self._hosts = HostFollower(trusted, denied=denied)
            await self._hosts.start()

    async def _listen(self, settings: GateSettings, tls: Tls | None, sockets: dict[str, list[socket.socket]]) -> None:
        for name in [name for name in self._listeners if name not in sockets]:
            self._listeners.pop(name).close()
        for listen in settings.listens:
            context = None if listen.tls == "none" else tls
            listener = self._listeners.get(listen.name)
            if listener is not None:
                listener.configure(listen, context)
            else:
                listener = self._listeners[listen.name] = Listener(self, listen, context)
            await listener.open(sockets.get(listen.name, []))

    async def drain(self) -> None:
        """Take no new session, end the idle ones with 421, return when none is left in content."""
        self.draining = True
        if self._self_testing is not None:
            self._self_testing.cancel()
        for listener in self._listeners.values():
            listener.close()
        self._expire_idle()
        while self.sessions:
            self._idle.clear()
            await self._idle.wait()
        for backend in self.backends.values():
            await backend.close()
        if self._authenticator is not None:
            await self._authenticator[1].close()
        if self._hosts is not None:
            await self._hosts.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._counts is not None:
            self._counts.close()
        if self._store is not None:
            self._store.close()
        if self.journal is not None:
            await asyncio.to_thread(self.journal.close)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that is kept until it ends; its exception, a fault of ours, is logged."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            text = "".join(traceback.format_exception(task.exception()))
            self.log.event("fault", text, Level.ERROR)

    # ---- sessions

    def admit(self, address: IPAddress) -> Reply | None:
        """Count a session in; the 421 where its client is banned or there are too many, and then it is not counted."""
        limits = self.settings.limits
        if self.draining:
            return _DRAINING
        occupancy = self.occupancy
        here = occupancy.enter(address)
        if limits.sessions_per_client and here > limits.sessions_per_client:
            occupancy.leave(address)
            self.metrics.reply("connect", "busy")
            return _TOO_MANY_FROM_CLIENT
        per_minute = limits.sessions_per_minute_per_client
        if per_minute and occupancy.arrive(address, self.loop.time()) > per_minute:
            occupancy.leave(address)
            self.metrics.reply("connect", "rate")
            return _TOO_MANY_FROM_CLIENT
        if limits.sessions and occupancy.sessions() > limits.sessions:
            occupancy.leave(address)
            self.metrics.reply("connect", "busy")
            return _TOO_MANY_SESSIONS
        if self._some_banned and self._bans.client(address, self.now_s()) is not None:
            occupancy.leave(address)
            self.metrics.reply("connect", "banned")
            return _BANNED
        return None

    def recount(self, counted: IPAddress, address: IPAddress) -> Reply | None:
        """The client of a session that was counted turns out to be another one; as ``admit``."""
        refusal = self.admit(address)
        if refusal is None:
            self.occupancy.leave(counted)
        return refusal

    def begun(self, session: AnySession) -> None:
        """A session starts."""
        self.sessions.add(session)
        self.metrics.begun(session.facts.role)

    def ended(self, session: AnySession) -> None:
        """A session is over: its one line, and room for another."""
        self.sessions.discard(session)
        self.occupancy.leave(session.counted if isinstance(session, Session) else session.facts.client.address)
        self.metrics.ended(session.facts.role)
        self.log.session(session.record())
        if self.journal is not None:
            session.hand_over(self.journal, session.ending())
            self._noted.discard(session)
        if self.draining:
            self._idle.set()

    def noted(self, session: Session) -> None:
        """It has something for the journal, which waits a moment for more: most sessions end soon."""
        if not self._noted:
            self.loop.call_later(NOTED_S, self._hand_over)
        self._noted.add(session)

    def _hand_over(self) -> None:
        noted, self._noted = self._noted, set()
        if self.journal is not None:
            for session in noted:
                session.hand_over(self.journal)

    def close(self, connection: Connection) -> None:
        """Close when all is sent; a peer that does not take it is cut a little later."""
        if not connection.close():
            self._lingering[connection] = self.loop.time() + LINGER_S

    def failed(self, facts: SessionFacts) -> None:
        """A fault of ours ended a session: the traceback goes to the log, nothing of it to the client."""
        self.metrics.reply("session", "error")
        self.log.event("fault", traceback.format_exc(), Level.ERROR, reference=facts.reference)

    def storage_failed(self, error: StorageError) -> None:
        """Content could not be kept."""
        self.log.event("storage", f"{error}; the message is deferred with 452", Level.ERROR)

    def _backend_said(self, text: str, *, up: bool) -> None:
        self.log.event("backend", text, Level.NOTE if up else Level.WARNING)

    def now_s(self) -> float:
        """Seconds since the epoch."""
        return time.time()  # noqa: TID251 - the gate is where the clock enters

    @property
    def guesses(self) -> Guard:
        """Guesses of passwords, whatever the protocol."""
        return self.logins.guard

    async def is_bait(self, user: str) -> bool:
        """Whether this is an account that nobody uses: whoever tries it is an attacker."""
        return await self.logins.authenticator.is_bait(user)

    def mailbox_login(self, address: IPAddress) -> MailboxLogin | None:
        """The last login from this address to the mailbox server behind us, where some grant asks for it."""
        return self._windows.last(address, self.now_s()) if self._windows is not None else None

    def login_opened(self, account: str, client: IPAddress, accounts_max: int, now_s: float) -> bool:
        """The mailbox server said yes; False where the address is shared by more accounts than that."""
        assert self._store is not None
        return MailboxWindows(self._store, self._digests, accounts_max).logged_in(account, client, now_s)

    def hosts_of(self, address: IPAddress) -> tuple[str, ...]:
        """The trusted or denied host names that this address has now."""
        return self._hosts.names(address) if self._hosts is not None else ()

    def new_reference(self) -> str:
        """A session's reference: 40 random bits in eight letters and digits."""
        if len(self._random) < REFERENCE_OCTETS:
            self._random = os.urandom(256 * REFERENCE_OCTETS)
        number = int.from_bytes(self._random[:REFERENCE_OCTETS], "big")
        self._random = self._random[REFERENCE_OCTETS:]
        return _PAIRS[number >> 30] + _PAIRS[number >> 20 & 1023] + _PAIRS[number >> 10 & 1023] + _PAIRS[number & 1023]

    # ---- EHLO: only what every backend can carry is offered

    def hello_reply(
        self, listener: Listener, *, esmtp: bool, tls: bool, mechanisms: tuple[str, ...], front: bool
    ) -> tuple[Reply, frozenset[str]]:
        """The reply to EHLO or HELO and the keywords in force after it.  RFC 5321 §4.1.1.1.

        Args:
            mechanisms: of AUTH, as far as this client may use it now; front: it may say XCLIENT.
        """
        capabilities = [backend.capabilities for backend in self.backends.values()]
        if capabilities != self._hello_capabilities:
            self._hello_replies.clear()
            self._hello_capabilities = capabilities
        starttls = listener.tls is not None and not tls
        which = (listener.settings.name, starttls, mechanisms, front)
        found = self._hello_replies.get(which)
        if found is None:
            found = self._hello_replies[which] = self._offer(starttls=starttls, mechanisms=mechanisms, front=front)
        return found if esmtp else (Reply(250, self.settings.name), found[1])

    def _offer(self, *, starttls: bool, mechanisms: tuple[str, ...], front: bool) -> tuple[Reply, frozenset[str]]:
        known = [c for c in (backend.capabilities for backend in self.backends.values()) if c is not None]
        keywords = {"PIPELINING", "SIZE", "ENHANCEDSTATUSCODES", "CHUNKING", "HELP"}
        if len(known) == len(self.backends):
            keywords |= {
                keyword for keyword in ("8BITMIME", "SMTPUTF8", "DSN") if all(keyword in c.keywords for c in known)
            }
            if "8BITMIME" not in keywords:  # RFC 6531 §3.1: SMTPUTF8 needs 8BITMIME
                keywords.discard("SMTPUTF8")
        if starttls:
            keywords.add("STARTTLS")
        if mechanisms:
            keywords.add("AUTH")
        if front:
            keywords.add("XCLIENT")
        sizes = [c.size_octets - EHLO_SIZE_ROOM_OCTETS for c in known if c.size_octets]
        own = self.settings.limits.message_size_octets
        size = min([*([own] if own else []), *(max(size, 1) for size in sizes)], default=0)
        said = {"SIZE": f"SIZE {size}", "AUTH": f"AUTH {' '.join(mechanisms)}", "XCLIENT": _XCLIENT}
        lines = [self.settings.name, *(said.get(keyword, keyword) for keyword in _ORDER if keyword in keywords)]
        return Reply(250, "\n".join(lines)), frozenset(keywords)

    # ---- timeouts

    def _sweep(self) -> None:
        """End the sessions whose clients are silent.  One pass a second serves all of them."""
        self._sweeper = self.loop.call_later(SWEEP_S, self._sweep)
        self._some_banned = self._bans.any(self.now_s())  # by any worker, or by an operator
        now = self.loop.time()
        timeouts, limit = self.settings.timeouts, self.settings.limits.sessions
        busy = bool(limit) and self.occupancy.sessions() > limit * BUSY_SHARE
        command_s = min(timeouts.command_s, timeouts.busy_s) if busy else timeouts.command_s
        block_s = min(timeouts.content_block_s, timeouts.busy_s) if busy else timeouts.content_block_s
        for session in list(self.sessions):
            connection = session.connection
            if not connection.waiting:
                continue
            if isinstance(session, MailboxSession):
                late = now - connection.since > session.patience_s(command_s)
            elif connection.in_content:
                late = now - connection.since > block_s or now - connection.content_since > timeouts.content_total_s
            else:
                late = now - connection.since > command_s
            if late:
                connection.expire(Ended.TIMEOUT)
        for connection in [connection for connection, until in self._lingering.items() if now >= until]:
            del self._lingering[connection]
            connection.abort()
        if self.draining:
            self._expire_idle()
            return
        if self.worker == 0 and self._sweeps % SUSPENSION_SWEEPS == 0:
            self.metrics.suspended(len(self.sources.records.suspensions(self.now_s())))
        if self.worker == 0 and self._self_tests.due(self.settings.selftest_s, now):
            self._self_testing = self.spawn(self._self_test())
        self._sweeps += 1
        for backend in self.backends.values():
            if backend.healthy:
                self.metrics.backend(backend.name, up=True)
            elif self._sweeps % PROBE_SWEEPS == 0:
                self.spawn(self._probe(backend))

    async def _self_test(self) -> None:
        """Ask through every listener as a stranger; other workers take part, as each may get the connection."""
        settings = self.settings
        served = [(name, *at) for name, listener in self._listeners.items() for at in listener.addresses]
        tests = (
            partial(compare, settings, bound, number, self.hosts_of, self.now_s())
            for number, bound in enumerate(bound_for_smtp(settings.listens, served))
        )
        await self._self_tests.run(tests, lambda: self.settings is settings)

    def _expire_idle(self) -> None:
        for session in list(self.sessions):
            if not session.connection.in_content:
                session.connection.expire(Ended.DRAINED)


def _content_limits(limits: Limits, *, normalise: bool) -> ContentLimits:
    return ContentLimits(
        limits.message_size_octets,
        limits.content_line_octets,
        limits.header_section_octets,
        limits.received_fields,
        normalise,
    )


def _temporary(data: str) -> str:
    """Where content goes that does not fit into memory: beside the rest, so that its room is the administrator's."""
    directory = Path(data) / "tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {directory}: {error.strerror}") from error
    return str(directory)
