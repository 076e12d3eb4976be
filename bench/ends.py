"""The two ends of the benchmark: load.c compiled, its sink running, its generator run once a measurement.

Promise: the sink's counts are exact at the moment they are asked for.  A generator that met one unexpected reply raises
    Failed with the transcript of that session.
"""

from __future__ import annotations

import functools
import hashlib
import json
import resource
import shutil
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

from bench.machine import Failed, process_cpu_s

SOURCE = Path(__file__).with_name("load.c")
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "bench"
STRANGERS = (
    "127.0.0.3-127.0.0.66"  # sixty-four clients: no port of one is used up, no limit of one is all that is measured
)


@functools.cache
def compiled() -> Path:
    """The path of the program, compiled when its source has changed."""
    program = CACHE / f"load-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}"
    if program.exists():
        return program
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Failed("load generator and sink are C: install a compiler (cc)")
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE.parent / ".gitignore").write_text("*\n")
    fresh = program.with_suffix(".new")
    subprocess.run([compiler, "-O2", "-std=gnu11", "-Wall", "-Wextra", "-o", fresh, SOURCE], check=True)
    fresh.replace(program)
    return program


def raise_file_limit() -> None:
    """Thousands of sessions: programs started from here inherit the limit."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@dataclass(frozen=True)
class SinkCounts:
    """What has arrived since the sink was started."""

    connections: int
    open: int
    open_max: int
    messages: int
    recipients: int
    refused: int
    octets: int
    resets: int
    errors: int


class Sink:
    """The backend of every program under test."""

    def __init__(self, port: int, refuse: str = "elsewhere.test") -> None:
        self.port = port
        self._process = subprocess.Popen(
            [compiled(), "sink", "--listen", f"127.0.0.1:{port}", "--refuse", refuse],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        if self._line() != "ready":
            raise Failed("the sink did not start")

    def counts(self) -> SinkCounts:
        self._process.send_signal(signal.SIGUSR1)
        return SinkCounts(**json.loads(self._line()))

    def cpu_s(self) -> float:
        return process_cpu_s(self._process.pid)

    def stop(self) -> SinkCounts | None:
        """Ends it; its last counts, None when it had died or been stopped before."""
        assert self._process.stdout is not None
        if self._process.stdout.closed:
            return None
        if self._process.poll() is None:
            self._process.terminate()
        last = self._line()
        self._process.wait()
        self._process.stdout.close()
        return SinkCounts(**json.loads(last)) if last else None

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode().strip()


@dataclass(frozen=True)
class LoadResult:
    """One run of the generator.  Latencies are of a unit: the session with one message each, else the message."""

    units: int
    messages: int
    connections: int
    elapsed_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    cpu_s: float
    size_octets: int


def run_load(port: int, options: list[str], *, units: int, seconds: float) -> LoadResult:
    """Raises Failed with the transcript when one reply was not the expected one."""
    command = [str(compiled()), "load", "--to", f"127.0.0.1:{port}", "--from", STRANGERS]
    command += ["--units", str(units), "--seconds", str(seconds), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if run.returncode != 0:
        raise Failed(run.stderr.strip() or f"the generator ended with {run.returncode}")
    return LoadResult(**json.loads(run.stdout))


class Held:
    """Sessions held after the greeting, while the block lasts."""

    def __init__(self, port: int, sessions: int, seconds: float) -> None:
        command = [str(compiled()), "load", "--to", f"127.0.0.1:{port}", "--from", STRANGERS, "--hold"]
        command += ["--sessions", str(sessions), "--seconds", str(seconds)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._watchdog = threading.Timer(seconds + 60, self._process.kill)
        self._watchdog.daemon = True
        self._watchdog.start()
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise Failed("the generator could not hold sessions")
        self.sessions = int(json.loads(line)["held"])

    def release(self) -> int:
        """Ends them; how many were still open."""
        output, _ = self._process.communicate()
        self._watchdog.cancel()
        return int(json.loads(output)["held"]) if output else 0
