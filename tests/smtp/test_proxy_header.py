"""PROXY headers, read back by another implementation and by our own."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxyprotocol.result import ProxyResult
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from gatepost.smtp.preamble import ProxyHeader, ProxyParser
from gatepost.smtp.proxy_header import LOCAL_V2, UNKNOWN_V1, Endpoint, proxy_v1, proxy_v2

V4 = Endpoint(ip_address("192.0.2.7"), 40000)
V6 = Endpoint(ip_address("2001:db8::7"), 65535)
SERVER_V4 = Endpoint(ip_address("127.0.0.1"), 25)
SERVER_V6 = Endpoint(ip_address("::1"), 0)

# An address in ::ffff:0:0/96 is an IPv4 address by the time that it is a client's.
ADDRESSES = st.ip_addresses().filter(lambda address: getattr(address, "ipv4_mapped", None) is None)
ENDPOINTS = st.builds(Endpoint, ADDRESSES, st.integers(0, 65535))


def read(header: bytes) -> ProxyResult:
    """As the other implementation reads it: all of it, and nothing is left."""
    return (ProxyProtocolV1() if header.startswith(b"PROXY") else ProxyProtocolV2()).unpack(header)


@pytest.mark.parametrize(
    ("source", "destination", "line"),
    [
        (V4, SERVER_V4, b"PROXY TCP4 192.0.2.7 127.0.0.1 40000 25\r\n"),
        (V6, SERVER_V6, b"PROXY TCP6 2001:db8::7 ::1 65535 0\r\n"),
        (V4, SERVER_V6, b"PROXY TCP4 192.0.2.7 0.0.0.0 40000 0\r\n"),
        (V6, SERVER_V4, b"PROXY TCP6 2001:db8::7 :: 65535 25\r\n"),
        (V6, None, b"PROXY TCP6 2001:db8::7 :: 65535 0\r\n"),
    ],
)
def test_version_1_is_a_line(source, destination, line):
    assert proxy_v1(source, destination) == line


def test_version_2_is_binary():
    assert proxy_v2(V4, SERVER_V4) == bytes.fromhex("0d0a0d0a 000d0a51 5549540a 21 11 000c c0000207 7f000001 9c40 0019")
    assert proxy_v2(V6, None)[12:16] == bytes.fromhex("21210024")


@pytest.mark.parametrize("make", [proxy_v1, proxy_v2])
@given(source=ENDPOINTS, destination=st.none() | ENDPOINTS)
def test_both_say_who_the_client_is(make, source, destination):
    header = make(source, destination)
    assert len(header) <= 107
    result = read(header)
    assert result.proxied
    assert isinstance(result.source, tuple)
    assert result.source == (source.address, source.port)
    tail = b"EHLO client.test\r\n"
    assert ProxyParser().feed(header + tail) == ProxyHeader(source.address, source.port, tail)


def test_a_look_of_our_own_names_nobody():
    assert not read(LOCAL_V2).proxied
    assert not hasattr(read(UNKNOWN_V1), "source") or read(UNKNOWN_V1).source is None
    assert ProxyParser().feed(LOCAL_V2) == ProxyHeader(None, 0, b"", relayed=False)
    assert ProxyParser().feed(UNKNOWN_V1) == ProxyHeader(None, 0, b"")
