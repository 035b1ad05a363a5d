"""Phi-3, Phi-3.5 and Phi-4: Llama with its matrices stored together, LongRoPE, and perhaps a part of each head turned.

Turned by the angles for short contexts or by those for long ones, whichever the context it is loaded with needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgellm.architectures import Stored, llama
from edgellm.architectures.llama import STACKED, caches, shapes
from edgellm.config import integer, number, one_of, sizes_from_gguf, sizes_from_hf
from edgellm.errors import CheckpointError
from edgellm.ops import Ops, X
from edgellm.rope import attention_factor, frequencies, rope_from_gguf, rope_from_hf
from edgellm.tensor import Weights

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "Phi-3, Phi-3.5, Phi-4"

__all__ = ["STACKED", "Config", "caches", "shapes"]

QKV = ("layers.{}.q", "layers.{}.k", "layers.{}.v")
GATE_UP = ("layers.{}.gate", "layers.{}.up")

HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "layers.{}.attn_norm": "model.layers.{}.input_layernorm.weight",
    **{name: Stored("model.layers.{}.self_attn.qkv_proj.weight", of=QKV) for name in QKV},
    "layers.{}.o": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    **{name: Stored("model.layers.{}.mlp.gate_up_proj.weight", of=GATE_UP) for name in GATE_UP},
    "layers.{}.down": "model.layers.{}.mlp.down_proj.weight",
    "norm": "model.norm.weight",
    "output": "lm_head.weight",
}

GGUF_NAMES = {
    "embed": "token_embd.weight",
    "layers.{}.attn_norm": "blk.{}.attn_norm.weight",
    **{name: Stored("blk.{}.attn_qkv.weight", of=QKV) for name in QKV},
    "layers.{}.o": "blk.{}.attn_output.weight",
    "layers.{}.ffn_norm": "blk.{}.ffn_norm.weight",
    **{name: Stored("blk.{}.ffn_up.weight", of=GATE_UP) for name in GATE_UP},
    "layers.{}.down": "blk.{}.ffn_down.weight",
    "norm": "output_norm.weight",
    "output": "output.weight",
}

GGUF_INTERLEAVED = ()


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    partial_rotary_factor: float = 1.0
    """The part of each head that is turned."""

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.rotary_dim <= self.head_dim:
            raise CheckpointError(
                f"config has partial_rotary_factor = {self.partial_rotary_factor}; expected a part of the "
                f"{self.head_dim} values of a head"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        one_of(config, "hidden_act", [cls.ACTIVATION], "silu")
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        if rope.get("type") in ("su", "yarn"):  # what LongRoPE was called at first
            rope["type"] = "longrope"
        return cls(
            **sizes_from_hf(config),
            **rope_from_hf({**config, "rope_parameters": rope}),
            partial_rotary_factor=number({**config, **rope}, "partial_rotary_factor", 1.0),
            sliding_window=integer(config, "sliding_window") if config.get("sliding_window") else None,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        sizes, window = sizes_from_gguf(metadata), metadata.get("attention.sliding_window")
        rotary_dim = integer(metadata, "rope.dimension_count", sizes["head_dim"])
        return cls(
            **sizes,
            **rope_from_gguf(metadata),
            partial_rotary_factor=rotary_dim / sizes["head_dim"],
            sliding_window=integer(metadata, "attention.sliding_window") if window else None,
        )

    @classmethod
    def tiny(cls) -> Self:
        return replace(super().tiny(), partial_rotary_factor=0.7)


def to_gguf(config: Config) -> dict[str, Any]:
    """GGUF metadata, of which from_gguf makes this config again."""
    return {**llama.to_gguf(config), "attention.sliding_window": config.sliding_window or 0}


def pairs(config: Config) -> dict[str, int]:
    """Rows of heads that are turned in part have no pairs."""
    return llama.pairs(config) if config.rotary_dim == config.head_dim else {"gate_up": config.ffn_size}


def forward(config: Config, weights: Weights, ops: Ops[X]) -> X:
    """The step's rows -> logits of those that want them, (wanted rows, vocab_size)."""
    angles = frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling, config.context_length)
    factor = attention_factor(config.rope_scaling)
    x = ops.embed(weights.embed)
    for i in range(config.n_layers):
        layer = weights.layer(i)
        h = ops.rms_norm(x, layer.attn_norm, config.norm_eps)
        q = ops.rope(ops.linear(h, layer.q), config.head_dim, angles, factor)
        k = ops.rope(ops.linear(h, layer.k), config.head_dim, angles, factor)
        h = ops.attention(q, k, ops.linear(h, layer.v), i, scale=config.head_dim**-0.5)
        x = ops.add(x, ops.linear(h, layer.o))
        h = ops.rms_norm(x, layer.ffn_norm, config.norm_eps)
        x = ops.add(x, ops.linear(ops.glu(ops.linear(h, layer.gate_up), "silu"), layer.down))
    x = ops.rms_norm(x, weights.norm, config.norm_eps)
    return ops.logits(x, weights.embed if config.tie_embeddings else weights.output)
