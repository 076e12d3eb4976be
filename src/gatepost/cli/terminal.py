"""What commands say, and the options they share.

Promise: plain text in a pipe; on a terminal bold and colour, unless NO_COLOR or a dumb terminal forbids it.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from gatepost.cli import printable

ConfigOption = Annotated[
    str | None,
    Parameter(
        name="--config",
        help="The configuration file. Default: ./gatepost.toml, then /etc/gatepost/gatepost.toml.",
    ),
]
UnusedConfigOption = Annotated[str | None, Parameter(name="--config", show=False)]
JsonOption = Annotated[bool, Parameter(name="--json", help="Answer in JSON.")]


def say(text: str, style: str = "") -> None:
    """Words for a person, on standard output; long lines are the terminal's to fold."""
    Console(highlight=False, markup=False, emoji=False, soft_wrap=True).print(printable(text), style=style or None)


def say_json(value: dict[str, Any]) -> None:
    """One JSON object for a program, on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def warn(text: str) -> None:
    """A sentence beside the answer, on standard error."""
    sys.stderr.write(f"{printable(text)}\n")
