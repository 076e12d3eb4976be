"""One TOML file, judged table by table.

Why: an administrator mends a file in one go, so every problem is found in one reading, each with file, line, the
    offending value and the mend; a bad table does not hide what is wrong in the next.
Trust: an administrator's file; bounded in size, since it is read as a whole.
Promise: a table in ``tables``, ``entries`` or ``named`` is valid by itself; ``settings`` judges what joins them.  The
    value of a key that is unknown, or that may hold a secret, is never shown.
Sources: TOML 1.0.0.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable
from datetime import date, time
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gatepost.config.places import Path, Places
from gatepost.config.schema import ENTRIES, NAMED, SECRET_KEYS, SECTIONS, SUBTABLES, WHO_KEYS, Form, Table
from gatepost.config.values import UNSHOWABLE, size_text
from gatepost.errors import ConfigError

FILE_OCTETS_MAX = 32 << 20
SHOWN_MAX = 80  # characters of an offending value

_POSITION = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")
_TWICE = re.compile(r"Cannot declare \((.*?),?\) twice")

# What tomllib says, and what a person does about it.  The first whose words stand in the message.
_SYNTAX = (
    ("Expected '='", 'after a key stands "=" and a value; write key = "value"'),
    ("Invalid statement", 'this is neither a table nor a key; write [table] or key = "value", and "#" before a remark'),
    ("Invalid initial character for a key", 'a key is missing here, or begins with a wrong character; write key = "v"'),
    (
        "Expected newline or end of document",
        "the value ends before the line does; write one key on a line, text in quotes, a date as 2027-06-30",
    ),
    ("Invalid value", 'this is no value; text stands in double quotes, as in "text", and true and false in lower case'),
    ("Invalid date", "this is no date; write it as 2027-06-30, without quotes"),
    ('Expected "\'"', "the text does not end; close it with the quote that opened it"),
    ("Unterminated string", "the text does not end; close it with the quote that opened it"),
    ("Unclosed array", 'the list does not end; close it with "]", and put "," between its elements'),
    ("Unclosed inline table", 'the inline table does not end; close it with "}", and put "," between its keys'),
    ("Expected ']]'", "the table's name does not end; write it as [[table]], with two brackets on each side"),
    ("Expected ']'", "the table's name does not end; write it as [table]"),
    ("Duplicate inline table key", "a key stands twice in this inline table; keep one"),
    ("Cannot overwrite a value", "this key or table stands twice; keep one"),
    ("Cannot mutate immutable namespace", "this table was complete before; write all its keys in one place"),
    ("Unescaped '\\'", "a backslash begins an escape; write it twice, or put the text in single quotes"),
    ("Illegal character", "a control character stands here, or a text goes over the end of its line; remove it"),
    ("Found invalid character", "a control character stands here; remove it"),
)


class Document:
    """A parsed file: its tables as values, its problems as sentences.

    Args:
        octets: the file, UTF-8.
        path: its name in messages.

    Attributes:
        tables: [section] tables by name; a section that is missing has its defaults.  A [section.part] stands under
            "section.part" if it is there and valid.
        entries: [[table]] entries by name, each with its index in the file.
        named: [backend.NAME] tables by table and name, in the file's order.
        written: names of all tables that the file has, valid or not.
    """

    def __init__(self, octets: bytes, path: str) -> None:
        self.path = path
        self.places = Places(path)
        self._problems: list[tuple[int, str]] = []
        self._warnings: list[tuple[int, str]] = []
        raw = self._parse(octets)
        self.written = frozenset(raw)
        self._raw = raw
        self.tables: dict[str, Table] = {}
        self.entries: dict[str, list[tuple[int, Any]]] = {name: [] for name in ENTRIES}
        self.named: dict[str, dict[str, Any]] = {name: {} for name in NAMED}
        self.names: dict[str, list[str]] = {name: [] for name in NAMED}
        for name, value in raw.items():
            self._judge_root(name, value)
        for name, model in SECTIONS.items():
            if name not in self.tables:
                self.tables[name] = model()

    def written_entries(self, name: str) -> list[dict[str, Any]]:
        """All the [[name]] tables as they are written, valid or not."""
        value = self._raw.get(name, [])
        return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []

    # --- Problems -----------------------------------------------------------------------------------------------------

    def problem(self, path: Path, sentence: str, *, value: object = None) -> None:
        """Something that keeps the file from loading.  ``value``: the offending value, where it may be shown."""
        self._problems.append((self.places.line(path), self._line(path, sentence, value)))

    def warning(self, path: Path, sentence: str, *, value: object = None) -> None:
        """Something that loads, and that the administrator should know."""
        self._warnings.append((self.places.line(path), self._line(path, sentence, value)))

    @property
    def problems(self) -> list[str]:
        return [text for _, text in sorted(self._problems, key=lambda problem: problem[0])]

    @property
    def warnings(self) -> list[str]:
        return [text for _, text in sorted(self._warnings, key=lambda warning: warning[0])]

    def _line(self, path: Path, sentence: str, value: object) -> str:
        label = path_label(path)
        if value is not None and not may_be_secret(path):
            label += f" = {shown(value)}"
        text = f"{self.places.at(path)}: {label}: {sentence}" if label else f"{self.places.at(path)}: {sentence}"
        return UNSHOWABLE.sub("?", text)  # sentences quote the value, too

    # --- Parsing -----------------------------------------------------------------------------------------------------

    def _parse(self, octets: bytes) -> dict[str, Any]:
        if len(octets) > FILE_OCTETS_MAX:
            raise ConfigError([f"{self.path}: the file is larger than {size_text(FILE_OCTETS_MAX)}; make it smaller"])
        try:
            text = octets.removeprefix(b"\xef\xbb\xbf").decode()
        except UnicodeDecodeError as error:
            line = octets.count(b"\n", 0, error.start) + 1
            raise ConfigError([f"{self.path}:{line}: this is not UTF-8; save the file as UTF-8 text"]) from None
        text = text.replace("\r\n", "\n")
        try:
            raw = tomllib.loads(text)
        except RecursionError:
            raise ConfigError([f"{self.path}: lists are nested too deep; a list here holds plain values"]) from None
        except ValueError as error:
            raise ConfigError([f"{self.path}{self._syntax(str(error), text)}"]) from None
        self.places = Places(self.path, text)
        return raw

    def _syntax(self, message: str, text: str) -> str:
        """What tomllib found, as ":line: sentence"."""
        position = _POSITION.search(message)
        line = int(position[1]) if position and position[1] else text.rstrip("\n").count("\n") + 1
        what = _POSITION.sub("", message)
        if position is None:  # a number beyond what Python converts: int() says so, without a position
            return ": a number has too many digits; write a smaller one"
        twice = _TWICE.match(what)
        if twice is not None:
            name = ".".join(part.strip().strip("'\"") for part in twice[1].split(","))
            return f":{line}: [{name}] stands twice; write its keys in one place"
        for words, sentence in _SYNTAX:
            if words in what:
                return f":{line}: {sentence}"
        return f":{line}: this is not TOML: {UNSHOWABLE.sub('?', what)}; mend the line"

    # --- Judging -----------------------------------------------------------------------------------------------------

    def _judge_root(self, name: str, value: object) -> None:
        if name in SECTIONS:
            if isinstance(value, dict):
                parts = SUBTABLES.get(name, {})
                for key in parts.keys() & value.keys():
                    self._judge_part(name, key, value[key])
                table = self._judge(SECTIONS[name], (name,), {k: v for k, v in value.items() if k not in parts})
                if table is not None:
                    self.tables[name] = table
            else:
                self.problem((name,), f"this is one table; write [{name}] and its keys below it")
        elif name in ENTRIES:
            if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
                for index, entry in enumerate(value):
                    self._judge_who(name, index, entry)
                    table = self._judge(ENTRIES[name], (name, index), entry)
                    if table is not None:
                        self.entries[name].append((index, table))
            else:
                self.problem((name,), f"each entry is a table of its own; write [[{name}]] with two brackets")
        elif name in NAMED:
            self._judge_named(name, value)
        else:
            self._unknown((name,), {*SECTIONS, *ENTRIES, *NAMED}, is_table=isinstance(value, dict | list))

    def _judge_part(self, name: str, key: str, value: object) -> None:
        if not isinstance(value, dict):
            self.problem((name, key), f"this is a table; write [{name}.{key}] and its keys below it")
            return
        table = self._judge(SUBTABLES[name][key], (name, key), value)
        if table is not None:
            self.tables[f"{name}.{key}"] = table

    def written_part(self, name: str, key: str) -> bool:
        """Whether the file has a [name.key], valid or not."""
        value = self._raw.get(name)
        return isinstance(value, dict) and key in value

    def _judge_named(self, name: str, value: object) -> None:
        if not isinstance(value, dict):
            self.problem((name,), f"each {name} has a name; write [{name}.NAME] and its keys below it")
            return
        for key, entry in value.items():
            self.names[name].append(key)
            path: Path = (name, key)
            if not isinstance(entry, dict):
                self.problem(path, f"each {name} has a name; write [{name}.NAME] and its keys below it")
                continue
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", key):
                self.problem(path, 'a name is made of letters, digits, "_" and "-"; choose another')
            table = self._judge(NAMED[name], path, entry)
            if table is not None:
                self.named[name][key] = table

    def _judge_who(self, name: str, index: int, entry: dict[str, Any]) -> None:
        who_keys = WHO_KEYS.get(name)
        if who_keys is None:
            return
        given = [key for key in who_keys if key in entry]
        if not given:
            choice = f"{', '.join(who_keys[:-1])} or {who_keys[-1]}"
            self.problem((name, index), f"the entry does not say whom it means; give it one of {choice}")
        elif len(given) > 1:
            self.problem(
                (name, index, given[1]),
                f"the entry has {' and '.join(given)}, which one may read as either or as both; "
                "keep one, and make an entry of its own for each other",
            )

    def _judge(self, model: type[Table], path: Path, raw: dict[str, Any]) -> Table | None:
        try:
            return model.model_validate(raw)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                self._judged(model, path, detail)
            return None

    def _judged(self, model: type[Table], path: Path, detail: ErrorDetails) -> None:
        at: Path = (*path, *detail["loc"])
        kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
        if kind == "extra_forbidden":
            self._unknown(at, set(model.model_fields), is_table=False)
            return
        if kind == "missing":
            self.problem(path, f"{at[-1]} is missing; {_EXAMPLES[str(at[-1])]}")
            return
        if kind == "value_error":
            sentence = str(context["error"])
        elif kind == "literal_error":
            sentence = f"this must be {context['expected']}; write one of them".replace("'", '"')
        elif kind in ("greater_than_equal", "less_than_equal"):
            bound = _shown_bound(model, str(detail["loc"][0]), context.get("ge", context.get("le")))
            side, word = ("least", "more") if kind == "greater_than_equal" else ("most", "less")
            sentence = f"this must be at {side} {bound}; write {bound} or {word}"
        else:
            sentence = _TYPES.get(kind) or f"{detail['msg']}; see the reference of the configuration"
        self.problem(at, sentence, value=value)

    def _unknown(self, path: Path, known: Iterable[str], *, is_table: bool) -> None:
        name = str(path[-1])
        near = get_close_matches(name, sorted(known), n=1, cutoff=0.6)
        what = "table" if is_table else "key"
        homes = [label for label, model in _all_tables() if name in model.model_fields]
        headings = {label.strip("[]").partition(".")[0]: label for label, _ in _all_tables()}
        if near:
            mend = f'did you mean "{near[0]}"?'
        elif name in headings and len(path) > 1:
            mend = f"write {headings[name]} on a line of its own, and its keys below it"
        elif homes and not is_table:
            mend = f"it belongs into {' or '.join(homes)}"
        else:
            mend = "remove it, or see the reference of the configuration for the right name"
        self.problem(path, f"unknown {what}; {mend}")


_TYPES = {
    "string_type": "this must be text; write it in double quotes",
    "bool_type": "this must be true or false; write it without quotes",
    "int_type": "this must be a whole number; write it without quotes",
    "list_type": 'this must be a list; write it as ["one", "two"]',
    "dict_type": "this must be a table; write it under a heading of its own in brackets",
}


def _all_tables() -> list[tuple[str, type[Table]]]:
    return [
        *((f"[{name}]", model) for name, model in SECTIONS.items()),
        *((f"[{name}.{key}]", model) for name, parts in SUBTABLES.items() for key, model in parts.items()),
        *((f"[[{name}]]", model) for name, model in ENTRIES.items()),
        *((f"[{name}.NAME]", model) for name, model in NAMED.items()),
    ]


_EXAMPLES = {
    "address": 'write address = "host:port"',
    "accounts": 'write accounts = ["alice"]',
    "reverse_paths": 'write reverse_paths = ["sales@example.com"]',
    "forward_paths": 'write forward_paths = ["*@example.com"]',
    "backend": 'write backend = "NAME", the NAME of a [backend.NAME]',
}


def _shown_bound(model: type[Table], key: str, bound: object) -> object:
    field = model.model_fields.get(key)
    for form in field.metadata if field is not None else ():
        if isinstance(form, Form) and form.show is not None:
            return form.show(bound)
    return bound


def may_be_secret(path: Path) -> bool:
    """Whether a value here may hold a password, rightly or by mistake."""
    return bool(SECRET_KEYS.intersection(path[1:])) or (path[:1] == ("backend",) and "auth" in path[2:])


def path_label(path: Path) -> str:
    """The table and key as they stand in the file: "[[trust]] network"."""
    if not path:
        return ""
    root, rest = str(path[0]), list(path[1:])
    if root in ENTRIES:
        label = f"[[{root}]]"
        rest = rest[1:] if rest and isinstance(rest[0], int) else rest
    elif root in NAMED:
        label = f"[{root}.{rest.pop(0)}]" if rest else f"[{root}]"
    elif root in SECTIONS:
        part = rest.pop(0) if rest and rest[0] in SUBTABLES.get(root, {}) else ""
        label = f"[{root}.{part}]" if part else f"[{root}]"
    else:
        label = root
    keys = ".".join(str(key) for key in rest if isinstance(key, str))
    return f"{label} {keys}" if keys else label


def shown(value: object) -> str:
    """A value as TOML writes it, on one line and safe on a terminal."""
    if isinstance(value, bool):
        written = "true" if value else "false"
    elif isinstance(value, str):
        written = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, list):
        written = f"[{', '.join(map(shown, value[:4]))}{', ...' if len(value) > 4 else ''}]"
    elif isinstance(value, dict):
        written = "{...}"  # what stands inside may be secret
    elif isinstance(value, date | time):
        written = value.isoformat()
    elif isinstance(value, int) and abs(value) >= 10**18:
        written = "a very large number"  # str() refuses to write the largest
    else:
        written = str(value)
    written = UNSHOWABLE.sub("?", written)
    return written if len(written) <= SHOWN_MAX else f"{written[: SHOWN_MAX - 3]}..."
