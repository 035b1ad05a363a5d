"""Random low-rank adapters for any model, as PEFT saves them."""

import json

import numpy as np
import safetensors.numpy

from edgellm.converters.adapter import _is_computed
from edgellm.converters.naming import places

CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none"}


def tensors(architecture, config, rank=8, seed=0, size=0.5):
    """Pairs for every matrix of the layers; what they add is about `size` times as large as what is there."""
    rng, result = np.random.default_rng(seed), {}
    where = places(architecture, config, architecture.HF_NAMES)
    for name, place in {place.tensor: place for part, place in where.items() if _is_computed(part)}.items():
        if len(place.shape) == 2:
            rows, cols = place.shape[::-1] if place.stored.transposed else place.shape
            module = f"base_model.model.{name.removesuffix('.weight')}"
            result[f"{module}.lora_A.weight"] = normal(rng, rank, cols) / cols**0.5
            result[f"{module}.lora_B.weight"] = normal(rng, rows, rank) * size / rank**0.5
    return result


def normal(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def write(folder, values, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    safetensors.numpy.save_file(values, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def written(folder, model, rank=8, seed=0, size=0.5, **changes):
    """For a loaded model."""
    values = tensors(model._architecture, model.config, rank, seed, size)
    return write(folder, values, r=rank, lora_alpha=rank, **changes)
