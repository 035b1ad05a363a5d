"""NumPy's archives, and zip archives in general."""

import io
import json
import re
import struct
import tracemalloc
import zipfile
from contextlib import suppress

import numpy as np
import pytest
from conftest import shared
from mutations import mutations

from edgellm.converters import archive
from edgellm.converters.archive import members
from edgellm.converters.blocks import decode_rows
from edgellm.converters.name_map import rename
from edgellm.converters.npz import read_npz
from edgellm.errors import CheckpointError, UnsupportedError

MATRIX = np.arange(35, dtype=np.float32).reshape(5, 7)


def values_of(source, first=0, stop=None):
    rows = int(np.prod(source.shape[:-1])) if stop is None else stop
    return decode_rows(source.type, source.read(first, rows))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w.npz"


def pack(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)


def npy(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


# Arrays.


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_arrays(path, save, dtype):
    arrays = {"a.weight": MATRIX, "by_columns": np.asfortranarray(MATRIX), "b": MATRIX[0], "c": MATRIX[1, 2],
              "d": MATRIX[:4, :6].reshape(2, 3, 4)}  # fmt: skip
    save(path, **{name: array.astype(dtype) for name, array in arrays.items()})
    found = read_npz(path)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(values_of(found[name]).reshape(array.shape), array)
    for name in ("a.weight", "by_columns"):
        for first, stop in [(3, 5), (0, 2), (1, 3)]:
            np.testing.assert_array_equal(values_of(found[name], first, stop), MATRIX[first:stop])


def test_files_of_other_projects():
    with pytest.raises(UnsupportedError, match="array 'x' is stored as <i8; this version reads <f4, <f2"):
        read_npz(shared("data/torch-pickle-fixtures/test.npz"))


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (MATRIX.astype(np.float64), "<f8"),
        (MATRIX.astype(np.int8), "|i1"),
        (MATRIX.astype(">f4"), ">f4"),
        (MATRIX.astype(np.complex64), "<c8"),
        (MATRIX.view("V4"), "|V4"),
        (np.array(["a"]), "<U1"),
    ],
)
def test_types_that_are_not_read(path, array, said):
    np.savez(path, w=array)
    with pytest.raises(
        UnsupportedError, match=re.escape(f"array 'w' is stored as {said}; this version reads <f4, <f2")
    ):
        read_npz(path)


def test_pickled_objects_are_not_read(path):
    np.savez(path, w=np.array([print], object))
    with pytest.raises(UnsupportedError, match=r"array 'w' is stored as \|O"):
        read_npz(path)


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (5, 7), }"


def with_header(text, version=1, data=bytes(140), magic=b"\x93NUMPY"):
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return magic + bytes([version, 0]) + length + text.encode() + data


@pytest.mark.parametrize(
    "text",
    [
        HEADER,
        HEADER + " " * 50 + "\n",
        "{'descr': '<f4','fortran_order': False,'shape': (5,7)}",
        "{ 'descr': '<f4', 'fortran_order': False, 'shape': (5, 7,)}",
    ],
)
@pytest.mark.parametrize("version", [1, 2, 3])
def test_headers(path, text, version):
    pack(path, {"w.npy": with_header(text, version)})
    assert read_npz(path)["w"].shape == (5, 7)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "starts with b''; expected the header"),
        (b"\x93NUMPY", "expected the header"),
        (with_header(HEADER)[:40], "expected the header"),
        (with_header(HEADER, magic=b"\x93NUMPX"), "expected the header"),
        (
            with_header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (35,), }"),
            "with one type and a shape",
        ),
        (with_header(HEADER.replace("False", "0")), "expected the header"),
        (with_header(HEADER.replace("(5, 7)", "(5, -7)")), "expected the header"),
        (with_header(HEADER.replace("(5, 7)", "(5 7)")), "expected the header"),
        (with_header(HEADER.replace("(5, 7)", "(" + "1, " * 9 + ")")), "expected the header"),
        (with_header(HEADER.replace("(5, 7)", "(__import__('os').abort(),)")), "expected the header"),
        (with_header(HEADER + " " * 10_000), "expected the header"),
        (with_header("(" * 9_000), "expected the header"),
        (with_header(HEADER.replace("5, 7", "5, 8")), r"has 209 bytes; expected 229 for shape \(5, 8\)"),
        (with_header(HEADER.replace("5, 7", f"{10**18 - 1}, {10**18 - 1}")), "has 243 bytes; expected 399999"),
        (with_header(HEADER) + b"\0", "has 210 bytes; expected 209"),
    ],
)
def test_bad_arrays(path, data, words):
    pack(path, {"w.npy": data})
    with pytest.raises(CheckpointError, match=words):
        read_npz(path)


def test_other_members(path):
    pack(path, {"w.npy": npy(MATRIX), "notes.txt": b""})
    with pytest.raises(CheckpointError, match=r"w.npz holds 'notes.txt', which is no array"):
        read_npz(path)


# Archives.


def test_a_deflated_member_is_read_from_the_front_on(path):
    """In pieces of any size, also going back, without inflating more than is asked for."""
    content = np.random.default_rng(0).integers(0, 9, 1 << 20, np.uint8).tobytes()
    pack(path, {"x": content}, zipfile.ZIP_DEFLATED)
    member = members(path)["x"]
    for begin, count in [(0, 10), (10, 0), (10, 70_000), (500_000, 3), (499_999, 200_000), (0, 1 << 20), (1 << 20, 0)]:
        assert member.read(begin, count).tobytes() == content[begin : begin + count]
    assert member.whole(1 << 20) == content
    tracemalloc.start()
    member.read(0, 1000)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_a_bomb_is_inflated_as_far_as_it_is_asked_for(path):
    pack(path, {"x": bytes(1 << 26)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    member = members(path)["x"]
    assert not member.read(1 << 25, 1 << 16).any()
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    with pytest.raises(CheckpointError, match="'x' has 67108864 bytes; expected at most 1000"):
        member.whole(1000)


def changed(path, old, new):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_what_does_not_match_its_checksum(path, compression):
    pack(path, {"x": b"abcdefgh" * 100}, compression)
    data = path.read_bytes()
    info = zipfile.ZipFile(path).getinfo("x")
    path.write_bytes(data.replace(struct.pack("<I", info.CRC), bytes(4)))
    with pytest.raises(CheckpointError, match="'x' does not match its checksum"):
        members(path)["x"].whole(1000)


def test_what_inflates_to_less_or_to_nothing(path):
    pack(path, {"x": b"abcdefgh" * 100}, zipfile.ZIP_DEFLATED)
    changed(path, struct.pack("<I", 800), struct.pack("<I", 900))
    with pytest.raises(CheckpointError, match="'x' ends after 800 bytes; expected 900"):
        members(path)["x"].read(0, 900)
    pack(path, {"x": b"abcdefgh" * 100}, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    data[31] = 0xFF  # the first byte after the name
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="'x' cannot be inflated"):
        members(path)["x"].read(0, 1)


def test_archives_that_are_refused(path, monkeypatch):
    pack(path, {"x": b"abc"}, zipfile.ZIP_BZIP2)
    with pytest.raises(UnsupportedError, match="'x' is encrypted or compressed by method 12; this version reads"):
        members(path)
    pack(path, {"x": b"abc"})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as file:
        file.writestr("x", b"def")
    with pytest.raises(CheckpointError, match="holds a member twice"):
        members(path)
    pack(path, {"x": b"abc", "y": b"abc"})
    directory = path.read_bytes().index(b"PK\1\2")
    data = bytearray(path.read_bytes())
    data[directory + 46 + 1 + 42] = 0  # y's offset is x's
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="'y' takes the bytes 31 to 34; expected them from 34 on"):
        members(path)
    pack(path, {"x": b"abc"})
    changed(path, b"PK\3\4", b"PK\3\5")
    with pytest.raises(CheckpointError, match="cannot be read: 'x' is not where the list of members says"):
        members(path)
    pack(path, {f"{i:>0300}": b"" for i in range(10)})
    monkeypatch.setattr(archive, "MAX_DIRECTORY", 3000)
    with pytest.raises(CheckpointError, match=r"its list of members takes \d+ bytes, at most 3000 are expected"):
        members(path)
    path.write_bytes(b"PK\3\4")
    with pytest.raises(CheckpointError, match=r"w.npz is a zip archive that cannot be read"):
        members(path)
    with pytest.raises(CheckpointError, match=r"other.npz cannot be read: No such file"):
        members(path.with_name("other.npz"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_mutated_files_give_arrays_or_a_named_error(path, save):
    """And take no memory to speak of."""
    save(path, a=MATRIX, b=np.asfortranarray(MATRIX), c=MATRIX[0])
    tracemalloc.start()
    for data in mutations(path.read_bytes(), 300):
        path.write_bytes(data)
        with suppress(CheckpointError, UnsupportedError):
            for source in read_npz(path).values():
                values_of(source)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


# Maps of names.


def renamed(tmp_path, names, found):
    path = tmp_path / "names.json"
    path.write_text(names if isinstance(names, str) else json.dumps(names))
    return rename(path, dict.fromkeys(found))


def test_names(tmp_path):
    names = {
        "tok": "model.embed",
        "l{}.q": "model.layers.{}.q",
        "l{}.e{}.w": "model.{}.{}",
        "l2.k": "special",
        "rope": None,
        "a.b": "c",
    }
    found = ["tok", "l0.q", "l11.q", "l3.e4.w", "l2.k", "rope", "a.b", "kept", "lx.q"]
    assert list(renamed(tmp_path, names, found)) == [
        "model.embed", "model.layers.0.q", "model.layers.11.q", "model.3.4", "special", "c", "kept", "lx.q"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("[", "names.json is not sound JSON"),
        ({"a": 1}, r"names.json has 'a': '1'; expected a name with as many \{\} for numbers, or null"),
        ({"a{}": "b"}, "expected a name with as many"),
        ({"a": "b{}"}, "expected a name with as many"),
        ({"a": "x", "axb": "y", "z{}": None}, r"tensors that are not there: axb, z\{\}; those that are: a, b"),
        ({"a": "b"}, "gives several tensors one name: b; expected one for each"),
        ({"a": "{0.__class__}", "b": "{0.__class__}"}, "gives several tensors one name: {0.__class__}"),
        ({"a": "x", "b": "x"}, "gives several tensors one name: x"),
    ],
)
def test_bad_names(tmp_path, names, words):
    with pytest.raises(CheckpointError, match=words):
        renamed(tmp_path, names, ["a", "b"])
