"""Tensors of ours in a checkpoint that stores them otherwise, on arrays small enough to write down what is expected."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgellm.architectures import Stored
from edgellm.converters.blocks import TYPES, decode_rows
from edgellm.converters.checkpoint import SourceTensor
from edgellm.converters.naming import match_tensors
from edgellm.errors import CheckpointError, UnsupportedError

CONFIG = SimpleNamespace(n_layers=1, head_dim=2, n_experts=3)
QKV = ("layers.{}.q", "layers.{}.k", "layers.{}.v")


def source(name, values, kind="F32"):
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(values.size // values.shape[-1], -1)
    return SourceTensor(name, values.shape, TYPES[kind], lambda first, stop: raw[first:stop])


def read(tensor):
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    values = decode_rows(tensor.type, tensor.read(0, rows)) + tensor.plus
    half = decode_rows(tensor.type, tensor.read(rows // 2, rows)) + tensor.plus
    np.testing.assert_array_equal(half, values[rows // 2 :])
    return values.reshape(tensor.shape)


def ours(shapes, names, found, stacked=None):
    """{our name: values} that are found under those names in a checkpoint of those arrays."""
    architecture = SimpleNamespace(shapes=lambda config: shapes, STACKED=stacked or {})
    sources = {name: source(name, values) for name, values in found.items()}
    tensors = match_tensors(Path("m"), architecture, CONFIG, names, sources)
    return {name: np.concatenate([read(part) for part in parts]) for name, parts in tensors.items()}


def numbered(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_rows_one_after_the_other():
    shapes = {"layers.0.q": (4, 3), "layers.0.k": (2, 3), "layers.0.v": (2, 3)}
    values = ours(shapes, {name: Stored("h.{}.qkv", of=QKV) for name in QKV}, {"h.0.qkv": numbered(8, 3)})
    np.testing.assert_array_equal(values["layers.0.q"], numbered(8, 3)[:4])
    np.testing.assert_array_equal(values["layers.0.k"], numbered(8, 3)[4:6])
    np.testing.assert_array_equal(values["layers.0.v"], numbered(8, 3)[6:])


def test_elements_of_a_vector():
    names = {name: Stored("b", of=("q_bias", "k_bias")) for name in ("q_bias", "k_bias")}
    values = ours({"q_bias": (4,), "k_bias": (2,)}, names, {"b": numbered(6)})
    assert values["q_bias"].tolist() == [0, 1, 2, 3]
    assert values["k_bias"].tolist() == [4, 5]


def test_heads_that_take_turns():
    """Two heads of two rows each: q0 q1 k0 k1 v0 v1, then the second head's."""
    names = {name: Stored("h.{}.qkv", of=QKV, by_head=True) for name in QKV}
    values = ours(
        dict.fromkeys(["layers.0.q", "layers.0.k", "layers.0.v"], (4, 1)), names, {"h.0.qkv": numbered(12, 1)}
    )
    assert values["layers.0.q"][:, 0].tolist() == [0, 1, 6, 7]
    assert values["layers.0.k"][:, 0].tolist() == [2, 3, 8, 9]
    assert values["layers.0.v"][:, 0].tolist() == [4, 5, 10, 11]


def test_heads_of_a_vector_that_take_turns():
    names = {name: Stored("b", of=("q", "k"), by_head=True) for name in ("q", "k")}
    assert ours({"q": (4,), "k": (4,)}, names, {"b": numbered(8)})["k"].tolist() == [2, 3, 6, 7]


def test_inputs_by_outputs():
    values = ours({"up": (4, 3)}, {"up": Stored("w", transposed=True)}, {"w": numbered(3, 4)})
    np.testing.assert_array_equal(values["up"], numbered(3, 4).T)
    square = ours({"o": (3, 3)}, {"o": Stored("w", transposed=True)}, {"w": numbered(3, 3)})
    np.testing.assert_array_equal(square["o"], numbered(3, 3).T)


def test_columns_of_inputs_by_outputs():
    names = {name: Stored("w", of=("q", "k"), transposed=True) for name in ("q", "k")}
    values = ours({"q": (4, 3), "k": (2, 3)}, names, {"w": numbered(3, 6)})
    np.testing.assert_array_equal(values["q"], numbered(3, 6)[:, :4].T)
    np.testing.assert_array_equal(values["k"], numbered(3, 6)[:, 4:].T)


def test_values_that_are_stored_as_what_they_differ_from_one():
    assert ours({"norm": (3,)}, {"norm": Stored("n", plus=1)}, {"n": numbered(3)})["norm"].tolist() == [1, 2, 3]


def experts(*names):
    return {f"layers.0.experts.{e}.{name}": (2, 5) for e in range(3) for name in names}


def test_all_experts_in_one_tensor():
    names = {"layers.{}.experts.{}.down": Stored("blk.{}.exps")}
    values = ours(experts("down"), names, {"blk.0.exps": numbered(3, 2, 5)})
    for e in range(3):
        np.testing.assert_array_equal(values[f"layers.0.experts.{e}.down"], numbered(3, 2, 5)[e])


def test_gate_and_up_of_all_experts_in_one_tensor_each_or_together():
    gate, up = "layers.{}.experts.{}.gate", "layers.{}.experts.{}.up"
    shapes = {f"layers.0.experts.{e}.gate_up": (4, 5) for e in range(3)}
    stacked = {"layers.{}.experts.{}.gate_up": (gate, up)}
    apart = {"g.0": numbered(3, 2, 5), "u.0": 100 + numbered(3, 2, 5)}
    both = np.concatenate([apart["g.0"], apart["u.0"]], axis=1)
    first = ours(shapes, {gate: "g.{}", up: "u.{}"}, apart, stacked)
    second = ours(shapes, {name: Stored("gu.{}", of=(gate, up)) for name in (gate, up)}, {"gu.0": both}, stacked)
    for e in range(3):
        np.testing.assert_array_equal(first[f"layers.0.experts.{e}.gate_up"], both[e])
        np.testing.assert_array_equal(second[f"layers.0.experts.{e}.gate_up"], both[e])


def test_an_expert_in_a_tensor_of_its_own():
    found = {f"l.0.{e}": numbered(2, 5) + e for e in range(3)}
    values = ours(experts("down"), {"layers.{}.experts.{}.down": "l.{}.{}"}, found)
    np.testing.assert_array_equal(values["layers.0.experts.2.down"], found["l.0.2"])


def test_problems_are_told_in_the_checkpoints_words():
    names = {name: Stored("h.{}.qkv", of=QKV) for name in QKV} | {"up": Stored("w", transposed=True), "norm": "n"}
    shapes = {"layers.0.q": (4, 3), "layers.0.k": (2, 3), "layers.0.v": (2, 3), "up": (4, 3), "norm": (3,)}
    with pytest.raises(CheckpointError) as caught:
        ours(shapes, names, {"h.0.qkv": numbered(7, 3), "w": numbered(4, 3), "x": numbered(1)})
    assert str(caught.value) == (
        "m does not hold the tensors that its config asks for: n is missing; x is not a tensor of this architecture; "
        "h.0.qkv has the shape (7, 3), expected (8, 3); w has the shape (4, 3), expected (3, 4)"
    )


@pytest.mark.parametrize("stored", [Stored("w", of=("q", "k")), Stored("w", transposed=True)])
def test_blocks_cannot_be_cut(stored):
    shapes = {"q": (16,), "k": (16,)} if stored.of else {"q": (16, 32)}
    architecture = SimpleNamespace(shapes=lambda config: shapes, STACKED={})
    found = {"w": SourceTensor("w", (32,) if stored.of else (32, 16), TYPES["Q8_0"], lambda first, stop: None)}
    with pytest.raises(UnsupportedError, match="'w' is stored as Q8_0, but has to be taken apart value by value"):
        match_tensors(Path("m"), architecture, CONFIG, dict.fromkeys(shapes, stored), found)
