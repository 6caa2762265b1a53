"""The core of the text under way (`selectors/core.py`): when it is chosen, when it is chosen anew, when it is given up.

    behind a prompt        its last tokens (as many as a job takes) score the neurons; the core is the prompt's
    a prompt that does not tell, for it is short or its halves have different cores
                           the core of the kind of text to which it is nearest, if `warmfront cluster` has found kinds;
                           else everything is computed until the text is long enough, and then it is read again
    every `refresh` tokens the tokens since are read again as a prompt, computed whole, and score; older tokens count
                           for less as new ones come. What they had left in the KV cache is replaced by what is exact
    some layers            lose far more by their core than others (of SmolLM2 the first): they are computed whole
    with `max_loss`        the last tokens are computed with the core and whole: if the distributions differ by more,
                           everything is computed until the core is chosen the next time

All of this follows from the text alone, so that the same prompt gives the same answer.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.decode.team_config import Place
from warmfront.coordinator.engine.runtime import Runtime
from warmfront.coordinator.packing.arrays import load_arrays
from warmfront.coordinator.packing.beside import beside, keep
from warmfront.coordinator.scheduling.text import Text
from warmfront.coordinator.selectors.clusters import load_clusters
from warmfront.coordinator.selectors.core import bits_of, kept_norms, largest, overlap
from warmfront.coordinator.selectors.core_scores import add_norm_scores, add_positive_scores
from warmfront.coordinator.selectors.divergence import divergence
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.panels import BATCH
from warmfront.shared.wire.board import ALL_NEURONS

__all__ = ["CoreFacts", "TextCore"]

Floats = npt.NDArray[np.float32]
# Under so many tokens the core still changes (CoreInfer: by 6 % with 64 more of them at 200 to 300).
_LEAST_TOKENS = 100
# Tokens behind which an undecided text is looked at again.
_AGAIN = 64
# The halves of a text that are as unlike as that (`overlap`) have no common core.
_LEAST_OVERLAP = 0.3
# Tokens that the drift is measured with.
_PROBED = BATCH
# A layer is computed whole if its core alone loses so many times what that of the median layer does, and so many nats.
_OUTLIER, _LEAST_LOSS = 4.0, 0.01
_NEVER = sys.maxsize


class CoreFacts(NamedTuple):
    """What became of the cores of a session's texts."""

    # How often one was chosen; how often it was given up for its drift.
    chosen: int
    given_up: int
    # Of the last: how alike the cores of its tokens' halves were, and what it was measured to lose, in nats; None: it
    # was not measured.
    overlap: float | None
    drift: float | None


class TextCore:
    """Makes the workers compute the core of a text. One for a session, which tells it what was read."""

    def __init__(self, runtime: Runtime, say: Callable[[str], None]) -> None:
        self._runtime, self._model, config = runtime, runtime.model, runtime.plan.config
        self._keep, self._refresh, self._max_loss = config.keep, config.refresh, config.max_loss
        self._by_norm = config.core_score == "norm"
        self._norms: Floats = kept_norms(self._model, say) if self._by_norm else np.zeros((0, 0), np.float32)
        shape = self._model.spec.layers, self._model.layout.groups * GROUP
        self.scores: npt.NDArray[np.float64] = np.zeros(shape)
        self._clusters = load_clusters(self._model, config.core_score, shape)
        # Tokens that the scores are of; the position behind the last one; where the core is to be chosen again.
        self._tokens = self._end = 0
        self.due = _LEAST_TOKENS
        self._overlap: float | None = None
        # bool [layers]: those that are computed whole; None until that is measured.
        self.whole: npt.NDArray[np.bool_] | None = None
        self._say = say
        kept = load_arrays(self._kept).get("losses")
        if kept is not None and kept.shape == shape[:1]:
            self._leave_out(kept)
        self.facts = CoreFacts(0, 0, None, None)

    @property
    def window(self) -> int:
        """The most tokens that are read at once, and that count."""
        return self._runtime.max_tokens

    def unread(self, text: int) -> int:
        """How many tokens at the end of a text of so many are to be read again before the core is chosen."""
        return min(text - self._end, self.window)

    def begin(self) -> None:
        """A new text: nothing is known of it, and everything is computed until its core is chosen."""
        # A token of its prompt that is a job of its own is decoded: by the core of the text before it would be lossy.
        self._runtime.select(None)
        self.scores[:], self._tokens, self._end, self._overlap, self.due = 0, 0, 0, None, _LEAST_TOKENS

    def learn(self, tokens: int, end: int) -> None:
        """The last job was the prompt of `tokens` tokens that ends at position `end`."""
        self._end = end
        if tokens == 1:  # which is decoded, and not noted
            return
        if self._tokens:
            new = self._scored(0, tokens)
            self._compare(self.scores, new)
            kept = max(0.0, min(1.0, (self.window - tokens) / self._tokens))
            self.scores *= kept
            self.scores += new
            self._tokens = round(kept * self._tokens) + tokens
            return
        first, second = self._scored(0, tokens // 2), self._scored(tokens // 2, tokens)
        self._compare(first, second)
        self.scores[:], self._tokens = first + second, tokens

    def _scored(self, first: int, end: int) -> npt.NDArray[np.float64]:
        """What these tokens of the last job give, float64 [layers, neurons]."""
        scores = np.zeros_like(self.scores)
        for layer, noted in enumerate(self._runtime.board.noted[:, first:end]):
            if self._by_norm:
                add_norm_scores(noted, self._norms[layer], scores[layer])
            else:
                add_positive_scores(noted, scores[layer])
        return scores

    def _compare(self, first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> None:
        neurons = self._model.layout.ffn
        self._overlap = overlap(*(largest(scores, self._keep, neurons) for scores in (first, second)))

    def _largest(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        core = largest(scores, self._keep, self._model.layout.ffn)
        if self.whole is not None:
            core[self.whole] = True
        return core

    @property
    def _kept(self) -> Path:
        """Where the layers' losses are kept, by all that they depend on: a predictor makes up for a part of them."""
        model, plan = self._model, self._runtime.plan
        predictors = [plan.config.bits, plan.recall, model.predictor.path.name if model.predictor is not None else ""]
        facts = [plan.selector.name, plan.config.core_score, self._keep, model.spec.activation, *predictors]
        return beside(model, f"core-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}", ".npz")

    def measure_layers(self, text: Text) -> None:
        """Find out, behind the prompt `text`, what each layer loses by its core, and which are to be computed whole."""
        core, losses = bits_of(self._largest(self.scores)), np.zeros(len(self.scores))
        every = np.full_like(core, ALL_NEURONS)
        reference = self._logits(None, text)
        for layer in range(len(core)):
            words = every.copy()
            words[layer] = core[layer]
            losses[layer] = divergence(reference, self._logits(words, text))
        self._leave_out(losses)
        self.facts = CoreFacts(0, 0, None, None)
        keep(self._kept, "the losses of the layers", self._say, losses=losses)

    def _leave_out(self, losses: npt.NDArray[np.float64]) -> None:
        self.whole = losses > max(_LEAST_LOSS, _OUTLIER * float(np.median(losses)))

    def choose(self, text: Text) -> None:
        """Decide what is computed behind `text`, all of which is in the cache."""
        every = self._end + (self._refresh or _NEVER)
        scores, self.due = self.scores, every
        if not self._settled:
            self.due = min(every, self._end + max(_AGAIN, _LEAST_TOKENS - self._tokens))
            if self._clusters is None or not self._tokens:
                self._runtime.select(None)
                return
            scores = self._clusters.nearest(scores, self._model.layout.ffn)
        core = self._largest(scores)
        drift, lost = None, False
        if self._max_loss is not None and len(text) > 1:
            drift = self._drift(core, text)
            lost = not drift <= self._max_loss  # NaN is no little loss
        self._runtime.select(None if lost else bits_of(core))
        chosen, given_up = self.facts.chosen + (not lost), self.facts.given_up + lost
        self.facts = CoreFacts(chosen, given_up, self._overlap, drift)

    @property
    def _settled(self) -> bool:
        """Whether the tokens tell the core."""
        if self._tokens >= self.window:
            return True
        return self._tokens >= _LEAST_TOKENS and (self._overlap or 0.0) >= _LEAST_OVERLAP

    def _drift(self, core: npt.NDArray[np.bool_], text: Text) -> float:
        """What computing only the core changes in what follows the last tokens of `text`."""
        lossy = self._logits(bits_of(core), text)
        # All neurons last: the cache is as exact then as it was.
        return divergence(self._logits(None, text), lossy)

    def _logits(self, words: npt.NDArray[np.uint32] | None, text: Text) -> Floats:
        """Those of the last tokens of `text`, decoded again with only these neurons: float32 [tokens, vocab]."""
        self._runtime.select(words)
        rows = []
        for first in range(max(1, len(text) - _PROBED), len(text), self._runtime.batch):
            tokens = text.ids[first : min(first + self._runtime.batch, len(text))]
            places = [Place(first + i, text.table) for i in range(len(tokens))]
            self._runtime.run(tokens, places, True, decode=True)
            rows.append(self._runtime.logits[: len(tokens)].copy())
        return np.concatenate(rows)
