"""What a worker hands over: on the disk, whatever else happens, or counted and said."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.store.places import NOON_S, entry, record, refused

from gatepost.store import backlog as backlog_module
from gatepost.store.backlog import LINE_OCTETS_MAX, QUEUE_RECORDS_MAX, TROUBLE_SAID_S, Backlog, segments
from gatepost.store.record import Record, decode, encode
from gatepost.store.segments import Position
from gatepost.verdict import Finding, Result

ROOM = 1 << 30


def refusal(number: int = 1) -> Record:
    return record([refused(f"K7Q2M9XD-{number}")])


def accepted(number: int = 1) -> Record:
    return record([entry(message=f"K7Q2M9XD.{number}")])


def kept(directory: Path) -> list[str]:
    """References and messages in a backlog, in order."""
    files = segments(directory, ROOM)
    position = Position()
    found: list[str] = []
    while True:
        lines, behind = files.read(position, 1 << 24)
        if behind == position:
            return found
        position = behind
        records = [decode(line) for line in lines]
        found += [one.reference or one.message for each in records if each is not None for one in each.entries]


def test_what_was_handed_over_before_the_end_is_there(tmp_path):
    backlog = Backlog(tmp_path, ROOM)
    for number in range(1000):
        backlog.keep(refusal(number), NOON_S)
    backlog.close()
    assert kept(tmp_path) == [f"K7Q2M9XD-{number}" for number in range(1000)]


def test_two_workers(tmp_path):
    workers = [Backlog(tmp_path, ROOM), Backlog(tmp_path, ROOM)]
    for number in range(500):
        workers[number % 2].keep(refusal(number), NOON_S)
    for worker in workers:
        worker.close()
    assert sorted(kept(tmp_path)) == sorted(f"K7Q2M9XD-{number}" for number in range(500))


async def test_durably_is_said_when_it_is_on_the_disk(tmp_path):
    backlog = Backlog(tmp_path, ROOM)
    assert await backlog.keep_durably(accepted(1), NOON_S, 30.0)
    assert kept(tmp_path) == ["K7Q2M9XD.1"]
    many = await asyncio.gather(*(backlog.keep_durably(accepted(number), NOON_S, 30.0) for number in range(2, 300)))
    assert all(many)
    assert len(kept(tmp_path)) == 299
    backlog.close()


async def test_durably_is_not_said_where_the_disk_does_not_take_it(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    backlog = Backlog(tmp_path / "file", ROOM)
    assert not await backlog.keep_durably(accepted(), NOON_S, 30.0)
    (tmp_path / "file").unlink()
    assert await backlog.keep_durably(accepted(2), NOON_S, 30.0)
    backlog.close()
    assert kept(tmp_path / "file") == ["K7Q2M9XD.2"]


async def test_durably_is_not_waited_for_without_end(tmp_path, monkeypatch):
    held, let_go = threading.Event(), threading.Event()
    backlog = Backlog(tmp_path, ROOM)
    append = backlog._segments.append

    def stands_still(lines: bytes, **how: object) -> None:
        held.set()
        assert let_go.wait(60)
        append(lines, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(backlog._segments, "append", stands_still)
    assert not await backlog.keep_durably(accepted(), NOON_S, 0.05)
    let_go.set()
    backlog.close()
    assert kept(tmp_path) == ["K7Q2M9XD.1"], "it may come later"


@pytest.mark.parametrize(("beyond", "lost"), [(-1, 0), (0, 0), (1, 1)])
def test_a_record_beyond_all_measure_is_lost_and_its_neighbours_are_not(tmp_path, beyond, lost):
    def with_evidence(octets: int) -> Record:
        return record([refused("K7Q2M9XD-2", findings=(Finding("check", Result.NONE, "x" * octets),))])

    room = LINE_OCTETS_MAX - len(encode(with_evidence(0))) - 1
    backlog = Backlog(tmp_path, ROOM)
    batch = [refusal(1), with_evidence(room + beyond), refusal(3)]
    assert backlog._write([(each, None) for each in batch]) == lost
    assert kept(tmp_path) == [f"K7Q2M9XD-{number}" for number in ([1, 3] if lost else [1, 2, 3])]


def test_a_disk_that_takes_nothing_is_counted_and_said_and_not_more_often_than_that(tmp_path):
    dropped: list[int] = []
    said: list[str] = []
    states: list[bool] = []
    (tmp_path / "file").write_bytes(b"")
    backlog = Backlog(tmp_path / "file", ROOM, dropped=dropped.append, said=said.append, state=states.append)
    assert backlog._write([(refusal(1), None)]) == 1
    for after_s in (0.0, 1.0, TROUBLE_SAID_S - 1, TROUBLE_SAID_S, TROUBLE_SAID_S + 1):
        backlog._now_s = NOON_S + after_s
        backlog._dropped(2)
    assert dropped == [2] * 5
    assert len(said) == 2
    assert said[0] == (
        f"the journal cannot be written in {tmp_path}/file (Not a directory): what is dropped will be found neither by "
        "`gatepost trace` nor by `gatepost explain`"
    )
    backlog.keep(refusal(2), NOON_S)
    backlog.close()
    (tmp_path / "file").unlink()
    assert backlog._write([(refusal(3), None)]) == 0
    backlog.keep(refusal(4), NOON_S)
    assert states == [False, True]


def test_where_there_is_little_room_left_it_is_for_accepted_messages(tmp_path, monkeypatch):
    monkeypatch.setattr(backlog_module, "SEGMENT_OCTETS_MAX", 5 * len(encode(accepted(10))))
    backlog = Backlog(tmp_path, 0)  # as few files as there may be
    number = 100
    while backlog._write([(refusal(number), None)]) == 0:
        number += 1
    full = len(kept(tmp_path))
    assert backlog._write([(refusal(999), None), (accepted(1), None), (refusal(998), None)]) == 2
    assert kept(tmp_path)[full:] == ["K7Q2M9XD.1"]
    while backlog._write([(accepted(2), None)]) == 0:
        pass
    assert set(kept(tmp_path)[full:]) == {"K7Q2M9XD.1", "K7Q2M9XD.2"}


@pytest.mark.parametrize(("records", "lost"), [(QUEUE_RECORDS_MAX, 0), (QUEUE_RECORDS_MAX + 1, 1)])
def test_a_disk_that_stands_still_costs_records_and_no_session_waits(tmp_path, monkeypatch, records, lost):
    dropped: list[int] = []
    held, let_go = threading.Event(), threading.Event()
    backlog = Backlog(tmp_path, ROOM, dropped=dropped.append)
    append = backlog._segments.append

    def stands_still(lines: bytes, **how: object) -> None:
        held.set()
        assert let_go.wait(60)
        append(lines, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(backlog._segments, "append", stands_still)
    backlog.keep(refusal(0), NOON_S)
    assert held.wait(60)  # what is being written counts until it is
    for number in range(1, records):
        backlog.keep(refusal(number), NOON_S)
    assert sum(dropped) == lost
    let_go.set()
    backlog._batches.close(60.0)
    assert len(kept(tmp_path)) == QUEUE_RECORDS_MAX


KILLED = """
import os, sys, time
from pathlib import Path
from tests.store.test_backlog import NOON_S, ROOM, Backlog, kept, refusal
backlog = Backlog(Path(sys.argv[1]), ROOM)
for number in range(200):
    backlog.keep(refusal(number), NOON_S)
while len(kept(Path(sys.argv[1]))) < 200:
    time.sleep(0.01)
for number in range(200, 400):
    backlog.keep(refusal(number), NOON_S)
os.kill(os.getpid(), 9)
"""


def test_a_worker_that_is_killed_takes_its_last_moment_along_and_damages_nothing(tmp_path):
    root = Path(__file__).parent.parent.parent
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    there = kept(tmp_path)
    assert there[:200] == [f"K7Q2M9XD-{number}" for number in range(200)]
    backlog = Backlog(tmp_path, ROOM)
    backlog.keep(refusal(1000), NOON_S)
    backlog.close()
    assert kept(tmp_path)[-1] == "K7Q2M9XD-1000"
