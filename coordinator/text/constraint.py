"""What an answer is held to, such as a grammar: which tokens may come next, and whether it is complete."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["FORBIDDEN", "Constraint"]

# The logit of a token that may not come: finite, as the sampler wants it, and out of reach of a repetition penalty.
FORBIDDEN = np.float32(-1e30)


class Constraint(Protocol):
    """One answer's state: `allowed` before a token is chosen, `push` behind it. Used on the engine's thread."""

    def allowed(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """A copy of float32 [vocab] `logits`, those of tokens that may not come next being `FORBIDDEN`."""

    def push(self, token: int) -> bool:
        """Take account of the token that was chosen; returns whether the answer is complete with it."""
