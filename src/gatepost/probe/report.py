"""What a probe asks for and what it found: frozen values, for the command line and for whoever imports the tester.

Promise: ``Verdict.CLOSED`` is said only where every form was asked, over everything that was asked for, and refused.
Sources: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, unique
from ipaddress import IPv4Address, IPv6Address
from typing import Literal, NamedTuple

from gatepost.probe.reply import Outcome

Address = IPv4Address | IPv6Address
StartTls = Literal["auto", "never", "require"]

DEFAULT_PORT = 25
# .invalid is nobody's for ever (RFC 6761 §6.4): whatever a relay makes of it, no stranger gets mail.
DEFAULT_OUTSIDE = "relay-test@gatepost-probe.invalid"


@unique
class Verdict(Enum):
    """What can be said of a server."""

    CLOSED = "closed"
    OPEN = "open"
    UNKNOWN = "unknown"


class Target(NamedTuple):
    """One host: a name or an address, and a port."""

    host: str
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """How to ask.

    Attributes:
        local_domains: domains that the server takes mail for; () to derive one from what it says and from HOST.
        outside: a foreign address; with ``deliver`` that one is used instead.
        deliver: the person's own address, to which one message goes where a form is accepted; "" for no mail at all.
        reverse_path: what MAIL FROM says where a form leaves it open; "" for the first that the server takes.
        hello: our name in EHLO; "" for the address literal of our own address.
        families: 4, 6 or both.
        implicit_tls: TLS from the first octet, as on port 465; ``starttls`` then says nothing.
        source: the address to speak from; None for the host's choice.
        pause_s: between two forms.
        timeout_s: for a connection, and for each reply, however many octets it comes in.
        budget_s: for everything.
    """

    local_domains: tuple[str, ...] = ()
    outside: str = DEFAULT_OUTSIDE
    deliver: str = ""
    reverse_path: str = ""
    hello: str = ""
    families: tuple[int, ...] = (4, 6)
    starttls: StartTls = "auto"
    implicit_tls: bool = False
    source: Address | None = None
    pause_s: float = 0.2
    timeout_s: float = 30.0
    budget_s: float = 1800.0


@dataclass(frozen=True, slots=True)
class Attempt:
    """One form, asked once.

    Attributes:
        id: of the form, and ``why`` and ``source`` its.
        reverse_path, forward_path: what followed "MAIL FROM:" and "RCPT TO:".
        reply: the one that decided, on one line.
        note: why nothing can be concluded; "" where something can.
        transcript: the dialogue, "C: " and "S: " before each line.
    """

    id: str
    why: str
    source: str
    reverse_path: str
    forward_path: str
    outcome: Outcome
    reply: str
    note: str
    transcript: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """All forms over one address, plain or under TLS.

    Attributes:
        tls: asked for TLS; ``tls_version`` such as "TLSv1.3" where it came about.
        why: of the verdict, as sentences for a person.
        opening: the transcript of the first connection up to the questions about the server itself.
        takes_anybody: it took made-up users wherever it was asked: it does not decide at RCPT.
        planned: how many forms there are; fewer attempts mean that the round was cut short.
        own_address: which we spoke from; "" where there was no connection.
    """

    address: Address
    port: int
    tls: bool
    tls_version: str
    greeting: str
    local_domains: tuple[str, ...]
    verdict: Verdict
    why: tuple[str, ...]
    opening: tuple[str, ...]
    takes_anybody: bool
    planned: int
    attempts: tuple[Attempt, ...]
    own_address: str = ""

    @property
    def name(self) -> str:
        return f"IPv{self.address.version}{' TLS' if self.tls else ''}"

    @property
    def accepted(self) -> tuple[Attempt, ...]:
        return tuple(attempt for attempt in self.attempts if attempt.outcome is Outcome.ACCEPTED)


@dataclass(frozen=True, slots=True)
class Delivery:
    """The one message of a probe with ``deliver``.

    Attributes:
        token: the mark in its subject; taken: the server took it.
        form: by which it went, or the last by which it was refused; reply: the server's to the content.
        arrived: its mark was seen in the person's inbox; inbox: the host at which it was looked for, "" for none.
    """

    token: str
    address: str
    form: str
    taken: bool
    reply: str
    transcript: tuple[str, ...]
    arrived: bool = False
    inbox: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What was found.

    Attributes:
        why: the reasons, as sentences for a person.
        delivery: None where no message was sent or tried.
    """

    target: Target
    outside: str
    verdict: Verdict
    why: tuple[str, ...]
    rounds: tuple[Round, ...]
    delivery: Delivery | None
    seconds: float

    @property
    def first_accepted(self) -> tuple[Round, Attempt] | None:
        """The first form that relays, and the round in which it did."""
        return next(((one, attempt) for one in self.rounds for attempt in one.accepted), None)
