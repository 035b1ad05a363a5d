"""How models are called: models/catalog.json, and what files end in. Knows no network, and not what is installed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path

from edgellm.errors import ModelNotFoundError

DEFAULT = "smollm2"
BUNDLED = "bundled"
"""The source of a model that comes with edgellm."""
WEIGHTS = (".safetensors", ".pt", ".pth", ".npz")
"""What files end in that need a config.json beside them; a .bin file may be one of these too."""
CHECKPOINTS = (".gguf", ".bin", *WEIGHTS)
"""What files end in that `convert` may read."""


@dataclass(frozen=True)
class Entry:
    """A known model; models/README.md says what each field means."""

    name: str
    description: str
    architecture: str
    license: str
    source: str
    file: tuple[str, ...]
    size: int | None
    sha256: str | None

    @property
    def bundled(self) -> Path | None:
        """Where the file lies that came with edgellm; None for a model to be fetched."""
        return folder() / self.file[0] if self.source == BUNDLED else None


def folder() -> Path:
    """The folder of the catalog and the bundled models."""
    return Path(import_module("edgellm.models").__path__[0])


@cache
def entries() -> dict[str, Entry]:
    """Every known model by its name, the default first."""
    catalog = json.loads((folder() / "catalog.json").read_text(encoding="utf-8"))
    return {name: Entry(name=name, **(fields | {"file": tuple(fields["file"])})) for name, fields in catalog.items()}


def get(name: str) -> Entry:
    """The known model of that name; raises ModelNotFoundError with the names there are."""
    if name not in entries():
        raise unknown(name)
    return entries()[name]


def unknown(name: str, installed: Iterable[str] = ()) -> ModelNotFoundError:
    """The error for a name that is neither known nor among the installed."""
    names = list(dict.fromkeys([*entries(), *installed]))
    close = get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    return ModelNotFoundError(
        f"there is no model {name!r}{f' (did you mean {_either(close)}?)' if close else ''}; "
        f"the names known here are {', '.join(names)}, and otherwise give a .edge or .gguf file or a Hugging Face "
        f"folder, or pull hf:OWNER/REPO or https://HOST/FILE first"
    )


def _either(names: list[str]) -> str:
    return " or ".join(repr(name) for name in names)
