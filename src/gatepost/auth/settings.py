"""Who verifies a login: frozen values that ``config`` builds from [auth] and its tables."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LoginServer:
    """[auth.pop3], [auth.imap], [auth.smtp]: a server that knows its users' passwords.

    Attributes:
        host, port: where it is; a DNS name is looked up at each login.
        tls: "off", "opportunistic" (STLS or STARTTLS where offered, the certificate not judged), "required" (the same,
            never without, the certificate judged) or "implicit" (TLS from the first octet, judged).
        authority: PEM file of the authority that signed its certificate, "" for the system's.
        login: how the user's name is told to the server: "{user}" as typed, "{local_part}", "{domain}".
        timeout_s: for the whole of one login.
        connections: logins at the same time, in this process.
    """

    host: str
    port: int
    tls: str = "opportunistic"
    login: str = "{user}"
    timeout_s: float = 10.0
    connections: int = 20
    authority: str = ""


@dataclass(frozen=True, slots=True)
class LdapServer:
    """[auth.ldap]: a bind as the user.

    Attributes:
        host, port; tls: "off", "starttls" or "implicit"; the certificate is judged by the system's authorities, or by
            ``authority``, a PEM file.
        bind: the name to bind with, where it can be made from the login: "uid={user},ou=people,dc=example,dc=com", or
            for Active Directory "{user}"; "" where the entry is searched for.
        search_base, search_filter: where and how the entry is found, such as "(mail={user})"; search_bind and
            search_password: whom the search is done as, "" anonymously.
        addresses: attributes whose values are addresses that the account may send as, such as "mail" and
            "proxyAddresses" ("smtp:" before a value is taken off).
    """

    host: str
    port: int
    tls: str = "starttls"
    authority: str = ""
    bind: str = ""
    search_base: str = ""
    search_filter: str = ""
    search_bind: str = ""
    search_password: str = field(default="", repr=False)
    addresses: tuple[str, ...] = ()
    timeout_s: float = 10.0
    connections: int = 20


@dataclass(frozen=True, slots=True)
class DovecotServer:
    """[auth.dovecot]: Dovecot's auth protocol, on a Unix socket (path) or a TCP port (host, port)."""

    path: str = ""
    host: str = ""
    port: int = 0
    timeout_s: float = 10.0


@dataclass(frozen=True, slots=True)
class OauthIssuer:
    """[auth.oauth]: whose tokens are taken (XOAUTH2, OAUTHBEARER).

    Attributes:
        jwks: URL or path of the keys that sign tokens; "" where tokens are introspected.
        introspection: URL of RFC 7662; client_id, client_secret: who asks there.
        issuer, audience: what a token must say, "" for any.  A JWT without audience is refused where one is wanted.
        user_claim: the claim that names the account.
        scope: one that the token must hold, "" for none.
    """

    jwks: str = ""
    introspection: str = ""
    client_id: str = ""
    client_secret: str = field(default="", repr=False)
    issuer: str = ""
    audience: str = ""
    user_claim: str = "email"
    scope: str = ""
    timeout_s: float = 10.0


@dataclass(frozen=True, slots=True)
class AuthSettings:
    """[auth] as a whole.

    Attributes:
        verify: who is asked, in order: "accounts", "pop3", "imap", "smtp", "ldap", "dovecot", "oauth".
        cache_s: how long a good login to another server is believed again without asking, 0 for never.
        accounts: the directory of our own accounts.
        hello: the name we say to another SMTP server.
    """

    verify: tuple[str, ...] = ("accounts",)
    accounts: str = ""
    pop3: LoginServer | None = None
    imap: LoginServer | None = None
    smtp: LoginServer | None = None
    ldap: LdapServer | None = None
    dovecot: DovecotServer | None = None
    oauth: OauthIssuer | None = None
    cache_s: float = 60.0
    hello: str = "localhost"
