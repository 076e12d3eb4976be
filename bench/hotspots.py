"""Where the gate's CPU goes: the workers sampled by their own CPU time during one measurement, ranked by function.

Why: profile before changing; an optimisation is kept when it shows here and in ``--baseline``.
Promise: the samples are scaled to the CPU seconds that were measured with them, so that the figures are microseconds a
    unit.  Sampling itself adds a few per cent.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.machine import Failed

SAMPLER = Path(__file__).with_name("sampler")
LINES = 45


def environment(directory: Path) -> dict[str, str]:
    """For a gate whose workers can be sampled."""
    path = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": f"{SAMPLER}{os.pathsep}{path}" if path else str(SAMPLER),
        "GATEPOST_BENCH_SAMPLES": str(directory),
    }


@contextmanager
def recording(pids: list[int], directory: Path) -> Iterator[None]:
    """Samples while the block runs; the files are whole after it."""
    if not pids:
        raise Failed("no worker was found")
    for file in directory.glob("samples-*"):
        file.unlink()
    for pid in pids:
        os.kill(pid, signal.SIGUSR2)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGUSR2)
        deadline = time.monotonic() + 5
        while len(list(directory.glob("samples-*"))) < len(pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.1)


def ranking(directory: Path, cpu_s: float) -> list[str]:
    """Own and total time of functions, and own time of lines.

    Args:
        cpu_s: CPU seconds for 1,000 units: what the samples stand for.
    """
    own: Counter[str] = Counter()
    total: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    for file in directory.glob("samples-*"):
        samples = json.loads(file.read_text())
        own.update(samples["own"])
        total.update(samples["total"])
        lines.update(samples["lines"])
    if not own:
        raise Failed("no worker was sampled")
    us = cpu_s * 1000 / own.total()
    rows = [f"{'us own':>8} {'us total':>9}  function"]
    rows += [f"{n * us:8.1f} {total[name] * us:9.1f}  {name}" for name, n in own.most_common(LINES)]
    rows += ["", f"{'us total':>8} {'us own':>9}  function"]
    rows += [f"{n * us:8.1f} {own[name] * us:9.1f}  {name}" for name, n in total.most_common(LINES)]
    rows += ["", f"{'us own':>8}  line"]
    rows += [f"{n * us:8.1f}  {name}" for name, n in lines.most_common(LINES)]
    return rows
