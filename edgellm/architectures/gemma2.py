"""Gemma 2: norms before and after attention and feed-forward, windows in turns, capped scores (arXiv:2408.00118)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from edgellm.architectures import Stored, llama
from edgellm.architectures.llama import FULL, SLIDING, STACKED, caches, pairs, windows_from_hf
from edgellm.config import integer, number, require
from edgellm.errors import UnsupportedError
from edgellm.ops import Ops, X
from edgellm.rope import attention_factor, frequencies
from edgellm.tensor import Weights

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "Gemma 2"

__all__ = ["STACKED", "Config", "caches", "pairs"]

HF_NAMES = {
    **{name: theirs for name, theirs in llama.HF_NAMES.items() if "norm" not in name and "bias" not in name},
    "layers.{}.attn_norm": Stored("model.layers.{}.input_layernorm.weight", plus=1),
    "layers.{}.attn_post_norm": Stored("model.layers.{}.post_attention_layernorm.weight", plus=1),
    "layers.{}.ffn_norm": Stored("model.layers.{}.pre_feedforward_layernorm.weight", plus=1),
    "layers.{}.ffn_post_norm": Stored("model.layers.{}.post_feedforward_layernorm.weight", plus=1),
    "norm": Stored("model.norm.weight", plus=1),
}

GGUF_NAMES = {
    **{name: theirs for name, theirs in llama.GGUF_NAMES.items() if "bias" not in name},
    "layers.{}.attn_post_norm": "blk.{}.post_attention_norm.weight",
    "layers.{}.ffn_post_norm": "blk.{}.post_ffw_norm.weight",
}

GGUF_INTERLEAVED = ()


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    query_pre_attn_scalar: float = 256.0
    """Scores are divided by its root."""
    attention_softcap: float | None = None
    logits_softcap: float | None = None

    ACTIVATION: ClassVar[str] = "gelu_pytorch_tanh"
    WINDOWS_IN_TURNS: ClassVar[int] = 2
    """Every so many layers one has no window, where the checkpoint does not say which."""
    SCALED_BY_HIDDEN_SIZE: ClassVar[int] = 46
    """Layers of the largest model, whose scores are scaled by hidden_size / n_heads; GGUF files do not say it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qkv_bias or self.o_bias or self.ffn_bias:
            raise UnsupportedError("config has biases; this architecture supports none")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        require(config, "use_bidirectional_attention", False)
        made = super().from_hf({"tie_word_embeddings": True, "head_dim": 256, **config})
        every = integer(config, "sliding_window_pattern", cls.WINDOWS_IN_TURNS)
        return replace(
            made,
            query_pre_attn_scalar=number(config, "query_pre_attn_scalar", 256),
            attention_softcap=config.get("attn_logit_softcapping"),
            logits_softcap=config.get("final_logit_softcapping"),
            **windows_from_hf(config, in_turns(every, made.n_layers)),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        made = super().from_gguf(metadata)
        by_hidden = made.n_layers == cls.SCALED_BY_HIDDEN_SIZE
        return replace(
            made,
            query_pre_attn_scalar=made.hidden_size / made.n_heads if by_hidden else made.head_dim,
            attention_softcap=metadata.get("attn_logit_softcapping"),
            logits_softcap=metadata.get("final_logit_softcapping"),
            **windows_from_gguf(metadata, cls.WINDOWS_IN_TURNS, made.n_layers),
        )

    @classmethod
    def tiny(cls) -> Self:
        return replace(
            super().tiny(),
            query_pre_attn_scalar=20.0,
            attention_softcap=2.0,
            logits_softcap=3.0,
            sliding_window=5,
            layer_types=[SLIDING, FULL],
        )


def to_gguf(config: Config) -> dict[str, Any]:
    """GGUF metadata, of which from_gguf makes this config again if its scale and its windows are Gemma's."""
    said = {
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logits_softcap,
    }
    return llama.to_gguf(config) | {key: value for key, value in said.items() if value is not None}


def windows_from_gguf(metadata: Mapping[str, Any], every: int, n_layers: int) -> dict[str, Any]:
    """The fields of a Config for windows: by a pattern that is a number, or says which layers have one."""
    if not metadata.get("attention.sliding_window"):
        return {}
    pattern = metadata.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        kinds = [SLIDING if windowed else FULL for windowed in pattern]
    else:
        kinds = in_turns(integer(metadata, "attention.sliding_window_pattern", every), n_layers)
    return {"sliding_window": integer(metadata, "attention.sliding_window"), "layer_types": kinds}


def in_turns(every: int, n_layers: int) -> list[str]:
    return [SLIDING if (i + 1) % every else FULL for i in range(n_layers)]


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden = (config.hidden_size,)
    norms = {"attn_post_norm": hidden, "ffn_post_norm": hidden}
    return llama.model_shapes(config, {**llama.layer_shapes(config), **norms})


def forward(config: Config, weights: Weights, ops: Ops[X]) -> X:
    """The step's rows -> logits of those that want them, (wanted rows, vocab_size)."""
    angles = frequencies(config.head_dim, config.rope_theta, config.rope_scaling, config.context_length)
    scale = config.query_pre_attn_scalar**-0.5 * attention_factor(config.rope_scaling) ** 2
    x = ops.embed(weights.embed, config.hidden_size**0.5)
    for i in range(config.n_layers):
        layer = weights.layer(i)
        h = ops.rms_norm(x, layer.attn_norm, config.norm_eps)
        q = ops.rope(ops.linear(h, layer.q), config.head_dim, angles)
        k = ops.rope(ops.linear(h, layer.k), config.head_dim, angles)
        h = ops.attention(q, k, ops.linear(h, layer.v), i, scale, config.attention_softcap or 0.0)
        x = ops.add(x, ops.rms_norm(ops.linear(h, layer.o), layer.attn_post_norm, config.norm_eps))
        h = ops.rms_norm(x, layer.ffn_norm, config.norm_eps)
        h = ops.linear(ops.glu(ops.linear(h, layer.gate_up), "gelu_tanh"), layer.down)
        x = ops.add(x, ops.rms_norm(h, layer.ffn_post_norm, config.norm_eps))
    x = ops.rms_norm(x, weights.norm, config.norm_eps)
    head = weights.embed if config.tie_embeddings else weights.output
    return ops.logits(x, head, softcap=config.logits_softcap or 0.0)
