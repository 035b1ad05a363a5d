"""Beam search of transformers, on the random models of transformers_cases.

pip install -e '.[torch]'
python tests/golden/beams_cases.py     # writes beams.json beside this file
"""

import json
import tempfile
from pathlib import Path

from transformers_cases import IDS, expected, write_folder

GOLDEN = Path(__file__).with_name("beams.json")
MODEL = "llama"
CASES = [
    {"beams": beams, "max_tokens": max_tokens, "ends": ends, "length_penalty": length_penalty, "n_prompt": n_prompt}
    for beams, max_tokens, ends, length_penalty, n_prompt in [
        (1, 20, [], 1.0, 8), (3, 20, [], 1.0, 8), (4, 30, list(range(0, 97, 9)), 1.0, 5),
        (4, 30, list(range(0, 97, 4)), 1.0, 8), (5, 30, list(range(0, 97, 9)), 0.0, 12),
        (3, 30, list(range(0, 97, 9)), 2.0, 3), (8, 40, [7, 11, 50], 0.6, 8),
    ]
]  # fmt: skip


def main():
    import torch
    from transformers import AutoModelForCausalLM

    case = expected()[MODEL]
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), case["config"], case["shapes"])
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for case in CASES:
        prompt = torch.tensor([IDS[: case["n_prompt"]]])
        made = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, num_beams=case["beams"],
            num_return_sequences=case["beams"], max_new_tokens=case["max_tokens"], eos_token_id=case["ends"] or None,
            pad_token_id=96, length_penalty=case["length_penalty"], early_stopping=False, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        answers = []
        for ids in made.sequences[:, case["n_prompt"] :].tolist():
            end = next((i + 1 for i, id in enumerate(ids) if id in case["ends"]), case["max_tokens"])
            answers.append(ids[:end])
        scores = made.sequences_scores.tolist() if case["beams"] > 1 else []
        found.append({**case, "answers": answers, "scores": scores})
    GOLDEN.write_text("[" + ",\n".join(map(json.dumps, found)) + "]\n")


if __name__ == "__main__":
    main()
