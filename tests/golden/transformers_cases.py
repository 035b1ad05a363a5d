"""Small random models with the same weights for transformers and for us, and what transformers computes with them.

pip install torch transformers
python tests/golden/transformers_cases.py     # writes transformers.json beside this file
"""

import json
from pathlib import Path

import numpy as np

IDS = [int(id) for id in np.random.RandomState(0).randint(0, 97, 24)]
SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
CASES = {
    "llama": {**SIZES, "model_type": "llama"},
    "llama-tied": {**SIZES, "model_type": "llama", "tie_word_embeddings": True},
    "llama-all-heads": {**SIZES, "model_type": "llama", "num_key_value_heads": 6, "head_dim": 8},
    "llama-3.1-rope": {**SIZES, "model_type": "llama", "rope_scaling": LLAMA3, "rope_theta": 500.0},
    "llama-linear-rope": {**SIZES, "model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral-window": {**SIZES, "model_type": "mistral", "sliding_window": 6},
}


def weights(shapes):
    """{checkpoint name: values} from a generator whose numbers never change."""
    random = np.random.RandomState(1)
    return {name: _values(random, shape) for name, shape in sorted(shapes.items())}


def _values(random, shape):
    if len(shape) == 1:
        return random.uniform(0.5, 1.5, shape).astype(np.float32)
    return (random.standard_normal(shape) / shape[1] ** 0.5 * 1.5).astype(np.float32)


def compute(config):
    """What transformers says: the logits of 24 tokens, and 20 greedy tokens after the first 4."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**config, attn_implementation="eager", bos_token_id=None, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(made).eval()
    state = model.state_dict()
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    new = weights({name: tuple(value.shape) for name, value in state.items() if name not in tied})
    model.load_state_dict({name: torch.from_numpy(value) for name, value in new.items()}, strict=False)
    model.tie_weights()
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0].numpy()
        ids = IDS[:4]
        for _ in range(20):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return {"logits": [[round(float(x), 6) for x in row[:6]] for row in logits], "greedy": ids}


if __name__ == "__main__":
    import torch
    import transformers

    made = {"made_with": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "cases": {name: compute(config) for name, config in CASES.items()}}  # fmt: skip
    path = Path(__file__).with_name("transformers.json")
    path.write_text(json.dumps(made).replace('}, "', '},\n "') + "\n")
