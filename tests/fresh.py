"""Random numbers that are new in every run. A test that fails shows the seed; EDGELLM_TEST_SEED=SEED repeats it."""

import os
import secrets
import zlib

import numpy as np

SEED = int(os.environ.get("EDGELLM_TEST_SEED") or secrets.randbits(32))


def rng(*what):
    """A generator for one purpose: the same for the whole run."""
    print(f"EDGELLM_TEST_SEED={SEED}")
    return np.random.default_rng([SEED, zlib.crc32(repr(what).encode())])
