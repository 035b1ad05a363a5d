"""Writes a file of tensors, whatever its format, so that it is there whole or not at all. Knows no header."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from edgellm.arrays import U8, Array


class TensorWriter:
    """A format's writer says what stands before, between and after the tensors; here they are written in order.

    Use as a context manager: `write` every tensor's bytes in the order of `n_bytes`, in as many pieces as convenient.
    The target appears only when all of it is on disk; an exception, or the death of the process, leaves it alone.
    """

    def __init__(self, path: str | os.PathLike[str], n_bytes: Mapping[str, int]) -> None:
        self.path = Path(path)
        self._part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self._left = dict(n_bytes)

    def __enter__(self) -> TensorWriter:
        self._file = open(self._part, "wb")
        self._begin()
        return self

    def write(self, name: str, data: Array) -> None:
        """Append to the tensor `name`; raises ValueError when it is not the next one or is full."""
        expected = next((n for n, left in self._left.items() if left), None)
        if name != expected or data.nbytes > self._left[name]:
            raise ValueError(f"{data.nbytes} bytes of {name!r} given; the next tensor is {expected!r}")
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self._file.write(raw.data)
        self._left[name] -= len(raw)
        self._wrote(name, raw)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()
            with suppress(OSError):
                self._part.unlink()

    def _finish(self) -> None:
        if missing := [name for name, left in self._left.items() if left]:
            raise ValueError(f"tensors not written: {', '.join(missing)}")
        self._end()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._part, self.path)

    def _begin(self) -> None:
        """Write what stands before the tensors."""

    def _wrote(self, name: str, raw: U8) -> None:
        """Some bytes of a tensor have been written."""

    def _end(self) -> None:
        """Write what is known only after the tensors."""
