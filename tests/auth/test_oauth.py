"""Bearer tokens: against the keys of an issuer, and by asking it; an issuer that misbehaves."""

from __future__ import annotations

import asyncio
import json
import time
import warnings
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from aiohttp import web
from joserfc import jws, jwt
from joserfc.errors import SecurityWarning
from joserfc.jwk import ECKey, OctKey, OKPKey, RSAKey
from tests.auth.parts import is_no, is_unknown, is_yes, tells

from gatepost.auth import Denied, Outcome, Unavailable, Verified, Verifier
from gatepost.auth.oauth import (
    ALGORITHMS,
    ANSWER_OCTETS_MAX,
    KEYS_AGAIN_S,
    KEYS_KEPT_S,
    KEYS_MAX,
    LEEWAY_S,
    OauthVerifier,
)
from gatepost.auth.settings import OauthIssuer
from gatepost.smtp.sasl import Password, Token

NOW = 1_800_000_000.0
RSA = RSAKey.generate_key(2048, {"kid": "rsa", "use": "sig"}, private=True)
KEYS: dict[str, Any] = {
    "RS256": RSA,
    "PS256": RSA,
    "ES256": ECKey.generate_key("P-256", {"kid": "p256"}, private=True),
    "ES512": ECKey.generate_key("P-521", {"kid": "p521"}, private=True),
    "Ed25519": OKPKey.generate_key("Ed25519", {"kid": "ed"}, private=True),
    "EdDSA": OKPKey.generate_key("Ed25519", {"kid": "ed2"}, private=True),
}
CLAIMS: dict[str, Any] = {
    "iss": "https://id.example.com",
    "aud": "gatepost",
    "email": "Alice@example.com",
    "exp": int(NOW) + 600,
    "scope": "openid smtp",
}
WANTED: dict[str, Any] = {"issuer": "https://id.example.com", "audience": "gatepost", "scope": "smtp"}


def public(*keys: Any) -> dict[str, Any]:
    return {"keys": [key.as_dict(private=False) for key in keys]}


def signed(claims: dict[str, Any] | None = None, algorithm: str = "RS256", key: Any = None, **header: Any) -> str:
    key = key or KEYS[algorithm]
    fields = {"alg": algorithm, "kid": key.kid, **header}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecurityWarning)  # an issuer may still call it EdDSA
        return jws.serialize_compact(fields, json.dumps(claims or CLAIMS), key, algorithms=[algorithm])


class Clock:
    def __init__(self) -> None:
        self.time = NOW

    def __call__(self) -> float:
        return self.time


class Issuer:
    """An issuer's web server: /keys and /introspect, each an answer that a test may change."""

    def __init__(self) -> None:
        self.keys: Any = public(*{id(key): key for key in KEYS.values()}.values())
        self.answer: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None
        self.introspection: Any = {"active": False}
        self.asked: list[tuple[str, dict[str, str], str]] = []
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_route("*", "/{name}", self._respond)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.path, dict(request.headers), await request.text()))
        if self.answer is not None:
            return await self.answer(request)
        return web.json_response(self.keys if request.path == "/keys" else self.introspection)


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    async with Issuer() as one:
        yield one


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def verifier(issuer: Issuer, clock: Clock) -> AsyncIterator[OauthVerifier]:
    """By the issuer's keys, with everything wanted that can be."""
    one = OauthVerifier(OauthIssuer(jwks=f"{issuer.url}/keys", **WANTED), now=clock)
    yield one
    await one.close()


@pytest.fixture
async def asking(issuer: Issuer, clock: Clock) -> AsyncIterator[OauthVerifier]:
    """By introspection."""
    settings = OauthIssuer(introspection=f"{issuer.url}/introspect", client_id="gate", client_secret="s:cret +%")
    one = OauthVerifier(settings, now=clock)
    yield one
    await one.close()


# ---- keys


@pytest.mark.parametrize("algorithm", KEYS)
async def test_a_token_that_the_issuer_has_signed(verifier: OauthVerifier, algorithm: str) -> None:
    token = Token("alice@example.com", signed(algorithm=algorithm))
    assert is_yes(await verifier.verify(token), "alice@example.com")


@pytest.mark.parametrize("named", ["", "alice@example.com", "ALICE@EXAMPLE.COM"])
async def test_whom_the_client_may_name(verifier: OauthVerifier, named: str) -> None:
    assert is_yes(await verifier.verify(Token(named, signed())), "alice@example.com")


@pytest.mark.parametrize("named", ["bob@example.com", "alice", "alice@example.com.evil.test", "Alicé@example.com"])
async def test_a_token_of_another_account_is_a_no(verifier: OauthVerifier, named: str) -> None:
    assert await verifier.verify(Token(named, signed())) == Denied("the token is another account's")


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True),
        ({"exp": NOW - LEEWAY_S + 1}, True),
        ({"exp": NOW - LEEWAY_S}, False),
        ({"exp": NOW - LEEWAY_S - 1}, False),
        ({"exp": None}, False),
        ({"exp": True}, False),
        ({"exp": "never"}, False),
        ({"exp": float("inf")}, False),
        ({"exp": float("nan")}, False),
        ({"nbf": NOW + LEEWAY_S}, True),
        ({"nbf": NOW + LEEWAY_S + 1}, False),
        ({"nbf": "now"}, False),
        ({"iss": "https://id.example.com/"}, False),
        ({"iss": None}, False),
        ({"iss": ["https://id.example.com"]}, False),
        ({"aud": ["other", "gatepost"]}, True),
        ({"aud": ["other"]}, False),
        ({"aud": "other gatepost"}, False),
        ({"aud": None}, False),
        ({"aud": {"gatepost": 1}}, False),
        ({"scope": "smtp"}, True),
        ({"scope": "smtps openid"}, False),
        ({"scope": None}, False),
        ({"scope": None, "scp": ["smtp", 1]}, True),
        ({"scope": None, "scp": "imap smtp"}, True),
        ({"email": None}, False),
        ({"email": 7}, False),
        ({"email": ""}, False),
        ({"email": "a\r\nb"}, False),
        ({"email": "x" * 300}, False),
        ({"email_verified": True}, True),
        ({"email_verified": False}, False),
        ({"email_verified": "true"}, False),
    ],
)
async def test_what_a_token_must_say(verifier: OauthVerifier, change: dict[str, Any], good: bool) -> None:
    claims = {name: value for name, value in (CLAIMS | change).items() if value is not None}
    outcome = await verifier.verify(Token("", signed(claims)))
    assert isinstance(outcome, Verified if good else Denied), outcome


async def test_nothing_is_wanted_that_the_settings_do_not_name(issuer: Issuer, clock: Clock) -> None:
    verifier = OauthVerifier(OauthIssuer(jwks=f"{issuer.url}/keys", user_claim="sub"), now=clock)
    assert is_yes(await verifier.verify(Token("", signed({"sub": "Alice", "exp": NOW + 1}))), "alice")
    await verifier.close()


def unsigned(header: dict[str, Any], claims: Any = None, signature: str = "") -> str:
    def part(value: Any) -> str:
        return b64encode(json.dumps(value).encode(), b"-_").decode().rstrip("=")

    return f"{part(header)}.{part(CLAIMS if claims is None else claims)}.{signature}"


def forged() -> dict[str, str]:
    stranger = RSAKey.generate_key(2048, {"kid": "rsa"}, private=True)
    with_public_key = OctKey.import_key(b64encode(RSA.as_der(private=False)), {"kid": "rsa"})
    good = signed()
    head, body, signature = good.split(".")
    other = unsigned({"alg": "RS256", "kid": "rsa"}, CLAIMS | {"email": "bob@example.com"}).split(".")[1]
    return {
        "another's key": signed(key=stranger),
        "none": unsigned({"alg": "none"}),
        "None": unsigned({"alg": "None", "kid": "rsa"}),
        "no algorithm": unsigned({"kid": "rsa"}),
        "algorithm is a list": unsigned({"alg": ["RS256"], "kid": "rsa"}),
        "public key as a secret": signed(algorithm="HS256", key=with_public_key),
        "no signature": f"{head}.{body}.",
        "cut signature": good[:-10],
        "other claims": f"{head}.{other}.{signature}",
        "unknown key": signed(kid="unknown"),
        "key is a list": unsigned({"alg": "RS256", "kid": ["rsa"]}, signature=signature),
        "its own key": signed(key=stranger, jwk=stranger.as_dict(private=False)),
        "another kind of key": unsigned({"alg": "ES256", "kid": "rsa"}, signature=signature),
        "empty": "",
        "no JWT": "opaque-token",
        "dots": "....",
        "encrypted": "a.b.c.d.e",
        "no JSON": "YQ.YQ.YQ",
        "claims are a list": jws.serialize_compact({"alg": "RS256", "kid": "rsa"}, "[]", RSA),
        "claims are no JSON": jws.serialize_compact({"alg": "RS256", "kid": "rsa"}, "x", RSA),
        "deep header": b64encode(b'{"a":' + b"[" * 5000).decode().rstrip("=") + ".YQ.YQ",
        "deep claims": jws.serialize_compact({"alg": "RS256", "kid": "rsa"}, "[" * 5000, RSA),
    }


async def test_a_token_that_the_issuer_has_not_signed(verifier: OauthVerifier) -> None:
    for how, token in forged().items():
        outcome = await verifier.verify(Token("", token))
        assert is_no(outcome), (how, outcome)
        assert not token or not tells(token, outcome)


async def test_a_token_without_a_key_number_may_be_signed_with_any(verifier: OauthVerifier) -> None:
    token = jwt.encode({"alg": "ES256"}, CLAIMS, KEYS["ES256"], algorithms=["ES256"])
    assert is_yes(await verifier.verify(Token("", token)), "alice@example.com")


async def test_secrets_among_the_keys_are_no_keys(issuer: Issuer, clock: Clock) -> None:
    """RFC 8725 §3.1: what is published must not be what makes a signature."""
    secret = OctKey.generate_key(256, {"kid": "oct"}, private=True)
    sealing = RSAKey.generate_key(2048, {"kid": "enc"}, private=True)
    for_sealing = {**sealing.as_dict(private=False), "use": "enc"}
    issuer.keys = {"keys": [secret.as_dict(private=True), for_sealing, {"kty": "AKP"}, 7, {}, {"kty": "RSA"}]}
    verifier = OauthVerifier(OauthIssuer(jwks=f"{issuer.url}/keys"), now=clock)
    assert is_no(await verifier.verify(Token("", signed(algorithm="HS256", key=secret))))
    assert is_no(await verifier.verify(Token("", signed(key=sealing))))
    await verifier.close()


def test_algorithms_are_for_public_keys() -> None:
    assert not [name for name in ALGORITHMS if name.startswith("HS") or name.lower() == "none"]


# ---- fetching keys


async def test_keys_are_fetched_once(verifier: OauthVerifier, issuer: Issuer) -> None:
    outcomes = await asyncio.gather(*(verifier.verify(Token("", signed())) for _ in range(20)))
    assert all(is_yes(outcome, "alice@example.com") for outcome in outcomes)
    assert len(issuer.asked) == 1


async def test_a_new_key_is_found_and_an_unknown_one_asked_for_seldom(
    verifier: OauthVerifier, issuer: Issuer, clock: Clock
) -> None:
    new = RSAKey.generate_key(2048, {"kid": "new"}, private=True)
    assert is_yes(await verifier.verify(Token("", signed())), "alice@example.com")
    issuer.keys = public(new)
    clock.time += KEYS_AGAIN_S - 1
    for _ in range(10):
        assert is_no(await verifier.verify(Token("", signed(key=new))))
    assert len(issuer.asked) == 1
    clock.time += 1
    assert is_yes(await verifier.verify(Token("", signed(key=new))), "alice@example.com")
    assert is_no(await verifier.verify(Token("", signed())))
    assert len(issuer.asked) == 2


@pytest.mark.parametrize(("after_s", "good"), [(KEYS_KEPT_S - 1, True), (KEYS_KEPT_S, False), (KEYS_KEPT_S + 1, False)])
async def test_a_key_that_was_withdrawn(
    verifier: OauthVerifier, issuer: Issuer, clock: Clock, after_s: float, good: bool
) -> None:
    token = Token("", signed(CLAIMS | {"exp": NOW + 2 * KEYS_KEPT_S}))
    assert is_yes(await verifier.verify(token), "alice@example.com")
    issuer.keys = public(KEYS["ES256"])
    clock.time += after_s
    assert isinstance(await verifier.verify(token), Verified if good else Denied)


async def test_an_issuer_that_is_gone(verifier: OauthVerifier, issuer: Issuer, clock: Clock) -> None:
    long = Token("", signed(CLAIMS | {"exp": NOW + 3 * KEYS_KEPT_S}))
    assert is_yes(await verifier.verify(long), "alice@example.com")

    async def broken(_request: web.Request) -> web.Response:
        return web.Response(status=503)

    issuer.answer = broken
    clock.time += KEYS_AGAIN_S
    for _ in range(5):
        assert is_unknown(await verifier.verify(Token("", signed(kid="unknown"))))
        assert is_yes(await verifier.verify(long), "alice@example.com")  # its key is known
    assert len(issuer.asked) == 2
    clock.time += KEYS_KEPT_S
    assert is_unknown(await verifier.verify(long))
    issuer.answer = None
    clock.time += KEYS_AGAIN_S
    assert is_yes(await verifier.verify(long), "alice@example.com")


async def test_keys_in_a_file(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "keys.json"
    verifier = OauthVerifier(OauthIssuer(jwks=str(path)), now=clock)
    outcome = await verifier.verify(Token("", signed()))
    assert outcome == Unavailable(f"{path}: its keys cannot be read: No such file or directory")
    path.write_text(json.dumps(public(RSA)))
    clock.time += KEYS_AGAIN_S
    assert is_yes(await verifier.verify(Token("", signed())), "alice@example.com")


@pytest.mark.parametrize("more", [-1, 0, 1])
async def test_as_many_keys_as_may_be(issuer: Issuer, clock: Clock, more: int) -> None:
    fill = [KEYS["ES256"].as_dict(private=False)] * (KEYS_MAX - 1 + more)
    issuer.keys = {"keys": [*fill, RSA.as_dict(private=False)]}
    verifier = OauthVerifier(OauthIssuer(jwks=f"{issuer.url}/keys"), now=clock)
    assert isinstance(await verifier.verify(Token("", signed())), Denied if more > 0 else Verified)
    await verifier.close()


# ---- an issuer that misbehaves


async def _status(request: web.Request) -> web.StreamResponse:
    return web.Response(status=500, text="{}")


async def _redirect(request: web.Request) -> web.StreamResponse:
    return web.Response(status=302, headers={"Location": str(request.url)})


async def _html(request: web.Request) -> web.StreamResponse:
    return web.Response(text="<html>")


async def _list(request: web.Request) -> web.StreamResponse:
    return web.json_response([{"active": True}])


async def _deep(request: web.Request) -> web.StreamResponse:
    return web.Response(text="[" * 100_000)


async def _flood(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b'{"keys": [' + b" " * 65536)


async def _cut(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b"{")
    assert request.transport is not None
    request.transport.abort()
    return response


async def _silent(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


@pytest.mark.parametrize("path", ["jwks", "introspection"])
@pytest.mark.parametrize("answer", [_status, _redirect, _html, _list, _deep, _flood, _cut, _silent])
async def test_trouble_is_never_an_answer(issuer: Issuer, clock: Clock, path: str, answer: Any) -> None:
    issuer.answer = answer
    settings: dict[str, Any] = {path: f"{issuer.url}/x", "timeout_s": 0.3 if answer is _silent else 20.0}
    verifier = OauthVerifier(OauthIssuer(**settings), now=clock)
    token = signed()
    outcome = await verifier.verify(Token("", token))
    assert is_unknown(outcome), outcome
    assert not tells(token, outcome)
    assert len(issuer.asked) == 1
    await verifier.close()


@pytest.mark.parametrize("keys", [{}, {"keys": {}}, {"keys": None}])
async def test_keys_that_are_no_set(issuer: Issuer, clock: Clock, keys: Any) -> None:
    issuer.keys = keys
    verifier = OauthVerifier(OauthIssuer(jwks=f"{issuer.url}/keys"), now=clock)
    assert is_unknown(await verifier.verify(Token("", signed())))
    await verifier.close()


async def test_nobody_answers(clock: Clock) -> None:
    async with Issuer() as issuer:
        url = issuer.url
    attempts: list[dict[str, Any]] = [
        {"jwks": url},
        {"introspection": url},
        {"jwks": "http://id.invalid/x"},
        {"jwks": "ftp://x/y"},
    ]
    for settings in attempts:
        verifier = OauthVerifier(OauthIssuer(**settings), now=clock)
        assert is_unknown(await verifier.verify(Token("", signed())))
        await verifier.close()


@pytest.mark.parametrize("more", [-1, 0, 1])
async def test_an_answer_as_long_as_may_be(issuer: Issuer, asking: OauthVerifier, more: int) -> None:
    text = json.dumps({"active": True, "email": "alice@example.com"})

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(text=text + " " * (ANSWER_OCTETS_MAX - len(text) + more))

    issuer.answer = answer
    outcome = await asking.verify(Token("", "opaque"))
    assert is_unknown(outcome) if more > 0 else is_yes(outcome, "alice@example.com")


# ---- introspection


async def test_what_the_issuer_is_asked(asking: OauthVerifier, issuer: Issuer) -> None:
    issuer.introspection = {"active": True, "email": "alice@example.com"}
    assert is_yes(await asking.verify(Token("alice@example.com", "opaque~token/+")), "alice@example.com")
    [(path, headers, form)] = issuer.asked
    assert path == "/introspect"
    assert form == "token=opaque~token%2F%2B&token_type_hint=access_token"
    assert headers["Authorization"] == "Basic " + b64encode(b"gate:s%3Acret+%2B%25").decode()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ({"active": True, "email": "alice@example.com"}, Verified),
        ({"active": True, "username": "Alice@example.com"}, Verified),
        ({"active": True, "email": "alice@example.com", "username": "bob"}, Verified),
        ({"active": True, "email": "alice@example.com", "exp": NOW + 1}, Verified),
        ({"active": True, "email": "alice@example.com", "exp": NOW - LEEWAY_S}, Denied),
        ({"active": True, "email": "alice@example.com", "exp": None}, Denied),
        ({"active": True, "email": "alice@example.com", "nbf": NOW + LEEWAY_S + 1}, Denied),
        ({"active": True, "email": "bob@example.com"}, Denied),
        ({"active": True}, Denied),
        ({"active": False, "email": "alice@example.com"}, Denied),
        ({"active": 1, "email": "alice@example.com"}, Denied),
        ({"active": "true", "email": "alice@example.com"}, Denied),
        ({"email": "alice@example.com"}, Denied),
        ({}, Denied),
    ],
)
async def test_what_the_issuer_says(asking: OauthVerifier, issuer: Issuer, answer: dict[str, Any], kind: type) -> None:
    issuer.introspection = answer
    outcome: Outcome = await asking.verify(Token("alice@example.com", "opaque"))
    assert isinstance(outcome, kind), outcome


async def test_the_issuer_is_asked_each_time(asking: OauthVerifier, issuer: Issuer) -> None:
    """A token that was good a moment ago may have been withdrawn."""
    issuer.introspection = {"active": True, "email": "alice@example.com"}
    assert is_yes(await asking.verify(Token("", "opaque")), "alice@example.com")
    issuer.introspection = {"active": False}
    assert is_no(await asking.verify(Token("", "opaque")))


async def test_a_password_is_not_for_this_verifier(clock: Clock) -> None:
    verifier: Verifier = OauthVerifier(OauthIssuer(jwks="/nowhere"), now=clock)
    assert is_no(await verifier.verify(Password("alice", "wonder")))
    assert verifier.name == "oauth"
    await verifier.close()


async def test_the_clock_that_is_passed_in_may_be_the_real_one(issuer: Issuer) -> None:
    verifier = OauthVerifier(OauthIssuer(jwks=f"{issuer.url}/keys"), now=time.time)
    assert is_yes(await verifier.verify(Token("", signed(CLAIMS | {"exp": time.time() + 60}))), "alice@example.com")
    await verifier.close()
