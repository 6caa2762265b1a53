"""A model in floats, delivered in few bits: a `Source` in front of another one, as which the packer reads it."""

from collections.abc import Callable, Mapping, Set

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.models.source import IGNORE_OVERFLOW, Source, SourceTensor, padded
from warmfront.coordinator.quantising.feedback import (
    Factor,
    factor_of,
    plainly,
    with_feedback,
    with_feedback_across,
)
from warmfront.coordinator.quantising.samples import Samples
from warmfront.coordinator.quantising.scales import FOUR_BITS
from warmfront.shared.model.formats import BLOCK, Kind, finite

__all__ = ["QuantisedSource"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class QuantisedSource:
    """`source`, of which the matrices of `kinds` have those types; `samples`: of their inputs."""

    def __init__(self, source: Source, kinds: Mapping[str, Kind], samples: Samples | None) -> None:
        self._source, self._kinds, self._samples = source, kinds, samples
        self.spec, self.tokenizer = source.spec, source.tokenizer
        self.notes, self.activations = source.notes, source.activations
        self._last: tuple[str, int, Factor | None] = ("", 0, None)

    def names(self) -> Set[str]:
        return self._source.names()

    def tensor(self, name: str) -> SourceTensor:
        tensor = self._source.tensor(name)
        if name not in self._kinds:
            return tensor
        return _Quantised(name, tensor, self._kinds[name], self._factor)

    def _factor(self, name: str, inputs: int) -> Factor | None:
        """The factor of a matrix of so many inputs; that of the last one is kept, for q, k and v have the same."""
        if self._samples is None or (place := self._samples.place_of(name)) is None:
            return None
        if self._last[:2] != (place, inputs):
            self._last = (
                place,
                inputs,
                factor_of(self._samples.at(place)[:, :inputs], inputs, 1 if name.endswith(".down") else BLOCK),
            )
        return self._last[2]


class _Quantised(SourceTensor):
    """A matrix of `QuantisedSource`; `factor` gives what its rounding is weighed by, for its name and inputs."""

    def __init__(
        self, name: str, tensor: SourceTensor, kind: Kind, factor: Callable[[str, int], Factor | None]
    ) -> None:
        super().__init__(name, tensor.shape, kind, step=tensor.step)
        self._tensor, self._name, self._factor = tensor, name, factor
        self._whole: Bytes | None = None

    def _widen(self, start: int, stop: int) -> Floats:
        return self._tensor.widened(start, stop)

    def _pack(self, start: int, stop: int, kind: Kind) -> Bytes:
        if kind not in FOUR_BITS:
            return super()._pack(start, stop, kind)
        values = _padded(self.widened(start, stop))
        factor = self._factor(self._name, values.shape[1])
        return plainly(values, kind) if factor is None else with_feedback(values, factor, kind)

    @IGNORE_OVERFLOW
    def packed(self, kind: Kind, start: int = 0, stop: int | None = None) -> Bytes:
        """As of any tensor; but rows of down are inputs, each of which takes up what the ones before it lost: they are
        rounded together, for the first of them that is asked for."""
        if not self._name.endswith(".down") or kind not in FOUR_BITS:
            return super().packed(kind, start, stop)
        if self._whole is None:
            values = _padded(self.float32())
            factor = self._factor(self._name, len(values))
            self._whole = plainly(values, kind) if factor is None else with_feedback_across(values, factor, kind)
            self.check_finite(finite(self._whole, kind, values.shape[1]), kind)
        return self._whole[start:stop]


def _padded(values: Floats) -> Floats:
    return np.pad(values, ((0, 0), (0, padded(values.shape[1]) - values.shape[1])))
