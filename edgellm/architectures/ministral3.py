"""Ministral 3: Llama that scales its queries by position beyond the length it was trained on.

No op scales by position: contexts are limited to that length, 16384, within which the scale is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgellm.architectures import llama
from edgellm.architectures.llama import GGUF_INTERLEAVED, GGUF_NAMES, HF_NAMES, STACKED, caches, forward, pairs, shapes
from edgellm.config import integer
from edgellm.rope import TRAINED, attention_factor

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "Ministral 3"

__all__ = ["GGUF_INTERLEAVED", "GGUF_NAMES", "HF_NAMES", "STACKED", "Config", "caches", "forward", "pairs", "shapes"]

GGUF_ARCHITECTURE = "mistral3"


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        rope = config.get("rope_parameters") or {}
        made = super().from_hf(config)
        return made._limited(integer(rope, TRAINED)) if rope.get("llama_4_scaling_beta") else made

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        made = super().from_gguf(metadata)
        scaled = metadata.get("attention.temperature_scale")
        return made._limited(integer(metadata, "rope.scaling.original_context_length")) if scaled else made

    def _limited(self, context_length: int) -> Self:
        return replace(self, context_length=min(self.context_length, context_length))


def to_gguf(config: Config) -> dict[str, Any]:
    """GGUF metadata, of which from_gguf makes this config again."""
    return {**llama.to_gguf(config), **_yarn_attention(config.rope_scaling or {})}


def _yarn_attention(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing for YaRN's own factor, or what makes it 1."""
    plain = scaling.get("type") == "yarn" and attention_factor(scaling) == 1
    return {"rope.scaling.yarn_log_multiplier": 1.0} if plain else {}
