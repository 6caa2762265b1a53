"""Lists of neurons, and masks of them: 32 neurons, a group, to a word."""

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.simd import I32, call
from warmfront.shared.model.bundle import GROUP

__all__ = ["group_start", "list_masked", "lowest_bit", "set_bit"]

Ints = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint32]


@intrinsic
def lowest_bit(context, word):
    """The number of the lowest bit set in a word that is not 0."""

    def build(context, b, _signature, arguments):
        return call(b, "llvm.cttz.i32", I32, arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int32(types.uint32), build


@kernel
def set_bit(words: Words, neuron: int) -> None:
    """Set the bit of a neuron, 32 neurons a word."""
    words[neuron // GROUP] |= np.uint32(1) << np.uint32(neuron % GROUP)


@kernel
def list_masked(words: Words, groups: int, listed: Ints) -> int:
    """List the neurons whose bits are set in the first `groups` words, 32 neurons a word; returns their number."""
    count = 0
    for group in range(groups):
        word = words[group]
        while word != 0:
            listed[count] = group * GROUP + lowest_bit(word)
            count += 1
            word &= word - np.uint32(1)
    return count


@kernel
def group_start(listed: Ints, count: int, i: int) -> int:
    """The first entry from `i` on of an ascending list of `count` neurons that begins a group; `count` if none does."""
    while 0 < i < count and listed[i] // GROUP == listed[i - 1] // GROUP:
        i += 1
    return i
