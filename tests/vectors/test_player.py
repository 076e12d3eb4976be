"""The player is an instrument too: an open relay must fail it, and so must a server that takes or keeps nothing."""

from __future__ import annotations

import socketserver
import threading
from collections import Counter

import pytest
from tests.vectors.lenient import LenientBackend, Transaction
from tests.vectors.player import Played, Target, load_cases, play_all, sender_of, text_differs

LOCAL = frozenset({"example.com", "xn--bcher-kva.example", "bücher.example"})
CASES = load_cases()

# What even an open relay in front of nothing does no harm with: it refuses the syntax itself, or the case asks for
# something that no backend of the mode "all" misreads.
HARMLESS = {
    "relay-basic": set(),
    "addr": {
        "addr-at-only",
        "addr-double-at",
        "addr-empty",
        "addr-extra-close",
        "addr-no-domain",
        "addr-no-domain-at",
        "addr-no-local",
        "addr-null-rcpt",
    },
    "addr-utf8": {
        "u8-idn-alabel-local",
        "u8-latin1-8bit",
        "u8-latin1-8bit-smtputf8",
        "u8-no-smtputf8-8bit",
        "u8-no-smtputf8-8bit-smtputf8",
        "u8-roman-four",
        "u8-roman-four-smtputf8",
    },
    "eod": {
        "eod-boundary-1000",
        "eod-boundary-1024",
        "eod-boundary-2048",
        "eod-boundary-512",
        "eod-boundary-65536",
        "eod-crlf-dot-sp",
        "eod-highbit-crlf",
        "eod-lf-dotdot-lf",
        "eod-ls",
        "eod-nel-utf8",
        "eod-vt",
    },
    "verbs": {"vb-bad-many", "vb-expn", "vb-help-noop", "vb-vrfy"},
}


def test_all_published_cases_are_here():
    assert len(CASES) == len({case.id for case in CASES}) == 415
    assert Counter(case.family for case in CASES) == {
        "addr": 78,
        "eod": 49,
        "relay-basic": 43,
        "conf": 35,
        "auth": 33,
        "addr-utf8": 31,
        "framing": 24,
        "bdat": 21,
        "state": 21,
        "params": 17,
        "verbs": 16,
        "starttls": 13,
        "proxy": 10,
        "pipe": 9,
        "dos": 8,
        "trace": 7,
    }
    assert Counter(case.client for case in CASES) == {"stranger": 398, "authenticated": 16, "trusted": 1}
    assert len({case.address for case in CASES}) == 415


@pytest.fixture(scope="module")
def open_relay() -> Played:
    """The cases played straight at a backend that takes everything and misreads all it can."""
    with LenientBackend("all") as backend:
        cases = [case for case in CASES if case.family in {*HARMLESS, "conf", "pipe"}]
        return play_all(cases, Target("127.0.0.1", backend.port, LOCAL), backend)


@pytest.mark.parametrize("family", HARMLESS)
def test_an_open_relay_is_found_out(open_relay, family):
    harmless = {
        name for name, outcome in open_relay.outcomes.items() if outcome.case.family == family and not outcome.harms
    }
    assert harmless == HARMLESS[family]


def test_an_open_relay_passes_honest_mail_all_the_same(open_relay):
    assert [
        str(outcome) for outcome in open_relay.outcomes.values() if outcome.case.family == "conf" and outcome.harms
    ] == []


def test_recipients_without_a_message_are_noticed(open_relay):
    assert any("an outside RCPT reached the backend" in line for line in open_relay.unexplained)


def test_who_logs_in_is_not_played_where_nobody_can(open_relay):
    assert set(open_relay.not_offered.values()) == {"AUTH"}


class _RefusingServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128

    class RequestHandlerClass(socketserver.StreamRequestHandler):
        def handle(self):
            self.wfile.write(b"220 refusing.test\r\n")
            for _ in self.rfile:
                self.wfile.write(b"550 5.7.1 no\r\n")

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.RequestHandlerClass)


def test_a_server_that_takes_nothing_is_found_out():
    cases = [case for case in CASES if case.family in {"conf", "relay-basic"} and "segment_octets" not in str(case)]
    with _RefusingServer() as server, LenientBackend("strict") as backend:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        played = play_all(cases, Target("127.0.0.1", server.server_address[1], LOCAL, timeout_s=1.0), backend)
        server.shutdown()
    harms = {name for name, outcome in played.outcomes.items() if outcome.harms}
    assert harms == {case.id for case in cases if case.delivers is not None and case.id in played.outcomes}
    assert "cf-plain" in harms


@pytest.mark.parametrize(
    ("octets", "same"),
    [
        (b"Subject: x\r\n\r\nhello\r\n", True),
        (b"Received: from a ([127.9.0.1])\r\n\tby b; now\r\nSubject: x\r\n\r\nhello\r\n", True),
        (b"Received: a\r\nReceived: b\r\nSubject: x\r\n\r\nhello\r\n", False),
        (b"X-Spam: no\r\nSubject: x\r\n\r\nhello\r\n", False),
        (b"Received: a\nb\r\nSubject: x\r\n\r\nhello\r\n", False),
        (b"Subject: x\r\n\r\nhello\r\n\r\n", False),
        (b"Subject: x\r\n\r\nhello \r\n", False),
        (b"", False),
    ],
)
def test_one_trace_field_and_nothing_else_may_be_added(octets, same):
    assert (text_differs(octets, b"Subject: x\r\n\r\nhello\r\n") is None) is same


def transaction(peer: str, octets: bytes) -> Transaction:
    return Transaction(1, peer, b"", b"", b"", (), octets, "DATA")


def test_what_arrived_is_told_apart_by_our_trace_field():
    field = b"Received: from x ([127.9.1.7])\r\n\tby mx.example.com\r\nSubject: x\r\n"
    assert sender_of(transaction("127.0.0.1", field), "127.9.0.1") == "127.9.1.7"
    assert sender_of(transaction("127.0.0.1", b"Subject: smuggled\r\n"), "127.9.0.1") == "127.9.0.1"
    assert sender_of(transaction("127.9.0.3", field), "127.9.0.1") == "127.9.0.3"
