"""What serves clients is tried on both event loops: uvloop, and asyncio's own where uvloop is missing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
import uvloop
from tests.gate.scripted_gate import Trial

BOTH_LOOPS = {
    "test_session.py",
    "test_server.py",
    "test_connection.py",
    "test_logins.py",
    "test_mailbox_proxy.py",
    "test_certificates.py",
}


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    if item.path.name not in BOTH_LOOPS:
        return {"asyncio": asyncio.new_event_loop}
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest_asyncio.fixture
async def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Trial]:
    """A whole gate in this process."""
    trial = Trial(tmp_path, monkeypatch)
    yield trial
    await trial.close()
