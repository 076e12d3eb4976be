"""What is DECIDED: findings are evidence, verdicts are decisions, replies are wording.

Why: a yes carries its authority and a no its reason, so that the journal, ``explain`` and the reply agree.
Promise: the public wording of a reason holds no evidence; the operator finds that by the reference.
Sources: RFC 3463 and RFC 5248 (enhanced status codes), RFC 8601 §2.7 (results).
"""

from __future__ import annotations

from enum import Enum, unique
from typing import NamedTuple

from gatepost.smtp.path import ForwardPath
from gatepost.smtp.reply import Reply


@unique
class Result(Enum):
    """What a check found.  RFC 8601 §2.7.  TEMPERROR: the check crashed or ran out of time; it never means yes."""

    NONE = "none"
    PASS = "pass"
    NEUTRAL = "neutral"
    SOFTFAIL = "softfail"
    FAIL = "fail"
    TEMPERROR = "temperror"
    PERMERROR = "permerror"


class Finding(NamedTuple):
    """One check's evidence."""

    check: str
    result: Result
    evidence: str


@unique
class Reason(Enum):
    """Why something was refused or deferred: basic code, enhanced status, public wording."""

    RELAYING = (550, "5.7.1", "Relaying is prohibited")
    ROUTING = (550, "5.7.1", "Relaying is prohibited: the address holds routing characters")
    DENIED = (550, "5.7.1", "Refused by the administrator of this server")
    EXPIRED_TRUST = (550, "5.7.1", "Relaying is prohibited: the permission has expired")
    SUSPENDED = (550, "5.7.1", "Relaying is prohibited: the trust in this address is suspended")
    NARROWED = (550, "5.7.1", "Relaying is prohibited: not from or to this address")
    MAILBOX_LOGIN = (550, "5.7.1", "Relaying is prohibited: read your mail first, then send")
    SEND_AS = (550, "5.7.1", "Sending as this address is prohibited")
    AUTHOR = (550, "5.7.1", "Nobody can tell whom the message is from")
    TLS_REQUIRED = (530, "5.7.10", "Relaying is prohibited without TLS of a newer version")
    RATE = (450, "4.7.1", "Too much mail in this hour, try again later")
    AUTH_REQUIRED = (530, "5.7.0", "Authentication required")
    TOO_MANY_RECIPIENTS = (452, "4.5.3", "Too many recipients, send the rest in another transaction")
    OTHER_ROUTE = (452, "4.5.3", "Send this recipient in a transaction of its own")
    NO_ROUTE = (550, "5.1.2", "No server for this domain is configured here")

    def __init__(self, code: int, status: str, wording: str) -> None:
        self.code = code
        self.status = status
        self.wording = wording
        self._enhanced = Reply(code, wording, status).status

    def reply(self, reference: str = "", hint: str = "") -> Reply:
        """The public reply; with the reference by which the operator finds the evidence.

        Args:
            hint: what helps whoever sees the reply and is known to them already; printable.
        """
        words = f"{self.wording}: {hint}" if hint else self.wording
        return Reply(self.code, f"{words} [{reference}]" if reference else words, self._enhanced)


class LocalDomain(NamedTuple):
    """Authority: anyone may deliver to our own domains.  ``where`` is "file:line" of the pattern."""

    pattern: str
    where: str


class Trust(NamedTuple):
    """Authority: a [[trust]] entry.  ``who`` is its who key and value, such as "network 10.1.0.0/16"."""

    who: str
    why: str
    owner: str
    where: str


RelayAuthority = LocalDomain | Trust


class AdmittedRecipient(NamedTuple):
    """A forward-path with the authority that lets it pass and the backend that takes it.

    Minted in ``policy/relay.py`` alone (a test over the syntax tree holds this), so that a forgotten relay check
    is a type error: backends take nothing else.
    """

    forward_path: ForwardPath
    authority: RelayAuthority
    backend: str


class Admit(NamedTuple):
    """The forward-path may pass."""

    recipient: AdmittedRecipient


class Defer(NamedTuple):
    """Not now: a 4yz.  ``where``: the rule's file and line, "" for built-in rules."""

    reason: Reason
    where: str = ""
    detail: str = ""


class Refuse(NamedTuple):
    """No: a 5yz.

    Attributes:
        reply: the administrator's own wording, where a [[deny]] entry gives one.
        hint: added to the reason's wording, for an authenticated client who may know it.
    """

    reason: Reason
    where: str = ""
    detail: str = ""
    reply: Reply | None = None
    hint: str = ""


RelayVerdict = Admit | Defer | Refuse
