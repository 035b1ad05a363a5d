"""An object file -> an image: a kernel's code and constants as they stand in memory, wherever that is.

A kernel finds its constants by their distance. So an object file of ELF (Linux) is linked once, when it is compiled,
and a start loads images without LLVM, which takes forty megabytes of memory, and from an SD card seconds. What a
kernel calls of the C library it reaches by a jump whose target is filled in then; the names and places of these stand
after the code, as JSON. Relocations are those of the ELF supplements for x86-64 and for AArch64.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from edgellm.arrays import Array, address

MAGIC = b"edgellm image 1\n"
START = 64
"""Where the first section stands: before it are MAGIC, where the function is, and where the code ends."""
_SYMBOLS, _RELOCATIONS = 2, 4
_WRITABLE, _IN_MEMORY = 1, 2
_SECTION = np.dtype([
    ("name", "<u4"), ("type", "<u4"), ("flags", "<u8"), ("address", "<u8"), ("offset", "<u8"), ("size", "<u8"),
    ("link", "<u4"), ("info", "<u4"), ("align", "<u8"), ("entry_size", "<u8"),
])  # fmt: skip
_SYMBOL = np.dtype([
    ("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"), ("size", "<u8")
])  # fmt: skip
_RELOCATION = np.dtype([("offset", "<u8"), ("type", "<u4"), ("symbol", "<u4"), ("addend", "<i8")])


def image_of(compiled: bytes, name: str) -> bytes | None:
    """The image of an object file and its function `name`; None if LLVM has to load it."""
    if compiled[:6] != b"\x7fELF\x02\x01":
        return None
    found = _Object(compiled)
    image, places = _laid_out(found)
    jumps: dict[str, int] = {}
    for section, relocation in found.relocations():
        symbol, kind = found.symbols[relocation["symbol"]], (found.machine, int(relocation["type"]))
        if symbol["section"] == 0 and kind in _CALLS:
            to = _jump(image, jumps, found.names[relocation["symbol"]], found.machine)
        elif int(symbol["section"]) in places and kind in _RELOCATE:
            to = places[int(symbol["section"])] + int(symbol["value"])
        else:
            return None
        if section in places:
            _RELOCATE[kind](image, places[section] + int(relocation["offset"]), to + int(relocation["addend"]))
    function = found.symbols[found.names.index(name)]
    start = places[int(function["section"])] + int(function["value"])
    head = MAGIC + start.to_bytes(8, "little") + len(image).to_bytes(8, "little")
    image[: len(head)] = head
    return bytes(image) + json.dumps({name: at + 8 for name, at in jumps.items()}).encode()


def load(image: bytes) -> int | None:
    """Put an image into memory; returns its function's address, None if this system lacks a function that it calls, or
    has no memory for code.

    It stays there: threads may be in it when the interpreter ends.
    """
    if sys.platform != "linux":
        return None
    start, end = (int.from_bytes(image[at : at + 8], "little") for at in (len(MAGIC), len(MAGIC) + 8))
    code, process = bytearray(image[:end]), ctypes.CDLL(None)
    try:
        for name, at in json.loads(image[end:]).items():
            there = ctypes.cast(process[name], ctypes.c_void_p).value or 0
            code[at : at + 8] = there.to_bytes(8, "little")
        with open(os.memfd_create("edgellm kernel"), "wb", buffering=0) as file:
            file.write(code)
            pages = mmap.mmap(file.fileno(), end, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)
    except (AttributeError, OSError):
        return None
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pages))
    return address(np.frombuffer(pages, np.uint8)) + start


class _Object:
    """The tables of an object file."""

    def __init__(self, compiled: bytes) -> None:
        self.compiled = compiled
        self.machine, n_sections = (int.from_bytes(compiled[at : at + 2], "little") for at in (18, 60))
        self.sections = np.frombuffer(compiled, _SECTION, n_sections, int.from_bytes(compiled[40:48], "little"))
        listed = next(section for section in self.sections if section["type"] == _SYMBOLS)
        texts = int(self.sections[listed["link"]]["offset"])
        self.symbols = self._table(listed, _SYMBOL)
        self.names = [self._text(texts + int(symbol["name"])) for symbol in self.symbols]

    def relocations(self) -> Iterator[tuple[int, np.void]]:
        """Each with the number of the section that it changes."""
        for section in self.sections[self.sections["type"] == _RELOCATIONS]:
            yield from ((int(section["info"]), relocation) for relocation in self._table(section, _RELOCATION))

    def _table(self, section: np.void, kind: np.dtype[np.void]) -> Array:
        return np.frombuffer(self.compiled, kind, int(section["size"]) // kind.itemsize, int(section["offset"]))

    def _text(self, start: int) -> str:
        return self.compiled[start : self.compiled.index(b"\0", start)].decode()


def _laid_out(found: _Object) -> tuple[bytearray, dict[int, int]]:
    """What is read-only in memory, one section after the other, and where each is."""
    image, places = bytearray(START), dict[int, int]()
    for i, section in enumerate(found.sections):
        if section["flags"] & _IN_MEMORY and not section["flags"] & _WRITABLE:
            image += bytes(-len(image) % max(1, int(section["align"])))
            places[i] = len(image)
            image += found.compiled[int(section["offset"]) : int(section["offset"]) + int(section["size"])]
    return image, places


def _jump(image: bytearray, jumps: dict[str, int], name: str, machine: int) -> int:
    """Where the jump to a function is, appended if it is the first: the address, 8 bytes after it, comes in loading."""
    if name not in jumps:
        image += bytes(-len(image) % 16)
        jumps[name] = len(image)
        image += _JUMPS[machine] + bytes(8)
    return jumps[name]


def _distance(n_bytes: int, image: bytearray, at: int, to: int) -> None:
    image[at : at + n_bytes] = (to - at).to_bytes(n_bytes, "little", signed=True)


def _bits(image: bytearray, at: int, value: int, count: int, shift: int) -> None:
    """Set bits of an instruction of AArch64 that are 0."""
    word = int.from_bytes(image[at : at + 4], "little") | (value & (1 << count) - 1) << shift
    image[at : at + 4] = word.to_bytes(4, "little")


def _branch(image: bytearray, at: int, to: int) -> None:
    _bits(image, at, to - at >> 2, 26, 0)


def _page(image: bytearray, at: int, to: int) -> None:
    """adrp: how many pages of 4096 bytes the two are apart, whatever page the image begins with."""
    distance = (to >> 12) - (at >> 12)
    _bits(image, at, distance, 2, 29)
    _bits(image, at, distance >> 2, 19, 5)


def _in_page(log2_bytes: int, image: bytearray, at: int, to: int) -> None:
    """The part of an address that is less than a page, in units of what is loaded from there."""
    _bits(image, at, (to & 4095) >> log2_bytes, 12 - log2_bytes, 10)


_X86_64, _AARCH64 = 62, 183
_CALLS = {(_X86_64, 4), (_AARCH64, 282), (_AARCH64, 283)}
_JUMPS = {
    _X86_64: bytes.fromhex("ff25020000009090"),  # jmp [rip + 2]; nop; nop
    _AARCH64: bytes.fromhex("5000005800021fd6"),  # ldr x16, 8; br x16
}
_RELOCATE: dict[tuple[int, int], Callable[[bytearray, int, int], None]] = {
    (_X86_64, 2): partial(_distance, 4),  # PC32
    (_X86_64, 4): partial(_distance, 4),  # PLT32
    (_X86_64, 24): partial(_distance, 8),  # PC64
    (_AARCH64, 260): partial(_distance, 8),  # PREL64
    (_AARCH64, 261): partial(_distance, 4),  # PREL32
    (_AARCH64, 275): _page,  # ADR_PREL_PG_HI21
    (_AARCH64, 277): partial(_in_page, 0),  # ADD_ABS_LO12_NC
    (_AARCH64, 278): partial(_in_page, 0),  # LDST8_ABS_LO12_NC
    (_AARCH64, 282): _branch,  # JUMP26
    (_AARCH64, 283): _branch,  # CALL26
    (_AARCH64, 284): partial(_in_page, 1),  # LDST16_ABS_LO12_NC
    (_AARCH64, 285): partial(_in_page, 2),  # LDST32_ABS_LO12_NC
    (_AARCH64, 286): partial(_in_page, 3),  # LDST64_ABS_LO12_NC
    (_AARCH64, 299): partial(_in_page, 4),  # LDST128_ABS_LO12_NC
}
