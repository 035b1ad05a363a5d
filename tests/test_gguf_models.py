"""GGUF files of every architecture give what the Hugging Face folders give that they were made of.

The files are made here as llama.cpp's own converter makes them, tensor for tensor: names by the gguf package's map, and
checksums of the values in tests/golden/gguf, made by gguf_cases.py.
"""

import json
import re
from dataclasses import asdict

import gguf
import numpy as np
import pytest
from gguf_cases import GOLDEN, UNKNOWN, checksum
from transformers_cases import CASES, expected, weights, write_folder

from edgellm import architectures
from edgellm.converters import convert
from edgellm.loading import open_model
from edgellm.rope import attention_factor, frequencies

HF = expected()
EXPECTED = {name: case for path in GOLDEN.glob("*.json") for name, case in json.loads(path.read_text()).items()}
LOST = {
    "mistral-window": {"sliding_window"},
    "qwen2-window": {"sliding_window"},
    "smollm3-window": {"sliding_window", "rope_layers"},
    "starcoder2-window": {"sliding_window"},
    "gpt-neox-serial": {"activation"},
    "gemma2": {"query_pre_attn_scalar"},
    "gemma3": {"query_pre_attn_scalar"},
    "gemma3-scaled": {"query_pre_attn_scalar", "sliding_window"},
    "hunyuan-alpha": {"context_length"},
}
"""Fields that GGUF has no place for, and llama.cpp no knowledge of: it takes what the usual models have."""


def half_apart_to_adjacent(config, values):
    """Rows of each head, RoPE's pairs (i, i + n) -> (2i, 2i + 1)."""
    head_dim = config["head_dim"]
    return values.reshape(-1, 2, head_dim // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def turned(config, name, values):
    return half_apart_to_adjacent(config, values) if ".q_proj." in name or ".k_proj." in name else values


def plus_one(config, name, values):
    return values + np.float32(1) if "norm" in name else values


def transposed(config, name, values):
    return values.T if values.ndim == 2 and ("c_attn" in name or "c_proj" in name or "c_fc" in name) else values


def heads_in_turns_to_one_after_the_other(config, name, values):
    if "query_key_value" not in name:
        return values
    by_head = values.reshape(config["num_attention_heads"], 3, -1, *values.shape[1:])
    return by_head.swapaxes(0, 1).reshape(values.shape)


def without_middle_axis(config, name, values):
    return values[:, 0] if "conv.conv" in name else values


CHANGES = {
    "gpt2": transposed,
    "gpt_neox": heads_in_turns_to_one_after_the_other,
    "lfm2": without_middle_axis,
    **dict.fromkeys(["llama", "mistral", "ministral3", "smollm3", "granite"], turned),
    **dict.fromkeys(["gemma", "gemma2", "gemma3_text"], plus_one),
}
"""What llama.cpp's converter does to values."""


def test_every_case_is_here():
    assert set(EXPECTED) == set(CASES) - UNKNOWN


@pytest.mark.parametrize("case", EXPECTED)
def test_gguf_gives_what_the_folder_gives(tmp_path, case):
    write_folder(tmp_path / "hf", HF[case]["config"], HF[case]["shapes"])
    write_gguf(tmp_path / "model.gguf", case)
    convert(tmp_path / "hf", tmp_path / "hf.edge", format="f32", progress=False)
    convert(tmp_path / "model.gguf", tmp_path / "gguf.edge", format="f32", progress=False)
    first, second = (open_model(tmp_path / name) for name in ("hf.edge", "gguf.edge"))
    assert differing(first, second) == LOST.get(case, set())
    assert first.file.tensors.keys() == second.file.tensors.keys()
    for name, tensor in first.file.tensors.items():
        np.testing.assert_array_equal(second.file.tensors[name].data, tensor.data, err_msg=name)
    first.file.close()
    second.file.close()


def write_gguf(path, case):
    """As llama.cpp's converter, with another vocabulary."""
    golden, config = EXPECTED[case], HF[case]["config"]
    metadata, left = dict(golden["metadata"]), dict(golden["tensors"])
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        add = {
            int: writer.add_uint32,
            float: writer.add_float32,
            bool: writer.add_bool,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](key, value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<{id}>" for id in range(3, 97))])
    writer.add_token_scores([0.0] * 97)
    writer.add_token_types([2, 3, 3, *[1] * 94])
    for name, values in gguf_tensors(writer.arch, config, weights(HF[case]["shapes"])).items():
        assert checksum(values) == left.pop(name), name
        writer.add_tensor(name, values)
    assert not left
    for name, values in golden["made_of_the_config"].items():
        writer.add_tensor(name, np.array(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(arch, config, values):
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.get("num_hidden_layers") or config["n_layer"])
    change = CHANGES.get(config["model_type"], lambda config, name, values: values)
    return {
        names.get_name(name, (".weight", ".bias")): change(config, name, value)
        for name, value in experts_together(values).items()
    }


def experts_together(values):
    """mlp.experts.3.up_proj.weight and those of the other experts -> mlp.experts.up_proj.weight."""
    result = {}
    for name, value in values.items():  # in the order of the names: fewer than eleven experts are in theirs
        result.setdefault(re.sub(r"\.experts\.\d\.", ".experts.", name), []).append(value)
    return {name: np.stack(each) if ".experts." in name else each[0] for name, each in result.items()}


def differing(first, second):
    """Names of fields that are not the same; of windows and angles, if they do not come to the same."""
    a, b = ({**asdict(made.config), **in_effect(made)} for made in (first, second))
    return {key for key in a if a[key] != (pytest.approx(b[key], rel=1e-6) if isinstance(a[key], float) else b[key])}


def in_effect(made):
    config, windows = made.config, [cache.window for cache in made.architecture.caches(made.config)]
    result = {"sliding_window": windows, "layer_types": None}
    if hasattr(config, "rope_theta"):
        rotary_dim = getattr(config, "rotary_dim", config.head_dim)
        lengths = (1, config.context_length)
        angles = [frequencies(rotary_dim, config.rope_theta, config.rope_scaling, length) for length in lengths]
        result["rope_scaling"] = np.round(angles, 6).tolist()
        result["attention_factor"] = float(attention_factor(config.rope_scaling))
    return result


def test_architectures_have_one_name_in_gguf_each():
    for name in architectures.names():
        called = getattr(architectures.get(name), "GGUF_ARCHITECTURE", name)
        assert architectures.named_in_gguf(called) in (name, called)
    assert architectures.named_in_gguf("nonesuch") == "nonesuch"
