"""The journal's one writer: from the backlog into the database, and what retention asks for.

Why: one process writes, so that no session waits for a database and SQLite has one writer only.  How far the backlog
    has been read stands in the database and moves in one transaction with the rows: a writer that is killed, or a
    server that goes away in the middle, costs no row and doubles none.
Trust: lines come from workers, which parse what strangers send: each is judged member by member before anything of it
    becomes a row, and one that is not what it should be is counted and passed over.
Promise: ``step`` does a bounded piece of work, whole or not at all.  Rows become pseudonymous after ``keep_s`` and go
    after ``pseudonyms_s`` more, whatever the clock did in between.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from sqlalchemy import Connection, Table, and_, bindparam, delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from gatepost.errors import StorageError
from gatepost.facts import client_address
from gatepost.store.backlog import backlog_directory, segments
from gatepost.store.database import Database
from gatepost.store.pseudonyms import Pseudonyms
from gatepost.store.record import (
    DAMAGED,
    DELIVERING,
    SCHEMA,
    STAGES,
    VERDICTS,
    EndLine,
    EntryLine,
    SessionLine,
    lines,
    parse,
)
from gatepost.store.schema import BACKLOGS, ENTRIES, FACTS, SESSIONS, STATE
from gatepost.store.segments import Position
from gatepost.store.settings import JournalSettings

READ_OCTETS: Final = 8 << 20  # in a large database the pages that rows share are written once a batch
DAY_MS: Final = 86_400_000
TIDY_ROWS: Final = 1000
CLOCK_BACK_MS: Final = 60_000
_KEY_MAX: Final = 600  # letters of a text: an index of PostgreSQL takes 2,700 octets, and no path or reply is longer
_PLAIN_OCTETS: Final = 2000  # a line with no more of them holds no text that is too long for one
_FACTS_KNOWN: Final = 50_000
_SESSIONS_KNOWN: Final = 4096
_FACTS_SHARE: Final = 1.25  # of ``entries_max``: more rows than verdicts name are worth a look through all of them

_UNTIL: Final = "pseudonymous until"
_MESSAGE: Final = [column.name for column in ENTRIES.columns].index("message") - 1


class Rows(NamedTuple):
    """What one line, or many, become.

    Attributes:
        settled: session and message whose entries said "delivering", and what became of them is known.
    """

    facts: dict[int, tuple[int, str]]
    entries: list[tuple[Any, ...]]
    sessions: list[tuple[Any, ...]]
    settled: dict[tuple[str, str], None]


class Step(NamedTuple):
    """What a step did.

    Attributes:
        records: lines that became rows; damaged: lines passed over; newer: lines of a newer version, passed over.
        crowded_out: rows that went because there may be no more of them.
        clock_back_s: by how much the clock of the gate went back between two records, 0.0 where it did not.
    """

    records: int = 0
    damaged: int = 0
    newer: int = 0
    crowded_out: int = 0
    clock_back_s: float = 0.0


class _Told(msgspec.Struct, gc=False):
    """One line, but for its session: whose facts are often known by their text alone."""

    schema: int
    session: msgspec.Raw
    entries: list[EntryLine] = []
    end: EndLine | None = None


class _Known:
    """What sessions say that have their facts in common.

    Attributes:
        written: the facts as they are kept: JSON, without the session's reference and the client's port.
        day, id: the last day they were asked for, and their number on that day.
    """

    __slots__ = ("account", "client", "day", "id", "session", "written")

    def __init__(self, session: SessionLine, written: bytes) -> None:
        self.session = session
        self.client = packed(session.client)
        self.account = _storable("" if session.identity is None else session.identity.account, _KEY_MAX)
        self.written = written
        self.day = self.id = -1


class Writer:
    """What the writing process does, one step after the other.

    Args:
        data: the gate's data directory.
        now_s: seconds since the epoch.

    Raises:
        StorageError: the database cannot be used now.
    """

    def __init__(self, data: str, settings: JournalSettings, database: Database, now_s: Callable[[], float]) -> None:
        self._settings = settings
        self._database = database
        self._now_s = now_s
        self._pseudonyms = Pseudonyms.in_data(data, make=True)
        directory = backlog_directory(data)
        self._segments = segments(directory, settings.backlog_octets)
        self._backlog = _backlog_id(directory)
        self._facts: dict[int, None] = {}
        self._facts_rows = self._facts_least = 0  # about; as many as verdicts name
        self._latest_ms = 0
        self._known: dict[bytes, _Known] = {}
        database.prepare()
        self._position = self._where_we_were()

    @property
    def position(self) -> Position:
        """Up to where the backlog is in the database."""
        return self._position

    def _where_we_were(self) -> Position:
        with self._database.transaction() as connection:
            self._facts_rows = connection.execute(select(func.count()).select_from(FACTS)).scalar_one()
            row = connection.execute(
                select(BACKLOGS.c.segment, BACKLOGS.c.octets).where(BACKLOGS.c.id == self._backlog)
            ).one_or_none()
        return Position() if row is None else Position(row[0], row[1])

    # ---- the backlog

    def step(self) -> Step:
        """Take over what waits, no more than about ``READ_OCTETS`` of it.

        Raises:
            StorageError: nothing was taken over; it is tried again with the next step.
        """
        try:
            lines, position = self._segments.read(self._position, READ_OCTETS)
        except OSError as error:
            raise StorageError(f"cannot read the journal's backlog: {error.strerror}") from error
        if position == self._position:
            return Step()
        rows, step = self._rows(lines)
        with self._database.transaction() as connection:
            self._add(connection, rows)
            crowded_out = sum(
                _make_room(connection, table, self._settings.entries_max, 2 * len(added))
                for table, added in ((ENTRIES, rows.entries), (SESSIONS, rows.sessions))
                if added
            )
            _put(connection, BACKLOGS, {"id": self._backlog}, {"segment": position.segment, "octets": position.octets})
        # Only now: what a transaction that failed had put there is not there.
        self._facts.update(dict.fromkeys(rows.facts))
        self._facts_rows += len(rows.facts)
        if self._facts_rows > max(self._settings.entries_max, self._facts_least) * _FACTS_SHARE:
            self._forget_facts()
        while len(self._facts) > _FACTS_KNOWN:
            del self._facts[next(iter(self._facts))]
        self._position = position
        try:
            self._segments.forget_before(position)
        except OSError as error:
            raise StorageError(f"cannot take away what was read of the journal's backlog: {error.strerror}") from error
        return step._replace(crowded_out=crowded_out)

    def _forget_facts(self) -> None:
        """A flood brings facts of its own with each verdict: those that no verdict names any more go."""
        with self._database.transaction() as connection:
            named = select(ENTRIES.c.facts).distinct().scalar_subquery()
            self._facts_rows -= connection.execute(delete(FACTS).where(FACTS.c.id.not_in(named))).rowcount
        self._facts, self._facts_least = {}, self._facts_rows

    def _rows(self, lines: list[bytes]) -> tuple[Rows, Step]:
        rows = Rows({}, [], [], {})
        records = damaged = newer = back_ms = 0
        for line in lines:
            entries = self._rows_of_plain(line, rows)
            if entries is None:
                try:
                    record = parse(line)
                except StorageError:
                    newer += 1
                    continue
                entries = None if record is None else self._rows_of(record, line, rows)
            if entries is None:
                damaged += 1
                continue
            records += 1
            for at in entries:
                if at < self._latest_ms - CLOCK_BACK_MS:
                    back_ms = max(back_ms, self._latest_ms - at)
                    self._latest_ms = at  # said once
                self._latest_ms = max(self._latest_ms, at)
        return rows, Step(records, damaged, newer, clock_back_s=back_ms / 1000)

    def _rows_of_plain(self, line: bytes, rows: Rows) -> list[int] | None:
        """As ``_rows_of``, for a line as ``encode`` makes nearly all.

        Returns:
            None also where the line is none of these, and is to be looked at closely.
        """
        # Where nothing is escaped, nothing can be there that a database does not take.
        if len(line) > _PLAIN_OCTETS or b"\\u" in line or not line.isascii():
            return None
        try:
            told = _told(line)
            session = bytes(told.session)
            found = _SESSION(session)
            if told.schema != SCHEMA or found is None:
                return None
            reference, client, port, rest = found.groups()
            written = b"{%b,%b}" % (client, rest)
            known = self._known.get(written) or self._remember(_session(session), written)
            return self._add_rows(rows, reference.decode(), int(port), known, told.entries, told.end, plain=True)
        except DAMAGED:
            return None

    def _rows_of(self, record: dict[str, Any], line: bytes, rows: Rows) -> list[int] | None:
        """Add what a line becomes.

        Returns:
            The times of its entries; None where it is not exactly what it should be, and then nothing was added.
        """
        plain = len(line) <= _PLAIN_OCTETS and b"\\u" not in line
        try:
            told = record["session"]
            session, entries, end = lines(record)
            without = {name: value for name, value in told.items() if name not in ("reference", "port")}
            written = json.dumps(without, separators=(",", ":")).encode()
            known = self._known.get(written) or self._remember(session, written)
            return self._add_rows(rows, _short(session.reference, 16), session.port, known, entries, end, plain=plain)
        except DAMAGED:
            return None

    def _remember(self, session: SessionLine, written: bytes) -> _Known:
        known = self._known[written] = _Known(session, written)
        if len(self._known) > _SESSIONS_KNOWN:
            del self._known[next(iter(self._known))]
        return known

    def _add_rows(
        self,
        rows: Rows,
        reference: str,
        port: int,
        known: _Known,
        told: list[EntryLine],
        end: EndLine | None,
        *,
        plain: bool,
    ) -> list[int]:
        """All of them, or none.

        Raises:
            one of ``DAMAGED``.
        """
        about = reference, known.client, port & 0xFFFF, known.account
        entries: list[tuple[Any, ...]] = []
        facts: dict[int, tuple[int, str]] = {}
        settled: dict[tuple[str, str], None] = {}
        for entry in told:
            day = entry.at // DAY_MS
            if day != known.day:
                known.day, known.id = day, self._pseudonyms.facts(day, known.written)
            if known.id not in self._facts and known.id not in rows.facts:
                facts[known.id] = (day, known.written.decode())
            row = _entry_row(entry, known.id, about, plain=plain)
            if entry.settles:
                settled[reference, row[_MESSAGE]] = None
            entries.append(row)
        if end is not None:
            rows.sessions.append(_session_row(known.session, end, about, plain=plain))
        rows.entries.extend(entries)
        rows.facts.update(facts)
        rows.settled.update(settled)
        return [entry.at for entry in told]

    def _add(self, connection: Connection, rows: Rows) -> None:
        facts = [(known, *row) for known, row in rows.facts.items()]
        for table, values, tail in (
            (FACTS, facts, " ON CONFLICT DO NOTHING"),
            (ENTRIES, rows.entries, ""),
            (SESSIONS, rows.sessions, ""),
        ):
            if values:
                # By the driver itself: to bind names to values costs as much as all the rest of a row.
                connection.exec_driver_sql(
                    self._database.insertion(table, but="id" if table is not FACTS else "") + tail, values
                )
        if rows.settled:
            done = and_(ENTRIES.c.session == bindparam("s"), ENTRIES.c.message == bindparam("m"))
            connection.execute(
                delete(ENTRIES).where(done, ENTRIES.c.reason == DELIVERING),
                [{"s": session, "m": message} for session, message in rows.settled],
            )

    # ---- retention

    def tidy(self) -> int:
        """A piece of what retention asks for.

        Returns:
            How many rows it dealt with; 0 when nothing is left to do for now.

        Raises:
            StorageError: the database did not do it.
        """
        now_ms = int(self._now_s() * 1000)
        keep_ms = now_ms - int(self._settings.keep_s * 1000)
        gone_ms = keep_ms - int(self._settings.pseudonyms_s * 1000)
        with self._database.transaction() as connection:
            done = _take_away(connection, ENTRIES, gone_ms) + _take_away(connection, SESSIONS, gone_ms)
            if not done and gone_ms < keep_ms:
                done = self._make_pseudonymous(connection, keep_ms)
            if not done:
                # Whole days: nobody refers to them any more, but for rows that are pseudonymous and say so.
                done = connection.execute(delete(FACTS).where(FACTS.c.day < keep_ms // DAY_MS)).rowcount
        return done

    def _make_pseudonymous(self, connection: Connection, keep_ms: int) -> int:
        until = connection.execute(select(STATE.c.value).where(STATE.c.name == _UNTIL)).scalar_one_or_none() or 0
        entries = (
            connection.execute(
                select(ENTRIES)
                .where(ENTRIES.c.at >= until, ENTRIES.c.at < keep_ms, ENTRIES.c.pseudonymous == 0)
                .order_by(ENTRIES.c.at)
                .limit(TIDY_ROWS)
            )
            .mappings()
            .all()
        )
        for row in entries:
            connection.execute(update(ENTRIES).where(ENTRIES.c.id == row["id"]).values(self._nameless_entry(row)))
        # How far entries are done bounds the sessions: all of both before ``keep_ms`` become pseudonymous.
        done_ms = keep_ms if len(entries) < TIDY_ROWS else entries[-1]["at"]
        sessions = (
            connection.execute(
                select(SESSIONS).where(SESSIONS.c.ended >= until, SESSIONS.c.ended < done_ms, SESSIONS.c.role != "")
            )
            .mappings()
            .all()
        )
        for row in sessions:
            connection.execute(update(SESSIONS).where(SESSIONS.c.id == row["id"]).values(self._nameless_session(row)))
        if done_ms > until:
            _put(connection, STATE, {"name": _UNTIL}, {"value": done_ms})
        return len(entries) + len(sessions)

    def _nameless_entry(self, row: Any) -> dict[str, Any]:  # noqa: ANN401  a row's mapping
        names = self._pseudonyms
        return {
            "facts": 0,
            "client": names.client(row["client"]),
            "port": 0,
            "account": names.name(row["account"]),
            "reverse_path": names.path(row["reverse_path"]),
            "forward_path": None if row["forward_path"] is None else names.path(row["forward_path"]),
            "message_id": names.name(row["message_id"]),
            # What was said in words may hold any of these.
            "detail": "",
            "hint": "",
            "reply": row["reply"][:9] if row["reply"][:3].isdigit() else "",
            "would": "",
            "more": None,
            "pseudonymous": 1,
        }

    def _nameless_session(self, row: Any) -> dict[str, Any]:  # noqa: ANN401
        names = self._pseudonyms
        return {
            "client": names.client(row["client"]),
            "port": 0,
            "real_client": "",
            "hello": "",
            "account": names.name(row["account"]),
            "certificate": "",
            "reply": "",
            "logins": None,
            "role": "",  # it tells that the row is done
        }


def _make_room(connection: Connection, table: Table, rows_max: int, rows: int) -> int:
    """Take the oldest away where there are more than ``rows_max``, no more than ``rows`` at once."""
    # One by one: SQLite looks at the ends of the table for one of them, and through all of it for both.
    first, last = (connection.execute(select(of(table.c.id))).scalar_one() for of in (func.min, func.max))
    end = min(last - rows_max, first + rows - 1)
    return connection.execute(delete(table).where(table.c.id <= end)).rowcount if end >= first else 0


def _take_away(connection: Connection, table: Table, before_ms: int) -> int:
    """Some of the rows that are older."""
    at = table.c.at if table is ENTRIES else table.c.ended
    old = select(table.c.id).where(at < before_ms).order_by(at).limit(TIDY_ROWS)
    return connection.execute(delete(table).where(table.c.id.in_(old.scalar_subquery()))).rowcount


def _put(connection: Connection, table: Table, key: dict[str, Any], values: dict[str, Any]) -> None:
    """One row by its key."""
    adding = (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(table).values(key | values)
    connection.execute(adding.on_conflict_do_update(index_elements=list(key), set_=values))


def _backlog_id(directory: Path) -> str:
    """What tells this backlog from any other that the same database may have read."""
    path = directory / "id"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with path.open("x") as file:
                file.write(os.urandom(16).hex())
        except FileExistsError:
            pass
        found = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot use {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(found) != 32:
        # Killed between making and writing it: nothing of this backlog has been read under any id.
        path.unlink(missing_ok=True)
        return _backlog_id(directory)
    return found


# --- One row ----------------------------------------------------------------------------------------------------------


_told: Final = msgspec.json.Decoder(_Told).decode
_session: Final = msgspec.json.Decoder(SessionLine).decode
_SESSION: Final = re.compile(
    rb'\{"reference":"([0-9A-Za-z]{1,16})",("client":"[0-9A-Fa-f.:]+"),"port":([0-9]{1,5}),(.+)\}'
).fullmatch


def _entry_row(told: EntryLine, facts: int, about: tuple[str, bytes, int, str], *, plain: bool) -> tuple[Any, ...]:
    """In the order of the table's columns, without its id."""
    if told.stage not in STAGES or told.verdict not in VERDICTS:
        raise ValueError(told)
    reference, client, port, account = about
    forward_path = told.forward_path
    texts = (
        told.reverse_path, forward_path or "", told.reason, told.reference, told.by, told.detail, told.hint,
        told.reply, told.message, told.message_id, told.backend, told.would,
    )  # fmt: skip
    (
        reverse_path, forward, reason, refused_as, by, detail, hint, reply, message, message_id, backend, would,
    ) = texts if plain else _storables(texts)  # fmt: skip
    return (
        told.at,
        reference,
        told.number & 0x7FFFFFFF,
        told.stage,
        facts,
        client,
        port,
        account,
        reverse_path,
        domain_key(reverse_path),
        None if forward_path is None else forward,
        None if forward_path is None else domain_key(forward),
        _short(told.shape, 16) if told.shape else None,
        told.recipients & 0x7FFFFFFF,
        told.verdict,
        reason,
        refused_as,
        by,
        detail,
        hint,
        reply,
        message,
        message_id,
        told.size,
        backend,
        would,
        _more(told) if told.findings or told.authors else None,
        0,
    )


def _more(told: EntryLine) -> str:
    more = {name: said for name, said in (("findings", told.findings), ("authors", told.authors)) if said}
    return json.dumps(more, separators=(",", ":"))


def _session_row(
    session: SessionLine, end: EndLine, about: tuple[str, bytes, int, str], *, plain: bool
) -> tuple[Any, ...]:
    """In the order of the table's columns, without its id."""
    reference, client, port, account = about
    texts = (
        session.listen, session.role, end.real_client, session.hello, session.tls, session.certificate, end.how,
        end.reply,
    )  # fmt: skip
    listen, role, real_client, hello, tls, certificate, how, reply = texts if plain else _storables(texts)
    return (
        reference,
        end.started,
        end.ended,
        listen,
        role,
        client,
        port,
        real_client,
        hello,
        tls,
        account,
        certificate,
        end.errors & 0x7FFFFFFF,
        how,
        reply,
        json.dumps(end.logins, separators=(",", ":")) if end.logins else None,
    )


def _storables(texts: tuple[str, ...]) -> tuple[str, ...]:
    """As both databases take them."""
    return tuple([_storable(said, _KEY_MAX) for said in texts])


@lru_cache(maxsize=16384)
def packed(client: str) -> bytes:
    """A client's 16 octets: an IPv4 address as IPv4-mapped.

    Raises:
        ValueError: it is no address.
    """
    address = client_address(client)
    return b"\0" * 10 + b"\xff\xff" + address.packed if isinstance(address, IPv4Address) else address.packed


def domain_key(path: str) -> str:
    """The domain of a path, as it is found by; "" for a path without."""
    return path.rpartition("@")[2].lower() if "@" in path else ""


def _storable(said: str, length_max: int) -> str:
    """Text that both databases take, and an index of PostgreSQL: no NUL, no half of a surrogate pair, not too long."""
    if len(said) > length_max:
        said = said[:length_max]
    if not said.isascii():
        said = said.encode("utf-8", "replace").decode()
    return said.replace("\0", "\ufffd") if "\0" in said else said


def _short(said: str, letters: int) -> str:
    if len(said) > letters:
        raise ValueError(said)
    return _storable(said, letters)
