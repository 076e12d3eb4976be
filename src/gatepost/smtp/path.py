"""Reverse-paths, forward-paths and their parts: the only address parser in the gate.

Why: a gate in front of another server is as safe as the backend's reading of an address.  So an address is parsed once,
    here, to a value; the decision is made on that value; and what goes on is its ``octets``, never the client's.
Trust: every octet comes from the network and is meant to be read in two ways by two programs.
Promise: a path that parses has one reading.  ``octets`` is canonical: parsing it gives the same mailbox again, it holds
    no CR, LF or NUL, and exactly one "@" outside quotes.  ``Shape`` says whether some backend might nevertheless take
    the local-part for a route, a program, a file or an encapsulated address.  Bounded and linear in the input.
Sources: RFC 5321 §4.1.2 (grammar), §4.1.3 (address literals), §4.5.3.1 (limits), appendix C (source routes);
    RFC 6531 §3.3 (UTF-8 in paths), RFC 5890 to 5893 (IDNA 2008), RFC 2047 §2 (encoded words), RFC 3463 §3.2 (5.1.x).
    Stricter: no comments, no white space, no obsolete forms, no empty quoted local-part, no general address literal,
    no domain that ends in a number.  Wider: "_" in a domain (names of real hosts), a path without brackets where it is
    plain.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from enum import Enum, unique
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple, NoReturn

import idna

from gatepost.smtp.reply import Reply

# RFC 5321 §4.5.3.1.1 says 64 at least; addresses that encode another one (VERP, SRS) are longer.  Quotes included.
LOCAL_PART_OCTETS_MAX = 200
DOMAIN_OCTETS_MAX = 255  # RFC 5321 §4.5.3.1.2
LABEL_OCTETS_MAX = 63  # RFC 1035 §2.3.4
PATH_OCTETS_MAX = 256  # RFC 5321 §4.5.3.1.3, "<" and ">" included
PATHS_REMEMBERED = 8192  # nearly all mail is from and for the same mailboxes

Domain = str  # lower-case A-labels, as parse_domain() returns them

# The way of nearly every path: a dot-string of characters that no server gives a second meaning, at a domain of
# letters, digits and single hyphens.  What does not match is not wrong, it only takes the long way.
_PLAIN_PATH = re.compile(
    rb"<(?!-|[Ii][Mm][Cc][Ee][Aa])([A-Za-z0-9_+='-]+(?:\.[A-Za-z0-9_+='-]+)*)"
    rb"@((?:[A-Za-z0-9]+[.-])*[A-Za-z0-9]+\.[A-Za-z]+)>"
)

# A path as a whole, and what may follow it.  Quotes protect ">" and SP; a backslash counts inside quotes only.
_BRACKETED = re.compile(
    rb' *(<(?:[^<>"\\\x00-\x20\x7f]|"(?:[^"\\\x00-\x1f\x7f]|\\[\x20-\x7e])*")*>)(?: +(.*))?', re.DOTALL
)
# Without brackets (typed by hand, sent by old devices) only what cannot be anything else.
_UNBRACKETED = re.compile(rb' *([^<>"\\,;:()\x00-\x20\x7f]+)(?: +(.*))?', re.DOTALL)

_ATEXT = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~\-"  # RFC 5322 §3.2.3
_UTF8 = r"\xa0-\U0010ffff"  # UTF8-non-ascii of RFC 6531 §3.3, without the C1 controls
_DOT_STRING = re.compile(rf"[{_ATEXT}{_UTF8}]+(?:\.[{_ATEXT}{_UTF8}]+)*")
_CANONICAL = re.compile(rf"[{_ATEXT}{_UTF8}]+(?:\.[{_ATEXT}{_UTF8}]+)*@[a-z0-9._-]+")
_QUOTED_STRING = re.compile(rf'"((?:[\x20\x21\x23-\x5b\x5d-\x7e{_UTF8}]|\\[\x20-\x7e])*)"')
_QUOTED_PAIR = re.compile(r"\\(.)")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_IPV6_TAG = re.compile(r"IPv6:", re.IGNORECASE | re.ASCII)

# Controls, line separators, and the characters that change the order in which text is shown: never in an address.
_NEVER = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufff9-\ufffb\ufffe\uffff]")


@unique
class Shape(Enum):
    """What kind of forward-path this is: whether some backend may read it as another address."""

    PLAIN = "plain"
    LITERAL = "literal"
    NO_DOMAIN = "no-domain"
    PERCENT = "percent"
    BANG = "bang"
    QUOTED_AT = "quoted-at"
    ROUTE = "route"
    ENCODED = "encoded"
    SPECIAL = "special"

    routing: bool
    """True for all but PLAIN, LITERAL and NO_DOMAIN: refused from strangers, whatever the domain."""

    def __init__(self, word: str) -> None:
        self.routing = word not in ("plain", "literal", "no-domain")


class PathDefect(NamedTuple):
    """The octets are no path that we take; ``reply`` is the refusal to send."""

    reply: Reply


class AddressLiteral(NamedTuple):
    """[192.0.2.1] or [IPv6:2001:db8::1].  RFC 5321 §4.1.3.  A mapped IPv6 address stays what it was written as."""

    address: IPv4Address | IPv6Address

    def __str__(self) -> str:
        if isinstance(self.address, IPv4Address):
            return f"[{self.address}]"
        mapped = self.address.ipv4_mapped
        # Python 3.13 changed str() of a mapped address; the canonical form must not depend on the interpreter.
        return f"[IPv6:{self.address}]" if mapped is None else f"[IPv6:::ffff:{mapped}]"


class Mailbox(NamedTuple):
    """local-part "@" domain.  RFC 5321 §4.1.2.

    Attributes:
        local_part: the text itself, without quotes and backslashes; not ASCII only under SMTPUTF8.
        domain: canonical, see ``parse_domain``.
    """

    local_part: str
    domain: Domain | AddressLiteral

    @property
    def octets(self) -> bytes:
        """The canonical form without "<" and ">": quoted only where it must be.

        Raises:
            ValueError: when the value was built by hand from text that has no form on the wire.
        """
        return _canonical(self).encode()

    def __str__(self) -> str:
        return _canonical(self)


@lru_cache(maxsize=PATHS_REMEMBERED)
def _canonical(mailbox: Mailbox) -> str:
    text = f"{mailbox.local_part}@{mailbox.domain}"
    return text if _CANONICAL.fullmatch(text) else _quoted(mailbox)


def _quoted(mailbox: Mailbox) -> str:
    """The canonical form where the local-part needs quotes or the domain is a literal; both are looked at again."""
    local_part = mailbox.local_part
    if not local_part or _NEVER.search(local_part):
        raise ValueError(f"{local_part!a} cannot be a local-part")
    if isinstance(mailbox.domain, str) and parse_domain(mailbox.domain) != mailbox.domain:
        raise ValueError(f"{mailbox.domain!a} is not a canonical domain")
    if _DOT_STRING.fullmatch(local_part) is None:
        # RFC 5321 §4.1.2: no more quotes and quoted-pairs than the text needs.
        local_part = '"' + local_part.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"{local_part}@{mailbox.domain}"


class NullReversePath(Enum):
    """The type of NULL_REVERSE_PATH, its only value."""

    NULL_REVERSE_PATH = "<>"

    @property
    def octets(self) -> bytes:
        return b""

    def __str__(self) -> str:
        return "<>"


class Postmaster(Enum):
    """The type of POSTMASTER, its only value: the one forward-path without a domain.  RFC 5321 §4.5.1."""

    POSTMASTER = "postmaster"

    @property
    def local_part(self) -> str:
        return "postmaster"

    @property
    def octets(self) -> bytes:
        return b"postmaster"

    def __str__(self) -> str:
        return "postmaster"


NULL_REVERSE_PATH: Final = NullReversePath.NULL_REVERSE_PATH
POSTMASTER: Final = Postmaster.POSTMASTER

ReversePath = Mailbox | NullReversePath


class ForwardPath(NamedTuple):
    """One recipient as it was decided on.  A source route is dropped, and remembered as ``Shape.ROUTE`` alone."""

    mailbox: Mailbox | Postmaster
    shape: Shape

    @property
    def octets(self) -> bytes:
        """What is sent on between "<" and ">"."""
        return self.mailbox.octets

    def __str__(self) -> str:
        return str(self.mailbox)


class _Wrong(ValueError):
    """Why a path or a domain is refused; its text is a sentence for a person."""


def _refuse(why: str) -> NoReturn:
    raise _Wrong(why)


def split_path(argument: bytes) -> tuple[bytes, bytes] | PathDefect:
    """The path at the start of what follows "FROM:" or "TO:", and the parameters behind it.

    Args:
        argument: hostile; spaces before the path are passed over, since many clients send one.

    Returns:
        The path with "<" and ">" (supplied where a plain address came without), and the rest without outer spaces.
    """
    match = _BRACKETED.fullmatch(argument)
    if match is not None:
        return match[1], match[2].strip(b" ") if match[2] else b""
    match = _UNBRACKETED.fullmatch(argument)
    if match is not None and b" <" not in argument:  # "Alice <a@b>" is a header field's form
        return b"<" + match[1] + b">", match[2].strip(b" ") if match[2] else b""
    return PathDefect(Reply(501, 'Syntax error: one address between "<" and ">", then parameters', "5.5.4"))


def parse_plain_mailbox(octets: bytes) -> Mailbox | None:
    """The mailbox of a path in the plain shape that nearly all have, or None for one that needs the long way.

    Args:
        octets: hostile; "<" and ">" included.  What matches holds no space and no quote.
    """
    return _plain_mailbox(octets) if len(octets) <= PATH_OCTETS_MAX else None


@lru_cache(maxsize=PATHS_REMEMBERED)
def _plain_mailbox(octets: bytes) -> Mailbox | None:
    match = _PLAIN_PATH.fullmatch(octets)
    if match is None:
        return None
    local_part, domain = match.groups()
    if len(local_part) > LOCAL_PART_OCTETS_MAX:
        return None
    if len(domain) > LABEL_OCTETS_MAX and max(map(len, domain.split(b"."))) > LABEL_OCTETS_MAX:
        return None
    return Mailbox(local_part.decode(), domain.lower().decode())


def parse_reverse_path(octets: bytes, *, smtputf8: bool) -> ReversePath | PathDefect:
    """The reverse-path of MAIL.

    Args:
        octets: hostile; "<" and ">" included.
        smtputf8: MAIL carried the parameter SMTPUTF8 (RFC 6531 §3.4).
    """
    mailbox = parse_plain_mailbox(octets)
    if mailbox is not None:
        return mailbox
    if octets == b"<>":
        return NULL_REVERSE_PATH  # RFC 5321 §4.5.5
    parsed = _parse(octets, smtputf8, "5.1.7")
    if isinstance(parsed, PathDefect):
        return parsed
    return _no_domain("5.1.7") if isinstance(parsed[0], Postmaster) else parsed[0]


def parse_forward_path(octets: bytes, *, smtputf8: bool) -> ForwardPath | PathDefect:
    """The forward-path of RCPT.

    Args:
        octets: hostile; "<" and ">" included.
        smtputf8: the transaction's MAIL carried the parameter SMTPUTF8.
    """
    plain = parse_plain_mailbox(octets)
    if plain is not None:
        return ForwardPath(plain, Shape.PLAIN)
    if octets == b"<>":
        return PathDefect(Reply(501, "A recipient needs an address", "5.1.3"))
    parsed = _parse(octets, smtputf8, "5.1.3")
    if isinstance(parsed, PathDefect):
        return parsed
    mailbox, routed = parsed
    return ForwardPath(mailbox, Shape.ROUTE if routed else _shape(mailbox))


def parse_domain(text: str) -> Domain:
    """A domain in either form, U-labels or A-labels, in its canonical form: lower-case A-labels.

    IDNA 2008 without any mapping: what needs mapping (fullwidth letters, ideographic dots, soft hyphens, joiners) is
    refused, for two programs map it in two ways.  RFC 5891 §5.3.

    Raises:
        ValueError: with a sentence that says what is wrong.
    """
    if not text:
        raise _Wrong("the domain is empty")
    if len(text) > DOMAIN_OCTETS_MAX:
        raise _Wrong(f"the domain is longer than {DOMAIN_OCTETS_MAX} octets")
    labels = [_label(label) for label in text.split(".")]
    if _NUMBER.fullmatch(labels[-1]):
        # "user@127.0.0.1": a name whose last label is a number is an IP address to inet_aton() and its heirs.
        raise _Wrong("a domain does not end in a number; an IP address stands between [ and ]")
    domain = ".".join(labels)
    if len(domain) > DOMAIN_OCTETS_MAX:
        raise _Wrong(f"the domain is longer than {DOMAIN_OCTETS_MAX} octets")
    return domain


def parse_address_literal(text: str) -> AddressLiteral:
    """[192.0.2.1] or [IPv6:2001:db8::1]; no other tag, no decimal or shortened IPv4 address, no zone.

    Raises:
        ValueError: with a sentence that says what is wrong.
    """
    if not (text.startswith("[") and text.endswith("]")):
        raise _Wrong("the address literal does not end" if text.startswith("[") else "an address literal begins with [")
    inner = text[1:-1]
    tag = _IPV6_TAG.match(inner)
    try:
        if tag is None:
            return AddressLiteral(IPv4Address(inner))
        if "%" not in inner:
            return AddressLiteral(IPv6Address(inner[tag.end() :]))
    except ValueError:
        pass
    raise _Wrong("an address literal is [IPv4 address] or [IPv6:address]")


def _no_domain(status: str) -> PathDefect:
    return PathDefect(Reply(553, "The address needs a domain", status))


def _parse(octets: bytes, smtputf8: bool, status: str) -> tuple[Mailbox | Postmaster, bool] | PathDefect:
    """The long way.  Returns the mailbox, and whether a source route stood before it."""
    if len(octets) > PATH_OCTETS_MAX:
        return PathDefect(Reply(501, f"The path is longer than {PATH_OCTETS_MAX} octets", status))
    if not (octets.startswith(b"<") and octets.endswith(b">") and len(octets) > 2):
        return PathDefect(Reply(501, 'An address stands between "<" and ">"', status))
    if not octets.isascii() and not smtputf8:
        return PathDefect(Reply(553, "An address with non-ASCII characters needs SMTPUTF8", "5.6.7"))  # RFC 6531 §3.5
    try:
        text = octets[1:-1].decode("utf-8")  # strict: neither overlong forms nor surrogates
    except UnicodeDecodeError:
        return PathDefect(Reply(501, "The address is not valid UTF-8", status))
    try:
        if _NEVER.search(text):
            _refuse("the address holds control characters")
        routed = text.startswith("@")
        if routed:
            text = _drop_route(text)
        elif text.isascii() and text.lower() == "postmaster":
            return POSTMASTER, False
        local_part, domain_text = _split_mailbox(text)
        if domain_text is None:
            return _no_domain(status)
        mailbox = Mailbox(local_part, _domain_or_literal(domain_text))
        if len(mailbox.octets) > PATH_OCTETS_MAX - 2:
            # A-labels may be longer than the U-labels that came; what we could not send, we do not take.
            _refuse(f"the path is longer than {PATH_OCTETS_MAX} octets")
    except _Wrong as wrong:
        return PathDefect(Reply(501, f"Bad address: {wrong}", status))
    return mailbox, routed


def _drop_route(text: str) -> str:
    """The mailbox behind "@a,@b:".  RFC 5321 §4.1.1.3 and appendix C: accepted as syntax, never followed or sent on."""
    route, colon, mailbox = text.partition(":")
    if not colon:
        raise _Wrong("the local-part is missing")
    for hop in route.split(","):
        if not hop.startswith("@"):
            raise _Wrong("a source route is a list of @domain")
        parse_domain(hop[1:])
    return mailbox


def _split_mailbox(text: str) -> tuple[str, str | None]:
    """The unquoted local-part, and the text behind the "@" that ends it; None where there is no such "@"."""
    quoted = text.startswith('"')
    match = (_QUOTED_STRING if quoted else _DOT_STRING).match(text)
    if match is None:
        raise _Wrong("the quoted string does not end" if quoted else "the local-part is malformed")
    rest = text[match.end() :]
    if rest and not rest.startswith("@"):
        raise _Wrong("the local-part is malformed")
    if len(match[0].encode()) > LOCAL_PART_OCTETS_MAX:
        raise _Wrong(f"the local-part is longer than {LOCAL_PART_OCTETS_MAX} octets")
    # RFC 5321 §4.1.2: \x and x are the same character; the value holds the character.
    local_part = _QUOTED_PAIR.sub(r"\1", match[1]) if quoted else match[0]
    if not local_part:
        raise _Wrong("the local-part is empty")  # Postfix reads <""@x> as the null reverse-path
    return local_part, rest[1:] if rest else None


def _domain_or_literal(text: str) -> Domain | AddressLiteral:
    return parse_address_literal(text) if text.startswith("[") else parse_domain(text)


def _label(label: str) -> str:
    if not label:
        raise _Wrong("the domain has an empty label")
    if not label.isascii():
        return _u_label(label)
    label = label.lower()
    if _LABEL.fullmatch(label) is None:
        raise _Wrong(f"{label[:64]!a} is not a label of a domain")
    if label.startswith("xn--"):
        # RFC 5891 §5.4: an A-label is one only if it comes back from its U-label.
        try:
            if _u_label(idna.ulabel(label)) == label:
                return label
        except ValueError:
            pass
        raise _Wrong(f"{label!a} is not a valid A-label")
    return label


def _u_label(label: str) -> str:
    try:
        if len(label) <= LABEL_OCTETS_MAX:  # bounds the work of Punycode
            return idna.alabel(label).decode("ascii")
    except ValueError:  # idna.IDNAError is one
        pass
    raise _Wrong(f"{label[:64]!a} is not a label of IDNA 2008, which knows no upper case")


# --- Shape ------------------------------------------------------------------------------------------------------------

# Exchange unwraps IMCEASMTP-user+40host to user@host (MS99-027) and has more such types; IMCEAEX is its own internal
# form, which bounces and replies to ordinary users carry.
_ENCAPSULATED = re.compile(r"IMCEA(?!EX-)[A-Z0-9]*[-_ ]", re.IGNORECASE | re.ASCII)
# Characters that end, group, quote or begin something in some reading of an address; "/" and "-" at the start make a
# file or an option of it (Postfix allow_min_user), "|" a program, a dot there a hidden file (Exim's default ACL).
_SPECIAL = re.compile(r"""[\x00-\x20\x7f"(),:;<>\[\\\]|`]|\$\{|\A[-./]|/\.\.?(?:/|\Z)""")

# Default_Ignorable_Code_Point: a program that drops them sees what is left.  Unicode DerivedCoreProperties.
_IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# What Unicode normalisation leaves alone but conversion to a Windows or East Asian code page turns into ASCII, as the
# "best fit" tables of these code pages have it.
_BEST_FIT = str.maketrans(
    {
        "\u01c0": "|", "\u01c3": "!", "\u02ba": '"', "\u0589": ":", "\u05c3": ":", "\u066a": "%", "\u2010": "-",
        "\u2012": "-", "\u2013": "-", "\u2014": "-", "\u2033": '"', "\u2039": "<", "\u203a": ">", "\u2044": "/",
        "\u2212": "-", "\u2215": "/", "\u2216": "\\", "\u2223": "|", "\u2236": ":", "\u2329": "<", "\u232a": ">",
        "\u2758": "|", "\u3008": "<", "\u3009": ">", "\u301a": "[", "\u301b": "]", "\u301d": '"', "\u301e": '"',
        "\u00a5": "\\", "\u20a9": "\\", "\u00a6": "|", "\u00ab": "<", "\u00bb": ">", "\u030e": '"', "\u2320": "(",
        "\u2321": ")", "\u2500": "-",
    }
)  # fmt: skip


def _shape(mailbox: Mailbox | Postmaster) -> Shape:
    if isinstance(mailbox, Postmaster):
        return Shape.NO_DOMAIN
    local_part = mailbox.local_part
    shape = _shape_of_text(local_part)
    if shape is Shape.PLAIN and not local_part.isascii() and _hides_another(local_part):
        return Shape.ENCODED
    if shape is Shape.PLAIN and isinstance(mailbox.domain, AddressLiteral):
        return Shape.LITERAL
    return shape


def _shape_of_text(local_part: str) -> Shape:
    if "@" in local_part:
        return Shape.QUOTED_AT
    if "%" in local_part:
        return Shape.PERCENT
    if "!" in local_part or "^" in local_part:  # the sendmail.cf of BSD and SunOS: "convert ^ to !"
        return Shape.BANG
    if ("=?" in local_part and "?=" in local_part) or "&#" in local_part or _ENCAPSULATED.match(local_part):
        return Shape.ENCODED
    if _SPECIAL.search(local_part):
        return Shape.SPECIAL
    return Shape.PLAIN


def _hides_another(local_part: str) -> bool:
    """Whether a backend that normalises, drops or converts characters would be left with another kind of local-part.

    A character that turns into ASCII makes another mailbox at least (Roman numeral four: "IV").  For the rest,
    compatibility decomposition keeps every ASCII character that NFKC keeps, and marks are taken off, so that nothing
    hides behind one.
    """
    if any(not c.isascii() and any(map(str.isascii, unicodedata.normalize("NFKC", c))) for c in local_part):
        return True
    return _shape_of_text(_bare(local_part).upper()) is not Shape.PLAIN


def _bare(local_part: str) -> str:
    text = unicodedata.normalize("NFKD", _IGNORABLE.sub("", local_part)).translate(_BEST_FIT)
    return "".join(c for c in text if not unicodedata.combining(c) and not _IGNORABLE.match(c))


def may_be_read_with(local_part: str, characters: str) -> bool:
    """Whether a local-part holds one of these ASCII characters, or may be left with one where it is converted."""
    text = local_part if local_part.isascii() else local_part + _bare(local_part)
    return not set(characters).isdisjoint(text)


# --- Patterns of the configuration ------------------------------------------------------------------------------------


class Pattern(NamedTuple):
    """Which paths an administrator means: "user@example.com", "*@example.com", "*@*.example.com", "*", "<>".

    "*.example.com" is every name below example.com and not example.com itself.  "*" alone (or "*@*") is every path, the
    null reverse-path and bare postmaster included; these two are otherwise matched by "<>" and "postmaster" alone.

    Attributes:
        text: canonical form; two patterns of the same text match the same paths, see ``pattern_texts``.
        special: the one value without a domain that is meant, if any.
        local_part: folded to lower case; None for any.
        domain: None for any.
        below: the names below ``domain`` are meant.
    """

    text: str
    special: NullReversePath | Postmaster | None = None
    local_part: str | None = None
    domain: Domain | AddressLiteral | None = None
    below: bool = False

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """The pattern an administrator wrote.

        Raises:
            ValueError: with a sentence that says what is wrong and what to write.
        """
        if text in ("*", "*@*"):
            return cls("*")
        if text == "<>":
            return cls("<>", special=NULL_REVERSE_PATH)
        if text.isascii() and text.lower() == "postmaster":
            return cls("postmaster", special=POSTMASTER)
        if "@" not in text:
            raise _Wrong(f'"{text}" has no "@": write "*@{text}" for all addresses of a domain')
        local_part: str | None = None
        domain: Domain | AddressLiteral | None = None
        below = False
        if text.startswith("*@"):
            domain_text = text[2:]
        else:
            local_part, rest = _split_mailbox(text)
            domain_text = rest or ""
            if "*" in local_part:
                raise _Wrong(f'"{text}": "*" stands for a whole local-part or for nothing, as in "*@{domain_text}"')
            if _NEVER.search(local_part):
                raise _Wrong(f"{text!r} holds control characters")
        if domain_text.startswith("*."):
            below, domain = True, parse_domain(domain_text[2:])
        elif domain_text != "*":
            if "*" in domain_text:
                raise _Wrong(f'"{text}": in a domain "*" stands only at its beginning, as in "*.example.com"')
            domain = _domain_or_literal(domain_text)
        if isinstance(domain, AddressLiteral):
            domain = _unmapped(domain)
        local_part = None if local_part is None else _fold(local_part)
        right = "*" if domain is None else f"*.{domain}" if below else str(domain)
        return cls(f"{_left(local_part)}@{right}", None, local_part, domain, below)

    def matches(self, path: ReversePath | ForwardPath | Mailbox | Postmaster) -> bool:
        """Whether the pattern means this path."""
        if isinstance(path, ForwardPath):
            path = path.mailbox
        if self.text == "*":
            return True
        if not isinstance(path, Mailbox):
            return path is self.special
        if self.special is not None:
            return False
        if self.local_part is not None and self.local_part != _fold(path.local_part):
            return False
        domain = self.domain
        if domain is None:
            return True
        if isinstance(domain, str):
            if not isinstance(path.domain, str):
                return False
            return path.domain.endswith("." + domain) if self.below else path.domain == domain
        return isinstance(path.domain, AddressLiteral) and domain == _unmapped(path.domain)

    def __str__(self) -> str:
        return self.text


def pattern_texts(path: ReversePath | ForwardPath | Mailbox | Postmaster) -> Iterator[str]:
    """The canonical text of every pattern that matches the path, for lookup among many patterns."""
    if isinstance(path, ForwardPath):
        path = path.mailbox
    yield "*"
    if not isinstance(path, Mailbox):
        yield str(path)
        return
    if isinstance(path.domain, AddressLiteral):
        rights = [str(_unmapped(path.domain))]
    else:
        rights = [path.domain]
        _, dot, parent = path.domain.partition(".")
        while dot:
            rights.append("*." + parent)
            _, dot, parent = parent.partition(".")
    left = _left(_fold(path.local_part))
    yield left + "@*"
    for right in rights:
        yield f"{left}@{right}"
        yield f"*@{right}"


def exact_text(mailbox: Mailbox) -> str:
    """The canonical text of the one pattern that means this mailbox alone: compared without case, never a wildcard."""
    domain = mailbox.domain if isinstance(mailbox.domain, str) else str(_unmapped(mailbox.domain))
    return f"{_left(_fold(mailbox.local_part))}@{domain}"


def _left(local_part: str | None) -> str:
    """The part before the "@" of a pattern: quoted as in a path, so that a quoted "*" is not a wildcard."""
    if local_part is None:
        return "*"
    return '"*"' if local_part == "*" else Mailbox(local_part, "x").octets.decode().removesuffix("@x")


def _fold(local_part: str) -> str:
    """Lower case, except that no foreign letter becomes an ASCII one (the Kelvin sign would become "k")."""
    if local_part.isascii():
        return local_part.lower()
    return "".join(c if not c.isascii() and c.lower().isascii() else c.lower() for c in local_part)


def _unmapped(literal: AddressLiteral) -> AddressLiteral:
    """[IPv6:::ffff:192.0.2.1] names the same host as [192.0.2.1]."""
    address = literal.address
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return AddressLiteral(address.ipv4_mapped)
    return literal
