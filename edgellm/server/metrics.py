"""What a server counts and measures, as Prometheus reads it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Upper bounds of the histograms."""


class Count:
    """A number that grows, for each combination of labels."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text, self._values = name, text, Counter[tuple[tuple[str, str], ...]]()

    def add(self, amount: float = 1, **labels: str) -> None:
        self._values[tuple(labels.items())] += amount  # type: ignore[assignment]

    def lines(self) -> Iterator[str]:
        yield from (f"# HELP {self._name} {self._text}", f"# TYPE {self._name} counter")
        for labels, value in sorted(self._values.items()):
            yield f"{self._name}{_labelled(labels)} {value:.15g}"


class Histogram:
    """How many of what was measured stay below bounds."""

    def __init__(self, name: str, text: str, bounds: Sequence[float] = SECONDS) -> None:
        self._name, self._text, self._bounds = name, text, bounds
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self) -> Iterator[str]:
        yield from (f"# HELP {self._name} {self._text}", f"# TYPE {self._name} histogram")
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{self._name}_bucket{{le="{bound}"}} {total}'
        yield from (f"{self._name}_sum {self._sum:.15g}", f"{self._name}_count {total}")


class Metrics:
    def __init__(self) -> None:
        self.requests = Count("edgellm_requests_total", "Requests by path and status.")
        self.prompt_tokens = Count("edgellm_prompt_tokens_total", "Tokens of prompts, by model.")
        self.cached_tokens = Count("edgellm_cached_tokens_total", "Those of them that a cache held already, by model.")
        self.generated_tokens = Count("edgellm_generated_tokens_total", "Tokens of answers, by model.")
        self.model_loads = Count("edgellm_model_loads_total", "How often a model was loaded, by model.")
        self.model_unloads = Count("edgellm_model_unloads_total", "How often one was unloaded, by model.")
        self.first_token = Histogram("edgellm_first_token_seconds", "From a request to its first token.")
        self.next_token = Histogram("edgellm_next_token_seconds", "From one token of an answer to the next.")

    def text(self, gauges: dict[str, tuple[str, float]]) -> str:
        """`gauges`: name -> (what it is, its value now)."""
        kinds = (each for each in vars(self).values() if isinstance(each, (Count, Histogram)))
        lines = [line for kind in kinds for line in kind.lines()]
        for name, (text, value) in gauges.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge", f"{name} {value:.15g}"]
        return "\n".join(lines) + "\n"


def _labelled(labels: Sequence[tuple[str, str]]) -> str:
    if not labels:
        return ""
    escaped = (value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for _, value in labels)
    pairs = (f'{name}="{value}"' for (name, _), value in zip(labels, escaped, strict=True))
    return f"{{{','.join(pairs)}}}"
