"""The records that the workers share, opened by a command, whether the gate runs or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from gatepost import config
from gatepost.config import Config
from gatepost.counters import EmbeddedStore, Store, state_directory
from gatepost.gate import privileges
from gatepost.store.journal import Journal


@contextlib.contextmanager
def opened(loaded: Config, *, make: bool, said: Callable[[str], None]) -> Iterator[Store | None]:
    """The records of the configuration's gate; None where nothing was ever kept and nothing is to be made.

    What root does here is done as the owner of the data directory: files get that owner, and a link that was planted
    there leads root nowhere.

    Args:
        said: takes a sentence for the operator.

    Raises:
        StorageError: they cannot be used.
    """
    if make:
        where = loaded.config_path or config.EMBEDDED_DEFAULT_NAME
        privileges.prepare_data(loaded.data, privileges.account_of(loaded.user, where), where)
    with privileges.acting_as(privileges.owner_of(loaded.data)):
        directory = state_directory(loaded.data)
        if not make and not _is_there(directory / "data.mdb"):
            yield None
            return
        store = EmbeddedStore(directory, said)
        try:
            yield store
        finally:
            store.close()


@contextlib.contextmanager
def journal(loaded: Config) -> Iterator[Journal]:
    """The journal of the configuration's gate.

    Raises:
        StorageError: it cannot be used.
    """
    with privileges.acting_as(
        privileges.owner_of(loaded.data)
    ):  # what SQLite puts beside its file must not become root's
        opened = Journal(loaded.data, loaded.gate.journal)
        try:
            yield opened
        finally:
            opened.close()


def _is_there(path: Path) -> bool:
    """Whether the store has its file; where we may not even look, the store itself says so."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True
