"""A model folder as Hugging Face has it: config.json, safetensors, tokenizer.json. Knows no architecture.

A safetensors file is a uint64 length, that many bytes of JSON (name -> dtype, shape, first and last byte), the data.
It is not trusted: see gguf.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgellm import architectures
from edgellm.errors import CheckpointError, UnsupportedError

from .blocks import BYTE, TYPES
from .checkpoint import (
    END_OF_TURN,
    Checkpoint,
    SourceTensor,
    TokenizerSource,
    check_rope_type,
    check_vocabulary,
    row_reader,
    unreadable,
)
from .naming import match_tensors
from .ternary import with_ternary
from .text_part import text_settings, text_tensors

MAX_DIMS = 8
MAX_JSON = 100_000_000
"""Bytes of a safetensors header, which is also the format's own limit, or of a file of JSON or text."""
DTYPES = ("F32", "F16", "BF16")
_TYPES = {**{name: TYPES[name] for name in DTYPES}, "U8": BYTE}
_COMPUTED = re.compile(r".*(\.rotary_emb\.inv_freq|\.(attn|attention)\.(masked_)?bias)")
"""Names of tensors that old checkpoints store although they follow from the config: frequencies of RoPE, and the masks
of GPT-2 and GPT-NeoX."""


def read_huggingface(folder: Path) -> Checkpoint:
    """Open a model folder.

    Raises CheckpointError if something in it is damaged or missing, UnsupportedError for a sound model that this
    version cannot run.
    """
    whole = _json_object(folder / "config.json")
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
    found, left_out = text_tensors(whole, _tensors(folder))
    found = _numbers_of(folder, _with_base(found, embed, output), quantization, others=(embed, output))
    if config.tie_embeddings or output not in found:
        config = replace(config, tie_embeddings=True)
        found.pop(output, None)
    tensors = match_tensors(folder, architecture, config, architecture.HF_NAMES, found)
    tokenizer_config = _json_object(folder / "tokenizer_config.json", optional=True)
    generation = _json_object(folder / "generation_config.json", optional=True)
    tokenizer = _tokenizer(folder, tokenizer_config, [settings, generation])
    check_vocabulary(folder, tokenizer.n_tokens, config.vocab_size)
    return Checkpoint(
        path=str(folder),
        architecture=name,
        config=config,
        tensors=tensors,
        tokenizer=tokenizer,
        quantized=False,
        left_out=left_out,
        ternary=bool(quantization),
        chat_template=_chat_template(folder, tokenizer_config),
        metadata=_said_of_itself(folder, settings),
    )


def _with_base(found: dict[str, SourceTensor], embed: str, output: str) -> dict[str, SourceTensor]:
    """In checkpoints of a model without its head, names lack the first word, as in "transformer.wte.weight"."""
    base, _, rest = embed.partition(".")
    if embed in found or rest not in found:
        return found
    return {name if name == output else f"{base}.{name}": tensor for name, tensor in found.items()}


def _numbers_of(
    folder: Path, found: dict[str, SourceTensor], quantization: Mapping[str, Any] | None, others: tuple[str, ...]
) -> dict[str, SourceTensor]:
    """Tensors that can be read as numbers; raises UnsupportedError for bytes of which nothing says what they mean."""
    if quantization:
        found = with_ternary(quantization, found, others)
    for name, tensor in found.items():
        if tensor.type is BYTE:
            raise _unsupported_type(folder, name, BYTE.name)
    return found


def _check_rope(path: Path, settings: Mapping[str, Any]) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        rope = settings.get(key) or {}
        if not isinstance(rope, dict):
            raise CheckpointError(f"{path} has {key} = {rope!r}; expected a JSON object")
        check_rope_type(path, rope.get("rope_type", rope.get("type")))


# JSON.


def _json_object(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    return _parse_object(path, _bytes(path))


def _bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_JSON:
            raise CheckpointError(f"{path} has {size} bytes; expected at most {MAX_JSON}: it is damaged")
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def _parse_object(path: Path, text: bytes) -> dict[str, Any]:
    """Raises CheckpointError unless `text` is a JSON object without a key that stands there twice."""
    try:
        value = json.loads(text, object_pairs_hook=_distinct, parse_int=_number)
    except RecursionError as error:
        raise CheckpointError(f"{path} is JSON nested too deep; expected a plain object") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not sound JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def _number(digits: str) -> int | float:
    # Python fails to print or to round integers of thousands of digits; as a float none is taken for a size or an id.
    return int(digits) if len(digits) <= 18 else float(digits)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict[str, Any]()
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key[:200]!r} stands there twice")
        result[key] = value
    return result


# Weights.


def _tensors(folder: Path) -> dict[str, SourceTensor]:
    """Of all shards, by their names in the file, without those that follow from the config."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return _safetensors(single)
    if index.exists():
        return _sharded(index)
    others = sorted(path.name for path in folder.glob("*.bin"))
    raise CheckpointError(
        f"{folder} has no model.safetensors and no {index.name}"
        + (
            f", but {', '.join(others)}: convert the weights to safetensors first"
            if others
            else "; expected one of them: fetch the model again"
        )
    )


def _sharded(index: Path) -> dict[str, SourceTensor]:
    places = _json_object(index).get("weight_map")
    if not isinstance(places, dict):
        raise CheckpointError(f"{index} has no weight_map; expected an object of tensor and file names")
    files = sorted(set(_plain_names(index, places.values())))
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise CheckpointError(f"{index} names files that are not beside it: {', '.join(missing)}; fetch them")
    shards = {file: _safetensors(index.parent / file) for file in files}
    astray = [
        f"{name} in {file}"
        for name, file in places.items()
        if name not in shards[file] and not _COMPUTED.fullmatch(name)
    ]
    if astray:
        raise CheckpointError(f"{index} says where tensors are that are not there: {', '.join(astray)}")
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    if len(tensors) != sum(map(len, shards.values())):
        raise CheckpointError(f"the shards of {index} hold a tensor twice; expected each in one file")
    return tensors


def _plain_names(index: Path, files: Iterable[Any]) -> Iterator[str]:
    """The names, once it is certain that none leads out of the folder."""
    for file in files:
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise CheckpointError(f"{index} refers to {file!r}; expected the name of a .safetensors file beside it")
        yield file


def _safetensors(path: Path) -> dict[str, SourceTensor]:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_JSON, size - 8):
                raise CheckpointError(
                    f"{path} announces a header of {length} bytes in a file of {size}; expected at "
                    f"most {MAX_JSON}, and all in the file: it is damaged or incomplete"
                )
            header = _parse_object(path, file.read(length))
    except OSError as error:
        raise unreadable(path, error) from error
    header.pop("__metadata__", None)
    spans = sorted((*_span(path, name, info), name) for name, info in header.items())
    _check_contiguous(path, spans, size - 8 - length)
    return {
        name: _tensor(path, name, header[name], 8 + length + begin)
        for begin, _, name in spans
        if not _COMPUTED.fullmatch(name)
    }


def _span(path: Path, name: str, info: Any) -> tuple[int, int]:
    """First byte and byte after the last of a tensor, counted from the start of the data."""
    if not _is_described(info):
        raise CheckpointError(
            f"{path}: tensor {name!r} is described by {str(info)[:200]}; expected its dtype, its "
            "shape and two data_offsets"
        )
    begin, end = info["data_offsets"]
    if _COMPUTED.fullmatch(name):
        return begin, end
    if info["dtype"] not in _TYPES:
        raise _unsupported_type(path, name, info["dtype"])
    expected = math.prod(info["shape"]) * _TYPES[info["dtype"]].block_bytes
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: tensor {name!r} has the bytes {begin} to {end}; expected {expected} bytes for "
            f"{info['dtype']} of shape {tuple(info['shape'])}"
        )
    return begin, end


def _unsupported_type(path: Path, name: str, dtype: str) -> UnsupportedError:
    return UnsupportedError(
        f"{path}: tensor {name!r} is stored as {dtype[:20]}; this version reads {', '.join(DTYPES)}: use the original "
        "model, or a GGUF file of it"
    )


def _is_described(info: Any) -> bool:
    if not isinstance(info, dict) or not isinstance(info.get("dtype"), str):
        return False
    shape, offsets = info.get("shape"), info.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(shape) > MAX_DIMS or len(offsets) != 2:
        return False
    return all(type(number) is int and number >= 0 for number in shape + offsets)


def _check_contiguous(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """`spans` in ascending order; raises CheckpointError for holes, overlaps, missing bytes and bytes left over."""
    at = 0
    for begin, end, name in spans:
        if begin != at:
            raise CheckpointError(
                f"{path}: tensor {name!r} starts at byte {begin} of the data; expected {at}, where "
                "the one before it ends"
            )
        at = end
    if at != size:
        raise CheckpointError(
            f"{path} has {size} bytes of data; expected {at}: it is damaged or incomplete, fetch it again"
        )


def _tensor(path: Path, name: str, info: Mapping[str, Any], offset: int) -> SourceTensor:
    block_type, shape = _TYPES[info["dtype"]], tuple(info["shape"])
    rows, cols = math.prod(shape[:-1]), shape[-1] if shape else 1
    return SourceTensor(name, shape, block_type, row_reader(path, offset, rows, cols * block_type.block_bytes))


# Text.


def _tokenizer(folder: Path, tokenizer_config: Mapping[str, Any], configs: list[dict[str, Any]]) -> TokenizerSource:
    """`configs` are config.json and generation_config.json, which may know the ids of special tokens too."""
    path = folder / "tokenizer.json"
    if not path.exists() and (folder / "tokenizer.model").exists():
        raise UnsupportedError(
            f"{folder} has a tokenizer.model and no tokenizer.json; expected the latter: save it "
            "with transformers' AutoTokenizer, or use a GGUF file of the model"
        )
    text = _bytes(path)
    ids = _token_ids(path, _parse_object(path, text))
    n_tokens = max(ids.values(), default=-1) + 1
    bos = _numbers(configs, "bos_token_id")
    if "bos_token" in tokenizer_config:
        bos = _named(ids, [tokenizer_config["bos_token"]])
    eos = _named(ids, [tokenizer_config.get("eos_token")]) + _numbers(configs, "eos_token_id")
    eos += _named(ids, END_OF_TURN)
    unknown = [number for number in bos + eos if not 0 <= number < n_tokens]
    if unknown:
        raise CheckpointError(
            f"the configs in {folder} name the token ids {unknown}; expected ids below {n_tokens}, "
            "the number of tokens in tokenizer.json"
        )
    return TokenizerSource(text, n_tokens, bos[0] if bos else None, tuple(dict.fromkeys(eos)))


def _token_ids(path: Path, tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id of a tokenizer.json, whose vocabulary is an object, or a list of (token, score) for Unigram."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    try:
        if isinstance(vocabulary, list):
            vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
        ids = {**vocabulary, **{token["content"]: token["id"] for token in added}}  # type: ignore[dict-item]
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} has no vocabulary that can be read; expected model.vocab and added_tokens as "
            "the tokenizers library writes them"
        ) from error
    if not all(isinstance(token, str) and type(i) is int and i >= 0 for token, i in ids.items()):
        raise CheckpointError(f"{path} has a vocabulary with ids that are no positive integers; fetch it again")
    return ids


def _named(ids: Mapping[str, int], tokens: Iterable[Any]) -> list[int]:
    """Ids of the tokens that are in the vocabulary; a token is its text, or an object with its `content`."""
    texts = [token.get("content") if isinstance(token, dict) else token for token in tokens]
    return [ids[text] for text in texts if isinstance(text, str) and text in ids]


def _numbers(configs: Iterable[Mapping[str, Any]], key: str) -> list[int]:
    """Every id under `key`, where a config has a number, a list of them, or nothing."""
    values = [config.get(key) for config in configs]
    return [
        number for value in values for number in (value if isinstance(value, list) else [value]) if type(number) is int
    ]


def _chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """A file of its own, which newer models have, goes before the entry of tokenizer_config.json."""
    path, template = folder / "chat_template.jinja", tokenizer_config.get("chat_template")
    if path.exists():
        try:
            return _bytes(path).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not UTF-8 text; fetch it again") from error
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'} has a chat_template that is a "
            f"{type(template).__name__}; expected text, or a list with one named 'default'"
        )
    return template


def _said_of_itself(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    name, source = folder.resolve().name, settings.get("_name_or_path")
    said = {"name": name, "source": source if isinstance(source, str) and source else name}
    readme = folder / "README.md"
    license = re.search(rb"^license: *([\w.-]+)", _bytes(readme)[:4096], re.MULTILINE) if readme.is_file() else None
    return said | ({"license": license[1].decode()} if license else {})
