"""Traces: which neurons a model fired, recorded or synthetic.  Format: see `simulate_balancing.py`."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.shared.errors import UsageError

Floats = npt.NDArray[np.float64]
GROUP = 32


class Trace(NamedTuple):
    """What a model fired."""

    name: str
    counts: npt.NDArray[np.uint8]  # [tokens, layers, groups]: neurons of the group that fired
    profile: Floats  # [layers, groups]: the mean of the same over the profile's tokens
    row_bytes: int  # of one weight row
    switches: list[int]  # tokens at which the topic changes
    other: Floats | None = None  # as `profile`, of a topic that is not in the trace, where one is known

    @property
    def neuron_bytes(self) -> int:
        """Gate row, up row, down row."""
        return 3 * self.row_bytes


def popcounts(fired: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    """Bits set of each word."""
    table = np.array([number.bit_count() for number in range(256)], np.uint8)
    return np.asarray(table[np.ascontiguousarray(fired)[..., None].view(np.uint8)].sum(-1, dtype=np.uint8))


def load_trace(path: Path, profile: Path | None) -> Trace:
    """Raises UsageError if a file is not a trace."""

    def read(path: Path) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
        try:
            with np.load(path) as file:
                about = json.loads(str(file["about"]))
                counts = popcounts(file["fired"].astype(np.uint32, casting="safe"))
            if counts.ndim != 3 or not isinstance(about["row_bytes"], int):
                raise ValueError("of another shape")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is not a trace of firing neurons ({error})") from None
        return counts, about

    counts, about = read(path)
    switches = [int(token) for token in about.get("switches", [])]
    if profile is not None:
        sample = read(profile)[0]
    else:
        skipped = len(counts) // 10
        sample, counts = counts[:skipped], counts[skipped:]
        switches = [token - skipped for token in switches if token > skipped]
    if sample.shape[1:] != counts.shape[1:] or not len(sample) or not len(counts):
        raise UsageError(f"{path} has too few tokens, or its profile is of another model")
    return Trace(str(about.get("name", path.stem)), counts, sample.mean(0), about["row_bytes"], switches)


def clusters(points: Floats, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """The cluster of each of `points` [n, d]: k-means, ten rounds."""
    centres = points[rng.choice(len(points), count, replace=False)]
    for _ in range(10):
        near = ((points[:, None] - centres[None]) ** 2).sum(-1).argmin(1)
        centres = np.stack([points[near == k].mean(0) if (near == k).any() else centres[k] for k in range(count)])
    return np.asarray(near)


def synthesize(
    *,
    topics: int = 4,
    tokens: int = 2000,
    layers: int = 40,
    groups: int = 432,
    hidden: int = 5120,
    active: float = 0.10,
    rank: int = 63,
    seed: int = 0,
) -> Trace:
    """A synthetic trace, in which topics follow each other.

    Neuron i fires where u_i . z is above its threshold. z of a token is normally distributed around its topic's centre,
    and the thresholds are such that the rates over all topics follow a power law. The profile is exact, of all topics.
    """
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from synthetic.shape import firing_rates

    rng = np.random.default_rng(seed)
    neurons = groups * GROUP
    rates = firing_rates(neurons, active)
    topic = np.arange(tokens) * topics // tokens
    centres = np.zeros((topics, rank), np.float32)
    if topics > 1:
        centres[np.arange(topics), np.arange(topics)] = rank**0.5
    counts = np.empty((tokens, layers, groups), np.uint8)
    profile = np.empty((layers, groups))
    for layer in range(layers):
        u = rng.standard_normal((neurons, rank)).astype(np.float32) / rank**0.5
        size, wanted = torch.from_numpy(np.linalg.norm(u, axis=1)), torch.from_numpy(rng.permutation(rates))
        mean = torch.from_numpy(u @ centres.T)

        def firing(threshold: Any, mean: Any = mean, size: Any = size) -> Any:
            return torch.special.ndtr(((mean - threshold[:, None]) / size[:, None]).double())

        low, high = torch.full((neurons,), -12.0), torch.full((neurons,), 24.0)
        for _ in range(40):
            middle = (low + high) / 2
            over = firing(middle).mean(1) > wanted
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        by_topic = firing(low).numpy()
        order = packed(by_topic, rng)
        z = rng.standard_normal((tokens, rank)).astype(np.float32) + centres[topic]
        fired = z @ u[order].T > low.numpy()[order]
        counts[:, layer] = fired.reshape(tokens, groups, GROUP).sum(2, dtype=np.uint8)
        profile[layer] = by_topic.mean(1)[order].reshape(groups, GROUP).sum(1)
    switches = [int(token) for token in np.flatnonzero(np.diff(topic)) + 1]
    return Trace(f"synthetic, {topics} topics", counts, profile, 2 * hidden, switches)


def synthesize_experts(
    *,
    topics: int = 4,
    tokens: int = 2000,
    layers: int = 48,
    experts: int = 128,
    used: int = 8,
    expert_bytes: int = 2_654_208,
    share: float = 0.8,
    seed: int = 0,
) -> Trace:
    """A synthetic trace of a mixture of experts, each of which is one group: a token chooses `used` in each layer.

    In each topic another tenth of the experts gets `share` of the choices, or with a tenth of it as many as the others:
    then no topic differs from another.
    """
    rng = np.random.default_rng(seed)
    hot = max(1, experts // 10)
    # So many of the hot ones and of the others that their share of the choices is the wished one.
    uses = np.r_[np.full(hot, used * share / hot), np.full(experts - hot, used * (1 - share) / (experts - hot))]
    uses = np.minimum(uses, 1.0)
    by_topic = np.stack([[rng.permutation(uses) for _ in range(layers)] for _ in range(topics + 1)])
    topic = np.arange(tokens) * topics // tokens
    counts = np.zeros((tokens, layers, experts), np.uint8)
    for token in range(tokens):
        for layer in range(layers):
            counts[token, layer, choice(by_topic[topic[token], layer], used, rng)] = GROUP
    switches = [int(token) for token in np.flatnonzero(np.diff(topic)) + 1]
    profile, other = GROUP * by_topic[:topics].mean(0), GROUP * by_topic[topics]
    # A group has 32 neurons of three rows.
    name = f"{experts} experts, {topics} topics, {share:.0%} on a tenth"
    return Trace(name, counts, profile, expert_bytes // (3 * GROUP), switches, other)


def choice(chances: Floats, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """`count` different ones, each as often as its chance says, of which `count` is the sum: systematic sampling."""
    order = rng.permutation(len(chances))
    ends = np.cumsum(chances[order])
    marks = (np.arange(count) + rng.random()) * ends[-1] / count
    return np.asarray(order[np.minimum(np.searchsorted(ends, marks, side="right"), len(ends) - 1)])


def packed(by_topic: Floats, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Order of neurons with rates `by_topic` [neurons, topics]: by cluster and rate, cut into groups, these by rate."""
    rate = by_topic.mean(1)
    roots = np.sqrt(by_topic)
    directions = roots / np.linalg.norm(roots, axis=1, keepdims=True)
    cluster = (
        clusters(directions, min(2 * by_topic.shape[1], 16), rng) if by_topic.shape[1] > 1 else np.zeros(len(rate))
    )
    groups = np.lexsort((-rate, cluster)).reshape(-1, GROUP)
    return np.asarray(groups[np.argsort(-rate[groups].sum(1), kind="stable")].ravel())
