"""Who may see the console's pages: whoever can read a key below the gate's data directory.

Why: the pages show who wrote to whom, and a password more is one more to be guessed, shared and forgotten.  Who may
    read the gate's files may see its pages; `gatepost console` makes a link for them that opens the pages in a browser.
Trust: tokens come from anybody; they are compared in constant time and bounded before anything else is done with them.
Promise: a link is good for LINK_S and a cookie for COOKIE_S, each for its own purpose alone; a new key ends both.
Sources: RFC 2104 (HMAC), RFC 6265 §4.1 (cookies).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
from pathlib import Path
from typing import Final

from gatepost.errors import StorageError

KEY_OCTETS: Final = 32
LINK_S: Final = 600
COOKIE_S: Final = 12 * 3600
COOKIE: Final = "gatepost"
_TOKEN_MAX: Final = 100


class Login:
    """Links and cookies under one key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def in_data(cls, data: str) -> Login:
        """The key kept under the data directory, made at first use.

        Raises:
            StorageError: it cannot be read or written.
        """
        path = Path(data) / "keys" / "console.key"
        try:
            try:
                key = _read(path)
            except FileNotFoundError:
                _make(path)
                key = _read(path)
        except OSError as error:
            raise StorageError(f"cannot use the console's key {path}: {error.strerror}") from error
        if len(key) != KEY_OCTETS:
            raise StorageError(f"cannot use the console's key {path}: it has not {KEY_OCTETS} octets; remove it")
        return cls(key)

    def link_token(self, now_s: float) -> str:
        """For the address that `gatepost console` prints."""
        return self._seal("link", int(now_s) + LINK_S)

    def cookie(self, now_s: float) -> str:
        """For the browser that came by such an address."""
        return self._seal("cookie", int(now_s) + COOKIE_S)

    def opens(self, token: str, now_s: float) -> bool:
        """Whether this is a link of ours that is still good."""
        return self._good("link", token, now_s)

    def knows(self, cookie: str, now_s: float) -> bool:
        """Whether this is a cookie of ours that is still good."""
        return self._good("cookie", cookie, now_s)

    def _seal(self, purpose: str, until_s: int) -> str:
        return f"{until_s}.{hmac.new(self._key, f'{purpose} {until_s}'.encode(), hashlib.sha256).hexdigest()}"

    def _good(self, purpose: str, token: str, now_s: float) -> bool:
        until, _, _ = token.partition(".")
        if len(token) > _TOKEN_MAX or not (until.isascii() and until.isdigit()):
            return False
        wanted = self._seal(purpose, int(until))
        return hmac.compare_digest(wanted.encode(), token.encode("utf-8", "replace")) and now_s < int(until)


def _read(path: Path) -> bytes:
    # What stands there may be a pipe, whose reader would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(descriptor, KEY_OCTETS + 1)
    finally:
        os.close(descriptor)


def _make(path: Path) -> None:
    """Whole or not at all; whoever is first wins."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.write(descriptor, os.urandom(KEY_OCTETS))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()
