"""The journal's database: SQLite below the data directory, or PostgreSQL by one URL; the same tables, the same queries.

Why: whoever asks the journal, and the one process that writes it, must get a sentence that can be acted on when a file
    is damaged, a disk is full, a server is away or a newer version was here before.
Trust: the database is the administrator's own; what stands in it came from strangers, and goes in and out as bound
    values only.
Promise: every error of the database is a StorageError that says what happened and what to do; a password in the URL is
    in none of them.  SQLite: WAL, so that readers never wait for the writer; a commit is on the disk when it returns.
Sources: SQLite, "Write-Ahead Logging"; RFC 3986 (the URL).
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    inspect,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from gatepost.errors import StorageError
from gatepost.store.schema import REVISIONS

BUSY_S: Final = 10.0
CONNECT_S: Final = 5
_REVISION: Final = Table("alembic_version", MetaData(), Column("version_num", String(32)))  # Alembic's own
_SQLITE_CACHE_KIB: Final = 128 << 10
_SQLITE_WAL_PAGES: Final = 16_000  # 64 MiB: a page that many commits change goes from there into the database once


def sqlite_path(data: str) -> Path:
    """Where the journal is kept where no URL is configured."""
    return Path(data) / "journal" / "journal.sqlite"


class Database:
    """One database, whose tables may be there or not.

    Args:
        data: the gate's data directory; url: of PostgreSQL, "" for SQLite.
        writes: its tables are made and brought up to date by ``prepare``.

    Raises:
        StorageError: the URL is none of PostgreSQL.
    """

    def __init__(self, data: str, url: str, *, writes: bool = False) -> None:
        self._path = None if url else sqlite_path(data)
        self._writes = writes
        if self._path is None:
            self._engine = _postgresql(url, writes=writes)
            at = self._engine.url
            self.name = f"PostgreSQL at {at.host or 'the local socket'}{f':{at.port}' if at.port else ''}/{at.database}"
        else:
            self._engine = _sqlite(self._path, writes=writes)
            self.name = str(self._path)

    @property
    def exists(self) -> bool:
        """Whether there is a file to read; a server is thought to be there."""
        return self._path is None or self._path.exists()

    @property
    def dialect(self) -> str:
        """Which of the two it is: "sqlite" or "postgresql"."""
        return self._engine.dialect.name

    def prepare(self) -> None:
        """Make the tables, or bring them up to date.

        Raises:
            StorageError: it cannot be done, or a newer version of Gatepost was here.
        """
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise StorageError(f"cannot make {self._path.parent}: {error.strerror}") from error
        with self.transaction() as connection:
            if self._revision(connection) != REVISIONS[-1]:
                _upgrade(connection)

    def check(self) -> bool:
        """Whether the tables are there, as this version knows them.

        Raises:
            StorageError: a newer version of Gatepost made them, or it cannot be read.
        """
        if not self.exists:
            return False
        with self.transaction() as connection:
            return self._revision(connection) == REVISIONS[-1]

    def _revision(self, connection: Connection) -> str:
        """Of the tables that are there; "" for none."""
        if not inspect(connection).has_table(_REVISION.name):
            return ""
        current = connection.execute(select(_REVISION.c.version_num)).scalar_one_or_none() or ""
        if current and current not in REVISIONS:
            raise StorageError(
                f"the journal in {self.name} was made by a newer version of Gatepost (its schema is {current}, this "
                f"version knows {REVISIONS[-1]}): run that version, or give this one another database"
            )
        return current

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction, committed at its end, rolled back where anything went wrong.

        Raises:
            StorageError: the database did not do it.
        """
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise StorageError(self._sentence(error)) from error

    def insertion(self, table: Table, but: str) -> str:
        """An INSERT for the driver's own use, with the values of a row in the order of the table's columns.

        Args:
            but: a column that the database fills by itself, "" for none.
        """
        quote = self._engine.dialect.identifier_preparer.quote
        names = [quote(column.name) for column in table.columns if column.name != but]
        mark = "%s" if self._path is None else "?"
        # Names of ours, and no value.
        return f"INSERT INTO {quote(table.name)} ({', '.join(names)}) VALUES ({', '.join([mark] * len(names))})"  # noqa: S608

    def close(self) -> None:
        """Let its connections go."""
        self._engine.dispose()

    def _sentence(self, error: SQLAlchemyError) -> str:
        said = str(error.orig if isinstance(error, DBAPIError) else error).strip().partition("\n")[0]
        if self._path is None:
            return f"the journal in {self.name} does not answer as it should: {said}"
        if "malformed" in said or "not a database" in said:
            damaged = f"{self._path}.damaged"
            return (
                f"the journal in {self._path} is damaged ({said}). What comes is kept in the backlog beside it. Move "
                f"it away: mv {self._path} {damaged}; rm -f {self._path}-wal {self._path}-shm; a new one is then made "
                f"within a minute. What the old one held: sqlite3 {damaged} .recover"
            )
        return f"the journal in {self._path} cannot be {'written' if self._writes else 'read'}: {said}"


def _pool(*, writes: bool) -> dict[str, Any]:
    """One connection for who writes all the time; one for each question for who asks."""
    return {"pool_size": 1, "max_overflow": 0, "pool_pre_ping": True} if writes else {"poolclass": NullPool}


def _sqlite(path: Path, *, writes: bool) -> Engine:
    options = {"timeout": BUSY_S, "check_same_thread": False}
    engine = create_engine(f"sqlite:///{path}", connect_args=options, **_pool(writes=writes))

    @event.listens_for(engine, "connect")
    def _connected(connection: sqlite3.Connection, _: object) -> None:
        # The driver's own transactions begin late and end early: ours are begun below, and only there.
        connection.isolation_level = None
        for pragma in (
            *(
                ("journal_mode=WAL", "synchronous=FULL", f"wal_autocheckpoint={_SQLITE_WAL_PAGES}")
                if writes
                else ("query_only=ON",)
            ),
            f"cache_size=-{_SQLITE_CACHE_KIB}",
            "temp_store=MEMORY",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgresql(url: str, *, writes: bool) -> Engine:
    try:
        at = make_url(url)
    except ArgumentError:
        raise StorageError('[store] url is none; write "postgresql://user:password@host:5432/database"') from None
    if at.get_backend_name() not in ("postgresql", "postgres"):
        raise StorageError(
            f'[store] url begins with "{at.drivername}"; write one of PostgreSQL, or leave it out for SQLite'
        )
    try:
        import psycopg  # noqa: PLC0415  an extra: most journals are in SQLite
    except ImportError:
        raise StorageError(
            'the journal in PostgreSQL needs the driver psycopg: pip install "gatepost[postgresql]"'
        ) from None
    options: dict[str, Any] = {"connect_timeout": CONNECT_S, "application_name": "gatepost"}
    options = {name: value for name, value in options.items() if name not in at.query}
    driver = at.set(drivername="postgresql+psycopg")
    return create_engine(driver, module=psycopg, connect_args=options, **_pool(writes=writes))


def _upgrade(connection: Connection) -> None:
    # Here: whoever only reads need not wait half a second for it.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", "gatepost:store/migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
