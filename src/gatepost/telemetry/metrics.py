"""Counters, gauges and histograms in shared memory: one block a process, summed by the console.

Why: an increment stands on the hot path of every reply, so it is one addition to one cell (about 0.1 us), without lock
    or label dictionary; and a worker that dies must not take its counts along.
Trust: any worker can write all of the memory; a reader takes numbers for numbers and shows names as printable text.
Promise: each block has a single writer; cells are aligned 64-bit words, so a reader sees an old or a new value, never a
    torn one.  Counters never go down while the supervisor lives.  Every label set is finite: most are declared here,
    the names of backends get one of ``BACKENDS_MAX`` places when they are first configured and keep it.

    Blocks 0 to n-1 belong to the workers, block n to the supervisor, block n+1 to the journal's writer.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from enum import Enum, unique
from itertools import product
from typing import Final, NamedTuple

OTHER = "other"
BACKENDS_MAX = 32
BACKEND_NAME_OCTETS_MAX = 64
SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

# Where in the dialogue an answer was given.
STAGES = (
    "connect",
    "proxy",
    "tls",
    "hello",
    "auth",
    "mail",
    "rcpt",
    "data",
    "content",
    "session",
    OTHER,
)
# Why.  The members of verdict.Reason in lower case (a test holds that none is missing: this module stands below them),
# then the engine's and the gate's own reasons.
REASONS = (
    "relaying",
    "routing",
    "denied",
    "expired_trust",
    "suspended",
    "narrowed",
    "mailbox_login",
    "send_as",
    "author",
    "tls_required",
    "rate",
    "auth_required",
    "too_many_recipients",
    "other_route",
    "no_route",
    "accepted",
    "banned",
    "backend",
    "backend_down",
    "bare_newline",
    "busy",
    "content",
    "credentials",
    "draining",
    "error",
    "errors",
    "journal",
    "line_length",
    "loop",
    "proxy",
    "sequence",
    "size",
    "storage",
    "syntax",
    "timeout",
    "unavailable",
    "unsupported",
    OTHER,
)
ROLES = ("mx", "submission", "inside", "pop3", "imap")
VERDICTS = ("accepted", "deferred", "refused")


@unique
class Kind(Enum):
    """How a cell is written and how the blocks become one value."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    STATE = "state"  # 0 unknown, 1 up, 2 down; down in one process is down


STATE_UNKNOWN, STATE_UP, STATE_DOWN = 0, 1, 2


class Family:
    """One metric with all its label sets.

    Attributes:
        labels: the label names; values: for each the values it can have.
        dynamic: the first label is a backend's name, whose values are places until a name is known.
        cells: label values to the first of their cells.
    """

    __slots__ = ("cells", "dynamic", "help", "kind", "labels", "name", "values", "width")

    def __init__(
        self, first: int, name: str, text: str, kind: Kind, labels: dict[str, tuple[str, ...]], *, dynamic: bool
    ) -> None:
        self.name = name
        self.help = text
        self.kind = kind
        self.labels = tuple(labels)
        self.values = tuple(labels.values())
        self.dynamic = dynamic
        # A histogram: one cell a bucket, one for everything above, one for the sum (a double).
        self.width = len(SECONDS_BUCKETS) + 2 if kind is Kind.HISTOGRAM else 1
        self.cells = {key: first + place * self.width for place, key in enumerate(product(*self.values))}

    def at(self, *values: str) -> int:
        """The cell of these label values.  A value unknown to a label that has "other" counts there.

        Raises:
            KeyError: when a label has no such value; a mistake of ours, found by the first test that comes along.
        """
        cell = self.cells.get(values)
        if cell is None:
            known = (
                value if value in allowed or allowed[-1] != OTHER else OTHER
                for value, allowed in zip(values, self.values, strict=True)
            )
            cell = self.cells[tuple(known)]
        return cell


_PLACES = (*(str(place) for place in range(BACKENDS_MAX)), OTHER)
_catalogue: list[Family] = []
_cells = 0


def _declare(
    name: str, text: str, kind: Kind, labels: dict[str, tuple[str, ...]] | None = None, *, dynamic: bool = False
) -> Family:
    global _cells  # noqa: PLW0603  the catalogue is laid out once, while this module is imported
    family = Family(_cells, name, text, kind, labels or {}, dynamic=dynamic)
    _cells += family.width * len(family.cells)
    _catalogue.append(family)
    return family


SESSIONS: Final = _declare("gatepost_sessions_total", "Sessions begun.", Kind.COUNTER, {"role": ROLES})
SESSIONS_OPEN: Final = _declare("gatepost_sessions", "Sessions open now.", Kind.GAUGE, {"role": ROLES})
REPLIES: Final = _declare(
    "gatepost_replies_total",
    "Replies given, by the stage of the dialogue and the reason; accepted, refused or deferred alike.",
    Kind.COUNTER,
    {"stage": STAGES, "reason": REASONS},
)
MESSAGES: Final = _declare(
    "gatepost_messages_total", "Messages by the final reply to their content.", Kind.COUNTER, {"verdict": VERDICTS}
)
MESSAGE_OCTETS: Final = _declare(
    "gatepost_message_octets_total", "Octets of content received, accepted or not.", Kind.COUNTER
)
BACKEND_SECONDS: Final = _declare(
    "gatepost_backend_seconds",
    "Seconds from the end of content to the backend's final reply.",
    Kind.HISTOGRAM,
    {"backend": _PLACES},
    dynamic=True,
)
BACKEND_STATE: Final = _declare(
    "gatepost_backend_up",
    "1 when the backend answered last time, 0 when a worker last saw it down.",
    Kind.STATE,
    {"backend": _PLACES},
    dynamic=True,
)
LOG_DROPPED: Final = _declare(
    "gatepost_log_dropped_total", "Lines of the log dropped because nobody read them fast enough.", Kind.COUNTER
)
JOURNAL_DROPPED: Final = _declare(
    "gatepost_journal_dropped_total",
    "Records that the journal could not keep: the disk is full or slow, or the backlog has as much as it may have.",
    Kind.COUNTER,
)
JOURNAL_DAMAGED: Final = _declare(
    "gatepost_journal_damaged_total", "Lines of the journal's backlog that could not be read.", Kind.COUNTER
)
JOURNAL_RECORDS: Final = _declare(
    "gatepost_journal_records_total", "Records taken over into the journal's database.", Kind.COUNTER
)
JOURNAL_WAITING: Final = _declare(
    "gatepost_journal_waiting_octets",
    "Octets of the journal's backlog that its database does not have yet.",
    Kind.GAUGE,
)
JOURNAL_STATE: Final = _declare(
    "gatepost_journal_up",
    "1 when the journal's backlog on the disk, or its database, took what was written last; 0 when it did not.",
    Kind.STATE,
    {"part": ("backlog", "database")},
)
WORKERS_RESTARTED: Final = _declare(
    "gatepost_workers_restarted_total", "Worker processes that died and were started again.", Kind.COUNTER
)
RELOADS: Final = _declare(
    "gatepost_reloads_total", "Reloads of the configuration.", Kind.COUNTER, {"result": ("ok", "refused")}
)
TRUST_SUSPENDED: Final = _declare(
    "gatepost_trust_suspended", "Trusted addresses and listeners whose trust is suspended now.", Kind.GAUGE
)
SELFTEST: Final = _declare(
    "gatepost_selftest_agrees",
    "1 when the last self-test found what the rules say, 0 when it found something else.",
    Kind.STATE,
)
CATALOGUE: Final = tuple(_catalogue)
CELLS: Final = _cells

# Memory: digest of the layout, names of backends, blocks.  How many blocks there are, its sealed size says.
_NAMES_AT = 8
_BLOCKS_AT = _NAMES_AT + BACKENDS_MAX * BACKEND_NAME_OCTETS_MAX
_DIGEST = hashlib.blake2b(
    repr([(f.name, f.kind, f.labels, f.values) for f in CATALOGUE]).encode(), digest_size=8
).digest()


class Sample(NamedTuple):
    """One label set's value, all blocks together.

    Attributes:
        labels: label values in the family's order.
        value: the count, gauge or state; for a histogram the sum of what was observed.
        buckets: for a histogram the observations up to each bound, the last without bound; cumulative.
    """

    labels: tuple[str, ...]
    value: float
    buckets: tuple[int, ...] = ()


class Metrics:
    """The memory, with one block to write.

    Args:
        memory: ``size_octets(workers)`` octets, laid out by ``format``.
        block: the block this process writes.

    Raises:
        ValueError: when the memory was laid out by another version of Gatepost (it was upgraded on disk while it ran).
    """

    __slots__ = ("_blocks", "_cells", "_memory", "_sums", "block")

    def __init__(self, memory: memoryview, block: int) -> None:
        if bytes(memory[:8]) != _DIGEST:
            raise ValueError("Gatepost was replaced on disk while it ran: restart it as a whole")
        self._memory = memory
        self._blocks = (len(memory) - _BLOCKS_AT) // (CELLS * 8)
        self.block = block
        octets = self._octets(block)
        self._cells = octets.cast("q")
        self._sums = octets.cast("d")

    @staticmethod
    def size_octets(workers: int) -> int:
        """Memory for so many workers, the supervisor and the journal's writer."""
        return _BLOCKS_AT + (workers + 2) * CELLS * 8

    @staticmethod
    def format(memory: memoryview) -> None:
        """Lay out zeroed memory; the supervisor calls this before anybody else sees it."""
        memory[:8] = _DIGEST

    @classmethod
    def private(cls, workers: int = 1, block: int = 0) -> Metrics:
        """Metrics in memory of this process's own, for tests and tools."""
        memory = memoryview(bytearray(cls.size_octets(workers)))
        cls.format(memory)
        return cls(memory, block)

    def _octets(self, block: int) -> memoryview:
        if not 0 <= block < self._blocks:
            raise ValueError(f"there is no block {block}, there are {self._blocks}")
        start = _BLOCKS_AT + block * CELLS * 8
        return self._memory[start : start + CELLS * 8]

    # ---- writing

    def cell(self, family: Family, *values: str) -> int:
        """The cell of these label values, the names of backends resolved; to be kept where it is used often."""
        if family.dynamic:
            values = (self._place(values[0]), *values[1:])
        return family.at(*values)

    def inc(self, cell: int, amount: int = 1) -> None:
        """Add to a counter or gauge."""
        self._cells[cell] += amount

    def put(self, cell: int, value: int) -> None:
        """Set a gauge or state."""
        self._cells[cell] = value

    def observe(self, cell: int, seconds: float) -> None:
        """Count one observation in a histogram."""
        self._cells[cell + bisect_left(SECONDS_BUCKETS, seconds)] += 1
        self._sums[cell + len(SECONDS_BUCKETS) + 1] += seconds

    def backend_state(self, backend: str, *, up: bool) -> None:
        """A backend was seen to answer, or not to."""
        self.put(self.cell(BACKEND_STATE, backend), STATE_UP if up else STATE_DOWN)

    def log_dropped(self, lines: int) -> None:
        self._cells[LOG_DROPPED.at()] += lines

    def name_backends(self, names: tuple[str, ...]) -> None:
        """Give each backend a place; the supervisor calls this before it hands a configuration on.

        A place is never given to another name.  Names beyond the last place are counted together as "other".
        """
        known = self.backends()
        for name in names:
            octets = name.encode()[:BACKEND_NAME_OCTETS_MAX]
            if octets.decode("utf-8", "ignore") not in known and len(known) < BACKENDS_MAX:
                start = _NAMES_AT + len(known) * BACKEND_NAME_OCTETS_MAX
                self._memory[start : start + len(octets)] = octets
                known = self.backends()

    def clear_gauges(self, block: int) -> None:
        """Forget what a dead worker had open; its counters stay."""
        cells = self._octets(block).cast("q")
        for family in CATALOGUE:
            if family.kind in (Kind.GAUGE, Kind.STATE):
                for cell in family.cells.values():
                    cells[cell] = 0

    # ---- reading

    def backends(self) -> list[str]:
        """The names that have a place, in the order of the places."""
        names = []
        for place in range(BACKENDS_MAX):
            start = _NAMES_AT + place * BACKEND_NAME_OCTETS_MAX
            octets = bytes(self._memory[start : start + BACKEND_NAME_OCTETS_MAX]).rstrip(b"\0")
            if not octets:
                break
            names.append(octets.decode("utf-8", "ignore"))
        return names

    def _place(self, name: str) -> str:
        octets = name.encode()[:BACKEND_NAME_OCTETS_MAX]
        try:
            return str(self.backends().index(octets.decode("utf-8", "ignore")))
        except ValueError:
            return OTHER

    def read(self, family: Family) -> list[Sample]:
        """All label sets of a family.

        Left out: places of backends that have no name, states that no process knows yet, and, in families with several
        labels, combinations that never happened.
        """
        blocks = [self._octets(block) for block in range(self._blocks)]
        cells = [octets.cast("q") for octets in blocks]
        sums = [octets.cast("d") for octets in blocks]
        names = self.backends() if family.dynamic else []
        samples = []
        for labels, first in family.cells.items():
            shown = labels
            if family.dynamic and labels[0] != OTHER:
                place = int(labels[0])
                if place >= len(names):
                    continue
                shown = (names[place], *labels[1:])
            values = [[block[cell] for block in cells] for cell in range(first, first + family.width)]
            if family.kind is Kind.HISTOGRAM:
                count, buckets = 0, []
                for bucket in values[:-1]:
                    count += sum(bucket)
                    buckets.append(count)
                if count or labels[:1] != (OTHER,):
                    samples.append(
                        Sample(shown, sum(block[first + family.width - 1] for block in sums), tuple(buckets))
                    )
            elif family.kind is Kind.STATE:
                state = max(values[0])
                if state != STATE_UNKNOWN:
                    samples.append(Sample(shown, float(state == STATE_UP)))
            else:
                value = sum(values[0])
                if value or len(labels) < 2:
                    samples.append(Sample(shown, value))
        return samples
