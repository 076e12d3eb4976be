"""``gatepost init``: a first configuration, asked for or taken from options."""

from __future__ import annotations

import os
import pwd
import socket
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NamedTuple

from cyclopts import Parameter
from rich.prompt import Prompt

from gatepost import config, draft
from gatepost.cli import DONE, dialect
from gatepost.cli.terminal import say
from gatepost.config import values
from gatepost.errors import GatepostError

DEFAULT_OUTPUT = "gatepost.toml"
USER = "gatepost"


class Question(NamedTuple):
    """One thing to know.

    Attributes:
        judge: the written answer to what stands in the file; ValueError with a sentence where it is wrong.
        needed: what is not said where there is no answer; "" where there need be none.
        single: whether one answer is all there may be.
    """

    option: str
    words: str
    default: str
    judge: Callable[[str], str]
    needed: str = ""
    single: bool = False


def init(
    *,
    name: Annotated[str | None, Parameter(help="This gate's name in DNS. Default: the host's own full name.")] = None,
    listen: Annotated[
        list[str] | None, Parameter(help="address:port to listen on; repeatable. Default: 0.0.0.0:25.")
    ] = None,
    local_domain: Annotated[list[str] | None, Parameter(help="A domain whose mail is ours; repeatable.")] = None,
    backend: Annotated[
        str | None,
        Parameter(help='The mail server: "host:port", "lmtp:/path" or "embedded:" for mailboxes of the gate\'s own.'),
    ] = None,
    trust: Annotated[
        list[str] | None, Parameter(help="A network or host name that may send anywhere; repeatable. Default: none.")
    ] = None,
    data: Annotated[str | None, Parameter(help="The directory of what the gate keeps.")] = None,
    output: Annotated[
        str | None, Parameter(name=["--output", "--config"], help="The file to write. Default: gatepost.toml.")
    ] = None,
    force: Annotated[bool, Parameter(help="Overwrite the file if there is one.")] = False,
    non_interactive: Annotated[bool, Parameter(help="Ask nothing.")] = False,
) -> int:
    """Write a first configuration, with a comment for every choice.

    On a terminal it asks for what the options leave open; with --local-domain and --backend, or in a pipe, it asks
    nothing. It looks at the backend, says what that offers, asks it how it reads addresses and whom it takes (see
    `gatepost check --backend`), and loads what it wrote before it leaves it. Exit code: 0 written, 2 not.
    """
    output = output or DEFAULT_OUTPUT
    asks = not non_interactive and not (local_domain and backend) and sys.stdin.isatty() and sys.stdout.isatty()
    if not force and (Path(output).exists() or Path(output).is_symlink()):
        raise GatepostError(f"{output} is there already; --force overwrites it, --output writes another")
    if asks:
        say(f"This writes {output}. Enter alone takes what stands in brackets.", "bold")
    (gate_name,) = _answers(_name_question(), [name] if name else None, asks=asks)
    listens = _answers(_LISTEN, listen, asks=asks)
    local = _answers(_LOCAL, local_domain, asks=asks)
    (server,) = _answers(_BACKEND, [backend] if backend else None, asks=asks)
    trusted = _answers(_TRUST, trust, asks=asks)
    in_etc = Path(output).absolute().is_relative_to("/etc")
    data = data or ("/var/lib/gatepost" if in_etc else "gatepost-data")
    sighting = draft.look_at(values.backend_address(server), gate_name)
    answers = draft.Answers(gate_name, listens, local, server, trusted, data, _user())
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    octets = draft.text(answers, sighting, date).encode()
    loaded = config.load(octets, output)
    meant = dialect.first_look(loaded) if sighting.reached else []
    octets = draft.text(answers, sighting, date, [finding.sentence for finding in meant if finding.warning]).encode()
    loaded = config.load(octets, output)
    draft.write(output, octets, overwrite=force)
    say(f"backend {server}: {sighting.words}", "" if sighting.reached else "yellow")
    for finding in meant:
        say(f"- {finding.sentence}", "yellow" if finding.warning else "")
    for warning in loaded.warnings:
        say(f"warning {warning}", "yellow")
    say(f"{output} is written. `gatepost check` says what it allows, `gatepost run` starts the gate.", "bold")
    return DONE


def _own_name() -> str:
    name = socket.getfqdn()
    try:
        return values.domain(name) if "." in name else ""
    except ValueError:
        return ""


def _user() -> str:
    """The gate's own user, where root sets up a gate and the user exists."""
    try:
        pwd.getpwnam(USER)
    except KeyError:
        return ""
    return USER if os.geteuid() == 0 else ""


def _listen(written: str) -> str:
    return values.address_text(*values.listen_address(written))


def _backend(written: str) -> str:
    values.backend_address(written)
    return written


def _name_question() -> Question:
    return Question(
        "--name",
        "This gate's name in DNS",
        _own_name(),
        values.domain,
        "the gate's name in DNS, which this host does not know itself,",
        single=True,
    )


_LISTEN = Question("--listen", "Listen on, address:port", f"{values.ANY_IPV4}:25", _listen, "where clients come to")
_LOCAL = Question("--local-domain", "Domains whose mail is ours", "", values.local_domain, "whose mail is ours")
_BACKEND = Question(
    "--backend",
    'The mail server, host:port, or "embedded:" for a trial',
    "",
    _backend,
    "where accepted mail goes",
    single=True,
)
_TRUST = Question("--trust", "Networks or hosts that may send anywhere (Enter for none)", "", draft.grantee)


def _answers(question: Question, given: list[str] | None, *, asks: bool) -> tuple[str, ...]:
    """Given by the option, asked for, or the default; a wrong answer is asked for again where somebody can be asked."""
    asks = asks and given is None
    while True:
        words = given if given is not None else _ask(question) if asks else question.default.split()
        try:
            answers = tuple(map(question.judge, words))
        except ValueError as error:
            wrong = str(error)
        else:
            if question.single and len(answers) > 1:
                wrong = "write one; more can be added to the file"
            elif question.needed and not answers:
                wrong = f"{question.needed} is not said"
            else:
                return answers
        if not asks:
            raise GatepostError(f"{question.option}: {wrong}")
        say(f"  {wrong}", "red")


def _ask(question: Question) -> list[str]:
    try:
        answer = Prompt.ask(question.words, default=question.default, show_default=bool(question.default))
    except EOFError:
        raise GatepostError("the answers ended before the questions; nothing is written") from None
    return answer.replace(",", " ").split()
