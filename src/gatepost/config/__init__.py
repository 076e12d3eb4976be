"""gatepost.toml to each package's own settings: all errors at once, with file and line.

Why: everything that is configured is read in this package and nowhere else; other packages see frozen values.
    ``places`` knows lines, ``values`` reads one value, ``schema`` names tables and keys, ``document`` judges a file
    table by table, ``settings`` joins the tables, ``sentences`` says the result in words.
Trust: an administrator's file, read as root at times: bounded, never executed, its secrets never shown.
Promise: ``load`` gives a whole Config or raises ConfigError with every problem found; there is nothing in between.
    The environment is read in this package alone.
Sources: TOML 1.0.0.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from gatepost.config import settings
from gatepost.config.document import FILE_OCTETS_MAX, Document
from gatepost.config.places import Places
from gatepost.errors import ConfigError
from gatepost.gate.settings import GateSettings

SEARCHED = ("gatepost.toml", "/etc/gatepost/gatepost.toml")

EMBEDDED_DEFAULT_NAME = "embedded default"
EMBEDDED_DEFAULT = b"""\
[gate]
data = "gatepost-data"

[[listen]]
name = "mx"
address = "127.0.0.1:2525"

[domains]
local = ["example.com"]

[backend.mailbox]
address = "embedded:"

[console]
address = "127.0.0.1:8025"
"""


@dataclass(frozen=True, slots=True)
class Config:
    """One loaded configuration.

    Attributes:
        gate: what each worker serves by.
        console_address: host and port of the console.
        user: whose privileges to take after binding, "" for none.
        config_path: the file's path as given, "" for the embedded default.
        warnings: one line a warning, "file:line: ...".
        sources: where each table and key stands.
    """

    gate: GateSettings
    console_address: tuple[str, int]
    user: str
    config_path: str
    warnings: tuple[str, ...] = ()
    sources: Places = field(default_factory=lambda: Places(""), repr=False)

    @property
    def data(self) -> str:
        """The data directory, absolute."""
        return self.gate.data

    @property
    def pid_path(self) -> str:
        """Where the running gate keeps its supervisor's process id."""
        return str(Path(self.gate.data) / "gatepost.pid")


def load(octets: bytes, path: str, *, now: float | None = None) -> Config:
    """The configuration in these octets.

    Args:
        octets: the whole file.
        path: its path, for messages and for what is relative to it; "" for the embedded default.
        now: seconds since the epoch; None for the clock's.

    Raises:
        ConfigError: with every problem, each "file:line: ...".
    """
    document = Document(octets, path or EMBEDDED_DEFAULT_NAME)
    gate = settings.build(document, datetime.now(UTC).timestamp() if now is None else now)
    console_address = settings.console_address(document)
    if document.problems:
        raise ConfigError(document.problems)
    return Config(
        gate=gate,
        console_address=console_address,
        user=settings.user(document),
        config_path=path,
        warnings=tuple(document.warnings),
        sources=document.places,
    )


def embedded_default() -> Config:
    """What the gate runs on where no configuration is found."""
    # Its warnings (the host may have no full name) would send a newcomer to a file that does not exist.
    return replace(load(EMBEDDED_DEFAULT, ""), warnings=())


def find(explicit: str | None = None) -> str | None:
    """The path of the configuration: the one asked for, else the first of ``SEARCHED`` that exists, else None."""
    if explicit is not None:
        return explicit
    return next((path for path in SEARCHED if Path(path).exists()), None)


def read(path: str) -> bytes:
    """The octets of a configuration file.

    Raises:
        ConfigError: when it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            octets = file.read(FILE_OCTETS_MAX + 1)
    except OSError as error:
        mend = "gatepost init writes one" if isinstance(error, FileNotFoundError) else "see its path and permissions"
        raise ConfigError([f"{path}: the configuration cannot be read: {error.strerror}; {mend}"]) from None
    return octets


def load_file(path: str | None) -> Config:
    """The configuration in this file, or the embedded default for None."""
    return embedded_default() if path is None else load(read(path), path)
