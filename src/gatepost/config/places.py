"""Where each key of a TOML file stands.

Why: an error that names file and line is mended in seconds; ``tomllib`` gives values without positions, so one small
    scanner walks the same text and notes the line of every table, key and array element.
Trust: the text is the administrator's, and ``tomllib`` has accepted it before it comes here; so this scanner is lax,
    and where it cannot follow it stops, and the lines found so far serve (a wrong line is worse than a missing one).
Promise: paths are those of the parsed document: ("listen", 0, "address", 1).  Time and memory linear in the text.
Sources: TOML 1.0.0.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right

Path = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:\\.|(?!""")[^\\])*"""(?:"{0,2})'  # up to two quotes may stand before the closing three
    r"|'''(?:(?!''').)*'''(?:'{0,2})"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
_SCALAR = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[^\s,\]}#]*|[^\s,\]}#]+")  # a space may join date and time


class Places:
    """The lines of one file.

    Args:
        file: the file as messages shall name it.
        text: its text, "" for a file without positions.
    """

    def __init__(self, file: str, text: str = "") -> None:
        self.file = file
        self._lines: dict[Path, int] = _Scanner(text).lines if text else {}

    def __contains__(self, path: Path) -> bool:
        return path in self._lines

    def line(self, path: Path) -> int:
        """The line of this path, or of the nearest table or key that holds it; 0 where nothing is known."""
        for length in range(len(path), 0, -1):
            line = self._lines.get(path[:length])
            if line is not None:
                return line
        return 0

    def at(self, path: Path) -> str:
        """The path's place as "file:line"; the file alone where no line is known."""
        line = self.line(path)
        return f"{self.file}:{line}" if line else self.file

    def paths(self) -> dict[Path, int]:
        """Every path found, with its line."""
        return dict(self._lines)


class _Scanner:
    """One walk over a text that is TOML."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.lines: dict[Path, int] = {}
        self._newlines = [match.start() for match in re.finditer("\n", text)]
        self._table: Path = ()
        self._counts: dict[Path, int] = {}  # how many tables an array of tables has so far
        try:
            self._document()
        except (ValueError, IndexError, RecursionError):
            return  # what was found serves; see Trust

    def _document(self) -> None:
        text = self.text
        while True:
            self._skip_blank()
            if self.position >= len(text):
                return
            if text.startswith("[[", self.position):
                self._header(2)
            elif text.startswith("[", self.position):
                self._header(1)
            else:
                self._pair(self._table)

    def _line(self) -> int:
        return bisect_right(self._newlines, self.position - 1) + 1

    def _skip_blank(self) -> None:
        match = _BLANK.match(self.text, self.position)
        if match is not None:
            self.position = match.end()

    def _header(self, brackets: int) -> None:
        """[table] or [[array of tables]]."""
        line = self._line()
        self.position += brackets
        keys = self._key()
        self.position += brackets
        path: Path = ()
        for key in keys[:-1]:
            path = self._last((*path, key))
            self.lines.setdefault(path, line)
        path = (*path, keys[-1])
        if brackets == 2:
            index = self._counts.get(path, 0)
            self._counts[path] = index + 1
            self.lines.setdefault(path, line)
            path = (*path, index)
        self.lines[path] = line
        self._table = path

    def _last(self, path: Path) -> Path:
        """Below an array of tables a header means its last table so far."""
        count = self._counts.get(path)
        return path if count is None else (*path, count - 1)

    def _key(self) -> list[str]:
        """A key, dotted or not; ends before "=" or "]"."""
        keys = []
        while True:
            self._skip_blank()
            bare = _BARE_KEY.match(self.text, self.position)
            if bare is not None:
                keys.append(bare[0])
                self.position = bare.end()
            else:
                keys.append(str(tomllib.loads(f"key = {self._string()}")["key"]))
            self._skip_blank()
            if self.text[self.position] != ".":
                return keys
            self.position += 1

    def _pair(self, table: Path) -> None:
        """One key, "=" and its value."""
        line = self._line()
        path = table
        for key in self._key():
            path = (*path, key)
            self.lines.setdefault(path, line)
        if self.text[self.position] != "=":
            raise ValueError("no key and value here")
        self.position += 1
        self._value(path)

    def _value(self, path: Path) -> None:
        self._skip_blank()
        first = self.text[self.position]
        if first == "[":
            self._array(path)
        elif first == "{":
            self._inline_table(path)
        elif first in "\"'":
            self._string()
        else:
            scalar = _SCALAR.match(self.text, self.position)
            if scalar is None:
                raise ValueError("no value here")
            self.position = scalar.end()

    def _string(self) -> str:
        match = _STRING.match(self.text, self.position)
        if match is None:
            raise ValueError("no string here")
        self.position = match.end()
        return match[0]

    def _array(self, path: Path) -> None:
        self.position += 1
        index = 0
        while True:
            self._skip_blank()
            if self.text[self.position] == "]":
                self.position += 1
                return
            element = (*path, index)
            self.lines[element] = self._line()
            self._value(element)
            index += 1
            self._skip_blank()
            if self.text[self.position] == ",":
                self.position += 1

    def _inline_table(self, path: Path) -> None:
        self.position += 1
        while True:
            self._skip_blank()
            if self.text[self.position] == "}":
                self.position += 1
                return
            self._pair(path)
            self._skip_blank()
            if self.text[self.position] == ",":
                self.position += 1
