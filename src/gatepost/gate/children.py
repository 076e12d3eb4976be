"""Child processes: how they are started, how long their successor waits, how they ended.

Trust: a child inherits the descriptors it is given by number and nothing else.
Promise: a process that dies quickly again and again is started ever more slowly, and never given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

Process = asyncio.subprocess.Process


# Content comes in blocks of up to 256 KiB.  glibc would give each back to the kernel at once, to have it zeroed and
# mapped again for the next one: a quarter of the CPU of a large message.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(4 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}


@dataclass(frozen=True, slots=True)
class Times:
    """How patient the supervisor is, in seconds.

    Attributes:
        tick_s: between two looks at everything.
        silent_ticks: a worker that says nothing for so many looks hangs, and is ended.
        quick_s: a process that lived shorter died quickly: its successor waits wait_first_s, then twice as long each
            time, up to wait_max_s.
        start_tries: so many quick deaths of one worker before the gate ever served are a failed start.
        apply_s: in this time all workers have taken a configuration.
        drain_s: content in flight when the gate ends may take so long to arrive and be answered.  A client whose
            content is cut sends the message again, and where its backend had taken it, it arrives twice.
        cut_s: from the end of a process's patience to its death.
        settle_s: changes of a file gather before they are looked at.
        bind_s: at the start, ports that are taken may become free for so long.
    """

    tick_s: float = 5.0
    silent_ticks: int = 12
    quick_s: float = 5.0
    wait_first_s: float = 1.0
    wait_max_s: float = 30.0
    start_tries: int = 3
    apply_s: float = 300.0
    drain_s: float = 60.0
    cut_s: float = 3.0
    settle_s: float = 0.3
    bind_s: float = 3.0


class BackOff:
    """When to start the next one of a kind of process."""

    def __init__(self, times: Times) -> None:
        self._times = times
        self._began_s = 0.0
        self.quick_deaths = 0

    def started(self) -> None:
        self._began_s = time.monotonic()

    def died(self) -> float:
        """Seconds to wait: nothing after a long life; 1, 2, 4, ... after the first, second, third quick death."""
        if time.monotonic() - self._began_s >= self._times.quick_s:
            self.quick_deaths = 0
            return 0.0
        self.quick_deaths += 1
        return float(min(self._times.wait_first_s * 2 ** min(self.quick_deaths - 1, 30), self._times.wait_max_s))


async def spawn(command: Sequence[str], descriptors: Sequence[int]) -> Process:
    """Start a child.

    Raises:
        OSError: it could not be started.
    """
    # In a session of its own: the terminal's Ctrl-C is for the supervisor, who then drains.
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        pass_fds=tuple(descriptors),
        start_new_session=True,
        env={**_MALLOC, **os.environ},  # noqa: TID251  what the gate itself was started with, and ours under it
    )


def send_signal(process: Process | None, number: signal.Signals) -> None:
    """Signal a child, if it still lives."""
    if process is not None and process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


async def end(process: Process, patience_s: float) -> int:
    """Wait for a child that was asked to end; kill it when the patience is over.

    Returns:
        Its return code.
    """
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                return await process.wait()
        send_signal(process, signal.SIGKILL)
        return await process.wait()
    finally:
        send_signal(process, signal.SIGKILL)  # where we were cancelled


def how_it_ended(returncode: int) -> str:
    """The rest of a sentence that begins with the process."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"
