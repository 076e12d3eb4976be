"""A transaction at a backend that behaves, that refuses, and that dies at every moment."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from tests.backend.parts import SENDER, TEXT, TRACE, Notes, backend_of, begin, content_of, recipient, send
from tests.backend.scripted import KEYWORDS, Answer, Scripted, Session

from gatepost.backend.connection import JOIN_OCTETS
from gatepost.backend.content import Content, Memory
from gatepost.backend.settings import LmtpSocket
from gatepost.errors import StorageError
from gatepost.smtp.command import NO_RCPT_PARAMETERS, MailParameters, RcptParameters
from gatepost.smtp.path import NULL_REVERSE_PATH, Mailbox
from gatepost.smtp.reply import Reply

PLAIN = tuple(keyword for keyword in KEYWORDS if keyword != "PIPELINING")


def once(answer: bytes | None, *, hang_up: bool = False, then: bytes):
    """A rule that does something the first time, and answers ``then`` afterwards."""
    done = False

    def rule(session: Session, _argument: bytes) -> Answer:
        nonlocal done
        if done:
            return then
        done = True
        if hang_up:
            session.hang_up()
        return answer

    return rule


def code(reply: Reply) -> str:
    return reply.octets().decode()[:9]


# ---- all is well


async def test_a_message_and_another_over_the_same_connection():
    async with Scripted() as server:
        backend = backend_of(server.port)
        reply = await send(backend)
        assert reply.octets() == b"250 2.0.0 Queued as 1\r\n"
        assert (await send(backend, TEXT, "bob", "carol")).octets() == b"250 2.0.0 Queued as 2\r\n"
        first, second = server.messages
        assert first.mail == b"FROM:<sender@elsewhere.test>"
        assert first.recipients == [b"TO:<alice@example.com>"]
        assert first.content == TRACE + TEXT
        assert second.recipients == [b"TO:<bob@example.com>", b"TO:<carol@example.com>"]
        (session,) = server.sessions
        assert session.verbs == ["EHLO", "MAIL", "RCPT", "DATA", "MAIL", "RCPT", "RCPT", "DATA"]
        assert session.commands[0] == b"EHLO gate.example.com"
        assert session.together[1] == 2, "MAIL and the first RCPT come together"
        await backend.close()
        assert session.verbs[-1] == "QUIT"


async def test_nothing_is_said_before_the_first_recipient():
    async with Scripted() as server:
        backend = backend_of(server.port)
        begin(backend).abort()
        begin(backend)
        await asyncio.sleep(0.02)
        assert server.sessions == []
        await backend.close()


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        b"\r\n",
        TEXT,
        b".\r\n",
        b"..\r\n.x\r\n\r\n.\r\n.\r\n",
        b"Subject: x\r\n\r\n.\r\nMAIL FROM:<a@b>\r\n",
        bytes(range(128, 256)) + b"\x01\t \r\n",
        b"x" * 998 + b"\r\n" + b"." * 998 + b"\r\n",
        b"no end of line",
        b".no end of line",
        b"." + b"y" * 70 + b"\r\n" + (b"x" * 76 + b"\r\n") * 20_000,
        (b"x" * 76 + b"\r\n.\r\n") * 3000 + b"no end of line",
    ],
    ids=lambda octets: repr(octets[:12]) + str(len(octets)),
)
@pytest.mark.parametrize("block", [0, 100, 70_000])
async def test_content_arrives_octet_for_octet(octets, block):
    async with Scripted() as server:
        backend = backend_of(server.port)
        delivery = begin(backend)
        await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)
        assert (await delivery.deliver(content_of(octets, block=block), TRACE)).code == 250
        end = b"" if octets.endswith(b"\r\n") or not octets else b"\r\n"
        assert server.messages[0].content == TRACE + octets + end
        await backend.close()


async def test_content_from_a_temporary_file_arrives_octet_for_octet(tmp_path):
    octets = b"".join(b"%d " % n * 10 + b"\r\n.\r\n" for n in range(60_000))
    memory = Memory(1 << 20, 1 << 16, str(tmp_path))
    async with Scripted() as server:
        backend = backend_of(server.port)
        delivery = begin(backend)
        await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)
        content = content_of(octets, block=50_000, memory=memory)
        assert (await delivery.deliver(content, TRACE)).code == 250
        content.close()
        assert server.messages[0].content == TRACE + octets
        await backend.close()


async def test_without_pipelining_each_command_waits_for_its_reply():
    async with Scripted(keywords=PLAIN) as server:
        backend = backend_of(server.port)
        assert (await send(backend, TEXT, "alice", "bob")).code == 250
        assert (await send(backend)).code == 250
        assert set(server.sessions[0].together) == {1}
        assert len(server.messages) == 2
        await backend.close()


async def test_a_server_that_knows_no_ehlo_gets_helo_and_no_parameters():
    async with Scripted() as server:
        server.on["EHLO"] = lambda _session, _argument: b"502 5.5.1 Not implemented"
        backend = backend_of(server.port)
        delivery = begin(backend, SENDER, MailParameters(size_octets=100, body="8BITMIME", ret="FULL"))
        parameters = RcptParameters(notify=("NEVER",))
        assert (await delivery.rcpt(recipient(), parameters)).code == 250
        assert (await delivery.deliver(content_of(TEXT), TRACE)).code == 250
        assert server.sessions[0].commands[:4] == [
            b"EHLO gate.example.com",
            b"HELO gate.example.com",
            b"MAIL FROM:<sender@elsewhere.test>",
            b"RCPT TO:<alice@example.com>",
        ]
        assert backend.capabilities is not None
        assert backend.capabilities.keywords == frozenset()
        await backend.close()


async def test_parameters_go_to_a_server_that_offers_them():
    async with Scripted() as server:
        backend = backend_of(server.port)
        delivery = begin(backend, NULL_REVERSE_PATH, MailParameters(100, "8BITMIME", True, "FULL", "abc+d", "somebody"))
        assert (await delivery.rcpt(recipient(), RcptParameters(("NEVER",), ("rfc822", "a@b.test")))).code == 250
        await delivery.deliver(content_of(TEXT), TRACE)
        assert server.messages[0].mail == b"FROM:<> SIZE=100 BODY=8BITMIME SMTPUTF8 RET=FULL ENVID=abc+2Bd"
        assert server.messages[0].recipients == [b"TO:<alice@example.com> NOTIFY=NEVER ORCPT=rfc822;a+40b.test"]
        await backend.close()


# ---- the backend refuses


async def test_an_unknown_user_is_the_backends_own_answer():
    async with Scripted() as server:
        server.on["RCPT"] = lambda _session, argument: (
            b"550-5.1.1 <bob>: no such user\r\n550 5.1.1 ask the postmaster" if b"bob" in argument else b"250 2.1.5 Ok"
        )
        backend = backend_of(server.port)
        delivery = begin(backend)
        refusal = await delivery.rcpt(recipient("bob"), NO_RCPT_PARAMETERS)
        assert refusal.octets() == b"550-5.1.1 <bob>: no such user\r\n550 5.1.1 ask the postmaster\r\n"
        assert (await delivery.rcpt(recipient("alice"), NO_RCPT_PARAMETERS)).code == 250
        assert (await delivery.rcpt(recipient("bob"), NO_RCPT_PARAMETERS)).code == 550
        assert (await delivery.deliver(content_of(TEXT), TRACE)).code == 250
        assert server.messages[0].recipients == [b"TO:<alice@example.com>"]
        await backend.close()


@pytest.mark.parametrize("keywords", [KEYWORDS, PLAIN])
async def test_a_refused_mail_answers_each_recipient_and_is_not_asked_again(keywords):
    async with Scripted(keywords=keywords) as server:
        server.on["MAIL"] = lambda _session, argument: (
            b"550 5.1.8 Sender address rejected" if b"elsewhere" in argument else b"250 2.1.0 Ok"
        )
        backend = backend_of(server.port)
        delivery = begin(backend)
        for local_part in ("alice", "bob"):
            reply = await delivery.rcpt(recipient(local_part), NO_RCPT_PARAMETERS)
            assert reply.octets() == b"550 5.1.8 Sender address rejected\r\n"
        delivery.abort()
        assert server.sessions[0].verbs.count("MAIL") == 1
        other = begin(backend, NULL_REVERSE_PATH)
        assert (await other.rcpt(recipient(), NO_RCPT_PARAMETERS)).code == 250
        assert (await other.deliver(content_of(TEXT), TRACE)).code == 250
        assert len(server.sessions) == 1
        await backend.close()


@pytest.mark.parametrize("answer", [b"554 5.5.1 No valid recipients", b"451 4.3.0 Later"])
async def test_a_refused_data_is_the_answer_to_content(answer):
    async with Scripted() as server:
        server.on["DATA"] = once(answer, then=b"354 Go ahead")
        backend = backend_of(server.port)
        assert (await send(backend)).octets() == answer + b"\r\n"
        assert (await send(backend)).code == 250
        assert server.sessions[0].verbs[4:6] == ["RSET", "MAIL"], "the next one starts clean"
        assert len(server.messages) == 1
        await backend.close()


@pytest.mark.parametrize("answer", [b"552 5.3.4 Too large", b"451 4.7.1 Greylisted, later"])
async def test_refused_content_is_the_backends_own_answer(answer):
    async with Scripted() as server:
        server.on["CONTENT"] = once(answer, then=b"250 2.0.0 Ok")
        backend = backend_of(server.port)
        assert (await send(backend)).octets() == answer + b"\r\n"
        assert (await send(backend)).code == 250
        assert server.sessions[0].verbs[4:6] == ["RSET", "MAIL"]
        assert len(server.messages) == 1
        await backend.close()


async def test_no_accepted_recipient_means_no_content():
    async with Scripted() as server:
        server.on["RCPT"] = lambda _session, _argument: b"550 5.1.1 no"
        backend = backend_of(server.port)
        delivery = begin(backend)
        await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)
        assert code(await delivery.deliver(content_of(TEXT), TRACE)) == "554 5.5.1"
        assert "DATA" not in server.sessions[0].verbs
        await backend.close()


# ---- what the backend cannot carry


async def test_eight_bit_content_is_not_sent_where_8bitmime_is_not_offered():
    async with Scripted(keywords=("PIPELINING",)) as server:
        backend = backend_of(server.port)
        assert code(await send(backend, "Grüße\r\n".encode())) == "554 5.6.3"
        assert (await send(backend, b"Gruesse\r\n")).code == 250
        assert [message.content for message in server.messages] == [TRACE + b"Gruesse\r\n"]
        assert len(server.sessions) == 1
        await backend.close()


async def test_utf8_addresses_are_not_sent_where_smtputf8_is_not_offered():
    async with Scripted(keywords=("PIPELINING", "8BITMIME")) as server:
        backend = backend_of(server.port)
        utf8 = MailParameters(smtputf8=True)
        delivery = begin(backend, SENDER, utf8)
        assert code(await delivery.rcpt(recipient("jürgen"), NO_RCPT_PARAMETERS)) == "553 5.6.7"
        assert (await delivery.rcpt(recipient("alice"), NO_RCPT_PARAMETERS)).code == 250
        assert code(await delivery.rcpt(recipient("jürgen"), NO_RCPT_PARAMETERS)) == "553 5.6.7"
        assert (await delivery.deliver(content_of(TEXT), TRACE)).code == 250
        delivery = begin(backend, Mailbox("jürgen", "elsewhere.test"), utf8)
        assert code(await delivery.rcpt(recipient("alice"), NO_RCPT_PARAMETERS)) == "553 5.6.7"
        delivery = begin(backend, SENDER, utf8)
        assert (await delivery.rcpt(recipient("alice"), NO_RCPT_PARAMETERS)).code == 250
        reply = await delivery.deliver(content_of("Subject: Grüße\r\n\r\n".encode()), TRACE)
        assert code(reply) == "554 5.6.9"
        assert all(command.isascii() for session in server.sessions for command in session.commands)
        assert len(server.messages) == 1
        await backend.close()


async def test_utf8_addresses_go_where_they_are_taken():
    async with Scripted() as server:
        backend = backend_of(server.port)
        delivery = begin(backend, Mailbox("jürgen", "elsewhere.test"), MailParameters(smtputf8=True))
        assert (await delivery.rcpt(recipient("jürgen"), NO_RCPT_PARAMETERS)).code == 250
        assert (await delivery.deliver(content_of("Subject: Grüße\r\n\r\n".encode()), TRACE)).code == 250
        assert server.messages[0].mail == "FROM:<jürgen@elsewhere.test> SMTPUTF8".encode()
        assert server.messages[0].recipients == ["TO:<jürgen@example.com>".encode()]
        await backend.close()


# ---- LMTP


async def test_lmtp_takes_one_recipient_a_transaction(tmp_path):
    async with Scripted(lmtp=True, path=tmp_path / "lmtp") as server:
        backend = backend_of(addresses=(LmtpSocket(str(tmp_path / "lmtp")),))
        delivery = begin(backend)
        assert (await delivery.rcpt(recipient("alice"), NO_RCPT_PARAMETERS)).code == 250
        assert code(await delivery.rcpt(recipient("bob"), NO_RCPT_PARAMETERS)) == "452 4.5.3"
        assert (await delivery.deliver(content_of(TEXT), TRACE)).code == 250
        assert (await send(backend, b".\r\n", "bob")).octets() == b"250 2.0.0 Stored for TO:<bob@example.com>\r\n"
        assert [message.recipients for message in server.messages] == [
            [b"TO:<alice@example.com>"],
            [b"TO:<bob@example.com>"],
        ]
        assert server.sessions[0].commands[0] == b"LHLO gate.example.com"
        assert len(server.sessions) == 1
        await backend.close()


async def test_lmtp_asks_on_after_a_refused_recipient(tmp_path):
    async with Scripted(lmtp=True, path=tmp_path / "lmtp") as server:
        server.on["RCPT"] = lambda _session, argument: b"550 5.1.1 no" if b"bob" in argument else b"250 2.1.5 Ok"
        server.on["CONTENT"] = lambda _session, _argument: b"452 4.2.2 Mailbox full"
        backend = backend_of(addresses=(LmtpSocket(str(tmp_path / "lmtp")),))
        delivery = begin(backend)
        assert (await delivery.rcpt(recipient("bob"), NO_RCPT_PARAMETERS)).code == 550
        assert (await delivery.rcpt(recipient("alice"), NO_RCPT_PARAMETERS)).code == 250
        assert (await delivery.deliver(content_of(TEXT), TRACE)).octets() == b"452 4.2.2 Mailbox full\r\n"
        await backend.close()


# ---- a pooled connection has died: nobody notices


async def test_a_pooled_connection_that_was_closed_is_not_used():
    async with Scripted() as server:
        backend = backend_of(server.port)
        await send(backend)
        server.sessions[0].writer.transport.abort()
        await asyncio.sleep(0.02)
        assert (await send(backend)).code == 250
        assert len(server.sessions) == 2
        await backend.close()


@pytest.mark.parametrize("keywords", [KEYWORDS, PLAIN])
@pytest.mark.parametrize("verb", ["MAIL", "RCPT", "DATA"])
@pytest.mark.parametrize("hang_up", [True, False])
async def test_a_pooled_connection_that_dies_is_replaced(keywords, verb, hang_up):
    async with Scripted(keywords=keywords) as server:
        notes = Notes()
        backend = backend_of(server.port, notes=notes)
        await send(backend)
        server.on[verb] = once(
            b"421 4.4.2 Idle too long", hang_up=hang_up, then=b"354 Go on" if verb == "DATA" else b"250 2.0.0 Ok"
        )
        assert (await send(backend, TEXT, "alice", "bob")).code == 250
        assert [message.recipients for message in server.messages[1:]] == [
            [b"TO:<alice@example.com>", b"TO:<bob@example.com>"]
        ]
        assert len(server.sessions) == 2
        assert "retry" in notes.measures
        await backend.close()


async def test_recipients_already_accepted_are_told_to_the_new_connection():
    async with Scripted() as server:
        backend = backend_of(server.port)
        delivery = begin(backend)
        for local_part in ("alice", "bob"):
            assert (await delivery.rcpt(recipient(local_part), NO_RCPT_PARAMETERS)).code == 250
        server.sessions[0].writer.transport.abort()
        assert (await delivery.rcpt(recipient("carol"), NO_RCPT_PARAMETERS)).code == 250
        server.sessions[1].writer.transport.abort()
        await asyncio.sleep(0.02)
        assert (await delivery.deliver(content_of(TEXT), TRACE)).code == 250
        (message,) = server.messages
        assert message.session is server.sessions[2]
        assert message.recipients == [b"TO:<%b@example.com>" % name for name in (b"alice", b"bob", b"carol")]
        assert server.sessions[2].together[1] == 4, "in one group"
        await backend.close()


async def test_content_cut_short_is_sent_again_as_long_as_its_end_was_not():
    octets = (b"x" * 76 + b"\r\n") * 400_000  # more than the sockets hold
    async with Scripted() as server:
        server.on["BLOCK"] = once(None, hang_up=True, then=b"")
        backend = backend_of(server.port)
        assert (await send(backend, octets)).code == 250
        assert [message.content for message in server.messages] == [TRACE + octets]
        assert len(server.sessions) == 2
        await backend.close()


@pytest.mark.parametrize("what", ["RCPT", "MAIL"])
async def test_a_backend_that_changes_its_mind_about_a_recipient_gets_no_message(what):
    async with Scripted() as server:
        backend = backend_of(server.port)
        delivery = begin(backend)
        for local_part in ("alice", "bob"):
            await delivery.rcpt(recipient(local_part), NO_RCPT_PARAMETERS)
        server.sessions[0].writer.transport.abort()
        await asyncio.sleep(0.02)
        server.on[what] = lambda _session, _argument: b"550 5.1.1 No such user"
        assert code(await delivery.rcpt(recipient("carol"), NO_RCPT_PARAMETERS)) == "451 4.3.0"
        server.on.clear()
        assert code(await delivery.rcpt(recipient("dave"), NO_RCPT_PARAMETERS)) == "451 4.3.0"
        assert code(await delivery.deliver(content_of(TEXT), TRACE)) == "451 4.3.0"
        assert server.messages == []
        await backend.close()


async def test_nor_one_that_does_so_before_the_content():
    async with Scripted() as server:
        backend = backend_of(server.port)
        delivery = begin(backend)
        for local_part in ("alice", "bob"):
            await delivery.rcpt(recipient(local_part), NO_RCPT_PARAMETERS)
        server.sessions[0].writer.transport.abort()
        await asyncio.sleep(0.02)
        server.on["RCPT"] = lambda _session, argument: b"452 4.2.2 Full" if b"bob" in argument else b"250 Ok"
        assert code(await delivery.deliver(content_of(TEXT), TRACE)) == "451 4.3.0"
        assert server.messages == []
        assert "DATA" not in server.sessions[1].verbs
        await backend.close()


async def test_a_new_connection_that_can_carry_less_is_a_change_too():
    async with Scripted() as server:
        backend = backend_of(server.port)
        delivery = begin(backend, SENDER, MailParameters(smtputf8=True))
        assert (await delivery.rcpt(recipient("jürgen"), NO_RCPT_PARAMETERS)).code == 250
        server.sessions[0].writer.transport.abort()
        await asyncio.sleep(0.02)
        server.keywords = ("PIPELINING", "8BITMIME")
        assert code(await delivery.deliver(content_of(TEXT), TRACE)) == "451 4.3.0"
        assert server.messages == []
        await backend.close()


# ---- it dies for good


async def test_421_twice_defers():
    async with Scripted() as server:
        server.on["MAIL"] = lambda _session, _argument: b"421 4.3.2 Shutting down"
        backend = backend_of(server.port)
        assert code(await send(backend)) == "451 4.4.1"
        assert len(server.sessions) == 2
        await backend.close()


@pytest.mark.parametrize("verb", ["MAIL", "RCPT", "DATA"])
async def test_hanging_up_twice_defers(verb):
    async with Scripted() as server:
        server.on[verb] = lambda session, _argument: session.hang_up()
        backend = backend_of(server.port)
        assert code(await send(backend)) == "451 4.4.2"
        assert len(server.sessions) == 2
        assert server.messages == []
        await backend.close()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (None, "451 4.4.2"),
        (b"421 4.3.0 Crashed", "451 4.4.1"),
        (b"nonsense", "451 4.4.2"),
        (b"354 Again?", "451 4.4.1"),
    ],
)
@pytest.mark.parametrize("octets", [TEXT, (b"x" * 76 + b"\r\n") * 10_000], ids=["small", "large"])
async def test_without_a_final_answer_the_message_is_deferred_and_not_sent_again(answer, expected, octets):
    async with Scripted() as server:

        def rule(session: Session, _argument: bytes) -> Answer:
            if answer is None:
                session.hang_up()
            return answer

        server.on["CONTENT"] = rule
        backend = backend_of(server.port)
        assert code(await send(backend, octets)) == expected
        assert len(server.sessions) == 1
        assert server.sessions[0].verbs.count("DATA") == 1
        server.on.clear()
        assert (await send(backend)).code == 250
        assert len(server.sessions) == 2, "and the connection is not used again"
        await backend.close()


@pytest.mark.parametrize("answer", [b"250 2.0.0 Ok", b"200 Ok", b"334 "])
async def test_data_without_354_is_deferred_and_closes_the_connection(answer):
    async with Scripted() as server:
        server.on["DATA"] = once(answer, then=b"354 Go ahead")
        backend = backend_of(server.port)
        assert code(await send(backend)) == "451 4.4.1"
        assert server.messages == []
        assert (await send(backend)).code == 250
        assert len(server.sessions) == 2
        await backend.close()


@pytest.mark.parametrize("verb", ["MAIL", "RCPT"])
async def test_354_where_it_makes_no_sense_is_deferred_and_closes_the_connection(verb):
    async with Scripted() as server:
        server.on[verb] = once(b"354 Go ahead", then=b"250 2.0.0 Ok")
        backend = backend_of(server.port)
        assert code(await send(backend)) == "451 4.4.1"
        assert (await send(backend)).code == 250
        assert len(server.sessions) == 2
        await backend.close()


# ---- the backend speaks out of turn


@pytest.mark.parametrize("extra", [b"250 2.0.0 Really\r\n", b"421 4.0.0 Bye\r\n", b"2", b"\r\n"])
async def test_octets_behind_the_final_answer_end_the_connection(extra):
    async with Scripted() as server:
        server.on["CONTENT"] = once(b"250 2.0.0 Ok\r\n" + extra + b"\n", then=b"250 2.0.0 Ok")
        backend = backend_of(server.port)
        assert (await send(backend)).code == 250, "the answer itself came, and counts"
        assert (await send(backend)).code == 250
        assert len(server.sessions) == 2
        await backend.close()


async def test_an_idle_connection_on_which_something_is_said_is_not_used_again():
    async with Scripted() as server:
        backend = backend_of(server.port)
        await send(backend)
        server.sessions[0].send(b"250 2.1.0 Ok\r\n")
        await asyncio.sleep(0.02)
        assert (await send(backend)).code == 250
        assert len(server.sessions) == 2
        await backend.close()


@pytest.mark.parametrize("answer", [b"552 5.3.4 Too large", b"451 4.3.1 Disk full"])
async def test_a_refusal_in_the_middle_of_content_is_passed_on_and_closes_the_connection(answer):
    async with Scripted() as server:
        stalled = asyncio.Event()

        async def rule(session: Session, _argument: bytes) -> Answer:
            session.send(answer + b"\r\n")
            await stalled.wait()
            return b""

        server.on["BLOCK"] = rule
        backend = backend_of(server.port)
        reply = await send(backend, (b"x" * 76 + b"\r\n") * 400_000)
        assert reply.octets() == answer + b"\r\n"
        server.on.clear()
        stalled.set()
        assert (await send(backend)).code == 250
        assert [message.content for message in server.messages] == [TRACE + TEXT]
        await backend.close()


async def test_250_in_the_middle_of_content_is_no_250():
    async with Scripted() as server:
        stalled = asyncio.Event()

        async def rule(session: Session, _argument: bytes) -> Answer:
            session.send(b"250 2.0.0 Thanks, enough\r\n")
            await stalled.wait()
            return b""

        server.on["BLOCK"] = rule
        backend = backend_of(server.port)
        assert code(await send(backend, (b"x" * 76 + b"\r\n") * 400_000)) == "451 4.4.2"
        stalled.set()
        assert len(server.sessions) == 1, "it may believe it has the message: not sent again"
        await backend.close()


@pytest.mark.parametrize(
    "answer",
    [b"250-one\r\n550 two\r\n", b"250 Ok\n", b"Ok\r\n", b"250 " + b"x" * 3000 + b"\r\n", b"250-x\r\n" * 200],
    ids=["two codes", "bare LF", "no code", "long", "many lines"],
)
async def test_a_malformed_answer_never_counts_as_yes(answer):
    async with Scripted() as server:
        server.on["RCPT"] = lambda _session, _argument: answer
        backend = backend_of(server.port)
        assert code(await send(backend)) == "451 4.4.2"
        assert "DATA" not in [verb for session in server.sessions for verb in session.verbs]
        await backend.close()


# ---- the backend is silent


@pytest.mark.parametrize(
    ("verb", "setting", "expected"),
    [
        ("RCPT", "command_timeout_s", "451 4.4.2"),
        ("DATA", "data_timeout_s", "451 4.4.2"),
        ("CONTENT", "final_timeout_s", "451 4.4.2"),
    ],
)
async def test_silence_is_deferred(verb, setting, expected):
    async with Scripted() as server:
        server.on[verb] = lambda _session, _argument: None
        backend = backend_of(server.port, **{setting: 0.1})
        assert code(await send(backend)) == expected
        assert len(server.messages) == 0
        assert len(server.sessions) == 1, "who was silent for so long is not asked again at once"
        await backend.close()


async def test_a_backend_that_stops_reading_content_is_given_up():
    async with Scripted() as server:
        stalled = asyncio.Event()

        async def rule(_session: Session, _argument: bytes) -> Answer:
            await stalled.wait()
            return b""

        server.on["BLOCK"] = rule
        backend = backend_of(server.port, block_timeout_s=0.1)
        assert code(await send(backend, (b"x" * 76 + b"\r\n") * 400_000)) == "451 4.4.2"
        stalled.set()
        assert server.messages == []
        await backend.close()


# ---- ours


class Unreadable(Content):
    def chunks(self) -> Iterator[bytes]:
        yield (b"x" * 76 + b"\r\n") * 1000
        raise StorageError("cannot read content back")


class Torn(Content):
    """What no content of ours is: a CRLF cut in two, a line with a period behind it."""

    def chunks(self) -> Iterator[bytes]:
        yield b"x" * 76 + b"\r"
        yield b"\n.\r\nMAIL FROM:<victim@elsewhere.test>\r\n"


@pytest.mark.parametrize("size_octets", [10, JOIN_OCTETS + 1])
async def test_content_that_cannot_be_read_is_deferred_and_its_end_is_not_sent(size_octets):
    async with Scripted() as server:
        notes = Notes()
        backend = backend_of(server.port, notes=notes)
        content = Unreadable(Memory(1, 1))
        content.size_octets = size_octets
        delivery = begin(backend)
        await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)
        assert code(await delivery.deliver(content, TRACE)) == "451 4.3.0"
        await server.until(lambda: server.sessions[0].ended)
        assert server.messages == []
        assert notes.lines == ["- backend mail: cannot read content back"]
        assert (await send(backend)).code == 250
        await backend.close()


@pytest.mark.parametrize("size_octets", [10, JOIN_OCTETS + 1])
async def test_content_that_is_not_whole_lines_is_a_fault_of_ours_and_is_not_sent(size_octets):
    async with Scripted() as server:
        backend = backend_of(server.port)
        content = Torn(Memory(1, 1))
        content.size_octets = size_octets
        delivery = begin(backend)
        await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)
        with pytest.raises(RuntimeError, match="not whole lines"):
            await delivery.deliver(content, TRACE)
        await server.until(lambda: server.sessions[0].ended)
        assert server.messages == []
        await backend.close()


@pytest.mark.parametrize("field", [b"", b"Received: x", b"Received: x\r\n.\r\n", b"Received: x\n"])
async def test_a_trace_field_that_is_none_is_a_fault_of_ours_and_is_not_sent(field):
    async with Scripted() as server:
        backend = backend_of(server.port)
        delivery = begin(backend)
        await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)
        with pytest.raises(RuntimeError, match="trace field"):
            await delivery.deliver(content_of(TEXT), field)
        await server.until(lambda: server.sessions[0].ended)
        assert server.messages == []
        await backend.close()


# ---- the client goes away


async def test_after_an_abort_the_connection_is_reset_before_it_is_used_again():
    async with Scripted() as server:
        backend = backend_of(server.port)
        delivery = begin(backend)
        await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)
        delivery.abort()
        delivery.abort()
        await server.until(lambda: "RSET" in server.sessions[0].verbs)
        assert (await send(backend)).code == 250
        assert server.sessions[0].verbs == ["EHLO", "MAIL", "RCPT", "RSET", "MAIL", "RCPT", "DATA"]
        assert code(await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)) == "503 5.5.1"
        assert code(await delivery.deliver(content_of(TEXT), TRACE)) == "503 5.5.1"
        assert len(server.messages) == 1
        await backend.close()


@pytest.mark.parametrize("answer", [b"500 5.5.1 What?", b"421 Bye", b"354 Go ahead", b"nonsense"])
async def test_a_connection_that_cannot_be_reset_is_not_used_again(answer):
    async with Scripted() as server:
        server.on["RSET"] = lambda _session, _argument: answer
        backend = backend_of(server.port)
        delivery = begin(backend)
        await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)
        delivery.abort()
        await server.until(lambda: server.sessions[0].ended)
        assert (await send(backend)).code == 250
        assert len(server.sessions) == 2
        await backend.close()


async def test_a_connection_whose_reset_is_not_answered_is_not_waited_for():
    async with Scripted() as server:
        server.on["RSET"] = lambda _session, _argument: None
        backend = backend_of(server.port, command_timeout_s=0.2)
        delivery = begin(backend)
        await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)
        delivery.abort()
        assert (await send(backend)).code == 250
        assert len(server.sessions) == 2
        await server.until(lambda: server.sessions[0].ended)
        await backend.close()


@pytest.mark.parametrize("verb", ["GREETING", "RCPT", "DATA", "CONTENT"])
async def test_a_session_that_is_cancelled_leaves_nothing_behind(verb):
    async with Scripted() as server:
        reached, stalled = asyncio.Event(), asyncio.Event()

        async def rule(_session: Session, _argument: bytes) -> Answer:
            reached.set()
            await stalled.wait()
            return b"220 Hello" if verb == "GREETING" else b"354 Go ahead" if verb == "DATA" else b"250 Ok"

        server.on[verb] = rule
        backend = backend_of(server.port, connections=1)
        task = asyncio.get_running_loop().create_task(send(backend))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        server.on.clear()
        stalled.set()
        assert (await send(backend)).code == 250, "the only place is free again"
        assert server.messages[-1].content == TRACE + TEXT
        await backend.close()


async def test_an_abort_beside_a_waiting_recipient_ends_it():
    async with Scripted() as server:
        reached, stalled = asyncio.Event(), asyncio.Event()

        async def rule(_session: Session, _argument: bytes) -> Answer:
            reached.set()
            await stalled.wait()
            return b"250 Ok"

        server.on["RCPT"] = rule
        backend = backend_of(server.port)
        delivery = begin(backend)
        task = asyncio.get_running_loop().create_task(delivery.rcpt(recipient(), NO_RCPT_PARAMETERS))
        await reached.wait()
        delivery.abort()
        assert code(await task) == "503 5.5.1"
        stalled.set()
        await server.until(lambda: server.sessions[0].ended)
        assert len(server.sessions) == 1
        await backend.close()
