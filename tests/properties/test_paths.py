"""Whatever the octets, an address has one reading, and what is sent on is read the same way again.

Why: tables hold the tricks that are known; these hold for the ones that are not.
"""

from __future__ import annotations

import re
import unicodedata

from hypothesis import example, given
from hypothesis import strategies as st

from gatepost.smtp.path import (
    LOCAL_PART_OCTETS_MAX,
    NULL_REVERSE_PATH,
    PATH_OCTETS_MAX,
    ForwardPath,
    Mailbox,
    PathDefect,
    Pattern,
    Shape,
    parse_domain,
    parse_forward_path,
    parse_plain_mailbox,
    parse_reverse_path,
    pattern_texts,
    split_path,
)

# Octets that are near to an address, so that a good part of them parses.
PIECES = st.sampled_from(
    [
        b"a", b"bob", b"B", b"0", b"1", b"-", b".", b"..", b"_", b"+", b"@", b"@", b"%", b"!", b'"', b'"', b"\\", b" ",
        b",", b";", b":", b"(", b")", b"<", b">", b"[", b"]", b"/", b"|", b"=?", b"?=", b"=", b"*", b"\x00", b"\r\n",
        b"\n", b"\x7f", b"\x80", b"example.com", b"example", b".com", b"xn--", b"xn--bcher-kva", b"[127.0.0.1]",
        b"[IPv6:", b"::1", b"IMCEASMTP-", b"IMCEA", b"@a.test:", b"postmaster", b"a" * 30, b"d" * 62, b"SIZE=1",
        "\u00e9".encode(), "\u00fc".encode(), "\uff20".encode(), "\u3002".encode(), "\u200b".encode(),
        "\u00ad".encode(), "\u2163".encode(), "\u4f8b".encode(), "\u0131".encode(), "\u017f".encode(),
        "\u0300".encode(), "\u202e".encode(), "\U0001f600".encode(),
    ]
)  # fmt: skip
NEARLY = st.one_of(
    st.lists(PIECES, max_size=12).map(b"".join),
    st.builds(
        lambda local_part, domain: b"".join(local_part) + b"@" + b"".join(domain),
        st.lists(PIECES, min_size=1, max_size=5),
        st.lists(PIECES, min_size=1, max_size=4),
    ),
    st.builds(
        lambda local_part: b'"' + b"".join(local_part) + b'"@example.com', st.lists(PIECES, min_size=1, max_size=6)
    ),
    st.builds(lambda text: text.encode() + b"@example.com", st.text(min_size=1, max_size=12)),
    st.builds(lambda text: b"a@" + text.encode() + b".example", st.text(min_size=1, max_size=12)),
    st.binary(max_size=40),
)
BRACKETED = NEARLY.map(lambda octets: b"<" + octets + b">")


def unquoted_ats(octets: bytes) -> int:
    """An independent count: at-signs outside quotes, a backslash protecting what follows it."""
    return re.sub(rb'"(?:\\.|[^"\\])*"', b"", octets, flags=re.DOTALL).count(b"@")


@given(BRACKETED, st.booleans())
def test_a_path_that_parses_is_sent_on_with_the_same_reading(octets: bytes, smtputf8: bool) -> None:
    path = parse_forward_path(octets, smtputf8=smtputf8)
    if isinstance(path, PathDefect):
        assert path.reply.code in (501, 553)
        return
    sent = path.octets
    again = parse_forward_path(b"<" + sent + b">", smtputf8=smtputf8)
    assert isinstance(again, ForwardPath)
    assert again.mailbox == path.mailbox
    assert again.octets == sent
    assert again == path or path.shape is Shape.ROUTE
    assert not re.search(rb"[\x00-\x1f\x7f]", sent)
    assert len(sent) <= PATH_OCTETS_MAX - 2
    assert smtputf8 or sent.isascii()
    if isinstance(path.mailbox, Mailbox):
        assert unquoted_ats(sent) == 1
        assert len(path.mailbox.local_part.encode()) <= LOCAL_PART_OCTETS_MAX
        assert parse_reverse_path(octets, smtputf8=smtputf8) == path.mailbox
        # The domain that was decided on is the text behind the last "@", in any reading.
        assert sent.rpartition(b"@")[2] == str(path.mailbox.domain).encode()
    else:
        assert sent == b"postmaster"


@given(BRACKETED, st.booleans())
def test_both_directions_agree(octets: bytes, smtputf8: bool) -> None:
    ahead = parse_forward_path(octets, smtputf8=smtputf8)
    back = parse_reverse_path(octets, smtputf8=smtputf8)
    if back is NULL_REVERSE_PATH:
        assert octets == b"<>"
    elif isinstance(back, PathDefect):
        assert isinstance(ahead, PathDefect) or ahead.shape is Shape.NO_DOMAIN
        assert back.reply.code in (501, 553)
    else:
        assert isinstance(ahead, ForwardPath)
        assert ahead.mailbox == back


@given(BRACKETED)
@example(b"<a@b.c>")
@example(b"<imceasmtp-a@b.cc>")
def test_the_plain_way_is_the_long_way(octets: bytes) -> None:
    """What the fast expression takes, the grammar takes too, with the same result and as PLAIN."""
    plain = parse_plain_mailbox(octets)
    if plain is None:
        return
    # A character that only the long way takes is added to both sides and looked for behind it.
    local_part, _, domain = octets[1:-1].partition(b"@")
    detour = parse_forward_path(b"<#" + local_part + b"@_." + domain + b">", smtputf8=False)
    if isinstance(detour, PathDefect):  # grown too long
        assert len(local_part) == LOCAL_PART_OCTETS_MAX or len(octets) >= PATH_OCTETS_MAX - 2
        return
    assert detour == ForwardPath(Mailbox("#" + plain.local_part, f"_.{plain.domain}"), Shape.PLAIN)
    assert parse_forward_path(octets, smtputf8=False) == ForwardPath(plain, Shape.PLAIN)


@given(BRACKETED)
def test_a_path_that_is_not_routing_holds_nothing_to_route_by(octets: bytes) -> None:
    path = parse_forward_path(octets, smtputf8=True)
    if isinstance(path, PathDefect) or path.shape.routing or not isinstance(path.mailbox, Mailbox):
        return
    local_part = path.mailbox.local_part
    for reading in (local_part, unicodedata.normalize("NFKC", local_part), unicodedata.normalize("NFKD", local_part)):
        assert not set(reading) & set('@%!|"\\<>()[],;: ')
        assert not reading.startswith(("/", "-", "."))
        assert not re.match(r"imcea(smtp)?[-_]", reading, re.IGNORECASE)


@given(st.text(max_size=20), st.sampled_from(["example.com", "xn--bcher-kva.example"]))
def test_any_mailbox_that_can_be_written_is_read_back(local_part: str, domain: str) -> None:
    mailbox = Mailbox(local_part, domain)
    try:
        octets = mailbox.octets
    except ValueError:
        return
    path = parse_reverse_path(b"<" + octets + b">", smtputf8=True)
    if isinstance(path, PathDefect):
        # Only an address that could not have come from the network can be too long or hold a control.
        assert len(octets) > LOCAL_PART_OCTETS_MAX + len(domain) or not local_part.isprintable()
    else:
        assert path == mailbox


@given(NEARLY, st.sampled_from([b"", b" ", b" SIZE=1", b" X=<y>", b"x"]))
def test_splitting_loses_nothing(octets: bytes, tail: bytes) -> None:
    for argument in (b"<" + octets + b">" + tail, octets + tail):
        split = split_path(argument)
        if isinstance(split, PathDefect):
            assert split.reply.code == 501
            continue
        path, rest = split
        bare = path if argument.lstrip(b" ").startswith(b"<") else path[1:-1]
        assert argument.strip(b" ").startswith(bare)
        assert argument.strip(b" ")[len(bare) :].strip(b" ") == rest
        # Where the path ends, another reader of quotes sees it end too.
        assert not re.search(rb"[<> ]", re.sub(rb'"(?:\\.|[^"\\])*"', b"", path[1:-1], flags=re.DOTALL))


@given(st.text(max_size=30))
def test_a_domain_is_canonical_or_refused(text: str) -> None:
    for candidate in (text, f"{text}.example", f"xn--{text}.example"):
        try:
            domain = parse_domain(candidate)
        except ValueError:
            continue
        assert parse_domain(domain) == domain
        assert re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", domain)
        assert len(domain) <= 255
        if candidate.isascii():
            assert domain == candidate.lower()


LOCAL_PARTS = st.sampled_from(["a", "A", "b", "a b", "*", "\u00fc", "\u00dc", "k", "\u212a"])
DOMAINS = st.sampled_from(
    ["x.test", "y.x.test", "z.y.x.test", "test", "nx.test", "[192.0.2.1]", "[IPv6:::ffff:192.0.2.1]"]
)


@given(
    st.one_of(
        st.sampled_from(["*", "<>", "postmaster", "*@*"]),
        st.builds(
            "{}@{}{}".format,
            st.sampled_from(["*", "a", "A", '"a b"', "\u00fc", "k"]),
            st.sampled_from(["", "*."]),
            DOMAINS,
        ),
    ),
    st.builds(
        lambda local_part, domain: Mailbox(local_part, "x.test").octets.removesuffix(b"x.test") + domain.encode(),
        LOCAL_PARTS,
        DOMAINS,
    ),
)
def test_looking_a_pattern_up_is_matching_it(text: str, octets: bytes) -> None:
    try:
        pattern = Pattern.parse(text)
    except ValueError:
        assert text.startswith(("*@*.[", "a@*.[", "A@*.[", '"a b"@*.[', "\u00fc@*.[", "k@*.["))
        return
    assert Pattern.parse(str(pattern)) == pattern
    path = parse_forward_path(b"<" + octets + b">", smtputf8=True)
    assert isinstance(path, ForwardPath)
    for candidate in (path, path.mailbox):
        assert pattern.matches(candidate) == (str(pattern) in set(pattern_texts(candidate)))
    assert pattern.matches(NULL_REVERSE_PATH) == (str(pattern) in set(pattern_texts(NULL_REVERSE_PATH)))
