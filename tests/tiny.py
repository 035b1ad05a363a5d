"""Tiny random models, for tests that need no trained weights."""

from dataclasses import replace

import numpy as np

from edgellm import architectures, quant
from edgellm.backends import get
from edgellm.file import pad_vector
from edgellm.tensor import Tensor


def tensors(architecture, config, fmt="f32", seed=0):
    """Random tensors of the shapes that the architecture wants, matrices in one format."""
    rng = np.random.default_rng(seed)
    return {name: _tensor(rng, name, shape, fmt) for name, shape in architecture.shapes(config).items()}


def _tensor(rng, name, shape, fmt):
    if len(shape) == 1:
        return Tensor(name, shape, "f32", pad_vector(rng.uniform(0.5, 1.5, shape).astype(np.float32)))
    fmt = "f32" if name.rpartition(".")[2] in architectures.FLOAT32 else fmt
    values = (rng.standard_normal(shape) / shape[1] ** 0.5).astype(np.float32)
    return Tensor(name, shape, fmt, quant.get(fmt).pack(quant.get(fmt).quantize(values)))


def config(name):
    return architectures.get(name).Config.tiny()


def backend(name, fmt="f32", kind="reference", context_length=64, max_rows=None, n_threads=None, kv="f16", **changes):
    """A backend of that kind with a tiny random model of the architecture; `changes` go into its config."""
    architecture = architectures.get(name)
    config = replace(architecture.Config.tiny(), context_length=context_length, **changes)
    made = get(kind)(architecture, config, tensors(architecture, config, fmt), context_length, n_threads, kv)
    if max_rows:
        made.MAX_ROWS = max_rows
    return made
