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
CASES = {
    "llama": {**SIZES, "model_type": "llama"},
    "llama-tied": {**SIZES, "model_type": "llama", "tie_word_embeddings": True},
    "llama-all-heads": {**SIZES, "model_type": "llama", "num_key_value_heads": 6, "head_dim": 8},
    "llama-3.1-rope": {**SIZES, "model_type": "llama", "rope_scaling": LLAMA3, "rope_theta": 500.0},
    "llama-linear-rope": {**SIZES, "model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-biases": {**SIZES, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-yarn-rope": {**SIZES, "model_type": "llama", "rope_scaling": YARN, "rope_theta": 500.0},
    "mistral-window": {**SIZES, "model_type": "mistral", "sliding_window": 6},
}


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
