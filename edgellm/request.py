"""What is asked of an answer, checked, and the answer that is begun for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any

from edgellm.adapter import Adapter
from edgellm.answer import Answer, Completion, Timings
from edgellm.banned import Banned
from edgellm.breakers import breakers
from edgellm.errors import ArgumentError, EdgeError
from edgellm.generate import most_new
from edgellm.logprobs import Recorder, Scored
from edgellm.lookup import Lookup
from edgellm.overflow import SINKS, Window, check_policy, fits, most_left, without_oldest
from edgellm.sampling import Chooser, Sampler, SamplingParams, check_count, check_texts
from edgellm.sequence import Sequence as Tokens
from edgellm.text_stream import StopStrings, TextStream
from edgellm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgellm.answer_cache import AnswerCache
    from edgellm.structured.constraint import LogitsProcessor, Vocabulary
    from edgellm.structured.json_schema import JsonSchema

GRAMMARS = ("json_schema", "regex", "choices", "grammar")
"""Options that say what an answer must be."""


@dataclass(frozen=True)
class Request:
    """The options of `Model.stream`."""

    params: SamplingParams
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    overflow: str = "error"
    n_first: int = SINKS
    """With overflow="window": first tokens that stay."""
    speculate: int = 0
    banned_strings: Sequence[str] = ()
    json_schema: JsonSchema | None = None
    regex: str | None = None
    choices: Sequence[str] | None = None
    grammar: str | None = None
    logits_processors: Sequence[LogitsProcessor] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    adapter: Adapter | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Request:
        """Out of keyword arguments; those that are not fields are of SamplingParams, or raise TypeError."""
        own = cls.__dataclass_fields__.keys() - {"params"}
        sampling = {name: value for name, value in options.items() if name not in own}
        return cls(_params(sampling), **{name: value for name, value in options.items() if name in own})

    @property
    def is_determined(self) -> bool:
        """Whether the same tokens with these options get the same answer, and no more is asked for than that; with a
        window what was dropped would be."""
        asks_more = self.logits_processors or self.logprobs is not None or self.prompt_logprobs is not None
        return self.params.is_determined and not asks_more and self.overflow != "window"

    @property
    def determinants(self) -> dict[str, Any]:
        """What the answer depends on, besides the model and the prompt's tokens."""
        others = ("overflow", "n_first", "speculate", "logits_processors", "logprobs", "prompt_logprobs")
        found = {name: value for name, value in vars(self).items() if name not in others}
        texts = {"stop": _texts(self.stop), "banned_strings": _texts(self.banned_strings)}
        return {**found, **texts, "adapter": self.adapter and self.adapter.fingerprint}


class Answers:
    """Begins the answers of one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        context_length: int,
        ends: Sequence[int],
        least_latest: Callable[[], int],
        cache: AnswerCache | None = None,
        bound_to: Mapping[str, Any] | None = None,
    ) -> None:
        """`least_latest` is Backend's. `cache` has answers of models, of which this one is told by `bound_to`."""
        self._tokenizer, self._vocab_size, self._cache, self._bound_to = tokenizer, vocab_size, cache, bound_to
        self._least_latest = least_latest
        self._context_length, self._ends = context_length, ends
        self._breakers = lru_cache(8)(partial(breakers, tokenizer))

    def begin(self, prompt_ids: Sequence[int], request: Request) -> Answer:
        """Raises ArgumentError, UnsupportedError or ContextOverflowError for what cannot be answered."""
        self.check(prompt_ids)
        window = self._window(request)
        n_given, prompt_ids = len(prompt_ids), self._fitted(prompt_ids, request)
        most_new(len(prompt_ids), request.max_tokens, self._context_length, window)
        check_count("speculate", request.speculate)
        done = Completion(
            "", [], "cancelled", prompt_ids, Timings(prompt_tokens=len(prompt_ids)),
            dropped_tokens=n_given - len(prompt_ids),
        )  # fmt: skip
        banned = check_texts("banned_strings", _texts(request.banned_strings))
        sampler = self._chooser(request)
        if request.logprobs is not None:
            sampler = Recorder(sampler, check_count("logprobs", request.logprobs), done.logprobs)
        kind: Callable[..., Tokens] = Tokens
        if request.prompt_logprobs is not None:
            n_top = check_count("prompt_logprobs", request.prompt_logprobs)
            kind = partial(Scored, n_top=n_top, found=done.prompt_logprobs)
        answer = Answer(
            completion=done,
            sampler=sampler,
            stops=StopStrings(check_texts("stop", _texts(request.stop))),
            text=TextStream(self._tokenizer, prompt_ids),
            max_tokens=request.max_tokens,
            ends=() if request.ignore_eos else self._ends,
            lookup=Lookup(request.speculate) if request.speculate else None,
            banned=Banned(self._tokenizer, banned) if banned else None,
            adapter=request.adapter,
            window=window,
            kind=kind,
        )
        if self._cache is not None and request.is_determined:
            self._look_up(answer, self._cache, request)
        return answer

    def _look_up(self, answer: Answer, cache: AnswerCache, request: Request) -> None:
        """Find out whether it was made before, and have it kept for the next time."""
        question = {"model": self._bound_to, "prompt": answer.completion.prompt_ids, **request.determinants}
        known = cache.get(question)
        answer.known = known if known and all(id < self._vocab_size for id in known[0]) else None
        answer.keep = partial(cache.put, question)

    def check(self, ids: Sequence[int]) -> None:
        """Raises ArgumentError for no ids, or what is none."""
        if not len(ids):
            raise ArgumentError("there are no tokens to begin with, and this model adds none; give some text")
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            raise ArgumentError(f"token ids from {min(ids)} to {max(ids)}; expected 0 to {self._vocab_size - 1}")

    def _window(self, request: Request) -> Window | None:
        check_policy(request.overflow)
        if request.overflow != "window":
            return None
        window = Window(request.n_first, self._least_latest())
        window.check(self._context_length)
        return window

    def _fitted(self, ids: Sequence[int], request: Request) -> list[int]:
        moves = request.overflow == "window"
        max_tokens = None if moves else request.max_tokens  # what moves leaves room for any number
        if request.overflow == "error" or fits(len(ids), max_tokens, self._context_length):
            return list(ids)
        n_first = request.n_first if moves else int(ids[0] == self._tokenizer.bos_id)
        return without_oldest(ids, n_first, most_left(max_tokens, self._context_length))

    def _chooser(self, request: Request) -> Chooser:
        sampler = self._sampler(request.params)
        asked = {name: getattr(request, name) for name in GRAMMARS}
        if not request.logits_processors and all(value is None for value in asked.values()):
            return sampler
        # Imported only when needed: it takes as long as some tokens.
        from edgellm.structured.constraint import Constraint, GuidedSampler, grammar_for

        wanted = grammar_for(**asked)
        if wanted and request.ignore_eos:
            raise ArgumentError(f"{wanted.kind} and ignore_eos are both given; an answer ends where it is complete")
        if wanted and request.banned_strings:
            raise ArgumentError(
                f"{wanted.kind} and banned strings are both given; say in the {wanted.kind} what may come"
            )
        constraint = Constraint(self._vocabulary, wanted) if wanted else None
        return GuidedSampler(sampler, request.logits_processors, constraint)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        from edgellm.structured.constraint import Vocabulary

        return Vocabulary(self._tokenizer)

    def _sampler(self, params: SamplingParams) -> Sampler:
        if bad := [id for id in params.logit_bias if not 0 <= id < self._vocab_size]:
            raise ArgumentError(f"logit_bias has token id {bad[0]}; expected 0 to {self._vocab_size - 1}")
        return Sampler(params, self._breakers(tuple(params.dry_sequence_breakers)) if params.dry_multiplier else None)


def _texts(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _params(sampling: dict[str, Any]) -> SamplingParams:
    try:
        return SamplingParams(**sampling)
    except TypeError as error:
        if isinstance(error, EdgeError):
            raise
        known = ", ".join(SamplingParams.__dataclass_fields__)
        raise TypeError(f"unknown or mistyped sampling option in {sampling}; known: {known}") from error
