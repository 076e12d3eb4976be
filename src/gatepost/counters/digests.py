"""Names and secrets as keyed digests: what is kept of them.

Why: a store of wrong secrets is a store of nearly right ones; nobody may read them there.
Trust: names and secrets are a stranger's, of any length.
Promise: a secret is kept as 4 octets of a keyed digest.  They suffice to know the same secret again (one in 4 thousand
    million others looks like it).  To who steals the records they are useless: without the key (random, 0600, its
    owner's alone) every secret fits them; with the key they tell 32 bits, so that of all secrets of ten random letters
    30,000 fit, and no trial shows which.  A digest binds a secret to its user: that two users have the same one cannot
    be seen.  What a dictionary holds is not safe from who has records and key, as it is nowhere.
Sources: RFC 7693 (BLAKE2, keyed).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from pathlib import Path

from gatepost.errors import StorageError

SECRET_DIGEST_OCTETS = 4
NAME_DIGEST_OCTETS = 16
NAME_OCTETS_MAX = 256  # of a name; what is longer counts as what it begins with
_KEY_OCTETS = 32


class Digests:
    """Digests under one key.

    Args:
        key: 32 octets.

    Attributes:
        mark_key: for marks of right secrets, which ``freshness`` keeps; it does not tell the key.
    """

    def __init__(self, key: bytes) -> None:
        self._names = hashlib.blake2b(key=key, digest_size=NAME_DIGEST_OCTETS, person=b"gatepost.name")
        self._secrets = hashlib.blake2b(key=key, digest_size=SECRET_DIGEST_OCTETS, person=b"gatepost.secret")
        self.mark_key = hashlib.blake2b(key=key, digest_size=_KEY_OCTETS, person=b"gatepost.mark").digest()

    @classmethod
    def in_directory(cls, directory: Path) -> Digests:
        """Digests under the directory's key, which is made where there is none.

        Raises:
            StorageError: the key can be neither read nor made.
        """
        path = directory / "key"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # workers start together, and must agree on one key
                key = os.pread(descriptor, _KEY_OCTETS, 0)
                if len(key) < _KEY_OCTETS:
                    key = secrets.token_bytes(_KEY_OCTETS)
                    os.pwrite(descriptor, key, 0)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError(f"cannot use the key {path}: {error.strerror}") from error
        return cls(key)

    def name(self, name: str) -> bytes:
        """Of a user's name, whose case does not count."""
        hasher = self._names.copy()
        hasher.update(cut(name, NAME_OCTETS_MAX).casefold().encode())
        return hasher.digest()

    def secret(self, name: str, secret: str) -> bytes:
        """Of a secret of this user."""
        hasher = self._secrets.copy()
        hasher.update(self.name(name))
        hasher.update(secret.encode("utf-8", "surrogatepass"))
        return hasher.digest()


def cut(text: str, octets_max: int) -> str:
    """The text's beginning, of so many octets at most, in whole characters."""
    return text.encode("utf-8", "replace")[:octets_max].decode("utf-8", "ignore")
