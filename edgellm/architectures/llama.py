"""Llama 1 to 3, SmolLM2, TinyLlama: pre-norm transformer with grouped-query attention, RoPE and SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from edgellm.architectures import LayerCache
from edgellm.config import DecoderConfig, integer, one_of, sizes_from_gguf, sizes_from_hf, sizes_to_gguf, truth
from edgellm.errors import CheckpointError, UnsupportedError
from edgellm.ops import Ops, X
from edgellm.rope import attention_factor, frequencies, rope_from_gguf, rope_from_hf, rope_to_gguf
from edgellm.tensor import Weights

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "Llama 1 to 3, SmolLM2, TinyLlama"
VERIFIED = ("SmolLM2 135M", "stories260K")

HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "layers.{}.attn_norm": "model.layers.{}.input_layernorm.weight",
    "layers.{}.q": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers.{}.k": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers.{}.v": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers.{}.o": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.o_bias": "model.layers.{}.self_attn.o_proj.bias",
    "layers.{}.ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.gate_bias": "model.layers.{}.mlp.gate_proj.bias",
    "layers.{}.up": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.up_bias": "model.layers.{}.mlp.up_proj.bias",
    "layers.{}.down": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.down_bias": "model.layers.{}.mlp.down_proj.bias",
    "norm": "model.norm.weight",
    "output": "lm_head.weight",
}

GGUF_NAMES = {
    "embed": "token_embd.weight",
    "layers.{}.attn_norm": "blk.{}.attn_norm.weight",
    "layers.{}.q": "blk.{}.attn_q.weight",
    "layers.{}.q_bias": "blk.{}.attn_q.bias",
    "layers.{}.k": "blk.{}.attn_k.weight",
    "layers.{}.k_bias": "blk.{}.attn_k.bias",
    "layers.{}.v": "blk.{}.attn_v.weight",
    "layers.{}.v_bias": "blk.{}.attn_v.bias",
    "layers.{}.o": "blk.{}.attn_output.weight",
    "layers.{}.o_bias": "blk.{}.attn_output.bias",
    "layers.{}.ffn_norm": "blk.{}.ffn_norm.weight",
    "layers.{}.gate": "blk.{}.ffn_gate.weight",
    "layers.{}.gate_bias": "blk.{}.ffn_gate.bias",
    "layers.{}.up": "blk.{}.ffn_up.weight",
    "layers.{}.up_bias": "blk.{}.ffn_up.bias",
    "layers.{}.down": "blk.{}.ffn_down.weight",
    "layers.{}.down_bias": "blk.{}.ffn_down.bias",
    "norm": "output_norm.weight",
    "output": "output.weight",
}

GGUF_INTERLEAVED = ("q", "k")

STACKED = {
    "layers.{}.gate_up": ("layers.{}.gate", "layers.{}.up"),
    "layers.{}.gate_up_bias": ("layers.{}.gate_bias", "layers.{}.up_bias"),
}

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    ffn_bias: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    """FULL or SLIDING for each layer; without it a window is all layers'."""

    ACTIVATION: ClassVar[str] = "silu"
    """As config.json calls it."""

    @property
    def rotary_dim(self) -> int:
        """How many values of each head are turned."""
        return self.head_dim

    def __post_init__(self) -> None:
        super().__post_init__()
        frequencies(self.rotary_dim, self.rope_theta, self.rope_scaling, self.context_length)
        attention_factor(self.rope_scaling)
        if self.layer_types is not None:
            self._check_layer_types(self.layer_types)

    def _check_layer_types(self, kinds: object) -> None:
        if not isinstance(kinds, list) or len(kinds) != self.n_layers:
            raise CheckpointError(f"config has {self.n_layers} layers, but layer_types = {kinds!r:.200}")
        for kind in kinds:
            one_of({"layer_types": kind}, "layer_types", (FULL, SLIDING))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        key = "hidden_activation" if "hidden_activation" in config else "hidden_act"
        one_of(config, key, [cls.ACTIVATION], cls.ACTIVATION)
        bias = truth(config, "attention_bias", False)
        return cls(
            **sizes_from_hf(config),
            **rope_from_hf(config),
            qkv_bias=bias,
            o_bias=bias,
            ffn_bias=truth(config, "mlp_bias", False),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """`metadata` without the architecture's prefix, as in "block_count"; `tensors` are the names of all."""
        if metadata.get("expert_count"):
            raise UnsupportedError("config has experts; this architecture supports dense models")
        sizes, tensors = sizes_from_gguf(metadata), metadata["tensors"]
        if metadata.get("rope.dimension_count", sizes["head_dim"]) != sizes["head_dim"]:
            raise UnsupportedError(
                f"config has rope.dimension_count = {metadata['rope.dimension_count']}; this architecture needs "
                f"head_dim = {sizes['head_dim']}"
            )
        return cls(
            **sizes,
            **rope_from_gguf(metadata),
            qkv_bias="blk.0.attn_q.bias" in tensors,
            o_bias="blk.0.attn_output.bias" in tensors,
            ffn_bias="blk.0.ffn_gate.bias" in tensors,
        )

    @classmethod
    def tiny(cls) -> Self:
        """A few thousand weights with odd sizes, for tests."""
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
            rope_theta=10000.0,
        )


def to_gguf(config: Config) -> dict[str, Any]:
    """GGUF metadata, of which from_gguf makes this config again."""
    return {**sizes_to_gguf(config), **rope_to_gguf(config.rotary_dim, config.rope_theta, config.rope_scaling)}


def windows_from_hf(config: Mapping[str, Any], layer_types: list[str]) -> dict[str, Any]:
    """The fields of a Config for windows; `layer_types` if config.json does not list them."""
    kinds = config.get("layer_types") or layer_types
    windowed = isinstance(kinds, list) and SLIDING in kinds
    return {"sliding_window": integer(config, "sliding_window") if windowed else None, "layer_types": kinds}


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model; (rows, cols) = (outputs, inputs)."""
    return model_shapes(config, layer_shapes(config))


def layer_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, ffn = config.hidden_size, config.ffn_size
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "q": (q, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "o": (hidden, q),
        "ffn_norm": (hidden,),
        "gate_up": (2 * ffn, hidden),
        "down": (hidden, ffn),
    }
    biased = ("q", "k", "v") * config.qkv_bias + ("o",) * config.o_bias + ("gate_up", "down") * config.ffn_bias
    return layer | {f"{name}_bias": layer[name][:1] for name in biased}


def model_shapes(config: DecoderConfig, layer: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of all layers, which are alike, and of what is around them."""
    result: dict[str, tuple[int, ...]] = {"embed": (config.vocab_size, config.hidden_size)}
    for i in range(config.n_layers):
        result |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    result["norm"] = (config.hidden_size,)
    if not config.tie_embeddings:
        result["output"] = (config.vocab_size, config.hidden_size)
    return result


def pairs(config: Config) -> dict[str, int]:
    return {"q": config.head_dim // 2, "k": config.head_dim // 2, "gate_up": config.ffn_size}


def caches(config: Config) -> list[LayerCache]:
    kinds = config.layer_types or [SLIDING] * config.n_layers
    windows = [config.sliding_window if kind == SLIDING else None for kind in kinds]
    return [LayerCache(config.n_kv_heads, config.head_dim, window) for window in windows]


def forward(config: Config, weights: Weights, ops: Ops[X]) -> X:
    """The step's rows -> logits of those that want them, (wanted rows, vocab_size)."""
    angles = frequencies(config.head_dim, config.rope_theta, config.rope_scaling, config.context_length)
    scale = config.head_dim**-0.5 * attention_factor(config.rope_scaling) ** 2  # of queries and of keys
    x = ops.embed(weights.embed)
    for i in range(config.n_layers):
        layer = weights.layer(i)
        h = ops.rms_norm(x, layer.attn_norm, config.norm_eps)
        q = ops.rope(ops.linear(h, layer.q, layer.get("q_bias")), config.head_dim, angles)
        k = ops.rope(ops.linear(h, layer.k, layer.get("k_bias")), config.head_dim, angles)
        v = ops.linear(h, layer.v, layer.get("v_bias"))
        h = ops.attention(q, k, v, i, scale=scale)
        x = ops.add(x, ops.linear(h, layer.o, layer.get("o_bias")))
        h = ops.rms_norm(x, layer.ffn_norm, config.norm_eps)
        h = ops.glu(ops.linear(h, layer.gate_up, layer.get("gate_up_bias")), "silu")
        x = ops.add(x, ops.linear(h, layer.down, layer.get("down_bias")))
    x = ops.rms_norm(x, weights.norm, config.norm_eps)
    return ops.logits(x, weights.embed if config.tie_embeddings else weights.output)
