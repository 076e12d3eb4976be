"""A whole gate in this process: real sockets or a scripted wire in front, a scripted backend behind, clocks by hand.

Why: what a client hears and what the operator's log says are asserted; no test waits for time to pass.  ``clock_s`` is
    the loop's clock as the gate sees it, ``now_s`` is the time of day; nothing is swept but by ``sweep``.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gatepost.auth import Verifier
from gatepost.auth.authenticator import Authenticator
from gatepost.auth.settings import AuthSettings
from gatepost.backend.content import Content
from gatepost.backend.settings import BackendSettings, SmtpAddress
from gatepost.facts import Session as SessionFacts
from gatepost.gate import logins as logins_module
from gatepost.gate import server as server_module
from gatepost.gate import session as session_module
from gatepost.gate.connection import Connection
from gatepost.gate.server import Server
from gatepost.gate.session import Session
from gatepost.gate.settings import GateSettings, Limits, ListenSettings, Timeouts
from gatepost.policy.relay import LocalPattern, RelayRules, TrustEntry
from gatepost.smtp.client import Capabilities
from gatepost.smtp.command import MailParameters, RcptParameters
from gatepost.smtp.path import ReversePath
from gatepost.smtp.reply import Reply
from gatepost.telemetry import Metrics, Occupancy, SessionLog, Style
from gatepost.telemetry import batches as batches_module
from gatepost.telemetry.metrics import Family
from gatepost.verdict import AdmittedRecipient

PATIENCE_S = 20.0  # a test that waits for so long has failed
HOUR_S = 3600
NAME = "mx.example.com"
TRUSTED = "127.0.0.2"  # the source address of a client that a trust entry may name
EVERYTHING = Capabilities(frozenset({"PIPELINING", "8BITMIME", "SMTPUTF8", "DSN", "SIZE"}))

RECIPIENT_OK = Reply(250, "Recipient OK", "2.1.5")
TAKEN = Reply(250, "Taken as 4711", "2.0.0")


class ScriptedDelivery:
    """One transaction at the scripted backend, and what it heard."""

    def __init__(self, backend: ScriptedBackend, reverse_path: ReversePath, session: SessionFacts) -> None:
        self.backend = backend
        self.reverse_path = reverse_path
        self.session = session
        self.recipients: list[str] = []
        self.content: bytes | None = None
        self.trace_field = b""
        self.aborted = False

    async def rcpt(self, recipient: AdmittedRecipient, parameters: RcptParameters) -> Reply:
        self.backend.asked.set()
        await self.backend.answers_rcpt.wait()
        reply = self.backend.rcpt_reply
        if reply.positive:
            self.recipients.append(recipient.forward_path.octets.decode())
        return reply

    async def deliver(self, content: Content, trace_field: bytes) -> Reply:
        self.content, self.trace_field = b"".join(content.chunks()), trace_field
        self.backend.delivering.set()
        await self.backend.answers_content.wait()
        return self.backend.content_reply

    def abort(self) -> None:
        self.aborted = True
        if self.backend.abort_error is not None:
            raise self.backend.abort_error

    def park(self) -> bool:
        return False


class ScriptedBackend:
    """A backend that says what it is told to say, when it is told."""

    def __init__(self, settings: BackendSettings) -> None:
        self.settings = settings
        self.name = settings.name
        self.capabilities: Capabilities | None = EVERYTHING
        self.healthy = True
        self.closed = False
        self.rcpt_reply = RECIPIENT_OK
        self.content_reply = TAKEN
        self.abort_error: Exception | None = None
        self.asked, self.answers_rcpt = asyncio.Event(), asyncio.Event()
        self.delivering, self.answers_content = asyncio.Event(), asyncio.Event()
        self.answers_rcpt.set()
        self.answers_content.set()
        self.deliveries: list[ScriptedDelivery] = []

    def begin(self, reverse_path: ReversePath, parameters: MailParameters, session: SessionFacts) -> ScriptedDelivery:
        self.deliveries.append(ScriptedDelivery(self, reverse_path, session))
        return self.deliveries[-1]

    @property
    def contents(self) -> list[bytes]:
        return [delivery.content for delivery in self.deliveries if delivery.content is not None]

    async def probe(self) -> None:
        pass

    async def close(self, grace_s: float | None = None) -> None:
        self.closed = True


class _Loop:
    """The event loop with a clock that stands still."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._loop = asyncio.get_running_loop()

    def time(self) -> float:
        return self._trial.clock_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


class Peer:
    """A client with a real socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def say(self, octets: bytes) -> None:
        self.writer.write(octets)
        async with asyncio.timeout(PATIENCE_S):
            await self.writer.drain()

    async def reply(self) -> str:
        """One whole reply, its lines separated by "\\n"; "" at the end of the connection."""
        lines = []
        async with asyncio.timeout(PATIENCE_S):
            while line := (await self.reader.readline()).decode():
                assert line.endswith("\r\n"), line
                lines.append(line[:-2])
                if line[3:4] != "-":
                    break
        return "\n".join(lines)

    async def ask(self, line: str) -> str:
        await self.say(line.encode() + b"\r\n")
        return await self.reply()

    async def asked(self, *lines: str) -> list[str]:
        return [await self.ask(line) for line in lines]

    async def rest(self) -> str:
        """All that comes until the gate closes; the end of the connection is awaited."""
        async with asyncio.timeout(PATIENCE_S):
            with suppress(ConnectionResetError):
                return (await self.reader.read()).decode()
        return ""

    async def over(self) -> None:
        assert await self.rest() == ""

    def hang_up(self) -> None:
        self.writer.transport.abort()


class Wire(asyncio.Transport):
    """A transport without a network: what the gate wrote is in the journal; how the peer takes it is up to the test."""

    def __init__(self, name: str, journal: list[tuple[str, bytes]]) -> None:
        super().__init__()
        self.name = name
        self.journal = journal
        self.connection: Connection
        self.reading = True
        self.unsent_octets = 0  # what the peer has not taken yet
        self.closing = self.aborted = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.3", 4000) if name == "peername" else default

    def write(self, data: Any) -> None:
        self.journal.append((self.name, bytes(data)))

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def get_write_buffer_size(self) -> int:
        return self.unsent_octets

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True

    @property
    def heard(self) -> bytes:
        return b"".join(octets for name, octets in self.journal if name == self.name)


class Trial:
    """The gate under trial."""

    def __init__(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock_s = 1000.0
        self.now_s = 500_000 * HOUR_S + 600.0  # ten past: no count falls into another hour
        self.data = data
        self.made: list[ScriptedBackend] = []
        self.capabilities: dict[str, Capabilities | None] = {}
        self.peers: list[Peer] = []
        self.journal: list[tuple[str, bytes]] = []
        self.bound: dict[str, socket.socket] = {}
        self.log_path = data / "log"
        self._descriptor = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.log = SessionLog(self._descriptor, Style())
        self.metrics = Metrics.private()
        monkeypatch.setattr(batches_module, "FLUSH_S", 0.001)
        monkeypatch.setattr(server_module, "SWEEP_S", 10.0 * PATIENCE_S)
        monkeypatch.setattr(server_module, "make_backend", self._make_backend)
        for module in (session_module, server_module):
            monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: self.now_s))
        self.verifiers: list[Verifier] | None = None  # in place of those that the settings name
        monkeypatch.setattr(server_module, "Authenticator", self._make_authenticator)
        self.delays: list[float] = []  # answers to guessers are put off, but not in these tests
        monkeypatch.setattr(logins_module, "asyncio", SimpleNamespace(sleep=self._put_off))
        self.server = Server(worker=0, workers=1, metrics=self.metrics, log=self.log, occupancy=Occupancy.private())
        self.server.loop = cast("asyncio.AbstractEventLoop", _Loop(self))

    def _make_backend(self, settings: BackendSettings, **_: Any) -> ScriptedBackend:
        backend = ScriptedBackend(settings)
        backend.capabilities = self.capabilities.get(settings.name, EVERYTHING)
        self.made.append(backend)
        return backend

    def _make_authenticator(self, settings: AuthSettings, **arguments: Any) -> Authenticator:
        return Authenticator(settings, verifiers=self.verifiers, **arguments)

    async def _put_off(self, seconds: float) -> None:
        self.delays.append(seconds)

    def backend(self, name: str = "b") -> ScriptedBackend:
        return cast("ScriptedBackend", self.server.backends[name])

    # ---- settings

    def settings(
        self, *, trust: tuple[TrustEntry, ...] = (), rules: dict[str, Any] | None = None, **changes: Any
    ) -> GateSettings:
        """One listener, one backend, example.com is ours; no limit stands in the way but those a test sets."""
        base = GateSettings(
            name=NAME,
            data=str(self.data),
            workers=1,
            listens=(ListenSettings("mx", (("127.0.0.1", 0),)),),
            rules=RelayRules(
                **{
                    "local": (LocalPattern("example.com", "g.toml:1"),),
                    "trust": trust,
                    "default_backend": "b",
                    "postmaster_domain": "example.com",
                    **(rules or {}),
                }
            ),
            backends=(BackendSettings("b", (SmtpAddress("127.0.0.1", 25),)),),
            limits=unlimited(),
            timeouts=Timeouts(),
        )
        return replace(base, **changes)

    async def apply(self, settings: GateSettings | None = None, **changes: Any) -> None:
        """Bind what is not bound, close what is not named, and hand it over, as the supervisor does."""
        settings = settings or self.settings(**changes)
        names = {listen.name for listen in settings.listens}
        for name in [name for name in self.bound if name not in names]:
            self.bound.pop(name).close()
        for name in names - self.bound.keys():
            self.bound[name] = sock = socket.socket()
            sock.setblocking(False)  # a duplicate shares this with the one in service
            sock.bind(("127.0.0.1", 0))
        handed = {name: [sock.dup()] for name, sock in self.bound.items()}
        try:
            await self.server.apply(settings, handed)
        except BaseException:
            for sock, *_ in handed.values():
                sock.close()
            raise

    # ---- clients

    def address(self, listen: str = "mx") -> tuple[str, int]:
        return cast("tuple[str, int]", self.bound[listen].getsockname())

    async def connect(self, source: str = "127.0.0.1", listen: str = "mx") -> Peer:
        """Connected, nothing said yet."""
        reader, writer = await asyncio.open_connection(*self.address(listen), local_addr=(source, 0))
        self.peers.append(Peer(reader, writer))
        return self.peers[-1]

    async def greeted(self, source: str = "127.0.0.1", listen: str = "mx") -> Peer:
        """A client whose EHLO was answered."""
        peer = await self.connect(source, listen)
        assert (await peer.reply()).startswith("220 ")
        assert (await peer.ask("EHLO client.test")).startswith("250")
        return peer

    async def in_content(self, source: str = "127.0.0.1") -> Peer:
        """A client that was told to send content."""
        peer = await self.greeted(source)
        replies = await peer.asked("MAIL FROM:<a@client.test>", "RCPT TO:<bob@example.com>", "DATA")
        assert [reply[:3] for reply in replies] == ["250", "250", "354"]
        await self.until(lambda: self.session(peer).connection.in_content)
        return peer

    async def wired(self, name: str) -> Wire:
        """A client on a scripted wire, its EHLO answered."""
        wire = Wire(name, self.journal)
        wire.connection = Connection(self.server._listeners["mx"], self.server.loop)
        wire.connection.connection_made(wire)
        await self.until(lambda: b"220 " in wire.heard)
        wire.connection.data_received(b"EHLO client.test\r\n")
        await self.until(lambda: b"250 HELP" in wire.heard)
        return wire

    def session(self, peer: Peer) -> Session:
        """The gate's side of this client."""
        port = peer.writer.get_extra_info("sockname")[1]
        sessions = [session for session in self.server.sessions if isinstance(session, Session)]
        return next(session for session in sessions if session.facts.client.port == port)

    # ---- time

    def sweep(self, after_s: float = 0.0) -> None:
        """Let so much time pass, then look for clients that are late."""
        self.clock_s += after_s
        assert self.server._sweeper is not None
        self.server._sweeper.cancel()
        self.server._sweep()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - the conditions are the gate's own, and it tells nobody
                await asyncio.sleep(0.001)

    # ---- what the operator sees

    def lines(self, event: str = "session") -> list[dict[str, Any]]:
        # A reader may see a line while it is being written: only what has its line end is whole.
        whole, _, _ = self.log_path.read_text("ascii").rpartition("\n")
        return [line for line in map(json.loads, whole.splitlines()) if line["event"] == event]

    async def logged(self, event: str = "session", count: int = 1) -> list[dict[str, Any]]:
        """The lines of this kind, when there are so many; more would be a defect."""
        await self.until(lambda: len(self.lines(event)) >= count)
        lines = self.lines(event)
        assert len(lines) == count
        return lines

    def counted(self, family: Family, *labels: str) -> float:
        return sum(sample.value for sample in self.metrics.read(family) if sample.labels == labels)

    async def close(self) -> None:
        for peer in self.peers:
            peer.hang_up()
        for backend in self.made:
            backend.answers_rcpt.set()
            backend.answers_content.set()
        for session in list(self.server.sessions):
            session.connection.abort()
        async with asyncio.timeout(PATIENCE_S):
            await self.server.drain()
            await self.until(lambda: not self.server._tasks)
        for sock in self.bound.values():
            sock.close()
        self.log.close()
        os.close(self._descriptor)
        for peer in self.peers:
            with suppress(OSError):
                await peer.writer.wait_closed()


def unlimited(**limits: int) -> Limits:
    """No limits but these."""
    return Limits(
        **{
            "sessions_per_client": 0,
            "sessions_per_minute_per_client": 0,
            "errors_per_session": 0,
            "messages_per_hour_per_mailbox": 0,
            **limits,
        }
    )
