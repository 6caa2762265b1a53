"""The check that every selected neuron is computed, and none twice."""

import numpy as np
import numpy.typing as npt

from warmfront.shared.errors import WorkerError

__all__ = ["check_once"]


def check_once(wanted: npt.NDArray[np.uint32], requested: npt.NDArray[np.uint32]) -> None:
    """Raise WorkerError unless the neurons `wanted` [layers, groups], a bit each, are those `requested` of the workers
    [workers, layers, groups], each of one."""
    # All of it by somebody, and no bit twice.
    once = np.bitwise_or.reduce(requested) == wanted
    once &= np.bitwise_count(requested).sum(0) == np.bitwise_count(wanted)
    if not once.all():
        layer, group = np.argwhere(~once)[0]
        raise WorkerError(
            f"group {group} of layer {layer} was not computed exactly once: this is a defect of warmfront"
        )
