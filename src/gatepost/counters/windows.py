"""Who logged in to the mailbox server lately, and from where: the windows of POP-before-SMTP.

Why: a program that cannot log in for sending can for fetching, and has just done so.
Trust: addresses come from the socket or a listed proxy; accounts are those that the mailbox server said yes to.
Promise: a window is of one address, of IPv6 too: an address that did not log in itself gets none, whoever its
    neighbours are.  An address from which more distinct accounts logged in than ``accounts_max`` within a day is shared
    by many clients, some of which did not log in: it has no window, and one it had is closed.  Nothing is kept longer
    than ``MAILBOX_WINDOW_S_MAX``; whether a login is recent enough is for the policy to say.
Sources: none; POP-before-SMTP is a custom.
"""

from __future__ import annotations

import json

from gatepost.counters import distinct
from gatepost.counters.digests import NAME_OCTETS_MAX, Digests, cut
from gatepost.counters.store import LOGIN, Store
from gatepost.facts import IPAddress, MailboxLogin

MAILBOX_WINDOW_S_MAX = 86_400.0
SHARED_WINDOW_S = 86_400.0  # in which distinct accounts of an address are counted


class MailboxWindows:
    """The windows at one gate, over all its workers.

    Args:
        accounts_max: distinct accounts from one address in a day, up to ``distinct.MEMBERS_MAX`` less one.
    """

    def __init__(self, store: Store, digests: Digests, accounts_max: int = 3) -> None:
        self._store = store
        self._digests = digests
        self._accounts_max = min(accounts_max, distinct.MEMBERS_MAX - 1)

    def logged_in(self, account: str, client: IPAddress, now_s: float) -> bool:
        """The mailbox server said yes: open a window.

        Args:
            now_s: seconds since the epoch.

        Returns:
            False where the address is shared, and no window is open.
        """
        account = cut(account, NAME_OCTETS_MAX)
        whose = self._digests.name(account)[: distinct.MEMBER_OCTETS]
        opened = False

        def change(old: bytes | None) -> tuple[bytes, float]:
            nonlocal opened
            length = 0 if old is None else old[0] * distinct.OCTETS_PER_MEMBER
            accounts = distinct.members(None if old is None else old[1 : 1 + length], now_s, SHARED_WINDOW_S)
            accounts[whose] = distinct.seconds(now_s)
            opened = len(accounts) <= self._accounts_max
            kept = distinct.packed(accounts)
            login = json.dumps([account, now_s]).encode() if opened else b""
            return bytes((len(kept) // distinct.OCTETS_PER_MEMBER,)) + kept + login, SHARED_WINDOW_S

        self._store.update(LOGIN + client.packed, now_s, change)
        return opened

    def last(self, client: IPAddress, now_s: float) -> MailboxLogin | None:
        """The last good login from this address that is kept; None where there is none, or the address is shared."""
        value = self._store.read((LOGIN + client.packed,), now_s)[0]
        login = b"" if value is None else value[1 + value[0] * distinct.OCTETS_PER_MEMBER :]
        if not login:
            return None
        account, at = json.loads(login)
        return MailboxLogin(account, at) if now_s - at < MAILBOX_WINDOW_S_MAX else None
