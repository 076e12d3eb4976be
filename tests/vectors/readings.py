"""Every address that some mail server might read out of one RCPT argument.

Why: the rule the gate must keep is about the backend's reading, not ours: user%elsewhere@ours is local to one server
    and a relay to the next.  So the lenient backend records all readings, and one foreign reading fails a test.
Trust: the argument is whatever came over the wire; nothing here raises on it, and the number of readings is bounded.
Promise: one rule is one way in which a family of servers is known to misread; rules compose (a comment inside a
    percent hack), each reading with the chain of rules that leads to it.
Sources: RFC 5321 appendix C and RFC 1123 §5.2.16-19 (routes, percent), RFC 976 (bang), RFC 2047, the sources that
    cases.jsonl names.
"""

from __future__ import annotations

import email.errors
import email.header
import html
import re
import unicodedata
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterator

READINGS_MAX = 400
CHAIN_MAX = 5

AddressRule = Callable[[bytes], Iterator[bytes]]
_ADDRESS_RULES: list[tuple[str, AddressRule]] = []
_ARGUMENT_RULES: list[tuple[str, AddressRule]] = []

_CONTROLS = re.compile(rb"[\x01-\x1f\x7f]")
_BLANKS = re.compile(rb"[ \t\n\r\x0b\x0c\xa0]+")
_QUOTED = re.compile(rb'"(?:\\.|[^"\\])*"', re.DOTALL)
_ADDRESS = re.compile(rb"[^\s<>,;:=()\"]+@[^\s<>,;:=()\"]+")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufe00-\ufe0f\ufeff]")
_DOTS = re.compile("[\u3002\uff0e\uff61]")
_OVERLONG = re.compile(rb"[\xc0\xc1][\x80-\xbf]")
_ENCAPSULATED = re.compile(rb"\"?IMCEA(?:SMTP)?[-_ ](?P<inner>.*?)\"?", re.DOTALL | re.IGNORECASE)
_PIPE = b"program@pipe.invalid"  # what a mailer does that hands "|program" or a file name to the shell


def _rule(name: str) -> Callable[[AddressRule], AddressRule]:
    def add(rule: AddressRule) -> AddressRule:
        _ADDRESS_RULES.append((name, rule))
        return rule

    return add


def _argument_rule(name: str) -> Callable[[AddressRule], AddressRule]:
    def add(rule: AddressRule) -> AddressRule:
        _ARGUMENT_RULES.append((name, rule))
        return rule

    return add


# --------------------------------------------------------------------------------------------- the plain reading


def _unquoted(text: bytes, wanted: bytes) -> list[int]:
    """Where the octet stands outside quotes and escapes; everywhere, when a quote is never closed."""
    found, quoted, at = [], False, 0
    while at < len(text):
        octet = text[at : at + 1]
        if octet == b"\\":
            at += 1
        elif octet == b'"':
            quoted = not quoted
        elif octet == wanted and not quoted:
            found.append(at)
        at += 1
    if quoted:
        return [at for at in range(len(text)) if text[at : at + 1] == wanted]
    return found


def plain(argument: bytes) -> bytes:
    """The path as RFC 5321 reads it: between angle brackets, quotes honoured; else the first word."""
    argument = argument.strip(b" \t")
    start = argument.find(b"<")
    if start < 0:
        return argument.split(b" ", 1)[0].split(b"\t", 1)[0]
    ends = [at for at in _unquoted(argument, b">") if at > start]
    return argument[start + 1 : ends[0]] if ends else argument[start + 1 :]


def split(address: bytes) -> tuple[bytes, bytes]:
    """Local-part and domain at the last at-sign outside quotes; no domain: b""."""
    ats = _unquoted(address, b"@")
    return (address[: ats[-1]], address[ats[-1] + 1 :]) if ats else (address, b"")


def domain_of(address: bytes) -> str:
    """The domain as a mail server compares it: case folded, without a trailing dot."""
    return split(address)[1].strip().rstrip(b".").lower().decode("utf-8", "backslashreplace")


# ------------------------------------------------------------------------------------------------ routing on purpose


@_rule("source-route")
def _source_route(address: bytes) -> Iterator[bytes]:
    """<@a,@b:user@c> goes to a, to b or to c, as the server likes; "host:user@domain" is its short form."""
    if address.startswith(b"@"):
        route, colon, rest = address.partition(b":")
        if colon:
            yield rest
        if colon or b"," in route:
            for hop in route.split(b","):
                yield b"hop" + hop.strip()
        return
    local, domain = split(address)
    head, colon, tail = local.partition(b":")
    if colon and b"@" not in head and not local.startswith(b'"'):
        yield tail + b"@" + domain


@_rule("percent-hack")
def _percent(address: bytes) -> Iterator[bytes]:
    """user%next@here: the last percent becomes the at-sign.  RFC 1123 §5.2.16."""
    local, _ = split(address)
    if b"%" in local and not local.startswith(b'"'):
        user, _, host = local.rpartition(b"%")
        yield user + b"@" + host


@_rule("bang")
def _bang(address: bytes) -> Iterator[bytes]:
    """next!user@here: UUCP before Internet.  RFC 976."""
    local, _ = split(address)
    if b"!" in local and not local.startswith(b'"'):
        host, _, user = local.partition(b"!")
        yield user + b"@" + host


@_rule("caret")
def _caret(address: bytes) -> Iterator[bytes]:
    """next^user@here: the sendmail.cf of BSD, IDA and SunOS 4.1 made carets bangs, for shells that take "!"."""
    local, _ = split(address)
    if b"^" in local and not local.startswith(b'"'):
        host, _, user = local.partition(b"^")
        yield user + b"@" + host


@_rule("imcea")
def _imcea(address: bytes) -> Iterator[bytes]:
    """IMCEASMTP-user+40host@here: Exchange's encapsulated address."""
    match = _ENCAPSULATED.fullmatch(split(address)[0])
    if match:
        yield re.sub(rb"\+([0-9A-Fa-f]{2})", lambda pair: bytes([int(pair[1], 16)]), match["inner"])


@_rule("pipe")
def _pipe(address: bytes) -> Iterator[bytes]:
    """A local-part that begins with | or / is a program or a file to some local mailers."""
    local, _ = split(address)
    if local.lstrip(b'"').startswith((b"|", b"/")):
        yield _PIPE


# ------------------------------------------------------------------------------------------------ quoting misread


@_rule("unquote")
def _unquote(address: bytes) -> Iterator[bytes]:
    """The quotes are thrown away and the inside read again."""
    local, domain = split(address)
    local = local.strip()
    if len(local) < 2 or not (local.startswith(b'"') and local.endswith(b'"')):
        return
    inner = re.sub(rb"\\(.)", rb"\1", local[1:-1], flags=re.DOTALL)
    if b"@" in inner:
        yield inner
    if b"%" in inner or b"!" in inner:
        yield inner + (b"@" + domain if domain else b"")


@_rule("backslash")
def _backslash(address: bytes) -> Iterator[bytes]:
    yield address.replace(b"\\", b"")


@_rule("first-at")
def _first_at(address: bytes) -> Iterator[bytes]:
    """Cut at some at-sign that is not the last one outside quotes."""
    pieces = address.split(b"@")
    if len(pieces) < 3:
        return
    yield b"@".join(pieces[:2])
    if not address.startswith(b"@"):
        for piece in pieces[1:]:
            yield b"x@" + piece


@_rule("comments")
def _comments(address: bytes) -> Iterator[bytes]:
    """RFC 822 comments are dropped, nested ones too."""
    out, depth, quoted, at = bytearray(), 0, False, 0
    while at < len(address):
        octet = address[at : at + 1]
        if octet == b"\\":
            octet = address[at : at + 2]
            at += 1
        elif octet == b'"' and not depth:
            quoted = not quoted
        elif octet == b"(" and not quoted:
            depth += 1
        elif octet == b")" and not quoted and depth:
            depth -= 1
            at += 1
            continue
        if not depth:
            out += octet
        at += 1
    yield bytes(out)


@_rule("naive-gt")
def _naive_gt(address: bytes) -> Iterator[bytes]:
    """The first > ends the path, whatever the quotes say."""
    if b">" in address:
        head = address.partition(b">")[0]
        yield head
        yield head.lstrip(b'"')


@_rule("angle-last")
def _angle_last(address: bytes) -> Iterator[bytes]:
    """The last < begins the path: display names where none belong."""
    if b"<" in address:
        yield address.rpartition(b"<")[2].partition(b">")[0]


# ------------------------------------------------------------------------------------------- separators and controls


@_rule("space-cut")
def _space_cut(address: bytes) -> Iterator[bytes]:
    words = _BLANKS.split(address)
    if len(words) > 1:
        yield from (word for word in words if b"@" in word)


@_rule("space-drop")
def _space_drop(address: bytes) -> Iterator[bytes]:
    yield _BLANKS.sub(b"", address)


@_rule("many")
def _many(address: bytes) -> Iterator[bytes]:
    """A list of recipients in one path."""
    if not address.startswith(b"@"):
        words = re.split(rb"[,;]", address)
        if len(words) > 1:
            yield from (word for word in words if b"@" in word)


@_rule("nul")
def _nul(address: bytes) -> Iterator[bytes]:
    """A C string ends at NUL; another program drops it."""
    if b"\0" in address:
        yield address.partition(b"\0")[0]
        yield address.replace(b"\0", b"")


@_rule("controls")
def _control(address: bytes) -> Iterator[bytes]:
    if _CONTROLS.search(address):
        yield _CONTROLS.split(address)[0]
        yield _CONTROLS.sub(b"", address)


# ------------------------------------------------------------------------------------------------ encodings misread


@_rule("high-bit")
def _high_bit(address: bytes) -> Iterator[bytes]:
    """Seven-bit transport, and UTF-8 decoders that take two octets for one ASCII character."""
    yield bytes(octet & 0x7F for octet in address)
    yield _OVERLONG.sub(lambda pair: bytes([((pair[0][0] & 3) << 6 | pair[0][1] & 0x3F) & 0x7F]), address)


@_rule("nfkc")
def _nfkc(address: bytes) -> Iterator[bytes]:
    """Compatibility forms, ideographic dots and invisible characters folded, as IDNA 2003 and many libraries do."""
    if address.isascii():
        return
    for charset in ("utf-8", "latin-1"):
        try:
            text = address.decode(charset)
        except UnicodeDecodeError:
            continue
        folded = _INVISIBLE.sub("", _DOTS.sub(".", unicodedata.normalize("NFKC", text)))
        if "@" in folded:
            yield folded.encode()


@_rule("url")
def _url(address: bytes) -> Iterator[bytes]:
    yield urllib.parse.unquote_to_bytes(address)


@_rule("html")
def _html(address: bytes) -> Iterator[bytes]:
    if b"&" in address and b";" in address:
        text = address.decode("latin-1")
        decoded = html.unescape(text)
        if decoded != text:
            yield decoded.encode("utf-8", "replace")


@_rule("encoded-word")
def _encoded_word(address: bytes) -> Iterator[bytes]:
    """RFC 2047 in an envelope."""
    if b"=?" not in address or b"?=" not in address:
        return
    try:
        pieces = email.header.decode_header(address.decode("latin-1"))
        text = "".join(
            piece if isinstance(piece, str) else piece.decode(charset or "latin-1", "replace")
            for piece, charset in pieces
        )
    except (email.errors.HeaderParseError, LookupError, ValueError):
        return
    yield text.encode("utf-8", "replace")


# ------------------------------------------------------------------------------ rules over the whole RCPT argument


@_argument_rule("many")
def _many_in_argument(argument: bytes) -> Iterator[bytes]:
    """A second address behind or inside the first path."""
    path = plain(argument)
    _, _, behind = argument.partition(path) if path else (b"", b"", b"")
    yield from re.findall(rb"<([^<>\s]+@[^<>\s]+)>", behind)
    yield from re.findall(rb"(?:^|[\s,;>])([^\s<>,;:=]+@[^\s<>,;:=]+)", behind)
    if b'"' not in path and not path.startswith(b"@") and re.search(rb"[,;]", path):
        yield from (found for found in _ADDRESS.findall(_QUOTED.sub(b"Q", argument)) if found in path)


@_argument_rule("angle-last")
def _angle_last_in_argument(argument: bytes) -> Iterator[bytes]:
    if argument.count(b"<") > 1:
        last = argument.rpartition(b"<")[2].partition(b">")[0]
        if b"@" in last:
            yield last


@_argument_rule("naive-gt")
def _naive_gt_in_argument(argument: bytes) -> Iterator[bytes]:
    if b"<" in argument:
        first = argument.partition(b"<")[2].partition(b">")[0]
        yield first
        if first.startswith(b'"') and first.count(b'"') == 1:
            yield first[1:]


ALL_RULES = frozenset(name for name, _ in _ADDRESS_RULES + _ARGUMENT_RULES)


def every_reading(argument: bytes, rules: frozenset[str]) -> dict[bytes, tuple[str, ...]]:
    """All addresses that servers with these habits may deliver to.

    Args:
        argument: what stood behind "RCPT TO:", hostile.
        rules: names out of ALL_RULES; with none there is one reading, the plain one.

    Returns:
        address -> the chain of rules that leads to it, () for the plain reading.
    """
    found: dict[bytes, tuple[str, ...]] = {plain(argument): ()}
    for name, rule in _ARGUMENT_RULES:
        if name in rules:
            for reading in rule(argument):
                found.setdefault(reading, (name,))
    rest = deque(found)
    while rest and len(found) < READINGS_MAX:
        address = rest.popleft()
        chain = found[address]
        if len(chain) >= CHAIN_MAX:
            continue
        for name, rule in _ADDRESS_RULES:
            if name not in rules:
                continue
            for reading in map(bytes.strip, rule(address)):
                if reading and reading not in found:
                    found[reading] = (*chain, name)
                    rest.append(reading)
    return found
