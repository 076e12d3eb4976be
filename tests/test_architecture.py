"""The architecture's rules that neither import-linter nor ruff can hold, read off the syntax tree.

Why: a rule that is only written down is broken by the third change after it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "gatepost"
MODULES = sorted(SOURCE.rglob("*.py"))

# Where nothing but octets, values and pure tables may be known.
PURE = ("smtp", "facts", "verdict", "policy")
WORLD = {
    "asyncio", "socket", "ssl", "select", "selectors", "threading", "multiprocessing", "subprocess", "signal",
    "time", "random", "secrets", "os", "io", "pathlib", "tempfile", "shutil", "logging", "warnings", "sys",
}  # fmt: skip
PURE_TABLES = {"idna"}

# The tester is an independent witness: what it shared with the accused would be blind in both.
WITNESS = "probe"
ACCUSED = {"policy", "verdict", "facts", "gate", "backend"}

# Where an authority to relay is made, and where one is read back that was stored with its message.
MINTS = {"policy/relay.py", "store/spool.py"}

# The places where a defect of ours is caught whole: a session's task, of SMTP as of POP3 and IMAP, answers 421 or the
# like, counts it and logs the traceback; a check that crashed is TEMPERROR.
CATCHES_ALL = {"gate/session.py", "gate/mailbox_proxy.py", "checks/run.py"}

# One home each for what touches the world through a library.
HOMES = {
    "aiodns": "resolver", "pycares": "resolver", "dns": "resolver",
    "sqlalchemy": "store", "sqlite3": "store", "aiosqlite": "store", "asyncpg": "store",
    "lmdb": "counters", "valkey": "counters",
    "starlette": "console", "uvicorn": "console",
    "OpenSSL": "gate", "argon2": "auth", "scramp": "auth", "joserfc": "auth", "anyldap": "auth",
}  # fmt: skip

NOT_THERE_ON_PURPOSE = {"utils", "common", "helpers", "models", "types", "handlers", "managers", "core"}
LOOSE_ENDS = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|NotImplementedError|pragma: no cover")


def name(module: Path) -> str:
    return module.relative_to(SOURCE).as_posix()


def top(module: Path) -> str:
    """The layer a module belongs to: its package below gatepost, or its own name."""
    return module.relative_to(SOURCE).parts[0].removesuffix(".py")


@cache
def tree(module: Path) -> ast.Module:
    return ast.parse(module.read_text("utf-8"), str(module))


def imports(module: Path) -> Iterator[str]:
    """Every module named in an import, wherever it stands, under TYPE_CHECKING too."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(module)}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(module: Path, function: str) -> Iterator[int]:
    """Lines that call ``function(...)`` or ``something.function(...)``."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            called = node.func
            if (called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")) == function:
                yield node.lineno


def catches_all(handler: ast.ExceptHandler) -> bool:
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(
        exception is None or (isinstance(exception, ast.Name) and exception.id in ("Exception", "BaseException"))
        for exception in caught
    )


each_module = pytest.mark.parametrize("module", MODULES, ids=name)


@each_module
def test_pure_packages_know_nothing_of_the_world(module: Path) -> None:
    if top(module) not in PURE:
        return
    for imported in imports(module):
        first = imported.partition(".")[0]
        assert first not in WORLD, f"{name(module)} imports {imported}"
        ours_or_standard = first == "gatepost" or first in sys.stdlib_module_names
        assert ours_or_standard or first in PURE_TABLES, f"{name(module)} imports {imported}"


@each_module
def test_the_tester_shares_nothing_with_the_accused(module: Path) -> None:
    if top(module) != WITNESS:
        return
    for imported in imports(module):
        parts = imported.split(".")
        assert not (parts[0] == "gatepost" and ACCUSED & set(parts[1:2])), f"{name(module)} imports {imported}"


@each_module
def test_an_admitted_recipient_is_minted_by_the_relay_policy_alone(module: Path) -> None:
    if name(module) not in MINTS:
        assert not list(calls(module, "AdmittedRecipient")), f"{name(module)} mints an AdmittedRecipient"


def test_the_relay_policy_does_mint_admitted_recipients() -> None:
    """Else the test above would guard an empty room."""
    assert list(calls(SOURCE / "policy" / "relay.py", "AdmittedRecipient"))


@each_module
def test_a_library_has_one_home(module: Path) -> None:
    for imported in imports(module):
        home = HOMES.get(imported.partition(".")[0])
        assert home in (None, top(module)), f"{name(module)} imports {imported}, whose home is {home}"


@each_module
def test_everything_is_caught_only_in_the_places_named(module: Path) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ExceptHandler) and catches_all(node):
            reraises = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            assert reraises or name(module) in CATCHES_ALL, f"{name(module)}:{node.lineno} catches everything"


@each_module
def test_no_address_of_a_peer_is_parsed_by_the_standard_library(module: Path) -> None:
    """email and smtplib read addresses more kindly than a relay decision can bear; writing a date is harmless."""
    for imported in imports(module):
        harmless = imported in ("email.utils.formatdate", "email.utils.format_datetime")
        assert harmless or not imported.startswith(("email", "smtplib")), f"{name(module)} imports {imported}"


@each_module
def test_module_says_why_it_is_there(module: Path) -> None:
    assert ast.get_docstring(tree(module)), f"{name(module)} has no docstring"


@each_module
def test_no_loose_ends(module: Path) -> None:
    for number, line in enumerate(module.read_text("utf-8").splitlines(), 1):
        assert not LOOSE_ENDS.search(line), f"{name(module)}:{number}: {line.strip()}"


@each_module
def test_no_drawer_for_what_has_no_home(module: Path) -> None:
    parts = {part.removesuffix(".py") for part in module.relative_to(SOURCE).parts}
    assert not parts & NOT_THERE_ON_PURPOSE


def test_every_exception_of_ours_stands_in_errors() -> None:
    """The children of GatepostError are few, and their tree stands in one docstring."""
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ClassDef) and any(
                isinstance(base, ast.Name) and base.id == "GatepostError" for base in node.bases
            ):
                assert name(module) == "errors.py", f"{name(module)} defines {node.name}"


def test_the_project_depends_on_what_it_imports_and_nothing_else() -> None:
    """Each dependency at run time is imported somewhere, and each import from outside is a dependency."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    optional = [one for extra in project["optional-dependencies"].values() for one in extra]
    declared = {re.split(r"[^A-Za-z0-9-]", one)[0].lower() for one in [*project["dependencies"], *optional]}
    modules = {"prometheus-client": "prometheus_client", "argon2-cffi": "argon2", "pyopenssl": "OpenSSL"}
    wanted = {modules.get(one, one) for one in declared}
    imported = {one.partition(".")[0] for module in MODULES for one in imports(module)}
    outside = {one for one in imported if one not in sys.stdlib_module_names and one != "gatepost"}
    carried = {"annotated_types", "pydantic_core"}  # come with pydantic
    assert outside - carried == wanted


def test_a_worker_imports_neither_the_console_nor_the_command_line() -> None:
    """Memory and start-up of every worker: what only the console or the command line needs stays out of it."""
    program = "import sys, gatepost.gate.server; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"starlette", "uvicorn", "cyclopts", "rich", "pydantic", "prometheus_client"}
