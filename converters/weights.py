"""The weights of a folder or a file: finds them, recognises their format, joins their shards. Knows no architecture."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgellm.catalog import CHECKPOINTS
from edgellm.errors import CheckpointError, UnsupportedError

from .archive import members
from .checkpoint import SourceTensor, is_computed, listed, unreadable
from .json_file import read_object
from .npz import SUFFIX, read_npz
from .pytorch import LEGACY, read_pytorch
from .safetensors import read_safetensors

Reader = Callable[[Path], dict[str, SourceTensor]]

READERS: Mapping[str, Reader] = {"safetensors": read_safetensors, "PyTorch": read_pytorch, "npz": read_npz}
ZIP = b"PK\3\4"
MARKS = (ZIP, LEGACY)
"""With which files of PyTorch and NumPy start."""
FILES = {"model.safetensors": "safetensors", "pytorch_model.bin": "PyTorch"}
"""What Hugging Face folders call their weights, in the order of preference; of shards, NAME.index.json."""


def read_weights(path: Path) -> tuple[str, dict[str, SourceTensor]]:
    """What kind of source a folder or file is, and its tensors by the names they have there.

    Raises CheckpointError if weights are missing or damaged, UnsupportedError for what is not read here.
    """
    if path.is_file():
        kind = kind_of(path)
        return f"{kind} file", READERS[kind](path)
    for name, kind in FILES.items():
        single, index = path / name, path / f"{name}.index.json"
        if single.exists():
            return f"Hugging Face folder of {kind}", READERS[kind](single)
        if index.exists():
            return f"Hugging Face folder of {kind} shards", _sharded(index, READERS[kind])
    others = sorted(file.name for file in path.iterdir() if file.suffix in CHECKPOINTS)
    raise CheckpointError(
        f"{path} has none of {', '.join(FILES)} and no index of one; "
        + (f"for the weights in {listed(others)} give the file itself" if others else "fetch the model again")
    )


def kind_of(path: Path) -> str:
    """Which of READERS a file is for, as its first bytes say. Raises UnsupportedError if it is for none."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(LEGACY))
    except OSError as error:
        raise unreadable(path, error) from error
    if start.startswith(ZIP):
        return "npz" if any(name.endswith(SUFFIX) for name in members(path)) else "PyTorch"
    if start == LEGACY:
        return "PyTorch"
    if path.suffix == ".safetensors":
        return "safetensors"
    raise UnsupportedError(
        f"{path}: not a checkpoint that can be converted; convert reads GGUF files, Hugging Face folders, llama2.c "
        ".bin files, and safetensors, torch.save and .npz files with a config.json beside them"
    )


def _sharded(index: Path, read: Callable[[Path], dict[str, SourceTensor]]) -> dict[str, SourceTensor]:
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict):
        raise CheckpointError(f"{index} has no weight_map; expected an object of tensor and file names")
    files = sorted(set(_plain_names(index, places.values())))
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise CheckpointError(f"{index} names files that are not beside it: {listed(missing)}; fetch them")
    shards = {file: read(index.parent / file) for file in files}
    astray = [
        f"{name} in {file}" for name, file in places.items() if name not in shards[file] and not is_computed(name)
    ]
    if astray:
        raise CheckpointError(f"{index} says where tensors are that are not there: {listed(astray)}")
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    if len(tensors) != sum(map(len, shards.values())):
        raise CheckpointError(f"the shards of {index} hold a tensor twice; expected each in one file")
    return tensors


def _plain_names(index: Path, files: Iterable[Any]) -> Iterator[str]:
    """The names, once it is certain that none leads out of the folder."""
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    for file in files:
        if not isinstance(file, str) or not re.fullmatch(rf"[\w.-]+\{suffix}", file):
            raise CheckpointError(f"{index} refers to {file!r}; expected the name of a {suffix} file beside it")
        yield file
