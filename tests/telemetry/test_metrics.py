"""Counts over several blocks: sums, restarts, label sets, names of backends."""

from __future__ import annotations

import os

import pytest

from gatepost.telemetry import (
    BACKEND_SECONDS,
    BACKEND_STATE,
    LOG_DROPPED,
    MESSAGE_OCTETS,
    MESSAGES,
    REASONS,
    REPLIES,
    SESSIONS,
    SESSIONS_OPEN,
    Metrics,
    create_memory,
    map_memory,
)
from gatepost.telemetry.metrics import BACKENDS_MAX, CATALOGUE, CELLS, SECONDS_BUCKETS, Kind
from gatepost.verdict import Reason


def shared(workers: int) -> list[Metrics]:
    """One Metrics a worker, and the supervisor's, over the same memory."""
    memory = memoryview(bytearray(Metrics.size_octets(workers)))
    Metrics.format(memory)
    return [Metrics(memory, block) for block in range(workers + 1)]


def value(metrics: Metrics, family, *labels: str) -> float:
    return next((sample.value for sample in metrics.read(family) if sample.labels == labels), 0)


def test_counts_of_all_workers_are_summed():
    first, second, supervisor = shared(2)
    first.inc(first.cell(SESSIONS, "mx"))
    second.inc(second.cell(SESSIONS, "mx"), 41)
    second.inc(second.cell(SESSIONS, "inside"))
    assert value(supervisor, SESSIONS, "mx") == 42
    assert value(first, SESSIONS, "inside") == 1
    assert value(first, SESSIONS, "submission") == 0


def test_no_two_label_sets_share_a_cell():
    metrics = Metrics.private()
    spans = [(first, family.width) for family in CATALOGUE for first in family.cells.values()]
    cells = [cell for first, width in spans for cell in range(first, first + width)]
    assert sorted(cells) == list(range(CELLS))
    metrics.inc(CELLS - 1)
    with pytest.raises(IndexError):
        metrics.inc(CELLS)


def test_a_restarted_worker_goes_on_counting_and_has_nothing_open():
    worker, supervisor = shared(1)
    worker.inc(worker.cell(SESSIONS, "mx"), 7)
    worker.inc(worker.cell(SESSIONS_OPEN, "mx"), 3)
    worker.inc(worker.cell(MESSAGE_OCTETS), 1 << 40)
    worker.name_backends(("mail",))
    worker.backend_state("mail", up=False)
    supervisor.clear_gauges(0)
    assert value(supervisor, SESSIONS, "mx") == 7
    assert value(supervisor, SESSIONS_OPEN, "mx") == 0
    assert value(supervisor, MESSAGE_OCTETS) == 1 << 40
    assert supervisor.read(BACKEND_STATE) == []


def test_a_gauge_may_be_below_nothing_for_a_moment():
    metrics = Metrics.private()
    metrics.inc(metrics.cell(SESSIONS_OPEN, "mx"), -1)
    assert value(metrics, SESSIONS_OPEN, "mx") == -1


def test_histogram_buckets_are_cumulative_and_bounds_inclusive():
    metrics = Metrics.private()
    metrics.name_backends(("mail",))
    cell = metrics.cell(BACKEND_SECONDS, "mail")
    metrics.observe(cell, SECONDS_BUCKETS[0])
    metrics.observe(cell, 0.3)
    metrics.observe(cell, 10_000.0)
    (sample,) = [sample for sample in metrics.read(BACKEND_SECONDS) if sample.labels == ("mail",)]
    assert sample.value == pytest.approx(10_000.301)
    assert sample.buckets[0] == 1
    assert sample.buckets[SECONDS_BUCKETS.index(0.25)] == 1
    assert sample.buckets[SECONDS_BUCKETS.index(0.5)] == 2
    assert sample.buckets[-2:] == (2, 3)


def test_every_reason_for_a_refusal_has_its_label():
    assert {reason.name.lower() for reason in Reason} <= set(REASONS)


def test_unknown_reasons_and_stages_count_as_other_and_unknown_verdicts_are_our_mistake():
    metrics = Metrics.private()
    metrics.inc(metrics.cell(REPLIES, "rcpt", "no such reason"))
    metrics.inc(metrics.cell(REPLIES, "no such stage", "relaying"))
    labels = [sample.labels for sample in metrics.read(REPLIES)]
    assert labels == [("rcpt", "other"), ("other", "relaying")]  # what never happened is not shown
    with pytest.raises(KeyError):
        metrics.cell(MESSAGES, "maybe")
    with pytest.raises(ValueError, match="zip"):
        metrics.cell(MESSAGES)


def test_backends_keep_their_places_and_those_beyond_the_last_are_other():
    worker, supervisor = shared(1)
    supervisor.name_backends(("mail", "sales"))
    mail = worker.cell(BACKEND_SECONDS, "mail")
    supervisor.name_backends(("sales", "new"))
    assert worker.backends() == ["mail", "sales", "new"]
    assert worker.cell(BACKEND_SECONDS, "mail") == mail
    supervisor.name_backends(tuple(f"b{number}" for number in range(BACKENDS_MAX)))
    assert len(worker.backends()) == BACKENDS_MAX
    other = worker.cell(BACKEND_SECONDS, "b31")
    assert other == worker.cell(BACKEND_SECONDS, "never heard of") == BACKEND_SECONDS.at("other")
    worker.observe(other, 1.0)
    assert [sample.labels for sample in worker.read(BACKEND_SECONDS)][-1] == ("other",)


@pytest.mark.parametrize("length", [63, 64, 65, 200])
def test_a_backend_of_any_name_has_one_place(length):
    metrics = Metrics.private()
    name = "é" * length
    metrics.name_backends((name,))
    metrics.name_backends((name,))
    assert len(metrics.backends()) == 1
    assert metrics.cell(BACKEND_SECONDS, name) == BACKEND_SECONDS.at("0")


def test_a_backend_that_any_worker_sees_down_is_down():
    first, second, supervisor = shared(2)
    supervisor.name_backends(("mail", "sales"))
    first.backend_state("mail", up=True)
    assert [(sample.labels, sample.value) for sample in supervisor.read(BACKEND_STATE)] == [(("mail",), 1.0)]
    second.backend_state("mail", up=False)
    assert value(supervisor, BACKEND_STATE, "mail") == 0.0
    second.backend_state("mail", up=True)
    assert value(supervisor, BACKEND_STATE, "mail") == 1.0


def test_memory_of_another_version_is_refused():
    memory = memoryview(bytearray(Metrics.size_octets(1)))
    with pytest.raises(ValueError, match="restart it as a whole"):
        Metrics(memory, 0)
    Metrics.format(memory)
    Metrics(memory, 2)
    with pytest.raises(ValueError, match="no block 3"):
        Metrics(memory, 3)


def test_the_memory_of_several_processes_cannot_be_cut_off():
    descriptor = create_memory("test", Metrics.size_octets(1))
    memory = map_memory(descriptor)
    Metrics.format(memory)
    Metrics(memory, 0).inc(LOG_DROPPED.at(), 5)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)
    readable = Metrics(map_memory(descriptor, writable=False), 0)
    assert value(readable, LOG_DROPPED) == 5
    with pytest.raises(TypeError):
        readable.inc(LOG_DROPPED.at())


def test_only_known_kinds_are_declared():
    assert {family.kind for family in CATALOGUE} == set(Kind)
    assert all(family.name.startswith("gatepost_") and family.help.endswith(".") for family in CATALOGUE)
