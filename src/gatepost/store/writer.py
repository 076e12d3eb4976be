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
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Table, and_, bindparam, delete, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from gatepost.errors import StorageError
from gatepost.facts import client_address
from gatepost.store.backlog import backlog_directory, segments
from gatepost.store.database import Database
from gatepost.store.pseudonyms import Pseudonyms
from gatepost.store.record import (
    DAMAGED,
    DELIVERING,
    STAGES,
    VERDICTS,
    milliseconds,
    number,
    one_of,
    parse,
    text,
    typed,
)
from gatepost.store.schema import BACKLOGS, ENTRIES, FACTS, SESSIONS, STATE
from gatepost.store.segments import Position
from gatepost.store.settings import JournalSettings

READ_OCTETS: Final = 2 << 20  # more than the longest line
DAY_MS: Final = 86_400_000
TIDY_ROWS: Final = 1000
CLOCK_BACK_MS: Final = 60_000
_KEY_MAX: Final = 500  # of what is indexed: PostgreSQL takes 2,700 octets, and no path or domain is longer
_TEXT_MAX: Final = 4000
_FACTS_KNOWN: Final = 50_000

_UNTIL: Final = "pseudonymous until"


class Rows(NamedTuple):
    """What one line, or many, become.

    Attributes:
        settled: session and message whose entries said "delivering", and what became of them is known.
    """

    facts: list[dict[str, Any]]
    entries: list[dict[str, Any]]
    sessions: list[dict[str, Any]]
    settled: list[tuple[str, str]]


class Step(NamedTuple):
    """What a step did.

    Attributes:
        records: lines that became rows; damaged: lines passed over; newer: lines of a newer version, passed over.
        clock_back_s: by how much the clock of the gate went back between two records, 0.0 where it did not.
    """

    records: int = 0
    damaged: int = 0
    newer: int = 0
    clock_back_s: float = 0.0


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
        self._latest_ms = 0
        database.prepare()
        self._position = self._where_we_were()

    @property
    def position(self) -> Position:
        """Up to where the backlog is in the database."""
        return self._position

    def _where_we_were(self) -> Position:
        with self._database.transaction() as connection:
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
            _put(connection, BACKLOGS, {"id": self._backlog}, {"segment": position.segment, "octets": position.octets})
        # Only now: what a transaction that failed had put there is not there.
        for facts in rows.facts:
            self._facts[facts["id"]] = None
        while len(self._facts) > _FACTS_KNOWN:
            del self._facts[next(iter(self._facts))]
        self._position = position
        try:
            self._segments.forget_before(position)
        except OSError as error:
            raise StorageError(f"cannot take away what was read of the journal's backlog: {error.strerror}") from error
        return step

    def _rows(self, lines: list[bytes]) -> tuple[Rows, Step]:
        rows = Rows([], [], [], [])
        records = damaged = newer = 0
        back_ms = 0
        for line in lines:
            try:
                record = parse(line)
            except StorageError:
                newer += 1
                continue
            part = None if record is None else self._rows_of(record)
            if part is None:
                damaged += 1
                continue
            records += 1
            rows.facts.extend(part.facts)
            rows.entries.extend(part.entries)
            rows.sessions.extend(part.sessions)
            rows.settled.extend(part.settled)
            for row in part.entries:
                if row["at"] < self._latest_ms - CLOCK_BACK_MS:
                    back_ms = max(back_ms, self._latest_ms - row["at"])
                    self._latest_ms = row["at"]  # said once
                self._latest_ms = max(self._latest_ms, row["at"])
        return rows, Step(records, damaged, newer, back_ms / 1000)

    def _rows_of(self, record: dict[str, Any]) -> Rows | None:
        """None where the line is not exactly what it should be."""
        try:
            session = dict(typed(record["session"], dict))
            reference = _short(text(session.pop("reference")), 16)
            port = number(session.pop("port"))
            client = packed(text(session["client"]))
            identity = session.get("identity")
            account = _key("" if identity is None else text(identity["account"]))
            about: dict[str, Any] = {"session": reference, "client": client, "port": port, "account": account}
            rows = Rows([], [], [], [])
            facts = json.dumps(session, separators=(",", ":"))
            for told in typed(record.get("entries", []), list):
                at = milliseconds(told["at"])
                day = at // DAY_MS
                facts_id = self._pseudonyms.facts(day, facts.encode())
                if facts_id not in self._facts:
                    rows.facts.append({"id": facts_id, "day": day, "session": facts})
                row = about | _entry_row(told, at) | {"facts": facts_id}
                if typed(told.get("settles", False), bool):
                    rows.settled.append((reference, row["message"]))
                rows.entries.append(row)
            end = record.get("end")
            if end is not None:
                rows.sessions.append(_session_row(session, about, typed(end, dict)))
        except DAMAGED:
            return None
        return rows

    def _add(self, connection: Connection, rows: Rows) -> None:
        if rows.facts:
            adding = (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(FACTS)
            connection.execute(
                adding.on_conflict_do_nothing(), list({facts["id"]: facts for facts in rows.facts}.values())
            )
        if rows.entries:
            connection.execute(insert(ENTRIES), rows.entries)
        if rows.settled:
            done = and_(ENTRIES.c.session == bindparam("s"), ENTRIES.c.message == bindparam("m"))
            connection.execute(
                delete(ENTRIES).where(done, ENTRIES.c.reason == DELIVERING),
                [{"s": session, "m": message} for session, message in dict.fromkeys(rows.settled)],
            )
        if rows.sessions:
            connection.execute(insert(SESSIONS), rows.sessions)

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
                done = connection.execute(delete(FACTS).where(FACTS.c.day < keep_ms // DAY_MS - 1)).rowcount
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


def _entry_row(told: dict[str, Any], at: int) -> dict[str, Any]:
    reverse_path, forward_path = _key(text(told["reverse_path"])), told.get("forward_path")
    more = {name: typed(told[name], list) for name in ("findings", "authors") if name in told}
    return {
        "at": at,
        "number": number(told["number"]) & 0x7FFFFFFF,
        "stage": one_of(told["stage"], STAGES),
        "reverse_path": reverse_path,
        "reverse_domain": domain_key(reverse_path),
        "forward_path": None if forward_path is None else _key(text(forward_path)),
        "forward_domain": None if forward_path is None else domain_key(_key(forward_path)),
        "shape": _short(text(told["shape"]), 16) if "shape" in told else None,
        "recipients": number(told.get("recipients", 0)) & 0x7FFFFFFF,
        "verdict": one_of(told["verdict"], VERDICTS),
        "reason": _key(text(told.get("reason", ""))),
        "reference": _key(text(told.get("reference", ""))),
        "by": _storable(text(told.get("by", ""))),
        "detail": _storable(text(told.get("detail", ""))),
        "hint": _storable(text(told.get("hint", ""))),
        "reply": _storable(text(told.get("reply", ""))),
        "message": _key(text(told.get("message", ""))),
        "message_id": _key(text(told.get("message_id", ""))),
        "size": number(told.get("size", 0)),
        "backend": _key(text(told.get("backend", ""))),
        "would": _storable(text(told.get("would", ""))),
        "more": json.dumps(more, separators=(",", ":")) if more else None,
        "pseudonymous": 0,
    }


def _session_row(session: dict[str, Any], about: dict[str, Any], end: dict[str, Any]) -> dict[str, Any]:
    logins = typed(end["logins"], list)
    return {
        "reference": about["session"],
        "started": milliseconds(end["started"]),
        "ended": milliseconds(end["ended"]),
        "listen": _key(text(session["listen"])),
        "role": _key(text(session["role"])),
        "client": about["client"],
        "port": about["port"],
        "real_client": _key(text(end["real_client"])),
        "hello": _storable(text(session["hello"])),
        "tls": _key(text(session.get("tls", ""))),
        "account": about["account"],
        "certificate": _key(text(session.get("certificate", ""))),
        "errors": number(end["errors"]) & 0x7FFFFFFF,
        "how": _key(text(end["how"])),
        "reply": _storable(text(end["reply"])),
        "logins": json.dumps(logins, separators=(",", ":")) if logins else None,
    }


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


def _storable(said: str, octets_max: int = _TEXT_MAX) -> str:
    """Text that both databases take: no NUL, no half of a surrogate pair."""
    said = said[:octets_max]
    if not said.isascii():
        said = said.encode("utf-8", "replace").decode()
    return said.replace("\0", "\ufffd") if "\0" in said else said


def _key(said: str) -> str:
    return _storable(said, _KEY_MAX)


def _short(said: str, letters: int) -> str:
    if len(said) > letters:
        raise ValueError(said)
    return _storable(said)
