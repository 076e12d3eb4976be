"""Many transactions over few connections, several addresses, TLS, coming and going."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Coroutine
from typing import Any

import pytest
import trustme
from tests.backend.parts import TEXT, TRACE, Notes, backend_of, begin, content_of, recipient, send, settings
from tests.backend.scripted import KEYWORDS, Answer, Scripted, Session

from gatepost.backend.connection import BLEMISHES_MAX
from gatepost.backend.delivery import PARKS_MAX, SmtpBackend
from gatepost.backend.settings import EmbeddedMailboxes, LmtpSocket, SmtpAddress
from gatepost.smtp.command import NO_RCPT_PARAMETERS
from gatepost.smtp.reply import Reply


def code(reply: Reply) -> str:
    return reply.octets().decode()[:9]


def start(work: Coroutine[Any, Any, Reply]) -> asyncio.Task[Reply]:
    return asyncio.get_running_loop().create_task(work)


async def closed_port() -> int:
    """A port of the loopback interface on which nobody listens."""
    async with Scripted() as server:
        return server.port


class Gate:
    """A rule that holds its sessions until it is opened."""

    def __init__(self, answer: bytes = b"250 2.0.0 Ok") -> None:
        self.answer = answer
        self.waiting = 0
        self._open = asyncio.Event()

    async def __call__(self, _session: Session, _argument: bytes) -> Answer:
        self.waiting += 1
        await self._open.wait()
        return self.answer

    def open(self) -> None:
        self._open.set()


# ---- bounded


async def test_no_more_connections_than_configured_and_everybody_is_served():
    async with Scripted() as server:
        backend = backend_of(server.port, connections=3)
        replies = await asyncio.gather(*(send(backend, b"%d\r\n" % n) for n in range(200)))
        assert {reply.code for reply in replies} == {250}
        assert server.open_max <= 3
        assert sorted(m.content for m in server.messages) == sorted(TRACE + b"%d\r\n" % n for n in range(200))
        await backend.close()


async def test_the_connection_used_last_is_used_next():
    async with Scripted() as server:
        backend = backend_of(server.port)
        await asyncio.gather(*(send(backend) for _ in range(4)))
        used = {message.session.number for message in server.messages[-1:]}
        for _ in range(5):
            await send(backend)
        assert {message.session.number for message in server.messages[-5:]} == used
        await backend.close()


async def test_who_waits_too_long_is_deferred():
    async with Scripted() as server:
        gate = server.on["CONTENT"] = Gate()
        backend = backend_of(server.port, connections=1, wait_timeout_s=0.1)
        first = start(send(backend))
        await server.until(lambda: bool(gate.waiting))
        assert code(await send(backend)) == "451 4.3.2"
        gate.open()
        assert (await first).code == 250
        assert (await send(backend)).code == 250
        assert len(server.sessions) == 1
        await backend.close()


async def test_too_many_do_not_wait_at_all():
    async with Scripted() as server:
        gate = server.on["CONTENT"] = Gate()
        backend = backend_of(server.port, connections=1, waiters=2)
        tasks = [start(send(backend))]
        await server.until(lambda: bool(gate.waiting))
        tasks += [start(send(backend)), start(send(backend))]
        await asyncio.sleep(0)
        assert code(await send(backend)) == "451 4.3.2"
        gate.open()
        assert [(await task).code for task in tasks] == [250, 250, 250]
        await backend.close()


async def test_a_waiter_that_is_cancelled_takes_no_connection_with_it():
    async with Scripted() as server:
        gate = server.on["CONTENT"] = Gate()
        backend = backend_of(server.port, connections=1)
        first, second = start(send(backend)), start(send(backend))
        await server.until(lambda: bool(gate.waiting))
        third = start(send(backend))
        await asyncio.sleep(0)
        second.cancel()
        gate.open()
        assert (await first).code == 250
        assert (await third).code == 250
        with pytest.raises(asyncio.CancelledError):
            await second
        await backend.close()


async def test_who_wants_a_new_connection_gets_one_though_the_pool_is_full_of_idle_ones():
    async with Scripted() as server:
        pool = backend_of(server.port, connections=1)._pool
        old = await pool.acquire()
        pool.release(old)
        new = await pool.acquire(fresh=True)
        assert new is not old
        assert not old.alive
        pool.release(new)
        assert await pool.acquire() is new
        new.close()
        await server.until(lambda: server.open == 0)
        await pool.close()


async def test_a_fault_of_ours_while_connecting_keeps_nobody_waiting(monkeypatch, caplog):
    async def faulty(*_arguments: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("gatepost.backend.pool.open_connection", faulty)
    backend = backend_of(1)
    replies = await asyncio.gather(*(send(backend) for _ in range(3)))
    assert {code(reply) for reply in replies} == {"451 4.4.1"}
    assert "ours" in caplog.text
    await backend.close()


async def test_idle_connections_are_closed_with_quit():
    async with Scripted() as server:
        backend = backend_of(server.port, idle_s=0.1)
        await asyncio.gather(*(send(backend) for _ in range(3)))
        await server.until(lambda: server.open == 0)
        assert all(session.verbs[-1] == "QUIT" for session in server.sessions)
        assert (await send(backend)).code == 250
        await backend.close()


async def test_an_idle_connection_whose_quit_is_not_answered_is_cut():
    async with Scripted() as server:
        server.on["QUIT"] = lambda _session, _argument: None
        held = asyncio.Event()

        async def rule(_session: Session, _argument: bytes) -> Answer:
            await held.wait()
            return None

        server.on["QUIT"] = rule
        backend = backend_of(server.port, command_timeout_s=0.1)
        await send(backend)
        await backend.close()
        held.set()
        await server.until(lambda: server.open == 0)


async def test_a_connection_is_closed_after_so_many_deliveries():
    async with Scripted() as server:
        backend = backend_of(server.port, deliveries=3, connections=1)
        for _ in range(7):
            assert (await send(backend)).code == 250
        assert [session.verbs.count("DATA") for session in server.sessions] == [3, 3, 1]
        assert [session.verbs[-1] for session in server.sessions[:2]] == ["QUIT", "QUIT"]
        assert server.open_max == 1
        await backend.close()


async def test_a_connection_that_was_refused_much_is_not_for_somebody_else():
    async with Scripted() as server:
        server.on["RCPT"] = lambda _session, argument: b"250 Ok" if b"alice" in argument else b"550 5.1.1 no"
        backend = backend_of(server.port, connections=1)
        for number in range(7):
            assert (await send(backend, TEXT, f"guess{number}")).code == 550
        assert (await send(backend)).code == 250
        for number in range(7):
            assert (await send(backend, TEXT, f"guess{number}")).code == 550
        assert len(server.sessions) == 1, "a message makes up for it"
        assert (await send(backend, TEXT, "guess")).code == 550
        assert (await send(backend)).code == 250
        assert len(server.sessions) == 2
        assert server.sessions[0].verbs[-1] == "QUIT"
        await backend.close()


async def test_a_connection_that_was_reset_much_is_not_for_somebody_else():
    async with Scripted() as server:
        backend = backend_of(server.port, connections=1)
        for _ in range(BLEMISHES_MAX + 5):
            delivery = begin(backend)
            assert (await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)).code == 250
            delivery.abort()
        assert len(server.sessions) == 2
        assert server.sessions[0].verbs.count("RSET") == BLEMISHES_MAX
        await backend.close()


@pytest.mark.parametrize("answer", [b"421 4.7.0 Too many messages", b"452 4.5.3 Too many messages in this session"])
async def test_the_past_of_a_connection_is_not_the_clients(answer):
    async with Scripted() as server:
        server.on["MAIL"] = lambda session, _argument: answer if session.verbs.count("MAIL") > 2 else b"250 2.1.0 Ok"
        backend = backend_of(server.port, connections=1)
        for _ in range(5):
            assert (await send(backend)).code == 250
        assert [session.verbs.count("DATA") for session in server.sessions] == [2, 2, 1]
        server.on["MAIL"] = lambda _session, _argument: b"452 4.3.1 Disk full"
        assert (await send(backend)).octets() == b"452 4.3.1 Disk full\r\n"
        assert len(server.sessions) == 4, "a new connection says the same: that is the answer"
        assert (await send(backend)).code == 452
        assert len(server.sessions) == 4
        await backend.close()


async def test_exim_delivers_at_once_only_what_comes_first_on_a_connection():
    async with Scripted() as server:
        server.on["GREETING"] = lambda _session, _argument: b"220 mail.example.com ESMTP Exim 4.96 Mon, 23 Nov 2026"
        backend = backend_of(server.port)
        for _ in range(21):
            assert (await send(backend)).code == 250
        assert [session.verbs.count("DATA") for session in server.sessions] == [10, 10, 1]
        await backend.close()


# ---- clients that stall must lend their connection


async def test_stalling_clients_do_not_keep_others_out():
    async with Scripted() as server:
        notes = Notes()
        backend = backend_of(server.port, connections=2, notes=notes)
        stalling = [begin(backend) for _ in range(6)]
        for number, delivery in enumerate(stalling):
            assert (await delivery.rcpt(recipient(f"slow{number}"), NO_RCPT_PARAMETERS)).code == 250
        for _ in range(5):
            assert (await send(backend, TEXT, "quick")).code == 250
        assert server.open_max <= 2
        assert notes.measures.count("park") >= 5
        # And each of them, when it goes on at last, finds its transaction as it left it.
        for number, delivery in enumerate(stalling):
            assert (await delivery.rcpt(recipient(f"more{number}"), NO_RCPT_PARAMETERS)).code == 250
        for number, delivery in enumerate(stalling):
            assert (await delivery.deliver(content_of(b"%d\r\n" % number), TRACE)).code == 250
        slow = {message.content: message.recipients for message in server.messages[5:]}
        assert slow == {
            TRACE + b"%d\r\n" % n: [b"TO:<slow%d@example.com>" % n, b"TO:<more%d@example.com>" % n] for n in range(6)
        }
        await backend.close()


async def test_the_oldest_lends_first_and_only_as_many_as_are_waited_for():
    async with Scripted() as server:
        notes = Notes()
        backend = backend_of(server.port, connections=3, notes=notes)
        stalling = [begin(backend) for _ in range(3)]
        for number, delivery in enumerate(stalling):
            await delivery.rcpt(recipient(f"slow{number}"), NO_RCPT_PARAMETERS)
        assert (await send(backend)).code == 250
        assert notes.measures.count("park") == 1
        assert server.messages[0].session.commands[2] == b"RCPT TO:<slow0@example.com>"
        for delivery in stalling:
            delivery.abort()
        await backend.close()


async def test_a_parked_transaction_that_is_answered_otherwise_afterwards_is_deferred():
    async with Scripted() as server:
        backend = backend_of(server.port, connections=1)
        stalling = begin(backend)
        await stalling.rcpt(recipient("slow"), NO_RCPT_PARAMETERS)
        assert (await send(backend)).code == 250
        server.on["RCPT"] = lambda _session, _argument: b"550 5.1.1 Gone since"
        assert code(await stalling.deliver(content_of(TEXT), TRACE)) == "451 4.3.0"
        assert len(server.messages) == 1
        await backend.close()


async def test_a_transaction_that_is_parked_again_and_again_gets_no_more_recipients():
    async with Scripted() as server:
        backend = backend_of(server.port, connections=1)
        stalling = begin(backend)
        reply = Reply(250, "")
        for number in range(PARKS_MAX):
            reply = await stalling.rcpt(recipient(f"slow{number}"), NO_RCPT_PARAMETERS)
            assert reply.code == 250
            assert (await send(backend)).code == 250
        assert code(await stalling.rcpt(recipient("more"), NO_RCPT_PARAMETERS)) == "452 4.5.3"
        assert (await stalling.deliver(content_of(b"slow\r\n"), TRACE)).code == 250
        assert len(server.messages[-1].recipients) == PARKS_MAX
        await backend.close()


async def test_a_delivery_is_never_parked():
    async with Scripted() as server:
        gate = server.on["CONTENT"] = Gate()
        notes = Notes()
        backend = backend_of(server.port, connections=1, wait_timeout_s=0.3, notes=notes)
        first = start(send(backend))
        await server.until(lambda: bool(gate.waiting))
        assert code(await send(backend)) == "451 4.3.2"
        gate.open()
        assert (await first).code == 250
        assert "park" not in notes.measures
        await backend.close()


async def test_a_transaction_whose_recipient_is_being_asked_is_parked_afterwards():
    async with Scripted() as server:
        gate = server.on["RCPT"] = Gate()
        backend = backend_of(server.port, connections=1)
        stalling = begin(backend)
        asked = start(stalling.rcpt(recipient("slow"), NO_RCPT_PARAMETERS))
        await server.until(lambda: bool(gate.waiting))
        other = start(send(backend))
        await asyncio.sleep(0.1)
        assert not other.done()
        del server.on["RCPT"]
        gate.open()
        assert (await asked).code == 250
        assert (await other).code == 250
        assert (await stalling.deliver(content_of(TEXT), TRACE)).code == 250
        await backend.close()


async def test_a_parked_transaction_may_be_aborted():
    async with Scripted() as server:
        backend = backend_of(server.port, connections=1)
        stalling = begin(backend)
        await stalling.rcpt(recipient("slow"), NO_RCPT_PARAMETERS)
        assert (await send(backend)).code == 250
        stalling.abort()
        assert not stalling.park()
        assert (await send(backend)).code == 250
        await backend.close()


async def test_a_new_connection_that_is_not_greeted_does_not_keep_a_waiter_from_the_old_one():
    async with Scripted() as server:
        backend = backend_of(server.port, connections=2)
        stalling = begin(backend)
        await stalling.rcpt(recipient("slow"), NO_RCPT_PARAMETERS)
        gate = server.on["GREETING"] = Gate(b"220 at last")
        assert (await send(backend)).code == 250
        assert gate.waiting == 1
        stalling.abort()
        gate.open()
        await backend.close()


# ---- a backend that limits its connections


@pytest.mark.parametrize("refusal", [b"421 4.7.0 Too many connections", b"451 4.3.2 Busy"])
async def test_a_backend_that_takes_no_more_connections_makes_the_pool_smaller(refusal):
    async with Scripted() as server:
        server.on["GREETING"] = lambda session, _argument: refusal if session.server.open > 2 else b"220 Hello"
        notes = Notes()
        backend = backend_of(server.port, connections=10, notes=notes)
        await asyncio.gather(send(backend), send(backend))
        replies = await asyncio.gather(*(send(backend) for _ in range(50)))
        assert {reply.code for reply in replies} == {250}
        assert backend.healthy
        assert any("connections for now" in line for line in notes.lines)
        assert len(server.sessions) < 20, "it is not asked for each message"
        await backend.close()


async def test_a_backend_that_takes_no_connection_at_all_defers():
    async with Scripted() as server:
        server.on["GREETING"] = lambda _session, _argument: b"421 4.7.0 Too many connections"
        backend = backend_of(server.port)
        assert code(await send(backend)) == "451 4.3.2"
        assert not backend.healthy
        server.on.clear()
        assert await recovers(backend)
        await backend.close()


# ---- out of reach, several addresses


async def recovers(backend: SmtpBackend) -> bool:
    for _ in range(400):
        if (await send(backend)).code == 250:
            return backend.healthy
        await asyncio.sleep(0.05)
    return False


async def test_a_backend_out_of_reach_defers_and_recovers_by_itself():
    server = Scripted()
    await server.start()
    notes = Notes()
    backend = backend_of(server.port, notes=notes)
    assert (await send(backend)).code == 250
    assert backend.healthy
    await server.stop()
    assert (
        await send(backend)
    ).octets() == b"451 4.4.1 The server behind this one does not answer, try again later\r\n"
    for _ in range(20):
        assert code(await send(backend)) == "451 4.4.1"
    assert not backend.healthy
    await server.start()
    assert await recovers(backend)
    assert [line[:2] for line in notes.lines] == ["- ", "+ "], "one line for the loss and one for the return"
    await backend.close()
    await server.stop()


async def test_all_who_wait_for_a_backend_out_of_reach_are_told_at_once():
    backend = backend_of(await closed_port(), connections=2)
    replies = await asyncio.gather(*(send(backend) for _ in range(20)))
    assert {code(reply) for reply in replies} == {"451 4.4.1"}
    await backend.close()


async def test_a_name_that_cannot_be_looked_up_is_out_of_reach():
    backend = backend_of(addresses=(SmtpAddress("no-such-host.invalid", 25),))
    assert code(await send(backend)) == "451 4.4.1"
    await backend.close()


async def test_a_name_is_looked_up():
    async with Scripted() as server:
        backend = backend_of(addresses=(SmtpAddress("localhost", server.port),))
        assert (await send(backend)).code == 250
        await backend.close()


async def test_an_lmtp_socket_that_is_not_there_is_out_of_reach(tmp_path):
    backend = backend_of(addresses=(LmtpSocket(str(tmp_path / "none")),))
    assert code(await send(backend)) == "451 4.4.1"
    await backend.close()


@pytest.mark.parametrize("greeting", [b"554 5.3.2 No SMTP service here", b"521 no", b"nonsense", b"HTTP/1.1 400\r\n"])
async def test_a_server_that_does_not_serve_is_out_of_reach(greeting):
    async with Scripted() as server:
        server.on["GREETING"] = lambda _session, _argument: greeting
        notes = Notes()
        backend = backend_of(server.port, notes=notes)
        assert code(await send(backend)) == "451 4.4.1"
        assert len(notes.lines) == 1
        await backend.close()


@pytest.mark.parametrize("verb", ["GREETING", "EHLO"])
async def test_a_server_that_does_not_greet_is_out_of_reach(verb):
    async with Scripted() as server:
        gate = server.on[verb] = Gate()
        backend = backend_of(server.port, greeting_timeout_s=0.1, command_timeout_s=0.1)
        assert code(await send(backend)) == "451 4.4.1"
        gate.open()
        await backend.close()


async def test_a_server_that_refuses_ehlo_and_helo_is_out_of_reach():
    async with Scripted() as server:
        server.on["EHLO"] = server.on["HELO"] = lambda _session, _argument: b"550 5.7.1 Not you"
        backend = backend_of(server.port)
        assert code(await send(backend)) == "451 4.4.1"
        await backend.close()


async def test_the_addresses_are_tried_in_order():
    async with Scripted() as first, Scripted() as second:
        backend = backend_of(first.port, second.port)
        assert (await send(backend)).code == 250
        assert (len(first.messages), len(second.messages)) == (1, 0)
        await first.stop()
        assert (await send(backend)).code == 250
        assert len(second.messages) == 1
        assert backend.healthy
        await backend.close()


async def test_a_dead_first_address_is_not_tried_for_each_message():
    async with Scripted() as first, Scripted() as second:
        first.on["GREETING"] = lambda session, _argument: session.hang_up()
        backend = backend_of(first.port, second.port, deliveries=1)
        for _ in range(10):
            assert (await send(backend)).code == 250
        assert len(second.messages) == 10
        assert len(first.sessions) < 10
        first.on.clear()
        async with asyncio.timeout(20):
            while not first.messages:
                assert (await send(backend)).code == 250
                await asyncio.sleep(0.01)
        await backend.close()


async def test_nobody_waits_while_a_dead_first_address_is_tried_again():
    async with Scripted() as first, Scripted() as second:
        first.on["GREETING"] = lambda session, _argument: session.hang_up()
        backend = backend_of(first.port, second.port, deliveries=1)
        assert (await send(backend)).code == 250
        gate = first.on["GREETING"] = Gate(b"220 at last")
        async with asyncio.timeout(20):
            while not gate.waiting:
                assert (await send(backend)).code == 250
                await asyncio.sleep(0.02)
        for _ in range(10):
            assert (await send(backend)).code == 250
        assert gate.waiting == 1, "one attempt at a time"
        gate.open()
        await backend.close()


# ---- capabilities, health


async def test_a_probe_learns_the_capabilities_and_keeps_the_connection():
    async with Scripted() as server:
        backend = backend_of(server.port)
        assert backend.capabilities is None
        assert not backend.healthy
        await backend.probe()
        assert backend.healthy
        assert backend.capabilities is not None
        assert backend.capabilities.size_octets == 52428800
        assert "8BITMIME" in backend.capabilities.keywords
        assert (await send(backend)).code == 250
        assert len(server.sessions) == 1
        await backend.close()


async def test_a_probe_of_a_backend_out_of_reach_does_not_raise():
    backend = backend_of(await closed_port())
    await backend.probe()
    assert not backend.healthy
    assert backend.capabilities is None
    await backend.close()


async def test_a_probe_notices_that_a_backend_is_gone_and_that_it_is_back():
    server = Scripted()
    await server.start()
    backend = backend_of(server.port)
    await backend.probe()
    assert backend.healthy
    await server.stop()
    await asyncio.sleep(0.02)
    await backend.probe()
    assert not backend.healthy
    await server.start()
    async with asyncio.timeout(20):
        while not backend.healthy:
            await asyncio.sleep(0.05)
            await backend.probe()
    await backend.close()
    await server.stop()


async def test_a_probe_of_a_full_pool_opens_nothing():
    async with Scripted() as server:
        backend = backend_of(server.port, connections=1)
        await send(backend)
        await backend.probe()
        assert len(server.sessions) == 1
        await backend.close()


async def test_capabilities_follow_the_backend():
    async with Scripted() as server:
        backend = backend_of(server.port, deliveries=1)
        await send(backend)
        server.keywords = ("SIZE 1000",)
        await send(backend)
        assert backend.capabilities is not None
        assert backend.capabilities.keywords == {"SIZE"}
        assert backend.capabilities.size_octets == 1000
        await backend.close()


# ---- closing


async def test_closing_lets_transactions_end():
    async with Scripted() as server:
        gate = server.on["CONTENT"] = Gate()
        backend = backend_of(server.port, connections=1)
        delivery = begin(backend)
        await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)
        first, second = start(delivery.deliver(content_of(TEXT), TRACE)), start(send(backend))
        await server.until(lambda: bool(gate.waiting))
        closing = asyncio.get_running_loop().create_task(backend.close())
        await asyncio.sleep(0.02)
        assert not closing.done()
        gate.open()
        assert (await first).code == 250
        assert (await second).code == 250
        await closing
        await server.until(lambda: server.open == 0)
        assert server.sessions[0].verbs[-1] == "QUIT"


async def test_a_transaction_may_end_after_its_backend_was_closed():
    async with Scripted() as server:
        backend = backend_of(server.port)
        delivery = begin(backend)
        await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)
        await backend.close()
        await server.until(lambda: server.open == 0)
        assert (await delivery.deliver(content_of(TEXT), TRACE)).code == 250
        await server.until(lambda: server.open == 0)
        assert [session.verbs[-1] for session in server.sessions] == ["QUIT", "QUIT"]
        await backend.close()


async def test_closing_does_not_wait_for_ever():
    async with Scripted() as server:
        gate = server.on["CONTENT"] = Gate()
        backend = backend_of(server.port)
        task = start(send(backend))
        await server.until(lambda: bool(gate.waiting))
        await backend.close(0.05)
        assert code(await task) == "451 4.4.2"
        gate.open()


async def test_closing_what_was_never_used():
    await backend_of(1).close()


async def test_a_pool_refuses_settings_it_cannot_serve(tmp_path):
    with pytest.raises(ValueError, match="SMTP or LMTP"):
        SmtpBackend(settings(addresses=(EmbeddedMailboxes(str(tmp_path)),)))
    with pytest.raises(ValueError, match="SMTP or LMTP"):
        SmtpBackend(settings())


# ---- TLS


class Authority:
    def __init__(self, *names: str) -> None:
        self.ca = trustme.CA()
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ca.issue_cert(*names).configure_cert(self.server)

    @property
    def client(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.ca.configure_trust(context)
        return context


async def test_required_tls_with_a_good_certificate():
    authority = Authority("localhost", "127.0.0.1")
    async with Scripted(tls=authority.server) as server:
        backend = backend_of(server.port, tls="required", context=authority.client)
        octets = (b"x" * 76 + b"\r\n.\r\n") * 30_000
        assert (await send(backend)).code == 250
        assert (await send(backend, octets)).code == 250
        assert [message.content for message in server.messages] == [TRACE + TEXT, TRACE + octets]
        (session,) = server.sessions
        assert session.tls
        assert session.verbs[:4] == ["EHLO", "STARTTLS", "EHLO", "MAIL"]
        await backend.close()


@pytest.mark.parametrize("names", [("localhost",), ("mail.example.com",)])
async def test_required_tls_with_a_certificate_for_another_name_defers(names):
    authority = Authority(*names)
    async with Scripted(tls=authority.server) as server:
        notes = Notes()
        backend = backend_of(server.port, tls="required", context=authority.client, notes=notes)
        assert code(await send(backend)) == "451 4.7.5"
        assert "certificate" in notes.lines[0].lower()
        assert server.messages == []
        assert all("MAIL" not in session.verbs for session in server.sessions)
        await backend.close()


async def test_required_tls_with_a_certificate_of_nobody_we_know_defers():
    async with Scripted(tls=Authority("127.0.0.1").server) as server:
        backend = backend_of(server.port, tls="required")
        assert code(await send(backend)) == "451 4.7.5"
        assert code(await send(backend)) == "451 4.7.5"
        assert server.messages == []
        await backend.close()


@pytest.mark.parametrize("how", ["not offered", "refused"])
async def test_required_tls_that_cannot_be_had_defers(how):
    authority = Authority("127.0.0.1")
    async with Scripted(keywords=(*KEYWORDS, "STARTTLS") if how == "refused" else KEYWORDS) as server:
        server.on["STARTTLS"] = lambda _session, _argument: b"454 4.7.0 Not now"
        backend = backend_of(server.port, tls="required", context=authority.client)
        assert code(await send(backend)) == "451 4.7.5"
        assert all("MAIL" not in session.verbs for session in server.sessions)
        await backend.close()


async def test_opportunistic_tls_is_used_where_it_is_offered_whatever_the_certificate():
    async with Scripted(tls=Authority("elsewhere.test").server) as server:
        notes = Notes()
        backend = backend_of(server.port, tls="opportunistic", notes=notes)
        assert (await send(backend)).code == 250
        assert server.sessions[0].tls
        assert notes.lines == []
        await backend.close()


async def test_opportunistic_tls_does_without_where_it_is_not_offered():
    async with Scripted() as server:
        backend = backend_of(server.port, tls="opportunistic")
        assert (await send(backend)).code == 250
        await backend.close()


async def test_opportunistic_tls_that_is_refused_goes_on_in_plain_text():
    async with Scripted(keywords=(*KEYWORDS, "STARTTLS")) as server:
        server.on["STARTTLS"] = lambda _session, _argument: b"454 4.7.0 Not now"
        backend = backend_of(server.port, tls="opportunistic")
        assert (await send(backend)).code == 250
        assert server.sessions[0].verbs[:3] == ["EHLO", "STARTTLS", "MAIL"]
        await backend.close()


async def test_opportunistic_tls_whose_handshake_fails_goes_on_in_plain_text_and_says_so_once():
    async with Scripted(keywords=(*KEYWORDS, "STARTTLS")) as server:

        async def rule(session: Session, _argument: bytes) -> Answer:
            session.send(b"220 2.0.0 Go ahead\r\n")
            await session.reader.read(1)
            session.send(b"\x15\x03\x03\x00\x02\x02\x28")  # a fatal alert: handshake failure
            session.hang_up_soon()
            return None

        server.on["STARTTLS"] = rule
        notes = Notes()
        backend = backend_of(server.port, tls="opportunistic", notes=notes, deliveries=1)
        for _ in range(3):
            assert (await send(backend)).code == 250
        assert len(server.messages) == 3
        assert len(notes.lines) == 1
        assert "plain text" in notes.lines[0]
        await backend.close()


@pytest.mark.parametrize("tls", ["opportunistic", "required"])
@pytest.mark.parametrize("injected", [b"250 2.0.0 injected\r\n", b"250-STARTTLS\r\n", b"x"])
async def test_octets_behind_the_220_to_starttls_end_the_connection(tls, injected):
    """Response injection, RFC 3207 §6: a man in the middle speaks before TLS what would be believed after it."""
    authority = Authority("127.0.0.1")
    async with Scripted(tls=authority.server) as server:
        server.on["STARTTLS"] = lambda _session, _argument: b"220 2.0.0 Go ahead\r\n" + injected + b"\n"
        backend = backend_of(server.port, tls=tls, context=authority.client)
        assert code(await send(backend)) == "451 4.4.1"
        assert server.messages == []
        assert all("MAIL" not in session.verbs for session in server.sessions)
        await backend.close()


async def test_what_was_offered_before_tls_is_forgotten():
    authority = Authority("127.0.0.1")
    async with Scripted(tls=authority.server) as server:

        def rule(session: Session, _argument: bytes) -> Answer:
            if session.tls:
                return b"250-scripted\r\n250 SIZE 2000"
            return b"250-scripted\r\n250-PIPELINING\r\n250-8BITMIME\r\n250-SIZE 1000\r\n250 STARTTLS"

        server.on["EHLO"] = rule
        backend = backend_of(server.port, tls="required", context=authority.client)
        assert (await send(backend)).code == 250
        assert backend.capabilities is not None
        assert backend.capabilities.keywords == {"SIZE"}
        assert backend.capabilities.size_octets == 2000
        assert set(server.sessions[0].together) == {1}, "no pipelining any more"
        await backend.close()
