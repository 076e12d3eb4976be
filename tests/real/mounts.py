"""A gate that sees other files than the rest of this host: a small disk, a DNS server of its own.

Why: a full disk is made by filling a disk, not by a scripted error; one of a few MiB is full soon and hurts nobody.
Promise: what is mounted is seen by one process tree alone, and gone with it.
"""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.servers import CI

_PREPARE = "set -e; mount --make-rprivate /; "


def small_disk(directory: Path, size: str) -> str:
    """A file system of its own, of so many octets."""
    return f"mount -t tmpfs -o size={size} tmpfs {shlex.quote(str(directory))}; "


def in_place_of(path: Path, other: Path) -> str:
    """One file seen where another one is."""
    return f"mount --bind {shlex.quote(str(other))} {shlex.quote(str(path))}; "


def mounted(*mounts: str) -> tuple[str, ...]:
    """The command that runs the one behind it with these mounts; where that is not allowed the test is skipped.

    Under CI it fails instead: there it is allowed.
    """
    unshare = _unshare()
    if isinstance(unshare, str):
        if CI:
            pytest.fail(unshare)
        pytest.skip(unshare)
    return (*unshare, "sh", "-c", _PREPARE + "".join(mounts) + 'exec "$@"', "sh")


@functools.cache
def _unshare() -> Sequence[str] | str:
    commands = [("unshare", "--mount"), ("unshare", "--map-root-user", "--mount")]
    said = "unshare is not installed"
    for command in commands if os.geteuid() == 0 else commands[1:]:
        try:
            tried = subprocess.run(
                [*command, "sh", "-c", _PREPARE + "mount -t tmpfs none /mnt"],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
        except OSError:
            break
        if tried.returncode == 0:
            return command
        said = tried.stderr.strip().rpartition("\n")[2]
    return f"this host does not let us mount: {said}"


def seen_by(pid: int, path: Path) -> Path:
    """A path as that process sees it."""
    return Path(f"/proc/{pid}/root{path}")
