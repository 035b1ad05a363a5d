"""Low-rank adapters of the models of transformers_cases.py, what PEFT computes with them, and what llama.cpp's
convert_lora_to_gguf.py makes of them, by checksum.

pip install -e '.[torch]' peft sentencepiece
python tests/golden/peft_cases.py LLAMA_CPP     # its source tree; writes peft.json
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
from gguf_cases import checksum, with_old_keys
from transformers_cases import IDS, weights, write_folder
from transformers_cases import expected as models

GOLDEN = Path(__file__).with_name("peft.json")
ALL = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
CASES = {
    "llama": {**ALL, "rank_pattern": {"q_proj": 6, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "qwen2": {**ALL, "use_rslora": True},
    "gemma2": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "gate_proj"]},
    "phi3": ALL,
    "gpt2": {**ALL, "fan_in_fan_out": True},
    "gpt-neox": ALL,
    "lfm2": ALL,
    "olmoe": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj"]},
}
"""By model: options of PEFT's LoraConfig."""


def expected():
    """{case: what `compute` gave for it}."""
    return json.loads(GOLDEN.read_text())


def write_adapter(folder, config, shapes, name="adapter_model.safetensors"):
    """An adapter as PEFT saves it."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(weights(shapes), folder / name, {"format": "pt"})


def compute(name, folder, llama_cpp):
    """What PEFT saves, its config, names and shapes, and the logits of 24 tokens."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    write_folder(folder / "model", models()[name]["config"], models()[name]["shapes"])

    def base():
        return AutoModelForCausalLM.from_pretrained(
            folder / "model", attn_implementation="eager", dtype=torch.float32
        ).eval()

    get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **CASES[name])).save_pretrained(folder / "adapter")
    saved = safetensors.numpy.load_file(folder / "adapter" / "adapter_model.safetensors")
    shapes = sorted((name, list(values.shape)) for name, values in saved.items())
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "model", "target_modules": sorted(config["target_modules"])}
    write_adapter(folder / "adapter", config, shapes)
    with torch.no_grad():
        plain = base()(torch.tensor([IDS])).logits[0].numpy()
        logits = PeftModel.from_pretrained(base(), folder / "adapter").eval()(torch.tensor([IDS])).logits[0].numpy()
    assert np.abs(logits - plain).mean() > 0.1, "the adapter changes little"
    return {"config": config, "shapes": shapes, "gguf": in_gguf(llama_cpp, folder),
            "logits": [[round(float(x), 6) for x in row[:6]] for row in logits]}  # fmt: skip


def in_gguf(llama_cpp, folder):
    """{tensor: checksum} of the adapter as llama.cpp has it; None if its converter fails."""
    import gguf

    path = folder / "model" / "config.json"
    path.write_text(json.dumps(with_old_keys(json.loads(path.read_text()))))
    script, out = Path(llama_cpp, "convert_lora_to_gguf.py"), folder / "adapter.gguf"
    command = [sys.executable, script, "--base", folder / "model", "--outfile", out, folder / "adapter"]
    if subprocess.run(command).returncode:
        return None
    reader = gguf.GGUFReader(out)
    return {tensor.name: checksum(tensor.data) for tensor in reader.tensors}


def main(llama_cpp):
    import peft
    import torch
    import transformers

    versions = f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    made = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            made[name] = {"made_with": versions, **compute(name, Path(folder), llama_cpp)}
    lines = [f'"{key}": {{\n' + ",\n".join(f'"{part}": {json.dumps(value)}' for part, value in case.items()) + "}"
             for key, case in made.items()]  # fmt: skip
    GOLDEN.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
