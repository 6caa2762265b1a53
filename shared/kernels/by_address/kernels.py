"""Kernels that are compiled apart and called by address.

A kernel that another calls is compiled into it once more, and so on upwards; and whatever a kernel might call must be
compiled before it runs. What is called by address is compiled once, and only where a run needs it: its caller is told
where it is, 0 for what is not to be called.
"""

from typing import Any

import numba
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.core.types.misc import unliteral
from numba.extending import intrinsic

from warmfront.shared.kernels.jit import compile_for

__all__ = ["call_at", "entry_of"]


def entry_of(function: Any, *arguments: object) -> int:
    """The address of the kernel `function`, which returns an integer, compiled for the types of `arguments`.

    They are to be of the types that it is called with: integers are int64.
    """
    compile_for(function, *arguments)
    result = function.overloads[tuple(map(numba.typeof, arguments))]
    assert unliteral(result.signature.return_type) == types.int64, result.signature
    return int(result.library.get_pointer_to_function(result.fndesc.llvm_func_name))


@intrinsic
def call_at(context, address, *arguments):
    """What the kernel at `address` returns for `arguments`."""
    kinds = tuple(map(unliteral, arguments))
    for kind in kinds:
        for field in kind if isinstance(kind, types.BaseTuple) else (kind,):
            if isinstance(field, types.Integer) and unliteral(field) != types.int64:
                raise TypingError(f"{field}, where the kernel that is called takes an int64")

    def build(ctx, builder, _signature, values):
        convention = ctx.call_conv
        kernel_type = convention.get_function_type(types.int64, kinds)
        function = builder.inttoptr(values[0], kernel_type.as_pointer())
        parts = cgutils.unpack_tuple(builder, values[1])
        status, result = convention.call_function(builder, function, types.int64, kinds, parts)
        with cgutils.if_unlikely(builder, status.is_error):
            convention.return_status_propagate(builder, status)
        return result

    return types.int64(address, types.StarArgTuple.from_types(kinds)), build
