"""What [journal] and [store] configure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

DAY_S: Final = 86400.0


@dataclass(frozen=True, slots=True)
class JournalSettings:
    """How the journal is kept.

    Attributes:
        url: of PostgreSQL, "" for SQLite below the data directory; it may hold a password.
        before_reply: a message's record is on the disk before its 250.
        keep_s: entries are kept as they are for so long; pseudonyms_s: and for so long after that with pseudonyms in
            place of addresses, accounts and clients.
        entries_max: so many verdicts are kept, and so many sessions; beyond it the oldest go, however young.
        backlog_octets: what may wait on the disk while the database is away.
    """

    enabled: bool = True
    url: str = field(default="", repr=False)
    before_reply: bool = False
    keep_s: float = 30 * DAY_S
    pseudonyms_s: float = 150 * DAY_S
    entries_max: int = 5_000_000
    backlog_octets: int = 1 << 30
