"""A user's map of tensor names, for a checkpoint that has other names than Hugging Face's.

    {"tok_embeddings.weight": "model.embed_tokens.weight",
     "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
     "rope.freqs": null}

The checkpoint's name -> the architecture's in Hugging Face checkpoints, "{}" standing for a number; null leaves a
tensor out. A name that is not in the map stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellm.errors import CheckpointError

from .checkpoint import SourceTensor, listed
from .json_file import read_object


def rename(path: Path, found: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Tensors by the names that the map in the file `path` gives them.

    Raises CheckpointError for a map that is damaged, names tensors that are not there, or gives two the same name.
    """
    rules = [_Rule(path, theirs, ours) for theirs, ours in read_object(path).items()]
    result, twice = dict[str, SourceTensor](), list[str]()
    for name, tensor in found.items():
        ours = next((rule.target(name) for rule in rules if rule.fits(name)), name)
        if ours in result:
            twice.append(ours)
        if ours is not None:
            result[ours] = tensor
    unused = [rule.theirs for rule in rules if not rule.used]
    if unused:
        raise CheckpointError(
            f"{path} names tensors that are not there: {listed(unused)}; those that are: {listed(found)}"
        )
    if twice:
        raise CheckpointError(f"{path} gives several tensors one name: {listed(twice)}; expected one for each")
    return result


class _Rule:
    """An entry of the map."""

    def __init__(self, path: Path, theirs: str, ours: Any) -> None:
        if ours is not None and (not isinstance(ours, str) or ours.count("{}") != theirs.count("{}")):
            raise CheckpointError(
                f"{path} has {theirs!r}: {str(ours)[:80]!r}; expected a name with as many {{}} for numbers, or null"
            )
        self.theirs, self.used = theirs, False
        self._pattern, self._ours = re.compile(re.escape(theirs).replace(r"\{\}", "([0-9]+)")), ours

    def target(self, name: str) -> str | None:
        """The new name of a tensor that the rule fits, with the numbers of its old one."""
        match = self._pattern.fullmatch(name)
        assert match
        self.used = True
        numbers = iter(match.groups())
        return None if self._ours is None else re.sub(r"\{\}", lambda _: next(numbers), self._ours)

    def fits(self, name: str) -> bool:
        return self._pattern.fullmatch(name) is not None
