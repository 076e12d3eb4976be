"""What one gate remembers of its sessions and verdicts: the journal.

Why: whoever was refused asks days later, and whoever complains about a message asks weeks later; the operator answers
    from what is kept here.  A worker writes the ``backlog``, one process (``writer``) takes it over into the
    ``database``, and commands read both (``journal``).
Promise: a worker imports no SQL: only ``backlog`` and ``record`` stand behind the names below.
"""

from gatepost.store.backlog import Backlog, backlog_directory
from gatepost.store.record import DELIVERING, End, Entry, Record
from gatepost.store.refusal import Refusal, reference_of, refusal_of, waiting
from gatepost.store.settings import JournalSettings

__all__ = [
    "DELIVERING",
    "Backlog",
    "End",
    "Entry",
    "JournalSettings",
    "Record",
    "Refusal",
    "backlog_directory",
    "reference_of",
    "refusal_of",
    "waiting",
]
