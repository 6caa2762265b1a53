"""How keys and values lie in the KV cache: in tiles of 32 positions, which the kernels read as they come.

A head's numbers are padded to a multiple of 32. A *strip* is a matrix of some rows and 32 columns, of which a kernel
takes sums over the rows, with its sums in the lanes of vectors:

    tile of keys     one strip: a row for each number of the head, a column for each position
    tile of values   a strip for each 32 numbers of the head: a row for each position, a column for each number

    F32, F16         strip: row by row
    Q8               strip: four rows at a time, as byte products want them: bytes [rows / 4][32 columns][4 rows], of
                     keys unsigned, the number + 128, of values int8; behind a tile's strips its scales, float16
                     [numbers / 32][32 positions]: of each 32 numbers of a position, w = number * scale (`formats.py`)

Zero bytes are weights of 0, and a tile takes what 32 packed rows take. The tiles of 256 positions, a *span*, lie one
behind the other; then come the same of the next layer, and behind the last layer the next span: [heads][spans][layers]
[tiles]. Memory is touched as the text grows, a span of all layers at a time, and a head's is one piece, on the NUMA
node of whoever attends to it.
"""

from warmfront.shared.model.formats import BLOCK, row_bytes

__all__ = ["SPAN", "TILE", "padded", "tile_bytes", "whole_spans"]

TILE = BLOCK
SPAN = 8 * TILE


def padded(head_dim: int) -> int:
    """Numbers of a head, with what they are padded by."""
    return -(-head_dim // BLOCK) * BLOCK


def tile_bytes(kind: int, head_dim: int) -> int:
    """Bytes of the keys, or values, of a head in 32 positions."""
    return TILE * row_bytes(kind, padded(head_dim))


def whole_spans(positions: int) -> int:
    """`positions` rounded up to whole spans."""
    return -(-positions // SPAN) * SPAN
