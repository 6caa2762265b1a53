"""Inner products by byte instructions: the input quantised to 15 bits, and its dot with rows of whole numbers.

Where the CPU multiplies bytes (AVX-512 VNNI, AVX2), dots with 8-bit and 4-bit rows take the input in blocks of 32 with
one scale each (`quantise_input`): less than half the instructions of floats. The input's numbers have 15 bits, in two
bytes, because 8 change one greedy token in twenty and 15 none (docs/log.md): an error of 2^-15 of a block's largest
feature is below what rounding the weights to 8 bits has already lost.

AVX2 adds the products of two neighbouring bytes in 16 bits, where 255 * 127 * 2 has no room: there numbers of 8 bits
are multiplied by their magnitudes, with their signs moved to the input. That changes no bit of a result.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from warmfront.shared.kernels import simd
from warmfront.shared.kernels.fp16 import has
from warmfront.shared.kernels.jit import apart, kernel
from warmfront.shared.kernels.simd import (
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    V16,
    call,
    constants,
    fma,
    load,
    long,
    splat,
    store,
    vector,
)
from warmfront.shared.model.formats import BLOCK
from warmfront.shared.model.panels import LANES

__all__ = [
    "Left",
    "Products",
    "Split",
    "adds_in_words",
    "block_offset",
    "byte_dot",
    "inputs_at_once",
    "left",
    "most_inputs",
    "multiplies_bytes",
    "quantise_batch",
    "quantise_input",
    "quantised_bytes",
    "quantised_parts",
    "signed",
    "split_block",
]

V32, V64 = vector(I8, 32), vector(I8, 64)
# The largest feature of a block, 127 * 128: the high part stays a signed byte when the low part rounds into it.
_STEPS = 16256.0


def adds_in_words(context: Any) -> bool:
    """Whether code for this CPU adds products of four bytes to 32 bits by one instruction."""
    return has(context, "avx512vnni", "avx512bw")


def multiplies_bytes(context: Any) -> bool:
    """Whether code for this CPU takes inputs quantised."""
    return adds_in_words(context) or has(context, "avx2")


def signed(context: Any, largest: int) -> bool:
    """Whether unsigned numbers up to `largest` are multiplied with their middle, 128, as zero."""
    return largest > 128 and not adds_in_words(context)


class Left(NamedTuple):
    """64 unsigned bytes of rows; `signs`: where they are magnitudes, bytes with the signs of what they are of."""

    numbers: Any
    signs: Any = None


def left(context: Any, b: Any, numbers: Any, largest: int) -> Left:
    """Unsigned numbers up to `largest` as `Products` takes them."""
    if not signed(context, largest):
        return Left(numbers)
    signs = b.xor(numbers, constants(-128, V64))
    return Left(call(b, "llvm.abs.v64i8", V64, signs, ir.Constant(ir.IntType(1), 0)), signs)


def most_inputs(context: Any) -> int:
    """How many inputs are multiplied at once: the sums of more leave no registers to the numbers."""
    return 4 if adds_in_words(context) else 2


@intrinsic
def inputs_at_once(context):
    """`most_inputs`, for kernels."""

    def build(context, b, _signature, arguments):
        return long(most_inputs(context))

    return types.int64(), build


class Products:
    """Code that adds up products of 64 bytes of rows with 64 signed ones, four to each of 16 integers.

    `largest`: of the unsigned numbers from which `left` made those of the rows. With AVX2 products are added in 16
    bits, as many as have room.
    """

    def __init__(self, context: Any, largest: int, start: Any = None) -> None:
        self._in_words = adds_in_words(context)
        self._total = constants(0, vector(I32)) if start is None else start
        self._short: list[Any] = []
        self._room, self._used = (2**15 - 1) // (2 * 127 * min(largest, 128)), 0

    def add(self, b: Any, rows: Left, bytes_: Any) -> None:
        """Add the products with `bytes_`, -127 to 127."""
        if self._in_words:
            self._total = call(b, "llvm.x86.avx512.vpdpbusd.512", vector(I32), self._total, rows.numbers, bytes_)
            return
        if self._used == self._room:
            self._widen(b)
        factors = _halves(b, bytes_)
        if rows.signs is not None:
            couples = zip(factors, _halves(b, rows.signs), strict=True)
            factors = [call(b, "llvm.x86.avx2.psign.b", V32, *couple) for couple in couples]
        couples = zip(_halves(b, rows.numbers), factors, strict=True)
        products = [call(b, "llvm.x86.avx2.pmadd.ub.sw", _SHORTS, *couple) for couple in couples]
        self._short = [b.add(*both) for both in zip(self._short, products, strict=True)] if self._used else products
        self._used += 1

    def _widen(self, b: Any) -> None:
        if self._used:
            words = [call(b, "llvm.x86.avx2.pmadd.wd", _WORDS, each, constants(1, _SHORTS)) for each in self._short]
            lanes = ir.Constant(vector(I32), list(range(LANES)))
            self._total, self._used = b.add(self._total, b.shuffle_vector(*words, lanes)), 0

    def total(self, b: Any) -> Any:
        """The 16 sums, int32."""
        self._widen(b)
        return self._total


_SHORTS, _WORDS = vector(I16, 16), vector(I32, 8)


def _halves(b: Any, value: Any) -> list[Any]:
    """Both halves of 64 bytes."""
    parts = (range(first, first + 32) for first in (0, 32))
    return [b.shuffle_vector(value, value, ir.Constant(vector(I32, 32), list(part))) for part in parts]


@register_jitable
def quantised_bytes(cols: int) -> int:
    """Bytes of a quantised input: 15 bits a feature, x = (128 * high + low) * scale.

    int8 high parts and int8 low parts [cols padded to 64] each, of each two blocks the first halves, then the second
    halves; float32 scales and int32 sums of the blocks' numbers [blocks padded to 16] each. Padding is never written
    nor used.
    """
    return 2 * 64 * -(-cols // 64) + 2 * 64 * -(-cols // (16 * BLOCK))


def _padded(b: Any, cols: Any) -> Any:
    return b.mul(b.udiv(b.add(cols, long(63)), long(64)), long(64))


def quantised_parts(b: Any, q: Any, cols: Any) -> tuple[Any, Any, Any]:
    """Addresses of the low parts, the scales and the block sums of a quantised input; the high parts come first."""
    padded = _padded(b, cols)
    floats = b.mul(b.udiv(b.add(cols, long(16 * BLOCK - 1)), long(16 * BLOCK)), long(64))
    scales_at = b.add(q, b.mul(padded, long(2)))
    return b.add(q, padded), scales_at, b.add(scales_at, floats)


def block_offset(b: Any, block: Any) -> Any:
    """Where the first half of a block's parts lies; the second is 32 bytes behind it."""
    return b.add(b.mul(b.udiv(block, long(2)), long(64)), b.mul(b.urem(block, long(2)), long(16)))


class Split(NamedTuple):
    """32 numbers x = (128 * high + low) * scale: vectors of 32-bit integers, 16 numbers each."""

    high: list[Any]
    low: list[Any]
    # float32, and the sum of the integers.
    scale: Any
    total: Any


def split_block(b: Any, halves: list[Any]) -> Split:
    """Two float vectors, a block of 32, in 15 bits a number.

    No integer stands for NaN: the scale does.
    """
    largest = simd.largest(b, [call(b, "llvm.fabs.v16f32", V16, half) for half in halves])
    # A block of zeros has scale 0, whose inverse would make NaN of it.
    not_zero = b.fcmp_ordered(">", largest, ir.Constant(FLOAT, 0.0))
    inverse = b.select(not_zero, b.fdiv(ir.Constant(FLOAT, _STEPS), largest), ir.Constant(FLOAT, 0.0))
    scale = b.fdiv(largest, ir.Constant(FLOAT, _STEPS))
    highs, lows, whole = [], [], []
    for values in halves:
        rounded = call(b, "llvm.rint.v16f32", V16, b.fmul(values, splat(b, inverse)))
        whole.append(b.fptosi(rounded, vector(I32)))
        # Adding half a step makes the low part signed, -64..63: both parts then fit the signed side of VNNI.
        seven = constants(7, vector(I32))
        highs.append(b.ashr(b.add(whole[-1], constants(64, vector(I32))), seven))
        lows.append(b.sub(whole[-1], b.shl(highs[-1], seven)))
    return Split(highs, lows, scale, call(b, "llvm.vector.reduce.add.v16i32", I32, b.add(*whole)))


def _quantise_block(b: Any, x: Any, out: Any, cols: Any, block: Any) -> None:
    at = b.mul(block, long(128))
    numbers = split_block(b, [load(b, x, b.add(at, long(64 * half)), V16) for half in (0, 1)])
    place = block_offset(b, block)
    low_at, scales_at, sums_at = quantised_parts(b, out, cols)
    for half, (high, low) in enumerate(zip(numbers.high, numbers.low, strict=True)):
        at = b.add(place, long(32 * half))
        store(b, out, at, b.trunc(high, vector(I8)))
        store(b, low_at, at, b.trunc(low, vector(I8)))
    store(b, scales_at, b.mul(block, long(4)), numbers.scale)
    store(b, sums_at, b.mul(block, long(4)), numbers.total)


@intrinsic
def _quantise(context, x, out, cols):
    def build(context, b, _signature, arguments):
        x, out, cols = arguments
        if not multiplies_bytes(context):
            return x
        with cgutils.for_range(b, b.udiv(cols, long(BLOCK)), intp=I64) as loop:
            _quantise_block(b, x, out, cols, loop.index)
        return out

    return types.int64(types.int64, types.int64, types.int64), build


@kernel
def quantise_input(x: int, out: int, cols: int) -> Any:
    """Quantise float32 [cols] at `x` for `rows.dot`, in `out` [quantised_bytes(cols)].

    Returns the address to give to `dot`: `x` itself where the machine does not multiply bytes.
    """
    return _quantise(x, out, cols)


@apart
def quantise_batch(x: int, out: int, cols: int, tokens: int) -> tuple[int, int]:
    """Quantise float32 [tokens, cols] at `x` in `out` [tokens, quantised_bytes(cols)].

    Returns the address to give to `dot` for the first token, and how many bytes behind it the next token's is.
    """
    at, row = x, cols * 4
    for token in range(tokens):
        given = x + token * cols * 4
        if quantise_input(given, out + token * quantised_bytes(cols), cols) != given:
            at, row = out, quantised_bytes(cols)
    return at, row


def _factors_of_pairs(context: Any, b: Any, factors: Any) -> Callable[[Any], Any]:
    """Code for those of two of 16 blocks: lanes of the products alternate between the blocks by fours."""
    lanes = ir.Constant(vector(I32), ([0] * 4 + [1] * 4) * 2)

    def permuted(pair: Any) -> Any:
        which = b.add(lanes, splat(b, b.trunc(b.mul(pair, long(2)), I32)))
        return call(b, "llvm.x86.avx512.permvar.sf.512", V16, factors, which)

    def loaded(pair: Any) -> Any:
        two = load(b, kept, b.mul(pair, long(8)), vector(FLOAT, 2))
        return b.shuffle_vector(two, two, lanes)

    if adds_in_words(context):
        return permuted
    # AVX2 has no such permutation across its registers.
    kept = b.ptrtoint(cgutils.alloca_once(b, V16), I64)
    store(b, kept, long(0), factors)
    return loaded


def byte_dot(
    context: Any,
    b: Any,
    q: Any,
    cols: Any,
    weights: Callable[[Any], Any],
    scales: Callable[[Any], Any],
    zero: float | Callable[[Any], Any],
    largest: int,
) -> Any:
    """The dot of unsigned byte weights with a quantised input, in code that multiplies bytes.

    `weights(i)`: 64 numbers, blocks 2i and 2i + 1 in the input's order; `scales(offset)`: the scales of 16 blocks at a
    byte offset into the float16 scales; `zero`: the number that stands for weight 0, or what gives the blocks' minima
    in the same way; `largest`: of the numbers.

    A block's sum of w * x is scale * sum of number * x + minimum * sum of x, where the minimum is -zero * scale if it
    is not given: so the input's block sums, made once, account for it, and the inner loop has integers only. It takes
    two blocks at a time, then one multiply-add by the scales, into two sums in turn, for each would wait for itself.

    Four blocks are read where fewer are left. What lies behind the last block of either side is never used, only
    replaced by 0: the input's buffer serves vectors of several lengths, so its padding may hold bytes of a longer one
    that read as NaN, and 0 * NaN is NaN.
    """
    blocks = b.udiv(cols, long(BLOCK))
    low_at, scales_at, sums_at = quantised_parts(b, q, cols)
    sums, offsets = (simd.zeros(b), simd.zeros(b)), simd.zeros(b)
    if signed(context, largest):
        assert not callable(zero)
        zero -= 128
    lanes, nothing = ir.Constant(vector(I64), list(range(LANES))), constants(0.0)
    with cgutils.for_range(b, b.udiv(b.add(blocks, long(15)), long(16)), intp=I64) as chunk:
        first = b.mul(chunk.index, long(16))
        rest = b.sub(blocks, first)
        valid = b.icmp_signed("<", lanes, splat(b, rest))
        floats_at, halves_at = b.mul(first, long(4)), b.mul(first, long(2))
        scale = b.select(valid, scales(halves_at), nothing)
        input_scale = b.select(valid, load(b, scales_at, floats_at, V16), nothing)
        factors_of = _factors_of_pairs(context, b, b.fmul(scale, input_scale))
        # A given zero's offset needs no selecting: its scale is 0 already.
        offset = b.select(valid, zero(halves_at), nothing) if callable(zero) else b.fmul(scale, constants(-float(zero)))
        block_sums = b.fmul(b.sitofp(load(b, sums_at, floats_at, vector(I32)), V16), input_scale)
        b.store(fma(b, offset, block_sums, b.load(offsets)), offsets)
        rounds = b.udiv(b.add(rest, long(3)), long(4))
        rounds = b.select(b.icmp_signed("<", rounds, long(4)), rounds, long(4))
        with cgutils.for_range(b, rounds, intp=I64) as loop:
            for turn, total in enumerate(sums):
                pair = b.add(b.mul(loop.index, long(2)), long(turn))
                at = b.add(b.mul(chunk.index, long(8)), pair)
                numbers = left(context, b, weights(at), largest)
                whole = constants(0, vector(I32))
                # High parts, times 128, then low parts: 255 * 127 * 4 * 128 + ... stays far below 2^31.
                for start in (q, low_at):
                    products = Products(context, largest, b.shl(whole, constants(7, vector(I32))))
                    products.add(b, numbers, load(b, start, b.mul(at, long(64)), V64))
                    whole = products.total(b)
                b.store(fma(b, b.sitofp(whole, V16), factors_of(pair), b.load(total)), total)
    return simd.total(b, b.fadd(b.fadd(*(b.load(total) for total in sums)), b.load(offsets)))
