"""Rotary position embedding: the angle per position of each pair of a head (arXiv:2104.09864), and its scaling.

`scaling`, None or an object that JSON can hold, stretches angles for contexts longer than a model was trained on:

    {"type": "linear", "factor"}                    all alike
    {"type": "factors", "factors": [...]}           a divisor for each pair
    {"type": "llama3", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    {"type": "yarn", "factor", "beta_fast", "beta_slow", "truncate", "original_max_position_embeddings",
     "attention_factor"}                            (arXiv:2309.00071)
    {"type": "longrope", "short_factor": [...], "long_factor": [...], "original_max_position_embeddings",
     "attention_factor"}                            divisors by the length of the context (arXiv:2402.13753)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgellm.arrays import F32
from edgellm.config import number, truth
from edgellm.errors import CheckpointError, UnsupportedError

TRAINED = "original_max_position_embeddings"
_NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", TRAINED),
    "yarn": ("factor", TRAINED),
    "longrope": (TRAINED,),
}


def frequencies(rotary_dim: int, theta: float, scaling: Mapping[str, Any] | None, context_length: int) -> F32:
    """Radians per position: (rotary_dim / 2,) float32; context_length is that with which the model is loaded.

    Raises CheckpointError or UnsupportedError for a scaling that is not as described above.
    """
    if rotary_dim % 2:
        raise CheckpointError(f"config has rotary heads of {rotary_dim}; RoPE needs an even number")
    base = theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    stretched: F32 = (base / _divisors(base, theta, scaling, context_length)).astype(np.float32)
    return stretched


def attention_factor(scaling: Mapping[str, Any] | None) -> float:
    """What turned queries and keys are multiplied by, each."""
    return number(scaling or {}, "attention_factor", 1.0)


def rope_from_hf(config: Mapping[str, Any], theta: float = 10000.0) -> dict[str, Any]:
    """rope_theta and rope_scaling of a config.json, where older ones have `rope_scaling`, newer `rope_parameters`."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = given.get("rope_type") or given.get("type") or "default"
    scaling = None if kind == "default" else _scaling(kind, config, given)
    return {"rope_theta": number({**config, **given}, "rope_theta", theta), "rope_scaling": scaling}


def _scaling(kind: object, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(kind, str):
        raise CheckpointError(f"config has rope scaling of the type {kind!r:.80}; expected a word")
    trained = config.get(TRAINED) or given.get(TRAINED) or config.get("max_position_embeddings")
    rope = {**given, TRAINED: trained}
    if kind in ("yarn", "longrope") and rope.get("factor") is None:
        rope["factor"] = number(config, "max_position_embeddings") / number(rope, TRAINED)
    result: dict[str, Any] = {"type": kind, **{key: number(rope, key) for key in _NUMBERS.get(kind, ())}}
    if kind == "yarn":
        result |= {
            "beta_fast": number(rope, "beta_fast", 32),
            "beta_slow": number(rope, "beta_slow", 1),
            "truncate": truth(rope, "truncate", True),
            "attention_factor": number(rope, "attention_factor", _yarn_attention_factor(rope)),
        }
    elif kind == "longrope":
        grown = max(1.0, number(rope, "factor"))
        default = math.sqrt(1 + math.log(grown) / math.log(number(rope, TRAINED))) if grown > 1 else 1.0
        result |= {key: rope.get(key) for key in ("short_factor", "long_factor")}
        result["attention_factor"] = number(rope, "attention_factor", default)
    return result


def _yarn_attention_factor(rope: Mapping[str, Any]) -> float:
    grown = math.log(max(1.0, number(rope, "factor")))
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return (0.1 * number(rope, "mscale") * grown + 1) / (0.1 * number(rope, "mscale_all_dim") * grown + 1)
    return 0.1 * grown + 1


def rope_from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling of GGUF metadata without the architecture's prefix.

    Tensors of divisors stand in it as lists, by their names without ".weight".
    """
    return {
        "rope_theta": number(metadata, "rope.freq_base", 10000.0),
        "rope_scaling": _scaling_from_gguf(metadata),
    }


def _scaling_from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    factor = metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear"))
    kind = metadata.get("rope.scaling.type", "none" if factor is None else "linear")
    if "rope_factors_long" in metadata:
        kind = "longrope"
    if "rope_freqs" in metadata:
        if kind != "none":
            raise UnsupportedError(f"rope scaling {kind!r} together with the tensor rope_freqs.weight is not supported")
        return {"type": "factors", "factors": metadata["rope_freqs"]}
    if kind == "none":
        return None
    log_multiplier, attention = (metadata.get(f"rope.scaling.{key}") for key in ("yarn_log_multiplier", "attn_factor"))
    given = {
        "factor": factor,
        TRAINED: metadata.get("rope.scaling.original_context_length"),
        "beta_fast": metadata.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": metadata.get("rope.scaling.yarn_beta_slow"),
        "mscale": log_multiplier and 1.0,
        "mscale_all_dim": log_multiplier,
        "short_factor": metadata.get("rope_factors_short"),
        "long_factor": metadata.get("rope_factors_long"),
        "attention_factor": attention if kind == "longrope" else None,
    }
    return _scaling(kind, {"max_position_embeddings": metadata.get("context_length")}, given)


def rope_to_gguf(rotary_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """GGUF metadata of which rope_from_gguf makes the same angles; llama3's scaling is told in divisors, as always."""
    said = {"rope.dimension_count": rotary_dim, "rope.freq_base": theta}
    return said | (_scaling_to_gguf(rotary_dim, theta, scaling) if scaling else {})


def _scaling_to_gguf(rotary_dim: int, theta: float, scaling: Mapping[str, Any]) -> dict[str, Any]:
    kind = scaling["type"]
    if kind in ("factors", "llama3"):
        base = theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
        return {"rope_freqs": _divisors(base, theta, scaling, 0).astype(np.float32).tolist()}
    trained = {"rope.scaling.original_context_length": int(scaling.get(TRAINED, 0))}
    if kind == "longrope":
        divisors = {f"rope_factors_{length}": scaling[f"{length}_factor"] for length in ("short", "long")}
        return {**trained, **divisors, "rope.scaling.attn_factor": scaling["attention_factor"]}
    said = {"rope.scaling.type": kind, "rope.scaling.factor": scaling["factor"]}
    if kind == "linear":
        return said
    betas = {f"rope.scaling.yarn_{key}": scaling[key] for key in ("beta_fast", "beta_slow")}
    return {**said, **trained, **betas}


def _divisors(base: Any, theta: float, scaling: Mapping[str, Any] | None, context_length: int) -> Any:
    kind = scaling["type"] if scaling else None
    if scaling is None:
        return 1.0
    if kind == "linear":
        return number(scaling, "factor")
    if kind == "factors":
        return _listed(scaling, "factors", len(base))
    if kind == "llama3":
        return _llama3(base, scaling)
    if kind == "yarn":
        return _yarn(len(base), theta, scaling)
    if kind == "longrope":
        short, long = (_listed(scaling, key, len(base)) for key in ("short_factor", "long_factor"))
        return long if context_length > number(scaling, TRAINED) else short
    raise UnsupportedError(
        f"rope scaling {kind!r} is not supported; this version has linear, llama3, yarn, longrope and factors"
    )


def _listed(scaling: Mapping[str, Any], key: str, count: int) -> Any:
    factors = scaling.get(key)
    if not isinstance(factors, list) or len(factors) != count:
        raise CheckpointError(f"rope scaling has the {key} {str(factors)[:80]}; expected a list of {count} numbers")
    return np.array([number({key: factor}, key) for factor in factors])


def _llama3(base: Any, scaling: Mapping[str, Any]) -> Any:
    """Slow waves are stretched, fast ones kept, those between blended (Llama 3.1 model card)."""
    factor, low, high, trained = (number(scaling, key) for key in _NUMBERS["llama3"])
    if high <= low:
        raise CheckpointError(f"rope scaling has high_freq_factor {high} <= low_freq_factor {low}")
    turns = trained * base / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (kept + (1 - kept) / factor)


def _yarn(count: int, theta: float, scaling: Mapping[str, Any]) -> Any:
    """As llama3, but blended evenly from pair to pair: between those that turn beta_fast and beta_slow times."""
    factor, trained = (number(scaling, key) for key in _NUMBERS["yarn"])
    if theta <= 1:
        raise CheckpointError(f"config has rope_theta = {theta}; yarn scaling needs more than 1")
    pairs = [
        count * math.log(trained / (number(scaling, key) * 2 * math.pi)) / math.log(theta)
        for key in ("beta_fast", "beta_slow")
    ]
    first, last = (math.floor(pairs[0]), math.ceil(pairs[1])) if truth(scaling, "truncate") else pairs
    first, last = max(first, 0), min(last, 2 * count - 1)
    stretched = np.clip((np.arange(count) - first) / (last - first or 0.001), 0, 1)
    return 1 / (1 - stretched + stretched / factor)
