"""Building blocks of the kernels: explicit vectors of LLVM IR, 16 lanes wide.

LLVM lowers them to whatever the machine has: one AVX-512 register, two of AVX2, four of NEON. Multiply-adds are
`fmuladd`: fused where the machine can. Every sum has a fixed order, so results repeat bit for bit.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from warmfront.shared.model.panels import LANES

__all__ = [
    "FLOAT",
    "I8",
    "I16",
    "I32",
    "I64",
    "V16",
    "call",
    "chosen",
    "constants",
    "fetch",
    "fma",
    "largest",
    "load",
    "long",
    "prefetch_line",
    "splat",
    "store",
    "total",
    "vector",
    "zeros",
]

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT = ir.FloatType()
V16 = ir.VectorType(FLOAT, LANES)


def vector(element: Any, lanes: int = LANES) -> Any:
    """A vector type."""
    return ir.VectorType(element, lanes)


def long(value: int) -> Any:
    """A 64-bit constant."""
    return ir.Constant(I64, value)


def constants(value: Any, type_: Any = V16) -> Any:
    """A vector constant: `value` in every lane of `type_`."""
    return ir.Constant(type_, [value] * type_.count)


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


def chosen(b: Any, number: Any, codes: Sequence[int], emit: Callable[[int], Any]) -> Any:
    """The code `emit(code)` of each of `codes`, of which the 64-bit `number` chooses one at run time: its value.

    One switch, which LLVM makes the cheapest compares of. Any other number is taken for the first code.
    """
    blocks = [b.append_basic_block(f"case.{code}") for code in codes]
    end = b.append_basic_block("chosen")
    switch = b.switch(number, blocks[0])
    values = []
    for code, block in zip(codes, blocks, strict=True):
        if block is not blocks[0]:
            switch.add_case(long(code), block)
        b.position_at_end(block)
        values.append((emit(code), b.block))  # where the code ends
        b.branch(end)
    b.position_at_end(end)
    if values[0][0] is None:
        return None
    value = b.phi(values[0][0].type)
    for each, block in values:
        value.add_incoming(each, block)
    return value


def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z."""
    return call(b, "llvm.fmuladd.v16f32", V16, x, y, z)


def total(b: Any, lanes: Any) -> Any:
    """The sum of all lanes."""
    name = "llvm.vector.reduce.fadd.v16f32"
    reduce = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(FLOAT, [FLOAT, V16]), name)
    return b.call(reduce, [ir.Constant(FLOAT, 0.0), lanes], fastmath=("reassoc",))


def largest(b: Any, vectors: list[Any]) -> Any:
    """The largest of all lanes of float vectors that are not negative; NaN if there is one.

    As integers, whose order is that of such floats, with NaN above all: LLVM reduces floats by a chain of comparisons.
    """
    whole, *others = (b.bitcast(each, vector(I32)) for each in vectors)
    for other in others:
        whole = call(b, "llvm.smax.v16i32", vector(I32), whole, other)
    return b.bitcast(call(b, "llvm.vector.reduce.smax.v16i32", I32, whole), FLOAT)


def prefetch_line(b: Any, address: Any) -> None:
    """Fetch the cache line at `address`, which may be any."""
    hints = (ir.Constant(I32, value) for value in (0, 3, 1))
    call(b, "llvm.prefetch.p0", ir.VoidType(), b.inttoptr(address, I8.as_pointer()), *hints)


def fetch(b: Any, at: Any, ahead: Any, size: int) -> None:
    """Fetch `size` bytes that lie `ahead` bytes behind `at`; where `ahead` is 0 at run time, nothing.

    LLVM takes the question out of small loops; in large ones it is one instruction for each line or more, which the
    kernels do not feel in the cache.
    """
    with b.if_then(b.icmp_signed("!=", ahead, long(0))):
        for line in range(0, size, 64):
            prefetch_line(b, b.add(b.add(at, ahead), long(line)))


def fetch_part(b: Any, at: Any, size: int, step: int, steps: int) -> None:
    """Fetch those lines of `size` bytes at `at` whose turn it is in one of so many steps of arithmetic.

    Spread, lines arrive as fast as rows do; all at once they fill what a core can wait for, and from memory the same
    tiles were read at 26 instead of 32 GB/s.
    """
    lines = -(-size // 64)
    for line in range(lines * step // steps, lines * (step + 1) // steps):
        prefetch_line(b, b.add(at, long(64 * line)))
