"""What the gate is configured to be: frozen values that ``config`` builds and a reload replaces as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from gatepost.auth.settings import AuthSettings
from gatepost.backend.settings import BackendSettings
from gatepost.counters.guesses import GuessLimits
from gatepost.facts import IPAddress
from gatepost.policy.admission import SendAsRules
from gatepost.policy.relay import RelayRules
from gatepost.store.settings import JournalSettings

MIB = 1 << 20


class CertificateFiles(NamedTuple):
    """Paths of PEM files: a certificate with its chain, and its key (which may stand in the same file)."""

    certificate: str
    key: str


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """[tls].

    Attributes:
        certificates: chosen by the name that the client asks for (SNI), the first where none matches; none at all: a
            self-signed pair made under data.
        minimum: the oldest version of TLS, where a listener says nothing else.
    """

    certificates: tuple[CertificateFiles, ...] = ()
    minimum: str = "1.2"


@dataclass(frozen=True, slots=True)
class MailboxServer:
    """The POP3 or IMAP server behind a listener of role "pop3" or "imap".

    Attributes:
        tls: "off", "opportunistic", "required" or "implicit", as in ``auth.settings.LoginServer``.
        accounts_max: an address from which more accounts than so many logged in lately is shared by many clients, and
            opens no window.
    """

    host: str
    port: int
    tls: str = "opportunistic"
    timeout_s: float = 10.0
    accounts_max: int = 3


@dataclass(frozen=True, slots=True)
class ListenSettings:
    """One [[listen]] table.

    Attributes:
        addresses: (host, port) pairs; port 0 lets the system choose.
        role: "mx", "submission" or "inside"; "pop3" or "imap" for a proxy in front of a mailbox server.
        tls: "none", "starttls" or "implicit"; tls_minimum: the oldest version, "1.0" to "1.3".
        proxy_from: networks whose connections must begin with a PROXY header; from others one is refused.
        auth: "off", "offered" or "required".
        send_as: what becomes of an authenticated account that sends as somebody else: "enforce" refuses, "log" passes
            and says so, "off" does not look.
        xclient_from: networks whose clients may say with XCLIENT who the real client is.
        server: of a proxy: the mailbox server behind it.
        bare_newlines: "refuse" or "normalise", for every client of this listener.
    """

    name: str
    addresses: tuple[tuple[str, int], ...]
    where: str = ""
    role: str = "mx"
    tls: str = "none"
    proxy_from: tuple[str, ...] = ()
    auth: str = "off"
    auth_without_tls: bool = False
    bare_newlines: str = "refuse"
    tls_minimum: str = "1.2"
    send_as: str = "enforce"
    xclient_from: tuple[str, ...] = ()
    server: MailboxServer | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """[limits].  0 means none for the numbers of the first group; the second group has no "none".

    Attributes:
        message_size_octets: content, our trace field not counted.
        content_line_octets: one line of content without its CRLF (RFC 5321 §4.5.3.1.6 gives 998).
        header_section_octets: the header section with its line ends.
        memory_octets: content held in memory by one worker, all sessions together; beyond it temporary files serve.
        message_memory_octets: content of one message held in memory.
    """

    message_size_octets: int = 50 * MIB
    recipients_per_message: int = 100
    sessions: int = 4000
    sessions_per_client: int = 50
    sessions_per_minute_per_client: int = 300
    errors_per_session: int = 10
    messages_per_hour_per_mailbox: int = 1000

    content_line_octets: int = 998
    header_section_octets: int = 256 << 10
    received_fields: int = 100
    memory_octets: int = 64 * MIB
    message_memory_octets: int = 2 * MIB


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long the gate waits for its client, in seconds.  RFC 5321 §4.5.3.2; ``busy_s`` when sessions are scarce."""

    command_s: float = 300.0
    content_block_s: float = 180.0
    content_total_s: float = 3600.0
    proxy_header_s: float = 5.0
    tls_handshake_s: float = 30.0
    busy_s: float = 10.0


@dataclass(frozen=True, slots=True)
class GateSettings:
    """All that one worker needs to serve sessions.

    Attributes:
        name: the host name in greeting, EHLO and trace field.
        data: directory for keys, embedded mailboxes and temporary files.
        own_addresses: addresses of this host's listeners that are not wildcards (for address literals and loops).
        open_relay: strangers may send anywhere through this gate, and the administrator said so.
        selftest_s: the gate probes itself as often as that; 0 for never.
        shadowed: the rules with those that are only watched, None where there are none.
        journal: what is remembered of sessions and verdicts, and where.
        auth: who verifies a login; guesses: how much guessing is borne; send_as: which accounts may send as whom.
    """

    name: str
    data: str
    workers: int
    listens: tuple[ListenSettings, ...]
    rules: RelayRules
    backends: tuple[BackendSettings, ...]
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    tls: TlsSettings = TlsSettings()
    own_addresses: tuple[IPAddress, ...] = ()
    auth: AuthSettings = field(default_factory=AuthSettings)
    guesses: GuessLimits = field(default_factory=GuessLimits)
    send_as: SendAsRules = field(default_factory=SendAsRules)
    open_relay: bool = False
    selftest_s: float = 0.0
    shadowed: RelayRules | None = None
    journal: JournalSettings = field(default_factory=JournalSettings)
