"""Files of torch.save: real ones, and what a hostile or damaged one may hold."""

import pickle
import re
import sys
import tracemalloc
import zipfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from conftest import shared
from mutations import mutations
from torch_pickles import (
    MAGIC,
    call,
    dictionary,
    group,
    name,
    program,
    storage,
    tensor,
    value,
    write_legacy,
    write_zip,
)

from edgellm.converters import torch_pickle
from edgellm.converters.blocks import decode_rows
from edgellm.converters.pytorch import LEGACY, read_pytorch
from edgellm.converters.torch_pickle import Storage, StorageType, StoredTensor, load
from edgellm.errors import CheckpointError, UnsupportedError

GOLDEN = Path(__file__).parent / "golden"
sys.path.append(str(GOLDEN))
from torch_files import VALUES  # noqa: E402

NUMBERS = np.arange(12, dtype=np.float32)


def values_of(source, first=0, stop=None):
    rows = int(np.prod(source.shape[:-1])) if stop is None else stop
    return decode_rows(source.type, source.read(first, rows))


def one(path, content, **storages):
    """The tensor "w" of a file with it alone."""
    write_zip(path, dictionary({"w": content}), storages or {"0": NUMBERS.tobytes()})
    return read_pytorch(path)["w"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w.pt"


# Files that PyTorch wrote.


@pytest.mark.parametrize("file", ["torch_zip.pt", "torch_legacy.pt"])
def test_files_of_torch(file):
    tensors = read_pytorch(GOLDEN / file)
    assert list(tensors) == list(VALUES)
    for key, expected in VALUES.items():
        assert tensors[key].shape == expected.shape
        np.testing.assert_array_equal(values_of(tensors[key]).reshape(expected.shape), expected, err_msg=key)
    assert [tensors[key].type.name for key in ("float32", "float16", "bfloat16", "parameter")] == [
        "F32", "F16", "BF16", "F32"
    ]  # fmt: skip


@pytest.mark.parametrize("file", ["torch_zip.pt", "torch_legacy.pt"])
@pytest.mark.parametrize("key", ["float32", "transposed", "some_rows", "some_columns"])
def test_some_rows_of_files_of_torch(file, key):
    source = read_pytorch(GOLDEN / file)[key]
    for first, stop in [(0, 1), (1, 3), (2, 2)]:
        if first < stop:
            np.testing.assert_array_equal(values_of(source, first, stop), VALUES[key][first:stop])


@pytest.mark.parametrize(
    ("file", "key", "expected"),
    [
        ("test.pt", "test", StoredTensor(Storage(StorageType("I64", 8), "0", 8), 0, (2, 4), (4, 1))),
        ("fortran_tensor_3d.pth", "tensor_fortran",
         StoredTensor(Storage(StorageType("I64", 8), "0", 24), 0, (2, 3, 4), (1, 2, 6))),
    ],
)  # fmt: skip
def test_what_the_pickles_of_other_projects_hold(file, key, expected):
    archive = shared(f"data/torch-pickle-fixtures/{file}")
    content, storages = load(BytesIO(zipfile.ZipFile(archive).read(f"{archive.stem}/data.pkl")))
    assert content == {key: expected}
    assert storages == {"0": expected.storage}
    with pytest.raises(UnsupportedError, match=f"tensor '{key}' is stored as I64; this version reads F32, F16, BF16"):
        read_pytorch(archive)


def test_other_protocols():
    """As json is: what a pickle holds does not depend on the protocol."""
    thing = {"a": [1, -70000, 2**40, 0.5, None, True, False], "b": (), "c": (1, "x", (2, 3), ("é", 4, 5)), 7: {"d": []}}
    for protocol in (2, 3, 4, 5):
        assert load(BytesIO(pickle.dumps(thing, protocol)))[0] == thing


# State dicts.


@pytest.mark.parametrize("nest", [lambda state: state, *(
    lambda state, key=key: dictionary({"epoch": value(3), "optimizer": value({"state": []}), key: state})
    for key in ("state_dict", "model_state_dict", "model", "module")
)])  # fmt: skip
def test_weights_may_be_among_other_things(path, nest):
    write_zip(path, nest(dictionary({"w": tensor((3, 4))})), {"0": NUMBERS.tobytes()})
    tensors = read_pytorch(path)
    assert list(tensors) == ["w"]
    np.testing.assert_array_equal(values_of(tensors["w"]), NUMBERS.reshape(3, 4))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (value([1]), "it holds a list; expected tensors by name"),
        (
            value({"lr": 1, "steps": 2}),
            "it holds a dict of lr, steps; expected tensors by name, or a dict of them under",
        ),
        (tensor((3, 4)), "it holds a StoredTensor"),
        (
            dictionary({"w": tensor((3, 4)), "epoch": value(3)}),
            "it holds epoch among its tensors; expected nothing else",
        ),
        (dictionary({7: tensor((3, 4))}), "it holds 7 among its tensors"),
        (
            dictionary({"model": dictionary({"w": tensor((3, 4))}), "module": dictionary({"w": tensor((3, 4))})}),
            "it holds a dict of model, module",
        ),
        (dictionary({f"k{i}": value(i) for i in range(40)}), "k8, k9 and 30 more"),
    ],
)
def test_what_is_no_state_dict(path, content, words):
    write_zip(path, content, {"0": NUMBERS.tobytes()})
    with pytest.raises(CheckpointError, match=re.escape(words)):
        read_pytorch(path)


def test_tensors_that_follow_from_the_config_are_ignored(path):
    content = {"w": tensor((3, 4)), "l.rotary_emb.inv_freq": tensor((2,), kind="LongStorage", key="1")}
    write_zip(path, dictionary(content), {"0": NUMBERS.tobytes(), "1": bytes(16)})
    assert list(read_pytorch(path)) == ["w"]


# Layouts.


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "expected"),
    [
        ((3, 4), (4, 1), 0, NUMBERS.reshape(3, 4)),
        ((4, 3), (1, 4), 0, NUMBERS.reshape(3, 4).T),
        ((2, 3), (4, 1), 5, NUMBERS.reshape(3, 4)[1:, 1:]),
        ((3, 2), (1, 4), 1, NUMBERS.reshape(3, 4)[:2, 1:].T),
        ((1, 4), (99, 1), 8, NUMBERS[None, 8:]),
        ((4, 1), (1, 77), 8, NUMBERS[8:, None]),
        ((4, 1), (3, 77), 0, None),
        ((3, 1), (4, 1), 2, NUMBERS[2::4][:, None]),
        ((2, 3, 2), (6, 2, 1), 0, NUMBERS.reshape(2, 3, 2)),
        ((2, 1, 6), (6, 55, 1), 0, NUMBERS.reshape(2, 1, 6)),
        ((12,), (1,), 0, NUMBERS),
        ((), (), 3, NUMBERS[3]),
    ],
)
def test_layouts(path, shape, strides, offset, expected):
    content = tensor(shape, strides, offset, size=12)
    if expected is None:
        with pytest.raises(UnsupportedError, match="save it contiguous"):
            one(path, content)
        return
    source = one(path, content)
    np.testing.assert_array_equal(values_of(source).reshape(shape), expected)
    if len(shape) == 2:
        np.testing.assert_array_equal(values_of(source, shape[0] - 1, shape[0]), expected[-1:])


@pytest.mark.parametrize(
    ("shape", "strides"), [((2, 3, 2), (1, 2, 6)), ((3, 2), (4, 2)), ((6,), (2,)), ((3, 3), (2, 2))]
)
def test_layouts_that_are_refused(path, shape, strides):
    with pytest.raises(UnsupportedError, match=r"w.pt: tensor 'w' of shape .* save it contiguous"):
        one(path, tensor(shape, strides, size=12))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (tensor((3, 5), size=12), "leads to number 14 of a storage of 12"),
        (tensor((3, 4), offset=1, size=12), "leads to number 12 of a storage of 12"),
        (tensor((3, 4), (10**15, 1), size=12), "leads to number 2000000000000003"),
        (tensor((2**40, 2**40), (0, 1), size=12), "of a storage of 12; expected it to have its own"),
        (tensor((2**60, 1), (0, 1), size=12), "of a storage of 12; expected it to have its own"),
        (tensor((3, 4), size=13), "needs a storage of 52 bytes; found 48"),
        (tensor((3, 4), key="1"), "needs a storage of 48 bytes; found none"),
        (tensor((3, 4), key="../data.pkl"), "found none"),
        (tensor((3, 4), kind="HalfStorage"), "needs a storage of 24 bytes; found 48"),
        (tensor((3, 4), (1,)), "2 dimensions with 1 strides"),
        (tensor((1,) * 9), "9 dimensions with 9 strides"),
        (tensor((-3, 4)), "no sizes"),
        (tensor((3, 4), (4, -1)), "no sizes"),
        (tensor((3, 4), offset=-1), "no sizes"),
        (tensor((3, True)), "no sizes"),
        (tensor((3.0, 4)), "no sizes"),
        (tensor([3, 4]), "list where tuple is expected"),
    ],
)
def test_tensors_that_lead_elsewhere(path, content, words):
    with pytest.raises(CheckpointError, match=words):
        one(path, content)


@pytest.mark.parametrize(
    ("kind", "said"), [("DoubleStorage", "F64"), ("CharStorage", "I8"), ("BoolStorage", "BOOL"),
                       ("ShortStorage", "I16"), ("IntStorage", "I32")]
)  # fmt: skip
def test_numbers_that_are_not_read(path, kind, said):
    with pytest.raises(UnsupportedError, match=f"tensor 'w' is stored as {said}; this version reads F32, F16, BF16"):
        one(path, tensor((3, 4), kind=kind))


# Hostile pickles.


class Runs:
    """Unpickled by Python, leaves a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_is_run(path, protocol, legacy):
    mark = path.with_name("mark")
    hostile = pickle.dumps(Runs(mark), protocol)
    pickle.loads(hostile)
    mark.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", hostile)
    if legacy:
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True})) + hostile)
    with pytest.raises(UnsupportedError, match=r"wants to import '|has the instruction"):
        read_pytorch(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (call(name("os", "system"), value("true")), "wants to import 'os.system', which tensors do not need"),
        (name("builtins", "eval"), "'builtins.eval'"),
        (name("torch", "load"), "'torch.load'"),
        (name("torch._utils", "_rebuild_tensor_v3"), "'torch._utils._rebuild_tensor_v3'"),
        (name("torch._utils", "_rebuild_qtensor"), "nothing was imported or run: save the state_dict alone"),
        (name("collections", "OrderedDict.fromkeys"), "'collections.OrderedDict.fromkeys'"),
        (name("transformers.models.llama", "LlamaForCausalLM"), "'transformers.models.llama.LlamaForCausalLM'"),
        (value("os") + value("system") + b"\x93", "'os.system'"),
        (value(1) + value("system") + b"\x93", "damaged"),
        (b"(ios\nsystem\n", "the instruction INST"),
        (b"(" + name("collections", "OrderedDict") + b"o", "the instruction OBJ"),
        (name("collections", "OrderedDict") + b")\x81", "the instruction NEWOBJ"),
        (b"\x82\x01", "the instruction EXT1"),
        (b"I5\n", "the instruction INT"),
        (b"Pkey\n", "the instruction PERSID"),
        (b"0", "the instruction POP"),
        (b"\x8f", "the instruction EMPTY_SET"),
        (b"C\x01x", "the instruction SHORT_BINBYTES"),
    ],
)
def test_imports_and_instructions_that_tensors_do_not_need(path, content, words):
    write_zip(path, content, {})
    with pytest.raises((UnsupportedError, CheckpointError), match=words):
        read_pytorch(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"t",
        b"u",
        b"\x85",
        b"h\x07",
        b"q\x07",
        b"R",
        b"b",
        b"Q",
        value(1) + value(()) + b"R",
        name("torch", "FloatStorage") + value(()) + b"R",
        value({}) + value([]) + value(1) + b"s",
        value({}) + value((1,)) + value(1) + b"s",
        value({}) + b"(" + value("a") + b"u",
        value(()) + value(1) + b"a",
        value(1) + value({}) + b"b",
        value(()) + b"Q",
        group(value("storage")) + b"Q",
        group(value("module"), name("torch", "FloatStorage"), value("0"), value("cpu"), value(1)) + b"Q",
        storage("0", 4, "FloatStorage", value(("view", 0, 4))),
        storage(["0"], 4),
        storage("0", 4.0),
        call(name("torch._utils", "_rebuild_tensor_v2")),
        call(name("torch._utils", "_rebuild_tensor_v2"), *map(value, (1, 0, (1,), (1,)))),
        call(name("torch._utils", "_rebuild_tensor_v2"), storage("0", 4),
             *map(value, (0, (1,), (1,), False, {}, {"neg": True}))),
        call(name("torch._utils", "_rebuild_parameter"), value(1)),
        call(name("collections", "OrderedDict"), value(1)),
        call(name("collections", "OrderedDict"), value([(((),), 1)])),
        b"X\xff\xff\xff\xff",
        b"\x8a\xff",
        b"\xfe",
        b"X\x01\0\0\0\xff",
    ],
)  # fmt: skip
def test_damaged_pickles(path, content):
    write_zip(path, content, {})
    with pytest.raises(CheckpointError, match=r"w.pt: its pickle is damaged"):
        read_pytorch(path)


def test_what_would_take_memory_or_the_stack_of_others(path):
    """A number in memory that is far away, tuples in tuples as a key, a dict of itself: all bad for Python's own."""
    deep = value(()) + b"\x85" * 500_000
    many = dictionary({}) + b"q\x00" + (b"h\x00" * 2 + b"\x86" + b"q\x00") * 5_000
    for content, words in [
        (value(1) + b"r\xff\xff\xff\xff", "it holds a int"),
        (deep, "it holds a tuple"),
        (value({}) + deep + value(1) + b"s", "tuple where str"),
        (many, "it holds a tuple"),
        (b"}q\x00" + value("model") + b"h\x00s", "it holds a dict of model"),
    ]:
        write_zip(path, content, {})
        with pytest.raises(CheckpointError, match=words):
            read_pytorch(path)


def test_keys_of_storages_that_would_take_the_stack_or_memory_to_print(path):
    heads = b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True}, {}))
    many = value(()) + b"q\x00" + (b"h\x00" * 2 + b"\x86" + b"q\x00") * 5_000
    for key in (value(()) + b"\x85" * 500_000, many):
        path.write_bytes(heads + program(b"](" + key + b"e"))
        with pytest.raises(CheckpointError, match="does not go on so"):
            read_pytorch(path)


def test_a_pickle_that_goes_on_and_on(path, monkeypatch):
    """16 MB of instructions that make dicts would make a gigabyte of them."""
    monkeypatch.setattr(torch_pickle, "MAX_INSTRUCTIONS", 10_000)
    write_zip(path, b"}" * 1_000_000, {}, compression=zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="more than 10000 instructions"):
        read_pytorch(path)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    write_zip(path, b"}" * (1 << 25), {}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"data.pkl' has 33554435 bytes; expected at most 16777216"):
        read_pytorch(path)


# Files.


def test_compressed_and_renamed_archives(path):
    """As somebody may have packed them again."""
    write_zip(path, dictionary({"w": tensor((3, 4))}), {"0": NUMBERS.tobytes()}, "any/where", zipfile.ZIP_DEFLATED)
    np.testing.assert_array_equal(values_of(read_pytorch(path)["w"]), NUMBERS.reshape(3, 4))


@pytest.mark.parametrize(
    ("members", "error", "words"),
    [
        ({"a/data.pkl": program(value({})), "b/data.pkl": program(value({}))}, CheckpointError, "2 members named data"),
        ({"a/weights": b""}, CheckpointError, "0 members named data.pkl; expected one"),
        ({"a/data.pkl": b"", "a/byteorder": b"big"}, UnsupportedError, "big-endian"),
        ({"a/data.pkl": program(value({})) * 2}, CheckpointError, "it holds a dict of ;"),
    ],
)
def test_bad_archives(path, members, error, words):
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    with pytest.raises(error, match=words):
        read_pytorch(path)


def legacy(path, **changes):
    arguments = {"content": dictionary({"w": tensor((3, 4))}), "storages": {"0": NUMBERS.tobytes()}, "sizes": {"0": 12}}
    write_legacy(path, **(arguments | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"version": 1002}, CheckpointError, "does not go on so"),
        ({"machine": []}, CheckpointError, "does not go on so"),
        ({"machine": {"little_endian": False}}, UnsupportedError, "big-endian"),
        ({"sizes": {"0": 11}}, CheckpointError, "needs a storage of 48 bytes; found 44"),
        ({"sizes": {"0": 13}}, CheckpointError, "takes the bytes .* but the file ends at"),
        ({"sizes": {"0": -1}}, CheckpointError, "but the file ends at"),
        ({"storages": {}}, CheckpointError, "needs a storage of 48 bytes; found none"),
        ({"storages": {"1": b""}, "sizes": {"1": 0}}, CheckpointError, "says nothing of it"),
    ],
)
def test_bad_legacy_files(path, changes, error, words):
    with pytest.raises(error, match=words):
        read_pytorch(legacy(path, **changes))


def test_every_cut_of_a_legacy_file_is_found(path):
    whole = legacy(path).read_bytes()
    assert list(read_pytorch(path)) == ["w"]
    for length in range(len(LEGACY), len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="fetch it again"):
            read_pytorch(path)


@pytest.mark.parametrize("file", ["torch_zip.pt", "torch_legacy.pt"])
def test_mutated_files_give_tensors_or_a_named_error(path, file):
    """And take no memory to speak of."""
    tracemalloc.start()
    for data in mutations((GOLDEN / file).read_bytes(), 300):
        path.write_bytes(data)
        with suppress(CheckpointError, UnsupportedError):
            for source in read_pytorch(path).values():
                values_of(source)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
