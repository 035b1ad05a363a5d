"""The operations that models are written over.

A backend gives them a meaning: compute at once (reference), or record. `X` is whatever the backend passes between
ops, so a model may only hand it from op to op: shapes below are what it stands for. The rows of a step (token, slot,
position) are known to the ops and to no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

from edgellm.arrays import F32
from edgellm.config import one_of
from edgellm.tensor import Tensor

X = TypeVar("X")
Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]
"""x * sigmoid(x); x * P(normal <= x) and its approximation by tanh (arXiv:1606.08415); max(x, 0)^2."""

_IN_HF: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
    "silu": "silu",
}


def activation_from_hf(config: Mapping[str, Any], key: str, default: str) -> Activation:
    """A config.json's activation; raises UnsupportedError with the known names."""
    return _IN_HF[one_of(config, key, list(_IN_HF), default)]


class Ops(Protocol[X]):
    def embed(self, table: Tensor, scale: float = 1.0) -> X:
        """Rows of the table for the step's tokens, times scale: -> (rows, hidden_size)."""

    def add_positions(self, x: X, table: Tensor) -> X:
        """x + the table's rows for the step's positions."""

    def linear(self, x: X, weight: Tensor, bias: Tensor | None = None) -> X:
        """x @ weight.T + bias: (rows, cols of weight) -> (rows, rows of weight)."""

    def add(self, x: X, y: X, scale: float = 1.0) -> X:
        """x + scale * y."""

    def rms_norm(self, x: X, weight: Tensor, eps: float) -> X:
        """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467); of each head by itself if the weight is as long as
        a head, not a row."""

    def layer_norm(self, x: X, weight: Tensor, bias: Tensor | None, eps: float) -> X:
        """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias (arXiv:1607.06450)."""

    def activate(self, x: X, activation: Activation) -> X: ...

    def glu(self, x: X, activation: Activation) -> X:
        """activation(first half of the columns) * second half (arXiv:2002.05202): (rows, 2 n) -> (rows, n)."""

    def rope(self, x: X, head_dim: int, frequencies: F32, scale: float = 1.0) -> X:
        """Rotate the pairs (i, i + n) of each head by position * frequencies[i], i < n = len(frequencies), and
        multiply them by scale; what of a head is beyond 2 n stays as it is (arXiv:2104.09864)."""

    def attention(self, q: X, k: X, v: X, layer: int, scale: float, softcap: float = 0.0) -> X:
        """Append k and v to the layer's cache, then attend causally within each row's slot.

        q (rows, n_heads * head_dim), k and v (rows, n_kv_heads * head_dim) -> as q. Query head h reads key/value head
        h * n_kv_heads // n_heads (arXiv:2305.13245). With a softcap, scores become softcap * tanh(score / softcap)
        (arXiv:2408.00118). The heads' sizes and the window are in the layer's LayerCache.
        """

    def short_conv(self, x: X, weight: Tensor, layer: int) -> X:
        """A causal convolution of each channel, gated on both sides (LFM2): x = [b, c, u] (rows, 3 n) -> (rows, n),
        c * sum over j of weight[:, j] * (b * u at j - (kernel - 1) positions from the row's).

        weight (n, kernel). Earlier values of b * u are in the layer's LayerCache, those before position 0 are 0.
        """

    def experts(
        self,
        x: X,
        router: Tensor,
        gate_up: Sequence[Tensor],
        down: Sequence[Tensor],
        n_used: int,
        activation: Activation,
        normalize: bool,
    ) -> X:
        """The sum over the n_used most probable experts e of probability(e) * down[e](glu(gate_up[e](x))).

        Probabilities are softmax(x @ router.T); with `normalize`, those of the experts used are divided by their sum
        (arXiv:2101.03961, arXiv:2409.02060).
        """

    def logits(self, x: X, table: Tensor, scale: float = 1.0, softcap: float = 0.0) -> X:
        """x @ table.T * scale for the rows whose logits the step wants: -> (wanted rows, vocab_size); with a softcap,
        softcap * tanh(logit / softcap)."""
