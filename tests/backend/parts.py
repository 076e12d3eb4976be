"""Values that tests of the backend side share."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

from gatepost.backend.content import Content, Memory
from gatepost.backend.delivery import SmtpBackend, SmtpDelivery
from gatepost.backend.settings import BackendSettings, SmtpAddress
from gatepost.facts import Client, Session
from gatepost.smtp.command import NO_MAIL_PARAMETERS, NO_RCPT_PARAMETERS, MailParameters
from gatepost.smtp.path import ForwardPath, Mailbox, ReversePath, Shape
from gatepost.smtp.reply import Reply
from gatepost.verdict import AdmittedRecipient, LocalDomain, RelayAuthority

CLIENT = Client(ip_address("192.0.2.9"), 40000)
SESSION = Session("r1", CLIENT, "mx", "mx", "client.test", esmtp=True)
SENDER = Mailbox("sender", "elsewhere.test")
TRACE = b"Received: from x by gate\r\n\twith ESMTP; now\r\n"
TEXT = b"Subject: hello\r\n\r\nHow do you do?\r\n"
LOCAL = LocalDomain("example.com", "gatepost.toml:3")


def settings(*ports: int, **changes: Any) -> BackendSettings:
    """Short times, so that a test that waits for one does not wait long."""
    values: dict[str, Any] = {
        "name": "mail",
        "addresses": tuple(SmtpAddress("127.0.0.1", port) for port in ports),
        "tls": "off",
        "connections": 4,
        "hello": "gate.example.com",
        "connect_timeout_s": 5.0,
        "greeting_timeout_s": 5.0,
        "wait_timeout_s": 5.0,
        "park_after_s": 0.05,
    }
    return BackendSettings(**(values | changes))


class Notes:
    """What a pool has told its log and its observer."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.measures: list[str] = []

    def log(self, text: str, *, up: bool) -> None:
        self.lines.append(("+ " if up else "- ") + text)

    def observe(self, name: str, value: float) -> None:
        assert value >= 0
        self.measures.append(name)


def backend_of(*ports: int, **changes: Any) -> SmtpBackend:
    notes = changes.pop("notes", None) or Notes()
    tls = changes.pop("context", None)
    return SmtpBackend(settings(*ports, **changes), tls=tls, observe=notes.observe, log=notes.log)


def recipient(
    local_part: str = "alice", domain: str = "example.com", authority: RelayAuthority = LOCAL
) -> AdmittedRecipient:
    return AdmittedRecipient(ForwardPath(Mailbox(local_part, domain), Shape.PLAIN), authority, "mail")


def content_of(octets: bytes, *, block: int = 0, memory: Memory | None = None) -> Content:
    """Content as the gate keeps it: whole lines, cut into blocks of about ``block`` octets."""
    content = Content(memory or Memory(1 << 30, 1 << 30))
    start = 0
    while start < len(octets):
        end = octets.find(b"\n", start + block) + 1 if block else 0
        content.add(octets[start : end or len(octets)])
        start = end or len(octets)
    content.eight_bit = not octets.isascii()
    content.dotted = octets.startswith(b".") or b"\r\n." in octets
    return content


def begin(
    backend: SmtpBackend, reverse_path: ReversePath = SENDER, parameters: MailParameters = NO_MAIL_PARAMETERS
) -> SmtpDelivery:
    return backend.begin(reverse_path, parameters, SESSION)


async def send(backend: SmtpBackend, octets: bytes = TEXT, *local_parts: str) -> Reply:
    """One whole message."""
    delivery = begin(backend)
    for local_part in local_parts or ("alice",):
        reply = await delivery.rcpt(recipient(local_part), NO_RCPT_PARAMETERS)
        if not reply.positive:
            delivery.abort()
            return reply
    return await delivery.deliver(content_of(octets), TRACE)
