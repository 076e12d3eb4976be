"""The relay tester against Postfix, Exim, OpenSMTPD, Sendmail and our own gate, closed and open, as people do it."""

from __future__ import annotations

import asyncio
import json
import re
import smtplib
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
import trustme
from tests.gatehouse import Gate
from tests.probe.parts import QUICK, accepted, inbox, outcomes
from tests.servers import Exim, OpenSmtpd, Postfix, Sendmail, Server, need
from tests.vectors.lenient import LenientBackend
from tests.vectors.readings import domain_of

from gatepost import cli
from gatepost.probe import Outcome, ProbeSettings, Report, Target, Verdict, probe

STRANGER = "mynetworks = 127.0.0.9/32"  # who is not at that address is one
FOREIGN = {"null-sender", "foreign-sender", "local-sender", "hello-localhost", "bang-through-us", "pipelined"}
MINE = "me@elsewhere.test"


class StrictExim(Exim):
    """Exim that trusts no stranger.  Options as Exim's; changes: pairs of text for its configuration."""

    def _prepare(self) -> None:
        super()._prepare()
        path = self.directory / "exim.conf"
        text = path.read_text()
        for old, new in (("accept hosts = 127.0.0.0/8", "accept hosts = 127.0.0.9"), *self.options.get("changes", ())):
            assert old in text
            text = text.replace(old, new, 1)
        path.write_text(text)


class OpenOpenSmtpd(OpenSmtpd):
    """OpenSMTPD that takes everything from anybody."""

    def _prepare(self) -> None:
        super()._prepare()
        path = self.root / "etc" / "smtpd.conf"
        path.write_text(path.read_text() + 'action away relay host "127.0.0.1:9"\nmatch from any for any action away\n')


# An old gateway: the local-part of our domain is an address, once the percent is an at-sign.
PERCENT_EXIM = (
    ("recipient:\n", "recipient:\n  accept domains = example.com\n         local_parts = ^.*%\n"),
    (
        "begin routers\n",
        """begin routers
percent:
  driver = redirect
  domains = example.com
  local_parts = ^.*%
  data = ${sg{$local_part}{%}{@}}
""",
    ),
)


def ask(server: Server | Gate, settings: ProbeSettings = QUICK) -> Report:
    return asyncio.run(probe(Target("127.0.0.1", server.port), settings))


@pytest.fixture(scope="module")
def certificate() -> Iterator[Path]:
    """A chain that servers can read which have dropped their rights."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "chain.pem"
        trustme.CA().issue_cert("mx.example.com").private_key_and_cert_chain_pem.write_to_path(path)
        path.parent.chmod(0o755)
        path.chmod(0o644)
        yield path


CLOSED = {
    "postfix": lambda certificate: Postfix(settings=[STRANGER], certificate=certificate),
    "exim": lambda certificate: StrictExim(certificate=certificate),
    "opensmtpd": lambda _: OpenSmtpd(),
    "sendmail": lambda certificate: Sendmail(certificate=certificate),
}


@pytest.mark.parametrize("name", CLOSED)
def test_a_closed_server_is_closed_in_plain_and_under_tls(name, certificate):
    with CLOSED[name](certificate) as server:
        report = ask(server)
    assert report.verdict is Verdict.CLOSED, report.why
    assert [one.tls for one in report.rounds] == ([False] if name == "opensmtpd" else [False, True])
    for one in report.rounds:
        assert {attempt.outcome for attempt in one.attempts} == {Outcome.REFUSED}


@pytest.mark.parametrize("name", CLOSED)
def test_a_closed_server_is_closed_without_a_word_about_it(name, certificate):
    """Nothing is known but its address: the local domain is guessed."""
    with CLOSED[name](certificate) as server:
        report = ask(server, replace(QUICK, local_domains=()))
    assert report.verdict is Verdict.CLOSED, report.why


OPEN = {
    "postfix": lambda: Postfix(settings=["mynetworks = 0.0.0.0/0"]),
    "exim": lambda: StrictExim(changes=[("accept hosts = 127.0.0.9", "accept hosts = *")]),
    "sendmail": lambda: Sendmail(settings=["FEATURE(`promiscuous_relay')"]),
}


@pytest.mark.parametrize("name", OPEN)
def test_a_server_that_trusts_the_world_is_open(name):
    with OPEN[name]() as server:
        report = ask(server)
        assert report.verdict is Verdict.OPEN, report.why
        # Sendmail looks for the sender among its users where the sender's domain is its own.
        assert set(accepted(report)) >= FOREIGN - ({"local-sender"} if name == "sendmail" else set())
        assert not list(server.mailbox("alice").glob("new/*")), "no mail was sent"


def test_a_server_that_relays_whatever_it_does_not_know_is_told_by_delivery():
    """Made-up users of its own domain it relays as well, so RCPT alone cannot tell it from one that refuses later."""
    with OpenOpenSmtpd() as server:
        assert ask(server).verdict is Verdict.UNKNOWN
        report = ask(server, replace(QUICK, deliver=MINE))
    assert report.verdict is Verdict.OPEN, report.why


def test_a_relay_for_one_foreign_domain_is_open_to_that_one():
    """relay_domains names what is none of ours."""
    with Postfix(settings=[STRANGER, "relay_domains = elsewhere.test"]) as server:
        report = ask(server, replace(QUICK, outside="victim@elsewhere.test"))
        assert report.verdict is Verdict.OPEN
        assert FOREIGN - {"bang-through-us"} <= set(accepted(report)), "which Postfix reads as victim@example.com"
        assert ask(server).verdict is Verdict.CLOSED, "other domains it refuses"


def test_whoever_claims_a_local_sender_may_relay():
    settings = [
        STRANGER,
        "smtpd_relay_restrictions = check_sender_access inline:{example.com=OK}, reject_unauth_destination",
    ]
    with Postfix(settings=settings) as server:
        report = ask(server)
    assert report.verdict is Verdict.OPEN
    assert set(accepted(report)) == {"local-sender", "no-brackets", "auth-parameter-local"}


def test_whoever_says_hello_as_localhost_may_relay():
    settings = [
        STRANGER,
        "smtpd_relay_restrictions = check_helo_access inline:{localhost=OK}, reject_unauth_destination",
    ]
    with Postfix(settings=settings) as server:
        report = ask(server)
    assert report.verdict is Verdict.OPEN
    assert accepted(report) == ["hello-localhost"]


def test_a_percent_hack_is_found_and_named():
    with StrictExim(changes=PERCENT_EXIM) as server:
        report = ask(server)
    assert report.verdict is Verdict.OPEN
    assert accepted(report) == ["percent-ours", "percent-twice", "quoted-percent-ours"]


def test_a_list_of_bad_clients_is_not_taken_for_closed():
    settings = [STRANGER, "smtpd_client_restrictions = check_client_access inline:{127.0.0.1=REJECT}"]
    with Postfix(settings=settings) as server:
        report = ask(server)
    assert report.verdict is Verdict.UNKNOWN
    assert any("refuses us" in sentence for sentence in report.why)


def test_greylisting_is_not_taken_for_closed():
    defer = "check_client_access inline:{127.0.0.1=450 4.2.0 Greylisted}"
    with Postfix(settings=["mynetworks = 0.0.0.0/0", f"smtpd_recipient_restrictions = {defer}"]) as server:
        report = ask(server)
    assert report.verdict is Verdict.UNKNOWN


def test_an_open_relay_that_asks_dns_first_is_not_taken_for_closed():
    settings = ["mynetworks = 0.0.0.0/0", "smtpd_recipient_restrictions = reject_unknown_recipient_domain, permit"]
    with Postfix(settings=settings) as server:
        report = ask(server)
    assert report.verdict is not Verdict.CLOSED
    assert outcomes(report)["null-sender"] is Outcome.UNCLEAR


def test_strict_error_limits_do_not_stop_the_test():
    settings = [STRANGER, "smtpd_soft_error_limit = 3", "smtpd_hard_error_limit = 4", "smtpd_error_sleep_time = 0"]
    with Postfix(settings=settings) as server:
        report = ask(server)
    assert report.verdict is Verdict.CLOSED, report.why


def test_delivery_is_proof(certificate):
    """The open Postfix discards what it relays, and its log says that it was our message."""
    with Postfix(settings=["mynetworks = 0.0.0.0/0"]) as server:
        report = ask(server, replace(QUICK, deliver=MINE))
        assert report.verdict is Verdict.OPEN
        assert report.delivery is not None
        assert report.delivery.taken
        assert f"message-id=<{report.delivery.token}@elsewhere.test>" in server.log
        assert server.log.count("message-id=") == 1
    with Postfix(settings=[STRANGER], certificate=certificate) as server:
        report = ask(server, replace(QUICK, deliver=MINE))
        assert (report.verdict, report.delivery) == (Verdict.CLOSED, None)
        assert "message-id=" not in server.log


def test_sendmail_takes_the_message_once_and_keeps_nobody_waiting():
    """Its own users get their mail; what it relays for us is one message."""
    with Sendmail(settings=["FEATURE(`promiscuous_relay')"]) as server:
        with smtplib.SMTP("127.0.0.1", server.port, timeout=30) as client:
            client.sendmail("me@elsewhere.test", "alice@example.com", b"X-First: yes\r\n\r\nHello\r\n")
        assert server.arrived("alice", first=b"X-First") == [b"X-First: yes\r\n\r\nHello\r\n"]
        report = ask(server, replace(QUICK, deliver=MINE))
        assert report.verdict is Verdict.OPEN
        assert report.delivery is not None
        assert (report.delivery.form, report.delivery.taken) == ("null-sender", True)
        assert server.log.count(f"Message-ID: <{report.delivery.token}@elsewhere.test>") == 1
        assert report.seconds < 20, "it would wait ever longer after 20 RSET"


def test_a_message_that_a_real_relay_hands_on_is_found_in_the_inbox(capsys, tmp_path):
    """The percent hack, through Exim, to a server elsewhere whose inbox is on the web."""
    with LenientBackend("strict") as elsewhere, inbox(elsewhere) as url:
        away = f"driver = smtp\n  hosts = 127.0.0.1\n  port = {elsewhere.port}\n  allow_localhost\n"
        changes = (*PERCENT_EXIM, ("driver = appendfile\n  file = /dev/null\n", away))
        with StrictExim(changes=changes) as server:
            arguments = ["--local-domain", "example.com", "--pause", "0", "--deliver-to", MINE, "--inbox", url]
            path = tmp_path / "report.json"
            code = cli.main(["probe", f"127.0.0.1:{server.port}", *arguments, "--report", str(path)])
    answer = json.loads(path.read_text())
    assert code == 1, capsys.readouterr()
    assert answer["delivery"]["arrived"] is True
    assert answer["delivery"]["form"] == "percent-ours"
    (message,) = elsewhere.transactions()
    assert answer["delivery"]["token"].encode() in message.octets
    assert b"by exim.test" in message.octets


# ---- our own gate

GATE = """
[gate]
name = "mx.example.com"
data = "data"
workers = 1

[[listen]]
name = "mx"
address = "127.0.0.1:0"
tls = "starttls"

[domains]
local = ["example.com"]

[backend.mail]
address = "127.0.0.1:{backend}"

[[trust]]
network = "127.0.0.2"
why = "the office"
owner = "it@example.com"

[console]
address = "127.0.0.1:0"
"""


@pytest.mark.parametrize("mode", ["strict", "all"])
def test_the_gate_is_closed_in_front_of_a_backend_that_takes_anything(mode, tmp_path):
    with LenientBackend(mode) as backend, Gate(tmp_path, GATE.format(backend=backend.port)) as gate:
        report = ask(gate)
        heard = backend.recipients()
        assert report.verdict is not Verdict.OPEN, report.why
        assert {domain_of(recipient.argument.strip(b"<>")) for recipient in heard} <= {"example.com"}
        assert backend.transactions() == []
        assert {attempt.outcome for attempt in report.rounds[0].attempts} == {Outcome.REFUSED}
        assert report.verdict is Verdict.CLOSED
        assert [one.tls for one in report.rounds] == [False, True]
        assert any("Relaying is prohibited" in attempt.reply for attempt in report.rounds[0].attempts)


def test_the_gate_is_open_for_whom_it_trusts(tmp_path):
    """The self-test must not come from a trusted address: what it then sees is no stranger's view."""
    with LenientBackend("strict") as backend, Gate(tmp_path, GATE.format(backend=backend.port)) as gate:
        report = ask(gate, replace(QUICK, source=ip_address("127.0.0.2"), starttls="never"))
    assert "null-sender" in {a.id for a in report.rounds[0].attempts if a.reply.startswith("250")}


def test_as_it_is_typed(capsys):
    with Postfix(settings=["mynetworks = 0.0.0.0/0"]) as server:
        code = cli.main(
            ["probe", f"127.0.0.1:{server.port}", "--local-domain", "example.com", "--pause", "0", "--json"]
        )
    answer = json.loads(capsys.readouterr().out)
    assert (code, answer["verdict"]) == (1, "open")


def test_another_tester_agrees(certificate):
    """swaks asks the plain form, and comes to the same."""
    swaks = need("swaks")
    for settings, denied in ((STRANGER, True), ("mynetworks = 0.0.0.0/0", False)):
        with Postfix(settings=[settings]) as server:
            command = [
                str(swaks), "--server", "127.0.0.1", "--port", str(server.port), "--from", "<>",
                "--to", "relay-test@gatepost-probe.invalid", "--quit-after", "RCPT",
            ]  # fmt: skip
            said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
            report = ask(server)
        assert bool(re.search(r"4[0-9]{2} .*Relay access denied", said)) is denied
        assert (outcomes(report)["null-sender"] is Outcome.REFUSED) is denied


QUICK_POSTFIX = "smtpd_error_sleep_time = 0"
BOTH: dict[str, tuple[Callable[[], Server], bool | None]] = {
    "postfix, closed": (lambda: Postfix(settings=[STRANGER, QUICK_POSTFIX]), False),
    "postfix, open": (lambda: Postfix(settings=["mynetworks = 0.0.0.0/0", QUICK_POSTFIX]), True),
    "postfix, one domain": (lambda: Postfix(settings=[STRANGER, "relay_domains = gatepost-probe.invalid"]), True),
    "sendmail, closed": (Sendmail, False),
    "sendmail, open": (lambda: Sendmail(settings=["FEATURE(`promiscuous_relay')"]), True),
    "opensmtpd, closed": (OpenSmtpd, False),
    "exim, closed": (StrictExim, None),  # it ends the session at the third error, and nmap does not come again
}


@pytest.mark.parametrize("name", BOTH)
def test_nmap_agrees_where_it_can_tell(name):
    nmap = need("nmap")
    make, is_open = BOTH[name]
    with make() as server:
        verdict = ask(server).verdict
        command = [
            str(nmap), "-Pn", "-n", "-p", str(server.port), "--script", "+smtp-open-relay", "--script-args",
            "smtp-open-relay.domain=gatepost-probe.invalid,smtp-open-relay.ip=127.0.0.1", "127.0.0.1",
        ]  # fmt: skip
        said = ""
        for _ in range(3):  # it waits some seconds for a reply, and for no more on a busy machine
            said = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
            if "connection timeout" not in said:
                break
    told = True if "is an open relay" in said else False if "doesn't seem to be an open relay" in said else None
    assert told is is_open, said
    assert verdict is (Verdict.OPEN if is_open else Verdict.CLOSED)
