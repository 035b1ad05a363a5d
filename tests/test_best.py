"""The head's best tokens, on every ISA that runs here: the same as NumPy finds in the logits that a matmul writes."""

from functools import partial

import numpy as np
import pytest
from test_kernels import FORMATS, ISAS, multiply, problem

from edgellm import isa
from edgellm.backends import best_tokens
from edgellm.kernels import best as bodies
from edgellm.kernels import compiler
from edgellm.kernels.best import best
from edgellm.kernels.matmul import matmul
from edgellm.kernels.prepare import prepare

PAIR = np.dtype([("logit", np.float32), ("token", np.int32)])
SHAPES = [(1, 200, 172, 0), (29, 40, 32, 0), (4, 17, 100, 0), (12, 97, 64, 0), (9, 1, 64, 0)]


def head(name, matrix, x, wanted, n_threads=1, best_only=True):
    """The best tokens of some rows, from the threads' finds, or the logits."""
    vocab_size = len(matrix.quantized.codes)
    found = np.full((n_threads, len(wanted)), np.array((-np.inf, 0), PAIR))
    logits = multiply(
        name, matrix, x, n_threads, list(wanted), bodies=(prepare, best),
        step_fields={"BEST": found.ctypes.data} if best_only else {},
        GATHERS=1, VOCAB_SIZE=vocab_size, LOGITS_OP=compiler(isa.get(name)).op(matmul),
    )  # fmt: skip
    if not best_only:
        return logits
    assert (logits == 0.5).all()  # as it was: nothing is written
    return found["token"][found["logit"].argmax(axis=0), np.arange(len(wanted))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", ISAS)
def test_best_tokens_are_those_of_the_logits(name, fmt, shape):
    matrix, x = problem(fmt, *shape)
    for wanted in (range(shape[0]), [shape[0] - 1], range(0, shape[0], 2)):
        expected = head(name, matrix, x, wanted, best_only=False)
        np.testing.assert_array_equal(expected, multiply(name, matrix, x)[list(wanted)])
        for n_threads in (1, 2, 3, 20):
            np.testing.assert_array_equal(head(name, matrix, x, wanted, n_threads), expected.argmax(axis=1))


@pytest.mark.parametrize("fmt", FORMATS)
def test_padding_never_wins(fmt):
    """97 tokens, all with negative logits, stand in a matrix of 112 rows, whose last are zeros."""
    matrix, _ = problem(fmt, 5, 97, 256, 0)
    x = np.tile(-np.linalg.pinv(matrix.values) @ np.ones(97), (5, 1)).astype(np.float32)
    logits = head(ISAS[0], matrix, x, range(5), best_only=False)
    assert (logits < 0).all()
    np.testing.assert_array_equal(head(ISAS[0], matrix, x, range(5), 3), logits.argmax(axis=1))
    np.testing.assert_array_equal(head(ISAS[0], matrix, np.zeros_like(x), range(5), 3), [0] * 5)


def keep(keep_better, rows, vocab_size):
    """What is kept after logits in blocks of 16."""
    found, logits = np.array([(-np.inf, 0)], PAIR), np.full(-(-len(rows) // 16) * 16, 7e30, np.float32)
    logits[: len(rows)] = rows
    for token in range(0, len(logits), 16):
        keep_better(found.ctypes.data, logits[token:].ctypes.data, token, vocab_size)
    return int(found["token"][0])


@pytest.mark.parametrize("name", [*ISAS, "plain"])
def test_ties_infinities_and_what_is_not_a_number(name):
    function = bodies.keep_better if name == "plain" else compiler(isa.get(name)).function(bodies.keep_better)
    kept, rng, inf = partial(keep, function), np.random.default_rng(0), np.inf
    cases = [
        [0.0, -0.0, 1, 1] * 10, [-0.0, 0.0] * 20, [-1] * 33 + [2] * 4, [-inf] * 40, [-inf] * 39 + [-3e38],
        [1, inf, 2, inf] * 9, [inf, -inf] * 20, [np.nan], [1] * 20 + [np.nan], [np.nan] + [9] * 40,
        [inf] * 20 + [np.nan] + [inf] * 20, [-inf] * 17 + [np.nan],
        *rng.integers(-3, 3, (200, 45)), *rng.standard_normal((100, 33)),
    ]  # fmt: skip
    for case in cases:
        logits = np.array(case, np.float32)
        assert kept(logits, len(logits)) == best_tokens(logits[None])[0]
