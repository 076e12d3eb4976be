"""From judged tables to the values that each package takes.

Why: here tables meet: names that refer to each other, keys that ask for what this version cannot do, and grants that
    together make an open relay.
Trust: an administrator's file, each table of it valid by itself.
Promise: a key that has no effect is never silently ignored.  Where its absence would let more mail through, or lose
    mail, that is a problem; where it only refuses more, a warning.  A file that relays for strangers does not load.
Sources: RFC 5321 §4.5.1 (postmaster); RFC 8996 (old TLS); RFC 6890 (special addresses); RFC 6761, RFC 8375 (names).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

from gatepost.auth.settings import AuthSettings, DovecotServer, LdapServer, LoginServer, OauthIssuer
from gatepost.backend import dialect, profile
from gatepost.backend.settings import BackendAddress, BackendSettings, EmbeddedMailboxes, LmtpSocket, SmtpAddress
from gatepost.config import dialects, exposure, schema
from gatepost.config.document import Document
from gatepost.config.places import Path as Place
from gatepost.config.values import ANY_IPV4, address_text, domain, login_form
from gatepost.counters.guesses import GuessLimits
from gatepost.errors import StorageError
from gatepost.facts import IPAddress, client_address
from gatepost.gate.settings import (
    CertificateFiles,
    GateSettings,
    Limits,
    ListenSettings,
    MailboxServer,
    Timeouts,
    TlsSettings,
)
from gatepost.policy import prover
from gatepost.policy.admission import SendAsEntry, SendAsRules
from gatepost.policy.prover import Listener, Proof
from gatepost.policy.relay import DenyEntry, LocalPattern, RelayRules, Reread, Route, TrustEntry
from gatepost.smtp.path import Pattern
from gatepost.store.settings import JournalSettings

_DEFAULT_AUTH = {"mx": "off", "submission": "required", "inside": "offered"}
_DEFAULT_SEND_AS = {"mx": "log", "submission": "enforce", "inside": "off"}
_BROKEN = ("1.0", "1.1")  # RFC 8996
_PROXIES = ("pop3", "imap")  # roles of listeners in front of a mailbox server


def build(document: Document, now: float, *, refuse_open: bool = True) -> GateSettings:
    """The gate's settings.  Problems and warnings go to the document; the value counts only if there are none.

    Args:
        now: seconds since the epoch, for entries that have expired.
        refuse_open: an open relay is a problem; False tells what is wrong besides.
    """
    gate = cast("schema.Gate", document.tables["gate"])
    limits = cast("schema.Limit", document.tables["limits"])
    name = gate.name or _own_name(document)
    data = _path(document.path, gate.data) if gate.data else _default_data(document.path)
    listens = _listens(document)
    workers = gate.workers or len(os.sched_getaffinity(0))
    backends = _backends(document, listens, name, data, workers)
    rules, shadowed = _rules(document, limits.recipients_per_message, _reread(document, data, backends), now)
    auth = _auth(document, data, name)
    _refuse_lost_references(document)
    _judge_logins(document, listens, rules)
    journal = _journal(document)
    _refuse_open_relay(document, listens, rules, name, now, refuse=refuse_open)
    if shadowed is not None:
        _warn_of_open_shadows(document, listens, shadowed, now)
        _warn_of_blind_shadows(document, rules)
    return GateSettings(
        name=name,
        data=data,
        workers=workers,
        listens=listens,
        rules=rules,
        shadowed=shadowed,
        backends=backends,
        limits=Limits(
            message_size_octets=limits.message_size,
            recipients_per_message=limits.recipients_per_message,
            sessions=limits.sessions,
            sessions_per_client=limits.sessions_per_client,
            sessions_per_minute_per_client=limits.sessions_per_minute_per_client,
            errors_per_session=limits.errors_per_session,
            messages_per_hour_per_mailbox=limits.messages_per_hour_per_mailbox,
            content_line_octets=limits.content_line,
            header_section_octets=limits.header_section,
            memory_octets=limits.memory,
            message_memory_octets=min(schema.LIMITS.message_memory_octets, limits.memory),
        ),
        timeouts=_timeouts(document),
        tls=_tls(document),
        own_addresses=_own_addresses(listens),
        auth=auth,
        guesses=_guesses(document),
        send_as=_send_as(document, rules, now),
        open_relay=gate.open_relay == name,
        selftest_s=gate.selftest,
        journal=journal,
    )


def console_address(document: Document) -> tuple[str, int]:
    """Where the console listens; warned of where others can reach it."""
    host, port = cast("schema.Console", document.tables["console"]).address
    if not ip_address(host).is_loopback:
        document.warning(
            ("console", "address"),
            "the console asks for no login, whoever reaches this address reads it; let a firewall keep strangers out",
            value=address_text(host, port),
        )
    for index, listen in document.entries["listen"]:
        if port and (host, port) in listen.address:
            document.problem(
                ("console", "address"),
                f"the listener at {document.places.at(('listen', index))} has this address; choose another port",
                value=address_text(host, port),
            )
    return host, port


# --- The gate itself --------------------------------------------------------------------------------------------------


def _path(config_path: str, written: str) -> str:
    """A relative path counts from the directory of the configuration."""
    return str(Path(config_path).absolute().parent / written)


def _default_data(config_path: str) -> str:
    directory = Path(config_path).absolute().parent
    return "/var/lib/gatepost" if directory.is_relative_to("/etc") else str(directory / "gatepost-data")


def _own_name(document: Document) -> str:
    """The host's own full name."""
    name = socket.gethostname()
    if "." not in name:
        name = socket.getfqdn(name)
    try:
        name = domain(name)
    except ValueError:
        name = "localhost"
    if "." not in name:
        document.warning(
            ("gate", "name"),
            f'the name is not set, and this host knows no full name of its own, so the gate calls itself "{name}"; '
            'write name = "mx.example.com" in [gate]',
        )
    return name


# --- Listeners --------------------------------------------------------------------------------------------------------


def _listens(document: Document) -> tuple[ListenSettings, ...]:
    if "listen" not in document.written:
        document.problem((), 'no [[listen]] table: nothing would listen; write [[listen]] and address = "host:port"')
    names: dict[str, str] = {}
    addresses: dict[tuple[str, int], str] = {}
    out = []
    for index, listen in document.entries["listen"]:
        path = ("listen", index)
        where = document.places.at(path)
        name = listen.name or listen.role
        if name in names:
            document.problem(
                (*path, "name"), f"the listener at {names[name]} has this name, too; give each its own", value=name
            )
        names.setdefault(name, where)
        for number, address in enumerate(listen.address):
            if address[1] and address in addresses:
                document.problem(
                    (*path, "address", number),
                    f"{addresses[address]} listens there, too; keep one",
                    value=address_text(*address),
                )
            addresses.setdefault(address, where)
        _judge_proxy(document, path, listen)
        if listen.role == "submission" and listen.auth not in (None, "required"):
            document.problem(
                (*path, "auth"),
                'a submission listener requires AUTH; remove the key, or write role = "inside"',
                value=listen.auth,
            )
        out.append(
            ListenSettings(
                name=name,
                addresses=tuple(listen.address),
                where=where,
                role=listen.role,
                tls=listen.tls,
                proxy_from=tuple(map(str, listen.proxy_from)),
                auth=listen.auth or _DEFAULT_AUTH.get(listen.role, "off"),
                auth_without_tls=listen.auth_without_tls,
                bare_newlines=listen.bare_newlines,
                tls_minimum=_tls_minimum(document, path, listen),
                send_as=listen.send_as or _DEFAULT_SEND_AS.get(listen.role, "off"),
                xclient_from=tuple(map(str, listen.xclient_from)),
                server=_mailbox_server(listen),
            )
        )
    return tuple(out)


def _judge_proxy(document: Document, path: Place, listen: schema.Listen) -> None:
    """The keys of a mailbox proxy stand in its table, and those of SMTP do not."""
    if listen.role in _PROXIES:
        if listen.server is None:
            document.problem(
                path, f'a listener of role {listen.role} needs the server behind it; write server = "10.0.0.5:110"'
            )
        for key in ("auth", "send_as"):
            if getattr(listen, key) is not None:
                document.problem((*path, key), f"this says nothing to a proxy for {listen.role}; remove the key")
        if listen.xclient_from:
            document.problem((*path, "xclient_from"), f"there is no XCLIENT in {listen.role}; remove the key")
    elif listen.server is not None:
        document.problem(
            (*path, "server"),
            'only a listener of role "pop3" or "imap" has a server behind it; set role, or remove the key',
        )


def _mailbox_server(listen: schema.Listen) -> MailboxServer | None:
    if listen.server is None:
        return None
    return MailboxServer(*listen.server, listen.server_tls, accounts_max=listen.accounts_per_address)


def _tls_minimum(document: Document, path: Place, listen: schema.Listen) -> str:
    common = cast("schema.Tls", document.tables["tls"]).minimum
    if listen.tls_minimum is None:
        return common
    if listen.tls == "none":
        document.problem(
            (*path, "tls_minimum"), 'this listener speaks no TLS; write tls = "starttls", or remove the key'
        )
    elif listen.tls_minimum in _BROKEN:
        document.warning(
            (*path, "tls_minimum"),
            "TLS 1.0 and 1.1 are broken (RFC 8996), and every client of this listener may be talked down to them; "
            "write it into the [[trust]] entry of the one device that needs it",
            value=listen.tls_minimum,
        )
    return listen.tls_minimum


def _tls(document: Document) -> TlsSettings:
    tls = cast("schema.Tls", document.tables["tls"])
    if tls.key and not tls.certificate:
        document.problem(("tls", "key"), "there is a key but no certificate; write certificate, too", value=tls.key[0])
    elif tls.key and len(tls.key) != len(tls.certificate):
        document.problem(
            ("tls", "key"),
            f"{len(tls.certificate)} certificates and {len(tls.key)} keys are no pairs; name a key for each, in order",
        )
    if tls.minimum in _BROKEN:
        document.warning(
            ("tls", "minimum"),
            'TLS 1.0 and 1.1 are broken (RFC 8996); write "1.2", and tls_minimum into the [[trust]] entry of the one '
            "device that needs less",
            value=tls.minimum,
        )
    certificates = [_path(document.path, certificate) for certificate in tls.certificate]
    keys = [_path(document.path, key) for key in tls.key] or certificates
    return TlsSettings(tuple(map(CertificateFiles, certificates, keys)), tls.minimum)


# --- Logins -----------------------------------------------------------------------------------------------------------


def _auth(document: Document, data: str, hello: str) -> AuthSettings:
    """Who verifies a login."""
    auth = cast("schema.Auth", document.tables["auth"])
    verify = tuple(dict.fromkeys(auth.verify))
    for number, name in enumerate(auth.verify):
        if name != "accounts" and not document.written_part("auth", name):
            document.problem(
                ("auth", "verify", number), f"there is no [auth.{name}]; write it, and its address below it", value=name
            )
    for part in schema.SUBTABLES["auth"].keys() - {"guesses"}:
        if document.written_part("auth", part) and part not in verify:
            document.warning(("auth", part), f'nobody is asked here: "{part}" is not in [auth] verify')
    return AuthSettings(
        verify=verify,
        accounts=str(Path(data) / "accounts"),
        pop3=_login_server(document, "pop3"),
        imap=_login_server(document, "imap"),
        smtp=_login_server(document, "smtp"),
        ldap=_ldap(document),
        dovecot=_dovecot(document),
        oauth=_oauth(document),
        cache_s=auth.cache,
        hello=hello,
    )


def _login_server(document: Document, name: str) -> LoginServer | None:
    table = cast("schema.LoginServer | None", document.tables.get(f"auth.{name}"))
    if table is None:
        return None
    host, port = table.address
    if table.tls == "off" and not _near(host):
        document.warning(
            ("auth", name, "tls"), "passwords cross the network as they are; write a tls that the server can do"
        )
    authority = _path(document.path, table.authority) if table.authority else ""
    return LoginServer(host, port, table.tls, table.login, table.timeout, table.connections, authority)


def _near(host: str) -> bool:
    """Passwords to this host do not leave this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _ldap(document: Document) -> LdapServer | None:
    table = cast("schema.Ldap | None", document.tables.get("auth.ldap"))
    if table is None:
        return None
    implicit, host, port = table.address
    path: Place = ("auth", "ldap")
    if not table.bind and not table.search_filter:
        document.problem(path, "the user's entry is either named by bind or found by search_filter; write one of them")
    if table.bind and table.search_filter and not table.addresses:
        document.problem(
            (*path, "search_filter"),
            "beside bind this finds the entry with the addresses; write addresses, or remove it",
        )
    if table.search_filter and not table.search_base:
        document.problem((*path, "search_filter"), "search_base is missing: below which entry shall be searched?")
    for key in ("bind", "search_filter"):
        written = str(getattr(table, key))
        if written:
            try:
                login_form(written)
            except ValueError as error:
                document.problem((*path, key), str(error))
    if table.tls == "off" and not implicit and not _near(host):
        document.warning(
            (*path, "tls"), 'passwords cross the network as they are; write "starttls", or an ldaps address'
        )
    return LdapServer(
        host=host,
        port=port,
        tls="implicit" if implicit else table.tls,
        authority=_path(document.path, table.authority) if table.authority else "",
        bind=table.bind,
        search_base=table.search_base,
        search_filter=table.search_filter,
        search_bind=table.search_bind,
        search_password=table.search_password.reveal() if table.search_password is not None else "",
        addresses=tuple(table.addresses),
        timeout_s=table.timeout,
        connections=table.connections,
    )


def _dovecot(document: Document) -> DovecotServer | None:
    table = cast("schema.Dovecot | None", document.tables.get("auth.dovecot"))
    if table is None:
        return None
    if isinstance(table.address, str):
        return DovecotServer(path=table.address, timeout_s=table.timeout)
    host, port = table.address
    if not _near(host):
        document.warning(("auth", "dovecot", "address"), "Dovecot's protocol has no TLS: passwords cross the network")
    return DovecotServer(host=host, port=port, timeout_s=table.timeout)


def _oauth(document: Document) -> OauthIssuer | None:
    table = cast("schema.Oauth | None", document.tables.get("auth.oauth"))
    if table is None:
        return None
    path: Place = ("auth", "oauth")
    if bool(table.jwks) == bool(table.introspection):
        document.problem(
            path, "a token is judged by its signature or by its issuer; write either jwks or introspection"
        )
    for key in ("jwks", "introspection"):
        url = str(getattr(table, key))
        if "://" in url and not url.startswith("https://") and not _near(urlsplit(url).hostname or ""):
            document.problem((*path, key), "who can change what comes from here can log in as anybody; write https://")
    if table.jwks and not table.audience:
        document.warning(path, "a token that was made for another program is taken here, too; write audience")
    return OauthIssuer(
        jwks=_path(document.path, table.jwks) if table.jwks and "://" not in table.jwks else table.jwks,
        introspection=table.introspection,
        client_id=table.client_id,
        client_secret=table.client_secret.reveal() if table.client_secret is not None else "",
        issuer=table.issuer,
        audience=table.audience,
        user_claim=table.user_claim,
        scope=table.scope,
        timeout_s=table.timeout,
    )


def _guesses(document: Document) -> GuessLimits:
    table = cast("schema.GuessBounds | None", document.tables.get("auth.guesses"))
    if table is None:
        return GuessLimits()
    return GuessLimits(
        secrets_per_user=table.secrets_per_user,
        users_per_client=table.users_per_client,
        window_s=table.window,
        ban_s=table.ban,
        bait_ban_s=table.bait_ban,
    )


def _send_as(document: Document, rules: RelayRules, now: float) -> SendAsRules:
    entries = []
    for index, entry in document.entries["send_as"]:
        path = ("send_as", index)
        _warn_of_expiry(document, path, entry.expires, now)
        entries.append(
            SendAsEntry(
                where=document.places.at(path),
                accounts=tuple(entry.accounts),
                reverse_paths=tuple(entry.reverse_paths),
                why=entry.why,
                owner=entry.owner,
                expires_at=entry.expires,
            )
        )
    return SendAsRules(tuple(entries), tuple(local.pattern for local in rules.local if local.pattern[0] not in "*["))


def takes_logins(listen: ListenSettings) -> bool:
    """Whether somebody can log in to this listener."""
    return listen.auth != "off" and (listen.tls != "none" or listen.auth_without_tls)


def _judge_logins(document: Document, listens: tuple[ListenSettings, ...], rules: RelayRules) -> None:
    """Who may log in where, and what it gives them, fit together."""
    taken = any(takes_logins(listen) for listen in listens)
    by_account = any(entry.accounts for entry in rules.trust)
    for (index, written), listen in zip(document.entries["listen"], listens, strict=True):
        path: Place = ("listen", index)
        if listen.auth == "off":
            continue
        key: Place = (*path, "role" if written.auth is None else "auth")
        if not takes_logins(listen):
            if listen.auth == "required" or written.auth is not None:
                document.warning(
                    key,
                    "AUTH is offered under TLS only, which this listener does not speak, so that nobody can log in; "
                    'write tls = "starttls"',
                )
            continue
        if listen.auth_without_tls and not all(_near(host) for host, _ in listen.addresses):
            document.warning(
                (*path, "auth_without_tls"), "passwords cross the network as they are, for everybody to read"
            )
        if listen.auth == "required" and not by_account:
            document.warning(
                key,
                "who logs in here may send to the local domains only: no [[trust]] entry has accounts; "
                'write [[trust]] and accounts = ["*"]',
            )
    for index, entry in document.entries["trust"]:
        if entry.accounts is not None and not taken:
            document.warning(
                ("trust", index, "accounts"), "AUTH is offered by no listener, so the entry matches no client"
            )
        if entry.pop3 is not None and not any(listen.role in _PROXIES for listen in listens):
            document.warning(
                ("trust", index, "pop3"),
                'no listener has role "pop3" or "imap", so the entry matches no client',
            )
        if entry.certificate is not None and all(listen.tls == "none" for listen in listens):
            document.warning(("trust", index, "certificate"), "no listener speaks TLS, so the entry matches no client")
    if "auth" in document.written and not taken:
        document.warning(("auth",), "AUTH is offered by no listener, so that nobody is asked")


def _timeouts(document: Document) -> Timeouts:
    timeouts = cast("schema.Timeout", document.tables["timeouts"])
    return Timeouts(
        command_s=timeouts.command,
        content_block_s=timeouts.content_block,
        content_total_s=timeouts.content_total,
        proxy_header_s=timeouts.proxy_header,
        tls_handshake_s=timeouts.tls_handshake,
        busy_s=timeouts.busy,
    )


def _own_addresses(listens: Iterable[ListenSettings]) -> tuple[IPAddress, ...]:
    found: dict[IPAddress, None] = {}
    for listen in listens:
        for host, _ in listen.addresses:
            address = client_address(host)
            if not address.is_unspecified:
                found[address] = None
    return tuple(found)


# --- Backends ---------------------------------------------------------------------------------------------------------


def _backends(
    document: Document, listens: tuple[ListenSettings, ...], hello: str, data: str, workers: int
) -> tuple[BackendSettings, ...]:
    if not document.names["backend"] and "backend" not in document.written:
        document.problem(
            (), 'no [backend.NAME] table: mail would go nowhere; write [backend.mail] and address = "host:25"'
        )
    own = {address: listen.where for listen in listens for address in listen.addresses if address[1]}
    out = []
    for name, backend in document.named["backend"].items():
        path = ("backend", name)
        addresses = tuple(_placed(document.path, address, data) for address in backend.address)
        kinds = {type(address) for address in addresses}
        if EmbeddedMailboxes in kinds and len(addresses) > 1:
            document.problem((*path, "address"), "the embedded mailbox stands alone; make it a backend of its own")
        if SmtpAddress not in kinds and backend.tls == "required":
            document.problem(
                (*path, "tls"), "there is no TLS on a Unix socket or in a directory; remove the key", value=backend.tls
            )
        for key in ("xclient", "proxy"):
            if getattr(backend, key) not in (False, "off") and kinds != {SmtpAddress}:
                document.problem((*path, key), "only a server reached over TCP takes this; remove the key")
        if backend.xclient and backend.proxy != "off":
            document.problem((*path, "xclient"), "the PROXY header says who the client is already; keep one of the two")
        for number, address in enumerate(addresses):
            listener = _own_listener(address, own)
            if listener:
                document.problem(
                    (*path, "address", number),
                    f"this is the gate's own listener ({listener}), mail would go in circles; name the mail server",
                    value=address_text(*address[:2]) if isinstance(address, SmtpAddress) else None,
                )
        out.append(
            BackendSettings(
                name=name,
                addresses=addresses,
                where=document.places.at(path),
                tls=backend.tls if SmtpAddress in kinds else "off",
                connections=max(1, backend.connections // workers),
                hello=hello,
                connect_timeout_s=backend.connect_timeout,
                xclient=backend.xclient,
                proxy=backend.proxy,
            )
        )
    return tuple(out)


def _placed(config_path: str, address: BackendAddress, data: str) -> BackendAddress:
    if isinstance(address, EmbeddedMailboxes):
        directory = _path(config_path, address.directory) if address.directory else str(Path(data) / "mail")
        return EmbeddedMailboxes(directory)
    return address


def _own_listener(address: BackendAddress, own: dict[tuple[str, int], str]) -> str:
    """Where the listener stands that this backend address leads to, "" for none."""
    if isinstance(address, LmtpSocket | EmbeddedMailboxes):
        return ""
    hosts = [address.host]
    if address.host == "localhost":
        hosts = ["127.0.0.1", "::1"]
    for host in hosts:
        candidates = [host]
        if host.startswith("127.") or host == "::1":
            candidates.append("::" if ":" in host else ANY_IPV4)
        for candidate in candidates:
            if (candidate, address.port) in own:
                return own[candidate, address.port]
    return ""


def _routes(document: Document) -> tuple[Route, ...]:
    names = document.names["backend"]
    catch_all = ""
    used = set(names[:1])
    out = []
    for index, route in document.entries["route"]:
        path = ("route", index)
        where = document.places.at(path)
        used.add(route.backend)
        if catch_all:
            document.warning(path, f'this route is never reached: "*" at {catch_all} takes everything before it')
        patterns = tuple(pattern for pattern in route.forward_paths if isinstance(pattern, Pattern))
        if any(str(pattern) == "*" for pattern in patterns):
            catch_all = catch_all or where
        out.append(Route(where, route.backend, patterns, local="local" in route.forward_paths))
    for name in names:
        if name not in used:
            document.warning(("backend", name), "no [[route]] leads to this backend, and it is not the first one")
    return tuple(out)


# --- Relay rules ------------------------------------------------------------------------------------------------------


def _reread(document: Document, data: str, backends: Iterable[BackendSettings]) -> tuple[Reread, ...]:
    """What backends were found to read as another address when they were asked, if they ever were.

    Answers that are there and cannot be read are taken for the worst.
    """
    out = []
    for backend in backends:
        try:
            found = profile.recall(profile.path_of(data, backend.name))
        except StorageError as error:
            document.warning(
                ("backend", backend.name),
                f"{error}; until it can be read, strangers' local-parts with one of {' '.join(dialect.CHARACTERS)} are "
                "refused, for the backend might read them as another address",
            )
            out.append(Reread(backend.name, dialect.CHARACTERS))
            continue
        if found is not None and found.open_to_strangers:
            document.warning(
                ("backend", backend.name),
                f"it was found to read local-parts with {dialects.characters_text(found)} as another address: the gate "
                "refuses strangers such; let it stop that, then: gatepost check --backend",
            )
            out.append(Reread(backend.name, "".join(form.character for form in found.open_to_strangers)))
    return tuple(out)


def _rules(
    document: Document, recipients_max: int, reread: tuple[Reread, ...], now: float
) -> tuple[RelayRules, RelayRules | None]:
    """The rules in force; and with them those that are only watched, None where there are none.

    What is in force holds nothing of a shadow entry, so that nothing can act on one by mistake.
    """
    backends = document.names["backend"]
    local = _local(document)
    trust, deny = _trust(document, now), _deny(document, now)
    all_rules = RelayRules(
        local=local,
        trust=trust,
        deny=deny,
        routes=_routes(document),
        recipients_max=recipients_max,
        default_backend=backends[0] if backends else "",
        postmaster_domain=next((entry.pattern for entry in local if entry.pattern[0] not in "*["), ""),
        reread=reread,
    )
    in_force = replace(
        all_rules,
        trust=tuple(
            rule for rule, (_, entry) in zip(trust, document.entries["trust"], strict=True) if not entry.shadow
        ),
        deny=tuple(rule for rule, (_, entry) in zip(deny, document.entries["deny"], strict=True) if not entry.shadow),
    )
    shadows = len(all_rules.trust) + len(all_rules.deny) > len(in_force.trust) + len(in_force.deny)
    return (in_force, all_rules) if shadows else (all_rules, None)


def _local(document: Document) -> tuple[LocalPattern, ...]:
    seen: dict[str, str] = {}
    out = []
    for index, pattern in enumerate(cast("schema.Domains", document.tables["domains"]).local):
        path = ("domains", "local", index)
        where = document.places.at(path)
        if pattern in seen:
            document.warning(path, f"this domain stands at {seen[pattern]}, too", value=pattern)
        seen.setdefault(pattern, where)
        out.append(LocalPattern(pattern, where))
    if not out and "domains" not in document.written:
        document.warning(
            (), 'no [domains] table: the gate takes mail from trusted clients only; write local = ["example.com"]'
        )
    return tuple(out)


def _trust(document: Document, now: float) -> tuple[TrustEntry, ...]:
    out = []
    for index, trust in document.entries["trust"]:
        path = ("trust", index)
        if trust.tls_minimum in _BROKEN and trust.network is None and trust.host is None:
            document.warning(
                (*path, "tls_minimum"),
                "who a client is shows after the TLS handshake here, so that none below the listener's minimum is "
                "spoken; an entry by network or host can have less",
                value=trust.tls_minimum,
            )
        if trust.shared and trust.network is None and trust.host is None and trust.listen is None:
            document.warning(
                (*path, "shared"),
                "nothing is suspended for who logs in, shows a certificate or reads its mail; remove the key",
                value=True,
            )
        _warn_of_expiry(document, path, trust.expires, now)
        out.append(
            TrustEntry(
                where=document.places.at(path),
                why=trust.why,
                owner=trust.owner,
                network=trust.network,
                host=trust.host or "",
                listen=trust.listen or "",
                accounts=tuple(trust.accounts or ()),
                certificate=trust.certificate or "",
                pop3_s=trust.pop3 or 0.0,
                expires_at=trust.expires,
                reverse_paths=tuple(trust.reverse_paths or ()),
                forward_paths=tuple(trust.forward_paths or ()),
                messages_per_hour=trust.messages_per_hour,
                recipients_per_hour=trust.recipients_per_hour,
                tls_minimum=trust.tls_minimum or "",
                bare_newlines=trust.bare_newlines,
                shared=trust.shared,
            )
        )
    return tuple(out)


def _deny(document: Document, now: float) -> tuple[DenyEntry, ...]:
    out = []
    for index, deny in document.entries["deny"]:
        path = ("deny", index)
        _warn_of_expiry(document, path, deny.expires, now)
        out.append(
            DenyEntry(
                where=document.places.at(path),
                why=deny.why,
                network=deny.network,
                host=deny.host or "",
                helo=deny.helo or "",
                reverse_path=deny.reverse_path,
                forward_path=deny.forward_path,
                reply=deny.reply,
                expires_at=deny.expires,
            )
        )
    return tuple(out)


def _warn_of_expiry(document: Document, path: tuple[str, int], expires_at: float | None, now: float) -> None:
    if expires_at is not None and expires_at <= now:
        document.warning((*path, "expires"), "this entry has expired and matches nobody; renew or remove it")


# --- What must not be silent ------------------------------------------------------------------------------------------


def _refuse_lost_references(document: Document) -> None:
    """Names that no table has; judged on what is written, so that one bad table does not make others look lost."""
    backends = document.names["backend"]
    listens = [str(listen.get("name", listen.get("role", "mx"))) for listen in document.written_entries("listen")]
    for table, key, names, what in (
        ("route", "backend", backends, "a [backend.NAME] table"),
        ("trust", "listen", listens, "a [[listen]] table"),
    ):
        for index, entry in enumerate(document.written_entries(table)):
            name = entry.get(key)
            if isinstance(name, str) and name not in names:
                near = get_close_matches(name, names, n=1)
                mend = f'did you mean "{near[0]}"?' if near else f"write the name of {what}"
                document.problem((table, index, key), f"nothing has this name; {mend}", value=name)


def _journal(document: Document) -> JournalSettings:
    journal = cast("schema.Journal", document.tables["journal"])
    secret = cast("schema.Store", document.tables["store"]).url
    url = "" if secret is None else secret.reveal()
    if secret is not None and not url.startswith(("postgresql://", "postgres://")):
        # What stands there may be a password, and is not repeated.
        document.problem(
            ("store", "url"),
            'this is no URL of PostgreSQL; write "postgresql://user:password@host:5432/database", or remove the key: '
            "without it the journal is kept in SQLite",
        )
    return JournalSettings(
        enabled=journal.enabled,
        url="postgresql://" + url.partition("://")[2] if url else "",
        before_reply=journal.before_reply,
        keep_s=journal.keep,
        pseudonyms_s=journal.pseudonyms,
        entries_max=journal.entries,
        backlog_octets=journal.backlog,
    )


def smtp_listeners(listens: Iterable[ListenSettings]) -> tuple[Listener, ...]:
    """The listeners by which mail comes in, as the prover sees them."""
    return tuple(
        Listener(
            name=listen.name,
            where=listen.where,
            role=listen.role,
            addresses=tuple(client_address(host) for host, _ in listen.addresses),
            auth_required=listen.auth == "required",
            proxied=bool(listen.proxy_from),
            tls=listen.tls,
        )
        for listen in listens
        if listen.role not in _PROXIES
    )


def prove(document: Document, gate: GateSettings, now: float) -> Proof:
    """Who may send where, decided for everybody.

    Args:
        gate: what ``build`` made of the document.
        now: seconds since the epoch; what has expired opens nothing.
    """
    public_trust = cast("schema.Gate", document.tables["gate"]).public_trust
    return prover.prove(gate.rules, smtp_listeners(gate.listens), public_trust, now)


def _refuse_open_relay(
    document: Document, listens: tuple[ListenSettings, ...], rules: RelayRules, name: str, now: float, *, refuse: bool
) -> None:
    """Refuse a file that lets strangers relay, unless it says in so many words that it means to."""
    gate = cast("schema.Gate", document.tables["gate"])
    meant = gate.open_relay == name
    if refuse and gate.open_relay is not None and not meant:
        document.problem(
            ("gate", "open_relay"),
            f'an open relay is confirmed with this gate\'s own name; write "{name}", or better remove the key',
            value=gate.open_relay,
        )
    listeners = smtp_listeners(listens)
    openings = prover.openings(rules, listeners, gate.public_trust, now)
    for opening in openings:
        path = _rule_path(document, opening.rule, opening.number)
        if meant:
            document.warning(path, f"OPEN RELAY, as [gate] open_relay wishes: {opening.sentence}")
        elif refuse:
            document.problem(path, f"this would be an open relay: {opening.sentence}")
    told = (opening.number for opening in openings if opening.rule != "local")
    for rule, number, sentence in exposure.advice(rules, listeners, now, told):
        document.warning(_rule_path(document, rule, number), sentence)
    if meant and not openings:
        document.warning(("gate", "open_relay"), "nothing here is an open relay; remove the key")


def _warn_of_open_shadows(
    document: Document, listens: tuple[ListenSettings, ...], shadowed: RelayRules, now: float
) -> None:
    """What is only watched opens nothing; whoever means to act on it later should know."""
    public_trust = cast("schema.Gate", document.tables["gate"]).public_trust
    for opening in prover.openings(shadowed, smtp_listeners(listens), public_trust, now):
        index, entry = document.entries["trust"][opening.number] if opening.rule != "local" else (0, None)
        if entry is not None and entry.shadow:
            document.warning(
                ("trust", index),
                f"acted on, this would be an open relay: {opening.sentence}; it is only watched",
            )


def _warn_of_blind_shadows(document: Document, rules: RelayRules) -> None:
    """What a client is not asked for cannot be seen of it."""
    for index, entry in document.entries["trust"]:
        if not entry.shadow:
            continue
        if entry.certificate and not rules.index.trust_certificates:
            document.warning(
                ("trust", index, "certificate"),
                "no client is asked for its certificate until an entry in force trusts one, so that this one, which is "
                "only watched, sees none",
            )
        if entry.pop3 and not rules.index.trust_mailbox_logins:
            document.warning(
                ("trust", index, "pop3"),
                "no login to the mailbox server is kept until an entry in force asks for it, so that this one, which "
                "is only watched, sees none",
            )


def _rule_path(document: Document, rule: str, number: int) -> Place:
    """Where a rule stands in the file; entries that are not valid by themselves have made no rule."""
    if rule == "local":
        return ("domains", "local", number)
    acting = [index for index, entry in document.entries["trust"] if not entry.shadow]
    entry: Place = ("trust", acting[number])
    return (*entry, rule) if rule else entry


def user(document: Document) -> str:
    """The user to run as, "" for none."""
    return cast("schema.Gate", document.tables["gate"]).user
