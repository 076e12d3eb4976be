"""What all workers of one gate remember together and may lose: rates, guesses, bans, logins, lost sources, used grants.

Why: a guesser who meets another worker with each connection must not begin anew, and an operator wants to see and end a
    ban from another process.  ``hourly`` counts what is looked at for each recipient, without a lock; everything else
    is a record with an end, in a ``Store`` that has a few primitives, so that a server of records can take its place.
Trust: names, addresses and secrets are a stranger's; keys are keyed digests, every record and every kind of record has
    a greatest size, and a secret is kept as 4 octets of a keyed digest.
Promise: losing all of it costs a guesser's history and no mail.
"""

from gatepost.counters.bans import Ban, Bans
from gatepost.counters.digests import Digests
from gatepost.counters.embedded import EmbeddedStore, state_directory
from gatepost.counters.evidence import Source, Sources, Suspension
from gatepost.counters.freshness import Freshness
from gatepost.counters.guesses import Guesses, GuessLimits, Look
from gatepost.counters.hourly import WINDOW_S, HourlyCounts
from gatepost.counters.store import MemoryStore, Store
from gatepost.counters.uses import Use, Uses
from gatepost.counters.windows import MailboxWindows

__all__ = [
    "WINDOW_S",
    "Ban",
    "Bans",
    "Digests",
    "EmbeddedStore",
    "Freshness",
    "GuessLimits",
    "Guesses",
    "HourlyCounts",
    "Look",
    "MailboxWindows",
    "MemoryStore",
    "Source",
    "Sources",
    "Store",
    "Suspension",
    "Use",
    "Uses",
    "state_directory",
]
