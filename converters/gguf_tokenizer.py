"""Tokenizers out of vocabularies and metadata: a tokenizer.json with the same ids as llama.cpp. Knows no files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgellm.arrays import F32, I32
from edgellm.errors import CheckpointError, UnsupportedError

from .checkpoint import END_OF_TURN, TokenizerSource

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import Model
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""What GGUF says of a token."""


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> TokenizerSource:
    """The tokenizer that a GGUF's metadata describes.

    Raises CheckpointError if the metadata contradicts itself, UnsupportedError for a kind that is not known here.
    """
    kind, known = _get(metadata, "model", str, None), {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind is None:
        raise CheckpointError("the GGUF names no tokenizer; expected one in tokenizer.ggml.model")
    if kind not in known:
        raise UnsupportedError(
            f"the GGUF has a tokenizer of the kind {kind!r}; known are {', '.join(known)}: convert another model"
        )
    source = known[kind](metadata)
    more = (_id(metadata, f"{name}_token_id", source.n_tokens, None) for name in ("eot", "eom"))
    return replace(source, eos_ids=_distinct((*source.eos_ids, *more)))


def tokenizer_from_pieces(
    pieces: Sequence[str],
    scores: F32,
    types: I32,
    *,
    bos_id: int | None,
    eos_id: int | None,
    unk_id: int | None,
    add_bos: bool,
    add_eos: bool,
    add_space_prefix: bool,
    rstrip: Collection[str] = (),
    byte_fallback: bool = True,
    model: Model | None = None,
    cleaning: Sequence[Normalizer] = (),
) -> TokenizerSource:
    """A SentencePiece vocabulary as a tokenizer.json: by default BPE by score, and what is not in it as bytes.

    Special tokens in `rstrip` swallow the white space after them; `cleaning` is done to text first. Raises
    CheckpointError.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = _vocabulary(pieces)
    if np.isnan(scores).any():
        raise CheckpointError("a tokenizer score is not a number; expected a finite one: the file is damaged")
    space = [normalizers.Prepend("\u2581")] if add_space_prefix else []
    unspace = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    tokenizer = Tokenizer(
        model
        or models.BPE(
            vocab=ids,
            merges=_merges_by_score(pieces, scores, types),
            byte_fallback=byte_fallback,
            fuse_unk=True,
            unk_token=None if unk_id is None else pieces[unk_id],
        )
    )
    tokenizer.normalizer = normalizers.Sequence([*cleaning, *space, normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *unspace]
    )
    return _finish(tokenizer, pieces, types, bos_id, eos_id, add_bos, add_eos, rstrip)


def _merges_by_score(pieces: Sequence[str], scores: F32, types: I32) -> list[tuple[str, str]]:
    """Every way to put a piece together out of two others, best piece first.

    Of one piece, longer left parts come first: in a run of one character that is the leftmost pair, which is what
    SentencePiece merges first among equals.
    """
    known = {piece for piece, type in zip(pieces, types.tolist(), strict=True) if type not in (UNKNOWN, CONTROL, BYTE)}
    merges = []
    for id in np.argsort(-scores, kind="stable").tolist():
        piece = pieces[id]
        if piece in known:
            merges += [
                (piece[:cut], piece[cut:])
                for cut in range(len(piece) - 1, 0, -1)
                if piece[:cut] in known and piece[cut:] in known
            ]
    return merges


def _sentencepiece(metadata: Mapping[str, Any]) -> TokenizerSource:
    pieces, types = _pieces(metadata)
    name = str(metadata.get("general.name", "")).lower()
    return tokenizer_from_pieces(
        pieces,
        _numbers(metadata, "scores", len(pieces), np.float32),
        types,
        bos_id=_id(metadata, "bos_token_id", len(pieces), 1),
        eos_id=_id(metadata, "eos_token_id", len(pieces), 2),
        unk_id=_id(metadata, "unknown_token_id", len(pieces), 0),
        add_bos=_get(metadata, "add_bos_token", bool, True),
        add_eos=_get(metadata, "add_eos_token", bool, False),
        add_space_prefix=_get(metadata, "add_space_prefix", bool, True),
        # Phi 3 was trained so, and GGUF has no field for it.
        rstrip=set(pieces) - {"<unk>", "<s>", "<|endoftext|>"} if "phi-3" in name or "phi3" in name else (),
    )


def _byte_level(metadata: Mapping[str, Any]) -> TokenizerSource:
    from tokenizers import Tokenizer, decoders, models

    pieces, types = _pieces(metadata)
    pre, ids = _pre(metadata), _vocabulary(pieces)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=_merges(metadata, ids), ignore_merges=pre.ignore_merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(
        tokenizer,
        pieces,
        types,
        _id(metadata, "bos_token_id", len(pieces), None),
        _id(metadata, "eos_token_id", len(pieces), None),
        _get(metadata, "add_bos_token", bool, pre.add_bos),
        _get(metadata, "add_eos_token", bool, False),
    )


def _merges(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for rank, merge in enumerate(_strings(metadata, "merges")):
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(
                f"merge {rank} of the tokenizer is {merge!r}; expected two tokens of the vocabulary "
                "that make a third, with a space between them: the file is damaged"
            )
        merges.append((left, right))
    return merges


def _finish(
    tokenizer: Tokenizer,
    pieces: Sequence[str],
    types: I32,
    bos_id: int | None,
    eos_id: int | None,
    add_bos: bool,
    add_eos: bool,
    rstrip: Collection[str] = (),
) -> TokenizerSource:
    """Special tokens, BOS and EOS: what all kinds have in common."""
    special = [id for id, type in enumerate(types.tolist()) if type in (CONTROL, UNKNOWN) or pieces[id] in END_OF_TURN]
    own = set(special)
    whole = [id for id, type in enumerate(types.tolist()) if id in own or type == USER_DEFINED]
    tokenizer.add_tokens([_added(pieces[id], id in own, pieces[id] in rstrip) for id in whole])
    _frame(tokenizer, _framing("BOS", pieces, bos_id, add_bos), _framing("EOS", pieces, eos_id, add_eos))
    ends = {pieces[id]: id for id in special if pieces[id] in END_OF_TURN}
    return TokenizerSource(
        tokenizer.to_str().encode(),
        len(pieces),
        bos_id,
        _distinct((eos_id, *ends.values())),
        type(tokenizer.model).__name__,
    )


def _added(text: str, special: bool, rstrip: bool) -> AddedToken:
    from tokenizers import AddedToken

    return AddedToken(text, rstrip=rstrip, normalized=False, special=special)


def _framing(name: str, pieces: Sequence[str], id: int | None, add: bool) -> list[tuple[str, int]]:
    if add and id is None:
        raise CheckpointError(f"the tokenizer adds {name} to every text, but does not say which token that is")
    return [(pieces[id], id)] if add and id is not None else []


def _frame(tokenizer: Tokenizer, before: list[tuple[str, int]], after: list[tuple[str, int]]) -> None:
    from tokenizers import processors

    if before or after:
        # Lists, because a token may have the characters that the one-string form gives a meaning.
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(text for text, _ in before), "$A", *(text for text, _ in after)], special_tokens=[*before, *after]
        )


def _vocabulary(pieces: Sequence[str]) -> dict[str, int]:
    ids = {piece: id for id, piece in enumerate(pieces)}
    if len(ids) < len(pieces):
        twice = next(piece for id, piece in enumerate(pieces) if ids[piece] != id)
        raise CheckpointError(
            f"the tokenizer has the token {twice!r} more than once; expected it once: the file is damaged"
        )
    try:
        "".join(pieces).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            "the tokenizer has a token that is not UTF-8; expected text: the file is damaged"
        ) from error
    return ids


def _pieces(metadata: Mapping[str, Any]) -> tuple[list[str], I32]:
    """The tokens, and what each is; where the file does not say, all are normal."""
    # An empty token can be made by nothing, and takes a name that nobody writes.
    pieces = [piece or f"[EMPTY_{id}]" for id, piece in enumerate(_strings(metadata, "tokens"))]
    if "tokenizer.ggml.token_type" not in metadata:
        return pieces, np.full(len(pieces), NORMAL, np.int32)
    return pieces, _numbers(metadata, "token_type", len(pieces), np.int32)


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"the GGUF's tokenizer.ggml.{key} is {_described(values)}; expected a list of strings")
    return values


def _numbers(metadata: Mapping[str, Any], key: str, count: int, type: type[np.generic]) -> npt.NDArray[Any]:
    """One number a token."""
    values = metadata.get(f"tokenizer.ggml.{key}")
    array = np.asarray(values) if isinstance(values, (list, np.ndarray)) else np.zeros(0, object)
    if array.shape != (count,) or array.dtype.kind not in ("i" if type is np.int32 else "if"):
        raise CheckpointError(
            f"the GGUF's tokenizer.ggml.{key} is {_described(values)}; expected {count} numbers, one for each token"
        )
    return array.astype(type)


def _id(metadata: Mapping[str, Any], key: str, count: int, default: int | None) -> int | None:
    value: int | None = _get(metadata, key, int, default if default is not None and default < count else None)
    if value is not None and not 0 <= value < count:
        raise CheckpointError(
            f"the GGUF's tokenizer.ggml.{key} is {value}; expected the id of one of its {count} tokens"
        )
    return value


def _get(metadata: Mapping[str, Any], key: str, type: type, default: Any) -> Any:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    # bool is an int in Python, and True is no id.
    if value is not default and (not isinstance(value, type) or isinstance(value, bool) is not (type is bool)):
        raise CheckpointError(f"the GGUF's tokenizer.ggml.{key} is {_described(value)}; expected {type.__name__}")
    return value


def _described(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, np.ndarray):
        return f"an array of {value.size} x {value.dtype}"
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)[:80]


def _distinct(ids: Iterable[int | None]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(id for id in ids if id is not None))


@dataclass(frozen=True)
class _Pre:
    """How text is cut into words before it is merged."""

    splits: tuple[str, ...]
    """Regular expressions, each applied to what the one before left."""
    ignore_merges: bool = False
    """Whether a word that is a token stays whole, even where no merges lead to it."""
    add_bos: bool = False


def pre_tokenizer_name(cut: PreTokenizer, ignore_merges: bool, texts: Iterable[str]) -> str | None:
    """GGUF's name of the way in which a byte-level tokenizer cuts these texts, None if there is none."""
    for names in sorted(_GROUPS, key="default".__eq__):  # the default last
        pre = _GROUPS[names]
        known = _pre_tokenizer(pre)
        if pre.ignore_merges == ignore_merges and all(
            cut.pre_tokenize_str(text) == known.pre_tokenize_str(text) for text in texts
        ):
            return names.split()[0]
    return None


def _pre_tokenizer(pre: _Pre) -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _pre(metadata: Mapping[str, Any]) -> _Pre:
    name = _get(metadata, "pre", str, "default")
    if name not in _PRE:
        raise UnsupportedError(
            f"the GGUF's tokenizer cuts text into words as {name!r}; known are {', '.join(_PRE)}: convert another model"
        )
    return _PRE[name]


_SUFFIXES = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CHINESE_KOREAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

# The cased letters of the Unicode version that DeepSeek was trained with: a class of today would hold more.
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)


def _cl100k(digits: str, letters: str = r"\p{L}") -> str:
    return rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{digits}| ?[^\s{letters}\p{{N}}]+[\r\n]*|{_SPACES}"


def _o200k(digits: str, suffix: str) -> str:
    first = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{first}[{_UPPER}]*[{_LOWER}]+{suffix}|{first}[{_UPPER}]+[{_LOWER}]*{suffix}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_GROUPS = {
    "default": _Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat mellum modern-bert exaone4 a.x-4.0 jina-es jina-de "
    "jina-v2-es jina-v2-de jina-v1-en jina-v2-code": _Pre((_GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": _Pre((r"\p{N}", _GPT2)),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": _Pre(
        (_cl100k(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe": _Pre((_cl100k(r"\p{N}{1,3}"),)),
    "glm4": _Pre((_cl100k(r"\p{N}{1,3}"),), ignore_merges=True),
    "qwen2 deepseek-r1-qwen stablelm2 hunyuan megrez kormo": _Pre((_cl100k(r"\p{N}"),)),
    "qwen35": _Pre((_cl100k(r"\p{N}", r"\p{L}\p{M}"),)),
    "tekken": _Pre((_o200k(r"\p{N}", ""),), ignore_merges=True, add_bos=True),
    "gpt-4o llama4 kanana2": _Pre((_o200k(r"\p{N}{1,3}", _SUFFIXES + "?"),)),
    "falcon": _Pre((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "deepseek-llm": _Pre(
        (
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _CHINESE_KOREAN,
            r"\p{N}+",
        )
    ),
    "deepseek-v3 hunyuan-dense joyai-llm": _Pre(
        (
            r"\p{N}{1,3}",
            "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
        )
    ),
    "deepseek-coder": _Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE_KOREAN, r"\p{N}")),
}
_PRE = {name: pre for names, pre in _GROUPS.items() for name in names.split()}
