"""SmolLM2's trained weights by way of Hugging Face: its GGUF file, dequantized by transformers, in a folder, converted.

pip install -e '.[dev,torch]'
python tests/dequantized.py TEXT     # WikiText-2's test; fails where float32 is not what transformers computes

What is printed: logits and greedy tokens against transformers', and for each format the perplexity of 40 chunks of 512
of the first 100,000 bytes, and how often the likeliest token is float32's, of all tokens of 8 of those chunks. In q8 it
is 97.46 %, as in llama.cpp's own Q8_0 file; of those that lead by a fifth of a logit, 99.97 %. Five minutes, 2 cores.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from conftest import checkpoint

from edgellm.api import Model
from edgellm.converters import convert
from edgellm.perplexity import perplexity

N_IDS, N_PROMPT, N_GREEDY = 256, 32, 100
CHUNK, N_CHUNKS, N_COMPARED = 512, 40, 8


def dequantize(gguf, folder):
    """What transformers reads of a GGUF file, as safetensors in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model.hf_quantizer = None  # its weights are plain by now, but it would not be saved as what was quantized
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def compute(folder, ids):
    """What transformers computes with a folder: the logits of all ids, and the greedy tokens that follow the first."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
        prompt = torch.tensor([ids[:N_PROMPT]])
        answer = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=N_GREEDY,
            max_new_tokens=N_GREEDY,
        )
    return logits, answer[0, N_PROMPT:].tolist()


def compare(folder, edge, text):
    """Float32 against transformers: the largest difference of a logit, and all greedy tokens the same."""
    with Model(edge, backend="reference") as model:
        ids = model.tokenize(text)[:N_IDS]
        logits, greedy = compute(folder, ids)
        difference = np.abs(model.logits(ids) - logits).max()
        answer = model.stream_ids(ids[:N_PROMPT], temperature=0, max_tokens=N_GREEDY, ignore_eos=True)
        same = [piece.id for piece in answer if piece.id is not None] == greedy
    print(f"f32: logits of {N_IDS} tokens within {difference:.1e} of transformers'; greedy tokens the same: {same}")
    assert difference < 1e-3
    assert same


def likeliest(model, text):
    ids = model.tokenize(text)
    return np.concatenate([model.logits(ids[i * CHUNK : (i + 1) * CHUNK]).argmax(axis=1) for i in range(N_COMPARED)])


def main(text):
    gguf = checkpoint("smollm2")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "hf")
        dequantize(gguf, folder)
        sources = {fmt: (folder, fmt) for fmt in ("f32", "q8", "q4m")} | {"the GGUF file": (gguf, "keep")}
        best = {}
        for label, (source, fmt) in sources.items():
            edge = Path(name, f"{label}.edge")
            convert(source, edge, format=fmt, progress=False)
            if label == "f32":
                compare(folder, edge, text)
            for backend in ("reference", "cpu"):
                with Model(edge, backend=backend) as model:
                    best[label, backend] = likeliest(model, text)
                    *_, result = perplexity(model, text, context=CHUNK, chunks=N_CHUNKS)
                agreement = np.mean(best[label, backend] == best["f32", "reference"])
                print(f"{label}, {backend}: perplexity {result.value:.4f}, likeliest token {agreement:.2%}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).read_bytes()[:100_000].decode())
