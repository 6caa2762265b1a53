"""How keys and values lie in the KV cache: in tiles of 32 positions, which the kernels read as they come.

A head's numbers are padded to a multiple of 32. A *strip* is a matrix of some rows and 32 columns, of which a kernel
takes sums over the rows, with its sums in the lanes of vectors:

    tile of keys     one strip: a row for each number of the head, a column for each position
    tile of values   a strip for each 32 numbers of the head: a row for each position, a column for each number

    F32, F16         strip: row by row
    Q8               strip: four rows at a time, as byte products want them: bytes [rows / 4][32 columns][4 rows], of
                     keys unsigned, the number + 128, of values int8; behind a tile's strips its scales, float16
                     [numbers / 32][32 positions]: of each 32 numbers of a position, w = number * scale (`formats.py`)

Zero bytes are weights of 0, and a tile takes what 32 packed rows take. A *page* is the tiles of so many positions of
one text, in all heads and layers: [heads][pages][layers][tiles of a page]. Which pages hold a text, a table says for
each sequence, so that texts that begin alike share the pages of their beginning (vLLM's PagedAttention). Memory is
touched as pages are used, and a head's is one piece, on the NUMA node of whoever attends to it.
"""

from warmfront.shared.model.formats import BLOCK, row_bytes

__all__ = ["PAGE", "TILE", "padded", "pages_of", "tile_bytes"]

TILE = BLOCK
PAGE = TILE


def padded(head_dim: int) -> int:
    """Numbers of a head, with what they are padded by."""
    return -(-head_dim // BLOCK) * BLOCK


def tile_bytes(kind: int, head_dim: int) -> int:
    """Bytes of the keys, or values, of a head in 32 positions."""
    return TILE * row_bytes(kind, padded(head_dim))


def pages_of(positions: int) -> int:
    """How many pages hold so many positions of a text."""
    return -(-positions // PAGE)
