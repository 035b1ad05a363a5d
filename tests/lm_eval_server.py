"""lm-evaluation-harness, as a client of the server, and `edgellm eval`: do they score a model alike?

pip install -e '.[serve]' 'lm_eval[api]' transformers
python tests/lm_eval_server.py DATA [--task hellaswag] [--limit 100] [--model smollm2]

DATA is the folder of the tasks' files, as for tests/golden/evaluation_cases.py. The harness words the questions itself,
has the server tokenize them, and sums up the log-probabilities that /v1/completions gives with `echo`. Exits with 1
where a score is not the same.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).with_name("golden"))]


def of_harness(options):
    from evaluation_cases import compute
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager
    from serving import Server

    with Server(options.model) as server:
        client = LocalCompletionsAPI(
            base_url=f"{server.url}/completions", model=options.model, tokenizer_backend="remote", num_concurrent=8,
            batch_size=1,
        )  # fmt: skip
        return compute(client, TaskManager().task_index, options.task, options.data, options.limit)["results"]


def of_edgellm(options):
    from evaluation_cases import FILES

    data = options.data / Path(FILES[options.task]).parent
    command = ["eval", options.task, options.model, "--data", data, "--limit", options.limit, "--json"]
    run = subprocess.run(
        [sys.executable, "-m", "edgellm", *map(str, command)], stdout=subprocess.PIPE, text=True, check=True
    )
    return {name: result["value"] for name, result in json.loads(run.stdout)["results"].items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--task", default="hellaswag")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--model", default="smollm2")
    options = parser.parse_args()
    ours, theirs = of_edgellm(options), of_harness(options)
    for name, value in ours.items():
        print(f"{name:<12} edgellm eval {value:.4f}   lm_eval {theirs[name]:.4f}")
    sys.exit(any(round(value - theirs[name], 9) for name, value in ours.items()))


if __name__ == "__main__":
    main()
