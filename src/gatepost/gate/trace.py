"""The trace field: the one thing that the gate adds to a message.

Why: whoever complains about a message holds its header section.  The token in our Received field tells the operator,
    and nobody else, which session, client and account it came from, even when the logs are gone.
Trust: the hello name is the client's text; only octets of an allow-list reach the field, so that it can never carry a
    line end, a comment's end or another field.
Promise: one field, folded, no line over 998 octets; the token is authenticated encryption under a key of this gate.
Sources: RFC 5321 §4.4 (trace information), RFC 3848 and RFC 6531 §4.3 (with protocol types), RFC 5297 (AES-SIV).
"""

from __future__ import annotations

import base64
import os
import re
import struct
from email.utils import formatdate
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from gatepost.errors import StorageError
from gatepost.facts import IPAddress, Session, client_address
from gatepost.gate.tls import write_once

_NOT_IN_HELLO = re.compile(r"[^A-Za-z0-9.:_\[\]-]")
_HELLO_MAX = 255
_HEAD = struct.Struct(">I16s8s")  # seconds, client (IPv4 as mapped), session reference
_CONTEXT = [b"gatepost trace 1"]
KEY_OCTETS = 64


class TraceRecord(NamedTuple):
    """What a token says.  seconds: since the epoch."""

    seconds: int
    client: IPAddress
    reference: str
    account: str


class TraceKey:
    """The key of this gate's tokens."""

    __slots__ = ("_cipher",)

    def __init__(self, key: bytes) -> None:
        self._cipher = AESSIV(key)

    @classmethod
    def in_data(cls, data: str) -> TraceKey:
        """The key kept under the data directory, made at first use.

        Raises:
            StorageError: it cannot be read or written.
        """
        path = Path(data) / "keys" / "trace.key"
        try:
            if not path.exists():
                write_once(path, os.urandom(KEY_OCTETS))
            return cls(path.read_bytes())
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot use the trace key {path}: {error}") from error

    def seal(self, session: Session, seconds: int) -> str:
        """The token for a message of this session."""
        address = session.client.address
        packed = address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed
        account = session.identity.account.encode()[:64] if session.identity else b""
        plain = _HEAD.pack(seconds & 0xFFFFFFFF, packed, session.reference.encode()[:8]) + account
        return base64.urlsafe_b64encode(self._cipher.encrypt(plain, _CONTEXT)).rstrip(b"=").decode()

    def read(self, token: str) -> TraceRecord | None:
        """What a token of ours says; None for anything that this key did not seal."""
        try:
            sealed = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
            plain = self._cipher.decrypt(sealed, _CONTEXT)
        except (ValueError, InvalidTag):
            return None
        seconds, packed, reference = _HEAD.unpack_from(plain)
        account = plain[_HEAD.size :].decode("utf-8", "replace")
        return TraceRecord(seconds, client_address(str(IPv6Address(packed))), reference.rstrip(b"\0").decode(), account)


class Dates:
    """RFC 5322 dates, made once a second."""

    __slots__ = ("_seconds", "_text")

    def __init__(self) -> None:
        self._seconds = -1
        self._text = ""

    def text(self, seconds: int) -> str:
        """The date-time of a trace field, in UTC.  RFC 5322 §3.3."""
        if seconds != self._seconds:
            self._seconds, self._text = seconds, formatdate(seconds)[:-5] + "+0000"
        return self._text


def trace_head(session: Session, name: str, *, utf8: bool) -> str:
    """The part of the trace field that says who and how, which a session's messages have in common.  RFC 5321 §4.4.

    Args:
        name: this gate's host name.
        utf8: the transaction has SMTPUTF8.
    """
    hello = _NOT_IN_HELLO.sub("?", session.hello[:_HELLO_MAX]) or "unknown"
    address = session.client.address
    text = str(address)  # an f-string would go the long way round
    literal = f"[{text}]" if isinstance(address, IPv4Address) else f"[IPv6:{text}]"
    if not session.esmtp:
        protocol = "SMTP"
    else:
        protocol = ("UTF8SMTP" if utf8 else "ESMTP") + ("S" if session.tls else "") + ("A" if session.identity else "")
    return f"Received: from {hello} ({literal})\r\n\tby {name} (Gatepost) with {protocol} id "


def trace_field(head: str, message: str, token: str, date: str) -> bytes:
    """Our Received field, CRLF included.  RFC 5321 §4.4.

    Args:
        head: from ``trace_head``; message: the reference of the message in the log; token: from ``TraceKey.seal``.
    """
    return f"{head}{message}\r\n\t(token {token});\r\n\t{date}\r\n".encode()
