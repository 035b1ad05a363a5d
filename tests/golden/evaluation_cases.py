"""What lm-evaluation-harness says of SmolLM2, in float32, on the first questions of each task.

pip install lm_eval torch transformers accelerate gguf
python tests/golden/evaluation_cases.py DATA MODEL.gguf TOKENIZER.json    # writes evaluation.json beside this file

DATA is the folder of the tasks' files, MODEL.gguf what SmolLM2 is converted from, TOKENIZER.json a .edge file's. The
harness words the questions itself, from columns as the data sets of its tasks have them.
"""

import json
import sys
import tempfile
from pathlib import Path

COUNT = 6
FILES = {
    "arc_challenge": "llm-foundry/arc_challenge.jsonl",
    "arc_easy": "llm-foundry/arc_easy.jsonl",
    "boolq": "llm-foundry/boolq.jsonl",
    "hellaswag": "hellaswag/hellaswag_val_full.txt",
    "lambada": "lambada/lambada_test.jsonl",
    "openbookqa": "llm-foundry/openbook_qa.jsonl",
    "piqa": "llm-foundry/piqa.jsonl",
    "winogrande": "llm-foundry/winogrande.jsonl",
}
NAMES = {"lambada": "lambada_openai"}


def lettered(record):
    labels = "ABCDE"[: len(record["choices"])]
    return {"choices": {"text": record["choices"], "label": list(labels)}, "answerKey": labels[record["gold"]]}


def arc(record):
    return {"question": record["query"].removeprefix("Question: "), **lettered(record)}


def boolq(record):
    passage, question = record["query"].removeprefix("Passage: ").rsplit("\nQuestion: ", 1)
    return {"passage": passage, "question": question.removesuffix("?"), "label": record["gold"]}


def openbookqa(record):
    return {"question_stem": record["query"], **lettered(record)}


def piqa(record):
    goal = record["query"].removeprefix("Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": record["choices"][0], "sol2": record["choices"][1], "label": record["gold"]}


def winogrande(record):
    """The options are what differs between the contexts, in whole words."""
    words = [context.split(" ") for context in record["context_options"]]
    same = next(i for i, (first, second) in enumerate(zip(*words, strict=False)) if first != second)
    options = {f"option{i}": " ".join(context[same:]) for i, context in enumerate(words, 1)}
    stem = " ".join([*words[0][:same], "_"])
    return {"sentence": f"{stem} {record['continuation']}", "answer": str(record["gold"] + 1), **options}


def hellaswag(lines):
    label, context = lines[0].split(": ", 1)
    return {"activity_label": label, "ctx_a": context, "ctx_b": "", "label": lines[1], "endings": lines[2:]}


COLUMNS = {"arc_challenge": arc, "arc_easy": arc, "boolq": boolq, "lambada": dict, "openbookqa": openbookqa,
           "piqa": piqa, "winogrande": winogrande}  # fmt: skip


def rows(task, data, count=COUNT):
    lines = (data / FILES[task]).read_text(encoding="utf-8").split("\n")
    if task == "hellaswag":
        return [hellaswag(lines[at : at + 6]) for at in range(0, 6 * count, 6)]
    return [COLUMNS[task](json.loads(line)) for line in lines[:count]]


def compute(model, index, task, data, count=COUNT):
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(task, data, count)))
        name = NAMES.get(task, task)
        changes = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(path)}},
                   "training_split": None, "validation_split": None, "test_split": "test"}  # fmt: skip
        config = load_yaml(index[name].yaml_path, resolve_func=True) | changes
        made = lm_eval.simple_evaluate(model, tasks=[config], log_samples=True, bootstrap_iters=100)
    samples = sorted(made["samples"][name], key=lambda sample: sample["doc_id"])
    answers = [sample["filtered_resps"] for sample in samples]
    results = {key.split(",")[0]: value for key, value in made["results"][name].items() if key.endswith(",none")}
    return {
        "answers": [[[round(float(loss), 4), greedy] for loss, greedy in question] for question in answers],
        "results": {key: value for key, value in results.items() if isinstance(value, float)},
    }


if __name__ == "__main__":
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    data, gguf, tokenizer = map(Path, sys.argv[1:])
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    harness = HFLM(model, tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), **special), device="cpu")
    index = TaskManager().task_index
    made = {"made_with": f"lm_eval {lm_eval.__version__}, torch {torch.__version__}",
            "tasks": {task: compute(harness, index, task, data) for task in FILES}}  # fmt: skip
    Path(__file__).with_name("evaluation.json").write_text(json.dumps(made).replace('}}, "', '}},\n "') + "\n")
