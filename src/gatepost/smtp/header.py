"""The authors that a message's header section names: every address that a reader may be shown as whom it is from.

Why: an account may write as itself and as nobody else, and what people believe is the From field.
Trust: the header section is the client's, and made to be read in two ways: one by the gate, another by a mail reader.
Promise: no address is missed that some reader could show or use as the author: what is read in more than one way is a
    defect, never a guess.  An address counts wherever it stands in the field: in a name, a comment, a quoted string or
    an encoded word as well.  Never raises on what a peer sent; time is linear in the octets.
Sources: RFC 5322 §2.2 (fields, folding), §3.4 (addresses), §3.6.2 (From), RFC 6532 (UTF-8), RFC 6854 (groups in From),
    RFC 2047 (encoded words).
    Sender and Resent fields are not looked at: they name who sent or passed on a message, which readers show beside the
    author and never in its place (RFC 5322 §3.6.2, §3.6.6), and programs that act for somebody fill them rightly.
    Stricter: nothing obsolete (space before the colon, routes, empty members, white space inside an address), no
    address without a domain or in a shape that some server reads as another one (``path.Shape``), no encoded word whose
    charset is not known.
"""

from __future__ import annotations

import binascii
import re
import unicodedata
from collections.abc import Iterator
from enum import Enum, unique
from itertools import pairwise
from typing import Final

from gatepost.smtp.path import ForwardPath, Mailbox, parse_forward_path

AUTHORS_MAX = 100
MESSAGE_ID_MAX = 250  # as it is kept; RFC 5322 §2.1.1 allows a line of 998 octets
_MESSAGE_ID_WITHIN = 64 << 10
_MESSAGE_ID = re.compile(rb"(?:[ \t]|\r\n(?=[ \t]))*([^\s]+)")

_BARE = re.compile(rb"\0|\r(?!\n)|(?<!\r)\n")
_FIELD = re.compile(rb"([!-9;-~]+)([ \t]*):")  # RFC 5322 §2.2; white space before the colon: §4.5
_NOT_LETTER = re.compile(rb"[^A-Za-z]+")

# Controls, line separators, and the characters that change the order in which text is shown.
_NEVER = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufff9-\ufffb\ufffe\uffff]")
_ATOM = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~.\-\xa0-\U0010ffff"  # RFC 5322 §3.2.3, with the dots of dot-atom and obs-phrase
_TOKEN = re.compile(
    rf'(?P<s>[ \t]+)|(?P<a>[{_ATOM}]+)|(?P<q>"(?:[^"\\]|\\.)*+")|(?P<d>\[[^\[\]\\]*+\])|(?P<special>[<>@,:;])'
)
_COMMENT = re.compile(r"[^()\\]+|\\.|[()]")  # RFC 5322 §3.2.2: comments nest

# The grammar over kinds of tokens, one letter each: s white space or comments, a atom, q quoted string, d literal.
_MAILBOX = re.compile(r"s?(?:(?:[aq]s?)*+<([aq]@[ad])>|([aq]@[ad]))s?")
_GROUP = re.compile(r"s?(?:[aq]s?)++:")
_GROUP_END = re.compile(r"s?;s?")

# Whatever looks like an address to a reader that knows no grammar.
_RUN = re.compile(rf"(?:[{_ATOM}@]|(?<=@)\[[^\]\s]{{0,64}}\])+")
_ENCODED_WORD = re.compile(r"=\?([^?*]{1,40})(?:\*[^?]{0,40})?\?([BbQq])\?([^?]*)\?=")  # RFC 2047 §2, RFC 2231 §5
_BETWEEN_ENCODED_WORDS = re.compile(r"(?<=\?=)[ \t]+(?==\?)")  # RFC 2047 §6.2: not shown
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_BASE64 = re.compile(rb"[A-Za-z0-9+/]*")
_Q_PAIR = re.compile(rb"=([0-9A-Fa-f]{2})")
_CHARSETS: Final = {
    **{f"iso-8859-{part}": f"iso8859-{part}" for part in (*range(1, 12), *range(13, 17))},
    **{f"windows-{page}": f"cp{page}" for page in range(1250, 1259)},
    **{name: name for name in ("utf-8", "koi8-r", "koi8-u", "gbk", "gb18030", "big5", "euc-jp", "iso-2022-jp")},
    "us-ascii": "ascii", "ascii": "ascii", "utf8": "utf-8", "tis-620": "tis-620",
    # Names under which more than they stand for is sent.
    "gb2312": "gb18030", "shift_jis": "cp932", "euc-kr": "cp949", "ks_c_5601-1987": "cp949",
}  # fmt: skip


@unique
class HeaderDefect(Enum):
    """Why nobody can say who the author is; the value is a sentence for the client."""

    BARE = "The header section holds a NUL, a bare CR or a bare LF"
    HIDDEN = "The header section holds a line that may or may not be read as a From field"
    TWICE = "There is more than one From field"
    MALFORMED = "The From field is malformed"
    DOUBTFUL = "The From field holds an address that may be read in more than one way"
    TOO_MANY = f"The From field holds more than {AUTHORS_MAX} addresses"


class _Wrong(ValueError):
    """The section has a defect."""

    def __init__(self, defect: HeaderDefect) -> None:
        super().__init__(defect.value)
        self.defect = defect


def message_id(section: bytes) -> str:
    """What the message calls itself, for whoever looks for it later; "" where it does not say.

    Args:
        section: the header section; of several fields the first counts, as it does for most readers.

    Returns:
        As it stands there, at most ``MESSAGE_ID_MAX`` characters; nothing is judged by it.

    Source: RFC 5322 §3.6.4.
    """
    lower = section[:_MESSAGE_ID_WITHIN].lower()
    start = 0 if lower.startswith(b"message-id:") else lower.find(b"\nmessage-id:") + 1
    if start == 0 and not lower.startswith(b"message-id:"):
        return ""
    value = _MESSAGE_ID.match(section, start + 11)
    return value[1][:MESSAGE_ID_MAX].decode("utf-8", "replace") if value is not None else ""


def author_addresses(section: bytes) -> tuple[Mailbox, ...] | HeaderDefect:
    """Every address in the From field, the authors first; () where there is no From field.

    Args:
        section: hostile; whole lines with CRLF from the beginning of content, the header section complete.  What comes
            behind the first empty line is not looked at.
    """
    if section.startswith(b"\r\n"):
        return ()
    end = section.find(b"\r\n\r\n")
    section = section.removesuffix(b"\r\n") if end < 0 else section[:end]
    if _BARE.search(section):
        return HeaderDefect.BARE
    try:
        value = _from_field(section.split(b"\r\n"))
        return () if value is None else _addresses(value)
    except _Wrong as wrong:
        return wrong.defect


# --- The field --------------------------------------------------------------------------------------------------------


def _from_field(lines: list[bytes]) -> str | None:
    """The unfolded body of the one From field.

    A line that is no field ends the header section for some readers, is passed over by others, and joined to the line
    before by a few.  So no From field may stand behind one or directly before it.
    """
    found: list[bytes] | None = None
    field: list[bytes] | None = None  # the one that a continuation belongs to
    broken = False
    for line in lines:
        if field is not None and line[:1] in (b" ", b"\t") and not line.isspace():
            field.append(line)
            continue
        match = _FIELD.match(line)
        if match is None:
            letters = _NOT_LETTER.sub(b"", line.partition(b":")[0]).lower()
            if letters.startswith(b"from") or (field is not None and field is found):
                raise _Wrong(HeaderDefect.HIDDEN)
            broken, field = True, None
            continue
        field = [line[match.end() :]]
        if match[1].lower() == b"from":
            if broken or match[2]:
                raise _Wrong(HeaderDefect.HIDDEN)
            if found is not None:
                raise _Wrong(HeaderDefect.TWICE)
            found = field
    if found is None:
        return None
    try:
        return b"".join(found).decode("utf-8")  # RFC 5322 §2.2.3: CRLF goes, white space stays; RFC 6532 §3.2
    except UnicodeDecodeError:
        raise _Wrong(HeaderDefect.MALFORMED) from None


# --- The addresses ----------------------------------------------------------------------------------------------------


def _addresses(value: str) -> tuple[Mailbox, ...]:
    if _NEVER.search(value):
        raise _Wrong(HeaderDefect.MALFORMED)
    mailboxes = [_mailbox(address) for address in _members(value)]
    mailboxes += [_mailbox(address) for address in sorted(_shown(value))]
    distinct = tuple(dict.fromkeys(mailboxes))
    if len(distinct) > AUTHORS_MAX:
        raise _Wrong(HeaderDefect.TOO_MANY)
    return distinct


def _mailbox(address: str) -> Mailbox:
    path = parse_forward_path(b"<" + address.encode() + b">", smtputf8=True)
    if not isinstance(path, ForwardPath) or path.shape.routing or not isinstance(path.mailbox, Mailbox):
        raise _Wrong(HeaderDefect.DOUBTFUL)
    return path.mailbox


def _members(value: str) -> list[str]:
    """Each addr-spec, by the grammar of address-list.  RFC 5322 §3.4, RFC 6854 §2.1."""
    kinds, tokens = _tokens(value)
    addresses: list[str] = []
    position, grouped = 0, False
    while True:
        if not grouped and (group := _GROUP.match(kinds, position)):
            position, grouped = group.end(), True
        member = _MAILBOX.match(kinds, position)
        if member is None:
            raise _Wrong(HeaderDefect.MALFORMED)  # a group of nobody among them: readers would show its name
        at = member.start(1 if member[1] else 2)
        addresses.append("".join(tokens[at : at + 3]))
        if len(addresses) > AUTHORS_MAX:
            raise _Wrong(HeaderDefect.TOO_MANY)
        position = member.end()
        if grouped and (end := _GROUP_END.match(kinds, position)):
            position, grouped = end.end(), False
        if position == len(kinds) and not grouped:
            return addresses
        if kinds[position : position + 1] != ",":
            raise _Wrong(HeaderDefect.MALFORMED)
        position += 1


def _tokens(value: str) -> tuple[str, list[str]]:
    """The kind and the text of each token; white space and comments in a row are one."""
    kinds: list[str] = []
    tokens: list[str] = []
    position = 0
    while position < len(value):
        if value[position] == "(":
            kind, end = "s", _comment_end(value, position)
        else:
            match = _TOKEN.match(value, position)
            if match is None:
                raise _Wrong(HeaderDefect.MALFORMED)
            end = match.end()
            kind = match[0] if match.lastgroup == "special" else str(match.lastgroup)
        if kind != "s" or kinds[-1:] != ["s"]:
            kinds.append(kind)
            tokens.append(value[position:end])
        position = end
    return "".join(kinds), tokens


def _comment_end(value: str, position: int) -> int:
    depth = 0
    while match := _COMMENT.match(value, position):
        position = match.end()
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if not depth:
            return position
    raise _Wrong(HeaderDefect.MALFORMED)


# --- What else a reader may show --------------------------------------------------------------------------------------


def _shown(value: str) -> set[str]:
    """Whatever looks like an address, in any of the ways in which readers make the field's text presentable."""
    value = _folded(value)
    texts = {value, value.replace("\\", "").replace('"', "")}
    if "=?" in value:  # each with and without the white space between encoded words, decoded even in quoted strings
        texts |= {_BETWEEN_ENCODED_WORDS.sub("", text) for text in texts}
        texts |= {_ENCODED_WORD.sub(_decoded, text) for text in texts}
    found: set[str] = set()
    for text in texts:
        found.update(_looking_like_addresses(text))
        if len(found) > AUTHORS_MAX:
            raise _Wrong(HeaderDefect.TOO_MANY)
    return found


def _folded(text: str) -> str:
    """Text with each character that looks like an ASCII one as that: a fullwidth "@" is one to the eye.

    One by one, since to put a long row of combining marks into their order takes time beyond measure.
    """
    return _NOT_ASCII.sub(lambda character: unicodedata.normalize("NFKC", character[0]), text)


def _looking_like_addresses(text: str) -> Iterator[str]:
    for run in _RUN.findall(text):
        for left, right in pairwise(run.split("@")):
            local_part, domain = left.lstrip("."), right.rstrip(".")
            if local_part and domain:
                yield f"{local_part}@{domain}"


def _base64(encoded: bytes) -> bytes:
    """Base64 without its padding, which is often missing; ValueError where readers would each make their own of it."""
    if _BASE64.fullmatch(encoded) is None:
        raise ValueError("not base64")
    return binascii.a2b_base64(encoded + b"=" * (-len(encoded) % 4))


def _decoded(match: re.Match[str]) -> str:
    """An encoded word's text.  RFC 2047 §4."""
    charset, encoding, encoded = _CHARSETS.get(match[1].lower()), match[2].upper(), match[3].encode()
    if charset is None:
        raise _Wrong(HeaderDefect.DOUBTFUL)
    try:
        if encoding == "B":
            octets = _base64(encoded.rstrip(b"="))
        else:
            octets = _Q_PAIR.sub(lambda pair: bytes((int(pair[1], 16),)), encoded.replace(b"_", b" "))
        text = octets.decode(charset)
    except ValueError:
        raise _Wrong(HeaderDefect.DOUBTFUL) from None
    if _NEVER.search(text):  # to some the text ends there, and others leave it out
        raise _Wrong(HeaderDefect.DOUBTFUL)
    return _folded(text)
