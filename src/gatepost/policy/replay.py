"""Questions that the rules cannot tell apart, so that a million old ones are decided anew in a minute.

Why: the journal is full of the same clients, domains and rules, and of addresses that no rule names.  A decision costs
    more than to see that it was made before.
Trust: facts and paths came from strangers, and were parsed.
Promise: pure.  Two transactions of the same classes, at the same time and with as many recipients before them, get the
    same verdict by the same rule; tests/policy/test_replay.py holds that against ``relay``.  A path that any rule names
    by its local-part, and whatever has another shape than a plain one, is a class by itself.
    The reverse-path of an account is ``admission``'s business, too: it is not classified here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterator
from ipaddress import IPv4Address

from gatepost.facts import Client, Session
from gatepost.policy.relay import CLOCK_SLACK_S, RelayRules
from gatepost.smtp.path import ForwardPath, Mailbox, Pattern, ReversePath, Shape

_ANYBODY = Client(IPv4Address(0), 0)


class Classes:
    """The classes of one set of rules."""

    __slots__ = ("_hellos", "_named", "_reread", "_rules", "_windows")

    def __init__(self, rules: RelayRules) -> None:
        self._rules = rules
        self._named = {pattern.local_part for pattern in _patterns(rules) if pattern.local_part is not None}
        self._hellos = bool(rules.index.deny_helos)
        self._reread = bool(rules.reread)
        self._windows = sorted({entry.pop3_s for entry in rules.trust if entry.pop3_s})

    def session(self, session: Session) -> Hashable:
        """Who it is to the rules; how long ago it read its mail is ``login``."""
        index, address = self._rules.index, session.client.address
        return (
            session._replace(
                reference="",
                client=_ANYBODY,
                hello=session.hello if self._hellos else "",
                esmtp=True,
                role="",
                mailbox_login=None,
            ),
            tuple(index.trust_networks.matching(address)),
            tuple(index.deny_networks.matching(address)),
        )

    def login(self, session: Session, at: float) -> int:
        """Which grants of POP before SMTP the session's login was recent enough for, at this time."""
        login, windows = session.mailbox_login, self._windows
        if login is None or not windows:
            return 0
        age_s = at - login.at
        return -1 if age_s < -CLOCK_SLACK_S else 1 + bisect_right(windows, age_s)

    def reverse_path(self, path: ReversePath) -> Hashable:
        """Without its local-part, where no rule asks for that."""
        if not isinstance(path, Mailbox):
            return path
        local_part = path.local_part
        return path if not local_part.isascii() or local_part.lower() in self._named else path.domain

    def forward_path(self, path: ForwardPath) -> Hashable:
        """As ``reverse_path``; where a backend reads local-parts in its own way, each is a class."""
        if self._reread or path.shape is not Shape.PLAIN or not isinstance(path.mailbox, Mailbox):
            return path
        return self.reverse_path(path.mailbox)


def _patterns(rules: RelayRules) -> Iterator[Pattern]:
    for grant in rules.trust:
        yield from (*grant.reverse_paths, *grant.forward_paths)
    for denial in rules.deny:
        yield from (path for path in (denial.reverse_path, denial.forward_path) if path is not None)
    for route in rules.routes:
        yield from route.forward_paths
