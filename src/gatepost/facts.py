"""What is KNOWN about a session and its transaction, in the nouns of RFC 5321 and RFC 5598.

Why: decisions are functions of these values and nothing else, so that every decision can be explained and made again.
Trust: values here are already parsed and bounded; the hello name is what the client claimed and never confers a right.
Promise: frozen; a change makes a new value (after STARTTLS or a new EHLO nothing old can linger).
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

from gatepost.smtp.path import ReversePath

IPAddress = IPv4Address | IPv6Address


@lru_cache(maxsize=4096)  # the same clients come again and again
def client_address(text: str) -> IPAddress:
    """The address a client really has: an IPv4-mapped IPv6 address is the IPv4 address.

    Args:
        text: an address as the socket or a PROXY header gives it, without port; a zone index ("%eth0") is dropped.

    Raises:
        ValueError: when it is no IP address.
    """
    address = ip_address(text.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


class Client(NamedTuple):
    """The SMTP client's end of the connection, as the socket or a listed proxy told it."""

    address: IPAddress
    port: int


class Identity(NamedTuple):
    """Who authenticated; made from what ``auth`` verified only.

    Attributes:
        account: in lower case; mechanism: of SASL, such as "PLAIN".
        verifier: who vouched for it, as in [auth] verify; device: the label of the app password, "" for the account's
            own.
        addresses: addresses that the verifier says belong to the account.
    """

    account: str
    mechanism: str
    verifier: str = ""
    device: str = ""
    addresses: tuple[str, ...] = ()


class MailboxLogin(NamedTuple):
    """The last good login to the old server from the client's address, through our POP3 or IMAP proxy.

    Attributes:
        at: seconds since the epoch.
    """

    account: str
    at: float


class Session(NamedTuple):
    """One SMTP session.  RFC 5321 §3.1.

    Attributes:
        reference: the session's short reference; replies that refuse carry it.
        listen: the name of the listener; role: mx, submission or inside.
        hello: the client's claim in EHLO or HELO, "" before it; esmtp: it said EHLO.
        tls: protocol version such as "TLSv1.3", "" in plain text.
        identity: None until AUTH succeeded; auth_required: the listener takes no mail without one.
        hosts: names of trusted or denied hosts that resolve to the client's address at this time.
        certificate: SHA-256 of the certificate that the client proved to own, hexadecimal, "" for none.
        mailbox_login: for POP-before-SMTP; None where nobody logged in from that address lately.
        suspended: the trust in the client's address is suspended, for strangers were seen behind it;
            listen_suspended: that in whoever comes to the listener.
    """

    reference: str
    client: Client
    listen: str
    role: str
    hello: str = ""
    esmtp: bool = False
    tls: str = ""
    identity: Identity | None = None
    hosts: tuple[str, ...] = ()
    auth_required: bool = False
    certificate: str = ""
    mailbox_login: MailboxLogin | None = None
    suspended: bool = False
    listen_suspended: bool = False


class Evidence(NamedTuple):
    """What was seen behind one trusted address, or at one trusted listener: in one session, or in the last days.

    Attributes:
        hellos: whom clients said to be in EHLO or HELO, one word for each organisation; public_names: those of them
            that are public and not ours.
        reverse_domains: organisations of reverse-paths that are public and not ours; inbound_domains: those of them
            that brought mail for our domains.
        bounces: whom clients said to be that brought mail with the null reverse-path for our domains.
        fingerprints: TLS version and cipher.
        public_clients: addresses, at a listener.
    """

    hellos: tuple[str, ...] = ()
    public_names: tuple[str, ...] = ()
    reverse_domains: tuple[str, ...] = ()
    inbound_domains: tuple[str, ...] = ()
    bounces: tuple[str, ...] = ()
    fingerprints: tuple[str, ...] = ()
    public_clients: tuple[str, ...] = ()


class Transaction(NamedTuple):
    """One mail transaction, from MAIL on.  RFC 5321 §3.3.

    Attributes:
        recipients: forward-paths admitted so far.
        now: seconds since the epoch (UTC), for entries that expire.
    """

    session: Session
    reverse_path: ReversePath
    recipients: int
    now: float
