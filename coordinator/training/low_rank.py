"""How far each neuron is open, from a few numbers: fc2 . (fc1 . x) + bias, in closed form and then by descent.

Closed form: of all matrices of rank r, the one whose error in the margins on the recorded inputs, each neuron's in
units of its own spread, is the least. It is the truncated SVD of the gates, seen through the inputs' covariance; fc1's
outputs are uncorrelated and of variance one. A margin that is no linear function of x (drelu) is regressed first.

Descent: logistic regression of "fires" from there. An error on a neuron that fires weighs what that neuron weighs, one
on a neuron that does not a constant, so the logit orders neurons by the mass that each is expected to bring for one
that is read in vain: which threshold is best for a recall by mass does not depend on the neuron.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from warmfront.coordinator.training.neurons import Neurons, margins

__all__ = ["LowRank", "Moments", "chunks", "closed_form", "descend", "logit_units", "moments_of", "scores"]

# Tokens that are widened at a time.
CHUNK = 1024
# Of a neuron's spread: an error below it is taken for that, so that no logit is beyond any doubt.
_LEAST_ERROR = 0.05
# A Gaussian error of one is an error of the logit of 1 / 1.7.
_PROBIT = 1.7
# The rate is in units of each matrix' own numbers (docs/log.md).
_BATCH, _RATE = 512, 0.08


class LowRank(NamedTuple):
    """fc1 [r, hidden], fc2 [neurons, r], bias [neurons]."""

    fc1: Tensor
    fc2: Tensor
    bias: Tensor

    def cut(self, rank: int) -> "LowRank":
        """The first `rank` of its numbers: they are in the order of what they explain."""
        return LowRank(self.fc1[:rank], self.fc2[:, :rank], self.bias)


class Moments(NamedTuple):
    """Mean [hidden] and covariance [hidden, hidden] of the inputs, and the linear map [neurons, hidden] and mean
    [neurons] of the margins."""

    mean: Tensor
    covariance: Tensor
    map: Tensor
    level: Tensor


def chunks(x: Tensor) -> Iterator[Tensor]:
    """Rows of `x`, a few at a time, as float32."""
    return (part.float() for part in torch.split(x, CHUNK))


def moments_of(neurons: Neurons, x: Tensor) -> Moments:
    """The moments of `x`, float16 [tokens, hidden]."""
    tokens, hidden = x.shape
    mean = torch.stack([part.sum(0) for part in chunks(x)]).sum(0) / tokens
    covariance = x.new_zeros((hidden, hidden), dtype=torch.float32)
    bent = neurons.how.activation == "drelu"
    cross = x.new_zeros((len(neurons.gate), hidden) if bent else (0, 0), dtype=torch.float32)
    level = neurons.gate @ mean + neurons.gate_bias - neurons.how.closed
    if bent:
        level = torch.stack([margins(neurons, part).sum(0) for part in chunks(x)]).sum(0) / tokens
    for part in chunks(x):
        part -= mean
        covariance.addmm_(part.T, part)
        if bent:
            cross.addmm_((margins(neurons, part + mean) - level).T, part)
    covariance /= tokens
    # Few tokens leave directions without any variance: a share of the diagonal stands for what they do not show.
    share = hidden / (hidden + 10 * tokens)
    covariance = (1 - share) * covariance + share * torch.diag(covariance.diagonal())
    covariance.diagonal().add_(1e-6 * covariance.diagonal().mean())
    linear = torch.linalg.solve(covariance, (cross / tokens).T, left=True).T if bent else neurons.gate
    return Moments(mean, covariance, linear, level)


def closed_form(moments: Moments, rank: int) -> LowRank:
    """The closed form of a rank, and of each lower one (`LowRank.cut`)."""
    root = torch.linalg.cholesky(moments.covariance)
    through = moments.map @ root
    spread = through.norm(dim=1, keepdim=True).clamp_(min=1e-12)
    scaled = through / spread
    _, vectors = torch.linalg.eigh(scaled.T @ scaled)
    basis = vectors.flip(1)[:, :rank]
    fc1 = torch.linalg.solve_triangular(root.T, basis, upper=True).T.contiguous()
    return LowRank(fc1, through @ basis, moments.level)


def scores(low_rank: LowRank, x: Tensor, mean: Tensor) -> Tensor:
    """The scores of float32 `x` [tokens, hidden]: float32 [tokens, neurons]."""
    return torch.addmm(low_rank.bias, (x - mean) @ low_rank.fc1.T, low_rank.fc2.T)


def logit_units(errors: Tensor, spread: Tensor) -> Tensor:
    """What makes logits of scores, by their `errors` and the margins' `spread`: all [neurons], the last two standard
    deviations."""
    return _PROBIT / torch.maximum(errors, _LEAST_ERROR * spread).clamp_(min=1e-12)


def descend(
    start: LowRank,
    x: Tensor,
    mean: Tensor,
    mass: Tensor,
    epochs: int,
    after: Callable[[int, LowRank], bool],
) -> None:
    """Descend from `start` on float16 `x` [tokens, hidden] and `mass` [tokens, neurons], zero where nothing fires.

    `after` is called behind each epoch with their number and the predictor, and returns whether to go on.
    """
    fires = mass > 0
    typical = float(mass.sum(dtype=torch.float64) / fires.sum().clamp(min=1))
    # Deja Vu's: as many times less for a neuron that does not fire as there are more of them.
    quiet = float(fires.float().mean())
    fc1, fc2, bias = (values.clone() for values in start)
    rates = [_RATE * float(values.square().mean().sqrt()) for values in (fc1, fc2, fc2)]
    groups = [{"params": [values], "lr": rate} for values, rate in zip((fc1, fc2, bias), rates, strict=True)]
    descent = torch.optim.Adam(groups, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(0)
    steps = -(-len(x) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(descent, steps * epochs)
    for epoch in range(1, epochs + 1):
        for rows in torch.split(torch.randperm(len(x), generator=generator).to(x.device), _BATCH):
            part = x[rows].float().sub_(mean)
            weigh = mass[rows].float()
            open_ = weigh > 0
            weigh = torch.where(open_, (weigh / typical).clamp_(max=10), quiet)
            inner = part @ fc1.T
            # The gradient of the weighed cross-entropy by the logits.
            error = torch.addmm(bias, inner, fc2.T).sigmoid_().sub_(open_.float()).mul_(weigh).div_(len(rows))
            fc1.grad, fc2.grad, bias.grad = (error @ fc2).T @ part, error.T @ inner, error.sum(0)
            descent.step()
            schedule.step()
        if not after(epoch, LowRank(fc1, fc2, bias)):
            return
