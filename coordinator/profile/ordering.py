"""Which neurons share a group: those that fire together, and among them those that fire equally often.

A group of 32 is owned, stored and moved as one, so a hot neuron among cold ones wastes 31 places. Neurons that fire in
the same segments of a text are found by k-means. A neuron's vector is the square roots of the shares of its firing that
fall into each segment: distances are then Hellinger's, and frequent and rare neurons alike lie on the unit sphere. Each
cluster is cut into groups from its hottest neuron on; the remainders of all clusters form further groups, by hotness.
The hottest groups come first. A quarter of the groups then makes 0.88 of a topic's firing, by hotness alone 0.85, in
the original order 0.36 (docs/log.md).
"""

import numpy as np
import numpy.typing as npt

from warmfront.shared.model.bundle import GROUP

__all__ = ["order_groups", "order_neurons"]

_CLUSTERS = 8  # or as many as there are segments
_ROUNDS = 20  # at most: assignments settle sooner

Counts = npt.NDArray[np.uint16]
Permutation = npt.NDArray[np.int64]


def order_neurons(counts: Counts, ffn: int) -> Permutation:
    """int64 [neurons]: the neuron that comes to each place of a layer; places from `ffn` on are padding and stay.

    `counts`: [segments, neurons], how often each fired.
    """
    hotness = counts[:, :ffn].sum(0, dtype=np.int64)
    clusters = _clusters(counts[:, :ffn], hotness)
    by_hotness = np.argsort(-hotness, kind="stable")
    by_hotness = by_hotness[hotness[by_hotness] > 0]
    groups, taken = [], np.zeros(ffn, bool)
    for cluster in range(clusters.max(initial=0) + 1):
        neurons = by_hotness[clusters[by_hotness] == cluster]
        whole = neurons[: len(neurons) // GROUP * GROUP]
        taken[whole] = True
        groups += list(whole.reshape(-1, GROUP))
    rest = np.flatnonzero(~taken)
    rest = rest[np.argsort(-hotness[rest], kind="stable")]
    whole, last = np.split(rest, [len(rest) // GROUP * GROUP])
    groups += list(whole.reshape(-1, GROUP))
    groups.sort(key=lambda group: -int(hotness[group].sum()))
    padding = np.arange(ffn, counts.shape[1])
    return np.concatenate((*groups, last, padding), dtype=np.int64)


def order_groups(counts: Counts, ffn: int) -> Permutation:
    """As `order_neurons`, for neurons that cannot leave their groups: int64 [neurons], whole groups moved."""
    groups = counts.shape[1] // GROUP
    hotness = counts.sum(0, dtype=np.int64).reshape(groups, GROUP).sum(1)
    order = np.arange(groups)
    whole = ffn // GROUP
    order[:whole] = np.argsort(-hotness[:whole], kind="stable")
    return (order[:, None] * GROUP + np.arange(GROUP)).ravel()


def _clusters(counts: Counts, weights: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """int64 [neurons], the cluster of each: k-means over the columns of `counts`, each weighted by how often it fired.

    The first centre is the heaviest neuron, each further one that with the largest weight times distance from those
    before. That is deterministic, and wastes no cluster on a neuron that fired once.
    """
    vectors = np.sqrt(counts / np.maximum(weights, 1)).T
    chosen = [int(np.argmax(weights))]
    while len(chosen) < min(_CLUSTERS, len(counts)):
        nearness = (vectors @ vectors[chosen].T).max(1)
        chosen.append(int(np.argmax(weights * (1 - nearness))))
    centres = vectors[chosen]
    clusters = np.full(len(vectors), -1)
    for _ in range(_ROUNDS):
        before, clusters = clusters, np.argmax(vectors @ centres.T, axis=1)
        if np.array_equal(before, clusters):
            break
        is_in = clusters[:, None] == np.arange(len(centres))
        sums = (is_in * weights[:, None]).T @ vectors
        # Back to the unit sphere, where the largest dot product is the smallest distance; an empty cluster stays.
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(lengths > 0, sums / np.maximum(lengths, 1e-300), centres)
    return clusters
