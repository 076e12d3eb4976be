"""What backends answered, kept as one JSON file a backend.

Why: a backend is asked now and then; what it said last is wanted at each check, and by whoever reads the directory.
Trust: the file is the gate's own, but anybody may have edited it: bounded, judged, and never more than words.
Promise: a file is replaced whole or not at all; what is no profile is told as such, and not used.
Sources: RFC 8259 (JSON).
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from gatepost.backend.dialect import SAID_CHARACTERS_MAX, Answer, Dialect, Heard
from gatepost.errors import StorageError

FILE_OCTETS_MAX = 256 << 10
HEARD_MAX = 100
KEYWORDS_MAX = 100
_DIRECTORY = "dialect"


def path_of(data: str, backend: str) -> Path:
    """Where the profile of a backend is kept.

    Args:
        data: the data directory; backend: NAME of [backend.NAME], letters, digits, "_" and "-".
    """
    return Path(data) / _DIRECTORY / f"{backend}.json"


def as_object(dialect: Dialect) -> dict[str, Any]:
    """For JSON.  ``accept_all`` and ``rereads`` are for readers; they follow from the answers."""
    found = asdict(dialect)
    found["at"] = datetime.fromtimestamp(dialect.at, UTC).isoformat(timespec="seconds")
    found["accept_all"] = dialect.accept_all.value
    found["heard"] = [_heard_object(heard) for heard in dialect.heard]
    found["ends"] = [_heard_object(heard) for heard in dialect.ends]
    return found


def _heard_object(heard: Heard) -> dict[str, str]:
    return {**heard._asdict(), "answer": heard.answer.value}


def keep(path: Path, dialect: Dialect) -> None:
    """Write the profile in the place of the one before it.

    Raises:
        StorageError: it cannot be written.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o750, exist_ok=True)
        try:
            with fresh.open("x", encoding="ascii") as file:
                json.dump(as_object(dialect), file, indent=2)
                file.write("\n")
            fresh.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from None


def recall(path: Path) -> Dialect | None:
    """The profile that was kept; None where there is none.

    Raises:
        StorageError: it cannot be read, or is no profile.
    """
    try:
        with path.open("rb") as file:
            octets = file.read(FILE_OCTETS_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return _dialect(json.loads(octets if len(octets) <= FILE_OCTETS_MAX else b""))
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        raise StorageError(f"{path} is no profile of a backend; `gatepost check --backend` writes a new one") from None


def _dialect(parsed: object) -> Dialect:
    found = _table(parsed)
    size_octets = found["size_octets"]
    if not (size_octets is None or isinstance(size_octets, int)):
        raise TypeError
    return Dialect(
        backend=_text(found["backend"]),
        peer=_text(found["peer"]),
        at=datetime.fromisoformat(_text(found["at"])).timestamp(),
        tls=_text(found["tls"]),
        greeting=_text(found["greeting"]),
        local_domain=_text(found["local_domain"]),
        elsewhere=_text(found["elsewhere"]),
        keywords=tuple(map(_text, _list(found["keywords"])[:KEYWORDS_MAX])),
        size_octets=size_octets,
        heard=tuple(map(_heard, _list(found["heard"])[:HEARD_MAX])),
        ends=tuple(map(_heard, _list(found["ends"])[:HEARD_MAX])),
    )


def _heard(parsed: object) -> Heard:
    found = _table(parsed)
    return Heard(_text(found["id"]), _text(found["asked"]), Answer(found["answer"]), _text(found["said"]))


def _table(parsed: object) -> dict[str, object]:
    if not isinstance(parsed, dict):
        raise TypeError
    return cast("dict[str, object]", parsed)


def _list(parsed: object) -> list[object]:
    if not isinstance(parsed, list):
        raise TypeError
    return cast("list[object]", parsed)


def _text(parsed: object) -> str:
    if not isinstance(parsed, str):
        raise TypeError
    return parsed[: 2 * SAID_CHARACTERS_MAX]
