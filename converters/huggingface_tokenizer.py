"""The tokenizer of a Hugging Face folder: tokenizer.json, and what the configs say of its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgellm.errors import CheckpointError, UnsupportedError

from .checkpoint import END_OF_TURN, TokenizerSource
from .json_file import parse_object, read_whole


def read_tokenizer(folder: Path, settings: Mapping[str, Any], configs: Sequence[Mapping[str, Any]]) -> TokenizerSource:
    """`settings` are tokenizer_config.json; `configs` are others, which may know the ids of special tokens too.

    Raises CheckpointError, UnsupportedError.
    """
    path = folder / "tokenizer.json"
    if not path.exists() and (folder / "tokenizer.model").exists():
        raise UnsupportedError(
            f"{folder} has a tokenizer.model and no tokenizer.json; expected the latter: save it "
            "with transformers' AutoTokenizer, or use a GGUF file of the model"
        )
    text = read_whole(path)
    content = parse_object(path, text)
    ids = _token_ids(path, content)
    n_tokens = max(ids.values(), default=-1) + 1
    bos = _numbers(configs, "bos_token_id")
    if "bos_token" in settings:
        bos = _named(ids, [settings["bos_token"]])
    eos = _named(ids, [settings.get("eos_token")]) + _numbers(configs, "eos_token_id")
    eos += _named(ids, END_OF_TURN)
    unknown = [number for number in bos + eos if not 0 <= number < n_tokens]
    if unknown:
        raise CheckpointError(
            f"the configs in {folder} name the token ids {unknown}; expected ids below {n_tokens}, "
            f"the number of tokens in {path.name}"
        )
    kind = str(content["model"].get("type", "unknown"))[:40]
    return TokenizerSource(text, n_tokens, bos[0] if bos else None, tuple(dict.fromkeys(eos)), kind)


def read_chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """A file of its own, which newer models have, goes before the entry of tokenizer_config.json, `settings`."""
    path, template = folder / "chat_template.jinja", settings.get("chat_template")
    if path.exists():
        try:
            return read_whole(path).decode()
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
