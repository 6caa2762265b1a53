"""Matrix products of prefill: packed rows times several tokens.

The tokens come in panels (`shared/model/panels.py`): a weight meets 16 of them in one instruction, and no horizontal
sum is needed. A product takes 8 rows and up to 3 panels at a time: 24 accumulators of the 32 registers.

Rows are widened 8 or 32 at a time into scratch memory, which stays in the cache while all panels meet it. Where the CPU
multiplies bfloat16 at twice the rate (AVX512_BF16), rows and input are rounded to it (but for float32 models) and two
features are taken at once: *pairs*, 32 bits holding features 2k and 2k + 1, of a weight row or of a token. A bfloat16
has 8 bits, so a term is off by up to 2^-8 and a long sum by far less: its terms' errors cancel. Elsewhere it is
float32.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels import simd
from warmfront.shared.kernels.fp16 import has
from warmfront.shared.kernels.jit import apart, kernel
from warmfront.shared.kernels.row_formats import FORMATS, PLAIN, RowFormat, by_kind, column_scales
from warmfront.shared.kernels.rows import widen
from warmfront.shared.kernels.simd import (
    FLOAT,
    I16,
    I32,
    I64,
    V16,
    call,
    chosen,
    constants,
    fma,
    load,
    long,
    splat,
    store,
    vector,
)
from warmfront.shared.model.formats import BLOCK, Kind
from warmfront.shared.model.panels import LANES

__all__ = [
    "PANELS",
    "ROWS",
    "Gathered",
    "Left",
    "Panels",
    "Rows",
    "accumulate",
    "by_panels",
    "gather_columns",
    "in_pairs",
    "multiplies_bfloat",
    "multiply",
    "multiply_columns",
    "multiply_rows",
    "pack_panels",
    "paired",
    "panels_of",
    "parts_in_registers",
]

ROWS = 8
PANELS = 3
_F32 = int(Kind.F32)


class _BFloat(ir.types._BaseFloatType):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite lacks."""

    null = "0.0"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()
_BFLOAT = _BFloat()


def multiplies_bfloat(context: Any) -> bool:
    """Whether code for this CPU multiplies bfloat16 pairs.

    CPUs with AMX leave bfloat16 to it: a product of pairs takes them as long as four of floats (docs/log.md).
    """
    return has(context, "avx512bf16", "avx512bw", "avx512vl") and not has(context, "amx-bf16")


@intrinsic
def _pairs_possible(context):
    def build(context, b, _signature, _arguments):
        return ir.Constant(ir.IntType(1), int(multiplies_bfloat(context)))

    return types.boolean(), build


@kernel
def in_pairs(kind: int) -> bool:
    """Whether rows of this type are multiplied in bfloat16 pairs."""
    return kind != _F32 and _pairs_possible()


def paired(b: Any, even: Any, odd: Any) -> Any:
    """Two float vectors as bfloat16 pairs, rounded to nearest even: i32 lanes, `even` in the low half."""
    name, bits = "llvm.x86.avx512bf16.cvtneps2bf16.512", vector(I16)
    narrow = (b.bitcast(call(b, name, vector(_BFLOAT), floats), bits) for floats in (even, odd))
    low, high = (b.zext(half, vector(I32)) for half in narrow)
    return b.or_(low, b.shl(high, constants(16, vector(I32))))


@intrinsic
def _pair_features(context, x, out, count):
    """Turn `count` couples of vectors at `x` (features 2k and 2k + 1 of a panel) into pairs at `out`."""

    def build(context, b, _signature, arguments):
        x, out, count = arguments
        if multiplies_bfloat(context):
            with cgutils.for_range(b, count, intp=I64) as loop:
                at = b.mul(loop.index, long(128))
                couple = (load(b, x, b.add(at, long(64 * half)), V16) for half in (0, 1))
                store(b, out, b.mul(loop.index, long(64)), paired(b, *couple))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@intrinsic
def _narrow_row(context, kind, row, out, cols):
    """Write a packed row as bfloat16 [cols]."""

    def build(context, b, _signature, arguments):
        kind, row, out, cols = arguments
        name, result = "llvm.x86.avx512bf16.cvtne2ps2bf16.512", vector(_BFLOAT, 32)

        def emit(form: RowFormat) -> None:
            with cgutils.for_range(b, b.udiv(cols, long(BLOCK)), intp=I64) as loop:
                low, high = form.weights(context, b, row, cols, loop.index)
                both = b.bitcast(call(b, name, result, high, low), vector(I32))
                store(b, out, b.mul(loop.index, long(64)), both)

        if multiplies_bfloat(context):
            by_kind(b, kind, [form for form in PLAIN if form.kind != Kind.F32], emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), build


@intrinsic
def _interleave_rows(context, rows, tail, out, cols, first, count):
    """Write the columns of `count` blocks, from block `first` on, of two packed rows (kind, even, odd) as pairs.

    `tail`: of their group, for Q4C.
    """

    def build(context, b, _signature, arguments):
        rows, tail, out, cols, first, count = arguments
        kind, even, odd = cgutils.unpack_tuple(b, rows, 3)

        def emit(form: RowFormat) -> None:
            with cgutils.for_range(b, count, intp=I64) as loop:
                block = b.add(first, loop.index)
                blocks = (_row_block(context, b, form, row, tail, cols, block) for row in (even, odd))
                for half, couple in enumerate(zip(*blocks, strict=True)):
                    at = b.add(b.mul(loop.index, long(128)), long(64 * half))
                    store(b, out, at, paired(b, *couple))

        if multiplies_bfloat(context):
            by_kind(b, kind, [form for form in FORMATS if form.kind != Kind.F32], emit)
        return context.get_dummy_value()

    return types.void(rows, *[types.int64] * 5), build


def _row_block(context: Any, b: Any, form: RowFormat, row: Any, tail: Any, cols: Any, block: Any) -> list[Any]:
    """32 weights of a down row as two float32 vectors."""
    halves = form.weights(context, b, row, cols, block)
    if form.kind != Kind.Q4C:
        return list(halves)
    starts = (b.add(b.mul(block, long(64)), long(32 * half)) for half in (0, 1))
    return [fma(b, each, *column_scales(context, b, tail, cols, at)) for each, at in zip(halves, starts, strict=True)]


@intrinsic
def _widen_columns(context, kind, row, tail, out, cols, first, count):
    """Write the columns of `count` blocks, from block `first` on, of a packed row as float32; `tail`: for Q4C."""

    def build(context, b, _signature, arguments):
        kind, row, tail, out, cols, first, count = arguments

        def emit(form: RowFormat) -> None:
            with cgutils.for_range(b, count, intp=I64) as loop:
                block = b.add(first, loop.index)
                for half, weights in enumerate(_row_block(context, b, form, row, tail, cols, block)):
                    store(b, out, b.add(b.mul(loop.index, long(128)), long(64 * half)), weights)

        by_kind(b, kind, FORMATS, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), build


def by_panels(b: Any, way: Any, panels: Any, emit: Callable[[bool, int], None]) -> None:
    """The code `emit(way, panels)` for both truths of `way` and 1 to `PANELS` panels, chosen at run time."""
    with b.if_else(way) as branches:
        for branch, truth in zip(branches, (True, False), strict=True):
            with branch:
                chosen(b, panels, range(1, PANELS + 1), partial(emit, truth))


@intrinsic
def _products(context, pairs, left, x, y, adds, panels):
    """`panels` panels, 1 to 3: y[p][r][:] = or += sum over k of left[r][k] * x[p][k][:] for 8 rows r.

    x, y: address, step from panel to panel.
    """

    def build(context, b, _signature, arguments):
        pairs, *tuples, adds, panels = arguments
        (w, row_step, k_step, terms), (x, x_step), (y, y_step) = (cgutils.unpack_tuple(b, each) for each in tuples)
        rows = [b.add(w, b.mul(row_step, long(r))) for r in range(ROWS)]

        def emit(pairs: bool, count: int) -> None:
            if not pairs or multiplies_bfloat(context):
                for some, beside in parts_in_registers(context, count):
                    emit_part(pairs, some, beside)

        def emit_part(pairs: bool, some: range, beside: range) -> None:
            sums = {(r, p): simd.zeros(b) for r in some for p in beside}
            places = {(r, p): b.add(b.mul(y_step, long(p)), long(64 * r)) for r, p in sums}
            with b.if_then(adds):
                for cell, total in sums.items():
                    b.store(load(b, y, places[cell], V16), total)
            element = I32 if pairs else FLOAT
            with cgutils.for_range(b, terms, intp=I64) as loop:
                at = b.mul(loop.index, long(64))
                tokens = {p: load(b, x, b.add(b.mul(x_step, long(p)), at), vector(element)) for p in beside}
                k = b.mul(loop.index, k_step)
                for r in some:
                    weight = splat(b, load(b, rows[r], k, element))
                    for p in beside:
                        b.store(accumulate(b, b.load(sums[r, p]), weight, tokens[p], pairs), sums[r, p])
            for cell, total in sums.items():
                store(b, y, places[cell], b.load(total))

        by_panels(b, pairs, panels, emit)
        return context.get_dummy_value()

    return types.void(types.boolean, left, x, y, types.boolean, types.int64), build


def parts_in_registers(context: Any, panels: int) -> Iterator[tuple[range, range]]:
    """Which of 8 rows and of some panels have their sums in registers at the same time."""
    # 8 x 3 sums beside 3 vectors of inputs and a weight are 28 of AVX-512's 32. Of 16 half as wide 4 x 1 take 8.
    rows, beside = (ROWS, panels) if has(context, "avx512f") else (ROWS // 2, 1)
    for panel in range(0, panels, beside):
        for row in range(0, ROWS, rows):
            yield range(row, row + rows), range(panel, panel + beside)


def accumulate(b: Any, sums: Any, weight: Any, tokens: Any, pairs: bool) -> Any:
    if not pairs:
        return fma(b, weight, tokens, sums)
    # Products of bfloat16 are exact in float32; only the inputs have been rounded, to 8 bits.
    halves = (b.bitcast(each, vector(_BFLOAT, 32)) for each in (weight, tokens))
    return call(b, "llvm.x86.avx512bf16.dpbf16ps.512", V16, sums, *halves)


# Kernels of their own, or LLVM would unroll the loops over rows that call them.
@kernel
def _narrow(kind: int, row: int, out: int, cols: int) -> None:
    _narrow_row(kind, row, out, cols)


@kernel
def _interleave(rows: tuple[int, int, int], tail: int, out: int, cols: int, first: int, count: int) -> None:
    _interleave_rows(rows, tail, out, cols, first, count)


@kernel
def _columns(kind: int, row: int, tail: int, out: int, cols: int, first: int, count: int) -> None:
    _widen_columns(kind, row, tail, out, cols, first, count)


class Rows(NamedTuple):
    """Packed rows, one behind the other."""

    # Weight type.
    kind: int
    # Address of the first row, and bytes from row to row.
    at: int
    stride: int
    # Weights of a row.
    cols: int


class Panels(NamedTuple):
    """Where panels lie: addresses `at`, `at` + `step`, ..."""

    at: int
    step: int
    panels: int


class Left(NamedTuple):
    """8 rows of widened weights, or of pairs: [r][k] at `at` + r * `row_step` + k * `k_step`, k < `terms`."""

    at: int
    row_step: int
    k_step: int
    terms: int


@apart
def multiply(pairs: bool, left: Left, x: Panels, y: Panels, adds: bool) -> None:
    """8 rows times panels of features, or pairs: y[p][r] = sum_k left[r][k] * x[p][k], or += if it `adds`."""
    for p in range(0, x.panels, PANELS):
        x_at, y_at = x.at + p * x.step, y.at + p * y.step
        _products(pairs, left, (x_at, x.step), (y_at, y.step), adds, min(x.panels - p, PANELS))


@kernel
def pack_panels(kind: int, x: int, out: int, features: int, panels: int) -> int:
    """Panels at `x` as rows of `kind` want them: as they are, or as pairs in `out` (half the size)."""
    if not in_pairs(kind):
        return x
    _pair_features(x, out, features * panels // 2)
    return out


@apart
def multiply_rows(rows: Rows, x: int, y: Panels, scratch: int) -> None:
    """8 packed rows times as many panels as `y` has: y[p][r][lane].

    `x`: panels [cols, 16] that come from `pack_panels(kind, ...)`; `scratch` has room for 8 rows of float32.
    """
    kind, cols = rows.kind, rows.cols
    if in_pairs(kind):
        for r in range(ROWS):
            _narrow(kind, rows.at + r * rows.stride, scratch + r * cols * 2, cols)
        multiply(True, Left(scratch, cols * 2, 4, cols // 2), Panels(x, cols * LANES * 2, y.panels), y, False)
    else:
        for r in range(ROWS):
            widen(kind, rows.at + r * rows.stride, scratch + r * cols * 4, cols)
        multiply(False, Left(scratch, cols * 4, 4, cols), Panels(x, cols * LANES * 4, y.panels), y, False)


@apart
def gather_columns(rows: Rows, count: int, tail: int, out: int, first: int, columns: int, apart: int) -> Any:
    """Widen `columns` columns, from column `first` on (multiples of 32), of `count` packed rows (an even number).

    As `multiply_columns` wants them; returns where the next ones belong. `out` has room for them in float32; `tail`: of
    the rows' group, for Q4C; `apart`: a row's blocks of 32 columns follow each other at so many blocks.
    """
    kind, cols, step = rows.kind, rows.cols, columns * 4
    blocks, run = columns // BLOCK, columns // BLOCK if apart == 1 else 1
    pairs = in_pairs(kind)
    together = 2 if pairs else 1
    for r in range(0, count, together):
        row = rows.at + r * rows.stride
        for i in range(0, blocks, run):
            block, at = (first // BLOCK + i) * apart, out + r // together * step + i * BLOCK * 4
            if pairs:
                _interleave((kind, row, row + rows.stride), tail, at, cols, block, run)
            else:
                _columns(kind, row, tail, at, cols, block, run)
    return out + count // together * step


class Gathered(NamedTuple):
    """Rows that `gather_columns` widened."""

    # Weight type of the rows.
    kind: int
    at: int
    rows: int
    cols: int


@apart
def multiply_columns(left: Gathered, x: int, x_rows: int, y: Panels) -> None:
    """Add to y[p][column] the sum over the gathered rows of row[column] * x[p][row].

    `x`: panels [x_rows, 16] that come from `pack_panels(kind, ...)`, from the first row's place on.
    """
    pairs = in_pairs(left.kind)
    per_word = 2 if pairs else 1
    inputs = Panels(x, x_rows // per_word * LANES * 4, y.panels)
    for column in range(0, left.cols, ROWS):
        eight = Left(left.at + column * 4, 4, left.cols * 4, left.rows // per_word)
        multiply(pairs, eight, inputs, Panels(y.at + column * LANES * 4, y.step, y.panels), True)


@kernel
def panels_of(tokens: int) -> int:
    """Panels that hold `tokens` tokens; a single token is a panel of one lane."""
    return (tokens + LANES - 1) // LANES
