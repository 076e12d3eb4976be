"""How many different things in the last while: a small set whose members carry their time.

Why: the same wrong secret a hundred times is a telephone that was forgotten, a hundred wrong secrets are an attack.
Promise: at most ``MEMBERS_MAX`` members; beyond it those that were seen longest ago are forgotten, so that a set of a
    stranger's making cannot grow.  Times are whole seconds.
"""

from __future__ import annotations

import struct

from gatepost.counters.digests import SECRET_DIGEST_OCTETS

MEMBERS_MAX = 32
MEMBER_OCTETS = SECRET_DIGEST_OCTETS
_MEMBER = struct.Struct(f">{MEMBER_OCTETS}sI")
OCTETS_PER_MEMBER = _MEMBER.size


def members(value: bytes | None, now_s: float, window_s: float) -> dict[bytes, int]:
    """The members seen within the window, each with its time.

    Args:
        value: what ``packed`` gave, or None for nothing.
    """
    oldest = now_s - window_s
    return {member: at for member, at in _MEMBER.iter_unpack(value or b"") if at > oldest}


def packed(found: dict[bytes, int]) -> bytes:
    """The set as octets, without those that are too many."""
    latest = sorted(found.items(), key=lambda member: member[1])[-MEMBERS_MAX:]
    return b"".join(_MEMBER.pack(member, at) for member, at in latest)


def seconds(now_s: float) -> int:
    """The time of a member; a clock beyond the years 1970 to 2106 is read as the nearest of them."""
    return min(max(int(now_s), 0), 0xFFFFFFFF)
