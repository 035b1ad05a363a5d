"""One answer: its text, tokens and timings, and how it is made, alone or batched with others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edgellm.adapter import Adapter
from edgellm.banned import Banned
from edgellm.generate import Slot, generate
from edgellm.logprobs import Logprob
from edgellm.lookup import Lookup
from edgellm.overflow import Window
from edgellm.sampling import Chooser
from edgellm.scheduler import Progress, Scheduler
from edgellm.sequence import Sequence as Tokens
from edgellm.text_stream import StopStrings, TextStream

if TYPE_CHECKING:
    from edgellm.tools import ToolCall


@dataclass
class Timings:
    """Where the time of one answer went, in tokens and seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that were in the cache already."""
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    """Including the one that ended the answer."""
    generate_seconds: float = 0.0
    drafted_tokens: int = 0
    """With `speculate`: how many tokens were proposed; `accepted_tokens` of them were right."""
    accepted_tokens: int = 0

    @property
    def prompt_per_second(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generated_per_second(self) -> float:
        """Without the first token, which comes from evaluating the prompt."""
        return max(0, self.generated_tokens - 1) / self.generate_seconds if self.generate_seconds else 0.0


@dataclass
class Completion:
    """What a model answered."""

    text: str
    ids: list[int]
    """The generated tokens, without the one that ended the answer. If a stop string came, `text` ends before theirs."""
    finish_reason: str
    """"stop": the model ended the answer, it is complete (structured output), or a stop string came; "length":
    max_tokens or the context is used up; "tool_calls": the model ended after calls; "cancelled"."""
    prompt_ids: list[int]
    timings: Timings
    tool_calls: list[ToolCall] = field(default_factory=list)
    """The model's calls, in a chat with `tools`; `text` does not contain them."""
    dropped_tokens: int = 0
    """With overflow="shift": how many of the prompt's oldest tokens were left out; `prompt_ids` does not have them.
    With "window", also those that were dropped from prompt and answer while the answer was made."""
    dropped_messages: Sequence[Mapping[str, Any]] = ()
    """In a chat with overflow="shift" or "window": the oldest messages, which the model did not see."""
    logprobs: list[Logprob] = field(default_factory=list)
    """With `logprobs`: one for each of `ids`, and for the token that ended the answer, if there was one."""
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    """With `prompt_logprobs`: one for each of `prompt_ids` except the first."""
    from_cache: bool = False
    """The answer comes from an AnswerCache: nothing was evaluated, and its timings have no seconds."""


@dataclass(frozen=True)
class Piece:
    """The next bit of an answer's text; it is empty while a character or a possible stop string is incomplete."""

    text: str
    id: int | None
    """The token that gave it; None for text that is left over at the end."""
    tool_calls: Sequence[ToolCall] = ()
    """Calls that are now complete."""


class Stream(Iterator[Piece]):
    """An answer while it is generated. Iterate over it for the pieces; `completion` has everything so far.

    Closing it early (`close`, or leaving a with-statement) stops the answer and keeps what was generated.
    """

    def __init__(self, pieces: Iterator[Piece], completion: Completion) -> None:
        self._pieces, self.completion = pieces, completion

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        self._pieces.close()  # type: ignore[attr-defined]

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Turn:
    """Hooks around an answer: what becomes of its pieces before anybody sees them, and of the answer when it is over.
    These do nothing; a chat's do."""

    def show(self, piece: Piece) -> Piece | None:
        return piece

    def finish(self) -> Piece | None:
        """The rest of an answer that was not stopped early."""
        return None

    def remember(self) -> None:
        """Called when the answer is over, or was stopped."""


@dataclass
class Answer:
    """One answer in the making."""

    completion: Completion
    sampler: Chooser
    stops: StopStrings
    text: TextStream
    max_tokens: int | None
    ends: Sequence[int]
    lookup: Lookup | None
    banned: Banned | None
    adapter: Adapter | None = None
    window: Window | None = None
    kind: Callable[..., Tokens] = Tokens
    """Of its sequence."""
    made: list[int] = field(default_factory=list)
    """All tokens so far, the one that ended the answer included."""
    known: tuple[Sequence[int], str] | None = None
    """`made` and the finish_reason of the same answer, if it was made before: see `replay`."""
    keep: Callable[[Sequence[int], str], None] | None = None
    """Called with `made` and the finish_reason, for the next time."""
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.n_left_out = self.completion.dropped_tokens

    def pieces(self, slot: Slot) -> Iterator[Piece]:
        """The answer, made in a slot of its own."""
        done = self.completion
        self.started, done.timings.cached_tokens = time.perf_counter(), slot.common(done.prompt_ids)
        ids = generate(
            slot,
            done.prompt_ids,
            self.sampler,
            self.max_tokens,
            self.lookup,
            ends=self.ends,
            banned=self.banned,
            window=self.window,
            kind=self.kind,
        )
        return self._told(ids, lambda: "stop" if self.sampler.is_done else "length")

    def replay(self) -> Iterator[Piece]:
        """The answer as it is known: the same pieces, of which nothing is evaluated."""
        assert self.known
        ids, reason = self.known
        done, self.keep = self.completion, None
        done.from_cache, done.timings.cached_tokens = True, len(done.prompt_ids)
        yield from self._told(ids, lambda: reason)
        done.timings.prompt_seconds = done.timings.generate_seconds = 0.0

    def _told(self, ids: Iterable[int], reason: Callable[[], str]) -> Iterator[Piece]:
        """The pieces of tokens that come; `reason` is asked for if none of them ends the answer."""
        for id in ids:
            shown = self._push(id)
            if shown is None:
                break
            yield Piece(shown, id)
            if self.is_over:
                return
        else:
            self._end(reason())
        yield Piece(self._rest(), None)

    def submit(self, scheduler: Scheduler) -> Tokens:
        """The answer's sequence, made beside others; it is to be followed."""
        return scheduler.submit(
            self.completion.prompt_ids,
            self.sampler,
            self.max_tokens,
            ends=self.ends,
            lookup=self.lookup,
            banned=self.banned,
            adapter=self.adapter,
            window=self.window,
            kind=self.kind,
        )

    def follow(self, progress: Progress, scheduler: Scheduler) -> list[Piece]:
        """Take in what a step brought -> its pieces; raises what the sampler did."""
        done, sequence = self.completion, progress.sequence
        done.timings.cached_tokens = sequence.n_cached
        if sequence.error:
            raise sequence.error
        pieces = []
        for id in progress.ids:
            shown = self._push(id)
            if shown is None:
                break
            pieces.append(Piece(shown, id))
            if self.is_over:
                scheduler.cancel(sequence)
                return pieces
        if progress.finish_reason:
            self._end(progress.finish_reason)
            pieces.append(Piece(self._rest(), None))
        return pieces

    @property
    def is_over(self) -> bool:
        return self.completion.finish_reason != "cancelled"

    def _push(self, id: int) -> str | None:
        """The text that a token makes certain; None for one that ends the answer."""
        self._clock()
        done = self.completion
        self.made.append(id)
        if self.window:
            done.dropped_tokens = self.n_left_out + self.window.dropped
        if id in self.ends:
            self._end("stop")
            return None
        done.ids.append(id)
        shown, stopped = self.stops.push(self.text.push(id))
        done.text += shown
        if stopped:
            self._end("stop")
        return shown

    def _end(self, reason: str) -> None:
        if not self.is_over:
            self.completion.finish_reason = reason
            if self.keep:
                self.keep(self.made, reason)

    def _rest(self) -> str:
        """What was held back; nothing after a stop string."""
        rest, _ = self.stops.push(self.text.flush())
        rest += self.stops.flush()
        self.completion.text += rest
        return rest

    def _clock(self) -> None:
        timings, now = self.completion.timings, time.perf_counter()
        if not timings.generated_tokens:
            timings.prompt_seconds, self.started = now - self.started, now
        timings.generated_tokens += 1
        timings.generate_seconds = now - self.started
        if self.lookup:
            timings.drafted_tokens, timings.accepted_tokens = self.lookup.drafted, self.lookup.accepted
