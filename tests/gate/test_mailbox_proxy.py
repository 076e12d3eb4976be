"""POP before SMTP: what clients of the POP3 and IMAP proxy hear, what the server behind hears, which windows open.

``House`` is the rest of the gate, scripted; ``Scripted`` is the mailbox server, which misbehaves as it is told.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address
from typing import Any, NamedTuple

import pytest
import pytest_asyncio
import trustme

from gatepost.facts import Client, Session
from gatepost.gate import mailbox_proxy, mailbox_server
from gatepost.gate.connection import Connection, Ended
from gatepost.gate.mailbox_lines import (
    CAPABILITIES_MAX,
    LITERAL_OCTETS_MAX,
    SERVER_LINE_OCTETS_MAX,
    Lines,
)
from gatepost.gate.mailbox_proxy import COMMANDS_MAX, REFUSALS_MAX, MailboxSession, turned_away
from gatepost.gate.mailbox_server import UNTAGGED_MAX
from gatepost.gate.settings import GateSettings, ListenSettings, MailboxServer, TlsSettings
from gatepost.gate.tls import Tls, TlsContext
from gatepost.policy.relay import RelayRules
from gatepost.smtp.command import AUTH_OCTETS_MAX

PATIENCE_S = 20.0  # a test that waits for so long has failed
NOW_S = 1_800_000_000.0
SECRET = "s3cret-of-alice"


def b64(octets: bytes) -> bytes:
    return base64.b64encode(octets)


PLAIN = b64(b"\0alice\0" + SECRET.encode())


# ---- the gate around it


class Looked(NamedTuple):
    banned: bool = False
    delay_s: float = 0.0


class ScriptedGuesses:
    def __init__(self) -> None:
        self.look_is = Looked()
        self.wrongs: list[tuple[str, str, str, float]] = []
        self.rights: list[tuple[str, str, float]] = []
        self.baits: list[tuple[str, str, float]] = []

    def look(self, user: str, client: Any, now_s: float) -> Looked:
        return self.look_is

    def wrong(self, user: str, client: Any, secret: str, now_s: float) -> None:
        self.wrongs.append((user, str(client), secret, now_s))

    def right(self, user: str, client: Any, now_s: float) -> None:
        self.rights.append((user, str(client), now_s))

    def bait(self, user: str, client: Any, now_s: float) -> None:
        self.baits.append((user, str(client), now_s))


class ScriptedCounts:
    def __init__(self) -> None:
        self.replies: list[tuple[str, str]] = []

    def reply(self, stage: str, reason: str) -> None:
        self.replies.append((stage, reason))


class House:
    """The gate and its one listener, as far as a mailbox session needs them."""

    def __init__(self, server: MailboxServer, data: str, role: str = "pop3", **listen: Any) -> None:
        self.loop = asyncio.get_running_loop()
        tls = listen.pop("tls", "none")
        self.settings = ListenSettings(role, (("127.0.0.1", 0),), role=role, tls=tls, server=server, **listen)
        self.gate = self
        self.guesses = ScriptedGuesses()
        self.metrics = ScriptedCounts()
        self.tls = None if tls == "none" else Tls(TlsSettings(), "mx.example.com", data)
        self.shared = False
        self.first = b""  # what came behind a PROXY header
        self.bait = ""  # an account that nobody uses
        self.faults: list[str] = []  # that sessions reported
        self.escaped: list[BaseException] = []
        self.windows: list[tuple[str, str, int, float]] = []
        self.sessions: list[MailboxSession] = []
        self.lines: list[Any] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        self._server = await self.loop.create_server(lambda: Connection(self, self.loop), "127.0.0.1", 0)  # type: ignore[arg-type]
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for session in self.sessions:
            session.connection.abort()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=PATIENCE_S)
        assert not self.escaped

    # ---- as Listener

    def tls_context(self, facts: Any) -> TlsContext | None:
        return None if self.tls is None else self.tls.context("1.2")

    def accepted(self, connection: Connection) -> None:
        address, port, *_ = connection.transport.get_extra_info("peername")
        session = MailboxSession(GateOf(self), self, connection, Client(ip_address(address), port))
        if self.settings.tls == "implicit":
            connection.keep(b"")
        self.sessions.append(session)
        connection.task = self.loop.create_task(session.run(self.first))
        self.tasks.add(connection.task)
        connection.task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        fault = None if task.cancelled() else task.exception()
        if fault is not None:
            self.escaped.append(fault)

    def expire(self, reason: Ended) -> None:
        for session in self.sessions:
            session.connection.expire(reason)


class GateOf:
    """The same as Server: its settings are those of the whole gate."""

    def __init__(self, house: House) -> None:
        self._house = house
        self.settings = GateSettings("mx.example.com", "", 1, (house.settings,), RelayRules(), ())
        self.guesses = house.guesses
        self.metrics = house.metrics

    def now_s(self) -> float:
        return NOW_S

    def new_reference(self) -> str:
        return "REF"

    async def is_bait(self, user: str) -> bool:
        return user == self._house.bait

    def login_opened(self, account: str, client: Any, accounts_max: int, now_s: float) -> bool:
        if self._house.shared:
            return False
        self._house.windows.append((account, str(client), accounts_max, now_s))
        return True

    def close(self, connection: Connection) -> None:
        connection.close()

    def failed(self, facts: Session) -> None:
        self._house.faults.append(f"{facts.reference}: {traceback.format_exc()}")

    def ended(self, session: MailboxSession) -> None:
        self._house.sessions.remove(session)
        self._house.lines.append(session.record())


# ---- the server behind it


START_TLS = object()
Script = Callable[[bytes], Any]


class Scripted:
    """A mailbox server: a greeting, and for each line an answer.

    That is octets, or None to hang up, or octets and what happens behind them: START_TLS, or None again.
    """

    def __init__(self, greeting: bytes, script: Script, tls: ssl.SSLContext | None = None) -> None:
        self.greeting = greeting
        self.script = script
        self.tls = tls
        self.implicit = False
        self.heard: list[bytes] = []
        self.connections = 0
        self.writers: list[asyncio.StreamWriter] = []
        self.eof = asyncio.Event()
        self.port = 0

    async def open(self) -> None:
        context = self.tls if self.implicit else None
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._server.close()
        for writer in self.writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        with suppress(ConnectionError, ssl.SSLError):
            writer.write(self.greeting)
            while line := await reader.readline():
                self.heard.append(line.removesuffix(b"\r\n"))
                answer = self.script(line.removesuffix(b"\r\n"))
                if answer is None:
                    break
                if isinstance(answer, tuple):
                    writer.write(answer[0])
                    await writer.drain()
                    if answer[1] is None:
                        break
                    assert self.tls is not None
                    await writer.start_tls(self.tls)
                else:
                    writer.write(answer)
            if not line:
                self.eof.set()
        writer.close()


CAPA = (b"TOP", b"UIDL", b"USER", b"SASL PLAIN LOGIN CRAM-MD5", b"PIPELINING", b"UTF8", b"LANG")


def pop3(capa: tuple[bytes, ...] | None = CAPA, **answers: Any) -> Script:
    """Answers by verb; a good login is alice's."""

    def script(line: bytes) -> Any:
        verb, _, argument = line.partition(b" ")
        name = verb.decode().upper()
        if name in answers:
            return answers[name]
        match name:
            case "CAPA":
                if capa is None:
                    return b"-ERR what?\r\n"
                return b"+OK\r\n" + b"".join(item + b"\r\n" for item in capa) + b".\r\n"
            case "USER":
                return b"+OK\r\n"
            case "PASS":
                return b"+OK 2 messages\r\n" if argument == SECRET.encode() else b"-ERR no, not %b\r\n" % argument
            case "AUTH":
                return b"+ \r\n"
            case "STLS":
                return (b"+OK\r\n", START_TLS)
            case "QUIT":
                return None
            case _:
                return b"+OK " + line + b"\r\n"

    return script


IMAP_CAPABILITIES = b"IMAP4rev1 LITERAL+ SASL-IR IDLE UIDPLUS AUTH=PLAIN AUTH=CRAM-MD5 COMPRESS=DEFLATE LOGIN-REFERRALS"


def imap(offered: bytes = IMAP_CAPABILITIES, **answers: Any) -> Script:
    """Answers by verb, %t for the tag; a good login is alice's."""

    def script(line: bytes) -> Any:
        tag, _, rest = line.partition(b" ")
        name = rest.partition(b" ")[0].decode("latin-1").upper()
        if name in answers:
            answer = answers[name]
            return answer.replace(b"%t", tag) if isinstance(answer, bytes) else answer
        match name:
            case "CAPABILITY":
                return b"* CAPABILITY %b\r\n%b OK\r\n" % (offered, tag)
            case "LOGIN":
                good = rest == b'LOGIN "alice" "%b"' % SECRET.encode()
                return tag + (b" OK [CAPABILITY IMAP4rev1] in\r\n" if good else b" NO wrong\r\n")
            case "AUTHENTICATE":
                return b"+ \r\n"
            case "STARTTLS":
                return (tag + b" OK\r\n", START_TLS)
            case "LOGOUT":
                return None
            case _:
                return tag + b" OK " + rest + b"\r\n"

    return script


class Peer:
    """A client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def say(self, octets: bytes) -> None:
        self.writer.write(octets)

    async def line(self) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.readline()

    async def ask(self, line: bytes) -> bytes:
        self.say(line + b"\r\n")
        return await self.line()

    async def until(self, last: bytes) -> list[bytes]:
        """Lines up to the one that begins so."""
        lines: list[bytes] = []
        while not lines or not lines[-1].startswith(last):
            line = await self.line()
            assert line, lines
            lines.append(line.removesuffix(b"\r\n"))
        return lines

    async def rest(self) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            with suppress(ConnectionError):
                return await self.reader.read()
        return b""

    async def secure(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        async with asyncio.timeout(PATIENCE_S):
            await self.writer.start_tls(context)


class Stage:
    """A server, the proxy in front of it, and clients."""

    def __init__(self, data: str) -> None:
        self.data = data
        self.server: Scripted
        self.house: House
        self.peers: list[Peer] = []

    async def set(
        self,
        role: str,
        script: Script | None = None,
        *,
        greeting: bytes = b"",
        settings: dict[str, Any] | None = None,
        server_tls: ssl.SSLContext | None = None,
        implicit: bool = False,
        **listen: Any,
    ) -> None:
        ready = b"+OK ready\r\n" if role == "pop3" else b"* OK ready\r\n"
        self.server = Scripted(greeting or ready, script or (pop3() if role == "pop3" else imap()), server_tls)
        self.server.implicit = implicit
        await self.server.open()
        mailbox = replace(MailboxServer("127.0.0.1", self.server.port, tls="off"), **(settings or {}))
        self.house = House(mailbox, self.data, role, **listen)
        await self.house.open()

    async def connect(self) -> Peer:
        self.peers.append(Peer(*await asyncio.open_connection("127.0.0.1", self.house.port)))
        return self.peers[-1]

    async def greeted(self) -> Peer:
        peer = await self.connect()
        self.greeting = await peer.line()
        return peer

    async def logged_in(self) -> Peer:
        """Alice is in, and octets go both ways."""
        peer = await self.greeted()
        if self.house.settings.role == "pop3":
            await peer.ask(b"USER alice")
            assert await peer.ask(b"PASS " + SECRET.encode()) == b"+OK 2 messages\r\n"
        else:
            assert (await peer.ask(b"a1 LOGIN alice " + SECRET.encode())).startswith(b"a1 OK")
        return peer

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - the conditions are the gate's own, and it tells nobody
                await asyncio.sleep(0.001)

    async def logged(self) -> dict[str, Any]:
        await self.until(lambda: self.house.lines)
        (line,) = self.house.lines
        assert SECRET not in str(line)
        return line

    async def close(self) -> None:
        for peer in self.peers:
            peer.writer.transport.abort()
        if hasattr(self, "house"):
            await self.house.close()
            await self.server.close()


@pytest_asyncio.fixture
async def stage(tmp_path) -> AsyncIterator[Stage]:
    stage = Stage(str(tmp_path))
    yield stage
    await stage.close()


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def server_tls(authority, monkeypatch, tmp_path) -> ssl.SSLContext:
    """A server's certificate for 127.0.0.1, vouched for by the system's authorities as this process sees them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    mailbox_server._context.cache_clear()
    return context


# ---- POP3


async def test_a_login_by_pop3_opens_a_window_and_then_octets_go_both_ways(stage):
    await stage.set("pop3")
    peer = await stage.greeted()
    assert stage.greeting == b"+OK mx.example.com POP3 Gatepost\r\n"
    assert await peer.ask(b"USER Alice") == b"+OK Password?\r\n"
    assert stage.server.heard == []
    stage.server.script = pop3()
    peer.say(b"PASS " + SECRET.encode() + b"\r\nSTAT\r\n")
    assert await peer.line() == b"+OK 2 messages\r\n"
    assert await peer.line() == b"+OK STAT\r\n"
    assert stage.house.windows == [("alice", "127.0.0.1", 3, NOW_S)]
    assert stage.house.guesses.rights == [("alice", "127.0.0.1", NOW_S)]
    assert stage.server.heard == [b"CAPA", b"USER Alice", b"PASS " + SECRET.encode(), b"STAT"]
    peer.say(b"QUIT\r\n")
    assert await peer.rest() == b""
    line = await stage.logged()
    assert line["event"] == "session"
    assert line["listen"] == "pop3"
    assert line["client"] == "127.0.0.1"
    assert line["account"] == "alice"
    assert line["window"] == "opened"
    assert line["end"] == "server closed"
    assert line["logins"] == [{"account": "alice", "mechanism": "USER", "verdict": "verified"}]
    assert stage.house.metrics.replies == [("auth", "accepted")]


@pytest.mark.parametrize(
    "lines",
    [
        [b"AUTH PLAIN " + PLAIN],
        [b"auth plain", PLAIN],
        [b"AUTH PLAIN " + b64(b"alice\0alice\0" + SECRET.encode())],
        [b"AUTH LOGIN", b64(b"alice"), b64(SECRET.encode())],
        [b"AUTH LOGIN " + b64(b"alice"), b64(SECRET.encode())],
    ],
)
async def test_sasl_is_told_to_the_server_as_it_takes_a_login(stage, lines):
    await stage.set("pop3")
    peer = await stage.greeted()
    for line in lines[:-1]:
        assert (await peer.ask(line)).startswith(b"+ ")
    assert await peer.ask(lines[-1]) == b"+OK 2 messages\r\n"
    assert stage.server.heard == [b"CAPA", b"USER alice", b"PASS " + SECRET.encode()]
    assert stage.house.windows[0][0] == "alice"


async def test_a_server_that_wants_sasl_gets_it(stage):
    def script(line):
        return b"+OK in\r\n" if line == PLAIN else pop3(capa=(b"SASL PLAIN",))(line)

    await stage.set("pop3", script)
    peer = await stage.greeted()
    await peer.ask(b"USER alice")
    assert await peer.ask(b"PASS " + SECRET.encode()) == b"+OK in\r\n"
    assert stage.server.heard == [b"CAPA", b"AUTH PLAIN", PLAIN]


async def test_capabilities_are_the_servers_and_ours(stage):
    await stage.set("pop3")
    peer = await stage.greeted()
    peer.say(b"CAPA\r\n")
    lines = await peer.until(b".")
    assert lines[1:-1] == [
        b"TOP",
        b"UIDL",
        b"PIPELINING",
        b"RESP-CODES",
        b"AUTH-RESP-CODE",
        b"USER",
        b"SASL PLAIN LOGIN",
    ]
    peer.say(b"AUTH\r\n")
    assert await peer.until(b".") == [b"+OK Mechanisms follow", b"PLAIN", b"LOGIN", b"."]


@pytest.mark.parametrize("role", ["pop3", "imap"])
async def test_capabilities_of_a_server_that_is_down_are_ours_alone(stage, role):
    await stage.set(role)
    await stage.server.close()
    peer = await stage.greeted()
    peer.say(b"CAPA\r\n" if role == "pop3" else b"a CAPABILITY\r\n")
    lines = await peer.until(b"." if role == "pop3" else b"a OK")
    assert (b"UIDL" in lines) is False
    assert lines[1] == b"RESP-CODES" if role == "pop3" else lines[0].startswith(b"* CAPABILITY IMAP4rev1 ID ")


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (b"APOP alice c4c9334bac560ecc979e58001b3e22fb", b"-ERR Log in first"),
        (b"STAT", b"-ERR Log in first"),
        (b"STLS", b"-ERR Log in first"),
        (b"PASS x", b"-ERR Say USER first"),
        (b"AUTH CRAM-MD5", b"-ERR No such mechanism"),
        (b"AUTH XOAUTH2 eA==", b"-ERR No such mechanism"),
        (b"AUTH \xff", b"-ERR No such mechanism"),
        (b"AUTH PLAIN !!!", b"-ERR The response is not base64"),
        (b"AUTH PLAIN =", b"-ERR The response is not what the mechanism asks for"),
        (b"EHLO client.test", b"-ERR Log in first"),
        (b"", b"-ERR This is POP3"),
    ],
)
async def test_other_commands_before_the_login_are_refused_here(stage, command, answer):
    await stage.set("pop3")
    peer = await stage.greeted()
    assert (await peer.ask(command)).startswith(answer)
    assert stage.server.connections == 0
    assert await peer.ask(b"QUIT") == b"+OK Bye\r\n"
    assert await peer.rest() == b""
    line = await stage.logged()
    assert (line["end"], line["errors"]) == ("quit", 1)
    assert "account" not in line


async def test_an_exchange_can_be_cancelled(stage):
    await stage.set("pop3")
    peer = await stage.greeted()
    assert await peer.ask(b"AUTH PLAIN") == b"+ \r\n"
    assert await peer.ask(b"*") == b"-ERR Authentication cancelled\r\n"
    assert await peer.ask(b"AUTH PLAIN " + PLAIN) == b"+OK 2 messages\r\n"


async def test_a_wrong_password_is_counted_and_another_may_follow(stage):
    await stage.set("pop3")
    peer = await stage.greeted()
    await peer.ask(b"USER alice")
    assert await peer.ask(b"PASS wrong") == b"-ERR [AUTH] Authentication failed\r\n"
    assert stage.house.guesses.wrongs == [("alice", "127.0.0.1", "wrong", NOW_S)]
    assert stage.house.windows == []
    assert await peer.ask(b"PASS " + SECRET.encode()) == b"-ERR Say USER first\r\n"
    await peer.ask(b"USER alice")
    assert await peer.ask(b"PASS " + SECRET.encode()) == b"+OK 2 messages\r\n"
    assert stage.server.connections == 1


async def test_an_unknown_user_and_a_wrong_password_sound_the_same(stage):
    await stage.set("pop3", pop3(USER=b"-ERR nobody of that name\r\n"))
    peer = await stage.greeted()
    assert await peer.ask(b"USER mallory") == b"+OK Password?\r\n"
    assert await peer.ask(b"PASS x") == b"-ERR [AUTH] Authentication failed\r\n"
    assert [wrong[0] for wrong in stage.house.guesses.wrongs] == ["mallory"]


@pytest.mark.parametrize("user", [b"", b"\xff\xfe", b"a\tb", b"x" * 257])
async def test_a_name_that_nobody_can_have_is_a_wrong_one(stage, user):
    await stage.set("pop3")
    peer = await stage.greeted()
    await peer.ask(b"USER " + user)
    assert await peer.ask(b"PASS x") == b"-ERR [AUTH] Authentication failed\r\n"
    assert stage.server.connections == 0
    peer.say(b"QUIT\r\n")
    await peer.rest()
    assert (await stage.logged())["logins"][0]["account"] == ""


async def test_nobody_acts_for_somebody_else(stage):
    await stage.set("pop3")
    peer = await stage.greeted()
    answer = await peer.ask(b"AUTH PLAIN " + b64(b"bob\0alice\0" + SECRET.encode()))
    assert answer == b"-ERR [AUTH] Authentication failed\r\n"
    assert stage.server.connections == 0
    assert stage.house.windows == []


@pytest.mark.parametrize("role", ["pop3", "imap"])
async def test_the_server_is_asked_for_a_line_and_gets_no_second_one(stage, role):
    """Whatever is in a name or a secret, it is one argument of one command."""
    await stage.set(role)
    peer = await stage.greeted()
    if role == "pop3":
        answer = await peer.ask(b"AUTH PLAIN " + b64(b"\0alice\0x\r\nDELE 1"))
        assert answer == b"-ERR [AUTH] Authentication failed\r\n"
    else:
        peer.say(b"a LOGIN alice {8+}\r\nx\r\ny LOG\r\n")
        assert (await peer.line()).startswith(b"a NO [AUTHENTICATIONFAILED]")
    assert stage.server.heard == []


@pytest.mark.parametrize("code", [b"SYS/TEMP", b"IN-USE", b"LOGIN-DELAY", b"SYS/PERM"])
async def test_a_refusal_that_judges_nothing_is_passed_on_and_counts_as_no_guess(stage, code):
    await stage.set("pop3", pop3(PASS=b"-ERR [%b] later\r\n" % code))
    peer = await stage.greeted()
    await peer.ask(b"USER alice")
    assert await peer.ask(b"PASS " + SECRET.encode()) == b"-ERR [%b] later\r\n" % code
    assert stage.house.guesses.wrongs == []
    assert stage.house.windows == []


# ---- what both have in common: guesses, windows, a server that is odd


async def log_in(peer: Peer, role: str, secret: bytes = SECRET.encode()) -> bytes:
    if role == "imap":
        peer.say(b"z LOGIN alice " + secret + b"\r\n")
        return (await peer.until(b"z "))[-1]
    await peer.ask(b"USER alice")
    return (await peer.ask(b"PASS " + secret)).removesuffix(b"\r\n")


UNAVAILABLE = {
    "pop3": b"-ERR [SYS/TEMP] The mailbox server cannot be asked now, try again later",
    "imap": b"z NO [UNAVAILABLE] The mailbox server cannot be asked now, try again later",
}
WRONG = {
    "pop3": b"-ERR [AUTH] Authentication failed",
    "imap": b"z NO [AUTHENTICATIONFAILED] Authentication failed",
}
both = pytest.mark.parametrize("role", ["pop3", "imap"])


@both
async def test_who_is_banned_hears_what_a_wrong_password_hears_and_the_server_hears_nothing(stage, role):
    await stage.set(role)
    stage.house.guesses.look_is = Looked(banned=True)
    peer = await stage.greeted()
    assert await log_in(peer, role) == WRONG[role]
    assert stage.server.connections == 0
    assert stage.house.windows == stage.house.guesses.wrongs == stage.house.guesses.rights == []
    assert stage.house.metrics.replies == [("auth", "banned")]
    peer.writer.transport.abort()
    assert (await stage.logged())["logins"][0]["why"] == "banned"


@both
async def test_who_tries_a_bait_account_hears_what_a_wrong_password_hears_and_the_server_hears_nothing(stage, role):
    await stage.set(role)
    stage.house.bait = "alice"
    peer = await stage.greeted()
    assert await log_in(peer, role) == WRONG[role]  # with what would be the right secret
    assert await log_in(peer, role, b"wrong") == WRONG[role]
    assert stage.server.connections == 0
    guesses = stage.house.guesses
    assert guesses.baits == [("alice", "127.0.0.1", NOW_S)] * 2
    assert guesses.wrongs == [("alice", "127.0.0.1", secret, NOW_S) for secret in (SECRET, "wrong")]
    assert stage.house.windows == guesses.rights == []
    assert stage.house.metrics.replies == [("auth", "credentials")] * 2
    peer.writer.transport.abort()
    line = await stage.logged()
    assert [login["why"] for login in line["logins"]] == ["a bait account"] * 2
    assert line["errors"] == 2


async def test_a_bait_account_is_one_in_any_case_and_for_whomever_it_is_to_act(stage):
    await stage.set("pop3")
    stage.house.bait = "alice"
    peer = await stage.greeted()
    answer = await peer.ask(b"AUTH PLAIN " + b64(b"bob\0ALICE\0" + SECRET.encode()))
    assert answer == WRONG["pop3"] + b"\r\n"
    assert stage.house.guesses.baits == [("alice", "127.0.0.1", NOW_S)]


@both
async def test_who_is_banned_is_not_looked_up_among_the_bait_accounts(stage, role):
    await stage.set(role)
    stage.house.bait = "alice"
    stage.house.guesses.look_is = Looked(banned=True)
    peer = await stage.greeted()
    assert await log_in(peer, role) == WRONG[role]
    assert stage.house.guesses.baits == []


@both
async def test_too_many_tries_of_a_bait_account_end_the_session(stage, role):
    await stage.set(role)
    stage.house.bait = "alice"
    peer = await stage.greeted()
    for _ in range(REFUSALS_MAX):
        assert await log_in(peer, role) == WRONG[role]
    assert (await peer.rest()).startswith(b"-ERR Too many" if role == "pop3" else b"* BYE Too many")


@both
async def test_who_guessed_before_waits_for_an_answer(stage, role, monkeypatch):
    await stage.set(role)
    stage.house.guesses.look_is = Looked(delay_s=7.5)
    slept = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds > 1:
            slept.append((seconds, stage.server.connections))
            seconds = 0
        await real(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    peer = await stage.greeted()
    assert await log_in(peer, role, b"wrong") == WRONG[role]
    assert slept == [(7.5, 0)]


@both
async def test_an_address_of_many_accounts_opens_no_window(stage, role):
    await stage.set(role)
    stage.house.shared = True
    peer = await stage.logged_in()
    peer.writer.transport.abort()
    line = await stage.logged()
    assert line["account"] == "alice"
    assert line["window"] == "not opened: many accounts log in from this address"


@both
async def test_too_many_wrong_passwords_end_the_session(stage, role):
    await stage.set(role)
    peer = await stage.greeted()
    for number in range(REFUSALS_MAX):
        assert await log_in(peer, role, b"wrong%d" % number) == WRONG[role]
    assert (await peer.rest()).startswith(b"-ERR Too many" if role == "pop3" else b"* BYE Too many")
    assert len(stage.house.guesses.wrongs) == REFUSALS_MAX
    assert (await stage.logged())["end"] == "too many errors"


@both
async def test_so_many_commands_and_no_more(stage, role):
    for commands, good in ((COMMANDS_MAX - 1, True), (COMMANDS_MAX, True), (COMMANDS_MAX + 1, False)):
        await stage.set(role)
        peer = await stage.greeted()
        last = b"QUIT\r\n" if role == "pop3" else b"a LOGOUT\r\n"
        peer.say((b"STAT\r\n" if role == "pop3" else b"a NOOP\r\n") * (commands - 1) + last)
        await peer.rest()
        assert (await stage.logged())["end"] == ("quit" if good else "too many commands")
        await stage.close()


@both
@pytest.mark.parametrize("octets", [b"USER a\0lice\r\n", b"USER a\rlice\r\n", b"x" * AUTH_OCTETS_MAX])
async def test_octets_that_are_no_line_end_the_session(stage, role, octets):
    await stage.set(role)
    peer = await stage.greeted()
    peer.say(octets)
    said = await peer.rest()
    assert said.startswith(b"-ERR ") if role == "pop3" else b"* BYE " in said
    assert (await stage.logged())["end"] == "protocol error"


ODD_POP3: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greets with a refusal": ({"greeting": b"-ERR go away\r\n"}, {}),
    "greets in another tongue": ({"greeting": b"220 mx ESMTP\r\n"}, {}),
    "greets without end": ({"greeting": b"+OK " + b"x" * SERVER_LINE_OCTETS_MAX}, {}),
    "says nul": ({"greeting": b"+OK \0\r\n"}, {}),
    "endless capabilities": ({}, {"CAPA": b"+OK\r\n" + b"TOP\r\n" * (CAPABILITIES_MAX + 1)}),
    "capabilities cut short": ({}, {"CAPA": (b"+OK\r\nTOP\r\n", None)}),
    "hangs up at USER": ({}, {"USER": None}),
    "hangs up at PASS": ({}, {"PASS": None}),
    "nonsense at PASS": ({}, {"PASS": b"250 OK\r\n"}),
    "a yes that is none": ({}, {"PASS": b"+OKAY\r\n"}),
    "asks on at PASS": ({}, {"PASS": b"+ \r\n"}),
    "answers USER twice": ({}, {"USER": b"+OK\r\n+OK you are in\r\n"}),
    "empty line": ({}, {"PASS": b"\r\n"}),
}
ODD_IMAP: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greets with BYE": ({"greeting": b"* BYE go away\r\n"}, {}),
    "greets as if we were in": ({"greeting": b"* PREAUTH hello\r\n"}, {}),
    "greets without end": ({"greeting": b"* OK " + b"x" * SERVER_LINE_OCTETS_MAX}, {}),
    "hangs up at LOGIN": ({}, {"LOGIN": None}),
    "another tag": ({}, {"LOGIN": b"g99 OK in\r\n"}),
    "only untagged": ({}, {"LOGIN": (b"* OK in\r\n* BYE\r\n", None)}),
    "asks on": ({}, {"LOGIN": b"+ more\r\n"}),
    "a yes that is none": ({}, {"LOGIN": b"%t OKAY\r\n"}),
    "did not understand": ({}, {"LOGIN": b"%t BAD what?\r\n"}),
    "endless untagged": ({}, {"LOGIN": b"* X\r\n" * (UNTAGGED_MAX + 1) + b"%t OK\r\n"}),
    "a literal": ({}, {"LOGIN": b"* X {3}\r\nabc\r\n%t OK\r\n"}),
}


@pytest.mark.parametrize(("role", "how"), [*(("pop3", how) for how in ODD_POP3), *(("imap", how) for how in ODD_IMAP)])
async def test_a_server_that_is_odd_is_out_of_reach_and_nobody_guessed(stage, role, how):
    options, answers = (ODD_POP3 if role == "pop3" else ODD_IMAP)[how]
    await stage.set(role, (pop3 if role == "pop3" else imap)(**answers), **options)
    peer = await stage.greeted()
    assert await log_in(peer, role) == UNAVAILABLE[role]
    assert stage.house.windows == stage.house.guesses.wrongs == stage.house.guesses.rights == []
    # The session goes on, with a connection of its own.
    stage.server.greeting, stage.server.script = (b"+OK\r\n", pop3()) if role == "pop3" else (b"* OK\r\n", imap())
    assert (await log_in(peer, role)).startswith((b"+OK", b"z OK"))


@pytest.mark.parametrize("more", [-1, 0, 1])
async def test_a_server_at_the_limits_of_what_it_may_say(stage, more):
    capa = b"+OK\r\nUSER\r\n" + b"TOP\r\n" * (CAPABILITIES_MAX - 1 + more) + b".\r\n"
    await stage.set("pop3", pop3(CAPA=capa))
    assert ((await log_in(await stage.greeted(), "pop3")) != UNAVAILABLE["pop3"]) is (more <= 0)
    await stage.close()
    await stage.set("imap", imap(LOGIN=b"* X\r\n" * (UNTAGGED_MAX + more) + b"%t OK in\r\n"))
    assert ((await log_in(await stage.greeted(), "imap")) != UNAVAILABLE["imap"]) is (more <= 0)


@both
async def test_a_server_that_is_silent_is_out_of_reach(stage, role):
    await stage.set(role, lambda _: b"", settings={"timeout_s": 0.2})
    peer = await stage.greeted()
    assert await log_in(peer, role) == UNAVAILABLE[role]
    peer.writer.transport.abort()
    line = await stage.logged()
    assert line["logins"][0]["verdict"] == "unavailable"
    assert line["logins"][0]["why"] == f"127.0.0.1:{stage.server.port}: no answer in time"


@both
async def test_a_server_that_is_down_is_out_of_reach(stage, role):
    await stage.set(role)
    await stage.server.close()
    peer = await stage.greeted()
    assert await log_in(peer, role) == UNAVAILABLE[role]
    assert stage.house.metrics.replies == [("auth", "unavailable")]


@both
async def test_a_server_that_closed_in_the_meantime_is_asked_again(stage, role):
    await stage.set(role)
    peer = await stage.greeted()
    assert await log_in(peer, role, b"wrong") == WRONG[role]
    stage.server.writers[0].transport.abort()
    await stage.until(lambda: stage.house.sessions[0].link._wire.ended)
    assert b"OK" in await log_in(peer, role)
    assert stage.server.connections == 2


async def test_a_server_that_has_no_name(stage):
    await stage.set("pop3", settings={"host": "no-such-host.invalid"})
    peer = await stage.greeted()
    assert await log_in(peer, "pop3") == UNAVAILABLE["pop3"]
    peer.writer.transport.abort()
    assert "the name cannot be looked up" in (await stage.logged())["logins"][0]["why"]


async def test_a_server_whose_first_address_is_dead_is_asked_at_the_next(stage, monkeypatch):
    """Connecting to the first neither succeeds nor fails: it takes its share of the time and no more."""
    await stage.set("pop3", settings={"timeout_s": 2.0})
    loop = asyncio.get_running_loop()
    connect = loop.create_connection
    tried = []

    async def found(*_: Any, **__: Any) -> list[Any]:
        return [(0, 0, 0, "", (address, 0)) for address in ("192.0.2.1", "127.0.0.1")]

    async def create_connection(factory: Any, host: str, port: int) -> Any:
        tried.append(host)
        if host == "192.0.2.1":
            await asyncio.Event().wait()
        return await connect(factory, host, port)

    peer = await stage.greeted()
    monkeypatch.setattr(loop, "getaddrinfo", found)
    monkeypatch.setattr(loop, "create_connection", create_connection)
    assert await log_in(peer, "pop3", b"wrong") == WRONG["pop3"]
    assert tried == ["192.0.2.1", "127.0.0.1"]


async def test_a_server_that_takes_no_login_in_plain_text_is_told_none(stage):
    await stage.set("pop3", pop3(capa=(b"TOP", b"UIDL")))
    peer = await stage.greeted()
    assert await log_in(peer, "pop3") == UNAVAILABLE["pop3"]
    assert stage.server.heard == [b"CAPA"]


async def test_a_server_that_does_not_know_capa(stage):
    await stage.set("pop3", pop3(capa=None), settings={"tls": "opportunistic"})
    peer = await stage.greeted()
    assert await log_in(peer, "pop3") == b"+OK 2 messages"


@both
async def test_a_client_that_leaves_in_the_middle_of_an_exchange(stage, role):
    await stage.set(role)
    peer = await stage.greeted()
    assert await peer.ask(b"AUTH PLAIN" if role == "pop3" else b"a AUTHENTICATE PLAIN") == b"+ \r\n"
    peer.writer.write_eof()
    assert await peer.rest() == b""
    assert (await stage.logged())["end"] == "client closed"


@both
async def test_a_fault_of_ours_ends_one_session_and_opens_nothing(stage, role):
    await stage.set(role)
    stage.house.guesses.right = None
    peer = await stage.greeted()
    other = await stage.greeted()
    peer.say(b"AUTH PLAIN " + PLAIN + b"\r\n" if role == "pop3" else b"a AUTHENTICATE PLAIN " + PLAIN + b"\r\n")
    assert await peer.rest() == turned_away(role, "Internal error; closing, try again later")
    line = await stage.logged()
    assert line["end"] == "internal error"
    assert "window" not in line
    (fault,) = stage.house.faults
    assert fault.startswith(f"{line['reference']}: Traceback ")
    assert SECRET not in fault
    assert stage.house.windows == []
    assert await log_in(other, role, b"wrong") == WRONG[role]


@both
async def test_a_fault_of_ours_in_the_middle_of_mail_is_no_word_in_it(stage, role, monkeypatch):
    await stage.set(role)
    peer = await stage.logged_in()

    def rest(lines: Lines) -> bytes:
        raise LookupError("the innermost secret")

    with monkeypatch.context() as patch:
        patch.setattr(Lines, "rest", rest)
        peer.say(b"x NOOP\r\n")
        assert await peer.rest() == b""
    line = await stage.logged()
    assert line["end"] == "internal error"
    (fault,) = stage.house.faults
    assert "the innermost secret" in fault
    async with asyncio.timeout(PATIENCE_S):
        await stage.server.eof.wait()


@both
async def test_octets_behind_a_proxy_header_are_the_clients_first(stage, role):
    await stage.set(role)
    stage.house.first = b"QUIT\r\n" if role == "pop3" else b"a LOGOUT\r\n"
    peer = await stage.greeted()
    assert (await peer.rest()).endswith(b"OK Bye\r\n" if role == "pop3" else b"a OK Done\r\n")


@both
async def test_a_session_that_is_cut_is_logged(stage, role):
    await stage.set(role)
    await stage.logged_in()
    (task,) = stage.house.tasks
    task.cancel()
    assert (await stage.logged())["end"] == "cut"
    async with asyncio.timeout(PATIENCE_S):
        await stage.server.eof.wait()


# ---- IMAP


async def test_a_login_by_imap_opens_a_window_and_then_octets_go_both_ways(stage):
    await stage.set("imap", imap(LOGIN=b"* 1 EXISTS\r\n%t OK [CAPABILITY IMAP4rev1 IDLE] in\r\n"))
    peer = await stage.greeted()
    assert stage.greeting == b"* OK mx.example.com IMAP Gatepost\r\n"
    peer.say(b"a1 LOGIN Alice " + SECRET.encode() + b"\r\na2 SELECT INBOX\r\n")
    assert await peer.until(b"a2") == [
        b"* 1 EXISTS",
        b"a1 OK [CAPABILITY IMAP4rev1 IDLE] in",
        b"a2 OK SELECT INBOX",
    ]
    assert stage.server.heard == [
        b"g1 CAPABILITY",
        b'g2 LOGIN "Alice" "%b"' % SECRET.encode(),
        b"a2 SELECT INBOX",
    ]
    assert stage.house.windows == [("alice", "127.0.0.1", 3, NOW_S)]
    peer.say(b"a3 LOGOUT\r\n")
    await peer.rest()
    assert (await stage.logged())["logins"] == [{"account": "alice", "mechanism": "LOGIN", "verdict": "verified"}]


@pytest.mark.parametrize(
    "lines",
    [
        [b'a LOGIN "alice" "%b"' % SECRET.encode()],
        [b"a LOGIN {5}", b"alice {%d}" % len(SECRET), SECRET.encode()],
        [b"a LOGIN {5+}\r\nalice {%d+}\r\n%b" % (len(SECRET), SECRET.encode())],
        [b"a AUTHENTICATE PLAIN", PLAIN],
        [b"a AUTHENTICATE PLAIN " + PLAIN],
        [b"a authenticate login", b64(b"alice"), b64(SECRET.encode())],
    ],
)
async def test_ways_to_log_in_by_imap(stage, lines):
    await stage.set("imap")
    peer = await stage.greeted()
    for line in lines[:-1]:
        assert (await peer.ask(line)).startswith(b"+ ")
    assert await peer.ask(lines[-1]) == b"a OK [CAPABILITY IMAP4rev1] in\r\n"
    assert stage.server.heard == [b"g1 CAPABILITY", b'g2 LOGIN "alice" "%b"' % SECRET.encode()]
    assert stage.house.windows[0][0] == "alice"


@pytest.mark.parametrize(
    ("offered", "heard"),
    [
        (b"IMAP4rev1 LOGINDISABLED AUTH=PLAIN", [b"g2 AUTHENTICATE PLAIN", PLAIN]),
        (b"IMAP4rev1 LOGINDISABLED", []),
    ],
)
async def test_a_server_without_login_gets_authenticate_or_nothing(stage, offered, heard):
    def script(line):
        return b"g2 OK in\r\n" if line == PLAIN else imap(offered)(line)

    await stage.set("imap", script)
    peer = await stage.greeted()
    assert await log_in(peer, "imap") == (b"z OK in" if heard else UNAVAILABLE["imap"])
    assert stage.server.heard == [b"g1 CAPABILITY", *heard]


async def test_names_that_are_not_ascii_go_as_literals(stage):
    def script(line):
        if line.endswith(b"}"):
            return b"+ go on\r\n"
        return b"g2 OK in\r\n" if line == b"pw" else imap(b"IMAP4rev1")(line)

    await stage.set("imap", script)
    peer = await stage.greeted()
    assert await peer.ask('a LOGIN "jörg" pw'.encode()) == b"a OK in\r\n"
    assert stage.server.heard[1:] == [b"g2 LOGIN {5}", "jörg {2}".encode(), b"pw"]


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (b"a CAPABILITY", b"* CAPABILITY IMAP4rev1 LITERAL+ IDLE UIDPLUS ID SASL-IR AUTH=PLAIN AUTH=LOGIN"),
        (b"a NOOP", b"a OK Done"),
        (b'a ID ("name" "x")', b"* ID NIL"),
        (b"a SELECT INBOX", b"a BAD Log in first"),
        (b"a STARTTLS", b"a BAD Log in first"),
        (b"a APPEND x {3}", b"a BAD Log in first"),
        (b"a LOGIN alice", b"a BAD LOGIN wants a user name and a password"),
        (b"a LOGIN alice {5000}", b"a BAD Too long or too many literals"),
        (b"a AUTHENTICATE", b"a NO No such mechanism"),
        (b"a AUTHENTICATE GSSAPI", b"a NO No such mechanism"),
        (b"a AUTHENTICATE PLAIN x y", b"a NO No such mechanism"),
        (b"a AUTHENTICATE PLAIN !!", b"a BAD The response is not base64"),
        (b"nonsense", b"nonsense BAD This is IMAP: a tag, a command"),
        (b"(", b"* BAD This is IMAP: a tag, a command"),
    ],
)
async def test_commands_of_imap_before_the_login_are_answered_here(stage, command, answer):
    await stage.set("imap")
    peer = await stage.greeted()
    assert (await peer.ask(command)).rstrip() == answer
    assert [line for line in stage.server.heard if b"CAPABILITY" not in line] == []
    peer.say(b"z LOGOUT\r\n")
    assert (await peer.until(b"z OK"))[-2] == b"* BYE Logging out"
    assert await peer.rest() == b""


async def test_a_literal_that_comes_unasked_and_too_long_ends_the_session(stage):
    await stage.set("imap")
    peer = await stage.greeted()
    peer.say(b"a LOGIN alice {%d+}\r\nz LOGOUT\r\n" % (LITERAL_OCTETS_MAX + 1))
    assert (await peer.rest()).splitlines() == [
        b"a BAD Too long or too many literals",
        b"* BYE What follows cannot be read",
    ]
    assert (await stage.logged())["end"] == "protocol error"


@pytest.mark.parametrize("code", [b"UNAVAILABLE", b"INUSE", b"LIMIT", b"SERVERBUG"])
async def test_a_refusal_of_imap_that_judges_nothing_is_passed_on(stage, code):
    await stage.set("imap", imap(LOGIN=b"* X\r\n%%t NO [%b] later\r\n" % code))
    peer = await stage.greeted()
    assert await peer.ask(b"a LOGIN alice " + SECRET.encode()) == b"a NO [%b] later\r\n" % code
    assert stage.house.guesses.wrongs == stage.house.windows == []


# ---- TLS on the client's side


STARTTLS = {"pop3": (b"STLS", b"+OK Begin TLS\r\n"), "imap": (b"a STARTTLS", b"a OK Begin TLS\r\n")}


@both
async def test_no_login_in_plain_text_where_tls_is_offered(stage, role):
    await stage.set(role, tls="starttls")
    peer = await stage.greeted()
    for line in (
        [b"USER alice", b"PASS x", b"AUTH PLAIN " + PLAIN, b"AUTH"]
        if role == "pop3"
        else [b"a LOGIN alice x", b"a LOGIN {5}", b"a LOGIN alice {2+}\r\npw", b"a AUTHENTICATE PLAIN " + PLAIN]
    ):
        answer = await peer.ask(line)
        assert answer.startswith(b"-ERR [AUTH] Say STLS first" if role == "pop3" else b"a NO [PRIVACYREQUIRED]")
    peer.say(b"CAPA\r\n" if role == "pop3" else b"a CAPABILITY\r\n")
    said = b" ".join(await peer.until(b"." if role == "pop3" else b"a OK"))
    assert (b"STLS" if role == "pop3" else b" STARTTLS LOGINDISABLED") in said
    assert b"PLAIN" not in said
    assert stage.house.guesses.wrongs == []


@both
async def test_a_login_behind_starttls(stage, role):
    await stage.set(role, tls="starttls")
    peer = await stage.greeted()
    command, go_ahead = STARTTLS[role]
    assert await peer.ask(command) == go_ahead
    await peer.secure()
    peer.say(b"CAPA\r\n" if role == "pop3" else b"a CAPABILITY\r\n")
    said = b" ".join(await peer.until(b"." if role == "pop3" else b"a OK"))
    assert b"PLAIN" in said
    assert not any(word in said for word in (b"STLS", b"STARTTLS", b"LOGINDISABLED"))
    assert (await peer.ask(command)).startswith((b"-ERR ", b"a BAD "))
    assert b"OK" in await log_in(peer, role)
    peer.writer.transport.abort()
    line = await stage.logged()
    assert line["tls"].startswith("TLSv1.")
    assert line["window"] == "opened"


async def test_what_was_said_before_tls_is_forgotten(stage):
    await stage.set("pop3", tls="starttls", auth_without_tls=True)
    peer = await stage.greeted()
    assert await peer.ask(b"USER mallory") == b"+OK Password?\r\n"
    assert await peer.ask(b"STLS") == b"+OK Begin TLS\r\n"
    await peer.secure()
    assert await peer.ask(b"PASS " + SECRET.encode()) == b"-ERR Say USER first\r\n"


@both
async def test_octets_behind_starttls_end_the_session(stage, role):
    await stage.set(role, tls="starttls")
    peer = await stage.greeted()
    peer.say(STARTTLS[role][0] + b"\r\nUSER mallory\r\n")
    said = await peer.rest()
    assert said.startswith((b"-ERR Octets came behind", b"* BYE Octets came behind"))
    assert (await stage.logged())["end"] == "octets behind STARTTLS"


@both
async def test_a_handshake_that_fails_ends_the_session(stage, role):
    await stage.set(role, tls="starttls")
    peer = await stage.greeted()
    await peer.ask(STARTTLS[role][0])
    peer.say(b"USER alice\r\nPASS " + SECRET.encode() + b"\r\n")
    await peer.rest()
    assert (await stage.logged())["end"].startswith("TLS handshake failed")
    assert stage.server.connections == 0


@both
async def test_tls_from_the_first_octet(stage, role):
    await stage.set(role, tls="implicit")
    peer = await stage.connect()
    await peer.secure()
    assert b"OK mx.example.com" in await peer.line()
    assert b"OK" in await log_in(peer, role)
    peer.writer.transport.abort()
    assert (await stage.logged())["tls"].startswith("TLSv1.")


@both
async def test_a_login_in_plain_text_where_the_settings_say_so(stage, role):
    await stage.set(role, tls="starttls", auth_without_tls=True)
    peer = await stage.greeted()
    assert b"OK" in await log_in(peer, role)


# ---- TLS on the server's side


def with_tls(role: str) -> Script:
    return pop3((*CAPA, b"STLS")) if role == "pop3" else imap(IMAP_CAPABILITIES + b" STARTTLS")


@both
@pytest.mark.parametrize("tls", ["opportunistic", "required"])
async def test_the_server_is_asked_under_tls(stage, role, tls, server_tls):
    await stage.set(role, with_tls(role), server_tls=server_tls, settings={"tls": tls})
    peer = await stage.greeted()
    assert b"OK" in await log_in(peer, role)
    heard = [line.split(b" ")[-1 if role == "pop3" else 1] for line in stage.server.heard[:3]]
    assert heard == ([b"CAPA", b"STLS", b"CAPA"] if role == "pop3" else [b"CAPABILITY", b"STARTTLS", b"CAPABILITY"])
    assert stage.server.writers[0].get_extra_info("ssl_object") is not None


@both
async def test_the_server_is_asked_under_implicit_tls(stage, role, server_tls):
    await stage.set(role, server_tls=server_tls, implicit=True, settings={"tls": "implicit"})
    peer = await stage.greeted()
    assert b"OK" in await log_in(peer, role)


@both
async def test_opportunistic_is_plain_text_where_there_is_no_tls_and_required_is_not(stage, role):
    for tls, good in (("opportunistic", True), ("required", False)):
        await stage.set(role, settings={"tls": tls})
        peer = await stage.greeted()
        answer = await log_in(peer, role)
        assert (answer == UNAVAILABLE[role]) is not good
        assert any(SECRET.encode() in line for line in stage.server.heard) is good
        await stage.close()


@both
@pytest.mark.parametrize("tls", ["required", "implicit"])
async def test_a_certificate_of_somebody_else_is_no_server_of_ours(stage, role, tls, server_tls):
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(stranger)
    implicit = tls == "implicit"
    await stage.set(role, with_tls(role), server_tls=stranger, implicit=implicit, settings={"tls": tls})
    peer = await stage.greeted()
    assert await log_in(peer, role) == UNAVAILABLE[role]
    assert not any(SECRET.encode() in line for line in stage.server.heard)


@both
async def test_opportunistic_goes_on_where_the_server_refuses_tls(stage, role):
    refusal = {"STLS": b"-ERR not now\r\n"} if role == "pop3" else {"STARTTLS": b"%t NO not now\r\n"}
    script = pop3((*CAPA, b"STLS"), **refusal) if role == "pop3" else imap(IMAP_CAPABILITIES + b" STARTTLS", **refusal)
    await stage.set(role, script, settings={"tls": "opportunistic"})
    assert b"OK" in await log_in(await stage.greeted(), role)


async def test_opportunistic_takes_any_certificate(stage):
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("elsewhere.test").configure_cert(stranger)
    await stage.set("pop3", with_tls("pop3"), server_tls=stranger, settings={"tls": "opportunistic"})
    peer = await stage.greeted()
    assert await log_in(peer, "pop3") == b"+OK 2 messages"


@both
async def test_octets_of_the_server_behind_its_leave_for_tls_are_not_believed(stage, role, server_tls):
    leave = {"STLS": b"+OK\r\n+OK injected\r\n", "STARTTLS": b"%t OK\r\n%t OK injected\r\n"}
    script = (
        pop3((*CAPA, b"STLS"), STLS=leave["STLS"])
        if role == "pop3"
        else imap(IMAP_CAPABILITIES + b" STARTTLS", STARTTLS=leave["STARTTLS"])
    )
    await stage.set(role, script, settings={"tls": "opportunistic"})
    peer = await stage.greeted()
    assert await log_in(peer, role) == UNAVAILABLE[role]


# ---- the pump, and how it ends


@both
async def test_a_client_that_does_not_read_is_not_flooded_and_misses_nothing(stage, role):
    big = b"x" * (16 << 20) + b"\r\n"
    good = pop3() if role == "pop3" else imap()
    await stage.set(role, lambda line: big if line.endswith(b"BIG") else good(line))
    peer = await stage.logged_in()
    (session,) = stage.house.sessions
    peer.writer.transport.pause_reading()
    peer.say(b"a BIG\r\n")
    await stage.until(lambda: session.link._wire._paused)
    assert session.link._wire.lines.unread_octets < 1 << 20
    peer.writer.transport.resume_reading()
    async with asyncio.timeout(PATIENCE_S):
        while len(big) > 0:
            piece = await peer.reader.read(1 << 16)
            assert big.startswith(piece)
            big = big[len(piece) :]


@both
async def test_a_server_that_does_not_read_is_not_flooded_and_misses_nothing(stage, role):
    good = pop3() if role == "pop3" else imap()
    total = 0

    def script(line: bytes) -> Any:
        nonlocal total
        total += len(line)
        return good(line) if b"y" not in line else b""

    await stage.set(role, script)
    peer = await stage.logged_in()
    (session,) = stage.house.sessions
    transport = stage.server.writers[0].transport
    transport.pause_reading()
    before, lines = total, 400
    for _ in range(lines):
        peer.say(b"y" * 60_000 + b"\r\n")
    await stage.until(lambda: session.connection._paused)
    assert session.lines.unread_octets < 1 << 20
    transport.resume_reading()
    await stage.until(lambda: total - before == lines * 60_000)


async def test_a_server_that_never_reads_again_is_left(stage, monkeypatch):
    monkeypatch.setattr(mailbox_server, "SERVER_STALL_S", 0.1)
    await stage.set("pop3")
    peer = await stage.logged_in()
    stage.server.writers[0].transport.pause_reading()
    for _ in range(400):
        peer.say(b"y" * 60_000 + b"\r\n")
    assert (await stage.logged())["end"] == "the server takes no more"


@both
async def test_a_client_that_says_goodbye_by_closing(stage, role):
    await stage.set(role)
    peer = await stage.logged_in()
    peer.writer.close()
    line = await stage.logged()
    assert line["end"] in ("client closed", "connection lost")
    async with asyncio.timeout(PATIENCE_S):
        await stage.server.eof.wait()


@both
async def test_a_client_that_half_closes_hears_the_answers(stage, role):
    await stage.set(role)
    peer = await stage.logged_in()
    peer.say(b"a1 LAST\r\n")
    peer.writer.write_eof()
    assert b"LAST" in await peer.rest()
    assert (await stage.logged())["end"] == "client closed"


@both
async def test_all_of_it_said_at_once_and_half_closed(stage, role):
    await stage.set(role)
    peer = await stage.connect()
    if role == "pop3":
        peer.say(b"USER alice\r\nPASS " + SECRET.encode() + b"\r\nSTAT\r\n")
    else:
        peer.say(b"a LOGIN alice " + SECRET.encode() + b"\r\nb STAT\r\n")
    peer.writer.write_eof()
    assert b"OK STAT\r\n" in await peer.rest()


@both
async def test_a_drain_ends_who_waits_for_commands(stage, role):
    await stage.set(role)
    idle, busy = await stage.greeted(), await stage.logged_in()
    for peer in (idle, busy):
        await stage.until(lambda: all(session.connection.waiting for session in stage.house.sessions))
        assert peer
    stage.house.expire(Ended.DRAINED)
    for peer in (idle, busy):
        assert await peer.rest() == (b"* BYE This server is going down\r\n" if role == "imap" else b"")
    await stage.until(lambda: len(stage.house.lines) == 2)
    assert [line["end"] for line in stage.house.lines] == ["draining", "draining"]
    await stage.until(lambda: not stage.house.tasks)


async def test_no_word_of_ours_in_the_middle_of_mail(stage):
    await stage.set("imap", lambda line: b"* 1 FETCH {100}\r\nhalf a line" if b"FETCH" in line else imap()(line))
    peer = await stage.logged_in()
    peer.say(b"a FETCH 1\r\n")
    async with asyncio.timeout(PATIENCE_S):
        await peer.reader.readuntil(b"half a line")
    stage.house.expire(Ended.DRAINED)
    assert await peer.rest() == b""


@both
async def test_silence_before_and_after_login(stage, role):
    await stage.set(role)
    peer = await stage.greeted()
    (session,) = stage.house.sessions
    assert session.patience_s(300.0) == mailbox_proxy.LOGIN_S
    assert session.patience_s(10.0) == 10.0  # when sessions are scarce
    await log_in(peer, role)
    idle_s = mailbox_proxy.POP3_IDLE_S if role == "pop3" else mailbox_proxy.IMAP_IDLE_S
    assert session.patience_s(10.0) == idle_s >= (600.0 if role == "pop3" else 1800.0)
    await stage.until(lambda: session.connection.waiting)
    stage.house.expire(Ended.TIMEOUT)
    assert await peer.rest() == (b"* BYE Autologout; idle for too long\r\n" if role == "imap" else b"")
    assert (await stage.logged())["end"] == "timeout"


@both
async def test_commands_before_the_login_do_not_buy_time(stage, role):
    await stage.set(role)
    peer = await stage.greeted()
    (session,) = stage.house.sessions
    session.connection.since = 0.0
    await peer.ask(b"STAT" if role == "pop3" else b"a NOOP")
    assert session.connection.since == 0.0
    await log_in(peer, role, b"wrong")
    assert session.connection.since > 0.0


def test_who_is_turned_away_hears_it_in_its_own_protocol():
    assert turned_away("pop3", "Too many sessions") == b"-ERR [SYS/TEMP] Too many sessions\r\n"
    assert turned_away("imap", "Too many sessions") == b"* BYE [UNAVAILABLE] Too many sessions\r\n"
