"""Damaged copies of a file, the same in every run."""

import random


def mutations(content, count, seed=5):
    """Copies with a few bytes changed, taken out, repeated, or cut off."""
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 4, 30])
            kind = rng.randrange(6)
            if kind < 3:
                data[at : at + length] = rng.choice([rng.randbytes(length), b"\xff" * length, bytes(length)])
            elif kind == 3:
                del data[at : at + length]
            elif kind == 4:
                data[at:at] = data[at : at + length]
            elif rng.random() < 0.2:
                del data[at:]
        yield bytes(data)
