"""The authors of a message: every address that some reader may show, or a defect; against other readers, too."""

from __future__ import annotations

import contextlib
import email
import email.errors
import email.header
import email.policy
import email.utils
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gatepost.smtp.header import AUTHORS_MAX, HeaderDefect, author_addresses
from gatepost.smtp.path import Mailbox, PathDefect, parse_forward_path

BEFORE = b"Received: from a by b\r\nSubject: From: x@evil.test\r\n"
AFTER = b"To: bob@example.com\r\nSender: x@evil.test\r\nResent-From: x@evil.test\r\nReply-To: x@evil.test\r\n"
BODY = b"\r\nFrom: x@evil.test\r\n"


def authors(value: bytes | str) -> list[str] | HeaderDefect:
    """What comes of a From field, wherever in the section it stands."""
    value = value if isinstance(value, bytes) else value.encode()
    field = b"From:" + value + b"\r\n"
    results = [
        author_addresses(section)
        for section in (field, field + BODY, BEFORE + field, BEFORE + field + AFTER, BEFORE + field + AFTER + BODY)
    ]
    assert all(result == results[0] for result in results)
    return results[0] if isinstance(results[0], HeaderDefect) else [str(mailbox) for mailbox in results[0]]


# ---- what honest programs write


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"alice@ours.test", ["alice@ours.test"]),
        (b" alice@OURS.test", ["alice@ours.test"]),
        (b"\t<alice@ours.test> ", ["alice@ours.test"]),
        (b" Alice <alice@ours.test>", ["alice@ours.test"]),
        (b" Alice<alice@ours.test>", ["alice@ours.test"]),
        (b" Alice B. C. Doe-Roe <alice@ours.test>", ["alice@ours.test"]),
        (b' "Doe, Alice (Sales)" <alice@ours.test>', ["alice@ours.test"]),
        (b' "Alice \\"Al\\" Doe" <alice@ours.test>', ["alice@ours.test"]),
        (b' "Alice" Doe "Roe" <alice@ours.test>', ["alice@ours.test"]),
        (b' "" <alice@ours.test>', ["alice@ours.test"]),
        (b' "alice@ours.test" <alice@ours.test>', ["alice@ours.test"]),
        (b" alice@ours.test (Alice Doe (Sales \\) ))", ["alice@ours.test"]),
        (b" (x) Alice (y) <alice@ours.test> (z)", ["alice@ours.test"]),
        (b" 'Alice' <o'hara+tag=1@ours.test>", ["o'hara+tag=1@ours.test"]),
        (b" Bob & Eve <alice@ours.test>", ["alice@ours.test"]),
        (b' "Alice @ Work" <alice@ours.test>', ["alice@ours.test"]),
        (b' "@alice" <alice@ours.test>', ["alice@ours.test"]),
        (b' "alice"@ours.test', ["alice@ours.test"]),
        (b" alice@[192.0.2.1]", ["alice@[192.0.2.1]"]),
        (b" alice@[IPv6:2001:db8::1]", ["alice@[IPv6:2001:db8::1]"]),
        (" Jos\u00e9 <jos\u00e9@m\u00fcller.test>", ["jos\u00e9@xn--mller-kva.test"]),
        (" \u5f20\u4f1f <alice@ours.test>", ["alice@ours.test"]),
        (b" =?utf-8?Q?Jos=C3=A9_Doe?= <alice@ours.test>", ["alice@ours.test"]),
        (b" =?UTF-8?B?Sm9zw6k=?=\r\n =?utf-8*en?b?IERvZQ?= <alice@ours.test>", ["alice@ours.test"]),
        (b" =?gb2312?B?1dXOsA==?= <alice@ours.test>", ["alice@ours.test"]),
        (b" =?iso-2022-jp?B?GyRCO01ARRsoQg==?= <alice@ours.test>", ["alice@ours.test"]),
        (b" =?Windows-1252?Q?Caf=E9_?= =?iso-8859-15?Q?=A4?= <alice@ours.test>", ["alice@ours.test"]),
        (b' "=?us-ascii?q?Alice?=" <alice@ours.test>', ["alice@ours.test"]),
        (b" what =? is this <alice@ours.test>", ["alice@ours.test"]),
        (b" Alice\r\n <alice@ours.test>", ["alice@ours.test"]),
        (b"\r\n alice@ours.test", ["alice@ours.test"]),
        (b" a@ours.test, B <b@ours.test>,\r\n\tc@ours.test", ["a@ours.test", "b@ours.test", "c@ours.test"]),
        (b" Sales: a@ours.test, B <b@ours.test>;", ["a@ours.test", "b@ours.test"]),
        (b" a@ours.test, Sales:b@ours.test; , c@ours.test", ["a@ours.test", "b@ours.test", "c@ours.test"]),
        (b" a@ours.test, A@ours.test, a@OURS.test", ["a@ours.test", "A@ours.test"]),
    ],
)
def test_an_author_is_read(value: bytes | str, expected: list[str]) -> None:
    assert authors(value) == expected


@pytest.mark.parametrize(
    "section",
    [
        b"", b"\r\n", b"\r\nFrom: x@evil.test\r\n", BEFORE, AFTER, BEFORE + BODY, b"hello\r\n", b"no field here\r\n",
        b"X-From: a@b.test\r\n", b"Fromage: a@b.test\r\n", b"From-: a@b.test\r\n", b"Subject: x\r\n From: a@b.test\r\n",
        b"Dear Bob,\r\nregards: Alice\r\n", b" \r\n", b"Sender: a@b.test\r\n",
    ],
)  # fmt: skip
def test_without_a_from_field_there_is_no_author(section: bytes) -> None:
    assert author_addresses(section) == ()


@pytest.mark.parametrize("name", [b"from", b"FROM", b"fRoM"])
def test_the_name_of_the_field_has_no_case(name: bytes) -> None:
    assert author_addresses(BEFORE + name + b": a@ours.test\r\n" + BODY) == (Mailbox("a", "ours.test"),)


# ---- what others may read


@pytest.mark.parametrize(
    "value",
    [
        b" a@ours.test (b@evil.test)",
        b" (b@evil.test) a@ours.test",
        b" (x (b@evil.test)) a@ours.test",
        b' "b@evil.test" <a@ours.test>',
        b' "<b@evil.test>" <a@ours.test>',
        b' "x\\" <b@evil.test>" <a@ours.test>',
        b' "b\\@evil.test" <a@ours.test>',
        b' "b\\@evil\\.test" <a@ours.test>',
        b' "write to b@evil.test..." <a@ours.test>',
        b' "(b@evil.test)" <a@ours.test>',
        b' "x,b@evil.test,y" <a@ours.test>',
        b' "b@evil.test via List" <a@ours.test>',
        b" =?utf-8?q?b=40evil.test?= <a@ours.test>",
        b" =?utf-8?q?=62=40=65vil.test_x?= <a@ours.test>",
        b" =?utf-8?b?YkBldmlsLnRlc3Q=?= <a@ours.test>",
        b" =?utf-8?b?YkBldmlsLnRlc3Q?= <a@ours.test>",
        b" =?utf-8?q?b?= =?utf-8?q?=40evil.test?= <a@ours.test>",
        b" =?utf-8?q?b=40?=\r\n =?iso-8859-1?q?evil.test?= <a@ours.test>",
        b" =?utf-8?q?x_b=40evil.test_?= =?utf-8?q?.ours.test?= <a@ours.test>",
        b' "=?utf-8?q?b=40evil.test?=" <a@ours.test>',
        b" a@ours.test (=?utf-8?q?b=40evil.test?=)",
        b" =?iso-2022-jp?b?YhskQiF3GyhCZXZpbC50ZXN0?= <a@ours.test>",
        " b\uff20evil\uff0etest <a@ours.test>",
        " b\ufe6bevil.test <a@ours.test>",
        " =?utf-8?q?b=EF=BC=A0evil.test?= <a@ours.test>",
        ' "\u00a0b@evil.test\u3000" <a@ours.test>',
        b" b@evil.test, a@ours.test",
        b" a@ours.test, b@evil.test",
        b" Group: a@ours.test, b@evil.test;",
        b" Group: a@ours.test;, b@evil.test",
        b" a@ours.test,\r\n b@evil.test",
    ],
)
def test_an_address_counts_wherever_it_stands(value: bytes | str) -> None:
    found = authors(value)
    assert isinstance(found, list)
    assert {"a@ours.test", "b@evil.test"} <= set(found)


def test_an_address_literal_counts_in_a_name_too() -> None:
    assert authors(b' "b@[192.0.2.1]" <a@ours.test>') == ["a@ours.test", "b@[192.0.2.1]"]


@pytest.mark.parametrize(
    "value",
    [
        b"", b" ", b" ()", b" (a@ours.test)", b",", b" ,a@ours.test", b" a@ours.test,", b" a@ours.test,,b@ours.test",
        b" a@ours.test <b@evil.test>", b" a@ours.test <a@ours.test>", b" b@evil.test a@ours.test", b" a@ours.test x",
        b" <a@ours.test> <b@evil.test>", b" <a@ours.test> b@evil.test", b" <a@ours.test", b" a@ours.test>", b" <>",
        b" x <>", b" <<a@ours.test>>", b" < a@ours.test>", b" <a@ours.test >", b" <(x)a@ours.test>", b" <a>", b" alice",
        b" Doe, Alice <a@ours.test>", b" a @ours.test", b" a@ ours.test", b" a(x)@ours.test", b" a@(x)ours.test",
        b" a@ours.\r\n test", b" a@ours\r\n .test", b" a@ours.test b@evil.test", b" a@b@ours.test", b" @ours.test",
        b" a@",
        b" <@evil.test:a@ours.test>", b" <@x.test,@y.test:a@ours.test>", b" @evil.test:a@ours.test",
        b" Group:;", b" Group: a@ours.test", b" a@ours.test;", b" a@ours.test; b@evil.test", b" G: H: a@ours.test;;",
        b" :a@ours.test;", b" Group: a@ours.test; b@evil.test", b" Group: a@ours.test;;", b" <G: a@ours.test;>",
        b' "a@ours.test', b' "x <a@ours.test>', b' a@ours.test"', b" (x a@ours.test", b" a@ours.test (x",
        b" a@ours.test)",
        b" a@ours.test (x\\)", b' "x\\" <a@ours.test>', b" [x] <a@ours.test>", b" a\\@evil.test <a@ours.test>",
        b" Alice \\ <a@ours.test>", b" a@[192.0.2.1", b" a@192.0.2.1]", b" Alice\xe9 <a@ours.test>",
        b" \xc0\x80 <a@ours.test>", b" a\x00@ours.test", b" a@ours.test\x08", b" \x1b[2J <a@ours.test>",
        " \u202etset.sruo@b\u202c <a@ours.test>", " \u2066x\u2069 <a@ours.test>", " x\u2028b@evil.test <a@ours.test>",
        b" =?utf-8?q?Doe,_A?= <a@ours.test>", b' ""@ours.test', b" a..b@ours.test", b" .a@ours.test", b" a@ours..test",
        b" a%evil.test@ours.test", b" evil.test!a@ours.test", b' "b@evil.test"@ours.test', b' "a b"@ours.test',
        b" a@127.0.0.1", b" a@-x.test", b" a@xn--a.test", b" a@" + b"x" * 64 + b".test", b" a@ours.test.",
        b" =?utf-8?q?b=40evil.test=00?=@ours.test", b" =?utf-8?q?x?=@ours.test",
        b" <=?utf-8?q?a=40evil.test?=@ours.test>",
        b" =?utf-7?q?b+AEA-evil.test?= <a@ours.test>", b" =?x-none?q?x?= <a@ours.test>",
        b" =?utf-8?b?!!!?= <a@ours.test>",
        b" =?utf-8?b?YQ==YQ==?= <a@ours.test>", b" =?utf-8?q?=C3?= <a@ours.test>",
        b" =?utf-8?q?b=00=40evil.test?= <a@ours.test>",
        b" =?utf-8?q?x=0AFrom:?= <a@ours.test>", b' "=?utf-8?q?b@evil.test?=" <a@ours.test>',
        b' "b@evil..test" <a@ours.test>',
        b' "b@evil_\xe2\x80\x8b.test" <a@ours.test>', b' "=?utf-8?q?b?=\\@evil.test" <a@ours.test>',
    ],
)  # fmt: skip
def test_what_can_be_read_in_two_ways_is_a_defect(value: bytes | str) -> None:
    assert authors(value) in (HeaderDefect.MALFORMED, HeaderDefect.DOUBTFUL, HeaderDefect.BARE)


@pytest.mark.parametrize(
    ("section", "defect"),
    [
        (b"From: a@ours.test\r\nFrom: b@evil.test\r\n", HeaderDefect.TWICE),
        (b"From: a@ours.test\r\nFrom: a@ours.test\r\n", HeaderDefect.TWICE),
        (b"From: a@ours.test\r\nX: y\r\nfrom: b@evil.test\r\n\r\nbody", HeaderDefect.TWICE),
        (b"From: a@ours.test\r\nFROM:\r\n b@evil.test\r\n", HeaderDefect.TWICE),
        (b"From : a@ours.test\r\n", HeaderDefect.HIDDEN),
        (b"From\t: a@ours.test\r\n", HeaderDefect.HIDDEN),
        (b"From: a@ours.test\r\nFrom : b@evil.test\r\n", HeaderDefect.HIDDEN),
        (b"From\x0b: a@ours.test\r\n", HeaderDefect.HIDDEN),
        (b"From\xa0: a@ours.test\r\n", HeaderDefect.HIDDEN),
        (b"\xef\xbb\xbfFrom: a@ours.test\r\n", HeaderDefect.HIDDEN),
        (b"\xe2\x80\x8bFrom: a@ours.test\r\nFrom: b@evil.test\r\n", HeaderDefect.HIDDEN),
        (b"Fr\xc2\xadom: b@evil.test\r\nFrom: a@ours.test\r\n", HeaderDefect.HIDDEN),
        (b" From: b@evil.test\r\nFrom: a@ours.test\r\n", HeaderDefect.HIDDEN),
        (b"\tFrom: b@evil.test\r\n", HeaderDefect.HIDDEN),
        (b"From b@evil.test Mon Jan  1 00:00:00 2024\r\nFrom: a@ours.test\r\n", HeaderDefect.HIDDEN),
        (b">From: b@evil.test\r\nFrom: a@ours.test\r\n", None),
        (b"> From: b@evil.test\r\nFrom: a@ours.test\r\n", HeaderDefect.HIDDEN),
        (b"no field\r\nFrom: b@evil.test\r\n", HeaderDefect.HIDDEN),
        (b" continues nothing\r\nFrom: b@evil.test\r\n", HeaderDefect.HIDDEN),
        (b"From: a@ours.test\r\nno field\r\n", HeaderDefect.HIDDEN),
        (b"From: a@ours.test\r\n \r\n", HeaderDefect.HIDDEN),
        (b"From: a@ours.test\r\n \t\r\n , b@evil.test\r\n", HeaderDefect.HIDDEN),
        (b"From: a@ours.test\r\n\x0b, b@evil.test\r\n", HeaderDefect.HIDDEN),
        (b"From: a@ours.test\r\n\xa0, b@evil.test\r\n", HeaderDefect.HIDDEN),
        (b"Subject: x\r\n \r\nFrom: b@evil.test\r\n", HeaderDefect.HIDDEN),
        (b"Subject: x\r\n \r\n From: b@evil.test\r\n", HeaderDefect.HIDDEN),
        (b"no field\r\n From: b@evil.test\r\n", HeaderDefect.HIDDEN),
        (b"From: a@ours.test\r\nX: y\r\nno field\r\n", None),
        (b"From: a@ours.test\r\n , b@evil.test\r\n", None),
        (b"From: a@ours.test\r\nX: y\rFrom: b@evil.test\r\n", HeaderDefect.BARE),
        (b"From: a@ours.test\r\nX: y\nFrom: b@evil.test\r\n", HeaderDefect.BARE),
        (b"From: a@ours.test\r\nX: y\n\nFrom: b@evil.test\r\n", HeaderDefect.BARE),
        (b"From: a@ours.test\r\nX: \0\r\n", HeaderDefect.BARE),
        (b"From: a@ours.test\r\n\0From: b@evil.test\r\n", HeaderDefect.BARE),
    ],
)
def test_no_line_hides_a_second_from_field(section: bytes, defect: HeaderDefect | None) -> None:
    for end in (b"", BODY):
        result = author_addresses(section + end)
        if defect is not None:
            assert result is defect
        else:
            assert not isinstance(result, HeaderDefect)
            wanted = {"a", "b"} if b", b@" in section else {"a"}
            assert {mailbox.local_part for mailbox in result} == wanted


def test_each_defect_is_told_in_a_sentence_for_the_client() -> None:
    assert all(defect.value.isascii() and defect.value.isprintable() for defect in HeaderDefect)


@pytest.mark.parametrize("count", [AUTHORS_MAX - 1, AUTHORS_MAX, AUTHORS_MAX + 1])
def test_authors_are_bounded(count: int) -> None:
    several = [b"a%d@ours.test" % number for number in range(count)]
    for value in (
        b", ".join(several),
        b'"' + b" ".join(several[1:]) + b'" <a0@ours.test>',
        b"G:" + b",".join(several) + b";",
    ):
        found = authors(b" " + value)
        assert found is HeaderDefect.TOO_MANY if count > AUTHORS_MAX else len(found) == count  # type: ignore[arg-type]
    many = authors(b" " + b", ".join([b"a@ours.test"] * count))
    assert many == (HeaderDefect.TOO_MANY if count > AUTHORS_MAX else ["a@ours.test"])


# ---- time

N_OCTETS = 256 << 10
LONG = {
    "atoms": b"a" * N_OCTETS,
    "words": b"a " * (N_OCTETS // 2) + b"<a@ours.test>",
    "quotes": b'"' * N_OCTETS,
    "quoted": b'"" ' * (N_OCTETS // 3) + b"<a@ours.test>",
    "backslashes": b'"' + b"\\" * N_OCTETS,
    "comments": b"(" * N_OCTETS,
    "closed comments": b"()" * (N_OCTETS // 2) + b"a@ours.test",
    "ats": b'"' + b"a@" * (N_OCTETS // 2) + b'" <a@ours.test>',
    "literals": b'"' + b"@[" * (N_OCTETS // 2) + b'" <a@ours.test>',
    "the same": b"(" + b"a@ours.test " * (N_OCTETS // 12) + b") a@ours.test",
    "groups": b"a:" * (N_OCTETS // 2),
    "members": b"a@ours.test," * (N_OCTETS // 12),
    "commas": b"a," * (N_OCTETS // 2),
    "half words": b'"' + b"=?a?b?" * (N_OCTETS // 6) + b'" <a@ours.test>',
    "encoded words": b"=?utf-8?q?a?= " * (N_OCTETS // 14) + b"<a@ours.test>",
    "marks": b'"' + "\u0301".encode() * (N_OCTETS // 4) + "\u0323".encode() * (N_OCTETS // 4) + b'" <a@ours.test>',
    "encoded marks": b"=?utf-8?q?" + "\u0301\u0323".encode() * (N_OCTETS // 4) + b"?= <a@ours.test>",
    "ligatures": b'"' + "\ufdfa".encode() * (N_OCTETS // 3) + b'" <a@ours.test>',
    "folds": b"a\r\n " * (N_OCTETS // 4) + b"<a@ours.test>",
}


@pytest.mark.parametrize("name", LONG)
def test_time_is_linear_in_the_octets(name: str) -> None:
    begin = time.process_time()
    author_addresses(b"From: " + LONG[name] + b"\r\n")
    assert time.process_time() - begin < 10, "a tenth of it is expected, minutes where it is not linear"


# ---- whatever comes, and what other readers make of it

PIECES = [
    b"a@ours.test", b"b@evil.test", b"c@other.test", b"<", b">", b"<b@evil.test>", b"<a@ours.test>", b'"', b"\\", b"(",
    b")", b",", b";", b":", b" ", b"\t", b"\r\n ", b"@", b".", b"Alice", b'"Bob"', b"[", b"]",
    b"=?utf-8?q?b=40evil.test?=",
    b"=?utf-8?b?YkBldmlsLnRlc3Q=?=", b"=?", b"?=", b"\r\nFrom: ", b"\r\n", b"\r\n\r\n", b"From: ", b"From : ", b"X: y",
    b"\xc3\xa9", b"\xef\xbc\xa0", b"\xff", b"\0", b"Group:", b"\x0b", b"%", b"!", b"'", b"=40",
]  # fmt: skip
pieces = st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=3)), max_size=14).map(b"".join)
quickly = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)


def other_readings(section: bytes) -> set[str]:
    """The addresses that readers of the standard library show as authors."""
    found: set[str] = set()
    for policy in (email.policy.compat32, email.policy.default, email.policy.SMTPUTF8):
        # One that crashes shows nothing.
        with contextlib.suppress(AttributeError, IndexError, TypeError, ValueError, email.errors.MessageError):
            message = email.message_from_bytes(section, policy=policy)
            for value in message.get_all("From", []):
                found |= {address for _, address in email.utils.getaddresses([str(value)])}
                found |= {one.addr_spec for one in getattr(value, "addresses", ())}
    # Octets that a reader did not take for UTF-8 came in as surrogates; one that shows none of them shows no address.
    found = {address.encode("utf-8", "surrogateescape").decode() for address in found}
    return {address for address in found if "@" in address.strip("@") and "\ufffd" not in address}


@quickly
@given(pieces)
@example(b"From: a@ours.test\r\n\x0b <b@evil.test>")
@example(b'From: "a@ours.test" <b@evil.test>')
def test_any_section_gives_addresses_or_a_defect(octets: bytes) -> None:
    result = author_addresses(octets)
    if isinstance(result, HeaderDefect):
        return
    assert len(result) <= AUTHORS_MAX
    for mailbox in result:
        assert author_addresses(b"From: " + mailbox.octets + b"\r\n") == (mailbox,)
    assert author_addresses(octets + b"\r\n\r\nFrom: b@evil.test") == result or not octets or octets.endswith(b"\r\n")


@quickly
@given(st.sampled_from([b"", b"X: y\r\n"]), pieces)
@example(b"", b' "x" <a@ours.test> (b@evil.test)')
@example(b"", b" =?utf-8?q?b=40evil.test?= <a@ours.test>")
def test_no_address_is_missed_that_another_reader_shows(before: bytes, value: bytes) -> None:
    section = before + b"From: " + value + b"\r\n"
    result = author_addresses(section)
    if isinstance(result, HeaderDefect):
        return
    ours = {str(mailbox).lower() for mailbox in result}
    for address in other_readings(section):
        path = parse_forward_path(f"<{address}>".encode(), smtputf8=True)
        canonical = address if isinstance(path, PathDefect) else str(path)  # the domain as A-labels
        assert canonical.lower() in ours, f"{address!r} is shown by another reader of {section!r}"


@quickly
@given(
    st.sampled_from(["a@ours.test", "b@evil.test", "c.d+e@other.test"]),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12),
)
def test_an_address_set_off_by_spaces_is_found_in_any_name(address: str, before: str, after: str) -> None:
    name = f"{before} {address} {after}"
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    for value in (f' "{quoted}" <z@ours.test>', f" {email.header.Header(name, 'utf-8').encode()} <z@ours.test>"):
        found = authors(value.replace("\n", "\r\n"))
        assert isinstance(found, HeaderDefect) or {address, "z@ours.test"} <= set(found)
