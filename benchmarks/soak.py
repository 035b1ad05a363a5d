"""Runs two models from four threads for some minutes, with cancelled answers, and prints memory as it goes.

    python benchmarks/soak.py [MINUTES]

Memory must not grow after the first minute, and the program must end.
"""

from __future__ import annotations

import random
import sys
import threading
import time

import edgellm
from edgellm.footprint import resident_memory

PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):",
    "1, 2, 3, 4, 5,",
    "Water boils at " * 20,
)


def ask(models: list[edgellm.Model], stop: threading.Event, counts: list[int], number: int) -> None:
    """Answers of random length, of which one in three is left halfway."""
    rng = random.Random(number)
    while not stop.is_set():
        model = rng.choice(models)
        with model.stream(rng.choice(PROMPTS), max_tokens=rng.randrange(1, 60), seed=rng.randrange(99)) as stream:
            for i, _ in enumerate(stream):
                if i == 10 and rng.randrange(3) == 0:
                    break
        counts[number] += 1


if __name__ == "__main__":
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    with edgellm.load("smollm2") as large, edgellm.load("stories260k") as small:
        stop, counts = threading.Event(), [0] * 4
        threads = [threading.Thread(target=ask, args=([large, small], stop, counts, i)) for i in range(4)]
        for thread in threads:
            thread.start()
        for tick in range(10):
            time.sleep(minutes * 6)
            used = (resident_memory() or 0) / 1e6
            print(f"{(tick + 1) * minutes / 10:5.1f} min  {used:6.0f} MB  {sum(counts)} answers", flush=True)
        stop.set()
        for thread in threads:
            thread.join()
    print(f"threads left: {threading.active_count() - 1}")
