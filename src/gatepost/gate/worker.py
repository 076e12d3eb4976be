"""A worker's end of the control channel: configurations and the drain, and serving in between.

Trust: the supervisor is trusted; this process parses what strangers send, and the supervisor trusts it with nothing but
    its own sessions.
Promise: the supervisor hears ``ready`` only once every listener accepts; a configuration that is refused changes
    nothing.  Without a supervisor there is no worker: it drains and ends, so that the ports are free for the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from gatepost.errors import GatepostError
from gatepost.gate.channel import (
    TEXT_MAX,
    Channel,
    Configure,
    Drain,
    Drained,
    Listening,
    Message,
    Ready,
    Refused,
    Status,
)
from gatepost.gate.settings import GateSettings
from gatepost.telemetry import Level, SessionLog

STATUS_S = 5.0
ORPHAN_PATIENCE_S = 60.0  # where the supervisor is gone and nobody says how long
CUT_S = 1.0  # what is cut may say so in its log line


class Service(Protocol):
    """What the worker drives: ``gate.server.Server``."""

    @property
    def sessions(self) -> Sequence[object] | set[Any]: ...

    async def apply(self, settings: GateSettings, sockets: dict[str, list[socket.socket]]) -> None: ...

    async def drain(self) -> None: ...


class Worker:
    """One worker process.

    Args:
        load: a configuration's octets and path to settings; raises ConfigError.
    """

    def __init__(
        self, service: Service, channel: Channel, log: SessionLog, load: Callable[[bytes, str], GateSettings]
    ) -> None:
        self._service = service
        self._channel = channel
        self._log = log
        self._load = load
        self._in_force = False
        self._drain_wanted = asyncio.Event()
        self._patience_s = ORPHAN_PATIENCE_S
        self._patience_changed = asyncio.Event()

    async def run(self) -> int:
        """Serve until the supervisor says drain, or is gone.

        Returns:
            The exit code: 0 when drained, 1 when there was nothing to serve.
        """
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._unhandled)
        # Where a TERM goes to all processes of the unit or container, it means a drain here as well.
        loop.add_signal_handler(signal.SIGTERM, self._drain, ORPHAN_PATIENCE_S)
        async with asyncio.TaskGroup() as group:
            listening = group.create_task(self._listen())
            status = group.create_task(self._tell_status())
            draining = group.create_task(self._drain_wanted.wait())
            await asyncio.wait((listening, draining), return_when=asyncio.FIRST_COMPLETED)
            if self._drain_wanted.is_set():
                await self._drained(group)
            for task in (listening, status, draining):
                task.cancel()
        return 0 if self._drain_wanted.is_set() else 1

    # ---- what the supervisor says

    async def _listen(self) -> None:
        """Take messages; returns when the supervisor is gone, or when there is nothing to serve."""
        while True:
            received = await self._channel.receive()
            if received is None:
                self._drain(ORPHAN_PATIENCE_S)
                return
            if isinstance(received.message, Configure):
                await self._configure(received.message, received.descriptors)
                if not self._in_force:
                    return  # the supervisor tries again with a new process, while the backlog waits
            elif isinstance(received.message, Drain):
                self._drain(received.message.patience_s)

    async def _configure(self, message: Configure, descriptors: list[int]) -> None:
        octets, sockets = _taken(message.listeners, descriptors)
        try:
            # In a thread: a configuration of a million networks takes a while, and sessions go on.
            settings = await asyncio.to_thread(self._load, octets, message.path)
            await self._service.apply(settings, sockets)
        except (GatepostError, OSError) as error:
            for group in sockets.values():
                for sock in group:
                    sock.close()
            await self._say(Refused(message.generation, str(error)[:TEXT_MAX]))
            return
        if not self._in_force:
            self._in_force = True
            # What lives now lives for good: the collector need not look at it again and again.
            gc.collect()
            gc.freeze()
        await self._say(Ready(message.generation))

    async def _tell_status(self) -> None:
        while True:
            await asyncio.sleep(STATUS_S)
            await self._say(Status(len(self._service.sessions)))

    async def _say(self, message: Message) -> None:
        with contextlib.suppress(ConnectionError):  # whether the supervisor is gone is seen in _listen
            await self._channel.send(message)

    # ---- the end

    def _drain(self, patience_s: float) -> None:
        """Begin the drain, or shorten one that runs."""
        self._patience_s = min(self._patience_s, patience_s) if self._drain_wanted.is_set() else patience_s
        self._drain_wanted.set()
        self._patience_changed.set()

    async def _drained(self, group: asyncio.TaskGroup) -> None:
        """End what is idle, wait for what is in content as long as the patience lasts, cut the rest."""
        began_s = asyncio.get_running_loop().time()
        drain = group.create_task(self._service.drain())
        while not drain.done():
            self._patience_changed.clear()
            left_s = began_s + self._patience_s - asyncio.get_running_loop().time()
            changed = group.create_task(self._patience_changed.wait())
            await asyncio.wait((drain, changed), timeout=max(left_s, 0.0), return_when=asyncio.FIRST_COMPLETED)
            over = not (drain.done() or changed.done())
            changed.cancel()
            if over:
                break
        cut = len(self._service.sessions)
        drain.cancel()
        await self._say(Drained(cut))

    def _unhandled(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        text = "".join(traceback.format_exception(error)) if error else str(context.get("message"))
        self._log.event("fault", text, Level.ERROR)


def _taken(listeners: Sequence[Listening], descriptors: list[int]) -> tuple[bytes, dict[str, list[socket.socket]]]:
    """The configuration's octets, and the sockets by listener."""
    octets = os.pread(descriptors[0], os.fstat(descriptors[0]).st_size, 0)
    os.close(descriptors[0])
    sockets: dict[str, list[socket.socket]] = {}
    for listening, descriptor in zip(listeners, descriptors[1:], strict=True):
        sockets.setdefault(listening.name, []).append(socket.socket(fileno=descriptor))
    return octets, sockets


async def abandon() -> None:
    """Cancel all that still runs, and wait for it a moment: a session that will not end must not keep the process."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=CUT_S)
