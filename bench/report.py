"""From samples to the table: medians, ratios in one run, and whether each target is met.

Why: only ratios to a peer in the same run are quoted; the targets stand here as data, beside what is measured.
Promise: a ratio is the median over the rounds of ours over the peer's in the same round; nothing is rounded before
    it is judged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from statistics import median

from bench.calm import CALM

GATE = "gatepost"
EVERYTHING = "everything"  # with its journal
BARE = "bare"  # what the machine's Python costs at the least


@dataclass(frozen=True)
class Sample:
    """One program, one scenario, one round.

    Attributes:
        rate: units a second, MiB a second for accept-large.
        cpu_s: CPU seconds of all the program's processes for 1,000 units.
        p50_ms, p99_ms: latency of a unit.
        others: share of the machine's CPU that went to neither program, generator nor sink: noise.
        pace_s: of a fixed loop just before or just after, whichever was slower: a neighbour's noise.
        tries: so often it was measured until it was calm; the calmest counts.
    """

    program: str
    scenario: str
    round: int
    units: int
    rate: float
    cpu_s: float
    p50_ms: float
    p99_ms: float
    others: float
    pace_s: float = 0.0
    tries: int = 1


@dataclass(frozen=True)
class IdleSample:
    """Memory of sessions after the greeting."""

    program: str
    round: int
    held: int
    base_kib: int
    session_kib: float


@dataclass(frozen=True)
class GrowthSample:
    """One step of a row that should stay flat."""

    row: str
    step: str
    round: int
    rate: float
    cpu_s: float
    pace_s: float = 0.0
    tries: int = 1


@dataclass(frozen=True)
class Target:
    """``figure`` of the gate over the peer's in the same round: at least or at most ``bound``."""

    scenario: str
    figure: str
    peer: str
    at_least: float | None = None
    at_most: float | None = None
    program: str = GATE


# The gate with its policy and one JSON log line a session.
TARGETS = (
    *(
        Target(scenario, "cpu_s", "postfix", at_most=bound)
        for scenario, bound in (
            ("accept-fresh", 0.45),
            ("accept-reuse", 0.37),
            ("accept-large", 0.5),
            ("reject-relay", 0.46),
        )
    ),
    *(
        Target(scenario, "rate", peer, at_least=bound)
        for scenario, postfix, haproxy in (
            ("accept-fresh", 2.2, 0.7),
            ("accept-reuse", 2.8, 0.6),
            ("accept-large", 2.0, 0.5),
            ("reject-relay", 2.0, 1.0),
        )
        for peer, bound in (("postfix", postfix), ("haproxy", haproxy))
    ),
    *(
        Target(scenario, "p99_ms", "postfix", at_most=1.0)
        for scenario in ("accept-fresh", "accept-reuse", "accept-large", "reject-relay")
    ),
)
# The same with the journal on, the console open and everything counted.
TARGETS_WITH_EVERYTHING = (
    *(
        Target(scenario, "cpu_s", "postfix", at_most=bound, program=EVERYTHING)
        for scenario, bound in (
            ("accept-fresh", 0.65),
            ("accept-reuse", 0.6),
            ("accept-large", 0.5),
            ("reject-relay", 0.7),
        )
    ),
    *(
        Target(scenario, "rate", peer, at_least=bound, program=EVERYTHING)
        for scenario, postfix, haproxy in (
            ("accept-fresh", 1.6, 0.5),
            ("accept-reuse", 2.0, 0.45),
            ("accept-large", 2.0, 0.5),
            ("reject-relay", 1.5, 0.8),
        )
        for peer, bound in (("postfix", postfix), ("haproxy", haproxy))
    ),
    *(
        Target(scenario, "p99_ms", "postfix", at_most=1.0, program=EVERYTHING)
        for scenario in ("accept-fresh", "accept-reuse", "accept-large", "reject-relay")
    ),
)
FIGURES = {"rate": "throughput", "cpu_s": "CPU for 1,000", "p99_ms": "p99 latency"}
IDLE_KIB_AT_MOST = 12.0
# How flat is flat: a two-core machine that others use repeats itself to about a tenth.  Each is a ratio within a round.
GROWTH_TARGETS = {
    "parallel sessions": ("messages/s, lowest of 50 and more over that of 50", 0.75),
    "configuration": ("CPU for 1,000, plain over large", 0.9),
    "workers": ("CPU for 1,000, one over two", 0.85),
}


@dataclass(frozen=True)
class Judgement:
    """One target and what was measured; ``bare``: the bare trial's own figure, None where it was not measured."""

    scenario: str
    what: str
    measured: float
    bound: float
    met: bool
    at_least: bool
    bare: float | None = None


@dataclass
class Results:
    """All that one run has measured."""

    machine: str
    accounting: str
    rounds: int
    seconds: float
    titles: dict[str, str]
    best_pace_s: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    idle: list[IdleSample] = field(default_factory=list)
    growth: list[GrowthSample] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    profiles: dict[str, list[str]] = field(default_factory=dict)

    def of(self, scenario: str, program: str) -> list[Sample]:
        return [s for s in self.samples if s.scenario == scenario and s.program == program]

    def scenarios(self) -> list[str]:
        return list(dict.fromkeys(s.scenario for s in self.samples))

    def programs(self, scenario: str) -> list[str]:
        return list(dict.fromkeys(s.program for s in self.samples if s.scenario == scenario))

    def ratio(self, scenario: str, figure: str, peer: str, program: str = GATE) -> float | None:
        """The gate's figure over the peer's: the median of the rounds that both have."""
        peers = {s.round: getattr(s, figure) for s in self.of(scenario, peer)}
        ratios = [getattr(s, figure) / peers[s.round] for s in self.of(scenario, program) if peers.get(s.round)]
        return median(ratios) if ratios else None

    def pace(self, sample: Sample | GrowthSample) -> float:
        """How many times as long as in the run's best moment the fixed loop took beside it."""
        return sample.pace_s / self.best_pace_s if self.best_pace_s else 1.0

    def calm(self) -> dict[str, float]:
        """How calm those samples were that count."""
        samples: list[Sample | GrowthSample] = [*self.samples, *self.growth]
        paces = [self.pace(sample) for sample in samples]
        return {
            "best_ms": self.best_pace_s * 1000,
            "calm": CALM,
            "worst": max(paces, default=1.0),
            "samples": len(samples),
            "again": sum(sample.tries > 1 for sample in samples),
            "not_calm": sum(pace > CALM for pace in paces),
        }

    def judgements(self) -> list[Judgement]:
        judged = []
        for target in (*TARGETS, *TARGETS_WITH_EVERYTHING):
            measured = self.ratio(target.scenario, target.figure, target.peer, target.program)
            if measured is not None:
                judgement = _judge(
                    target.scenario,
                    f"{FIGURES[target.figure]} over {self.titles[target.peer].split(',')[0]}"
                    + (", everything on" if target.program == EVERYTHING else ""),
                    measured,
                    at_least=target.at_least,
                    at_most=target.at_most,
                )
                if target.figure != "p99_ms":
                    bare = self.ratio(target.scenario, target.figure, target.peer, BARE)
                    judgement = replace(judgement, bare=bare)
                judged.append(judgement)
        sessions = [s.session_kib for s in self.idle if s.program == GATE]
        if sessions:
            judged.append(_judge("idle", "KiB a session", median(sessions), at_most=IDLE_KIB_AT_MOST))
        for row, (what, bound) in GROWTH_TARGETS.items():
            measured = self._flatness(row)
            if measured is not None:
                judged.append(_judge("growth", f"{row}: {what}", measured, at_least=bound))
        return judged

    def _flatness(self, row: str) -> float | None:
        """The median over the rounds of what GROWTH_TARGETS names."""
        rounds: dict[int, list[GrowthSample]] = defaultdict(list)
        for sample in self.growth:
            # The row of sessions begins with ten, which cannot keep two workers busy: shown, not judged.
            if sample.row == row and sample.step != "10":
                rounds[sample.round].append(sample)
        if row == "parallel sessions":
            ratios = [min(s.rate for s in steps) / steps[0].rate for steps in rounds.values() if len(steps) > 1]
        else:
            ratios = [steps[0].cpu_s / steps[-1].cpu_s for steps in rounds.values() if len(steps) > 1]
        return median(ratios) if ratios else None

    def growth_medians(self, row: str) -> dict[str, tuple[float, float]]:
        steps: dict[str, list[GrowthSample]] = defaultdict(list)
        for sample in self.growth:
            if sample.row == row:
                steps[sample.step].append(sample)
        return {
            step: (median(s.rate for s in samples), median(s.cpu_s for s in samples)) for step, samples in steps.items()
        }

    def as_json(self) -> dict[str, object]:
        return {
            "machine": self.machine,
            "accounting": self.accounting,
            "rounds": self.rounds,
            "seconds": self.seconds,
            "pace": self.calm(),
            "samples": [{**asdict(s), "pace": self.pace(s)} for s in self.samples],
            "idle": [asdict(s) for s in self.idle],
            "growth": [{**asdict(s), "pace": self.pace(s)} for s in self.growth],
            "targets": [asdict(j) for j in self.judgements()],
            "missing": self.missing,
            "failures": self.failures,
            "notes": self.notes,
            "profiles": self.profiles,
        }


def _judge(
    scenario: str, what: str, measured: float, *, at_least: float | None = None, at_most: float | None = None
) -> Judgement:
    if at_least is not None:
        return Judgement(scenario, what, measured, at_least, measured >= at_least, at_least=True)
    assert at_most is not None
    return Judgement(scenario, what, measured, at_most, measured <= at_most, at_least=False)


def table(rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table whose columns line up; the second row is made here."""
    cells = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]

    def line(row: list[str], pad: Callable[[str, int], str] = str.rjust) -> str:
        return (
            f"| {row[0].ljust(widths[0])} | "
            + " | ".join(pad(c, w) for c, w in zip(row[1:], widths[1:], strict=True))
            + " |"
        )

    rule = "|" + "-" * (widths[0] + 2) + "|" + "|".join("-" * (w + 1) + ":" for w in widths[1:]) + "|"
    return [line(cells[0]), rule, *(line(row) for row in cells[1:])]


def number(value: float) -> str:
    """Three significant digits, as a person writes them."""
    if value >= 1000:
        return f"{round(value, -1):,.0f}"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(values: list[float]) -> str:
    """The median, and how far the rounds lie apart."""
    middle = median(values)
    apart = (max(values) - min(values)) / middle if middle else 0.0
    return f"{number(middle)} ±{apart * 50:.0f}%"


def text(results: Results) -> str:
    """The whole report."""
    out = [
        f"{results.machine}; CPU by {results.accounting}.",
        f"Medians of {results.rounds} interleaved rounds of {results.seconds:g} s; ±: half of how far they lie apart.",
        "others: CPU of the machine that went to neither program, generator nor sink.",
        "pace: so many times as long as in the run's best moment a fixed loop took just before or after, at the worst.",
    ]
    if results.samples or results.growth:
        calm = results.calm()
        out.append(
            f"Of {calm['samples']} samples {calm['again']} were measured again; {calm['not_calm']} that count were not"
            f" calm (pace over {calm['calm']:g}, the worst {calm['worst']:.2f}; best moment {calm['best_ms']:.1f} ms)."
        )
    out.append("")
    for scenario in results.scenarios():
        unit = "MiB/s" if scenario == "accept-large" else "units/s"
        peers = [p for p in results.programs(scenario) if p not in {GATE, "direct"}]
        rows = [[scenario, unit, "CPU s for 1,000", "p50 ms", "p99 ms"]]
        rows[0] += ["gate / it: rate", "CPU", "p99", "others", "pace"]
        for program in results.programs(scenario):
            samples = results.of(scenario, program)
            ratios = ["", "", ""]
            if program in peers:
                ratios = [
                    "" if (r := results.ratio(scenario, figure, program)) is None else number(r)
                    for figure in ("rate", "cpu_s", "p99_ms")
                ]
            rows.append(
                [
                    results.titles[program],
                    spread([s.rate for s in samples]),
                    "" if program == "direct" else spread([s.cpu_s for s in samples]),
                    number(median(s.p50_ms for s in samples)),
                    number(median(s.p99_ms for s in samples)),
                    *ratios,
                    f"{median(s.others for s in samples):.0%}",
                    f"{max(results.pace(s) for s in samples):.2f}",
                ]
            )
        out += [*table(rows), ""]
    if results.idle:
        rows = [["idle, after the greeting", "sessions held", "base MiB", "KiB a session"]]
        for program in dict.fromkeys(s.program for s in results.idle):
            idle = [s for s in results.idle if s.program == program]
            rows.append(
                [
                    results.titles[program],
                    f"{min(s.held for s in idle):,}",
                    number(median(s.base_kib for s in idle) / 1024),
                    spread([s.session_kib for s in idle]),
                ]
            )
        out += [*table(rows), ""]
    for row in dict.fromkeys(s.row for s in results.growth):
        rows = [[f"growth: {row}", "messages/s", "CPU s for 1,000", "pace"]]
        for step, (rate, cpu) in results.growth_medians(row).items():
            worst = max(results.pace(s) for s in results.growth if (s.row, s.step) == (row, step))
            rows.append([step, number(rate), number(cpu), f"{worst:.2f}"])
        out += [*table(rows), ""]
    judged = results.judgements()
    if judged:
        rows = [["target", "scenario", "measured", "wanted", "met"]]
        has_bare = any(j.bare is not None for j in judged)
        if has_bare:
            rows[0].append("bare trial")
        for j in judged:
            wanted = f"{'≥' if j.at_least else '≤'} {j.bound:g}"
            rows.append([j.what, j.scenario, number(j.measured), wanted, "yes" if j.met else "NO"])
            if has_bare:
                rows[-1].append("" if j.bare is None else number(j.bare))
        out += [*table(rows), ""]
    out += [f"not measured: {results.titles.get(name, name)}: {why}" for name, why in results.missing.items()]
    out += results.notes
    for scenario, lines in results.profiles.items():
        out += ["", f"{scenario}: microseconds of the workers' CPU a unit", "", *lines]
    out += [f"FAILED: {failure}" for failure in results.failures]
    return "\n".join(out).rstrip()
