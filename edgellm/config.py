"""Reading a checkpoint's config: numbers are checked here, so that the models can trust them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from edgellm.errors import CheckpointError, UnsupportedError

LIMIT = 1 << 24
"""No size of a model that fits an edge device is larger; a damaged number almost always is."""


LARGEST = 1e30
"""As float32 can hold it and its square roots, sums and products with other numbers of a config."""


def integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer of a config."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LIMIT:
        raise CheckpointError(f"config has {key} = {value!r}; expected an integer from 1 to {LIMIT}")
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite positive number of a config."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < LARGEST:
        raise CheckpointError(f"config has {key} = {value!r}; expected a positive number")
    return float(value)


def truth(config: Mapping[str, Any], key: str, default: bool | None = None) -> bool:
    """True or false in a config."""
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, bool):
        raise CheckpointError(f"config has {key} = {value!r}; expected true or false")
    return value


def one_of(config: Mapping[str, Any], key: str, known: Sequence[str], default: str | None = None) -> str:
    """A word of a config; raises UnsupportedError with the known ones."""
    value = config.get(key)
    if value is None:
        value = default
    if value not in known:
        raise UnsupportedError(f"config has {key} = {value!r}; this architecture supports {', '.join(known)}")
    return str(value)


def require(config: Mapping[str, Any], key: str, value: object) -> None:
    """Raise UnsupportedError if a config has anything but `value`, which is the only case that the model computes."""
    if config.get(key) not in (None, value):
        raise UnsupportedError(f"config has {key} = {config[key]!r:.80}; this architecture supports {value!r}")


_CHECKS = {"int": integer, "float": number, "bool": truth}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes of a decoder, to which architectures add what else they need.

    Every field of the type int, float or bool, theirs too, is checked: numbers must be positive, or None where the
    type allows it. Raises CheckpointError.
    """

    vocab_size: int
    hidden_size: int
    ffn_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    context_length: int
    """Of the model; a backend gets that with which it is loaded."""
    norm_eps: float
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        values = vars(self)
        for field in fields(self):
            kind, _, optional = str(field.type).partition(" | ")
            if kind in _CHECKS and not (optional and values[field.name] is None):
                _CHECKS[kind](values, field.name)
        if self.n_heads % self.n_kv_heads:
            raise CheckpointError(
                f"config has n_heads = {self.n_heads}, not a multiple of n_kv_heads = {self.n_kv_heads}"
            )


def sizes_from_hf(config: Mapping[str, Any], norm_eps: str = "rms_norm_eps") -> dict[str, Any]:
    """The fields of DecoderConfig from a config.json; `norm_eps` is its word for that."""
    n_heads, hidden_size = integer(config, "num_attention_heads"), integer(config, "hidden_size")
    return {
        "vocab_size": integer(config, "vocab_size"),
        "hidden_size": hidden_size,
        "ffn_size": integer(config, "intermediate_size"),
        "n_layers": integer(config, "num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": integer(config, "num_key_value_heads", n_heads),
        "head_dim": integer(config, "head_dim", hidden_size // n_heads),
        "context_length": integer(config, "max_position_embeddings", 2048),
        "norm_eps": number(config, norm_eps, 1e-6),
        "tie_embeddings": truth(config, "tie_word_embeddings", False),
    }


def sizes_from_gguf(metadata: Mapping[str, Any], norm_eps: str = "attention.layer_norm_rms_epsilon") -> dict[str, Any]:
    """The fields of DecoderConfig from GGUF metadata without the architecture's prefix: "block_count"."""
    n_heads, hidden_size = integer(metadata, "attention.head_count"), integer(metadata, "embedding_length")
    head_dim = integer(metadata, "attention.key_length", hidden_size // n_heads)
    if integer(metadata, "attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(
            f"config has attention.value_length = {metadata['attention.value_length']}; this version needs it to be "
            f"attention.key_length, {head_dim}"
        )
    return {
        "vocab_size": integer(metadata, "vocab_size"),
        "hidden_size": hidden_size,
        "ffn_size": integer(metadata, "feed_forward_length"),
        "n_layers": integer(metadata, "block_count"),
        "n_heads": n_heads,
        "n_kv_heads": integer(metadata, "attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "context_length": integer(metadata, "context_length"),
        "norm_eps": number(metadata, norm_eps),
    }


def sizes_to_gguf(config: DecoderConfig, norm_eps: str = "attention.layer_norm_rms_epsilon") -> dict[str, Any]:
    """GGUF metadata, of which sizes_from_gguf makes these fields again."""
    return {
        "vocab_size": config.vocab_size,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.ffn_size,
        "block_count": config.n_layers,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "context_length": config.context_length,
        norm_eps: config.norm_eps,
    }


def template(name: str) -> tuple[str, list[int]]:
    """A tensor's name as the tables of names have it, and the numbers of its layer and expert."""
    words = name.split(".")
    numbers = [int(word) for word in words if word.isdigit()]
    return ".".join("{}" if word.isdigit() else word for word in words), numbers


def from_json(cls: type[Any], config: Mapping[str, Any]) -> Any:
    """A Config from the dict that dataclasses.asdict gave, perhaps before some fields with a default were added.

    Raises CheckpointError for unknown and missing keys.
    """
    known = {field.name for field in fields(cls)}
    needed = {field.name for field in fields(cls) if field.default is MISSING}
    if not needed <= set(config) <= known:
        raise CheckpointError(
            f"config has the keys {sorted(config)}; expected {sorted(needed)}, and perhaps {sorted(known - needed)}: "
            "made by another version of edgellm?"
        )
    return cls(**config)
