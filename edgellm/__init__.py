"""A runtime for language models on laptops and single-board computers.

import edgellm
with edgellm.load("smollm2") as model:
    print(model.generate("The capital of France is", max_tokens=8).text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgellm.answer import Completion, Piece, Stream, Timings
    from edgellm.answer_cache import AnswerCache
    from edgellm.api import Model, load
    from edgellm.async_stream import AsyncStream
    from edgellm.chat import Chat
    from edgellm.errors import EdgeError
    from edgellm.logprobs import Logprob
    from edgellm.sampling import SamplingParams
    from edgellm.tools import ToolCall

__version__ = "0.1.0"
__all__ = [
    "AnswerCache",
    "AsyncStream",
    "Chat",
    "Completion",
    "EdgeError",
    "Logprob",
    "Model",
    "Piece",
    "SamplingParams",
    "Stream",
    "Timings",
    "ToolCall",
    "load",
]

_HOMES = {
    "AnswerCache": "answer_cache",
    "AsyncStream": "async_stream",
    "Chat": "chat",
    "Completion": "answer",
    "EdgeError": "errors",
    "Logprob": "logprobs",
    "Piece": "answer",
    "SamplingParams": "sampling",
    "Stream": "answer",
    "Timings": "answer",
    "ToolCall": "tools",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import edgellm` costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'edgellm' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"edgellm.{_HOMES.get(name, 'api')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
