"""The relay tester against servers that play a part: each verdict, and what must never be concluded."""

from __future__ import annotations

import asyncio
import random
import re
import socket
import ssl
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address

import pytest
import trustme
from tests.probe.parts import (
    DENIED,
    OURS,
    QUICK,
    Scripted,
    accepted,
    choosy,
    closed,
    outcomes,
    probed,
)
from tests.vectors.lenient import MODES, LenientBackend
from tests.vectors.readings import domain_of, plain

from gatepost.errors import GatepostError
from gatepost.probe import Outcome, Target, Verdict, probe
from gatepost.probe.forms import FORMS
from gatepost.probe.round import CONNECTIONS_MAX, DEFERRALS_MAX, REFUSALS_MAX, RESETS_MAX, SILENCES_MAX
from gatepost.resolver import Answer, Certainty, Resolver

MINE = "me@elsewhere.example"


@pytest.fixture(scope="module")
def tls() -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("mx.example.com").configure_cert(context)
    return context


async def ask(server: Scripted, **changes):
    return await probe(server.target, replace(QUICK, **changes))


# ---- closed and open


async def test_a_closed_server_is_closed():
    async with Scripted() as server:
        report = await ask(server)
    assert report.verdict is Verdict.CLOSED
    assert set(outcomes(report).values()) == {Outcome.REFUSED}
    assert len(report.rounds[0].attempts) == report.rounds[0].planned == len(FORMS)
    assert report.why == (f"IPv4: It refused all {len(FORMS)} forms.",)


async def test_nothing_is_ever_sent_unless_asked_for():
    async with Scripted(rcpt=lambda argument: "250 Ok") as server:
        await ask(server)
    assert not [line for line in server.heard if re.match("DATA|BDAT|VRFY|EXPN|AUTH|SEND|ETRN", line, re.IGNORECASE)]
    started = sum(line.startswith("MAIL") for line in server.heard)
    taken_back = sum(line in ("RSET", "QUIT") for line in server.heard)
    assert taken_back >= started


def relays_plainly(argument: str) -> str:
    return closed(argument) if domain_of(plain(argument.encode())) in (OURS, "[127.0.0.1]") else "250 2.1.5 Ok"


async def test_an_open_relay_is_open_and_shows_the_dialogue():
    async with Scripted(rcpt=relays_plainly) as server:
        report = await ask(server)
    assert report.verdict is Verdict.OPEN
    assert {"null-sender", "local-sender", "route-ours", "pipelined"} <= set(accepted(report))
    assert report.first_accepted is not None
    assert report.first_accepted[1].transcript == (
        "C: MAIL FROM:<>",
        "S: 250 2.1.0 Ok",
        "C: RCPT TO:<relay-test@gatepost-probe.invalid>",
        "S: 250 2.1.5 Ok",
    )


async def test_exchange_5_5_says_yes_in_its_own_way():
    def exchange(argument: str) -> str:
        if domain_of(plain(argument.encode())) in (OURS, "[127.0.0.1]"):
            return "550 5.1.1 No such user"
        return f"250 OK - Recipient {argument}"

    async with Scripted(
        rcpt=exchange,
        mail=lambda argument: f"250 OK - mail from {argument}",
        connections=lambda _: (
            "220 mail.example.com ESMTP Server (Microsoft Exchange Internet Mail Service 5.5.2653.13)"
        ),
        ehlo="500 Command unrecognized",
    ) as server:
        report = await ask(server)
    assert report.verdict is Verdict.UNKNOWN, "EHLO and HELO are refused alike"
    async with Scripted(rcpt=exchange, ehlo="250 mail.example.com Hello [127.0.0.1]") as server:
        report = await ask(server)
    assert report.verdict is Verdict.OPEN
    assert report.rounds[0].attempts[0].reply == "250 OK - Recipient <relay-test@gatepost-probe.invalid>"


EACH = {
    "percent-ours": lambda rcpt: rcpt == "<relay-test%gatepost-probe.invalid@example.com>",
    "quoted-ours": lambda rcpt: rcpt == '<"relay-test@gatepost-probe.invalid"@example.com>',
    "bang-bare": lambda rcpt: rcpt == "<gatepost-probe.invalid!relay-test>",
    "trailing-dot": lambda rcpt: rcpt.endswith(".invalid.>"),
    "upper-case": lambda rcpt: rcpt == "<RELAY-TEST@GATEPOST-PROBE.INVALID>",
    "no-brackets": lambda rcpt: not rcpt.strip().startswith("<"),
    "tab-before": lambda rcpt: rcpt.startswith("\t"),
    "address-decimal": lambda rcpt: "[3221225985]" in rcpt,
    "address-v6": lambda rcpt: "[IPv6:" in rcpt and "IPv6:2001" in rcpt,
    "full-width-at": lambda rcpt: "＠" in rcpt,
    "orcpt": lambda rcpt: "ORCPT=" in rcpt,
}


@pytest.mark.parametrize("form", EACH)
async def test_a_server_that_is_open_in_one_form_alone_is_found(form):
    async with Scripted(rcpt=lambda rcpt: "250 2.1.5 Ok" if EACH[form](rcpt) else closed(rcpt)) as server:
        report = await ask(server)
    assert report.verdict is Verdict.OPEN
    assert accepted(report) == [form]
    assert report.why[0] == f"IPv4: It relays in 1 of {len(FORMS)} forms: {form}."


@pytest.mark.parametrize(
    ("form", "opens"),
    [
        ("local-sender", "<postmaster@example.com>"),
        ("literal-sender", "<postmaster@[127.0.0.1]>"),
        ("bare-sender", "<postmaster>"),
        ("auth-parameter", "<> AUTH=<>"),
    ],
)
async def test_a_server_that_believes_a_sender_is_found(form, opens):
    server = Scripted()

    def believe(argument: str) -> str:
        last = [line for line in server.heard if line.startswith("MAIL FROM:")][-1]
        return "250 Ok" if last == f"MAIL FROM:{opens}" and ".invalid" in argument else closed(argument)

    server.rcpt = believe
    async with server:
        report = await ask(server)
    assert report.verdict is Verdict.OPEN
    assert form in accepted(report)
    assert "null-sender" not in accepted(report)


async def test_a_server_that_believes_a_hello_is_found_and_the_name_taken_back():
    server = Scripted()

    def believe(argument: str) -> str:
        last = [line for line in server.heard if line.startswith("EHLO")][-1]
        return "250 Ok" if last == "EHLO localhost" else closed(argument)

    server.rcpt = believe
    async with server:
        report = await ask(server)
    assert accepted(report) == ["hello-localhost"]


@pytest.mark.parametrize("forgets", [True, False])
async def test_a_server_that_forgets_its_refusal_of_mail_is_found(forgets):
    server = Scripted(mail=lambda argument: "501 5.1.7 Bad" if argument == "<@>" else "250 Ok", forgets=forgets)

    def believe(argument: str) -> str:
        last = [line for line in server.heard if line.startswith("MAIL FROM:")][-1]
        return "250 Ok" if last == "MAIL FROM:<@>" else closed(argument)

    server.rcpt = believe
    async with server:
        report = await ask(server)
    assert accepted(report) == (["after-refused-mail"] if forgets else [])


MISREADS = {
    "percent-hack": {"percent-ours", "percent-literal", "percent-bare", "quoted-ours", "quoted-whole", "bang-ours"},
    "source-route": {"route-ours", "route-literal", "route-two"},
    "old-unix": {"percent-ours", "quoted-ours", "bang-ours", "route-ours", "pair-brackets"},
    "all": {"percent-ours", "quoted-ours", "escaped-at", "doubled-at-ours", "trailing-at", "route-ours"},
}


@pytest.mark.parametrize("mode", MISREADS)
async def test_a_server_that_misreads_is_open_and_the_forms_are_named(mode, monkeypatch):
    with choosy(mode, monkeypatch) as backend:
        report = await probed(backend.port, replace(QUICK, starttls="never"))
        assert report.verdict is Verdict.OPEN
        assert MISREADS[mode] <= set(accepted(report))
        assert "null-sender" not in accepted(report)
        assert backend.transactions() == []


@pytest.mark.parametrize("mode", sorted(set(MODES) - set(MISREADS)))
async def test_a_server_that_reads_addresses_rightly_is_closed(mode, monkeypatch):
    with choosy(mode, monkeypatch) as backend:
        report = await probed(backend.port, replace(QUICK, starttls="never"))
    assert report.verdict is Verdict.CLOSED


# ---- what cannot be concluded


async def test_a_server_that_takes_everything_tells_nothing():
    with LenientBackend("strict") as backend:
        report = await probed(backend.port)
    assert report.verdict is Verdict.UNKNOWN
    assert report.rounds[0].takes_anybody
    assert any("takes every recipient at RCPT" in sentence for sentence in report.why)


async def test_a_mailbox_that_takes_everything_is_no_relay():
    def catch_all(argument: str) -> str:
        return "250 Ok" if domain_of(plain(argument.encode())) == OURS else DENIED

    async with Scripted(rcpt=catch_all) as server:
        report = await ask(server)
    assert report.verdict is Verdict.UNKNOWN
    assert not report.rounds[0].takes_anybody
    assert outcomes(report)["null-sender"] is Outcome.REFUSED
    assert outcomes(report)["percent-ours"] is Outcome.UNCLEAR
    assert "any local-part" in next(a.note for a in report.rounds[0].attempts if a.id == "percent-ours")


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("450 4.2.0 Greylisted, try again", "puts us off"),
        ("451 4.3.0 Local problem", "puts us off"),
        ("450 4.1.2 Recipient address rejected: Domain not found", "DNS does not know it"),
        ("550 Unrouteable address", "DNS does not know it"),
        ("554 5.7.1 Client host [127.0.0.1] blocked using zen.spamhaus.org", "refuses us"),
    ],
)
async def test_a_no_for_another_reason_is_not_closed(reply, words):
    async with Scripted(rcpt=lambda argument: closed(argument) if OURS in argument else reply) as server:
        report = await ask(server)
    assert report.verdict is Verdict.UNKNOWN
    assert any(words in sentence for sentence in report.why)


async def test_one_form_that_says_nothing_is_enough():
    async with Scripted(rcpt=lambda rcpt: "451 Fault" if rcpt.startswith("<@") else closed(rcpt)) as server:
        report = await ask(server)
    assert report.verdict is Verdict.UNKNOWN
    assert sorted(name for name, said in outcomes(report).items() if said is Outcome.UNCLEAR) == [
        "route-literal",
        "route-ours",
        "route-two",
    ]


async def test_the_same_words_for_a_made_up_user_are_a_no():
    """Exim has one answer for every address that it cannot route."""

    def exim(argument: str) -> str:
        return "550 Unrouteable address" if domain_of(plain(argument.encode())) == OURS else "550 relay not permitted"

    async with Scripted(rcpt=exim) as server:
        assert (await ask(server)).verdict is Verdict.CLOSED


async def test_a_sender_whose_domain_is_unknown_cannot_relay_as_such():
    def checks_senders(argument: str) -> str:
        return "450 4.1.8 Sender address rejected: Domain not found" if ".invalid" in argument else "250 Ok"

    async with Scripted(mail=checks_senders) as server:
        report = await ask(server)
    assert report.verdict is Verdict.CLOSED
    assert outcomes(report)["foreign-sender"] is Outcome.REFUSED


async def test_what_a_server_has_against_a_sender_or_a_name_it_may_say_at_rcpt():
    """Postfix does, unless smtpd_delay_reject is off: that the other forms are refused for relaying still counts."""
    server = Scripted()

    def delayed(argument: str) -> str:
        mail = [line for line in server.heard if line.startswith("MAIL FROM:")][-1]
        hello = [line for line in server.heard if line.startswith("EHLO")][-1]
        if hello == "EHLO localhost":
            return "504 5.5.2 <localhost>: Helo command rejected: need fully-qualified hostname"
        if hello == "EHLO example.com":
            return "450 4.7.1 <example.com>: Helo command rejected: Host not found"
        if ".invalid" in mail:
            return "450 4.1.8 <antispam@gatepost-probe.invalid>: Sender address rejected: Domain not found"
        return closed(argument)

    server.rcpt = delayed
    async with server:
        report = await ask(server)
    assert report.verdict is Verdict.CLOSED, report.why


async def test_the_local_sender_is_taken_where_no_other_is():
    server = Scripted(mail=lambda argument: "250 Ok" if argument == "<postmaster@example.com>" else "550 5.7.1 No")
    server.rcpt = lambda argument: "250 Ok" if "%" in argument else closed(argument)
    async with server:
        report = await ask(server)
    assert "percent-ours" in accepted(report)
    assert report.rounds[0].attempts[-1].reverse_path == "<postmaster@example.com>"


@pytest.mark.parametrize("at_mail", [True, False])
async def test_hanging_up_on_everything_is_no_refusal(at_mail):
    server = Scripted(mail=lambda _: None) if at_mail else Scripted(rcpt=lambda _: None)
    async with server:
        report = await ask(server)
    assert report.verdict is Verdict.UNKNOWN
    assert set(outcomes(report).values()) <= {Outcome.UNCLEAR}


async def test_nonsense_instead_of_a_reply_is_no_refusal():
    async with Scripted(rcpt=lambda rcpt: "what?" if "%" in rcpt else closed(rcpt)) as server:
        report = await ask(server)
    assert report.verdict is Verdict.UNKNOWN
    assert outcomes(report)["percent-ours"] is Outcome.UNCLEAR


async def test_open_is_found_though_every_error_ends_the_session():
    async with Scripted(rcpt=lambda rcpt: "250 Ok" if "%" in rcpt else closed(rcpt), errors=1) as server:
        report = await ask(server)
    assert report.verdict is Verdict.OPEN
    assert "percent-ours" in accepted(report)


async def test_who_puts_us_off_every_time_is_left_alone():
    async with Scripted(rcpt=lambda _: "450 4.2.0 Greylisted") as server:
        report = await ask(server)
    assert report.verdict is Verdict.UNKNOWN
    assert len(report.rounds[0].attempts) == DEFERRALS_MAX
    assert any("put us off" in sentence for sentence in report.why)


# ---- the connection


async def test_nobody_answers():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        report = await probed(unused.getsockname()[1])
    assert report.verdict is Verdict.UNKNOWN
    assert report.rounds[0].attempts == ()
    assert "refused" in report.why[0].lower()


@pytest.mark.parametrize("greeting", ["554 5.7.1 Go away", "421 4.3.2 Busy", "SSH-2.0-OpenSSH_9", "354 What", None])
async def test_a_greeting_that_is_none(greeting):
    async with Scripted(connections=lambda _: greeting) as server:
        report = await ask(server)
    assert report.verdict is Verdict.UNKNOWN
    assert server.opened == 1
    assert not [line for line in server.heard if line.startswith("MAIL")]


@pytest.mark.parametrize("errors", [REFUSALS_MAX - 1, REFUSALS_MAX, REFUSALS_MAX + 1, 1])
async def test_a_server_that_ends_sessions_after_errors_is_asked_to_the_end(errors):
    async with Scripted(errors=errors) as server:
        report = await ask(server)
    assert report.verdict is Verdict.CLOSED
    assert len(FORMS) // REFUSALS_MAX <= server.opened <= CONNECTIONS_MAX


async def test_a_server_that_tires_of_rset_and_ehlo_is_asked_by_many_connections():
    """Sendmail answers each RSET after the 20th, and each EHLO after the third, later than the one before.

    The forms that differ by EHLO come on one connection, and no other form after them.
    """
    async with Scripted(rcpt=relays_plainly) as server:
        await ask(server)
    sessions = "\n".join(server.heard).split("QUIT")
    assert max(session.count("RSET") for session in sessions) == RESETS_MAX
    pretending = [session for session in sessions if session.count("EHLO") > 1]
    assert 1 <= len(pretending) <= 2
    for session in pretending:
        assert session.count("EHLO") <= 4
        assert session.rpartition("EHLO")[2].count("MAIL") == 1, "no other form after it"


async def test_connections_are_counted():
    """A server that ends every session after one error is not asked without end."""
    async with Scripted(errors=1) as server:
        report = await ask(server, local_domains=("example.com", "example.org", "example.net"))
    assert report.rounds[0].planned > CONNECTIONS_MAX
    assert server.opened == CONNECTIONS_MAX
    assert report.verdict is Verdict.UNKNOWN
    assert f"it ended {CONNECTIONS_MAX} connections" in report.why[-1]


@pytest.mark.parametrize("flood", [b"220-and so on\r\n", b"x"])
async def test_a_server_that_talks_without_end_is_left(flood):
    sent = 0

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        with suppress(ConnectionError):
            while sent < 256 << 20:
                writer.write(flood * 1_000)
                sent += len(flood) * 1_000
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(pour, "127.0.0.1", 0) as server:
        report = await probe(Target("127.0.0.1", server.sockets[0].getsockname()[1]), QUICK)
    assert report.verdict is Verdict.UNKNOWN
    assert "a reply of more than" in report.why[0]
    assert sent < 32 << 20, "no more than what buffers hold"


async def test_a_server_that_hangs_up_on_a_form_refuses_it():
    async with Scripted(rcpt=lambda rcpt: None if "%" in rcpt else closed(rcpt)) as server:
        report = await ask(server)
    assert report.verdict is Verdict.CLOSED
    assert next(a.reply for a in report.rounds[0].attempts if a.id == "percent-ours") == "(it hung up without a reply)"


async def test_banned_in_the_middle_is_unknown():
    async with Scripted(connections=lambda number: "220 mx" if number < 2 else "554 5.7.1 Banned") as server:
        report = await ask(server)
    assert report.verdict is Verdict.UNKNOWN
    assert 0 < len(report.rounds[0].attempts) < report.rounds[0].planned
    assert "does not talk to us any more (it greets with 554 5.7.1 Banned)" in report.why[-1]


async def test_open_stays_open_when_banned_afterwards():
    async with Scripted(
        rcpt=relays_plainly, connections=lambda number: "220 mx" if number < 2 else "554 5.7.1 Banned"
    ) as server:
        report = await ask(server)
    assert report.verdict is Verdict.OPEN


async def test_a_server_that_says_nothing_is_given_up():
    async with Scripted(rcpt=lambda rcpt: "" if ".invalid" in rcpt else closed(rcpt)) as server:
        report = await ask(server, timeout_s=0.1)
    assert report.verdict is Verdict.UNKNOWN
    assert len(report.rounds[0].attempts) <= SILENCES_MAX
    assert any(f"without a reply {SILENCES_MAX} times" in sentence for sentence in report.why)


async def test_a_reply_that_drips_has_one_deadline():
    async with Scripted(rcpt=lambda rcpt: "..." if ".invalid" in rcpt else closed(rcpt)) as server:
        report = await ask(server, timeout_s=0.3)
    assert report.verdict is Verdict.UNKNOWN
    assert "no reply in 0.3 s" in report.rounds[0].attempts[0].reply
    assert len(report.rounds[0].attempts) <= SILENCES_MAX


async def test_the_whole_test_has_an_end():
    async with Scripted() as server:
        report = await ask(server, pause_s=0.5, budget_s=1.2)
    assert report.verdict is Verdict.UNKNOWN
    assert report.seconds < 60
    assert len(report.rounds[0].attempts) < len(FORMS)


async def test_what_the_server_says_is_shown_printable_and_its_name_checked():
    async with Scripted(
        rcpt=lambda _: "550 \x1b[31mred\x07 \u202eright",
        ehlo="250-evil\x1b[2J>.example\r\n250 HELP",
        connections=lambda _: "220 <x@y>\x1b]0;title\x07 ESMTP",
    ) as server:
        report = await ask(server, local_domains=())
    one = report.rounds[0]
    for text in (one.greeting, *one.opening, *(line for attempt in one.attempts for line in attempt.transcript)):
        assert text.replace("\t", "").isprintable()
    assert one.local_domains == ("[127.0.0.1]",), "a name that is none is not said back"
    assert report.verdict is Verdict.CLOSED


@pytest.mark.parametrize(
    ("said", "local"),
    [
        ("mx.example.com Hello", ("example.com",)),
        ("mx1.mail.example.com", ("mail.example.com",)),
        ("example.com", ("example.com",)),
        ("example.co.uk", ("example.co.uk",)),
        ("mx.example.co.uk", ("example.co.uk",)),
        ("localhost", ("[127.0.0.1]",)),
    ],
)
async def test_the_local_domain_is_guessed_from_the_servers_name(said, local):
    async with Scripted(ehlo=f"250 {said}", connections=lambda _: "220 ready") as server:
        report = await ask(server, local_domains=())
    assert report.rounds[0].local_domains == local


async def test_an_address_in_a_guessed_local_domain_is_no_foreign_one():
    async with Scripted() as server:
        report = await ask(server, local_domains=(), outside="you@example.com")
    assert report.verdict is Verdict.UNKNOWN
    assert "name an address elsewhere" in report.why[0]


async def test_several_local_domains_are_all_tried():
    def second(argument: str) -> str:
        return "250 Ok" if argument == "<relay-test%gatepost-probe.invalid@example.org>" else closed(argument)

    async with Scripted(rcpt=second) as server:
        report = await ask(server, local_domains=("example.com", "example.org"))
    assert accepted(report) == ["percent-ours:example.org"]


# ---- TLS and address families


async def test_plain_and_tls_are_both_tested(tls):
    async with Scripted(tls=tls) as server:
        report = await ask(server)
        assert [(one.name, one.verdict) for one in report.rounds] == [
            ("IPv4", Verdict.CLOSED),
            ("IPv4 TLS", Verdict.CLOSED),
        ]
        assert report.rounds[1].tls_version.startswith("TLSv1.")
        assert [one.tls for one in (await ask(server, starttls="never")).rounds] == [False]
        assert [one.tls for one in (await ask(server, starttls="require")).rounds] == [True]


async def test_tls_from_the_first_octet(tls):
    async with Scripted(implicit_tls=tls) as server:
        report = await ask(server, implicit_tls=True)
        assert [(one.name, one.verdict) for one in report.rounds] == [("IPv4 TLS", Verdict.CLOSED)]
        assert report.rounds[0].tls_version.startswith("TLSv1.")
        assert "STARTTLS" not in server.heard
        assert (await ask(server, timeout_s=1.0)).verdict is Verdict.UNKNOWN  # in plain nobody answers there
    async with Scripted() as server:
        report = await ask(server, implicit_tls=True)
    assert report.verdict is Verdict.UNKNOWN
    assert "the TLS handshake failed" in report.why[0]


async def test_who_cancels_a_test_leaves_no_connection_behind():
    asked, gone = asyncio.Event(), asyncio.Event()

    def silent(argument: str) -> str:
        asked.set()
        return ""

    server = Scripted(rcpt=silent, over=gone)
    async with server:
        test = asyncio.create_task(ask(server))
        async with asyncio.timeout(20.0):
            await asked.wait()
            test.cancel()
            await gone.wait()
    assert test.cancelled()


async def test_open_under_tls_alone_is_open(tls):
    server = Scripted(tls=tls)
    server.rcpt = lambda argument: relays_plainly(argument) if "STARTTLS" in server.heard else closed(argument)
    async with server:
        report = await ask(server)
    assert [one.verdict for one in report.rounds] == [Verdict.CLOSED, Verdict.OPEN]
    assert report.verdict is Verdict.OPEN


async def test_tls_that_is_required_and_not_there():
    async with Scripted() as server:
        report = await ask(server, starttls="require")
    assert report.verdict is Verdict.UNKNOWN
    assert report.why == (
        f"IPv4 TLS: Given up after 0 of {report.rounds[0].planned} forms: it does not offer STARTTLS.",
    )


async def test_what_is_said_before_the_handshake_is_not_believed_after_it(tls):
    async with Scripted(tls=tls, injected=b"250-injected.test\r\n250 2.1.0 Ok\r\n250 2.1.5 Ok\r\n") as server:
        report = await ask(server, starttls="require")
    assert report.verdict is Verdict.CLOSED
    assert not any("injected" in line for line in report.rounds[0].opening)


def names(monkeypatch, **answers: Answer) -> None:
    async def lookup(self: Resolver, host: str, record_type: str) -> Answer:
        return answers[record_type]

    monkeypatch.setattr(Resolver, "lookup", lookup)


async def test_both_families_are_tested_and_open_in_one_is_open(monkeypatch):
    names(
        monkeypatch,
        A=Answer(Certainty.FOUND, (ip_address("127.0.0.1"), ip_address("127.0.0.2"))),
        AAAA=Answer(Certainty.FOUND, (ip_address("::1"),)),
    )
    async with Scripted() as four, Scripted(host="::1", port=four.port, rcpt=relays_plainly) as six:
        report = await probe(Target("mx.example.com", four.port), QUICK)
        assert [(one.name, one.verdict) for one in report.rounds] == [("IPv4", Verdict.CLOSED), ("IPv6", Verdict.OPEN)]
        assert "C: MAIL FROM:<postmaster@[IPv6:::1]>" in [
            line for attempt in report.rounds[1].attempts for line in attempt.transcript
        ]
        assert report.verdict is Verdict.OPEN
        before = six.opened
        report = await probe(Target("mx.example.com", four.port), replace(QUICK, families=(4,)))
        assert report.verdict is Verdict.CLOSED
        assert six.opened == before


async def test_a_family_that_could_not_be_tested_is_not_closed(monkeypatch):
    names(
        monkeypatch,
        A=Answer(Certainty.FOUND, (ip_address("127.0.0.1"),)),
        AAAA=Answer(Certainty.FOUND, (ip_address("::1"),)),
    )
    async with Scripted() as server:
        report = await probe(Target("mx.example.com", server.port), QUICK)
    assert report.verdict is Verdict.UNKNOWN
    names(
        monkeypatch,
        A=Answer(Certainty.FOUND, (ip_address("127.0.0.1"),)),
        AAAA=Answer(Certainty.UNKNOWN, why="no answer"),
    )
    async with Scripted() as server:
        report = await probe(Target("mx.example.com", server.port), QUICK)
    assert report.verdict is Verdict.UNKNOWN
    assert report.why[-1] == "IPv6 was not tested: DNS does not answer for mx.example.com (no answer)."


async def test_a_name_with_one_family_is_tested_over_that_one(monkeypatch):
    names(monkeypatch, A=Answer(Certainty.FOUND, (ip_address("127.0.0.1"),)), AAAA=Answer(Certainty.NONE))
    async with Scripted() as server:
        assert (await probe(Target("mx.example.com", server.port), QUICK)).verdict is Verdict.CLOSED
        report = await probe(Target("mx.example.com", server.port), replace(QUICK, families=(6,)))
        assert (report.verdict, report.why) == (Verdict.UNKNOWN, ("mx.example.com has no IPv6 address.",))
        assert (await probe(server.target, replace(QUICK, families=(6,)))).verdict is Verdict.UNKNOWN


async def test_it_speaks_from_the_address_that_it_is_told():
    async with Scripted() as server:
        report = await ask(server, source=ip_address("127.0.0.77"), hello="tester.example.net")
        assert report.verdict is Verdict.CLOSED
        assert server.heard[0] == "EHLO tester.example.net"
        await ask(server, source=ip_address("127.0.0.77"))
        assert "EHLO [127.0.0.77]" in server.heard
        report = await ask(server, source=ip_address("192.0.2.1"))
        assert report.verdict is Verdict.UNKNOWN, "that is no address of this host"


async def test_progress_is_told():
    told: list[tuple[str, int, int]] = []
    async with Scripted() as server:
        await probe(server.target, QUICK, lambda *what: told.append(what))
    assert told == [("127.0.0.1 in plain", number, len(FORMS)) for number in range(len(FORMS))]


async def test_settings_that_make_no_sense_are_refused_before_anything_is_asked():
    async with Scripted() as server:
        with pytest.raises(GatepostError):
            await ask(server, outside="x@example.com")
    assert server.opened == 0


# ---- the one message


async def test_delivery_sends_one_marked_message_by_the_first_form():
    async with Scripted(rcpt=relays_plainly) as server:
        report = await ask(server, deliver=MINE)
    assert report.verdict is Verdict.OPEN
    assert report.delivery is not None
    assert (report.delivery.taken, report.delivery.form) == (True, "null-sender")
    (message,) = server.messages
    assert f"Subject: Relay test {report.delivery.token}\r\n" in message
    assert f"To: {MINE}\r\n" in message
    assert "Auto-Submitted: auto-generated\r\n" in message
    assert "RCPT TO:<me@elsewhere.example>" in server.heard


async def test_a_server_that_decides_after_the_content_is_asked_so_by_every_form_that_leads_to_the_person():
    async with Scripted(rcpt=lambda _: "250 Ok", content=lambda _: "550 5.7.1 Unable to relay") as server:
        assert (await ask(server)).verdict is Verdict.UNKNOWN
        report = await ask(server, deliver=MINE)
    assert report.delivery is not None
    assert not report.delivery.taken
    left = {name for name, outcome in outcomes(report).items() if outcome is not Outcome.REFUSED}
    assert left == {
        *("look-alike", "address-v4", "address-v6", "address-decimal", "address-bare"),  # nobody's addresses
        *("after-local", "pipelined"),  # would bother the postmaster
    }
    assert report.verdict is Verdict.UNKNOWN


async def test_a_server_that_takes_everything_and_the_message_too_is_open():
    with LenientBackend("strict") as backend:
        report = await probed(backend.port, replace(QUICK, deliver=MINE))
        (message,) = backend.transactions()
    assert report.verdict is Verdict.OPEN
    assert report.delivery is not None
    assert report.delivery.token.encode() in message.octets
    assert [recipient.argument for recipient in message.recipients] == [f"<{MINE}>".encode()]


async def test_a_message_into_a_mailbox_that_takes_everything_proves_nothing():
    def catch_all(argument: str) -> str:
        return "250 Ok" if domain_of(plain(argument.encode())) == OURS else DENIED

    async with Scripted(rcpt=catch_all) as server:
        report = await ask(server, deliver=MINE)
    assert report.verdict is Verdict.UNKNOWN
    assert report.delivery is not None
    assert report.delivery.taken
    assert any("your mailbox tells" in sentence for sentence in report.why)


async def test_no_message_where_nothing_is_accepted_and_one_over_all_rounds(tls):
    async with Scripted(tls=tls) as server:
        assert (await ask(server, deliver=MINE)).delivery is None
        assert server.messages == []
    async with Scripted(tls=tls, rcpt=relays_plainly) as server:
        await ask(server, deliver=MINE)
        assert len(server.messages) == 1


@pytest.mark.parametrize("reply", ["451 4.3.0 Later", "550 5.7.1 Spam", "552 5.3.4 Too big", None])
async def test_what_is_said_of_the_content_says_nothing_of_relaying(reply):
    def only_percent(argument: str) -> str:
        return "250 Ok" if argument == "<me%elsewhere.example@example.com>" else closed(argument)

    async with Scripted(rcpt=only_percent, content=lambda _: reply) as server:
        report = await ask(server, deliver=MINE)
    assert report.verdict is Verdict.UNKNOWN


async def test_a_message_never_goes_to_the_postmaster_as_well():
    server = Scripted()

    def after_local(argument: str) -> str:
        cleared = "RCPT TO:<postmaster@example.com>" in server.heard[-2:]
        return "250 Ok" if cleared and argument == f"<{MINE}>" else closed(argument)

    server.rcpt = after_local
    async with server:
        report = await ask(server, deliver=MINE)
    assert set(accepted(report)) == {"after-local", "pipelined"}
    assert (report.verdict, report.delivery, server.messages) == (Verdict.OPEN, None, [])


# ---- whatever it says

REPLIES = (
    "250 Ok", "250 Ok", DENIED, DENIED, "550 No", "450 Later", "421 Bye", "251 On", "354 Go ahead", "250-and", "25",
    "999 ?", "\x00\x1b[2J", "501 5.1.3 Bad", "554 5.7.1 Client host blocked using x", None,
)  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
async def test_whatever_a_server_says_closed_means_that_it_took_nobody(seed):
    chance = random.Random(seed)
    likely = chance.choices(REPLIES, k=1 + seed % 3) + [DENIED] * 20
    took: list[str] = []

    def rcpt(argument: str) -> str | None:
        reply = chance.choice(likely)
        if reply in ("250 Ok", "251 On") and argument != "<postmaster@example.com>":
            took.append(argument)
        return reply

    def mail(argument: str) -> str | None:
        return chance.choice([*likely, *["250 Ok"] * 40])

    async with Scripted(rcpt=rcpt, mail=mail) as server:
        report = await ask(server, timeout_s=0.05, budget_s=20.0)
    if report.verdict is Verdict.CLOSED:
        assert not [argument for argument in took if "no-such-user" not in argument or "relay-test" in argument]
        assert len(report.rounds[0].attempts) == report.rounds[0].planned
    for attempt in report.rounds[0].attempts:
        assert attempt.outcome is not Outcome.ACCEPTED or attempt.reply.startswith("25")
        assert attempt.outcome is not Outcome.UNCLEAR or attempt.note
