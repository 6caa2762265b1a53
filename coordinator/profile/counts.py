"""How often each neuron fired on text, by segment of the text: the basis of the neurons' order and placement.

A profile is stored in the packed model itself, as tensor and metadata `profile`, so that it always matches the order of
the neurons there. Segments show what fires together: there are at most 64, of 32 tokens at first; for each further one
the two neighbours with the fewest tokens are merged.
"""

import json
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.store import PackedModel

__all__ = ["MAX_TOKENS", "SEGMENTS", "SEGMENT_TOKENS", "Profile", "profiled"]

SEGMENTS = 64
SEGMENT_TOKENS = 32
# Counts are 16 bits. The smallest pair of neighbours of 64 segments holds at most 2 / 63 of the tokens: below 65,536.
MAX_TOKENS = 2_000_000

Counts = npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float64]


def profiled(model: PackedModel) -> bool:
    """Whether a packed model has a profile, and it was counted with the activation that is used."""
    return model.profile.get("activation") == model.spec.activation


class Profile:
    """The counts of a model with `ffn` neurons a layer, padded to `neurons`; empty at first, filled by `add`."""

    def __init__(self, layers: int, neurons: int, ffn: int, activation: str, texts: Sequence[str] = ()) -> None:
        """`activation`: that of the model, on which what fires depends."""
        self.ffn, self.activation = ffn, activation
        self.texts = list(texts)
        self.tokens: list[int] = []
        # Rows are reused when segments are merged: the row of each segment, in the order of the text.
        self._rows: list[int] = []
        self._counts: Counts = np.zeros((layers, SEGMENTS, neurons), np.uint16)

    @classmethod
    def of(cls, model: PackedModel) -> Self | None:
        """The profile in a packed model; None if it has none for its activation."""
        if not profiled(model):
            return None
        shape = model.entries["profile"].shape
        counts = model.bytes_of("profile").view(np.uint16).reshape(shape)
        return cls.restored(counts, model.spec.ffn, model.profile)

    @classmethod
    def restored(cls, counts: Counts, ffn: int, facts: dict[str, Any]) -> Self:
        """The profile whose `counts` and `facts` these are."""
        layers, segments, neurons = counts.shape
        profile = cls(layers, neurons, ffn, facts["activation"], facts["texts"])
        profile._counts[:, :segments] = counts
        profile._rows = list(range(segments))
        profile.tokens = list(facts["tokens"])
        return profile

    @property
    def counts(self) -> Counts:
        """uint16 [layers, segments, neurons]: tokens that fired the neuron."""
        return self._counts[:, self._rows]

    @property
    def facts(self) -> dict[str, Any]:
        """What is stored beside the counts: the activation, the tokens of each segment, the names of the texts."""
        return {"activation": self.activation, "tokens": self.tokens, "texts": self.texts}

    def to_json(self) -> str:
        """The facts as the packed model's metadata."""
        return json.dumps(self.facts)

    def add(self, fired: npt.NDArray[np.bool_], *, fresh: bool = False) -> None:
        """Count further tokens, bool [layers, tokens, neurons]; `fresh`: they begin a text, and so a segment."""
        at = 0
        while at < fired.shape[1]:
            if fresh or not self.tokens or self.tokens[-1] >= SEGMENT_TOKENS:
                self._begin()
                fresh = False
            chunk = fired[:, at : at + SEGMENT_TOKENS - self.tokens[-1]]
            self._counts[:, self._rows[-1]] += chunk.sum(1, dtype=np.uint16)
            self.tokens[-1] += chunk.shape[1]
            at += chunk.shape[1]

    def _begin(self) -> None:
        """Begin a segment; if there are 64 already, merge the two neighbours with the fewest tokens first."""
        row = len(self._rows)
        if row == SEGMENTS:
            first = int(np.argmin(np.add(self.tokens[:-1], self.tokens[1:])))
            row = self._rows.pop(first + 1)
            self.tokens[first] += self.tokens.pop(first + 1)
            self._counts[:, self._rows[first]] += self._counts[:, row]
            self._counts[:, row] = 0
        self._rows.append(row)
        self.tokens.append(0)

    def reordered(self, permutation: npt.NDArray[np.int64]) -> "Profile":
        """The profile of the model with neuron `permutation[layer, i]` in place i of each layer."""
        counts = np.take_along_axis(self.counts, permutation[:, None], axis=2)
        return self.restored(counts, self.ffn, self.facts)

    def rates(self) -> Floats:
        """float64 [layers, neurons]: the share of the tokens that fired each neuron."""
        fired = self.counts.sum(1, dtype=np.int64)
        return np.asarray(fired / max(sum(self.tokens), 1), np.float64)

    def group_firing(self) -> Floats:
        """float64 [layers, groups]: how many neurons of each group a token fires on average."""
        rates = self.rates()
        return np.asarray(rates.reshape(len(rates), -1, GROUP).sum(2), np.float64)

    def active(self) -> Floats:
        """float64 [layers]: the share of the neurons that a token fires on average."""
        return np.asarray(self.rates().sum(1) / self.ffn, np.float64)

    def hot_share(self, part: float = 0.8) -> Floats:
        """float64 [layers]: the share of the neurons, hottest first, that make `part` of all firing."""
        fired = -np.sort(-self.counts.sum(1, dtype=np.int64), axis=1)
        made = np.cumsum(fired, axis=1)
        short = (made < part * made[:, -1:]).sum(1) + (made[:, -1] > 0)
        return np.asarray(short / self.ffn, np.float64)
