"""Instruction sets: the byte dot product of one CPU family a file, chosen by the CPU's features, never by trying.

An ISA module has

    MACHINE        "x86_64", "aarch64", or "" for any
    FEATURES       sets of LLVM's CPU features, of which the CPU must have one: a missing instruction ends the process
    ROWS           rows of activations, or vectors of sums, that a kernel holds in registers: a multiple of 4
    dot4, dot4_u8  LLVM emitters, see _vectors.primitives

Importing a module imports llvmlite, but not LLVM itself; listing them imports neither.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol, cast

from edgellm.errors import BackendError
from edgellm.isa import _host

BEST_FIRST = ("avx512vnni", "avxvnni", "avx2", "neon_dotprod", "neon", "generic")


class Isa(Protocol):
    __name__: str
    MACHINE: str
    FEATURES: Sequence[Sequence[str]]
    ROWS: int
    dot4: Callable[..., Any]
    dot4_u8: Callable[..., Any]


def names() -> list[str]:
    """Every ISA, best first."""
    there = {module.name for module in iter_modules(__path__) if not module.name.startswith("_")}
    return [name for name in BEST_FIRST if name in there] + sorted(there - set(BEST_FIRST))


def get(name: str) -> Isa:
    """The ISA module of that name; raises BackendError with the known names."""
    if name not in names():
        raise BackendError(f"unknown ISA {name!r}; known: {', '.join(names())}")
    return cast(Isa, import_module(f"{__name__}.{name}"))


def runnable() -> list[str]:
    """The ISAs that this CPU has, best first."""
    return [name for name in names() if _runs(get(name))]


def detect() -> Isa:
    """The best ISA of this CPU, or the one that EDGELLM_ISA names; raises BackendError if the CPU lacks that."""
    wanted, there = os.environ.get("EDGELLM_ISA"), runnable()
    if not there:
        raise BackendError("this CPU lacks F16C, or is of a kind that is not known here; use --backend reference")
    if wanted and wanted not in there:
        raise BackendError(f"EDGELLM_ISA is {wanted!r}; this CPU runs {', '.join(there)}")
    return get(wanted or there[0])


def _runs(isa: Isa) -> bool:
    machine, features = cpu()
    if machine == "x86_64" and "f16c" not in features:  # then LLVM calls functions for float16 that are not there
        return False
    return isa.MACHINE in ("", machine) and any(features.issuperset(needed) for needed in isa.FEATURES)


@cache
def host() -> tuple[str, str, str]:
    """LLVM's words for this machine: its triple, the CPU's name, its features. Numba's variables for them count."""
    return _known()[:3]


@cache
def cpu() -> tuple[str, frozenset[str]]:
    """The machine, "x86_64" or "aarch64", and the features that LLVM may use."""
    known = _known()
    features = {word[1:] for word in known.features.split(",") if word.startswith("+")}
    if known.dot_products:
        features.add("dotprod")
    return known.triple.split("-")[0].replace("arm64", "aarch64"), frozenset(features)


_known = cache(_host.known)
