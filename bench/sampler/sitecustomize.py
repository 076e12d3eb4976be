"""Samples the workers of a gate that was started with this directory first on its path; see hotspots.py.

Why: a profiler that looks from outside counts by the clock, which on two cores that program, generator and sink share
    shows who waits for a CPU.  This one is woken after each millisecond of CPU time that the process itself has used,
    kernel time included.
Trust: does nothing but in a worker, and nothing there before SIGUSR2.
Promise: SIGUSR2 starts and stops; at the stop the counts are written to a file of the worker's own.
"""

from __future__ import annotations

import dis
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

INTERVAL_S = 0.001
LOOP = "(event loop)"


class Sampler:
    """Own and total samples by function, own samples by line."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / f"samples-{os.getpid()}.json"
        self._resume = dis.opmap["RESUME"]
        self._own: Counter[str] = Counter()
        self._total: Counter[str] = Counter()
        self._lines: Counter[str] = Counter()

    def toggle(self, _signal: int, _frame: FrameType | None) -> None:
        if signal.getsignal(signal.SIGPROF) == self.sample:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, signal.SIG_IGN)
            self._path.write_text(json.dumps({"own": self._own, "total": self._total, "lines": self._lines}))
        else:
            for counts in (self._own, self._total, self._lines):
                counts.clear()
            signal.signal(signal.SIGPROF, self.sample)
            signal.setitimer(signal.ITIMER_PROF, INTERVAL_S, INTERVAL_S)

    def sample(self, _signal: int, frame: FrameType | None) -> None:
        # The interpreter looks for signals when a function begins and when a call of C returns.  At the beginning of a
        # function the time was its caller's; without a caller it was the event loop's own.
        if frame is not None and frame.f_code.co_code[frame.f_lasti] == self._resume:
            frame = frame.f_back
        if frame is None or frame.f_code.co_name == "_worker_main":
            self._own[LOOP] += 1
            self._lines[LOOP] += 1
        else:
            self._own[_name(frame)] += 1
            self._lines[f"{_name(frame)}:{frame.f_lineno}"] += 1
        names = set()
        while frame is not None:
            names.add(_name(frame))
            frame = frame.f_back
        self._total.update(names)


def _name(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_qualname} ({'/'.join(code.co_filename.rsplit('/', 2)[1:])})"


if "worker" in sys.orig_argv and (directory := os.environ.get("GATEPOST_BENCH_SAMPLES")):
    signal.signal(signal.SIGUSR2, Sampler(Path(directory)).toggle)
