"""The operations that models are written over.

A backend gives them a meaning: compute at once (reference), or record. `X` is whatever the backend passes between
ops, so a model may only hand it from op to op: shapes below are what it stands for. The rows of a step (token, slot,
position) are known to the ops and to no model.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeVar

from edgellm.arrays import F32
from edgellm.tensor import Tensor

X = TypeVar("X")
Activation = Literal["silu", "gelu_tanh"]


class Ops(Protocol[X]):
    def embed(self, table: Tensor) -> X:
        """Rows of the table for the step's tokens: -> (rows, hidden_size)."""

    def linear(self, x: X, weight: Tensor, bias: Tensor | None = None) -> X:
        """x @ weight.T + bias: (rows, cols of weight) -> (rows, rows of weight)."""

    def add(self, x: X, y: X) -> X: ...

    def rms_norm(self, x: X, weight: Tensor, eps: float) -> X:
        """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467)."""

    def layer_norm(self, x: X, weight: Tensor, bias: Tensor, eps: float) -> X:
        """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias (arXiv:1607.06450)."""

    def glu(self, x: X, activation: Activation) -> X:
        """activation(first half of the columns) * second half (arXiv:2002.05202): (rows, 2 n) -> (rows, n)."""

    def rope(self, x: X, head_dim: int, frequencies: F32) -> X:
        """Rotate each head's pairs (i, i + head_dim/2) by position * frequencies[i] (arXiv:2104.09864)."""

    def attention(self, q: X, k: X, v: X, layer: int, scale: float) -> X:
        """Append k and v to the layer's cache, then attend causally within each row's slot.

        q (rows, n_heads * head_dim), k and v (rows, n_kv_heads * head_dim) -> as q. Query head h reads key/value head
        h * n_kv_heads // n_heads (arXiv:2305.13245). The heads' sizes and the window are in the layer's LayerCache.
        """

    def logits(self, x: X, table: Tensor) -> X:
        """x @ table.T for the rows whose logits the step wants: -> (wanted rows, vocab_size)."""
