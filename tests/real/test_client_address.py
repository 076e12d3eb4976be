"""Postfix is told of the client, by XCLIENT and by PROXY headers: whom it sees, and that it judges each by itself."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from ipaddress import ip_address
from typing import Any, NamedTuple, TypeVar

import pytest
import uvloop
from tests.backend.parts import Notes, content_of, recipient, settings
from tests.servers import Postfix, free_port

from gatepost.backend import make_backend
from gatepost.backend.dedicated import DedicatedBackend
from gatepost.facts import Client, Identity, Session
from gatepost.smtp.command import NO_MAIL_PARAMETERS, NO_RCPT_PARAMETERS
from gatepost.smtp.path import Mailbox
from gatepost.smtp.reply import Reply

T = TypeVar("T")

TRACE = b"Received: from gate-under-test by gate.example.com\r\n\twith ESMTP id 1; Mon, 23 Nov 2026 07:00:00 +0000\r\n"
ARRIVE_S = 30.0
ATTEMPTS_MAX = 200  # each a tenth of a second after the last: whatever the server needs to start its processes again
BLOCKED = 66  # the client whom the server behind takes nothing from

SEEN = re.compile(
    rb"^Return-Path: <(?P<sender>\S+)@elsewhere\.test>\n.*?"
    rb"^Received: from (?P<hello>\S+) \(\S+ \[(?:IPv6:)?(?P<address>\S+)\]\)\n"
    rb"\tby postfix\.test \(Postfix\) with (?P<protocol>\S+) id.*?"
    rb"^Received: from gate-under-test .*?^Subject: (?P<subject>\S+)\n",
    re.DOTALL | re.MULTILINE,
)


class Seen(NamedTuple):
    """One message as it arrived: who sent it, by its reverse-path, and what the server says of its client."""

    sender: str
    address: str
    hello: str
    protocol: str
    subject: str


class TellingPostfix(Postfix):
    """Postfix.  ``strangers``: XCLIENT is taken again after it named a stranger; ``proxied_port``: expects PROXY."""

    def __init__(self, *settings: str, strangers: bool = False) -> None:
        self.proxied_port = free_port()
        super().__init__(
            settings=[
                "service_throttle_time = 1s",  # a process killed before it has served anybody is thought a bad one
                "smtpd_peername_lookup = no",
                "inet_protocols = all",  # else it refuses to hear of an IPv6 client
                "smtpd_authorized_xclient_hosts = 127.0.0.0/8" + (", 0.0.0.0/0, [::]/0" if strangers else ""),
                f"smtpd_client_restrictions = check_client_access inline:{{ {{192.0.2.{BLOCKED} = REJECT}} }}",
                *settings,
            ]
        )

    def _prepare(self) -> None:
        super()._prepare()
        with (self.directory / "etc" / "master.cf").open("a") as file:
            file.write(
                f"127.0.0.1:{self.proxied_port} inet n - n - - smtpd\n"
                "  -o smtpd_upstream_proxy_protocol=haproxy -o smtpd_authorized_xclient_hosts=\n"
            )

    def seen(self, subjects: set[str], user: str = "alice") -> list[Seen]:
        """All messages that arrived, when those of these subjects have."""
        until = time.monotonic() + ARRIVE_S
        while True:
            new = self.mailbox(user) / "new"
            found = []
            for file in new.iterdir() if new.is_dir() else ():
                match = SEEN.search(file.read_bytes())
                assert match is not None, file.read_bytes()[:1000]
                words = {name: octets.decode() for name, octets in match.groupdict().items()}
                found.append(Seen(**words))
            if subjects <= {one.subject for one in found}:
                return found
            assert time.monotonic() < until, self.log
            time.sleep(0.05)


@pytest.fixture(scope="module")
def postfix() -> Iterator[TellingPostfix]:
    with TellingPostfix() as server:
        yield server


@pytest.fixture(scope="module")
def indifferent() -> Iterator[TellingPostfix]:
    with TellingPostfix(strangers=True) as server:
        yield server


WAYS: dict[str, dict[str, Any]] = {
    "xclient": {"xclient": True},
    "xclient-strangers": {"xclient": True},
    "proxy-v1": {"proxy": "v1"},
    "proxy-v2": {"proxy": "v2"},
}


@pytest.fixture(params=WAYS)
def way(request) -> str:
    name: str = request.param
    return name


@pytest.fixture
def server(request, way) -> TellingPostfix:
    found: TellingPostfix = request.getfixturevalue("indifferent" if way == "xclient-strangers" else "postfix")
    return found


def run(work: Coroutine[Any, Any, T]) -> T:
    """On the event loop that production has."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def backend_of(server: TellingPostfix, way: str, notes: Notes | None = None, **changes: Any) -> DedicatedBackend:
    port = server.proxied_port if way.startswith("proxy") else server.port
    notes = notes or Notes()
    backend = make_backend(settings(port, **WAYS[way], **changes), observe=notes.observe, log=notes.log)
    assert isinstance(backend, DedicatedBackend)
    return backend


def who(number: int, **changes: Any) -> Session:
    """Client n has 192.0.2.n, or 2001:db8::n where n is odd."""
    address = ip_address(f"2001:db8::{number}" if number % 2 else f"192.0.2.{number}")
    session = Session("r1", Client(address, 40000 + number), "mx", "mx", f"client{number}.test", esmtp=True)
    return session._replace(**changes)


async def send(
    backend: DedicatedBackend, session: Session, subject: str, *, domain: str = "example.com", pause_s: float = 0.0
) -> Reply:
    sender = Mailbox(str(session.client.address).replace(":", "-"), "elsewhere.test")
    delivery = backend.begin(sender, NO_MAIL_PARAMETERS, session)
    reply = await delivery.rcpt(recipient("alice", domain), NO_RCPT_PARAMETERS)
    if not reply.positive:
        delivery.abort()
        return reply
    await asyncio.sleep(pause_s)
    return await delivery.deliver(content_of(f"Subject: {subject}\r\n\r\nHello\r\n".encode()), TRACE)


def own(one: Seen) -> bool:
    """It was seen under the address of the one who sent it."""
    return one.address == one.sender.replace("-", ":")


@pytest.mark.parametrize("number", [8, 9])
def test_the_server_sees_the_client(server, way, number):
    async def play() -> Reply:
        backend = backend_of(server, way)
        reply = await send(backend, who(number), f"{way}-{number}")
        await backend.close()
        return reply

    assert run(play()).code == 250
    (one,) = [one for one in server.seen({f"{way}-{number}"}) if one.subject == f"{way}-{number}"]
    assert own(one)
    assert one.address == str(who(number).client.address)
    assert one.hello == ("gate.example.com" if way.startswith("proxy") else f"client{number}.test")
    assert f"[{one.address}]" in server.log


def test_many_clients_over_few_connections_are_each_seen_under_their_own_address(server, way):
    """Some pause and are parked for others, and server processes are killed in between."""
    sent: set[str] = set()
    replies: Counter[int] = Counter()

    async def client(backend: DedicatedBackend, number: int) -> None:
        """Three messages.  What was deferred is tried again, as another message, since it may have been taken."""
        for turn in range(3):
            pause_s = 0.2 if (number + turn) % 5 == 0 else 0.0
            for attempt in range(ATTEMPTS_MAX):
                subject = f"{way}-many-{number}-{turn}-{attempt}"
                reply = await send(backend, who(number), subject, pause_s=pause_s)
                replies[reply.code] += 1
                if reply.code == 250:
                    sent.add(subject)
                    break
                await asyncio.sleep(0.1)

    async def killer() -> None:
        for _ in range(3):
            await asyncio.sleep(0.1)
            for pid in server.processes("smtpd")[:2]:
                os.kill(pid, signal.SIGKILL)

    notes = Notes()

    async def play() -> None:
        backend = backend_of(server, way, notes, connections=4, wait_timeout_s=30.0)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(killer())
            for number in range(100, 160):
                tasks.create_task(client(backend, number))
        await backend.close()
        assert "park" in notes.measures

    run(play())
    assert set(replies) <= {250, 451}
    assert len(sent) == 180, (replies, notes.lines)
    many = [one for one in server.seen(sent) if "-many-" in one.subject and one.subject.startswith(f"{way}-many")]
    assert all(own(one) for one in many)
    assert Counter(one.subject for one in many if one.subject in sent) == Counter(sent), "each once"
    assert len({one.address for one in many}) == 60


def test_the_server_judges_each_client_by_itself(server, way):
    """Also the rights of the gate's own address, for which the server would relay, are nobody else's."""

    async def play() -> list[Reply]:
        backend = backend_of(server, way)
        replies = [
            await send(backend, who(8), f"{way}-good"),
            await send(backend, who(BLOCKED), f"{way}-blocked"),
            await send(backend, who(8), f"{way}-good-again"),
            await send(backend, who(8), f"{way}-relay", domain="elsewhere.test"),
        ]
        await backend.close()
        return replies

    good, blocked, again, relay = run(play())
    assert (good.code, again.code) == (250, 250)
    assert blocked.code == 554
    assert "Client host rejected" in blocked.text
    assert (relay.code, "Relay access denied" in relay.text) == (454, True)


def test_an_account_is_handed_on_and_left_to_nobody():
    with TellingPostfix(strangers=True) as server:

        async def play() -> list[Reply]:
            backend = backend_of(server, "xclient", connections=1)
            anna = who(8, identity=Identity("anna@example.com", "PLAIN"))
            replies = [await send(backend, session, "x") for session in (anna, who(9), anna, who(8))]
            await backend.close()
            return replies

        assert {reply.code for reply in run(play())} == {250}
        clients = re.findall(r"client=\S+\[(\S+)\](, sasl_method=XCLIENT, sasl_username=anna@example\.com)?$",
                             server.log, re.MULTILINE)  # fmt: skip
        assert [(address, bool(login)) for address, login in clients] == [
            ("192.0.2.8", True),
            ("2001:db8::9", False),
            ("192.0.2.8", True),
            ("192.0.2.8", False),
        ]
        assert len(re.findall(r"smtpd\[\d+\]: connect from unknown\[127\.0\.0\.1\]", server.log)) == 2, (
            "one look, and one connection for all"
        )


def test_a_client_refused_in_the_answer_to_xclient_is_deferred_and_the_operator_hears_why():
    with TellingPostfix("smtpd_delay_reject = no") as server:
        notes = Notes()

        async def play() -> list[Reply]:
            backend = backend_of(server, "xclient", notes)
            replies = [await send(backend, who(number), f"delay-{number}") for number in (BLOCKED, 8)]
            await backend.close()
            return replies

        blocked, good = run(play())
        assert blocked.octets().startswith(b"451 4.7.0")
        assert good.code == 250
        assert len(notes.lines) == 1
        assert "Client host rejected" in notes.lines[0]


def test_a_server_that_does_not_let_the_gate_speak_for_others_gets_mail_without():
    with Postfix() as server:
        notes = Notes()

        async def play() -> list[Reply]:
            backend = make_backend(settings(server.port, xclient=True), log=notes.log)
            assert isinstance(backend, DedicatedBackend)
            replies = [await send(backend, who(number), f"without-{number}") for number in (8, 9)]
            await backend.close()
            return replies

        assert {reply.code for reply in run(play())} == {250}
        assert [line for line in notes.lines if "XCLIENT" in line] == notes.lines[:1]
        log = server.log
        assert log.count("client=localhost[127.0.0.1]") == 2


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_server_that_expects_no_header_gets_no_mail(postfix, version):
    notes = Notes()

    async def play() -> Reply:
        backend = make_backend(settings(postfix.port, proxy=version), log=notes.log)
        assert isinstance(backend, DedicatedBackend)
        reply = await send(backend, who(8), f"unexpected-{version}")
        await backend.close()
        return reply

    assert run(play()).octets().startswith(b"451 4.")
    assert len(notes.lines) == 1
    assert f"unexpected-{version}" not in {one.subject for one in postfix.seen(set())}


@pytest.mark.parametrize("version", ["proxy-v1", "proxy-v2"])
def test_a_look_at_a_server_behind_a_header_is_answered(postfix, version):
    async def play() -> tuple[bool, bool]:
        backend = backend_of(postfix, version)
        await backend.probe()
        healthy, capabilities = backend.healthy, backend.capabilities
        await backend.close()
        return healthy, capabilities is not None and "PIPELINING" in capabilities.keywords

    assert run(play()) == (True, True)
