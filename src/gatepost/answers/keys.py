"""The keys of the tokens in our trace fields, as the owner of the data directory sees them."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

from gatepost.config import Config
from gatepost.gate import privileges
from gatepost.gate.trace import KeyFile, key_files


def found(loaded: Config) -> list[KeyFile]:
    """All keys of the configuration's gate, the newest first; nothing is made.

    Raises:
        StorageError: nobody can tell which there are.
    """
    with as_owner(loaded.data):
        return key_files(loaded.data)


def as_owner(data: str) -> AbstractContextManager[None]:
    """Root acts as whom the data directory belongs to: keys are readable by their owner alone, and that is the gate."""
    account = None
    if os.geteuid() == 0 and Path(data).exists():
        status = Path(data).stat()
        account = privileges.Account("", status.st_uid, status.st_gid) if status.st_uid else None
    return privileges.acting_as(account)
