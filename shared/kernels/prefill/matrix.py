"""Rows of any weight type times several tokens: as bytes where the CPU multiplies them, else as `gemm.py` does."""

from warmfront.shared.kernels.gemm import Panels, Rows, in_pairs, multiply_rows, pack_panels
from warmfront.shared.kernels.jit import apart, kernel
from warmfront.shared.kernels.prefill.byte_panels import PANEL_BLOCK, quantise_panels
from warmfront.shared.kernels.prefill.byte_products import multiply_byte_rows
from warmfront.shared.kernels.tiles import TILE, in_tiles
from warmfront.shared.model.formats import BLOCK
from warmfront.shared.model.panels import LANES

__all__ = ["multiply_tokens", "pack_tokens", "packed_words"]


@apart
def pack_tokens(kind: int, x: int, out: int, cols: int, panels: int) -> int:
    """Panels at `x` as `multiply_tokens` wants them for rows of `kind`: as they are, or in `out` (half the size)."""
    # A type that is held in tiles is one that is multiplied as bytes.
    if in_tiles(kind):
        quantise_panels(kind, x, out, cols, panels)
        return out
    return pack_panels(kind, x, out, cols, panels)


@kernel
def packed_words(kind: int, cols: int) -> int:
    """32-bit words of each token in a panel that comes from `pack_tokens`: [words, 16]."""
    if in_tiles(kind):
        return cols // BLOCK * (PANEL_BLOCK // (4 * LANES))
    return cols // 2 if in_pairs(kind) else cols


@apart
def multiply_tokens(rows: Rows, tiled: int, low: int, high: int, x: int, y: Panels, scratch: int) -> None:
    """Rows low..high, multiples of 8, of a matrix times as many panels as `y` has: y[p][r][lane], from row 0 on.

    `tiled`: so many rows, of the first, are in tiles. `x`: panels [cols, 16] that come from `pack_tokens(kind, ...)`;
    `scratch`: float32 [8, cols] and `PRODUCT_FLOATS`.
    """
    if not in_tiles(rows.kind):
        for first in range(low // 8 * 8, high, 8):
            some = Rows(rows.kind, rows.at + first * rows.stride, rows.stride, rows.cols)
            multiply_rows(some, x, Panels(y.at + first * LANES * 4, y.step, y.panels), scratch)
        return
    first = low // TILE * TILE
    while first < high:
        # Tiles, or rows: what is multiplied together is one or the other.
        end = min(first + 2 * TILE, high)
        if first < tiled < end:
            end = tiled
        some = Rows(rows.kind, rows.at + first * rows.stride, rows.stride, rows.cols)
        out = Panels(y.at + first * LANES * 4, y.step, y.panels)
        multiply_byte_rows(some, first < tiled, max(first, low) - first, end - first, x, out, scratch)
        first = end
