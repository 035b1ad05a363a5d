"""OLMo 2: Llama that norms what attention and feed-forward give, not what they take; queries and keys are normed too.

(arXiv:2501.00656)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgellm.architectures import llama
from edgellm.architectures.llama import STACKED, caches, pairs, to_gguf
from edgellm.config import require
from edgellm.errors import UnsupportedError
from edgellm.ops import Ops, X
from edgellm.rope import attention_factor, frequencies
from edgellm.tensor import Weights

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "OLMo 2"

__all__ = ["STACKED", "Config", "caches", "pairs", "to_gguf"]

HF_NAMES = {
    **{name: theirs for name, theirs in llama.HF_NAMES.items() if "_norm" not in name and "bias" not in name},
    "layers.{}.q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers.{}.k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "layers.{}.attn_post_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.ffn_post_norm": "model.layers.{}.post_feedforward_layernorm.weight",
}

GGUF_NAMES = {
    **{name: theirs for name, theirs in llama.GGUF_NAMES.items() if "_norm" not in name and "bias" not in name},
    "layers.{}.q_norm": "blk.{}.attn_q_norm.weight",
    "layers.{}.k_norm": "blk.{}.attn_k_norm.weight",
    "layers.{}.attn_post_norm": "blk.{}.post_attention_norm.weight",
    "layers.{}.ffn_post_norm": "blk.{}.post_ffw_norm.weight",
}

GGUF_INTERLEAVED = ()


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qkv_bias or self.o_bias or self.ffn_bias:
            raise UnsupportedError("config has biases; this architecture supports none")

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        require(metadata, "attention.sliding_window", 0)  # OLMo 3 has one
        return super().from_gguf(metadata)


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    layer = llama.layer_shapes(config)
    norms: dict[str, tuple[int, ...]] = {
        "q_norm": layer["q"][:1],
        "k_norm": layer["k"][:1],
        "attn_post_norm": (config.hidden_size,),
        "ffn_post_norm": (config.hidden_size,),
    }
    return llama.model_shapes(config, {name: shape for name, shape in layer.items() if "_norm" not in name} | norms)


def forward(config: Config, weights: Weights, ops: Ops[X]) -> X:
    """The step's rows -> logits of those that want them, (wanted rows, vocab_size)."""
    angles = frequencies(config.head_dim, config.rope_theta, config.rope_scaling, config.context_length)
    scale = config.head_dim**-0.5 * attention_factor(config.rope_scaling) ** 2
    x = ops.embed(weights.embed)
    for i in range(config.n_layers):
        layer = weights.layer(i)
        q = ops.rms_norm(ops.linear(x, layer.q), layer.q_norm, config.norm_eps)
        k = ops.rms_norm(ops.linear(x, layer.k), layer.k_norm, config.norm_eps)
        q, k = ops.rope(q, config.head_dim, angles), ops.rope(k, config.head_dim, angles)
        h = ops.attention(q, k, ops.linear(x, layer.v), i, scale=scale)
        x = ops.add(x, ops.rms_norm(ops.linear(h, layer.o), layer.attn_post_norm, config.norm_eps))
        h = ops.linear(ops.glu(ops.linear(x, layer.gate_up), "silu"), layer.down)
        x = ops.add(x, ops.rms_norm(h, layer.ffn_post_norm, config.norm_eps))
    x = ops.rms_norm(x, weights.norm, config.norm_eps)
    return ops.logits(x, weights.embed if config.tie_embeddings else weights.output)
