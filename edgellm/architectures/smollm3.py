"""SmolLM3: Llama without positions in every fourth layer (arXiv:2501.18795)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgellm.architectures import llama
from edgellm.architectures.llama import (
    FULL,
    GGUF_INTERLEAVED,
    GGUF_NAMES,
    HF_NAMES,
    SLIDING,
    STACKED,
    caches,
    pairs,
    shapes,
    to_gguf,
    windows_from_hf,
)
from edgellm.config import integer, truth
from edgellm.errors import CheckpointError
from edgellm.ops import Ops, X
from edgellm.rope import attention_factor, frequencies
from edgellm.tensor import Weights

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "SmolLM3"

__all__ = ["GGUF_INTERLEAVED", "GGUF_NAMES", "HF_NAMES", "STACKED", "Config", "caches", "pairs", "shapes", "to_gguf"]


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    rope_layers: list[int] | None = None
    """1 for each layer that turns queries and keys by position, 0 for each that does not; without it all do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope_layers is not None and not (
            isinstance(self.rope_layers, list)
            and len(self.rope_layers) == self.n_layers
            and all(turned in (0, 1) for turned in self.rope_layers)
        ):
            raise CheckpointError(
                f"config has the rope layers {self.rope_layers!r:.200}; expected 0 or 1 for each of {self.n_layers}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        made = super().from_hf({"tie_word_embeddings": True, **config})
        interval = integer(config, "no_rope_layer_interval", 4)
        made = replace(made, rope_layers=config.get("no_rope_layers") or every_but(interval, made.n_layers))
        used = truth(config, "use_sliding_window", False)
        kinds = [SLIDING if used and not turned else FULL for turned in made.rope_layers or ()]
        return replace(made, **windows_from_hf(config, kinds))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        made = super().from_gguf(metadata)
        return replace(made, rope_layers=every_but(4, made.n_layers))

    @classmethod
    def tiny(cls) -> Self:
        return replace(super().tiny(), rope_layers=[1, 0])


def every_but(interval: int, n_layers: int) -> list[int]:
    return [int((i + 1) % interval != 0) for i in range(n_layers)]


def forward(config: Config, weights: Weights, ops: Ops[X]) -> X:
    """The step's rows -> logits of those that want them, (wanted rows, vocab_size)."""
    angles = frequencies(config.head_dim, config.rope_theta, config.rope_scaling, config.context_length)
    factor = attention_factor(config.rope_scaling)
    turned = config.rope_layers or [1] * config.n_layers
    x = ops.embed(weights.embed)
    for i in range(config.n_layers):
        layer = weights.layer(i)
        h = ops.rms_norm(x, layer.attn_norm, config.norm_eps)
        q = ops.linear(h, layer.q, layer.get("q_bias"))
        k = ops.linear(h, layer.k, layer.get("k_bias"))
        v = ops.linear(h, layer.v, layer.get("v_bias"))
        if turned[i]:
            q, k = ops.rope(q, config.head_dim, angles, factor), ops.rope(k, config.head_dim, angles, factor)
        h = ops.attention(q, k, v, i, scale=config.head_dim**-0.5)
        x = ops.add(x, ops.linear(h, layer.o, layer.get("o_bias")))
        h = ops.rms_norm(x, layer.ffn_norm, config.norm_eps)
        h = ops.glu(ops.linear(h, layer.gate_up, layer.get("gate_up_bias")), "silu")
        x = ops.add(x, ops.linear(h, layer.down, layer.get("down_bias")))
    x = ops.rms_norm(x, weights.norm, config.norm_eps)
    return ops.logits(x, weights.embed if config.tie_embeddings else weights.output)
