"""SCRAM-SHA-256 and SCRAM-SHA-256-PLUS, the server's side: a login at which no secret is sent.

Why: a client that knows SCRAM never shows its password, not even to a gate that somebody took over; and with a channel
    binding no one in the middle of the TLS connection can pass the login on.
Trust: every message is a stranger's, bounded before it is looked at; what is compared is compared in constant time.
Promise: never raises on what a peer sent.  A name that nobody has, a locked account and a bait are asked and answered
    as any other account: with a salt that is always the same for the name, and a refusal after the proof.  A client
    that was made to believe that there is no channel binding, where there is one, is refused.
    Which wrong secret was used cannot be told: a proof depends on both nonces, and two proofs by one wrong secret have
    nothing in common.  ``user`` is known from the first message on; whoever counts guesses must count exchanges.
Sources: RFC 5802 (SCRAM), RFC 7677 (SHA-256), RFC 5929 and RFC 9266 (channel bindings), RFC 4954 §4 (the server's last
    message is a challenge, answered by an empty response).
    An account may have several secrets: they share salt and iteration count, so that one server-first-message serves
    them all, and the proof is tried on each.
    Keys are made by the library scramp.  The exchange is ours, because that library takes neither an authorization
    identity nor the channel binding tls-exporter, the one that TLS 1.3 has; the tests hold it against the library's
    client and the example of RFC 7677 §3.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple, Protocol

from gatepost.auth import Denied, Unavailable, Verified
from gatepost.smtp.reply import Reply
from gatepost.smtp.sasl import USER_OCTETS_MAX, Challenge, prepare_user

SCRAM, SCRAM_PLUS = "SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"
KEY_OCTETS = hashlib.sha256().digest_size

NONCE_OCTETS_MAX = 200  # of the client; with ours, a salt and a count it fits the line of one challenge
MESSAGE_OCTETS_MAX = 2048  # a client-first-message: names whose every octet is escaped, the nonce, extensions

_MALFORMED = Reply(501, "The response is not what the mechanism asks for", "5.5.2")
_INVALID = Reply(535, "Authentication credentials invalid", "5.7.8")
_DOWNGRADE = Reply(535, "Channel binding is supported here, and was offered", "5.7.8")
_NO_SUCH_BINDING = Reply(535, "There is no such channel binding on this connection", "5.7.8")
_OTHER_CHANNEL = Reply(535, "The channel binding does not match: somebody stands between", "5.7.8")
_OTHER_NONCE = Reply(535, "The nonce is not the one of this exchange", "5.7.8")

# RFC 5802 §7.  An "m=" before the name is a mandatory extension, of which there are none: it does not match.
_NAME = r"(?:[^,=\0]|=2C|=3D)+"
_NONCE = r"[\x21-\x2b\x2d-\x7e]+"
_EXTENSIONS = r"(?:,[A-Za-z]=[^,\0]+)*"
_CLIENT_FIRST = re.compile(rf"((n|y|p=([A-Za-z0-9.-]+)),(?:a=({_NAME}))?,)(n=({_NAME}),r=({_NONCE}){_EXTENSIONS})")
_CLIENT_FINAL = re.compile(rf"(c=([A-Za-z0-9+/=]+),r=({_NONCE}){_EXTENSIONS}),p=([A-Za-z0-9+/=]+)")


@dataclass(frozen=True, slots=True)
class ScramKeys:
    """What the server keeps of a secret.  RFC 5802 §3."""

    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)


class ScramRecord(NamedTuple):
    """What an exchange needs to know of an account; the same shape for one that is not there.

    Attributes:
        salt, iterations: of all its secrets.
        keys: its secrets, each with the label of a device, "" for the account's own password.
        refusal: why even a right proof is refused, "" where it is not.
    """

    account: str
    salt: bytes
    iterations: int
    keys: tuple[tuple[str, ScramKeys], ...]
    refusal: str = ""


class Records(Protocol):
    """Where accounts are looked up."""

    async def scram(self, user: str) -> ScramRecord | Unavailable:
        """The account's record, or a likeness of one where there is no such account."""
        ...

    async def used(self, account: str, device: str) -> None:
        """The device has just logged in.  Does not raise."""
        ...


def load_library() -> None:
    """Load what ``derive`` needs, while it can be read."""
    import scramp  # type: ignore[import-untyped]  # noqa: F401, PLC0415


def derive(secret: str, salt: bytes, iterations: int) -> ScramKeys:
    """The keys of a secret, which is prepared as RFC 5802 §2.2 has it.

    Raises:
        ValueError: it holds characters that SASLprep (RFC 4013) forbids, so that no client could prepare it either.
    """
    # Loaded here: it brings 4 MiB of ASN.1, and a worker makes no keys.
    from scramp import ScramException, ScramMechanism  # noqa: PLC0415

    try:
        _, stored_key, server_key, _ = ScramMechanism(SCRAM).make_auth_info(secret, iterations, salt)
    except ScramException:
        raise ValueError("it holds characters that not every client can send") from None
    return ScramKeys(stored_key, server_key)


class _Stage(Enum):
    FIRST = auto()
    FINAL = auto()
    ACKNOWLEDGED = auto()
    OVER = auto()


class ScramExchange:
    """One exchange.

    Args:
        mechanism: "SCRAM-SHA-256" or "SCRAM-SHA-256-PLUS".
        bindings: names of channel bindings with their data; not empty means that -PLUS was offered.
        nonce: ours, fresh and not to be guessed; printable, without a comma.

    Attributes:
        user: whom it is about, prepared; "" until the first message told it.
        authzid: the account to act for, prepared; "" where none was given.  For the caller to judge.
    """

    __slots__ = (
        "_bindings",
        "_channel",
        "_expected_nonce",
        "_first_bare",
        "_nonce",
        "_outcome",
        "_plus",
        "_record",
        "_records",
        "_server_first",
        "_stage",
        "authzid",
        "user",
    )

    def __init__(self, mechanism: str, records: Records, bindings: Mapping[str, bytes], nonce: str) -> None:
        self._plus = mechanism == SCRAM_PLUS
        self._records = records
        self._bindings = bindings
        self._nonce = nonce
        self._stage = _Stage.FIRST
        self._record = ScramRecord("", b"", 0, ())
        self._outcome: Verified | Denied = Denied("the exchange was not completed")
        self._channel = self._first_bare = self._server_first = b""
        self._expected_nonce = ""
        self.user = ""
        self.authzid = ""

    async def step(self, response: bytes | None) -> Challenge | Verified | Denied | Unavailable | Reply:
        """Take a decoded response in, and say what it makes.

        Args:
            response: hostile; None once, at the start, where the client gave no initial response.
        """
        if response is None and self._stage is _Stage.FIRST:
            return Challenge(b"")
        stage, self._stage = self._stage, _Stage.OVER  # a step that does not lead on ends the exchange
        if response is None or len(response) > MESSAGE_OCTETS_MAX:
            return _MALFORMED
        try:
            message = response.decode("utf-8")
        except UnicodeDecodeError:
            return _MALFORMED
        if stage is _Stage.FIRST:
            return await self._first(message)
        if stage is _Stage.FINAL:
            return await self._final(message)
        if stage is _Stage.ACKNOWLEDGED and not message:
            return self._outcome
        return _MALFORMED

    async def _first(self, message: str) -> Challenge | Unavailable | Reply:
        match = _CLIENT_FIRST.fullmatch(message)
        if match is None or len(match[7]) > NONCE_OCTETS_MAX:
            return _MALFORMED
        header, flag, binding, authzid, bare, user, nonce = match.groups()
        channel = b""
        if flag[0] == "p":
            if not self._plus or binding not in self._bindings:
                return _NO_SUCH_BINDING  # RFC 5802 §6: MUST fail
            channel = self._bindings[binding]
        elif flag == "y" and self._bindings:
            return _DOWNGRADE  # RFC 5802 §6: somebody took -PLUS out of our list on its way to the client
        elif self._plus:
            return _MALFORMED  # RFC 5802 §6: -PLUS without "p"
        prepared, prepared_authzid = _unescaped(user), _unescaped(authzid) if authzid else ""
        if prepared is None or prepared_authzid is None:
            return _INVALID
        record = await self._records.scram(prepared)
        if isinstance(record, Unavailable):
            return record
        self.user = prepared
        self.authzid = "" if prepared_authzid == prepared else prepared_authzid
        self._record = record
        self._channel = header.encode() + channel
        self._first_bare = bare.encode()
        self._expected_nonce = nonce + self._nonce
        salt = base64.b64encode(record.salt).decode("ascii")
        self._server_first = f"r={self._expected_nonce},s={salt},i={record.iterations}".encode("ascii")
        self._stage = _Stage.FINAL
        return Challenge(self._server_first)

    async def _final(self, message: str) -> Challenge | Denied | Reply:
        match = _CLIENT_FINAL.fullmatch(message)
        if match is None:
            return _MALFORMED
        without_proof, channel_text, nonce, proof_text = match.groups()
        try:
            channel = base64.b64decode(channel_text, validate=True)
            proof = base64.b64decode(proof_text, validate=True)
        except binascii.Error:
            return _MALFORMED
        if not hmac.compare_digest(channel, self._channel):
            return _OTHER_CHANNEL
        if not hmac.compare_digest(nonce, self._expected_nonce):
            return _OTHER_NONCE
        if len(proof) != KEY_OCTETS:
            return _MALFORMED
        auth_message = b",".join((self._first_bare, self._server_first, without_proof.encode()))
        record = self._record
        proved: tuple[str, ScramKeys] | None = None
        for device, keys in record.keys:  # all of them: which one it was is not to be told by the time it takes
            if _proves(proof, keys.stored_key, auth_message):
                proved = device, keys
        if record.refusal:
            return Denied(record.refusal)
        if proved is None:
            return Denied("wrong password")
        device, keys = proved
        if device:
            await self._records.used(record.account, device)
        self._outcome = Verified(record.account, device=device)
        self._stage = _Stage.ACKNOWLEDGED
        signature = hmac.digest(keys.server_key, auth_message, "sha256")
        return Challenge(b"v=" + base64.b64encode(signature))


def _proves(proof: bytes, stored_key: bytes, auth_message: bytes) -> bool:
    """Whether whoever made the proof knows the secret.  RFC 5802 §3: ClientKey = ClientProof XOR ClientSignature."""
    signature = hmac.digest(stored_key, auth_message, "sha256")
    client_key = bytes(one ^ other for one, other in zip(proof, signature, strict=True))
    return hmac.compare_digest(hashlib.sha256(client_key).digest(), stored_key)


def _unescaped(name: str) -> str | None:
    """RFC 5802 §5.1: "=2C" and "=3D" stand for a comma and an equals sign."""
    if len(name) > 3 * USER_OCTETS_MAX:
        return None
    return prepare_user(name.replace("=2C", ",").replace("=3D", "="))
