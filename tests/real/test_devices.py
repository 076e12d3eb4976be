"""Printers, scanners, ERP systems and their like, each with a passport of its own: one [[trust]] entry by its address.

Why: these devices cannot be mended.  What each of them does that no mail program would do is done here as it does it,
    at a live gate, and what arrives behind the gate is what a careful server takes.
Promise: what one device may do, no other address may.
"""

from __future__ import annotations

import base64
import re
import ssl
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.gatehouse import Gate
from tests.real.console import no_faults
from tests.real.openssl import converse
from tests.real.test_logins import account
from tests.real.wire import Wire, until
from tests.vectors.lenient import LenientBackend, Transaction

STRANGER = "127.0.0.9"
NAMELESS = "127.0.0.31"
LF_ONLY = "127.0.0.32"
OLD_TLS = "127.0.0.33"
FIXED_SENDER = "127.0.0.34"
FIXED_RECIPIENT = "127.0.0.35"
FEW_MESSAGES = "127.0.0.36"
FEW_RECIPIENTS = "127.0.0.37"
PATIENT = "127.0.0.38"
PLAIN_SCANNER = "127.0.0.39"

OUTSIDE = "friend@elsewhere.test"
LOCAL = "bob@example.com"
SECRET = "a long enough secret"
COMMAND_S = 3
MESSAGES_ON_ONE_CONNECTION = 2_000
GROWTH_OCTETS_MAX = 8 << 20

CONFIG = f"""
[gate]
name = "mx.example.com"
workers = 1

[[listen]]
name = "mx"
address = "127.0.0.1:0"
tls = "starttls"

[[listen]]
name = "login"
address = "127.0.0.1:0"
auth = "offered"
auth_without_tls = true

[domains]
local = ["example.com"]

[backend.mail]
address = "127.0.0.1:{{port}}"
tls = "off"

[[trust]]
network = "{NAMELESS}"
why = "the meter that does not know its name"
owner = "it@example.com"

[[trust]]
network = "{LF_ONLY}"
why = "the ERP system, which ends lines with LF"
owner = "it@example.com"
bare_newlines = "normalise"

[[trust]]
network = "{OLD_TLS}"
why = "the copier of 2009"
owner = "it@example.com"
tls_minimum = "1.0"

[[trust]]
network = "{FIXED_SENDER}"
why = "the printer on the second floor"
owner = "it@example.com"
reverse_paths = ["printer2@example.com"]

[[trust]]
network = "{FIXED_RECIPIENT}"
why = "the alarm, which writes to the guard alone"
owner = "it@example.com"
forward_paths = ["*@guard.test"]

[[trust]]
network = "{FEW_MESSAGES}"
why = "the shop"
owner = "it@example.com"
messages_per_hour = 3

[[trust]]
network = "{FEW_RECIPIENTS}"
why = "the newsletter of the canteen"
owner = "it@example.com"
recipients_per_hour = 4

[[trust]]
network = "{PATIENT}"
why = "the monitoring, which never hangs up"
owner = "it@example.com"

[[trust]]
network = "{PLAIN_SCANNER}"
why = "the scanner"
owner = "it@example.com"

[[trust]]
accounts = ["*"]
why = "devices that can log in"

[[trust]]
accounts = ["erp@example.com"]
why = "the ERP system, which ends lines with LF"
bare_newlines = "normalise"

[timeouts]
command = "{COMMAND_S}s"

[limits]
messages_per_hour_per_mailbox = 0
sessions_per_minute_per_client = 0

[console]
address = "127.0.0.1:0"
"""


class Site(NamedTuple):
    """A gate whose devices have passports, and what arrives behind it."""

    gate: Gate
    backend: LenientBackend
    device_secret: str

    def wire(self, source: str) -> Wire:
        return Wire(self.gate.port, source=source)

    def arrived(self, subject: str) -> list[Transaction]:
        return [one for one in self.backend.transactions() if f"Subject: {subject}\r\n".encode() in one.octets]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    with LenientBackend("strict") as backend:
        gate = Gate(tmp_path_factory.mktemp("devices"), CONFIG.format(port=backend.port))
        for name in ("scanner@example.com", "erp@example.com"):
            added = account(gate, "add", name, "--password-stdin", typed=f"{SECRET}\n")
            assert added.returncode == 0, added.stderr
        made = account(gate, "device", "add", "scanner@example.com", "second floor", "--json")
        assert made.returncode == 0, made.stderr
        secret = re.search(r'"password": ?"([^"]+)"', made.stdout)
        assert secret is not None
        with gate:
            yield Site(gate, backend, secret[1])
        no_faults(gate)


def scan(subject: str) -> bytes:
    """What a device sends: no Date, no Message-ID."""
    return f"From: scanner <scanner@example.com>\r\nSubject: {subject}\r\n\r\nscanned\r\n".encode()


def content_of(transaction: Transaction) -> bytes:
    """What arrived, without the gate's own trace field."""
    octets = transaction.octets
    trace = re.match(rb"Received:[^\r\n]*\r\n(?:[ \t][^\r\n]*\r\n)*", octets)
    assert trace is not None
    return octets[trace.end() :]


# ---- names


@pytest.mark.parametrize("verb", ["EHLO", "HELO", "ehlo ", "HELO  "])
def test_a_device_may_have_no_name(site, verb):
    subject = f"nameless {len(verb)} {verb[0]}{verb[1]}"
    with site.wire(NAMELESS) as wire:
        assert wire.say(verb).startswith("250"), wire.said
        assert wire.mail(OUTSIDE, scan(subject)).startswith("250")
    (taken,) = site.arrived(subject)
    assert content_of(taken) == scan(subject)


@pytest.mark.parametrize("verb", ["EHLO", "HELO"])
def test_a_stranger_says_its_name(site, verb):
    with site.wire(STRANGER) as wire:
        assert wire.say(verb).startswith("501 "), wire.said
        assert wire.say("MAIL FROM:<a@sender.test>").startswith("503")


# ---- lines


def test_lines_that_end_in_lf_arrive_with_crlf(site):
    with site.wire(LF_ONLY) as wire:
        for line, code in (
            (b"EHLO erp\n", "250"),
            (b"MAIL FROM:<erp@example.com>\n", "250"),
            (b"RCPT TO:<friend@elsewhere.test>\n", "250"),
            (b"DATA\n", "354"),
        ):
            wire.send(line)
            assert wire.reply().startswith(code), wire.said
        wire.send(b"Subject: lines\n\none\n..two\n...\nthree\r\n.\r\n")
        assert wire.reply().startswith("250"), wire.said
        wire.send(b"QUIT\n")
        assert wire.reply().startswith("221")
    (taken,) = site.arrived("lines")
    assert content_of(taken) == b"Subject: lines\r\n\r\none\r\n.two\r\n..\r\nthree\r\n"


def test_a_dot_between_bare_lfs_is_text_even_of_a_device(site):
    """Otherwise whoever feeds text into the device could end its message, and begin another one."""
    with site.wire(LF_ONLY) as wire:
        assert wire.rcpt(OUTSIDE).startswith("250")
        assert wire.say("DATA").startswith("354")
        wire.send(b"Subject: dots\n\nbefore\n.\nMAIL FROM:<boss@example.com>\nRCPT TO:<all@example.com>\n")
        assert wire.quiet()
        wire.send(b"\r\n.\r\n")
        assert wire.reply().startswith("250")
        assert wire.say("NOOP").startswith("250")
    (taken,) = site.arrived("dots")
    assert content_of(taken).startswith(b"Subject: dots\r\n\r\nbefore\r\n\r\nMAIL FROM:<boss@example.com>\r\nRCPT TO:")
    assert b"boss" not in b"".join(one.reverse_path for one in site.backend.transactions())


@pytest.mark.parametrize("source", [STRANGER, PLAIN_SCANNER])
def test_nobody_else_ends_lines_with_lf(site, source):
    with site.wire(source) as wire:
        wire.send(b"EHLO client.test\n")
        assert wire.reply().startswith("500 5.5.2"), wire.said
        assert wire.end() == b""
    with site.wire(source) as wire:
        assert wire.rcpt(LOCAL).startswith("250")
        assert wire.content(b"Subject: bare\n\none\n\r\n").startswith("550 5.6.0"), wire.said
    assert not site.arrived("bare")


# ---- TLS


def of_2009() -> ssl.SSLContext:
    """TLS 1.0 and nothing newer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


def test_the_old_copier_speaks_tls_1_0(site):
    with site.wire(OLD_TLS) as wire:
        wire.hello("copier")
        assert wire.start_tls(of_2009()) == "TLSv1"
        wire.hello("copier")
        assert wire.mail(OUTSIDE, scan("from 2009")).startswith("250"), wire.said
        assert wire.say("QUIT").startswith("221")
    assert len(site.arrived("from 2009")) == 1
    line = site.gate.wait_for_session(lambda line: line["client"] == OLD_TLS and line["end"] == "quit")
    assert line["tls"] == "TLSv1"


def test_the_old_copier_with_openssl(site):
    """As another library of that time would do it."""
    old = ("-starttls", "smtp", "-tls1", "-cipher", "ALL:@SECLEVEL=0")
    commands = ("EHLO copier", "MAIL FROM:<a@example.com>", f"RCPT TO:<{OUTSIDE}>")
    replies, of_tls = converse(site.gate.port, *old, commands=commands, source=OLD_TLS)
    assert replies[2].startswith("250 2.1.5"), (replies, of_tls)
    replies, _ = converse(site.gate.port, *old, commands=commands, source=STRANGER)
    assert replies == []


def test_the_copier_must_speak_tls_at_least(site):
    with site.wire(OLD_TLS) as wire:
        assert wire.rcpt(OUTSIDE).startswith("530 5.7.10 ")
        assert wire.say(f"RCPT TO:<{LOCAL}>").startswith("250")  # as for every stranger


@pytest.mark.parametrize("source", [STRANGER, PLAIN_SCANNER])
def test_nobody_else_speaks_tls_1_0(site, source):
    with site.wire(source) as wire:
        wire.hello()
        with pytest.raises((ssl.SSLError, ConnectionError)):
            wire.start_tls(of_2009())
    with site.wire(source) as wire:
        wire.hello()
        assert wire.start_tls() == "TLSv1.3"


# ---- as whom, to whom, how much


def test_a_printer_sends_as_itself(site):
    with site.wire(FIXED_SENDER) as wire:
        assert wire.rcpt(OUTSIDE, "printer2@example.com").startswith("250")
        assert wire.content(scan("as itself")).startswith("250")
        assert wire.envelope(OUTSIDE, "boss@example.com").startswith(
            "550 5.7.1 Relaying is prohibited: not from or to this address ["
        )
        assert wire.say(f"RCPT TO:<{LOCAL}>").startswith("250")  # to us everybody may write
        assert wire.say("RSET").startswith("250")
        assert wire.envelope(OUTSIDE, "").startswith("550 5.7.1 ")
    assert len(site.arrived("as itself")) == 1
    with site.wire(STRANGER) as wire:  # the address in MAIL FROM alone gives nobody anything
        assert wire.rcpt(OUTSIDE, "printer2@example.com").startswith("550 5.7.1 Relaying is prohibited [")


def test_an_alarm_writes_to_the_guard(site):
    with site.wire(FIXED_RECIPIENT) as wire:
        assert wire.rcpt("night@guard.test").startswith("250")
        assert wire.say(f"RCPT TO:<{OUTSIDE}>").startswith("550 5.7.1 ")
        assert wire.say("RCPT TO:<night@sub.guard.test>").startswith("550 5.7.1 ")
        assert wire.content(scan("fire")).startswith("250")
    (taken,) = site.arrived("fire")
    assert [recipient.argument for recipient in taken.recipients] == [b"<night@guard.test>"]


def test_the_fourth_of_three_messages_in_an_hour_waits(site):
    for number in range(3):
        with site.wire(FEW_MESSAGES) as wire:
            assert wire.rcpt(OUTSIDE).startswith("250")
            assert wire.say("RCPT TO:<second@elsewhere.test>").startswith("250")  # of the same message
            assert wire.content(scan(f"order {number}")).startswith("250")
    with site.wire(FEW_MESSAGES) as wire:
        assert wire.rcpt(OUTSIDE).startswith("450 4.7.1 Too much mail in this hour, try again later ["), wire.said
        assert wire.say(f"RCPT TO:<{LOCAL}>").startswith("250")


def test_the_fifth_of_four_recipients_in_an_hour_waits(site):
    with site.wire(FEW_RECIPIENTS) as wire:
        assert wire.rcpt("one@elsewhere.test").startswith("250")
        for name in ("two", "three", "four"):
            assert wire.say(f"RCPT TO:<{name}@elsewhere.test>").startswith("250")
        assert wire.say("RCPT TO:<five@elsewhere.test>").startswith("450 4.7.1 ")
        assert wire.content(scan("menu")).startswith("250")
        assert wire.envelope("six@elsewhere.test").startswith("450 4.7.1 ")
    (taken,) = site.arrived("menu")
    assert len(taken.recipients) == 4


# ---- connections


def resident_octets(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no process {pid}")


def test_a_connection_that_is_kept_for_days(site):
    """NOOP and RSET between the messages, now and then silence almost as long as is borne; memory stays what it was."""
    (worker,) = site.gate.workers()
    with site.wire(PATIENT) as wire:
        wire.hello("monitoring")

        def send(count: int) -> None:
            for _ in range(count):
                assert wire.mail(OUTSIDE, scan("still alive")).startswith("250"), wire.said[-4:]
                assert wire.say("NOOP").startswith("250")
                assert wire.say("RSET").startswith("250")
                wire.said.clear()

        send(MESSAGES_ON_ONE_CONNECTION // 4)
        before = resident_octets(worker)
        send(MESSAGES_ON_ONE_CONNECTION - MESSAGES_ON_ONE_CONNECTION // 4)
        assert resident_octets(worker) - before < GROWTH_OCTETS_MAX
        began_s = time.monotonic()
        while time.monotonic() < began_s + 2 * COMMAND_S:
            time.sleep(COMMAND_S / 4)
            assert wire.say("NOOP").startswith("250")
        assert wire.mail(OUTSIDE, scan("still alive")).startswith("250")
        assert wire.say("QUIT").startswith("221")
    assert len(site.arrived("still alive")) == MESSAGES_ON_ONE_CONNECTION + 1
    assert site.gate.workers() == [worker]


def test_a_connection_that_falls_silent_is_told_so_and_may_come_again(site):
    with site.wire(PATIENT) as wire:
        wire.hello("monitoring")
        assert wire.mail(OUTSIDE, scan("and then nothing")).startswith("250")
        assert wire.reply() == "421 4.4.2 Timeout; closing"
        assert wire.end() == b""
    with site.wire(PATIENT) as wire:
        assert wire.rcpt(OUTSIDE).startswith("250")


def test_a_scanner_that_does_not_wait_for_goodbye(site):
    with site.wire(PLAIN_SCANNER) as wire:
        assert wire.rcpt(OUTSIDE).startswith("250")
        assert wire.say("DATA").startswith("354")
        wire.send(scan("in a hurry") + b".\r\nQUIT\r\n")
        wire.half_close()
        assert wire.end().startswith(b"250 ")
    assert len(site.arrived("in a hurry")) == 1


def test_a_scanner_that_is_gone_before_its_reply(site):
    """It has sent all of its message, so the message arrives; nobody is there to hear it."""
    with site.wire(PLAIN_SCANNER) as wire:
        assert wire.rcpt(OUTSIDE).startswith("250")
        assert wire.say("DATA").startswith("354")
        wire.send(scan("and gone") + b".\r\nQUIT\r\n")
    until(lambda: site.arrived("and gone"), "the message is there")


def test_a_scanner_that_never_says_goodbye(site):
    for number in range(20):
        with site.wire(PLAIN_SCANNER) as wire:
            wire.hello("scanner")
            assert wire.mail(OUTSIDE, scan(f"page {number} of 20")).startswith("250")
    for number in range(20):
        assert len(site.arrived(f"page {number} of 20")) == 1
    assert site.gate.wait_for_session(
        lambda line: (
            line["client"] == PLAIN_SCANNER
            and line["end"] == "client closed"
            and [one["verdict"] for one in line["transactions"]] == ["accepted"]
        )
    )


def test_twenty_mebibytes_that_come_slowly(site):
    """Longer than the command timeout; it is the next octets that are waited for, not all of them."""
    line = b"A" * 76 + b"\r\n"
    block = line * ((20 << 20) // len(line) // 40)
    with site.wire(PLAIN_SCANNER) as wire:
        assert wire.rcpt(OUTSIDE).startswith("250")
        assert wire.say("DATA").startswith("354")
        wire.send(b"Subject: poster\r\n\r\n")
        for _ in range(40):
            wire.send(block)
            time.sleep(1.5 * COMMAND_S / 40)
        wire.send(b".\r\n")
        assert wire.reply().startswith("250"), wire.said[-1]
    (taken,) = site.arrived("poster")
    assert content_of(taken) == b"Subject: poster\r\n\r\n" + block * 40


# ---- ways of speaking


@pytest.mark.parametrize(
    ("mail", "rcpt"),
    [
        ("mail from:<scanner@example.com>", f"rcpt to:<{OUTSIDE}>"),
        ("MAIL FROM: <scanner@example.com>", f"RCPT TO: <{OUTSIDE}>"),
        ("Mail From:scanner@example.com", f"Rcpt To:{OUTSIDE}"),
        ("MAIL FROM: scanner@example.com", f"RCPT TO: {OUTSIDE}"),
        ("MAIL FROM:<scanner@example.com> ", f"RCPT TO:<{OUTSIDE}> "),
    ],
)
def test_spoken_carelessly(site, mail, rcpt):
    since = len(site.backend.journal)
    with site.wire(PLAIN_SCANNER) as wire:
        assert wire.say("helo scanner").startswith("250")
        assert wire.say(mail).startswith("250"), wire.said
        assert wire.say(rcpt).startswith("250"), wire.said
        assert wire.say("data").startswith("354")
        wire.send(scan("careless") + b".\r\n")
        assert wire.reply().startswith("250")
        assert wire.say("quit").startswith("221")
    (taken,) = site.backend.transactions(since)
    assert taken.reverse_path == b"scanner@example.com"
    assert [recipient.argument for recipient in taken.recipients] == [f"<{OUTSIDE}>".encode()]


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_auth_login_with_the_name_at_once(site):
    """As devices do that were written for one server: verb, mechanism and user name in one line, in any case."""
    with Wire(site.gate.ports["login"], source=STRANGER) as wire:
        assert "AUTH " in wire.hello("scanner")
        assert wire.say(f"auth login {encoded('scanner@example.com')}") == f"334 {encoded('Password:')}"
        assert wire.say(encoded(site.device_secret)).startswith("235 2.7.0 ")
        assert wire.mail(OUTSIDE, scan("logged in"), "scanner@example.com").startswith("250"), wire.said
        assert wire.say("QUIT").startswith("221")
    assert len(site.arrived("logged in")) == 1
    line = site.gate.wait_for_session(lambda line: line["listen"] == "login" and "account" in line)
    assert (line["account"], line["logins"][0]["device"]) == ("scanner@example.com", "second floor")


def test_auth_login_with_a_device_s_old_password(site):
    with Wire(site.gate.ports["login"], source=STRANGER) as wire:
        wire.hello("scanner")
        assert wire.say(f"AUTH LOGIN {encoded('scanner@example.com')}").startswith("334 ")
        assert wire.say(encoded("last year's")) == "535 5.7.8 Authentication credentials invalid"
        assert wire.rcpt(OUTSIDE, "scanner@example.com").startswith("550 5.7.1 ")


@pytest.mark.parametrize(("name", "code"), [("erp@example.com", "250"), ("scanner@example.com", "550 5.6.0")])
def test_a_device_that_logs_in_has_its_line_ends_from_its_account(site, name, code):
    with Wire(site.gate.ports["login"], source=STRANGER) as wire:
        wire.hello("erp")
        assert wire.say(f"AUTH PLAIN {encoded(f'{chr(0)}{name}{chr(0)}{SECRET}')}").startswith("235 ")
        assert wire.envelope(OUTSIDE, name).startswith("250")
        assert wire.say("DATA").startswith("354")
        wire.send(f"From: {name}\nSubject: by account\n\none\n\r\n.\r\n".encode())
        assert wire.reply().startswith(code), wire.said
