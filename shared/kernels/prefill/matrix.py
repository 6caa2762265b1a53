"""Rows of any weight type times several tokens: as bytes where the CPU multiplies them, else as `gemm.py` does."""

from warmfront.shared.kernels.gemm import Panels, Rows, multiply_rows, pack_panels
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.prefill.byte_products import multiply_byte_rows, quantise_panels
from warmfront.shared.kernels.tiles import TILE, in_tiles
from warmfront.shared.model.panels import LANES

__all__ = ["multiply_tokens", "pack_tokens"]


@kernel
def pack_tokens(kind: int, x: int, out: int, cols: int, panels: int) -> int:
    """Panels at `x` as `multiply_tokens` wants them for rows of `kind`: as they are, or in `out` (half the size)."""
    # A type that is held in tiles is one that is multiplied as bytes.
    if in_tiles(kind):
        quantise_panels(kind, x, out, cols, panels)
        return out
    return pack_panels(kind, x, out, cols, panels)


@kernel
def multiply_tokens(rows: Rows, tiled: int, low: int, high: int, x: int, y: Panels, scratch: int) -> None:
    """Rows low..high, multiples of 8, of a matrix times as many panels as `y` has: y[p][r][lane], from row 0 on.

    `tiled`: so many rows, of the first, are in tiles. `x`: panels [cols, 16] that come from `pack_tokens(kind, ...)`;
    `scratch`: room for 16 rows of float32.
    """
    in_bytes = in_tiles(rows.kind)
    step = TILE if in_bytes else 8
    for first in range(low // step * step, high, step):
        some = Rows(rows.kind, rows.at + first * rows.stride, rows.stride, rows.cols)
        out = Panels(y.at + first * LANES * 4, y.step, y.panels)
        if in_bytes:
            begin, end = max(first, low) - first, min(first + TILE, high) - first
            multiply_byte_rows(some, first < tiled, begin, end, x, out, scratch)
        else:
            multiply_rows(some, x, out, scratch)
