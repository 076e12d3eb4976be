"""The backend side against Postfix, Exim and OpenSMTPD: what real servers get, refuse, and do to a connection."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trustme
import uvloop
from tests.backend.parts import SENDER, Notes, backend_of, begin, content_of, recipient
from tests.servers import Exim, OpenSmtpd, Postfix, Server

from gatepost.backend.delivery import SmtpBackend
from gatepost.backend.settings import SmtpAddress
from gatepost.smtp.command import NO_MAIL_PARAMETERS, NO_RCPT_PARAMETERS, MailParameters
from gatepost.smtp.path import Mailbox
from gatepost.smtp.reply import Reply

T = TypeVar("T")

TRACE = b"Received: from gate-under-test by gate.example.com\r\n\twith ESMTP id 1; Mon, 23 Nov 2026 07:00:00 +0000\r\n"
HEADER = (
    b"Date: Mon, 23 Nov 2026 07:00:00 +0000\r\nFrom: sender@elsewhere.test\r\nTo: alice@example.com\r\n"
    b"Message-ID: <%b@elsewhere.test>\r\nSubject: a trial\r\n"
)


def run(work: Coroutine[Any, Any, T]) -> T:
    """On the event loop that production has."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


@pytest.fixture(scope="module")
def postfix() -> Iterator[Postfix]:
    with Postfix() as server:
        yield server


@pytest.fixture(scope="module")
def exim() -> Iterator[Exim]:
    with Exim() as server:
        yield server


@pytest.fixture(scope="module")
def opensmtpd() -> Iterator[OpenSmtpd]:
    with OpenSmtpd() as server:
        yield server


@pytest.fixture(params=["postfix", "exim", "opensmtpd"])
def server(request) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


async def send(
    backend: SmtpBackend,
    octets: bytes,
    user: str = "alice",
    parameters: MailParameters = NO_MAIL_PARAMETERS,
    reverse_path: Mailbox = SENDER,
) -> Reply:
    delivery = begin(backend, reverse_path, parameters)
    reply = await delivery.rcpt(recipient(user), NO_RCPT_PARAMETERS)
    if not reply.positive:
        delivery.abort()
        return reply
    content = content_of(octets, block=60_000)
    try:
        return await delivery.deliver(content, TRACE)
    finally:
        content.close()


def message(name: str, body: bytes) -> bytes:
    return HEADER % name.encode() + body


def arrived(server: Server, name: str, user: str = "alice") -> list[bytes]:
    """The message of that name, as often as it arrived; waited for until it is there."""
    for count in range(1, 10_000):
        mine = [octets for octets in server.arrived(user, count) if b"<%b@elsewhere.test>" % name.encode() in octets]
        if mine:
            return mine
    raise AssertionError(name)


BODIES = {
    "text": b"\r\nHow do you do?\r\n",
    "empty": b"\r\n",
    "eight-bit": b"\r\n" + bytes(octet for octet in range(1, 256) if octet not in b"\r\n") + b"\r\n",
    "long-lines": b"\r\n" + (b"x" * 998 + b"\r\n") * 3 + b"." * 998 + b"\r\n",
    "dots": b"\r\n.\r\n..\r\n...\r\n.x\r\n\r\n.\r\nMAIL FROM:<a@b.test>\r\n.\r\n",
    "from-lines": b"\r\nFrom me to you\r\n>From you to me\r\n",
    "trailing-space": b"\r\nno  \t\r\n \r\n\t\r\n\r\n\r\n",
    "large": b"\r\n" + b"".join(b"%076d\r\n" % number for number in range((25 << 20) // 78)),
}


@pytest.mark.parametrize("name", list(BODIES))
def test_content_arrives_octet_for_octet(server, name):
    octets = message(name, BODIES[name])

    async def play() -> Reply:
        backend = backend_of(server.port)
        reply = await send(backend, octets)
        await backend.close()
        return reply

    assert run(play()).code == 250
    assert arrived(server, name) == [TRACE + octets]


def test_utf8_in_address_and_header_arrives_octet_for_octet(server):
    octets = message("utf8", "X-Greeting: Grüße aus 東京\r\n\r\nGrüße\r\n".encode())
    sender = Mailbox("jürgen", "elsewhere.test")

    async def play() -> tuple[Reply, bool]:
        backend = backend_of(server.port)
        reply = await send(backend, octets, "alice", MailParameters(smtputf8=True, body="8BITMIME"), sender)
        assert backend.capabilities is not None
        offered = "SMTPUTF8" in backend.capabilities.keywords
        await backend.close()
        return reply, offered

    reply, offered = run(play())
    if offered:
        assert reply.code == 250
        assert arrived(server, "utf8") == [TRACE + octets]
    else:
        assert isinstance(server, OpenSmtpd)
        assert reply.octets().startswith(b"553 5.6.7 ")


OWN_WORDS = {"postfix": "User unknown", "exim": "no such user here", "opensmtpd": "Invalid recipient"}


def test_an_unknown_user_is_refused_in_the_servers_own_words(server):
    async def play() -> list[Reply]:
        backend = backend_of(server.port)
        delivery = begin(backend)
        replies = [await delivery.rcpt(recipient(user), NO_RCPT_PARAMETERS) for user in ("nobody", "bob", "none")]
        replies.append(await delivery.deliver(content_of(message("known", b"\r\nHello\r\n")), TRACE))
        await backend.close()
        return replies

    replies = run(play())
    assert [reply.code for reply in replies] == [550, 250, 550, 250]
    assert OWN_WORDS[server.name] in replies[0].text
    assert arrived(server, "known", "bob") == [TRACE + message("known", b"\r\nHello\r\n")]


def test_many_messages_over_few_connections_all_arrive_once(server):
    names = [f"many-{number}" for number in range(100)]

    async def play() -> list[Reply]:
        backend = backend_of(server.port, connections=3, wait_timeout_s=60.0)
        replies = await asyncio.gather(*(send(backend, message(name, b"\r\nHello\r\n"), "bob") for name in names))
        await backend.close()
        return replies

    assert {reply.code for reply in run(play())} == {250}
    for name in names:
        assert arrived(server, name, "bob") == [TRACE + message(name, b"\r\nHello\r\n")]


def test_many_messages_over_one_connection_all_arrive_at_once(server):
    """What servers limit a session to is met before they do; Exim would leave the eleventh message to a queue run."""
    names = [f"row-{number}" for number in range(130)]

    async def play() -> list[Reply]:
        backend = backend_of(server.port, connections=1)
        replies = [await send(backend, message(name, b"\r\nHello\r\n"), "bob") for name in names]
        await backend.close()
        return replies

    assert {reply.code for reply in run(play())} == {250}
    for name in names:
        assert arrived(server, name, "bob") == [TRACE + message(name, b"\r\nHello\r\n")]


def test_a_strangers_guesses_do_not_slow_down_the_next_one(server):
    async def play() -> set[int]:
        backend = backend_of(server.port, connections=1)
        codes = set()
        for number in range(60):
            codes.add((await send(backend, b"", f"guess{number}")).code)
        assert (await send(backend, message("guessed", b"\r\nHello\r\n"))).code == 250
        await backend.close()
        return codes

    assert run(play()) == {550}
    assert len(arrived(server, "guessed")) == 1


def test_clients_that_stall_keep_nobody_out(server):
    async def play() -> list[int]:
        backend = backend_of(server.port, connections=2)
        stalling = [begin(backend) for _ in range(4)]
        codes = [(await delivery.rcpt(recipient("alice"), NO_RCPT_PARAMETERS)).code for delivery in stalling]
        codes.append((await send(backend, message("quick", b"\r\nHello\r\n"))).code)
        for number, delivery in enumerate(stalling):
            content = content_of(message(f"slow-{number}", b"\r\nHello\r\n"))
            codes.append((await delivery.deliver(content, TRACE)).code)
        await backend.close()
        return codes

    assert run(play()) == [250] * 9
    for name in ("quick", "slow-0", "slow-1", "slow-2", "slow-3"):
        assert len(arrived(server, name)) == 1


def test_a_message_that_was_not_finished_does_not_arrive(server):
    async def play() -> None:
        backend = backend_of(server.port, connections=1)
        delivery = begin(backend)
        assert (await delivery.rcpt(recipient("alice"), NO_RCPT_PARAMETERS)).code == 250
        delivery.abort()
        assert (await send(backend, message("after", b"\r\nHello\r\n"), "bob")).code == 250
        await backend.close()

    before = len(server.arrived("alice", 0))
    run(play())
    assert len(arrived(server, "after", "bob")) == 1
    assert len(server.arrived("alice", 0)) == before


@pytest.mark.parametrize("kind", [Postfix, Exim, OpenSmtpd])
def test_a_server_that_is_stopped_and_started_again(kind):
    with kind() as server:

        async def play() -> None:
            notes = Notes()
            backend = backend_of(server.port, notes=notes)
            assert (await send(backend, message("before", b"\r\nHello\r\n"))).code == 250
            await asyncio.to_thread(arrived, server, "before")
            half = begin(backend)
            assert (await half.rcpt(recipient("alice"), NO_RCPT_PARAMETERS)).code == 250
            await asyncio.to_thread(server.stop)
            assert (await send(backend, message("down", b"\r\nHello\r\n"))).octets().startswith(b"451 4.4.1 ")
            reply = await half.deliver(content_of(message("half", b"\r\nHello\r\n")), TRACE)
            assert reply.octets().startswith(b"451 4.4.1 ")
            assert not backend.healthy
            await asyncio.to_thread(server.start)
            until = time.monotonic() + 30
            while (await send(backend, message("again", b"\r\nHello\r\n"))).code != 250:
                assert time.monotonic() < until
                await asyncio.sleep(0.1)
            assert backend.healthy
            assert [line[0] for line in notes.lines] == ["-", "+"]
            await backend.close()

        run(play())
        assert len(arrived(server, "again")) == 1
        octets = b"".join(server.arrived("alice"))
        assert b"<down@" not in octets
        assert b"<half@" not in octets


@pytest.mark.parametrize("moment", ["between messages", "before content"])
def test_a_connection_whose_server_process_is_killed(postfix, moment):
    name = "killed-" + moment.replace(" ", "-")

    async def play() -> None:
        notes = Notes()
        backend = backend_of(postfix.port, connections=1, notes=notes)
        assert (await send(backend, message("live", b"\r\nHello\r\n"), "bob")).code == 250
        delivery = begin(backend)
        if moment == "before content":
            assert (await delivery.rcpt(recipient("alice"), NO_RCPT_PARAMETERS)).code == 250
        for pid in postfix.processes("smtpd"):
            os.kill(pid, signal.SIGKILL)
        if moment == "between messages":
            assert (await delivery.rcpt(recipient("alice"), NO_RCPT_PARAMETERS)).code == 250
        assert (await delivery.deliver(content_of(message(name, b"\r\nHello\r\n")), TRACE)).code == 250
        await backend.close()

    run(play())
    assert arrived(postfix, name) == [TRACE + message(name, b"\r\nHello\r\n")]


def test_a_connection_that_the_server_closes_because_it_was_idle():
    with Postfix(settings=["smtpd_timeout = 1s"]) as server:

        async def play() -> None:
            backend = backend_of(server.port)
            assert (await send(backend, message("one", b"\r\nHello\r\n"))).code == 250
            delivery = begin(backend)
            assert (await delivery.rcpt(recipient("alice"), NO_RCPT_PARAMETERS)).code == 250
            await asyncio.sleep(1.5)  # 421 4.4.2, and the end of the connection
            assert (await delivery.deliver(content_of(message("two", b"\r\nHello\r\n")), TRACE)).code == 250
            await backend.close()

        run(play())
        assert len(arrived(server, "one")) == 1
        assert len(arrived(server, "two")) == 1


def test_a_server_that_takes_only_few_connections():
    limits = ["smtpd_client_connection_count_limit = 2", "smtpd_client_event_limit_exceptions ="]
    with Postfix(settings=limits) as server:

        async def play() -> None:
            notes = Notes()
            backend = backend_of(server.port, connections=10, notes=notes, wait_timeout_s=60.0)
            assert (await send(backend, message("first", b"\r\nHello\r\n"))).code == 250
            replies = await asyncio.gather(
                *(send(backend, message(f"few-{number}", b"\r\nHello\r\n")) for number in range(60))
            )
            assert {reply.code for reply in replies} == {250}
            assert any("connections for now" in line for line in notes.lines)
            await backend.close()

        run(play())
        assert len(server.arrived("alice", 61)) == 61


def test_a_declared_size_beyond_the_servers_is_refused_in_its_own_words(postfix):
    async def play() -> Reply:
        backend = backend_of(postfix.port)
        reply = await send(backend, message("huge", b"\r\n"), "alice", MailParameters(size_octets=1 << 30))
        await backend.close()
        return reply

    reply = run(play())
    assert reply.octets().startswith(b"552 5.3.4 ")


# ---- STARTTLS


class Authority:
    def __init__(self, directory: Path) -> None:
        self._ca = trustme.CA()
        self.path = directory / "server.pem"
        certificate = self._ca.issue_cert("localhost", "127.0.0.1")
        certificate.private_key_and_cert_chain_pem.write_to_path(self.path)

    @property
    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self._ca.configure_trust(context)
        return context


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def postfix_tls(authority) -> Iterator[Postfix]:
    with Postfix(certificate=authority.path, settings=["smtpd_tls_received_header = yes"]) as server:
        yield server


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_required_tls(postfix_tls, authority, host):
    name = f"tls-{host}"
    octets = message(name, b"\r\n" + b"x" * 76 + b"\r\n" + b"".join(b"%070d\r\n" % n for n in range(20_000)))

    async def play() -> Reply:
        address = SmtpAddress(host, postfix_tls.port)
        backend = backend_of(addresses=(address,), tls="required", context=authority.context)
        reply = await send(backend, octets)
        await backend.close()
        return reply

    assert run(play()).code == 250
    assert arrived(postfix_tls, name) == [TRACE + octets]
    (file,) = [f for f in (postfix_tls.mailbox("alice") / "new").iterdir() if name.encode() in f.read_bytes()[:3000]]
    assert b"using TLSv1.3" in file.read_bytes()[:3000]


def test_required_tls_with_a_certificate_of_somebody_else(postfix_tls):
    async def play() -> Reply:
        backend = backend_of(postfix_tls.port, tls="required")
        reply = await send(backend, message("never", b"\r\n"))
        await backend.close()
        return reply

    assert run(play()).octets().startswith(b"451 4.7.5 ")


def test_required_tls_that_is_not_offered(postfix):
    async def play() -> Reply:
        backend = backend_of(postfix.port, tls="required")
        reply = await send(backend, message("never", b"\r\n"))
        await backend.close()
        return reply

    assert run(play()).octets().startswith(b"451 4.7.5 ")


def test_opportunistic_tls(postfix_tls, postfix):
    async def play() -> list[int]:
        codes = []
        for number, server in enumerate((postfix_tls, postfix)):
            backend = backend_of(server.port, tls="opportunistic")
            codes.append((await send(backend, message(f"opportunistic-{number}", b"\r\nHello\r\n"))).code)
            await backend.close()
        return codes

    assert run(play()) == [250, 250]
    assert len(arrived(postfix_tls, "opportunistic-0")) == 1
    assert len(arrived(postfix, "opportunistic-1")) == 1
