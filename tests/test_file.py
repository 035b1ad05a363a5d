"""The .edge file: what is written is read, any safetensors reader opens it, damage is found and named."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm import quant
from edgellm.errors import EdgeError, EdgeFileError, UnsupportedError
from edgellm.file import EdgeFile, ModelInfo, TensorSpec, Writer, pad_vector

INFO = ModelInfo(
    architecture="llama",
    config={"vocab_size": 7, "theta": 1e4},
    recipe="q4",
    bos_id=None,
    eos_ids=(2, 5),
    chat_template='{{ "ü" }}',
    name="tiny",
    license="MIT",
    origin="here",
)
SPECS = {
    "embed": TensorSpec((7, 40), "q8"),
    "norm": TensorSpec((40,), "f32"),
    "gate_up": TensorSpec((64, 40), "q4", pair=32),
    "output": TensorSpec((7, 40), "f16"),
}


def write(path, specs=SPECS, info=INFO, tokenizer=b'{"a": 1}', tables=None):
    rng, matrices = np.random.default_rng(0), {}
    with Writer(path, info, tokenizer, specs, tables) as writer:
        for name, (shape, fmt, _) in specs.items():
            values = rng.standard_normal(shape).astype(np.float32)
            if len(shape) == 1:
                matrices[name] = pad_vector(values)
            else:
                matrices[name] = quant.get(fmt).pack(quant.get(fmt).quantize(values))
            for piece in np.array_split(matrices[name].reshape(-1), 2):
                writer.write(name, piece)
    return matrices


@pytest.fixture
def edge(tmp_path):
    write(tmp_path / "tiny.edge")
    return tmp_path / "tiny.edge"


def reason(path):
    """The error of opening and verifying a file, None if there is none."""
    try:
        file = EdgeFile(path)
    except EdgeError as error:
        return error
    try:
        file.verify()
    except EdgeError as error:
        return error
    finally:
        file.close()
    return None


def test_round_trip(tmp_path):
    matrices = write(tmp_path / "tiny.edge")
    file = EdgeFile(tmp_path / "tiny.edge")
    file.verify()
    assert file.info == INFO
    assert json.loads(file.tokenizer_json) == {"a": 1}
    assert file.tokenizer_tables is None
    assert list(file.tensors) == list(SPECS)
    for name, tensor in file.tensors.items():
        assert (tensor.shape, tensor.format, tensor.pair) == SPECS[name]
        np.testing.assert_array_equal(tensor.data.view(np.uint8), matrices[name].view(np.uint8))
    file.close()


def test_tables_are_a_view_of_the_map(tmp_path):
    write(tmp_path / "tiny.edge", tables=bytes(range(128)))
    file = EdgeFile(tmp_path / "tiny.edge")
    file.verify()
    assert file.tokenizer_tables.tolist() == list(range(128))
    assert file.tokenizer_tables.ctypes.data % 64 == 0
    assert not file.tokenizer_tables.flags.owndata
    assert list(file.tensors) == list(SPECS)
    file.close()


def test_version_1_is_read(edge):
    rewrite(edge, at("header", "__metadata__", "version", value="1"))
    file = EdgeFile(edge)
    assert file.tokenizer_tables is None
    assert file.info == INFO
    file.close()


def test_tensors_are_aligned_views_of_the_map(edge):
    file = EdgeFile(edge)
    for tensor in file.tensors.values():
        assert tensor.data.ctypes.data % 64 == 0
        assert not tensor.data.flags.owndata
        assert not tensor.data.flags.writeable
    assert (edge.stat().st_size - sum(t.data.nbytes for t in file.tensors.values()) - 64) % 4096 == 0
    file.close()


def test_safetensors_lists_and_reads_it(edge):
    loaded = safetensors.numpy.load_file(edge)
    assert {name: (value.dtype.name, value.shape) for name, value in loaded.items()} == {
        "tokenizer.json": ("uint8", (64,)),
        "embed": ("uint8", (1, 1, 1088)),
        "norm": ("float32", (48,)),
        "gate_up": ("uint8", (4, 1, 576)),
        "output": ("float16", (1, 1, 64, 16)),
    }
    file = EdgeFile(edge)
    for name, tensor in file.tensors.items():
        np.testing.assert_array_equal(loaded[name].reshape(-1).view(np.uint8), tensor.data.reshape(-1).view(np.uint8))
    file.close()


def test_arrays_outlive_close(edge):
    file = EdgeFile(edge)
    norm = file.tensors["norm"].data
    file.close()
    assert norm[40:].tolist() == [0] * 8
    assert file.tensors == {}


def test_same_model_same_bytes(tmp_path):
    for name in ("a.edge", "b.edge"):
        write(tmp_path / name)
    assert (tmp_path / "a.edge").read_bytes() == (tmp_path / "b.edge").read_bytes()


def test_every_truncation_is_named(edge, tmp_path):
    whole, cut = edge.read_bytes(), tmp_path / "cut.edge"
    for size in [*range(64), *range(64, len(whole), 97), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        assert isinstance(reason(cut), EdgeFileError), size
    cut.write_bytes(whole + b" ")
    assert "cut short or padded" in str(reason(cut))


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_every_flipped_bit_is_found(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "tiny.edge"
    write(path, tables=bytes(128))
    content = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    assert isinstance(reason(path), (EdgeFileError, UnsupportedError))


def rewrite(path, change):
    """Apply a change to the parsed header and write it back with a checksum that fits, as an attacker would."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    tensors = json.loads(header["__metadata__"]["tensors"])
    change(header, tensors)
    header["__metadata__"]["tensors"] = json.dumps(tensors)
    header["__metadata__"]["header_sha256"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    text = text.replace(b"0" * 64, hashlib.sha256(text).hexdigest().encode(), 1)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


def at(*keys, value):
    def change(header, tensors):
        place = {"header": header, "tensors": tensors}[keys[0]]
        for key in keys[1:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


HAND_MADE = {
    "other version": (at("header", "__metadata__", "version", value="3"), UnsupportedError, "'3'.*reads 1 and 2"),
    "not ours": (at("header", "__metadata__", "format", value="pt"), EdgeFileError, r"not a \.edge file"),
    "no metadata": (at("header", "__metadata__", "config", value=5), EdgeFileError, "malformed"),
    "config no JSON": (at("header", "__metadata__", "config", value="{"), EdgeFileError, "malformed"),
    "deep config": (at("header", "__metadata__", "config", value="[" * 10**5), EdgeFileError, "malformed"),
    "eos no list": (at("header", "__metadata__", "eos_ids", value="3"), EdgeFileError, "malformed"),
    "negative offset": (at("header", "embed", "data_offsets", value=[-64, 1024]), EdgeFileError, "stands at|expected"),
    "huge offset": (at("header", "embed", "data_offsets", value=[1 << 62, (1 << 62) + 1088]), EdgeFileError, "stands"),
    "overlap": (at("header", "embed", "data_offsets", value=[0, 1088]), EdgeFileError, "stands at"),
    "offsets no integers": (at("header", "embed", "data_offsets", value=[64.0, 1152]), EdgeFileError, "integers"),
    "three offsets": (at("header", "embed", "data_offsets", value=[64, 100, 1152]), EdgeFileError, "malformed"),
    "huge shape": (at("tensors", "embed", "shape", value=[1 << 62, 40]), EdgeFileError, "shape"),
    "zero shape": (at("tensors", "embed", "shape", value=[0, 40]), EdgeFileError, "shape"),
    "three dimensions": (at("tensors", "embed", "shape", value=[7, 40, 1]), EdgeFileError, "shape"),
    "larger shape": (at("tensors", "embed", "shape", value=[17, 40]), EdgeFileError, "stored as"),
    "unknown format": (at("tensors", "embed", "format", value="q3"), EdgeFileError, "'q3'"),
    "format of a path": (at("tensors", "embed", "format", value="../x"), EdgeFileError, "format"),
    "other format": (at("tensors", "embed", "format", value="q4"), EdgeFileError, "stored as"),
    "quantized vector": (at("tensors", "norm", "format", value="q8"), EdgeFileError, "format"),
    "odd pair": (at("tensors", "gate_up", "pair", value=24), EdgeFileError, "paired by 24"),
    "negative pair": (at("tensors", "gate_up", "pair", value=-16), EdgeFileError, "paired"),
    "other type": (at("header", "embed", "dtype", value="F64"), EdgeFileError, "F64"),
    "no checksum": (at("tensors", "embed", "sha256", value=None), EdgeFileError, "does not match"),
    "extra tensor": (at("header", "more", value={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
                     EdgeFileError, "more"),
    "tables that are not there": (at("header", "__metadata__", "tokenizer_tables_sha256", value=""),
                                  EdgeFileError, r"tokenizer\.tables"),
    "tables without a checksum": (at("header", "tokenizer.tables", value={"data_offsets": [0, 0]}),
                                  EdgeFileError, r"tokenizer\.tables"),
    "missing tensor": (lambda header, tensors: tensors.pop("embed"), EdgeFileError, "embed"),
}  # fmt: skip


@pytest.mark.parametrize("case", HAND_MADE)
def test_hand_made_headers(edge, case):
    change, kind, words = HAND_MADE[case]
    rewrite(edge, change)
    with pytest.raises(kind, match=words):
        EdgeFile(edge).verify()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 8, b"\xff" * 64, (2).to_bytes(8, "little") + b"[]", (4).to_bytes(8, "little") + b"\xff\xfe{}",
     (1 << 62).to_bytes(8, "little") + b"{}", (24).to_bytes(8, "little") + b'{"a":1,"a":2}           ',
     (60000).to_bytes(8, "little") + b"[" * 60000, (6000).to_bytes(8, "little") + b"1" * 6000],
    ids=range(9),
)  # fmt: skip
def test_not_even_safetensors(tmp_path, content):
    (tmp_path / "bad.edge").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(EdgeFileError, match=r"bad\.edge"):
        EdgeFile(tmp_path / "bad.edge")
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.edge", tmp_path):
        with pytest.raises(EdgeFileError, match="cannot be read"):
            EdgeFile(path)


def write_some(path, tensors):
    with Writer(path, INFO, b"{}", SPECS) as writer:
        for name, data in tensors.items():
            writer.write(name, data)


def test_a_failed_write_leaves_the_target_and_nothing_else(edge):
    before = edge.read_bytes()
    for wrong in ({"embed": np.zeros(1089, np.uint8)}, {"norm": np.zeros(48, np.float32)}, {}):
        with pytest.raises(ValueError, match=r"given|not written"):
            write_some(edge, wrong)
    assert edge.read_bytes() == before
    assert os.listdir(edge.parent) == ["tiny.edge"]


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from test_file import INFO, SPECS, Writer
with Writer(sys.argv[1], INFO, b"{}", SPECS) as writer:
    writer.write("embed", np.zeros(1088, np.uint8))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
def test_kill_while_writing_leaves_the_target(edge):
    before = edge.read_bytes()
    killed = subprocess.run([sys.executable, "-c", KILLED, edge, os.path.dirname(__file__)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert edge.read_bytes() == before
