"""Verify a bearer token: against the issuer's keys, or by asking the issuer.

Why: an organisation whose logins live with an identity provider has tokens instead of passwords, and its mail clients
    send them (XOAUTH2, OAUTHBEARER).
Trust: a token is a stranger's: nothing in it is believed before its signature is, and of its header only the key's
    number and the algorithm are looked at.  The issuer is the administrator's choice; what it answers is bounded too.
Promise: yes needs a signature by a key of the issuer with an algorithm for public keys, or the issuer's word; a token
    of now, for us; and the account that the client named, where it named one.  An issuer that cannot be asked is
    unknown.  Nothing that a token is good for is kept; keys are, for a time.
Sources: RFC 7519 §4.1, §7.2 (JWT), RFC 7517 (keys), RFC 8725 §3 (algorithms, audience), RFC 9068 §4 (access tokens),
    RFC 7662 (introspection), RFC 6749 §2.3.1, §3.3 (client, scope); OpenID Connect Core 1.0 §5.1 (email_verified).
    Stricter: a JWT without exp is refused; so is an address that its issuer calls unverified.
"""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeGuard
from urllib.parse import quote_plus, urlsplit

from joserfc import jws, jwt
from joserfc.errors import JoseError, UnsupportedAlgorithmError
from joserfc.jwk import ECKey, OKPKey, RSAKey

from gatepost.auth import Credentials, Denied, Outcome, Verified
from gatepost.auth.inquiry import Inquiries, Trouble
from gatepost.auth.settings import OauthIssuer
from gatepost.smtp.sasl import TOKEN_OCTETS_MAX, Token, prepare_user

if TYPE_CHECKING:
    import aiohttp

Key = RSAKey | ECKey | OKPKey

ANSWER_OCTETS_MAX = 1 << 18
KEYS_MAX = 100
KEYS_KEPT_S = 3600.0  # then they are fetched again: a key that the issuer has withdrawn is good no longer
KEYS_AGAIN_S = 30.0  # for a key that is not known they are fetched again, but not more often
LEEWAY_S = 30.0  # between the issuer's clock and ours
TOGETHER_MAX = 20  # tokens that are being judged at a time

# RFC 8725 §3.1: a list of ours, whatever the token says.  None of them works with a key that is public ("none", HS256).
ALGORITHMS: Final = (
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "PS384",
    "PS512",
    "ES256",
    "ES384",
    "ES512",
    "EdDSA",
    "Ed25519",
)
_KINDS: Final[dict[object, type[Key]]] = {"RSA": RSAKey, "EC": ECKey, "OKP": OKPKey}

NOT_A_TOKEN: Final = Denied("it takes tokens, and the client sent a password")


class OauthVerifier:
    """[auth.oauth].

    Args:
        now: seconds since the epoch.
    """

    name: ClassVar[str] = "oauth"

    def __init__(self, issuer: OauthIssuer, *, now: Callable[[], float]) -> None:
        self._issuer = issuer
        self._now = now
        self._web = _Web()
        self._keys = _Keys(issuer.jwks, self._web, now)
        place = issuer.introspection or issuer.jwks
        self._inquiries = Inquiries(urlsplit(place).hostname or place, issuer.timeout_s, TOGETHER_MAX)

    async def verify(self, credentials: Credentials) -> Outcome:
        if not isinstance(credentials, Token):
            return NOT_A_TOKEN
        return await self._inquiries.ask(lambda _: self._ask(credentials))

    async def close(self) -> None:
        """Let go of connections to the issuer."""
        await self._web.close()

    async def _ask(self, credentials: Token) -> Outcome:
        issuer = self._issuer
        if issuer.jwks:
            claims = await self._read(credentials.token)
            return claims if isinstance(claims, Denied) else self._judged(claims, credentials.user, claims.get("exp"))
        claims = await self._introspect(credentials.token)
        if claims.get("active") is not True:
            return Denied("the issuer says that the token is not active")
        if not claims.get(issuer.user_claim):
            claims = {**claims, issuer.user_claim: claims.get("username")}  # RFC 7662 §2.2
        return self._judged(claims, credentials.user, claims.get("exp", self._now()))

    async def _read(self, token: str) -> Mapping[str, Any] | Denied:
        """What a JWT says, once its signature is known to be the issuer's."""
        try:
            header = jws.extract_compact(token.encode()).headers()
        except (JoseError, ValueError, TypeError, KeyError, RecursionError):
            return Denied("the token is no signed JWT")
        if header.get("alg") not in ALGORITHMS:
            return Denied("the token is signed in a way that is not taken")
        for key in await self._keys.known_as(header.get("kid")):
            try:
                return jwt.decode(token, key, registry=_REGISTRY).claims
            except (JoseError, ValueError, TypeError, RecursionError):
                continue  # another key, or none at all
        return Denied("the token is not signed by its issuer")

    async def _introspect(self, token: str) -> Mapping[str, Any]:
        """RFC 7662 §2.1."""
        issuer = self._issuer
        who = f"{quote_plus(issuer.client_id)}:{quote_plus(issuer.client_secret)}"
        return await self._web.json(
            issuer.introspection,
            form={"token": token, "token_type_hint": "access_token"},
            headers={"Authorization": f"Basic {b64encode(who.encode()).decode()}"} if issuer.client_id else {},
        )

    def _judged(self, claims: Mapping[str, Any], named: str, expires: object) -> Outcome:
        """What the claims of a token that is genuine make of it.

        Args:
            named: whom the client says it is, "" for nobody.
            expires: when the token does.
        """
        issuer, now = self._issuer, self._now()
        if not _is_time(expires) or expires <= now - LEEWAY_S:
            return Denied("the token has expired, or does not say when it will")
        begins = claims.get("nbf", now)
        if not _is_time(begins) or begins > now + LEEWAY_S:
            return Denied("the token is not valid yet")
        if issuer.issuer and claims.get("iss") != issuer.issuer:
            return Denied("the token is another issuer's")
        if issuer.audience and issuer.audience not in _words(claims.get("aud"), split=False):
            return Denied("the token is for somebody else")
        if issuer.scope and issuer.scope not in (*_words(claims.get("scope")), *_words(claims.get("scp"))):
            return Denied("the token does not hold the scope")
        user = claims.get(issuer.user_claim)
        account = prepare_user(user) if isinstance(user, str) else None
        if account is None:
            return Denied("the token names no account")
        if issuer.user_claim == "email" and claims.get("email_verified", True) is not True:
            return Denied("the issuer has not verified the account's address")
        if named and named.lower() != account.lower():
            return Denied("the token is another account's")
        return Verified(account.lower())


def _is_time(value: object) -> TypeGuard[float]:
    """A NumericDate.  RFC 7519 §2."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _words(value: object, *, split: bool = True) -> Sequence[str]:
    """One text, or a list of them; of scopes a text may hold several.  RFC 7519 §4.1.3, RFC 6749 §3.3."""
    if isinstance(value, str):
        return value.split(" ") if split else (value,)
    return [word for word in value if isinstance(word, str)] if isinstance(value, list) else ()


class _Registry(jws.JWSRegistry):
    """Our algorithms, without a warning that EdDSA has a better name since RFC 9864: issuers still use the old one."""

    max_header_length = TOKEN_OCTETS_MAX

    def get_alg(self, name: str) -> Any:  # noqa: ANN401 - the library does not publish the type
        if name not in ALGORITHMS:
            raise UnsupportedAlgorithmError
        return self.algorithms[name]


# RFC 7515 §4: what is not understood in a header is ignored, unless it is marked as critical.
_REGISTRY: Final = _Registry(strict_check_header=False)


class _Keys:
    """The issuer's keys, fetched when they are wanted.

    Args:
        place: a URL or a path; "" for none.
    """

    def __init__(self, place: str, web: _Web, now: Callable[[], float]) -> None:
        self._place = place
        self._web = web
        self._now = now
        self._keys: list[Key] = []
        self._fetched: float | None = None
        self._tried: float | None = None
        self._trouble = ""
        self._one_at_a_time = asyncio.Lock()

    async def known_as(self, number: object) -> Sequence[Key]:
        """The keys that a token may be signed with.

        Args:
            number: its ``kid``, hostile; None for none, which every key may be meant by.

        Raises:
            Trouble: they cannot be had.
        """
        if not self._old(self._fetched, KEYS_KEPT_S) and self._found(number):
            return self._found(number)  # nobody waits behind those whose keys are not known
        async with self._one_at_a_time:
            if self._old(self._tried, KEYS_AGAIN_S):
                self._tried = self._now()
                self._trouble = "its keys cannot be had"
                self._keys = _import(await self._fetch())
                self._fetched, self._trouble = self._now(), ""
        if self._trouble or self._old(self._fetched, KEYS_KEPT_S):
            raise Trouble(self._trouble or "its keys are too old")
        return self._found(number)

    def _old(self, since: float | None, most_s: float) -> bool:
        return since is None or abs(self._now() - since) >= most_s

    def _found(self, number: object) -> Sequence[Key]:
        return [key for key in self._keys if number is None or key.kid == number]

    async def _fetch(self) -> Mapping[str, Any]:
        if "://" in self._place:
            return await self._web.json(self._place)
        try:
            return _object(await asyncio.to_thread(_read_file, self._place))
        except OSError as error:
            raise Trouble(f"its keys cannot be read: {error.strerror}") from None


def _read_file(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(ANSWER_OCTETS_MAX + 1)


def _import(document: Mapping[str, Any]) -> list[Key]:
    """The public keys for signatures; others, and those that are not understood, are passed over.  RFC 7517 §5."""
    listed = document.get("keys")
    if not isinstance(listed, list):
        raise Trouble("its keys are no JWK set")
    keys: list[Key] = []
    for entry in listed[:KEYS_MAX]:
        if not isinstance(entry, dict) or entry.get("kty") not in _KINDS or entry.get("use", "sig") != "sig":
            continue
        try:
            keys.append(_KINDS[entry["kty"]].import_key(entry))
        except (JoseError, ValueError, TypeError, KeyError):
            continue
    return keys


def _object(octets: bytes) -> Mapping[str, Any]:
    """An answer of the issuer: a JSON object of bounded size."""
    if len(octets) > ANSWER_OCTETS_MAX:
        raise Trouble("its answer is too long")
    try:
        found = json.loads(octets)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Trouble("its answer is no JSON object")
    return found


class _Web:
    """HTTP, as much of it as an issuer needs.  The library is imported when it is wanted: most gates have no issuer."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def json(
        self, url: str, *, form: Mapping[str, str] | None = None, headers: Mapping[str, str] | None = None
    ) -> Mapping[str, Any]:
        """GET, or POST of a form.  No redirection is followed, and nothing is decompressed.

        Raises:
            Trouble: the answer is not 200, or no JSON object of bounded size, or there is none.
        """
        import aiohttp  # noqa: PLC0415 - see above

        if self._session is None:
            self._session = aiohttp.ClientSession(auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar())
        asked = {"Accept": "application/json", "Accept-Encoding": "identity", **(headers or {})}
        method = "GET" if form is None else "POST"
        try:
            async with self._session.request(method, url, data=form, headers=asked, allow_redirects=False) as answer:
                if answer.status != 200:
                    raise Trouble(f"it answers with status {answer.status}")
                octets = bytearray()
                async for chunk in answer.content.iter_any():
                    octets += chunk
                    if len(octets) > ANSWER_OCTETS_MAX:
                        raise Trouble("its answer is too long")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # What the library says may hold the whole URL; its kind says enough.
            raise Trouble(f"it cannot be asked ({type(error).__name__})") from None
        return _object(bytes(octets))

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()
