"""Reading a checkpoint's config: numbers are checked here, so that the models can trust them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from edgellm.errors import CheckpointError

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


def template(name: str) -> tuple[str, list[int]]:
    """A tensor's name as the tables of names have it, and the numbers of its layer and expert."""
    words = name.split(".")
    numbers = [int(word) for word in words if word.isdigit()]
    return ".".join("{}" if word.isdigit() else word for word in words), numbers


def from_json(cls: type[Any], config: Mapping[str, Any]) -> Any:
    """A Config from the dict that dataclasses.asdict gave; unknown and missing keys are errors."""
    known = {field.name for field in fields(cls)}
    if set(config) != known:
        raise CheckpointError(
            f"config has the keys {sorted(config)}; expected {sorted(known)}: made by another version of edgellm?"
        )
    return cls(**config)
