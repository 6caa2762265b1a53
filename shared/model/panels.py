"""How activations of several tokens lie in memory, on the board and in every kernel.

A decoded token is a plain vector [features], and a batch of them is [token][feature]: each is computed as if it came
alone, bit for bit. Tokens of a prompt come 16 to a panel: [panel][feature][lane], one token a lane, so that a weight
meets 16 tokens in one vector instruction. Lanes behind the last token hold anything. Kernels that serve both see a
batch as panels of one lane.
"""

__all__ = ["BATCH", "LANES", "PRODUCT_FLOATS", "PRODUCT_TOKENS", "whole_panels"]

# Tokens of a panel: the floats of a vector in the kernels (`kernels/simd.py`).
LANES = 16
# The most tokens of a batch.
BATCH = 16
# Tokens of a product of 32 rows at a time: their sums, 12 KB, stay in the first cache while all columns meet them.
PRODUCT_TOKENS = 6 * LANES
# These sums, and those of one panel once more.
PRODUCT_FLOATS = 32 * (PRODUCT_TOKENS + LANES)


def whole_panels(tokens: int) -> int:
    """`tokens` rounded up to whole panels."""
    return -(-tokens // LANES) * LANES
