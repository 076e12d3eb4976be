"""The PROXY header: exact or refused, however its octets come, and never more than it is."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from proxyprotocol.result import ProxyResult, ProxyResultIPv4, ProxyResultIPv6, ProxyResultUnix, ProxyResultUnknown
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from gatepost.smtp.preamble import (
    NEED,
    V1_OCTETS_MAX,
    V2_OCTETS_MAX,
    Need,
    ProxyDefect,
    ProxyHeader,
    ProxyParser,
)

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
V4 = bytes([192, 0, 2, 1, 198, 51, 100, 1]) + (40000).to_bytes(2, "big") + (25).to_bytes(2, "big")
V6 = IPv6Address("2001:db8::1").packed + IPv6Address("2001:db8::2").packed + V4[8:]
MAPPED = IPv6Address("::ffff:192.0.2.1").packed + IPv6Address("::1").packed + V4[8:]


def v2(command: int, family: int, block: bytes, length: int | None = None) -> bytes:
    """A header of version 2, with a length that may lie."""
    length = len(block) if length is None else length
    return SIGNATURE + bytes([command, family]) + length.to_bytes(2, "big") + block


def parse(octets: bytes, *sizes: int) -> Need | ProxyHeader | ProxyDefect:
    """Fed in pieces of these sizes, over and over; what was not fed when the answer came is part of the rest."""
    parser = ProxyParser()
    position = turn = 0
    answer: Need | ProxyHeader | ProxyDefect = NEED
    while position < len(octets) and answer is NEED:
        size = sizes[turn % len(sizes)]
        answer = parser.feed(octets[position : position + size])
        position, turn = position + size, turn + 1
    if isinstance(answer, ProxyHeader):
        return answer._replace(rest=answer.rest + octets[position:])
    return answer


def three_ways(octets: bytes) -> Need | ProxyHeader | ProxyDefect:
    """Whole, octet by octet, and in pieces: the same answer."""
    answers = [parse(octets, *sizes) for sizes in ((len(octets) or 1,), (1,), (5, 1, 11))]
    if isinstance(answers[0], ProxyDefect):  # the moment differs, and with it perhaps the words
        assert all(isinstance(answer, ProxyDefect) for answer in answers)
    else:
        assert answers[0] == answers[1] == answers[2]
    return answers[0]


GOOD = [
    (b"PROXY TCP4 192.0.2.1 198.51.100.1 40000 25\r\n", "192.0.2.1", 40000),
    (b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", "255.255.255.255", 65535),
    (b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n", "0.0.0.0", 0),
    (b"PROXY TCP6 2001:db8::1 2001:DB8::2 40000 25\r\n", "2001:db8::1", 40000),
    (b"PROXY TCP6 ::ffff:192.0.2.1 ::1 40000 25\r\n", "192.0.2.1", 40000),
    (b"PROXY TCP6 ::ffff:c000:201 ::1 40000 25\r\n", "192.0.2.1", 40000),
    (
        b"PROXY TCP6" + b" ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff" * 2 + b" 65535 65535\r\n",
        "ffff:" * 7 + "ffff",
        65535,
    ),
    (v2(0x21, 0x11, V4), "192.0.2.1", 40000),
    (v2(0x21, 0x21, V6), "2001:db8::1", 40000),
    (v2(0x21, 0x21, MAPPED), "192.0.2.1", 40000),
    (v2(0x21, 0x11, V4 + b"\x04\x00\x03abc"), "192.0.2.1", 40000),
    (v2(0x21, 0x11, V4 + b"\xff"), "192.0.2.1", 40000),
    (v2(0x21, 0x21, V6 + b"\x01\x00\x02h2" * 100), "2001:db8::1", 40000),
]


@pytest.mark.parametrize(("octets", "address", "port"), GOOD)
@pytest.mark.parametrize("tail", [b"", b"EHLO x\r\n", b"\n", b"\r\n\r\n\x00\r\nQUIT\n", b"PROXY UNKNOWN\r\n"])
def test_a_header_tells_the_client_and_leaves_the_rest(octets: bytes, address: str, port: int, tail: bytes) -> None:
    assert three_ways(octets + tail) == ProxyHeader(ip_address(address), port, tail)


@pytest.mark.parametrize(
    "octets",
    [
        b"PROXY UNKNOWN\r\n",
        b"PROXY UNKNOWN \r\n",
        b"PROXY UNKNOWN" + b" ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff" * 2 + b" 65535 65535\r\n",
        b"PROXY UNKNOWN \x00\xff anything\r\n",
        v2(0x21, 0x00, b""),
        v2(0x21, 0x00, b"\x04\x00\x03abc"),
        v2(0x21, 0x31, b"/run/client".ljust(108, b"\x00") + b"/run/server".ljust(108, b"\x00")),
    ],
)
def test_a_client_whose_address_is_lost_is_still_a_client(octets: bytes) -> None:
    assert three_ways(octets + b"EHLO x\r\n") == ProxyHeader(None, 0, b"EHLO x\r\n", relayed=True)


@pytest.mark.parametrize(
    "octets", [v2(0x20, 0x00, b""), v2(0x20, 0x11, V4), v2(0x20, 0x12, V4), v2(0x20, 0xFF, b"xyz"), v2(0x20, 0x21, V4)]
)
def test_a_proxy_may_speak_for_itself(octets: bytes) -> None:
    assert three_ways(octets + b"QUIT\r\n") == ProxyHeader(None, 0, b"QUIT\r\n", relayed=False)


@pytest.mark.parametrize("octets", [octets for octets, _, _ in GOOD] + [b"PROXY UNKNOWN\r\n", v2(0x20, 0, b"")])
def test_less_than_a_header_needs_more(octets: bytes) -> None:
    for end in range(len(octets)):
        assert three_ways(octets[:end]) is NEED
    assert ProxyParser().feed(b"") is NEED


@pytest.mark.parametrize(
    "octets",
    [
        b"EHLO x\r\n",
        b"PROXX",
        b"proxy TCP4 192.0.2.1 198.51.100.1 40000 25\r\n",
        b" PROXY TCP4 192.0.2.1 198.51.100.1 40000 25\r\n",
        b"PROXY  TCP4 192.0.2.1 198.51.100.1 40000 25\r\n",
        b"PROXY\r\n",
        b"PROXY \r\n",
        b"PROXY TCP4\r\n",
        b"PROXY TCP4 \r\n",
        b"PROXY TCP5 192.0.2.1 198.51.100.1 80 90\r\n",
        b"PROXY tcp4 192.0.2.1 198.51.100.1 40000 25\r\n",
        b"PROXY UNKNOWNX\r\n",
        b"PROXY UNKNOWN a\rb\r\n",
        b"PROXY UNKNOWN\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.1 40000 25\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.1 40000 25 \r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.1 40000 25\r\r\n",
        b"PROXY TCP4 192.0.2.1  198.51.100.1 40000 25\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.1 40000\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.1 40000 25 x\r\n",
        b"PROXY TCP4\t192.0.2.1 198.51.100.1 40000 25\r\n",
        b"PROXY TCP4 192.0.2.01 198.51.100.1 40000 25\r\n",
        b"PROXY TCP4 192.0.2.256 198.51.100.1 40000 25\r\n",
        b"PROXY TCP4 192.0.2 198.51.100.1 40000 25\r\n",
        b"PROXY TCP4 3221225985 198.51.100.1 40000 25\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100 40000 25\r\n",
        b"PROXY TCP4 2001:db8::1 2001:db8::2 40000 25\r\n",
        b"PROXY TCP6 192.0.2.1 198.51.100.1 40000 25\r\n",
        b"PROXY TCP6 2001:db8::1 2001:db8:::2 40000 25\r\n",
        b"PROXY TCP6 fe80::1%eth0 ::1 40000 25\r\n",
        b"PROXY TCP6 [::1] ::1 40000 25\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.1 65536 25\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.1 40000 65536\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.1 040000 25\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.1 -1 25\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.1 +1 25\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.1 4_0 25\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.1 \u0661 25\r\n".encode(),
        "PROXY TCP4 \u0661.0.2.1 198.51.100.1 1 25\r\n".encode(),
        b"PROXY TCP4 192.0.2.1\x00 198.51.100.1 1 25\r\n",
        SIGNATURE[:-1] + b"\r",
        b"\r\nEHLO x\r\n",
        v2(0x11, 0x11, V4),
        v2(0x31, 0x11, V4),
        v2(0x22, 0x11, V4),
        v2(0x2F, 0x11, V4),
        v2(0x01, 0x11, V4),
        v2(0x21, 0x12, V4),
        v2(0x21, 0x22, V6),
        v2(0x21, 0x32, b"\x00" * 216),
        v2(0x21, 0x10, V4),
        v2(0x21, 0x13, V4),
        v2(0x21, 0x41, V4),
        v2(0x21, 0x01, V4),
        v2(0x21, 0xFF, V4),
        v2(0x21, 0x11, V4, 4),
        v2(0x21, 0x11, V4[:11]),
        v2(0x21, 0x21, V4),
        v2(0x21, 0x21, V6[:35]),
        v2(0x21, 0x31, b"\x00" * 215),
        v2(0x21, 0x11, V4, 0xFFFF),
        v2(0x20, 0x00, b"", 0xFFFF),
    ],
)
def test_what_is_not_exactly_a_header_is_a_defect(octets: bytes) -> None:
    defect = three_ways(octets)
    assert isinstance(defect, ProxyDefect), defect
    assert defect.text.isprintable()


# --- Limits ----------------------------------------------------------------------------------------------------------


def test_a_line_of_version_1_is_bounded() -> None:
    for octets in (V1_OCTETS_MAX - 1, V1_OCTETS_MAX):
        line = b"PROXY UNKNOWN ".ljust(octets - 2, b"*") + b"\r\n"
        assert three_ways(line + b"tail") == ProxyHeader(None, 0, b"tail")
    assert isinstance(three_ways(b"PROXY UNKNOWN ".ljust(V1_OCTETS_MAX - 1, b"*") + b"\r\n"), ProxyDefect)
    endless = ProxyParser()
    answers = [endless.feed(octet) for octet in [b"PROXY UNKNOWN "] + [b"*"] * (V1_OCTETS_MAX - len(b"PROXY UNKNOWN "))]
    assert all(answer is NEED for answer in answers[:-1])
    assert isinstance(answers[-1], ProxyDefect)


def test_a_header_of_version_2_is_bounded() -> None:
    for octets in (V2_OCTETS_MAX - 1, V2_OCTETS_MAX):
        header = v2(0x21, 0x11, V4.ljust(octets - 16, b"\x04"))
        assert len(header) == octets
        assert three_ways(header + b"tail") == ProxyHeader(IPv4Address("192.0.2.1"), 40000, b"tail")
    # Refused on its length, before its octets come.
    assert isinstance(three_ways(v2(0x21, 0x11, b"", V2_OCTETS_MAX - 15)), ProxyDefect)
    assert isinstance(three_ways(v2(0x20, 0x00, b"", V2_OCTETS_MAX - 15)), ProxyDefect)


def test_a_length_that_says_more_than_the_addresses_takes_octets_of_nobody() -> None:
    """The proxy's length, not the address family's, says where the client's octets begin."""
    header = v2(0x21, 0x11, V4, len(V4) + 6)
    assert three_ways(header) is NEED
    assert three_ways(header + b"EHLO xQUIT\r\n") == ProxyHeader(IPv4Address("192.0.2.1"), 40000, b"QUIT\r\n")


# --- Against another implementation ----------------------------------------------------------------------------------

PORTS = st.integers(0, 65535)
V4_ENDS = st.tuples(st.ip_addresses(v=4), PORTS)
V6_ENDS = st.tuples(st.ip_addresses(v=6), PORTS)


def expected(result: ProxyResult, tail: bytes) -> ProxyHeader:
    """The same header in our words."""
    if isinstance(result, ProxyResultIPv4 | ProxyResultIPv6):
        address, port = result.source
        mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
        return ProxyHeader(mapped or address, port, tail)
    return ProxyHeader(None, 0, tail)


@given(
    st.one_of(
        st.builds(ProxyResultIPv4, V4_ENDS, V4_ENDS, protocol=st.just(socket.SOCK_STREAM)),
        st.builds(ProxyResultIPv6, V6_ENDS, V6_ENDS, protocol=st.just(socket.SOCK_STREAM)),
    ),
    st.binary(max_size=20),
)
def test_what_another_implementation_writes_is_read(result: ProxyResult, tail: bytes) -> None:
    for writer in (ProxyProtocolV1(), ProxyProtocolV2()):
        octets = writer.pack(result)
        assert three_ways(octets + tail) == expected(result, tail)


def test_what_another_implementation_writes_without_address_is_read() -> None:
    unix = ProxyResultUnix("/run/client", "/run/server", protocol=socket.SOCK_STREAM)
    assert three_ways(ProxyProtocolV2().pack(unix) + b"x") == ProxyHeader(None, 0, b"x")
    assert three_ways(ProxyProtocolV2().pack(ProxyResultUnknown()) + b"x") == ProxyHeader(None, 0, b"x")


LINES = st.one_of(
    st.builds(
        "PROXY {} {} {} {} {}\r\n".format,
        st.sampled_from(["TCP4", "TCP6", "UNKNOWN", "TCP", ""]),
        st.one_of(st.ip_addresses().map(str), st.sampled_from(["1.2.3", "::ffff:1.2.3.4", "01.2.3.4", "::1%x", ""])),
        st.ip_addresses().map(str),
        st.one_of(PORTS.map(str), st.sampled_from(["65536", "-1", "+1", "1_0", "00", ""])),
        PORTS.map(str),
    ).map(str.encode),
    st.builds(
        v2,
        st.sampled_from([0x20, 0x21, 0x22, 0x11]),
        st.sampled_from([0x00, 0x11, 0x21, 0x31, 0x12, 0x41]),
        st.binary(max_size=60),
    ),
    st.binary(max_size=30),
    st.binary(max_size=30).map(lambda octets: b"PROXY " + octets),
    st.binary(max_size=30).map(lambda octets: SIGNATURE + octets),
)


@given(LINES)
@example(b"")
def test_we_never_read_more_into_a_header_than_another_implementation(octets: bytes) -> None:
    ours = three_ways(octets)
    if not isinstance(ours, ProxyHeader) or ours.address is None:
        return
    whole = octets[: len(octets) - len(ours.rest)]
    theirs = (ProxyProtocolV1() if whole.startswith(b"PROXY") else ProxyProtocolV2()).unpack(whole)
    assert ours == expected(theirs, ours.rest)
