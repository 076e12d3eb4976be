"""The tables and keys of gatepost.toml: names, forms, defaults, and what each means.

Why: said once, here; the loader judges by it and the reference documentation is printed from it.
Trust: an administrator's file; each model takes one parsed TOML table and refuses what it does not know.
Promise: strict: no text is taken for a number, no number for text, no key is ignored.
Sources: the configuration section of the interface; RFC 5321 §4.5.3 for limits and times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from gatepost.auth.settings import AuthSettings
from gatepost.backend.settings import BackendAddress
from gatepost.config import values
from gatepost.counters.distinct import MEMBERS_MAX
from gatepost.counters.guesses import GuessLimits
from gatepost.gate.settings import Limits, MailboxServer, Timeouts
from gatepost.policy.relay import IPNetwork
from gatepost.smtp.path import Pattern
from gatepost.smtp.reply import Reply
from gatepost.store.settings import JournalSettings

LIMITS = Limits()
TIMEOUTS = Timeouts()
AUTH = AuthSettings()
GUESSES = GuessLimits()
JOURNAL = JournalSettings()
MAILBOX = MailboxServer("", 0)
PUBLIC_TRUST = 65536
SELFTEST_S = 86400.0


@dataclass(frozen=True, slots=True)
class Form:
    """How a value is written, for the reference; ``show`` writes a parsed default that way."""

    words: str
    show: Callable[[Any], str] | None = None


def _several(value: object) -> object:
    return value if isinstance(value, list) else [value]


def _name(value: str) -> str:
    if not value or not all(c.isascii() and (c.isalnum() or c in "._-") for c in value) or len(value) > 64:
        raise ValueError('a name is made of letters, digits, ".", "_" and "-"; write one such as "mx"')
    return value


def _line(value: str) -> str:
    if values.UNSHOWABLE.search(value) or len(value) > 500:
        raise ValueError("this is shown to people on one line; write at most 500 characters, none of them a control")
    return value


def _absent(sentence: str, harmless: object = None) -> Callable[[object], object]:
    """A validator for a key whose work this version does not do, and whose absence would do harm."""

    def refuse(value: object) -> object:
        if value != harmless:
            raise ValueError(sentence)
        return value

    return refuse


def _filled(value: list[Any]) -> list[Any]:
    if not value:
        raise ValueError("the list is empty; name at least one, or remove the key")
    return value


Size = Annotated[int, PlainValidator(values.size_octets), Form('size, such as "50 MiB"; 0 = none', values.size_text)]
Wait = Annotated[
    float, PlainValidator(values.duration_s), Field(ge=1, le=86400), Form('time, such as "30m"', values.duration_text)
]
Bound = Annotated[int, PlainValidator(values.size_octets), Form('size, such as "1 MiB"', values.size_text)]
Duration = Annotated[float, PlainValidator(values.duration_s), Form('time, such as "30m"', values.duration_text)]
NEVER = Form('time, such as "1d"; 0 = never', values.duration_text)
Count = Annotated[int, Field(ge=0, le=10**9), Form("number; 0 = none")]
Expiry = Annotated[float, PlainValidator(values.expiry), Form("date or date-time, without quotes, UTC")]
Network = Annotated[IPNetwork, PlainValidator(values.network), Form("network: CIDR, address/mask or one address")]
HostPort = Annotated[tuple[str, int], PlainValidator(values.listen_address), Form('"address:port" or "[v6]:port"')]
BackendAt = Annotated[
    BackendAddress,
    PlainValidator(values.backend_address),
    Form('"host:port", "lmtp:/path", "lmtp:host:port" or "embedded:"'),
]
ServerAt = Annotated[tuple[str, int], PlainValidator(values.server_address), Form('"host:port"')]
LdapAt = Annotated[
    tuple[bool, str, int],
    PlainValidator(values.ldap_address),
    Form('"host:port", "ldap://host:port" or "ldaps://host:port"'),
]
DovecotAt = Annotated[
    str | tuple[str, int],
    PlainValidator(values.dovecot_address),
    Form('"/run/dovecot/auth-client" (a Unix socket) or "host:port"'),
]
LoginForm = Annotated[str, AfterValidator(values.login_form), Form('text with "{user}" or "{local_part}"')]
AccountName = Annotated[str, PlainValidator(values.account), Form('account name; "*" for all')]
DomainName = Annotated[str, PlainValidator(values.domain), Form("domain name")]
LocalDomain = Annotated[
    str, PlainValidator(values.local_domain), Form('"example.com", "*.example.com" or "[192.0.2.1]"')
]
PathPattern = Annotated[
    Pattern,
    PlainValidator(lambda value: Pattern.parse(values.text(value))),
    Form('pattern: "user@example.com", "*@example.com", "*@*.example.com", "<>" or "*"', str),
]
RoutePattern = Annotated[
    Pattern | Literal["local"],
    PlainValidator(lambda value: "local" if value == "local" else Pattern.parse(values.text(value))),
    Form('pattern: "user@example.com", "*@example.com", "*@*.example.com", "local" or "*"', str),
]
HeloPattern = Annotated[str, PlainValidator(values.helo_pattern), Form('"name" or "*.name"')]
Fingerprint = Annotated[str, PlainValidator(values.fingerprint), Form("SHA-256, hexadecimal")]
Refusal = Annotated[Reply, PlainValidator(values.refusal), Form('"550 5.7.1 Not from there"')]
Secret = Annotated[values.Secret, PlainValidator(values.secret), Form('text, "${NAME}" or { file = "/run/secrets/x" }')]
Name = Annotated[str, AfterValidator(_name), Form("name")]
Line = Annotated[str, AfterValidator(_line), Form("one line of text")]
File = Annotated[str, AfterValidator(_line), Form("path, relative to this file")]
TlsVersion = Literal["1.0", "1.1", "1.2", "1.3"]
BareNewlines = Literal["refuse", "normalise"]


class Table(BaseModel):
    """What all tables have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


class Gate(Table):
    """This gate as a whole."""

    name: DomainName | None = Field(
        None, description="The name in greeting, EHLO and trace field. Default: the host's own full name."
    )
    data: File = Field(
        "",
        description="Directory of what the gate keeps: keys, embedded mailboxes, temporary files, its process id. "
        "Default: /var/lib/gatepost for a configuration below /etc, otherwise gatepost-data beside the configuration.",
    )
    workers: int | None = Field(
        None, ge=1, le=256, description="Worker processes. Default: the number of CPUs that the gate may use."
    )
    user: Line = Field(
        "",
        description="The user whose privileges the gate takes once its ports are bound; needed where it is started as "
        "root.",
    )
    public_trust: int = Field(
        PUBLIC_TRUST,
        ge=0,
        le=2**32,
        description="How many public IPv4 addresses, and how many IPv6 sites (/48), may relay without AUTH in all "
        "before the configuration counts as an open relay and is refused: by default 65,536 addresses and a /32. An "
        "entry that has expired, or whose forward_paths all name domains, does not count.",
    )
    open_relay: DomainName | None = Field(
        None,
        description="The only way to load a configuration that relays for strangers: this gate's own name, as in name.",
    )
    selftest: Annotated[float, PlainValidator(values.duration_s), Field(le=31 * 86400), NEVER] = Field(
        SELFTEST_S,
        description="How often the gate probes itself through each of its listeners, as a stranger, and compares with "
        "its rules; first some minutes after the start. A disagreement is an error in the log and a warning in "
        "`gatepost status`.",
    )


class Listen(Table):
    """One listener: its addresses, and what is expected of clients that come there. At least one."""

    name: Name | None = Field(None, description="What logs, metrics and [[trust]] call it. Default: its role.")
    address: Annotated[list[HostPort], BeforeValidator(_several), AfterValidator(_filled)] = Field(
        description="Where to listen: one or several. Port 0 lets the system choose. 0.0.0.0 is every IPv4 address, "
        "[::] every IPv6 address, and localhost means 127.0.0.1.",
    )
    role: Literal["mx", "submission", "inside", "pop3", "imap"] = Field(
        "mx",
        description="mx: strangers bring mail for us. submission: AUTH is required. inside: our own machines. pop3, "
        "imap: a proxy in front of the mailbox server named in server, see [[trust]] pop3.",
    )
    tls: Literal["none", "starttls", "implicit"] = Field(
        "none", description="none, starttls (offered in EHLO) or implicit (TLS from the first octet, as on port 465)."
    )
    tls_minimum: TlsVersion | None = Field(
        None, description="The oldest version of TLS that is spoken here. Default: [tls] minimum."
    )
    proxy_from: Annotated[list[Network], BeforeValidator(_several)] = Field(
        default_factory=list,
        description="Connections from these must begin with a PROXY header (v1 or v2), which says who the client is; "
        "from anybody else such a header is refused.",
    )
    auth: Literal["off", "offered", "required"] | None = Field(
        None,
        description="Whether clients may or must log in. Default by role: mx off, submission required, inside offered.",
    )
    auth_without_tls: bool = Field(
        False, description="Offer AUTH on plain connections, too. Passwords then cross the network as they are."
    )
    send_as: Literal["enforce", "log", "off"] | None = Field(
        None,
        description="What becomes of an account that sends as somebody else, in MAIL FROM or in the From field: "
        "enforce refuses it, log lets it pass and says so in the log, off does not look. Default by role: "
        "submission enforce, mx log, inside off.",
    )
    xclient_from: Annotated[list[Network], BeforeValidator(_several)] = Field(
        default_factory=list,
        description="Clients in these may say with XCLIENT who the real client is. Nobody else is offered XCLIENT.",
    )
    server: ServerAt | None = Field(
        None, description="Of a listener of role pop3 or imap: the mailbox server behind it. Required there."
    )
    server_tls: Literal["off", "opportunistic", "required", "implicit"] = Field(
        "opportunistic",
        description="How the mailbox server is spoken to: off, opportunistic (STLS or STARTTLS where offered, its "
        "certificate not judged), required (never without, judged) or implicit (TLS from the first octet, judged).",
    )
    accounts_per_address: int = Field(
        MAILBOX.accounts_max,
        ge=1,
        le=MEMBERS_MAX - 1,
        description="Of a listener of role pop3 or imap: an address from which more accounts than so many logged in "
        "within a day is shared by many clients, and no login from there lets anybody send.",
    )
    bare_newlines: BareNewlines = Field(
        "refuse",
        description="What becomes of a CR or LF that stands alone in content: refuse, or normalise to CRLF. Neither "
        "sends one on.",
    )


class Tls(Table):
    """The certificates of listeners with TLS. Without one, a self-signed one is made below data."""

    certificate: Annotated[list[File], BeforeValidator(_several)] = Field(
        default_factory=list,
        description="PEM file: the certificate, then its chain. Several: chosen by the name that the client asks for "
        "(SNI), the first where none has that name. Read again when a file changes.",
    )
    key: Annotated[list[File], BeforeValidator(_several)] = Field(
        default_factory=list,
        description="PEM file of the private key, in the order of certificate. Default: each stands in its "
        "certificate's file.",
    )
    minimum: TlsVersion = Field("1.2", description="The oldest version of TLS, where no listener says otherwise.")


class Domains(Table):
    """The domains whose mail is ours."""

    local: Annotated[list[LocalDomain], BeforeValidator(_several)] = Field(
        default_factory=list,
        description="Anyone may send mail to these. *.example.com is every name below example.com and not example.com "
        "itself. International names in either form. The first domain without * takes the mail to bare postmaster.",
    )


class Backend(Table):
    """One server that takes the mail. The first in the file takes what no [[route]] takes."""

    address: Annotated[list[BackendAt], BeforeValidator(_several), AfterValidator(_filled)] = Field(
        description="One or several, tried in order. lmtp: speaks LMTP to a Unix socket or a port. embedded: keeps a "
        "Maildir for each mailbox below data, embedded:/directory below that directory.",
    )
    tls: Literal["off", "opportunistic", "required"] = Field(
        "opportunistic",
        description="opportunistic: STARTTLS where the backend offers it, its certificate not judged. required: never "
        "without, and the certificate must be right.",
    )
    connections: int = Field(
        100, ge=1, le=100_000, description="At most so many at once; each worker has an even share, of one at least."
    )
    connect_timeout: Duration = Field(
        10.0, description="How long one address may take to connect, TLS included, before the next is tried."
    )
    when_down: Annotated[
        Literal["defer", "spool"],
        AfterValidator(
            _absent("this version does not spool, so that mail it answered for would be lost; remove the key", "defer")
        ),
    ] = Field(
        "defer",
        description="While the backend is out of reach: defer (451, the client keeps the message). spool is refused: "
        "this version has no spool.",
    )
    xclient: bool = Field(
        False,
        description="Hand the client's address, its EHLO name and account on with XCLIENT, where the backend offers "
        "it. The backend must allow that to the gate's address.",
    )
    proxy: Literal["off", "v1", "v2"] = Field(
        "off",
        description="Begin each connection with a PROXY header of this version that names the client. The backend must "
        "expect it; its connections are then not shared by clients.",
    )
    auth: Annotated[
        Any,
        PlainValidator(
            _absent("this version does not log in to a backend, which would refuse the mail; remove the key"),
        ),
        Form("table"),
    ] = Field(None, description="Refused: this version does not log in to a backend.")


class Route(Table):
    """Which backend takes which forward-paths. The first match wins; without one the first backend takes the mail."""

    forward_paths: Annotated[list[RoutePattern], BeforeValidator(_several), AfterValidator(_filled)] = Field(
        description="Patterns; local stands for all local domains."
    )
    backend: Name = Field(description="The NAME of a [backend.NAME].")


class Trust(Table):
    """Who may send anywhere: one grant. Exactly one of network, host, listen, accounts, certificate and pop3."""

    network: Network | None = Field(None, description="Who: clients in this network.")
    host: DomainName | None = Field(None, description="Who: the addresses of this DNS name, followed as it moves.")
    listen: Name | None = Field(None, description="Who: the clients of the listener with this name.")
    accounts: Annotated[list[AccountName], BeforeValidator(_several), AfterValidator(_filled)] | None = Field(
        None, description="Who: clients that logged in, by account name; * for all."
    )
    certificate: Fingerprint | None = Field(
        None, description="Who: clients that show this certificate in the TLS handshake, whoever signed it."
    )
    pop3: Annotated[Duration, Field(ge=60, le=86400)] | None = Field(
        None,
        description="Who: clients from whose address somebody logged in to a listener of role pop3 or imap in the time "
        "given.",
    )
    why: Line = Field("", description="Why this grant exists; named in verdicts.")
    owner: Line = Field("", description="Whom to ask about it.")
    expires: Expiry | None = Field(
        None, description="When the grant ends: a date (to the end of that day, UTC) or a date-time."
    )
    reverse_paths: Annotated[list[PathPattern], BeforeValidator(_several), AfterValidator(_filled)] | None = Field(
        None, description="Only as these. Default: any. A reverse-path only narrows a grant, it never makes one."
    )
    forward_paths: Annotated[list[PathPattern], BeforeValidator(_several), AfterValidator(_filled)] | None = Field(
        None, description="Only to these. Default: any."
    )
    messages_per_hour: Count = Field(
        0, description="At most so many messages in an hour, all clients of this grant together."
    )
    recipients_per_hour: Count = Field(
        0, description="At most so many recipients in an hour, all clients of this grant together."
    )
    tls_minimum: TlsVersion | None = Field(
        None,
        description="Only over TLS of at least this version. One below the listener's is spoken with the clients of "
        "this network or host, and with nobody else.",
    )
    bare_newlines: BareNewlines = Field("refuse", description="As in [[listen]], for these clients.")
    shared: bool = Field(
        False,
        description="Of network, host and listen: several clients are known to hide behind one address, or public ones "
        "to come to the listener. The grant is then never suspended, whoever is seen there.",
    )
    shadow: bool = Field(
        False,
        description="Decided and journalled, not acted on: what it would change stands as `would` in the log and in "
        "`gatepost trace`.",
    )


class Deny(Table):
    """Refused whatever else is allowed. Exactly one of network, host, helo, reverse_path and forward_path."""

    network: Network | None = Field(None, description="Who: clients in this network.")
    host: DomainName | None = Field(None, description="Who: the addresses of this DNS name, followed as it moves.")
    helo: HeloPattern | None = Field(None, description="Who: clients that call themselves so in EHLO or HELO.")
    reverse_path: PathPattern | None = Field(None, description="Who: mail that claims to come from here.")
    forward_path: PathPattern | None = Field(None, description="Mail to here.")
    reply: Refusal | None = Field(None, description="The reply in place of our own: code, status and words.")
    why: Line = Field("", description="Why; named in verdicts, not in replies.")
    owner: Line = Field("", description="Whom to ask about it.")
    expires: Expiry | None = Field(None, description="When it ends, as in [[trust]].")
    shadow: bool = Field(False, description="Decided and journalled, not acted on, as in [[trust]].")


class SendAs(Table):
    """As whom an account may send, besides its own address: aliases, shared mailboxes, a whole domain.

    An account's own address is its name, where that is an address, else its name at each of our local domains.
    """

    accounts: Annotated[list[AccountName], BeforeValidator(_several), AfterValidator(_filled)] = Field(
        description="Which accounts; * for all."
    )
    reverse_paths: Annotated[list[PathPattern], BeforeValidator(_several), AfterValidator(_filled)] = Field(
        description="As whom: patterns, for MAIL FROM and for the From field alike."
    )
    why: Line = Field("", description="Why this grant exists.")
    owner: Line = Field("", description="Whom to ask about it.")
    expires: Expiry | None = Field(None, description="When it ends, as in [[trust]].")


class Auth(Table):
    """Who verifies a login."""

    verify: Annotated[
        list[Literal["accounts", "pop3", "imap", "smtp", "ldap", "dovecot", "oauth"]],
        BeforeValidator(_several),
        AfterValidator(_filled),
    ] = Field(
        ["accounts"],
        description="Asked in order until one says yes; each but accounts has a table of its own. accounts are ours, "
        "see `gatepost account`. oauth takes tokens, the others take passwords. Where one is out of reach and no other "
        "says yes, the client hears 454 and no guess is counted.",
    )
    cache: Annotated[Duration, Field(le=3600)] = Field(
        AUTH.cache_s,
        description="How long a good login to another server is believed again without asking; 0 for never. A login "
        "with another password, once that server took it, ends it.",
    )


class GuessBounds(Table):
    """How much guessing of passwords is borne, all workers together. Answers are slowed before anybody is banned."""

    secrets_per_user: int = Field(
        GUESSES.secrets_per_user,
        ge=1,
        le=MEMBERS_MAX,
        description="Different wrong passwords for one account from one network (IPv4 /24, IPv6 /64) before that "
        "network is banned from that account. The same wrong password again and again counts once.",
    )
    users_per_client: int = Field(
        GUESSES.users_per_client,
        ge=1,
        le=MEMBERS_MAX,
        description="Different accounts tried with wrong passwords from one network before the client is banned. One "
        "with a good login in the last seven days is not, nor is a listed proxy or the gate's own address.",
    )
    window: Annotated[Duration, Field(ge=60, le=86400)] = Field(
        GUESSES.window_s, description="How long an attempt counts."
    )
    ban: Annotated[Duration, Field(ge=60, le=31 * 86400)] = Field(GUESSES.ban_s, description="How long a ban lasts.")
    bait_ban: Annotated[Duration, Field(ge=60, le=31 * 86400)] = Field(
        GUESSES.bait_ban_s, description="How long one lasts after the use of a bait account."
    )


class LoginServer(Table):
    """A login to the server itself, so that its accounts stay where they are."""

    address: ServerAt = Field(description="The server that knows its users' passwords.")
    tls: Literal["off", "opportunistic", "required", "implicit"] = Field(
        "opportunistic",
        description="off, opportunistic (where offered, its certificate not judged), required (never without, judged) "
        "or implicit (TLS from the first octet, judged).",
    )
    authority: File = Field(
        "",
        description="PEM file of the authority that signed its certificate, where it is judged. Default: the system's.",
    )
    login: LoginForm = Field(
        "{user}",
        description="How the user is named to the server: {user} as typed, {local_part} before the @, {domain} behind "
        "it.",
    )
    timeout: Annotated[Duration, Field(ge=1, le=300)] = Field(10.0, description="For the whole of one login.")
    connections: int = Field(20, ge=1, le=10_000, description="Logins at the same time, in each worker.")


class Ldap(Table):
    """A bind as the user. Needs the extra package `gatepost[ldap]`, which a clone's own set-up brings."""

    address: LdapAt = Field(description="The directory. ldaps is TLS from the first octet.")
    tls: Literal["off", "starttls"] = Field(
        "starttls", description="For ldap: StartTLS, or passwords cross the network as they are."
    )
    authority: File = Field(
        "", description="PEM file of the authority that signed its certificate. Default: the system's."
    )
    bind: Line = Field(
        "",
        description='The name to bind as, such as "uid={user},ou=people,dc=example,dc=com", or "{user}" for Active '
        "Directory. Without it the entry is searched for.",
    )
    search_base: Line = Field("", description="Below which entry to search.")
    search_filter: Line = Field("", description='How the one entry is found, such as "(mail={user})".')
    search_bind: Line = Field("", description="Whom the search is done as. Default: nobody.")
    search_password: Secret | None = Field(None, description="Its password.")
    addresses: Annotated[list[Line], BeforeValidator(_several)] = Field(
        default_factory=list,
        description='Attributes that hold addresses which the account may send as, such as ["mail", "proxyAddresses"].',
    )
    timeout: Annotated[Duration, Field(ge=1, le=300)] = Field(10.0, description="For the whole of one login.")
    connections: int = Field(20, ge=1, le=10_000, description="Logins at the same time, in each worker.")


class Dovecot(Table):
    """Dovecot's own authentication, over its auth-client socket."""

    address: DovecotAt = Field(description="Where Dovecot listens for it.")
    timeout: Annotated[Duration, Field(ge=1, le=300)] = Field(10.0, description="For the whole of one login.")


class Oauth(Table):
    """Tokens of an OAuth 2 issuer (XOAUTH2, OAUTHBEARER): either signed, and checked by jwks, or asked for there."""

    jwks: Line = Field("", description="URL or file of the keys that sign its tokens.")
    introspection: Line = Field("", description="URL at which a token is asked for (RFC 7662).")
    client_id: Line = Field("", description="Who asks there.")
    client_secret: Secret | None = Field(None, description="Its secret.")
    issuer: Line = Field("", description="What a token must name as its issuer. Default: any.")
    audience: Line = Field("", description="What a token must be made for. Default: any.")
    user_claim: Line = Field("email", description="The claim that names the account.")
    scope: Line = Field("", description="A scope that the token must hold.")
    timeout: Annotated[Duration, Field(ge=1, le=300)] = Field(10.0, description="For one question.")


class Limit(Table):
    """Bounds against floods. 0 means none where the form says so."""

    message_size: Size = Field(LIMITS.message_size_octets, description="Content of one message; announced as SIZE.")
    recipients_per_message: Count = Field(
        LIMITS.recipients_per_message, description="Recipients of one transaction; RFC 5321 asks for 100 at least."
    )
    sessions: Count = Field(LIMITS.sessions, description="Sessions at once, all workers together.")
    sessions_per_client: Count = Field(LIMITS.sessions_per_client, description="Sessions at once from one address.")
    sessions_per_minute_per_client: Count = Field(
        LIMITS.sessions_per_minute_per_client, description="New sessions in a minute from one address."
    )
    errors_per_session: Count = Field(
        LIMITS.errors_per_session, description="Refused commands after which a session is closed."
    )
    messages_per_hour_per_mailbox: Count = Field(
        LIMITS.messages_per_hour_per_mailbox, description="Messages in an hour to one local mailbox: mail bombs."
    )
    content_line: Annotated[Bound, Field(ge=998, le=1 << 16)] = Field(
        LIMITS.content_line_octets, description="One line of content, without CRLF. From 998 B to 64 KiB."
    )
    header_section: Annotated[Bound, Field(ge=1 << 10, le=16 << 20)] = Field(
        LIMITS.header_section_octets, description="The header section of a message. From 1 KiB to 16 MiB."
    )
    memory: Annotated[Bound, Field(ge=1 << 20, le=1 << 40)] = Field(
        LIMITS.memory_octets,
        description="Content that one worker holds in memory, all sessions together; the rest waits in temporary "
        "files below data. At least 1 MiB.",
    )


class Timeout(Table):
    """How long the gate waits for a client. Shorter than RFC 5321 §4.5.3.2 asks only where sessions are scarce."""

    command: Wait = Field(TIMEOUTS.command_s, description="For the next command.")
    content_block: Wait = Field(TIMEOUTS.content_block_s, description="For the next octets of content.")
    content_total: Wait = Field(TIMEOUTS.content_total_s, description="For all the content of one message.")
    proxy_header: Wait = Field(TIMEOUTS.proxy_header_s, description="For the PROXY header.")
    tls_handshake: Wait = Field(TIMEOUTS.tls_handshake_s, description="For the TLS handshake.")
    busy: Wait = Field(TIMEOUTS.busy_s, description="For the next command or octets while sessions are scarce.")


class Console(Table):
    """Metrics and health for monitoring, from a process of its own."""

    address: HostPort = Field(("127.0.0.1", 8025), description="Where it listens. It asks for no login.")


class Store(Table):
    """Where the journal is kept. Default: SQLite, in `journal/journal.sqlite` below data."""

    url: Secret | None = Field(
        None,
        description='A PostgreSQL database: "postgresql://user:password@host:5432/database". It needs the extra '
        "`postgresql` (the driver psycopg). Takes effect with a reload.",
    )


class Journal(Table):
    """What is remembered of sessions, transactions and verdicts, for trace, explain, whosent and replay.

    Never content, never a secret.
    """

    enabled: bool = Field(default=JOURNAL.enabled, description="Whether it is kept at all.")
    before_reply: bool = Field(
        default=JOURNAL.before_reply,
        description="Whether a message's record is on the disk before its 250; a disk that does not take it then "
        "defers the message with 451. Else it is there within a fifth of a second.",
    )
    keep: Annotated[Duration, Field(ge=3600)] = Field(
        JOURNAL.keep_s, description="How long it is kept as it is. At least an hour."
    )
    pseudonyms: Annotated[Duration, NEVER] = Field(
        JOURNAL.pseudonyms_s,
        description="How long after that with keyed pseudonyms in place of clients, accounts and local-parts; 0 = not.",
    )
    entries: Annotated[int, Field(ge=1000, le=10**12), Form("number")] = Field(
        JOURNAL.entries_max,
        description="How many verdicts it holds, and how many sessions: about a kilobyte each. Beyond it the oldest "
        "go, however young, so that a flood fills no disk. At least 1000.",
    )
    backlog: Annotated[Bound, Field(ge=32 << 20, le=1 << 40)] = Field(
        JOURNAL.backlog_octets,
        description="What may wait on the disk while the database is away; beyond it, records are dropped and "
        "counted, those of refusals first. At least 32 MiB.",
    )


class Counters(Table):
    """Where rates are counted. Default: in this gate's own memory."""

    url: Annotated[
        Any,
        PlainValidator(
            _absent(
                "this version shares no counters, so that each machine would let the full rates through; remove the key"
            )
        ),
        Form("text"),
    ] = Field(None, description="Refused: this version counts rates for one machine only and shares them with none.")


SECTIONS: dict[str, type[Table]] = {
    "gate": Gate,
    "tls": Tls,
    "domains": Domains,
    "auth": Auth,
    "limits": Limit,
    "timeouts": Timeout,
    "console": Console,
    "store": Store,
    "journal": Journal,
    "counters": Counters,
}
"""[table]: one each."""

SUBTABLES: dict[str, dict[str, type[Table]]] = {
    "auth": {
        "guesses": GuessBounds,
        "pop3": LoginServer,
        "imap": LoginServer,
        "smtp": LoginServer,
        "ldap": Ldap,
        "dovecot": Dovecot,
        "oauth": Oauth,
    }
}
"""[table.part]: one each, judged by itself; there is no default for one that is missing."""

ENTRIES: dict[str, type[Table]] = {"listen": Listen, "route": Route, "trust": Trust, "deny": Deny, "send_as": SendAs}
"""[[table]]: any number, in order."""

NAMED: dict[str, type[Table]] = {"backend": Backend}
"""[table.NAME]: any number."""

WHO_KEYS = {
    "trust": ("network", "host", "listen", "accounts", "certificate", "pop3"),
    "deny": ("network", "host", "helo", "reverse_path", "forward_path"),
}
"""Exactly one of these stands in each entry."""

SECRET_KEYS = frozenset({"url", "password", "secret", "token", "search_password", "client_secret"})
"""Keys whose values no message may show."""
