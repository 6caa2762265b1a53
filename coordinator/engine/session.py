"""Tokens in, logits out: what is asked of texts (`passes.py`), and the core of the one that has it.

With a core, which is of one text, what begins a text ends the one before: a job of an ended one raises UsageError.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.engine.passes import Batch, Passes
from warmfront.coordinator.engine.resolve import RunPlan
from warmfront.coordinator.scheduling.text import Text
from warmfront.coordinator.text.tokenizer import Tokenizer
from warmfront.shared.errors import UsageError
from warmfront.shared.machine.process import hold_interrupts
from warmfront.shared.model.store import PackedModel

if TYPE_CHECKING:
    from warmfront.coordinator.engine.text_core import TextCore

__all__ = ["Session"]

Floats = npt.NDArray[np.float32]
# Of how many decoded tokens one has its selection compared with the neurons that fire: that computes all of them.
_COMPARE_EVERY = 64


class Session(Passes):
    """Owns `model` and what runs it; made empty, then `start`ed once. `close` ends it at any point.

    `profiles`: `firing` and `feed_forward_inputs` can be asked for; such a session notes nothing in a trace.
    """

    def __init__(self, model: PackedModel, plan: RunPlan, *, profiles: bool = False) -> None:
        super().__init__(model, plan, profiles=profiles)
        self.tokenizer = Tokenizer(model)
        # To compare a selection all gates are read, which a cache of the file does not hold.
        self._compares = plan.config.measure and plan.config.ram_budget is None
        self._decoded = self._compare_at = 0
        self.core: TextCore | None = None  # of texts, with selectors that have one

    def start(self, say: Callable[[str], None], progress: Callable[[str, int, int], None]) -> None:
        """Start the workers and the team and wait until they have loaded."""
        self.runtime.start(say, progress)

    def open_core(self, say: Callable[[str], None]) -> None:
        """From now on texts have cores."""
        with hold_interrupts():
            from warmfront.coordinator.engine.text_core import TextCore

        self.core, self.single = TextCore(self.runtime, say), True

    def prefill(self, text: Text, ids: list[int]) -> tuple[Floats, int]:
        """Logits, float32 [vocab], after `ids`, valid until the next job; and how many of `ids` were computed for them.

        The rest was in the cache.
        """
        return self._fill(text, ids, len(ids) - 1)

    def hold(self, text: Text, ids: list[int]) -> None:
        """Have the text be `ids`, none or more, and nothing behind them; those that the cache lacks are computed."""
        self._fill(text, ids, len(ids))

    def _fill(self, text: Text, ids: list[int], most: int) -> tuple[Floats, int]:
        """Compute `ids`, but for `most` at their beginning that the cache holds: the logits after the last that was
        computed, and how many were."""
        with self.alone():
            known = self.recall(text, ids, most)
            self._read(text, ids, want_logits=True)
            logits = self.runtime.logits[0]
            if self.core is not None:
                logits = logits.copy()
                self._choose_core(text)
            return logits, len(ids) - known

    def recall(self, text: Text, ids: list[int], most: int) -> int:
        """Have the text be as many of the first `most` of `ids` as the cache holds; how many those are."""
        with self.alone():
            self.forget(text, text.clean)
            text.find(ids, most)
            known = text.known(ids, most)
            if self.core is not None:
                # What scores the neurons is the same whatever was in the cache.
                self.core.begin()
                known = min(known, len(ids) - self.core.unread(len(ids)))
            self.forget(text, known)
            return len(text)

    def _read(self, text: Text, ids: list[int], want_logits: bool) -> None:
        """Compute what of `ids` is not in the cache, the last tokens in a job that scores the neurons."""
        last = len(ids) - self.core.unread(len(ids)) if self.core is not None else len(ids)
        while (at := len(text)) < len(ids):
            end = min(at + self.runtime.max_tokens, last if at < last else len(ids))
            scores = self.core is not None and at >= last
            self.read(text, ids[at:end], want_logits=want_logits and end == len(ids), noted=scores)
            if scores and self.core is not None:
                self.core.learn(end - at, end)

    def step(self, text: Text, token: int) -> Floats:
        """Logits, float32 [vocab], after one token more of the text; valid until the next job."""
        logits: Floats = self.verify(text, [token])[0]
        return logits

    def watched_step(self, text: Text, token: int) -> tuple[Floats, Floats]:
        """As `step`, and what the feed-forward layers got for the token, after their norm: float32 [layers, hidden]."""
        (logits,) = self.decode([(text, [token])], capture=True)
        return logits[0], self.runtime.captured(1)[:, 0]

    def verify(self, text: Text, tokens: list[int]) -> Floats:
        """As `decode` of one text: float32 [len(tokens), vocab]."""
        return self.decode([(text, tokens)])[0]

    def decode(self, batch: Batch, *, capture: bool = False) -> list[Floats]:
        """Logits after each token of a batch, up to `runtime.batch` in all, of as many texts: float32 [tokens of the
        text, vocab] of each, valid until the next job. `capture`: of a single token the feed-forward inputs are kept.

        Of each text's tokens the first is its next, the others are a guess of what follows: of the text they are only
        once they are accepted. The logits are the same bit for bit as if the tokens came one by one, and each text
        alone; only those after the first token of a text if one of its keys or values is not finite.
        """
        with self.alone():
            for text, _ in batch:
                self._keep_core(text)
            ends = np.cumsum([len(tokens) for _, tokens in batch]).tolist()
            compares = self._serving and self._compares
            compare = compares and ends[-1] == 1 and self._decoded >= self._compare_at
            if compare:
                self._compare_at = self._decoded + _COMPARE_EVERY
            self._decoded += len(batch)
            self.run(batch, want_logits=True, decode=True, compare_selection=compare, capture=capture)
            # Of a text with such values the tokens share tiles of the cache, where 0 times infinity is NaN.
            bad = [
                len(tokens) > 1 and len(text) - 1 <= text.clean < len(text) + len(text.guesses)
                for text, tokens in batch
            ]
            if any(bad):
                first = [tokens[:1] if each else tokens for (_, tokens), each in zip(batch, bad, strict=True)]
                for text, _ in batch:
                    self.forget(text, len(text) - 1)
                return self.decode([(text, tokens) for (text, _), tokens in zip(batch, first, strict=True)])
            return [self.runtime.logits[end - len(tokens) : end] for (_, tokens), end in zip(batch, ends, strict=True)]

    def _keep_core(self, text: Text) -> None:
        """Where it is time for that, read the last tokens of the text again, and choose its core by them too."""
        # A text that is over must not make the one under way forget its last tokens.
        if self.core is None or text.over or len(text) < self.core.due:
            return
        ids = text.ids.copy()
        self.forget(text, len(ids) - self.core.unread(len(ids)))
        self._read(text, ids, want_logits=False)
        self._choose_core(text)

    def core_scores(self, ids: list[int]) -> npt.NDArray[np.float64]:
        """What the tokens of a text of its own, one job at most, give the neurons: float64 [layers, neurons]."""
        assert self.core is not None
        with self.text() as text:
            self.core.begin()
            self.forget(text, 0)
            self._read(text, ids, want_logits=False)
            return self.core.scores.copy()

    def measure_core(self, ids: list[int]) -> None:
        """Find out from `ids`, as many as fit, which layers lose so much by a core that they are computed whole.

        Measured with tokens behind those that tell the core: of their own neurons a core has more than of later ones.
        """
        assert self.core is not None
        most = min(self.core.window, self.plan.context, len(ids))
        with self.text() as text:
            self.prefill(text, ids[: most - most // 8])
            self.read(text, ids[most - most // 8 : most], want_logits=False)
            with hold_interrupts():
                self.core.measure_layers(text)
        self.reset()

    def _choose_core(self, text: Text) -> None:
        with self._lock, hold_interrupts():
            assert self.core is not None
            self.core.choose(text)

    def accept(self, text: Text) -> None:
        """The next guess of the last pass is the text's next token: its logits count, and the cache holds it."""
        with self.alone(), hold_interrupts():
            self.check_under_way(text)
            text.accepted += 1
            text.ids.append(text.guesses.pop(0))
            self._decoded += 1
            if self.is_last(text):
                self.runtime.observe(text.row + text.accepted)

    def selected(self) -> npt.NDArray[np.uint32]:
        """The neurons that the selector chose for the last single token: [layers, groups], bit i = neuron i.

        Where nothing is predicted, those that were computed whole.
        """
        return self.runtime.ownership.asked() if self.plan.selector.masked else self.runtime.ownership.fired()

    def firing(self, ids: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Which neurons each of up to 288 tokens fires, computed anew from an empty cache: [layers, tokens, neurons].

        Only of a session that profiles, without a GPU.
        """
        self.check_open()
        if not self.runtime.profiles:
            raise UsageError("this engine does not note which neurons fire: open it for profiling")
        with self.text() as text:
            self.forget(text, 0)
            self.read(text, list(ids), want_logits=False)
            return self.runtime.fired(len(ids))

    def feed_forward_inputs(self, ids: Sequence[int]) -> Floats:
        """What the feed-forward layers get, after their norm, for each token: float32 [layers, len(ids), hidden].

        Only with the selector lowbit, or of a session that profiles. What exceeds the context is computed as a text of
        its own.
        """
        self.check_open()
        if self.runtime.lowbit is None and not self.runtime.profiles:
            raise UsageError(
                "the feed-forward inputs are kept for the selector lowbit only: load with selector='lowbit'"
            )
        max_tokens = min(self.runtime.max_tokens, self.plan.context)
        inputs: list[Floats] = []
        with self.text() as text:
            for at in range(0, len(ids), max_tokens):
                chunk = list(ids[at : at + max_tokens])
                if not inputs or len(text) + len(chunk) > self.plan.context:
                    self.forget(text, 0)
                self.run([(text, chunk)], capture=True)
                inputs.append(self.runtime.captured(len(chunk)))
        return np.concatenate(inputs, axis=1)

    def reset(self) -> None:
        """Forget the core, and what the KV cache holds of texts that are over: the next prompt is computed from its
        first token."""
        with self.alone():
            self.pages.clear()
            if self._latest is not None and (self._latest.left or self.single):
                with self.text() as text:
                    self.forget(text, 0)
            if self.core is not None:
                self.core.begin()
