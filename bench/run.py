#!/usr/bin/env python3
"""The benchmark: the gate, a sink and the peers that are installed, side by side, in interleaved rounds.

    .venv/bin/python bench/run.py [--rounds 3] [--scenarios accept-fresh,idle] [--peers postfix,haproxy] [--json]

Why: a figure counts only beside its peers, in one run, on the same machine, with the same generator and the same sink.
Promise: loopback only; bounded in count and time; ends only what it started.  Exit 0 when every target that could be
    judged is met, 1 when one is missed or a unit failed, 2 when it could not be done.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import hotspots, machine, programs, report
from bench.calm import Calm
from bench.ends import Held, LoadResult, Sink, SinkCounts, raise_file_limit, run_load
from bench.machine import Failed, Ports, Processes
from bench.programs import (
    ELSEWHERE,
    LOCAL,
    Direct,
    Gatepost,
    GatepostBaseline,
    GatepostEverything,
    GatepostLarge,
    GatepostOneWorker,
    GatepostSampled,
    Program,
)

UNITS_MAX = 300_000
IDLE_SESSIONS = 1000
GROWTH_SESSIONS = (10, 50, 200, 1000, 2000)


@dataclass(frozen=True)
class Scenario:
    """One kind of unit.

    Attributes:
        sessions: parallel.
        options: what the generator does.
        refusal: the unit ends with a refusal and no message.
    """

    name: str
    sessions: int
    options: tuple[str, ...]
    refusal: bool = False


SCENARIOS = (
    Scenario("accept-fresh", 50, ("--recipient", LOCAL)),
    Scenario("accept-reuse", 50, ("--recipient", LOCAL, "--messages-each", "100")),
    Scenario("accept-large", 8, ("--recipient", LOCAL, "--messages-each", "10", "--size", str(1 << 20))),
    Scenario("reject-relay", 50, ("--recipient", ELSEWHERE, "--refuse"), refusal=True),
)
NAMES = (*(s.name for s in SCENARIOS), "idle", "growth")


class Bench:
    """One run: the sink, the programs beside each other, and what was measured."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self.arguments = arguments
        self.directory = directory
        self.ports = Ports()
        self.progress("looking how fast the machine is")
        self.calm = Calm(patient=not arguments.no_calm)
        self.sink = Sink(self.ports.free())
        self.running: list[Program] = []
        kinds: tuple[type[Program], ...] = (Gatepost, GatepostEverything, GatepostBaseline, *programs.PEERS, Direct)
        self.results = report.Results(
            machine=machine.describe(),
            accounting="",
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            titles={kind.name: kind.title for kind in kinds},
        )
        self._serial = 0

    def progress(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def start(self, kind: type[Program]) -> Program:
        self.progress(f"starting {kind.title}")
        self._serial += 1
        program = kind(self.directory / f"{self._serial}-{kind.name}", self.ports, self.sink.port)
        self.running.append(program)
        program.start()
        return program

    def stop(self, program: Program) -> None:
        if isinstance(program, Gatepost) and program.processes is not None:
            self._check_log(program)
        program.stop()
        self.running.remove(program)

    def stop_all(self) -> None:
        for program in list(self.running):
            program.stop()
        self.sink.stop()

    # ---- the units

    def measure(self, program: Program, scenario: Scenario, sessions: int, seconds: float) -> report.Sample:
        """One program under one load, and the proof that it did the work."""
        options = [*scenario.options, "--sessions", str(sessions)]
        if self.arguments.pipelining:
            options.append("--pipelining")
        before, cpu_s, busy_s = self.sink.counts(), program.cpu_s(), machine.busy_s()
        sink_cpu_s, started = self.sink.cpu_s(), time.monotonic()
        load = run_load(program.port, options, units=UNITS_MAX, seconds=seconds)
        time.sleep(0.05)  # what the program does after its last reply is its cost, too
        program.settle()
        cpu_s, busy_s = program.cpu_s() - cpu_s, machine.busy_s() - busy_s
        sink_cpu_s, elapsed_s = self.sink.cpu_s() - sink_cpu_s, time.monotonic() - started
        self._prove(program, scenario, load, before)
        program.sessions_opened += load.connections
        mib = load.messages * load.size_octets / (1 << 20)
        return report.Sample(
            program=program.name,
            scenario=scenario.name,
            round=0,
            units=load.units,
            rate=(mib if scenario.name == "accept-large" else load.units) / load.elapsed_s,
            cpu_s=cpu_s / load.units * 1000,
            p50_ms=load.p50_ms,
            p99_ms=load.p99_ms,
            others=max(0.0, busy_s - cpu_s - sink_cpu_s - load.cpu_s) / elapsed_s / machine.cpus(),
        )

    def _prove(self, program: Program, scenario: Scenario, load: LoadResult, before: SinkCounts) -> None:
        after = self.sink.counts()
        arrived, refused = after.messages - before.messages, after.refused - before.refused
        if load.units == 0:
            raise Failed("not one unit was done in the time")
        if arrived != load.messages:
            raise Failed(f"{load.messages} messages were accepted and {arrived} arrived at the sink")
        if scenario.refusal and refused != (0 if program.has_policy else load.units):
            raise Failed(f"{refused} of {load.units} refusals were the sink's: the policy did not decide")
        if after.octets - before.octets < load.messages * load.size_octets:
            raise Failed("fewer octets arrived at the sink than were accepted")
        if after.errors != before.errors:
            raise Failed(f"the sink counted {after.errors - before.errors} commands that were none")

    def _check_log(self, program: Gatepost) -> None:
        """One JSON line a session is part of the work: without it the figures don't count."""
        deadline = time.monotonic() + 3
        while (lines := program.session_lines()) < program.sessions_opened and time.monotonic() < deadline:
            time.sleep(0.1)
        if lines < program.sessions_opened:
            self.results.failures.append(
                f"{program.title}: {lines} log lines for {program.sessions_opened} sessions: lines were dropped"
            )
        else:
            self.results.notes.append(f"{program.title}: {lines:,} log lines for {program.sessions_opened:,} sessions.")

    @contextmanager
    def attempting(self, what: str) -> Iterator[None]:
        """A failed unit ends that measurement with its transcript; the others go on."""
        try:
            yield
        except Failed as failure:
            self.results.failures.append(f"{what}: {failure}")
            time.sleep(1)

    def compare(self, kinds: list[type[Program]], scenarios: list[Scenario]) -> None:
        """The interleaved rounds."""
        beside = self._start_all(kinds)
        if not self.arguments.no_direct:
            beside.append(self.start(Direct))
        for scenario in scenarios:
            for program in beside:
                self.progress(f"{scenario.name}: warming up {program.title}")
                with self.attempting(f"{scenario.name}, {program.title}, warm-up"):
                    self.measure(program, scenario, scenario.sessions, program.warm_up_s)
            for number in range(self.arguments.rounds):
                for program in beside:
                    self.progress(f"{scenario.name}: round {number + 1} of {self.arguments.rounds}, {program.title}")
                    with self.attempting(f"{scenario.name}, {program.title}"):
                        measure = partial(self.measure, program, scenario, scenario.sessions, self.arguments.seconds)
                        taken = self.calm.take(measure)
                        sample = replace(taken.result, round=number, pace_s=taken.pace_s, tries=taken.tries)
                        self.results.samples.append(sample)
                    time.sleep(0.2)
        for program in beside:
            self.stop(program)

    def _start_all(self, kinds: list[type[Program]]) -> list[Program]:
        """The gate must start; a peer that does not is reported and left out."""
        beside = []
        for kind in kinds:
            try:
                beside.append(self.start(kind))
            except Failed as failure:
                if kind is Gatepost:
                    raise
                self.results.missing[kind.name] = str(failure)
                self.running.pop().stop()
        return beside

    def profile(self, scenarios: list[Scenario]) -> None:
        """Where the gate's CPU goes; by itself, since sampling costs a little."""
        program = self.start(GatepostSampled)
        assert isinstance(program, GatepostSampled)
        seconds = max(self.arguments.seconds, 5.0)
        for scenario in scenarios:
            self.progress(f"{scenario.name}: profiling")
            with self.attempting(f"{scenario.name}, profile"):
                self.measure(program, scenario, scenario.sessions, program.warm_up_s)
                with hotspots.recording(program.worker_pids(), program.directory):
                    sample = self.measure(program, scenario, scenario.sessions, seconds)
                self.results.profiles[scenario.name] = hotspots.ranking(program.directory, sample.cpu_s)
        self.stop(program)

    # ---- memory

    def idle(self, kinds: list[type[Program]]) -> None:
        """Fresh instances: what earlier load has left in a heap must not hide what a session takes."""
        for number in range(self.arguments.rounds):
            for kind in kinds:
                if kind is Direct or kind.name in self.results.missing:
                    continue
                self.progress(f"idle: round {number + 1} of {self.arguments.rounds}, {kind.title}")
                with self.attempting(f"idle, {kind.title}"):
                    self._idle(kind, number)

    def _idle(self, kind: type[Program], number: int) -> None:
        program = self.start(kind)
        try:
            assert program.processes is not None
            time.sleep(0.5)
            base = program.processes.memory()
            held = Held(program.port, IDLE_SESSIONS, seconds=30.0)
            try:
                time.sleep(1.0)
                more_kib = program.processes.memory().more_than_kib(base)
            finally:
                still = held.release()
            program.sessions_opened += IDLE_SESSIONS
            if still == 0:
                raise Failed("no session was held")
            self.results.idle.append(report.IdleSample(program.name, number, still, base.total_kib(), more_kib / still))
            if isinstance(program, Gatepost) and still < IDLE_SESSIONS:
                raise Failed(f"only {still} of {IDLE_SESSIONS} sessions were held")
        finally:
            self.stop(program)

    # ---- growth

    def growth(self) -> None:
        fresh = SCENARIOS[0]
        gate, large, single = (self.start(kind) for kind in (Gatepost, GatepostLarge, GatepostOneWorker))
        for program in (gate, large, single):
            with self.attempting(f"growth, {program.title}, warm-up"):
                self.measure(program, fresh, fresh.sessions, program.warm_up_s)
        rows: list[tuple[str, str, Program, int]] = [
            ("parallel sessions", f"{sessions:,}", gate, sessions) for sessions in GROWTH_SESSIONS
        ]
        rows += [
            ("configuration", "plain", gate, 50),
            ("configuration", "10,000 trust entries, 10,000 domains", large, 50),
        ]
        rows += [("workers", "1", single, 50), ("workers", "2", gate, 50)]
        for number in range(self.arguments.rounds):
            for row, step, program, sessions in rows:
                self.progress(f"growth: round {number + 1} of {self.arguments.rounds}, {row}: {step}")
                with self.attempting(f"growth, {row}: {step}"):
                    taken = self.calm.take(partial(self._warm, program, fresh, sessions))
                    sample = taken.result
                    self.results.growth.append(
                        report.GrowthSample(
                            row, step, number, sample.rate, sample.cpu_s, pace_s=taken.pace_s, tries=taken.tries
                        )
                    )
                time.sleep(0.2)
        for program in (gate, large, single):
            self.stop(program)

    def _warm(self, program: Program, scenario: Scenario, sessions: int) -> report.Sample:
        """Others ran since: what a pause costs is not growth."""
        self.measure(program, scenario, sessions, program.warm_up_s)
        return self.measure(program, scenario, sessions, self.arguments.seconds)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of load in each measurement (default 4)")
    parser.add_argument("--scenarios", default=",".join(NAMES), help=f"of {','.join(NAMES)} (default all)")
    parser.add_argument(
        "--peers",
        default=",".join(programs.PEERS_BY_DEFAULT),
        help=f"of {','.join(kind.name for kind in programs.PEERS)}; all; none (default %(default)s)",
    )
    parser.add_argument("--no-gate", action="store_true", help="the peers alone, to try the benchmark itself")
    parser.add_argument("--no-everything", action="store_true", help="leave out the gate with its journal")
    parser.add_argument("--no-direct", action="store_true", help="leave out the row straight into the sink")
    parser.add_argument("--pipelining", action="store_true", help="the clients send MAIL, RCPT and DATA in one segment")
    parser.add_argument(
        "--no-calm", action="store_true", help="take each sample as it comes, however slow the machine is meanwhile"
    )
    parser.add_argument("--profile", action="store_true", help="afterwards, where the gate's CPU goes, by function")
    parser.add_argument("--baseline", metavar="SRC", help="the src directory of another version, as one more peer")
    parser.add_argument("--json", action="store_true", help="every sample, ratio and target as one JSON object")
    options = parser.parse_args(arguments)
    options.scenarios = [name for name in options.scenarios.split(",") if name]
    if unknown := set(options.scenarios) - set(NAMES):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    kinds = {kind.name: kind for kind in programs.PEERS}
    wanted = {"all": list(kinds), "none": []}.get(options.peers, [name for name in options.peers.split(",") if name])
    if unknown := set(wanted) - set(kinds):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    options.peers = [kinds[name] for name in wanted]
    if options.baseline:
        sources = Path(options.baseline).resolve()
        if not (sources / "gatepost").is_dir():
            parser.error(f"{sources} holds no package gatepost")
        GatepostBaseline.sources = str(sources)
        options.peers.insert(0, GatepostBaseline)
    if not 1 <= options.rounds <= 20 or not 0.5 <= options.seconds <= 60:
        parser.error("rounds: 1 to 20; seconds: 0.5 to 60")
    return options


@contextmanager
def workplace() -> Iterator[Path]:
    """A directory that every program's own user may enter."""
    directory = Path(tempfile.mkdtemp(prefix="gatepost-bench-"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def interrupted(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    options = parsed()
    signal.signal(signal.SIGTERM, interrupted)
    raise_file_limit()
    try:
        with workplace() as directory:
            bench = Bench(options, directory)
            try:
                kinds: list[type[Program]] = [] if options.no_gate else [Gatepost, GatepostEverything]
                if options.no_everything:
                    kinds = kinds[:1]
                if kinds and (why := Gatepost.missing()):
                    raise Failed(why)
                for kind in options.peers:
                    if why := kind.missing():
                        bench.results.missing[kind.name] = why
                    else:
                        kinds.append(kind)
                scenarios = [s for s in SCENARIOS if s.name in options.scenarios]
                if "idle" in options.scenarios:
                    bench.idle(kinds)
                if scenarios:
                    bench.compare(kinds, scenarios)
                    if options.profile and not options.no_gate:
                        bench.profile(scenarios)
                if "growth" in options.scenarios and not options.no_gate:
                    bench.growth()
                bench.results.accounting = Processes.accounting()
                bench.results.best_pace_s = bench.calm.best_s
            finally:
                bench.stop_all()
                bench.progress("")
    except Failed as failure:
        print(f"bench: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 2
    results = bench.results
    print(json.dumps(results.as_json(), indent=1) if options.json else report.text(results))
    return 1 if results.failures or not all(j.met for j in results.judgements()) else 0


if __name__ == "__main__":
    sys.exit(main())
