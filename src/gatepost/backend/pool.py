"""A backend's connections: bounded, reused, lent and lent back.

Why: opening a connection costs more than a message, and a backend bears only so many; so connections are kept, and one
    that serves a client who dawdles is taken back for one who does not.
Trust: the backend may go away, say no more connections, or stall at any moment; clients may stall on purpose.
Promise: never more than ``settings.connections`` at once; a connection comes back only when the backend has confirmed
    that no transaction is open on it; who waits for one waits for a bounded time, in a bounded queue; one timer serves
    all deadlines.
Sources: RFC 5321 §4.5.3.2 (timeouts), §5.1 (several addresses), §3.8 (421), §4.5.4.1 (retry).
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Protocol

from gatepost.backend.connection import ConnectFailed, Connection, make_context, open_connection
from gatepost.backend.health import Addresses, AddressHealth
from gatepost.backend.settings import BackendSettings, LmtpSocket, SmtpAddress
from gatepost.errors import BackendUnavailable
from gatepost.facts import Client
from gatepost.smtp.client import Capabilities
from gatepost.smtp.reply import Reply

Observe = Callable[[str, float], None]
"""Takes a measure: connect (seconds), connect_failed, retry, park, wait (seconds), deliver (seconds)."""


class Log(Protocol):
    """Takes a sentence for the operator; ``up`` when it is good news."""

    def __call__(self, text: str, *, up: bool) -> None: ...


UNREACHABLE = Reply(451, "The server behind this one does not answer, try again later", "4.4.1")
CROWDED = Reply(451, "The server behind this one is too busy, try again later", "4.3.2")
INSECURE = Reply(451, "The server behind this one cannot be reached over verified TLS, try again later", "4.7.5")

LIMIT_GROWS_S = 5.0  # a limit that the backend made smaller doubles again so often
SWEEP_S = (0.02, 1.0)

_log = logging.getLogger("gatepost.backend")


class NoConnection(BackendUnavailable):
    """No connection could be had; ``reply`` is what to tell the client."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.text)
        self.reply = reply


Waiter = tuple[float, "asyncio.Future[Connection]", Hashable]
"""Until when, on the loop's clock, what, and for which client."""


class Lender(Protocol):
    """A transaction that holds a connection and can do without it for a while."""

    def park(self) -> bool:
        """Give the connection back.  False: not at this moment."""
        ...


class Pool:
    """All connections to one backend, of one process.

    Args:
        tls: the context for settings.tls "required"; None for the system's authorities.
        observe: told measures; log: told what an operator should know, a sentence each, when it changes.

    Attributes:
        capabilities: of the connection opened last; None until one was.
        healthy: the last attempt to get a connection succeeded.
        lendable: transactions that hold a connection while they wait for their client, oldest first, with the time
            they got it.
    """

    __slots__ = (
        "_addresses",
        "_closing",
        "_connecting",
        "_contexts",
        "_emptied",
        "_idle",
        "_idle_s",
        "_limit",
        "_limit_grows_at",
        "_loop",
        "_open",
        "_park_timer",
        "_plain_said",
        "_refusal",
        "_resetting",
        "_sweep_s",
        "_sweep_timer",
        "_tasks",
        "_trials",
        "_waiters",
        "capabilities",
        "healthy",
        "lendable",
        "lmtp",
        "log",
        "observe",
        "settings",
    )

    def __init__(
        self,
        settings: BackendSettings,
        *,
        tls: ssl.SSLContext | None = None,
        observe: Observe | None = None,
        log: Log | None = None,
    ) -> None:
        addresses = [address for address in settings.addresses if isinstance(address, SmtpAddress | LmtpSocket)]
        if not addresses or len(addresses) != len(settings.addresses):
            raise ValueError(f"backend {settings.name}: a pool connects to SMTP or LMTP servers")
        self.settings = settings
        self.capabilities: Capabilities | None = None
        self.healthy = False
        self.lendable: dict[Lender, float] = {}
        self.lmtp = any(isinstance(address, LmtpSocket) or address.lmtp for address in addresses)
        self.observe: Observe = observe or _unobserved
        self.log: Log = log or to_logging
        self._contexts: dict[str, ssl.SSLContext] = {} if tls is None else {"required": tls}
        self._addresses = Addresses(addresses)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: set[Connection] = set()
        self._idle: list[Connection] = []
        self._connecting: list[Client | None] = []
        self._trials = 0
        self._resetting = 0
        self._refusal = UNREACHABLE
        self._waiters: deque[Waiter] = deque()
        self._limit = settings.connections
        self._limit_grows_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._park_timer: asyncio.TimerHandle | None = None
        shortest = min(settings.command_timeout_s, settings.data_timeout_s, settings.block_timeout_s,
                       settings.final_timeout_s, settings.idle_s, settings.wait_timeout_s)  # fmt: skip
        self._sweep_s = min(max(shortest / 4, SWEEP_S[0]), SWEEP_S[1])
        self._idle_s = settings.idle_s
        self._closing = False
        self._emptied: asyncio.Future[None] | None = None
        self._plain_said: set[SmtpAddress | LmtpSocket] = set()

    # ---- taking and giving back

    async def acquire(self, client: Hashable = None, *, fresh: bool = False) -> Connection:
        """A connection without a transaction.

        Args:
            client: for whom; it matters where connections are ``dedicated``.
            fresh: rather a new one: one from the pool has just turned out dead.

        Raises:
            NoConnection: with the reply for the client.
        """
        if not fresh:
            idle = self._idle
            while idle:
                connection = idle.pop()
                if connection.alive:
                    return connection
        return await self._wait(client, fresh=fresh)

    async def _wait(self, client: Hashable, *, fresh: bool) -> Connection:
        loop = self._loop = asyncio.get_running_loop()
        now = loop.time()
        if not self._open and self._addresses.hopeless(now):
            raise NoConnection(self._refusal)
        if len(self._waiters) >= self.settings.waiters:
            raise NoConnection(CROWDED)
        if fresh and self._idle and len(self._open) + len(self._connecting) >= self._limit:
            self._idle.pop(0).close()
        future: asyncio.Future[Connection] = loop.create_future()
        waiter = (now + self.settings.wait_timeout_s, future, client)
        self._waiters.append(waiter)
        self._serve()
        self._arm()
        try:
            connection = await future
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif not future.cancelled() and future.exception() is None:
                self.release(future.result())
            raise
        self.observe("wait", loop.time() - now)
        return connection

    def release(self, connection: Connection) -> None:
        """Take back a connection on which no transaction is open."""
        if not connection.alive:
            return
        if connection.worn or len(self._open) > self._limit:
            connection.quit()
            return
        waiters = self._waiters
        while waiters:
            future = waiters.popleft()[1]
            if not future.done():
                future.set_result(connection)
                return
        if self._closing:
            connection.quit()
            return
        assert self._loop is not None
        connection.idle_since = self._loop.time()
        self._idle.append(connection)
        if self._sweep_timer is None:
            self._arm()

    def reset(self, connection: Connection) -> None:
        """Take back a connection on which a transaction may be open: after the 250 to RSET.  RFC 5321 §4.1.1.5."""
        self._resetting += 1
        connection.reset(self._reset_done)

    def may_lend(self, lender: Lender) -> None:
        """A transaction holds a connection from now on."""
        now = self.now()
        self.lendable[lender] = now
        if self._waiters and self._park_timer is None and self._loop is not None:
            self._park_timer = self._loop.call_at(now + self.settings.park_after_s, self._park_due)

    def _reset_done(self, connection: Connection, reply: Reply | None) -> None:
        self._resetting -= 1
        if reply is not None and 200 <= reply.code < 300:
            self.release(connection)
            return
        connection.close()
        self._serve()

    # ---- who waits

    def _serve(self) -> None:
        """Somebody waits: open connections while there is room, and ask lenders."""
        waiting = len(self._waiters) - self._resetting
        if waiting <= 0:
            return
        assert self._loop is not None
        now = self._loop.time()
        room = self._limit - len(self._open) - len(self._connecting) - self._trials
        if room > 0 and not self._addresses.hopeless(now):
            self._open_more(min(waiting - len(self._connecting), room))
        if self.lendable:
            self._call_in(waiting, now)

    def _open_more(self, count: int) -> None:
        """Open so many connections, none where it is negative."""
        for _ in range(count):
            self._open_one(None)

    def _open_one(self, client: Client | None) -> None:
        self._connecting.append(client)
        self._spawn(self._connect(client))

    def _call_in(self, waiting: int, now: float) -> None:
        """Park transactions that have held a connection for longer than any client in a hurry does.

        Clients that stall between RCPT and the end of content could otherwise hold all connections, and keep everybody
        else out at no cost to themselves.  While connections are being opened they are counted upon, but not for long:
        a backend at its own limit accepts a connection and leaves it without a greeting.
        """
        patience_s = self.settings.park_after_s
        overdue_at = self._waiters[0][0] - self.settings.wait_timeout_s + patience_s
        missing = waiting if overdue_at <= now else waiting - len(self._connecting)
        again = overdue_at
        if missing > 0:
            for lender, since in list(self.lendable.items()):
                if since + patience_s > now:
                    again = since + patience_s
                    break
                if lender.park():
                    self.observe("park", 1)
                    missing -= 1
                    if not missing:
                        return
        if self._park_timer is None and self._loop is not None:
            self._park_timer = self._loop.call_at(max(again, now + SWEEP_S[0]), self._park_due)

    def _park_due(self) -> None:
        self._park_timer = None
        self._serve()

    def _fail_waiters(self, reply: Reply) -> None:
        waiters, self._waiters = self._waiters, deque()
        for _, future, _ in waiters:
            if not future.done():
                future.set_exception(NoConnection(reply))

    # ---- opening

    async def _connect(self, client: Client | None = None) -> None:
        """One new connection, for whoever waits first unless it is dedicated."""
        try:
            connection = await self._dial(client)
        except ConnectFailed as failure:
            self._connecting.remove(client)
            self._not_connected(failure)
        except BaseException:
            self._connecting.remove(client)
            raise
        else:
            self._connecting.remove(client)
            self._adopt(connection)

    def _not_connected(self, failure: ConnectFailed) -> None:
        self._refusal = CROWDED if failure.busy else INSECURE if failure.tls else UNREACHABLE
        if not self._open:
            self.healthy = False
            if not self._connecting:
                self._fail_waiters(self._refusal)
            return
        if failure.busy:
            # It serves us, only not on one connection more: the pool is smaller than configured now.
            assert self._loop is not None
            if self._limit > len(self._open):
                self.log(f"backend {self.settings.name}: {len(self._open)} connections for now: {failure}", up=False)
            self._limit = len(self._open)
            self._limit_grows_at = self._loop.time() + LIMIT_GROWS_S
        else:
            self.healthy = False
        self._serve()

    async def _dial(self, client: Client | None) -> Connection:
        """Try the addresses in order.  RFC 5321 §5.1."""
        assert self._loop is not None
        working, due = self._addresses.working(), self._addresses.due(self._loop.time())
        if working:
            for health in due:
                if len(self._open) + len(self._connecting) + self._trials < self._limit:
                    self._trials += 1
                    health.trial = True
                    self._spawn(self._trial(health))
        failure = ConnectFailed(self._addresses.trouble or "no address to try")
        for health in working or due:
            try:
                return await self._attempt(health, client)
            except ConnectFailed as failed:
                failure = failed
        raise failure

    async def _trial(self, health: AddressHealth) -> None:
        """Whether a failed address works again, at nobody's expense."""
        try:
            connection = await self._attempt(health, None)
        except ConnectFailed:
            return
        finally:
            self._trials -= 1
        self._adopt(connection)

    async def _attempt(self, health: AddressHealth, client: Client | None) -> Connection:
        """One attempt at one address, with plain text behind it where TLS is opportunistic."""
        assert self._loop is not None
        settings, name = self.settings, self.settings.name
        started_at = self._loop.time()
        health.trial = health.failures > 0
        try:
            try:
                connection, health.answered = await open_connection(
                    health.address, settings, self._context(health.address), health.answered, client
                )
                self._plain_said.discard(health.address)
            except ConnectFailed as failure:
                if not failure.tls or settings.tls == "required":
                    raise
                # RFC 7435 §3: opportunistic TLS is for those who would otherwise have plain text.  It guards against
                # listeners only; who can break the handshake could as well have hidden STARTTLS.
                if health.address not in self._plain_said:
                    self._plain_said.add(health.address)
                    self.log(
                        f"backend {name}: {failure}; mail goes there in plain text (tls is opportunistic)", up=False
                    )
                connection, health.answered = await open_connection(
                    health.address, settings, None, health.answered, client
                )
        except ConnectFailed as failure:
            self.observe("connect_failed", 1)
            if not (failure.busy and self._open) and health.failed(str(failure), started_at, self._loop.time()):
                self.log(f"backend {name}: {failure}", up=False)
            raise
        finally:
            health.trial = False
        if health.succeeded():
            self.log(f"backend {name}: {connection.peer} answers again", up=True)
        self.observe("connect", self._loop.time() - started_at)
        return connection

    def _context(self, address: SmtpAddress | LmtpSocket) -> ssl.SSLContext | None:
        """The TLS context for an address; a Unix socket needs none."""
        kind = self.settings.tls
        if kind == "off" or isinstance(address, LmtpSocket):
            return None
        if kind not in self._contexts:
            self._contexts[kind] = make_context(required=kind == "required")
        return self._contexts[kind]

    def _adopt(self, connection: Connection) -> None:
        self.capabilities = connection.capabilities
        self.healthy = True
        if not connection.alive:  # lost since
            self._serve()
            return
        self._open.add(connection)
        connection.adopted(self._gone)
        self.release(connection)
        self._serve()  # who waits beside it need not wait for it

    def _gone(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._waiters:
            self._serve()
        self._rest()

    # ---- time

    def now(self) -> float:
        """The loop's clock; a transaction holds a connection by now, so that there is a loop."""
        assert self._loop is not None
        return self._loop.time()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._loop is not None
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Ours to mend; nobody must wait for it.
            _log.error("backend %s: opening a connection", self.settings.name, exc_info=error)
            if not self._open and not self._connecting:
                self._fail_waiters(UNREACHABLE)
        self._rest()

    def _arm(self) -> None:
        if self._sweep_timer is None and self._loop is not None:
            self._sweep_timer = self._loop.call_later(self._sweep_s, self._sweep)

    def _sweep(self) -> None:
        """Everything that is due by the clock."""
        assert self._loop is not None
        self._sweep_timer = None
        now = self._loop.time()
        for connection in [connection for connection in self._open if connection.deadline <= now]:
            connection.expire()
        idle, settings = self._idle, self.settings
        while idle and idle[0].idle_since + self._idle_s <= now:
            idle.pop(0).quit()
        waiters = self._waiters
        while waiters and (waiters[0][0] <= now or waiters[0][1].done()):
            future = waiters.popleft()[1]
            if not future.done():
                future.set_exception(NoConnection(CROWDED))
        if self._limit_grows_at and self._limit_grows_at <= now:
            self._limit = min(settings.connections, self._limit * 2)
            self._limit_grows_at = now + LIMIT_GROWS_S if self._limit < settings.connections else 0.0
        if waiters:
            self._serve()
        if self._open or waiters or self._limit_grows_at:
            self._arm()

    def _rest(self) -> None:
        """Tell ``close`` when nothing is left."""
        emptied = self._emptied
        if emptied is not None and not emptied.done() and not self._open and not self._tasks:
            emptied.set_result(None)

    # ---- from outside

    async def probe(self) -> None:
        """Open a connection, as a look at the backend, and keep it; ``healthy`` tells what came of it."""
        self._loop = asyncio.get_running_loop()
        if len(self._open) + len(self._connecting) + self._trials >= self._limit:
            return
        self._connecting.append(None)
        await self._connect()
        self._arm()

    async def close(self, grace_s: float | None = None) -> None:
        """Close idle connections now and the others when their delivery ends; a transaction may still begin and end.

        Args:
            grace_s: then cut what is left; None to let every delivery end.
        """
        loop = self._loop = asyncio.get_running_loop()
        self._closing = True
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.quit()
        for lender in list(self.lendable):
            lender.park()  # it gets another one, should its client go on
        if self._open or self._tasks:
            self._emptied = loop.create_future()
            self._arm()
            try:
                async with asyncio.timeout(grace_s):
                    await self._emptied
            except TimeoutError:
                for task in list(self._tasks):
                    task.cancel()
                for connection in list(self._open):
                    connection.close()
        self._fail_waiters(CROWDED)
        for timer in (self._sweep_timer, self._park_timer):
            if timer is not None:
                timer.cancel()
        self._sweep_timer = self._park_timer = None


def _unobserved(_name: str, _value: float) -> None:
    pass


def to_logging(text: str, *, up: bool) -> None:
    """The log of who passes none."""
    _log.log(logging.INFO if up else logging.WARNING, "%s", text)
