"""Small files as torch.save writes them, in both of its formats: torch_zip.pt, torch_legacy.pt.

pip install torch
python tests/golden/torch_files.py     # writes them beside this file
"""

from pathlib import Path

import numpy as np

BASE = np.arange(35, dtype=np.float32).reshape(5, 7) - 17
"""Whole numbers, which float16 and bfloat16 hold."""
VALUES = {
    "float32": BASE,
    "float16": BASE,
    "bfloat16": BASE,
    "parameter": BASE,
    "vector": BASE[0],
    "number": BASE[1, 2],
    "cube": BASE[:4, :6].reshape(2, 3, 4),
    "transposed": BASE.T,
    "some_rows": BASE[1:4],
    "some_columns": BASE[:, 2:5],
    "other_name": BASE,
}


def main():
    import torch

    base = torch.from_numpy(BASE)
    tensors = {
        "float32": base.clone(),
        "float16": base.half(),
        "bfloat16": base.bfloat16(),
        "parameter": torch.nn.Parameter(base.clone()),
        "vector": base[0].clone(),
        "number": base[1, 2].clone(),
        "cube": base[:4, :6].reshape(2, 3, 4).clone(),
        "transposed": base.t(),
        "some_rows": base[1:4],
        "some_columns": base[:, 2:5],
        "other_name": base,
    }
    module = torch.nn.Module()
    state = module.state_dict()  # with the _metadata that a module's has
    state.update(tensors)
    folder = Path(__file__).parent
    torch.save(state, folder / "torch_zip.pt")
    torch.save({"model": state, "step": 3}, folder / "torch_legacy.pt", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
