"""Alembic's entrance: it runs on the connection that ``database`` hands it, inside that connection's transaction."""

from __future__ import annotations

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
