"""An answer as its tokens come: how each is chosen, its text, and when the answer ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.text.constraint import Constraint
from warmfront.coordinator.text.sampling import Sampler, token_logprobs
from warmfront.coordinator.text.stop_strings import StopText
from warmfront.coordinator.text.tokenizer import Tokenizer
from warmfront.shared.config import Sampling, whole_number
from warmfront.shared.errors import UsageError

__all__ = ["Piece", "Reply", "Wishes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What is asked of an answer: see `Engine.generate`. Raises UsageError for what cannot be."""

    max_new_tokens: int = 128
    sampling: Sampling | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, Sampling | None):
            raise UsageError(f"sampling is {self.sampling!r}: give a Sampling, such as Sampling(temperature=0.8)")
        whole_number("max_new_tokens", self.max_new_tokens, 1)
        if self.logprobs is not None:
            whole_number("logprobs", self.logprobs, 0)
        StopText(self.stop)


class Piece(NamedTuple):
    """A token of an answer: the fields of `stats.Token`."""

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Reply:
    """One answer to the prompt `ids`; `context`: tokens of both that fit."""

    def __init__(self, ids: Sequence[int], tokenizer: Tokenizer, context: int, wishes: Wishes) -> None:
        self._sampler, self._seen, self._wishes = Sampler(wishes.sampling or Sampling()), list(ids), wishes
        self._stream, self._stops = tokenizer.stream(ids), StopText(wishes.stop)
        self._bytes_of = tokenizer.bytes_of
        self._ends = frozenset[int]() if wishes.ignore_eos else tokenizer.end_ids
        self.most = min(wishes.max_new_tokens, context - len(ids))  # tokens that may come
        self.count = 0
        self.finish_reason = ""  # "stop" or "length" once the answer is complete

    @property
    def token(self) -> int:
        """The last token that was chosen."""
        return self._seen[-1]

    def choose(self, logits: npt.NDArray[np.float32]) -> Piece | None:
        """Choose the next token by float32 [vocab] `logits`: it and the text that it completes; None for the end of the
        turn, unless that brings text that was held back."""
        wishes, constraint = self._wishes, self._wishes.constraint
        token = self._sampler.pick(logits if constraint is None else constraint.allowed(logits), self._seen)
        chances = () if wishes.logprobs is None else token_logprobs(logits, token, wishes.logprobs)
        self._seen.append(token)
        self.count += 1
        complete = constraint is not None and constraint.push(token)
        ended = token in self._ends
        last = ended or complete or self.count == self.most
        text = self._stream.rest() if ended else self._stream.push(token)
        piece = self._stops.push(text)
        if not text and not self._bytes_of(token):  # a special token, which no stop string spans
            piece += self._stops.rest()
        if last and not ended:
            piece += self._stops.push(self._stream.rest())
        if last or self._stops.found:
            piece += self._stops.rest()
            self.finish_reason = "stop" if ended or complete or self._stops.found else "length"
        return Piece(token, piece, *chances) if piece or not ended else None
