"""Backends that are told of the client: XCLIENT and PROXY headers, and that nobody passes for somebody else."""

from __future__ import annotations

import asyncio
import random
import re
import ssl
from collections import Counter
from collections.abc import Coroutine
from ipaddress import ip_address
from typing import Any

import pytest
import trustme
from proxyprotocol.detect import ProxyProtocolDetect
from proxyprotocol.reader import ProxyProtocolReader
from proxyprotocol.result import ProxyResult
from tests.backend.parts import SENDER, TEXT, TRACE, Notes, content_of, recipient, settings
from tests.backend.scripted import Answer, Scripted, Session

from gatepost.backend import dedicated, make_backend
from gatepost.backend.dedicated import DedicatedBackend
from gatepost.backend.delivery import SmtpDelivery
from gatepost.backend.settings import LmtpSocket
from gatepost.facts import Client, Identity
from gatepost.facts import Session as SessionFacts
from gatepost.smtp.command import NO_MAIL_PARAMETERS, NO_RCPT_PARAMETERS
from gatepost.smtp.path import Mailbox
from gatepost.smtp.reply import Reply

ATTRIBUTES = "NAME ADDR PROTO HELO REVERSE_NAME PORT LOGIN DESTADDR DESTPORT"


def who(number: int = 7, **changes: Any) -> SessionFacts:
    """The session of one client: number n has 192.0.2.n, or 2001:db8::n where n is odd and above 100."""
    address = ip_address(f"2001:db8::{number}" if number > 100 and number % 2 else f"192.0.2.{number}")
    facts = SessionFacts("r1", Client(address, 40000 + number), "mx", "mx", f"client{number}.test", esmtp=True)
    return facts._replace(**changes)


def sender(session: SessionFacts) -> Mailbox:
    """A reverse-path by which the backend can tell whose the message really is."""
    return Mailbox(str(session.client.address).replace(":", "-"), "elsewhere.test")


def code(reply: Reply) -> str:
    return reply.octets().decode()[:9]


def start(work: Coroutine[Any, Any, Reply]) -> asyncio.Task[Reply]:
    return asyncio.get_running_loop().create_task(work)


def backend_of(server: Scripted, notes: Notes | None = None, **changes: Any) -> DedicatedBackend:
    notes = notes or Notes()
    addresses = (LmtpSocket(str(server.path)),) if server.path else settings(server.port).addresses
    backend = make_backend(settings(**({"addresses": addresses} | changes)), observe=notes.observe, log=notes.log)
    assert isinstance(backend, DedicatedBackend)
    return backend


def begin(backend: DedicatedBackend, session: SessionFacts) -> SmtpDelivery:
    return backend.begin(sender(session), NO_MAIL_PARAMETERS, session)


async def send(backend: DedicatedBackend, session: SessionFacts, octets: bytes = TEXT, recipients: int = 1) -> Reply:
    delivery = begin(backend, session)
    for number in range(recipients):
        reply = await delivery.rcpt(recipient(f"user{number}"), NO_RCPT_PARAMETERS)
        if not reply.positive:
            delivery.abort()
            return reply
    return await delivery.deliver(content_of(octets), TRACE)


class Told(Scripted):
    """A backend that takes XCLIENT.

    ``once``: like Postfix, which judges XCLIENT by the address it was told, so that a connection stays its client's.
    ``seen``: for each message, under which address it came, and its reverse-path.
    """

    def __init__(self, *, once: bool = False, attributes: str = ATTRIBUTES, **options: Any) -> None:
        super().__init__(**options)
        self.once = once
        self.attributes = attributes
        self.is_now: dict[int, str] = {}
        self.mail_of: dict[int, bytes] = {}
        self.greeted: dict[int, bool] = {}
        self.seen: list[tuple[str, str]] = []
        self.on["XCLIENT"] = self.xclient
        self.on["EHLO"] = self.on["LHLO"] = self.hello
        self.on["MAIL"] = self.may_mail
        self.on["CONTENT"] = self.came

    def hello(self, session: Session, _argument: bytes) -> Answer:
        words = list(self.keywords)
        if self.attributes and not (self.once and session.number in self.is_now):
            words.append(f"XCLIENT {self.attributes}")
        if self.tls is not None and not session.tls:
            words.append("STARTTLS")
        self.greeted[session.number] = True
        lines = ["scripted", *words]
        return "".join(f"250{'-' if n < len(lines) else ' '}{line}\r\n" for n, line in enumerate(lines, 1)).encode()

    def xclient(self, session: Session, argument: bytes) -> Answer:
        if session.mail is not None:
            return b"503 5.5.1 MAIL transaction in progress"
        if self.once and session.number in self.is_now:
            return b"550 5.7.0 Error: insufficient authorization"
        match = re.match(rb"ADDR=(?:IPV6:)?(\S+)", argument)
        assert match is not None
        self.is_now[session.number] = match[1].decode()
        self.greeted[session.number] = False
        return b"220 scripted ESMTP"

    def may_mail(self, session: Session, _argument: bytes) -> Answer:
        return b"250 2.1.0 Ok" if self.greeted[session.number] else b"503 5.5.1 EHLO first"

    def came(self, session: Session, _content: bytes) -> Answer:
        match = re.match(rb"FROM:<(.*)@", self.mail_of[session.number])
        assert match is not None
        self.seen.append((self.is_now.get(session.number, ""), match[1].decode().replace("-", ":")))
        return b"250 2.0.0 Queued"

    async def _mail(self, session: Session, argument: bytes) -> None:
        self.mail_of[session.number] = argument
        await super()._mail(session, argument)

    def all_under_their_own(self) -> bool:
        return all(address == reverse_path for address, reverse_path in self.seen)


class Proxied(Told):
    """A backend that takes PROXY headers, read by another implementation."""

    def __init__(self, **options: Any) -> None:
        super().__init__(attributes="", **options)
        self.results: list[ProxyResult] = []

    async def _talk(self, session: Session) -> None:
        result = await ProxyProtocolReader(ProxyProtocolDetect()).read(session.reader)
        self.results.append(result)
        if isinstance(result.source, tuple):
            self.is_now[session.number] = str(result.source[0])
        await super()._talk(session)


# ---- XCLIENT


async def test_the_backend_is_told_of_the_client_before_the_transaction():
    async with Told() as server:
        backend = backend_of(server, xclient=True)
        session = who(identity=Identity("anna@example.com", "PLAIN"))
        assert (await send(backend, session)).code == 250
        assert server.sessions[0].commands == [
            b"EHLO gate.example.com",
            (
                b"XCLIENT ADDR=192.0.2.7 PORT=40007 NAME=[UNAVAILABLE] REVERSE_NAME=[UNAVAILABLE] HELO=client7.test "
                b"PROTO=ESMTP LOGIN=anna@example.com"
            ),
            b"EHLO client7.test",
            b"MAIL FROM:<192.0.2.7@elsewhere.test>",
            b"RCPT TO:<user0@example.com>",
            b"DATA",
        ]
        assert server.sessions[0].together[:3] == [1, 1, 1], "each is answered before the next"
        await backend.close()


async def test_only_what_is_offered_is_told():
    async with Told(attributes="ADDR HELO") as server:
        backend = backend_of(server, xclient=True)
        assert (await send(backend, who(103))).code == 250
        assert server.sessions[0].commands[1] == b"XCLIENT ADDR=IPV6:2001:db8::103 HELO=client103.test"
        await backend.close()


@pytest.mark.parametrize("hello", ["", "not a name", "ümlaut", "a" * 256])
async def test_a_hello_that_is_no_name_is_not_repeated(hello):
    async with Told() as server:
        backend = backend_of(server, xclient=True)
        assert (await send(backend, who(hello=hello, esmtp=False))).code == 250
        assert b"PROTO=SMTP" in server.sessions[0].commands[1]
        assert server.sessions[0].commands[2] == b"EHLO gate.example.com"
        await backend.close()


async def test_nothing_is_told_where_it_is_not_configured():
    async with Told() as server:
        backend = make_backend(settings(server.port))
        assert not isinstance(backend, DedicatedBackend)
        delivery = backend.begin(SENDER, NO_MAIL_PARAMETERS, who())
        assert (await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)).code == 250
        assert (await delivery.deliver(content_of(TEXT), TRACE)).code == 250
        assert "XCLIENT" not in server.sessions[0].verbs
        await backend.close()


async def test_the_same_client_is_told_of_once():
    async with Told() as server:
        backend = backend_of(server, xclient=True)
        for _ in range(3):
            assert (await send(backend, who())).code == 250
        assert Counter(server.sessions[0].verbs)["XCLIENT"] == 1
        assert len(server.sessions) == 1
        await backend.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"hello": "other.test"},
        {"esmtp": False},
        {"identity": Identity("anna", "PLAIN")},
        {"client": Client(ip_address("192.0.2.7"), 1)},
        {"client": Client(ip_address("192.0.2.8"), 40007)},
    ],
)
async def test_who_differs_in_anything_is_told_of_anew_on_the_same_connection(changes):
    async with Told() as server:
        backend = backend_of(server, xclient=True)
        for session in (who(), who(**changes), who()):
            assert (await send(backend, session)).code == 250
        assert Counter(server.sessions[0].verbs)["XCLIENT"] == 3
        assert len(server.sessions) == 1
        await backend.close()


async def test_nobody_inherits_an_account():
    async with Told() as server:
        backend = backend_of(server, xclient=True)
        await send(backend, who(identity=Identity("anna", "PLAIN")))
        await send(backend, who(8))
        told = [command for command in server.sessions[0].commands if command.startswith(b"XCLIENT")]
        assert [line.rpartition(b" ")[2] for line in told] == [b"LOGIN=anna", b"LOGIN=[UNAVAILABLE]"]
        await backend.close()


async def test_a_connection_that_offers_xclient_no_more_stays_with_its_client():
    async with Told(once=True) as server:
        backend = backend_of(server, xclient=True)
        for number in (7, 8, 7, 8, 8):
            assert (await send(backend, who(number))).code == 250
        assert [len(session.verbs) for session in server.sessions] == [9, 12]
        assert all(Counter(session.verbs)["XCLIENT"] == 1 for session in server.sessions)
        assert server.all_under_their_own()
        await backend.close()


async def test_a_connection_that_cannot_be_told_everything_anew_stays_with_its_client():
    """What is not said again stays what it was: here the account."""
    async with Told() as server:
        backend = backend_of(server, xclient=True)
        assert (await send(backend, who(identity=Identity("anna", "PLAIN")))).code == 250
        server.attributes = "ADDR"
        assert (await send(backend, who(identity=Identity("anna", "PLAIN"), hello="again.test"))).code == 250
        assert len(server.sessions) == 1, "offered once more by then"
        assert (await send(backend, who(8))).code == 250
        assert len(server.sessions) == 2
        assert server.all_under_their_own()
        await backend.close()


async def test_a_full_pool_closes_an_idle_connection_for_another_client():
    async with Told(once=True) as server:
        backend = backend_of(server, xclient=True, connections=1)
        for number in (7, 8, 9):
            assert (await send(backend, who(number))).code == 250
        assert server.open_max <= 2, "the one just closed may not know it yet"
        assert len(server.sessions) == 3
        assert server.all_under_their_own()
        await backend.close()


async def test_the_capabilities_are_those_behind_xclient():
    async with Told() as server:
        backend = backend_of(server, xclient=True)
        delivery = begin(backend, who())

        def less(session: Session, argument: bytes) -> Answer:
            everything = server.hello(session, argument)
            return b"250 scripted" if session.number in server.is_now else everything

        server.on["EHLO"] = less
        assert (await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)).code == 250
        assert set(server.sessions[0].together) == {1}, "no pipelining"
        reply = await delivery.deliver(content_of("Subject: ü\r\n\r\n".encode()), TRACE)
        assert code(reply) == "554 5.6.3", "no 8BITMIME"
        await backend.close()


async def test_mail_passes_without_where_xclient_is_not_offered_and_the_operator_hears_it_once():
    async with Told(attributes="") as server:
        notes = Notes()
        backend = backend_of(server, notes, xclient=True, deliveries=1)
        for number in (7, 8, 9):
            assert (await send(backend, who(number))).code == 250
        assert len(notes.lines) == 1
        assert "offers the gate no XCLIENT" in notes.lines[0]
        server.attributes = ATTRIBUTES
        assert (await send(backend, who())).code == 250
        assert notes.lines[1:] == [f"+ backend mail: 127.0.0.1:{server.port} offers XCLIENT now"]
        assert server.seen[-1] == ("192.0.2.7", "192.0.2.7")
        server.attributes = "NAME HELO"
        assert (await send(backend, who())).code == 250
        assert len(notes.lines) == 3, "without ADDR it is none"
        await backend.close()


async def test_connections_that_offer_no_xclient_serve_everybody():
    async with Told(attributes="") as server:
        backend = backend_of(server, xclient=True)
        for number in (7, 8, 9):
            assert (await send(backend, who(number))).code == 250
        assert len(server.sessions) == 1
        await backend.close()


@pytest.mark.parametrize("verb", ["XCLIENT", "EHLO"])
@pytest.mark.parametrize("answer", [b"550 5.7.0 Not you", b"554 5.7.1 Blocked", b"451 4.3.0 Later", b"354 What?"])
async def test_a_refusal_defers_that_client_and_nobody_else(verb, answer):
    async with Told() as server:
        notes = Notes()
        backend = backend_of(server, notes, xclient=True)
        ordinary = {"XCLIENT": server.xclient, "EHLO": server.hello}[verb]

        def rule(session: Session, argument: bytes) -> Answer:
            reply = ordinary(session, argument)
            return answer if server.is_now.get(session.number) == "192.0.2.7" else reply

        server.on[verb] = server.on["HELO"] = rule
        delivery = begin(backend, who())
        assert code(await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)) == "451 4.7.0"
        assert code(await delivery.rcpt(recipient("bob"), NO_RCPT_PARAMETERS)) == "451 4.7.0"
        assert code(await delivery.deliver(content_of(TEXT), TRACE)) == "451 4.7.0"
        assert len(server.sessions) == 1, "no further recipient costs another attempt"
        assert code(await send(backend, who())) == "451 4.7.0"
        assert (await send(backend, who(8))).code == 250
        assert len(notes.lines) == 1, "strangers cannot fill the log"
        assert str(answer[:3].decode()) in notes.lines[0]
        assert [session.verbs[-1] for session in server.sessions[:2]] == ["QUIT", "QUIT"]
        assert server.seen == [("192.0.2.8", "192.0.2.8")]
        await backend.close()


async def test_a_421_to_xclient_defers_and_the_operator_hears_why():
    async with Told() as server:
        notes = Notes()
        backend = backend_of(server, notes, xclient=True)
        server.on["XCLIENT"] = lambda _session, _argument: b"421 4.7.0 Too many connections from it"
        assert code(await send(backend, who())) == "451 4.7.0"
        assert len(server.sessions) == 2, "the first may have been closed for its age"
        assert len(notes.lines) == 1
        assert "Too many connections" in notes.lines[0]
        await backend.close()


async def test_a_connection_closed_for_its_age_is_replaced_and_introduced():
    async with Told() as server:
        backend = backend_of(server, xclient=True)
        assert (await send(backend, who())).code == 250

        def aged(session: Session, argument: bytes) -> Answer:
            return b"421 4.4.2 Timeout" if session.number == 0 else server.xclient(session, argument)

        server.on["XCLIENT"] = aged
        assert (await send(backend, who(8))).code == 250
        assert server.all_under_their_own()
        await backend.close()


@pytest.mark.parametrize("once", [False, True])
async def test_a_parked_transaction_and_the_one_that_took_its_connection_keep_their_names(once):
    async with Told(once=once) as server:
        notes = Notes()
        backend = backend_of(server, notes, xclient=True, connections=1)
        stalling = begin(backend, who(7))
        assert (await stalling.rcpt(recipient(), NO_RCPT_PARAMETERS)).code == 250
        assert (await send(backend, who(8))).code == 250
        assert (await stalling.rcpt(recipient("bob"), NO_RCPT_PARAMETERS)).code == 250
        assert (await send(backend, who(9))).code == 250
        assert (await stalling.deliver(content_of(TEXT), TRACE)).code == 250
        assert notes.measures.count("park") == 2
        assert [address for address, _ in server.seen] == ["192.0.2.8", "192.0.2.9", "192.0.2.7"]
        assert server.all_under_their_own()
        await backend.close()


@pytest.mark.parametrize("verb", ["XCLIENT", "EHLO", "MAIL", "RCPT", "DATA"])
@pytest.mark.parametrize("once", [False, True])
async def test_a_second_attempt_is_made_under_the_same_name(verb, once):
    async with Told(once=once) as server:
        backend = backend_of(server, xclient=True)
        await backend.probe()
        ordinary = server.on.get(verb)

        def dies(session: Session, argument: bytes) -> Answer | Any:
            if session.number == 0:
                session.hang_up()
            return ordinary(session, argument) if ordinary else {"RCPT": b"250 Ok", "DATA": b"354 Go"}[verb]

        server.on[verb] = dies
        assert (await send(backend, who())).code == 250
        assert len(server.sessions) == 2
        assert server.seen == [("192.0.2.7", "192.0.2.7")]
        await backend.close()


@pytest.mark.parametrize("verb", ["XCLIENT", "EHLO"])
@pytest.mark.parametrize("how", ["abort", "cancel"])
async def test_an_introduction_that_was_broken_off_leaves_no_connection(verb, how):
    async with Told() as server:
        backend = backend_of(server, xclient=True, connections=1)
        await backend.probe()
        ordinary, held, free = server.on[verb], asyncio.Event(), asyncio.Event()

        async def holds(session: Session, argument: bytes) -> Answer:
            reply: Any = ordinary(session, argument)
            if session.number == 0:
                held.set()
                await free.wait()
            return reply

        server.on[verb] = holds
        delivery = begin(backend, who(7))
        asked = start(delivery.rcpt(recipient(), NO_RCPT_PARAMETERS))
        await held.wait()
        if how == "abort":
            delivery.abort()
            assert code(await asked) == "503 5.5.1"
        else:
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
        free.set()
        assert (await send(backend, who(8))).code == 250
        assert len(server.sessions) == 2
        assert server.seen == [("192.0.2.8", "192.0.2.8")]
        await backend.close()


@pytest.mark.parametrize("once", [False, True])
async def test_an_aborted_transaction_leaves_its_name_to_nobody(once):
    async with Told(once=once) as server:
        backend = backend_of(server, xclient=True, connections=1)
        delivery = begin(backend, who(7))
        assert (await delivery.rcpt(recipient(), NO_RCPT_PARAMETERS)).code == 250
        delivery.abort()
        assert (await send(backend, who(8))).code == 250
        assert server.seen == [("192.0.2.8", "192.0.2.8")]
        await backend.close()


async def test_a_probe_names_nobody_and_its_connection_is_introduced_when_it_serves():
    async with Told() as server:
        backend = backend_of(server, xclient=True)
        await backend.probe()
        assert backend.healthy
        assert server.sessions[0].verbs == ["EHLO"]
        assert (await send(backend, who())).code == 250
        assert len(server.sessions) == 1
        await backend.probe()
        assert (await send(backend, who(8))).code == 250
        assert server.all_under_their_own()
        await backend.close()
        await server.until(lambda: server.open == 0)
        assert {session.verbs[-1] for session in server.sessions} == {"QUIT"}


async def test_lmtp_is_greeted_again_with_lhlo(tmp_path):
    async with Told(lmtp=True, path=tmp_path / "lmtp") as server:
        backend = backend_of(server, xclient=True)
        assert (await send(backend, who())).code == 250
        assert server.sessions[0].verbs[:3] == ["LHLO", "XCLIENT", "LHLO"]
        assert server.sessions[0].commands[2] == b"LHLO client7.test"
        await backend.close()


# ---- PROXY


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("number", [8, 103])
async def test_a_connection_begins_with_its_client(version, number):
    async with Proxied() as server:
        backend = backend_of(server, proxy=version)
        session = who(number)
        assert (await send(backend, session)).code == 250
        assert server.results[0].source == tuple(session.client)
        assert server.sessions[0].commands[0] == b"EHLO gate.example.com"
        await backend.close()


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_a_connection_is_used_again_for_the_same_client_only(version):
    async with Proxied() as server:
        backend = backend_of(server, proxy=version)
        for number in (7, 7, 8, 7, 8):
            assert (await send(backend, who(number))).code == 250
        other_port = who(7, client=who(7).client._replace(port=1))
        assert (await send(backend, other_port)).code == 250
        assert [len(server.messages), len(server.sessions)] == [6, 3]
        assert server.all_under_their_own()
        await backend.close()


async def test_a_full_pool_serves_one_client_after_another():
    async with Proxied() as server:
        backend = backend_of(server, proxy="v2", connections=2)
        replies = await asyncio.gather(*(send(backend, who(number)) for number in range(1, 61)))
        assert {reply.code for reply in replies} == {250}
        assert len(server.seen) == 60
        assert server.all_under_their_own()
        await backend.close()


async def test_for_each_who_waits_one_connection_is_opened():
    async with Proxied() as server:
        backend = backend_of(server, proxy="v2", connections=3)
        replies = await asyncio.gather(*(send(backend, who(number)) for number in (7, 8, 9)))
        assert {reply.code for reply in replies} == {250}
        assert sorted(server.is_now.values()) == ["192.0.2.7", "192.0.2.8", "192.0.2.9"]
        await backend.close()


async def test_many_transactions_of_one_client_wait_for_its_connections():
    async with Proxied() as server:
        backend = backend_of(server, proxy="v1", connections=2)
        replies = await asyncio.gather(*(send(backend, who(7)) for _ in range(40)))
        assert {reply.code for reply in replies} == {250}
        assert len(server.sessions) <= 2
        await backend.close()


async def test_the_queue_and_the_wait_have_their_limits():
    async with Proxied() as server:
        backend = backend_of(server, proxy="v1", connections=1, waiters=1, wait_timeout_s=0.2, park_after_s=60.0)
        holding = begin(backend, who(7))
        assert (await holding.rcpt(recipient(), NO_RCPT_PARAMETERS)).code == 250
        waiting = start(send(backend, who(8)))
        await asyncio.sleep(0)
        assert code(await send(backend, who(9))) == "451 4.3.2", "the queue is full"
        assert code(await waiting) == "451 4.3.2", "it has waited for long enough"
        assert len(server.sessions) == 1
        assert (await holding.deliver(content_of(TEXT), TRACE)).code == 250
        assert (await send(backend, who(9))).code == 250
        await backend.close()


async def test_a_parked_client_comes_back_on_a_connection_of_its_own():
    async with Proxied() as server:
        backend = backend_of(server, proxy="v2", connections=1)
        stalling = begin(backend, who(7))
        assert (await stalling.rcpt(recipient(), NO_RCPT_PARAMETERS)).code == 250
        assert (await send(backend, who(8))).code == 250
        assert (await stalling.deliver(content_of(TEXT), TRACE)).code == 250
        assert [address for address, _ in server.seen] == ["192.0.2.8", "192.0.2.7"]
        assert server.all_under_their_own()
        await backend.close()


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_a_probe_is_a_look_of_our_own_and_serves_nobody(version):
    async with Proxied() as server:
        backend = backend_of(server, proxy=version)
        await backend.probe()
        assert backend.healthy
        assert backend.capabilities is not None
        await server.until(lambda: server.open == 0)
        assert server.sessions[0].verbs == ["EHLO", "QUIT"]
        if version == "v2":
            assert not server.results[0].proxied
        else:
            assert str(server.results[0].source[0]) == "127.0.0.1"  # type: ignore[index]
        assert (await send(backend, who())).code == 250
        assert len(server.sessions) == 2
        await backend.close()


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_a_unix_socket_has_no_addresses_of_its_own(version, tmp_path):
    async with Proxied(lmtp=True, path=tmp_path / "lmtp") as server:
        backend = backend_of(server, proxy=version)
        await backend.probe()
        assert (await send(backend, who(8))).code == 250
        assert server.seen == [("192.0.2.8", "192.0.2.8")]
        await backend.close()


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("answer", [b"502 5.5.2 What?", b"421 4.7.0 No HTTP please"])
async def test_a_backend_that_does_not_know_the_header_gets_no_mail(version, answer):
    """Each of its answers is one command late: nothing that it says may be believed."""
    async with Scripted() as server:

        async def talk(session: Session) -> None:
            session.send(b"220 scripted ESMTP\r\n")
            header = await session.reader.read(16 if version == "v2" else 6)
            await session.reader.read(100)
            session.send(answer + b"\r\n")
            assert header
            server.on["GREETING"] = lambda _session, _argument: None
            await Scripted._talk(server, session)

        server._talk = talk  # type: ignore[method-assign]
        notes = Notes()
        backend = backend_of(server, notes, proxy=version)
        assert code(await send(backend, who()))[:5] == "451 4"
        assert all("MAIL" not in session.verbs for session in server.sessions)
        assert len(notes.lines) == 1
        await backend.close()


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_a_backend_that_hangs_up_at_once_is_out_of_reach(version):
    async with Scripted() as server:
        server.on["GREETING"] = lambda session, _argument: session.hang_up()
        backend = backend_of(server, proxy=version)
        assert code(await send(backend, who())) == "451 4.4.1"
        await backend.close()


async def test_all_who_wait_for_a_backend_out_of_reach_are_told_at_once():
    async with Proxied() as server:
        backend = backend_of(server, proxy="v1", connections=2)
        await server.stop()
        replies = await asyncio.gather(*(send(backend, who(number)) for number in range(1, 21)))
        assert {code(reply) for reply in replies} == {"451 4.4.1"}
        await backend.close()


async def test_a_failed_address_is_found_alive_again_by_a_look_that_serves_nobody():
    async with Proxied() as first, Proxied() as second:
        first.on["GREETING"] = lambda session, _argument: session.hang_up()
        backend = backend_of(first, proxy="v2", addresses=settings(first.port, second.port).addresses)
        assert (await send(backend, who(7))).code == 250
        del first.on["GREETING"]
        async with asyncio.timeout(20):
            number = 0
            while not first.messages:
                number = number % 99 + 1
                assert (await send(backend, who(number))).code == 250
                await asyncio.sleep(0.01)
        looks = [session for session, result in zip(first.sessions, first.results, strict=True) if not result.proxied]
        assert [session.verbs for session in looks] == [["EHLO", "QUIT"]]
        assert first.all_under_their_own()
        assert second.all_under_their_own()
        await backend.close()


# ---- both


@pytest.mark.parametrize("way", [{"xclient": True}, {"proxy": "v1"}, {"proxy": "v2"}])
async def test_a_client_is_told_beside_tls(way):
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    async with Told(tls=context) if "xclient" in way else Proxied(tls=context) as server:
        backend = make_backend(settings(server.port, tls="required", **way), tls=trust)
        assert isinstance(backend, DedicatedBackend)
        for number in (8, 9):
            assert (await send(backend, who(number))).code == 250
        introduction = ["XCLIENT", "EHLO"] if "xclient" in way else []
        assert server.sessions[0].verbs[: 5 + len(introduction)] == [
            *("EHLO", "STARTTLS", "EHLO"),
            *introduction,
            *("MAIL", "RCPT"),
        ]
        assert all(session.tls for session in server.sessions)
        assert server.all_under_their_own()
        await backend.close()


def test_a_client_is_told_in_one_way():
    with pytest.raises(ValueError, match="not by both"):
        make_backend(settings(25, xclient=True, proxy="v1"))


@pytest.mark.parametrize("way", [{"xclient": True}, {"proxy": "v1"}])
async def test_a_connection_nobody_else_can_use_is_not_kept_for_long(way, monkeypatch):
    monkeypatch.setattr(dedicated, "DEDICATED_IDLE_S", 0.05)
    async with Told(once=True) if "xclient" in way else Proxied() as server:
        backend = backend_of(server, **way)
        assert (await send(backend, who())).code == 250
        await server.until(lambda: server.open == 0)
        assert server.sessions[0].verbs[-1] == "QUIT"
        await backend.close()


@pytest.mark.parametrize("kind", ["xclient", "xclient once", "proxy v1", "proxy v2"])
async def test_many_clients_over_few_connections_are_each_seen_under_their_own_address(kind):
    """Half of them pause so long that they are parked, some break off, and the backend hangs up now and then."""
    dice = random.Random(kind)
    server: Told = Proxied() if kind.startswith("proxy") else Told(once=kind.endswith("once"))
    way = {"proxy": kind[-2:]} if kind.startswith("proxy") else {"xclient": True}

    def perhaps(verb: str, default: bytes) -> None:
        ordinary = server.on.get(verb)

        def rule(session: Session, argument: bytes) -> Any:
            opened = verb != "EHLO" or "XCLIENT" in session.verbs  # else nobody is served for a while
            if opened and dice.random() < 0.02:
                session.hang_up()
            return ordinary(session, argument) if ordinary else default

        server.on[verb] = rule

    for verb, default in (("XCLIENT", b""), ("EHLO", b""), ("MAIL", b""), ("RCPT", b"250 Ok"), ("RSET", b"250 Ok")):
        if verb in server.on or default:
            perhaps(verb, default)
    delivered: Counter[str] = Counter()

    async def client(backend: DedicatedBackend, number: int) -> None:
        session = who(number)
        for _ in range(5):
            await asyncio.sleep(dice.random() * 0.2)
            delivery = begin(backend, session)
            reply = await delivery.rcpt(recipient("one"), NO_RCPT_PARAMETERS)
            if reply.positive and dice.random() < 0.5:
                await asyncio.sleep(dice.random() * 0.1)
                reply = await delivery.rcpt(recipient("two"), NO_RCPT_PARAMETERS)
            if reply.positive and dice.random() < 0.9:
                reply = await delivery.deliver(content_of(TEXT), TRACE)
                if reply.positive:
                    delivered[str(session.client.address)] += 1
            else:
                delivery.abort()

    async with server:
        backend = backend_of(server, connections=5, park_after_s=0.02, **way)
        await asyncio.gather(*(client(backend, number) for number in range(1, 121)))
        await backend.close()
        assert server.all_under_their_own()
        assert Counter(address for address, _ in server.seen) == delivered
        assert delivered.total() > 300
        assert len(delivered) > 100
