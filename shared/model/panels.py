"""How activations of several tokens lie in memory, on the board and in every kernel.

A single token is a plain vector [features]. Several come 16 to a panel: [panel][feature][lane], one token a lane, so
that a weight meets 16 tokens in one vector instruction. Lanes behind the last token hold anything.
"""

__all__ = ["LANES", "whole_panels"]

# Tokens of a panel: the floats of a vector in the kernels (`kernels/simd.py`).
LANES = 16


def whole_panels(tokens: int) -> int:
    """`tokens` rounded up to whole panels."""
    return -(-tokens // LANES) * LANES
