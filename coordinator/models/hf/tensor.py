"""A tensor of a safetensors file, or a part of one, as a `SourceTensor`."""

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.models.hf.safetensors_file import ITEM_BYTES, KINDS
from warmfront.coordinator.models.source import Order, SourceTensor
from warmfront.coordinator.models.stored_tensor import StoredTensor
from warmfront.shared.model.formats import unpack

__all__ = ["HfTensor"]

Floats = npt.NDArray[np.float32]


class HfTensor(SourceTensor):
    """A tensor of a safetensors file; if `transposed`, delivered so. `plus` is added to every number.

    `picked`: the rows of what would be delivered that are this tensor, in ascending order; None: all.
    """

    def __init__(
        self,
        stored: StoredTensor[str],
        *,
        transposed: bool = False,
        order: Order | None = None,
        plus: float = 0,
        picked: Order | None = None,
    ) -> None:
        rows, *cols = stored.shape[::-1] if transposed else stored.shape
        self._stored = stored
        self._transposed = transposed
        self._plus = np.float32(plus)
        self._picked = picked
        label, step = f"{stored.path}: tensor {stored.name}", 1 if order is None else len(order)
        shape = (rows if picked is None else len(picked), *cols)
        super().__init__(label, shape, KINDS[stored.type], step=step, order=order)

    def _widen(self, start: int, stop: int) -> Floats:
        picked = None if self._picked is None else self._picked[start:stop]
        first, last = (start, stop) if picked is None else (int(picked[0]), int(picked[-1]) + 1)
        if self._transposed:
            size = ITEM_BYTES[self._stored.type]
            wide = unpack(self._stored.columns(first * size, last * size), self.kind, last - first).T
        elif len(self.shape) == 1:
            wide = unpack(self._stored.rows(), self.kind, self._stored.shape[0])[0, first:last] + self._plus
        else:
            wide = unpack(self._stored.rows(first, last), self.kind, self.shape[1])
        return self._ordered(wide if picked is None else wide[picked - first])
