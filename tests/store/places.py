"""Where the tests of the journal keep theirs, and what they put there."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psycopg
from tests.servers import PostgreSQL

from gatepost.facts import Client, Identity, Session
from gatepost.smtp.path import ForwardPath, Mailbox, Shape
from gatepost.store import Backlog, End, Entry, JournalSettings, Record, backlog_directory
from gatepost.store.database import Database
from gatepost.store.journal import Journal
from gatepost.store.writer import Writer

NOON_S = 1_800_000_000.25
_numbers = itertools.count(1)
_databases = itertools.count(1)


@dataclass
class Place:
    """One gate's data directory and its database; what was opened there is closed with it."""

    directory: Path
    url: str = ""
    opened: list[Database | Journal] = field(default_factory=list)

    def close(self) -> None:
        for one in self.opened:
            one.close()

    @property
    def data(self) -> str:
        return str(self.directory)

    def settings(self, **changes: Any) -> JournalSettings:
        return JournalSettings(url=self.url, **changes)

    def database(self) -> Database:
        database = Database(self.data, self.url, writes=True)
        self.opened.append(database)
        return database

    def writer(self, now_s: float = NOON_S, **changes: Any) -> Writer:
        return Writer(self.data, self.settings(**changes), self.database(), lambda: now_s)

    def journal(self) -> Journal:
        journal = Journal(self.data, self.settings())
        self.opened.append(journal)
        return journal

    def wait(self, *records: Record) -> None:
        """Put them into the backlog."""
        backlog = Backlog(backlog_directory(self.data), 1 << 30)
        assert backlog._write([(record, None) for record in records]) == 0

    def keep(self, *records: Record) -> None:
        """Put them into the database."""
        self.wait(*records)
        writer = self.writer()
        taken_over(writer)


def new_database(server: PostgreSQL) -> str:
    """Its URL."""
    name = f"journal{next(_databases)}"
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return server.url(name)


def taken_over(writer: Writer) -> int:
    """How many records it took over."""
    records = 0
    while step := writer.step():
        if not (step.records or step.damaged or step.newer):
            return records
        records += step.records
    return records


def session(number: int = 0, client: str = "192.0.2.1", account: str = "", **changes: Any) -> Session:
    """A session of a stranger, or of an account."""
    base = Session(
        reference=f"{number or next(_numbers):08}",
        client=Client(ip_address(client), 4711),
        listen="mx",
        role="mx",
        hello="client.test",
        esmtp=True,
        identity=Identity(account, "PLAIN", "accounts") if account else None,
    )
    return base._replace(**changes)


def entry(**changes: Any) -> Entry:
    """A message that the backend took."""
    base = Entry(
        at=NOON_S,
        number=1,
        stage="content",
        reverse_path=Mailbox("a", "x.example"),
        forward_path=ForwardPath(Mailbox("bob", "example.com"), Shape.PLAIN),
        recipients=0,
        verdict="accepted",
        by="g.toml:12",
        reply="250 2.0.0 Ok",
        size=4711,
        backend="mail",
    )
    return base._replace(**changes)


def refused(reference: str, **changes: Any) -> Entry:
    """A relay attempt."""
    return entry(
        stage="rcpt",
        forward_path=ForwardPath(Mailbox("victim", "elsewhere.example"), Shape.PLAIN),
        verdict="refused",
        reason="relaying",
        reference=reference,
        by="",
        reply=f"550 5.7.1 Relaying is prohibited [{reference}]",
        size=0,
        backend="",
    )._replace(**changes)


def record(entries: Iterable[Entry], of: Session | None = None, *, ended: bool = False) -> Record:
    """What a worker hands over."""
    kept = list(entries)
    end = End(kept[0].at - 1 if kept else NOON_S, kept[-1].at if kept else NOON_S + 1, "quit") if ended else None
    return Record(of or session(), kept, end)
