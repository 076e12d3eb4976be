"""Connections that belong to one client each: the backend is told, by XCLIENT or by a PROXY header, whose they are.

Why: behind the gate every client has the gate's address; a backend with rules, limits or logs of its own needs the
    client's.
Trust: the hello name is what the client claimed; it goes out as xtext, and in EHLO only where it is a plain name.
Promise: no transaction runs on a connection that the backend was told to be another client's, however it got there:
    the pool matches, and the delivery looks again.  A connection that cannot be handed over is closed rather than lent.
    A backend that never offered XCLIENT gets mail without it, as it would without the setting; one that refuses it
    gets none.
Sources: Postfix's XCLIENT_README; The PROXY protocol, versions 1 and 2 (HAProxy, 2020-03-05).

Postfix judges XCLIENT by the address it was told last, so that a connection told to be a stranger's offers XCLIENT no
more: such a connection serves its client's next transactions, and nobody else's.
"""

from __future__ import annotations

import ssl
from collections import Counter
from collections.abc import Hashable
from typing import ClassVar

from gatepost.backend.connection import ClientRefused, Connection, ConnectionLost
from gatepost.backend.delivery import SmtpBackend, SmtpDelivery
from gatepost.backend.pool import Log, NoConnection, Observe, Pool
from gatepost.backend.settings import BackendSettings
from gatepost.facts import Client, Session
from gatepost.smtp.client import Introduction
from gatepost.smtp.command import MailParameters
from gatepost.smtp.path import ReversePath
from gatepost.smtp.reply import Reply

DEDICATED_IDLE_S = 5.0  # a client that has more to send does so at once; nobody else can use its connection
REFUSAL_SAID_S = 60.0  # strangers must not be able to fill the log

REFUSED = Reply(451, "The server behind this one does not want this client now, try again later", "4.7.0")


class DedicatedPool(Pool):
    """A pool that knows whose each connection is."""

    __slots__ = ("_proxied", "_refusal_said_at", "_silent")

    def __init__(
        self,
        settings: BackendSettings,
        *,
        tls: ssl.SSLContext | None = None,
        observe: Observe | None = None,
        log: Log | None = None,
    ) -> None:
        super().__init__(settings, tls=tls, observe=observe, log=log)
        self._proxied = settings.proxy != "off"
        if self._proxied and settings.xclient:
            raise ValueError(f"backend {settings.name}: a client is told by XCLIENT or by a PROXY header, not by both")
        self._idle_s = min(settings.idle_s, DEDICATED_IDLE_S)
        self._refusal_said_at = float("-inf")
        self._silent: set[str] = set()  # addresses that offer no XCLIENT

    def suits(self, connection: Connection, client: Hashable) -> bool:
        """The connection is that client's, or can be made its own."""
        if connection.client == client:
            return True
        return not self._proxied and connection.transferable

    def refused(self, why: str) -> None:
        """Tell the operator why mail is deferred; not for each of many clients."""
        now = self.now()
        if now >= self._refusal_said_at + REFUSAL_SAID_S:
            self._refusal_said_at = now
            self.log(f"backend {self.settings.name}: {why}; mail of that client is deferred", up=False)

    async def acquire(self, client: Hashable = None, *, fresh: bool = False) -> Connection:
        """The client's own connection, or another that can become it, the most recently used first."""
        if not fresh:
            idle = self._idle
            for own in (True, False):
                for connection in reversed(idle):
                    if connection.client == client if own else self.suits(connection, client):
                        idle.remove(connection)
                        return connection
        return await self._wait(client, fresh=fresh)

    def release(self, connection: Connection) -> None:
        """To whoever waits first of those it suits.  If it suits none of them, its place is worth more than itself."""
        if not connection.alive:
            return
        look = self._proxied and connection.client is None  # at the backend, under our own address
        if look or connection.worn or len(self._open) > self._limit:
            connection.quit()
            return
        waiting = [waiter for waiter in self._waiters if not waiter[1].done()]
        for waiter in waiting:
            if self.suits(connection, waiter[2]):
                self._waiters.remove(waiter)
                waiter[1].set_result(connection)
                return
        if waiting:
            connection.close()
            return
        super().release(connection)

    def _serve(self) -> None:
        """As for any pool; connections that nobody waits for make room first, also for a look at a failed address."""
        waiting = len(self._waiters) - self._resetting - len(self._connecting)
        if self._idle and waiting > 0 and not self._addresses.hopeless(self.now()):
            wanted = waiting + len(self._addresses.due(self.now()))
            room = self._limit - len(self._open) - len(self._connecting) - self._trials
            count = max(min(wanted, wanted - room), 0)
            excess, self._idle = self._idle[:count], self._idle[count:]
            for connection in excess:
                connection.adopted(self._open.discard)  # this pool need not hear of each of them
                connection.close()
        super()._serve()

    def _open_more(self, count: int) -> None:
        """For those who wait, in their order, and for whom no connection is being opened yet."""
        if not self._proxied:
            super()._open_more(count)
            return
        opening = Counter(self._connecting)
        for _, future, client in self._waiters:
            if count <= 0:
                return
            if future.done():
                continue
            assert isinstance(client, Client)
            if opening[client]:
                opening[client] -= 1
                continue
            self._open_one(client)
            count -= 1

    def _adopt(self, connection: Connection) -> None:
        if self.settings.xclient:
            self._look_for_xclient(connection)
        super()._adopt(connection)

    def _look_for_xclient(self, connection: Connection) -> None:
        """Mail passes without it, since refusing all would be worse; but not without a word."""
        peer, name = connection.peer, self.settings.name
        if connection.capabilities.xclient:
            if peer in self._silent:
                self._silent.discard(peer)
                self.log(f"backend {name}: {peer} offers XCLIENT now", up=True)
        elif peer not in self._silent:
            self._silent.add(peer)
            self.log(
                f"backend {name}: {peer} offers the gate no XCLIENT; mail goes there under the gate's address", up=False
            )


class DedicatedDelivery(SmtpDelivery):
    """A transaction on a connection that the backend knows to be its client's.

    The client, as the pool compares it, is an Introduction for XCLIENT and a Client for a PROXY header.
    """

    __slots__ = ()

    _pool: DedicatedPool

    async def _take(self, *, fresh: bool) -> Connection:
        connection = await super()._take(fresh=fresh)
        client = self._client
        if connection.client == client:
            return connection
        if not self._pool.suits(connection, client) or not isinstance(client, Introduction):
            raise RuntimeError("this connection is another client's")
        if not connection.capabilities.xclient:
            return connection  # it never offered XCLIENT; the operator knows
        try:
            await connection.introduce(client)
        except ClientRefused as refusal:
            self._forget()
            connection.quit()
            raise self._refused(str(refusal)) from refusal
        except ConnectionLost as lost:
            if lost.reply is None or not fresh:
                raise  # a connection from the pool may have been closed for its age
            self._forget()
            raise self._refused(f"{lost}, to XCLIENT") from lost
        return connection

    def _refused(self, why: str) -> NoConnection:
        """The answer to this and every further recipient: none of them may cost another attempt."""
        self._pool.refused(why)
        return NoConnection(self._end_with(REFUSED))


class DedicatedBackend(SmtpBackend):
    """A backend that is told of each transaction's client."""

    __slots__ = ()

    POOL: ClassVar[type[Pool]] = DedicatedPool

    _pool: DedicatedPool

    def begin(self, reverse_path: ReversePath, parameters: MailParameters, session: Session) -> SmtpDelivery:
        """A transaction; nothing is sent before its first recipient.  Its client is who the session says now."""
        client: Introduction | Client = session.client
        if self.settings.xclient:
            identity = session.identity
            client = Introduction(
                session.client.address,
                session.client.port,
                session.hello,
                session.esmtp,
                identity.account if identity is not None else "",
            )
        return DedicatedDelivery(self._pool, reverse_path, parameters, client)
