"""Do the documents tell the truth?  Prints each "file:line: what is wrong" and exits 1 where they do not.

Why: a document that names a file, a command or a setting that is no longer there costs a reader's trust in the rest.

Checked in every Markdown file that git knows:
- links within the project lead to a file, and to a heading in it;
- paths in code spans exist: from the root, from the document, or (``smtp/path.py``) from src/gatepost;
- names in code spans that end in "()" are defined somewhere in src, tests, bench or scripts;
- commands: ``gatepost NAME --option`` is one that ``gatepost NAME --help`` documents;
- TOML blocks parse, and one that configures a whole gate (a backend and local domains) loads;
- generated pages are what their generator makes now.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "gatepost"

LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FENCE = re.compile(r"^\s*(```+|~~~+)\s*(\w*)")
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$")
PATH = re.compile(r"(?:\./)?(?:[\w.-]+/)+(?:[\w.-]+\.(?:py|md|toml|sh|json|jsonl|smtp|svg|png|lock|service|c)|)")
FUNCTION = re.compile(r"([A-Za-z_][\w.]*)\(\)")
COMMAND = re.compile(r"(?:^|[\s(])(?:\./)?gatepost((?:[ ][^\s`|&;<>()#]+)+)")
SHELL = {"sh", "bash", "console", "shell", "text", ""}
LAUNCHER_WORDS = {"test"}  # what ./gatepost itself does, see the script


class Block(NamedTuple):
    """A fenced block: its first line's number, its language, its text."""

    line: int
    language: str
    text: str


class Document(NamedTuple):
    """One Markdown file, taken apart: prose lines with their numbers, and fenced blocks."""

    path: Path
    prose: list[tuple[int, str]]
    blocks: list[Block]

    def __str__(self) -> str:
        return self.path.relative_to(ROOT).as_posix()


@cache
def document(path: Path) -> Document:
    prose: list[tuple[int, str]] = []
    blocks: list[Block] = []
    fence, language, start, lines = "", "", 0, list[str]()
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        match = FENCE.match(line)
        if fence and line.strip() == fence:
            blocks.append(Block(start, language, "\n".join(lines)))
            fence = ""
        elif fence:
            lines.append(line)
        elif match:
            fence, language, start, lines = match[1], match[2], number + 1, []
        else:
            prose.append((number, line))
    return Document(path, prose, blocks)


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z", "--", *patterns], cwd=ROOT, capture_output=True, check=True)
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).exists()]


# ---------------------------------------------------------------------------------------------------------------- links


@cache
def anchors(path: Path) -> frozenset[str]:
    """What a heading is called in a link: lower case, punctuation dropped, spaces to hyphens, doubles numbered."""
    found: dict[str, int] = {}
    names = set()
    for _, line in document(path).prose:
        if match := HEADING.match(line):
            text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", match[1])
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            count = found.get(slug, 0)
            found[slug] = count + 1
            names.add(f"{slug}-{count}" if count else slug)
        names.update(re.findall(r'<a (?:id|name)="([^"]+)"', line))
    return frozenset(names)


def broken_links(page: Document) -> Iterator[str]:
    for number, line in page.prose:
        for target in LINK.findall(SPAN.sub("", line)):
            if re.match(r"[a-z][a-z0-9+.-]*:", target):
                continue
            name, _, anchor = target.partition("#")
            path = (page.path.parent / name).resolve() if name else page.path
            if not path.exists():
                yield f"{page}:{number}: the link leads nowhere: {target}"
            elif anchor and path.suffix == ".md" and anchor not in anchors(path):
                yield f"{page}:{number}: no such heading: {target}"


# -------------------------------------------------------------------------------------------------- files and functions


@cache
def defined() -> frozenset[str]:
    names = set()
    for path in tracked("src/*.py", "tests/*.py", "bench/*.py", "scripts/*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
    return frozenset(names)


def missing_names(page: Document) -> Iterator[str]:
    for number, line in page.prose:
        for span in SPAN.findall(line):
            if PATH.fullmatch(span) and not any((base / span).exists() for base in (ROOT, page.path.parent, SOURCE)):
                yield f"{page}:{number}: no such file: {span}"
            if (match := FUNCTION.fullmatch(span)) and match[1].rpartition(".")[2] not in defined():
                yield f"{page}:{number}: no such function: {span}"


# ------------------------------------------------------------------------------------------------------------- commands


@cache
def usage(*command: str) -> str | None:
    """What ``gatepost COMMAND --help`` prints, or None where there is no such command."""
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200", "TERM": "dumb"}
    asked = [sys.executable, "-m", "gatepost.cli", *command, "--help"]
    done = subprocess.run(asked, capture_output=True, text=True, env=environment, timeout=60, check=False)
    return done.stdout if done.returncode == 0 and re.search(rf"\b{'.* '.join(command)}\b", done.stdout) else None


def commands_in(page: Document) -> Iterator[tuple[int, str]]:
    for number, line in page.prose:
        for span in SPAN.findall(line):
            yield from ((number, match[1]) for match in COMMAND.finditer(span))
    for block in page.blocks:
        if block.language in SHELL:
            joined = re.sub(r"\\\n\s*", " ", block.text)
            for offset, line in enumerate(joined.splitlines()):
                prompt = re.match(r"\s*[$#] (.*)", line)
                if block.language in ("console", "text", "") and not prompt:
                    continue  # output, not input
                spoken = (prompt[1] if prompt else line).partition(" #")[0]
                yield from ((block.line + offset, match[1]) for match in COMMAND.finditer(spoken))


def wrong_commands(page: Document) -> Iterator[str]:
    for number, text in commands_in(page):
        try:
            words = shlex.split(text)
        except ValueError:
            continue
        command = words[0]
        if command in LAUNCHER_WORDS or not re.fullmatch(r"[a-z][a-z-]*", command):
            continue  # a placeholder such as COMMAND, or an option of the whole
        help_text = usage(command)
        if help_text is None:
            yield f"{page}:{number}: no such command: gatepost {command}"
            continue
        for option in words[1:]:
            name = option.partition("=")[0]
            if re.fullmatch(r"--[a-z][a-z-]*", name) and not re.search(rf"{name}\b", help_text):
                yield f"{page}:{number}: gatepost {command} knows no {name}"


# -------------------------------------------------------------------------------------------------------- configuration


def wrong_configuration(page: Document) -> Iterator[str]:
    for block in page.blocks:
        if block.language != "toml":
            continue
        try:
            table = tomllib.loads(block.text)
        except tomllib.TOMLDecodeError as error:
            yield f"{page}:{block.line}: not TOML: {error}"
            continue
        if "backend" in table and "domains" in table:
            yield from unloadable(f"{page}:{block.line}", block.text)


def unloadable(where: str, text: str) -> Iterator[str]:
    from gatepost.config import load  # noqa: PLC0415 - links are checked even where nothing is installed
    from gatepost.errors import ConfigError  # noqa: PLC0415

    try:
        load(text.encode(), where)
    except ConfigError as error:
        yield from (f"{where}: does not load: {problem}" for problem in error.problems)


def main() -> int:
    problems: list[str] = []
    pages = [document(path) for path in tracked("*.md")]
    for page in pages:
        for check in (broken_links, missing_names, wrong_commands, wrong_configuration):
            problems.extend(check(page))
    print("\n".join(problems) if problems else f"{len(pages)} documents: links, files, commands and settings are right")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
