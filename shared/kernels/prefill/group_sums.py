"""Down rows of prefill: those of several groups times their neurons' factors, added to exact sums.

A group's part of a column is a float32 sum in registers, rounded once for each token (`exact_sums.py`). That costs as
much as half of the products: two conversions, additions, loads and stores for 32 neurons. So one group follows the
other while 8 columns of 48 tokens stay where they are: 6 KB of sums, in the first cache.
"""

from typing import NamedTuple

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels import simd
from warmfront.shared.kernels.exact_sums import add_to_sums
from warmfront.shared.kernels.gemm import (
    PANELS,
    ROWS,
    Panels,
    accumulate,
    by_panels,
    in_pairs,
    multiplies_bfloat,
    parts_in_registers,
)
from warmfront.shared.kernels.jit import apart, kernel
from warmfront.shared.kernels.simd import FLOAT, I32, I64, load, long, splat, vector
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.panels import LANES

__all__ = ["Columns", "Factors", "add_columns"]


class Columns(NamedTuple):
    """Columns of the down rows of groups, as `gather_columns` widens them; a group takes 32 * columns * 4 bytes."""

    # Weight type of the rows.
    kind: int
    at: int
    groups: int
    # A multiple of 8.
    columns: int


class Factors(NamedTuple):
    """What the groups' neurons are multiplied with: [32, 16] for each panel, packed; 32 * 64 * panels bytes a group."""

    at: int
    panels: int


@intrinsic
def _products(context, pairs, left, x, y, groups, panels):
    """Group after group: y[p][c][:] += sum over rows k of left[k][c] * x[p][k][:], rounded, for 8 columns c.

    `panels`: 1 to 3; left: address, steps from group to group and from row to row; x likewise, the last from panel to
    panel; y: address, step from panel to panel.
    """

    def build(context, b, _signature, arguments):
        pairs, *tuples, groups, panels = arguments
        left, x, y = (cgutils.unpack_tuple(b, each) for each in tuples)

        def emit(pairs: bool, count: int) -> None:
            if not pairs or multiplies_bfloat(context):
                for some, beside in parts_in_registers(context, count):
                    emit_part(pairs, some, beside)

        def emit_part(pairs: bool, some: range, beside: range) -> None:
            sums = {(r, p): simd.zeros(b) for r in some for p in beside}
            element, terms = (I32, GROUP // 2) if pairs else (FLOAT, GROUP)
            with cgutils.for_range(b, groups, intp=I64) as group:
                weights = b.add(left[0], b.mul(group.index, left[1]))
                factors = b.add(x[0], b.mul(group.index, x[1]))
                for total in sums.values():
                    b.store(simd.constants(0.0), total)
                with cgutils.for_range(b, long(terms), intp=I64) as loop:
                    at, k = b.mul(loop.index, long(64)), b.mul(loop.index, left[2])
                    tokens = {p: load(b, factors, b.add(b.mul(x[2], long(p)), at), vector(element)) for p in beside}
                    for r in some:
                        weight = splat(b, load(b, weights, b.add(k, long(4 * r)), element))
                        for p in beside:
                            b.store(accumulate(b, b.load(sums[r, p]), weight, tokens[p], pairs), sums[r, p])
                for (r, p), total in sums.items():
                    place = b.add(b.mul(y[1], long(p)), long(128 * r))
                    add_to_sums(context, b, y[0], place, b.load(total))

        by_panels(b, pairs, panels, emit)
        return context.get_dummy_value()

    return types.void(types.boolean, left, x, y, types.int64, types.int64), build


# A kernel of its own, or LLVM would unroll the loops that call it.
@kernel
def _add(
    pairs: bool, left: tuple[int, int, int], x: tuple[int, int, int], y: tuple[int, int], groups: int, panels: int
) -> None:
    _products(pairs, left, x, y, groups, panels)


@apart
def add_columns(left: Columns, x: Factors, y: Panels) -> None:
    """Add to the int64 sums y[p][column][lane] what the groups' neurons make of the columns, in units of the tokens."""
    pairs = in_pairs(left.kind)
    row_bytes = left.columns * 4
    # Two rows to a word.
    per_word = 2 if pairs else 1
    x_step = GROUP // per_word * LANES * 4
    panel = 0
    while panel < x.panels:
        count = min(x.panels - panel, PANELS)
        factors = (x.at + panel * x_step, GROUP * LANES * 4 * x.panels, x_step)
        for column in range(0, left.columns, ROWS):
            eight = (left.at + column * 4, GROUP * row_bytes, row_bytes)
            sums = (y.at + panel * y.step + column * LANES * 8, y.step)
            _add(pairs, eight, factors, sums, left.groups, count)
        panel += count
