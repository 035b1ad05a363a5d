"""A .edge file -> what runs: the file's architecture and config, tensors that fit them, its tokenizer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from edgellm import architectures
from edgellm.bpe import BPE
from edgellm.config import from_json
from edgellm.errors import CheckpointError, EdgeFileError, UnsupportedError
from edgellm.file import EdgeFile
from edgellm.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedFile:
    file: EdgeFile
    architecture: architectures.Architecture
    config: Any


def open_model(path: str | os.PathLike[str]) -> LoadedFile:
    """Map a .edge file and check that its tensors are its architecture's.

    Raises EdgeFileError for a file that is damaged or contradicts itself, UnsupportedError for one of a later version.
    """
    file = EdgeFile(path)
    try:
        architecture = architectures.get(file.info.architecture)
        config = from_json(architecture.Config, file.info.config)
        _check_tensors(file, architecture.shapes(config))
    except (CheckpointError, UnsupportedError) as error:
        file.close()
        kind = EdgeFileError if isinstance(error, CheckpointError) else UnsupportedError
        raise kind(f"{path}: {error}") from None
    return LoadedFile(file, architecture, config)


def open_tokenizer(loaded: LoadedFile) -> Tokenizer:
    """The tokenizer of a model, with its tables if the file has them: they keep the file mapped.

    Raises EdgeFileError or UnsupportedError for one that cannot be used.
    """
    info, tables = loaded.file.info, loaded.file.tokenizer_tables
    source = loaded.file.tokenizer_json if tables is None else BPE(tables)
    return Tokenizer(source, info.bos_id, info.eos_ids, loaded.config.vocab_size)


def _check_tensors(file: EdgeFile, shapes: dict[str, tuple[int, ...]]) -> None:
    found = {name: tensor.shape for name, tensor in file.tensors.items()}
    if found != shapes:
        wrong = sorted(name for name in {**shapes, **found} if found.get(name) != shapes.get(name))
        first = ", ".join(
            f"{name} {found.get(name, 'missing')} (expected {shapes.get(name, 'none')})" for name in wrong[:4]
        )
        raise CheckpointError(f"{len(wrong)} tensors do not fit the config: {first}; convert the model again")
