"""Where clients come in, who they are taken for, and what each may do: a live gate, real sockets, real HAProxy.

The backends are scripted ones that remember what they heard; what real servers make of the gate is in test_clients.py.
"""

from __future__ import annotations

import mailbox
import re
import smtplib
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from tests.gatehouse import REPOSITORY, Gate
from tests.real.console import metric, no_faults
from tests.real.mounts import in_place_of, mounted
from tests.real.programs import unjudging
from tests.real.wire import PATIENCE_S, Wire, message, until
from tests.servers import need
from tests.vectors.lenient import LenientBackend, Transaction

from gatepost.config import EMBEDDED_DEFAULT

STRANGER = "127.0.0.9"
TRUSTED = "127.0.0.2"
PROXY = "127.0.0.5"
OUTSIDE = "victim@elsewhere.test"
LOCAL = "bob@example.com"

PLACES = """
[gate]
name = "mx.example.com"
workers = 2

[[listen]]
name = "four"
address = "127.0.0.1:0"

[[listen]]
name = "six"
address = "[::1]:0"

[[listen]]
name = "both"
address = ["127.0.0.1:0", "[::1]:0"]

[[listen]]
name = "proxied"
address = "127.0.0.1:0"
proxy_from = ["127.0.0.5", "127.0.0.6/31"]

[[listen]]
name = "proxied6"
address = "[::1]:0"
proxy_from = ["::1"]

[[listen]]
name = "smtps"
address = "127.0.0.1:0"
tls = "implicit"
proxy_from = ["127.0.0.5"]

[[listen]]
name = "inside"
role = "inside"
address = "127.0.0.1:0"

[domains]
local = ["example.com", "*.example.com"]

[backend.mail]
address = "127.0.0.1:{mail}"

[backend.sales]
address = "127.0.0.1:{sales}"

[backend.lists]
address = "lmtp:127.0.0.1:{lists}"

[backend.kept]
address = "embedded:"

[[route]]
forward_paths = ["*@sales.example.com", "vip@example.com"]
backend = "sales"

[[route]]
forward_paths = ["*@lists.example.com"]
backend = "lists"

[[route]]
forward_paths = ["*@kept.example.com"]
backend = "kept"

[[trust]]
network = "127.0.0.2"
why = "the trusted machine"
owner = "it@example.com"

[[trust]]
network = "203.0.113.7"
why = "a machine behind the proxy"
owner = "it@example.com"

[[trust]]
network = "2001:db8:7::7"
why = "another one"
owner = "it@example.com"

[[trust]]
listen = "inside"
why = "our own machines"
owner = "it@example.com"
forward_paths = ["*@partner.test"]

[[trust]]
network = "127.0.0.8"
why = "moved out"
owner = "it@example.com"
expires = 2020-01-31

[[deny]]
network = "127.0.0.66"
reply = "554 5.7.1 Your complaint of May was heard"
why = "complaint of 12 May"

[[deny]]
helo = "*.spam.test"
why = "calls itself so"

[[deny]]
reverse_path = "*@spam.test"
reply = "550 5.7.1 Not from there"
why = "complaint of 12 May"

[[deny]]
forward_path = "gone@example.com"
reply = "550 5.1.6 She has moved"
why = "left"

[[deny]]
forward_path = "back@example.com"
why = "was on leave"
expires = 2020-01-31

[limits]
sessions_per_minute_per_client = 0

[console]
address = "127.0.0.1:0"
"""


class Places:
    """The gate of this module, and what stands behind it."""

    def __init__(self, gate: Gate, mail: LenientBackend, sales: LenientBackend, lists: LenientBackend) -> None:
        self.gate = gate
        self.mail = mail
        self.sales = sales
        self.lists = lists

    def port(self, name: str, host: str) -> int:
        """Of a listener that has several addresses."""
        ready = next(record for record in self.gate.log() if record.get("event") == "ready")
        for listener in ready["listeners"]:
            at, _, port = listener["address"].rpartition(":")
            if listener["name"] == name and at.strip("[]") == host:
                return int(port)
        raise AssertionError(f"no listener {name} at {host} in {ready}")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Iterator[Places]:
    with ExitStack() as stack:
        mail, sales, lists = (stack.enter_context(LenientBackend("strict")) for _ in range(3))
        config = PLACES.format(mail=mail.port, sales=sales.port, lists=lists.port)
        gate = stack.enter_context(Gate(tmp_path_factory.mktemp("places"), config))
        yield Places(gate, mail, sales, lists)
        no_faults(gate)


def arrived(backend: LenientBackend, subject: str) -> list[Transaction]:
    """The messages with this subject that the backend took."""
    return [taken for taken in backend.transactions() if f"Subject: {subject}\r\n".encode() in taken.octets]


def recipients(taken: Transaction) -> list[bytes]:
    return [recipient.argument.split(b" ")[0] for recipient in taken.recipients]


def relays(wire: Wire) -> bool:
    """Whether this client may send outside; anything but a clear yes or the clear refusal fails."""
    reply = wire.rcpt(OUTSIDE)
    if reply.startswith("250"):
        return True
    assert reply.startswith("550 5.7.1 Relaying is prohibited"), reply
    return False


# ---- addresses and ports


@pytest.mark.parametrize(
    ("name", "host"), [("four", "127.0.0.1"), ("six", "::1"), ("both", "127.0.0.1"), ("both", "::1")]
)
def test_every_address_of_every_listener_takes_mail_for_us_and_nothing_else(places, name, host):
    """Port 0: the line ``ready`` says which port it came to be."""
    subject = f"in at {name} {host}"
    with Wire(places.port(name, host), host, source=STRANGER if host == "127.0.0.1" else "") as wire:
        assert wire.greeting.startswith("220 mx.example.com ")
        assert not relays(wire)
        assert wire.say("RSET").startswith("250")
        assert wire.mail(LOCAL, message(subject)).startswith("250")
        assert wire.say("QUIT").startswith("221")
        assert wire.end() == b""
    [taken] = arrived(places.mail, subject)
    assert recipients(taken) == [b"<bob@example.com>"]
    client = "[127.0.0.9]" if host == "127.0.0.1" else "[IPv6:::1]"
    assert taken.octets.startswith(b"Received: from client.test (%b)\r\n\tby mx.example.com " % client.encode())
    session = places.gate.wait_for_session(lambda record: record["listen"] == name and record["end"] == "quit")
    assert session["transactions"][1]["verdict"] == "accepted"


def test_each_port_0_is_a_port_of_its_own(places):
    ready = next(record for record in places.gate.log() if record.get("event") == "ready")
    ports = [listener["address"].rpartition(":")[2] for listener in ready["listeners"]]
    assert len(set(ports)) == len(ports) == 8
    assert "0" not in ports


def test_trust_by_listener_holds_there_and_nowhere_else(places):
    with Wire(places.gate.ports["inside"], source=STRANGER) as wire:
        assert wire.rcpt("sales@partner.test").startswith("250")
        assert wire.say(f"RCPT TO:<{OUTSIDE}>").startswith("550 5.7.1 ")  # narrowed to partner.test
    with Wire(places.gate.ports["four"], source=STRANGER) as wire:
        assert wire.rcpt("sales@partner.test").startswith("550 5.7.1 Relaying is prohibited [")


def test_a_trusted_address_relays_and_its_neighbours_do_not(places):
    for source, trusted in ((TRUSTED, True), ("127.0.0.1", False), ("127.0.0.3", False)):
        with Wire(places.gate.ports["four"], source=source) as wire:
            assert relays(wire) is trusted


def test_an_expired_grant_is_none_and_the_reply_says_so(places):
    with Wire(places.gate.ports["four"], source="127.0.0.8") as wire:
        reply = wire.rcpt(OUTSIDE)
        assert reply.startswith("550 5.7.1 Relaying is prohibited: the permission has expired [")
        reference = reply.rpartition("[")[2].rstrip("]")
        assert wire.say(f"RCPT TO:<{LOCAL}>").startswith("250")
    record = places.gate.wait_for_session(lambda record: record["client"] == "127.0.0.8")
    [refused, admitted] = record["transactions"][0]["recipients"]
    assert (refused["reference"], refused["reason"]) == (reference, "expired_trust")
    assert refused["by"].rpartition(":")[2] == str(PLACES[: PLACES.index('"127.0.0.8"')].count("\n"))
    assert admitted["verdict"] == "admitted"


# ---- deny


def test_a_denied_network_hears_its_own_reply_whatever_else_is_allowed(places):
    with Wire(places.gate.ports["four"], source="127.0.0.66") as wire:
        wire.hello()
        assert wire.say("MAIL FROM:<a@sender.test>") == "554 5.7.1 Your complaint of May was heard"
        assert wire.say("RCPT TO:<bob@example.com>").startswith("503 ")


def test_a_denied_name_is_refused_with_a_reference(places):
    with Wire(places.gate.ports["four"], source=TRUSTED) as wire:
        wire.hello("mail.SPAM.test")
        reply = wire.say("MAIL FROM:<a@sender.test>")
        assert reply.startswith("550 5.7.1 Refused by the administrator of this server [")
        wire.hello("mail.ham.test")
        assert wire.say("MAIL FROM:<a@sender.test>").startswith("250")


def test_a_denied_reverse_path_hears_its_own_reply(places):
    with Wire(places.gate.ports["four"], source=TRUSTED) as wire:
        wire.hello()
        assert wire.say("MAIL FROM:<a@SPAM.test>") == "550 5.7.1 Not from there"
        assert wire.say("MAIL FROM:<a@sender.test>").startswith("250")


def test_a_denied_forward_path_is_one_recipient_less(places):
    with Wire(places.gate.ports["four"], source=STRANGER) as wire:
        assert wire.rcpt("gone@example.com") == "550 5.1.6 She has moved"
        assert wire.say("RCPT TO:<GONE@EXAMPLE.com>") == "550 5.1.6 She has moved"
        assert wire.say("RCPT TO:<bob@example.com>").startswith("250")
        assert wire.content(message("without her")).startswith("250")
    [taken] = arrived(places.mail, "without her")
    assert recipients(taken) == [b"<bob@example.com>"]


def test_an_expired_denial_denies_nobody(places):
    with Wire(places.gate.ports["four"], source=STRANGER) as wire:
        assert wire.rcpt("back@example.com").startswith("250")


# ---- routes


def test_recipients_of_a_second_route_are_told_to_come_again_and_arrive_then(places):
    """RFC 5321 §4.5.3.1.10: a client sends the recipients that had 452 in another transaction."""
    wanted = [
        "bob@example.com",
        "jane@sales.example.com",
        "alice@example.com",
        "VIP@example.com",
        "l@lists.example.com",
    ]
    transactions = 0
    with Wire(places.gate.ports["four"], source=STRANGER) as wire:
        wire.hello()
        while wanted:
            transactions += 1
            assert wire.say("MAIL FROM:<sender@sender.test>").startswith("250")
            replies = {path: wire.say(f"RCPT TO:<{path}>") for path in wanted}
            later = [path for path, reply in replies.items() if reply.startswith("452 4.5.3 ")]
            assert all(reply.startswith("250") for path, reply in replies.items() if path not in later), replies
            assert wire.content(message("for several")).startswith("250")
            wanted = later
    assert transactions == 3
    [to_mail], [to_sales], [to_lists] = (
        arrived(backend, "for several") for backend in (places.mail, places.sales, places.lists)
    )
    assert recipients(to_mail) == [b"<bob@example.com>", b"<alice@example.com>"]
    assert recipients(to_sales) == [b"<jane@sales.example.com>", b"<VIP@example.com>"]
    assert recipients(to_lists) == [b"<l@lists.example.com>"]


def test_an_lmtp_backend_hears_lhlo_and_one_recipient_a_transaction(places):
    """RFC 2033 §4.2: its replies to content are one a recipient, and ours is one."""
    with Wire(places.gate.ports["four"], source=STRANGER) as wire:
        assert wire.rcpt("one@lists.example.com").startswith("250")
        assert wire.say("RCPT TO:<two@lists.example.com>").startswith("452 4.5.3 ")
        assert wire.content(message("over LMTP")).startswith("250")
        assert wire.mail("two@lists.example.com", message("over LMTP")).startswith("250")
    assert [recipients(taken) for taken in arrived(places.lists, "over LMTP")] == [
        [b"<one@lists.example.com>"],
        [b"<two@lists.example.com>"],
    ]
    greeted = [heard.line for heard in places.lists.heard() if heard.line[:4].upper() in (b"EHLO", b"HELO", b"LHLO")]
    assert set(greeted) == {b"LHLO mx.example.com"}


def test_a_route_to_the_embedded_mailbox(places):
    with Wire(places.gate.ports["four"], source=STRANGER) as wire:
        wire.hello()
        assert wire.mail("archive@kept.example.com", message("kept")).startswith("250")
    maildir = places.gate.directory / "gatepost-data" / "mail" / "kept.example.com" / "archive"
    [kept] = mailbox.Maildir(maildir, create=False)
    assert kept["Subject"] == "kept"
    assert not arrived(places.mail, "kept")


# ---- the PROXY protocol


def v1(source: str, destination: str = "127.0.0.1") -> bytes:
    family = "TCP6" if ":" in source else "TCP4"
    return f"PROXY {family} {source} {destination} 40001 25\r\n".encode()


def v2(source: str, destination: str = "127.0.0.1", extra: bytes = b"") -> bytes:
    """Version 2, command PROXY, over TCP; ``extra`` are type-length-values."""
    address = ip_address(source)
    block = address.packed + ip_address(destination).packed + struct.pack(">HH", 40001, 25) + extra
    family = 0x11 if address.version == 4 else 0x21
    return b"\r\n\r\n\0\r\nQUIT\n" + struct.pack(">BBH", 0x21, family, len(block)) + block


V2_LOCAL = b"\r\n\r\n\0\r\nQUIT\n" + struct.pack(">BBH", 0x20, 0, 0)
V2_UNSPECIFIED = b"\r\n\r\n\0\r\nQUIT\n" + struct.pack(">BBH", 0x21, 0, 0)


@pytest.mark.parametrize("header", [v1, v2])
@pytest.mark.parametrize(
    ("client", "destination", "trusted"),
    [
        ("127.0.0.2", "127.0.0.1", True),
        ("203.0.113.7", "192.0.2.1", True),
        ("203.0.113.8", "192.0.2.1", False),
        ("127.0.0.5", "127.0.0.1", False),
        ("2001:db8:7::7", "2001:db8::1", True),
        ("2001:db8:7::8", "2001:db8::1", False),
        ("::ffff:127.0.0.2", "::ffff:127.0.0.1", True),
        ("::ffff:203.0.113.7", "::ffff:192.0.2.1", True),
        ("::ffff:203.0.113.8", "::ffff:192.0.2.1", False),
    ],
)
def test_behind_a_listed_proxy_the_client_named_by_it_decides(places, header, client, destination, trusted):
    with Wire(places.gate.ports["proxied"], source=PROXY, first=header(client, destination)) as wire:
        assert relays(wire) is trusted
        assert wire.say("QUIT").startswith("221")
    shown = client.removeprefix("::ffff:")
    places.gate.wait_for_session(lambda record: record["listen"] == "proxied" and record["client"] == shown)


def test_a_proxy_over_ipv6_and_one_out_of_a_network(places):
    with Wire(places.gate.ports["proxied6"], "::1", first=v2("127.0.0.2")) as wire:
        assert relays(wire)
    with Wire(places.gate.ports["proxied"], source="127.0.0.7", first=v1("127.0.0.2")) as wire:
        assert relays(wire)


def test_type_length_values_are_passed_over(places):
    extra = b"\x01\x00\x02h2" + b"\x04\x00\x10" + bytes(16)
    with Wire(places.gate.ports["proxied"], source=PROXY, first=v2("127.0.0.2", extra=extra)) as wire:
        assert relays(wire)


def test_a_header_may_come_octet_by_octet(places):
    for header in (v1("203.0.113.7"), v2("203.0.113.7")):
        with Wire(places.gate.ports["proxied"], source=PROXY, greeted=False) as wire:
            for octet in header:
                wire.send(bytes([octet]))
            assert wire.reply().startswith("220 ")
            assert relays(wire)


def test_a_listed_proxy_must_say_who_the_client_is(places):
    """Whatever it says in its place: the session ends, and the proxy's own address is nobody's passport."""
    for first in (
        b"EHLO client.test\r\n",
        b"PROXY UNKNOWN\r\n",
        V2_UNSPECIFIED,
        b"PROXY TCP4 127.0.0.2 127.0.0.1 40001\r\n",
        b"PROXY TCP4 127.0.0.02 127.0.0.1 40001 25\r\n",
        b"proxy TCP4 127.0.0.2 127.0.0.1 40001 25\r\n",
        b"\r\n\r\n\0\r\nQUIT\n\x31\x11\0\x0c" + bytes(12),
    ):
        with Wire(places.gate.ports["proxied"], source=PROXY, first=first, greeted=False) as wire:
            assert wire.reply() == "421 4.3.0 The PROXY header is missing or wrong; closing", first
            assert wire.end() == b""


def test_a_proxy_that_checks_our_health_speaks_for_itself(places):
    """Version 2, LOCAL: no client is connected, and the proxy has the rights of its own address: none here."""
    with Wire(places.gate.ports["proxied"], source=PROXY, first=V2_LOCAL) as wire:
        assert wire.greeting.startswith("220 ")
        assert not relays(wire)


def test_from_anybody_else_a_header_is_refused(places):
    """An unlisted address that claims a trusted one: on a listener with proxies, and on one without."""
    for name, source in (("proxied", STRANGER), ("four", PROXY), ("four", STRANGER), ("proxied", TRUSTED)):
        for header in (v1("127.0.0.2"), v2("127.0.0.2")):
            with Wire(places.gate.ports[name], source=source, first=header, greeted=False) as wire:
                said = wire.end()
            assert b"250" not in said, (name, source, said)
            assert said.rpartition(b"\r\n")[0].rpartition(b"\r\n")[2].startswith((b"554 ", b"500 ")), said


def test_a_client_of_a_listener_with_proxies_needs_no_header_if_it_is_none(places):
    with Wire(places.gate.ports["proxied"], source=TRUSTED) as wire:
        assert relays(wire)
    with Wire(places.gate.ports["proxied"], source=STRANGER) as wire:
        assert not relays(wire)


# ---- real HAProxy

HAPROXY = """
defaults
  mode tcp
  timeout connect 30s
  timeout client 60s
  timeout server 60s
listen v1
  bind fd@{v1}
  server gate 127.0.0.1:{port} send-proxy source 127.0.0.5
listen v2
  bind fd@{v2}
  server gate 127.0.0.1:{port} send-proxy-v2 source 127.0.0.5
listen without
  bind fd@{without}
  server gate 127.0.0.1:{port} source 127.0.0.5
listen unlisted
  bind fd@{unlisted}
  server gate 127.0.0.1:{port} send-proxy-v2 source 127.0.0.10
listen smtps
  bind fd@{smtps}
  server gate 127.0.0.1:{smtps_port} send-proxy-v2 source 127.0.0.5
"""


@pytest.fixture(scope="module")
def haproxy(places, tmp_path_factory) -> Iterator[dict[str, int]]:
    """HAProxy in front of the listener "proxied": the ports of its ways in, IPv4 and IPv6 alike."""
    program = need("haproxy")
    config = tmp_path_factory.mktemp("haproxy") / "haproxy.cfg"
    with ExitStack() as stack:
        # Its sockets are made here, so that no port can be taken by somebody else meanwhile.
        ways = {
            name: stack.enter_context(socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True))
            for name in ("v1", "v2", "without", "unlisted", "smtps")
        }
        numbers = {name: way.fileno() for name, way in ways.items()}
        ports = places.gate.ports
        config.write_text(HAPROXY.format(port=ports["proxied"], smtps_port=ports["smtps"], **numbers))
        process = subprocess.Popen(
            [program, "-db", "-f", config], pass_fds=tuple(numbers.values()), stdin=subprocess.DEVNULL
        )
        stack.callback(process.wait)
        stack.callback(process.terminate)
        yield {name: way.getsockname()[1] for name, way in ways.items()}


@pytest.mark.parametrize("way", ["v1", "v2"])
def test_behind_haproxy_the_client_decides_who_may_relay(haproxy, places, way):
    """An IPv4 client of HAProxy's IPv6 socket is named as ::ffff:127.0.0.2, and is 127.0.0.2."""
    with Wire(haproxy[way], source=TRUSTED) as wire:
        assert relays(wire)
    with Wire(haproxy[way], source=STRANGER) as wire:
        assert not relays(wire)
        assert wire.say("RSET").startswith("250")
        assert wire.mail(LOCAL, message(f"through haproxy {way}")).startswith("250")
    with Wire(haproxy[way], "::1") as wire:
        assert not relays(wire)
    [taken] = arrived(places.mail, f"through haproxy {way}")
    assert taken.octets.startswith(b"Received: from client.test ([127.0.0.9])\r\n")


def test_haproxy_without_a_header_or_without_a_listing_is_refused(haproxy):
    with Wire(haproxy["without"], source=TRUSTED, first=b"EHLO client.test\r\n", greeted=False) as wire:
        assert wire.end() == b"421 4.3.0 The PROXY header is missing or wrong; closing\r\n"
    with Wire(haproxy["unlisted"], source=TRUSTED, greeted=False) as wire:
        said = wire.end()
        assert said.rpartition(b"\r\n")[0].rpartition(b"\r\n")[2].startswith((b"554 ", b"500 ")), said


# ---- TLS from the first octet


def over_tls(port: int, source: str, subject: str) -> None:
    """Mail for us passes and a relay does not, as Python's SMTP_SSL sees it."""
    with smtplib.SMTP_SSL(
        "127.0.0.1", port, "client.test", timeout=PATIENCE_S, source_address=(source, 0), context=unjudging()
    ) as client:
        assert "starttls" not in client.esmtp_features
        assert client.sendmail("sender@sender.test", LOCAL, message(subject)) == {}
        client.mail("sender@sender.test")
        code, text = client.rcpt(OUTSIDE)
        if source == TRUSTED:
            assert code == 250, text
        else:
            assert (code, text.rpartition(b"[")[0]) == (550, b"5.7.1 Relaying is prohibited ")


def test_tls_from_the_first_octet(places):
    """RFC 8314 §3.3.  The client speaks first, at once."""
    for number in range(5):
        over_tls(places.gate.ports["smtps"], STRANGER, f"smtps {number}")
        [taken] = arrived(places.mail, f"smtps {number}")
        assert b"with ESMTPS id" in taken.octets.split(b"\r\n")[1]


def test_tls_from_the_first_octet_behind_haproxy(haproxy, places):
    for source in (STRANGER, TRUSTED):
        over_tls(haproxy["smtps"], source, f"smtps behind haproxy {source}")
        [taken] = arrived(places.mail, f"smtps behind haproxy {source}")
        assert taken.octets.startswith(b"Received: from client.test ([%b])\r\n" % source.encode())


@pytest.mark.parametrize("header", [v1, v2])
def test_a_header_and_the_client_hello_may_come_in_one_packet(places, header):
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = unjudging().wrap_bio(incoming, outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    first = header("203.0.113.7") + outgoing.read()

    with Wire(places.gate.ports["smtps"], source=PROXY, first=first, greeted=False) as wire:

        def talk(step: Callable[[], bytes | None]) -> bytes | None:
            while True:
                try:
                    return step()
                except ssl.SSLWantReadError:
                    pass
                finally:
                    wire.send(outgoing.read())
                octets = wire.receive()
                assert octets, "the gate hung up"
                incoming.write(octets)

        def reply(command: bytes) -> bytes:
            tls.write(command)
            return talk(partial(tls.read, 1000)) or b""

        talk(tls.do_handshake)
        assert reply(b"").startswith(b"220 mx.example.com ")
        assert reply(b"EHLO client.test\r\n").startswith(b"250-mx.example.com\r\n")
        assert reply(b"MAIL FROM:<a@sender.test>\r\n").startswith(b"250 ")
        assert reply(b"RCPT TO:<victim@elsewhere.test>\r\n").startswith(b"250 ")


def test_plain_text_where_tls_is_expected_hears_no_smtp(places):
    for source, first in ((STRANGER, b""), (PROXY, v1("127.0.0.2")), (PROXY, v2("127.0.0.2"))):
        octets = first + b"EHLO client.test\r\nMAIL FROM:<a@sender.test>\r\n"
        with Wire(places.gate.ports["smtps"], source=source, first=octets, greeted=False) as wire:
            assert b"220" not in wire.end()


# ---- limits

LIMITED = """
[gate]
name = "mx.example.com"
workers = 2

[[listen]]
name = "mx"
address = ["127.0.0.1:0", "[::1]:0"]
proxy_from = ["127.0.0.5"]

[domains]
local = ["example.com"]

[backend.mail]
address = "127.0.0.1:{mail}"

[[trust]]
host = "printer.localhost"
why = "a machine with a name"
owner = "it@example.com"

[limits]
sessions = 6
sessions_per_client = 3
sessions_per_minute_per_client = 0
errors_per_session = 4
recipients_per_message = 3
message_size = "4 KiB"

[console]
address = "127.0.0.1:0"
"""


@pytest.fixture(scope="module")
def limited(tmp_path_factory) -> Iterator[Gate]:
    with (
        LenientBackend("strict") as mail,
        Gate(tmp_path_factory.mktemp("limited"), LIMITED.format(mail=mail.port)) as gate,
    ):
        yield gate
        no_faults(gate)


@pytest.fixture
def empty(limited) -> Gate:
    """The gate without any session."""
    until(lambda: metric(limited, "gatepost_sessions") == 0, "the sessions of the test before have ended")
    return limited


def test_one_client_has_so_many_sessions_and_not_one_more(empty):
    with ExitStack() as stack:
        first, *_ = [stack.enter_context(Wire(empty.port, source="127.0.0.11")) for _ in range(3)]
        for _ in range(2):
            with Wire(empty.port, source="127.0.0.11") as fourth:
                assert fourth.greeting == "421 4.7.0 Too many sessions from your address, try again later"
                assert fourth.end() == b""
        with Wire(empty.port, source="127.0.0.12") as another:
            assert another.greeting.startswith("220 ")
        assert first.say("QUIT").startswith("221")
        assert first.end() == b""

        def is_taken() -> bool:
            with Wire(empty.port, source="127.0.0.11") as again:
                return again.greeting.startswith("220 ")

        until(is_taken, "a place is free for the client again")


def test_clients_behind_one_proxy_are_counted_one_by_one(empty):
    with ExitStack() as stack:
        for client in ("192.0.2.1", "192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2", "192.0.2.3"):
            destination = "::1" if ":" in client else "127.0.0.1"
            wire = stack.enter_context(Wire(empty.port, source=PROXY, first=v1(client, destination)))
            assert wire.greeting.startswith("220 "), client
        with Wire(empty.port, source=PROXY, first=v2("192.0.2.1")) as fourth:
            assert fourth.greeting.startswith("421 4.7.0 ")


def test_an_ipv6_client_is_its_slash_64(empty):
    with ExitStack() as stack:
        for last in range(3):
            stack.enter_context(Wire(empty.port, source=PROXY, first=v2(f"2001:db8::{last:x}:1", "::1")))
        with Wire(empty.port, source=PROXY, first=v2("2001:db8::ffff:ffff:ffff:ffff", "::1")) as fourth:
            assert fourth.greeting.startswith("421 4.7.0 ")
        with Wire(empty.port, source=PROXY, first=v2("2001:db8:0:1::1", "::1")) as neighbour:
            assert neighbour.greeting.startswith("220 ")


def test_all_together_have_so_many_sessions_and_not_one_more(empty):
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(empty.port, source=f"127.0.1.{number}")) for number in range(1, 7)]
        assert all(wire.greeting.startswith("220 ") for wire in wires)
        with Wire(empty.port, source="127.0.1.7") as seventh:
            assert seventh.greeting == "421 4.3.2 Too many sessions, try again later"
            assert seventh.end() == b""
        assert wires[0].rcpt(LOCAL).startswith("250")


def test_a_session_ends_with_its_last_error(empty):
    with Wire(empty.port, source=STRANGER) as wire:
        wire.hello()
        assert wire.say("MAIL FROM:<sender@sender.test>").startswith("250")
        for _ in range(3):
            assert wire.say(f"RCPT TO:<{OUTSIDE}>").startswith("550 5.7.1 ")
        assert wire.say("NOOP").startswith("250")
        assert wire.say("BOGUS").startswith("500 ")
        assert wire.reply() == "421 4.7.0 Too many errors; closing"
        assert wire.end() == b""
    record = empty.wait_for_session(lambda record: record["end"] == "too many errors")
    assert record["errors"] == 4


def test_the_fourth_of_three_recipients_is_for_another_transaction(empty):
    with Wire(empty.port, source=STRANGER) as wire:
        assert wire.rcpt("a@example.com").startswith("250")
        for path in ("b@example.com", "c@example.com"):
            assert wire.say(f"RCPT TO:<{path}>").startswith("250")
        assert wire.say("RCPT TO:<d@example.com>").startswith("452 4.5.3 ")
        assert wire.content(message("three")).startswith("250")
        assert wire.mail("d@example.com", message("the fourth")).startswith("250")


def test_a_message_may_have_just_its_size(empty):
    line = b"x" * 62 + b"\r\n"
    with Wire(empty.port, source=STRANGER) as wire:
        assert "250-SIZE 4096\n" in wire.hello() + "\n"
        assert wire.say("MAIL FROM:<sender@sender.test> SIZE=4097").startswith("552 5.3.4 ")
        assert wire.say("MAIL FROM:<sender@sender.test> SIZE=4096").startswith("250")
        assert wire.say(f"RCPT TO:<{LOCAL}>").startswith("250")
        assert wire.content(b"\r\n" + b"x" * 60 + b"\r\n" + line * 63).startswith("250")
        assert wire.mail(LOCAL, b"\r\n" + b"x" * 61 + b"\r\n" + line * 63).startswith("552 5.3.4 ")


def test_trust_by_host_name_is_trust_of_its_addresses(empty):
    """RFC 6761 §6.3: names below localhost are this host, in IPv4 and IPv6."""
    for host, source, trusted in (("127.0.0.1", "127.0.0.1", True), ("::1", "", True), ("127.0.0.1", STRANGER, False)):
        port = empty.port if host == "127.0.0.1" else port_of(empty, host)
        with Wire(port, host, source=source) as wire:
            assert relays(wire) is trusted, (host, source)


def port_of(gate: Gate, host: str) -> int:
    ready = next(record for record in gate.log() if record.get("event") == "ready")
    addresses = [listener["address"].rpartition(":") for listener in ready["listeners"]]
    return next(int(port) for at, _, port in addresses if at.strip("[]") == host)


# ---- DNS

NAMED = """
[gate]
name = "mx.example.com"
workers = 2

[[listen]]
name = "mx"
address = "127.0.0.1:0"
proxy_from = ["127.0.0.5"]

[domains]
local = ["example.com"]

[backend.mail]
address = "embedded:"

[[trust]]
host = "office.dyn.test"
why = "the office, whose address moves"
owner = "it@example.com"

[[trust]]
host = "self.dyn.test"
why = "a name that says it is this host"
owner = "it@example.com"

[[trust]]
host = "silent.dyn.test"
why = "a name whose server fails"
owner = "it@example.com"

[[deny]]
host = "bad.dyn.test"
why = "a name that is not wanted"

[console]
address = "127.0.0.1:0"
"""


@contextmanager
def nameserver(zone: dict[tuple[str, str], str]) -> Iterator[tuple[str, int]]:
    """A DNS server that knows (name, type) and answers everything else with SERVFAIL."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            octets, client = server.recvfrom(4096)
            if not octets:
                return
            query = dns.message.from_wire(octets)
            question = query.question[0]
            name, kind = question.name.to_text(omit_final_dot=True).lower(), dns.rdatatype.to_text(question.rdtype)
            response = dns.message.make_response(query)
            response.flags |= dns.flags.RA
            if not any(known == name for known, _ in zone):
                response.set_rcode(dns.rcode.SERVFAIL)
            elif (name, kind) in zone:
                response.answer.append(dns.rrset.from_text(question.name, 300, "IN", kind, *zone[name, kind].split()))
            server.sendto(response.to_wire(), client)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    host, port = server.getsockname()
    try:
        yield host, port
    finally:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            end.sendto(b"", (host, port))
        thread.join()
        server.close()


def test_trust_by_dns_name_is_trust_of_what_dns_says(tmp_path):
    zone = {
        ("office.dyn.test", "A"): "203.0.113.50 203.0.113.51",
        ("office.dyn.test", "AAAA"): "2001:db8::50",
        ("self.dyn.test", "A"): "127.0.0.1",
        ("bad.dyn.test", "A"): "203.0.113.66",
    }
    with nameserver(zone) as (host, port):
        resolv_conf = tmp_path / "resolv.conf"
        resolv_conf.write_text(f"nameserver {host}:{port}\n")
        within = mounted(in_place_of(Path("/etc/resolv.conf"), resolv_conf))
        with Gate(tmp_path, NAMED, within=within) as gate:
            for client, trusted in (
                ("203.0.113.50", True),
                ("203.0.113.51", True),
                ("2001:db8::50", True),
                ("203.0.113.52", False),
                ("127.0.0.1", False),  # dead dynamic names point there, and every local program comes from there
            ):
                with Wire(gate.port, source=PROXY, first=v2(client, "::1" if ":" in client else "127.0.0.1")) as wire:
                    reply = wire.rcpt(OUTSIDE)
                if trusted:
                    assert reply.startswith("550 5.1.2 "), reply  # admitted: it is the mailbox that keeps no such mail
                else:
                    assert reply.startswith("550 5.7.1 Relaying is prohibited ["), reply
            with Wire(gate.port, source=PROXY, first=v2("203.0.113.66")) as wire:
                wire.hello()
                reply = wire.say("MAIL FROM:<a@sender.test>")
                assert reply.startswith("550 5.7.1 Refused by the administrator of this server [")


# ---- time

IMPATIENT = """
[gate]
name = "mx.example.com"
workers = 1

[[listen]]
name = "mx"
address = "127.0.0.1:0"
proxy_from = ["127.0.0.5"]
tls = "starttls"

[domains]
local = ["example.com"]

[backend.mail]
address = "127.0.0.1:{mail}"

[timeouts]
command = "1s"
content_block = "3s"
proxy_header = "1s"
tls_handshake = "1s"

[console]
address = "127.0.0.1:0"
"""


@pytest.fixture(scope="module")
def impatient(tmp_path_factory) -> Iterator[tuple[Gate, LenientBackend]]:
    with (
        LenientBackend("strict") as mail,
        Gate(tmp_path_factory.mktemp("impatient"), IMPATIENT.format(mail=mail.port)) as gate,
    ):
        yield gate, mail
        no_faults(gate)


TIMEOUT = "421 4.4.2 Timeout; closing"


def test_who_says_nothing_is_told_so_at_last(impatient):
    gate, mail = impatient
    with (
        Wire(gate.port, source="127.0.0.21") as silent,
        Wire(gate.port, source="127.0.0.22") as mid_line,
        Wire(gate.port, source="127.0.0.23") as in_content,
        Wire(gate.port, source="127.0.0.24") as in_chunk,
        Wire(gate.port, source=PROXY, greeted=False) as proxy,
        Wire(gate.port, source="127.0.0.25") as handshaker,
    ):
        mid_line.send(b"EHLO cli")
        in_content.rcpt(LOCAL)
        assert in_content.say("DATA").startswith("354")
        in_content.send(message("never finished"))
        in_chunk.rcpt(LOCAL)
        in_chunk.send(b"BDAT 1000\r\n" + message("never finished"))
        handshaker.hello()
        assert handshaker.say("STARTTLS").startswith("220")
        assert silent.reply() == TIMEOUT
        assert mid_line.reply() == TIMEOUT
        assert in_content.reply() == TIMEOUT
        assert in_chunk.reply() == TIMEOUT
        assert proxy.reply() == "421 4.3.0 The PROXY header is missing or wrong; closing"
        for wire in (silent, mid_line, in_content, in_chunk, proxy, handshaker):
            assert wire.end() == b""
    for last in (21, 22, 23, 24):
        record = gate.wait_for_session(lambda record, last=last: record["client"] == f"127.0.0.{last}")
        assert record["end"] == "timeout"
    assert not arrived(mail, "never finished")


def test_who_is_slow_but_goes_on_is_waited_for(impatient):
    """The time is for the next block of content, not for all of it."""
    gate, mail = impatient
    with Wire(gate.port, source="127.0.0.26") as wire:
        wire.rcpt(LOCAL)
        assert wire.say("DATA").startswith("354")
        began_s = time.monotonic()
        while time.monotonic() < began_s + 3.5:
            wire.send(b"X-Slow: yes\r\n")
            time.sleep(0.1)
        wire.send(b"Subject: slow\r\n\r\n.\r\n")
        assert wire.reply().startswith("250")
    assert len(arrived(mail, "slow")) == 1


# ---- the embedded default


REFERENCE = re.compile(r"\[[0-9A-HJKMNP-TV-Z]{8}-\d+\]")


def comparable(reply: str) -> str:
    """A reply without what differs from session to session."""
    return REFERENCE.sub("[REF]", reply)


def readme_dialogue() -> list[tuple[str, str]]:
    """The dialogue that the README shows a newcomer: (command, reply)."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"\$ telnet 127\.0\.0\.1 2525\n(.+?)```", readme, re.DOTALL)
    assert lines is not None, "the README shows no dialogue"
    _, *rest = greeting, *_ = lines[1].splitlines()
    return [("", greeting), *zip(rest[::2], rest[1::2], strict=True)]


def test_the_readmes_dialogue_is_what_a_newcomer_sees(tmp_path):
    """The embedded default, but for its ports; the mail is in a Maildir that Python can read."""
    default = re.sub(rb'"127\.0\.0\.1:\d+"', b'"127.0.0.1:0"', EMBEDDED_DEFAULT).decode()
    dialogue = readme_dialogue()
    with Gate(tmp_path, default) as gate, Wire(gate.port) as wire:
        name, shown = wire.greeting.split()[1], dialogue[0][1].split()[1]
        seen = [wire.greeting, *(wire.type(command) for command, _ in dialogue[1:])]
        promised = [reply.replace(shown, name) for _, reply in dialogue]
        assert [comparable(line) for line in seen] == [comparable(line) for line in promised]
        octets = message("first mail", "hello\r\n.\r\n..two dots")
        assert wire.content(octets).startswith("250")
        assert wire.say("QUIT").startswith("221")
        maildir = mailbox.Maildir(tmp_path / "gatepost-data" / "mail" / "example.com" / "postmaster", create=False)
        [(key, kept)] = maildir.items()
        assert kept["Subject"] == "first mail"
        assert kept["Return-Path"] == "<me@elsewhere.test>"
        head = maildir.get_bytes(key).removesuffix(octets)
        assert re.fullmatch(rb"Return-Path: [^\n]+\nReceived: [^\n]+\n([ \t][^\n]+\n)*", head)
        record = gate.wait_for_session(lambda record: record["end"] == "quit")
    refused = record["transactions"][0]["recipients"][0]
    assert f"[{refused['reference']}]" in seen[3]
    assert (refused["verdict"], refused["reason"]) == ("refused", "relaying")
