"""Low-rank adapters (LoRA): folders as PEFT saves them, and GGUF files as llama.cpp's converter makes them of those.

Both name the matrices as checkpoints of their kind do, so the tables of the architecture say which of ours they are.
What such a file asks for besides pairs of small matrices is refused by name: nothing of it is left out. A file is not
trusted: see gguf.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgellm import architectures
from edgellm.adapter import LowRank, stacked
from edgellm.architectures import Architecture, Stored
from edgellm.arrays import F32, U8
from edgellm.errors import CheckpointError, ModelNotFoundError, UnsupportedError

from .blocks import TYPES, decode_rows
from .checkpoint import Checkpoint, SourceTensor, errors_about, listed
from .gguf import GGUFFile
from .json_file import read_object
from .naming import Place, parts, places
from .rows import row_order
from .weights import READERS, kind_of

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
NOT_COMPUTED = (
    "alora_invocation_tokens", "arrow_config", "layer_replication", "lora_bias", "modules_to_save", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
)  # fmt: skip
"""What PEFT's config may ask for that is more than pairs of matrices."""
CHANGES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
"""Ways to begin a training that take something off the model's own weights."""
_IN_PEFT = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
_IN_GGUF = re.compile(r"(.+)\.lora_([ab])")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as it is stored: pairs by the names of a checkpoint's tensors."""

    path: Path
    kind: str
    """What it is, to be shown."""
    pairs: Mapping[str, LowRank]
    """Scaled as the file says."""
    in_gguf: bool
    architecture: str | None = None
    """What a GGUF file says it is for, in GGUF's words."""
    base: str | None = None
    """The model that it was trained on, as it says."""

    def facts(self) -> dict[str, Any]:
        """What it is, to be shown."""
        modules = sorted({re.sub(r"\d+", "N", name) for name in self.pairs})
        return {
            "kind": self.kind,
            "base": self.base,
            "architecture": self.architecture,
            "matrices": len(self.pairs),
            "ranks": sorted({len(a) for a, _ in self.pairs.values()}),
            "weights": sum(a.size + b.size for a, b in self.pairs.values()),
            "changes": modules,
        }


def open_adapter(path: Path) -> AdapterFile:
    """Read an adapter of whatever model.

    Raises ModelNotFoundError if nothing is there, CheckpointError for a damaged one, UnsupportedError for one that asks
    for what this version does not compute.
    """
    path = path.absolute()
    with errors_about(path):
        if path.is_dir():
            return _read_peft(path, next((path / name for name in WEIGHTS if (path / name).exists()), None))
        if not path.is_file():
            raise ModelNotFoundError(f"{path}: no such adapter; expected a folder with {CONFIG}, or a GGUF file")
        with open(path, "rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        return _read_gguf(path) if is_gguf else _read_peft(path.parent, path)


def is_adapter(path: Path) -> bool:
    """Whether it is one by its looks, and no model."""
    if path.is_dir():
        return (path / CONFIG).exists()
    if path.suffix.lower() != ".gguf" or not path.is_file():
        return False
    return GGUFFile(path).metadata.get("general.type") == "adapter"


def read_adapter(path: Path, architecture: Architecture, config: Any, scale: float = 1.0) -> dict[str, LowRank]:
    """What an adapter adds to a model, by our tensors' names. Raises what `open_adapter` does, and CheckpointError for
    one that is another model's."""
    found, result = _fitted(open_adapter(path), architecture, config, scale), dict[str, LowRank]()
    for name, made_of in parts(architecture, config).items():
        if any(part in found for part in made_of):
            result[name] = _of_rows([(shape, found.get(part)) for part, shape in made_of.items()])
    return result


def _of_rows(made_of: Sequence[tuple[tuple[int, ...], LowRank | None]]) -> LowRank:
    """One pair for a matrix whose rows are those of several, one after the other."""
    first, pairs, total = 0, list[LowRank](), sum(shape[0] for shape, _ in made_of)
    for shape, pair in made_of:
        if pair:
            b = np.zeros((total, pair.b.shape[1]), np.float32)
            b[first : first + shape[0]] = pair.b
            alike = next((i for i, other in enumerate(pairs) if other.a is pair.a), None)
            if alike is None:
                pairs.append(LowRank(pair.a, b))
            else:
                pairs[alike] = LowRank(pair.a, pairs[alike].b + b)
        first += shape[0]
    return stacked(pairs)


def merged(checkpoint: Checkpoint, path: Path, scale: float = 1.0) -> Checkpoint:
    """A checkpoint whose weights have an adapter added; raises what `read_adapter` does, and UnsupportedError for
    weights that are ternary, which nothing can be added to."""
    if checkpoint.ternary:
        raise UnsupportedError(
            "the weights are ternary, and would not be with an adapter; give it to a command that runs the model"
        )
    architecture = architectures.get(checkpoint.architecture)
    found, tensors = _fitted(open_adapter(path), architecture, checkpoint.config, scale), dict(checkpoint.tensors)
    for name, made_of in parts(architecture, checkpoint.config).items():
        turned = name.split(".")[-1] in checkpoint.interleaved
        pairs = [_turned_back(found.get(part), checkpoint.config.head_dim if turned else 0) for part in made_of]
        tensors[name] = tuple(
            _with(source, pair) if pair else source for source, pair in zip(tensors[name], pairs, strict=True)
        )
    return replace(checkpoint, tensors=tensors)


def _turned_back(pair: LowRank | None, head_dim: int) -> LowRank | None:
    """For rows in the order of a checkpoint that has RoPE pairs adjacent."""
    if pair is None or not head_dim:
        return pair
    b = np.empty_like(pair.b)
    b[row_order(len(b), 0, 1, head_dim)] = pair.b
    return LowRank(pair.a, b)


def _with(source: SourceTensor, pair: LowRank) -> SourceTensor:
    def read(first: int, stop: int) -> U8:
        values = decode_rows(source.type, source.read(first, stop)) + np.float32(source.plus)
        total: F32 = values + pair.b[first:stop] @ pair.a
        return total.view(np.uint8)

    type = replace(TYPES["F32"], keep=source.type.keep, repack=None)
    return replace(source, type=type, read=read, plus=0.0)


# ---- which matrices they are


def _fitted(file: AdapterFile, architecture: Architecture, config: Any, scale: float) -> dict[str, LowRank]:
    """The pairs by the names of the architecture's tables, b's rows in our order, times scale."""
    with errors_about(file.path):
        _check_architecture(file, architecture)
        names = architecture.GGUF_NAMES if file.in_gguf else architecture.HF_NAMES
        where, result = places(architecture, config, names), dict[str, LowRank]()
        pairs = _named(file, where, names)
        for part, place in where.items():
            pair = pairs.get(place.tensor)
            if pair is not None:
                _check(file, part, place, pair)
                turned = file.in_gguf and part.split(".")[-1] in architecture.GGUF_INTERLEAVED
                b = pair.b if place.rows is None else pair.b[place.rows]
                b = b[row_order(len(b), 0, 1, config.head_dim)] if turned else b
                result[part] = LowRank(pair.a, b * np.float32(scale))
        return result


def _check_architecture(file: AdapterFile, architecture: Architecture) -> None:
    name = architecture.__name__.rpartition(".")[2]  # type: ignore[attr-defined]
    expected = getattr(architecture, "GGUF_ARCHITECTURE", name)
    if file.in_gguf and file.architecture != expected:
        raise CheckpointError(
            f"the adapter is for models of the architecture {file.architecture!r}; expected {expected!r}, this "
            "model's: load it with the model that it was trained on"
        )


def _named(file: AdapterFile, where: Mapping[str, Place], names: Mapping[str, str | Stored]) -> dict[str, LowRank]:
    """The pairs by the names of the table, in which those of a model without its head have one more word."""
    around = str(names["embed"]), str(names["output"])
    known = {place.tensor for place in where.values()} | set(around)
    base = around[0].partition(".")[0]
    pairs = {name if name in known else f"{base}.{name}": pair for name, pair in file.pairs.items()}
    unknown = [name for name, ours in zip(file.pairs, pairs, strict=True) if ours not in known]
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} of the adapter's {len(pairs)} matrices are none of this model: {listed(unknown)}; "
            f"expected names as {_example(names)}: was it trained on another model?"
        )
    for name in around:
        if name in pairs:
            raise _not_computed(name)
    return pairs


def _example(names: Mapping[str, str | Stored]) -> str:
    entry = next(names[key] for key in names if _is_computed(key) and not key.endswith(("norm", "bias")))
    return (entry if isinstance(entry, str) else entry.name).format(0, 0)


def _is_computed(part: str) -> bool:
    """Whether a matrix is one that all rows of a step are multiplied with, of a layer."""
    return part.startswith("layers.") and ".experts." not in part and part.split(".")[-1] not in architectures.FLOAT32


def _check(file: AdapterFile, part: str, place: Place, pair: LowRank) -> None:
    if not _is_computed(part) or len(place.shape) != 2:
        raise _not_computed(place.tensor)
    rows, cols = place.shape[::-1] if place.stored.transposed else place.shape
    if pair.a.shape[1] != cols or pair.b.shape[0] != rows:
        raise CheckpointError(
            f"the adapter of {place.tensor} is for a matrix of {pair.b.shape[0]} x {pair.a.shape[1]}; this model's has "
            f"{rows} x {cols}: load it with the model that it was trained on"
        )


def _not_computed(tensor: str) -> UnsupportedError:
    return UnsupportedError(
        f"the adapter changes {tensor}; this version computes adapters of attention and feed-forward matrices, not of "
        "embeddings, outputs, experts, norms and biases: use one that leaves it alone"
    )


def _paired(found: Mapping[str, SourceTensor], name: re.Pattern[str]) -> dict[str, LowRank]:
    """Pairs that fit each other, not yet scaled, by what stands before the ending of their names."""
    halves: dict[str, dict[str, SourceTensor]] = {}
    others = []
    for key, tensor in found.items():
        if match := name.fullmatch(key):
            halves.setdefault(match[1], {})[match[2].lower()] = tensor
        else:
            others.append(key)
    if others:
        raise UnsupportedError(
            f"the adapter has {listed(others)}; this version computes pairs of lora_A and lora_B of linear layers, and "
            "leaves nothing out: use an adapter without"
        )
    if not halves:
        raise CheckpointError("the adapter holds no pairs of matrices; expected lora_A and lora_B of linear layers")
    return {key: _pair(key, half) for key, half in halves.items()}


def _pair(key: str, half: Mapping[str, SourceTensor]) -> LowRank:
    if half.keys() != {"a", "b"}:
        raise CheckpointError(f"of {key} the adapter has lora_{min(half)} alone; expected lora_a and lora_b")
    a, b = (half[which] for which in ("a", "b"))
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise CheckpointError(
            f"of {key} the adapter has matrices of {a.shape} and {b.shape}; expected (rank, inputs) and (outputs, rank)"
        )
    return LowRank(_values(a), _values(b))


def _values(tensor: SourceTensor) -> F32:
    values = decode_rows(tensor.type, tensor.read(0, tensor.shape[0]))
    if not np.isfinite(values).all():
        raise CheckpointError(f"tensor {tensor.name!r} has weights that are not finite; the adapter is damaged")
    return values


def _scaled(pair: LowRank, scale: float) -> LowRank:
    return LowRank(pair.a, pair.b * np.float32(scale))


# ---- PEFT


def _read_peft(folder: Path, weights: Path | None) -> AdapterFile:
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"{folder} has no {CONFIG}; expected an adapter as PEFT saves it, or a GGUF file")
    if weights is None:
        raise CheckpointError(f"{folder} has none of {', '.join(WEIGHTS)}; fetch the adapter again")
    config = read_object(folder / CONFIG)
    _check_config(config)
    pairs = _paired(READERS[kind_of(weights)](weights), _IN_PEFT)
    ranks = {_whole(config, "r"), *_pattern(config, "rank_pattern").values()}
    alphas, alpha = _pattern(config, "alpha_pattern"), _number("lora_alpha", config.get("lora_alpha", 8))
    result = {}
    for module, pair in pairs.items():
        rank = len(pair.a)
        if rank not in ranks:
            raise CheckpointError(f"the adapter of {module} has rank {rank}; {CONFIG} says {_listed_numbers(ranks)}")
        divisor = math.sqrt(rank) if config.get("use_rslora") else rank
        result[f"{module}.weight"] = _scaled(pair, _of_module(alphas, module, alpha) / divisor)
    base = config.get("base_model_name_or_path")
    return AdapterFile(folder, "PEFT adapter", result, in_gguf=False, base=base if isinstance(base, str) else None)


def _check_config(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for what is more than low-rank pairs."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{CONFIG} has peft_type = {kind!r}; this version reads adapters of the kind 'LORA'")
    for key in NOT_COMPUTED:
        if config.get(key):
            raise UnsupportedError(
                f"{CONFIG} has {key} = {str(config[key])[:200]}, which this version does not compute; merge the "
                "adapter with PEFT, and convert the model that it makes"
            )
    if config.get("bias", "none") != "none":
        raise UnsupportedError(f"{CONFIG} has bias = {config['bias']!r}; this version computes adapters without biases")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise UnsupportedError(
            f"{CONFIG} has init_lora_weights = {start[:50]!r}, which changes the model's own weights; merge the "
            "adapter with PEFT, and convert the model that it makes"
        )


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise CheckpointError(f"the adapter has {key} = {str(value)[:100]}; expected a number")
    return float(value)


def _whole(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{CONFIG} has {key} = {str(value)[:100]}; expected a whole number above 0")
    return value


def _pattern(config: Mapping[str, Any], key: str) -> dict[str, float]:
    """Numbers by endings of modules' names; a "^" stands before whole names."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{CONFIG} has {key} = {str(patterns)[:100]}; expected an object")
    for name in patterns:
        if not re.fullmatch(r"\^?[\w.]+", name):
            raise UnsupportedError(
                f"{CONFIG} has {name[:100]!r} in {key}; this version takes names of modules, no other expressions"
            )
    return {name: _number(f"{key} of {name}", value) for name, value in patterns.items()}


def _of_module(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The first one that fits, as PEFT has it."""
    return next((value for name, value in patterns.items() if _fits(name, module)), default)


def _fits(name: str, module: str) -> bool:
    return module == name[1:] if name.startswith("^") else f".{module}".endswith(f".{name}")


def _listed_numbers(numbers: Iterable[float]) -> str:
    return listed((f"{number:g}" for number in sorted(numbers)), " or ")


# ---- GGUF


def _read_gguf(path: Path) -> AdapterFile:
    file = GGUFFile(path)
    said = {key: file.metadata.get(key) for key in ("general.type", "adapter.type", "general.architecture")}
    if said["general.type"] != "adapter":
        raise CheckpointError(
            f"the file has general.type = {str(said['general.type'])[:50]!r}; expected 'adapter': is it a model?"
        )
    if said["adapter.type"] != "lora":
        raise UnsupportedError(
            f"the file has adapter.type = {str(said['adapter.type'])[:50]!r}; this version reads 'lora'"
        )
    if "adapter.alora.invocation_tokens" in file.metadata:
        raise UnsupportedError("the adapter begins at invocation tokens (aLoRA), which this version does not compute")
    alpha = _number("adapter.lora.alpha", file.metadata.get("adapter.lora.alpha", 0.0))
    pairs = {
        name: _scaled(pair, alpha / len(pair.a) if alpha else 1.0)  # as llama.cpp has it
        for name, pair in _paired(file.tensors, _IN_GGUF).items()
    }
    return AdapterFile(path, "GGUF adapter", pairs, in_gguf=True, architecture=str(said["general.architecture"])[:64])
