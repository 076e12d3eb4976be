"""A mail transaction at a backend that speaks SMTP or LMTP, live from its first recipient on.

Why: the backend itself answers each RCPT, so that an unknown user is refused while the client is still there, and the
    gate never owes a bounce (RFC 5321 §6.1).
Trust: reverse-path, forward-paths and parameters are values that were parsed and decided on; the content is whole CRLF
    lines.  The backend's replies may come late, wrong or never.
Promise: a positive answer to content is the backend's own.  A message is handed over again only while the end of its
    content has not been written, and only if every recipient that was accepted is accepted again.  Whatever ends a
    transaction early, no connection comes back to the pool with a transaction open on it.
Sources: RFC 5321 §3.3, §4.1.1.4 (end of content), §4.1.1.5 (RSET), §6.1; RFC 1047 (duplicates); RFC 2033 §4.2 (LMTP);
    RFC 2920 §3.1 (pipelining); RFC 6152 §3, RFC 6531 §3.5 (what may be sent to whom).
"""

from __future__ import annotations

import ssl
from collections.abc import Hashable
from typing import ClassVar

from gatepost.backend.connection import Connection, ConnectionLost
from gatepost.backend.content import Content
from gatepost.backend.pool import UNREACHABLE, Log, NoConnection, Observe, Pool
from gatepost.backend.settings import BackendSettings
from gatepost.errors import StorageError
from gatepost.facts import Session
from gatepost.smtp import client as commands
from gatepost.smtp.client import Capabilities
from gatepost.smtp.command import MailParameters, RcptParameters
from gatepost.smtp.path import ForwardPath, ReversePath
from gatepost.smtp.reply import Reply
from gatepost.verdict import AdmittedRecipient

PARKS_MAX = 8  # then no further recipient: each would cost the backend all those before it again

LOST = Reply(451, "The connection to the server behind this one was lost, try again later", "4.4.2")
CHANGED = Reply(451, "The server behind this one answers differently now, try again later", "4.3.0")
UNREADABLE = Reply(451, "Local error, try again later", "4.3.0")
ONE_RECIPIENT = Reply(452, "One recipient at a time, send the rest in another transaction", "4.5.3")
TOO_SLOW = Reply(452, "Too many recipients in too long a time, send the rest in another transaction", "4.5.3")
NEEDS_SMTPUTF8 = Reply(553, "The server behind this one takes no non-ASCII address", "5.6.7")  # RFC 6531 §3.5
NEEDS_UTF8_HEADER = Reply(554, "The server behind this one takes no UTF-8 header", "5.6.9")  # RFC 6531 §4.3
NEEDS_8BITMIME = Reply(554, "The server behind this one takes 7-bit content only", "5.6.3")  # RFC 6152 §3
NO_RECIPIENTS = Reply(554, "No valid recipients", "5.5.1")
ENDED = Reply(503, "The transaction has ended", "5.5.1")


class SmtpBackend:
    """A backend that speaks SMTP or LMTP."""

    __slots__ = ("_pool", "name", "settings")

    POOL: ClassVar[type[Pool]] = Pool

    def __init__(
        self,
        settings: BackendSettings,
        *,
        tls: ssl.SSLContext | None = None,
        observe: Observe | None = None,
        log: Log | None = None,
    ) -> None:
        self.settings = settings
        self.name = settings.name
        self._pool = self.POOL(settings, tls=tls, observe=observe, log=log)

    @property
    def capabilities(self) -> Capabilities | None:
        """Of the connection opened last; None until one was."""
        return self._pool.capabilities

    @property
    def healthy(self) -> bool:
        """The last contact was good.  False until there was one."""
        return self._pool.healthy

    def begin(self, reverse_path: ReversePath, parameters: MailParameters, session: Session) -> SmtpDelivery:
        """A transaction; nothing is sent before its first recipient."""
        return SmtpDelivery(self._pool, reverse_path, parameters)

    async def probe(self) -> None:
        """Look at the backend; ``healthy`` and ``capabilities`` tell what was seen.  Does not raise."""
        await self._pool.probe()

    async def close(self, grace_s: float | None = None) -> None:
        """Let deliveries end, for so long or as long as they take, then close every connection."""
        await self._pool.close(grace_s)


class SmtpDelivery:
    """One transaction.  Its methods are called one after the other; ``abort`` and ``park`` at any time."""

    __slots__ = (
        "_accepted",
        "_busy",
        "_client",
        "_connection",
        "_final",
        "_parameters",
        "_parks",
        "_pool",
        "_reverse_path",
    )

    def __init__(
        self, pool: Pool, reverse_path: ReversePath, parameters: MailParameters, client: Hashable = None
    ) -> None:
        self._pool = pool
        self._reverse_path = reverse_path
        self._parameters = parameters
        self._client = client  # whom the connection must be dedicated to, if to anybody
        self._connection: Connection | None = None
        self._accepted: list[tuple[ForwardPath, RcptParameters]] = []
        self._final: Reply | None = None  # the answer to everything from now on
        self._busy = False
        self._parks = 0

    # ---- RCPT

    async def rcpt(self, recipient: AdmittedRecipient, parameters: RcptParameters) -> Reply:
        """One recipient: the backend's own answer, or ours where it gave none."""
        if self._final is not None:
            return self._final
        if self._accepted:
            if self._pool.lmtp:
                return ONE_RECIPIENT  # RFC 2033 §4.2: several answers to content cannot be told by one
            if self._parks >= PARKS_MAX and self._connection is None:
                return TOO_SLOW
        self._busy = True
        try:
            return await self._rcpt(recipient.forward_path, parameters)
        except NoConnection as none:
            return none.reply
        except BaseException:
            self._drop()
            raise
        finally:
            self._busy = False

    async def _rcpt(self, path: ForwardPath, parameters: RcptParameters) -> Reply:
        answer = UNREACHABLE
        for fresh in (False, True):
            try:
                if self._connection is None:
                    connection = await self._take(fresh=fresh)
                    reply = await self._open(connection, path, parameters, fresh=fresh)
                else:
                    reply = await self._further(self._connection, path, parameters)
            except ConnectionLost as lost:
                self._forget()
                if self._final is not None:  # aborted meanwhile
                    return self._final
                answer = UNREACHABLE if lost.reply is not None else LOST
                if lost.expired:
                    return answer
                self._pool.observe("retry", 1)
                continue
            if reply.code // 100 == 2:
                self._accepted.append((path, parameters))
            elif reply.code < 400:
                return self._broken()
            return reply
        return answer

    async def _take(self, *, fresh: bool) -> Connection:
        """A connection of our own, without a transaction so far."""
        connection = await self._pool.acquire(self._client, fresh=fresh)
        if self._final is not None:  # aborted meanwhile
            self._pool.release(connection)
            raise NoConnection(self._final)
        self._connection = connection
        connection.committed = False
        return connection

    async def _further(self, connection: Connection, path: ForwardPath, parameters: RcptParameters) -> Reply:
        octets = commands.rcpt(path, parameters, connection.offered)
        if not connection.smtputf8 and not octets.isascii():
            return NEEDS_SMTPUTF8
        return (await connection.exchange(octets, 1, self._pool.settings.command_timeout_s))[0]

    async def _open(
        self, connection: Connection, path: ForwardPath, parameters: RcptParameters, *, fresh: bool
    ) -> Reply:
        """MAIL, the recipients accepted on an earlier connection, and a new one: the answer to the new one."""
        offered = connection.offered
        octets = commands.rcpt(path, parameters, offered)
        if not connection.smtputf8 and not octets.isascii():
            self._give_back()
            return NEEDS_SMTPUTF8
        replies = await self._begin(connection, octets, fresh=fresh)
        if isinstance(replies, Reply):
            return replies
        return replies[-1]

    async def _begin(self, connection: Connection, last: bytes = b"", *, fresh: bool) -> list[Reply] | Reply:
        """MAIL and RCPTs on a connection without a transaction.

        Args:
            last: one more RCPT command, whose reply may be anything.
            fresh: this is the second attempt.

        Returns:
            The replies, or the one answer to the transaction when it cannot be had on this connection.
        """
        offered = connection.offered
        octets = [commands.mail(self._reverse_path, self._parameters, offered)]
        if not connection.smtputf8 and not octets[0].isascii():
            self._give_back()
            return self._end_with(CHANGED if self._accepted else NEEDS_SMTPUTF8)
        for path, parameters in self._accepted:
            octets.append(commands.rcpt(path, parameters, offered))
            if not connection.smtputf8 and not octets[-1].isascii():
                self._give_back()
                return self._end_with(CHANGED)
        accepted = len(octets)
        if last:
            octets.append(last)
        timeout_s = self._pool.settings.command_timeout_s
        if connection.pipelining:
            replies = await connection.exchange(b"".join(octets), len(octets), timeout_s)
        else:
            replies = []
            for command in octets:
                replies += await connection.exchange(command, 1, timeout_s)
                if replies[0].code // 100 != 2:
                    break
        if replies[0].code // 100 != 2:
            if 200 <= replies[0].code < 400:
                return self._broken()
            if replies[0].code == 452 and connection.deliveries and not fresh:
                # "452 Too many messages in this session" and its like: the connection's past is not this client's.
                connection.quit()
                raise ConnectionLost(f"{connection.peer}: {replies[0]!r}", replies[0])
            # RFC 5321 §3.3: MAIL was refused; that is the answer to each RCPT.
            self._give_back()
            return self._end_with(CHANGED if self._accepted else replies[0])
        for reply in replies[1:accepted]:
            if reply.code // 100 != 2:
                # We said 250 for this recipient and cannot take it back: nobody gets the message this time.
                self._give_back()
                return self._end_with(CHANGED)
        self._pool.may_lend(self)
        return replies

    # ---- content

    async def deliver(self, content: Content, trace_field: bytes) -> Reply:
        """Hand the message over: the backend's own final answer, or a deferral.

        Args:
            content: as it came; closed by the caller.
            trace_field: put before it; whole lines, the last CRLF included.
        """
        self._pool.lendable.pop(self, None)
        if self._final is not None:
            return self._final
        self._busy = True
        try:
            return await self._deliver(content, trace_field)
        except NoConnection as none:
            return none.reply
        except StorageError as error:
            self._pool.log(f"backend {self._pool.settings.name}: {error}", up=False)
            self._drop()
            return UNREADABLE
        except BaseException:
            self._drop()
            raise
        finally:
            self._busy = False
            self._final = ENDED

    async def _deliver(self, content: Content, trace_field: bytes) -> Reply:
        if not self._accepted:
            self._give_back()
            return NO_RECIPIENTS
        answer = LOST
        for fresh in (False, True):
            try:
                if self._connection is None:
                    connection = await self._take(fresh=fresh)
                    begun = await self._begin(connection, fresh=fresh)
                    self._pool.lendable.pop(self, None)
                    if isinstance(begun, Reply):
                        return begun
                return await self._hand_over(self._connection, content, trace_field)
            except ConnectionLost as lost:
                committed = self._connection is not None and self._connection.committed
                self._forget()
                if self._final is not None:  # aborted meanwhile
                    return self._final
                answer = UNREACHABLE if lost.reply is not None else LOST
                if committed or lost.expired:
                    return answer  # RFC 1047: it may have been taken; whether to send it again is for the client
                self._pool.observe("retry", 1)
        return answer

    async def _hand_over(self, connection: Connection | None, content: Content, trace_field: bytes) -> Reply:
        """DATA, content and its end.  RFC 5321 §4.1.1.4; never BDAT: framing has one reading."""
        assert connection is not None
        unable = self._unable(connection, content)
        if unable is not None:
            self._give_back()
            return unable
        pool = self._pool
        connection.committed = False
        started_at = pool.now()
        reply = (await connection.exchange(commands.DATA, 1, pool.settings.data_timeout_s))[0]
        if reply.code != 354:
            if reply.code < 400:
                return self._broken()
            self._give_back()
            return reply
        reply = await connection.send_content(trace_field, content)
        connection.deliveries += 1
        if reply.code // 100 == 2:
            connection.blemishes = 0
            self._connection = None
            pool.release(connection)  # RFC 5321 §4.1.1.4: its buffers are cleared
            pool.healthy = True
        elif reply.code < 400:
            return self._broken()
        else:
            self._give_back()  # RSET all the same: some servers keep the envelope of a refused message
        pool.observe("deliver", pool.now() - started_at)
        return reply

    def _unable(self, connection: Connection, content: Content) -> Reply | None:
        """Why this content cannot go over this connection."""
        if not content.eight_bit:
            return None
        if self._parameters.smtputf8 and not connection.smtputf8:
            return NEEDS_UTF8_HEADER
        if "8BITMIME" not in connection.offered:
            return NEEDS_8BITMIME
        return None

    # ---- ends

    def abort(self) -> None:
        """The transaction is over without a message.  Harmless after its end."""
        self._final = ENDED
        if self._busy:
            self._drop()  # a reply is due, and nobody will wait for it
        else:
            self._give_back()

    def park(self) -> bool:
        """Lend the connection back until the client goes on.  False: not at this moment."""
        connection = self._connection
        if connection is None or self._busy:
            return False
        if not connection.alive:
            self._forget()
            return False
        self._parks += 1
        self._give_back()
        return True

    def _give_back(self) -> None:
        """The connection goes back to the pool when the backend has confirmed RSET."""
        self._pool.lendable.pop(self, None)
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool.reset(connection)

    def _drop(self) -> None:
        """Close the connection: what the backend would answer next belongs to nobody."""
        connection = self._connection
        self._forget()
        if connection is not None:
            connection.close()

    def _forget(self) -> None:
        self._pool.lendable.pop(self, None)
        self._connection = None

    def _broken(self) -> Reply:
        """The backend answered what nobody can answer."""
        self._drop()
        return UNREACHABLE

    def _end_with(self, reply: Reply) -> Reply:
        self._final = reply
        return reply
