"""The trace field: the one thing that the gate adds to a message.

Why: whoever complains about a message holds its header section.  The token in our Received field tells the operator,
    and nobody else, which session, client and account it came from, even when the logs are gone.
Trust: the hello name is the client's text; only octets of an allow-list reach the field, so that it can never carry a
    line end, a comment's end or another field.
Promise: one field, folded, no line over 998 octets; the token is authenticated encryption under a key of this gate.
    The newest key seals, and every key that is still there reads.
Sources: RFC 5321 §4.4 (trace information), RFC 3848 and RFC 6531 §4.3 (with protocol types), RFC 5297 (AES-SIV).
"""

from __future__ import annotations

import base64
import os
import re
import struct
from collections.abc import Sequence
from email.utils import formatdate
from fnmatch import fnmatchcase
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from stat import S_ISREG
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
_NUMBERED = re.compile(r"trace(?:-([2-9]|[1-9][0-9]{1,8}))?\.key")


class TraceRecord(NamedTuple):
    """What a token says.

    Attributes:
        seconds: since the epoch.
        key: the name of the file of the key that sealed it, "" for a key that stands in none.
    """

    seconds: int
    client: IPAddress
    reference: str
    account: str
    key: str = ""


class KeyFile(NamedTuple):
    """One key below the data directory.

    Attributes:
        number: the greatest is the key that seals; 0 for a file that was put there under a name of its own, to be read
            with.
        made: seconds since the epoch, as the file has it.
        key: b"" where it cannot be used; problem: why not, "" where it can.
    """

    path: Path
    number: int
    made: float
    key: bytes
    problem: str = ""

    @property
    def name(self) -> str:
        """Of the file, without its directory."""
        return self.path.name


def key_files(data: str) -> list[KeyFile]:
    """All keys of this gate, the newest first; nothing is made.

    Raises:
        StorageError: nobody can tell which there are.
    """
    directory = Path(data) / "keys"
    try:
        paths = [path for path in directory.iterdir() if fnmatchcase(path.name, "trace*.key")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot use the trace keys in {directory}: {error.strerror}") from error
    files = [_key_file(path) for path in paths]
    return sorted(files, key=lambda file: (-file.number, -file.made, file.name))


def _key_file(path: Path) -> KeyFile:
    numbered = _NUMBERED.fullmatch(path.name)
    number = int(numbered[1] or 1) if numbered is not None else 0
    try:
        # What stands there may be a pipe, whose reader would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            octets = os.read(descriptor, KEY_OCTETS + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        return KeyFile(path, number, 0.0, b"", error.strerror or str(error))
    if not S_ISREG(status.st_mode) or len(octets) != KEY_OCTETS:
        return KeyFile(path, number, status.st_mtime, b"", f"it is no file of {KEY_OCTETS} octets")
    return KeyFile(path, number, status.st_mtime, octets)


def rotate(data: str) -> KeyFile:
    """Make the key that seals from the gate's next start or reload on; those before it stay, to be read with.

    Raises:
        StorageError: it cannot be made, or somebody else made one at this moment.
    """
    number = max((file.number for file in key_files(data)), default=0) + 1
    path = Path(data) / "keys" / ("trace.key" if number == 1 else f"trace-{number}.key")
    key = os.urandom(KEY_OCTETS)
    try:
        write_once(path, key)
        made = _key_file(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)  # before anything is sealed with it
        finally:
            os.close(directory)
    except OSError as error:
        raise StorageError(f"cannot make the trace key {path}: {error.strerror}") from error
    if made.key != key:
        raise StorageError(f"{path} was made at the same moment by somebody else; nothing else was made")
    return made


class TraceReader:
    """What tokens say, whichever of these keys sealed them.

    A token names no key: it is tried with each, the newest first, for 2 us each (docs/decisions/0015).
    """

    __slots__ = ("_ciphers", "files")

    def __init__(self, files: Sequence[KeyFile]) -> None:
        self.files = files
        self._ciphers = [(file.name, AESSIV(file.key)) for file in files if not file.problem]

    @classmethod
    def in_data(cls, data: str) -> TraceReader:
        """All keys below the data directory that can be used; nothing is made.

        Raises:
            StorageError: nobody can tell which there are.
        """
        return cls(key_files(data))

    @property
    def keys(self) -> int:
        """How many can be used."""
        return len(self._ciphers)

    def read(self, token: str) -> TraceRecord | None:
        """What a token of ours says; None for anything that none of the keys sealed."""
        try:
            sealed = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except ValueError:
            return None
        for name, cipher in self._ciphers:
            plain = _opened(cipher, sealed)
            if plain is not None:
                seconds, packed, reference = _HEAD.unpack_from(plain)
                client = client_address(str(IPv6Address(packed)))
                account = plain[_HEAD.size :].decode("utf-8", "replace")
                return TraceRecord(seconds, client, reference.rstrip(b"\0").decode(), account, name)
        return None

    def retired(self, name: str) -> float | None:
        """When the key after this one was made, in seconds since the epoch; None where it is the newest, or none."""
        newer: float | None = None
        for file in self.files:
            if file.name == name:
                return newer if file.number else None
            newer = file.made
        return None


def _opened(cipher: AESSIV, sealed: bytes) -> bytes | None:
    try:
        return cipher.decrypt(sealed, _CONTEXT)
    except (ValueError, InvalidTag):
        return None


class TraceKey:
    """The key that this gate seals its tokens with."""

    __slots__ = ("_cipher", "_reader")

    def __init__(self, key: bytes, reader: TraceReader | None = None) -> None:
        self._cipher = AESSIV(key)
        self._reader = reader or TraceReader([KeyFile(Path(), 1, 0.0, key)])

    @classmethod
    def in_data(cls, data: str) -> TraceKey:
        """The newest key kept under the data directory, made at first use; what the older ones sealed is read as well.

        Raises:
            StorageError: it cannot be read or written.  An older key that cannot be used costs only what it sealed.
        """
        path = Path(data) / "keys" / "trace.key"
        files = key_files(data)
        try:
            if not any(file.number for file in files):
                write_once(path, os.urandom(KEY_OCTETS))
                files = key_files(data)
        except OSError as error:
            raise StorageError(f"cannot use the trace key {path}: {error}") from error
        newest = files[0] if files else KeyFile(path, 1, 0.0, b"", "it went away at this moment")
        if newest.problem:
            raise StorageError(
                f"cannot use the trace key {newest.path}: {newest.problem}; put it back, or move it away and make "
                "another: gatepost key rotate"
            )
        return cls(newest.key, TraceReader(files))

    def seal(self, session: Session, seconds: int) -> str:
        """The token for a message of this session."""
        address = session.client.address
        packed = address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed
        account = session.identity.account.encode()[:64] if session.identity else b""
        plain = _HEAD.pack(seconds & 0xFFFFFFFF, packed, session.reference.encode()[:8]) + account
        return base64.urlsafe_b64encode(self._cipher.encrypt(plain, _CONTEXT)).rstrip(b"=").decode()

    def read(self, token: str) -> TraceRecord | None:
        """As ``TraceReader.read``, with all keys."""
        return self._reader.read(token)


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
