"""What is known of a client: its address is the one it really has."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatepost.facts import Client, Identity, Session, Transaction, client_address
from gatepost.smtp.path import NULL_REVERSE_PATH


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("::FFFF:c000:207", "192.0.2.7"),
        ("0:0:0:0:0:ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8::7", "2001:db8::7"),
        ("2001:DB8:0:0::7", "2001:db8::7"),
        ("fe80::1%eth0", "fe80::1"),
        ("::ffff:10.0.0.1%3", "10.0.0.1"),
        # IPv4 inside IPv6 in other ways is not the IPv4 client: anybody may come from there.
        ("::192.0.2.7", "::c000:207"),
        ("64:ff9b::192.0.2.7", "64:ff9b::c000:207"),
        ("2002:c000:207::", "2002:c000:207::"),
        ("::ffff:0:192.0.2.7", "::ffff:0:c000:207"),
        ("::1", "::1"),
    ],
)
def test_a_client_has_one_address(text: str, address: str) -> None:
    assert client_address(text) == ip_address(address)


@pytest.mark.parametrize(
    "text",
    ["", "localhost", "192.0.2", "192.0.2.07", "192.0.2.256", "0x7f.0.0.1", "2130706433", "192.0.2.7:25", "[::1]",
     "192.0.2.7/32", " 192.0.2.7", "192.0.2.7\n", "١٩٢.0.2.7", "::ffff:192.0.2.7.8", "%eth0", "1::2::3"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="does not appear to be"):
        client_address(text)


@given(st.integers(0, (1 << 32) - 1))
def test_a_mapped_address_is_the_ipv4_address(number: int) -> None:
    mapped = IPv6Address((0xFFFF << 32) + number)
    assert client_address(str(mapped)) == client_address(str(IPv4Address(number))) == IPv4Address(number)


@given(st.integers(0, (1 << 128) - 1).filter(lambda number: number >> 32 != 0xFFFF))
def test_any_other_address_is_itself(number: int) -> None:
    assert client_address(str(IPv6Address(number))) == IPv6Address(number)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        address = client_address(text)
    except ValueError:
        return
    assert address == ip_address(text.partition("%")[0]) or address.version == 4


def test_facts_are_replaced_and_never_changed() -> None:
    session = Session("REF", Client(ip_address("192.0.2.7"), 25), "mx", "mx")
    transaction = Transaction(session, NULL_REVERSE_PATH, 0, 0.0)
    for value, name in ((session, "identity"), (session.client, "address"), (transaction, "recipients")):
        with pytest.raises(AttributeError):
            setattr(value, name, Identity("eve", "PLAIN"))
    after = session._replace(hello="x", esmtp=True)
    assert (session.hello, after.hello) == ("", "x")


def test_a_new_session_claims_nothing() -> None:
    session = Session("REF", Client(ip_address("192.0.2.7"), 25), "mx", "mx")
    assert (session.hello, session.esmtp, session.tls, session.identity) == ("", False, "", None)
    assert (session.hosts, session.auth_required) == ((), False)
