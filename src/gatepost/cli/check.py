"""``gatepost check``: is the configuration right, and what does it allow?"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from cyclopts import Parameter

from gatepost import config
from gatepost.cli import DONE, dialect, trust
from gatepost.cli.terminal import ConfigOption, JsonOption, say, say_json
from gatepost.config import sentences, surroundings
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
    """Check the configuration, and say in words what it allows.

    Every problem is told at once, with file, line and mend. With --backend it asks the mail servers behind the gate
    instead, and keeps what they answer for later checks. Exit code: 0 it loads, and what a backend answers is well; 1 a
    backend answers what calls for something to be done; 2 it does not load, or a backend cannot be asked.
    """
    path = config.find(config_path)
    loaded = config.load_file(path)
    if backend is not None:
        return dialect.ask_backends(loaded, backend, elsewhere=elsewhere, end_of_data=end_of_data, as_json=as_json)
    if elsewhere or end_of_data:
        raise GatepostError("--elsewhere and --end-of-data go with --backend")
    facts = sentences.summary(loaded, datetime.now(UTC).timestamp())
    facts["warnings"] += surroundings.look(loaded) + trust.warnings(loaded)
    facts["dialects"] = dialect.kept(loaded)
    if as_json:
        say_json(facts)
    else:
        say(sentences.text(facts) + dialect.kept_text(facts["dialects"]))
    return DONE
