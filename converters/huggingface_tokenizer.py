"""The tokenizer of a Hugging Face folder: tokenizer.json or tokenizer.model, and what the configs say of its tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from edgellm.errors import CheckpointError, UnsupportedError

from .checkpoint import END_OF_TURN, TokenizerSource
from .gguf_tokenizer import BYTE, CONTROL, UNKNOWN, USER_DEFINED
from .json_file import parse_object, read_object, read_whole
from .sentencepiece import Piece, SentencePieceModel, read_sentencepiece, tokenizer_from_sentencepiece

FILES = ("tokenizer.json", "tokenizer.model")
"""In the order of preference."""


def read_tokenizer(folder: Path, settings: Mapping[str, Any], configs: Sequence[Mapping[str, Any]]) -> TokenizerSource:
    """`settings` are tokenizer_config.json; `configs` are others, which may know the ids of special tokens too.

    Raises CheckpointError, UnsupportedError.
    """
    path = next((path for name in FILES if (path := folder / name).exists()), None)
    if path is None:
        raise CheckpointError(f"{folder} has no {' and no '.join(FILES)}; expected one of them: fetch the model again")
    if path.suffix == ".model":
        model = read_sentencepiece(path)
        settings = {"bos_token": model.bos, "eos_token": model.eos, **settings}
        text = _made_of(folder, model, settings)
    else:
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
    texts = map(_content, tokens)
    return [ids[text] for text in texts if text is not None and text in ids]


def _numbers(configs: Iterable[Mapping[str, Any]], key: str) -> list[int]:
    """Every id under `key`, where a config has a number, a list of them, or nothing."""
    values = [config.get(key) for config in configs]
    return [
        number for value in values for number in (value if isinstance(value, list) else [value]) if type(number) is int
    ]


# SentencePiece.


class _Added(NamedTuple):
    """A token that was given to the model after its training, or one of its pieces that counts as a whole since."""

    id: int
    text: str
    type: int
    rstrip: bool


def _made_of(folder: Path, model: SentencePieceModel, settings: Mapping[str, Any]) -> bytes:
    """The tokenizer.json of a model with the tokens that were added to it."""
    pieces, added = list(model.pieces), _added(folder, settings)
    for token in added:
        if token.id == len(pieces):
            pieces.append(Piece(token.text, type=token.type))
        elif token.id > len(pieces) or pieces[token.id].text != token.text:
            expected = f"{pieces[token.id].text!r} there" if token.id < len(pieces) else f"{len(pieces)}, the next"
            raise CheckpointError(f"{folder} adds {token.text!r} as token {token.id}; expected {expected}")
        elif pieces[token.id].type not in (UNKNOWN, BYTE):
            pieces[token.id] = replace(pieces[token.id], type=token.type)
    texts, n_own = {piece.text for piece in pieces}, len(model.pieces)
    bos, eos = (_text_in(texts, settings.get(key)) for key in ("bos_token", "eos_token"))
    return tokenizer_from_sentencepiece(
        replace(model, pieces=tuple(pieces[:n_own])),
        pieces[n_own:],
        bos=bos,
        eos=eos,
        add_bos=bos is not None and _flag(folder, settings, "add_bos_token", True),
        add_eos=eos is not None and _flag(folder, settings, "add_eos_token", False),
        rstrip={token.text for token in added if token.rstrip},
    ).json


def _added(folder: Path, settings: Mapping[str, Any]) -> list[_Added]:
    """By id, from added_tokens.json, which old folders have, and from tokenizer_config.json."""
    named, more = (
        [settings[key] for key in settings if key.endswith("_token")],
        settings.get("additional_special_tokens"),
    )
    special = {_content(token) for token in (*named, *(more if isinstance(more, list) else []))}
    old, new = folder / "added_tokens.json", folder / "tokenizer_config.json"
    entries = {
        str(id): {"content": text, "special": text in special} for text, id in read_object(old, optional=True).items()
    }
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{new} has a {type(decoder).__name__} as added_tokens_decoder; expected an object")
    return sorted(_checked(folder, id, entry) for id, entry in (entries | decoder).items())


def _checked(folder: Path, id: str, entry: Any) -> _Added:
    text = _content(entry)
    if not re.fullmatch(r"\d{1,9}", id, re.ASCII) or not isinstance(entry, dict) or not text:
        raise CheckpointError(f"{folder} adds the token {str(entry)[:80]} as {id[:20]!r}; expected its text, and an id")
    if entry.get("lstrip") or entry.get("single_word"):
        raise UnsupportedError(
            f"{folder} adds the token {text!r} with lstrip or single_word; this version has neither for SentencePiece: "
            "save the tokenizer as tokenizer.json with transformers"
        )
    return _Added(int(id), text, CONTROL if entry.get("special") else USER_DEFINED, bool(entry.get("rstrip")))


def _content(token: Any) -> str | None:
    """The text of a token, which is a string or an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _text_in(texts: Collection[str], token: Any) -> str | None:
    text = _content(token)
    return text if text in texts else None


def _flag(folder: Path, settings: Mapping[str, Any], key: str, default: bool) -> bool:
    value = settings.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(
            f"tokenizer_config.json in {folder} has {key} = {str(value)[:80]!r}; expected true or false"
        )
    return default if value is None else value
