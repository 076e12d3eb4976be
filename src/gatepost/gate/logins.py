"""Logins at the gate: who is it, and is somebody guessing?

Why: ``auth`` verifies and ``counters`` counts, and neither knows the other; what a guess costs is decided where the
    client is.
Trust: user names and responses are a stranger's, prepared by ``smtp.sasl``.
Promise: an identity is made on one line of this file, from a verifier's own yes.  A client that is banned hears what a
    wrong secret hears, and nobody is asked.  Where nobody can tell, the client hears 454 and no guess is counted.  The
    replies to an unknown user, a locked one and a wrong secret are the same, and so is what they cost.
Sources: RFC 4954 §4, §6 (AUTH and its replies), RFC 4422 §3.6 (the outcome).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from gatepost.auth import Denied, Unavailable, Verified
from gatepost.auth import authenticator as verifying
from gatepost.auth.authenticator import Authenticator
from gatepost.counters import Ban, Guesses, Look
from gatepost.facts import Identity, IPAddress
from gatepost.smtp.reply import Reply
from gatepost.smtp.sasl import Challenge, Password, Token

_SUCCEEDED = Reply(235, "Authentication succeeded", "2.7.0")
_INVALID = Reply(535, "Authentication credentials invalid", "5.7.8")
_UNAVAILABLE = Reply(454, "Temporary authentication failure, try again later", "4.7.0")

_BANNED = "banned"


class LoginEnd(NamedTuple):
    """How a login ended.

    Attributes:
        account: as the verifier has it, or as the client named it where nobody said yes.
        verdict: "verified", "denied" or "unavailable"; reason: for the metrics; why: for the operator.
        identity: None unless it was verified.
    """

    account: str
    verdict: str
    reason: str
    reply: Reply
    identity: Identity | None = None
    why: str = ""


class Exchange(Protocol):
    """One AUTH command's exchange, to its end."""

    async def step(self, response: bytes | None) -> Challenge | Reply | LoginEnd:
        """Take a decoded response in; None once, at the start, where there was no initial response.

        Returns:
            A challenge for the client, a refusal of what it sent, or how the login ended.
        """
        ...


class Guard:
    """Guesses, counted over all workers.

    Args:
        said: takes each ban that begins, for the log.
    """

    def __init__(self, guesses: Guesses, said: Callable[[Ban], None]) -> None:
        self._guesses = guesses
        self._said = said

    def look(self, user: str, client: IPAddress, now_s: float) -> Look:
        """Before a secret is verified: whether to ask at all, and how long to wait with the answer."""
        return self._guesses.look(user.lower(), client, now_s)

    def wrong(self, user: str, client: IPAddress, secret: str | None, now_s: float) -> None:
        """A secret was wrong, or there is no such user; ``secret``: None where the mechanism shows none."""
        for ban in self._guesses.wrong(user.lower(), client, secret, now_s):
            self._said(ban)

    def right(self, user: str, client: IPAddress, now_s: float) -> None:
        """The secret was right."""
        self._guesses.right(user.lower(), client, now_s)

    def bait(self, user: str, client: IPAddress, now_s: float) -> None:
        """Somebody used an account that nobody uses."""
        ban = self._guesses.bait(user.lower(), client, now_s)
        if ban is not None:
            self._said(ban)


class Logins:
    """The logins of one worker.

    Args:
        now_s: the clock, seconds since the epoch.
    """

    def __init__(self, authenticator: Authenticator, guard: Guard, now_s: Callable[[], float]) -> None:
        self.authenticator = authenticator
        self.guard = guard
        self.now_s = now_s

    def mechanisms(self, bindings: Mapping[str, bytes]) -> tuple[str, ...]:
        """What EHLO offers, the strongest first.

        Args:
            bindings: the channel bindings of the connection, by name; empty without TLS.
        """
        return self.authenticator.mechanisms(bindings)

    def exchange(self, mechanism: str, client: IPAddress, bindings: Mapping[str, bytes]) -> Exchange | None:
        """A new exchange; None for a mechanism that is not offered."""
        inner = self.authenticator.exchange(mechanism, bindings)
        return None if inner is None else _Exchange(self, inner, mechanism, client)


class _Exchange:
    """An exchange whose credentials are verified, and whose guesses are counted."""

    __slots__ = ("_client", "_end", "_inner", "_logins", "_mechanism")

    def __init__(self, logins: Logins, inner: verifying.Exchange, mechanism: str, client: IPAddress) -> None:
        self._logins = logins
        self._inner = inner
        self._mechanism = mechanism
        self._client = client
        self._end: LoginEnd | None = None

    async def step(self, response: bytes | None) -> Challenge | Reply | LoginEnd:
        """As in ``Exchange``."""
        if self._end is not None:  # the client has read why its token was refused.  RFC 7628 §3.2.3
            return self._end
        answer = await self._inner.step(response)
        if isinstance(answer, Challenge | Reply):
            return answer
        end = await self._judge(answer)
        challenge = self._inner.denied() if end.verdict == "denied" else None
        if challenge is None:
            return end
        self._end = end
        return challenge

    async def _judge(self, answer: Password | Token | verifying.Login) -> LoginEnd:
        logins, client, user = self._logins, self._client, self._inner.user
        guard = logins.guard
        look = guard.look(user, client, logins.now_s())
        if look.delay_s:
            await asyncio.sleep(look.delay_s)
        if look.banned:
            return LoginEnd(user, "denied", _BANNED, _INVALID, why=_BANNED)
        bait = await logins.authenticator.is_bait(user)
        login = answer if isinstance(answer, verifying.Login) else await logins.authenticator.verify(answer)
        outcome, now_s = login.outcome, logins.now_s()
        if bait:
            guard.bait(user, client, now_s)
        if isinstance(outcome, Verified):
            guard.right(user, client, now_s)
            # The one place where somebody becomes somebody.
            identity = Identity(outcome.account, self._mechanism, login.verifier, outcome.device, outcome.addresses)
            return LoginEnd(outcome.account, "verified", "accepted", _SUCCEEDED, identity)
        if isinstance(outcome, Unavailable):
            return LoginEnd(user, "unavailable", "unavailable", _UNAVAILABLE, why=outcome.why)
        assert isinstance(outcome, Denied)
        if isinstance(answer, Password):
            guard.wrong(user, client, answer.secret, now_s)
        elif isinstance(answer, Token):
            guard.wrong(user, client, answer.token, now_s)
        else:
            guard.wrong(user, client, None, now_s)
        return LoginEnd(user, "denied", "credentials", _INVALID, why=outcome.why)
