"""The control channel: whole messages, strict reading, no descriptor lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatepost.gate.channel import (
    DESCRIPTORS_MAX,
    LISTENERS_MAX,
    MESSAGE_OCTETS_MAX,
    TEXT_MAX,
    Channel,
    ChannelError,
    Configure,
    Drain,
    Drained,
    Listening,
    Ready,
    Refused,
    Status,
    decode,
    encode,
    pair,
)

MESSAGES = [
    Configure(1, "/etc/gatepost/gatepost.toml", (Listening("mx", "0.0.0.0", 25), Listening("v6", "::1", 2525))),
    Configure(2, "", ()),
    Drain(0.0),
    Drain(60.5),
    Ready(3),
    Refused(4, "gatepost.toml:1: \u202e\x1b no"),
    Drained(0),
    Status(12),
]


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


async def heard(channel: Channel) -> Any:
    received = await channel.receive()
    assert received is not None
    return received.message


@pytest.mark.parametrize("message", MESSAGES)
def test_what_is_encoded_is_decoded(message):
    assert decode(encode(message)) == message
    assert encode(message).isascii()


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        b"x",
        b"[]",
        b"{}",
        b"null",
        b'["ready"]',
        b'["ready",{}]',
        b'["ready",[1]]',
        b'["ready",{"generation":1},1]',
        b'["ready",{"generation":1,"more":1}]',
        b'["ready",{"generation":-1}]',
        b'["ready",{"generation":1.0}]',
        b'["ready",{"generation":true}]',
        b'["ready",{"generation":"1"}]',
        b'["ready",{"generation":9007199254740993}]',
        b'["drain",{"patience_s":NaN}]',
        b'["drain",{"patience_s":Infinity}]',
        b'["drain",{"patience_s":-0.5}]',
        b'["launch",{}]',
        b'[["ready"],{"generation":1}]',
        b'["refused",{"generation":1,"text":null}]',
        b'["configure",{"generation":1,"path":"","listeners":[["mx","::"]]}]',
        b'["configure",{"generation":1,"path":"","listeners":[["mx","::",true]]}]',
        b'["configure",{"generation":1,"path":"","listeners":"mx"}]',
        b'["ready",{"generation":1}]\xff',
        b"[" * 50_000,
    ],
)
def test_what_is_not_exactly_a_message_is_refused(octets):
    with pytest.raises(ChannelError):
        decode(octets)


@given(st.binary(max_size=200))
def test_no_octets_raise_anything_else(octets):
    with contextlib.suppress(ChannelError):
        decode(octets)


@pytest.mark.parametrize(("length", "good"), [(TEXT_MAX - 1, True), (TEXT_MAX, True), (TEXT_MAX + 1, False)])
def test_texts_are_bounded(length, good):
    octets = encode(Refused(1, "x" * length))
    if good:
        assert decode(octets) == Refused(1, "x" * length)
    else:
        with pytest.raises(ChannelError):
            decode(octets)


@pytest.mark.parametrize("number", [LISTENERS_MAX - 1, LISTENERS_MAX, LISTENERS_MAX + 1])
def test_listeners_are_bounded(number):
    message = Configure(1, "", (Listening("mx", "127.0.0.1", 25),) * number)
    octets = encode(message)
    if number <= LISTENERS_MAX:
        assert decode(octets) == message
    else:
        with pytest.raises(ChannelError):
            decode(octets)


def test_a_message_too_long_is_not_sent():
    with pytest.raises(ChannelError):
        encode(Refused(1, "x" * MESSAGE_OCTETS_MAX))


async def test_messages_arrive_in_order_and_the_end_is_seen():
    ours, theirs = pair()
    here, there = Channel(ours), Channel(theirs)
    for message in (Ready(1), Status(2), Drained(3)):
        await here.send(message)
    assert [await heard(there) for _ in range(3)] == [Ready(1), Status(2), Drained(3)]
    waiting = asyncio.create_task(there.receive())
    await asyncio.sleep(0)
    here.close()
    assert await waiting is None
    with pytest.raises(ConnectionError):
        await there.send(Ready(1))
    there.close()
    with pytest.raises(ConnectionError):
        await here.send(Ready(1))


@pytest.mark.parametrize("number", [1, 2, DESCRIPTORS_MAX])
async def test_descriptors_come_with_their_message_and_are_not_inherited(number):
    ours, theirs = pair()
    here, there = Channel(ours), Channel(theirs)
    before = open_descriptors()
    listeners = (Listening("mx", "127.0.0.1", 25),) * (number - 1)
    reading, writing = os.pipe()
    await here.send(Configure(1, "", listeners), (writing,) * number)
    received = await there.receive()
    assert received is not None
    assert len(received.descriptors) == number
    assert not any(os.get_inheritable(descriptor) for descriptor in received.descriptors)
    os.write(received.descriptors[-1], b"hello")
    assert os.read(reading, 10) == b"hello"
    for descriptor in (reading, writing, *received.descriptors):
        os.close(descriptor)
    assert open_descriptors() == before
    here.close()
    there.close()


async def test_more_descriptors_than_the_kernel_takes_are_refused_here():
    ours, theirs = pair()
    here = Channel(ours)
    with pytest.raises(ChannelError):
        await here.send(Drain(0.0), (0,) * (DESCRIPTORS_MAX + 1))
    here.close()
    theirs.close()


@pytest.mark.parametrize(
    ("octets", "number"),
    [
        (encode(Configure(1, "", ())), 0),
        (encode(Configure(1, "", ())), 2),
        (encode(Drain(1.0)), 1),
        (b"nonsense", 3),
    ],
)
async def test_the_wrong_number_of_descriptors_is_refused_and_none_is_kept(octets, number):
    ours, theirs = pair()
    there = Channel(theirs)
    before = open_descriptors()
    with open("/dev/null") as file:  # noqa: ASYNC230, PTH123
        socket.send_fds(ours, [octets], [file.fileno()] * number)
    with pytest.raises(ChannelError):
        await there.receive()
    assert open_descriptors() == before
    ours.close()
    there.close()


async def test_the_supervisors_end_takes_no_descriptor():
    ours, theirs = pair()
    here = Channel(ours, descriptors_max=0)
    before = open_descriptors()
    with open("/dev/null") as file:  # noqa: ASYNC230, PTH123
        socket.send_fds(theirs, [encode(Ready(1))], [file.fileno()])
    with pytest.raises(ChannelError):
        await here.receive()
    assert open_descriptors() == before
    here.close()
    theirs.close()


async def test_a_message_longer_than_allowed_is_refused():
    ours, theirs = pair()
    here = Channel(ours)
    theirs.send(b" " * MESSAGE_OCTETS_MAX + encode(Ready(1)))
    with pytest.raises(ChannelError):
        await here.receive()
    here.close()
    theirs.close()


async def test_sending_waits_for_an_end_that_does_not_read():
    ours, theirs = pair()
    here, there = Channel(ours), Channel(theirs)
    number = 3000  # far more than the socket's buffer holds

    async def send() -> None:
        for count in range(number):
            await here.send(Status(count))

    sending = asyncio.create_task(send())
    await asyncio.sleep(0.05)
    assert not sending.done()
    got = [await heard(there) for _ in range(number)]
    await sending
    assert got == [Status(count) for count in range(number)]
    here.close()
    there.close()
