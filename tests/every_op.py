"""A model that no checkpoint has: every op of edgellm.ops, in each form that a backend treats apart."""

import sys
from dataclasses import dataclass

import numpy as np
import tiny

from edgellm.architectures import LayerCache
from edgellm.backends import get

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, EXPERTS, VOCAB = 72, 6, 2, 12, 40, 5, 97
FREQUENCIES = (100.0 ** (-np.arange(6) / 6)).astype(np.float32)
SOME = FREQUENCIES[:4]  # of a head's 12 values, 8 turn


@dataclass(frozen=True)
class Config:
    vocab_size: int = VOCAB
    n_layers: int = 3
    context_length: int = 320


def shapes(config):
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    found = {"embed": (VOCAB, HIDDEN), "positions": (320, HIDDEN), "norm": (HIDDEN,)}
    for i in range(2):
        layer = {
            "norm": (HIDDEN,), "norm_bias": (HIDDEN,), "q": (q, HIDDEN), "q_bias": (q,), "k": (kv, HIDDEN),
            "v": (kv, HIDDEN), "v_bias": (kv,), "o": (HIDDEN, q), "o_bias": (HIDDEN,), "q_norm": (HEAD_DIM,),
            "k_norm": (HEAD_DIM,), "row_norm": (q,), "post_norm": (HIDDEN,), "up": (FFN, HIDDEN), "up_bias": (FFN,),
            "down": (HIDDEN, FFN), "gate_up": (2 * FFN, HIDDEN), "glu_norm": (FFN,), "down2": (HIDDEN, FFN),
        }  # fmt: skip
        found |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    found |= {"layers.2.in": (3 * HIDDEN, HIDDEN), "layers.2.taps": (HIDDEN, 3), "layers.2.out": (HIDDEN, HIDDEN)}
    found["layers.2.router"] = (EXPERTS, HIDDEN)
    for e in range(EXPERTS):
        found |= {f"layers.2.{e}.gate_up": (2 * FFN, HIDDEN), f"layers.2.{e}.down": (HIDDEN, FFN)}
    return found


def caches(config):
    return [
        LayerCache(KV_HEADS, HEAD_DIM),
        LayerCache(KV_HEADS, HEAD_DIM, window=50),
        LayerCache(1, HIDDEN, window=3, n_arrays=1),
    ]


def forward(config, weights, ops):
    x = ops.add_positions(ops.embed(weights.embed, scale=1.5), weights.positions)
    x = sandwiched(weights.layer(0), ops, x)
    x = parallel(weights.layer(1), ops, x)
    x = convolved(weights.layer(2), ops, x)
    x = ops.layer_norm(x, weights.norm, None, 1e-5)
    return ops.logits(x, weights.embed, scale=0.25, softcap=3.0)


def sandwiched(layer, ops, x):
    """Norms on both sides, part of each head turned after a norm, or before, capped scores, a norm of a GLU."""
    h = ops.rms_norm(x, layer.norm, 1e-5)
    q = ops.rms_norm(ops.linear(h, layer.q, layer.q_bias), layer.q_norm, 1e-5)
    q, k = (ops.rope(heads, HEAD_DIM, SOME, scale=1.2) for heads in (q, ops.linear(h, layer.k)))
    k = ops.rms_norm(k, layer.k_norm, 1e-5)
    h = ops.attention(q, k, ops.linear(h, layer.v, layer.v_bias), 0, scale=0.4, softcap=2.0)
    x = ops.add(x, ops.rms_norm(ops.linear(h, layer.o, layer.o_bias), layer.post_norm, 1e-5))
    h = ops.activate(ops.linear(ops.layer_norm(x, layer.norm, layer.norm_bias, 1e-5), layer.up, layer.up_bias), "relu2")
    x = ops.add(x, ops.linear(h, layer.down), scale=0.1)
    h = ops.glu(ops.linear(x, layer.gate_up), "gelu")
    return ops.add(x, ops.linear(ops.rms_norm(h, layer.glu_norm, 1e-5), layer.down2), scale=0.5)


def parallel(layer, ops, x):
    """Attention of whole rows that are normed, without positions, beside a feed-forward network; a window."""
    h = ops.layer_norm(x, layer.norm, layer.norm_bias, 1e-5)
    q = ops.rms_norm(ops.linear(h, layer.q, layer.q_bias), layer.row_norm, 1e-5)
    k, v = ops.linear(h, layer.k), ops.linear(h, layer.v)
    attended = ops.linear(ops.attention(q, k, v, 1, scale=0.3), layer.o)
    h = ops.activate(ops.linear(ops.rms_norm(x, layer.post_norm, 1e-5), layer.up), "gelu_tanh")
    x = ops.add(x, ops.add(attended, ops.linear(h, layer.down)))
    h = ops.glu(ops.linear(x, layer.gate_up), "silu")
    return ops.add(x, ops.linear(h, layer.down2))


def convolved(layer, ops, x):
    h = ops.short_conv(ops.linear(x, getattr(layer, "in")), layer.taps, 2)
    x = ops.add(x, ops.linear(h, layer.out))
    experts = ([getattr(layer, f"{e}.{name}") for e in range(EXPERTS)] for name in ("gate_up", "down"))
    return ops.add(x, ops.experts(ops.activate(x, "gelu"), layer.router, *experts, 2, "silu", normalize=True), 0.7)


def tensors(fmt):
    return tiny.tensors(sys.modules[__name__], Config(), fmt)


def backend(fmt="f32", kind="cpu", context_length=320, n_threads=None, kv="f16"):
    return get(kind)(sys.modules[__name__], Config(), tensors(fmt), context_length, n_threads, kv)
