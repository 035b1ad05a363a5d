"""Kernels of the CPU backend: plain functions over vector primitives, compiled for the very CPU they run on.

A body is written once. Compiling rebuilds it with the primitives of an ISA in place of the plain ones, and so on down
through the bodies that it calls. Each kernel becomes an image, once per machine (see image, objects): where they are
all there, neither Numba nor LLVM is loaded.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterable
from functools import cache
from itertools import count
from typing import Any, NamedTuple

from edgellm.isa import Isa
from edgellm.kernels import image, objects

Body = Callable[..., Any]
SYMBOL = "kernel"
"""What the function is called in an object file."""


class Kernel(NamedTuple):
    """A body to compile: an op, a function to call from Python, or with a number of rows a dot kernel."""

    body: Body
    rows: int = 0
    cache: str = "f16"
    """What keys and values are, for a body that has to do with them."""

    @property
    def n_arguments(self) -> int:
        """All int64."""
        return int(self.body.__code__.co_argcount)

    @property
    def name(self) -> str:
        """'matmul.matmul', 'dots.q4-12', 'attention.attention-q8'."""
        module = self.body.__module__.rpartition(".")[2]
        kind = f"-{self.rows}" * bool(self.rows) + f"-{self.cache}" * (self.cache != "f16")
        return f"{module}.{self.body.__name__}{kind}"


class Compiler:
    """The kernels of one ISA: loaded, or compiled and then loaded, each once."""

    def __init__(self, isa: Isa) -> None:
        self.isa = isa
        self._functions: dict[Kernel, Any] = {}
        self._kept: list[Any] = []
        self._bodies: Any = None
        self._lock = threading.RLock()

    def op(self, body: Body, cache: str = "f16") -> int:
        """Address of an op: (record, step, thread, n_threads) -> nothing."""
        return self._address(Kernel(body, cache=cache))

    def dot(self, body: Body, rows: int) -> int:
        """Address of a dot kernel for that many rows of activations; see dots."""
        return self._address(Kernel(body, rows))

    def function(self, body: Body, cache: str = "f16") -> Any:
        """A body to call from Python with integers, for one; it runs without the interpreter's lock."""
        kernel = Kernel(body, cache=cache)
        self._address(kernel)
        return self._functions[kernel]

    def kept(self, kernel: Kernel) -> bool:
        """Whether the kernel is on disk."""
        return objects.read(self._file(kernel)) is not None

    def load(self, kernels: Iterable[Kernel]) -> bool:
        """Load what is on disk; whether that is all of them."""
        with self._lock:
            for kernel in kernels:
                if kernel not in self._functions and (compiled := objects.read(self._file(kernel))):
                    self._link(kernel, compiled)
            return all(kernel in self._functions for kernel in kernels)

    def get(self, kernels: Iterable[Kernel]) -> None:
        """Have all of these kernels, compiling those that are nowhere yet. Shows how far it is on a terminal."""
        with self._lock:
            kernels = list(dict.fromkeys(kernels))
            if self.load(kernels):
                objects.used()
                return
            missing = [kernel for kernel in kernels if kernel not in self._functions]
            try:
                for i, kernel in enumerate(missing, 1):
                    _say(f"compiling kernels, once per machine: {i} of {len(missing)}, {kernel.name}")
                    self._compile(kernel)
            finally:
                _say("")
            objects.tidy()

    def _compile(self, kernel: Kernel) -> None:
        if self._bodies is None:
            from edgellm.kernels._numba import Bodies

            self._bodies = Bodies(self.isa)
        compiled = self._bodies.object_file(kernel)
        for code in (image.image_of(compiled, SYMBOL), compiled):
            if code and self._link(kernel, code):
                objects.write(self._file(kernel), code)
                return
        self._kept.append(self._bodies.in_process(kernel))
        self._functions[kernel] = self._kept[-1].ctypes

    def _link(self, kernel: Kernel, code: bytes) -> bool:
        """Put an image or an object file into memory; False if it asks for what is not in this process."""
        address = image.load(code) if code.startswith(image.MAGIC) else _linked(self._file(kernel), code)
        if address is None:
            return False
        kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * kernel.n_arguments)
        self._functions[kernel] = kind(address)
        return True

    def _address(self, kernel: Kernel) -> int:
        if kernel not in self._functions:
            self.get([kernel])
        return ctypes.cast(self._functions[kernel], ctypes.c_void_p).value or 0

    def _file(self, kernel: Kernel) -> str:
        assert kernel.body.__module__.startswith("edgellm.kernels"), "the key does not cover other sources"
        return f"{kernel.name}-{self.isa.__name__.rpartition('.')[2]}"


@cache
def _jit() -> Any:
    """LLVM's loader. Never disposed of, nor what it loads: threads may be in there when the interpreter ends."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    jit = binding.create_lljit_compiler(suppress_errors=True)
    jit._owned = True
    return jit


def _linked(name: str, compiled: bytes) -> int | None:
    """The address of an object file's SYMBOL in memory; None if it wants a symbol that this process lacks."""
    from llvmlite import binding

    builder = binding.JITLibraryBuilder().add_object_img(compiled).add_current_process().export_symbol(SYMBOL)
    try:
        tracker = builder.link(_jit(), f"{name}.{next(_NUMBERS)}")
    except RuntimeError:
        return None
    tracker.detach()
    return int(tracker[SYMBOL])


_NUMBERS = count()


def _say(line: str) -> None:
    """Show what takes long on a terminal's last line, or clear it."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


_COMPILERS: dict[str, Compiler] = {}


def compiler(isa: Isa) -> Compiler:
    """The one compiler of an ISA."""
    return _COMPILERS.setdefault(isa.__name__, Compiler(isa))
