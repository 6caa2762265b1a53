"""Building blocks of the kernels: explicit vectors of LLVM IR, 16 lanes wide.

LLVM lowers them to whatever the machine has: one AVX-512 register, two of AVX2, four of NEON. Multiply-adds are
`fmuladd`: fused where the machine can. Every sum has a fixed order, so results repeat bit for bit.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from warmfront.shared.kernels.fp16 import widened
from warmfront.shared.model.formats import BLOCK, Kind, row_bytes

__all__ = [
    "BF16",
    "F16",
    "F32",
    "FLOAT",
    "I8",
    "I16",
    "I32",
    "I64",
    "LANES",
    "Q4",
    "Q4C",
    "Q4S",
    "Q8",
    "V16",
    "call",
    "column_scales",
    "fma",
    "load",
    "long",
    "prefetch",
    "prefetch_line",
    "splat",
    "store",
    "total",
    "vector",
    "weights_of",
    "zeros",
]

LANES = 16
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT = ir.FloatType()
V16 = ir.VectorType(FLOAT, LANES)
F32, F16, BF16, Q8, Q4, Q4S, Q4C = (int(kind) for kind in Kind)


def vector(element: Any, lanes: int = LANES) -> Any:
    """A vector type."""
    return ir.VectorType(element, lanes)


def long(value: int) -> Any:
    """A 64-bit constant."""
    return ir.Constant(I64, value)


def load(b: Any, address: Any, offset: Any, type_: Any) -> Any:
    """Load from any address."""
    value = b.load(b.inttoptr(b.add(address, offset), type_.as_pointer()))
    value.align = 1
    return value


def store(b: Any, address: Any, offset: Any, value: Any) -> None:
    """Store to any address."""
    b.store(value, b.inttoptr(b.add(address, offset), value.type.as_pointer())).align = 1


def splat(b: Any, scalar: Any) -> Any:
    """The scalar in all lanes."""
    nothing = ir.Constant(vector(scalar.type), ir.Undefined)
    one = b.insert_element(nothing, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(one, nothing, ir.Constant(vector(I32), [0] * LANES))


def zeros(b: Any) -> Any:
    """A float vector variable that starts at zero."""
    return cgutils.alloca_once_value(b, ir.Constant(V16, [0.0] * LANES))


def call(b: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call an LLVM intrinsic."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), arguments)


def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z."""
    return call(b, "llvm.fmuladd.v16f32", V16, x, y, z)


def total(b: Any, lanes: Any) -> Any:
    """The sum of all lanes."""
    name = "llvm.vector.reduce.fadd.v16f32"
    reduce = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(FLOAT, [FLOAT, V16]), name)
    return b.call(reduce, [ir.Constant(FLOAT, 0.0), lanes], fastmath=("reassoc",))


def prefetch(b: Any, kind: int, ahead: Any, block: Any, blocks: int = 1) -> None:
    """Fetch what `blocks` from `block` on are to their row, of the row at `ahead`."""
    size = row_bytes(kind, BLOCK)
    for line in range(0, size * blocks, 64):
        prefetch_line(b, b.add(ahead, b.add(b.mul(block, long(size)), long(line))))


def prefetch_line(b: Any, address: Any) -> None:
    """Fetch the cache line at `address`, which may be any."""
    hints = (ir.Constant(I32, value) for value in (0, 3, 1))
    call(b, "llvm.prefetch.p0", ir.VoidType(), b.inttoptr(address, I8.as_pointer()), *hints)


def _half(context: Any, b: Any, row: Any, offset: Any) -> Any:
    """The float16 at `offset`, in all lanes. Spread before it is widened: a scalar load of 16 bits merges into an old
    register, and the kernel would wait for its own accumulator (measured: half the speed)."""
    return widened(context, b, splat(b, load(b, row, offset, I16)))


def weights_of(context: Any, b: Any, kind: int, row: Any, cols: Any, block: Any) -> tuple[Any, Any]:
    """Weights 0..15 and 16..31 of `block` of a packed row, as two float32 vectors; of Q4C the bare numbers."""
    first = b.mul(block, long({F32: 128, F16: 64, BF16: 64, Q8: 32, Q4: 16, Q4S: 16, Q4C: 16}[kind]))
    second = b.add(first, long({F32: 64, F16: 32, BF16: 32, Q8: 16, Q4: 8, Q4S: 8, Q4C: 8}[kind]))
    if kind == F32:
        return load(b, row, first, V16), load(b, row, second, V16)
    if kind == F16:
        low, high = (widened(context, b, load(b, row, at, vector(I16))) for at in (first, second))
        return low, high
    if kind == BF16:
        shift = ir.Constant(vector(I32), [16] * LANES)
        longs = (b.zext(load(b, row, at, vector(I16)), vector(I32)) for at in (first, second))
        low, high = (b.bitcast(b.shl(each, shift), V16) for each in longs)
        return low, high
    scale_at = b.mul(block, long(2))
    if kind == Q8:
        scale = _half(context, b, row, b.add(cols, scale_at))
        longs = (b.sext(load(b, row, at, vector(I8)), vector(I32)) for at in (first, second))
        low, high = (b.fmul(b.sitofp(each, V16), scale) for each in longs)
        return low, high
    both = b.zext(load(b, row, first, vector(I8)), vector(I32))
    nibbles = (
        b.and_(both, ir.Constant(vector(I32), [15] * LANES)),
        b.lshr(both, ir.Constant(vector(I32), [4] * LANES)),
    )
    low, high = (b.sitofp(nibble, V16) for nibble in nibbles)
    if kind == Q4C:
        return low, high
    half = b.udiv(cols, long(2))
    scale = _half(context, b, row, b.add(half, scale_at))
    if kind == Q4S:
        minimum = b.fmul(scale, ir.Constant(V16, [-8.0] * LANES))
    else:
        minimum = _half(context, b, row, b.add(b.add(half, b.udiv(cols, long(BLOCK // 2))), scale_at))
    return fma(b, low, scale, minimum), fma(b, high, scale, minimum)


def column_scales(context: Any, b: Any, tail: Any, cols: Any, at: Any) -> tuple[Any, Any]:
    """Scale and minimum of 16 columns, the first at byte offset `at` of the scales, from a group's tail."""
    minima = b.add(at, b.mul(cols, long(2)))
    scale, minimum = (widened(context, b, load(b, tail, start, vector(I16))) for start in (at, minima))
    return scale, minimum
