"""The self-test as an object: what it is told of the running gate may be anything."""

from __future__ import annotations

import asyncio

import pytest

from gatepost import config
from gatepost.answers import tried
from gatepost.errors import GatepostError


@pytest.mark.parametrize("listeners", [["mx"], [None], [{}], [{"name": "mx"}], [{"name": "mx", "address": "x:y"}]])
def test_where_the_gate_listens_is_not_told(listeners):
    gate = config.embedded_default().gate
    with pytest.raises(GatepostError, match="does not say where it listens"):
        asyncio.run(tried.compared(gate, listeners, lambda _: None))


def test_a_listener_that_the_configuration_does_not_have():
    gate = config.embedded_default().gate
    with pytest.raises(GatepostError, match="has a listener other, the configuration has none; reload it first"):
        asyncio.run(tried.compared(gate, [{"name": "other", "address": "127.0.0.1:25"}], lambda _: None))


def test_a_gate_that_listens_nowhere_is_unknown():
    gate = config.embedded_default().gate
    comparisons = asyncio.run(tried.compared(gate, [], lambda _: None))
    assert tried.as_object(comparisons) == {"outcome": "unknown", "listeners": []}
