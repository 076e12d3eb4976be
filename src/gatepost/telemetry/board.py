"""The state of the gate's processes, from the supervisor to the console: one JSON text in shared memory.

Why: the console answers for processes it does not know; it reads what the supervisor last wrote, whenever it is asked.
Promise: a reader sees one whole state, never half of one and half of the next (a sequence lock: the number is odd while
    the one writer writes; a reader that saw it change reads again).
"""

from __future__ import annotations

import json
import time
from typing import Any

STATE_OCTETS_MAX = 256 << 10
_HEADER_OCTETS = 16  # sequence number, length
_TRIES = 100
_WAIT_S = 0.002  # a writer that was interrupted in the middle gets on


class StatusBoard:
    """A single writer, any number of readers."""

    SIZE_OCTETS = _HEADER_OCTETS + STATE_OCTETS_MAX

    def __init__(self, memory: memoryview) -> None:
        self._header = memory[:_HEADER_OCTETS].cast("Q")
        self._text = memory[_HEADER_OCTETS:]

    def write(self, state: dict[str, Any]) -> None:
        """Replace the state; the supervisor alone calls this.

        Raises:
            ValueError: when the state is larger than the board; the old one stays.
        """
        octets = json.dumps(state, separators=(",", ":")).encode()
        if len(octets) > len(self._text):
            raise ValueError(f"the state has {len(octets)} octets, the board {len(self._text)}")
        self._header[0] += 1
        self._header[1] = len(octets)
        self._text[: len(octets)] = octets
        self._header[0] += 1

    def read(self) -> dict[str, Any]:
        """The state as it was last written; {} before the first time, or when the writer died while it wrote."""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_WAIT_S)
            before = self._header[0]
            if not before:
                return {}
            if before % 2:
                continue
            octets = bytes(self._text[: min(self._header[1], len(self._text))])
            if self._header[0] != before:
                continue
            try:
                state = json.loads(octets)
            except ValueError:  # a processor that shows us another one's writes out of order
                continue
            return state if isinstance(state, dict) else {}
        return {}
