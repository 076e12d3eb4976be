"""The journal, read: who sent what to whom, and what became of it.

Why: "someone is e-mailing from our company" is answered in seconds only if every key that a person may have leads to
    the rows by an index, the newest first, however many there are.
Trust: what stands in the rows came from strangers; paths and facts go back through the parsers they came from, and a
    row that does not is passed over.
Promise: of several keys the one that leads to the fewest rows is looked up, by rules that stand below and not by a
    planner's guess; the others are filters.  A name is found under its pseudonym as well.
Sources: SQLite, "The SQLite Query Optimizer Overview"; PostgreSQL, "Indexes and ORDER BY".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from ipaddress import IPv4Network, IPv6Address, IPv6Network
from typing import Any, Final, NamedTuple

import msgspec
from sqlalchemy import ColumnElement, Connection, Select, and_, func, or_, select, union_all

from gatepost.facts import Client, Identity, IPAddress, Session, client_address
from gatepost.smtp.path import Shape
from gatepost.store.backlog import backlog_directory
from gatepost.store.database import Database
from gatepost.store.pseudonyms import Pseudonyms
from gatepost.store.record import (
    DAMAGED,
    MILLISECONDS_MAX,
    Entry,
    SessionLine,
    authors,
    findings,
    forward_path,
    reverse_path,
    session_of,
)
from gatepost.store.refusal import waiting
from gatepost.store.schema import ENTRIES, FACTS, FORWARD_KEY, REVERSE_KEY, SESSIONS
from gatepost.store.settings import JournalSettings
from gatepost.store.writer import packed

IPNetwork = IPv4Network | IPv6Network

READ_ROWS: Final = 5000
DENSE_ROWS: Final = 100_000  # a network with more rows is found by reading back in time, with fewer by its range
_FOREVER_MS: Final = 1 << 61
_FACTS_KNOWN: Final = 20_000
_PLAIN: Final = Shape.PLAIN.value


class Query(NamedTuple):
    """What is looked for; everything that is given must hold.

    Attributes:
        session: a session's reference.
        reference: the one in a reply that refused.
        message: the id in our trace field.
        domain: of the reverse-path or of the forward-path.
        since, until: seconds since the epoch; from, and before.
    """

    session: str = ""
    reference: str = ""
    message: str = ""
    message_id: str = ""
    client: IPAddress | None = None
    network: IPNetwork | None = None
    account: str = ""
    reverse_path: str = ""
    forward_path: str = ""
    domain: str = ""
    verdict: str = ""
    reason: str = ""
    since: float | None = None
    until: float | None = None


class Kept(NamedTuple):
    """One verdict as the journal has it.

    Attributes:
        id: grows with each row that comes in.
        reference: of the session.
        session: the facts; without the session's reference and the client's port where many entries share it.
        pseudonymous: names and clients are pseudonyms, and what was said in words is gone.
    """

    id: int
    reference: str
    session: Session
    entry: Entry
    pseudonymous: bool


class KeptSession(NamedTuple):
    """One session as the journal has it; times in seconds since the epoch."""

    id: int
    reference: str
    started: float
    ended: float
    listen: str
    role: str
    client: IPAddress
    port: int
    real_client: str
    hello: str
    tls: str
    account: str
    certificate: str
    errors: int
    how: str
    reply: str
    logins: tuple[Mapping[str, Any], ...]


class Journal:
    """The journal of one gate, or of several that share a database.

    Args:
        data: the gate's data directory.

    Raises:
        StorageError: it cannot be used; a newer version of Gatepost made it.
    """

    def __init__(self, data: str, settings: JournalSettings) -> None:
        self._backlog = backlog_directory(data)
        self._pseudonyms = Pseudonyms.in_data(data, make=False)
        self._database = Database(data, settings.url)
        self._facts: dict[int, Session | None] = {}
        self.name = self._database.name
        self.empty = not self._database.check()

    def close(self) -> None:
        """Let the database go."""
        self._database.close()

    # ---- verdicts

    def search(self, query: Query, limit: int) -> list[Kept]:
        """The newest entries that the query means, the newest first.

        Raises:
            StorageError: the database does not answer.
        """
        if self.empty:
            return []
        with self._database.transaction() as connection:
            return self._kept(connection, self._statement(connection, query, limit))

    def plan(self, query: Query, limit: int) -> list[str]:
        """How the database goes about ``search``, in its own words."""
        with self._database.transaction() as connection:
            statement = self._statement(connection, query, limit)
            compiled = statement.compile(connection, compile_kwargs={"render_postcompile": True})
            if self._database.dialect == "sqlite":
                values = tuple(compiled.params[name] for name in compiled.positiontup or ())
                return [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {compiled}", values)]
            return [row[0] for row in connection.exec_driver_sql(f"EXPLAIN {compiled}", dict(compiled.params))]

    def after(self, row_id: int, query: Query, limit: int) -> list[Kept]:
        """The entries that came in behind this one, the oldest first, as far as the query means them."""
        if self.empty and not self._look_again():
            return []
        query = _bindable(query)
        with self._database.transaction() as connection:
            statement = select(ENTRIES).where(ENTRIES.c.id > row_id, *self._filters(query)).order_by(ENTRIES.c.id)
            return self._kept(connection, statement.limit(limit))

    def last_id(self) -> int:
        """Of the newest entry; 0 where there is none."""
        if self.empty:
            return 0
        with self._database.transaction() as connection:
            return connection.execute(select(func.max(ENTRIES.c.id))).scalar_one_or_none() or 0

    def count(self, query: Query) -> int:
        """How many entries the query means."""
        if self.empty:
            return 0
        query = _bindable(query)
        with self._database.transaction() as connection:
            key, _ = self._key(connection, query)
            filters = self._filters(query, but=key)
            counted = [
                select(ENTRIES.c.id).where(branch, *filters, *_between(query)) for branch in self._branches(key, query)
            ]
            rows = counted[0] if len(counted) == 1 else union_all(*counted)
            return connection.execute(select(func.count()).select_from(rows.subquery())).scalar_one()

    def verdicts(self, since: float, until: float) -> Iterator[Kept]:
        """All entries of a time, the oldest first, but for pseudonymous ones; many share one ``Kept.session``.

        Args:
            since, until: seconds since the epoch; from, and before.
        """
        if self.empty:
            return
        at, last_id, end = _ms(since), 0, _ms(until)
        while True:
            behind = or_(ENTRIES.c.at > at, and_(ENTRIES.c.at == at, ENTRIES.c.id > last_id))
            statement = (
                select(ENTRIES)
                .where(ENTRIES.c.at >= at, ENTRIES.c.at < end, behind, ENTRIES.c.pseudonymous == 0)
                .order_by(ENTRIES.c.at, ENTRIES.c.id)
                .limit(READ_ROWS)
            )
            with self._database.transaction() as connection:
                rows = connection.execute(statement).all()
                self._know(connection, {row.facts for row in rows})
            for row in rows:
                kept = self._shared(row)
                if kept is not None:
                    yield kept
            if len(rows) < READ_ROWS:
                return
            at, last_id = rows[-1].at, rows[-1].id

    def count_between(self, since: float, until: float) -> int:
        """About how many entries ``verdicts`` gives."""
        return self.count(Query(since=since, until=until))

    # ---- one refusal

    def refusal(self, reference: str) -> Kept | None:
        """The verdict that carried this reference, be it in the database or in the backlog; None for neither.

        Raises:
            StorageError: neither can be read, or a newer version wrote it.
        """
        there = waiting(self._backlog, reference)
        if there is not None:
            session, entry = there
            return Kept(0, session.reference, session, entry, pseudonymous=False)
        found = self.search(Query(reference=reference), 1)
        return found[0] if found else None

    def kept_since(self) -> float | None:
        """When the oldest verdict that is kept fell, in seconds since the epoch; None where there is none."""
        if self.empty:
            return None
        with self._database.transaction() as connection:
            oldest = connection.execute(select(func.min(ENTRIES.c.at))).scalar_one_or_none()
        return None if oldest is None else oldest / 1000

    # ---- sessions

    def sessions(self, query: Query, limit: int) -> list[KeptSession]:
        """The newest sessions by reference, client, network, account or time, the newest first."""
        if self.empty:
            return []
        query, columns = _bindable(query), SESSIONS.c
        conditions: list[ColumnElement[bool]] = []
        if query.session:
            conditions.append(columns.reference == query.session)
        if query.client is not None:
            conditions.append(columns.client.in_(self._clients(query.client)))
        if query.network is not None:
            conditions.append(columns.client.between(*_range(query.network)))
        if query.account:
            conditions.append(columns.account.in_([query.account, self._pseudonyms.name(query.account)]))
        since, until = _times(query)
        statement = select(SESSIONS).where(columns.ended >= since, columns.ended < until, *conditions)
        with self._database.transaction() as connection:
            rows = connection.execute(statement.order_by(columns.ended.desc()).limit(limit)).all()
        return [_session_row(row) for row in rows]

    # ---- the key that is looked up

    def _statement(self, connection: Connection, query: Query, limit: int) -> Select[Any]:
        query = _bindable(query)
        key, dense = self._key(connection, query)
        filters = self._filters(query, but="" if dense else key)
        newest = (ENTRIES.c.at.desc(), ENTRIES.c.id.desc())
        branches = [
            select(ENTRIES).where(branch, *_between(query), *filters).order_by(*newest).limit(limit)
            for branch in ([ENTRIES.c.at >= 0] if dense else self._branches(key, query))
        ]
        if key == "network" and not dense and not filters:
            # The index alone tells which rows are the newest: only those are read.
            ids = select(ENTRIES.c.id).where(*self._branches(key, query), *_between(query))
            newest_ids = ids.order_by(*newest).limit(limit).scalar_subquery()
            return select(ENTRIES).where(ENTRIES.c.id.in_(newest_ids)).order_by(*newest)
        if len(branches) == 1:
            return branches[0]
        # Each by its own index and cut to the limit: OR in one WHERE would gather all and sort.
        parts = union_all(*(select(branch.subquery()) for branch in branches)).subquery()
        return select(parts).distinct().order_by(parts.c.at.desc(), parts.c.id.desc()).limit(limit)

    def _key(self, connection: Connection, query: Query) -> tuple[str, bool]:
        """The member of the query that leads to the fewest rows, and whether it is a network with very many."""
        for name in _KEYS:
            if getattr(query, name) not in ("", None):
                if name != "network":
                    return name, False
                within = ENTRIES.c.client.between(*_range(getattr(query, name)))
                some = select(ENTRIES.c.id).where(within).limit(DENSE_ROWS).subquery()
                return name, connection.execute(select(func.count()).select_from(some)).scalar_one() == DENSE_ROWS
        return "", False

    def _branches(self, key: str, query: Query) -> list[ColumnElement[bool]]:
        """The conditions of which one leads to a row, each by an index that ends in the time."""
        columns, names = ENTRIES.c, self._pseudonyms
        if key in ("session", "reference", "message"):
            session = getattr(query, key).partition("-")[0].partition(".")[0]
            return [
                and_(columns.session == session, *([] if key == "session" else [columns[key] == getattr(query, key)]))
            ]
        match key:
            case "client":
                return [columns.client == client for client in self._clients(getattr(query, key))]
            case "network":
                return [columns.client.between(*_range(getattr(query, key)))]
            case "account":
                return [
                    and_(columns.account == name, columns.account != "")
                    for name in (query.account, names.name(query.account))
                ]
            case "message_id":
                return [
                    and_(columns.message_id == name, columns.message_id != "")
                    for name in (query.message_id, names.name(query.message_id))
                ]
            case "reverse_path":
                return [func.lower(path) == REVERSE_KEY for path in _both(query.reverse_path, names.path)]
            case "forward_path":
                return [func.lower(path) == FORWARD_KEY for path in _both(query.forward_path, names.path)]
            case "domain":
                return [columns.forward_domain == query.domain, columns.reverse_domain == query.domain]
            case "reason":
                return [columns.reason == query.reason]
            case "verdict":
                return [columns.verdict == query.verdict]
        return [columns.at >= 0]

    def _filters(self, query: Query, but: str = "all of time") -> list[ColumnElement[bool]]:
        """The other members, in a form that no index takes.

        Args:
            but: the member that is looked up; by default none is, and times are filters as well.
        """
        columns, names = ENTRIES.c, self._pseudonyms
        conditions: list[ColumnElement[bool]] = []

        def plain(column: ColumnElement[Any], nothing: str | bytes = "") -> ColumnElement[Any]:
            return func.coalesce(column, nothing)

        for name in _KEYS:
            value = getattr(query, name)
            if name == but or value in ("", None):
                continue
            if name == "client":
                conditions.append(plain(columns.client, b"").in_(self._clients(value)))
            elif name == "network":
                conditions.append(plain(columns.client, b"").between(*_range(value)))
            elif name in ("reverse_path", "forward_path"):
                conditions.append(
                    func.lower(plain(columns[name])).in_([func.lower(path) for path in _both(value, names.path)])
                )
            elif name == "domain":
                conditions.append(or_(plain(columns.forward_domain) == value, plain(columns.reverse_domain) == value))
            elif name in ("account", "message_id"):
                conditions.append(plain(columns[name]).in_([value, names.name(value)]))
            else:
                conditions.append(plain(columns[name]) == value)
        if but == "all of time":
            conditions += _between(query)
        return conditions

    def _clients(self, client: IPAddress) -> list[bytes]:
        octets = packed(str(client))
        return [octets, self._pseudonyms.client(octets)]

    # ---- rows to values

    def _kept(self, connection: Connection, statement: Select[Any]) -> list[Kept]:
        rows = connection.execute(statement).all()
        self._know(connection, {row.facts for row in rows})
        found = []
        for row in rows:
            kept = self._shared(row)
            if kept is not None:
                client = kept.session.client._replace(port=row.port)
                found.append(kept._replace(session=kept.session._replace(reference=row.session, client=client)))
        return found

    def _know(self, connection: Connection, ids: set[int]) -> None:
        """Read the facts that are not known yet."""
        if len(self._facts) > _FACTS_KNOWN:
            self._facts = {}
        unknown = sorted(ids - self._facts.keys())
        for start in range(0, len(unknown), 500):
            part = unknown[start : start + 500]
            for row in connection.execute(select(FACTS.c.id, FACTS.c.session).where(FACTS.c.id.in_(part))):
                self._facts[row.id] = _facts(row.session)

    def _shared(self, row: Any) -> Kept | None:  # noqa: ANN401  a row of ENTRIES
        session = self._facts.get(row.facts)
        if session is None:
            session = _bare(row)
        try:
            return Kept(row.id, row.session, session, _entry(row), bool(row.pseudonymous))
        except DAMAGED:
            return None

    def _look_again(self) -> bool:
        """The gate may have made the tables in the meantime."""
        self.empty = not self._database.check()
        return not self.empty


# In the order in which they lead to few rows.
_KEYS: Final = (
    "session", "reference", "message", "message_id", "client", "account", "reverse_path", "forward_path", "network",
    "domain", "reason", "verdict",
)  # fmt: skip


def _both(path: str, pseudonym: Callable[[str], str]) -> list[str]:
    return list(dict.fromkeys((path, pseudonym(path))))


def _range(network: IPNetwork) -> tuple[bytes, bytes]:
    return packed(str(network[0])), packed(str(network[-1]))


def _times(query: Query) -> tuple[int, int]:
    return _ms(query.since or 0.0), _FOREVER_MS if query.until is None else _ms(query.until)


def _ms(seconds: float) -> int:
    """Within what a calendar has; what is no number is its beginning."""
    return int(min(seconds, MILLISECONDS_MAX / 1000) * 1000) if seconds > 0 else 0


def _bindable(query: Query) -> Query:
    """Without what no database takes, and no row has."""
    clean: dict[str, Any] = {
        name: value.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
        for name, value in query._asdict().items()
        if isinstance(value, str)
    }
    return query._replace(**clean)


def _between(query: Query) -> list[ColumnElement[bool]]:
    since, until = _times(query)
    return [
        *([ENTRIES.c.at >= since] if query.since is not None else []),
        *([ENTRIES.c.at < until] if query.until is not None else []),
    ]


def address(octets: bytes) -> IPAddress:
    """A client from its 16 octets."""
    return client_address(str(IPv6Address(bytes(octets))))


def _facts(written: str) -> Session | None:
    try:
        return session_of(msgspec.convert({**json.loads(written), "reference": "", "port": 0}, SessionLine))
    except DAMAGED:
        return None


def _bare(row: Any) -> Session:  # noqa: ANN401
    """What the entry itself says of its session."""
    identity = Identity(row.account, "") if row.account else None
    return Session("", Client(address(row.client), 0), "", "", identity=identity)


def _entry(row: Any) -> Entry:  # noqa: ANN401
    """Raises one of ``DAMAGED``."""
    (
        _, at, _, number, stage, _, _, _, _, reverse, _, forward, _, shape, recipients, verdict, reason, reference, by,
        detail, hint, reply, message, message_id, size, backend, would, more, _,
    ) = row  # fmt: skip
    said = json.loads(more) if more else None
    return Entry(
        at / 1000,
        number,
        stage,
        reverse_path(reverse),
        None if forward is None else forward_path(forward, shape or _PLAIN),
        recipients,
        verdict,
        reason,
        reference,
        by,
        detail,
        hint,
        reply,
        message,
        message_id,
        size,
        backend,
        would,
        settles=False,
        findings=findings(said.get("findings", [])) if said else (),
        authors=authors(said.get("authors", [])) if said else (),
    )


def _session_row(row: Any) -> KeptSession:  # noqa: ANN401
    return KeptSession(
        row.id,
        row.reference,
        row.started / 1000,
        row.ended / 1000,
        row.listen,
        row.role,
        address(row.client),
        row.port,
        row.real_client,
        row.hello,
        row.tls,
        row.account,
        row.certificate,
        row.errors,
        row.how,
        row.reply,
        tuple(json.loads(row.logins)) if row.logins else (),
    )
