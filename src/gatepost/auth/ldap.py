"""Verify by a bind at an LDAP server, Active Directory among them.

Why: where a directory knows the users, the gate asks it as the user, and learns which addresses are theirs.
Trust: the user's name is a stranger's, and goes into names and filters escaped.  What the server says is read here,
    bounded, by one who raises nothing on octets; the library ``anyldap`` builds what is asked.
Promise: success of a bind with the user's own name and password is yes, and nothing else is.  An empty password is no
    without being asked: a bind with it would succeed as nobody.  Codes that speak of the login are no; every other one,
    referrals among them, is unknown.  A password goes to the server in the settings and to no other.
Sources: RFC 4511 §4.1 (messages), §4.2 (bind), §4.5 (search), §4.14 (StartTLS), appendix A (result codes); RFC 4513
    §5.1.2, §6.3.1 (unauthenticated bind); RFC 4514 §2.4 (names), RFC 4515 §3 (filters); Microsoft's data
    codes of error 49.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import ClassVar, Final, NamedTuple, TypeVar

from gatepost.auth import Credentials, Denied, Outcome, Verified
from gatepost.auth.inquiry import Inquiries, Lines, Trouble, connect
from gatepost.auth.login import NOT_A_PASSWORD, NOT_CARRIED, carried, expand
from gatepost.auth.settings import LdapServer
from gatepost.errors import ConfigError
from gatepost.smtp.path import Mailbox, parse_reverse_path
from gatepost.smtp.sasl import Password

T = TypeVar("T")

MESSAGE_OCTETS_MAX = 1 << 16
ADDRESSES_MAX = 1000  # of one account
ENTRIES_MAX = 2  # asked for: one is enough to go on, and two to stop

_SUCCESS, _SIZE_LIMIT_EXCEEDED, _NO_SUCH_OBJECT = 0, 4, 32
_INVALID_CREDENTIALS = 49
_WHY_DENIED: Final = {
    19: "the account is locked",  # constraintViolation: too many wrong passwords
    32: "no such user",
    48: "the account has no password",  # inappropriateAuthentication
    49: "wrong user name or password",
}
# Active Directory says more behind "data" in the text of error 49.
_DATA = re.compile(rb"\bdata ([0-9a-f]{3,4})\b")
_WHY_DATA: Final = {
    b"525": "no such user",
    b"52e": "wrong password",
    b"530": "the user may not log in at this time",
    b"531": "the user may not log in from here",
    b"532": "the password has expired",
    b"533": "the account is disabled",
    b"701": "the account has expired",
    b"773": "the password must be changed first",
    b"775": "the account is locked",
}

# RFC 4511 §4.2 to §4.14: the tags of what a server answers.
_SEQUENCE, _SET, _INTEGER, _OCTETS, _ENUMERATED = 0x30, 0x31, 0x02, 0x04, 0x0A
_BIND_RESPONSE, _ENTRY, _SEARCH_DONE, _REFERENCE, _EXTENDED_RESPONSE = 0x61, 0x64, 0x65, 0x73, 0x78
_INTERMEDIATE = 0x79

_SPECIAL_IN_A_NAME = re.compile(r'[,+"\\<>;=]|^[ #]| $')
_PREFIX = re.compile(r"([A-Za-z0-9]+):(.*)", re.DOTALL)


class _Result(NamedTuple):
    """LDAPResult.  RFC 4511 §4.1.9."""

    code: int
    text: bytes


class _Entry(NamedTuple):
    """One that a search found: its name, and the values of the attributes asked for."""

    name: str
    values: tuple[bytes, ...]


class _Odd(ValueError):
    """Octets that are no LDAP message."""


def _judging(authority: str) -> ssl.SSLContext:
    """Certificates judged by an authority's PEM file; by the system's authorities where it is ""."""
    try:
        return ssl.create_default_context(cafile=authority or None)
    except OSError as error:  # ssl.SSLError is one: the file holds no certificate
        raise ConfigError(
            [f"[auth.ldap] authority {authority} cannot be used ({error.strerror}); name a PEM file of certificates"]
        ) from None


def escape_name(text: str) -> str:
    """A value in a distinguished name.  RFC 4514 §2.4."""
    return _SPECIAL_IN_A_NAME.sub(lambda match: "\\" + match[0], text)


def escape_filter(text: str) -> str:
    """A value in a filter, with every ASCII character but letters and digits as \\XX.  RFC 4515 §3."""
    return "".join(f"\\{ord(one):02x}" if one.isascii() and not one.isalnum() else one for one in text)


class LdapVerifier:
    """[auth.ldap].

    Args:
        judged: how the server's certificate is judged, instead of what the settings say.

    Raises:
        ConfigError: the library is missing, the filter is none, or the authority cannot be read.
    """

    name: ClassVar[str] = "ldap"

    def __init__(self, server: LdapServer, *, judged: ssl.SSLContext | None = None) -> None:
        self._server = server
        self._library = _Library()
        if server.search_filter:
            self._library.check(expand(server.search_filter, "user", escape_filter))
        self._context: ssl.SSLContext | None = None
        if server.tls != "off":
            self._context = judged or _judging(server.authority)
        self._inquiries = Inquiries(f"{server.host}:{server.port}", server.timeout_s, server.connections)

    async def verify(self, credentials: Credentials) -> Outcome:
        if not isinstance(credentials, Password):
            return NOT_A_PASSWORD
        user, secret = credentials.user, credentials.secret
        if not carried(user, secret):  # an empty secret above all.  RFC 4513 §6.3.1
            return NOT_CARRIED
        return await self._inquiries.ask(lambda deadline: self._ask(user, secret, deadline))

    async def close(self) -> None:
        """Nothing is kept between logins."""

    async def _ask(self, user: str, secret: str, deadline: asyncio.Timeout) -> Outcome:
        server = self._server
        with closing(await connect(server.host, server.port, deadline)) as lines:
            dialogue = _Dialogue(lines, self._library)
            if server.tls == "starttls":
                await dialogue.start_tls()
            if self._context is not None:
                await lines.secure(self._context, server.host)
            if not server.bind:
                return await self._search_and_bind(dialogue, user, secret)
            # A name with "=" in it is a distinguished one; others are Active Directory's, and taken as they are.
            distinguished = "=" in server.bind
            name = expand(server.bind, user, escape_name if distinguished else str)
            refused = _refused(await dialogue.bind(name, secret))
            if refused is not None:
                return refused
            addresses: tuple[str, ...] = ()
            if server.addresses and server.search_base and server.search_filter:
                addresses = _addresses(await self._found(dialogue, user))
            elif server.addresses and distinguished:
                addresses = _addresses(await dialogue.search(name, None, server.addresses))
            return Verified(user.lower(), addresses)

    async def _search_and_bind(self, dialogue: _Dialogue, user: str, secret: str) -> Outcome:
        server = self._server
        if server.search_bind:
            result = await dialogue.bind(server.search_bind, server.search_password)
            if result.code != _SUCCESS:
                raise Trouble(f"it refuses search_bind with result code {result.code}")
        entries = await self._found(dialogue, user)
        if not entries:
            return Denied("no such user")
        entry = entries[0]
        if not entry.name:
            raise Trouble("the entry it found has no name")  # a bind without a name is one as nobody
        refused = _refused(await dialogue.bind(entry.name, secret))
        return refused if refused is not None else Verified(user.lower(), _addresses(entries))

    async def _found(self, dialogue: _Dialogue, user: str) -> Sequence[_Entry]:
        """The one entry that is the user's, or none."""
        server = self._server
        text = expand(server.search_filter, user, escape_filter)
        entries = await dialogue.search(server.search_base, text, server.addresses)
        if len(entries) > 1:
            raise Trouble("the search finds more than one entry for one user")
        return entries


def _refused(result: _Result) -> Denied | None:
    """What a bind as the user says, if it is not yes."""
    if result.code == _SUCCESS:
        return None
    data = _DATA.search(result.text) if result.code == _INVALID_CREDENTIALS else None
    if data is not None and data[1] in _WHY_DATA:
        return Denied(_WHY_DATA[data[1]])
    if result.code in _WHY_DENIED:
        return Denied(_WHY_DENIED[result.code])
    raise Trouble(f"it answers a bind with result code {result.code}")


def _addresses(entries: Sequence[_Entry]) -> tuple[str, ...]:
    """Addresses among the values, each once; the domain in lower case.

    A value may say what kind it is: "smtp:" and "SMTP:" are addresses of mail, "X500:" and others are not.
    """
    found: dict[str, None] = {}
    for value in (value for entry in entries for value in entry.values):
        match = _PREFIX.fullmatch(value.decode("utf-8", "replace"))
        if match is not None and match[1].lower() != "smtp":
            continue
        address = parse_reverse_path(b"<%b>" % (value if match is None else match[2].encode()), smtputf8=True)
        if isinstance(address, Mailbox) and len(found) < ADDRESSES_MAX:
            found[str(address)] = None
    return tuple(found)


class _Library:
    """What ``anyldap`` builds for us.  It is imported when it is wanted: it is an optional dependency.

    Raises:
        ConfigError: it is not installed.
    """

    def __init__(self) -> None:
        try:
            from anyldap import ldapfilter  # noqa: PLC0415 - see above
            from anyldap.protocols import pureldap  # noqa: PLC0415
        except ImportError:
            raise ConfigError(
                ["[auth.ldap] needs the Python package anyldap, which is not installed; install gatepost[ldap]"]
            ) from None
        self._pureldap = pureldap
        self._ldapfilter = ldapfilter

    def check(self, text: str) -> None:
        """Raises ConfigError when the text is no filter."""
        try:
            self._ldapfilter.parseFilter(text)
        except self._ldapfilter.InvalidLDAPFilter:
            raise ConfigError(
                ["[auth.ldap] search_filter is no LDAP filter; write one such as (mail={user}), in parentheses"]
            ) from None

    def bind(self, number: int, name: str, secret: str) -> bytes:
        operation = self._pureldap.LDAPBindRequest(version=3, dn=name, auth=secret)
        return self._pureldap.LDAPMessage(operation, id=number).toWire()

    def start_tls(self, number: int) -> bytes:
        return self._pureldap.LDAPMessage(self._pureldap.LDAPStartTLSRequest(), id=number).toWire()

    def search(self, number: int, base: str, text: str | None, attributes: Sequence[str]) -> bytes:
        """``text``: a filter for the whole tree below the base; None for the base itself."""
        operation = self._pureldap.LDAPSearchRequest(
            baseObject=base,
            scope=0 if text is None else 2,
            derefAliases=0,
            sizeLimit=ENTRIES_MAX,
            timeLimit=0,
            typesOnly=0,
            filter=self._ldapfilter.parseFilter(text or "(objectClass=*)"),
            attributes=list(attributes) or ["1.1"],  # RFC 4511 §4.5.1.8: none
        )
        return self._pureldap.LDAPMessage(operation, id=number).toWire()


class _Dialogue:
    """Operations on one connection, one after the other."""

    def __init__(self, lines: Lines, library: _Library) -> None:
        self._lines = lines
        self._library = library
        self._number = 0

    async def start_tls(self) -> None:
        """RFC 4511 §4.14.  The handshake is for the caller."""
        self._say(self._library.start_tls(self._next()))
        code = (await self._result(_EXTENDED_RESPONSE)).code
        if code != _SUCCESS:
            raise Trouble(f"it refuses StartTLS with result code {code}, and tls is starttls")

    async def bind(self, name: str, secret: str) -> _Result:
        self._say(self._library.bind(self._next(), name, secret))
        return await self._result(_BIND_RESPONSE)

    async def search(self, base: str, text: str | None, attributes: Sequence[str]) -> Sequence[_Entry]:
        """Entries, two at most.

        Continuation references are passed over: Active Directory gives them with everything that is searched from its
        root, and nobody is asked but the server in the settings.
        """
        self._say(self._library.search(self._next(), base, text, attributes))
        entries: list[_Entry] = []
        while True:
            tag, content = await self._message()
            if tag == _ENTRY:
                if len(entries) < ENTRIES_MAX:
                    entries.append(_read(_entry, content))
            elif tag == _SEARCH_DONE:
                break
            elif tag not in (_REFERENCE, _INTERMEDIATE):
                raise Trouble("it answers a search with something else")
        code = _read(_result, content).code
        if code == _SIZE_LIMIT_EXCEEDED and len(entries) > 1:
            return entries
        if code == _NO_SUCH_OBJECT and text is None:
            return ()  # the user may not see the entry
        if code != _SUCCESS:
            raise Trouble(f"it answers a search with result code {code}")
        return entries

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _say(self, octets: bytes) -> None:
        self._lines.expect_silence()
        self._lines.send(octets)

    async def _result(self, expected: int) -> _Result:
        tag, content = await self._message()
        if tag != expected:
            raise Trouble("its answer is not to what was asked")
        return _read(_result, content)

    async def _message(self) -> tuple[int, bytes]:
        """The next message for the operation that is going on: its tag, and what it holds.  RFC 4511 §4.1.1, §5.1."""
        head = await self._lines.octets(2)
        if head[0] != _SEQUENCE or head[1] == 0x80 or head[1] > 0x84:
            raise Trouble("its answer is no LDAP message")
        length = head[1]
        if length > 0x80:
            length = int.from_bytes(await self._lines.octets(length - 0x80), "big")
        if length > MESSAGE_OCTETS_MAX:
            raise Trouble("an LDAP message of its is too long")
        parts = _read(lambda octets: list(_values(octets)), await self._lines.octets(length))
        if len(parts) < 2 or parts[0][0] != _INTEGER:
            raise Trouble("its answer is no LDAP message")
        if int.from_bytes(parts[0][1], "big") != self._number:
            raise Trouble("its answer is not to what was asked")  # 0 is a notice of disconnection.  RFC 4511 §4.4.1
        return parts[1]


# ---- What a server says.  RFC 4511 §5.1: BER, with definite lengths


def _read(reader: Callable[[bytes], T], octets: bytes) -> T:
    """What the octets mean; Trouble where they mean nothing."""
    try:
        return reader(octets)
    except ValueError:
        raise Trouble("its answer is no LDAP message") from None


def _values(octets: bytes) -> Iterator[tuple[int, bytes]]:
    """The values that stand in a row: tag and content of each.

    Raises:
        _Odd: the last one is not whole, or has no definite length.
    """
    at = 0
    while at < len(octets):
        if at + 2 > len(octets):
            raise _Odd
        tag, length = octets[at], octets[at + 1]
        at += 2
        if length >= 0x80:
            count = length - 0x80
            if not 1 <= count <= 4 or at + count > len(octets):
                raise _Odd
            length = int.from_bytes(octets[at : at + count], "big")
            at += count
        if at + length > len(octets):
            raise _Odd
        yield tag, octets[at : at + length]
        at += length


def _result(octets: bytes) -> _Result:
    """LDAPResult: resultCode, matchedDN, diagnosticMessage, and more that is not looked at."""
    parts = list(_values(octets))
    if [tag for tag, _ in parts[:3]] != [_ENUMERATED, _OCTETS, _OCTETS] or not 1 <= len(parts[0][1]) <= 4:
        raise _Odd
    return _Result(int.from_bytes(parts[0][1], "big"), parts[2][1])


def _entry(octets: bytes) -> _Entry:
    """SearchResultEntry: objectName, then attributes, each a type and a set of values."""
    parts = list(_values(octets))
    if [tag for tag, _ in parts[:2]] != [_OCTETS, _SEQUENCE]:
        raise _Odd
    values: list[bytes] = []
    for tag, attribute in _values(parts[1][1]):
        pair = list(_values(attribute))
        if tag != _SEQUENCE or [tag for tag, _ in pair] != [_OCTETS, _SET]:
            raise _Odd
        values += [value for _, value in _values(pair[1][1])]
    return _Entry(parts[0][1].decode("utf-8"), tuple(values))  # a UnicodeDecodeError is a ValueError too
