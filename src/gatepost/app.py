"""The composition root: the one place where objects are built and joined.

Why: four kinds of process make one gate.  ``run`` is the supervisor; it starts ``python -m gatepost.app worker``,
    ``console`` and ``journal`` and hands them what they need as file descriptors.
Promise: a process imports what its part needs and no more: no web framework in a worker, no SMTP in the console.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING, Any

from gatepost import __version__
from gatepost.errors import GatepostError
from gatepost.telemetry import Level, Metrics, Occupancy, SessionLog, StatusBoard, Style, map_memory

if TYPE_CHECKING:
    from gatepost.config import Config
    from gatepost.console.pages import Answers
    from gatepost.gate.settings import GateSettings
    from gatepost.gate.supervisor import Plan


NICE = 5  # of the journal's writer, nice(2)


def _style() -> Style:
    """Standard output's.  The world is passed in, and this is where it comes from."""
    return Style.of(1, os.environ)  # noqa: TID251  NO_COLOR and TERM are the terminal's, no configuration of ours


# ---- the supervisor


def run(config_path: str | None) -> int:
    """Run the gate in the foreground.

    Args:
        config_path: the configuration file, None for the embedded default.

    Returns:
        The exit code: 0 after a drain, 2 when the gate could not start.
    """
    from gatepost.gate.supervisor import Programs, Supervisor

    _open_standard_descriptors()
    # -P: modules are not looked for in the directory we happen to be started in, which may be anybody's.
    program = (sys.executable, "-P", "-m", "gatepost.app")

    async def supervise() -> None:
        supervisor = Supervisor(
            lambda: _plan(config_path),
            Programs((*program, "worker"), (*program, "console"), (*program, "journal")),
            _style(),
            notify_socket=os.environ.get("NOTIFY_SOCKET", ""),  # noqa: TID251  systemd's
        )
        await supervisor.run()

    try:
        asyncio.run(supervise())
    except GatepostError as error:
        print(error, file=sys.stderr)  # noqa: T201  the log is for a gate that runs
        return 2
    return 0


def _open_standard_descriptors() -> None:
    """Where standard output is closed, the next socket would get its number, and the log would be written to it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one


def _plan(config_path: str | None) -> Plan:
    """What the supervisor needs to know of the configuration as it is now."""
    from gatepost import config
    from gatepost.gate.supervisor import Plan

    if config_path is None:
        octets, loaded = config.EMBEDDED_DEFAULT, config.embedded_default()
    else:
        octets = config.read(config_path)
        loaded = config.load(octets, config_path)
    gate = loaded.gate
    return Plan(
        octets=octets,
        path=config_path or "",
        workers=gate.workers,
        data=gate.data,
        listens=gate.listens,
        user=loaded.user,
        console=loaded.console_address,
        console_where=loaded.sources.at(("console", "address")),
        sessions=gate.limits.sessions,
        backends=tuple(backend.name for backend in gate.backends),
        journal=gate.journal if gate.journal.enabled else None,
        watch=tuple(dict.fromkeys(path for path in (config_path, *chain.from_iterable(gate.tls.certificates)) if path)),
        introduction=_introduction(loaded) if config_path is None else (),
        warnings=(*loaded.warnings, *_around(loaded)) if config_path is not None else (),
    )


def _around(loaded: Config) -> list[str]:
    """Trusted networks that hold addresses which hide others, as this host stands now."""
    from gatepost.config import surroundings
    from gatepost.gate import interfaces

    return surroundings.around(loaded, interfaces.look(), datetime.now(UTC).timestamp())


def _introduction(default: Config) -> tuple[str, ...]:
    domains = ", ".join(entry.pattern for entry in default.gate.rules.local)
    return (
        "no configuration file was found: this is the embedded default, for a first look",
        f"mail for {domains} is taken from anybody and kept under {default.data}; nobody may relay",
        "`gatepost init` writes a real configuration",
    )


# ---- a worker


def _worker_main(options: argparse.Namespace) -> int:
    from gatepost.gate.channel import Channel
    from gatepost.gate.server import Server
    from gatepost.gate.worker import Worker, abandon

    try:
        metrics = Metrics(map_memory(options.metrics), options.index)
        occupancy = Occupancy(map_memory(options.occupancy), options.index)
    except ValueError as error:  # made by another version of this program
        print(error, file=sys.stderr)  # noqa: T201  there is no log yet
        return 2
    log = SessionLog(1, _style(), lock=options.metrics, dropped=metrics.log_dropped)
    # A server name that is no ASCII (SNI) raises inside the TLS library, where nobody can catch it: a client's fault.
    sys.unraisablehook = lambda caught: log.event("tls", f"a handshake failed: {caught.exc_value!r}", Level.NOTE)
    # Garbage in cycles is rare here, and a pass over everything is a pause for every session.
    gc.set_threshold(50_000, 20, 50)

    async def serve() -> int:
        server = Server(worker=options.index, workers=options.workers, metrics=metrics, log=log, occupancy=occupancy)
        channel = Channel(socket.socket(fileno=options.channel))
        try:
            return await Worker(server, channel, log, _gate_settings).run()
        finally:
            channel.close()
            await abandon()

    loop = _new_event_loop()
    try:
        return loop.run_until_complete(serve())
    finally:
        log.close()


def _gate_settings(octets: bytes, path: str) -> GateSettings:
    from gatepost import config

    return config.load(octets, path).gate


def _new_event_loop() -> asyncio.AbstractEventLoop:
    new: Callable[[], asyncio.AbstractEventLoop]
    try:
        from uvloop import new_event_loop as new
    except ImportError:
        new = asyncio.new_event_loop
    return new()


# ---- the console


def _console_main(options: argparse.Namespace) -> int:
    from gatepost import config
    from gatepost.console import server
    from gatepost.console.login import Login

    octets = os.pread(options.config, os.fstat(options.config).st_size, 0)
    os.close(options.config)
    loaded = config.load(octets, options.path)
    metrics = Metrics(map_memory(options.metrics, writable=False), 0)
    board = StatusBoard(map_memory(options.board, writable=False))
    answers = _answers(loaded, octets)
    app = server.application(metrics, board, __version__, answers, lambda: Login.in_data(loaded.data))
    asyncio.run(server.serve(app, socket.socket(fileno=options.socket), socket.socket(fileno=options.lifeline)))
    # Who asked has been told.  A thread that looks for an answer still must not keep the next console waiting.
    os._exit(0)


def _answers(loaded: Config, octets: bytes) -> Answers:
    """What the console's pages ask, of the configuration in force.

    What answers is loaded when first it is asked: most consoles are asked for counts and health alone.
    """
    from gatepost.answers import described
    from gatepost.console.pages import Answers

    def explain(asked: Mapping[str, str]) -> dict[str, Any]:
        from gatepost.answers import explained

        return explained.answer(loaded, asked)

    def in_words(told: dict[str, Any]) -> list[tuple[str, str]]:
        from gatepost.answers import explained

        return explained.lines(told)

    def proved() -> dict[str, Any]:
        from gatepost.answers import proof

        return proof.answer(octets, loaded.config_path).told

    def selftest(listeners: list[Any]) -> dict[str, Any]:
        from gatepost.answers import tried

        return tried.as_object(asyncio.run(tried.compared(loaded.gate, listeners, lambda _: None)))

    return Answers(
        explain=explain,
        in_words=in_words,
        proof=proved,
        selftest=selftest,
        names=frozenset({loaded.gate.name}),
        tls_versions=described.TLS_VERSIONS,
        now_s=lambda: datetime.now(UTC).timestamp(),
    )


# ---- the journal's writer


def _journal_main(options: argparse.Namespace) -> int:
    from gatepost import config
    from gatepost.store.keeper import Keeper

    os.nice(NICE)  # it can wait, and sessions cannot
    octets = os.pread(options.config, os.fstat(options.config).st_size, 0)
    os.close(options.config)
    metrics = Metrics(map_memory(options.metrics), options.index)
    log = SessionLog(1, _style(), lock=options.metrics, dropped=metrics.log_dropped)
    gate = config.load(octets, options.path).gate
    keeper = Keeper(gate.data, gate.journal, metrics, log, lambda: datetime.now(UTC).timestamp())
    try:
        keeper.run(socket.socket(fileno=options.lifeline))
    finally:
        log.close()
    return 0


# ---- the entrance of child processes


def main(arguments: Sequence[str]) -> int:
    """The supervisor's children; nobody types this."""
    parser = argparse.ArgumentParser(prog="python -m gatepost.app", description="Started by `gatepost run`.")
    parts = parser.add_subparsers(required=True)
    worker = parts.add_parser("worker")
    worker.set_defaults(main=_worker_main)
    for option in ("--channel", "--metrics", "--occupancy", "--index", "--workers"):
        worker.add_argument(option, type=int, required=True)
    console = parts.add_parser("console")
    console.set_defaults(main=_console_main)
    for option in ("--socket", "--metrics", "--board", "--config", "--lifeline"):
        console.add_argument(option, type=int, required=True)
    console.add_argument("--path", required=True)
    journal = parts.add_parser("journal")
    journal.set_defaults(main=_journal_main)
    for option in ("--config", "--metrics", "--index", "--lifeline"):
        journal.add_argument(option, type=int, required=True)
    journal.add_argument("--path", required=True)
    options = parser.parse_args(arguments)
    # The terminal's signals are for the supervisor alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    faulthandler.enable()  # what hangs is ended with SIGABRT, and shows where it hung
    return int(options.main(options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
