"""Stores for the tests of what the workers share."""

from __future__ import annotations

import pytest

from gatepost.counters import Digests, EmbeddedStore, MemoryStore

NOW = 1_800_000_000.0


@pytest.fixture(params=["embedded", "memory"])
def store(request, tmp_path):
    """Each store that there is: what is promised holds for all."""
    said: list[str] = []
    made = EmbeddedStore(tmp_path / "state", said.append) if request.param == "embedded" else MemoryStore()
    yield made
    made.close()
    assert not said


@pytest.fixture
def digests():
    return Digests(bytes(32))
