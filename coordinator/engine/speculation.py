"""Speculation without a draft model: several tokens guessed by n-grams, verified in one pass.

The next tokens are guessed (`coordinator/text/ngrams.py`) and computed with the one that is known, as a batch, whose
logits are those of the tokens one by one, bit for bit (`Session.verify`). The sampler then picks token by token as
ever; as long as it picks what was guessed, the next logits are there already. So the answer is the same with and
without, greedy or sampled, with the same seed the same tokens: a guess decides only how soon they come.

Whether a guess is worth a pass is measured, not assumed:

    how often guesses come true   by the number of tokens that agree before them; also counted for guesses that were
                                  not computed, so that free text costs nothing and a copy is noticed at once
    what a pass costs             one token, and each one more, on this machine with this model

A pass takes as many guessed tokens as promise the most tokens a second, and none unless that is more than without.
"""

import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.engine.session import Session
from warmfront.coordinator.scheduling.text import Text
from warmfront.coordinator.text.ngrams import NgramIndex
from warmfront.shared.model.panels import BATCH

__all__ = ["Acceptance", "PassCosts", "Speculation"]

Floats = npt.NDArray[np.float32]
# Weight of a new measurement of a pass, in the moving averages.
_NEW = 0.1
# Guessed tokens of the first passes, as long as it is not known what one costs.
_FIRST = 3
# After so many passes of one token a batch counts half as dear: what made it dear may be over.
_PATIENCE = 128
# Guesses that the rate of those that came true looks back on, and how many its prior of one half counts for.
_WINDOW, _PRIOR = 64.0, 2.0


@dataclass(slots=True)
class PassCosts:
    """Seconds of a pass of several tokens: those of one, and more for each further one. 0: not measured yet."""

    first_s: float = 0.0
    further_s: float = 0.0
    singles: int = 0  # passes of one token since the last of several

    def note(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens took so long."""
        if tokens == 1:
            self.first_s += (seconds - self.first_s) * (_NEW if self.first_s else 1.0)
            self.singles += 1
            if self.singles % _PATIENCE == 0:
                self.further_s /= 2
            return
        further_s = max(0.0, seconds - self.first_s) / (tokens - 1)
        known = self.further_s and self.singles < _PATIENCE
        self.further_s += (further_s - self.further_s) * (_NEW if known else 1.0)
        self.singles = 0

    def seconds(self, tokens: int) -> float:
        """What a pass of so many tokens will take."""
        return self.first_s + (tokens - 1) * self.further_s


def _class_of(length: int) -> int:
    """Guesses behind 3, 4 to 7, 8 to 15, ... agreeing tokens are alike."""
    return min(length, 32).bit_length()


@dataclass(slots=True)
class Acceptance:
    """How often the next guessed token came true lately, by how many tokens agree before it."""

    # By class: guesses that came true, and guesses, of a window that fades.
    hits: list[float] = field(default_factory=lambda: [_PRIOR / 2] * 8)
    tries: list[float] = field(default_factory=lambda: [_PRIOR] * 8)

    def note(self, length: int, true: bool) -> None:
        """A guess behind `length` agreeing tokens came true, or did not."""
        kind = _class_of(length)
        self.hits[kind] += true - self.hits[kind] / _WINDOW
        self.tries[kind] += 1 - self.tries[kind] / _WINDOW

    def rate(self, length: int) -> float:
        """The chance of the next."""
        kind = _class_of(length)
        return self.hits[kind] / self.tries[kind]


def worth(costs: PassCosts, acceptance: Acceptance, length: int, most: int) -> int:
    """How many of up to `most` guessed tokens behind `length` agreeing ones to compute: most tokens a second."""
    if not costs.first_s:
        return 0
    best, best_rate = 0, 1 / costs.first_s
    tokens = chance = 1.0
    for count in range(1, min(most, BATCH - 1 if costs.further_s else _FIRST) + 1):
        chance *= acceptance.rate(length + count - 1)
        tokens += chance
        rate = tokens / costs.seconds(1 + count)
        if rate > best_rate:
            best, best_rate = count, rate
    return best


class Speculation:
    """The passes of one answer; `costs` and `acceptance` outlive it."""

    def __init__(self, session: Session, prompt: list[int], costs: PassCosts, acceptance: Acceptance) -> None:
        self._session, self._costs, self._acceptance = session, costs, acceptance
        self._index = NgramIndex(prompt)
        # What may come next, behind how many agreeing tokens, and the logits of those that were computed.
        self._guess: list[int] = []
        self._length = 0
        self._rows: list[Floats] = []
        self.drafted = self.accepted = 0

    def passed(self, token: int) -> None:
        """`token` has come in a pass without guesses."""
        self._index.push(token)
        self._guess, self._rows = [], []

    def step(self, text: Text, token: int, most: int) -> Floats:
        """As `Session.step`: logits, float32 [vocab], after `token`; valid until the next one that makes a pass.

        `most`: tokens that may yet follow, at least 1.
        """
        true = bool(self._guess) and self._guess[0] == token
        if self._guess:
            self._acceptance.note(self._length, true)
        self._index.push(token)
        # Another text's job has written over the rows.
        if not self._session.is_last(text):
            self._rows = []
        if true and self._rows:
            self.accepted += 1
            self._guess.pop(0)
            self._length += 1
            self._session.accept(text)
            return self._rows.pop(0)
        self._guess, self._length = self._index.guess(BATCH)
        count = worth(self._costs, self._acceptance, self._length, min(most - 1, len(self._guess)))
        began = time.perf_counter()
        if count == 0:
            logits, self._rows = self._session.step(text, token), []
        else:
            logits, *self._rows = self._session.verify(text, [token, *self._guess[:count]])
        self._costs.note(1 + count, time.perf_counter() - began)
        self.drafted += count
        return logits
