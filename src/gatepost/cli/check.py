"""``gatepost check``: is the configuration right, what does it allow, and is that all?

Why: the one moment when somebody asks.  What the gate would refuse to load because strangers relay is shown here with
    the dialogue by which they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from cyclopts import Parameter

from gatepost import config
from gatepost.cli import BAD_NEWS, DONE, dialect, trust
from gatepost.cli.terminal import ConfigOption, JsonOption, say, say_json
from gatepost.config import dialects, exposure, sentences, settings, surroundings
from gatepost.config.document import Document
from gatepost.errors import ConfigError, GatepostError
from gatepost.gate import interfaces

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
    now = datetime.now(UTC).timestamp()
    octets = config.EMBEDDED_DEFAULT if path is None else config.read(path)
    document = Document(octets, path or config.EMBEDDED_DEFAULT_NAME)
    gate = settings.build(document, now, refuse_open=False)
    settings.console_address(document)
    readings = dialects.readings(
        dialect.recalled(gate.data, gate.backends), gate.rules, settings.smtp_listeners(gate.listens), now
    )
    proof = sentences.proof_facts(settings.prove(document, gate, now), gate.rules, now, readings)
    try:
        loaded = config.load_file(path)
    except ConfigError as error:
        if document.problems or not proof["openings"]:
            raise
        return _refused(document.path, error.problems, proof, as_json=as_json)
    facts = sentences.summary(loaded, now)
    facts["proof"] = proof
    facts["warnings"] += [
        *exposure.without_owner(gate.rules, now),
        *surroundings.look(loaded),
        *surroundings.around(loaded, interfaces.look(), now),
        *trust.warnings(loaded, now),
    ]
    facts["dialects"] = dialect.kept(loaded)
    if as_json:
        say_json(facts)
    else:
        say(sentences.text(facts) + dialect.kept_text(facts["dialects"]))
        _tell(proof)
    return DONE if proof["proven"] or loaded.gate.open_relay else BAD_NEWS


def _refused(path: str, problems: Sequence[str], proof: dict[str, Any], *, as_json: bool) -> int:
    """Nothing is wrong but that strangers relay."""
    if as_json:
        say_json({"config": path, "valid": False, "problems": list(problems), "proof": proof})
    else:
        say("\n".join([f"{path} does not load", "", "Problems", *(f"  {problem}" for problem in problems)]))
        _tell(proof)
    return BAD_NEWS


def _tell(proof: dict[str, Any]) -> None:
    say("")
    say(sentences.proof_text(proof), "bold green" if proof["proven"] else "bold red")
