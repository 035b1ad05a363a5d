"""Small random models with the same weights for transformers and for us, and what transformers computes with them.

pip install -e '.[torch]'
python tests/golden/transformers_cases.py [CASE...]     # writes transformers/ARCHITECTURE.json
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import safetensors.numpy

GOLDEN = Path(__file__).with_name("transformers")
IDS = [int(id) for id in np.random.RandomState(0).randint(0, 97, 24)]
N_PROMPT, N_GREEDY = 8, 100
SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
MINISTRAL3 = {
    "rope_type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 500.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
PHI = {"model_type": "phi3", "head_dim": 8, "rope_scaling": {
    "type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 1.5, 3.0, 6.0]}}  # fmt: skip
GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": 6, "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 128}
LFM2 = {"model_type": "lfm2", "head_dim": 8, "full_attn_idxs": [1], "conv_L_cache": 5, "block_multiple_of": 8}
MOE = {"num_experts": 5, "num_experts_per_tok": 2}
CASES = {
    "llama": {**SIZES, "model_type": "llama"},
    "llama-tied": {**SIZES, "model_type": "llama", "tie_word_embeddings": True},
    "llama-all-heads": {**SIZES, "model_type": "llama", "num_key_value_heads": 6, "head_dim": 8},
    "llama-3.1-rope": {**SIZES, "model_type": "llama", "rope_scaling": LLAMA3, "rope_theta": 500.0},
    "llama-linear-rope": {**SIZES, "model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-biases": {**SIZES, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-yarn-rope": {**SIZES, "model_type": "llama", "rope_scaling": YARN, "rope_theta": 500.0},
    "starcoder2-window": {**SIZES, "model_type": "starcoder2", "sliding_window": 6, "head_dim": 8},
    "starcoder2-tied": {**SIZES, "model_type": "starcoder2", "head_dim": 8, "tie_word_embeddings": True},
    "gpt2": {**GPT2, "tie_word_embeddings": False},
    "gpt2-tied-gelu": {**GPT2, "activation_function": "gelu", "n_inner": 76},
    "gpt-neox": {**SIZES, "model_type": "gpt_neox", "head_dim": 8, "rotary_pct": 0.5},
    "gpt-neox-serial": {
        **SIZES,
        "model_type": "gpt_neox",
        "head_dim": 8,
        "use_parallel_residual": False,
        "hidden_act": "gelu_fast",
        "tie_word_embeddings": True,
    },
    "lfm2": {**SIZES, "model_type": "lfm2", "head_dim": 8, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2-tied": {**SIZES, **LFM2, "tie_word_embeddings": True},
    "olmoe": {**SIZES, **MOE, "model_type": "olmoe", "head_dim": 8, "intermediate_size": 36},
    "qwen3-moe": {**SIZES, **MOE, "model_type": "qwen3_moe", "moe_intermediate_size": 36, "norm_topk_prob": True},
    "bitnet": {**SIZES, "model_type": "bitnet", "head_dim": 8, "intermediate_size": 76},
    "mistral-window": {**SIZES, "model_type": "mistral", "sliding_window": 6},
    "ministral": {**SIZES, "model_type": "ministral", "sliding_window": 6,
                  "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "ministral3": {**SIZES, "model_type": "ministral3", "rope_parameters": MINISTRAL3},
    "qwen2": {**SIZES, "model_type": "qwen2", "head_dim": 8},
    "qwen2-window": {**SIZES, "model_type": "qwen2", "head_dim": 8, "use_sliding_window": True, "sliding_window": 6,
                     "max_window_layers": 1},
    "qwen3": {**SIZES, "model_type": "qwen3", "tie_word_embeddings": True},
    "hunyuan": {**SIZES, "model_type": "hunyuan_v1_dense", "tie_word_embeddings": True},
    "hunyuan-alpha": {**SIZES, "model_type": "hunyuan_v1_dense", "attention_bias": True, "rope_parameters": {
        "rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0, "rope_theta": 1e4}, "max_position_embeddings": 32768},
    "qwen3-biases": {**SIZES, "model_type": "qwen3", "attention_bias": True},
    "smollm3": {**SIZES, "model_type": "smollm3", "num_hidden_layers": 5, "tie_word_embeddings": True},
    "smollm3-window": {**SIZES, "model_type": "smollm3", "no_rope_layers": [0, 1, 0], "use_sliding_window": True,
                       "sliding_window": 6, "attention_bias": True, "mlp_bias": True},
    "phi3": {**SIZES, "model_type": "phi3", "head_dim": 8, "sliding_window": 20},
    "phi3-partial": {**SIZES, "model_type": "phi3", "num_attention_heads": 3, "num_key_value_heads": 1,
                     "head_dim": 16, "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    "phi3-longrope": {**SIZES, **PHI, "original_max_position_embeddings": 4},
    "phi3-longrope-short": {**SIZES, **PHI, "original_max_position_embeddings": 128,
                            "max_position_embeddings": 512},
    "olmo2": {**SIZES, "model_type": "olmo2", "head_dim": 8},
    "exaone4": {**SIZES, "model_type": "exaone4", "head_dim": 8, "tie_word_embeddings": True, "sliding_window": None,
                "layer_types": ["full_attention"] * 3, "rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
    "exaone4-hybrid": {**SIZES, "model_type": "exaone4", "head_dim": 8, "num_hidden_layers": 5, "sliding_window": 6},
    "granite": {**SIZES, "model_type": "granite", "head_dim": 8, "embedding_multiplier": 12.0,
                "attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 0.25},
    "granite-biases": {**SIZES, "model_type": "granite", "head_dim": 8, "attention_bias": True, "mlp_bias": True,
                       "tie_word_embeddings": True, "attention_multiplier": 0.2},
    "gemma": {**SIZES, "model_type": "gemma", "tie_word_embeddings": True},
    "gemma-untied": {**SIZES, "model_type": "gemma"},
    "gemma2": {**SIZES, **GEMMA, "model_type": "gemma2", "attn_logit_softcapping": 1.5,
               "final_logit_softcapping": 2.0},
    "gemma3": {**SIZES, **GEMMA, "model_type": "gemma3_text", "num_hidden_layers": 7},
    "gemma3-scaled": {**SIZES, **GEMMA, "model_type": "gemma3_text", "tie_word_embeddings": False,
                      "layer_types": ["sliding_attention", "full_attention", "full_attention"],
                      "rope_parameters": {
                          "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                          "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
}  # fmt: skip


def expected():
    """{case: what `compute` gave for it}."""
    return {name: case for path in GOLDEN.glob("*.json") for name, case in json.loads(path.read_text()).items()}


def weights(shapes):
    """{checkpoint name: values}, each from a generator of its own whose numbers never change."""
    return {name: _values(np.random.RandomState(zlib.crc32(name.encode())), name, shape) for name, shape in shapes}


def _values(random, name, shape):
    if len(shape) == 1:
        values = random.normal(0, 0.3, shape) if "bias" in name else random.uniform(0.5, 1.5, shape)
    else:
        values = random.standard_normal(shape) / shape[-1] ** 0.5 * 1.5
    return values.astype(np.float32)


def write_folder(folder, config, shapes):
    """A model as transformers saves it, but for the tokenizer, of as many words as the vocabulary has."""
    folder.mkdir(exist_ok=True)
    vocabulary = {f"<{id}>": id for id in range(97)}
    words = {"version": "1.0", "added_tokens": [],
             "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
             "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<0>"}}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(words))
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(weights(shapes), folder / "model.safetensors", {"format": "pt"})


def compute(config, folder):
    """What transformers saves, and says: its config, names and shapes; the logits of 24 tokens, 100 greedy tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**config, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    saved = safetensors.numpy.load_file(folder / "model.safetensors")
    shapes = sorted((name, list(values.shape)) for name, values in saved.items())
    settings = json.loads((folder / "config.json").read_text())
    write_folder(folder, settings, shapes)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    ids, gaps = IDS[:N_PROMPT], []
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0].numpy()
        for _ in range(N_GREEDY):
            last = model(torch.tensor([ids])).logits[0, -1]
            first, second = last.topk(2).values.tolist()
            gaps.append(first - second)
            ids = [*ids, int(last.argmax())]
    assert min(gaps) > 1e-4, f"the two likeliest tokens are only {min(gaps)} apart: choose other sizes"
    return {"config": settings, "shapes": shapes, "logits": [[round(float(x), 6) for x in row[:6]] for row in logits],
            "greedy": ids[N_PROMPT:]}  # fmt: skip


def main(names):
    import torch
    import transformers

    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            case = compute(CASES[name], Path(folder))
        path = GOLDEN / f"{CASES[name]['model_type']}.json"
        made = json.loads(path.read_text()) if path.exists() else {}
        made[name] = {"made_with": f"transformers {transformers.__version__}, torch {torch.__version__}", **case}
        path.parent.mkdir(exist_ok=True)
        lines = [f'"{key}": {{\n' + ",\n".join(f'"{part}": {json.dumps(value)}' for part, value in case.items()) + "}"
                 for key, case in sorted(made.items())]  # fmt: skip
        path.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
