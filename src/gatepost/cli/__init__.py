"""``gatepost``: the command line.

Why: what an administrator types.  Each command stands in a module of its own, loaded when it is typed, so that
    ``gatepost --version`` loads nothing and a mistyped option costs no start of the gate.
Trust: the person at the keyboard; arguments may be copied from mail, so they are parsed and shown as hostile text.
Promise: exit code 0 as wished, 1 the answer is bad news, 2 it could not be done.  Errors go to standard error, with
    ``--json`` also as JSON to standard output; a user's mistake is never a traceback.
Sources: none.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gatepost import __version__
from gatepost.errors import ConfigError, GatepostError

if TYPE_CHECKING:
    from cyclopts import App

DONE, BAD_NEWS, NOT_DONE = 0, 1, 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

# Name, and where it stands; in the order of a new gate's life.
COMMANDS = (
    ("run", "gatepost.cli.running:run"),
    ("init", "gatepost.cli.init:init"),
    ("check", "gatepost.cli.check:check"),
    ("explain", "gatepost.cli.explain:explain"),
    ("trace", "gatepost.cli.trace:trace"),
    ("whosent", "gatepost.cli.whosent:whosent"),
    ("allow", "gatepost.cli.alike:allow"),
    ("deny", "gatepost.cli.alike:deny"),
    ("replay", "gatepost.cli.replay:replay"),
    ("probe", "gatepost.cli.probe:probe"),
    ("selftest", "gatepost.cli.selftest:selftest"),
    ("ban", "gatepost.cli.ban:ban"),
    ("trust", "gatepost.cli.trust:trust"),
    ("account", "gatepost.cli.account:account"),
    ("key", "gatepost.cli.key:key"),
    ("status", "gatepost.cli.running:status"),
    ("console", "gatepost.cli.console:console"),
    ("reload", "gatepost.cli.running:reload"),
    ("completion", "gatepost.cli.completion:completion"),
    ("version", "gatepost.cli.completion:version"),
)


def build() -> App:
    """The commands, none of them loaded yet."""
    from cyclopts import App, Parameter

    app = App(
        name="gatepost",
        help="An SMTP gateway that makes any mail server safe to put on the Internet.",
        version=__version__,
        version_flags=["--version"],
        result_action="return_value",
        default_parameter=Parameter(negative=(), show_default=False),
    )
    for name, place in COMMANDS:
        app.command(place, name=name)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what was typed.

    Returns:
        The exit code.
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    # Arguments and file names may be any octets; whatever the locale, showing them must not fail.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if tokens == ["--version"]:
        sys.stdout.write(f"{__version__}\n")
        return DONE
    try:
        code = _dispatch(_command_first(tokens))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # whoever reads us has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOT_DONE
    return code


def _dispatch(tokens: list[str]) -> int:
    from cyclopts import CycloptsError

    try:
        result = build()(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        command = f" {tokens[0]}" if tokens and tokens[0] in dict(COMMANDS) else ""
        _complain([" ".join(str(error).split()), f"gatepost{command} --help tells more"], tokens)
        return NOT_DONE
    except ConfigError as error:
        _complain(error.problems, tokens)
        return NOT_DONE
    except GatepostError as error:
        _complain([str(error)], tokens)
        return NOT_DONE
    return result if isinstance(result, int) else DONE


def _command_first(tokens: list[str]) -> list[str]:
    """``gatepost --config FILE ban list`` means ``gatepost ban list --config FILE``."""
    for length in (2, 1):
        head, rest = tokens[:length], tokens[length:]
        if head and rest and (head[0] == "--config" if length == 2 else head[0].startswith("--config=")):
            end = rest.index("--") if "--" in rest else len(rest)
            return [*rest[:end], *head, *rest[end:]]
    return tokens


def _complain(sentences: Sequence[str], tokens: Sequence[str]) -> None:
    if "--json" in tokens:
        sys.stdout.write(json.dumps({"valid": False, "problems": list(sentences)}, indent=2) + "\n")
    for sentence in sentences:
        sys.stderr.write(f"gatepost: {printable(sentence)}\n")


def printable(text: str) -> str:
    """Text that can be shown: no control that moves a terminal's cursor or turns the order of its letters."""
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)
