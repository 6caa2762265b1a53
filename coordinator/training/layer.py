"""The predictor of one layer: its rank, the matrices, the threshold, and how good it is on tokens held out.

Tokens come in runs of 32, which are dealt at random: four fifths to train on, a tenth to choose rank and threshold by,
a tenth to report. Neighbours are alike, so tokens dealt one by one would make the report too good.

A token reads the predictor and the gate of each selected neuron; up and down follow only where that is open. So the
rank costs r * (hidden + neurons) weights and saves gates: the rank is the one with which a token reads the least at the
wished recall.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from warmfront.coordinator.training.low_rank import (
    LowRank,
    chunks,
    closed_form,
    descend,
    logit_units,
    moments_of,
    scores,
)
from warmfront.coordinator.training.neurons import Neurons, margins, masses

__all__ = ["LEAST_TOKENS", "RANKS", "LayerReport", "Wish", "fit_layer"]

RANKS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_RUN = 32
# Tokens of which a tenth is a few runs.
LEAST_TOKENS = 20 * _RUN
EPOCHS = 8
# Selected for each that fires: not worth an epoch.
_GOOD_ENOUGH = 1.02
Half = npt.NDArray[np.float16]
Progress = Callable[[float], None]


class Wish(NamedTuple):
    """What was asked for."""

    # None: by need.
    rank: int | None
    # By mass.
    recall: float
    # Share of the neurons that may be selected at most, however low that makes the recall.
    max_density: float | None


class LayerReport(NamedTuple):
    """How a layer's predictor does on tokens held out: shares from 0 to 1."""

    rank: int
    # Of the mass that fires, and of the neurons that fire, what is selected.
    recall_by_mass: float
    recall_by_count: float
    # Of all neurons, what is selected, and what fires.
    density: float
    fired: float
    # What a token reads to know which neurons fire, predictor and gates, against all gates.
    reads: float
    # Density in closed form, before the descent.
    density_before: float


class Tokens(NamedTuple):
    """Inputs, float16 [tokens, hidden], and float16 masses [tokens, neurons], scaled."""

    x: Tensor
    mass: Tensor


def fit_layer(
    neurons: Neurons, inputs: Half, wish: Wish, device: str, progress: Progress
) -> tuple[LowRank, LayerReport]:
    """The predictor of a layer from its `inputs` [tokens, hidden]: x as they are, threshold 0; as it will be stored.

    `progress` gets the part that is done, up to 1.
    """
    parts = _dealt(neurons, torch.from_numpy(inputs), device)
    train, choose, held = parts
    progress(0.3)
    moments = moments_of(neurons, train.x)
    widest = max(rank for rank in RANKS if rank <= max(min(neurons.gate.shape) // 2, RANKS[0]))
    whole = closed_form(moments, max(widest, wish.rank or 0))
    spread = ((moments.map @ moments.covariance) * moments.map).sum(1).sqrt()
    progress(0.4)
    ranks = [wish.rank] if wish.rank is not None else [rank for rank in RANKS if rank <= widest]
    true = torch.cat([margins(neurons, part) for part in chunks(choose.x)])
    found = [_candidate(whole.cut(rank), true, moments.mean, spread, choose, wish) for rank in ranks]
    allowed = [each for each in found if wish.max_density is None or each.density <= wish.max_density]
    best = min(allowed, key=lambda each: each.reads) if allowed else min(found, key=lambda each: each.density)
    before, fired = best.density, float((choose.mass > 0).float().mean())

    def after(epoch: int, made: LowRank) -> bool:
        nonlocal best
        tried = _measured(made, _all_scores(made, choose, moments.mean), choose.mass, wish)
        progress(0.5 + 0.5 * epoch / EPOCHS)
        if tried.density < best.density:
            best = tried
        return best.density > _GOOD_ENOUGH * fired

    if before > _GOOD_ENOUGH * fired:
        descend(best.low_rank, train.x, moments.mean, train.mass, EPOCHS, after)
    stored = _stored(best.low_rank, moments.mean)
    nothing = torch.zeros_like(moments.mean)
    threshold = _threshold(_all_scores(stored, choose, nothing), choose.mass, wish)
    stored = stored._replace(bias=stored.bias - threshold)
    report = _report(stored, _all_scores(stored, held, nothing) > 0, held.mass, before)
    progress(1)
    return stored, report


class _Candidate(NamedTuple):
    low_rank: LowRank
    density: float
    reads: float


def _dealt(neurons: Neurons, inputs: Tensor, device: str) -> list[Tokens]:
    """Three parts of the tokens, with their masses in units of the mean of those that fire."""
    runs = torch.split(inputs, _RUN)
    order = np.random.default_rng(0).permutation(len(runs))
    tenth = max(len(runs) // 10, 1)
    parts = []
    for some in (order[2 * tenth :], order[:tenth], order[tenth : 2 * tenth]):
        x = torch.cat([runs[i] for i in some]).to(device)
        # Half precision: the ratio of two masses matters, in three digits, and there are neurons times tokens of them.
        unit, kept = 0.0, []
        for part in chunks(x):
            mass = masses(neurons, part)
            unit = unit or max(float(mass.sum(dtype=torch.float64) / (mass > 0).sum().clamp(min=1)), 1e-30)
            kept.append((mass / unit).clamp_(max=60000).half().clamp_(min=1e-7).mul_(mass > 0))
        parts.append(Tokens(x, torch.cat(kept)))
    return parts


def _candidate(low_rank: LowRank, true: Tensor, mean: Tensor, spread: Tensor, choose: Tokens, wish: Wish) -> _Candidate:
    """The closed form of a rank as logits, measured; `true`: the margins of `choose`."""
    said = _all_scores(low_rank, choose, mean)
    units = logit_units((said - true).square().mean(0).sqrt(), spread)
    logits = LowRank(low_rank.fc1, low_rank.fc2 * units[:, None], low_rank.bias * units)
    return _measured(logits, said * units, choose.mass, wish)


def _measured(low_rank: LowRank, said: Tensor, mass: Tensor, wish: Wish) -> _Candidate:
    """`said`: its scores of the tokens with these masses."""
    density = float((said > _threshold(said, mass, wish._replace(max_density=None))).float().mean())
    low_rank = LowRank(*(values.clone() for values in low_rank))
    return _Candidate(low_rank, density, _reads(low_rank, density))


def _reads(low_rank: LowRank, density: float) -> float:
    (rank, hidden), neurons = low_rank.fc1.shape, len(low_rank.fc2)
    return rank * (hidden + neurons) / (hidden * neurons) + density


def _all_scores(low_rank: LowRank, tokens: Tokens, mean: Tensor) -> Tensor:
    return torch.cat([scores(low_rank, part, mean) for part in chunks(tokens.x)])


def _threshold(said: Tensor, mass: Tensor, wish: Wish) -> float:
    """The highest score above which lies the wished part of the mass, but no more neurons than may be selected."""
    fires = mass > 0
    scored, order = said[fires].sort(descending=True)
    if not len(scored):
        return float(said.max())
    gathered = mass[fires].double()[order].cumsum(0)
    last = int(torch.searchsorted(gathered, wish.recall * gathered[-1]).clamp(max=len(scored) - 1))
    threshold = float(torch.nextafter(scored[last], torch.tensor(-torch.inf, device=said.device)))
    if wish.max_density is not None and float((said > threshold).float().mean()) > wish.max_density:
        most = max(int(wish.max_density * said.numel()), 1)
        threshold = float(said.flatten().topk(most + 1).values[-1])
    return threshold


def _stored(low_rank: LowRank, mean: Tensor) -> LowRank:
    """The same for inputs as they are, its matrices rounded to float16 but still float32."""
    fc1, fc2 = low_rank.fc1, low_rank.fc2
    # So that neither leaves the range of float16: rows of fc1 have length one.
    length = fc1.norm(dim=1).clamp_(min=1e-12)
    fc1, fc2 = (fc1 / length[:, None]).half().float(), fc2 * length
    # Nor does a logit's unit matter.
    unit = fc2.abs().max().clamp_(min=1e-12)
    fc2 = (fc2 / unit).half().float()
    return LowRank(fc1, fc2, low_rank.bias / unit - fc2 @ (fc1 @ mean))


def _report(stored: LowRank, selected: Tensor, mass: Tensor, before: float) -> LayerReport:
    fires, total = mass > 0, float(mass.sum(dtype=torch.float64))
    hits, density = selected & fires, float(selected.float().mean())
    return LayerReport(
        rank=len(stored.fc1),
        recall_by_mass=float(mass.mul(hits).sum(dtype=torch.float64)) / total if total else 1.0,
        recall_by_count=int(hits.sum()) / max(int(fires.sum()), 1) if total else 1.0,
        density=density,
        fired=float(fires.float().mean()),
        reads=_reads(stored, density),
        density_before=before,
    )
