"""What a prompt's tokens used, for the policies: by the experts that they chose, or by the neurons that fired."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.balancing.interface import Floats, Ints, PromptLoad
from warmfront.shared.model.panels import LANES

__all__ = ["load_by_choices", "load_by_firing"]


def load_by_choices(tokens: int, uses: Ints, bounds: Ints, use_bytes: Floats) -> PromptLoad:
    """Of `tokens` of which `uses` [L, B] have used each branch, whose groups begin at `bounds` [B + 1]; a token that
    uses a group reads `use_bytes` [L, G] of it."""
    return PromptLoad(tokens, np.repeat(uses / tokens, np.diff(bounds), axis=1) * use_bytes)


def load_by_firing(tokens: int, noted: npt.NDArray[np.uint16], load: Callable[[Floats], Floats]) -> PromptLoad:
    """Of `tokens` whose firing was noted (`Noted.FIRING`), [L, G, 32, panels]: bit i, token i of the panel.

    `load`: bytes that a token reads of each group if so many of its neurons fire, both [L, G].
    """
    whole, rest = divmod(tokens, LANES)
    fired = np.bitwise_count(noted[..., :whole]).sum((2, 3), dtype=np.int64)
    if rest:
        # What is behind the last token may be anything.
        fired += np.bitwise_count(noted[..., whole] & np.uint16((1 << rest) - 1)).sum(2, dtype=np.int64)
    return PromptLoad(tokens, load(fired / tokens))
