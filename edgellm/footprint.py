"""What a model takes of a machine's memory, known before it runs, what the machine has, and what this process took."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from edgellm.errors import OutOfMemoryError


class Share(NamedTuple):
    """What a model may take for what it remembers."""

    slots: int
    cache_bytes: int
    """What slots at rest hold besides."""


@dataclass(frozen=True)
class Footprint:
    """Bytes."""

    weights: int
    """Of the mapped file: the system may drop them and read them again, slowly."""
    cache: int
    """What one slot remembers when its context is full; taken as it fills."""
    arena: int
    """What ops leave for each other."""
    adapters: int = 0
    """Low-rank adapters that are loaded."""

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.cache + self.arena

    def share(self, room: int | None, wanted: int, least: int = 1) -> Share | None:
        """So many slots with full contexts as are wanted or fit into `room` bytes, weights apart, and what fits besides
        of one more context at rest; None if fewer than `least` slots fit. A room of None: nobody knows."""
        if room is None:
            return Share(wanted, self.cache)
        room = max(0, room - self.arena - self.adapters)
        contexts = room // max(1, self.cache)
        if contexts < least:
            return None
        slots = min(wanted, max(least, contexts - 1))
        return Share(slots, min(self.cache, room - slots * self.cache))

    def held(self, share: Share) -> int:
        """All that a model may come to take, weights included."""
        return self.weights + self.adapters + self.arena + share.slots * self.cache + share.cache_bytes

    def check(self, available: int | None, context_length: int) -> None:
        """Raise OutOfMemoryError if a full context could not be held, weights apart, beside what is free before
        adapters are loaded; None: nobody knows."""
        needed = self.cache + self.arena + self.adapters
        if available is not None and needed > available:
            fits = max(0, available - self.arena - self.adapters) * context_length // max(1, self.cache)
            adapters = f", adapters of {self.adapters / 1e6:.0f} MB included," if self.adapters else ","
            raise OutOfMemoryError(
                f"a context of {context_length} tokens takes {needed / 1e6:.0f} MB{adapters} and "
                f"{available / 1e6:.0f} MB of memory are free; ask for a context of at most {fits} tokens (--ctx, "
                "context_length)"
            )


def available_memory(proc: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process may still take without pushing others out; None where the system does not tell."""
    known = [amount for amount in (_of_machine(proc), _of_control_group(group)) if amount is not None]
    return min(known, default=None)


def resident_memory(statm: Path = Path("/proc/self/statm")) -> int | None:
    """Bytes that this process has in memory, mapped weights included; None where the system does not tell."""
    try:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _of_machine(proc: Path) -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in proc.read_text().splitlines() if ":" in line)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def _of_control_group(group: Path) -> int | None:
    """What a container's limit leaves; files that are mapped count as used there, but can be dropped."""
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - used + int(statistics.get("file", 0)))
    except (OSError, ValueError):
        return None
