"""The Python API: load a model, generate tokens, read what it cost.

    with Engine.load("smollm2-135m") as engine:
        for token in engine.generate("The lighthouse keeper", max_new_tokens=32):
            print(token.text, end="")

An engine owns its worker processes, its team of threads and the board between them; `close` ends them all. Several
answers may be under way, each computed when its iterator is asked; they share the KV cache, which holds `parallel`
texts of `context` tokens. With a core, which is of one text, what begins a text (`generate`, `decode_ids`, ...) ends
the one before, which then raises UsageError. Threads wait for each other's jobs. A process that was forked has no use
of it.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.engine.load import load
from warmfront.coordinator.engine.session import Session
from warmfront.coordinator.engine.speculation import Acceptance, PassCosts, Speculation
from warmfront.coordinator.engine.stats import Statistics, Stats, Token
from warmfront.coordinator.models.default_model import DEFAULT_MODEL
from warmfront.coordinator.scheduling.text import Text
from warmfront.coordinator.text.constraint import Constraint
from warmfront.coordinator.text.reply import Reply, Wishes
from warmfront.shared.config import EngineConfig, Sampling, whole_number
from warmfront.shared.errors import UsageError

if TYPE_CHECKING:
    from warmfront.coordinator.balancing.ownership import Ownership

__all__ = ["Engine"]


def _quiet(_message: str) -> None:
    pass


def _no_progress(_what: str, _done: int, _total: int) -> None:
    pass


class Engine:
    """A loaded model and everything that runs it: made by `Engine.load`, ended by `close` or a with block.

    `session` is the level below: token ids in, logits out. `statistics` tells what the workers have done, `stats` what
    the last answer cost, `plan` how the model is run.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.model, self.plan = session, session.model, session.plan
        self.tokenizer = session.tokenizer
        self.statistics, self.stats = Statistics(session), Stats()
        self._pass_costs, self._acceptance = PassCosts(), Acceptance()

    @classmethod
    def load(
        cls,
        model: str = DEFAULT_MODEL,
        *,
        say: Callable[[str], None] = _quiet,
        progress: Callable[[str, int, int], None] = _no_progress,
        **overrides: Any,
    ) -> Self:
        """Load `model` (a GGUF file, a Hugging Face folder, a name of the hub or "smollm2-135m") and start its workers.

        `overrides` are the fields of `EngineConfig`. `say` gets a line for each thing worth knowing, `progress` (what,
        bytes done, bytes in all). Raises a WarmfrontError; then nothing is left running.
        """
        started = time.monotonic()
        engine = cls(load(model, EngineConfig(**overrides), say, progress))
        engine.stats.load_s = time.monotonic() - started
        return engine

    @property
    def ownership(self) -> "Ownership":
        """Who holds and who computes which neurons."""
        self.session.check_open()
        return self.session.runtime.ownership

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        logprobs: int | None = None,
        constraint: Constraint | None = None,
    ) -> Iterator[Token]:
        """Yield the tokens that follow `prompt` (text or token ids) as they are computed.

        Ends after `max_new_tokens`, at an end-of-turn token (unless `ignore_eos`), before a stop string, or when the
        context is full; `stats.finish_reason` says which. The end-of-turn token itself is yielded only if it brings
        text that was held back. With `logprobs` each token comes with its own log probability and those of that many
        most probable ones, by the model's distribution before sampling. A `constraint` says which tokens may come.
        Raises UsageError for a wrong request or a prompt that does not fit the context, WorkerError if a worker dies.
        """
        wishes = Wishes(
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            constraint=constraint,
        )
        ids = self.prompt_ids(prompt)
        reply = Reply(ids, self.tokenizer, self.plan.context, wishes)
        session, stats = self.session, self._new_stats(ids)
        guessing = self.guessing(ids) if self.plan.speculates else None
        text = session.begin()
        try:
            with session.alone():  # the logits are the session's: another text would write over them
                piece = reply.choose(self._prefill(text, ids))
            first_at = time.monotonic()
            self.statistics.begin_answer()
            while True:
                stats.new_tokens, stats.finish_reason = reply.count, reply.finish_reason or stats.finish_reason
                stats.decode_s = time.monotonic() - first_at
                if piece is not None:
                    yield Token(*piece)
                if reply.finish_reason:
                    return
                with session.alone():
                    if guessing is None:
                        logits = session.step(text, reply.token)
                    else:
                        logits = guessing.step(text, reply.token, reply.most - reply.count)
                        stats.drafted, stats.accepted = guessing.drafted, guessing.accepted
                    piece = reply.choose(logits)
                self.statistics.add_token()
        finally:
            session.leave(text)

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids of a prompt, checked against vocabulary and context."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
            raise UsageError(f"the prompt is of type {type(prompt).__name__}: give text or token ids")
        else:
            ids = [whole_number("a token id", token) for token in prompt]
        if not ids:
            raise UsageError("the prompt is empty: give at least one token")
        self.session.check_ids(ids)
        if len(ids) >= self.plan.context:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, and the context holds {self.plan.context}, the answer included: "
                "shorten it or pass a larger --ctx"
            )
        return [int(token) for token in ids]

    def decode_ids(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` greedy tokens that follow `ids` after the first, past any end of the text: for measurements."""
        ids, count = self.prompt_ids(ids), whole_number("count", count, 0)
        stats = self._new_stats(ids)
        stats.new_tokens = count + 1
        with self.session.text() as text:
            self.session.check_room(len(ids), count)
            logits, answer = self._prefill(text, ids), []
            before = self.statistics.cache()
            started = time.monotonic()
            for _ in range(count):
                answer.append(int(np.argmax(logits)))
                logits = self.session.step(text, answer[-1])
            stats.decode_s = time.monotonic() - started
            after = self.statistics.cache()
        stats.cache = after.since(before) if after is not None and before is not None else None
        return answer

    def forced_logits(self, ids: Sequence[int], prefill: int) -> Iterator[npt.NDArray[np.float32]]:
        """Teacher forcing: prefill the first `prefill` tokens, at least one, then decode the rest one at a time.

        Yields float32 [vocab] logits after the prefill and after each further token: how quality is measured, since
        prefill alone is dense and never takes the sparse path.
        """
        ids, prefill = self.prompt_ids(ids), whole_number("prefill", prefill)
        if not 1 <= prefill <= len(ids):
            raise UsageError(f"a prefill of {prefill} of {len(ids)} tokens: there are no logits before the first")
        text = self.session.begin()
        try:
            with self.session.alone():
                self.session.forget(text, 0)
                logits = self._prefill(text, ids[:prefill]).copy()
            yield logits
            for token in ids[prefill:]:
                with self.session.alone():
                    logits = self.session.step(text, token).copy()
                yield logits
        finally:
            self.session.leave(text)

    def step(self, token: int) -> npt.NDArray[np.float32]:
        """Logits, float32 [vocab], after one token more behind what the cache holds; valid until the next job.

        Raises UsageError for a token outside the vocabulary and when the context is full.
        """
        with self.session.text() as text:
            return self.session.step(text, token)

    def reset(self) -> None:
        """Forget the KV cache: the next prompt is computed from its first token."""
        self.session.reset()

    def _new_stats(self, ids: Sequence[int]) -> Stats:
        self.stats = Stats(load_s=self.stats.load_s, prompt_tokens=len(ids))
        return self.stats

    def guessing(self, ids: list[int]) -> Speculation:
        """What guesses the tokens of an answer to the prompt `ids`."""
        return Speculation(self.session, ids, self._pass_costs, self._acceptance)

    def _prefill(self, text: Text, ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits after `ids`, and what they cost."""
        started = time.monotonic()
        logits, self.stats.prefilled = self.session.prefill(text, ids)
        self.stats.prefill_s = time.monotonic() - started
        return logits

    def close(self) -> None:
        """End the workers and the team, after a job that another thread has under way; may be called twice."""
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
