"""The control channel between the supervisor and one worker: few kinds of small messages, and file descriptors.

Why: a worker gets its configuration and its listening sockets from the supervisor, which keeps both, so that a worker
    can die and its successor take up the same sockets; and it says when it serves.
Trust: the supervisor is trusted by its workers.  A worker parses what strangers send and may have been taken over: what
    it says is read strictly and bounded, and no descriptor is taken from it.
Promise: a message arrives whole or not at all (SOCK_SEQPACKET); one that is not exactly of a kind named here is a
    ``ChannelError``, and descriptors that came with it are closed.
Sources: unix(7), cmsg(3).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
from array import array
from typing import Any, NamedTuple, get_type_hints

MESSAGE_OCTETS_MAX = 60_000  # well below the system's send buffer
DESCRIPTORS_MAX = 250  # the kernel's SCM_MAX_FD is 253
LISTENERS_MAX = DESCRIPTORS_MAX - 1
TEXT_MAX = 4000
_NUMBER_MAX = 2**53
_DESCRIPTOR_OCTETS = array("i").itemsize


class ChannelError(ValueError):
    """The other end said something that is not in the protocol."""


class Listening(NamedTuple):
    """One listening socket.  name: of the listener; host, port: as bound."""

    name: str
    host: str
    port: int


class Configure(NamedTuple):
    """To a worker: serve this.  Descriptors: the configuration's octets (memfd), then one socket a listener.

    Attributes:
        generation: grows with each configuration; ``ready`` and ``refused`` repeat it.
        path: the file's name for messages, "" for the embedded default.
    """

    generation: int
    path: str
    listeners: tuple[Listening, ...]


class Drain(NamedTuple):
    """To a worker: take no new session, end those that are not in content, then end.

    Attributes:
        patience_s: content may take so long; then it is cut.
    """

    patience_s: float


class Ready(NamedTuple):
    """From a worker: the configuration is in force, every listener accepts."""

    generation: int


class Refused(NamedTuple):
    """From a worker: the configuration cannot be used; the one before stays in force."""

    generation: int
    text: str


class Drained(NamedTuple):
    """From a worker: no session is left (or the patience is over, and ``sessions`` were cut)."""

    sessions: int


class Status(NamedTuple):
    """From a worker, every few seconds: it is alive."""

    sessions: int


Message = Configure | Drain | Ready | Refused | Drained | Status
_KINDS: dict[str, type[Message]] = {
    kind.__name__.lower(): kind for kind in (Configure, Drain, Ready, Refused, Drained, Status)
}
_FIELDS = {kind: get_type_hints(kind) for kind in _KINDS.values()}


class Received(NamedTuple):
    """A message with the descriptors that came along; whoever takes it closes them."""

    message: Message
    descriptors: list[int]


def encode(message: Message) -> bytes:
    """The message as JSON.

    Raises:
        ChannelError: when it is too long.
    """
    octets = json.dumps([type(message).__name__.lower(), message._asdict()], separators=(",", ":")).encode()
    if len(octets) > MESSAGE_OCTETS_MAX:
        raise ChannelError(f"a message of {len(octets)} octets is too long for the control channel")
    return octets


def decode(octets: bytes) -> Message:
    """The message in these octets.

    Raises:
        ChannelError: it is none.
    """
    try:
        parsed = json.loads(octets.decode("ascii"))
        name, values = parsed
        kind = _KINDS[name]
        fields = _FIELDS[kind]
        if type(values) is not dict or values.keys() != fields.keys():
            raise ChannelError(f"{name}: wrong fields")  # noqa: TRY301
        return kind(**{field: _value(values[field], wanted) for field, wanted in fields.items()})
    except ChannelError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ChannelError(f"not a message: {octets[:80]!r}") from error


def _value(value: Any, wanted: Any) -> Any:  # noqa: ANN401  JSON in, one of four types out
    if wanted is int and type(value) is int and 0 <= value <= _NUMBER_MAX:
        return value
    if wanted is float and type(value) in (int, float) and 0 <= value <= _NUMBER_MAX:
        return float(value)
    if wanted is str and type(value) is str and len(value) <= TEXT_MAX:
        return value
    if wanted == tuple[Listening, ...] and type(value) is list and len(value) <= LISTENERS_MAX:
        return tuple(Listening(_value(name, str), _value(host, str), _value(port, int)) for name, host, port in value)
    raise ChannelError(f"{value!r:.80} is not a {wanted}")


def pair() -> tuple[socket.socket, socket.socket]:
    """Both ends: ours, and the one a child inherits."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Channel:
    """One end.

    Args:
        end: of ``pair``; belongs to the channel from now on.
        descriptors_max: how many descriptors are taken with a message; 0 at the supervisor's end.
    """

    def __init__(self, end: socket.socket, *, descriptors_max: int = DESCRIPTORS_MAX) -> None:
        end.setblocking(False)
        self._socket = end
        # Without room the kernel closes what comes.
        self._ancillary_octets = socket.CMSG_SPACE(descriptors_max * _DESCRIPTOR_OCTETS) if descriptors_max else 0
        self._sending = asyncio.Lock()

    async def send(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        """Send one message; waits while the other end does not read.

        Raises:
            ConnectionError: the other end is gone.
            ChannelError: the message is too long.
        """
        octets = encode(message)
        if len(descriptors) > DESCRIPTORS_MAX:
            raise ChannelError(f"{len(descriptors)} descriptors are too many for one message")
        async with self._sending:
            while True:
                try:
                    if descriptors:
                        socket.send_fds(self._socket, [octets], list(descriptors))
                    else:
                        self._socket.send(octets)
                except BlockingIOError:
                    await self._until(writable=True)
                except OSError as error:
                    if error.errno == errno.ENOBUFS:
                        await asyncio.sleep(0.01)
                        continue
                    raise ConnectionError(str(error)) from error
                else:
                    return

    async def receive(self) -> Received | None:
        """The next message; None when the other end is gone.

        Raises:
            ChannelError: it said something that is not in the protocol.
        """
        taken = await self._take()
        if taken is None:
            return None
        octets, descriptors, flags = taken
        try:
            if not octets:
                return None
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(octets) > MESSAGE_OCTETS_MAX:
                raise ChannelError("a message was too long, or came with too many descriptors")
            message = decode(octets)
            expected = len(message.listeners) + 1 if isinstance(message, Configure) else 0
            if len(descriptors) != expected:
                raise ChannelError(f"{len(descriptors)} descriptors came with a message that has {expected}")
            received = Received(message, descriptors)
            descriptors = []
            return received
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    async def _take(self) -> tuple[bytes, list[int], int] | None:
        while True:
            try:
                # Not socket.recv_fds: it forgets its flags, and our children would inherit what came.
                octets, ancillary, flags, _ = self._socket.recvmsg(
                    MESSAGE_OCTETS_MAX + 1, self._ancillary_octets, socket.MSG_CMSG_CLOEXEC
                )
                return octets, _descriptors(ancillary), flags
            except BlockingIOError:
                await self._until(writable=False)
            except OSError:
                return None

    async def _until(self, *, writable: bool) -> None:
        loop = asyncio.get_running_loop()
        add, remove = (loop.add_writer, loop.remove_writer) if writable else (loop.add_reader, loop.remove_reader)
        ready = loop.create_future()
        # The descriptor's number is kept: close() while we wait must still find it registered.
        number = self._socket.fileno()
        if number < 0:
            raise ConnectionError("the control channel is closed")
        add(number, _resolve, ready)
        try:
            await ready
        finally:
            remove(number)

    def close(self) -> None:
        """Close this end; nobody waits in ``receive`` or ``send`` any more."""
        with contextlib.suppress(OSError):
            self._socket.close()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    descriptors = array("i")
    for level, kind, octets in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(octets[: len(octets) - len(octets) % _DESCRIPTOR_OCTETS])
    return list(descriptors)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
