"""Pickles of torch.save, rebuilt without running them: nothing that they name is imported or called. Knows no file.

A pickle is a program for a small stack machine. This machine has the few instructions that containers of tensors need,
and looks up what a pickle names in a table of stand-ins, where a name that is missing is an error. So a hostile pickle
can do no more than describe tensors, and those are checked where they are read.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from edgellm.errors import CheckpointError, UnsupportedError

from .checkpoint import MAX_DIMS

MAX_INSTRUCTIONS = 1 << 21
"""A tensor takes some fifty; an object that an instruction makes takes as many bytes."""


@dataclass(frozen=True)
class StorageType:
    name: str
    """As safetensors calls it."""
    item_bytes: int


@dataclass(frozen=True)
class Storage:
    """Numbers in the file, of which tensors are views."""

    type: StorageType
    key: str
    size: int
    """In numbers."""


@dataclass(frozen=True)
class StoredTensor:
    storage: Storage
    offset: int
    """In numbers, as the strides."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def load(file: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """What the pickle at the file's position holds: None, numbers, text, lists, tuples, dicts, StoredTensors; and the
    storages that it speaks of, by key. The file is at the pickle's end then.

    Raises CheckpointError for a damaged pickle, UnsupportedError with the name of what it wants to import.
    """
    machine = _Machine()
    try:
        for number, (instruction, argument, _) in enumerate(pickletools.genops(file)):
            if number == MAX_INSTRUCTIONS:
                raise ValueError(f"more than {MAX_INSTRUCTIONS} instructions")
            machine.run(instruction.name, argument)
        return machine.pop(), machine.storages
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"its pickle is damaged ({type(error).__name__}: {error}); fetch it again") from error


class _Machine:
    """A stack, those that a mark put aside, and what was remembered under a number."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._stack: list[Any] = []
        self._aside: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self._stack.pop()

    def run(self, instruction: str, argument: Any) -> None:
        """Raises IndexError, KeyError, TypeError or ValueError for an instruction that makes no sense here."""
        push = self._stack.append
        match instruction:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[instruction])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                push(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINSTRING" | "SHORT_BINSTRING":
                push(argument)
            case "EMPTY_DICT":
                push({})
            case "EMPTY_LIST":
                push([])
            case "EMPTY_TUPLE":
                push(())
            case "MARK":
                self._aside.append(self._stack)
                self._stack = []
            case "TUPLE":
                items = self._above_mark()
                self._stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(self._top(int(instruction[-1]))))
            case "APPEND":
                self._extend(self._top(1))
            case "APPENDS":
                self._extend(self._above_mark())
            case "SETITEM":
                self._update(self._top(2))
            case "SETITEMS":
                self._update(self._above_mark())
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self._memo[argument])
            case "GLOBAL":
                push(_stand_in(argument))
            case "STACK_GLOBAL":
                push(_stand_in(" ".join(self._top(2))))
            case "REDUCE":
                function, arguments = self._top(2)
                push(_expect(function, _Function).call(*_expect(arguments, tuple)))
            case "BUILD":  # of a state_dict: which version of PyTorch's modules it comes from
                self.pop()
                _expect(self._stack[-1], dict)
            case "BINPERSID":
                storage = _storage(*_expect(self.pop(), tuple))
                self.storages[storage.key] = storage
                self._stack.append(storage)
            case _:
                raise UnsupportedError(
                    f"its pickle has the instruction {instruction}, which tensors do not need; nothing was run: "
                    "save the state_dict alone"
                )

    def _top(self, count: int) -> list[Any]:
        taken = [self.pop() for _ in range(count)]
        return taken[::-1]

    def _above_mark(self) -> list[Any]:
        taken, self._stack = self._stack, self._aside.pop()
        return taken

    def _extend(self, items: list[Any]) -> None:
        _expect(self._stack[-1], list).extend(items)

    def _update(self, items: list[Any]) -> None:
        target = _expect(self._stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # No tuples: the hash of thousands of them in one another would end the process.
            target[_expect(key, str | int)] = value


@dataclass(frozen=True)
class _Function:
    """Stands for what a pickle calls."""

    call: Callable[..., Any]


def _ordered_dict(items: Sequence[Sequence[Any]] = ()) -> dict[str | int, Any]:
    return {_expect(key, str | int): value for key, value in items}


def _tensor(storage: Storage, offset: int, shape: Any, strides: Any, *state: Any) -> StoredTensor:
    """`state` is what training needs, then flags of a tensor that is to be negated or conjugated on reading."""
    if len(state) > 2 and state[2]:
        raise ValueError("a tensor that is negated or conjugated; save what .resolve_neg() gives")
    if not len(_expect(shape, tuple)) == len(_expect(strides, tuple)) <= MAX_DIMS:
        raise ValueError(f"a tensor of {len(shape)} dimensions with {len(strides)} strides")
    if not all(type(number) is int and number >= 0 for number in (offset, *shape, *strides)):
        raise ValueError("a tensor whose offset, shape or strides are no sizes")
    return StoredTensor(_expect(storage, Storage), offset, shape, strides)


def _parameter(tensor: StoredTensor, *state: Any) -> Any:
    return _expect(tensor, StoredTensor)


def _storage(kind: str, type: StorageType, key: str, place: str, size: int, view: None = None) -> Storage:
    if kind != "storage" or view is not None:
        raise ValueError("a persistent object that is no whole storage")
    return Storage(_expect(type, StorageType), _expect(key, str), _expect(size, int))


_STAND_INS: Mapping[str, StorageType | _Function] = {
    "torch FloatStorage": StorageType("F32", 4),
    "torch HalfStorage": StorageType("F16", 2),
    "torch BFloat16Storage": StorageType("BF16", 2),
    "torch DoubleStorage": StorageType("F64", 8),
    "torch LongStorage": StorageType("I64", 8),
    "torch IntStorage": StorageType("I32", 4),
    "torch ShortStorage": StorageType("I16", 2),
    "torch CharStorage": StorageType("I8", 1),
    "torch ByteStorage": StorageType("U8", 1),
    "torch BoolStorage": StorageType("BOOL", 1),
    "torch._utils _rebuild_tensor_v2": _Function(_tensor),
    "torch._utils _rebuild_parameter": _Function(_parameter),
    "collections OrderedDict": _Function(_ordered_dict),
}
"""By module and name."""


def _stand_in(name: str) -> StorageType | _Function:
    if name not in _STAND_INS:
        raise UnsupportedError(
            f"its pickle wants to import {name.replace(' ', '.')[:200]!r}, which tensors do not need; nothing was "
            "imported or run: save the state_dict alone"
        )
    return _STAND_INS[name]


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} where {getattr(kind, '__name__', kind)} is expected")
    return value
