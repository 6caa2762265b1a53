"""Tensors that no file has: they follow from what a folder does have."""

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.models.source import SourceTensor
from warmfront.shared.model.formats import Kind

__all__ = ["Ones", "Projected"]

Floats = npt.NDArray[np.float32]


class Projected(SourceTensor):
    """The product of a matrix [rows, width] and one in memory, [width, cols]; of the first one's weight type."""

    def __init__(self, tensor: SourceTensor, projection: Floats) -> None:
        super().__init__("a projection", (tensor.shape[0], projection.shape[1]), tensor.kind)
        self._tensor, self._projection = tensor, projection

    def _widen(self, start: int, stop: int) -> Floats:
        return np.asarray(self._tensor.widened(start, stop) @ self._projection)


class Ones(SourceTensor):
    """The weights of a norm that has none."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__("ones", shape, Kind.F32)

    def _widen(self, start: int, stop: int) -> Floats:
        return np.ones(stop - start, np.float32)
