"""What LLVM says of this machine, kept on disk: to load LLVM for it would take longer than the rest of a start."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from edgellm.home import home
from edgellm.shared import keep

CPU_LINES = (
    "vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU implementer", "CPU architecture",
    "CPU variant", "CPU part", "CPU revision",
)  # fmt: skip
"""The lines of /proc/cpuinfo that tell one kind of CPU from another."""


class Host(NamedTuple):
    """In LLVM's words: the triple, the CPU's name, its features, and whether code for it may use udot."""

    triple: str
    name: str
    features: str
    dot_products: bool


def known() -> Host:
    """The host, as asked now or before."""
    path = _path()
    host = path and _read(path)
    if not host:
        host = ask()
        if path:
            keep(path, json.dumps(host._asdict()).encode())
    return host


def ask() -> Host:
    """Load LLVM and ask it. Numba's variables for the CPU count."""
    from llvmlite import binding

    triple, name = binding.get_process_triple(), os.environ.get("NUMBA_CPU_NAME") or binding.get_host_cpu_name()
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        try:
            features = binding.get_host_cpu_features().flatten()
        except RuntimeError:  # LLVM knows no way to ask this system
            features = ""
    arm = triple.startswith(("aarch64", "arm64"))
    return Host(triple, name, features, arm and _emits_dot_products(triple, name, features))


def _path() -> Path | None:
    """Where this kind of CPU is written down; None where the system does not tell its kind."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = {line.strip() for line in file if line.partition("\t")[0].rstrip(" :") in CPU_LINES}
    except OSError:
        return None
    found = find_spec("llvmlite")
    if not lines or not found or not found.origin:
        return None
    version = Path(found.origin).with_name("_version.py").read_text()
    numba = [os.environ.get(name) for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")]
    said = repr((sys.platform, platform.machine(), version, numba, sorted(lines)))
    return home() / "kernels" / f"host-{hashlib.sha256(said.encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> Host | None:
    try:
        host = Host(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    kinds = [type(value) for value in host]
    return host if kinds == [str, str, str, bool] else None


def _emits_dot_products(triple: str, name: str, listed: str) -> bool:
    """Does LLVM write udot for a sum of products? The list of a host lacks dotprod: the CPU's name implies it."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_triple(triple).create_target_machine(cpu=name, features=listed, opt=2)
    return "udot" in target.emit_assembly(binding.parse_assembly(_SUM_OF_PRODUCTS))


_SUM_OF_PRODUCTS = """
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
define i32 @dot(<16 x i8> %x, <16 x i8> %y) {
    %a = zext <16 x i8> %x to <16 x i32>
    %b = zext <16 x i8> %y to <16 x i32>
    %products = mul <16 x i32> %a, %b
    %sum = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %products)
    ret i32 %sum
}
"""
