"""Keyed pseudonyms: whoever holds the key finds a person's old entries by the person's name, nobody else does.

Why: after some weeks nobody needs to know who wrote to whom, but whether one account sent ten times as much as the
    others is worth knowing for longer.
Promise: the same name always has the same pseudonym under one key; without the key it cannot be turned back.  Domains
    stay: they are organisations.  A client's pseudonym is an address of the discard-only block, which is nobody's.
Sources: RFC 2104 (HMAC), RFC 6666 (100::/64), RFC 7693 (BLAKE2).
"""

from __future__ import annotations

import base64
import hashlib
import os
from contextlib import suppress
from ipaddress import IPv6Network
from pathlib import Path
from typing import Final

from gatepost.errors import StorageError

KEY_OCTETS: Final = 32
DISCARD: Final = IPv6Network("100::/64")
_DISCARD_PREFIX: Final = DISCARD.network_address.packed[:8]


class Pseudonyms:
    """What one key makes of names."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def in_data(cls, data: str, *, make: bool) -> Pseudonyms:
        """The key kept under the data directory.

        Args:
            make: one is made where there is none; else nothing that is asked for then has a pseudonym.

        Raises:
            StorageError: it cannot be read or written.
        """
        path = Path(data) / "keys" / "journal.key"
        try:
            if make and not path.exists():
                _write_once(path, os.urandom(KEY_OCTETS))
            key = path.read_bytes() if make or path.exists() else os.urandom(KEY_OCTETS)
        except OSError as error:
            raise StorageError(f"cannot use the journal's key {path}: {error.strerror}") from error
        if len(key) != KEY_OCTETS:
            raise StorageError(f"cannot use the journal's key {path}: it has not {KEY_OCTETS} octets")
        return cls(key)

    def _digest(self, kind: bytes, name: bytes, octets: int) -> bytes:
        return hashlib.blake2b(name, digest_size=octets, key=self._key, person=kind).digest()

    def facts(self, day: int, facts: bytes) -> int:
        """A number for facts as they were known on a day; never 0.  Keyed: nobody else finds two with the same."""
        return int.from_bytes(self._digest(b"facts", b"%d %s" % (day, facts), 8)) >> 1 or 1

    def client(self, packed: bytes) -> bytes:
        """In place of a client's 16 octets."""
        if packed.startswith(_DISCARD_PREFIX):
            return packed  # it is one
        return _DISCARD_PREFIX + self._digest(b"client", packed, 8)

    def name(self, name: str) -> str:
        """In place of an account, a hello name or a Message-ID; "" stays."""
        if not name or (name.startswith("p-") and len(name) == 18):
            return name
        return (
            "p-" + base64.b32encode(self._digest(b"name", name.lower().encode("utf-8", "replace"), 10)).decode().lower()
        )

    def path(self, path: str) -> str:
        """In place of a reverse-path or forward-path: its domain stays, and so does a path that names nobody."""
        local_part, at, domain = path.rpartition("@")
        return f"{self.name(path if local_part else '')}@{domain}" if at and not local_part.startswith("p-") else path


def is_pseudonym(packed: bytes) -> bool:
    """Whether a client's 16 octets are a pseudonym."""
    return packed.startswith(_DISCARD_PREFIX)


def _write_once(path: Path, octets: bytes) -> None:
    """Whole or not at all; whoever is first wins."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, octets)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    with suppress(FileExistsError):
        os.link(temporary, path)
    temporary.unlink()
