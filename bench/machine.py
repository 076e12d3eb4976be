"""Processes and what they cost: CPU seconds, memory, and how busy the machine was with others.

Why: the table stands on three readings of the kernel, taken in one place.
Trust: starts and ends only what ``Processes.start`` was given.
Promise: a program's CPU seconds hold those of all its processes, also of those that came and went in between.  Every
    process that was started has ended when ``stop`` returns.
Sources: proc(5); the kernel's cgroup-v2 document for cpu.stat and cgroup.procs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
STOP_TIMEOUT_S = 10.0
PACE_LOOPS = 400_000  # some 12 ms


class Failed(Exception):
    """A program cannot be measured, or the benchmark cannot go on: the text says why."""


class Ports:
    """Loopback ports below the ephemeral range, each given once."""

    def __init__(self) -> None:
        self._next = 20000 + os.getpid() * 37 % 9000

    def free(self) -> int:
        for port in range(self._next, 32000):
            with socket.socket() as candidate, contextlib.suppress(OSError):
                candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                candidate.bind(("127.0.0.1", port))
                self._next = port + 1
                return port
        raise Failed("no free port below 32000")


def _own_cgroup() -> Path | None:
    """The directory of our own control group where groups may be made below it; None where they may not."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        hierarchy, _, path = line.split(":", 2)
        if hierarchy != "0":
            continue
        for root in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")):
            own = root / path.lstrip("/")
            if (own / "cgroup.procs").exists() and (own / "cpu.stat").exists():
                probe = own / f"gatepost-bench-{os.getpid()}"
                try:
                    probe.mkdir()
                    probe.rmdir()
                except OSError:
                    return None
                return own
    return None


@dataclass(frozen=True)
class Memory:
    """PSS by process: pages of files apart, since their share moves with every other process that maps them."""

    private_kib: dict[int, int]
    file_kib: dict[int, int]

    def total_kib(self) -> int:
        return sum(self.private_kib.values()) + sum(self.file_kib.values())

    def more_than_kib(self, base: Memory) -> int:
        """What was added: private pages of all processes, and all pages of the processes that are new."""
        new = sum(kib for pid, kib in self.file_kib.items() if pid not in base.file_kib)
        return sum(self.private_kib.values()) - sum(base.private_kib.values()) + new


class Processes:
    """One program's processes, children and grandchildren included.

    In a control group of their own where that may be made (exact, and nothing escapes it), else found as the tree below
    the first one (10 ms ticks a process; a child that ended counts when its parent has waited for it).
    """

    _serial = itertools.count()
    _parent: Path | None = None
    _searched = False

    def __init__(self, name: str) -> None:
        if not Processes._searched:
            Processes._parent, Processes._searched = _own_cgroup(), True
        self.name = name
        self.main: subprocess.Popen[bytes] | None = None
        self.group: Path | None = None
        if Processes._parent is not None:
            self.group = Processes._parent / f"gatepost-bench-{os.getpid()}-{next(Processes._serial)}-{name}"
            self.group.mkdir()

    @classmethod
    def accounting(cls) -> str:
        """How CPU seconds are read, for the report."""
        return "control groups" if cls._parent is not None else "process trees"

    def start(
        self,
        arguments: Sequence[str | Path],
        *,
        stdout: Path,
        stderr: Path,
        cwd: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        command = [str(argument) for argument in arguments]
        if shutil.which("setpriv"):  # a benchmark that was killed leaves nothing behind
            command = ["setpriv", "--pdeathsig", "TERM", "--", *command]
        if self.group is not None:  # before the first fork, so that every child is born in the group
            command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.group / "cgroup.procs"), *command]
        with stdout.open("ab") as out, stderr.open("ab") as err:
            self.main = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=cwd,
                env=environment,
                start_new_session=True,  # Postfix's master signals its whole process group
            )

    def alive(self) -> bool:
        return self.main is not None and self.main.poll() is None

    def pids(self) -> list[int]:
        if self.group is not None:
            return [int(pid) for pid in (self.group / "cgroup.procs").read_text().split()]
        if self.main is None:
            return []
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (fields := _stat(int(entry.name))) is not None:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
        found = [self.main.pid]
        for pid in found:
            found.extend(children.get(pid, []))
        return found

    def cpu_s(self) -> float:
        """User and system time since the start, of all processes that there are and were."""
        if self.group is not None:
            return int(_keyed(self.group / "cpu.stat")["usage_usec"]) / 1e6
        ticks = 0
        for pid in self.pids():
            if (fields := _stat(pid)) is not None:
                ticks += sum(int(field) for field in fields[11:15])  # utime, stime, and those of children waited for
        return ticks / TICKS_PER_S

    def memory(self) -> Memory:
        """The proportional set size of each process: a shared page counts in parts."""
        private_kib: dict[int, int] = {}
        file_kib: dict[int, int] = {}
        for pid in self.pids():
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended in between
            except PermissionError:
                raise Failed(f"the memory of {self.name} belongs to another user: root may read it") from None
            kib = {line.split()[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
            file_kib[pid] = kib["Pss_File:"]
            private_kib[pid] = kib["Pss:"] - kib["Pss_File:"]
        return Memory(private_kib, file_kib)

    def stop(self) -> None:
        """TERM to the first process; what is left after STOP_TIMEOUT_S is killed."""
        if self.main is None:
            self._remove_group()
            return
        born = {pid: _started(pid) for pid in self.pids()}

        def left() -> list[int]:
            if self.group is not None:
                return self.pids()
            # A number that another process has got since is not ours.
            return [pid for pid, started in born.items() if started and _started(pid) == started]

        if self.main.poll() is None:
            self.main.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline and (self.main.poll() is None or left()):
            time.sleep(0.02)
        for pid in left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.main.wait()
        self.main = None
        while left() and time.monotonic() < deadline + STOP_TIMEOUT_S:
            time.sleep(0.02)
        self._remove_group()

    def _remove_group(self) -> None:
        if self.group is not None:
            with contextlib.suppress(OSError):
                self.group.rmdir()
            self.group = None


def _keyed(path: Path) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in path.read_text().splitlines() if " " in line)


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third on (state, ppid, pgrp, session, ...); None when the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _started(pid: int) -> str:
    """When the process was started; "" for one that has ended."""
    fields = _stat(pid)
    return "" if fields is None or fields[0] == "Z" else fields[19]


def process_cpu_s(pid: int) -> float:
    """User and system time of one process."""
    fields = _stat(pid)
    return 0.0 if fields is None else (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def busy_s() -> float:
    """CPU seconds that the whole machine has spent, and that its host has taken from it, since it started."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


def _spin(loops: int) -> int:
    total = 0
    for number in range(loops):
        total += number & 7
    return total


def _spin_on(cpu: int, writer: int) -> NoReturn:
    """In a child: writes how long the loop took, and ends whatever happens."""
    try:
        os.sched_setaffinity(0, {cpu})
        _spin(PACE_LOOPS // 8)
        began = time.process_time()
        _spin(PACE_LOOPS)
        os.write(writer, repr(time.process_time() - began).encode())
        os._exit(0)
    finally:
        os._exit(1)


def pace_s() -> float:
    """CPU seconds of a fixed loop, on every CPU at once that we may use; the slowest counts.

    A virtual machine's CPU may be one of two threads of a core: while a neighbour's work runs on the other, the same
    instructions take up to twice as long, and nothing that the kernel counts shows it.
    """
    children: dict[int, int] = {}  # the reading end of its pipe by process
    told = []
    # A handler that raised in a child, before its own try, would run the benchmark a second time.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        for cpu in sorted(os.sched_getaffinity(0)):
            reader, writer = os.pipe()
            try:
                child = os.fork()
                if child == 0:
                    _spin_on(cpu, writer)
                children[child] = reader
            except OSError as error:
                os.close(reader)
                raise Failed(f"the machine's pace cannot be taken: {error}") from None
            finally:
                os.close(writer)
    finally:
        for child, reader in children.items():
            with os.fdopen(reader, "rb") as pipe:
                told.append(pipe.read())
            os.waitpid(child, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    if not all(told):
        raise Failed("the machine's pace cannot be taken: a process that took it died")
    return max(float(took) for took in told)


def cpus() -> int:
    """CPUs of the machine."""
    return os.cpu_count() or 1


def describe() -> str:
    """Machine and noise in one line."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        os.uname().machine,
    )
    python = f"Python {platform.python_version()} ({platform.python_compiler()})"
    load = f"load average at start {os.getloadavg()[0]:.2f}"
    return f"Linux {os.uname().release}, {cpus()} x {model}, {python}, {load}"
