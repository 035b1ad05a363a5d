"""Folders of models that see too: the text model is converted, and what is left out is said."""

import numpy as np
import pytest
import safetensors.numpy
import torch_pickles
from transformers_cases import expected, weights, write_folder

from edgellm import architectures
from edgellm.converters import convert
from edgellm.loading import open_model

OTHERS = {"vision_tower.embeddings.weight": [4, 4], "vision_tower.norm.weight": [4], "multi_modal_projector.w": [4, 4]}
NAMES = {
    "as transformers saves them": lambda name: f"language_model.{name}",
    "as transformers has them": lambda name: name.replace("model.", "model.language_model.", 1),
}


def write(folder, case, renamed, others=OTHERS):
    """The text model of a case within another, with the same weights."""
    config, shapes = expected()[case]["config"], expected()[case]["shapes"]
    whole = {"model_type": "sees", "text_config": config, "vision_config": {"model_type": "eye"}}
    write_folder(folder, whole, [])
    text = {renamed(name): values for name, values in weights(shapes).items()}
    safetensors.numpy.save_file({**text, **weights(others.items())}, folder / "model.safetensors")


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("case", ["gemma3", "ministral3"])
def test_the_text_model_is_converted(tmp_path, case, names):
    write_folder(tmp_path / "text", expected()[case]["config"], expected()[case]["shapes"])
    write(tmp_path / "whole", case, NAMES[names])
    assert not convert(tmp_path / "text", tmp_path / "text.edge", format="f32", progress=False).left_out
    report = convert(tmp_path / "whole", tmp_path / "whole.edge", format="f32", progress=False)
    assert report.left_out == {"vision_tower": 2, "multi_modal_projector": 1}
    first, second = (open_model(tmp_path / f"{name}.edge").file for name in ("text", "whole"))
    assert first.info.config == second.info.config
    assert first.info.architecture == second.info.architecture == report.architecture
    for name, tensor in first.tensors.items():
        assert tensor.data.tobytes() == second.tensors[name].data.tobytes(), name
    first.close()
    second.close()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "weights.npz"])
def test_the_text_model_of_pytorch_and_numpy(tmp_path, file):
    write(tmp_path, "gemma3", NAMES["as transformers has them"])
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    expected = convert(tmp_path, tmp_path / "a.edge", name="m", origin="o", progress=False)
    (tmp_path / "model.safetensors").unlink()
    if file.endswith(".npz"):
        np.savez(tmp_path / file, **tensors)
    else:
        torch_pickles.save(tmp_path / file, tensors)
    report = convert(tmp_path / file, tmp_path / "b.edge", name="m", origin="o", progress=False)
    assert report.left_out == expected.left_out
    assert (tmp_path / "a.edge").read_bytes() == (tmp_path / "b.edge").read_bytes()


def test_what_gemma_s_config_leaves_out():
    """The text config of Gemma 3 4B as it was published: other numbers are those that its class has."""
    config = architectures.get("gemma3_text").Config.from_hf(
        {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
         "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    )  # fmt: skip
    assert (config.vocab_size, config.n_heads, config.n_kv_heads, config.head_dim) == (262208, 8, 4, 256)
    assert (config.context_length, config.norm_eps, config.tie_embeddings) == (131072, 1e-6, True)
    assert (config.rope_theta, config.local_rope_theta) == (1e6, 1e4)
    assert config.rope_scaling == {"type": "linear", "factor": 8.0}
    assert (config.sliding_window, config.query_pre_attn_scalar) == (1024, 256)
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17, 23, 29]
