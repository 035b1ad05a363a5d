"""Compiled kernels on disk: found without Numba, checked, rebuilt, bounded, shared by processes."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from conftest import BUNDLED
from test_architectures import IDS

pytest.importorskip("numba")

from edgellm import isa
from edgellm.backends import cpu
from edgellm.generate import Slot
from edgellm.kernels import Compiler, Kernel, _numba, objects
from edgellm.kernels.matmul import block_place
from edgellm.kernels.prepare import rows_together

KERNEL = Kernel(block_place)
PROGRAM = """
import json, sys
from edgellm.isa import get
from edgellm.kernels import Compiler
from edgellm.kernels.matmul import block_place
result = Compiler(get("generic")).function(block_place)(3, 32)
print(json.dumps([result, "numba" in sys.modules, "llvmlite.binding" in sys.modules]))
"""
LLVM_LOADS = sys.platform != "linux"
"""Whether a start needs LLVM: for object files that are no images."""


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path))
    return tmp_path


def fresh():
    return Compiler(isa.get("generic"))


def works(compiler):
    return compiler.function(block_place)(3, 32) == 3 and compiler.function(block_place)(1, 32) == 2


def file():
    (path,) = objects.folder().rglob("*.kernel")
    return path


def start():
    return subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)


def test_a_kernel_is_compiled_once_and_loaded_without_numba_or_llvm():
    first = start().communicate(timeout=100)[0]
    again = start().communicate(timeout=100)[0]
    assert json.loads(first) == [3, True, True]
    assert json.loads(again) == [3, False, LLVM_LOADS]


def test_an_answer_needs_neither_numba_nor_llvm(monkeypatch):
    monkeypatch.delenv("EDGELLM_HOME")
    code = (
        f"import sys; from edgellm import load; load({str(BUNDLED)!r}, backend='cpu').generate('Once', max_tokens=2)\n"
        "print('numba' in sys.modules, 'llvmlite.binding' in sys.modules)"
    )
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == f"False {LLVM_LOADS}\n"


DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-1],
    "header only": lambda content: content[: len(objects.HEADER) + 32],
    "a bit": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    "longer": lambda content: content + b"\0",
    "foreign": lambda content: b"\x7fELF" + bytes(1000),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_never_loaded(damage):
    assert works(fresh())
    sound = file().read_bytes()
    file().write_bytes(DAMAGE[damage](sound))
    assert objects.read(file().stem) is None
    assert not list(objects.folder().rglob("*.kernel"))
    assert works(fresh())
    assert objects.read(file().stem) == sound[len(objects.HEADER) + 32 :]


def test_a_file_under_another_name_or_key_is_not_loaded(monkeypatch):
    compiler = fresh()
    assert works(compiler)
    assert compiler.function(rows_together)(9, 12) == 4
    one, other = sorted(objects.folder().rglob("*.kernel"))
    os.replace(one, other)
    assert objects.read(other.stem) is None
    assert works(fresh())
    moved = file()
    monkeypatch.setattr(objects, "key", lambda: "another-key")
    (objects.folder() / "another-key").mkdir()
    os.replace(moved, objects.folder() / "another-key" / moved.name)
    assert objects.read(moved.stem) is None


@pytest.mark.parametrize("place", ["file", "missing/\0" if sys.platform == "win32" else "/proc/none"])
def test_a_home_that_cannot_be_written(place, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / place))
    assert works(fresh())
    assert objects.held() == []
    assert capfd.readouterr() == ("", "")


def test_two_processes_at_once():
    both = [start(), start()]
    for process in both:
        assert json.loads(process.communicate(timeout=100)[0])[0] == 3
    assert objects.read(file().stem)
    assert json.loads(start().communicate(timeout=100)[0]) == [3, False, LLVM_LOADS]


def test_only_the_folders_used_last_are_kept():
    for i in range(objects.KEPT + 2):
        old = objects.folder() / f"old-{i:02}"
        old.mkdir(parents=True)
        (old / "x.kernel").write_bytes(b"x")
        os.utime(old, (1000 + i, 1000 + i))
    assert works(fresh())
    left_behind = objects.folder() / objects.key() / ".x.kernel.1-1.tmp"
    left_behind.write_bytes(b"half")
    objects.tidy()
    assert left_behind.exists()  # a process may be writing it
    os.utime(left_behind, (1000, 1000))
    objects.tidy()
    assert not left_behind.exists()
    assert [kept.path.name for kept in objects.held()] == [
        objects.key(), *(f"old-{i:02}" for i in range(objects.KEPT + 1, 2, -1))
    ]  # fmt: skip


def test_use_is_noted_once_an_hour():
    assert works(fresh())
    folder = file().parent
    for age, noted in ((objects.HOUR / 2, False), (objects.HOUR * 2, True)):
        os.utime(folder, (time.time() - age,) * 2)
        before = folder.stat().st_mtime
        assert works(fresh())
        assert (folder.stat().st_mtime > before) == noted


def test_the_key_names_the_cpu_and_depends_on_its_features(monkeypatch):
    key = objects.key()
    assert key.startswith(isa.host()[1].replace("_", "-").split("-")[0])
    monkeypatch.setattr(objects, "host", lambda: (*isa.host()[:2], "+other"))
    objects.key.cache_clear()
    try:
        assert objects.key() != key
    finally:
        monkeypatch.undo()
        objects.key.cache_clear()


def test_a_kernel_that_wants_an_unknown_symbol_is_compiled_by_numba_in_this_process(monkeypatch):
    """What LLVM's loader refuses, on disk or fresh, is not kept."""
    from llvmlite import binding

    source = binding.parse_assembly("declare void @no_such_symbol() define i64 @kernel(i64 %a, i64 %b) {\n"
                                    "call void @no_such_symbol()\nret i64 0 }")  # fmt: skip
    wanting = _numba._machine().emit_object(source)
    compiler = fresh()
    objects.write(compiler._file(KERNEL), wanting)
    monkeypatch.setattr(_numba.Bodies, "object_file", lambda *_: wanting)
    assert works(compiler)
    assert len(compiler._kept) == 1
    objects.remove(compiler._file(KERNEL))
    assert works(fresh())
    assert not list(objects.folder().rglob("*.kernel"))


def test_kernels_for_several_rows_come_when_a_step_has_enough(monkeypatch):
    """Short steps go row by row until then; no bit depends on it."""
    monkeypatch.delenv("EDGELLM_HOME")
    whole = Slot(tiny.backend("llama", "q4m", "cpu"), 64).extend(IDS, wanted=range(len(IDS)))
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "compiler", OneRowOnDisk)
        backend = tiny.backend("llama", "q4m", "cpu")
    slot, found = Slot(backend, 64), []
    for ids, most_rows in ((IDS[:15], 1), (IDS[15:16], 1), (IDS[16:], isa.detect().ROWS)):
        found.append(slot.extend(ids, wanted=range(len(ids))))
        assert backend._most_rows == most_rows
    np.testing.assert_array_equal(np.concatenate(found), whole)


class OneRowOnDisk(Compiler):
    def load(self, kernels):
        return super().load(kernels) if all(kernel.rows < 2 for kernel in kernels) else False


def test_progress_is_shown_on_a_terminal_and_cleared(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    compiler = fresh()
    compiler.get([KERNEL, Kernel(rows_together)])
    compiler.get([KERNEL])
    shown = capsys.readouterr().err.split("\r\033[K")
    assert shown == [
        "",
        "compiling kernels, once per machine: 1 of 2, matmul.block_place",
        "compiling kernels, once per machine: 2 of 2, prepare.rows_together",
        "",
    ]


def test_ctrl_c_clears_the_line_and_the_next_call_compiles(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    compiler = fresh()
    with monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        patch.setattr(_numba.Bodies, "object_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compiler.get([KERNEL])
        assert capsys.readouterr().err.endswith("\r\033[K")
    assert works(compiler)
