"""One sample, in a process of its own: prints {"tokens_per_second": ...}. benchmarks/compare.py runs it.

    python benchmarks/sample.py batch MODEL        edgellm: sequences that decode together, a step with a row of each
    python benchmarks/sample.py read MODEL         the limit of decoding: reading a step's weights, and keys and values
    python benchmarks/sample.py dot MODEL          the limit of prefill: the multiplications of a token's matrices
    python benchmarks/sample.py xllamacpp MODEL    a peer, in its own process, from Python
    python benchmarks/sample.py openvino MODEL

Prompts are random, and another one each time: a peer may remember what it has seen.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

VOCABULARY = 1000, 30000
"""Random tokens are in this range: words, in the models that are measured."""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="One sample, printed as JSON; compare.py runs it.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("model")
    for name, default in (("threads", 2), ("prompt", 0), ("tokens", 0), ("depth", 0), ("sequences", 1), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    print(json.dumps({"tokens_per_second": KINDS[options.kind](options)}), flush=True)
    os._exit(0)  # a peer's server threads would keep the process


# ---- edgellm


def batch(options: Any) -> float:
    """Tokens per second of all sequences together, once every one has its prompt."""
    from edgellm import backends, store
    from edgellm.loading import open_model
    from edgellm.step import Step

    loaded = open_model(store.resolve(options.model))
    context = options.prompt + options.tokens
    backend = backends.get(backends.best())(
        loaded.architecture, loaded.config, loaded.file.tensors, context, options.threads
    )
    n, rates = options.sequences, []
    for _ in range(options.repeats + 1):
        slots = [backend.open_slot() for _ in range(n)]
        for slot in slots:
            backend.run(Step.chunk(slot, 0, tokens(options.prompt)))
        started = time.perf_counter()
        for position in range(options.prompt, context):
            rows = np.asarray(tokens(n), np.int32)
            positions = np.full(n, position, np.int32)
            backend.run(Step(rows, np.asarray(slots, np.int32), positions, np.arange(n)))
        rates.append(n * options.tokens / (time.perf_counter() - started))
        for slot in slots:
            backend.close_slot(slot)
    return float(median(rates[1:]))


# ---- limits


def read(options: Any) -> float:
    """Steps per second, if a step did nothing but read its matrices, and the keys and values at that depth."""
    from edgellm.kernels.bandwidth import Threads, read_rate

    weights, _, cached = step_sizes(options.model)
    n_bytes: int = weights + cached * options.depth
    return read_rate(n_bytes, Threads(options.threads)) / n_bytes


def dot(options: Any) -> float:
    """Tokens per second of a prompt, if a token took nothing but the multiplications of its matrices."""
    from limits import dot_rate

    from edgellm.kernels.bandwidth import Threads

    _, multiplications, _ = step_sizes(options.model)
    return dot_rate(Threads(options.threads)) / (2 * multiplications)


def step_sizes(model: str) -> tuple[int, int, int]:
    """Bytes of all matrices; multiplications for a token of a prompt, without the logits; bytes that it caches."""
    from edgellm import store
    from edgellm.loading import open_model
    from edgellm.plan import Matmul, record

    loaded = open_model(store.resolve(model))
    plan = record(loaded.architecture, loaded.config, loaded.file.tensors)
    matmuls = [op for op in plan.ops if isinstance(op, Matmul)]
    multiplications = sum(op.weight.shape[0] * op.weight.shape[1] for op in matmuls if not op.logits)
    cached = sum(2 * 2 * cache.n_kv_heads * cache.head_dim for cache in plan.caches)  # keys and values, of 2 bytes
    return plan.bytes_read(), multiplications, cached


# ---- peers


def xllamacpp(options: Any) -> float:
    """llama.cpp as its wheel was built: for any CPU with AVX2."""
    import xllamacpp as peer

    params = peer.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = options.model, 2048, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    server = peer.Server(params)

    def answer() -> float:
        wish = {"prompt": tokens(options.prompt or 8), "n_predict": options.tokens or 1, "cache_prompt": False}
        timings = server.handle_completions({**wish, "ignore_eos": True, "temperature": 0.0})["timings"]
        assert timings["cache_n"] == 0, "the prompt was remembered"
        return float(timings["predicted_per_second" if options.tokens else "prompt_per_second"])

    return after_one(answer, options.repeats)


def openvino(options: Any) -> float:
    """OpenVINO GenAI, which converts a GGUF file as it loads it."""
    import openvino as tensors
    import openvino_genai as peer

    pipeline = peer.LLMPipeline(options.model, "CPU", INFERENCE_NUM_THREADS=options.threads)
    wish = peer.GenerationConfig()
    wish.max_new_tokens = wish.min_new_tokens = options.tokens or 1
    wish.ignore_eos, wish.do_sample, wish.apply_chat_template = True, False, False

    def answer() -> float:
        ids = tokens(options.prompt or 8)
        timings = pipeline.generate(tensors.Tensor(np.array([ids], np.int64)), wish).perf_metrics
        if options.tokens:
            return 1000 / float(timings.get_tpot().mean)
        return 1000 * len(ids) / float(timings.get_ttft().mean)

    return after_one(answer, options.repeats)


def after_one(answer: Callable[[], float], repeats: int) -> float:
    """The median, without the first, which warms up."""
    return float(median([answer() for _ in range(repeats + 1)][1:]))


RNG = np.random.default_rng()


def tokens(n: int) -> list[int]:
    return [int(id) for id in RNG.integers(*VOCABULARY, n)]


KINDS: dict[str, Callable[[Any], float]] = {
    "batch": batch,
    "read": read,
    "dot": dot,
    "xllamacpp": xllamacpp,
    "openvino": openvino,
}


if __name__ == "__main__":
    main(sys.argv[1:])
