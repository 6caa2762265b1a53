"""Who keeps and who computes each group of neurons.

*home*: the CPU worker that holds the group's full copy; *owner*: the worker that computes it now. Both are uint8
[layers, groups] tables of worker indices: CPU workers first, then the GPU workers.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.shared.bundle import BundleLayout
from warmfront.shared.errors import UsageError

__all__ = ["Placement", "place"]

Table = npt.NDArray[np.uint8]


class Placement(NamedTuple):
    """uint8 [layers, groups] each."""

    home: Table
    owner: Table


def place(layout: BundleLayout, layers: int, threads: Sequence[int], vram_bytes: int | None) -> Placement:
    """Slice every layer over the CPU workers by their `threads`; give the GPU the first groups of every layer.

    `vram_bytes`: what the one GPU worker may hold, None without one. Raises UsageError if not a group fits.
    """
    bounds = np.rint(layout.groups * np.cumsum([0, *threads]) / sum(threads)).astype(int)
    home = np.empty((layers, layout.groups), np.uint8)
    for index, (low, high) in enumerate(pairwise(bounds)):
        home[:, low:high] = index
    owner = home.copy()
    if vram_bytes is not None:
        slots = vram_bytes // layout.group_bytes
        if slots < 1:
            raise UsageError(
                f"a VRAM budget of {vram_bytes} bytes holds no group of neurons ({layout.group_bytes} bytes): "
                "pass a larger --vram-budget, or --gpu none"
            )
        # The first groups of every layer, one more in the first layers where it does not divide.
        for layer in range(layers):
            owner[layer, : min(slots // layers + (layer < slots % layers), layout.groups)] = len(threads)
    return Placement(home, owner)
