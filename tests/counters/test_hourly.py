"""Hourly counts: against a count by hand, over workers and hours."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gatepost.counters import WINDOW_S, HourlyCounts
from gatepost.errors import StorageError

HOUR = 490_000 * WINDOW_S  # some full hour


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "counters" / "hourly"


def test_what_is_added_is_counted(path: Path) -> None:
    counts = HourlyCounts(path, 0, 1)
    assert counts.count("a", HOUR) == 0
    for number in range(1, 1003):
        counts.add("a", HOUR + number)
        assert counts.count("a", HOUR + number) == number
    counts.add("b", HOUR + 5, 40)
    assert (counts.count("b", HOUR + 5), counts.count("c", HOUR + 5), counts.count("a", HOUR + 5)) == (40, 0, 1002)


@pytest.mark.parametrize(
    ("later_s", "left"),
    [(0, 100), (3599, 100), (3600, 100), (3601, 99), (5400, 50), (7199, 0), (7200, 0), (10_800, 0), (14_400, 0)],
)
def test_the_hour_slides(path: Path, later_s: int, left: int) -> None:
    counts = HourlyCounts(path, 0, 1)
    counts.add("a", HOUR, 100)
    assert counts.count("a", HOUR + later_s) == left


def test_an_hour_comes_back_empty(path: Path) -> None:
    """Buckets are used again every other hour; nothing of the old one is left."""
    counts = HourlyCounts(path, 0, 1)
    counts.add("a", HOUR, 100)
    counts.add("b", HOUR + 2 * WINDOW_S, 3)
    assert counts.count("a", HOUR + 2 * WINDOW_S) == 0
    assert counts.count("b", HOUR + 2 * WINDOW_S) == 3


def test_workers_count_together(path: Path) -> None:
    workers = [HourlyCounts(path, row, 3) for row in range(3)]
    for number, worker in enumerate(workers, 1):
        worker.add("a", HOUR, number)
    assert [worker.count("a", HOUR) for worker in workers] == [6, 6, 6]
    assert [worker.count("a", HOUR + WINDOW_S) for worker in workers] == [6, 6, 6]
    workers[1].add("a", HOUR + WINDOW_S, 10)
    assert workers[0].count("a", HOUR + WINDOW_S + 1800) == 13


def test_what_a_worker_counted_outlives_it(path: Path) -> None:
    first = HourlyCounts(path, 0, 2)
    first.add("a", HOUR, 7)
    first.close()
    assert HourlyCounts(path, 1, 2).count("a", HOUR) == 7
    assert HourlyCounts(path, 0, 4).count("a", HOUR) == 7, "more workers than before"


def test_a_count_stops_at_its_highest(path: Path) -> None:
    counts = HourlyCounts(path, 0, 1)
    counts.add("a", HOUR, 0xFFFFFFFE)
    counts.add("a", HOUR, 5)
    assert counts.count("a", HOUR) == 0xFFFFFFFF


WORKER = f"""
import sys
from pathlib import Path
from gatepost.counters import HourlyCounts
print("here", flush=True)
sys.stdin.readline()
counts = HourlyCounts(Path(sys.argv[1]), int(sys.argv[2]), 4)
counts.add("a", {HOUR})
print("added", flush=True)
sys.stdin.readline()
print(counts.count("a", {HOUR}), flush=True)
"""


def test_workers_that_start_together_agree_on_the_places(path: Path) -> None:
    """Else each would count for itself, and the limit would be as many times too wide."""
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", WORKER, str(path), str(row)], stdin=PIPE, stdout=PIPE, text=True, bufsize=1
                )
            )
            for row in range(4)
        ]

        def all_say() -> list[str]:
            return [worker.stdout.readline().strip() for worker in workers if worker.stdout]

        def to_all() -> None:
            for worker in workers:
                assert worker.stdin
                worker.stdin.write("go\n")

        assert all_say() == ["here"] * 4
        to_all()
        assert all_say() == ["added"] * 4
        to_all()
        assert all_say() == ["4"] * 4


def test_the_file_is_private_and_its_room_is_taken(path: Path) -> None:
    """A hole in a mapped file on a full disk kills whoever writes into it."""
    HourlyCounts(path, 0, 2)
    status = path.stat()
    assert status.st_mode & 0o777 == 0o600
    assert status.st_blocks * 512 >= status.st_size > 1 << 20


def test_two_gates_have_two_keys(tmp_path: Path) -> None:
    """Nobody can look up elsewhere which keys share their places."""
    gates = [HourlyCounts(tmp_path / name, 0, 1) for name in ("one", "two")]
    assert gates[0]._places("a") != gates[1]._places("a")


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot use the counters"):
        HourlyCounts(tmp_path / "file" / "hourly", 0, 1)
    with pytest.raises(StorageError, match="cannot use the counters"):
        HourlyCounts(tmp_path, 0, 1)


def test_a_full_disk_is_said_at_the_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left"):
        HourlyCounts(path, 0, 1)


keys = st.one_of(st.sampled_from(["a", "b", "mailbox bob@example.com"]), st.text(max_size=8))
events = st.lists(st.tuples(st.integers(0, 2), keys, st.integers(0, 3 * WINDOW_S), st.integers(1, 9)), max_size=40)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events)
def test_never_less_than_a_count_by_hand(tmp_path: Path, events: list[tuple[int, str, int, int]]) -> None:
    path = tmp_path / "hourly"
    path.unlink(missing_ok=True)
    workers = [HourlyCounts(path, row, 3) for row in range(3)]
    by_hand: dict[tuple[str, int], int] = {}
    for row, key, second, amount in sorted(events, key=lambda event: event[2]):
        workers[row].add(key, HOUR + second, amount)
        hour, past = divmod(HOUR + second, WINDOW_S)
        by_hand[key, hour] = by_hand.get((key, hour), 0) + amount
        share = 1.0 - past / WINDOW_S
        expected = int(by_hand[key, hour] + by_hand.get((key, hour - 1), 0) * share)
        for worker in workers:
            # With so few keys none shares all its places with others: exactly the same.
            assert worker.count(key, HOUR + second) == expected
    for worker in workers:
        worker.close()
