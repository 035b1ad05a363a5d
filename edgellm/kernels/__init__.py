"""Kernels of the CPU backend: plain functions over vector primitives, compiled for the very CPU they run on.

A body is written once. `Compiler` rebuilds it with the primitives of an ISA in place of the plain ones,
and so on down through the bodies that it calls. All flags of the compiler are here.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import signature as signature_of
from pathlib import Path
from types import FunctionType
from typing import Any

from edgellm.home import home
from edgellm.isa import Isa

Body = Callable[..., Any]


class Compiler:
    """Compiles bodies for one ISA; each once."""

    def __init__(self, isa: Isa) -> None:
        from edgellm.isa._vectors import primitives, row_primitives
        from edgellm.kernels._calls import calls

        self.isa = isa
        self._primitives = {**primitives(isa.dot4, isa.dot4_u8), **calls()}
        self._row_primitives = row_primitives
        self._bound: dict[Body, Any] = {}
        self._ops: dict[Any, Any] = {}

    def op(self, body: Body) -> int:
        """Address of an op: (record, step, thread, n_threads) -> nothing."""
        return self._address(body, body, self._primitives, 4)

    def dot(self, body: Body, rows: int) -> int:
        """Address of a dot kernel for that many rows of activations; see dots."""
        key, primitives = (body, rows), self._primitives
        if key not in self._ops:
            primitives = {**primitives, **self._row_primitives(self.isa.dot4, self.isa.dot4_u8, rows)}
        return self._address(key, body, primitives, 7)

    def function(self, body: Body) -> Any:
        """A body to call from Python; it runs without the interpreter's lock."""
        import numba

        key = ("function", body)
        if key not in self._ops:
            signature = (numba.types.int64,) * len(signature_of(body).parameters)
            dispatcher = self._compiled(body, self._primitives, "", numba.njit, nogil=True)
            dispatcher.compile(signature)
            self._ops[key] = dispatcher
        return self._ops[key]

    def _address(self, key: Any, body: Body, primitives: dict[str, Any], arity: int) -> int:
        from numba import cfunc, types

        if key not in self._ops:
            signature, tag = types.void(*[types.int64] * arity), f"_{key[1]}" if isinstance(key, tuple) else ""
            self._ops[key] = self._compiled(body, primitives, tag, lambda **flags: cfunc(signature, **flags))
        return int(self._ops[key].address)

    def _compiled(self, body: Body, primitives: dict[str, Any], tag: str, jit: Any, **flags: bool) -> Any:
        """A body compiled, or taken from the cache of compiled code where that can be kept."""
        rebuilt = self._rebuilt(body, primitives, tag)
        with _cache_folder() as folder:
            if folder is None or not any(folder.rglob(f"*.{rebuilt.__qualname__}-*.nbi")):
                _say(f"compiling kernels for this CPU, once per machine: {rebuilt.__qualname__}")
            return jit(error_model="numpy", cache=folder is not None, **flags)(rebuilt)

    def _rebuilt(self, body: Body, primitives: dict[str, Any], tag: str = "") -> Body:
        """The body with an ISA's primitives, and compiled bodies, under the names that it uses."""
        assert isinstance(body, FunctionType)
        names = {name: primitives[name] for name in body.__code__.co_names if name in primitives}
        for name in body.__code__.co_names:
            callee = body.__globals__.get(name)
            if (
                name not in names
                and isinstance(callee, FunctionType)
                and callee.__module__.startswith("edgellm.kernels")
            ):
                names[name] = self._inlined(callee)
        rebuilt = FunctionType(body.__code__, {**body.__globals__, **names}, body.__name__, body.__defaults__)
        rebuilt.__qualname__ = f"{body.__qualname__}_{self.isa.__name__.rpartition('.')[2]}{tag}"
        rebuilt.__module__ = body.__module__
        return rebuilt

    def _inlined(self, body: Body) -> Any:
        import numba

        if body not in self._bound:
            rebuilt = self._rebuilt(body, self._primitives)
            self._bound[body] = numba.njit(error_model="numpy", forceinline=True)(rebuilt)
        return self._bound[body]


@contextmanager
def _cache_folder() -> Iterator[Path | None]:
    """Have Numba keep what it compiles in our own folder, named by all that the code depends on: Numba looks at a
    body's own file only, and not at what it inlines. None where the folder cannot be written."""
    from numba import config

    folder = home() / "kernels" / _fingerprint()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
    try:
        yield folder if writable else None
    finally:
        config.CACHE_DIR = before


def _say(line: str) -> None:
    """Show what takes long on a terminal's last line."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def all_compiled() -> None:
    """Clear the line that `_say` wrote."""
    if sys.stderr is not None and sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


@cache
def _fingerprint() -> str:
    """Of the sources of kernels and ISAs; the versions of Python and of the compiler."""
    import llvmlite
    import numba

    digest = hashlib.sha256(f"{sys.version} {numba.__version__} {llvmlite.__version__}".encode())
    folder = Path(__file__).parent
    for path in sorted([*folder.glob("*.py"), *(folder.parent / "isa").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


_COMPILERS: dict[str, Compiler] = {}


def compiler(isa: Isa) -> Compiler:
    """The one compiler of an ISA."""
    if isa.__name__ not in _COMPILERS:
        _COMPILERS[isa.__name__] = Compiler(isa)
    return _COMPILERS[isa.__name__]
