"""Measurements between two moments at which the machine ran at its own pace.

Why: the CPUs of a virtual machine share cores with a neighbour's.  A fixed loop takes twice as long from one second to
    the next, and what runs in an interpreter suffers more than what runs in the kernel: not even ratios hold still.
Promise: which of several measurements counts is decided by the pace before and after it alone, never by what it says.
    Waiting and measuring again take no longer in all than the first measurements did, and one measurement more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from bench import machine

CALM = 1.3  # times the best pace of the run, which is a tenth below the usual one; a neighbour makes it 1.6 to 2
TRIES = 8
WAIT_S = 2.0  # for a calm moment before each of them
FIRST_LOOK = 20
PAUSE_S = 0.05

T = TypeVar("T")


@dataclass(frozen=True)
class Taken(Generic[T]):
    """What was measured, the slower pace of before and after, and how many measurements it took."""

    result: T
    pace_s: float
    tries: int


class Calm:
    """The pace of one run: its best moment, and the time that is left for calm."""

    def __init__(
        self,
        *,
        patient: bool = True,
        pace_s: Callable[[], float] = machine.pace_s,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Looks for a second at the machine.  Not patient: each measurement counts as it comes."""
        self.best_s = float("inf")
        self._patient = patient
        self._pace_s, self._clock, self._sleep = pace_s, clock, sleep
        self._spare_s = 0.0
        for _ in range(FIRST_LOOK):
            self._look()
            self._sleep(PAUSE_S)

    def take(self, measure: Callable[[], T]) -> Taken[T]:
        """Measures until it was calm before and after, or tries or time are used up: then the calmest counts."""
        before = self._wait()
        began = self._clock()
        result = measure()
        self._spare_s += self._clock() - began
        calmest = Taken(result, max(before, self._look()), 1)
        tries = 1
        while self._patient and not self._is_calm(calmest.pace_s) and tries < TRIES and self._spare_s > 0:
            before = self._wait()
            if not self._is_calm(before):
                break  # what is measured now would not be calm either: the time is better spent on the next
            began = self._clock()
            result = measure()
            self._spare_s -= self._clock() - began
            tries += 1
            if (pace_s := max(before, self._look())) < calmest.pace_s:
                calmest = Taken(result, pace_s, 1)
        return Taken(calmest.result, calmest.pace_s, tries)

    def _wait(self) -> float:
        """Until the machine is calm, for WAIT_S at most and what is left; the pace it has then."""
        began = self._clock()
        until = began + min(WAIT_S, self._spare_s if self._patient else 0.0)
        while not self._is_calm(pace_s := self._look()) and self._clock() < until:
            self._sleep(PAUSE_S)
        self._spare_s -= self._clock() - began
        return pace_s

    def _is_calm(self, pace_s: float) -> bool:
        """Judged by the best moment so far: a better one may have come since the pace was taken."""
        return pace_s <= CALM * self.best_s

    def _look(self) -> float:
        took = self._pace_s()
        self.best_s = min(self.best_s, took)
        return took
