"""Grants that nobody uses any more, in words.

Why: the machine is gone, its grant stays, and whoever gets the address next may send.  An audit finds it years later;
    the gate knows it all along.
Trust: the records are the gate's own, the rules an administrator's.
Promise: nothing is said of a grant before it was watched for ``UNUSED_DAYS``.
Sources: none.
"""

from __future__ import annotations

from gatepost.counters import Uses
from gatepost.policy import relay
from gatepost.policy.relay import RelayRules

UNUSED_DAYS = 90
_DAY_S = 86_400


def unused(rules: RelayRules, uses: Uses, now_s: float) -> list[str]:
    """The grants in force that let no mail through for so long, each "file:line: ...".

    Args:
        now_s: seconds since the epoch.
    """
    entries = [entry for entry in rules.trust if not relay.expired(entry, now_s)]
    out = []
    for entry, use in zip(entries, uses.of(map(relay.sense, entries), now_s), strict=True):
        if use is None:
            continue
        days = int(now_s - max(use.watched_s, use.used_s or 0)) // _DAY_S
        if days >= UNUSED_DAYS:
            ever = ", as long as it is watched" if use.used_s is None else ""
            mend = "remove it" if entry.expires_at is not None else "remove it, or say when it expires"
            out.append(f"{entry.where}: [[trust]]: {relay.who(entry)} is unused for {days:,} days{ever}; {mend}")
    return out
