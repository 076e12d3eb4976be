"""Starts a gate for a test as a user would: a gatepost.toml, ``python -m gatepost run``, wait for the line ``ready``.

    with Gate(tmp_path, f'''
        [gate]
        name = "mx.example.com"
        [[listen]]
        name = "mx"
        address = "127.0.0.1:0"
        ...
    ''') as gate:
        smtplib.SMTP("127.0.0.1", gate.port) ...
        gate.sessions()          # the JSON log lines, one a session

What it starts it ends, by process id: the supervisor by SIGTERM, and anything left of its children by SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

READY_S = 30.0
STOP_S = 30.0
REPOSITORY = Path(__file__).resolve().parent.parent


def free_port(host: str = "127.0.0.1") -> int:
    """A port nobody listens on now, and that no outgoing connection will be given."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)  # below what Linux hands out by itself
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port


class GateFailed(AssertionError):
    """The gate did not do what it was told; carries its output."""


class Gate:
    """One running gate.

    Args:
        directory: empty; gets gatepost.toml and the gate's data.
        config: the text of gatepost.toml.
        environment: added to the environment of the process.
        within: a command that runs the program behind it in its own process, such as ``unshare --mount``.

    Attributes:
        port: of the first listener; ``ports`` has the first of each listener by its name.
        console_port: where /metrics, /healthz and /readyz are.
        output: lines of standard output so far, ``errors`` those of standard error.
    """

    def __init__(
        self,
        directory: Path,
        config: str,
        environment: dict[str, str] | None = None,
        *,
        within: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        self.config = directory / "gatepost.toml"
        self.config.write_text(config, encoding="utf-8")
        self.output: list[str] = []
        self.errors: list[str] = []
        self.ports: dict[str, int] = {}
        self.console_port = 0
        self._within = tuple(within)
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
        self._said = threading.Condition()
        self._readers: list[threading.Thread] = []
        self.process: subprocess.Popen[str] | None = None

    # ---- start and stop

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> Self:
        """Start, and return when every listener accepts."""
        self.process = subprocess.Popen(
            [*self._within, sys.executable, "-m", "gatepost", "run", "--config", str(self.config)],
            cwd=self.directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        for stream, lines in ((self.process.stdout, self.output), (self.process.stderr, self.errors)):
            reader = threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            reader.start()
            self._readers.append(reader)
        try:
            self.wait_for_line(lambda text: text.startswith("ready"), READY_S)
            self._find_ports()
        except BaseException:
            self.stop()
            raise
        return self

    def _read(self, stream: Any, lines: list[str]) -> None:
        for line in stream:
            with self._said:
                lines.append(line.rstrip("\n"))
                self._said.notify_all()
        with self._said:
            self._said.notify_all()

    def _find_ports(self) -> None:
        """The ports as the gate says them itself, so that port 0 in the configuration does."""
        ready = next(record for record in self.log() if record.get("event") == "ready")
        for listener in ready["listeners"]:
            self.ports.setdefault(listener["name"], _port(listener["address"]))
        self.console_port = _port(ready["console"].rstrip("/"))

    @property
    def port(self) -> int:
        return next(iter(self.ports.values()))

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def terminate(self) -> None:
        """Ask for an orderly end and return at once."""
        assert self.process is not None
        self.process.terminate()

    def stop(self) -> int:
        """End in order; returns the exit code.  May be called again."""
        process = self.process
        if process is None:
            return 0
        left = self._descendants(process.pid)
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid, started in left.items():
            if _started(pid) == started:  # the same process, not another one with a number used again
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for reader in self._readers:
            reader.join(5.0)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        return process.returncode

    # ---- what it does while it runs

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def reload(self, config: str | None = None) -> None:
        """SIGHUP, with a new gatepost.toml if one is given; returns at once."""
        if config is not None:
            changed = self.config.with_suffix(".new")
            changed.write_text(config, encoding="utf-8")
            changed.replace(self.config)
        self.signal(signal.SIGHUP)

    def processes(self) -> list[int]:
        """The supervisor and all it started."""
        return [self.pid, *self._descendants(self.pid)]

    def workers(self) -> list[int]:
        """The worker processes."""
        return [pid for pid in self._descendants(self.pid) if b"worker" in _command_line(pid)]

    def _descendants(self, pid: int) -> dict[int, str]:
        found: dict[int, str] = {}
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                found[int(child)] = _started(int(child))
                found |= self._descendants(int(child))
        return found

    # ---- what it says

    def log(self) -> list[dict[str, Any]]:
        """The JSON objects on standard output so far."""
        with self._said:
            lines = [line for line in self.output if line.startswith("{")]
        return [json.loads(line) for line in lines]

    def sessions(self) -> list[dict[str, Any]]:
        """The log lines of sessions that have ended."""
        return [record for record in self.log() if record.get("event") == "session"]

    def wait_for_line(self, wanted: Callable[[str], bool], timeout_s: float = 10.0) -> str:
        """The first line of standard output or error that is wanted."""
        end = time.monotonic() + timeout_s
        with self._said:
            while True:
                for line in self.output + self.errors:
                    if wanted(line):
                        return line
                left = end - time.monotonic()
                if left <= 0 or (self.process is not None and self.process.poll() is not None):
                    raise GateFailed(f"no such line from the gate\n{self.said()}")
                self._said.wait(min(left, 0.2))

    def wait_for_session(self, wanted: Callable[[dict[str, Any]], bool], timeout_s: float = 10.0) -> dict[str, Any]:
        """The first session's log line that is wanted."""

        def matches(line: str) -> bool:
            return line.startswith('{"') and (record := json.loads(line)).get("event") == "session" and wanted(record)

        record: dict[str, Any] = json.loads(self.wait_for_line(matches, timeout_s))
        return record

    def said(self) -> str:
        """All output, for a failure's message."""
        return "\n".join(["--- gatepost.toml", self.config.read_text(), "--- output", *self.output, *self.errors])


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _started(pid: int) -> str:
    """When a process started, in clock ticks; "" when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
