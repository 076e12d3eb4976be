"""Where the gate's CPU goes: py-spy on the workers during one measurement, ranked by function.

Why: profile before changing; an optimisation is kept when it shows here.
Promise: the shares are of samples in which a worker was on a CPU; they are scaled to the CPU seconds measured.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.machine import Failed

RATE_HZ = 400
LINES = 30


@contextmanager
def recording(pids: list[int], seconds: float, directory: Path) -> Iterator[list[Path]]:
    """Records while the block runs; the files are whole after it."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        raise Failed("py-spy is not installed")
    if not pids:
        raise Failed("no worker was found")
    files = [directory / f"stacks-{pid}" for pid in pids]
    recorders = []
    for pid, file in zip(pids, files, strict=True):
        command = [program, "record", "--pid", str(pid), "--format", "raw", "--rate", str(RATE_HZ), "--native"]
        command += ["--nonblocking", "--duration", str(int(seconds)), "--output", str(file)]
        recorders.append(
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
    try:
        yield files
        for recorder in recorders:
            recorder.wait(timeout=seconds + 30)
    finally:
        for recorder in recorders:
            if recorder.poll() is None:
                recorder.kill()
                recorder.wait()


def ranking(files: list[Path], cpu_s: float) -> list[str]:
    """Self and total time of each function, in microseconds a unit.

    Args:
        files: raw stacks of the workers.
        cpu_s: CPU seconds for 1,000 units: what the samples stand for.
    """
    own: Counter[str] = Counter()
    total: Counter[str] = Counter()
    samples = 0
    for file in files:
        if not file.exists():
            continue
        for line in file.read_text(errors="replace").splitlines():
            stack, _, count = line.rpartition(" ")
            frames = [_frame(frame) for frame in stack.split(";")]
            samples += int(count)
            own[frames[-1]] += int(count)
            for frame in set(frames):
                total[frame] += int(count)
    if not samples:
        return ["no samples"]
    unit_us = cpu_s * 1000 / samples
    lines = [f"{'us own':>8} {'us total':>9}  function"]
    lines += [f"{n * unit_us:8.1f} {total[f] * unit_us:9.1f}  {f}" for f, n in own.most_common(LINES)]
    lines += ["", f"{'us total':>8} {'us own':>9}  Gatepost's functions"]
    ours = [(f, n) for f, n in total.most_common() if "gatepost" in f][:LINES]
    lines += [f"{n * unit_us:8.1f} {own[f] * unit_us:9.1f}  {f}" for f, n in ours]
    return lines


def _frame(frame: str) -> str:
    """Without the line number: lines of one function count together."""
    return re.sub(r"\(([^()]*?):\d+\)$", r"(\1)", frame.strip())
