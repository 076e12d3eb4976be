"""How a backend reads addresses: what is asked, what its answers mean, and servers that answer oddly or not at all."""

from __future__ import annotations

import asyncio
import re

import pytest
from tests.backend.parts import settings
from tests.backend.scripted import Scripted
from tests.vectors.lenient import CONTENT_ENDS, LenientBackend
from tests.vectors.readings import ALL_RULES, domain_of, every_reading

from gatepost.backend import dialect
from gatepost.backend.dialect import (
    CHARACTERS,
    ENDS,
    FOREIGN,
    FORMS,
    NOBODY,
    POSTMASTER,
    QUESTIONS,
    Answer,
    Dialect,
    Form,
)
from gatepost.backend.settings import EmbeddedMailboxes, LmtpSocket
from gatepost.errors import BackendUnavailable
from gatepost.smtp.path import Mailbox, Shape

NOW = 1_795_650_000.0
NONCE = "k7w2q9x4"
YOU = Mailbox("you", "example.com")
BY_ID = {form.id: form for form in QUESTIONS}


async def asked(server, **changes) -> Dialect:
    return await dialect.ask(settings(server.port), "example.com", nonce=NONCE, now=NOW, **changes)


async def ended(server, progress=lambda _: None) -> dict[str, dialect.Heard]:
    heard = await dialect.end_of_data(settings(server.port), YOU, nonce=NONCE, now=NOW, progress=progress)
    assert [one.id for one in heard] == list(ENDS)
    return {one.id: one for one in heard}


def reader(habits=frozenset(), *, users=(b"postmaster@example.com",), relays=True):
    """Takes its users, and what any reading of the path leads elsewhere, as a server does that trusts its gate."""

    def judge(_session, argument):
        readings = every_reading(argument.partition(b":")[2], frozenset(habits))
        if any(reading in users for reading in readings):
            return b"250 2.1.5 Ok"
        if relays and any(domain_of(reading) not in ("", "example.com") for reading in readings):
            return b"250 2.1.5 Will relay"
        return b"550 5.1.1 No such user"

    return judge


# --- What is asked ----------------------------------------------------------------------------------------------------


async def test_nothing_but_mail_rcpt_and_rset_is_said():
    async with Scripted() as server:
        await asked(server)
        await server.until(lambda: server.open == 0)
        verbs = {verb for session in server.sessions for verb in session.verbs}
        assert verbs == {"EHLO", "MAIL", "RCPT", "RSET", "QUIT"}
        assert server.messages == []
        asked_for = [c for session in server.sessions for c in session.commands if c.startswith(b"RCPT")]
        assert asked_for == [b"RCPT TO:%b" % form.fill(NONCE, "example.com").encode() for form in QUESTIONS]
        # Servers slow down, and hang up, on whoever errs more often than that in one session.
        assert all(session.verbs.count("RCPT") <= dialect.QUESTIONS_A_CONNECTION for session in server.sessions)


def test_the_forms_are_named_once_and_sorted_by_what_the_gate_makes_of_them():
    assert len(BY_ID) == len(QUESTIONS)
    shapes = {form.id: form.shape for form in FORMS}
    assert shapes == {
        "percent": Shape.PERCENT,
        "bang": Shape.BANG,
        "caret": Shape.BANG,
        "source route": Shape.ROUTE,
        "quoted at": Shape.QUOTED_AT,
        "quoted percent": Shape.PERCENT,
        "two ats": None,
        "trailing at": None,
        "no domain": None,
        "percent, no domain": None,
        "bang, no domain": None,
        "quoted at, no domain": None,
        "encapsulated": Shape.ENCODED,
        "equals": Shape.PLAIN,
        "plus": Shape.PLAIN,
        "slash": Shape.PLAIN,
    }


async def test_another_domain_may_be_asked_for():
    async with Scripted() as server:
        found = await asked(server, elsewhere="elsewhere.example")
        assert found.elsewhere == "elsewhere.example"
        assert b"RCPT TO:<k7w2q9x4%elsewhere.example@example.com>" in [
            command for session in server.sessions for command in session.commands
        ]


@pytest.mark.parametrize(
    ("local_domain", "nonce"),
    [("example.com>\r\nDATA", "x"), ("EXAMPLE.com", "x"), ("example.com", "a b"), ("example.com", ""), ("a@b", "x")],
)
async def test_nothing_else_gets_into_a_command(local_domain, nonce):
    with pytest.raises(ValueError, match=r"nonce|domain"):
        await dialect.ask(settings(1), local_domain, nonce=nonce, now=NOW)


async def test_mailboxes_of_our_own_are_not_asked():
    embedded = settings(addresses=(EmbeddedMailboxes("x"),))
    assert not dialect.can_be_asked(embedded)
    with pytest.raises(ValueError, match="is no server"):
        await dialect.ask(embedded, "example.com", nonce=NONCE, now=NOW)


# --- What the answers mean --------------------------------------------------------------------------------------------


async def test_what_a_backend_is_and_offers_is_kept():
    async with Scripted(keywords=("PIPELINING", "SIZE 1000", "DSN")) as server:
        server.on["GREETING"] = lambda *_: b"220 mail.example.com ESMTP of 1999"
        found = await asked(server)
        assert found.greeting == "220 mail.example.com ESMTP of 1999"
        assert (found.backend, found.peer, found.at, found.tls) == ("mail", f"127.0.0.1:{server.port}", NOW, "")
        assert (found.keywords, found.size_octets) == (("DSN", "PIPELINING", "SIZE"), 1000)
        assert [heard.id for heard in found.heard] == [form.id for form in QUESTIONS]
        assert found.ends == ()


@pytest.mark.parametrize(
    ("habits", "reread"),
    [
        ((), set()),
        (("percent-hack",), {"percent"}),
        (("bang",), {"bang"}),
        (("unquote",), {"quoted at"}),
        (("percent-hack", "unquote"), {"percent", "quoted at", "quoted percent"}),
        (("imcea",), {"encapsulated"}),
        (("first-at",), {"two ats", "quoted at"}),
    ],
)
async def test_the_forms_that_a_backend_reads_as_another_address_are_found(habits, reread):
    async with Scripted() as server:
        server.on["RCPT"] = reader(habits)
        found = await asked(server)
    assert found.accept_all is Answer.REFUSED
    assert (found.answer(POSTMASTER), found.answer(FOREIGN)) == (Answer.TAKEN, Answer.TAKEN)
    assert {form.id for form in FORMS if form.lands_here and found.rereads(form) is Answer.TAKEN} == reread
    assert found.open_to_strangers == ()


async def test_a_backend_that_relays_nothing_gives_no_form_a_meaning():
    async with Scripted() as server:
        server.on["RCPT"] = reader(ALL_RULES, relays=False)
        found = await asked(server)
    assert found.answer(FOREIGN) is Answer.REFUSED
    assert {found.rereads(form) for form in FORMS} == {Answer.REFUSED}


async def test_what_strangers_may_send_and_a_backend_reads_in_its_own_way_is_a_hole():
    async with Scripted() as server:

        def verp(session, argument):
            return reader()(session, re.sub(rb"<(\w+)=([\w.]+)@example\.com>", rb"<\1@\2>", argument))

        server.on["RCPT"] = verp
        found = await asked(server)
    assert [form.id for form in found.open_to_strangers] == ["equals"]


def test_each_form_that_is_plain_to_the_gate_is_known_by_a_character_of_its_own():
    plain = [form for form in FORMS if form.shape is not None and not form.shape.routing]
    assert [form.character for form in plain] == list(CHARACTERS)
    assert len(set(CHARACTERS)) == len(plain)
    for form in plain:
        assert form.character in form.pattern.replace("{user}", "").replace("{elsewhere}", "")


@pytest.mark.parametrize("mode", ["strict", "percent-hack", "source-route", "old-unix", "all"])
async def test_of_a_backend_that_takes_everybody_nobody_can_tell_what_it_makes_of_them(mode):
    with LenientBackend(mode) as server:
        found = await asked(server)
        assert server.transactions() == []
    assert found.accept_all is Answer.TAKEN
    assert {heard.answer for heard in found.heard} == {Answer.TAKEN}
    assert {found.rereads(form) for form in FORMS if form.lands_here} == {Answer.UNKNOWN}
    assert found.open_to_strangers == ()


async def test_one_refusal_is_enough_for_a_backend_that_knows_its_users():
    async with Scripted() as server:
        server.on["RCPT"] = lambda _, argument: b"550 5.1.1 No" if b"info-" in argument else b"250 2.1.5 Ok"
        assert (await asked(server)).accept_all is Answer.REFUSED


async def test_an_lmtp_server_is_asked_as_well(tmp_path):
    async with Scripted(lmtp=True, path=tmp_path / "lmtp.sock") as server:
        server.on["RCPT"] = reader()
        lmtp = settings(addresses=(LmtpSocket(str(tmp_path / "lmtp.sock")),))
        found = await dialect.ask(lmtp, "example.com", nonce=NONCE, now=NOW)
        assert server.sessions[0].verbs[0] == "LHLO"
    assert found.accept_all is Answer.REFUSED
    assert found.peer == f"lmtp:{tmp_path}/lmtp.sock"


# --- Odd servers ------------------------------------------------------------------------------------------------------


async def test_greylisting_is_no_answer():
    async with Scripted() as server:
        server.on["RCPT"] = lambda *_: b"450 4.2.0 Greylisted, come back in 5 minutes"
        found = await asked(server)
    assert found.accept_all is Answer.UNKNOWN
    assert {(heard.answer, heard.said) for heard in found.heard} == {
        (Answer.UNKNOWN, "450 4.2.0 Greylisted, come back in 5 minutes")
    }


@pytest.mark.parametrize("reply", [b"454 4.7.1 Relay access denied", b"553 No", b"500"])
async def test_what_will_not_change_is_a_refusal(reply):
    async with Scripted() as server:
        server.on["RCPT"] = lambda *_: reply
        assert {heard.answer for heard in (await asked(server)).heard} == {Answer.REFUSED}


async def test_a_server_that_hangs_up_on_some_forms_is_asked_the_others():
    async with Scripted() as server:

        def touchy(session, argument):
            if b"%" in argument and b'"' not in argument and b"example.com" in argument:
                session.send(b"421 4.7.0 Go away\r\n")
                session.hang_up_soon()
            return reader()(session, argument)

        server.on["RCPT"] = touchy
        found = await asked(server)
    assert {heard.id: heard.said for heard in found.heard if heard.answer is Answer.UNKNOWN} == {
        "percent": "421 4.7.0 Go away"
    }
    assert found.answer(FORMS[-1]) is Answer.REFUSED


async def test_a_server_that_always_hangs_up_is_left_alone_soon():
    async with Scripted() as server:
        server.on["RCPT"] = lambda session, _: session.hang_up()
        found = await asked(server)
        assert len(server.sessions) == dialect.LOSSES_MAX
    assert {heard.answer for heard in found.heard} == {Answer.UNKNOWN}
    assert len(found.heard) == len(QUESTIONS)


@pytest.mark.parametrize("refusal", [b"550 5.7.1 No bounces here", b"450 4.7.1 Later"])
async def test_where_the_null_reverse_path_is_refused_the_postmaster_asks(refusal):
    async with Scripted() as server:
        server.on["MAIL"] = lambda _, argument: refusal if b"<>" in argument else b"250 2.1.0 Ok"
        server.on["RCPT"] = reader()
        assert (await asked(server)).accept_all is Answer.REFUSED
        assert b"MAIL FROM:<postmaster@example.com>" in server.sessions[0].commands


async def test_where_no_mail_is_taken_nothing_is_known():
    async with Scripted() as server:
        server.on["MAIL"] = lambda *_: b"451 4.3.0 Disk full"
        found = await asked(server)
    assert {(heard.answer, heard.said) for heard in found.heard} == {(Answer.UNKNOWN, "451 4.3.0 Disk full")}


async def test_a_server_that_says_nothing_costs_no_more_than_the_budget():
    async with Scripted() as server:
        server.on["RCPT"] = lambda *_: None
        async with asyncio.timeout(10):
            found = await asked(server, budget_s=0.5)
    assert {heard.answer for heard in found.heard} == {Answer.UNKNOWN}
    assert found.heard[0].said == "no answer in time"
    assert found.heard[-1].said == "no time was left to ask"


async def test_a_server_that_is_not_there_is_said_to_be():
    async with Scripted() as server:
        pass
    with pytest.raises(BackendUnavailable, match="Connect"):
        await asked(server)


async def test_a_server_that_does_not_greet_is_said_to():
    async with Scripted() as server:
        server.on["GREETING"] = lambda *_: b"554 5.3.2 No service"
        with pytest.raises(BackendUnavailable, match="554"):
            await asked(server)


async def test_the_second_address_is_asked_where_the_first_is_gone():
    async with Scripted() as gone:
        pass
    async with Scripted() as server:
        found = await dialect.ask(settings(gone.port, server.port), "example.com", nonce=NONCE, now=NOW)
    assert found.peer == f"127.0.0.1:{server.port}"


@pytest.mark.parametrize("code", [b"199", b"250-", b"lines"])
async def test_what_is_no_reply_is_no_answer(code):
    async with Scripted() as server:
        server.on["RCPT"] = lambda *_: code + b" what\r\n"
        found = await asked(server, budget_s=1.0)
    assert {heard.answer for heard in found.heard} == {Answer.UNKNOWN}


async def test_words_are_cut():
    async with Scripted() as server:
        server.on["RCPT"] = lambda *_: b"550 5.1.1 " + b"x" * 1000
        found = await asked(server)
    assert {len(heard.said) for heard in found.heard} == {dialect.SAID_CHARACTERS_MAX}


# --- Ends of content --------------------------------------------------------------------------------------------------


def expected_ends(mode_habits) -> set[str]:
    """What the lenient server itself takes, by its own patterns."""
    patterns = [re.compile(p + rb"\Z") for habit, more in CONTENT_ENDS.items() if habit in mode_habits for p in more]
    return {name for name, end in ENDS.items() if any(pattern.search(end) for pattern in patterns)}


@pytest.mark.parametrize(
    "mode", ["strict", "lf-dot-lf", "lf-dot-crlf", "crlf-dot-lf", "cr-dot-cr", "crcrlf", "old-unix", "all"]
)
async def test_the_ends_that_a_server_takes_are_found(mode):
    with LenientBackend(mode) as server:
        heard = await ended(server)
        taken = {name for name, one in heard.items() if one.answer is Answer.TAKEN}
        assert taken == expected_ends(server.habits)
        assert Answer.UNKNOWN not in {one.answer for one in heard.values()}
        assert {message.reverse_path for message in server.transactions()} == {b""}
        assert {r.argument for m in server.transactions() for r in m.recipients} == {b"<you@example.com>"}


async def test_each_end_is_tried_on_a_connection_of_its_own_and_told_before():
    names: list[str] = []
    async with Scripted() as server:
        heard = await ended(server, names.append)
        assert len(server.sessions) == len(ENDS) + 1
        assert len(server.messages) == len(ENDS) + 1
        assert b"Nothing needs to be done." in server.messages[0].content
        assert b"Auto-Submitted: auto-generated\r\n" in server.messages[0].content
    assert names == ["CRLF . CRLF", *ENDS]
    assert {one.answer for one in heard.values()} == {Answer.REFUSED}


async def test_where_the_message_itself_is_refused_nothing_is_known_and_nothing_more_is_sent():
    async with Scripted() as server:
        server.on["RCPT"] = lambda *_: b"550 5.1.1 No such user"
        heard = await ended(server)
        assert len(server.sessions) == 1
    assert {(one.answer, one.said) for one in heard.values()} == {(Answer.UNKNOWN, "550 5.1.1 No such user")}


async def test_a_server_that_refuses_a_bare_lf_and_hangs_up_takes_no_such_end():
    async with Scripted() as server:

        def block(session, octets):
            if re.search(rb"(?<!\r)\n", octets):
                session.send(b"550 5.5.2 bare <LF> received\r\n")
                session.hang_up_soon()

        server.on["BLOCK"] = block
        heard = await ended(server)
    assert heard["LF . LF"].answer is Answer.REFUSED
    assert heard["LF . LF"].said == "550 5.5.2 bare <LF> received"
    assert heard["CR . CR"].answer is Answer.REFUSED


async def test_a_server_that_hangs_up_for_what_stood_behind_its_end_is_asked_without_it():
    """As OpenSMTPD does: its end is LF . LF, and it takes no command before it has answered."""
    async with Scripted() as server:

        def block(session, octets):
            if b"\n.\nRSET" in octets and b"\r\n.\nRSET" not in octets:
                session.send(b"500 5.5.1 Pipelining not supported\r\n")
                session.hang_up_soon()
            if octets.endswith(b"\n.\n") and not octets.endswith(b"\r\n.\n"):
                session.send(b"250 2.0.0 Taken\r\n")

        server.on["BLOCK"] = block
        heard = await ended(server)
    assert (heard["LF . LF"].answer, heard["LF . LF"].said) == (Answer.TAKEN, "250 2.0.0 Taken")
    assert heard["CRLF . LF"].answer is Answer.REFUSED


async def test_a_server_that_goes_away_in_between_leaves_the_rest_unknown():
    async with Scripted() as server:

        def content(session, _octets):
            if len(server.sessions) == 3:
                listening, server._server = server._server, None
                assert listening is not None
                listening.close()  # no more connections
                session.hang_up()
            return b"250 2.0.0 Queued"

        server.on["CONTENT"] = content
        heard = await ended(server)
    answers = [one.answer for one in heard.values()]
    assert answers == [Answer.REFUSED, *[Answer.UNKNOWN] * (len(ENDS) - 1)]


def test_a_form_says_what_it_is():
    assert NOBODY[0] == Form("unknown user", "<{user}@{ours}>")
    assert FOREIGN.fill("u", "ours.example") == "<u@elsewhere.invalid>"
