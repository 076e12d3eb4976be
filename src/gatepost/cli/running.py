"""``gatepost run``, ``status`` and ``reload``: the gate itself, and the gate that runs."""

from __future__ import annotations

from gatepost import app, config, control
from gatepost.cli import BAD_NEWS, DONE, NOT_DONE
from gatepost.cli.terminal import ConfigOption, JsonOption, say, say_json
from gatepost.errors import GatepostError

_SELFTESTS = {"agrees": "the gate does what its rules say", "disagrees": "the gate does NOT do what its rules say"}


def run(*, config_path: ConfigOption = None) -> int:
    """Run the gate in the foreground.

    Workers and console serve until TERM or INT, which lets messages in transfer finish. HUP, or a change of the file,
    reloads the configuration; one that does not load leaves the one before it in force. Without a configuration the
    embedded default runs: SMTP on 127.0.0.1:2525, mail for example.com kept below ./gatepost-data, nobody trusted.
    Exit code: 0 after the drain, 2 when the gate could not start.
    """
    return app.run(config.find(config_path))


def status(*, config_path: ConfigOption = None, as_json: JsonOption = False) -> int:
    """Say how the running gate is.

    Asks its console, at the address in the configuration. Exit code: 0 ready, 1 not ready, 2 nothing answers.
    """
    loaded = config.load_file(config.find(config_path))
    seen = control.status(loaded.console_address)
    answer = seen.answer
    if as_json:
        say_json({**answer, "sessions_open": seen.sessions_open, "sessions": seen.sessions, "messages": seen.messages})
        return DONE if seen.ready else BAD_NEWS
    say("ready" if seen.ready else "NOT READY", "bold green" if seen.ready else "bold red")
    listeners = ", ".join(f"{listener['name']} at {listener['address']}" for listener in answer.get("listeners", []))
    messages = ", ".join(f"{count:,} {verdict}" for verdict, count in seen.messages.items())
    backends = ", ".join(f"{name} is {state}" for name, state in answer.get("backends", {}).items())
    for title, words in (
        ("listeners", listeners or "none"),
        ("workers", str(answer.get("workers", 0))),
        ("sessions", f"{seen.sessions_open:,} now, {seen.sessions:,} since the start"),
        ("messages", messages or "none"),
        ("backends", backends or "none was asked yet"),
        ("self-test", _SELFTESTS.get(str(answer.get("selftest")), "none has told anything yet")),
    ):
        say(f"{title:<11}{words}")
    for problem in answer.get("problems", []):
        say(f"problem    {problem}", "red")
    for warning in answer.get("warnings", []):
        say(f"warning    {warning}", "yellow")
    return DONE if seen.ready else BAD_NEWS


def reload(*, config_path: ConfigOption = None, as_json: JsonOption = False) -> int:
    """Let the running gate read its configuration again.

    The file is checked first; one that does not load is not even offered. Exit code: 0 the gate took it, 2 it did not,
    or none runs.
    """
    path = config.find(config_path)
    if path is None:
        raise GatepostError("there is no configuration to reload: the embedded default never changes; see --config")
    loaded = config.load_file(path)
    outcome = control.reload(loaded.pid_path, loaded.console_address)
    if as_json:
        say_json({"pid": outcome.pid, "config": path, "taken": outcome.taken, "problems": list(outcome.problems)})
    elif outcome.taken is None:
        say(f"the gate (process {outcome.pid}) was asked to read {path}; its console did not say what came of it")
    elif outcome.taken:
        say(f"the gate (process {outcome.pid}) runs on {path} as it is now")
    else:
        say(f"the gate (process {outcome.pid}) refused {path} and runs on what it had before", "bold red")
        for problem in outcome.problems:
            say(f"  {problem}")
    return NOT_DONE if outcome.taken is False else DONE
