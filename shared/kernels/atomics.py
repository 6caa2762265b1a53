"""Atomics, and the clock, the futex and a few other system calls, for compiled code.

numba has no atomics on the CPU; llvmlite has, so each is an LLVM intrinsic. Addresses are int64, words are 64 bits
wide and naturally aligned. `syscall` and `clock_gettime` are declared as external functions of the process rather
than bound through ctypes, because a ctypes pointer would forbid caching of the compiled code; so is where libc keeps
the number of an error.
"""

import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.simd import I8, I32, I64

__all__ = [
    "address_of",
    "bytes_at",
    "clock_ns",
    "drop_pages",
    "fence",
    "fetch_add",
    "floats_at",
    "futex_wait",
    "futex_wake",
    "load_acquire",
    "longs_at",
    "pause",
    "read_at",
    "shorts_at",
    "store_release",
    "words_at",
    "yield_core",
]

_MACHINE = platform.machine()
# Linux system call numbers: futex, sched_yield, pread64, madvise.
_FUTEX, _YIELD, _PREAD, _MADVISE = (202, 24, 17, 28) if _MACHINE == "x86_64" else (98, 124, 67, 233)
_MADV_DONTNEED = 4
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_CLOCK_MONOTONIC = 1


def _external(builder: Any, name: str, result: Any, arguments: list[Any], variadic: bool = False) -> Any:
    return builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(result, arguments, var_arg=variadic), name
    )


@intrinsic
def load_acquire(context, address):
    """The word at `address`; nothing read afterwards can be older."""

    def build(_context, builder, _signature, arguments):
        return builder.load_atomic(builder.inttoptr(arguments[0], I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), build


@intrinsic
def store_release(context, address, value):
    """Publish `value` at `address` after everything written before."""

    def build(ctx, builder, _signature, arguments):
        builder.store_atomic(arguments[1], builder.inttoptr(arguments[0], I64.as_pointer()), "release", 8)
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def fetch_add(context, address, value):
    """Add to the word at `address` and return what it was."""

    def build(_context, builder, _signature, arguments):
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], I64.as_pointer()), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), build


@intrinsic
def fence(context):
    """Order earlier stores before later loads, for the two sides of a sleep/wake race."""

    def build(ctx, builder, _signature, _arguments):
        builder.fence("seq_cst")
        return ctx.get_dummy_value()

    return types.void(), build


@intrinsic
def pause(context):
    """Tell the core that this is a spin loop (nothing where the machine has no such hint)."""

    def build(ctx, builder, _signature, _arguments):
        if _MACHINE == "x86_64":
            builder.call(_external(builder, "llvm.x86.sse2.pause", ir.VoidType(), []), [])
        return ctx.get_dummy_value()

    return types.void(), build


@intrinsic
def _syscall(context, number, a, b, c, d):
    def build(_context, builder, _signature, arguments):
        return builder.call(_external(builder, "syscall", I64, [I64], variadic=True), list(arguments))

    return types.int64(*[types.int64] * 5), build


@intrinsic
def _last_error(context):
    """The number of the thread's last error."""

    def build(_context, builder, _signature, _arguments):
        place = builder.call(_external(builder, "__errno_location", I32.as_pointer(), []), [])
        return builder.load(place)

    return types.int32(), build


@intrinsic
def clock_ns(context):
    """CLOCK_MONOTONIC in nanoseconds; the same clock in every process of the machine."""

    def build(_context, builder, _signature, _arguments):
        with builder.goto_entry_block():
            spec = builder.alloca(ir.ArrayType(I64, 2))
        clock = _external(builder, "clock_gettime", I32, [I32, spec.type])
        builder.call(clock, [ir.Constant(I32, _CLOCK_MONOTONIC), spec])
        seconds, nanoseconds = (
            builder.load(builder.gep(spec, [ir.Constant(I32, 0), ir.Constant(I32, i)])) for i in (0, 1)
        )
        return builder.add(builder.mul(seconds, ir.Constant(I64, 1_000_000_000)), nanoseconds)

    return types.int64(), build


def _pointer_to(element: Any, llvm: Any) -> Any:
    @intrinsic
    def pointer_at(context, address):
        """Pointer for `numba.carray`."""

        def build(_context, builder, _signature, arguments):
            return builder.inttoptr(arguments[0], llvm.as_pointer())

        return types.CPointer(element)(types.int64), build

    return pointer_at


floats_at = _pointer_to(types.float32, ir.FloatType())
longs_at = _pointer_to(types.int64, I64)
shorts_at = _pointer_to(types.uint16, ir.IntType(16))
bytes_at = _pointer_to(types.uint8, I8)
words_at = _pointer_to(types.uint32, I32)


@kernel
def address_of(array: Any) -> Any:
    """The address of an array, in compiled code."""
    return np.int64(array.ctypes.data)


@kernel
def yield_core() -> None:
    """Let another thread of this core run: hand-over in 2.3 us on one core (scripts/bench_handoff.py)."""
    _syscall(_YIELD, 0, 0, 0, 0)


@kernel
def futex_wait(address: int, expected: int, timespec: int) -> None:
    """Sleep while the low half of the word at `address` equals that of `expected`, at most `timespec` (an address)."""
    _syscall(_FUTEX, address, _FUTEX_WAIT, expected & 0xFFFFFFFF, timespec)


@kernel
def futex_wake(address: int) -> None:
    """Wake every sleeper on the word at `address`."""
    _syscall(_FUTEX, address, _FUTEX_WAKE, 0x7FFFFFFF, 0)


@kernel
def read_at(fd: int, address: int, size: int, offset: int) -> int:
    """Read up to `size` bytes of a file from `offset` on; returns how many, 0 at its end, or -errno."""
    count = _syscall(_PREAD, fd, address, size, offset)
    return count if count >= 0 else -int(_last_error())


@kernel
def drop_pages(address: int, size: int) -> None:
    """Give whole pages of private memory back to the kernel at once; they read as zeros from then on."""
    _syscall(_MADVISE, address, size, _MADV_DONTNEED, 0)
