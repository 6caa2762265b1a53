"""A warmfront engine as a model of lm-eval, which calls it `warmfront` once this module is imported.

A continuation is decoded token by token, as an answer is, with the context kept in the KV cache for the others that
follow it. Computed as a prompt, which is dense, it would tell nothing of what a selector loses.
"""

import atexit
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.text.sampling import token_logprobs
from warmfront.shared.config import EngineConfig, Sampling
from warmfront.shared.errors import UsageError

__all__ = ["WarmfrontLM"]


@register_model("warmfront")
class WarmfrontLM(LM):  # type: ignore[misc, unused-ignore]
    """One model; its engine runs until the process ends, or until `close`.

    Texts are computed one at a time, by what the engine's configuration says: `batch_size`, `max_batch_size` and
    `device`, which lm-eval gives to every model, change nothing.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **overrides: Any,
    ) -> None:
        """`pretrained`: as `warmfront generate --model` takes it; `overrides`: fields of `EngineConfig`.

        Raises a WarmfrontError for a model that cannot be run, UsageError for an unknown field.
        """
        super().__init__()
        known = {field.name for field in fields(EngineConfig)}
        if unknown := overrides.keys() - known:
            raise UsageError(f"--model_args {min(unknown)}: there are pretrained and {', '.join(sorted(known))}")
        # What begins like a number is a number for lm-eval.
        overrides |= {name: str(overrides[name]) for name in ("predictor", "plan") if name in overrides}
        self.engine = Engine.load(str(pretrained), say=tqdm.write, **overrides)
        atexit.register(self.engine.close)
        self._tokenizer = self.engine.tokenizer

    def close(self) -> None:
        """End the engine."""
        atexit.unregister(self.engine.close)
        self.engine.close()

    @property
    def tokenizer_name(self) -> str:
        """By which lm-eval tells apart what it caches."""
        return self.engine.model.spec.name

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt for an answer to the turns; without `add_generation_prompt` the last of them is the answer's
        beginning."""
        if add_generation_prompt:
            return self._tokenizer.render_chat(chat_history)
        return self._tokenizer.render_chat(chat_history[:-1]) + chat_history[-1]["content"]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the log probability, and whether it is what is most probable throughout."""
        pairs = [self._encoded(*request.args) for request in requests]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        # Equal contexts one after the other, and those that begin alike.
        order = sorted(range(len(pairs)), key=lambda i: pairs[i])
        for i in tqdm(order, disable=disable_tqdm, desc="log-likelihoods"):
            answers[i] = self._scored(*pairs[i])
            self.cache_hook.add_partial("loglikelihood", requests[i].args, answers[i])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log probability of each text as a whole, in windows of the context."""
        answers = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm, desc="rolling"):
            ids = self._tokenizer.encode(text, with_start=False)
            windows = get_rolling_token_windows(ids, self._prefix, self.engine.plan.context, 1)
            answers.append(sum(self._scored(*make_disjoint_window(window))[0] for window in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answers[-1])
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each (prompt, settings), up to its stop strings or the end of the turn."""
        answers = []
        for prompt, settings in tqdm([request.args for request in requests], disable=disable_tqdm, desc="answers"):
            answers.append("".join(self._answer(prompt, settings)))
            self.cache_hook.add_partial("generate_until", (prompt, settings), answers[-1])
        return answers

    def _answer(self, prompt: str, settings: Mapping[str, Any]) -> Iterator[str]:
        wishes = normalize_gen_kwargs(dict(settings))
        most = min(wishes["max_gen_toks"], self.engine.plan.context - 1)
        sampling = {name: wishes[name] for name in ("temperature", "top_k", "top_p", "min_p") if name in wishes}
        # Of a prompt that is too long the end.
        ids = self._tokenizer.encode(prompt)[most - self.engine.plan.context :]
        stop = [text for text in wishes["until"] if text]
        tokens = self.engine.generate(ids, max_new_tokens=most, sampling=Sampling(**sampling), stop=stop)
        return (token.text for token in tokens)

    @property
    def _prefix(self) -> int:
        """What stands before a text without context: the token that begins a text, else one that ends it."""
        first = self.engine.model.text.get("bos_id")
        return min(self._tokenizer.end_ids) if first is None else int(first)

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Their ids; the two are encoded together, and the space between them is the continuation's."""
        if not context:
            return [self._prefix], self._tokenizer.encode(continuation, with_start=False)
        end = len(context.rstrip())
        whole = self._tokenizer.encode(context + continuation)
        before = self._tokenizer.encode(context[:end])
        return before or [self._prefix], whole[len(before) :]

    def _scored(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """As `loglikelihood`; of a text that is longer than the KV cache the end."""
        read = [*context, *continuation][:-1][-self.engine.plan.context :]
        start = max(len(read) - len(continuation), 0)
        session, total, greedy = self.engine.session, 0.0, True
        with session.text() as text:
            session.hold(text, read[:start])
            for token, follows in zip(read[start:], continuation[-(len(read) - start) :], strict=True):
                chance, ((best, _),) = token_logprobs(session.step(text, token), follows, 1)
                total, greedy = total + chance, greedy and best == follows
            # What was decoded is no part of a prompt that begins with it.
            session.forget(text, start)
        return total, greedy
