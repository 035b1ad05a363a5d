"""A tensor of a .edge file: a view into the map with its name, shape and format. No arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm.arrays import Array


@dataclass(frozen=True, eq=False)
class Tensor:
    name: str
    shape: tuple[int, ...]
    """(rows, cols) of a matrix, (size,) of a vector; padding not counted."""
    format: str
    """A name of edgellm.quant; vectors are always f32."""
    data: Array
    """Matrix: (row blocks, column tiles, tile bytes) uint8. Vector: (size padded to 16,) float32."""

    pair: int = 0
    """Half of the rows of each group whose rows are stored in pairs (quant.paired), 0 for rows in their order."""


class Weights:
    """The tensors of a model by dotted name: weights.layers[3].q is the tensor "layers.3.q"."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str = "") -> None:
        self._tensors, self._prefix = tensors, prefix

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self._tensors[self._prefix + name]
        except KeyError:
            raise AttributeError(f"no tensor {self._prefix + name!r}") from None

    def get(self, name: str) -> Tensor | None:
        """A tensor that not every model of the architecture has."""
        return self._tensors.get(self._prefix + name)

    def layer(self, i: int) -> Weights:
        return Weights(self._tensors, f"layers.{i}.")

    def expert(self, i: int) -> Weights:
        return Weights(self._tensors, f"{self._prefix}experts.{i}.")
