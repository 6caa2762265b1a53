"""float16 to float32 and back in LLVM IR: by the machine's own instructions, else by integer arithmetic.

x86 has had the instructions (F16C) since 2012, yet a virtual machine may hide them. LLVM would then call a function
of libgcc that need not be in the process, and the compiled code would jump to nowhere.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from warmfront.shared.kernels.simd import FLOAT, I16, I32, constants

__all__ = ["from_half", "has", "to_half", "widened"]

F16 = ir.HalfType()


def has(context: Any, *features: str) -> bool:
    """Whether the CPU that `context` compiles for has all of these LLVM features."""
    return {f"+{feature}" for feature in features} <= set(context.codegen().magic_tuple()[2].split(","))


def _has_instructions(context: Any) -> bool:
    return bool(context.codegen().magic_tuple()[0].startswith("aarch64")) or has(context, "f16c")


def widened(context: Any, b: Any, halves: Any) -> Any:
    """A vector of float16 bits (i16) as float32."""
    lanes = halves.type.count
    longs, floats = ir.VectorType(I32, lanes), ir.VectorType(FLOAT, lanes)
    if _has_instructions(context):
        return b.fpext(b.bitcast(halves, ir.VectorType(F16, lanes)), floats)

    bits = b.zext(halves, longs)
    sign = b.shl(b.and_(bits, constants(0x8000, longs)), constants(16, longs))
    magnitude = b.and_(bits, constants(0x7FFF, longs))
    # Shifted by 13 the bits are a float32's but for the bias of the exponent, 15 in place of 127: times 2^112, which is
    # exact, and right for subnormal numbers too.
    number = b.fmul(b.bitcast(b.shl(magnitude, constants(13, longs)), floats), constants(2.0**112, floats))
    # Infinities and NaN, whose exponent is all ones, keep one of all ones.
    not_finite = b.icmp_unsigned(">=", magnitude, constants(0x7C00, longs))
    special = b.select(not_finite, constants(0x7F800000, longs), constants(0, longs))
    return b.bitcast(b.or_(b.or_(b.bitcast(number, longs), special), sign), floats)


@intrinsic
def to_half(context, value):
    """The bits of `value` rounded to float16, ties to even."""

    def build(context, b, _signature, arguments):
        if _has_instructions(context):
            return b.bitcast(b.fptrunc(arguments[0], F16), I16)

        def long(number: int) -> Any:
            return ir.Constant(I32, number)

        bits = b.bitcast(arguments[0], I32)
        magnitude = b.and_(bits, long(0x7FFFFFFF))
        # A float32 beside 0.5 has the last place of a subnormal half, 2^-24: the addition rounds, ties to even.
        shifted = b.fadd(b.bitcast(magnitude, FLOAT), ir.Constant(FLOAT, 0.5))
        small = b.sub(b.bitcast(shifted, I32), long(0x3F000000))
        # Normal numbers: half a last place, less one unless the last bit is odd, is added before the shift cuts it off.
        odd = b.and_(b.lshr(magnitude, long(13)), long(1))
        rebiased = b.sub(b.add(magnitude, odd), long((112 << 23) - 0xFFF))
        normal = b.lshr(rebiased, long(13))
        large = b.select(b.icmp_unsigned(">", magnitude, long(0x7F800000)), long(0x7E00), long(0x7C00))
        half = b.select(b.icmp_unsigned("<", magnitude, long(113 << 23)), small, normal)
        half = b.select(b.icmp_unsigned(">=", magnitude, long(143 << 23)), large, half)
        sign = b.and_(b.lshr(bits, long(16)), long(0x8000))
        return b.trunc(b.or_(half, sign), I16)

    return types.uint16(types.float32), build


@intrinsic
def from_half(context, bits):
    """The float32 of the bits of a float16."""

    def build(context, b, _signature, arguments):
        one = b.bitcast(arguments[0], ir.VectorType(I16, 1))
        return b.extract_element(widened(context, b, one), ir.Constant(I32, 0))

    return types.float32(types.uint16), build
