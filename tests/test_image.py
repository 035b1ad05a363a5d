"""Kernels as images: linked as the ELF supplements say, loaded without LLVM, and what happens where they can't be."""

import ctypes
import json
import math
import os
import sys

import numpy as np
import pytest

pytest.importorskip("numba")

from llvmlite import binding

from edgellm import isa, quant
from edgellm.backends.cpu import needed
from edgellm.isa import _host
from edgellm.kernels import Compiler, compiler, image, objects
from edgellm.kernels.rows import rope_angles

PRIMES = [2, 3, 5, 7, 11, 13, 17, 19]
TABLE = f"@primes = internal constant [8 x i64] [{', '.join(f'i64 {prime}' for prime in PRIMES)}]"
PICK = """
define i64 @kernel(i64 %i) {
    %p = getelementptr [8 x i64], [8 x i64]* @primes, i64 0, i64 %i
    %x = load i64, i64* %p
    %y = call i64 @twice(i64 %x)
    ret i64 %y
}
define internal i64 @twice(i64 %x) noinline {
    %y = mul i64 %x, 2
    ret i64 %y
}
"""
BOTH = """
define <2 x double> @kernel(<2 x double> %x) {
    %y = fmul <2 x double> %x, <double 0x400921FB54442D18, double 0x4005BF0A8B145769>
    ret <2 x double> %y
}
"""


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path))
    return tmp_path


def compiled(source, triple="x86_64-unknown-linux-gnu"):
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(triple).create_target_machine(reloc="pic", codemodel="small", jit=True)
    return machine.emit_object(binding.parse_assembly(source))


def words(code):
    return np.frombuffer(code[: len(code) // 4 * 4], "<u4").tolist()


def field(word, first, count):
    return word >> first & (1 << count) - 1


def signed(value, bits):
    return value - (1 << bits) if value >> bits - 1 else value


@pytest.mark.skipif(isa.cpu()[0] != "x86_64" or sys.platform != "linux", reason="runs code of Linux on x86-64")
def test_an_image_finds_its_constants_and_functions():
    address = image.load(image.image_of(compiled(TABLE + PICK), "kernel"))
    kernel = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address)
    assert [kernel(i) for i in range(8)] == [2 * prime for prime in PRIMES]


@pytest.mark.skipif(isa.cpu()[0] != "x86_64" or sys.platform != "linux", reason="runs code of Linux on x86-64")
def test_an_image_calls_the_c_library():
    source = "declare i64 @labs(i64) define i64 @kernel(i64 %x) { %y = call i64 @labs(i64 %x) ret i64 %y }"
    linked = image.image_of(compiled(source), "kernel")
    kernel = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(image.load(linked))
    assert [kernel(-3), kernel(5)] == [3, 5]
    assert image.load(linked.replace(b"labs", b"lobs")) is None


def test_an_image_for_arm_calls_by_a_jump():
    """bl, then ldr and br, decoded: to the address 8 bytes after the jump."""
    source = "declare i64 @labs(i64) define i64 @kernel(i64 %x) { %y = tail call i64 @labs(i64 %x) ret i64 %y }"
    linked = image.image_of(compiled(source, "aarch64-unknown-linux-gnu"), "kernel")
    start, end = (int.from_bytes(linked[at : at + 8], "little") for at in (16, 24))
    assert json.loads(linked[end:]) == {"labs": end - 8}
    (call,) = (i for i, word in enumerate(words(linked[start : end - 16])) if field(word, 26, 5) == 0b00101)
    assert start + 4 * call + 4 * signed(field(words(linked[start:end])[call], 0, 26), 26) == end - 16
    assert words(linked[end - 16 : end - 8]) == [0x58000050, 0xD61F0200]  # ldr x16, 8; br x16


def test_an_image_for_arm_finds_its_constants():
    """adrp and ldr, decoded: the constant stands where they lead."""
    linked = image.image_of(compiled(BOTH, "aarch64-unknown-linux-gnu"), "kernel")
    at = int.from_bytes(linked[len(image.MAGIC) : image.START][:8], "little")
    page, load = words(linked[at : at + 8])
    assert field(page, 24, 5) == 0b10000
    assert field(page, 31, 1) == 1
    assert field(load, 22, 10) == 0b0011110111  # ldr of 16 bytes
    pages = signed(field(page, 5, 19) << 2 | field(page, 29, 2), 21)
    constant = ((at >> 12) + pages << 12) + 16 * field(load, 10, 12)
    assert np.frombuffer(linked, "<f8", 2, constant).tolist() == [math.pi, math.e]


def test_an_image_for_arm_finds_its_functions():
    """bl, decoded: it leads to the function that multiplies by two."""
    linked = image.image_of(compiled(TABLE + PICK, "aarch64-unknown-linux-gnu"), "kernel")
    at = int.from_bytes(linked[len(image.MAGIC) : image.START][:8], "little")
    (call,) = (i for i, word in enumerate(words(linked[at:])) if field(word, 26, 6) == 0b100101)
    callee = at + 4 * call + 4 * signed(field(words(linked[at:])[call], 0, 26), 26)
    assert words(linked[callee : callee + 8]) == [0xD37FF800, 0xD65F03C0]  # lsl x0, x0, #1; ret


def test_pages_and_branches_reach_backwards():
    code = bytearray(8192)
    code[4100:4104] = (0x90000000).to_bytes(4, "little")  # adrp x0
    image._RELOCATE[183, 275](code, 4100, 64)
    assert words(code[4100:4104]) == [0xF0FFFFE0]  # a page before this one
    code[4104:4108] = (0x94000000).to_bytes(4, "little")  # bl
    image._RELOCATE[183, 283](code, 4104, 4096)
    assert words(code[4104:4108]) == [0x97FFFFFE]


@pytest.mark.parametrize(
    "source",
    [
        "@other = external global i64\n"
        "define i64 @kernel(i64 %x) { %y = load i64, i64* @other ret i64 %y }",
        "@cell = internal global i64 1\n"
        "define i64 @kernel(i64 %x) { store i64 %x, i64* @cell ret i64 0 }",
    ],
)  # fmt: skip
def test_what_asks_for_more_is_left_to_llvm(source):
    assert image.image_of(compiled(source), "kernel") is None


def test_other_formats_are_left_to_llvm():
    assert image.image_of(compiled(BOTH, "x86_64-apple-macosx"), "kernel") is None
    assert image.image_of(compiled(BOTH, "x86_64-pc-windows-msvc"), "kernel") is None


def test_without_memory_for_images_llvm_loads_object_files(monkeypatch):
    def refused(name):
        raise PermissionError(name)

    monkeypatch.setattr(os, "memfd_create", refused, raising=False)
    for _ in range(2):
        Compiler(isa.get("generic")).op(rope_angles)
    (kept,) = objects.folder().rglob("*.kernel")
    assert not objects.read(kept.stem).startswith(image.MAGIC)


def test_an_image_that_cannot_be_loaded_is_compiled_again(monkeypatch):
    Compiler(isa.get("generic")).op(rope_angles)
    monkeypatch.setattr(image, "load", lambda code: None)
    assert Compiler(isa.get("generic")).op(rope_angles)


@pytest.mark.skipif(sys.platform != "linux", reason="images are for Linux")
def test_every_kernel_is_an_image(monkeypatch):
    monkeypatch.delenv("EDGELLM_HOME")
    kernels = compiler(isa.detect())
    every = needed(quant.names(), kernels.isa.ROWS)
    kernels.get(every)
    assert [kernel.name for kernel in every if not objects.read(kernels._file(kernel)).startswith(image.MAGIC)] == []


def test_llvm_is_asked_once_what_this_machine_is(monkeypatch):
    asked = []
    monkeypatch.setattr(_host, "ask", lambda there=_host.ask: asked.append(1) or there())
    assert _host.known() == _host.known()
    assert len(asked) == (1 if _host._path() else 2)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b'{"triple": 1}', b"\xff", b"null"])
def test_a_damaged_note_of_the_machine_is_written_again(damage):
    path = _host._path()
    if path is None:
        pytest.skip("this system does not tell its CPU")
    host = _host.known()
    sound = path.read_bytes()
    path.write_bytes(damage)
    assert _host.known() == host
    assert path.read_bytes() == sound


def test_numbas_variables_for_the_cpu_are_another_machine(monkeypatch):
    before = _host.known()
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    assert _host.known() == before._replace(name="generic")
