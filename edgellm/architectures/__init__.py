"""Model architectures: wiring over ops. One architecture a file, named after its `model_type`, found by that name.

An architecture module has

    MODELS        the models it runs, in words
    VERIFIED      models whose trained weights were compared with another runtime, if any; random weights always are
    Config        a frozen dataclass with from_hf(config.json), from_gguf(metadata) and tiny()
    HF_NAMES      our tensor name -> the checkpoint's, or Stored; "{}" stands for the layer, a second for the expert
    GGUF_NAMES    the same for GGUF
    GGUF_INTERLEAVED   matrices whose rows (and biases) GGUF stores with RoPE pairs adjacent (2i, 2i+1), not half a head
                  apart
    GGUF_ARCHITECTURE  what GGUF files call it, if not by the module's name
    to_gguf(config)    if `edgellm export` is to write it: metadata of which Config.from_gguf makes this config again,
                  without the architecture's prefix
    STACKED       our tensor -> the tensors of the tables above whose rows it holds, one after the other
    shapes(config)     our tensor name -> shape, every tensor that must be there
    pairs(config)      last part of a name -> half, for matrices whose rows are stored in pairs (quant.paired)
    caches(config)     what each layer remembers, attention's and a convolution's, by the `layer` given to the op
    forward(config, weights, ops)  the model
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol, cast

from edgellm.errors import UnsupportedError
from edgellm.ops import Ops, X
from edgellm.tensor import Weights

FLOAT32 = ("router", "taps")
"""Last parts of the names of matrices that are small, and stay float32 in every recipe: an expert that is chosen in
place of another costs more than the bytes."""


@dataclass(frozen=True)
class LayerCache:
    """What one layer remembers of every position, `window` of which a token sees, None for all: keys and values of
    attention, or one array, the input of a convolution, for which the kernel's size is the window."""

    n_kv_heads: int
    head_dim: int
    window: int | None = None
    n_arrays: int = 2


@dataclass(frozen=True)
class Stored:
    """Where and how a checkpoint has a tensor of ours, if not simply under a name of its own."""

    name: str
    """The checkpoint's tensor. Without a "{}" for the expert it holds those of all experts, one after the other."""
    of: tuple[str, ...] = ()
    """Our tensors that it holds, of which this is one: the rows of the first, of the second..."""
    by_head: bool = False
    """Of those the rows of one head each take turns."""
    transposed: bool = False
    """It is (inputs, outputs), and `of` are columns."""
    plus: float = 0.0
    """What is added to its values."""


class Config(Protocol):
    vocab_size: int
    n_layers: int
    context_length: int


class Architecture(Protocol):
    MODELS: str
    Config: Any
    HF_NAMES: Mapping[str, str | Stored]
    GGUF_NAMES: Mapping[str, str | Stored]
    GGUF_INTERLEAVED: Sequence[str]
    STACKED: Mapping[str, Sequence[str]]

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]: ...
    def pairs(self, config: Any) -> dict[str, int]: ...
    def caches(self, config: Any) -> list[LayerCache]: ...
    def forward(self, config: Any, weights: Weights, ops: Ops[X]) -> X: ...


def names() -> list[str]:
    return sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))


def get(name: str) -> Architecture:
    """The architecture module of that name; raises UnsupportedError with the known names, and the nearest."""
    if name not in names():
        nearest = get_close_matches(name, names(), 1)
        raise UnsupportedError(
            f"architecture {name!r} is not supported; this version has {', '.join(names())}"
            + (f": the nearest is {nearest[0]}" if nearest else "")
        )
    return cast(Architecture, import_module(f"{__name__}.{name}"))


def named_in_gguf(name: str) -> str:
    """Our name of the architecture that GGUF files call so; the same if none is called so."""
    if name in names():
        return name
    return next((ours for ours in names() if getattr(get(ours), "GGUF_ARCHITECTURE", ours) == name), name)


def described() -> list[tuple[str, str, str, str]]:
    """Of every architecture its name, the models it runs, the weights it was verified with, where it is read from."""
    return [_described(name, get(name)) for name in names()]


def _described(name: str, architecture: Architecture) -> tuple[str, str, str, str]:
    verified = (*getattr(architecture, "VERIFIED", ()), "random weights")
    in_gguf = getattr(architecture, "GGUF_ARCHITECTURE", name)
    sources = f"Hugging Face, GGUF{'' if in_gguf == name else f' ({in_gguf})'}"
    return name, architecture.MODELS, ", ".join(verified), sources
