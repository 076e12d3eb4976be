"""SASL exchanges as steps: a client's responses in; a challenge, credentials or a refusal out.

Why: what a client types as a login becomes one value here, so that whoever verifies it never sees octets, and two
    spellings of one user name are never two users.
Trust: every response is a stranger's, up to AUTH_OCTETS_MAX octets of base64.
Promise: never raises on what a peer sent, decides nothing and remembers no secret.  A user name is printable, without
    outer spaces, and has one spelling; no part is longer than its limit; no ``repr`` shows a secret or a token.
Sources: RFC 4422 (SASL), RFC 4954 §4 (AUTH), RFC 4616 (PLAIN), draft-murchison-sasl-login (LOGIN), RFC 7628
    (OAUTHBEARER), RFC 5801 §4 (its header), RFC 6750 §2.1 (tokens), Google's description of XOAUTH2.
    Preparation: secrets as OpaqueString of RFC 8265 §4.2, but that characters are not judged by whether the Unicode of
    this Python knows them: that could only lock somebody out.  User names in NFC; their case is kept, for each verifier
    has its own mind about it; characters that only stand for others (fullwidth letters) or are invisible are refused,
    as IdentifierClass of RFC 8264 §4.2 has it; wider than it: spaces inside and all printable ASCII ("DOMAIN\\user").
    SASLprep (RFC 4013) is not applied: where it agrees with PRECIS nothing changes, and where it does not (NFKC of a
    password) a verifier elsewhere would not know the password again.
"""

from __future__ import annotations

import base64
import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from gatepost.smtp.reply import LINE_OCTETS_MAX, Reply

USER_OCTETS_MAX = 256
SECRET_OCTETS_MAX = 1024
TOKEN_OCTETS_MAX = 8192  # with a user name and base64 it fits a line of AUTH_OCTETS_MAX
CHALLENGE_OCTETS_MAX = (LINE_OCTETS_MAX - len(b"334 \r\n")) // 4 * 3  # what one reply line holds as base64

# RFC 4648 §4, with all of its padding and nothing else; how strict Python's own decoder is depends on its version.
BASE64 = rb"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"

_CANCELLED = Reply(501, "Authentication cancelled", "5.7.0")  # RFC 4954 §4
_BAD_BASE64 = Reply(501, "The response is not base64", "5.5.2")  # RFC 4954 §4
_BAD_MESSAGE = Reply(501, "The response is not what the mechanism asks for", "5.5.2")
_INVALID = Reply(535, "Authentication credentials invalid", "5.7.8")  # RFC 4954 §6

_BASE64 = re.compile(BASE64)
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750 §2.1: b64token
_BEARER = re.compile(r"Bearer +([^ ]+) *", re.IGNORECASE | re.ASCII)
_XOAUTH2 = re.compile(r"user=([^\x01]*)\x01auth=([^\x01]*)\x01\x01")
_GS2_HEADER = re.compile(r"[ny],(?:a=((?:[^,=\0\x01]|=2C|=3D)+))?,")  # RFC 5801 §4, without channel binding
_PAIR = re.compile(r"([A-Za-z]+)=([\x20-\x7e\t\r\n]*)")  # RFC 7628 §3.1


@dataclass(frozen=True, slots=True)
class Password:
    """A user name and a secret.

    Attributes:
        user, secret: prepared as this module's header says, never empty.
        authzid: the account to act for, prepared; "" where none was given or it is ``user`` itself.  That of another
            account is for the caller to refuse.
    """

    user: str
    secret: str = field(repr=False)
    authzid: str = ""


@dataclass(frozen=True, slots=True)
class Token:
    """An OAuth 2.0 bearer token.  ``user``: whom the client says it is for, prepared; "" where it named nobody."""

    user: str
    token: str = field(repr=False)


class Challenge(NamedTuple):
    """What the client is asked, in plain octets, at most CHALLENGE_OCTETS_MAX."""

    octets: bytes

    @property
    def reply(self) -> Reply:
        """334 with the challenge in base64.  RFC 4954 §4."""
        assert len(self.octets) <= CHALLENGE_OCTETS_MAX, "a challenge of ours that no reply line holds"
        return Reply(334, base64.b64encode(self.octets).decode("ascii"))


class Exchange(Protocol):
    """One authentication exchange, the server's side."""

    def step(self, response: bytes | None) -> Challenge | Password | Token | Reply:
        """Take a decoded response in, and say what it makes: another challenge, credentials, or a refusal.

        Args:
            response: hostile; None once, at the start, where the client gave no initial response.
        """
        ...

    def denied(self) -> Challenge | None:
        """What a client whose credentials were refused is still asked; one more ``step`` then gives the 535.

        None where the 535 follows at once.
        """
        ...


def exchange(mechanism: str) -> Exchange | None:
    """A new exchange; None for a mechanism that is not known here.

    Args:
        mechanism: upper case, as ``command.Auth`` has it.
    """
    if mechanism == "LOGIN":
        return _Login()
    read = _READERS.get(mechanism)
    return None if read is None else _OneMessage(read, _DENIALS.get(mechanism))


def decode(line: bytes) -> bytes | Reply:
    """The response that a line of the exchange holds, or the reply that ends the exchange.  RFC 4954 §4.

    Args:
        line: hostile; base64 without CRLF, or "*".
    """
    if line == b"*":
        return _CANCELLED
    return base64.b64decode(line) if _BASE64.fullmatch(line) else _BAD_BASE64


def prepare_user(text: str) -> str | None:
    """The one spelling of a user name, or None for a name that is not taken; see the header for what is done."""
    if len(text) > USER_OCTETS_MAX:
        return None
    user = unicodedata.normalize("NFC", text)
    if not user.isprintable() or user.strip(" ") != user or unicodedata.normalize("NFKC", user) != user:
        return None
    return user if 0 < len(user.encode()) <= USER_OCTETS_MAX else None


def prepare_secret(text: str) -> str | None:
    """A secret as it is compared, or None for one that is not taken: empty, too long, or with control characters.

    Source: RFC 8265 §4.2.2.
    """
    if len(text) > SECRET_OCTETS_MAX:
        return None
    secret = "".join(" " if unicodedata.category(character) == "Zs" else character for character in text)
    secret = unicodedata.normalize("NFC", secret)
    if any(unicodedata.category(character) == "Cc" for character in secret):
        return None
    return secret if 0 < len(secret.encode()) <= SECRET_OCTETS_MAX else None


# --- The server's side ------------------------------------------------------------------------------------------------


class _OneMessage:
    """PLAIN, XOAUTH2, OAUTHBEARER: the client says all in one message.

    Args:
        read: the message to credentials.
        denial: what a client is told before the 535; None for nothing.
    """

    __slots__ = ("_denial", "_denied", "_read")

    def __init__(self, read: Callable[[str], Password | Token | Reply], denial: bytes | None) -> None:
        self._read = read
        self._denial = denial
        self._denied = False

    def step(self, response: bytes | None) -> Challenge | Password | Token | Reply:
        if self._denied:
            return _INVALID  # RFC 7628 §3.2.3: whatever the client says, a dummy is all that it may say
        if response is None:
            return Challenge(b"")
        message = _text(response)
        return _BAD_MESSAGE if message is None else self._read(message)

    def denied(self) -> Challenge | None:
        if self._denial is None:
            return None
        self._denied = True
        return Challenge(self._denial)


class _Login:
    """LOGIN: the user name, then the secret."""

    __slots__ = ("_user",)

    def __init__(self) -> None:
        self._user: str | None = None

    def step(self, response: bytes | None) -> Challenge | Password | Token | Reply:
        if response is None:
            return Challenge(b"Username:")
        message = _text(response)
        if message is None:
            return _BAD_MESSAGE
        if self._user is not None:
            secret = prepare_secret(message)
            return _INVALID if secret is None else Password(self._user, secret)
        self._user = prepare_user(message)
        return _INVALID if self._user is None else Challenge(b"Password:")

    def denied(self) -> Challenge | None:
        return None


def _text(response: bytes) -> str | None:
    try:
        return response.decode("utf-8")  # strict: neither overlong forms nor surrogates
    except UnicodeDecodeError:
        return None


def _plain(message: str) -> Password | Token | Reply:
    """[authzid] NUL authcid NUL passwd.  RFC 4616 §2."""
    parts = message.split("\0")
    if len(parts) != 3:
        return _BAD_MESSAGE
    user, secret = prepare_user(parts[1]), prepare_secret(parts[2])
    authzid = prepare_user(parts[0]) if parts[0] else ""
    if user is None or secret is None or authzid is None:
        return _INVALID
    return Password(user, secret, "" if authzid == user else authzid)


def _xoauth2(message: str) -> Password | Token | Reply:
    """user=NAME ^A auth=Bearer TOKEN ^A ^A."""
    match = _XOAUTH2.fullmatch(message)
    return _BAD_MESSAGE if match is None else _token(match[1], match[2])


def _oauthbearer(message: str) -> Password | Token | Reply:
    """A header of RFC 5801 §4, then pairs, each ended by ^A, and one more ^A.  RFC 7628 §3.1.

    Host and port, and whatever other pairs there are, confer nothing and are passed over.
    """
    header = _GS2_HEADER.match(message)
    if header is None:
        return _BAD_MESSAGE
    first, *pairs = message[header.end() :].split("\x01")
    if first or pairs[-2:] != ["", ""]:
        return _BAD_MESSAGE
    values: dict[str, str] = {}
    for pair in pairs[:-2]:
        match = _PAIR.fullmatch(pair)
        if match is None or match[1] in values:
            return _BAD_MESSAGE
        values[match[1]] = match[2]
    user = header[1] or ""
    return _token(user.replace("=2C", ",").replace("=3D", "="), values.get("auth", ""))


def _token(user: str, authorization: str) -> Token | Reply:
    """``authorization`` is what an Authorization field of HTTP would hold."""
    match = _BEARER.fullmatch(authorization)
    if match is None or _TOKEN.fullmatch(match[1]) is None:
        return _BAD_MESSAGE
    prepared = prepare_user(user) if user else ""
    if prepared is None or len(match[1]) > TOKEN_OCTETS_MAX:
        return _INVALID
    return Token(prepared, match[1])


_READERS: Final[dict[str, Callable[[str], Password | Token | Reply]]] = {
    "PLAIN": _plain,
    "XOAUTH2": _xoauth2,
    "OAUTHBEARER": _oauthbearer,
}
# RFC 7628 §3.2.2; clients of XOAUTH2 look for the status that Google gives them.
_DENIALS: Final = {
    "XOAUTH2": json.dumps({"status": "401", "schemes": "bearer"}).encode(),
    "OAUTHBEARER": json.dumps({"status": "invalid_token"}).encode(),
}


# --- The client's side: our own logins at other servers ---------------------------------------------------------------


def client_initial(mechanism: str, credentials: Password | Token) -> bytes:
    """The first response, in plain octets.

    That of LOGIN is the user name: it is sent as the answer to the first challenge, since not every server takes it
    together with the command; ``client_secret`` is the answer to the second.

    Args:
        mechanism: PLAIN or LOGIN for a Password, XOAUTH2 or OAUTHBEARER for a Token.

    Raises:
        ValueError: the mechanism does not go with the credentials.
    """
    match mechanism, credentials:
        case "PLAIN", Password(user, secret, authzid):
            return f"{authzid}\0{user}\0{secret}".encode()
        case "LOGIN", Password(user):
            return user.encode()
        case "XOAUTH2", Token(user, token):
            return f"user={user}\x01auth=Bearer {token}\x01\x01".encode()
        case "OAUTHBEARER", Token(user, token):
            name = user.replace("=", "=3D").replace(",", "=2C")
            return f"n,{f'a={name}' if name else ''},\x01auth=Bearer {token}\x01\x01".encode()
    raise ValueError(f"{mechanism} does not take a {type(credentials).__name__}")


def client_secret(credentials: Password) -> bytes:
    """The answer to the second challenge of LOGIN, in plain octets."""
    return credentials.secret.encode()
