"""The state's way from one writer to its readers."""

from __future__ import annotations

import threading

import pytest

from gatepost.telemetry import StatusBoard
from gatepost.telemetry.board import STATE_OCTETS_MAX


def board() -> tuple[StatusBoard, StatusBoard]:
    memory = memoryview(bytearray(StatusBoard.SIZE_OCTETS))
    return StatusBoard(memory), StatusBoard(memory.toreadonly())


def test_the_last_state_is_read_and_nothing_before_the_first():
    writer, reader = board()
    assert reader.read() == {}
    writer.write({"a": [1, 2, 3]})
    writer.write({"b": "é"})
    assert reader.read() == {"b": "é"}


def test_a_state_that_is_too_large_leaves_the_old_one():
    writer, reader = board()
    room = STATE_OCTETS_MAX - len('{"a":""}')
    writer.write({"a": "x" * room})
    assert len(reader.read()["a"]) == room
    with pytest.raises(ValueError, match="board"):
        writer.write({"a": "x" * (room + 1)})
    assert len(reader.read()["a"]) == room


def test_what_is_no_state_is_nothing():
    memory = memoryview(bytearray(StatusBoard.SIZE_OCTETS))
    header = memory[:16].cast("Q")
    header[0], header[1] = 2, STATE_OCTETS_MAX * 2
    assert StatusBoard(memory).read() == {}
    header[1] = 2
    memory[16:18] = b"[]"
    assert StatusBoard(memory).read() == {}


def test_a_writer_that_died_while_it_wrote_is_nothing_to_wait_for():
    memory = memoryview(bytearray(StatusBoard.SIZE_OCTETS))
    memory.cast("Q")[0] = 1
    assert StatusBoard(memory).read() == {}


def test_readers_never_see_half_a_state():
    writer, reader = board()
    done = threading.Event()

    def write() -> None:
        for number in range(3000):
            writer.write({"first": number, "padding": "x" * (number % 500), "last": number})
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        state = reader.read()
        assert state.get("first") == state.get("last")
    thread.join()
