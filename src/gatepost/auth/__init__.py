"""Who is it?  The only package that sees secrets: credentials in, an outcome out.

Why: a mail server that cannot authenticate, or does it badly, gets it done in front of it; against our own accounts or
    against whatever server knows its users already.
Trust: user names, secrets and tokens are a stranger's octets, bounded and decoded by ``smtp.sasl``; the servers that
    are asked belong to the administrator, and what they answer is bounded even so.
Promise: an ``Outcome`` is yes, no or unknown.  A server that is out of reach, slow or odd is ``Unavailable``: never a
    yes, and never counted as a wrong password.  No secret is in an outcome, an exception, a log line or a repr.
Sources: RFC 4422 (SASL), RFC 4954 (AUTH).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from gatepost.smtp.sasl import Password, Token

Credentials = Password | Token


class Verified(NamedTuple):
    """Yes.

    Attributes:
        account: the account's name, as this verifier writes it, in lower case.
        addresses: addresses that the verifier says belong to the account, besides what the name itself says.
        device: the label of the app password that was used, "" for the account's own password.
    """

    account: str
    addresses: tuple[str, ...] = ()
    device: str = ""


class Denied(NamedTuple):
    """No.  ``why`` is for the operator: "no such account", "wrong password", "locked"; never shown to the client."""

    why: str


class Unavailable(NamedTuple):
    """Nobody can tell now.  ``why`` is for the operator."""

    why: str


Outcome = Verified | Denied | Unavailable


class Verifier(Protocol):
    """One source of truth about logins.  An instance serves many logins at once."""

    @property
    def name(self) -> str:
        """As in [auth] verify."""
        ...

    async def verify(self, credentials: Credentials) -> Outcome:
        """Ask once.  Does not raise on what the user typed nor on what a server answers."""
        ...

    async def close(self) -> None:
        """Let go of connections and threads."""
        ...
