"""Files of torch.save: a pickle that describes tensors, and the storages that they are views of.

    today           a zip archive: NAME/data.pkl, NAME/data/KEY for each storage, NAME/byteorder
    before 1.6      pickles one after another: a magic number, a version, facts of the machine, the object, the keys of
                    the storages; then for each key its size as int64, and its numbers

A file is not trusted: see torch_pickle and archive.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from edgellm.errors import CheckpointError, UnsupportedError

from .archive import Member, members
from .checkpoint import (
    STORED_DTYPES,
    SourceTensor,
    errors_about,
    is_computed,
    listed,
    read_bytes,
    unreadable,
    unsupported_type,
)
from .strided import strided
from .torch_pickle import Storage, StoredTensor, load

MAX_PICKLE = 1 << 24
"""Bytes; ten thousand tensors take two million."""
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickle of the magic number, with which a file of the old kind starts."""
NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training programs keep the weights among other things."""


def read_pytorch(path: Path) -> dict[str, SourceTensor]:
    """Its tensors by name, without those that follow from a config.

    Raises CheckpointError if the file is damaged, UnsupportedError for what is no state_dict of numbers that this
    version reads.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(LEGACY))
        with errors_about(path):
            content, storages = (_legacy if start == LEGACY else _zipped)(path)
            tensors = _state_dict(content).items()
            return {name: _tensor(path, name, tensor, storages) for name, tensor in tensors if not is_computed(name)}
    except OSError as error:
        raise unreadable(path, error) from error


def _zipped(path: Path) -> tuple[Any, dict[str, Member]]:
    """The object, and the bytes of each storage by its key."""
    found = members(path)
    roots = [name.removesuffix("data.pkl") for name in found if name.endswith("data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(f"it has {len(roots)} members named data.pkl; expected one, as torch.save writes")
    (root,) = roots
    order = found.get(f"{root}byteorder")
    if order and order.whole(MAX_PICKLE) != b"little":
        raise _big_endian()
    content, _ = load(BytesIO(found[f"{root}data.pkl"].whole(MAX_PICKLE)))
    return content, {name.removeprefix(f"{root}data/"): member for name, member in found.items()}


def _legacy(path: Path) -> tuple[Any, dict[str, Member]]:
    size = path.stat().st_size
    head = BytesIO(read_bytes(path, 0, 0, min(size, MAX_PICKLE)).tobytes())
    _, (version, _), (machine, _), (content, storages), (keys, _) = (load(head) for _ in range(5))
    if version != 1001 or not isinstance(machine, dict) or not _is_list_of_text(keys):
        raise CheckpointError("it starts as a file of torch.save before 1.6, but does not go on so; fetch it again")
    if machine.get("little_endian") is not True:
        raise _big_endian()
    return content, _placed(path, size, head.tell(), keys, storages)


def _big_endian() -> UnsupportedError:
    return UnsupportedError("its numbers are big-endian; this version reads little-endian ones: save it elsewhere")


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _placed(path: Path, size: int, at: int, keys: Iterable[str], storages: Mapping[str, Storage]) -> dict[str, Member]:
    """The storages, which lie one after another from byte `at` on in the order of `keys`."""
    found = dict[str, Member]()
    for key in keys:
        storage = storages.get(key)
        begin = at + 8
        if storage is None or begin > size:
            raise CheckpointError(f"it ends before the storage {key[:40]!r}, or says nothing of it: fetch it again")
        numbers = int.from_bytes(read_bytes(path, at, 0, 8).tobytes(), "little")
        at = begin + numbers * storage.type.item_bytes
        if at > size:
            raise CheckpointError(
                f"the storage {key[:40]!r} takes the bytes {begin} to {at}, but the file ends at {size}: fetch it again"
            )
        found[key] = Member(key, at - begin, partial(read_bytes, path, begin))
    return found


def _state_dict(content: Any) -> dict[str, StoredTensor]:
    """The one dict of tensors that is there, with nothing else in it."""
    nested = [content[key] for key in NESTED if key in content] if isinstance(content, dict) else []
    found = [candidate for candidate in nested if _has_tensors(candidate)] or [content]
    if len(found) > 1 or not _has_tensors(found[0]):
        raise CheckpointError(
            f"it holds {_described(content)}; expected tensors by name, or a dict of them under one of "
            f"{', '.join(NESTED)}: save the state_dict alone"
        )
    tensors: dict[str, StoredTensor] = found[0]
    others = [name for name, value in tensors.items() if type(name) is not str or not isinstance(value, StoredTensor)]
    if others:
        raise CheckpointError(
            f"it holds {listed(others)} among its tensors; expected nothing else there: save the state_dict alone"
        )
    return tensors


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, StoredTensor) for item in value.values())


def _described(content: Any) -> str:
    return f"a dict of {listed(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"


def _tensor(path: Path, name: str, tensor: StoredTensor, storages: Mapping[str, Member]) -> SourceTensor:
    storage, member = tensor.storage, storages.get(tensor.storage.key)
    kind, item = storage.type.name, storage.type.item_bytes
    if kind not in STORED_DTYPES:
        raise unsupported_type(path, name, kind)
    if member is None or member.size != storage.size * item:
        raise CheckpointError(
            f"tensor {name!r} needs a storage of {storage.size * item} bytes; found "
            f"{'none' if member is None else member.size}: the file is damaged or incomplete"
        )
    count = math.prod(tensor.shape)
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    # Strides of zero can make a large tensor of few numbers.
    if count > storage.size or (count and last >= storage.size):
        raise CheckpointError(
            f"tensor {name!r} of shape {tensor.shape} leads to number {last} of a storage of {storage.size}; "
            "expected it to have its own: the file is damaged"
        )
    return strided(name, tensor.shape, tensor.strides, STORED_DTYPES[kind], member.read, tensor.offset * item)
