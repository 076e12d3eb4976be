"""``gatepost check``: is the configuration right, what does it allow, and is that all?

Why: the one moment when somebody asks.  What the gate would refuse to load because strangers relay is shown here with
    the dialogue by which they do.
"""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from gatepost import config
from gatepost.answers import proof
from gatepost.cli import BAD_NEWS, DONE, dialect
from gatepost.cli.terminal import ConfigOption, JsonOption, say, say_json
from gatepost.config import sentences
from gatepost.errors import GatepostError

Backend = Annotated[
    list[str] | None,
    Parameter(
        consume_multiple=True,
        help="Ask the backends of these names, or all, how they read addresses and whom they take; with RCPT alone.",
    ),
]
Elsewhere = Annotated[
    str | None,
    Parameter(help="With --backend: the domain to ask for that is not ours. Default: elsewhere.invalid."),
]
EndOfData = Annotated[
    str | None,
    Parameter(
        help="With --backend NAME: ask also what it takes for the end of a message. Sends some ten small messages to "
        "this address of yours."
    ),
]


def check(
    *,
    backend: Backend = None,
    elsewhere: Elsewhere = None,
    end_of_data: EndOfData = None,
    config_path: ConfigOption = None,
    as_json: JsonOption = False,
) -> int:
    """Check the configuration, say in words what it allows, and prove that it allows nothing else.

    Every problem is told at once, with file, line and mend; where strangers may relay, the shortest dialogue by which
    they do. With --backend it asks the mail servers behind the gate instead, and keeps what they answer for later
    checks and for the gate, which refuses strangers what a backend reads as another address. Exit code: 0 it loads,
    and what a backend answers is well; 1 strangers may relay and the file does not say that it means that, or a backend
    answers what calls for something to be done; 2 it does not load for other reasons, or a backend cannot be asked.
    """
    path = config.find(config_path)
    if backend is not None:
        loaded = config.load_file(path)
        return dialect.ask_backends(loaded, backend, elsewhere=elsewhere, end_of_data=end_of_data, as_json=as_json)
    if elsewhere or end_of_data:
        raise GatepostError("--elsewhere and --end-of-data go with --backend")
    octets = config.EMBEDDED_DEFAULT if path is None else config.read(path)
    proven = proof.answer(octets, path or "")
    told = proven.told
    if as_json:
        say_json(told)
        return DONE if proven.well else BAD_NEWS
    if told["valid"]:
        say(sentences.text(told) + dialect.kept_text(told["dialects"]))
    else:
        problems = (f"  {problem}" for problem in told["problems"])
        say("\n".join([f"{told['config']} does not load", "", "Problems", *problems]))
    say("")
    say(sentences.proof_text(told["proof"]), "bold green" if told["proof"]["proven"] else "bold red")
    return DONE if proven.well else BAD_NEWS
