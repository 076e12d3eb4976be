"""An entry added to gatepost.toml, and nothing else of it changed.

Why: a decision taken from the journal becomes a rule in the one file where all rules stand, between the comments of
    whoever wrote it.
Trust: the file is an administrator's; the values of the entry come from strangers' mail, so that they are written by a
    TOML library and read back before anything counts.
Promise: the old file is in the new one octet for octet, around the entry; parsed, the new one is the old one and the
    entry.  On the disk there is the old file or the new one, never a part, with the same owner and mode; a file that
    somebody else changed in the meantime is left alone.
Sources: TOML 1.0.0; rename(2), fsync(2).
"""

from __future__ import annotations

import contextlib
import difflib
import os
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Final

import tomlkit

from gatepost.config.document import FILE_OCTETS_MAX
from gatepost.config.places import Places
from gatepost.errors import GatepostError

Value = str | int | bool | date | list[str]

_SHOWN_LINES: Final = 3  # around what a diff shows


def entry_text(table: str, entry: Mapping[str, Value]) -> str:
    """The entry as it stands in a file, from its head to its last line end."""
    document, tables = tomlkit.document(), tomlkit.aot()
    written = tomlkit.table()
    for key, value in entry.items():
        written.add(key, tomlkit.item(value))
    tables.append(written)
    document.add(table, tables)
    return tomlkit.dumps(document)


def added(octets: bytes, table: str, entry: Mapping[str, Value]) -> bytes:
    """The file with one more [[table]]: behind the last of its kind, where there is none at the end.

    Args:
        octets: a file that loads.

    Raises:
        GatepostError: it is written in a way that takes no more tables.
    """
    try:
        text = octets.decode()
        before = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise GatepostError(f"the configuration cannot be read as TOML: {error}") from None
    there = before.get(table, [])
    if isinstance(there, list):
        wanted = {**before, table: [*there, dict(entry)]}
        positions = _positions(text, table, len(there))
    else:
        wanted, positions = {}, iter(())
    for position in positions:
        new = _inserted(text, position, entry_text(table, entry))
        with contextlib.suppress(tomllib.TOMLDecodeError):
            if tomllib.loads(new) == wanted:
                return new.encode()
    raise GatepostError(
        f"{table} is not written as [[{table}]] tables here, so that none can be added without changing what stands "
        "there; write the entry into the file by hand"
    )


def _positions(text: str, table: str, count: int) -> Iterator[int]:
    """Where the entry may stand, the best place first; ``count``: how many of its kind there are."""
    lines, places = _lines(text), Places("", text).paths()
    heads = sorted({line for line in places.values() if 0 < line <= len(lines) and _is_head(lines[line - 1])})
    last = places.get((table, count - 1))
    if last is not None:
        end = next((head - 1 for head in heads if head > last), len(lines))
        yield sum(map(len, lines[: _own_end(lines, last, end)]))
    yield len(text)


def _lines(text: str) -> list[str]:
    """TOML knows no other line ends than LF and CRLF."""
    parts = text.split("\n")
    return [part + "\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def _is_head(line: str) -> bool:
    """Whether a table begins on this line, rather than a key; an array's element may look like it."""
    return line.lstrip(" \t").startswith("[")


def _own_end(lines: list[str], head: int, end: int) -> int:
    """How many lines there are up to the end of the entry.

    Remarks right below its last key are the entry's own; what stands behind an empty line, or right above the next
    head, is not.

    Args:
        head: the line of its head, from 1; end: how many lines there are before the next head.
    """
    last = end
    while last > head and _says_nothing(lines[last - 1]):
        last -= 1
    for number in range(last, end):
        if not lines[number].strip():
            return number
    return end if end == len(lines) else last


def _says_nothing(line: str) -> bool:
    return not line.strip() or line.lstrip(" \t").startswith("#")


def _inserted(text: str, position: int, entry: str) -> str:
    """The entry between empty lines, with the line ends that the file has."""
    before, behind = text[:position], text[position:]
    line_end = "\r\n" if "\r\n" in text else "\n"
    entry = entry.replace("\r\n", "\n").replace("\n", line_end)
    if before and not before.endswith("\n"):
        before += line_end
    if before and before.rpartition("\n")[0].rpartition("\n")[2].strip():
        entry = line_end + entry
    if behind and behind.partition("\n")[0].strip():
        entry += line_end
    return before + entry + behind


def difference(old: bytes, new: bytes, name: str) -> str:
    """What changes, as ``diff -u`` tells it."""
    lines = difflib.unified_diff(
        old.decode("utf-8", "replace").splitlines(),
        new.decode("utf-8", "replace").splitlines(),
        name,
        f"{name} (new)",
        n=_SHOWN_LINES,
        lineterm="",
    )
    return "\n".join(lines)


# --- On the disk ------------------------------------------------------------------------------------------------------


def write(path: str, old: bytes, new: bytes) -> None:
    """Put the new file in the place of the old one.

    Args:
        path: as it was given; of a symbolic link, what it leads to is replaced.
        old: what was read there.

    Raises:
        GatepostError: it is not what was read any more, or it cannot be written; nothing is changed then.
    """
    try:
        target = Path(path).resolve(strict=True)
        _refuse_if_changed(target, old, path)
        if not os.access(target, os.W_OK):
            raise GatepostError(f"{path} cannot be written by this user; run this as its owner, or as root")
        status = target.stat()
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        temporary = Path(name)
        try:
            with open(descriptor, "wb") as file:  # noqa: PTH123  a descriptor
                file.write(new)
                file.flush()
                if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(descriptor, status.st_uid, status.st_gid)
                _copy_attributes(target, descriptor)
                os.fchmod(descriptor, status.st_mode & 0o7777)
                os.fsync(descriptor)
            _refuse_if_changed(target, old, path)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(target.parent)
    except OSError as error:
        raise GatepostError(
            f"{path} cannot be written: {error.strerror or error}; its directory must be writable as well, and its "
            "owner must stay the same: run this as its owner, or as root"
        ) from None


def _refuse_if_changed(target: Path, old: bytes, path: str) -> None:
    with target.open("rb") as file:
        now = file.read(FILE_OCTETS_MAX + 1)
    if now != old:
        raise GatepostError(f"{path} was changed by somebody else in the meantime; nothing was written, try again")


def _copy_attributes(source: Path, descriptor: int) -> None:
    """Access control lists and labels, as far as they may be copied."""
    with contextlib.suppress(OSError):
        for name in os.listxattr(source):
            with contextlib.suppress(OSError):
                os.setxattr(descriptor, name, os.getxattr(source, name))


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
