"""`warmfront eval`: what selectors cost in quality, by forced decode, against the dense model of the same weights.

Texts are cut into pieces of at most a context. Of each the first tokens are prefilled, the others come one by one, as
when an answer is made, and all but the last are followed by a token whose probability counts. The dense model (all
neurons, the KV cache's usual type) goes first; what it says is kept compactly, and the others are compared with that.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.engine.load import sample_ids
from warmfront.coordinator.engine.resolve import resolve, resolve_devices
from warmfront.coordinator.measure.evaluation_report import DENSE, Row, as_object
from warmfront.coordinator.measure.forced_decode import Measured, Reference, decode_piece, neurons_of
from warmfront.coordinator.measure.kept_progress import Kept, Pieces, kept_for
from warmfront.coordinator.measure.selector_wishes import overrides_of
from warmfront.shared.config import THREADING, EngineConfig
from warmfront.shared.errors import ResourceError, UsageError

__all__ = ["Span", "cut", "evaluate"]

# Tokens of a piece, of a model that holds so many.
_CONTEXT = 512
# What the reference takes on the disk is 8 KB a token: 1 GB at most.
_MOST_TOKENS = 1 << 17
# So many tokens of so many pieces have their selection compared with what matters, in all layers: more would tell the
# same shares, and each piece reads all neurons once.
_LOOKED_AT, _PIECES_LOOKED_AT = 64, 4
# Tokens that are decoded to tell what all will take.
_TRIAL = 8
# Fields of EngineConfig that change the speed of a run, but not what it computes.
_SPEED_ONLY = (*THREADING, "tuning", "speculate", "measure", "verify", "trace", "slow")
Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


class Span(NamedTuple):
    """Which tokens count: `context` tokens to a piece, None: 512 or what the model holds; of each the first
    `forced_from` are prefilled; at most `tokens` in all."""

    context: int | None = None
    forced_from: int = 64
    tokens: int | None = None


class _Run(NamedTuple):
    """One way of running the model; `settings` are all that its numbers depend on."""

    label: str
    overrides: Mapping[str, Any]
    settings: Mapping[str, Any]


def evaluate(
    model: str,
    texts: Sequence[tuple[str, str]],
    wishes: Sequence[str],
    overrides: Mapping[str, Any],
    span: Span,
    say: Say,
    progress: Progress,
    counted: Progress,
) -> dict[str, Any]:
    """Evaluate the selectors `wishes` (`selector_wishes.py`) and return the object that `--json` prints.

    `texts`: names and texts; without any the built-in one. `overrides`: of `EngineConfig`, for all runs. `progress`
    gets bytes, `counted` tokens. What is computed is kept until all is: the same call goes on after an interruption.
    Raises UsageError for a selector or a span that the model or the texts cannot have.
    """
    overrides = {**overrides, "context": span.context}
    dense = overrides | {"selector": "all", "kv": "auto", "look_ahead": False}
    runs = [_run(DENSE, dense), *(_run(wish, overrides | overrides_of(wish)) for wish in dict.fromkeys(wishes))]
    with contextlib.ExitStack() as stack:
        with Engine.load(model, say=say, progress=progress, **dense) as engine:
            same = _same_as_dense(engine, runs)
            pieces = _pieces(engine, [text for _, text in texts], span, say)
            facts = _facts(engine, model, [name for name, _ in texts], pieces, span)
            kept = stack.enter_context(kept_for(engine.model.path, pieces, _settings_of(engine, runs[0], span)))
            course = _Course(kept, pieces, span.forced_from, [run for run in runs if run.label not in same])
            course.begin(engine, say)
            measured = {DENSE: course.run(engine, runs[0], counted)}
        for run in course.runs[1:]:
            if course.missing(run):
                with Engine.load(model, say=say, progress=progress, **run.overrides) as engine:
                    course.run(engine, run, counted)
            measured[run.label] = course.kept_of(run)
        measured |= dict.fromkeys(same, measured[DENSE])
        rows = [Row.of(run.label, measured[run.label], measured[DENSE], facts["neurons"]) for run in runs]
    return as_object(facts, rows)


def _run(label: str, overrides: Mapping[str, Any]) -> _Run:
    fields = asdict(EngineConfig(**overrides))
    return _Run(label, overrides, {name: value for name, value in fields.items() if name not in _SPEED_ONLY})


def _quiet(_line: str) -> None:
    pass


def _same_as_dense(engine: Engine, runs: Sequence[_Run]) -> list[str]:
    """The labels of runs that compute what the dense one does; raises UsageError for one that the model cannot have."""
    same = []
    for run in runs[1:]:
        config = EngineConfig(**run.overrides)
        plan = resolve(config, resolve_devices(config, _quiet), engine.model, _quiet)
        if (str(plan.selector), plan.cache_kind) == (str(engine.plan.selector), engine.plan.cache_kind):
            same.append(run.label)
    return same


def _settings_of(engine: Engine, dense: _Run, span: Span) -> dict[str, Any]:
    model = engine.model
    # Whatever its path is, the predictor's packed file is named by its content.
    predictor = model.predictor.path.name if model.predictor is not None else None
    facts = {"forced_from": span.forced_from, "order": model.order, "act": model.spec.activation, "by": predictor}
    return {**dense.settings, **facts}


def _pieces(engine: Engine, texts: Sequence[str], span: Span, say: Say) -> Pieces:
    tokenizer = engine.tokenizer
    if texts:
        start, ids = tokenizer.encode(""), [tokenizer.encode(text) for text in texts]
    else:
        say("no --text: the built-in text, on which lowbit is calibrated too; give your own for a judgement")
        start, ids = [], [sample_ids(engine.session)]
    most = min(span.tokens or _MOST_TOKENS, _MOST_TOKENS)
    if most != span.tokens and sum(map(len, ids)) > most:
        say(f"the texts have {sum(map(len, ids)):,} tokens: the first {most:,} are read")
    context = span.context or min(_CONTEXT, engine.plan.context)
    if context < span.forced_from + 2:
        raise UsageError(
            f"pieces of {context} tokens, {span.forced_from} of which are prefilled, leave none to decode: pass a "
            "smaller --forced-from or a larger --ctx"
        )
    pieces = cut(ids, start, context, span.forced_from, most)
    if not pieces:
        raise UsageError(
            f"{min(most, sum(map(len, ids)))} tokens of text are read, and of each the first {span.forced_from} are "
            "prefilled: give more, or pass a smaller --forced-from"
        )
    return pieces


def cut(
    texts: Sequence[Sequence[int]], start: Sequence[int], context: int, forced_from: int, most: int
) -> list[list[int]]:
    """Pieces of at most `context` tokens, `most` in all; shorter ones of which nothing would be decoded are left out.

    `start`: what every text begins with, such as a token of its own for that; so does every piece then.
    """
    pieces, step = [], context - len(start)
    for ids in texts:
        body = ids[len(start) :] if list(ids[: len(start)]) == list(start) else ids
        for at in range(0, len(body), step):
            piece = [*start, *body[at : at + step]][:most]
            if len(piece) >= forced_from + 2:
                pieces.append(piece)
                most -= len(piece)
    return pieces


def _facts(engine: Engine, model: str, names: Sequence[str], pieces: Pieces, span: Span) -> dict[str, Any]:
    spec = engine.model.spec
    return {
        "model": model,
        "name": spec.name,
        "dtype": engine.plan.config.dtype,
        "activation": spec.activation,
        "sparse": spec.sparse,
        "neurons": np.bitwise_count(neurons_of(spec, engine.model.layout.groups)).sum(1).tolist(),
        "texts": list(names) or ["built-in"],
        "pieces": len(pieces),
        "forced_from": span.forced_from,
        "tokens": sum(len(piece) - span.forced_from - 1 for piece in pieces),
    }


class _Course:
    """The runs over the pieces: what is kept of them, and what is to be done."""

    def __init__(self, kept: Kept, pieces: Pieces, forced_from: int, runs: Sequence[_Run]) -> None:
        self._kept, self._pieces, self._forced_from, self.runs = kept, pieces, forced_from, runs
        self._total = len(runs) * sum(map(self._decoded, pieces))
        self._done = sum(self._decoded(pieces[at]) for run in runs for at in self._there(run))

    def _decoded(self, piece: Sequence[int]) -> int:
        return len(piece) - self._forced_from - 1

    def _there(self, run: _Run) -> Iterator[int]:
        return (at for at in range(len(self._pieces)) if self._has(run, at))

    def _has(self, run: _Run, piece: int) -> bool:
        # The reference alone counts half: without what it measured itself it is computed again.
        has = self._kept.measured(run.settings, piece) is not None
        return has and (run.label != DENSE or self._kept.reference(piece) is not None)

    def begin(self, engine: Engine, say: Say) -> None:
        """Say what is left to do, and how long it will take by the speed of a few tokens."""
        if self._done:
            say(f"going on after {self._done:,} of {self._total:,} tokens, which an earlier run has decoded")
        if self._done == self._total:
            return
        trial = self._pieces[0][: self._forced_from + 2 + _TRIAL]
        times: list[float] = [time.monotonic()]
        decode_piece(engine.session, trial, self._forced_from, 0, None, lambda _done: times.append(time.monotonic()))
        # The first one waited for the prefill.
        seconds = (times[-1] - times[1]) / (len(times) - 2) if len(times) > 2 else times[1] - times[0]
        left = self._total - self._done
        say(
            f"decoding {left:,} tokens one by one ({len(self.runs)} runs): about {_duration(seconds * left)}, by the "
            f"{seconds * 1000:.1f} ms that one takes now"
        )

    def missing(self, run: _Run) -> bool:
        """Whether some piece is still to be computed."""
        return len(list(self._there(run))) < len(self._pieces)

    def kept_of(self, run: _Run) -> list[Measured]:
        """What the run has measured, piece by piece."""
        found = [self._kept.measured(run.settings, at) for at in range(len(self._pieces))]
        return [measured for measured in found if measured is not None]

    def run(self, engine: Engine, run: _Run, counted: Progress) -> list[Measured]:
        """Compute the pieces that are missing."""
        number = len(self._pieces)
        looked = set(np.linspace(0, number - 1, min(_PIECES_LOOKED_AT, number)).astype(int).tolist())
        for at, piece in enumerate(self._pieces):
            if self._has(run, at):
                continue
            expected = None if run.label == DENSE else self._reference(at)
            measured, reference = decode_piece(
                engine.session,
                piece,
                self._forced_from,
                _LOOKED_AT if at in looked else 0,
                expected,
                lambda done: counted("decoding", self._done + done, self._total),
            )
            if run.label == DENSE:
                self._kept.keep_reference(at, reference)
            self._kept.keep(run.settings, at, measured)
            self._done += self._decoded(piece)
        return self.kept_of(run)

    def _reference(self, piece: int) -> Reference:
        if (reference := self._kept.reference(piece)) is None:
            raise ResourceError("what the dense model said is not in the cache any more: evaluate again")
        return reference


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
