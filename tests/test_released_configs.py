"""Configs of released checkpoints, as Hugging Face and GGUF tell them; and what is refused in them."""

from dataclasses import replace

import pytest

from edgellm import architectures
from edgellm.errors import CheckpointError, UnsupportedError

HF = {
    "starcoder2": {  # bigcode/starcoder2-3b
        "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072, "intermediate_size": 12288, "mlp_type": "default",
        "max_position_embeddings": 16384, "norm_epsilon": 1e-05, "norm_type": "layer_norm", "num_attention_heads": 24,
        "num_hidden_layers": 30, "num_key_value_heads": 2, "rope_theta": 999999.4420358813, "sliding_window": 4096,
        "use_bias": True, "vocab_size": 49152,
    },
    "gpt2": {  # openai-community/gpt2
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_embd": 768, "n_head": 12,
        "n_layer": 12, "n_positions": 1024, "summary_activation": None, "vocab_size": 50257,
    },
    "gpt_neox": {  # EleutherAI/pythia-70m
        "hidden_act": "gelu", "hidden_size": 512, "intermediate_size": 2048, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "num_attention_heads": 8, "num_hidden_layers": 6, "rotary_emb_base": 10000,
        "rotary_pct": 0.25, "tie_word_embeddings": False, "use_parallel_residual": True, "vocab_size": 50304,
    },
    "lfm2": {  # LiquidAI/LFM2-350M
        "block_auto_adjust_ff_dim": True, "block_dim": 1024, "block_ff_dim": 6656, "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256, "block_norm_eps": 1e-05, "conv_L_cache": 3, "conv_bias": False, "conv_dim": 1024,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14], "hidden_size": 1024, "max_position_embeddings": 128000,
        "norm_eps": 1e-05, "num_attention_heads": 16, "num_heads": 16, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "rope_theta": 1000000.0, "vocab_size": 65536,
    },
    "olmoe": {  # allenai/OLMoE-1B-7B-0924
        "attention_bias": False, "clip_qkv": None, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "vocab_size": 50304,
    },
    "qwen3_moe": {  # Qwen/Qwen3-30B-A3B
        "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "bitnet": {  # microsoft/bitnet-b1.58-2B-4T
        "hidden_act": "relu2", "hidden_size": 2560, "intermediate_size": 6912, "max_position_embeddings": 4096,
        "num_attention_heads": 20, "num_hidden_layers": 30, "num_key_value_heads": 5, "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
    },
}  # fmt: skip

GGUF = {
    "starcoder2": {
        "context_length": 16384, "embedding_length": 3072, "block_count": 30, "feed_forward_length": 12288,
        "attention.head_count": 24, "attention.head_count_kv": 2, "rope.freq_base": 999999.4420358813,
        "attention.layer_norm_epsilon": 1e-05,
    },
    "gpt2": {
        "context_length": 1024, "embedding_length": 768, "block_count": 12, "feed_forward_length": 3072,
        "attention.head_count": 12, "attention.layer_norm_epsilon": 1e-05,
    },
    "gpt_neox": {
        "context_length": 2048, "embedding_length": 512, "block_count": 6, "feed_forward_length": 2048,
        "rope.dimension_count": 16, "attention.head_count": 8, "use_parallel_residual": True,
        "attention.layer_norm_epsilon": 1e-05,
    },
    "lfm2": {
        "context_length": 128000, "embedding_length": 1024, "block_count": 16, "feed_forward_length": 4608,
        "attention.head_count": 16, "attention.head_count_kv": [0, 0, 8, 0, 0, 8, 0, 0, 8, 0, 8, 0, 8, 0, 8, 0],
        "attention.layer_norm_rms_epsilon": 1e-05, "rope.freq_base": 1000000.0, "shortconv.l_cache": 3,
    },
    "olmoe": {
        "context_length": 4096, "embedding_length": 2048, "block_count": 16, "feed_forward_length": 1024,
        "attention.head_count": 16, "attention.head_count_kv": 16, "attention.layer_norm_rms_epsilon": 1e-05,
        "rope.freq_base": 10000.0, "expert_count": 64, "expert_used_count": 8,
    },
    "qwen3_moe": {
        "context_length": 40960, "embedding_length": 2048, "block_count": 48, "feed_forward_length": 6144,
        "attention.head_count": 32, "attention.head_count_kv": 4, "attention.key_length": 128,
        "attention.value_length": 128, "attention.layer_norm_rms_epsilon": 1e-06, "rope.freq_base": 1000000.0,
        "expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 768,
    },
    "bitnet": {
        "architecture": "bitnet-b1.58", "context_length": 4096, "embedding_length": 2560, "block_count": 30,
        "feed_forward_length": 6912, "attention.head_count": 20, "attention.head_count_kv": 5,
        "attention.layer_norm_rms_epsilon": 1e-05, "rope.freq_base": 500000.0,
    },
}  # fmt: skip


def from_hf(name, **changes):
    return architectures.get(name).Config.from_hf({**HF[name], **changes})


def from_gguf(name, **changes):
    metadata = {"vocab_size": HF[name]["vocab_size"], "tensors": (), "architecture": name, **GGUF[name]}
    return architectures.get(name).Config.from_gguf({**metadata, **changes})


@pytest.mark.parametrize("name", HF)
def test_both_sources_tell_the_same(name):
    """But for what GGUF has no word for: StarCoder's window; whether the output is tied, which its tensors tell."""
    expected = replace(from_hf(name), tie_embeddings=False)
    if name == "starcoder2":
        expected = replace(expected, sliding_window=None)
    assert from_gguf(name) == expected


def test_what_is_tied_if_a_config_does_not_say_so():
    assert [name for name in HF if from_hf(name).tie_embeddings] == ["starcoder2", "gpt2", "lfm2", "bitnet"]
    assert not from_hf("lfm2", tie_embedding=False).tie_embeddings
    assert not from_hf("gpt2", tie_word_embeddings=False).tie_embeddings


def test_partial_rotary():
    assert from_hf("gpt_neox").rotary_dim == 16
    rope = {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 500.0}
    newer = {"rotary_pct": None, "rotary_emb_base": None, "rope_parameters": rope}
    assert from_hf("gpt_neox", **newer).rotary_dim == 32
    assert from_hf("gpt_neox", **newer).rope_theta == 500
    assert from_hf("gpt_neox", rotary_emb_base=500).rope_theta == 500


def test_layers_of_lfm2():
    config = from_hf("lfm2")
    assert config.ffn_size == 4608
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [2, 5, 8, 10, 12, 14]
    caches = architectures.get("lfm2").caches(config)
    assert (caches[1].n_arrays, caches[1].head_dim, caches[1].window) == (1, 1024, 3)
    assert (caches[2].n_arrays, caches[2].n_kv_heads, caches[2].head_dim, caches[2].window) == (2, 8, 64, None)
    as_it_is = {"block_ff_dim": None, "intermediate_size": 4608, "block_auto_adjust_ff_dim": False}
    newer = from_hf("lfm2", layer_types=config.layer_types, full_attn_idxs=None, **as_it_is)
    assert newer == config
    assert from_hf("lfm2", block_ffn_dim_multiplier=None).ffn_size == 4437


def test_activations():
    assert from_hf("gpt2").activation == "gelu_tanh"
    assert from_hf("gpt2", activation_function="gelu").activation == "gelu"  # Cerebras-GPT
    assert from_hf("gpt_neox", hidden_act="gelu_fast").activation == "gelu_tanh"  # GPT-NeoX 20B
    assert from_gguf("bitnet").activation == "relu2"
    assert from_gguf("bitnet", architecture="bitnet").activation == "silu"


REFUSED = [
    ("starcoder2", {"use_bias": False}, "use_bias = False"),
    ("starcoder2", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
    ("gpt2", {"activation_function": "tanh"}, "activation_function = 'tanh'; .* gelu, gelu_fast"),
    ("gpt_neox", {"attention_bias": False}, "attention_bias = False"),
    ("gpt_neox", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ("lfm2", {"conv_bias": True}, "conv_bias = True"),
    ("lfm2", {"layer_types": ["conv"] * 15 + ["mamba"]}, "'mamba'"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
    ("olmoe", {"attention_bias": True}, "attention_bias = True"),
    ("olmoe", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
    ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window = True"),
    ("bitnet", {"attention_bias": True}, "attention_bias = True"),
    ("bitnet", {"hidden_act": "tanh"}, "hidden_act = 'tanh'"),
]


@pytest.mark.parametrize(("name", "change", "words"), REFUSED)
def test_what_a_model_does_not_compute_is_refused_by_name(name, change, words):
    with pytest.raises(UnsupportedError, match=words):
        from_hf(name, **change)


DAMAGED = [
    ("gpt2", {"n_head": 0}, "n_head = 0"),
    ("gpt2", {"n_inner": "x"}, "n_inner = 'x'"),
    ("gpt_neox", {"rotary_pct": 2.0}, "rotary_dim = 128 in heads of 64"),
    ("gpt_neox", {"rotary_pct": 0.11}, "rotary heads of 7"),
    ("gpt_neox", {"use_parallel_residual": 1}, "use_parallel_residual = 1"),
    ("lfm2", {"layer_types": ["conv"]}, "16 layers, but layer_types = "),
    ("lfm2", {"layer_types": "conv"}, "16 layers, but layer_types = 'conv'"),
    ("lfm2", {"full_attn_idxs": 3}, "full_attn_idxs = 3"),
    ("lfm2", {"conv_L_cache": 0}, "conv_L_cache = 0"),
    ("lfm2", {"block_multiple_of": 0}, "block_multiple_of = 0"),
    ("olmoe", {"num_experts": None}, "num_experts = None"),
    ("olmoe", {"num_experts_per_tok": 65}, "n_experts_used = 65 of 64 experts"),
    ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size = None"),
    ("starcoder2", {"sliding_window": -1}, "sliding_window = -1"),
]


@pytest.mark.parametrize(("name", "change", "words"), DAMAGED)
def test_damaged_configs(name, change, words):
    with pytest.raises(CheckpointError, match=words):
        from_hf(name, **change)


DAMAGED_GGUF = [
    ("lfm2", {"attention.head_count_kv": None}, "head_count_kv = None; expected the same number"),
    ("lfm2", {"attention.head_count_kv": [0, 8, 4] + [0] * 13}, r"head_count_kv = \[0, 8, 4"),
    ("lfm2", {"attention.head_count_kv": ["8"] * 16}, "head_count_kv = "),
    ("lfm2", {"attention.head_count_kv": [0] * 16}, "head_count_kv = "),
    ("lfm2", {"attention.head_count_kv": [8] * 3}, "16 layers, but layer_types"),
    ("gpt_neox", {"rope.dimension_count": None}, "rope.dimension_count = None"),
    ("olmoe", {"expert_count": None}, "expert_count = None"),
    ("qwen3_moe", {"expert_feed_forward_length": [768, 0]}, "expert_feed_forward_length = "),
]


@pytest.mark.parametrize(("name", "change", "words"), DAMAGED_GGUF)
def test_damaged_metadata(name, change, words):
    with pytest.raises(CheckpointError, match=words):
        from_gguf(name, **change)


def test_clamped_keys_are_refused_in_metadata():
    with pytest.raises(UnsupportedError, match=r"attention\.clamp_kqv = 8"):
        from_gguf("olmoe", **{"attention.clamp_kqv": 8.0})


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bitnet"])
def test_an_unknown_activation_of_an_edge_file(name):
    with pytest.raises(UnsupportedError, match="activation = 'tanh'"):
        replace(architectures.get(name).Config.tiny(), activation="tanh")
