"""A password that must never be seen again once it was typed, and how to look for it.

Why: secrets leak by the way: into a log line, a traceback, a temporary file, the list of processes.  So tests log in
    with one that no chance could write, and afterwards everything that was written is searched for it, as it is and in
    the forms in which it crosses the wire.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

MARKED = "Kx7 marked horse 51c2"
OF_TESTS = "credentials-of-a-test"  # files whose names begin so are the tests' own, and hold it on purpose


def _forms(secret: bytes) -> Iterator[bytes]:
    yield secret
    yield secret[::-1]
    yield secret.hex().encode()
    for offset in range(3):  # wherever it stands in what was encoded, these letters are the same
        encoded = base64.b64encode(b"\0" * offset + secret + b"\0" * 3)
        yield encoded[(offset * 8 + 5) // 6 : (offset + len(secret)) * 8 // 6]


FORMS = tuple(_forms(MARKED.encode()))


def seen_in(octets: bytes) -> bool:
    """Whether the marked password stands there, in some form."""
    return any(form in octets for form in FORMS)


def files_with_it(directory: Path) -> list[Path]:
    """The files below the directory that hold it, but for the tests' own."""
    found = []
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink() and not path.name.startswith(OF_TESTS):
            try:
                octets = path.read_bytes()
            except OSError:
                continue  # gone in the meantime
            if seen_in(octets):
                found.append(path)
    return found
