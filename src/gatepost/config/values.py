"""One written value to what it means: sizes, times, networks, addresses, dates, replies, secrets.

Why: each form that INTERFACE allows is read in one function, whose error says what is wrong and how to mend it.
Trust: an administrator's text: honest, but mistyped, and copied from other programs that mean other things by it.
Promise: a function returns one exact meaning, or raises ValueError with a sentence "what is wrong; what to write".
    Nothing is guessed: a network with host bits, a size without its unit, a date in quotes are refused.
Sources: RFC 4632 §3.1 (CIDR), RFC 4291 §2.5.5.2 (IPv4-mapped addresses), RFC 5321 §4.1.3 (address literals), §4.2.
"""

from __future__ import annotations

import os
import re
from datetime import UTC, date, datetime, time
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any

from gatepost.auth.account import account_name
from gatepost.backend.settings import BackendAddress, EmbeddedMailboxes, LmtpSocket, SmtpAddress
from gatepost.facts import IPAddress
from gatepost.policy.relay import IPNetwork, literal_text
from gatepost.smtp.path import AddressLiteral, parse_domain
from gatepost.smtp.reply import LINE_OCTETS_MAX, Reply

SECRET_OCTETS_MAX = 64 << 10
ACCOUNT_OCTETS_MAX = 128
# What would break a line, or turn the order of what a terminal shows: controls, line separators, bidirectional marks.
UNSHOWABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
ANY_IPV4 = str(IPv4Address(0))

_SIZE = re.compile(r"([0-9]{1,15}) ?([A-Za-z]+)")
_SIZE_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_DURATION = re.compile(r"(?:([0-9]{1,6})d)?(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,9})s)?")
_DURATION_UNITS_S = (86400, 3600, 60, 1)
_NETMASK = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+")
_MAPPED = IPv6Network("::ffff:0:0/96")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_REPLY = re.compile(r"([45][0-9][0-9])(?: ([245])\.([0-9]{1,3})\.([0-9]{1,3}))?(?: (.*))?", re.DOTALL)
_PRINTABLE = re.compile(r"[\x20-\x7e]+")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_BRACES = re.compile(r"\{[^}]*\}?|\}")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def text(value: object) -> str:
    """A value that has to be text."""
    if isinstance(value, str):
        return value
    raise ValueError("this must be text; write it in double quotes")


# --- Sizes and times --------------------------------------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def size_octets(value: object) -> int:
    """A size with its unit, "50 MiB"; or 0."""
    if _is_number(value):
        if value == 0:
            return 0
        raise ValueError('the unit is missing; write the size with it, such as "50 MiB"')
    match = _SIZE.fullmatch(text(value))
    if match is None:
        raise ValueError('this is not a size; write a whole number and its unit, such as "50 MiB"')
    unit = _SIZE_UNITS.get(match[2])
    if unit is None:
        raise ValueError(f'"{match[2]}" is not a unit of size; the units are B, KiB, MiB and GiB')
    return int(match[1]) * unit


def size_text(octets: int) -> str:
    """The size as one writes it."""
    for unit in ("GiB", "MiB", "KiB"):
        if octets and octets % _SIZE_UNITS[unit] == 0:
            return f"{octets // _SIZE_UNITS[unit]} {unit}"
    return f"{octets} B" if octets else "0"


def duration_s(value: object) -> float:
    """A time with its units, "30m", "7d", "1h30m"; or 0."""
    if _is_number(value):
        if value == 0:
            return 0.0
        raise ValueError('the unit is missing; write the time with it, such as "30m"')
    match = _DURATION.fullmatch(text(value))
    if match is None or match.lastindex is None:
        raise ValueError('this is not a time; write numbers with the units s, m, h or d, such as "30m" or "7d"')
    return float(sum(int(n) * unit for n, unit in zip(match.groups("0"), _DURATION_UNITS_S, strict=True)))


def duration_text(seconds: float) -> str:
    """The time as one writes it."""
    whole, out = int(seconds), ""
    for letter, unit in zip("dhms", _DURATION_UNITS_S, strict=True):
        if whole >= unit:
            out += f"{whole // unit}{letter}"
            whole %= unit
    return out or "0"


def expiry(value: object) -> float:
    """A TOML date (to the end of that day, UTC) or date-time (UTC where it names no offset), as seconds since 1970."""
    if isinstance(value, datetime):
        moment = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
        return (moment - _EPOCH).total_seconds()
    if isinstance(value, date):
        return (datetime.combine(value, time(), UTC) - _EPOCH).total_seconds() + 86400
    wrong = "a date stands without quotes" if isinstance(value, str) else "this is not a date"
    raise ValueError(f"{wrong}; write it as expires = 2027-06-30")


# --- Networks and addresses -------------------------------------------------------------------------------------------


def network(value: object) -> IPNetwork:
    """A network as CIDR, as address/mask, or one address; an IPv4-mapped network is the IPv4 network."""
    written = text(value)
    address, slash, length = written.partition("/")
    if slash and _NETMASK.fullmatch(length):
        holes = int(_ipv4(length, "mask")) ^ 0xFFFFFFFF
        if holes & (holes + 1):  # the ones must stand together at the left; a host mask (0.0.255.255) is none
            raise ValueError(f"{length} is not a network mask; write it as 255.255.0.0, or the network as CIDR")
        length = str(32 - holes.bit_count())
        _ipv4(address, "address")
    elif slash and not (length.isascii() and length.isdigit()):
        raise ValueError('this is not a network; write "10.1.0.0/16", "10.1.0.0/255.255.0.0" or one address')
    try:
        found = ip_network(f"{address}/{length}" if slash else address, strict=False)
    except ValueError:
        raise ValueError(
            'this is not a network; write "10.1.0.0/16", "10.1.0.0/255.255.0.0", "2001:db8::/32" or one address'
        ) from None
    if found.network_address != _address(address):
        raise ValueError(f'the address has bits beyond its mask; the network is "{found}", one host is "{address}"')
    if isinstance(found, IPv6Network) and found.overlaps(_MAPPED):
        if found.prefixlen >= _MAPPED.prefixlen:
            # RFC 4291 §2.5.5.2: a client at ::ffff:10.1.2.3 is the client at 10.1.2.3.
            return IPv4Network((int(found.network_address) & 0xFFFFFFFF, found.prefixlen - _MAPPED.prefixlen))
        if found.prefixlen:
            raise ValueError("this network holds every IPv4-mapped address; write the IPv4 network itself")
    return found


def _ipv4(written: str, what: str) -> IPv4Address:
    try:
        return IPv4Address(written)
    except ValueError:
        raise ValueError(f'"{written}" is not an IPv4 {what}; write it as four numbers from 0 to 255') from None


def host_port(value: object) -> tuple[str, int]:
    """Split "host:port" or "[v6]:port"; the host is not yet judged."""
    written = text(value)
    if written.startswith("["):
        host, bracket, rest = written[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError('an IPv6 address stands in brackets; write "[2001:db8::1]:25"')
        port, colon = rest[1:], rest[:1]
        try:
            IPv6Address(host)
        except ValueError:
            raise ValueError(f'"{host}" is not an IPv6 address; write it as "[2001:db8::1]:25"') from None
    else:
        host, colon, port = written.rpartition(":")
        if ":" in host:
            raise ValueError('an IPv6 address stands in brackets; write "[2001:db8::1]:25"')
        if not colon:
            host = written
    if not colon or not port:
        raise ValueError(f'port is missing; write host:port, such as "{_bracketed(host) or ANY_IPV4}:25"')
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise ValueError(f'"{port}" is not a port; write a number from 0 to 65535')
    return host, int(port)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def address_text(host: str, port: int) -> str:
    """Host and port as one writes them."""
    return f"{_bracketed(host)}:{port}"


def listen_address(value: object) -> tuple[str, int]:
    """An IP address of this host and a port; port 0 lets the system choose."""
    host, port = host_port(value)
    if host == "localhost":
        return "127.0.0.1", port
    address = _address(host)
    if address is None:
        raise ValueError(
            f'"{host}" is not an IP address; write the address to listen on, or "{ANY_IPV4}:{port}" for all'
        )
    return str(address), port


def server_address(value: object) -> tuple[str, int]:
    """A server's name or IP address, and its port."""
    host, port = host_port(value)
    if port == 0:
        raise ValueError("port 0 is no server's port; write the port on which it listens")
    address = _address(host)
    return (domain(host) if address is None else str(address)), port


def ldap_address(value: object) -> tuple[bool, str, int]:
    """A directory: whether TLS begins with the first octet, its name or address, its port."""
    written = text(value)
    scheme, separator, rest = written.partition("://")
    implicit = bool(separator) and scheme == "ldaps"
    if separator and scheme not in ("ldap", "ldaps"):
        raise ValueError(f'"{scheme}" is no directory\'s scheme; write "ldap://host:389" or "ldaps://host:636"')
    place = rest.rstrip("/") if separator else written
    bare = not place.rpartition("]")[2].count(":") if place.startswith("[") else ":" not in place
    if bare:
        place += ":636" if implicit else ":389"
    return implicit, *server_address(place)


def dovecot_address(value: object) -> str | tuple[str, int]:
    """A Unix socket by its path, or a host and port."""
    written = text(value)
    return written if written.startswith("/") else server_address(written)


def login_form(value: str) -> str:
    """How a user is named to another server."""
    words = _BRACES.findall(value)
    if not set(words) <= {"{user}", "{local_part}", "{domain}"} or not {"{user}", "{local_part}"} & set(words):
        raise ValueError(
            'write "{user}" or "{local_part}" where the user\'s name belongs, such as "OFFICE\\\\{local_part}"'
        )
    return value


def account(value: object) -> str:
    """An account's name, in lower case; "*" is all accounts."""
    written = text(value)
    if (
        not written
        or len(written.encode()) > ACCOUNT_OCTETS_MAX
        or UNSHOWABLE.search(written)
        or written != written.strip()
    ):
        raise ValueError(
            f'an account has a name of 1 to {ACCOUNT_OCTETS_MAX} octets, such as "alice" or "alice@example.com"'
        )
    return account_name(written) or written.lower()  # another server's accounts may have names that ours do not


def backend_address(value: object) -> BackendAddress:
    """Where mail goes: "host:port", "lmtp:/path", "lmtp:host:port" or "embedded:"."""
    written = text(value)
    scheme, colon, rest = written.partition(":")
    if scheme == "lmtp" and rest.startswith("/"):
        return LmtpSocket(rest)
    if scheme == "embedded" and colon:
        return EmbeddedMailboxes(rest)
    lmtp = scheme == "lmtp" and (rest.startswith("[") or ":" in rest)
    host, port = host_port(rest if lmtp else written)
    if port == 0:
        raise ValueError("port 0 is no backend's port; write the port on which the backend listens, mostly 25")
    address = _address(host)
    return SmtpAddress(domain(host) if address is None else str(address), port, lmtp)


def backend_address_text(address: BackendAddress) -> str:
    """The backend address as one writes it."""
    if isinstance(address, LmtpSocket):
        return f"lmtp:{address.path}"
    if isinstance(address, EmbeddedMailboxes):
        return f"embedded:{address.directory}"
    return ("lmtp:" if address.lmtp else "") + address_text(address.host, address.port)


# --- Names and domains ------------------------------------------------------------------------------------------------


def domain(value: object) -> str:
    """A domain name, canonical."""
    if _address(text(value)) is not None:
        raise ValueError('this is an IP address; a name stands here, such as "mail.example.com"')
    try:
        return parse_domain(text(value))
    except ValueError as error:
        if not isinstance(value, str):
            raise
        raise ValueError(f'{error}; write a name such as "mail.example.com"') from None


def local_domain(value: object) -> str:
    """One entry of [domains] local, canonical: "example.com", "*.example.com", "[192.0.2.1]"."""
    written = text(value)
    if written in ("*", "*.", "*.*"):
        raise ValueError("this would take mail for every domain and relay it: an open relay; name your own domains")
    if "@" in written:
        raise ValueError(f'a domain stands here, not an address; write "{written.rpartition("@")[2]}"')
    if written.startswith("["):
        return _literal(written)
    if written.startswith("*."):
        return f"*.{domain(written[2:])}"
    if "*" in written:
        raise ValueError('"*" may stand only at the start, for all names below a domain; write "*.example.com"')
    address = _address(written)
    if address is not None:
        raise ValueError(f'an address stands in brackets here; write "{AddressLiteral(address)}"')
    return domain(written)


def _address(written: str) -> IPAddress | None:
    try:
        return ip_address(written)
    except ValueError:
        return None


def _literal(written: str) -> str:
    """An address literal as the relay policy looks for it.  RFC 5321 §4.1.3."""
    inside = written[1:-1] if written.endswith("]") else ""
    try:
        if inside[:5].lower() == "ipv6:":
            return literal_text(AddressLiteral(IPv6Address(inside[5:])))
        return literal_text(AddressLiteral(IPv4Address(inside)))
    except ValueError:
        raise ValueError('this is not an address literal; write "[192.0.2.1]" or "[IPv6:2001:db8::1]"') from None


def helo_pattern(value: object) -> str:
    """What a client may claim in EHLO or HELO, lower-case; it need not be a valid name to be denied."""
    written = text(value)
    if not _PRINTABLE.fullmatch(written) or " " in written or len(written) > 255:
        raise ValueError('write one name of at most 255 characters, such as "spam.test" or "*.spam.test"')
    if written == "*":
        raise ValueError("this would deny everybody; name what shall be denied")
    if not written.isascii() or "*" in written.removeprefix("*."):
        raise ValueError('"*" may stand only at the start, for all names below a domain; write "*.spam.test"')
    return written.lower()


def fingerprint(value: object) -> str:
    """A certificate's SHA-256, lower-case without colons."""
    digits = text(value).replace(":", "").lower()
    if not _FINGERPRINT.fullmatch(digits):
        raise ValueError("this is not a SHA-256 fingerprint; write its 64 hexadecimal digits, with or without colons")
    return digits


# --- Replies and secrets ----------------------------------------------------------------------------------------------


def refusal(value: object) -> Reply:
    """An administrator's own reply: "550 5.7.1 Not from there"."""
    written = text(value)
    match = _REPLY.fullmatch(written)
    if match is None:
        raise ValueError('a refusal begins with a code from 400 to 599; write it as "550 5.7.1 Not from there"')
    code, wording = int(match[1]), match[5] or ""
    if code == 421:
        raise ValueError("421 closes the session and belongs to the gate; write 450 or 550")  # RFC 5321 §3.8
    if match[2] and match[2] != match[1][0]:
        raise ValueError(f"status and code belong to one class; write {match[1]} {match[1][0]}.{match[3]}.{match[4]}")
    if not _PRINTABLE.fullmatch(wording):
        raise ValueError('the words are missing, or not printable ASCII; write it as "550 5.7.1 Not from there"')
    if len(written) > LINE_OCTETS_MAX - 12:
        raise ValueError(f"a reply is one line; write at most {LINE_OCTETS_MAX - 12} characters")
    status = (int(match[3]), int(match[4])) if match[2] else (7, 1)
    return Reply(code, wording, status)


class Secret:
    """A secret that shows itself to nobody who does not ask for it by name."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The secret itself: for the peer that asks for it, never for a log, an error or a page."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(hidden)"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)


def secret(value: object) -> Secret:
    """Text in which ``${NAME}`` stands for a variable of the environment, or ``{ file = "/run/secrets/x" }``.

    Errors name the variable or the file, never what stands around it.
    """
    if isinstance(value, dict):
        return _secret_file(value)
    if isinstance(value, str):
        return Secret(_VARIABLE.sub(_variable, value))
    raise ValueError('a secret is text, "${NAME}" for a variable, or { file = "/run/secrets/x" }')


def _variable(match: re.Match[str]) -> str:
    name = match[1]
    if not _VARIABLE_NAME.fullmatch(name):
        raise ValueError("between ${ and } stands the name of an environment variable; mend the name")
    value = os.environ.get(name)
    if value is None:
        raise ValueError(f"the environment variable {name} is not set; set it where the gate is started")
    return value


def _secret_file(table: dict[str, Any]) -> Secret:
    name = table.get("file")
    if set(table) != {"file"} or not isinstance(name, str):
        raise ValueError('a secret from a file is written { file = "/run/secrets/x" }')
    if not name.startswith("/"):
        raise ValueError("write the whole path of the secret's file, from /")
    try:
        with Path(name).open("rb") as file:
            octets = file.read(SECRET_OCTETS_MAX + 1)
    except OSError as error:
        raise ValueError(f"the secret's file {name} cannot be read: {error.strerror}") from None
    if len(octets) > SECRET_OCTETS_MAX:
        raise ValueError(f"the secret's file {name} is larger than {size_text(SECRET_OCTETS_MAX)}")
    try:
        return Secret(octets.decode().rstrip("\r\n"))
    except UnicodeDecodeError:
        raise ValueError(f"the secret's file {name} is not UTF-8 text") from None
