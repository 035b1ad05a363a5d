"""The text model of a checkpoint that sees or hears too: its config, its tensors, and what is left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from .checkpoint import SourceTensor

_TEXT = re.compile(r"(model\.)?language_model\.(model\.)?(?=.)")
"""What stands before the names of its tensors: older models have the second word first, and the head within."""


def text_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the text model: the same, unless it is a part of another's."""
    text = settings.get("text_config")
    return {**settings, **text} if isinstance(text, dict) else settings


def text_tensors(
    settings: Mapping[str, Any], found: Mapping[str, SourceTensor]
) -> tuple[dict[str, SourceTensor], Counter[str]]:
    """The text model's tensors under the names that they have without the rest, and how many the other parts have."""
    if not isinstance(settings.get("text_config"), dict):
        return dict(found), Counter()
    text, others = dict[str, SourceTensor](), Counter[str]()
    for name, tensor in found.items():
        start = _TEXT.match(name)
        if start:
            head = name.endswith("lm_head.weight")
            text[("" if head else "model.") + name[start.end() :]] = tensor
        elif name.startswith("lm_head."):
            text[name] = tensor
        else:
            others[name.removeprefix("model.").split(".")[0]] += 1
    return text, others
