"""Kinds of text and the neurons that each uses most (CoreInfer: similarity-guided), for prompts that do not tell.

Texts are alike if their cores in one layer, two thirds of the way up, are. Clusters of such cores come from k-means; of
each the mean scores of its texts are kept beside the packed model, so that its core can be taken for any share.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.packing.arrays import load_arrays, save_arrays
from warmfront.coordinator.packing.beside import beside
from warmfront.coordinator.selectors.core import largest
from warmfront.shared.model.store import PackedModel

__all__ = ["Clusters", "cluster", "elbow", "load_clusters", "save_clusters"]

Floats = npt.NDArray[np.float32]
Reals = npt.NDArray[np.float64]
# The share of a layer's neurons by which texts are compared, and the most clusters that are looked for.
_SHARE, _MOST = 0.4, 10


@dataclass(frozen=True, slots=True)
class Clusters:
    """Of one packed model and one way of scoring."""

    # float32 [clusters, neurons]: how often each neuron of the layer is in the core of a text.
    centres: Floats
    # float32 [clusters, layers, neurons]: what a token of such a text gives each neuron.
    scores: Floats
    # Texts in each.
    sizes: npt.NDArray[np.int64]

    def nearest(self, scores: Reals, neurons: int) -> Reals:
        """The scores, float64 [layers, neurons], of the cluster to which those of a text are nearest."""
        feature = _features(scores[None], neurons)[0]
        distances = ((self.centres - feature) ** 2).sum(1)
        return np.asarray(self.scores[int(distances.argmin())], np.float64)


def _features(scores: npt.NDArray[np.floating], neurons: int) -> Floats:
    """The cores of texts [texts, layers, neurons] in the layer that is compared: float32 [texts, neurons], 0 or 1."""
    layer = scores.shape[1] * 2 // 3
    return largest(np.asarray(scores[:, layer], np.float64), _SHARE, neurons).astype(np.float32)


def elbow(spreads: list[float]) -> int:
    """Of the spreads within 1, 2, ... clusters, the number behind which more gain least: that which is farthest below
    the line from the first to the last."""
    line = np.linspace(spreads[0], spreads[-1], len(spreads))
    return int(np.argmax(line - spreads)) + 1


def cluster(scores: Floats, neurons: int) -> Clusters:
    """Clusters of texts whose tokens gave, on average, `scores` [texts, layers, neurons]; needs scikit-learn."""
    from sklearn.cluster import KMeans

    features = _features(scores, neurons)
    numbers = range(1, min(_MOST, len(np.unique(features, axis=0))) + 1)
    found = [KMeans(number, n_init=4, random_state=0).fit(features) for number in numbers]
    best = found[elbow([each.inertia_ for each in found]) - 1]
    members = [best.labels_ == label for label in range(best.n_clusters)]
    return Clusters(
        centres=np.array([features[own].mean(0) for own in members], np.float32),
        scores=np.array([scores[own].mean(0) for own in members], np.float32),
        sizes=np.array([own.sum() for own in members], np.int64),
    )


def _kept(model: PackedModel, score: str) -> Path:
    return beside(model, f"clusters-{score}-{model.spec.activation}", ".npz")


def save_clusters(model: PackedModel, score: str, clusters: Clusters) -> Path:
    """Keep them beside the packed model; raises OSError where that cannot be written."""
    path = _kept(model, score)
    save_arrays(path, centres=clusters.centres, scores=clusters.scores, sizes=clusters.sizes)
    return path


def load_clusters(model: PackedModel, score: str, shape: tuple[int, int]) -> Clusters | None:
    """Those that were kept, of `shape` [layers, neurons]; None if there are none."""
    kept = load_arrays(_kept(model, score))
    if kept.keys() != {"centres", "scores", "sizes"}:
        return None
    clusters = Clusters(**kept)
    count = clusters.sizes.size
    fits = clusters.scores.shape == (count, *shape) and clusters.centres.shape == (count, shape[1])
    fits &= clusters.scores.dtype == clusters.centres.dtype == np.float32
    return clusters if fits and count else None
