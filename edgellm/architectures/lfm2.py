"""LFM2: gated short convolutions in most layers, grouped-query attention in the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgellm.architectures import LayerCache
from edgellm.config import (
    DecoderConfig,
    integer,
    number,
    one_of,
    require,
    sizes_from_gguf,
    sizes_from_hf,
    sizes_to_gguf,
    truth,
)
from edgellm.errors import CheckpointError
from edgellm.ops import Ops, X
from edgellm.rope import attention_factor, frequencies, rope_from_gguf, rope_from_hf, rope_to_gguf
from edgellm.tensor import Weights

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "LFM2"

HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "layers.{}.operator_norm": "model.layers.{}.operator_norm.weight",
    "layers.{}.conv_in": "model.layers.{}.conv.in_proj.weight",
    "layers.{}.taps": "model.layers.{}.conv.conv.weight",
    "layers.{}.conv_out": "model.layers.{}.conv.out_proj.weight",
    "layers.{}.q": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.q_norm": "model.layers.{}.self_attn.q_layernorm.weight",
    "layers.{}.k": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.k_norm": "model.layers.{}.self_attn.k_layernorm.weight",
    "layers.{}.v": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.o": "model.layers.{}.self_attn.out_proj.weight",
    "layers.{}.ffn_norm": "model.layers.{}.ffn_norm.weight",
    "layers.{}.gate": "model.layers.{}.feed_forward.w1.weight",
    "layers.{}.up": "model.layers.{}.feed_forward.w3.weight",
    "layers.{}.down": "model.layers.{}.feed_forward.w2.weight",
    "norm": "model.embedding_norm.weight",
    "output": "lm_head.weight",
}

GGUF_NAMES = {
    "embed": "token_embd.weight",
    "layers.{}.operator_norm": "blk.{}.attn_norm.weight",
    "layers.{}.conv_in": "blk.{}.shortconv.in_proj.weight",
    "layers.{}.taps": "blk.{}.shortconv.conv.weight",
    "layers.{}.conv_out": "blk.{}.shortconv.out_proj.weight",
    "layers.{}.q": "blk.{}.attn_q.weight",
    "layers.{}.q_norm": "blk.{}.attn_q_norm.weight",
    "layers.{}.k": "blk.{}.attn_k.weight",
    "layers.{}.k_norm": "blk.{}.attn_k_norm.weight",
    "layers.{}.v": "blk.{}.attn_v.weight",
    "layers.{}.o": "blk.{}.attn_output.weight",
    "layers.{}.ffn_norm": "blk.{}.ffn_norm.weight",
    "layers.{}.gate": "blk.{}.ffn_gate.weight",
    "layers.{}.up": "blk.{}.ffn_up.weight",
    "layers.{}.down": "blk.{}.ffn_down.weight",
    "norm": "token_embd_norm.weight",
    "output": "output.weight",
}

GGUF_INTERLEAVED = ()

STACKED = {"layers.{}.gate_up": ("layers.{}.gate", "layers.{}.up")}

LAYER_TYPES = ("conv", "full_attention")


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    layer_types: list[str]
    """Of LAYER_TYPES, one a layer."""
    conv_kernel: int
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        frequencies(self.head_dim, self.rope_theta, self.rope_scaling, self.context_length)
        attention_factor(self.rope_scaling)
        if not isinstance(self.layer_types, list) or len(self.layer_types) != self.n_layers:
            raise CheckpointError(f"config has {self.n_layers} layers, but layer_types = {self.layer_types!r:.200}")
        for kind in self.layer_types:
            one_of({"layer_types": kind}, "layer_types", LAYER_TYPES)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        require(config, "conv_bias", False)
        tied = truth(config, "tie_embedding", truth(config, "tie_word_embeddings", True))
        sizes = {**config, "intermediate_size": _ffn_size(config), "tie_word_embeddings": tied}
        return cls(
            **sizes_from_hf(sizes, "norm_eps"),
            **rope_from_hf(config, 1000000.0),
            layer_types=config.get("layer_types") or _layer_types(config),
            conv_kernel=integer(config, "conv_L_cache", 3),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        heads = metadata.get("attention.head_count_kv")
        counts: list[Any] = heads if isinstance(heads, list) else [heads] * integer(metadata, "block_count")
        if not all(type(count) is int for count in counts) or len(set(counts) - {0}) != 1:
            raise CheckpointError(
                f"config has attention.head_count_kv = {heads!r:.200}; expected the same number for every layer with "
                "attention, and 0 for a convolution"
            )
        return cls(
            **sizes_from_gguf({**metadata, "attention.head_count_kv": max(counts)}),
            **rope_from_gguf(metadata),
            layer_types=[LAYER_TYPES[count > 0] for count in counts],
            conv_kernel=integer(metadata, "shortconv.l_cache"),
        )

    @classmethod
    def tiny(cls) -> Self:
        return cls(
            vocab_size=97,
            hidden_size=72,
            ffn_size=104,
            n_layers=2,
            n_heads=6,
            n_kv_heads=2,
            head_dim=12,
            context_length=64,
            norm_eps=1e-5,
            layer_types=["conv", "full_attention"],
            conv_kernel=3,
            rope_theta=10000.0,
        )


def _ffn_size(config: Mapping[str, Any]) -> int:
    """A config may say a size of which two thirds are meant, rounded up."""
    size = integer(config, "block_ff_dim", config.get("intermediate_size"))
    if truth(config, "block_auto_adjust_ff_dim", True):
        size = int(2 * size / 3)
        if config.get("block_ffn_dim_multiplier", 1.0) is not None:
            multiple = integer(config, "block_multiple_of", 256)
            size = -(-int(number(config, "block_ffn_dim_multiplier", 1.0) * size) // multiple) * multiple
    return size


def _layer_types(config: Mapping[str, Any]) -> list[str]:
    """Older configs name the layers with attention."""
    n_layers = integer(config, "num_hidden_layers")
    attention = config.get("full_attn_idxs", list(range(n_layers)))
    if not isinstance(attention, list):
        raise CheckpointError(f"config has full_attn_idxs = {attention!r:.200}; expected a list of layers")
    return [LAYER_TYPES[i in attention] for i in range(n_layers)]


def to_gguf(config: Config) -> dict[str, Any]:
    """GGUF metadata, of which from_gguf makes this config again."""
    return {
        **sizes_to_gguf(config),
        **rope_to_gguf(config.head_dim, config.rope_theta, config.rope_scaling),
        "attention.head_count_kv": [0 if kind == "conv" else config.n_kv_heads for kind in config.layer_types],
        "shortconv.l_cache": config.conv_kernel,
    }


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    result: dict[str, tuple[int, ...]] = {"embed": (config.vocab_size, config.hidden_size)}
    for i, kind in enumerate(config.layer_types):
        layer = {**operator_shapes(config, kind), **ffn_shapes(config)}
        result |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    result["norm"] = (config.hidden_size,)
    if not config.tie_embeddings:
        result["output"] = (config.vocab_size, config.hidden_size)
    return result


def operator_shapes(config: Config, kind: str) -> dict[str, tuple[int, ...]]:
    hidden, q, kv = config.hidden_size, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    if kind == "conv":
        return {
            "operator_norm": (hidden,),
            "conv_in": (3 * hidden, hidden),
            "taps": (hidden, config.conv_kernel),
            "conv_out": (hidden, hidden),
        }
    return {
        "operator_norm": (hidden,),
        "q": (q, hidden),
        "q_norm": (config.head_dim,),
        "k": (kv, hidden),
        "k_norm": (config.head_dim,),
        "v": (kv, hidden),
        "o": (hidden, q),
    }


def ffn_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, ffn = config.hidden_size, config.ffn_size
    return {"ffn_norm": (hidden,), "gate_up": (2 * ffn, hidden), "down": (hidden, ffn)}


def pairs(config: Config) -> dict[str, int]:
    return {"q": config.head_dim // 2, "k": config.head_dim // 2, "gate_up": config.ffn_size}


def caches(config: Config) -> list[LayerCache]:
    attention = LayerCache(config.n_kv_heads, config.head_dim)
    conv = LayerCache(1, config.hidden_size, window=config.conv_kernel, n_arrays=1)
    return [conv if kind == "conv" else attention for kind in config.layer_types]


def forward(config: Config, weights: Weights, ops: Ops[X]) -> X:
    """The step's rows -> logits of those that want them, (wanted rows, vocab_size)."""
    angles = frequencies(config.head_dim, config.rope_theta, config.rope_scaling, config.context_length)
    scale = config.head_dim**-0.5 * attention_factor(config.rope_scaling) ** 2  # of queries and of keys
    x = ops.embed(weights.embed)
    for i, kind in enumerate(config.layer_types):
        layer = weights.layer(i)
        h = ops.rms_norm(x, layer.operator_norm, config.norm_eps)
        if kind == "conv":
            h = ops.short_conv(ops.linear(h, layer.conv_in), layer.taps, i)
            x = ops.add(x, ops.linear(h, layer.conv_out))
        else:
            q = ops.rms_norm(ops.linear(h, layer.q), layer.q_norm, config.norm_eps)
            k = ops.rms_norm(ops.linear(h, layer.k), layer.k_norm, config.norm_eps)
            q, k = ops.rope(q, config.head_dim, angles), ops.rope(k, config.head_dim, angles)
            h = ops.attention(q, k, ops.linear(h, layer.v), i, scale=scale)
            x = ops.add(x, ops.linear(h, layer.o))
        h = ops.rms_norm(x, layer.ffn_norm, config.norm_eps)
        h = ops.glu(ops.linear(h, layer.gate_up), "silu")
        x = ops.add(x, ops.linear(h, layer.down))
    x = ops.rms_norm(x, weights.norm, config.norm_eps)
    return ops.logits(x, weights.embed if config.tie_embeddings else weights.output)
