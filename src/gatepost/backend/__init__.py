"""DELIVER: what stands behind the gate.  One Backend a configured backend, one Delivery a transaction.

Why: the gate speaks to a backend of any kind through these two small ports.
Promise: importing this package costs little; what a kind of backend needs is imported when one is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from gatepost.backend.content import Content
    from gatepost.backend.pool import Log
    from gatepost.backend.settings import BackendSettings
    from gatepost.facts import Session
    from gatepost.smtp.client import Capabilities
    from gatepost.smtp.command import MailParameters, RcptParameters
    from gatepost.smtp.path import ReversePath
    from gatepost.smtp.reply import Reply
    from gatepost.verdict import AdmittedRecipient


class Delivery(Protocol):
    """One mail transaction at a backend.  The methods are called one after the other."""

    async def rcpt(self, recipient: AdmittedRecipient, parameters: RcptParameters) -> Reply:
        """One recipient, admitted by policy: the backend's own answer, or a 4yz of ours where it gave none."""
        ...

    async def deliver(self, content: Content, trace_field: bytes) -> Reply:
        """The message for all recipients that were answered 2yz.

        Args:
            content: read from its beginning, perhaps twice; closed by the caller.
            trace_field: whole lines, put before it.

        Returns:
            The backend's final answer.  A 2yz only when the backend, or the disk, has the message.
        """
        ...

    def abort(self) -> None:
        """The transaction is over without a message.  To be called whenever ``deliver`` was not; harmless after it."""
        ...

    def park(self) -> bool:
        """Lend the connection back until the client goes on; the pool asks by itself.  False: not at this moment."""
        ...


class Backend(Protocol):
    """A backend: its health, its capabilities, and transactions."""

    @property
    def name(self) -> str:
        """As in [backend.NAME]."""
        ...

    @property
    def settings(self) -> BackendSettings: ...

    @property
    def capabilities(self) -> Capabilities | None:
        """Last known; None until the backend was reached."""
        ...

    @property
    def healthy(self) -> bool:
        """The last contact was good.  False until there was one."""
        ...

    def begin(self, reverse_path: ReversePath, parameters: MailParameters, session: Session) -> Delivery:
        """A transaction; nothing is sent before its first recipient."""
        ...

    async def probe(self) -> None:
        """Look at the backend; ``healthy`` and ``capabilities`` tell what was seen.  Does not raise."""
        ...

    async def close(self, grace_s: float | None = None) -> None:
        """Let deliveries end, for so long or as long as they take, then close everything.

        Transactions that were begun before may still go on to their end.
        """
        ...


def make_backend(
    settings: BackendSettings,
    *,
    tls: ssl.SSLContext | None = None,
    observe: Callable[[str, float], None] | None = None,
    log: Log | None = None,
) -> Backend:
    """The backend that the settings describe.

    Args:
        tls: what judges the certificate where settings.tls is "required"; None for the system's authorities.
        observe: told measures, see ``pool.Observe``; log: told, in sentences, what an operator should know.

    Raises:
        ValueError: embedded mailboxes beside other addresses.
    """
    # Imported late: whoever wants the settings alone must not pay for asyncio and ssl.
    from gatepost.backend.settings import EmbeddedMailboxes  # noqa: PLC0415

    if any(isinstance(address, EmbeddedMailboxes) for address in settings.addresses):
        from gatepost.backend.mailbox import MailboxBackend  # noqa: PLC0415

        return MailboxBackend(settings, log=log)
    if settings.xclient or settings.proxy != "off":
        from gatepost.backend.dedicated import DedicatedBackend  # noqa: PLC0415

        return DedicatedBackend(settings, tls=tls, observe=observe, log=log)
    from gatepost.backend.delivery import SmtpBackend  # noqa: PLC0415

    return SmtpBackend(settings, tls=tls, observe=observe, log=log)
