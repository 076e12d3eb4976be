"""docs/limits.md has every limit, with the number that the code has."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gatepost.backend.settings import BackendSettings
from gatepost.config import schema
from gatepost.gate.settings import Limits, Timeouts

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "gatepost"
PAGE = ROOT / "docs" / "limits.md"

UNITS = {
    "": 1,
    "octets": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "s": 1,
    "min": 60,
    "h": 3600,
    "d": 86400,
    "characters": 1,
}
# Limits of the gate's own processes among themselves, and of what it shows to people: nobody outside can meet them.
INSIDE = {
    "gate/channel.py",
    "gate/privileges.py",
    "telemetry/board.py",
    "control.py",
    "config/sentences.py",
    "policy/explanation.py",
    "config/document.py:SHOWN_MAX",
    "probe/reply.py:SHOWN_CHARACTERS_MAX",
    "probe/round.py:NAMED_MAX",
    "probe/wire.py:TRANSCRIPT_LINES_MAX",
    "smtp/client.py:KNOWN_MAX",
    "smtp/client.py:KNOWN_OCTETS_MAX",
    "telemetry/metrics.py:BACKEND_NAME_OCTETS_MAX",
}


class Row(NamedTuple):
    """One limit of the page."""

    line: int
    number: float
    setting: str
    symbol: str
    file: str


@cache
def rows() -> tuple[Row, ...]:
    return tuple(_rows())


def _rows() -> Iterator[Row]:
    for line, text in enumerate(PAGE.read_text("utf-8").splitlines(), 1):
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        if not text.startswith("|") or cells[0] in ("what", "---"):
            continue
        assert len(cells) == 5, f"{PAGE.name}:{line}: five cells make a row"
        where = re.match(r"`([\w.]+)` in `([\w./]+)`", cells[4])
        assert where, f"{PAGE.name}:{line}: no place in the code: {cells[4]}"
        yield Row(line, _number(cells[1]), cells[2], where[1], where[2])


def _number(text: str) -> float:
    if text == "none":
        return 0
    match = re.fullmatch(r"([\d,.]+)(?: (\w+))?", text)
    assert match, text
    return float(match[1].replace(",", "")) * UNITS[match[2] or ""]


def _value(row: Row) -> Any:
    module = importlib.import_module("gatepost." + row.file.removesuffix(".py").replace("/", "."))
    name, _, attribute = row.symbol.partition(".")
    found = getattr(module, name)
    if not attribute:
        return found
    return next(field.default for field in fields(found) if field.name == attribute)


def test_the_page_is_read() -> None:
    assert len(rows()) > 60
    assert len({(row.file, row.symbol) for row in rows()}) == len(rows()), "each limit once"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.symbol)
def test_a_number_is_the_one_in_the_code(row: Row) -> None:
    assert _value(row) == row.number, f"{PAGE.name}:{row.line}"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.symbol)
def test_a_setting_has_the_number_as_its_default(row: Row) -> None:
    match = re.match(r"`\[+([\w.]+)\]+ (\w+)`", row.setting)
    if match is None:
        assert row.setting.startswith("fixed") or re.match(r"`\[auth\.", row.setting)
        return
    parts = {f"{name}.{part}": t for name, parts in schema.SUBTABLES.items() for part, t in parts.items()}
    named = {f"{name}.NAME": t for name, t in schema.NAMED.items()}
    tables = {**schema.SECTIONS, **parts, **schema.ENTRIES, **named}
    field = tables[match[1]].model_fields[match[2]]
    assert field.default == row.number
    may_be_none = any(getattr(one, "words", "").endswith("0 = none") for one in field.metadata)
    assert may_be_none == row.setting.endswith(", 0 = none"), f"{PAGE.name}:{row.line}"


def test_every_setting_with_a_number_is_there() -> None:
    named = {row.setting.removesuffix(", 0 = none").strip("`") for row in rows()}
    for section in ("limits", "timeouts"):
        for key in schema.SECTIONS[section].model_fields:
            assert f"[{section}] {key}" in named, f"{PAGE.name} does not tell [{section}] {key}"


def test_every_number_of_the_settings_is_there() -> None:
    told = {row.symbol for row in rows()}
    for kind in (Limits, Timeouts, BackendSettings):
        for field in fields(kind):
            if isinstance(field.default, int | float) and not isinstance(field.default, bool):
                assert f"{kind.__name__}.{field.name}" in told, f"{PAGE.name} does not tell {field.name}"


def test_every_constant_that_bounds_something_is_there() -> None:
    told = {(row.file, row.symbol) for row in rows()}
    for path in sorted(SOURCE.rglob("*.py")):
        file = path.relative_to(SOURCE).as_posix()
        for node in ast.parse(path.read_text("utf-8")).body:
            if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
                continue
            name = node.targets[0].id
            if not re.fullmatch(r"[A-Z][A-Z0-9_]*(_MAX|_CEILING|_TIMEOUT_S|_HIGH_OCTETS)", name):
                continue
            inside = file in INSIDE or f"{file}:{name}" in INSIDE
            assert inside or (file, name) in told, f"{PAGE.name} does not tell {name} of {file}"
