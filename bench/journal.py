"""The journal's figures: how fast it is written, and how fast each key is found in a large one.

    .venv/bin/python bench/journal.py                          # a million entries in SQLite: about a minute
    .venv/bin/python bench/journal.py --entries 10000000       # ten million: about fifteen
    .venv/bin/python bench/journal.py --url postgresql://...   # an empty database of yours

The entries are put into the tables as the writer would, but in bulk; then the writer itself takes over RECORDS records
more, on top of them.  Each key is looked for by what stands in the middle of the journal, by what is there very often,
and by what is not there at all; the slowest of five searches counts, on a connection of its own each.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from gatepost.facts import Client, Identity, Session
from gatepost.smtp.path import ForwardPath, Mailbox, Shape
from gatepost.store import Backlog, End, Entry, JournalSettings, Record, backlog_directory
from gatepost.store.database import Database
from gatepost.store.journal import Journal, Query
from gatepost.store.record import encode, parse
from gatepost.store.schema import ENTRIES, FACTS
from gatepost.store.writer import Rows, Writer

RECORDS = 50_000
ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
START_S = 1_790_000_000.0
DAYS = 30


class Traffic:
    """Mail as a busy gate sees it: nine of ten from strangers, three of ten refused."""

    def __init__(self, entries: int, seed: int = 1) -> None:
        self._random = random.Random(seed)
        self._entries = entries

    def record(self, number: int) -> Record:
        rng = self._random
        at = START_S + DAYS * 86400 * number / self._entries
        inside = rng.random() < 0.1
        octets = (10 << 24) + rng.randrange(200) if inside else (64 << 24) + int(rng.paretovariate(0.3)) % (1 << 24)
        session = Session(
            "".join(rng.choices(ALPHABET, k=8)),
            Client(ip_address(octets), rng.randrange(1024, 65536)),
            "submission" if inside else "mx",
            "submission" if inside else "mx",
            f"mail{octets % 5000}.example.net",
            esmtp=True,
            identity=Identity(f"user{octets % 200}", "PLAIN", "accounts") if inside else None,
        )
        refused = not inside and rng.random() < 0.33
        domain = rng.choice(("gmail.example", "outlook.example", f"d{rng.randrange(20_000)}.example"))
        elsewhere = ForwardPath(Mailbox(f"user{rng.randrange(10_000)}", domain), Shape.PLAIN)
        local = ForwardPath(Mailbox(f"local{rng.randrange(2000)}", "example.com"), Shape.PLAIN)
        entry = Entry(
            at,
            1,
            "rcpt" if refused else "content",
            Mailbox(f"user{rng.randrange(100_000)}", domain),
            elsewhere if inside or refused else local,
            0,
            "refused" if refused else "accepted",
            "relaying" if refused else "",
            f"{session.reference}-1" if refused else "",
            "" if refused else "gatepost.toml:12",
            reply=f"550 5.7.1 Relaying is prohibited [{session.reference}-1]" if refused else "250 2.0.0 Ok: queued",
            message="" if refused else f"{session.reference}.1",
            message_id="" if refused else f"<{number}.{rng.getrandbits(48):x}@{domain}>",
            size=0 if refused else rng.randrange(1000, 100_000),
            backend="" if refused else "mail",
        )
        return Record(session, [entry], End(at - 1, at, "quit"))


def fill(writer: Writer, database: Database, traffic: Traffic, entries: int) -> None:
    """Rows as the writer makes them, without the detour over the disk."""
    done = 0
    began = time.monotonic()
    while done < entries:
        rows = Rows({}, [], [], {})
        for number in range(done, min(done + 50_000, entries)):
            line = encode(traffic.record(number))
            record = parse(line)
            assert record is not None
            assert writer._rows_of(record, line, rows) is not None
        done = min(done + 50_000, entries)
        with database.transaction() as connection:
            connection.exec_driver_sql(
                database.insertion(FACTS, "") + " ON CONFLICT DO NOTHING",
                [(known, *row) for known, row in rows.facts.items()] or [],
            )
            connection.exec_driver_sql(database.insertion(ENTRIES, "id"), rows.entries)
        writer._facts.update(dict.fromkeys(rows.facts))
        rate = done / (time.monotonic() - began)
        print(f"\r{done:,} of {entries:,} entries, {rate:,.0f} a second ", end="", flush=True)
    print()


def searches(sample: Any, often: Any) -> Iterator[tuple[str, Query]]:
    """Each key, by what is there once, often, or never."""
    session, entry = sample.session, sample.entry
    yield "session", Query(session=sample.reference)
    yield "reference", Query(reference=often.entry.reference)
    yield "message", Query(message=entry.message)
    yield "message-id", Query(message_id=entry.message_id)
    yield "message-id, never", Query(message_id="<no@where.example>")
    yield "client", Query(client=session.client.address)
    yield "client, never", Query(client=ip_address("192.0.2.1"))
    yield "network /24", Query(network=ip_network(f"{session.client.address}/24", strict=False))
    yield "network /8", Query(network=ip_network("64.0.0.0/8"))
    yield "network /0", Query(network=ip_network("0.0.0.0/0"))
    yield "network, never", Query(network=ip_network("192.0.2.0/24"))
    yield "account", Query(account="user7")
    yield "account, never", Query(account="nobody")
    yield "reverse-path", Query(reverse_path=str(entry.reverse_path))
    yield "forward-path", Query(forward_path="local77@example.com")
    yield "domain, often", Query(domain="gmail.example")
    yield "domain, our own", Query(domain="example.com")
    yield "domain, never", Query(domain="nowhere.example")
    yield "verdict", Query(verdict="refused")
    yield "verdict, never", Query(verdict="deferred")
    yield "reason", Query(reason="relaying")
    yield "time", Query(since=entry.at - 60, until=entry.at)
    yield "the newest", Query()
    yield "account and verdict", Query(account="user7", verdict="refused")
    yield "domain and time", Query(domain="gmail.example", since=entry.at - 3600, until=entry.at)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--url", default="")
    parser.add_argument("--keep", type=Path, help="keep SQLite's journal in this directory, and use it again")
    options = parser.parse_args()
    directory = options.keep or Path(tempfile.mkdtemp(prefix="gatepost-journal-"))
    try:
        measure(str(directory), JournalSettings(url=options.url, entries_max=10**9), options.entries)
    finally:
        if options.keep is None:
            shutil.rmtree(directory)


def measure(data: str, settings: JournalSettings, entries: int) -> None:
    database = Database(data, settings.url, writes=True)
    writer = Writer(data, settings, database, time.time)
    there = Journal(data, settings).last_id()
    if there < entries:
        fill(writer, database, Traffic(entries), entries)
    traffic = Traffic(entries, seed=2)
    backlog = Backlog(backlog_directory(data), 1 << 30)
    for start in range(0, RECORDS, 128):
        backlog._write([(traffic.record(entries + number), None) for number in range(start, min(start + 128, RECORDS))])
    began, cpu_s = time.monotonic(), _cpu_s()
    taken = 0
    while step := writer.step():
        if not step.records:
            break
        taken += step.records
    elapsed, cpu_s = time.monotonic() - began, _cpu_s() - cpu_s
    size = sum(path.stat().st_size for path in (Path(data) / "journal").glob("journal.sqlite*"))
    print(
        f"written on top of {entries:,} entries ({size / (1 << 30):.1f} GiB): {taken / elapsed:,.0f} records/s, ",
        end="",
    )
    print(f"{cpu_s / taken * 1e6:.0f} us of CPU each\n")
    database.close()

    journal = Journal(data, settings)
    middle = START_S + DAYS * 86400 / 2
    sample = journal.search(Query(verdict="accepted", until=middle), 1)[0]
    often = journal.search(Query(verdict="refused", until=middle), 1)[0]
    print(f"{'looked for':<22} {'found':>6} {'ms':>7}   how")
    for name, query in searches(sample, often):
        slowest = 0.0
        found = []
        for _ in range(5):
            began = time.monotonic()
            found = journal.search(query, 100)
            slowest = max(slowest, time.monotonic() - began)
        how = [step for step in journal.plan(query, 100) if step.startswith(("SEARCH entries", "SCAN entries"))]
        print(f"{name:<22} {len(found):>6} {slowest * 1000:>7.1f}   {'; '.join(how)}")


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
