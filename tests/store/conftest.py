"""Both databases: every test that takes ``place`` runs on SQLite and on a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.servers import PostgreSQL
from tests.store.places import Place, new_database


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """One server for all tests of a process."""
    with PostgreSQL() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A data directory, and a database of its own."""
    place = Place(tmp_path)
    if request.param == "postgresql":
        place.url = new_database(request.getfixturevalue("postgresql"))
    yield place
    place.close()


@pytest.fixture
def sqlite_place(tmp_path: Path) -> Iterator[Place]:
    """As ``place``, on SQLite."""
    place = Place(tmp_path)
    yield place
    place.close()
