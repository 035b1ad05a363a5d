"""Configs that contradict themselves or their tensors, or ask for what no model here computes: one clear error each."""

import pytest
from transformers_cases import CASES, expected, write_folder

from edgellm import architectures
from edgellm.converters import convert
from edgellm.errors import CheckpointError, UnsupportedError

HF = {CASES[name]["model_type"]: case["config"] for name, case in expected().items()}
SHAPES = {CASES[name]["model_type"]: case["shapes"] for name, case in expected().items()}
NAMES = architectures.names()
WITH_ROPE = [name for name in NAMES if hasattr(architectures.get(name).Config.tiny(), "rope_theta")]
ACTIVATIONS = {"hidden_act", "hidden_activation", "activation_function"}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def refused(name, change, kind, words):
    with pytest.raises(kind, match=words) as caught:
        architectures.get(name).Config.from_hf({**HF[name], **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in NAMES if ACTIVATIONS & HF[name].keys()])
def test_unknown_activation(name):
    refused(name, dict.fromkeys(ACTIVATIONS & HF[name].keys(), "mish"), UnsupportedError, "'mish'; .* supports ")


@pytest.mark.parametrize("name", WITH_ROPE)
def test_unknown_rope_type(name):
    rope = {"full_attention": DYNAMIC, "sliding_attention": DYNAMIC} if name == "gemma3_text" else DYNAMIC
    refused(name, {"rope_parameters": rope}, UnsupportedError, "'dynamic'.* support")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, None, 1 << 40])
def test_number_of_layers(name, value):
    key = "n_layer" if name == "gpt2" else "num_hidden_layers"
    refused(name, {key: value, "layer_types": None}, CheckpointError, "expected an integer from 1 to")


@pytest.mark.parametrize("name", NAMES)
def test_config_that_disagrees_with_the_tensors(tmp_path, name):
    """All tensors that do not fit are named, and nothing is written."""
    write_folder(tmp_path / "m", {**HF[name], "vocab_size": 98}, SHAPES[name])
    with pytest.raises(CheckpointError, match=r"has the shape \(97, 48\), expected \(98, 48\)") as caught:
        convert(tmp_path / "m", tmp_path / "m.edge", progress=False)
    assert str(caught.value).count("expected (98, 48)") == sum(shape == [97, 48] for _, shape in SHAPES[name])
    assert not (tmp_path / "m.edge").exists()


LAYERS = {"num_hidden_layers": 3, "sliding_window": 6}
BAD = [
    ("qwen2", {**LAYERS, "layer_types": ["full_attention"]}, CheckpointError, "3 layers, but layer_types"),
    ("qwen2", {**LAYERS, "layer_types": 7}, CheckpointError, "3 layers, but layer_types = 7"),
    ("qwen2", {**LAYERS, "layer_types": ["x"] * 3}, UnsupportedError, "layer_types = 'x'; .* full_attention, sliding"),
    ("qwen2", {**LAYERS, "layer_types": [[]] * 3}, UnsupportedError, r"layer_types = \[\]"),
    ("ministral", {"sliding_window": 0, "layer_types": ["sliding_attention"] * 3}, CheckpointError, "window = 0"),
    ("smollm3", {"no_rope_layers": [1]}, CheckpointError, r"rope layers \[1\]; expected 0 or 1 for each of"),
    ("smollm3", {"no_rope_layers": 4}, CheckpointError, "rope layers 4"),
    ("smollm3", {"no_rope_layers": ["1"] * 5}, CheckpointError, "rope layers"),
    ("smollm3", {"no_rope_layers": [[]] * 5}, CheckpointError, "rope layers"),
    ("phi3", {"rope_parameters": {}, "partial_rotary_factor": 1.5}, CheckpointError, "factor = 1.5; expected a part"),
    ("phi3", {"rope_parameters": {}, "partial_rotary_factor": 0.01}, CheckpointError, "factor = 0.01"),
    ("phi3", {"rope_parameters": {**DYNAMIC, "rope_type": "longrope"}}, CheckpointError, "short_factor None; expected"),
    ("llama", {"rope_parameters": {**DYNAMIC, "rope_type": "yarn", "rope_theta": 1}}, CheckpointError, "more than 1"),
    ("llama", {"rope_parameters": {**DYNAMIC, "rope_type": "yarn", "truncate": 1}}, CheckpointError, "truncate = 1"),
    (
        "llama",
        {"rope_parameters": {**DYNAMIC, "rope_type": "yarn", "beta_fast": -1}},
        CheckpointError,
        "beta_fast = -1",
    ),
    ("llama", {"tie_word_embeddings": "no"}, CheckpointError, "tie_word_embeddings = 'no'; expected true or false"),
    ("gemma", {"use_bidirectional_attention": True}, UnsupportedError, "use_bidirectional_attention = True"),
    ("gemma", {"attention_bias": True}, UnsupportedError, "config has biases"),
    ("gemma2", {"use_bidirectional_attention": True}, UnsupportedError, "use_bidirectional_attention = True"),
    ("gemma2", {"attention_bias": True}, UnsupportedError, "config has biases"),
    ("gemma2", {"attn_logit_softcapping": -1.0}, CheckpointError, "attention_softcap = -1.0"),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": DYNAMIC}}, UnsupportedError, "'dynamic'"),
    ("olmo2", {"attention_bias": True}, UnsupportedError, "config has biases"),
    ("exaone4", {"attention_bias": True}, UnsupportedError, "config has biases"),
    ("exaone4", {"sliding_window": 0}, CheckpointError, "sliding_window = 0"),
    ("exaone4", {"layer_types": ["full_attention"]}, CheckpointError, "5 layers, but layer_types"),
    ("granite", {"logits_scaling": 0}, CheckpointError, "logits_scaling = 0"),
]


@pytest.mark.parametrize(("name", "change", "kind", "words"), BAD)
def test_bad_config(name, change, kind, words):
    refused(name, change, kind, words)


def test_gemma_s_first_checkpoints_name_another_activation():
    config = architectures.get("gemma").Config
    assert config.from_hf({**HF["gemma"], "hidden_act": "gelu"}) == config.from_hf(HF["gemma"])


SIZES = {
    "block_count": 3, "context_length": 128, "embedding_length": 48, "feed_forward_length": 80, "vocab_size": 97,
    "attention.head_count": 6, "attention.layer_norm_rms_epsilon": 1e-5, "logit_scale": 1.0, "tensors": (),
}  # fmt: skip
WINDOW = {"attention.sliding_window": 6}
BAD_GGUF = [
    ("llama", {"rope.dimension_count": 4}, UnsupportedError, "rope.dimension_count = 4; .* head_dim = 8"),
    ("llama", {"attention.value_length": 4}, UnsupportedError, "attention.value_length = 4"),
    ("llama", {"rope_freqs": [1.0] * 4, "rope.scaling.type": "yarn"}, UnsupportedError, "'yarn' together with"),
    ("llama", {"rope_freqs": [1.0] * 3}, CheckpointError, "a list of 4 numbers"),
    ("gemma2", {"tensors": ("blk.0.attn_q.bias",)}, UnsupportedError, "biases"),
    ("gemma2", {**WINDOW, "attention.sliding_window_pattern": [True]}, CheckpointError, "3 layers, but layer_types"),
    ("gemma2", {**WINDOW, "attention.sliding_window_pattern": "x"}, CheckpointError, "sliding_window_pattern = 'x'"),
    ("olmo2", {"attention.sliding_window": 6}, UnsupportedError, "attention.sliding_window = 6"),
    ("granite", {"rope.scaling.finetuned": False}, UnsupportedError, "finetuned = False"),
    ("phi3", {"rope.dimension_count": 16}, CheckpointError, "partial_rotary_factor = 2.0"),
    ("phi3", {"rope_factors_long": [1.0] * 4}, CheckpointError, "short_factor None"),
]


@pytest.mark.parametrize(("name", "change", "kind", "words"), BAD_GGUF)
def test_bad_gguf_metadata(name, change, kind, words):
    config = architectures.get(name).Config
    config.from_gguf(SIZES)
    with pytest.raises(kind, match=words):
        config.from_gguf({**SIZES, **change})


def test_ministral_3_is_limited_to_where_its_queries_are_not_scaled():
    config, rope = architectures.get("ministral3").Config, HF["ministral3"]["rope_parameters"]
    longer = {**HF["ministral3"], "max_position_embeddings": 512}
    assert config.from_hf(longer).context_length == rope["original_max_position_embeddings"] == 128
    assert config.from_hf({**longer, "rope_parameters": {**rope, "llama_4_scaling_beta": 0}}).context_length == 512
    scaled = {**SIZES, "context_length": 512, "rope.scaling.original_context_length": 128}
    assert config.from_gguf({**scaled, "attention.temperature_scale": 0.1}).context_length == 128
    assert config.from_gguf(scaled).context_length == 512
