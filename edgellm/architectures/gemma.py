"""Gemma 1: Llama with GeGLU, embeddings multiplied by the root of their size, and norms stored less 1.

(arXiv:2403.08295)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from edgellm.architectures import Stored, llama
from edgellm.architectures.llama import STACKED, caches, pairs, shapes, to_gguf
from edgellm.config import require
from edgellm.errors import UnsupportedError
from edgellm.ops import Ops, X
from edgellm.rope import attention_factor, frequencies
from edgellm.tensor import Weights

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "Gemma 1, CodeGemma"

__all__ = ["STACKED", "Config", "caches", "pairs", "shapes", "to_gguf"]

HF_NAMES = {
    **{name: theirs for name, theirs in llama.HF_NAMES.items() if "norm" not in name and "bias" not in name},
    "layers.{}.attn_norm": Stored("model.layers.{}.input_layernorm.weight", plus=1),
    "layers.{}.ffn_norm": Stored("model.layers.{}.post_attention_layernorm.weight", plus=1),
    "norm": Stored("model.norm.weight", plus=1),
}

GGUF_NAMES = {name: theirs for name, theirs in llama.GGUF_NAMES.items() if "bias" not in name}

GGUF_INTERLEAVED = ()


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    ACTIVATION: ClassVar[str] = "gelu_pytorch_tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qkv_bias or self.o_bias or self.ffn_bias:
            raise UnsupportedError("config has biases; this architecture supports none")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        require(config, "use_bidirectional_attention", False)
        if config.get("hidden_act") == "gelu":  # as the first checkpoints have it, which were trained with the other
            config = {**config, "hidden_act": cls.ACTIVATION}
        return super().from_hf({"tie_word_embeddings": True, "head_dim": 256, **config})


def forward(config: Config, weights: Weights, ops: Ops[X]) -> X:
    """The step's rows -> logits of those that want them, (wanted rows, vocab_size)."""
    angles = frequencies(config.head_dim, config.rope_theta, config.rope_scaling, config.context_length)
    scale = config.head_dim**-0.5 * attention_factor(config.rope_scaling) ** 2
    x = ops.embed(weights.embed, config.hidden_size**0.5)
    for i in range(config.n_layers):
        layer = weights.layer(i)
        h = ops.rms_norm(x, layer.attn_norm, config.norm_eps)
        q = ops.rope(ops.linear(h, layer.q), config.head_dim, angles)
        k = ops.rope(ops.linear(h, layer.k), config.head_dim, angles)
        h = ops.attention(q, k, ops.linear(h, layer.v), i, scale=scale)
        x = ops.add(x, ops.linear(h, layer.o))
        h = ops.rms_norm(x, layer.ffn_norm, config.norm_eps)
        x = ops.add(x, ops.linear(ops.glu(ops.linear(h, layer.gate_up), "gelu_tanh"), layer.down))
    x = ops.rms_norm(x, weights.norm, config.norm_eps)
    return ops.logits(x, weights.embed if config.tie_embeddings else weights.output)
