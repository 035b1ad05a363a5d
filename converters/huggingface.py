"""Models as Hugging Face has them: a config.json, weights by name, a tokenizer. Knows no architecture and no format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgellm import architectures
from edgellm.errors import CheckpointError, UnsupportedError

from .blocks import BYTE
from .checkpoint import DTYPES, Checkpoint, SourceTensor, check_rope_type, check_vocabulary, unsupported_type
from .huggingface_tokenizer import read_chat_template, read_tokenizer
from .json_file import read_object, read_whole
from .name_map import rename
from .naming import match_tensors
from .ternary import with_ternary
from .text_part import text_settings, text_tensors
from .weights import read_weights


def read_huggingface(path: Path, names: Path | None = None) -> Checkpoint:
    """Open a model folder, or a file of weights with the rest of the folder beside it.

    `names` is a map of tensor names, see name_map. Raises CheckpointError if something is damaged or missing,
    UnsupportedError for a sound model that this version cannot run.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json; expected one beside the weights: fetch it too")
    whole = read_object(folder / "config.json")
    settings = text_settings(whole)
    quantization = settings.get("quantization_config")
    if quantization and (not isinstance(quantization, dict) or quantization.get("quant_method") != "bitnet"):
        raise UnsupportedError(
            f"{folder / 'config.json'} describes quantized weights; this version reads "
            f"{', '.join(DTYPES)}, and BitNet's: use the original model, or a GGUF file of it"
        )
    name = settings.get("model_type")
    if not isinstance(name, str):
        raise CheckpointError(f"{folder / 'config.json'} has model_type = {name!r}; expected an architecture's name")
    architecture = architectures.get(name)
    _check_rope(folder / "config.json", settings)
    embed, output = str(architecture.HF_NAMES["embed"]), str(architecture.HF_NAMES["output"])
    config = architecture.Config.from_hf(settings)
    kind, found = read_weights(path)
    found, left_out = text_tensors(whole, rename(names, found) if names else found)
    found = _numbers_of(path, _with_base(found, embed, output), quantization, others=(embed, output))
    if config.tie_embeddings or output not in found:
        config = replace(config, tie_embeddings=True)
        found.pop(output, None)
    tensors = match_tensors(path, architecture, config, architecture.HF_NAMES, found)
    tokenizer_config = read_object(folder / "tokenizer_config.json", optional=True)
    generation = read_object(folder / "generation_config.json", optional=True)
    tokenizer = read_tokenizer(folder, tokenizer_config, [settings, generation])
    check_vocabulary(path, tokenizer.n_tokens, config.vocab_size)
    return Checkpoint(
        path=str(path),
        architecture=name,
        config=config,
        tensors=tensors,
        tokenizer=tokenizer,
        quantized=False,
        left_out=left_out,
        ternary=bool(quantization),
        kind=kind,
        chat_template=read_chat_template(folder, tokenizer_config),
        metadata=_said_of_itself(path, settings),
    )


def _with_base(found: dict[str, SourceTensor], embed: str, output: str) -> dict[str, SourceTensor]:
    """In checkpoints of a model without its head, names lack the first word, as in "transformer.wte.weight"."""
    base, _, rest = embed.partition(".")
    if embed in found or rest not in found:
        return found
    return {name if name == output else f"{base}.{name}": tensor for name, tensor in found.items()}


def _numbers_of(
    path: Path, found: dict[str, SourceTensor], quantization: Mapping[str, Any] | None, others: tuple[str, ...]
) -> dict[str, SourceTensor]:
    """Tensors that can be read as numbers; raises UnsupportedError for bytes of which nothing says what they mean."""
    if quantization:
        found = with_ternary(quantization, found, others)
    for name, tensor in found.items():
        if tensor.type is BYTE:
            raise unsupported_type(path, name, BYTE.name)
    return found


def _check_rope(path: Path, settings: Mapping[str, Any]) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        rope = settings.get(key) or {}
        if not isinstance(rope, dict):
            raise CheckpointError(f"{path} has {key} = {rope!r}; expected a JSON object")
        check_rope_type(path, rope.get("rope_type", rope.get("type")))


def _said_of_itself(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    folder = path if path.is_dir() else path.parent
    name, source = path.resolve().name if path.is_dir() else path.stem, settings.get("_name_or_path")
    said = {"name": name, "source": source if isinstance(source, str) and source else name}
    readme = folder / "README.md"
    license = re.search(rb"^license: *([\w.-]+)", read_whole(readme)[:4096], re.MULTILINE) if readme.is_file() else None
    return said | ({"license": license[1].decode()} if license else {})
