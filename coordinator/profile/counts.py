"""How often each neuron fired on text, by segment of the text: what the order of the neurons and their places rest on.

A profile lies in the packed model itself, as tensor and metadata `profile`, so that it always matches the order of
the neurons there. Segments keep apart what fires together: a text has at most 64 of them, of 32 tokens to begin with;
for each further one the two neighbours with the fewest tokens become one.
"""

import json
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.store import PackedModel

__all__ = ["MOST_TOKENS", "SEGMENTS", "SEGMENT_TOKENS", "Profile"]

SEGMENTS = 64
SEGMENT_TOKENS = 32
# The smallest pair of 64 segments holds at most 2 / 63 of the tokens: it stays below 65,536, which counts are kept in.
MOST_TOKENS = 2_000_000

Counts = npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float64]


class Profile:
    """Counts of a model with `ffn` neurons a layer, padded to `neurons`; made empty, filled with `add`."""

    def __init__(self, layers: int, neurons: int, ffn: int, texts: Sequence[str] = ()) -> None:
        self.ffn = ffn
        self.texts = list(texts)
        self.tokens: list[int] = []
        # Segments lie in any order; the row of each, in the order of the text.
        self._rows: list[int] = []
        self._counts: Counts = np.zeros((layers, SEGMENTS, neurons), np.uint16)

    @classmethod
    def of(cls, model: PackedModel) -> Self | None:
        """The profile in a packed model; None if it has none."""
        if "profile" not in model.entries:
            return None
        shape = model.entries["profile"].shape
        counts = model.bytes_of("profile").view(np.uint16).reshape(shape)
        return cls.restored(counts, model.spec.ffn, model.profile)

    @classmethod
    def restored(cls, counts: Counts, ffn: int, facts: dict[str, Any]) -> Self:
        """The inverse of `counts` and `facts`."""
        layers, segments, neurons = counts.shape
        profile = cls(layers, neurons, ffn, facts["texts"])
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
        """What the packed model keeps beside the counts: tokens of each segment, names of the texts."""
        return {"tokens": self.tokens, "texts": self.texts}

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
            some = fired[:, at : at + SEGMENT_TOKENS - self.tokens[-1]]
            self._counts[:, self._rows[-1]] += some.sum(1, dtype=np.uint16)
            self.tokens[-1] += some.shape[1]
            at += some.shape[1]

    def _begin(self) -> None:
        """An empty segment; where all are taken, of the neighbours with the fewest tokens the second makes room."""
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
        """The same with neuron `permutation[layer, i]` in place i of each layer."""
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
        """float64 [layers]: the smallest share of the neurons that make `part` of all firing."""
        fired = -np.sort(-self.counts.sum(1, dtype=np.int64), axis=1)
        made = np.cumsum(fired, axis=1)
        short = (made < part * made[:, -1:]).sum(1) + (made[:, -1] > 0)
        return np.asarray(short / self.ffn, np.float64)
