"""Threads that run plans together: they spin during and shortly after a step, and sleep when none comes."""

from __future__ import annotations

import os
import threading
import time
import weakref
from pathlib import Path

import numpy as np

from edgellm.arrays import Array, address
from edgellm.kernels import Compiler
from edgellm.kernels.layout import (
    ARRIVAL_BYTES,
    CELL,
    CONTROL_CELLS,
    CONTROL_GENERATION,
    CONTROL_RECORDS,
    CONTROL_STEP,
    CONTROL_STOP,
    MOST_THREADS,
    STEP_ARRIVALS,
    STEP_ARRIVED,
    STEP_ROWS,
)  # fmt: skip
from edgellm.kernels.pace import Pace
from edgellm.kernels.run import run, serve

PLAN = slice(CONTROL_RECORDS // CELL, CONTROL_STEP // CELL + 1)
"""Of what a team shares: the records' address, their number, the step's address."""
PATIENCE = 20_000
"""Spins, about a millisecond, that a worker waits for the next step before it sleeps."""


class Team:
    """Up to `n_threads` threads, the caller's one of them. One plan at a time."""

    def __init__(self, compiler: Compiler, n_threads: int | None) -> None:
        self.n_threads = min(n_threads or physical_cores(), MOST_THREADS - 1)
        self._leader, self._pace = _Leader(compiler, self.n_threads), Pace(self.n_threads)
        self._finalizer = weakref.finalize(self, self._leader.stop)

    def finish(self) -> None:
        """End a step that Ctrl-C interrupted, before what it works on is changed."""
        self._leader.finish()

    def run(self, records: Array, step: Array, out: Array | None) -> None:
        """Do a plan; returns when every thread is done. `out`, which the step points to, is kept alive until then."""
        self.finish()
        alone = step[STEP_ROWS // CELL] == 1
        n_threads, started = self._pace.next() if alone else self.n_threads, time.perf_counter()
        self._leader.start(records, step, n_threads, out)
        self._leader.finish()
        if alone:
            self._pace.took(n_threads, time.perf_counter() - started)

    def close(self) -> None:
        self._finalizer()


class _Leader:
    """The caller's part in a team. Ctrl-C may come between any two lines of Python, and leave a step that the workers
    have begun: then the next call, or the end, does the leader's share of it first."""

    def __init__(self, compiler: Compiler, n_threads: int) -> None:
        self._run = compiler.function(run)
        self._control = np.zeros(CONTROL_CELLS, np.int64)
        self._arrivals = np.zeros((n_threads, ARRIVAL_BYTES // CELL), np.int64)
        self._arrivals_address = address(self._arrivals)
        self._workers = [_Worker(compiler, self._control, i) for i in range(1, n_threads)]
        self._begun: tuple[int, Array, Array, int, Array | None] | None = None

    def start(self, records: Array, step: Array, n_threads: int, out: Array | None) -> None:
        control = self._control
        step[STEP_ARRIVALS // CELL], step[STEP_ARRIVED // CELL] = self._arrivals_address, self._arrivals[0, 0]
        control[PLAN] = address(records), len(records), address(step)
        self._begun = self._generation(n_threads), records, step, n_threads, out
        self._post(n_threads)

    def finish(self) -> None:
        """Do this thread's share of the step that was begun, if one was."""
        if self._begun:
            generation, _, _, n_threads, _ = self._begun
            if self._control[CONTROL_GENERATION // CELL] == generation:
                for worker in self._workers[: n_threads - 1]:
                    worker.wake()
                self._run(*self._control[PLAN].tolist(), 0, n_threads)
        self._begun = None

    def _generation(self, n_threads: int) -> int:
        """The next generation: a count, and who is in it. One number, because a worker that is not in a step may look
        while the next one is being written down."""
        return (int(self._control[CONTROL_GENERATION // CELL]) // MOST_THREADS + 1) * MOST_THREADS + n_threads

    def _post(self, n_threads: int) -> None:
        self._control[CONTROL_GENERATION // CELL] = self._generation(n_threads)
        for worker in self._workers[: n_threads - 1]:
            worker.wake()

    def stop(self) -> None:
        self.finish()
        self._control[CONTROL_STOP // CELL] = 1
        self._post(len(self._workers) + 1)
        for worker in self._workers:
            worker.thread.join()


class _Worker:
    def __init__(self, compiler: Compiler, control: Array, number: int) -> None:
        self._serve, self._control, self._number = compiler.function(serve), control, number
        self.asleep, self._wake = False, threading.Semaphore(0)
        self.thread = threading.Thread(target=self._work, name=f"edgellm-{number}", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        seen = 0
        while (seen := self._serve(self._control.ctypes.data, self._number, seen, PATIENCE)) >= 0:
            # Announce first, look again after: one of the two sides sees the other.
            self.asleep = True
            if self._control[CONTROL_GENERATION // CELL] == seen:
                self._wake.acquire()
            self.asleep = False

    def wake(self) -> None:
        """Once too often does no harm: the worker looks, and sleeps again."""
        if self.asleep:
            self._wake.release()


def physical_cores() -> int:
    """Cores that this process may use: its affinity, a container's quota, and not counting hyperthreads twice."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = {_core(cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota() or len(cores)))


def _core(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _quota() -> int | None:
    """Whole CPUs that a control group grants, None without a limit."""
    try:
        granted, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(granted) // int(period))
    except (OSError, ValueError):
        return None
