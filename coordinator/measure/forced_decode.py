"""Forced decoding of a piece of text: tokens are computed as decoding does it, whatever the model would have said.

Prefill is dense, so only what comes behind it tells what a selector costs. Of each token: its loss, how the
distribution behind it compares with the dense model's, and how many neurons were selected; of some tokens also which of
the neurons that matter were. That is measured on the inputs that the run itself has, so it tells of the selector alone;
what errors add up to over the layers and tokens is in the losses.
"""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.engine.session import Session
from warmfront.coordinator.selectors.calibration import masses
from warmfront.coordinator.selectors.divergence import log_softmax
from warmfront.shared.model.branches import bounds_of, parts_of
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.spec import ModelSpec
from warmfront.shared.model.store import PackedModel

__all__ = ["TOP", "Comparison", "Measured", "Reference", "compare", "decode_piece", "neurons_of", "reference_of"]

# Of the dense model's distribution so many tokens are kept by themselves, the rest as one: 8 KB a token.
TOP = 1024

Doubles = npt.NDArray[np.float64]


class Reference(NamedTuple):
    """The dense model's distributions behind n tokens: the most probable tokens in order, and the rest."""

    # int32 [n, TOP], or the whole vocabulary where that is less.
    tokens: npt.NDArray[np.int32]
    # float32, likewise: log probabilities.
    logprobs: npt.NDArray[np.float32]
    # float64 [n]: the probability of all others together.
    rest: Doubles


class Comparison(NamedTuple):
    """A distribution against that of the reference: KL(reference || other), and whether the most probable is the same.

    The divergence is that of the reference's TOP most probable tokens and of the event that it is none of them: at most
    the true one (data processing inequality), and on SmolLM2 98 % of it.
    """

    divergence: float
    agrees: bool


class Measured(NamedTuple):
    """What the forced decode of a piece has shown; n tokens were decoded and have one behind them."""

    # float64 [n]: -log p of the token that follows.
    losses: Doubles
    # float64 [n], bool [n]; against itself zeros and True.
    divergences: Doubles
    agreements: npt.NDArray[np.bool_]
    # int64 [layers]: neurons selected, summed over the tokens.
    kept: npt.NDArray[np.int64]
    # How many tokens were looked at, and sums over them, float64 [layers, 4]: neurons that fire, those of them that
    # were selected, what all weigh and what the selected weigh (|h_i| * ||down_i||). Of a mixture only neurons of the
    # experts that a token uses, all of which count as if they had the same weight.
    looked_at: int
    found: Doubles
    # Of decoding alone.
    seconds: float


def reference_of(logprobs: Doubles) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], float]:
    """A row of each field of `Reference`, of float64 [vocab] log probabilities."""
    size = min(TOP, len(logprobs))
    top = np.argpartition(logprobs, -size)[-size:]
    top = top[np.argsort(-logprobs[top], kind="stable")]
    rest = np.exp(logprobs)
    rest[top] = 0
    return top.astype(np.int32), logprobs[top].astype(np.float32), float(rest.sum())


def compare(reference: Reference, row: int, logprobs: Doubles) -> Comparison:
    """`logprobs`, float64 [vocab], against a row of the reference."""
    tokens, expected = reference.tokens[row], reference.logprobs[row].astype(np.float64)
    others = np.exp(logprobs)
    others[tokens] = 0
    divergence = float(np.exp(expected) @ (expected - logprobs[tokens]))
    if (rest := float(reference.rest[row])) > 0:
        divergence += rest * float(np.log(rest / max(float(others.sum()), np.finfo(np.float64).tiny)))
    return Comparison(divergence, bool(tokens[0] == logprobs.argmax()))


def neurons_of(spec: ModelSpec, groups: int) -> npt.NDArray[np.uint32]:
    """uint32 [layers, groups]: the bits that are neurons, and not what pads the last group of a branch."""
    words = np.zeros((spec.layers, groups), np.uint32)
    for layer in range(spec.layers):
        at = 0
        for part in parts_of(spec, layer):
            whole, rest = divmod(part.neurons, GROUP)
            words[layer, at : at + whole] = 0xFFFFFFFF
            if rest:
                words[layer, at + whole] = (1 << rest) - 1
            at += whole + (rest > 0)
    return words


def decode_piece(
    session: Session,
    ids: Sequence[int],
    forced_from: int,
    looked_at: int,
    reference: Reference | None,
    progress: Callable[[int], None],
) -> tuple[Measured, Reference]:
    """Prefill the first `forced_from` tokens of `ids`, and decode the rest but for the last, which is only predicted.

    `looked_at`: of so many tokens, evenly spread, which neurons matter is compared with the selection. `reference`:
    what to compare with; None: this run is the reference, and its distributions are returned.
    `progress` gets the tokens decoded so far.
    """
    model = session.model
    count = len(ids) - forced_from - 1
    marks = set(np.linspace(0, count - 1, min(looked_at, count)).astype(int).tolist())
    valid = neurons_of(model.spec, model.layout.groups)
    kept = np.zeros(model.spec.layers, np.int64)
    losses, rows, inputs, words, uses = [], [], [], [], []
    compared: list[Comparison] = []
    seconds = 0.0
    with session.text() as text:
        session.forget(text, 0)
        session.prefill(text, list(ids[:forced_from]))
        for at, token in enumerate(ids[forced_from:-1]):
            started = time.monotonic()
            if at in marks:
                logits, x = session.watched_step(text, token)
            else:
                logits = session.step(text, token)
            seconds += time.monotonic() - started
            selected = session.selected() & valid
            kept += np.bitwise_count(selected).sum(1, dtype=np.int64)
            if at in marks:
                inputs.append(x.copy())
                words.append(selected)
                uses.append(session.runtime.board.uses[0].copy())
            logprobs = log_softmax(logits)
            losses.append(-logprobs[ids[forced_from + at + 1]])
            if reference is None:
                rows.append(reference_of(logprobs))
                compared.append(Comparison(0.0, True))
            else:
                compared.append(compare(reference, at, logprobs))
            progress(at + 1)
    if reference is None:
        reference = Reference(*(np.stack(column) for column in zip(*rows, strict=True)))
    found = np.zeros((model.spec.layers, 4))
    if inputs:
        found = _found(model, np.stack(inputs), np.stack(words), np.stack(uses))
    measured = Measured(
        np.array(losses),
        np.array([each.divergence for each in compared]),
        np.array([each.agrees for each in compared]),
        kept,
        len(inputs),
        found,
        seconds,
    )
    return measured, reference


def _found(
    model: PackedModel,
    inputs: npt.NDArray[np.float32],
    words: npt.NDArray[np.uint32],
    uses: npt.NDArray[np.uint8],
) -> Doubles:
    """Of `inputs` [tokens, layers, hidden], selected `words` [tokens, layers, groups] and, of a mixture, the branches
    that tokens use, `uses` [tokens, layers, branches]: see `Measured.found`."""
    found = np.zeros((model.spec.layers, 4))
    parts = list(pairwise(bounds_of(model.spec).tolist()))
    for layer in range(model.spec.layers):
        for branch, (first, end) in enumerate(parts):
            users = uses[:, layer, branch] != 0 if len(parts) > 1 else np.ones(len(inputs), np.bool_)
            if first == end or not users.any():
                continue
            mass = masses(model, layer, np.ascontiguousarray(inputs[users, layer]), first, end)
            bits = np.ascontiguousarray(words[users, layer, first:end]).view(np.uint8)
            selected = np.unpackbits(bits, axis=1, bitorder="little").astype(bool)
            fires = mass > 0
            found[layer] += (
                np.count_nonzero(fires),
                np.count_nonzero(fires & selected),
                mass.sum(dtype=np.float64),
                mass[selected].sum(dtype=np.float64),
            )
    return found
