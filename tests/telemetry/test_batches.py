"""A queue that a thread empties: whole, in order, bounded, counted."""

from __future__ import annotations

import threading

import pytest

from gatepost.telemetry.batches import Batches

PATIENCE_S = 30.0


def test_all_is_written_in_order_and_no_batch_is_greater_than_asked_for():
    batches: list[list[int]] = []

    def write(batch: list[int]) -> int:
        batches.append(batch)
        return 0

    queue = Batches(write, size_max=10_000, batch_size=10, name="test")
    for number in range(1000):
        queue.append(number, 3)
    queue.close(PATIENCE_S)
    assert [number for batch in batches for number in batch] == list(range(1000))
    assert max(map(len, batches)) <= 4  # the fourth goes beyond the ten, and is the last


def test_without_an_item_there_is_no_thread():
    before = threading.active_count()
    queue: Batches[int] = Batches(lambda _: 0, size_max=1, batch_size=1, name="test")
    assert threading.active_count() == before
    queue.close(PATIENCE_S)


@pytest.mark.parametrize(("items", "dropped"), [(2, 0), (3, 0), (4, 1)])
def test_what_waits_is_bounded(items, dropped):
    counted: list[int] = []
    caught_up: list[int] = []
    writing, may_go_on = threading.Event(), threading.Event()

    def write(_: list[int]) -> int:
        writing.set()
        assert may_go_on.wait(PATIENCE_S)
        return 0

    queue = Batches(write, size_max=3, batch_size=1, name="test", dropped=counted.append, caught_up=caught_up.append)
    queue.append(0, 1)
    assert writing.wait(PATIENCE_S)  # it holds the first, which counts until it is written
    for number in range(1, items):
        queue.append(number, 1)
    assert sum(counted) == dropped
    may_go_on.set()
    queue.close(PATIENCE_S)
    assert sum(caught_up) == dropped


def test_what_was_lost_is_counted_by_whoever_comes_next():
    counted: list[int] = []
    queue: Batches[int] = Batches(len, size_max=10, batch_size=10, name="test", dropped=counted.append)
    for number in range(3):
        queue.append(number, 1)
    queue.close(PATIENCE_S)
    queue.append(3, 1)
    assert counted == [3]
