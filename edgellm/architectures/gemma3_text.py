"""Gemma 3 (its text model): Gemma 2 with normed queries and keys for caps, and angles of its own in windowed layers.

(arXiv:2503.19786)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from edgellm.architectures import Stored, gemma2
from edgellm.architectures.gemma2 import STACKED, caches, pairs
from edgellm.config import number, one_of
from edgellm.ops import Ops, X
from edgellm.rope import attention_factor, frequencies
from edgellm.tensor import Weights

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "Gemma 3 (text)"
VERIFIED = ("Gemma 3 270M",)

__all__ = ["STACKED", "Config", "caches", "pairs"]

HF_NAMES = {
    **gemma2.HF_NAMES,
    "layers.{}.q_norm": Stored("model.layers.{}.self_attn.q_norm.weight", plus=1),
    "layers.{}.k_norm": Stored("model.layers.{}.self_attn.k_norm.weight", plus=1),
}

GGUF_ARCHITECTURE = "gemma3"

GGUF_NAMES = {
    **gemma2.GGUF_NAMES,
    "layers.{}.q_norm": "blk.{}.attn_q_norm.weight",
    "layers.{}.k_norm": "blk.{}.attn_k_norm.weight",
}

GGUF_INTERLEAVED = ()

USUAL = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "rope_theta": 1e6,
}
"""What a config.json leaves out where it is a part of a larger model's."""


@dataclass(frozen=True, kw_only=True)
class Config(gemma2.Config):
    local_rope_theta: float = 10000.0
    """Of layers with a window, whose angles are never scaled."""

    WINDOWS_IN_TURNS: ClassVar[int] = 6
    SCALED_BY_HIDDEN_SIZE: ClassVar[int] = 62

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        rope = config.get("rope_parameters") or {
            "full_attention": config.get("rope_scaling"),
            "sliding_attention": {"rope_theta": config.get("rope_local_base_freq")},
        }
        far, near = (rope.get(kind) or {} for kind in ("full_attention", "sliding_attention"))
        one_of(near, "rope_type", ["default"], "default")
        made = super().from_hf({**USUAL, **config, "rope_parameters": far})
        return replace(made, local_rope_theta=number(near, "rope_theta", 1e4))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        made = super().from_gguf({"rope.freq_base": 1e6, **metadata})
        return replace(made, local_rope_theta=number(metadata, "rope.freq_base_swa", 1e4))


def to_gguf(config: Config) -> dict[str, Any]:
    """GGUF metadata, of which from_gguf makes this config again if its scale and its windows are Gemma's."""
    return {**gemma2.to_gguf(config), "rope.freq_base_swa": config.local_rope_theta}


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    norms = {f"layers.{i}.{name}": (config.head_dim,) for i in range(config.n_layers) for name in ("q_norm", "k_norm")}
    return {**gemma2.shapes(config), **norms}


def forward(config: Config, weights: Weights, ops: Ops[X]) -> X:
    """The step's rows -> logits of those that want them, (wanted rows, vocab_size)."""
    far = frequencies(config.head_dim, config.rope_theta, config.rope_scaling, config.context_length)
    near = frequencies(config.head_dim, config.local_rope_theta, None, config.context_length)
    far_factor, scale = attention_factor(config.rope_scaling), config.query_pre_attn_scalar**-0.5
    x = ops.embed(weights.embed, config.hidden_size**0.5)
    for i, cache in enumerate(caches(config)):
        layer, (angles, factor) = weights.layer(i), (near, 1.0) if cache.window else (far, far_factor)
        h = ops.rms_norm(x, layer.attn_norm, config.norm_eps)
        q = ops.rms_norm(ops.linear(h, layer.q), layer.q_norm, config.norm_eps)
        k = ops.rms_norm(ops.linear(h, layer.k), layer.k_norm, config.norm_eps)
        q, k = ops.rope(q, config.head_dim, angles, factor), ops.rope(k, config.head_dim, angles, factor)
        h = ops.attention(q, k, ops.linear(h, layer.v), i, scale, config.attention_softcap or 0.0)
        x = ops.add(x, ops.rms_norm(ops.linear(h, layer.o), layer.attn_post_norm, config.norm_eps))
        h = ops.rms_norm(x, layer.ffn_norm, config.norm_eps)
        h = ops.linear(ops.glu(ops.linear(h, layer.gate_up), "gelu_tanh"), layer.down)
        x = ops.add(x, ops.rms_norm(h, layer.ffn_post_norm, config.norm_eps))
    x = ops.rms_norm(x, weights.norm, config.norm_eps)
    head = weights.embed if config.tie_embeddings else weights.output
    return ops.logits(x, head, softcap=config.logits_softcap or 0.0)
