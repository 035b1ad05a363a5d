"""Ternary checkpoints of Hugging Face: packed, and as they were trained."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch_pickles
from test_transformers import EXPECTED
from transformers_cases import weights, write_folder

from edgellm.backends.reference import matrix
from edgellm.converters import convert, read
from edgellm.converters.blocks import decode_rows
from edgellm.errors import CheckpointError, UnsupportedError
from edgellm.loading import open_model

CASE = EXPECTED["bitnet"]
OFFLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
ONLINE = {**OFFLINE, "quantization_mode": "online"}
Q = "model.layers.0.self_attn.q_proj.weight"

# The example of transformers' unpack_weights.
BYTES = [[0b10100001, 0b00011000], [0b10010000, 0b00001010]]
MATRIX = [[0, -1], [-1, 1], [-1, 1], [-1, 1], [1, 0], [0, -1], [1, -1], [1, -1]]


def linear(name):
    return name.endswith("proj.weight")


def rounded(values):
    """As arXiv:2402.17764 has it: codes, and the scale."""
    scale = np.float32(max(np.abs(values).mean(dtype=np.float64), 1e-5))
    return np.clip(np.rint(values / scale), -1, 1), scale


def packed(codes):
    """Quarters of the rows, one above the other in the bits of a byte."""
    return sum(quarter.astype(np.uint8) + 1 << 2 * i for i, quarter in enumerate(np.split(codes, 4))).astype(np.uint8)


def write(folder, quantization, tensors):
    write_folder(folder, {**CASE["config"], "quantization_config": quantization}, CASE["shapes"])
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def offline_tensors(inverse=False):
    tensors = {}
    for name, values in weights(CASE["shapes"]).items():
        if linear(name):
            codes, scale = rounded(values)
            tensors[name] = packed(codes.astype(np.int8))
            scale = np.float32(np.float16(scale))
            tensors[f"{name}_scale"] = np.array([1 / scale if inverse else scale], np.float32)
        else:
            tensors[name] = values
    return tensors


def values_of(source):
    return decode_rows(source.type, source.read(0, source.shape[0]))


def test_the_example_of_transformers(tmp_path):
    tensors = offline_tensors() | {Q: np.array(BYTES, np.uint8), f"{Q}_scale": np.array([0.5], np.float32)}
    with pytest.raises(CheckpointError, match=r"q_proj.weight has the shape \(8, 2\), expected \(48, 48\)"):
        read(write(tmp_path, OFFLINE, tensors))
    tensors[Q] = np.tile(np.array(BYTES, np.uint8), (6, 24))
    found = values_of(read(write(tmp_path, OFFLINE, tensors)).tensors["layers.0.q"][0])
    quarters = np.split(np.array(MATRIX) * 0.5, 4)
    np.testing.assert_array_equal(found, np.concatenate([np.tile(quarter, (6, 24)) for quarter in quarters]))


@pytest.mark.parametrize("inverse", [False, True])
def test_packed_matrices_are_kept_exactly(tmp_path, inverse):
    quantization = {"quant_method": "bitnet"} if inverse else OFFLINE
    folder = write(tmp_path / "m", quantization, offline_tensors(inverse))
    report = convert(folder, tmp_path / "m.edge", progress=False)
    assert report.recipe == "q2t"
    assert report.rows["q2t"].tensors == 3 * 6
    assert report.rows["q2t"].max_error < (1e-7 if inverse else 1e-30)
    file = open_model(tmp_path / "m.edge").file
    assert {file.tensors[name].format for name in ("embed", "output")} == {"q8"}
    codes, scale = rounded(weights(CASE["shapes"])[Q])
    np.testing.assert_allclose(matrix(file.tensors["layers.0.q"]), codes * np.float32(np.float16(scale)), rtol=1e-6)
    file.close()


def test_trained_weights_are_rounded(tmp_path):
    folder = write(tmp_path / "m", ONLINE, weights(CASE["shapes"]))
    report = convert(folder, tmp_path / "m.edge", progress=False)
    assert report.recipe == "q2t"
    assert report.rows["q2t"].relative_rms < 2**-11
    checkpoint = read(folder)
    for name, ours in (("self_attn.o_proj", "o"), ("mlp.down_proj", "down")):
        codes, scale = rounded(weights(CASE["shapes"])[f"model.layers.2.{name}.weight"])
        np.testing.assert_array_equal(values_of(checkpoint.tensors[f"layers.2.{ours}"][0]), codes * scale)
    embed = weights(CASE["shapes"])["model.embed_tokens.weight"]
    np.testing.assert_array_equal(values_of(checkpoint.tensors["embed"][0]), embed)


def test_both_forms_give_the_same_model(tmp_path):
    """Read as float32: what is packed has its scales as float16."""
    convert(write(tmp_path / "a", OFFLINE, offline_tensors()), tmp_path / "a.edge", format="f32", progress=False)
    convert(write(tmp_path / "b", ONLINE, weights(CASE["shapes"])), tmp_path / "b.edge", format="f32", progress=False)
    first, second = (open_model(tmp_path / name).file for name in ("a.edge", "b.edge"))
    for name, tensor in first.tensors.items():
        if len(tensor.shape) == 2:
            np.testing.assert_allclose(matrix(tensor), matrix(second.tensors[name]), rtol=2**-11)
    first.close()
    second.close()


@pytest.mark.parametrize("save", [torch_pickles.save, lambda path, tensors: np.savez(path, **tensors)])
def test_packed_matrices_of_pytorch_and_numpy(tmp_path, save):
    folder, other = write(tmp_path / "a", OFFLINE, offline_tensors()), write(tmp_path / "b", OFFLINE, {})
    path = other / ("weights.pt" if save is torch_pickles.save else "weights.npz")
    save(path, offline_tensors())
    convert(folder, tmp_path / "a.edge", name="m", origin="o", progress=False)
    convert(path, tmp_path / "b.edge", name="m", origin="o", progress=False)
    assert (tmp_path / "a.edge").read_bytes() == (tmp_path / "b.edge").read_bytes()


REFUSED = [
    ({**OFFLINE, "use_rms_norm": True}, {}, UnsupportedError, "use_rms_norm = True"),
    ({**OFFLINE, "linear_class": "x"}, {}, UnsupportedError, "linear_class = 'x'"),
    ({**OFFLINE, "quantization_mode": "x"}, {}, UnsupportedError, "quantization_mode = 'x'"),
    ({**OFFLINE, "modules_to_not_convert": ["q_proj"]}, {}, UnsupportedError, r"modules_to_not_convert = \['q_proj'\]"),
    (OFFLINE, {f"{Q}_scale": None}, CheckpointError, "q_proj.weight has ternary codes; expected a number beside it"),
    (OFFLINE, {f"{Q}_scale": np.ones(2, np.float32)}, CheckpointError, "expected a number beside it"),
    (OFFLINE, {"x": np.ones(4, np.uint8)}, UnsupportedError, "tensor 'x' is stored as U8"),
    ([1], {}, UnsupportedError, "describes quantized weights"),
]


@pytest.mark.parametrize(("quantization", "change", "kind", "words"), REFUSED)
def test_what_is_refused(tmp_path, quantization, change, kind, words):
    tensors = {name: values for name, values in (offline_tensors() | change).items() if values is not None}
    with pytest.raises(kind, match=words):
        read(write(tmp_path, quantization, tensors))


@pytest.mark.parametrize(
    ("quantization", "scale"), [({"quant_method": "bitnet"}, 0), (OFFLINE, np.inf), (OFFLINE, np.nan)]
)
def test_scales_that_are_not_numbers(tmp_path, quantization, scale):
    tensors = offline_tensors() | {f"{Q}_scale": np.array([scale], np.float32)}
    with pytest.raises(CheckpointError, match=r"q_proj\.weight' has weights that are not finite"):
        convert(write(tmp_path / "m", quantization, tensors), tmp_path / "m.edge", progress=False)


def test_trained_weights_that_are_not_numbers(tmp_path):
    tensors = weights(CASE["shapes"])
    tensors[Q][3, 4] = np.nan
    with pytest.raises(CheckpointError, match=r"q_proj\.weight' has weights that are not finite"):
        convert(write(tmp_path / "m", ONLINE, tensors), tmp_path / "m.edge", progress=False)


def test_a_folder_without_that_config_is_of_plain_weights(tmp_path):
    write_folder(tmp_path, CASE["config"], CASE["shapes"])
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not read(tmp_path).ternary
