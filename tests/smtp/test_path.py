"""Paths: every address has one reading, or none.

Why: each row is an address that some server reads in two ways, or one that people really have and must not lose.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest

from gatepost.smtp.path import (
    DOMAIN_OCTETS_MAX,
    LABEL_OCTETS_MAX,
    LOCAL_PART_OCTETS_MAX,
    NULL_REVERSE_PATH,
    PATH_OCTETS_MAX,
    POSTMASTER,
    AddressLiteral,
    ForwardPath,
    Mailbox,
    PathDefect,
    Pattern,
    Postmaster,
    ReversePath,
    Shape,
    parse_address_literal,
    parse_domain,
    parse_forward_path,
    parse_plain_mailbox,
    parse_reverse_path,
    pattern_texts,
    split_path,
)


def forward(octets: bytes, *, smtputf8: bool = False) -> ForwardPath:
    path = parse_forward_path(octets, smtputf8=smtputf8)
    assert isinstance(path, ForwardPath), path
    return path


def refusal(octets: bytes, *, smtputf8: bool = False) -> str:
    """The code and status with which both directions refuse; they must agree that it is no path."""
    ahead = parse_forward_path(octets, smtputf8=smtputf8)
    back = parse_reverse_path(octets, smtputf8=smtputf8)
    assert isinstance(ahead, PathDefect), ahead
    assert isinstance(back, PathDefect), back
    assert back.reply.octets()[:4] == ahead.reply.octets()[:4]
    return ahead.reply.octets()[:9].decode()


# --- What people have ------------------------------------------------------------------------------------------------

ORDINARY = [
    (b"<bob@example.com>", "bob"),
    (b"<bob+tag@example.com>", "bob+tag"),
    (b"<o'bob.the-b_1=x@example.com>", "o'bob.the-b_1=x"),
    (b"<BOB@Example.COM>", "BOB"),
    (b"<prvs=tag/user@example.com>", "prvs=tag/user"),
    (b"<SRS0=x=y=z@example.com>", "SRS0=x=y=z"),
    (b"<SRS0+AbCd=EF=elsewhere.test=victim@example.com>", "SRS0+AbCd=EF=elsewhere.test=victim"),
    (b"<list-bounces+victim=elsewhere.test@example.com>", "list-bounces+victim=elsewhere.test"),
    (b"<#&*$~{@example.com>", "#&*$~{"),
    (b"<a#b@example.com>", "a#b"),
    (b"<quote'?}@example.com>", "quote'?}"),
    (b"<=?half@example.com>", "=?half"),
    (b'<"a..b"@example.com>', "a..b"),
    (b'<"a."@example.com>', "a."),
    (b'<"plain"@example.com>', "plain"),
    (b'<"\\p\\l\\a\\i\\n"@example.com>', "plain"),
    (b"<IMCEAEX-_O=ORG_OU=x+20y_CN=z@example.com>", "IMCEAEX-_O=ORG_OU=x+20y_CN=z"),
    (b"<imcea@example.com>", "imcea"),
    (b"<imran@example.com>", "imran"),
    (b"<postmaster@example.com>", "postmaster"),
    (b"<1@example.com>", "1"),
]


@pytest.mark.parametrize(("octets", "local_part"), ORDINARY)
def test_an_ordinary_address_passes_whole(octets: bytes, local_part: str) -> None:
    path = forward(octets)
    assert path == ForwardPath(Mailbox(local_part, "example.com"), Shape.PLAIN)
    assert not path.shape.routing
    assert parse_reverse_path(octets, smtputf8=False) == path.mailbox
    assert forward(b"<" + path.octets + b">") == path


@pytest.mark.parametrize(
    ("octets", "canonical"),
    [
        (b"<BOB@Example.COM>", b"BOB@example.com"),
        (b'<"bob"@example.com>', b"bob@example.com"),
        (b'<"a..b"@example.com>', b'"a..b"@example.com'),
        (b'<"\\a\\ \\"\\\\"@example.com>', b'"a \\"\\\\"@example.com'),
        (b"<@a.test,@b.test:bob@example.com>", b"bob@example.com"),
        (b"<bob@[127.0.0.1]>", b"bob@[127.0.0.1]"),
        (b"<bob@[ipv6:2001:DB8:0:0:0:0:0:1]>", b"bob@[IPv6:2001:db8::1]"),
        (b"<bob@[IPv6:::FFFF:7f00:1]>", b"bob@[IPv6:::ffff:127.0.0.1]"),
        (b"<bob@XN--BCHER-KVA.example>", b"bob@xn--bcher-kva.example"),
        (b"<Postmaster>", b"postmaster"),
    ],
)
def test_what_is_sent_on_is_canonical(octets: bytes, canonical: bytes) -> None:
    path = forward(octets)
    assert path.octets == canonical
    assert str(path) == canonical.decode()
    assert forward(b"<" + canonical + b">").mailbox == path.mailbox


def test_the_null_reverse_path_is_a_value_of_its_own() -> None:
    assert parse_reverse_path(b"<>", smtputf8=False) is NULL_REVERSE_PATH
    assert (NULL_REVERSE_PATH.octets, str(NULL_REVERSE_PATH)) == (b"", "<>")
    defect = parse_forward_path(b"<>", smtputf8=False)
    assert isinstance(defect, PathDefect)
    assert defect.reply.octets().startswith(b"501 5.1.3 ")


@pytest.mark.parametrize("octets", [b"<postmaster>", b"<POSTMASTER>", b"<PostMaster>"])
def test_postmaster_alone_needs_no_domain(octets: bytes) -> None:
    path = forward(octets)
    assert path == ForwardPath(POSTMASTER, Shape.NO_DOMAIN)
    assert not path.shape.routing
    assert (POSTMASTER.local_part, path.octets, str(path)) == ("postmaster", b"postmaster", "postmaster")
    assert isinstance(parse_reverse_path(octets, smtputf8=False), PathDefect)


@pytest.mark.parametrize("octets", ["<po\u017ftma\u017fter>".encode(), b'<"postmaster">', b"<@a.test:postmaster>"])
def test_nothing_else_is_postmaster(octets: bytes) -> None:
    assert isinstance(parse_forward_path(octets, smtputf8=True), PathDefect)


# --- What somebody might route ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("octets", "shape"),
    [
        (b"<victim%elsewhere.test@example.com>", Shape.PERCENT),
        (b"<victim%elsewhere.test%example.com@example.com>", Shape.PERCENT),
        (b"<victim%@example.com>", Shape.PERCENT),
        (b'<"victim%elsewhere.test"@example.com>', Shape.PERCENT),
        (b"<victim%40elsewhere.test%00@example.com>", Shape.PERCENT),
        (b"<victim%elsewhere.test@[127.0.0.1]>", Shape.PERCENT),
        (b"<elsewhere.test!victim@example.com>", Shape.BANG),
        (b'<"gw!elsewhere.test!victim"@example.com>', Shape.BANG),
        (b"<elsewhere.test^victim@example.com>", Shape.BANG),
        (b'<"gw^elsewhere.test^victim"@example.com>', Shape.BANG),
        (b'<"victim@elsewhere.test"@example.com>', Shape.QUOTED_AT),
        (b'<"victim\\@elsewhere.test"@example.com>', Shape.QUOTED_AT),
        (b'<"alice@example.com>"@elsewhere.test>', Shape.QUOTED_AT),
        (b'<"IMCEA victim@elsewhere.test"@example.com>', Shape.QUOTED_AT),
        (b"<@example.com:victim@elsewhere.test>", Shape.ROUTE),
        (b"<@example.com,@relay.test:victim@elsewhere.test>", Shape.ROUTE),
        (b"<@elsewhere.test:a%b@example.com>", Shape.ROUTE),
        (b"<@elsewhere.test:alice@[127.0.0.1]>", Shape.ROUTE),
        (b"<=?utf-8?q?victim=40elsewhere.test?=@example.com>", Shape.ENCODED),
        (b"<x=?utf-8?b?dmljdGltQGVsc2V3aGVyZS50ZXN0?=@example.com>", Shape.ENCODED),
        (b"<IMCEASMTP-victim+40elsewhere+2Etest@example.com>", Shape.ENCODED),
        (b"<imceasmtp_victim+40elsewhere+2Etest@example.com>", Shape.ENCODED),
        (b"<ImCeA-victim+40elsewhere+2Etest@example.com>", Shape.ENCODED),
        (b'<"IMCEA victim"@example.com>', Shape.ENCODED),
        (b"<IMCEAMAILTO-victim+40elsewhere+2Etest@example.com>", Shape.ENCODED),
        (b'<"|/bin/cat"@example.com>', Shape.SPECIAL),
        (b"<|cat@example.com>", Shape.SPECIAL),
        (b"<a|b@example.com>", Shape.SPECIAL),
        (b"</tmp/sink@example.com>", Shape.SPECIAL),
        (b'<"a/../b"@example.com>', Shape.SPECIAL),
        (b"<a/./b@example.com>", Shape.SPECIAL),
        (b'<".."@example.com>', Shape.SPECIAL),
        (b'<".forward"@example.com>', Shape.SPECIAL),
        (b"<-oQ/tmp@example.com>", Shape.SPECIAL),
        (b'<"a b"@example.com>', Shape.SPECIAL),
        (b'<"a,b"@example.com>', Shape.SPECIAL),
        (b'<"a;b"@example.com>', Shape.SPECIAL),
        (b'<"mailto:a"@example.com>', Shape.SPECIAL),
        (b'<"a<b"@example.com>', Shape.SPECIAL),
        (b'<"a>b"@example.com>', Shape.SPECIAL),
        (b'<"foo> ORCPT=x"@example.com>', Shape.SPECIAL),
        (b'<"a(b)"@example.com>', Shape.SPECIAL),
        (b'<"a[b]"@example.com>', Shape.SPECIAL),
        (b'<"a\\\\b"@example.com>', Shape.SPECIAL),
        (b'<"a\\"b"@example.com>', Shape.SPECIAL),
    ],
)
def test_an_address_that_a_backend_might_route_says_so(octets: bytes, shape: Shape) -> None:
    path = forward(octets)
    assert path.shape is shape
    assert path.shape.routing
    again = forward(b"<" + path.octets + b">")
    assert again.mailbox == path.mailbox
    assert again == path or shape is Shape.ROUTE


@pytest.mark.parametrize(
    "local_part",
    [
        "victim\uff20elsewhere.test",  # fullwidth @
        "victim\ufe6belsewhere.test",  # small @
        "victim\uff05elsewhere.test",  # fullwidth %
        "victim\u066aelsewhere.test",  # Arabic percent sign: best fit
        "elsewhere.test\uff01victim",  # fullwidth !
        "elsewhere.test\u01c3victim",  # retroflex click: best fit
        "elsewhere.test\u203cvictim",  # double exclamation mark
        "a\u030eb",  # best fit: a quotation mark
        "\u2500oQ",
        "\uff5c/bin/cat",
        "\u01c0cat",
        "\uff0ftmp",
        "\u200b/tmp",  # the first character is ignorable
        "a\u226eb",  # "<" with a stroke through it
        "a\u037eb",  # Greek question mark: ";"
        "a\u3000b",
        "a\u00a0b",
        "IMCEA\u00adSMTP-victim+40elsewhere+2Etest",
        "\u0131mceasmtp-victim+40elsewhere+2Etest",  # upper() of the dotless i is I
        "\uff29\uff2d\uff23\uff25\uff21-victim",
        "IMCEA\u2010victim",  # U+2010 hyphen
        "=\u200b?utf-8?q?victim=40elsewhere.test?=",
        "\uff1d\uff1futf-8?q?x?=",
        "henry\u2163",  # another mailbox: henryIV
        "\u212aelvin",
        "o\ufb03ce",
    ],
)
def test_a_utf8_local_part_that_may_turn_into_another_says_so(local_part: str) -> None:
    path = forward(f"<{local_part}@example.com>".encode(), smtputf8=True)
    assert path.shape is Shape.ENCODED
    assert path.mailbox.local_part == local_part
    assert forward(b"<" + path.octets + b">", smtputf8=True) == path


@pytest.mark.parametrize(
    "local_part",
    [
        "ren\u00e9",
        "rene\u0301",
        "z\u00fcrich",
        "\u7528\u6237",
        "\u0438\u0432\u0430\u043d.\u043f\u0435\u0442\u0440\u043e\u0432",
        "\u0e19\u0e49\u0e33",  # Thai, with SARA AM, which decomposes
        "\u0645\u062d\u0645\u062f",
        "\u0939\u093f\u0928\u094d\u0926\u0940",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # Persian, with a joiner
        "\U0001f469\u200d\U0001f680",
        "\u2764\ufe0f",
        "\ud55c\uad6d",
    ],
)
def test_an_ordinary_utf8_address_passes_with_smtputf8_only(local_part: str) -> None:
    octets = f"<{local_part}@example.com>".encode()
    assert forward(octets, smtputf8=True) == ForwardPath(Mailbox(local_part, "example.com"), Shape.PLAIN)
    assert parse_reverse_path(octets, smtputf8=True) == Mailbox(local_part, "example.com")
    assert refusal(octets) == "553 5.6.7"


def test_a_literal_is_no_route_but_no_name_either() -> None:
    path = forward(b"<alice@[IPv6:::1]>")
    assert path == ForwardPath(Mailbox("alice", AddressLiteral(IPv6Address("::1"))), Shape.LITERAL)
    assert not path.shape.routing


def test_a_mapped_literal_stays_as_written() -> None:
    path = forward(b"<alice@[IPv6:::ffff:127.0.0.1]>")
    assert path.mailbox == Mailbox("alice", AddressLiteral(IPv6Address("::ffff:127.0.0.1")))
    assert path.octets == b"alice@[IPv6:::ffff:127.0.0.1]"


# --- What nobody may say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        b"<",
        b">",
        b"x",
        b"alice@example.com",
        b"<@>",
        b"<.>",
        b'<"">',
        b"<alice@>",
        b"<@example.com>",
        b'<""@example.com>',
        b"<alice@@example.com>",
        b"<victim@elsewhere.test@example.com>",
        b"<'victim@elsewhere.test'@example.com>",
        b"<alice@example.com+bob@elsewhere.test>",
        b"<alice@example.com#@elsewhere.test>",
        b"<alice@example.com,victim@elsewhere.test>",
        b"<alice@example.com;victim@elsewhere.test>",
        b"<victim\\@elsewhere.test@example.com>",
        b"<victim@elsewhere.test(@example.com)>",
        b"<(@example.com)victim@elsewhere.test>",
        b"<victim@(example.com)elsewhere.test>",
        b"<victim @example.com>",
        b"< victim@example.com>",
        b"<victim@example.com >",
        b"<victim@ example.com>",
        b"<victim@example.com\x00>",
        b"<victim@example.com\r\n>",
        b"<victim\n@example.com>",
        b"<victim\x0b@example.com>",
        b"<victim\x7f@example.com>",
        b'<"a\r\nb"@example.com>',
        b'<"a\\\nb"@example.com>',
        b'<"a\x00b"@example.com>',
        b'<"a\tb"@example.com>',
        b'<"unclosed@example.com>',
        b'<"a"b@example.com>',
        b'<a"b"@example.com>',
        b'<"a"."b"@example.com>',
        b'<"a"b"@example.com>',
        b'<"a\\"@example.com>',
        b"<.alice@example.com>",
        b"<alice.@example.com>",
        b"<a..b@example.com>",
        b"<mailto:victim@example.com>",
        b"<staff:alice@example.com,victim@elsewhere.test;>",
        b"<<victim@example.com>>",
        b"<alice@example.com.>",
        b"<alice@.example.com>",
        b"<alice@example..com>",
        b"<alice@-example.com>",
        b"<alice@example-.com>",
        b"<alice@example.com/elsewhere.test>",
        b"<alice@example.com:25>",
        b"<alice@example.com[127.0.0.1]>",
        b"<alice@exam%ple.com>",
        b"<alice@exam!ple.com>",
        b"<alice@127.0.0.1>",
        b"<alice@2130706433>",
        b"<alice@0x7f000001>",
        b"<alice@0x7f.1>",
        b"<alice@example.0x>",
        b"<alice@xn--.com>",
        b"<alice@xn---.com>",
        b"<alice@xn--example-.com>",
        b"<alice@xn--a.com>",
        b"<alice@xn--" + "\u00dc".encode("punycode") + b".com>",  # a capital letter
        b"<alice@xn--" + "\u2163".encode("punycode") + b".com>",  # Roman numeral four
        b"<alice@xn--exmple-xx.com>",
        b"<alice@[127.0.0.1>",
        b"<alice@127.0.0.1]>",
        b"<alice@[]>",
        b"<alice@[::1]>",
        b"<alice@[2130706433]>",
        b"<alice@[127.1]>",
        b"<alice@[127.0.0.01]>",
        b"<alice@[127.0.0.256]>",
        b"<alice@[0x7f.0.0.1]>",
        b"<alice@[ 127.0.0.1]>",
        b"<alice@[127.0.0.1].example.com>",
        b"<alice@[example.com]>",
        b"<alice@[IPv4:127.0.0.1]>",
        b"<alice@[IPv6:127.0.0.1]>",
        b"<alice@[IPv6:fe80::1%eth0]>",
        b"<alice@[IPv6:1::2::3]>",
        b"<alice@[IPv6:]>",
        b"<alice@[x-tag:y]>",
        b"<@example.com victim@elsewhere.test>",
        b"<@example.com: victim@elsewhere.test>",
        b"<@example.com,:victim@elsewhere.test>",
        b"<@example.com,relay.test:victim@elsewhere.test>",
        b"<@example.com:@relay.test:victim@elsewhere.test>",
        b"<@[127.0.0.1]:victim@elsewhere.test>",
        b"<@:victim@elsewhere.test>",
        b"<@example.com:>",
        b"<@example..com:a@b.test>",
    ],
)
def test_what_is_no_path_is_refused_for_everybody(octets: bytes) -> None:
    assert refusal(octets) in ("501 5.1.3", "553 5.1.3")
    assert refusal(octets, smtputf8=True) in ("501 5.1.3", "553 5.1.3")


@pytest.mark.parametrize(
    "octets", [b"<victim>", b'<"victim@elsewhere.test">', b"<elsewhere.test!victim>", b"<victim%elsewhere.test>"]
)
def test_an_address_without_domain_is_told_so(octets: bytes) -> None:
    assert refusal(octets) == "553 5.1.3"
    defect = parse_reverse_path(octets, smtputf8=False)
    assert isinstance(defect, PathDefect)
    assert defect.reply.octets().startswith(b"553 5.1.7 ")


@pytest.mark.parametrize(
    "octets",
    [
        b"<ren\xe9@example.com>",  # Latin-1
        b"<victim\xc1\x80elsewhere.test@example.com>",  # an overlong "@"
        b"<\xc0\xaf@example.com>",
        b"<\xed\xa0\x80@example.com>",  # a surrogate
        b"<\xf5\x80\x80\x80@example.com>",
        b"<a\xc3@example.com>",
        b"<a\xc2\x85b@example.com>",  # NEL
        b"<a\xe2\x80\xa8b@example.com>",  # line separator
        b"<a\xe2\x80\xaeb@example.com>",  # right-to-left override
        b"<\xef\xbc\x8f@exa\xc2\xadmple.com>",
        "<alice@\uff45\uff58ample.com>".encode(),  # fullwidth letters
        "<alice@example\u3002com>".encode(),  # ideographic full stop
        "<alice@example\uff0ecom>".encode(),
        "<alice@exam\u00adple.com>".encode(),  # soft hyphen
        "<alice@exam\u200dple.com>".encode(),  # joiner
        "<alice@exam\u2060ple.com>".encode(),
        "<alice@e\u2179ample.com>".encode(),  # Roman numeral ten
        "<alice@\u2163.com>".encode(),
        "<alice@B\u00dcCHER.example>".encode(),
        "<alice@bu\u0308cher.example>".encode(),  # not NFC
        "<alice@\u0131.\u0130>".encode(),
        "<alice@example.\u0661>".encode(),  # Arabic digits
        "<alice@[\u0661.0.0.1]>".encode(),
        "<@ex\u00adample.com:a@b.test>".encode(),
    ],
)
def test_what_is_no_utf8_path_is_refused_with_smtputf8_too(octets: bytes) -> None:
    assert refusal(octets) == "553 5.6.7"
    assert refusal(octets, smtputf8=True) == "501 5.1.3"


# --- Domains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("example.com", "example.com"),
        ("EXAMPLE.Com", "example.com"),
        ("localhost", "localhost"),
        ("a_b._tcp.example.com", "a_b._tcp.example.com"),
        ("r3---sn-abc.example.com", "r3---sn-abc.example.com"),
        ("3com.example", "3com.example"),
        ("4.example", "4.example"),
        ("example.x2", "example.x2"),
        ("b\u00fccher.example", "xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("XN--BCHER-KVA.example", "xn--bcher-kva.example"),
        ("fa\u00df.example", "xn--fa-hia.example"),  # IDNA 2003 would make it fass.example
        ("ex\u0430mple.com", "xn--exmple-4nf.com"),  # Cyrillic: another domain than example.com
        ("\u4f8b\u3048.jp", "xn--r8jz45g.jp"),
    ],
)
def test_a_domain_has_one_form(text: str, canonical: str) -> None:
    assert parse_domain(text) == canonical
    assert parse_domain(canonical) == canonical


@pytest.mark.parametrize("text", ["", ".", "a.", ".a", "a b", "*.example.com", "[127.0.0.1]", "exa\nmple", "1", "x.1"])
def test_a_bad_domain_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"^[a-z'].{10,}$"):
        parse_domain(text)


def test_a_literal_can_be_read_alone() -> None:
    assert parse_address_literal("[192.0.2.1]") == AddressLiteral(IPv4Address("192.0.2.1"))
    assert str(parse_address_literal("[ipv6:2001:DB8::1]")) == "[IPv6:2001:db8::1]"
    for text in ("192.0.2.1", "[192.0.2.1", "[2001:db8::1]", "[]", "["):
        with pytest.raises(ValueError, match="literal"):
            parse_address_literal(text)


# --- Limits ----------------------------------------------------------------------------------------------------------

LONG_DOMAIN = ".".join(["d" * 63, "d" * 63, "d" * 63, "example"])  # 199 octets


@pytest.mark.parametrize("character", [b"a", b"#", b"\xc3\xa9"])
def test_the_local_part_is_bounded_in_octets(character: bytes) -> None:
    most = character * (LOCAL_PART_OCTETS_MAX // len(character))
    for fits in (most[len(character) :], most):
        assert forward(b"<" + fits + b"@example.com>", smtputf8=True).mailbox.local_part == fits.decode()
    assert refusal(b"<" + most + b"a@example.com>", smtputf8=True) == "501 5.1.3"


def test_quotes_count_in_the_local_part() -> None:
    assert forward(b'<"' + b"." * (LOCAL_PART_OCTETS_MAX - 2) + b'"@example.com>')
    assert refusal(b'<"' + b"." * (LOCAL_PART_OCTETS_MAX - 1) + b'"@example.com>') == "501 5.1.3"


@pytest.mark.parametrize("first", ["d", "d_"])  # the plain way, and the long one
def test_a_label_is_bounded(first: str) -> None:
    for octets in (LABEL_OCTETS_MAX - 1, LABEL_OCTETS_MAX):
        label = first.ljust(octets, "d")
        assert forward(f"<a@{label}.example>".encode()).octets == f"a@{label}.example".encode()
    assert refusal(f"<a@{first.ljust(LABEL_OCTETS_MAX + 1, 'd')}.example>".encode()) == "501 5.1.3"


def test_a_domain_is_bounded() -> None:
    for octets in (DOMAIN_OCTETS_MAX - 1, DOMAIN_OCTETS_MAX):
        domain = f"{LONG_DOMAIN}.".ljust(octets, "d")
        assert parse_domain(domain) == domain
    with pytest.raises(ValueError, match="255"):
        parse_domain(f"{LONG_DOMAIN}.".ljust(DOMAIN_OCTETS_MAX + 1, "d"))
    with pytest.raises(ValueError, match="255"):  # short as U-labels, too long as A-labels
        parse_domain(".".join(["\u00fc\u00e4\u00f6" * 8] * 10))


@pytest.mark.parametrize("top", ["x", "x_"])  # the plain way, and the long one
def test_a_path_is_bounded(top: str) -> None:
    room = PATH_OCTETS_MAX - len(f"<@{LONG_DOMAIN}.{top}>")
    for octets in (room - 1, room):
        assert forward(f"<{'l' * octets}@{LONG_DOMAIN}.{top}>".encode())
    assert refusal(f"<{'l' * (room + 1)}@{LONG_DOMAIN}.{top}>".encode()) == "501 5.1.3"


def test_a_path_is_bounded_in_its_canonical_form_too() -> None:
    domain = ".".join(["\u00fc"] * 28)  # 83 octets as it comes, 223 as it goes
    assert forward(f"<{'l' * 30}@{domain}>".encode(), smtputf8=True)
    assert refusal(f"<{'l' * 31}@{domain}>".encode(), smtputf8=True) == "501 5.1.3"


def test_a_source_route_counts() -> None:
    assert refusal(b"<@" + b"r" * 60 + b".test" + b",@r.test" * 30 + b":a@example.com>") == "501 5.1.3"


# --- Values made by hand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mailbox",
    [
        Mailbox("", "example.com"),
        Mailbox("a\r\nRCPT TO:<b", "example.com"),
        Mailbox("a\x00", "example.com"),
        Mailbox("a b\u2028", "example.com"),
        Mailbox("a", "example.com>\r\nRCPT TO:<b@c"),
        Mailbox("a", "b@example.com"),
        Mailbox("a b", "Example.com"),
        Mailbox("a", "ex\u00e4mple.com"),
        Mailbox("a", ""),
        Mailbox("\ud800", "example.com"),
    ],
)
def test_a_value_without_form_on_the_wire_has_no_octets(mailbox: Mailbox) -> None:
    with pytest.raises(ValueError, match=r"."):
        _ = mailbox.octets


# --- Splitting the argument of MAIL and RCPT -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "path", "rest"),
    [
        (b"<a@b.test>", b"<a@b.test>", b""),
        (b"<>", b"<>", b""),
        (b" <a@b.test>", b"<a@b.test>", b""),
        (b"   <a@b.test>  ", b"<a@b.test>", b""),
        (b"<a@b.test> SIZE=3", b"<a@b.test>", b"SIZE=3"),
        (b"<a@b.test>   SIZE=3  BODY=7BIT ", b"<a@b.test>", b"SIZE=3  BODY=7BIT"),
        (b'<"a> b"@c.test> X', b'<"a> b"@c.test>', b"X"),
        (b'<"a\\"> b"@c.test> X', b'<"a\\"> b"@c.test>', b"X"),
        (b'<"a\\\\"@c.test> "X', b'<"a\\\\"@c.test>', b'"X'),
        (b"<@a.test,@b.test:c@d.test> X", b"<@a.test,@b.test:c@d.test>", b"X"),
        (b"a@b.test", b"<a@b.test>", b""),
        (b" a@b.test SIZE=3", b"<a@b.test>", b"SIZE=3"),
        (b"postmaster", b"<postmaster>", b""),
        (b"a%b@[127.0.0.1]", b"<a%b@[127.0.0.1]>", b""),
        ("\u00e9@b.test SMTPUTF8".encode(), "<\u00e9@b.test>".encode(), b"SMTPUTF8"),
        (b"<a@b.test> <c@d.test>", b"<a@b.test>", b"<c@d.test>"),
    ],
)
def test_the_path_and_the_parameters_are_told_apart(argument: bytes, path: bytes, rest: bytes) -> None:
    assert split_path(argument) == (path, rest)


@pytest.mark.parametrize(
    "argument",
    [
        b"",
        b" ",
        b"<",
        b"<a@b.test",
        b"a@b.test>",
        b"<a@b.test>>>",
        b"<<a@b.test>>",
        b"<a@b.test <c@d.test>>",
        b"<a@b.test><c@d.test>",
        b"<a@b.test>, <c@d.test>",
        b"<a@b.test>SIZE=3",
        b"<a@b.test>\tSIZE=3",
        b"<a@b.test>\x00",
        b"Alice <a@b.test>",
        b"Alice B <a@b.test>",
        b"postmaster <a@b.test>",
        b'"a@b.test" <c@d.test>',
        b"<a @b.test>",
        b"<a@b.test SIZE=3",
        b'<"a@b.test>',
        b'<"a\\"@b.test>',
        b"<a\\@b@c.test>",
        b"<a\\>@c.test>",
        b"<a@b.test\x00>",
        b"<a@b\r\n.test>",
        b"<a@b\x0b.test>",
        b'"a b"@c.test',
        b'"a"@c.test',
        b"a\\@b@c.test",
        b"a@b.test,c@d.test",
        b"a@b.test;c@d.test",
        b"mailto:a@b.test",
        b"(a)b@c.test",
        b"a\x00@b.test",
        b"\x0b<a@b.test>",
    ],
)
def test_what_cannot_be_split_is_refused(argument: bytes) -> None:
    defect = split_path(argument)
    assert isinstance(defect, PathDefect), defect
    assert defect.reply.octets().startswith(b"501 5.5.4 ")


def test_a_long_hostile_argument_costs_no_more_than_its_length() -> None:
    """Nothing here may backtrack; with a quadratic step these 200 kB would not end."""
    for argument in (
        b'<"' * 100_000,
        b'<"' + b"\\\\" * 100_000,
        b"<" + b'"a"' * 70_000,
        b"<" + b"a.-" * 70_000,
        b"<a@" + b"a-" * 100_000,
    ):
        assert isinstance(split_path(argument), PathDefect)
        assert parse_plain_mailbox(argument + b">") is None
        assert isinstance(parse_forward_path(argument + b">", smtputf8=True), PathDefect)


# --- Patterns --------------------------------------------------------------------------------------------------------

PATHS: dict[str, ReversePath | Postmaster] = {
    "<>": NULL_REVERSE_PATH,
    "postmaster": POSTMASTER,
    "bob": Mailbox("bob", "example.com"),
    "BOB": Mailbox("BOB", "example.com"),
    "sub": Mailbox("bob", "sub.example.com"),
    "subsub": Mailbox("bob", "a.sub.example.com"),
    "not": Mailbox("bob", "notexample.com"),
    "other": Mailbox("bob", "example.com.elsewhere.test"),
    "star": Mailbox("*", "example.com"),
    "quoted": Mailbox("A b", "example.com"),
    "v4": Mailbox("bob", AddressLiteral(IPv4Address("192.0.2.1"))),
    "mapped": Mailbox("bob", AddressLiteral(IPv6Address("::ffff:192.0.2.1"))),
    "v6": Mailbox("bob", AddressLiteral(IPv6Address("2001:db8::1"))),
    "idn": Mailbox("bob", "xn--bcher-kva.example"),
    "utf8": Mailbox("\u00fcnal", "example.com"),
    "kelvin": Mailbox("\u212aim", "example.com"),
    "kim": Mailbox("kim", "example.com"),
    "pm": Mailbox("postmaster", "example.com"),
}
MAILBOXES = set(PATHS) - {"<>", "postmaster"}
AT_EXAMPLE = {"bob", "BOB", "star", "quoted", "utf8", "kelvin", "kim", "pm"}


@pytest.mark.parametrize(
    ("text", "canonical", "matching"),
    [
        ("*", "*", set(PATHS)),
        ("*@*", "*", set(PATHS)),
        ("<>", "<>", {"<>"}),
        ("postmaster", "postmaster", {"postmaster"}),
        ("Postmaster", "postmaster", {"postmaster"}),
        ("*@example.com", "*@example.com", AT_EXAMPLE),
        ("*@EXAMPLE.com", "*@example.com", AT_EXAMPLE),
        ("*@*.example.com", "*@*.example.com", {"sub", "subsub"}),
        ("*@*.com", "*@*.com", AT_EXAMPLE | {"sub", "subsub", "not"}),
        ("bob@example.com", "bob@example.com", {"bob", "BOB"}),
        ("Bob@example.com", "bob@example.com", {"bob", "BOB"}),
        ("bob@*.example.com", "bob@*.example.com", {"sub", "subsub"}),
        ("bob@*", "bob@*", {"bob", "BOB", "sub", "subsub", "not", "other", "v4", "mapped", "v6", "idn"}),
        ("postmaster@*", "postmaster@*", {"pm"}),
        ('"a B"@example.com', '"a b"@example.com', {"quoted"}),
        ('"bob"@example.com', "bob@example.com", {"bob", "BOB"}),
        ("*@[192.0.2.1]", "*@[192.0.2.1]", {"v4", "mapped"}),
        ("*@[IPv6:::ffff:192.0.2.1]", "*@[192.0.2.1]", {"v4", "mapped"}),
        ("*@[ipv6:2001:DB8:0::1]", "*@[IPv6:2001:db8::1]", {"v6"}),
        ("*@b\u00fccher.example", "*@xn--bcher-kva.example", {"idn"}),
        ("*@XN--bcher-kva.example", "*@xn--bcher-kva.example", {"idn"}),
        ("\u00dcnal@example.com", "\u00fcnal@example.com", {"utf8"}),
        ("kim@example.com", "kim@example.com", {"kim"}),
        ("nobody@example.com", "nobody@example.com", set()),
        ("*@elsewhere.test", "*@elsewhere.test", set()),
    ],
)
def test_a_pattern_matches_what_it_says(text: str, canonical: str, matching: set[str]) -> None:
    pattern = Pattern.parse(text)
    assert str(pattern) == canonical
    assert Pattern.parse(canonical) == pattern
    assert {name for name, path in PATHS.items() if pattern.matches(path)} == matching
    assert {name for name, path in PATHS.items() if canonical in pattern_texts(path)} == matching


def test_a_pattern_matches_a_forward_path_by_its_mailbox() -> None:
    pattern = Pattern.parse("*@example.com")
    assert pattern.matches(forward(b"<@elsewhere.test:bob@example.com>"))
    assert pattern.matches(forward(b"<bob%elsewhere.test@example.com>"))  # the caller looks at the shape
    assert not pattern.matches(forward(b"<postmaster>"))
    assert "postmaster" in set(pattern_texts(forward(b"<postmaster>")))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no"),
        ("example.com", 'write "*@example.com"'),
        ("*.example.com", "no"),
        ("bob*@example.com", "whole local-part"),
        ("*bob@example.com", "whole local-part"),
        ("**@example.com", "whole local-part"),
        ('"*"@example.com', "whole local-part"),
        ("*@", "empty"),
        ("bob@", "empty"),
        ("@example.com", "malformed"),
        ("*@example.*", "only at its beginning"),
        ("*@*example.com", "only at its beginning"),
        ("*@a.*.com", "only at its beginning"),
        ("*@*.*.com", "label"),
        ("*@**", "only at its beginning"),
        ("*@[127.0.0.1", "literal"),
        ("*@[*]", "only at its beginning"),
        ("*@example.com.", "empty label"),
        (" *@example.com", "malformed"),
        ("<bob@example.com>", "malformed"),
        ("a@b@example.com", "label"),
        ('"a\nb"@example.com', "."),
        ("a\u2028b@example.com", "control"),
    ],
)
def test_a_bad_pattern_is_refused_in_a_sentence(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why.replace("*", r"\*") if why != "." else why):
        Pattern.parse(text)
