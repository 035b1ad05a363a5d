"""How a conversion or an export went: what became of the tensors of each format, and the error."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgellm.arrays import F32
from edgellm.errors import CheckpointError, EdgeError


@dataclass
class Row:
    """What became of the tensors of one format."""

    format: str
    tensors: int = 0
    weights: int = 0
    n_bytes: int = 0
    squares: float = 0.0
    squared_error: float = 0.0
    max_error: float = 0.0
    """Largest absolute difference between a weight and what the file holds for it."""

    @property
    def relative_rms(self) -> float:
        """Root of the mean squared error over that of the mean squared weight."""
        return float(np.sqrt(self.squared_error / self.squares)) if self.squares else 0.0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / max(1, self.weights)


@dataclass
class Report:
    """How a conversion went: a row for each format used, the file's size and the seconds it took."""

    source: str
    target: str
    architecture: str
    recipe: str
    rows: dict[str, Row] = field(default_factory=dict)
    n_bytes: int = 0
    seconds: float = 0.0
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Parts of the source that are no text model, and how many tensors each has."""
    started: float = field(default_factory=time.perf_counter, repr=False)
    """When it began, as time.perf_counter has it."""

    @property
    def total(self) -> Row:
        total = Row("total")
        for row in self.rows.values():
            for key in ("tensors", "weights", "n_bytes", "squares", "squared_error"):
                setattr(total, key, getattr(total, key) + getattr(row, key))
            total.max_error = max(total.max_error, row.max_error)
        return total

    def row(self, format: str) -> Row:
        """Where another tensor of that format is accounted for."""
        row = self.rows.setdefault(format, Row(format))
        row.tensors += 1
        return row

    @contextmanager
    def written(self) -> Iterator[None]:
        """While the target is written, and then its size and the time are noted; raises EdgeError for an OSError."""
        try:
            yield
            self.n_bytes, self.seconds = Path(self.target).stat().st_size, time.perf_counter() - self.started
        except OSError as error:
            raise EdgeError(
                f"{error.filename or self.target}: {error.strerror or error}; nothing was written"
            ) from error


def account(row: Row, values: F32, stored: F32, n_bytes: int, tensor: str) -> None:
    """Add values of a tensor and what is stored for them; raises CheckpointError if the format cannot hold them."""
    difference = np.abs(stored - values)
    error = float(difference.max())
    if not np.isfinite(error):
        raise CheckpointError(f"tensor {tensor!r} has weights too large for {row.format}; try --format f32")
    row.weights += values.size
    row.n_bytes += n_bytes
    row.squares += float(np.square(values, dtype=np.float64).sum())
    row.squared_error += float(np.square(difference, dtype=np.float64).sum())
    row.max_error = max(row.max_error, error)
