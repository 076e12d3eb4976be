"""What an operator may do to the running gate: see how it is, and let it take its configuration anew.

Why: one function for each, so that the command line and the console cannot differ.
Trust: the operator's own gate answers, at an address from the operator's own file; its answers are bounded even so.
Promise: a process is signalled only while it holds the lock that the gate's supervisor holds.
Sources: flock(2); Prometheus text exposition format 0.0.4.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import time
from http.client import HTTPConnection, HTTPException
from ipaddress import ip_address
from typing import Any, NamedTuple

from gatepost.errors import GatepostError
from gatepost.telemetry import MESSAGES, RELOADS, SESSIONS, SESSIONS_OPEN

ANSWER_OCTETS_MAX = 8 << 20
HTTP_TIMEOUT_S = 5.0
PID_MAX = 1 << 22  # proc(5)

_SAMPLE = re.compile(r"([a-z_]+)(?:\{([^}]*)\})? ([0-9.eE+-]+|NaN)")
_LABEL = re.compile(r'[a-z_]+="([^"]*)"')


class Status(NamedTuple):
    """How the gate is.

    Attributes:
        ready: whether every listener accepts.
        answer: what /readyz said.
        sessions_open, sessions: now, and since the start.
        messages: by verdict, since the start.
    """

    ready: bool
    answer: dict[str, Any]
    sessions_open: int
    sessions: int
    messages: dict[str, int]


class Reloaded(NamedTuple):
    """What came of a reload.

    Attributes:
        pid: the process that was asked.
        taken: True or False as the gate says; None where its console said nothing in time.
        problems: why not.
    """

    pid: int
    taken: bool | None
    problems: tuple[str, ...] = ()


def supervisor(pid_path: str) -> int:
    """The process id of the gate that runs on this data directory.

    Raises:
        GatepostError: there is none; a file that a dead gate left behind counts for nothing, its lock went with it.
    """
    try:
        descriptor = os.open(pid_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise GatepostError(f"no gate runs here: {pid_path}: {error.strerror}") from None
    try:
        number = os.pread(descriptor, 20, 0).strip()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if number.isdigit() and 1 < int(number) <= PID_MAX:
                return int(number)
            raise GatepostError(f"{pid_path} is held, but names no process; try again") from None
        raise GatepostError(f"no gate runs here: {pid_path} was left behind by one that ended")
    finally:
        os.close(descriptor)


def status(console: tuple[str, int]) -> Status:
    """How the running gate is, as its console says.

    Args:
        console: host and port from the configuration.

    Raises:
        GatepostError: nothing answers there.
    """
    code, answer = _get(console, "/readyz")
    try:
        body = json.loads(answer)
    except ValueError:
        body = None
    if not isinstance(body, dict) or code not in (200, 503):
        raise GatepostError(f"what answers at {_at(console)} is not a gate's console")
    _, metrics = _get(console, "/metrics")
    samples = _samples(metrics.decode("utf-8", "replace"))
    return Status(
        ready=code == 200,
        answer=body,
        sessions_open=sum(samples.get(SESSIONS_OPEN.name, {}).values()),
        sessions=sum(samples.get(SESSIONS.name, {}).values()),
        messages={labels[0]: count for labels, count in samples.get(MESSAGES.name, {}).items() if labels},
    )


def reload(pid_path: str, console: tuple[str, int], *, patience_s: float = 15.0) -> Reloaded:
    """Let the gate read its configuration again, and see what came of it.

    Raises:
        GatepostError: there is no gate, or it is another user's.
    """
    pid = supervisor(pid_path)
    before = _reloads(console)
    try:
        os.kill(pid, signal.SIGHUP)
    except OSError as error:
        raise GatepostError(f"the gate (process {pid}) cannot be asked: {error.strerror}") from None
    end = time.monotonic() + patience_s
    while before is not None and time.monotonic() < end:
        time.sleep(0.1)
        after = _reloads(console)
        if after is not None and after["ok"] > before["ok"]:
            return Reloaded(pid, taken=True)
        if after is not None and after["refused"] > before["refused"]:
            return Reloaded(pid, False, tuple(status(console).answer.get("warnings", ())))
    return Reloaded(pid, None)


def _reloads(console: tuple[str, int]) -> dict[str, int] | None:
    try:
        samples = _samples(_get(console, "/metrics")[1].decode("utf-8", "replace"))
    except GatepostError:
        return None
    counts = {labels[0]: count for labels, count in samples.get(RELOADS.name, {}).items() if labels}
    return {"ok": counts.get("ok", 0), "refused": counts.get("refused", 0)}


def _get(console: tuple[str, int], path: str) -> tuple[int, bytes]:
    host, port = console
    if port == 0:
        raise GatepostError("[console] address has port 0, so that nobody can know it; give it a port")
    address = ip_address(host)
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    connection = HTTPConnection(host, port, timeout=HTTP_TIMEOUT_S)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        return response.status, response.read(ANSWER_OCTETS_MAX)
    except (OSError, HTTPException) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or "no answer"
        raise GatepostError(f"no gate's console answers at {_at(console)}: {why}") from None
    finally:
        connection.close()


def _at(console: tuple[str, int]) -> str:
    host, port = console
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _samples(text: str) -> dict[str, dict[tuple[str, ...], int]]:
    """Prometheus text: names to label values to whole numbers."""
    out: dict[str, dict[tuple[str, ...], int]] = {}
    for line in text.splitlines():
        match = _SAMPLE.fullmatch(line)
        if match is not None and match[3] != "NaN":
            labels = tuple(_LABEL.findall(match[2] or ""))
            out.setdefault(match[1], {})[labels] = int(float(match[3]))
    return out
