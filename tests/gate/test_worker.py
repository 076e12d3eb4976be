"""A worker's end of the channel, with a service that takes notes instead of serving."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from gatepost.errors import ConfigError
from gatepost.gate.channel import Channel, Configure, Drain, Drained, Listening, Ready, Refused, pair
from gatepost.gate.settings import GateSettings
from gatepost.gate.worker import Worker
from gatepost.policy.relay import RelayRules
from gatepost.telemetry import SessionLog, Style, create_memory

PATIENCE_S = 20.0


class Service:
    """What Server is to the worker."""

    def __init__(self) -> None:
        self.sessions: set[Any] = set()
        self.applied: list[tuple[str, dict[str, list[socket.socket]]]] = []
        self.error: Exception | None = None
        self.draining = asyncio.Event()
        self.idle = asyncio.Event()

    async def apply(self, settings: GateSettings, sockets: dict[str, list[socket.socket]]) -> None:
        if self.error is not None:
            raise self.error
        self.applied.append((settings.name, sockets))

    async def drain(self) -> None:
        self.draining.set()
        await self.idle.wait()


def settings(name: str) -> GateSettings:
    return GateSettings(name=name, data="", workers=1, listens=(), rules=RelayRules(), backends=())


def load(octets: bytes, path: str) -> GateSettings:
    if octets == b"bad":
        raise ConfigError([f"{path}:1: bad", f"{path}:2: " + "worse" * 2000])
    return settings(octets.decode())


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


class Trial:
    """One worker in this process and the supervisor's end of its channel."""

    def __init__(self) -> None:
        ours, theirs = pair()
        self.channel = Channel(ours, descriptors_max=0)
        self.service = Service()
        self.log_reading, self.log_writing = os.pipe()
        self.log = SessionLog(self.log_writing, Style())
        self.end = Channel(theirs)
        self.task = asyncio.create_task(Worker(self.service, self.end, self.log, load).run())

    async def configure(self, octets: bytes, generation: int = 1, listeners: int = 1) -> Any:
        descriptor = create_memory("config", len(octets))
        os.pwrite(descriptor, octets, 0)
        socks = [socket.create_server(("127.0.0.1", 0)) for _ in range(listeners)]
        names = tuple(Listening(f"l{n % 2}", "127.0.0.1", s.getsockname()[1]) for n, s in enumerate(socks))
        await self.channel.send(Configure(generation, "g.toml", names), (descriptor, *(s.fileno() for s in socks)))
        os.close(descriptor)
        for sock in socks:
            sock.close()
        return await self.heard()

    async def heard(self) -> Any:
        async with asyncio.timeout(PATIENCE_S):
            received = await self.channel.receive()
            return received.message if received else None

    async def ended(self) -> int:
        async with asyncio.timeout(PATIENCE_S):
            return await self.task

    def close(self) -> None:
        self.channel.close()
        self.end.close()
        self.log.close()
        os.close(self.log_reading)
        os.close(self.log_writing)
        for _, sockets in self.service.applied:
            for group in sockets.values():
                for sock in group:
                    sock.close()


@pytest.fixture
async def trial():
    trial = Trial()
    yield trial
    trial.task.cancel()
    await asyncio.gather(trial.task, return_exceptions=True)
    trial.close()


async def test_ready_follows_a_configuration_with_its_sockets(trial):
    assert await trial.configure(b"one", 5, listeners=3) == Ready(5)
    ((name, sockets),) = trial.service.applied
    assert name == "one"
    assert {listener: len(group) for listener, group in sockets.items()} == {"l0": 2, "l1": 1}
    assert not any(sock.get_inheritable() for group in sockets.values() for sock in group)
    assert await trial.configure(b"two", 6) == Ready(6)


@pytest.mark.parametrize("error", [ConfigError(["g.toml:3: no key"]), OSError("no such file")])
async def test_a_later_configuration_that_is_refused_changes_nothing(trial, error):
    await trial.configure(b"one", 1)
    before = open_descriptors()
    trial.service.error = error
    assert await trial.configure(b"two", 2) == Refused(2, str(error))
    trial.service.error = None
    refused = await trial.configure(b"bad", 3)
    assert (refused.generation, len(refused.text)) == (3, 4000)
    assert open_descriptors() == before  # the sockets that came along are closed
    assert not trial.task.done()
    assert await trial.configure(b"three", 4) == Ready(4)


async def test_a_first_configuration_that_is_refused_ends_the_worker(trial):
    assert isinstance(await trial.configure(b"bad"), Refused)
    assert await trial.ended() == 1


async def test_a_drain_waits_for_the_service(trial):
    await trial.configure(b"one")
    trial.service.sessions = {1, 2}
    await trial.channel.send(Drain(PATIENCE_S))
    await trial.service.draining.wait()
    assert not trial.task.done()
    trial.service.sessions = set()
    trial.service.idle.set()
    assert await trial.heard() == Drained(0)
    assert await trial.ended() == 0


async def test_a_second_drain_shortens_the_first_and_says_what_is_cut(trial):
    await trial.configure(b"one")
    trial.service.sessions = {1, 2}
    await trial.channel.send(Drain(3600.0))
    await trial.service.draining.wait()
    await trial.channel.send(Drain(0.0))
    assert await trial.heard() == Drained(2)
    assert await trial.ended() == 0


async def test_a_later_drain_does_not_lengthen_the_first(trial):
    await trial.configure(b"one")
    await trial.channel.send(Drain(0.0))
    await trial.channel.send(Drain(3600.0))
    assert await trial.heard() == Drained(0)
    assert await trial.ended() == 0


async def test_without_a_supervisor_the_worker_drains_and_ends(trial):
    await trial.configure(b"one")
    trial.channel.close()
    await trial.service.draining.wait()
    trial.service.idle.set()
    assert await trial.ended() == 0


async def test_a_term_for_all_is_a_drain(trial):
    await trial.configure(b"one")
    os.kill(os.getpid(), signal.SIGTERM)
    await trial.service.draining.wait()
    trial.service.idle.set()
    assert await trial.heard() == Drained(0)
    assert await trial.ended() == 0


async def test_a_fault_nobody_awaited_is_logged(trial):
    await trial.configure(b"one")
    loop = asyncio.get_running_loop()
    loop.call_exception_handler({"message": "unhandled", "exception": ValueError("a fault of ours")})
    trial.log.close()
    line = os.read(trial.log_reading, 100_000).decode()
    assert '"event":"fault"' in line
    assert "a fault of ours" in line
