"""Sessions, facts, entries, how far each backlog has been read, and what retention has done."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "backlogs",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("segment", sa.BigInteger(), nullable=False),
        sa.Column("octets", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "entries",
        sa.Column("id", _ID, autoincrement=True, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("session", sa.String(length=16), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("stage", sa.String(length=8), nullable=False),
        sa.Column("facts", sa.BigInteger(), nullable=False),
        sa.Column("client", sa.LargeBinary(length=16), nullable=False),
        sa.Column("port", sa.Integer(), nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("reverse_path", sa.Text(), nullable=False),
        sa.Column("reverse_domain", sa.Text(), nullable=False),
        sa.Column("forward_path", sa.Text(), nullable=True),
        sa.Column("forward_domain", sa.Text(), nullable=True),
        sa.Column("shape", sa.String(length=16), nullable=True),
        sa.Column("recipients", sa.Integer(), nullable=False),
        sa.Column("verdict", sa.String(length=8), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("reference", sa.Text(), nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("hint", sa.Text(), nullable=False),
        sa.Column("reply", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("message_id", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("backend", sa.Text(), nullable=False),
        sa.Column("would", sa.Text(), nullable=False),
        sa.Column("more", sa.Text(), nullable=True),
        sa.Column("pseudonymous", sa.SmallInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "entries_account",
        "entries",
        ["account", "at"],
        sqlite_where=sa.text("account != ''"),
        postgresql_where=sa.text("account != ''"),
    )
    op.create_index("entries_at", "entries", ["at"])
    op.create_index("entries_client", "entries", ["client", "at"])
    op.create_index("entries_forward_domain", "entries", ["forward_domain", "at"])
    op.create_index(
        "entries_message_id",
        "entries",
        ["message_id", "at"],
        sqlite_where=sa.text("message_id != ''"),
        postgresql_where=sa.text("message_id != ''"),
    )
    op.create_index("entries_reason", "entries", ["reason", "at"])
    op.create_index("entries_reverse_domain", "entries", ["reverse_domain", "at"])
    op.create_index("entries_session", "entries", ["session"])
    op.create_index("entries_verdict", "entries", ["verdict", "at"])
    op.create_table(
        "facts",
        sa.Column("id", _ID, autoincrement=False, nullable=False),
        sa.Column("day", sa.Integer(), nullable=False),
        sa.Column("session", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("facts_day", "facts", ["day"])
    op.create_table(
        "sessions",
        sa.Column("id", _ID, autoincrement=True, nullable=False),
        sa.Column("reference", sa.String(length=16), nullable=False),
        sa.Column("started", sa.BigInteger(), nullable=False),
        sa.Column("ended", sa.BigInteger(), nullable=False),
        sa.Column("listen", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("client", sa.LargeBinary(length=16), nullable=False),
        sa.Column("port", sa.Integer(), nullable=False),
        sa.Column("real_client", sa.Text(), nullable=False),
        sa.Column("hello", sa.Text(), nullable=False),
        sa.Column("tls", sa.Text(), nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("certificate", sa.Text(), nullable=False),
        sa.Column("errors", sa.Integer(), nullable=False),
        sa.Column("how", sa.Text(), nullable=False),
        sa.Column("reply", sa.Text(), nullable=False),
        sa.Column("logins", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("sessions_client", "sessions", ["client", "ended"])
    op.create_index("sessions_ended", "sessions", ["ended"])
    op.create_index("sessions_reference", "sessions", ["reference"])
    op.create_table(
        "state",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_index("entries_reverse_path", "entries", [sa.text("lower(reverse_path)"), "at"])
    op.create_index("entries_forward_path", "entries", [sa.text("lower(forward_path)"), "at"])
