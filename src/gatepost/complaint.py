"""What a complaint carries that can be verified, and what of it is true.

Why: people complain with what they have: a forwarded message, pasted headers whose folding broke, a feedback report,
    the text of a screenshot.  Our trace field is in most of them, damaged in a way of its own.
Trust: hostile twice over: whoever sent the message wrote everything below our trace field, and whoever complains can
    write anything.  Only a token that was sealed by a key of ours is believed, and it says no more than: a message of
    that session passed here.
Promise: pure; never raises on octets; work is linear in them, and what is kept, tried and unpacked is bounded by the
    numbers below.  A token is repaired only to one that verifies, in a fixed order of trials.
Sources: RFC 5322 §2.2.3 (folding), §3.6 (fields), RFC 5321 §4.4 (trace fields stand above those that were there), RFC
    5965 (feedback reports), RFC 2045 §6.7 (quoted-printable), §6.8 (base64), RFC 3676 §4.5 (quote marks).
"""

from __future__ import annotations

import binascii
import html
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum, unique
from itertools import chain, combinations, islice
from typing import Final, NamedTuple, Protocol

from gatepost.facts import IPAddress, client_address

COMPLAINT_OCTETS_MAX: Final = 50 << 20
DOCUMENTS_MAX: Final = 200  # texts unpacked from base64
DEPTH_MAX: Final = 8  # and from base64 within base64
FIELDS_MAX: Final = 2000  # of those that are looked at, in one complaint
CANDIDATES_MAX: Final = 1000  # texts behind the word "token"
BARE_MAX: Final = 2000  # texts that look like a token, without the word
IDS_MAX: Final = 100
RECEIVED_MAX: Final = 4000  # characters of one Received field
RECEIVED_LINES_MAX: Final = 40
VALUE_MAX: Final = 500  # characters of another field

LETTERS_MIN, LETTERS_MAX = 59, 144  # of a token: base64url of 44 to 108 octets, by its account
LETTERS_SEEN_MIN: Final = 4  # fewer behind the word "token" are no part of one
RUN_MAX: Final = 400  # characters behind the word "token" that may be parts of one
BASES_MAX: Final = 4  # readings of where one token ends, in a repair
JOINED_MAX: Final = 8  # so many letters too few or too many may come from joined ones
TRIALS_EACH: Final = 4096  # to repair one token
TRIALS_MAX: Final = 8192  # to repair all of a complaint
DATE_SLACK_S: Final = 120  # a token is up to a minute older than its field


class Sealed(Protocol):
    """What a token says."""

    @property
    def seconds(self) -> int: ...

    @property
    def client(self) -> IPAddress: ...

    @property
    def reference(self) -> str: ...

    @property
    def account(self) -> str: ...

    @property
    def key(self) -> str: ...


Read = Callable[[str], Sealed | None]


class Candidate(NamedTuple):
    """A text that may be a token.

    Attributes:
        letters: without the blanks; what only looks like a letter is the letter.
        variants: the texts that may have been meant, the likeliest first.
        gaps: places in ``letters`` where a blank stood.
        looked_alike: how many characters were none of a token's.
    """

    letters: str
    variants: tuple[str, ...]
    gaps: tuple[int, ...] = ()
    looked_alike: int = 0


class Received(NamedTuple):
    """One Received field, unfolded, as far as it can be read.

    Attributes:
        client: the address in it, None where none can be read.
        by: the host that claims to have received; gatepost: it claims to be a gate.
        id: the message's; seconds: its date since the epoch.
        candidates: for its token.
    """

    text: str
    hello: str
    client: IPAddress | None
    by: str
    gatepost: bool
    id: str
    seconds: int | None
    candidates: tuple[Candidate, ...]


class Section(NamedTuple):
    """Fields that stand together, as in one header section.

    Attributes:
        fields: the first of each name, in lower case.
        received: from the top.
        outermost: it begins the complaint itself.
    """

    fields: Mapping[str, str]
    received: tuple[Received, ...]
    outermost: bool


class Complaint(NamedTuple):
    """What was found in a complaint, in the order in which it stands there.

    Attributes:
        loose: candidates outside of every Received field; bare: texts of a token's length, without the word.
        ids: of messages, as our trace field has them; references: as a refusal of ours has them.
        forwarded: words of a mail program say that a message follows.
        characters: how many were looked at, for whoever bounds the work.
    """

    sections: tuple[Section, ...]
    loose: tuple[Candidate, ...]
    bare: tuple[str, ...]
    ids: tuple[str, ...]
    references: tuple[str, ...]
    forwarded: bool
    characters: int


def read_complaint(octets: bytes) -> Complaint:
    """What stands in a complaint.

    Args:
        octets: any; what lies behind ``COMPLAINT_OCTETS_MAX`` is not looked at.
    """
    sections: list[Section] = []
    loose: list[Candidate] = []
    bare: dict[str, None] = {}
    ids: dict[str, None] = {}
    references: dict[str, None] = {}
    room, characters, forwarded = FIELDS_MAX, 0, False
    for depth, text in _documents(octets[:COMPLAINT_OCTETS_MAX]):
        characters += len(text)
        found = _fields(text, room)
        room -= len(found)
        for section in _sections(text, found, outermost=depth == 0):
            if not any(section.received and section.received == known.received for known in sections):
                sections.append(section)
        spans = [(one.start, one.end) for one in found if one.name == "received"]
        loose += islice(_loose(text, spans), CANDIDATES_MAX - len(loose))
        bare.update(dict.fromkeys(islice((one[0] for one in _BARE.finditer(text)), BARE_MAX - len(bare))))
        ids.update(dict.fromkeys(islice((one[0] for one in _ID.finditer(text)), IDS_MAX - len(ids))))
        references.update(
            dict.fromkeys(islice((one[1] for one in _REFERENCE.finditer(text)), IDS_MAX - len(references)))
        )
        forwarded = forwarded or _FORWARDED.search(text) is not None
    return Complaint(tuple(sections), tuple(loose), tuple(bare), tuple(ids), tuple(references), forwarded, characters)


# --- Octets to texts --------------------------------------------------------------------------------------------------

_INVISIBLE: Final = dict.fromkeys(
    [0xAD, 0x034F, 0x061C, 0x180E, 0xFEFF, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070)]
)
_BLANKS: Final = dict.fromkeys([0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " ")
_LINE_ENDS: Final = dict.fromkeys([0x85, 0x2028, 0x2029], "\n")
_TRANSLATED: Final = {**_INVISIBLE, **_BLANKS, **_LINE_ENDS}

# Lines that are nothing but base64; the last may be short.
_BASE64: Final = re.compile(
    r"(?m)^(?=[A-Za-z0-9+/]{30})(?:[A-Za-z0-9+/]{30,}+[ \t]*+\n)*+(?:[A-Za-z0-9+/]++={0,2}+[ \t]*+$)?"
)
_WORTH_UNPACKING: Final = re.compile(rb"(?i)received|token|gatepost|message-id|content-t")

_QP_EVIDENCE: Final = re.compile(r"=\n|=3D|=20\n")
_QP_SOFT: Final = re.compile(r"=[ \t]*+\n")
_QP_OCTETS: Final = re.compile(r"(?:=[0-9A-F]{2})++")

_HTML_EVIDENCE: Final = re.compile(
    r"(?i)<(?:html|body|div|p|br|span|pre|blockquote|table|font|tt|code)[\s/>]|&(?:lt|gt|amp|nbsp|quot|shy|#[0-9x]++);"
)
_TAG: Final = re.compile(r"<(?:![^<>]{0,2000}+|/?([A-Za-z][A-Za-z0-9:]{0,20}+)(?:\s[^<>]{0,2000}+)?/?)>")
_LINE_TAGS: Final = frozenset(
    ("br", "p", "div", "tr", "li", "ul", "table", "blockquote", "pre", "hr", "h1", "h2", "h3", "body", "html", "head")
)

_MANY_LINE_ENDS: Final = re.compile(r"\n{3,}+")
_QUOTED: Final = re.compile(r"(?m)^[ \t]{0,8}+(?:[>|] ?)++")


def _documents(octets: bytes) -> Iterator[tuple[int, str]]:
    """The complaint's text, and the texts packed into it, each behind what it was packed in; with their depths."""
    waiting = [(0, octets)]
    for _ in range(DOCUMENTS_MAX):
        if not waiting:
            return
        depth, packed = waiting.pop()
        text = _text(packed)
        inner = list(islice(_unpacked(_QUOTED.sub("", text)), DOCUMENTS_MAX)) if depth < DEPTH_MAX else []
        waiting += [(depth + 1, one) for one in reversed(inner)]
        yield depth, _shown(text)


def _text(octets: bytes) -> str:
    """As characters, with LF as line end; whatever the octets are."""
    if octets[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = octets.decode("utf-16", "replace")
    else:
        try:
            text = octets.decode("utf-8")
        except ValueError:
            text = octets.decode("latin-1")
    # Without its NULs UTF-16 that does not say so can be read, as in the file of an Outlook message.
    for written, meant in (("\0", ""), ("\r\n", "\n"), ("\r", "\n"), ("\v", "\n"), ("\f", "\n")):
        text = text.replace(written, meant)
    text = _MANY_LINE_ENDS.sub("\n\n", text)
    return text if text.isascii() else text.translate(_TRANSLATED)


def _unpacked(text: str) -> Iterator[bytes]:
    """What stands in base64 and may be worth a look."""
    for run in _BASE64.finditer(text):
        letters = "".join(run[0].split()).partition("=")[0]
        # A word in the line behind may have come along; a message that was cut short is still worth reading.
        octets = binascii.a2b_base64(letters[: len(letters) - (len(letters) % 4 == 1)] + "==")
        if _WORTH_UNPACKING.search(octets.replace(b"\0", b"")):
            yield octets


def _shown(text: str) -> str:
    """As a mail program shows it: without encodings, markup and quote marks."""
    if _QP_EVIDENCE.search(text):
        text = _QP_OCTETS.sub(_from_quoted_printable, _QP_SOFT.sub("", text))
    if _HTML_EVIDENCE.search(text):
        text = html.unescape(_TAG.sub(_without_tag, text))
    if not text.isascii():
        text = text.translate(_TRANSLATED)
    return _QUOTED.sub("", text)


def _from_quoted_printable(found: re.Match[str]) -> str:
    octets = bytes.fromhex(found[0].replace("=", ""))
    try:
        return octets.decode("utf-8")
    except ValueError:
        return octets.decode("latin-1")


def _without_tag(tag: re.Match[str]) -> str:
    name = (tag[1] or "").lower()
    return "\n" if name in _LINE_TAGS else " " if name == "td" else ""


# --- Fields -----------------------------------------------------------------------------------------------------------

_ANCHOR: Final = re.compile(
    r"(?im)(?<![\w-])(?P<received>Rece[i1l!|]ved)[ \t]*+[:;]|^[ \t]*+(?P<name>From|Reply-To|To|Date|Sent|Subject|"
    r"Message-ID|Feedback-Type|Original-Mail-From|Original-Rcpt-To|Source-IP|Arrival-Date|Received-Date)[ \t]*+:"
)
_LINE: Final = re.compile(r"[^\n]*+\n?")
_EMPTY_LINE: Final = re.compile(r"\n[ \t]*+\n")
_NEXT_FIELD: Final = re.compile(
    r"[ \t]*+(?!(?:token|id|by|with|for|via)\b)[A-Za-z][A-Za-z0-9-]{1,60}+[ \t]?:(?:[ \t\n]|$)"
)
_BEGINNING: Final = re.compile(r"From |[A-Za-z][A-Za-z0-9-]{1,60}+[ \t]?:")  # the first is that of an mbox
_RECEIVED: Final = re.compile(r"(?i)(?<![\w-])Rece[i1l!|]ved[ \t]*+[:;]")
_GOES_ON: Final = re.compile(
    r"(?i)[ \t]*+(?:(?:from|by|with|id|for|via|token)\b|[(\[;]|(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun),?[ \t])"
)
_DATED: Final = re.compile(r"\b\d{1,2}\s{1,3}[A-Za-z]{3,9}\s{1,3}\d{4}\s{1,3}\d{1,2}:\d{2}")
_FORWARDED: Final = re.compile(
    r"(?im)^[ \t]*+(?:-{2,}[ \t]*+(?:forwarded|original|weitergeleitete|ursprüngliche|urspr\S{1,3}ngliche)\b"
    r"|begin forwarded message|anfang der weitergeleiteten)"
)


class _Found(NamedTuple):
    """A field in a text, with where it begins and ends."""

    name: str
    value: str
    start: int
    end: int


def _fields(text: str, room: int) -> list[_Found]:
    """The fields that are looked at, at most ``room``."""
    found: list[_Found] = []
    at = 0
    while len(found) < room:
        anchor = _ANCHOR.search(text, at)
        if anchor is None:
            return found
        if anchor["received"]:
            value, at = _received_extent(text, anchor.end())
            found.append(_Found("received", value, anchor.start(), at))
        else:
            value, at = _value(text, anchor.end())
            found.append(_Found(anchor["name"].lower(), value, anchor.start(), at))
    return found


def _value(text: str, at: int) -> tuple[str, int]:
    """A plain field's value and its end, unfolded."""
    limit, parts = at + VALUE_MAX, []
    while at < limit:
        line = _LINE.match(text, at, limit)
        assert line is not None, "it matches nothing as well"
        parts.append(line[0])
        at = line.end()
        if not line[0].endswith("\n") or text[at : at + 1] not in (" ", "\t") or not text[at : at + 80].strip():
            break
    return " ".join("".join(parts).split()), at - (1 if parts and parts[-1].endswith("\n") else 0)


def _received_extent(text: str, at: int) -> tuple[str, int]:
    """A Received field's value and its end, also where its lines lost their indentation or have empty ones between."""
    limit, parts, complete, empty = at + RECEIVED_MAX, [""], False, False
    for _ in range(RECEIVED_LINES_MAX):
        line = _LINE.match(text, at, limit)
        assert line is not None, "it matches nothing as well"
        words = line[0].strip()
        if len(parts) > 1 and words:
            if complete and line[0][0] not in " \t":
                break
            if _NEXT_FIELD.match(text, at, min(limit, at + 80)) or (empty and not _GOES_ON.match(text, at, limit)):
                break
        another = _RECEIVED.search(text, at, line.end())
        if another is not None:
            parts.append(text[at : another.start()])
            at = another.start()
            break
        if not words and (complete or not line[0]):
            break
        at, empty = line.end(), not words
        if words:
            parts.append(line[0])
            complete = complete or _DATED.search(parts[-2][-40:] + line[0]) is not None
    value = "".join(parts)
    return " ".join(value.split()), at - 1 if text[at - 1] == "\n" else at


def _sections(text: str, found: list[_Found], *, outermost: bool) -> Iterator[Section]:
    """The fields, by what stands together."""
    groups: list[list[_Found]] = []
    spaced = False  # each field of the last group has an empty line before it
    for number, one in enumerate(found):
        before = found[number - 1].end if number else 0
        if number and _EMPTY_LINE.search(text, before, one.start + 1) is None:
            if spaced and len(groups[-1]) > 1:  # the last of what seemed to be spaced out begins a group of its own
                groups.append([groups[-1].pop()])
            groups[-1].append(one)
            spaced = False
        elif number and spaced and one.start - before < RECEIVED_MAX and not _FORWARDED.search(text, before, one.start):
            groups[-1].append(one)
        else:
            groups.append([one])
            spaced = True
    for number, group in enumerate(groups):
        fields: dict[str, str] = {}
        for one in group:
            if one.name != "received":
                fields.setdefault(one.name, one.value)
        received = tuple(_received(one.value) for one in group if one.name == "received")
        yield Section(fields, received, outermost and number == 0 and _begins(text[: group[0].start]))


def _begins(before: str) -> bool:
    """Whether a header section may have begun before this place in the complaint, with nothing else before it."""
    before = before.strip()
    return not before or (_BEGINNING.match(before) is not None and _EMPTY_LINE.search(before) is None)


# --- One Received field -----------------------------------------------------------------------------------------------

_FROM: Final = re.compile(r"(?i)\s*+from\s++(\S{1,300})")
_BY: Final = re.compile(r"(?i)(?<![^\s)])by\s++(\S{1,300})(\s++\(\s*+gatep[o0]st\s*+\))?")
_ADDRESS: Final = re.compile(r"\[\s*+(?:IPv6:)?([0-9A-Fa-f:.]{2,45})\s*+\]")
_WITH_ID: Final = re.compile(r"(?i)\bid\s++<?([^\s;<>()]{1,100})")
_DATE: Final = re.compile(
    r"\b(\d{1,2}) {1,3}([A-Za-z]{3})[a-z]{0,6} {1,3}(\d{4}) {1,3}(\d{1,2}):(\d{2})(?::(\d{2}))?"
    r"(?: ?([+-])(\d{2})(\d{2}))?"
)
_MONTHS: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


def _received(text: str) -> Received:
    hello = _FROM.match(text)
    # The client chose its name: what comes behind it is what the field says.
    by = _BY.search(text, hello.end() if hello is not None else 0)
    before, behind = (text, text) if by is None else (text[: by.start()], text[by.end() :])
    address, with_id, dated = _ADDRESS.search(before), _WITH_ID.search(behind), _DATED.search(behind)
    return Received(
        text,
        hello[1] if hello is not None else "",
        _address(address[1]) if address is not None else None,
        by[1].rstrip(".;").lower() if by is not None else "",
        by is not None and by[2] is not None,
        with_id[1] if with_id is not None else "",
        date_seconds(behind[dated.start() :]) if dated is not None else None,
        tuple(_loose(behind, [])),
    )


def _address(written: str) -> IPAddress | None:
    try:
        return client_address(written)
    except ValueError:
        return None


def date_seconds(text: str) -> int | None:
    """The first date-time in a text, in seconds since the epoch; None where there is none.  RFC 5322 §3.3.

    One that names no zone is taken for UTC.
    """
    found = _DATE.search(text)
    if found is None or found[2].lower() not in _MONTHS:
        return None
    day, _, year, hour, minute, second, sign, zone_hours, zone_minutes = found.groups()
    try:
        local = datetime(
            int(year), _MONTHS.index(found[2].lower()) + 1, int(day), int(hour), int(minute), int(second or 0), 0, UTC
        )
        ahead = timedelta(hours=int(zone_hours or 0), minutes=int(zone_minutes or 0))
        return int((local + ahead if sign == "-" else local - ahead).timestamp())
    except (ValueError, OverflowError):
        return None


# --- Candidates for a token -------------------------------------------------------------------------------------------

_ID: Final = re.compile(r"(?<![0-9A-Za-z.])[0-9A-HJKMNP-TV-Z]{8}\.[1-9][0-9]{0,8}+(?![0-9A-Za-z.])")
_REFERENCE: Final = re.compile(r"\[([0-9A-HJKMNP-TV-Z]{8}-[1-9][0-9]{0,8}+)\]")
_WORD: Final = re.compile(r"(?i)(?<![A-Za-z0-9_-])[tl][o0]ken\b[\s:=(]{0,20}+")
_BARE: Final = re.compile(rf"(?<![A-Za-z0-9_-])[A-Za-z0-9_-]{{{LETTERS_MIN},{LETTERS_MAX}}}+(?![A-Za-z0-9_-])")
_ALPHABET: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
_LOOKS_LIKE: Final = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\u00ac", "-"), "\u2014": "--", "\u2015": "--",
    "|": "l", "!": "l", "\u00a6": "l", "$": "S", "\u00a7": "S", "\u20ac": "C", "\u00a9": "C", "\u00a5": "Y",
    "\u00b0": "o", "\u00a3": "E", "@": "a", "\u00df": "B",
    # Greek and Cyrillic letters, where a reader of images took the wrong alphabet.
    **dict(zip("АВСЕНІЈКМОРЅТХУасеіјорѕухΑΒΕΖΗΙΚΜΝΟΡΤΥΧο", "ABCEHIJKMOPSTXYaceijopsyxABEZHIKMNOPTYXo", strict=True)),
}  # fmt: skip


def _loose(text: str, spans: list[tuple[int, int]]) -> Iterator[Candidate]:
    """The texts behind the word "token", outside of these spans."""
    number = tried = 0
    for word in _WORD.finditer(text):
        while number < len(spans) and spans[number][1] <= word.start():
            number += 1
        if number < len(spans) and spans[number][0] <= word.start():
            continue
        tried += 1
        if tried > CANDIDATES_MAX:
            return
        candidate = _candidate(text, word.end())
        if candidate is not None:
            yield candidate


def _candidate(text: str, at: int) -> Candidate | None:
    """The text that begins here, down to what ends a token; None where it is too short to have been one."""
    letters, likened, end = "", 0, ""
    gaps: list[int] = []
    for character in text[at : at + RUN_MAX]:
        if character in _ALPHABET:
            letters += character
        elif character.isspace():
            if letters and (not gaps or gaps[-1] != len(letters)):
                gaps.append(len(letters))
        else:
            meant = _LOOKS_LIKE.get(character) or unicodedata.normalize("NFKC", character)
            if not meant or not _ALPHABET.issuperset(meant):
                end = character
                break
            letters, likened = letters + meant, likened + 1
    if len(letters) < LETTERS_SEEN_MIN:
        return None
    variants = {letters: None}
    if end != ")":  # it may have been misread, and what follows taken for a part of the token
        variants.update({letters[:-1]: None, **{letters[:gap]: None for gap in reversed(gaps)}})
        variants.update({letters[: gap - 1]: None for gap in reversed(gaps)})
    possible = tuple(filter(_may_be_token, variants))
    if len(letters) > LETTERS_MAX and possible:
        letters = possible[0]
    return Candidate(letters, possible, tuple(gap for gap in gaps if gap < len(letters)), likened)


# --- Repair -----------------------------------------------------------------------------------------------------------

# What readers of images take for each other: first what they often do, then the rest.
_OFTEN: Final = ("0Oo", "1lI", "5Ss", "8B", "2Zz", "6Gb", "9gq")
_SELDOM: Final = (
    "cC", "kK", "pP", "uU", "vV", "wW", "xX", "yY", "jJ", "il1", "QO", "D0", "hb", "ec", "nu", "tf", "4A", "7T", "-_",
)  # fmt: skip
_JOINED: Final = (
    ("m", "rn"), ("rn", "m"), ("w", "vv"), ("vv", "w"), ("d", "cl"), ("cl", "d"), ("--", "-"), ("-", "--"),
)  # fmt: skip


def _alternatives(groups: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for group in groups:
        for letter in group:
            found[letter] = "".join(dict.fromkeys(found.get(letter, "") + group.replace(letter, "")))
    return found


_OFTEN_FOR: Final = _alternatives(_OFTEN)
_SELDOM_FOR: Final = {
    letter: others.translate({ord(known): None for known in _OFTEN_FOR.get(letter, "")})
    for letter, others in _alternatives(_SELDOM).items()
}


class _Edit(NamedTuple):
    """Other letters for those from ``start`` to ``end``."""

    start: int
    end: int
    letters: str


class Seal(NamedTuple):
    """A token of ours.

    Attributes:
        repaired: how many places were read otherwise than they stand in the complaint; 0 for none.
    """

    record: Sealed
    token: str
    repaired: int = 0


class Trials:
    """Repairs tokens that do not verify, as long as there are trials left; ``used`` counts them."""

    __slots__ = ("_read", "used")

    def __init__(self, read: Read) -> None:
        self._read = read
        self.used = 0

    def repair(self, candidate: Candidate) -> Seal | None:
        """What the candidate says once it is read as it may have been meant; None where that does not help."""
        bases = candidate.variants[:BASES_MAX]
        if not bases and LETTERS_MIN - JOINED_MAX <= len(candidate.letters) <= LETTERS_MAX + JOINED_MAX:
            bases = (candidate.letters,)
        for base in bases:
            room = min(TRIALS_EACH // len(bases), TRIALS_MAX - self.used)
            for edits in islice(_readings(base, candidate.gaps), room):
                self.used += 1
                letters = _edited(base, edits)
                record = self._read(letters) if _may_be_token(letters) else None
                if record is not None:
                    return Seal(record, letters, len(edits) + candidate.looked_alike)
        return None


def _may_be_token(letters: str) -> bool:
    """By its length; base64 has no text of one letter more than a multiple of four.  RFC 4648 §4."""
    return LETTERS_MIN <= len(letters) <= LETTERS_MAX and len(letters) % 4 != 1


def _readings(letters: str, gaps: tuple[int, ...]) -> Iterator[tuple[_Edit, ...]]:
    """How else the letters may be read, the likeliest first."""
    often = [_Edit(at, at + 1, other) for at, letter in enumerate(letters) for other in _OFTEN_FOR.get(letter, "")]
    seldom = [_Edit(at, at + len(shown), meant) for shown, meant in _JOINED for at in _places(letters, shown)]
    seldom += [_Edit(gap, gap, lost) for gap in gaps if gap < len(letters) for lost in "_-"]
    seldom += [_Edit(at, at + 1, other) for at, letter in enumerate(letters) for other in _SELDOM_FOR.get(letter, "")]
    everything = [*often, *seldom]
    yield from ((one,) for one in everything)
    pairs_and_more = chain(
        combinations(often, 2),
        ((one, other) for number, one in enumerate(everything) for other in everything[max(number + 1, len(often)) :]),
        combinations(often, 3),
        combinations(often, 4),
    )
    for edits in pairs_and_more:
        if all(one.end <= other.start or other.end <= one.start for one, other in combinations(edits, 2)):
            yield edits


def _places(letters: str, shown: str) -> Iterator[int]:
    at = letters.find(shown)
    while at >= 0:
        yield at
        at = letters.find(shown, at + 1)


def _edited(letters: str, edits: tuple[_Edit, ...]) -> str:
    for edit in sorted(edits, reverse=True):
        letters = letters[: edit.start] + edit.letters + letters[edit.end :]
    return letters


# --- What is true -----------------------------------------------------------------------------------------------------


@unique
class Mark(Enum):
    """What is known of one Received field; the value is the word for it."""

    OURS = "ours"
    AFTER = "after us"  # added by whoever had the message after this gate
    BEFORE = "not ours"  # was there when a client handed the message over, and may be forged
    FORGED = "forged"  # claims to be ours, and is not
    DAMAGED = "damaged"  # claims to be ours, and what would prove it is not all there
    OTHER_GATE = "another gate's"
    UNKNOWN = "unknown"  # nothing of ours stands beside it


class Line(NamedTuple):
    """One Received field, judged.

    Attributes:
        why: what does not agree, or else deserves a word.
        seal: the token of ours in it, None where there is none.
    """

    received: Received
    mark: Mark
    why: tuple[str, ...]
    seal: Seal | None


class Judged(NamedTuple):
    """What of a complaint is true.

    Attributes:
        section: what is taken for the header section of the message complained of; its fields are not verified.
        lines: its Received fields.
        seals: tokens of that message, the last pass through this gate first.
        loose: they stand in no Received field, so that nothing around them can be compared.
        overshadowed: a line that claims to be ours, and is not verified, stands above the first that is.
        nested: it stands in another message, which did not pass here.
        enclosing: the header section of the complaint itself, where it holds another message; around: its Received
            fields.
        trials: how many were made to repair tokens.
    """

    section: Section
    lines: tuple[Line, ...]
    seals: tuple[Seal, ...]
    loose: bool
    overshadowed: bool
    nested: bool
    enclosing: Section | None
    around: tuple[Line, ...]
    trials: int


_NOTHING: Final = Section({}, (), outermost=False)
_MESSAGE_FIELDS: Final = frozenset(("from", "to", "date", "sent", "subject", "message-id"))


def judge(complaint: Complaint, read: Read, name: str, kind: str = "") -> Judged:
    """Which of the tokens are ours, and what that says of the fields around them.

    Args:
        read: what a token says, None for one that is not ours.
        name: of this gate, as it stands in its trace fields.
        kind: "complaint": its first header section is that of a complaint; "message": that of the message itself, and
            others in it are its content; "": that is to be guessed.
    """
    enclosing, sections = None, complaint.sections
    if kind == "message":
        sections = sections[:1]
    elif kind == "complaint" or _encloses(complaint):
        first = sections[:1]
        enclosing, sections = (first[0], sections[1:]) if first and first[0].outermost else (None, sections)
    trials = Trials(read)
    lines = [_lines(section, read, name) for section in sections]
    verified = next((number for number, some in enumerate(lines) if _ours(some)), len(sections))
    # What stands above the first that verifies may be ours and misread, and what verifies a copy below it.
    for number, section in enumerate(sections[: verified + 1]):
        lines[number] = _lines(section, read, name, trials)
    around = () if enclosing is None else _lines(enclosing, read, name)
    known = {line.seal.token for some in (*lines, around) for line in some if line.seal is not None}
    loose = [seal for seal in _loose_seals(complaint, read) if seal.token not in known]
    if not loose and not any(line.seal is not None for some in lines for line in some):
        loose = [seal for seal in map(trials.repair, complaint.loose) if seal is not None]
    number = _complained_of(sections, lines)
    chosen = lines[number] if sections else ()
    seals = tuple(line.seal for line in chosen if line.mark is Mark.OURS and line.seal is not None)
    above = [*chain.from_iterable(lines[:number]), *islice(chosen, _ours(chosen)[0] if seals else None)]
    return Judged(
        sections[number] if sections else _NOTHING,
        chosen,
        seals or tuple(loose),
        not seals and bool(loose),
        any(line.mark in (Mark.FORGED, Mark.DAMAGED) for line in above),
        any(one.received and _MESSAGE_FIELDS & one.fields.keys() for one in sections[:number]),
        enclosing,
        around,
        trials.used,
    )


def _encloses(complaint: Complaint) -> bool:
    """Whether the complaint is a message that holds the one complained of, or words about it."""
    first, rest = complaint.sections[:1], complaint.sections[1:]
    if not first or not first[0].outermost or "from" not in first[0].fields:
        return False
    return complaint.forwarded or any(
        section.received or "feedback-type" in section.fields or len(_MESSAGE_FIELDS & section.fields.keys()) > 1
        for section in rest
    )


def _loose_seals(complaint: Complaint, read: Read) -> Iterator[Seal]:
    """Each token of ours that stands in no Received field, once."""
    seen: set[str] = set()
    for candidate in (*complaint.loose, *(Candidate(bare, (bare,)) for bare in complaint.bare)):
        seal = _exact(candidate, read)
        if seal is not None and seal.token not in seen:
            seen.add(seal.token)
            yield seal


def _exact(candidate: Candidate, read: Read) -> Seal | None:
    for letters in candidate.variants:
        record = read(letters)
        if record is not None:
            return Seal(record, letters, candidate.looked_alike)
    return None


def _complained_of(sections: tuple[Section, ...], lines: list[tuple[Line, ...]]) -> int:
    """Which section is the message's: the first with a field of ours, or with what comes next to that."""

    def rank(number: int) -> int:
        marks = {line.mark for line in lines[number]}
        if Mark.OURS in marks:
            return 0
        if marks & {Mark.FORGED, Mark.DAMAGED, Mark.OTHER_GATE}:
            return 1
        if marks:
            return 2
        return 3 if len(_MESSAGE_FIELDS & sections[number].fields.keys()) > 1 else 4

    return min(range(len(sections)), key=rank, default=0)


def _lines(section: Section, read: Read, name: str, trials: Trials | None = None) -> tuple[Line, ...]:
    """The Received fields of one section, judged.  A trace field goes to the top: RFC 5321 §4.4.

    Args:
        trials: to repair tokens with, above the first that verifies.
    """
    judged = [_judged(one, read, name) for one in section.received]
    if trials is not None:
        for number, one in enumerate(section.received[: next(iter(_ours(judged)), None)]):
            if judged[number].seal is None:
                judged[number] = _judged(one, read, name, trials)
    ours = _ours(judged)
    if not ours:
        return tuple(judged)
    for number, line in enumerate(judged):
        if line.mark is Mark.UNKNOWN:
            judged[number] = line._replace(mark=Mark.AFTER if number < ours[0] else Mark.BEFORE)
        elif line.mark is Mark.OTHER_GATE and number > ours[0]:
            judged[number] = line._replace(mark=Mark.BEFORE)
        elif line.mark is Mark.OURS and number > ours[0]:
            earlier = "an earlier pass, as the client of the later one says: the token is true, but may be copied"
            judged[number] = line._replace(why=(*line.why, earlier))
    return tuple(judged)


def _ours(lines: Sequence[Line]) -> list[int]:
    return [number for number, line in enumerate(lines) if line.mark is Mark.OURS]


def _judged(received: Received, read: Read, name: str, trials: Trials | None = None) -> Line:
    """One Received field by itself."""
    seals = [seal for seal in (_exact(candidate, read) for candidate in received.candidates) if seal is not None]
    if not seals and trials is not None:
        seals = [seal for seal in map(trials.repair, received.candidates) if seal is not None]
    judged = [(_disagreements(received, seal.record), seal) for seal in seals]
    if judged:
        differs, seal = min(judged, key=lambda one: len(one[0]))
        if differs and not seal.repaired:
            return Line(received, Mark.FORGED, differs, seal)
        if seal.repaired:
            differs = tuple(f"{one}: misread, or forged" for one in differs)
        other = received.by not in ("", name.lower())
        renamed = (f"it names {received.by}, and this gate is {name}",) if other else ()
        return Line(received, Mark.OURS, (*differs, *renamed), seal)
    if not received.gatepost:
        return Line(received, Mark.UNKNOWN, (), None)
    if received.by != name.lower():
        return Line(received, Mark.OTHER_GATE, (f"the gate {received.by} may know it",), None)
    if not received.candidates:
        return Line(received, Mark.FORGED, ("it claims to be ours, and has no token",), None)
    letters = max(len(candidate.letters) for candidate in received.candidates)
    if letters < LETTERS_MIN:
        short = f"its token has {letters} letters, and ours have {LETTERS_MIN} to {LETTERS_MAX}: it was cut short"
        return Line(received, Mark.DAMAGED, (short,), None)
    return Line(
        received,
        Mark.FORGED,
        ("it claims to be ours, and no key of ours sealed its token: made up, or damaged beyond repair",),
        None,
    )


def _disagreements(received: Received, record: Sealed) -> tuple[str, ...]:
    """Where what can be seen is not what the token says."""
    found = []
    if received.client is not None and received.client != record.client:
        found.append(f"it shows the client {received.client}, and its token says {record.client}")
    shown = received.id.partition(".")[0].upper().translate(_MISREAD)
    if len(shown) == len(record.reference) and shown != record.reference:
        found.append(f"it shows the session {shown}, and its token says {record.reference}")
    elif received.id and len(shown) != len(record.reference):
        found.append(f"its id {received.id[:40]} is none of ours, and its token says {record.reference}")
    if received.seconds is not None and not -5 <= received.seconds - record.seconds <= DATE_SLACK_S:
        when = datetime.fromtimestamp(record.seconds, UTC)
        found.append(f"its date is not that of its token, which was sealed at {when:%Y-%m-%d %H:%M:%S} UTC")
    return tuple(found)


_MISREAD: Final = str.maketrans("OIL", "011")  # references have none of these
