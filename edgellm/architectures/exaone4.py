"""EXAONE 4: OLMo 2 with queries and keys normed head by head; where some layers have windows, only those have RoPE.

(arXiv:2507.11407)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgellm.architectures import olmo2
from edgellm.architectures.gemma2 import in_turns, windows_from_gguf
from edgellm.architectures.llama import FULL, SLIDING
from edgellm.architectures.olmo2 import GGUF_INTERLEAVED, GGUF_NAMES, HF_NAMES, STACKED, caches, pairs
from edgellm.config import integer
from edgellm.ops import Ops, X
from edgellm.rope import attention_factor, frequencies
from edgellm.tensor import Weights

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "EXAONE 4"

__all__ = ["GGUF_INTERLEAVED", "GGUF_NAMES", "HF_NAMES", "STACKED", "Config", "caches", "pairs"]


@dataclass(frozen=True, kw_only=True)
class Config(olmo2.Config):
    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        made = super().from_hf(config)
        window = None if config.get("sliding_window") is None else integer(config, "sliding_window")
        every = integer(config, "sliding_window_pattern", 4) if window else 1
        kinds = config.get("layer_types") or in_turns(every, made.n_layers)
        return replace(made, sliding_window=window, layer_types=kinds)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        made = super().from_gguf({**metadata, "attention.sliding_window": None})
        return replace(made, **windows_from_gguf(metadata, 4, made.n_layers))

    @classmethod
    def tiny(cls) -> Self:
        return replace(super().tiny(), sliding_window=5, layer_types=[SLIDING, FULL])


def to_gguf(config: Config) -> dict[str, Any]:
    """GGUF metadata, of which from_gguf makes this config again."""
    if not config.sliding_window:
        return olmo2.to_gguf(config)
    windows = [cache.window is not None for cache in caches(config)]
    said = {"attention.sliding_window": config.sliding_window, "attention.sliding_window_pattern": windows}
    return olmo2.to_gguf(config) | said


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    layers = [f"layers.{i}.{name}" for i in range(config.n_layers) for name in ("q_norm", "k_norm")]
    return olmo2.shapes(config) | dict.fromkeys(layers, (config.head_dim,))


def forward(config: Config, weights: Weights, ops: Ops[X]) -> X:
    """The step's rows -> logits of those that want them, (wanted rows, vocab_size)."""
    angles = frequencies(config.head_dim, config.rope_theta, config.rope_scaling, config.context_length)
    factor = attention_factor(config.rope_scaling)
    x = ops.embed(weights.embed)
    for i, cache in enumerate(caches(config)):
        layer = weights.layer(i)
        q = ops.rms_norm(ops.linear(x, layer.q), layer.q_norm, config.norm_eps)
        k = ops.rms_norm(ops.linear(x, layer.k), layer.k_norm, config.norm_eps)
        if cache.window or not config.sliding_window:
            q, k = ops.rope(q, config.head_dim, angles, factor), ops.rope(k, config.head_dim, angles, factor)
        h = ops.attention(q, k, ops.linear(x, layer.v), i, scale=config.head_dim**-0.5)
        x = ops.add(x, ops.rms_norm(ops.linear(h, layer.o), layer.attn_post_norm, config.norm_eps))
        h = ops.linear(ops.glu(ops.linear(x, layer.gate_up), "silu"), layer.down)
        x = ops.add(x, ops.rms_norm(h, layer.ffn_post_norm, config.norm_eps))
    x = ops.rms_norm(x, weights.norm, config.norm_eps)
    return ops.logits(x, weights.embed if config.tie_embeddings else weights.output)
