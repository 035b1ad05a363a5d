"""What an answer must be: a JSON schema, a regex, one of some choices, or a GBNF grammar, as masks over the vocabulary.

The masks are llguidance's, an optional package. An answer that ends by itself is in the grammar; one that is cut is the
beginning of such an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellm.arrays import F32, U8
from edgellm.errors import ArgumentError, UnsupportedError
from edgellm.sampling import Chooser, check_texts
from edgellm.structured import digits
from edgellm.structured.json_schema import JsonSchema, parse, prepared
from edgellm.structured.lexemes import to_lark

if TYPE_CHECKING:
    import llguidance

    from edgellm.tokenizer import Tokenizer

LogitsProcessor = Callable[[Sequence[int], F32], F32]
"""(ids so far, prompt included, (tokens,) logits of the next) -> logits; -inf excludes a token."""

JSON_OPTIONS = {
    # One line, written as json.dumps does or without the spaces: white space without a limit would let a model fill an
    # answer with it.
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    # No numeric escapes: by them a name that is taken could be written another way.
    "json_allowed_escapes": '"\\bfnrt',
    "json_allow_general_unicode_escapes": False,
    "lenient": False,
    "coerce_one_of": False,
}
BOUNDS = np.array([[np.inf if byte >> bit & 1 else -np.inf for bit in range(8)] for byte in range(256)], np.float32)
"""What eight logits are at most, by the byte that a mask has for them."""
TOO_MUCH = "too (complex|large|big|many)|limit|support|unimplemented|not disjoint|not present in a registry"
"""In llguidance's messages of what it cannot do."""


@dataclass(frozen=True)
class Grammar:
    """A description of answers, in the words of llguidance; made by `grammar_for`."""

    kind: str
    """The option that asked for it."""
    source: str
    is_json: bool = False


def grammar_for(
    *,
    json_schema: Any = None,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    grammar: str | Grammar | None = None,
) -> Grammar | None:
    """What these options of Model.generate ask for, or None.

    Raises ArgumentError for more than one of them or a wrong one, UnsupportedError for what cannot be kept to, or if
    llguidance is missing.
    """
    given = {"json_schema": json_schema, "regex": regex, "choices": choices, "grammar": grammar}
    kinds = [kind for kind, value in given.items() if value is not None]
    if not kinds:
        return None
    if len(kinds) > 1:
        raise ArgumentError(f"{' and '.join(kinds)} are both given; expected one of {', '.join(given)}")
    if isinstance(grammar, Grammar):
        return grammar
    return Grammar(kinds[0], _SOURCES[kinds[0]](given[kinds[0]]), is_json=json_schema is not None)


def _of_json_schema(schema: Any) -> str:
    text = json.dumps(prepared(parse(schema) if isinstance(schema, str) else schema))
    source: str = _library().LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
    return source


def call_grammar(schema: JsonSchema, begin: str, end: str, kind: str) -> Grammar:
    """JSON of a schema between two texts, as llguidance's Lark writes them: quoted, or <[ID]> for a special token."""
    options = {"x-guidance": JSON_OPTIONS}
    text = json.dumps({**options, **prepared(schema)})
    source = _library().LLMatcher.grammar_from_lark(f"start: {begin} call {end}\ncall: %json {text}")
    return Grammar(kind, source, is_json=True)


def _of_regex(regex: str) -> str:
    source: str = _library().LLMatcher.grammar_from_regex(_text(regex, "regex"))
    return source


def _of_choices(choices: Sequence[str]) -> str:
    if isinstance(choices, str) or not choices:
        raise ArgumentError(f"choices is {choices!r}; expected a list of at least one text")
    return _of_regex("|".join(re.escape(_text(choice, "choices")) for choice in choices))


def _of_gbnf(text: str) -> str:
    source: str = _library().LLMatcher.grammar_from_lark(to_lark(_text(text, "grammar")))
    return source


_SOURCES: dict[str, Callable[[Any], str]] = {
    "json_schema": _of_json_schema,
    "regex": _of_regex,
    "choices": _of_choices,
    "grammar": _of_gbnf,
}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise ArgumentError(f"{name} has {value!r}; expected a text that is not empty")
    return check_texts(name, [value])[0]


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UnsupportedError(
            "answers after a schema, regex, choices or grammar need the package llguidance; run "
            "pip install 'edgellm[structured]' and try again"
        ) from error
    return llguidance


class Vocabulary:
    """The bytes of a tokenizer's tokens, in the order in which masks are computed. Threads may share one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Takes some 0.2 seconds for 50,000 tokens."""
        library = _library()
        self.n_tokens, self._tokenizer = tokenizer.n_tokens, tokenizer
        # A model without an end of its own is given one behind its vocabulary; no mask shows it.
        self.ends = list(tokenizer.eos_ids) or [self.n_tokens]
        wrapped = _Tokens(tokenizer, self.ends)
        self.tokens: llguidance.LLTokenizer = library.LLTokenizer(
            library.TokenizerWrapper(wrapped), eos_token=self.ends
        )
        self.leading_digits = digits.leading(wrapped.tokens[: self.n_tokens])
        """(tokens,) uint8: with how many digits each begins."""
        self.most_digits = int(self.leading_digits.max())

    def bytes_of(self, id: int) -> bytes:
        return self._tokenizer.token_bytes(id) if id < self.n_tokens else b""


class _Tokens:
    """A tokenizer as llguidance wants to see it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int]) -> None:
        ids = range(tokenizer.n_tokens)
        more = [b"<end>"] * (max(ends) + 1 - tokenizer.n_tokens)
        self.tokens = [*map(tokenizer.token_bytes, ids), *more]
        self.special_token_ids = [*filter(tokenizer.is_special, ids), *ends]
        self.eos_token_id = ends[0]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """The ids of text that must come, so that it is cut as usual. With none, any cut of it is allowed."""
        # SentencePiece puts a space before a text, but not after a line's end.
        before = "\n" if self._tokenizer.drops_space else ""
        first = len(self._encode(before)) if before else 0
        ids = self._encode(before + text)[first:]
        return ids if b"".join(self.tokens[id] for id in ids) == text.encode() else []

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special=False, parse_special=False)


class Constraint:
    """One answer as it grows: which tokens may be next."""

    def __init__(self, vocabulary: Vocabulary, grammar: Grammar) -> None:
        """Raises ArgumentError for a grammar that is wrong, or that no text is in."""
        self._kind, self._vocabulary = grammar.kind, vocabulary
        self._digits, self._bounds = digits.Digits() if grammar.is_json else None, np.empty(0, np.float32)
        limits = _library().LLParserLimits(verbose_errors=False)
        self._matcher: llguidance.LLMatcher = _library().LLMatcher(
            vocabulary.tokens, grammar.source, log_level=0, limits=limits
        )
        if self._matcher.is_error():
            raise self._failure()

    def mask(self, logits: F32) -> F32:
        """The logits with -inf for tokens that cannot be next, good until the next call. Raises UnsupportedError if the
        grammar is too large to go on, ArgumentError if nothing can be next."""
        bits = self._bits(min(len(logits), self._vocabulary.n_tokens))
        if not bits.any():
            raise ArgumentError(f"no token can be next in the {self._kind}; no text that ends is in it from here on")
        n, n_bounds = len(logits), 8 * len(bits)
        if len(self._bounds) < max(n, n_bounds):
            self._bounds = np.full(max(n, n_bounds), -np.inf, np.float32)
        BOUNDS.take(bits, axis=0, out=self._bounds[:n_bounds].reshape(-1, 8), mode="clip")
        return np.minimum(logits, self._bounds[:n], out=self._bounds[:n])

    def _bits(self, n: int) -> U8:
        """(n / 8,) uint8: a bit for each token that may be next, the first the lowest."""
        bits: U8 = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)[: -(-n // 8)].copy()
        if self._matcher.is_error():
            raise self._failure()
        if n % 8:
            bits[-1] &= (1 << n % 8) - 1
        if self._digits and self._digits.in_a_row + self._vocabulary.most_digits > digits.MOST:
            return self._without_digits(bits, digits.MOST - self._digits.in_a_row)
        return bits

    def _without_digits(self, bits: U8, left: int) -> U8:
        """Without tokens of more digits than are left, unless nothing else can come: a schema may demand them."""
        short = np.packbits(self._vocabulary.leading_digits <= max(0, left), bitorder="little")[: len(bits)]
        return bits & short if (bits & short).any() else bits

    def accept(self, id: int) -> None:
        """Note the token that was taken, one that the mask allowed."""
        if not self._matcher.consume_token(id):
            raise self._failure()
        if self._digits:
            self._digits.push(self._vocabulary.bytes_of(id))

    @property
    def is_done(self) -> bool:
        """Whether the answer is complete and nothing can follow, be it without a token that ends it."""
        return self._matcher.is_stopped()

    def _failure(self) -> ArgumentError | UnsupportedError:
        lines = self._matcher.get_error().split("\n<state>")[0].splitlines()
        # The library shows the place in a grammar that is not the user's words.
        message = " ".join(line.strip() for line in lines if not re.match(r" *(\d+ \||\^)", line))
        message = re.sub(r"^at \d+\(\d+\): ", "", message)
        if "coerce_one_of" in message:
            message = "its oneOf has alternatives that may hold at once, which is not supported; use anyOf"
        kind = UnsupportedError if re.search(TOO_MUCH, message, re.IGNORECASE) else ArgumentError
        return kind(f"the {self._kind} cannot be used: {message}")


def _processed(processor: LogitsProcessor, ids: Sequence[int], logits: F32) -> F32:
    changed = np.asarray(processor(ids, logits), np.float32)
    if changed.shape != logits.shape:
        raise ArgumentError(f"a logits processor gave logits of shape {changed.shape}; expected {logits.shape}")
    return changed


class GuidedSampler:
    """A sampler behind logits processors and a constraint: these see the logits first, the constraint last of them."""

    takes_best = False

    def __init__(
        self, sampler: Chooser, processors: Sequence[LogitsProcessor] = (), constraint: Constraint | None = None
    ) -> None:
        self._sampler, self._processors, self._constraint = sampler, processors, constraint

    def __call__(self, logits: F32, ids: Sequence[int]) -> int:
        for processor in self._processors:
            logits = _processed(processor, ids, logits)
        if self._constraint is None:
            return self._sampler(logits, ids)
        id = self._sampler(self._constraint.mask(logits), ids)
        self._constraint.accept(id)
        return id

    def rewind(self, n: int) -> None:
        assert self._constraint is None  # which only goes forward: an answer has a grammar or banned strings
        self._sampler.rewind(n)

    @property
    def is_done(self) -> bool:
        return self._constraint is not None and self._constraint.is_done
