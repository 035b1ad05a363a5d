"""How many threads a step takes: all of them, or fewer while other programs keep cores busy.

Threads wait for each other after every op, so one that the system has put aside stops all: with one busy neighbour on
two cores, two threads decode at half the speed of one. Results do not depend on the number of threads, so it may
change from step to step; what is fastest is found by trying.
"""

from __future__ import annotations

PROBE = 40
"""Steps from one try of another number of threads to the next."""
WEIGHT = 0.25
"""Of the newest time in the running mean of a number of threads."""
MARGIN = 0.95
"""Another number of threads must take less than this share of the present one's time."""


class Pace:
    """For steps of one row, which are alike; any others take all threads."""

    def __init__(self, n_threads: int) -> None:
        self._choices = sorted({n_threads, max(1, n_threads - 1), 1}, reverse=True)
        self._seconds: dict[int, float] = {}
        self._best, self._steps = n_threads, 0

    def next(self) -> int:
        """The number of threads for the next step."""
        self._steps += 1
        if self._steps % PROBE:
            return self._best
        others = [n for n in self._choices if n != self._best]
        return others[self._steps // PROBE % len(others)] if others else self._best

    def took(self, n_threads: int, seconds: float) -> None:
        """Learn how long a step took."""
        mean = self._seconds.get(n_threads, seconds)
        # A try comes too seldom to be averaged: a neighbour that has gone would be noticed after minutes.
        self._seconds[n_threads] = seconds if n_threads != self._best else mean + WEIGHT * (seconds - mean)
        most = MARGIN * self._seconds.get(self._best, seconds)
        for n, taken in self._seconds.items():
            if taken < most:
                self._best, most = n, taken
