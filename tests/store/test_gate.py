"""Refusals of a live gate: several workers, one that is killed, a disk that is full."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import smtplib
import time
import urllib.request
from pathlib import Path

import pytest
from tests.gatehouse import Gate
from tests.real.mounts import mounted, small_disk

from gatepost.store import backlog_directory, waiting

PATIENCE_S = 30.0

CONFIG = """\
[gate]
name = "mx.example.com"
data = "data"
workers = 2

[[listen]]
name = "mx"
address = "127.0.0.1:0"

[domains]
local = ["example.com"]

[backend.mailbox]
address = "embedded:"

[limits]
sessions_per_minute_per_client = 0
errors_per_session = 0

[console]
address = "127.0.0.1:0"
"""


def refused(gate: Gate, number: int) -> list[str]:
    """So many relay attempts in one session: the references in the replies."""
    with smtplib.SMTP("127.0.0.1", gate.port, timeout=PATIENCE_S) as client:
        client.helo("client.test")
        client.mail("a@stranger.test")
        replies = [client.rcpt("victim@elsewhere.test") for _ in range(number)]
    assert {code for code, _ in replies} == {550}
    return [re.findall(r"\[(.*)\]$", text.decode())[0] for _, text in replies]


def kept(gate: Gate, reference: str) -> bool:
    return waiting(backlog_directory(str(gate.directory / "data")), reference) is not None


def until_kept(gate: Gate, references: list[str]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not all(kept(gate, reference) for reference in references):
        assert time.monotonic() < end, gate.said()
        time.sleep(0.02)


def test_all_workers_write_to_the_same_files(tmp_path):
    with Gate(tmp_path, CONFIG) as gate:
        references = [reference for _ in range(20) for reference in refused(gate, 10)]
        until_kept(gate, references)
    assert all(kept(gate, reference) for reference in references)
    backlog = backlog_directory(str(tmp_path / "data"))
    assert sorted(path.name for path in backlog.iterdir()) == ["00000001.jsonl", "id", "lock"]


def test_what_was_refused_before_the_gate_ended_is_kept(tmp_path):
    with Gate(tmp_path, CONFIG) as gate:
        references = refused(gate, 50)
        assert gate.stop() == 0
    assert all(kept(gate, reference) for reference in references)


def test_workers_that_are_killed_take_no_more_along_than_their_last_moment(tmp_path):
    with Gate(tmp_path, CONFIG) as gate:
        before = [reference for _ in range(10) for reference in refused(gate, 10)]
        until_kept(gate, before)
        killed = set(gate.workers())
        refused(gate, 100)
        for worker in killed:
            os.kill(worker, signal.SIGKILL)
        after: list[str] = []
        end = time.monotonic() + PATIENCE_S
        while not after:
            assert time.monotonic() < end, gate.said()
            with contextlib.suppress(OSError, smtplib.SMTPException):  # until the new workers are there
                after = refused(gate, 10)
        until_kept(gate, before + after)


def dropped(gate: Gate) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{gate.console_port}/metrics", timeout=PATIENCE_S) as answer:
        text = answer.read().decode()
    return float(re.findall(r"^gatepost_journal_dropped_total (.*)$", text, re.MULTILINE)[0])


@pytest.mark.real
def test_a_full_disk_costs_entries_and_no_session(tmp_path):
    small = tmp_path / "data" / "journal" / "backlog"
    small.mkdir(parents=True)
    with Gate(tmp_path, CONFIG, within=mounted(small_disk(small, "64k"))) as gate:
        end = time.monotonic() + PATIENCE_S
        while not dropped(gate):
            assert time.monotonic() < end, gate.said()
            refused(gate, 50)
        gate.wait_for_line(
            lambda line: "the journal cannot be written in" in line and "No space left on device" in line
        )
        assert refused(gate, 1)
        view = Path(f"/proc/{gate.workers()[0]}/root{small}/00000001.jsonl").read_bytes()
    assert view.endswith(b"}\n"), "no half line is left"
    assert 20_000 < len(view) <= 65_536
