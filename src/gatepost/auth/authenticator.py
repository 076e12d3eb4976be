"""All verifiers behind one question: who is it?

Why: the gate asks once, and does not know how many servers that takes; mail clients open ten connections at once, and
    the old server should not be asked ten times.
Trust: credentials are a stranger's, prepared by ``smtp.sasl``; verifiers answer with values and do not raise.
Promise: verifiers are asked in the configured order until one says yes.  Where none does and one could not tell, nobody
    can tell: it might have said yes.  A yes to an authorization identity of another account is a no.
    A password that a server said yes to is believed again for ``cache_s``, by this process alone and only while no
    worker has seen another one of that account work: a changed password ends the old one's rights as soon as the new
    one was used.  Own accounts are never remembered, so that a change of their files is in force at once; tokens are
    not either, since they end at a time of their own.  Only keyed digests of secrets are kept, under a key that lives
    as long as this process.
    SCRAM is offered where our own accounts alone take passwords.  A client takes the strongest mechanism that it knows
    and most try no other, so beside a server that needs to see the secret, all of that server's users would be told
    that their password is wrong.
Sources: RFC 4422 §3.4 (authorization identities), RFC 4954 §4 (AUTH), RFC 5802 §6 (offering channel bindings).
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple, Protocol

from gatepost.auth import Credentials, Denied, Outcome, Unavailable, Verified, Verifier
from gatepost.auth.accounts import AccountStore, AccountsVerifier
from gatepost.auth.scram import SCRAM, SCRAM_PLUS, ScramExchange
from gatepost.auth.settings import AuthSettings, LoginServer
from gatepost.errors import ConfigError
from gatepost.smtp import sasl
from gatepost.smtp.reply import Reply
from gatepost.smtp.sasl import Challenge, Password, Token

CACHE_ENTRIES_MAX = 10_000  # logins that are remembered, of one process
MARK_OCTETS = 4  # of a secret, where workers share which one worked last: enough to tell it from the one before

_ACCOUNTS, _OAUTH = "accounts", "oauth"
_KEY_OCTETS = 32
_NONCE_OCTETS = 18  # 24 characters

# A client binds by what its RFC says for the version of TLS (RFC 9266 §3, RFC 5802 §6) and asks for no other; where the
# TLS library gives neither, -PLUS would only keep it out.
_EXPECTED_BINDINGS: Final = frozenset({"tls-exporter", "tls-unique"})
_OTHER_ACCOUNT: Final = Denied("authorization identity of another account")


def _epoch_s() -> float:
    return datetime.now(UTC).timestamp()


class Freshness(Protocol):
    """Which secret of an account worked last, over all workers; what is forgotten is asked for again."""

    @property
    def key(self) -> bytes:
        """A secret that all workers share, for the marks."""
        ...

    def last_good(self, user: str) -> bytes | None:
        """The mark of the secret that worked last; None where nobody knows."""
        ...

    def set_last_good(self, user: str, mark: bytes) -> None:
        """Remember a mark of MARK_OCTETS."""
        ...


class Login(NamedTuple):
    """How a login ended.

    Attributes:
        verifier: who said yes, as in [auth] verify; "" where nobody did.
    """

    outcome: Outcome
    verifier: str = ""


class Exchange(Protocol):
    """One AUTH command's exchange."""

    @property
    def user(self) -> str:
        """Whom it is about, prepared; "" until that is known."""
        ...

    async def step(self, response: bytes | None) -> Challenge | Password | Token | Login | Reply:
        """Take a decoded response in; None once, at the start, where there was no initial response.

        Returns:
            A challenge for the client, credentials to be verified, how the login ended (SCRAM), or a refusal.
        """
        ...

    def denied(self) -> Challenge | None:
        """What a client is still asked before it is refused; one more ``step`` then gives the refusal."""
        ...


class _Told:
    """A mechanism whose client tells the secret."""

    __slots__ = ("_exchange", "user")

    def __init__(self, exchange: sasl.Exchange) -> None:
        self._exchange = exchange
        self.user = ""

    async def step(self, response: bytes | None) -> Challenge | Password | Token | Login | Reply:
        answer = self._exchange.step(response)
        if isinstance(answer, Password | Token):
            self.user = answer.user
        return answer

    def denied(self) -> Challenge | None:
        return self._exchange.denied()


class _Proved:
    """SCRAM: the exchange itself is the login."""

    __slots__ = ("_exchange",)

    def __init__(self, exchange: ScramExchange) -> None:
        self._exchange = exchange

    @property
    def user(self) -> str:
        return self._exchange.user

    async def step(self, response: bytes | None) -> Challenge | Password | Token | Login | Reply:
        answer = await self._exchange.step(response)
        if isinstance(answer, Verified):
            return _acting_for(Login(answer, _ACCOUNTS), self._exchange.user, self._exchange.authzid)
        if isinstance(answer, Denied | Unavailable):
            return Login(answer._replace(why=f"{_ACCOUNTS}: {answer.why}"))
        return answer

    def denied(self) -> Challenge | None:
        return None


class _Kept(NamedTuple):
    """A yes that is believed again.

    Attributes:
        digest: of the secret, under this process's key.
        until: of the monotonic clock, in seconds.
    """

    digest: bytes
    verified: Verified
    until: float


class Authenticator:
    """Who verifies logins, for one process.

    Args:
        freshness: shared with the other workers; None for a process alone.
        clock: monotonic, in seconds; now: seconds since the epoch.
        verifiers: instead of those that the settings name.
    """

    def __init__(
        self,
        settings: AuthSettings,
        *,
        freshness: Freshness | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = _epoch_s,
        verifiers: Sequence[Verifier] | None = None,
    ) -> None:
        self._verifiers = tuple(_verifiers(settings, now) if verifiers is None else verifiers)
        self._passwords = tuple(one for one in self._verifiers if one.name != _OAUTH)
        self._tokens = tuple(one for one in self._verifiers if one.name == _OAUTH)
        self._accounts = next((one for one in self._verifiers if isinstance(one, AccountsVerifier)), None)
        self._cache_s = settings.cache_s
        self._freshness = freshness or _ThisProcess()
        self._clock = clock
        self._key = secrets.token_bytes(_KEY_OCTETS)
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()
        self._under_way: dict[bytes, asyncio.Future[Login | None]] = {}

    def mechanisms(self, bindings: Mapping[str, bytes]) -> tuple[str, ...]:
        """What EHLO offers, the strongest first.

        Args:
            bindings: the channel bindings of the connection, by name; empty without TLS.
        """
        offered: list[str] = []
        if self._accounts is not None and len(self._passwords) == 1:
            offered += (SCRAM_PLUS, SCRAM) if _EXPECTED_BINDINGS & bindings.keys() else (SCRAM,)
        if self._tokens:
            offered += ("OAUTHBEARER", "XOAUTH2")
        if self._passwords:
            offered += ("PLAIN", "LOGIN")
        return tuple(offered)

    def exchange(self, mechanism: str, bindings: Mapping[str, bytes]) -> Exchange | None:
        """A new exchange; None for a mechanism that is not offered.

        Args:
            mechanism: upper case, as ``command.Auth`` has it.
            bindings: the same as for ``mechanisms``.
        """
        offered = self.mechanisms(bindings)
        if mechanism not in offered:
            return None
        if mechanism in (SCRAM, SCRAM_PLUS):
            assert self._accounts is not None
            nonce = secrets.token_urlsafe(_NONCE_OCTETS)
            # A client that could bind, and was not offered it, was not led astray.
            said = bindings if SCRAM_PLUS in offered else {}
            return _Proved(ScramExchange(mechanism, self._accounts, said, nonce))
        told = sasl.exchange(mechanism)
        return None if told is None else _Told(told)

    async def verify(self, credentials: Credentials) -> Login:
        """Ask whoever takes such credentials, in order.

        Logins with the same user and secret that come while one is under way get its answer.
        """
        which = self._digest("login", credentials)
        login: Login | None = None
        while login is None:
            asked = self._under_way.get(which)
            if asked is None:
                login = await self._ask_for_all(which, credentials)
            else:
                await asyncio.wait({asked})
                login = asked.result()
        authzid = credentials.authzid if isinstance(credentials, Password) else ""
        return _acting_for(login, credentials.user, authzid)

    async def is_bait(self, user: str) -> bool:
        """Whether the name is that of a bait account: whoever tries it, with whatever secret, is an attacker."""
        return self._accounts is not None and await self._accounts.is_bait(user)

    async def close(self) -> None:
        """Let go of connections and threads, when the logins under way have ended."""
        while self._under_way:
            await asyncio.wait(self._under_way.values())
        for verifier in self._verifiers:
            await verifier.close()

    async def _ask_for_all(self, which: bytes, credentials: Credentials) -> Login:
        """Ask, and tell all who wait for the same; where this one is cancelled, the next of them asks."""
        answer: asyncio.Future[Login | None] = asyncio.get_running_loop().create_future()
        self._under_way[which] = answer
        login: Login | None = None
        try:
            login = await self._ask(credentials)
        finally:
            del self._under_way[which]
            answer.set_result(login)
        return login

    async def _ask(self, credentials: Credentials) -> Login:
        noes: list[str] = []
        unknown: list[str] = []
        for verifier in self._tokens if isinstance(credentials, Token) else self._passwords:
            outcome = await self._ask_one(verifier, credentials)
            if isinstance(outcome, Verified):
                return Login(outcome, verifier.name)
            (noes if isinstance(outcome, Denied) else unknown).append(f"{verifier.name}: {outcome.why}")
        if unknown:
            return Login(Unavailable("; ".join(unknown)))
        return Login(Denied("; ".join(noes) or "nobody takes such credentials"))

    async def _ask_one(self, verifier: Verifier, credentials: Credentials) -> Outcome:
        if verifier.name == _ACCOUNTS or isinstance(credentials, Token) or self._cache_s <= 0:
            return await verifier.verify(credentials)
        digest = self._digest(verifier.name, credentials)
        place = verifier.name, credentials.user
        kept = self._kept.get(place)
        if kept is not None and self._clock() < kept.until and hmac.compare_digest(kept.digest, digest):
            last = self._freshness.last_good(_shared_name(verifier, kept.verified))
            if last is not None and hmac.compare_digest(last, self._mark(verifier, kept.verified, credentials)):
                return kept.verified
        outcome = await verifier.verify(credentials)
        if isinstance(outcome, Verified):
            mark = self._mark(verifier, outcome, credentials)
            self._freshness.set_last_good(_shared_name(verifier, outcome), mark)
            self._kept[place] = _Kept(digest, outcome, self._clock() + self._cache_s)
            self._kept.move_to_end(place)
            if len(self._kept) > CACHE_ENTRIES_MAX:
                self._kept.popitem(last=False)
        elif isinstance(outcome, Denied) and kept is not None and hmac.compare_digest(kept.digest, digest):
            self._kept.pop(place, None)  # it was right until now
        return outcome

    def _digest(self, purpose: str, credentials: Credentials) -> bytes:
        """Of user and secret, under this process's key."""
        told = "\0".join((purpose, type(credentials).__name__, credentials.user, _secret(credentials)))
        return hmac.digest(self._key, told.encode(), "sha256")

    def _mark(self, verifier: Verifier, verified: Verified, password: Password) -> bytes:
        told = f"{_shared_name(verifier, verified)}\0{password.secret}"
        return hmac.digest(self._freshness.key, told.encode(), "sha256")[:MARK_OCTETS]


class _ThisProcess:
    """Freshness where there is one process."""

    __slots__ = ("_marks", "key")

    def __init__(self) -> None:
        self.key = secrets.token_bytes(_KEY_OCTETS)
        self._marks: OrderedDict[str, bytes] = OrderedDict()

    def last_good(self, user: str) -> bytes | None:
        return self._marks.get(user)

    def set_last_good(self, user: str, mark: bytes) -> None:
        self._marks[user] = mark
        self._marks.move_to_end(user)
        if len(self._marks) > CACHE_ENTRIES_MAX:
            self._marks.popitem(last=False)


def _secret(credentials: Credentials) -> str:
    return credentials.secret if isinstance(credentials, Password) else credentials.token


def _shared_name(verifier: Verifier, verified: Verified) -> str:
    """The account, not how it was typed: its password is changed for all spellings."""
    return f"{verifier.name} {verified.account}"


def _acting_for(login: Login, user: str, authzid: str) -> Login:
    """A login as oneself only.  RFC 4422 §3.4.1, RFC 4616 §2."""
    outcome = login.outcome
    if not authzid or not isinstance(outcome, Verified):
        return login
    own = {name.lower() for name in (user, outcome.account, *outcome.addresses)}
    return login if authzid.lower() in own else Login(_OTHER_ACCOUNT)


def _verifiers(settings: AuthSettings, now: Callable[[], float]) -> Iterator[Verifier]:
    """Those that the settings name, in order."""
    for name in settings.verify:
        if name == _ACCOUNTS:
            yield AccountsVerifier(AccountStore(settings.accounts))
        else:
            yield _elsewhere(name, settings, now)


def _elsewhere(name: str, settings: AuthSettings, now: Callable[[], float]) -> Verifier:
    """One that asks another server.  What is not asked is not loaded: some bring large libraries.

    Raises:
        ConfigError: a library that it needs is not installed, or it cannot be used as it is configured.
    """
    if name == "pop3" and settings.pop3 is not None:
        from gatepost.auth.pop3 import Pop3Verifier

        return Pop3Verifier(settings.pop3, judged=_judged(settings.pop3))
    if name == "imap" and settings.imap is not None:
        from gatepost.auth.imap import ImapVerifier

        return ImapVerifier(settings.imap, judged=_judged(settings.imap))
    if name == "smtp" and settings.smtp is not None:
        from gatepost.auth.smtp import SmtpVerifier

        return SmtpVerifier(settings.smtp, judged=_judged(settings.smtp), hello=settings.hello)
    if name == "ldap" and settings.ldap is not None:
        from gatepost.auth.ldap import LdapVerifier

        return LdapVerifier(settings.ldap)
    if name == "dovecot" and settings.dovecot is not None:
        from gatepost.auth.dovecot import DovecotVerifier

        return DovecotVerifier(settings.dovecot)
    if name == "oauth" and settings.oauth is not None:
        from gatepost.auth.oauth import OauthVerifier

        return OauthVerifier(settings.oauth, now=now)
    raise ValueError(f"[auth] verify names {name}, and there is no [auth.{name}]")


def _judged(server: LoginServer) -> ssl.SSLContext | None:
    """How the server's certificate is judged; None for the system's authorities."""
    if not server.authority:
        return None
    try:
        return ssl.create_default_context(cafile=server.authority)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError([f"authority = {server.authority!r}: {error}; it must be a certificate in PEM"]) from error
