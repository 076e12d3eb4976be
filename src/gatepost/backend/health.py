"""Which of a backend's addresses to try: a failed one is avoided for a short, growing time.

Why: a dead first address must not cost each message its timeout, and a dead backend must be found alive again without
    anybody's help.
Promise: pure; the clock is an argument.  An address that works is always tried; one that failed is tried again by one
    attempt at a time (half-open), beside the traffic where another address works, by a message where none does.
Sources: RFC 5321 §5.1 (addresses in order), §4.5.4.1 (retry strategies).
"""

from __future__ import annotations

from collections.abc import Sequence

from gatepost.backend.settings import LmtpSocket, SmtpAddress

DELAY_FIRST_S = 0.25
DELAY_SLOW_MAX_S = 15.0
DELAY_QUICK_MAX_S = 1.0
QUICK_S = 0.5  # a failure that came so soon (connection refused) costs nobody anything and may be tried more often


class AddressHealth:
    """What is known of one address.

    Attributes:
        failures: attempts that failed since the last success.
        retry_at: before it the address is avoided.
        trial: one attempt at a failed address is under way.
        trouble: why the last attempt failed, for the operator.
        answered: the one of several network addresses behind a name that answered last; tried first.
    """

    __slots__ = ("_failed_at", "address", "answered", "failures", "retry_at", "trial", "trouble")

    def __init__(self, address: SmtpAddress | LmtpSocket) -> None:
        self.address = address
        self.failures = 0
        self.retry_at = 0.0
        self.trial = False
        self.trouble = ""
        self.answered = ""
        self._failed_at = float("-inf")

    def succeeded(self) -> bool:
        """An attempt succeeded.  Returns whether the address had been failing."""
        failing = self.failures > 0
        self.failures = 0
        self.trial = False
        self.trouble = ""
        return failing

    def failed(self, trouble: str, started_at: float, now: float) -> bool:
        """An attempt failed.  Returns whether the address had been working until now.

        Attempts that ran side by side count once: what started before the last failure says nothing new.
        """
        self.trial = False
        self.trouble = trouble
        if started_at < self._failed_at:
            return False
        self._failed_at = now
        self.failures += 1
        longest = DELAY_QUICK_MAX_S if now - started_at < QUICK_S else DELAY_SLOW_MAX_S
        self.retry_at = now + min(longest, DELAY_FIRST_S * 2 ** min(self.failures - 1, 16))
        return self.failures == 1


class Addresses:
    """A backend's addresses, in the order of the configuration."""

    __slots__ = ("_all",)

    def __init__(self, addresses: Sequence[SmtpAddress | LmtpSocket]) -> None:
        self._all = [AddressHealth(address) for address in addresses]

    def working(self) -> list[AddressHealth]:
        """Those not known to fail, in order."""
        return [health for health in self._all if not health.failures]

    def due(self, now: float) -> list[AddressHealth]:
        """Failed ones whose time has come and that nobody is trying already, in order."""
        return [health for health in self._all if health.failures and not health.trial and health.retry_at <= now]

    def hopeless(self, now: float) -> bool:
        """No attempt may be made now: each address is avoided, or under trial by somebody else."""
        return not any(not health.failures or (not health.trial and health.retry_at <= now) for health in self._all)

    @property
    def trouble(self) -> str:
        """Why the backend is out of reach, one clause an address; "" where one works."""
        if any(not health.failures for health in self._all):
            return ""
        return "; ".join(health.trouble for health in self._all)
