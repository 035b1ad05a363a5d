"""What llama.cpp's own converter makes of the models of transformers_cases.py: metadata, and tensors by checksum.

pip install -e '.[torch]' sentencepiece
python tests/golden/gguf_cases.py LLAMA_CPP [CASE...]     # its source tree; writes gguf/ARCHITECTURE.json
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
from transformers_cases import CASES, expected, write_folder

UNKNOWN = {"ministral", "bitnet", "gpt2-tied-gelu", "gemma-untied"}
"""Cases that llama.cpp's converter does not know: a model, logits that are not the embedding's, a size of the MLP."""
GOLDEN = Path(__file__).with_name("gguf")


def export(folder, target):
    """llama.cpp's convert_hf_to_gguf.py in F32, but for the vocabulary, whose kind it does not know."""
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    settings = with_old_keys(ModelBase.load_hparams(folder, False))
    model_class = get_model_class(get_model_architecture(settings, ModelType.TEXT))
    with torch.inference_mode():
        model = model_class(folder, gguf.LlamaFileType.ALL_F32, target, hparams=settings)
        getattr(model, "impl", model).set_vocab = lambda: None
        model.write()
    return gguf.GGUFReader(target)


def with_old_keys(config):
    """With what transformers does not write any more, and the converter asks for."""
    rope = config.get("rope_parameters") or {}
    return {**config, "n_ctx": config.get("n_positions"), "rotary_pct": rope.get("partial_rotary_factor")}


def described(reader):
    metadata = {
        key: field.contents()
        for key, field in reader.fields.items()
        if key == "general.architecture" or not key.startswith(("general.", "GGUF.", "tokenizer."))
    }
    made = [tensor for tensor in reader.tensors if tensor.name.startswith("rope_")]
    return {
        "metadata": metadata,
        "tensors": {tensor.name: checksum(tensor.data) for tensor in reader.tensors if tensor not in made},
        "made_of_the_config": {tensor.name: tensor.data.tolist() for tensor in made},
    }


def checksum(values):
    return zlib.crc32(np.ascontiguousarray(values).tobytes())


def main(llama_cpp, names):
    sys.path[:0] = [f"{llama_cpp}/gguf-py", llama_cpp]
    for name in names or CASES.keys() - UNKNOWN:
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), expected()[name]["config"], expected()[name]["shapes"])
            case = described(export(Path(folder), Path(folder, "model.gguf")))
        path = GOLDEN / f"{CASES[name]['model_type']}.json"
        made = json.loads(path.read_text()) if path.exists() else {}
        path.parent.mkdir(exist_ok=True)
        lines = [f'"{key}": {json.dumps(value)}' for key, value in sorted({**made, name: case}.items())]
        path.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
