"""The journal's tables.

Why: one schema for SQLite and PostgreSQL, written once; ``migrations`` makes it, and a test holds that both agree.
Promise: rows are only ever added, until retention makes them pseudonymous and takes them away; so an id is the order in
    which rows arrived.  Every index ends in the time: the newest of a thousand million are found without sorting.

    sessions   one row a session that ended
    facts      what was known of a client when verdicts fell; one row serves all verdicts of a day on the same facts
    entries    one row a verdict: on a forward-path, or on a transaction as a whole
    backlogs   how far each gate's backlog has been read; moves in one database transaction with the rows
    state      what retention has done, and until when
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, MetaData, SmallInteger, String, Table, Text
from sqlalchemy.sql import func

REVISIONS: Final = ("0001",)
"""What ``migrations`` knows, the newest last."""

METADATA: Final = MetaData()

# SQLite counts rows by itself only in a column that is exactly INTEGER.
_ID = BigInteger().with_variant(Integer, "sqlite")
_CLIENT = LargeBinary(16)  # an IPv4 address as IPv4-mapped, so that a network is a range

SESSIONS: Final = Table(
    "sessions",
    METADATA,
    Column("id", _ID, primary_key=True, autoincrement=True),
    Column("reference", String(16), nullable=False),
    Column("started", BigInteger, nullable=False),  # milliseconds since the epoch, as all times
    Column("ended", BigInteger, nullable=False),
    Column("listen", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("client", _CLIENT, nullable=False),
    Column("port", Integer, nullable=False),
    Column("real_client", Text, nullable=False),
    Column("hello", Text, nullable=False),
    Column("tls", Text, nullable=False),
    Column("account", Text, nullable=False),
    Column("certificate", Text, nullable=False),
    Column("errors", Integer, nullable=False),
    Column("how", Text, nullable=False),
    Column("reply", Text, nullable=False),
    Column("logins", Text),  # JSON
    Index("sessions_reference", "reference"),
    Index("sessions_ended", "ended"),
    Index("sessions_client", "client", "ended"),
)

FACTS: Final = Table(
    "facts",
    METADATA,
    Column("id", _ID, primary_key=True, autoincrement=False),  # a keyed digest of the rest
    Column("day", Integer, nullable=False),  # since the epoch: what retention goes by
    Column("session", Text, nullable=False),  # JSON, without the session's reference and the client's port
    Index("facts_day", "day"),
)

ENTRIES: Final = Table(
    "entries",
    METADATA,
    Column("id", _ID, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("session", String(16), nullable=False),  # its reference
    Column("number", Integer, nullable=False),  # of the transaction in the session
    Column("stage", String(8), nullable=False),
    Column("facts", BigInteger, nullable=False),  # 0: pseudonymous
    Column("client", _CLIENT, nullable=False),
    Column("port", Integer, nullable=False),
    Column("account", Text, nullable=False),
    Column("reverse_path", Text, nullable=False),
    Column("reverse_domain", Text, nullable=False),
    Column("forward_path", Text),
    Column("forward_domain", Text),
    Column("shape", String(16)),
    Column("recipients", Integer, nullable=False),
    Column("verdict", String(8), nullable=False),
    Column("reason", Text, nullable=False),
    Column("reference", Text, nullable=False),
    Column("by", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("hint", Text, nullable=False),
    Column("reply", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("message_id", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("backend", Text, nullable=False),
    Column("would", Text, nullable=False),
    Column("more", Text),  # JSON: findings and authors, where there are any
    Column("pseudonymous", SmallInteger, nullable=False),
)
_entries = ENTRIES.c
# Addresses are found in any case.  Both databases lower ASCII letters alike.
REVERSE_KEY: Final = func.lower(_entries.reverse_path)
FORWARD_KEY: Final = func.lower(_entries.forward_path)
Index("entries_at", _entries.at)
Index("entries_session", _entries.session)
Index("entries_client", _entries.client, _entries.at)
Index(
    "entries_account",
    _entries.account,
    _entries.at,
    sqlite_where=_entries.account != "",
    postgresql_where=_entries.account != "",
)
Index("entries_reverse_path", REVERSE_KEY, _entries.at)
Index("entries_reverse_domain", _entries.reverse_domain, _entries.at)
Index("entries_forward_path", FORWARD_KEY, _entries.at)
Index("entries_forward_domain", _entries.forward_domain, _entries.at)
Index(
    "entries_message_id",
    _entries.message_id,
    _entries.at,
    sqlite_where=_entries.message_id != "",
    postgresql_where=_entries.message_id != "",
)
Index("entries_verdict", _entries.verdict, _entries.at)
Index("entries_reason", _entries.reason, _entries.at)

BACKLOGS: Final = Table(
    "backlogs",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("segment", BigInteger, nullable=False),
    Column("octets", BigInteger, nullable=False),
)

STATE: Final = Table(
    "state",
    METADATA,
    Column("name", String(32), primary_key=True),
    Column("value", BigInteger, nullable=False),
)
