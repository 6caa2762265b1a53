"""NamedTuples that kernels take by address.

A tuple of arrays is hundreds of fields to LLVM, and each call passes them one by one: most of what the compiled pass
took to compile. `by_address(record)` writes the fields down once, and kernels get where; to them it is the same
NamedTuple, whose fields never change. Inner NamedTuples are by address too. The arrays are not counted: whoever holds
the `Struct` keeps them alive.
"""

from importlib import import_module
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.core.datamodel.models import OpaqueModel
from numba.core.typing.templates import AttributeTemplate
from numba.extending import NativeValue, infer_getattr, lower_getattr_generic, register_model, typeof_impl, unbox

from warmfront.shared.kernels.simd import I64, long
from warmfront.shared.machine.memory import address

__all__ = ["Struct", "by_address"]

Record = TypeVar("Record", bound=tuple[Any, ...])


class Struct:
    """A NamedTuple of numbers, arrays and such tuples as kernels read it: 8 bytes for a number, for an array its
    address, shape and strides."""

    __slots__ = ("_record", "_words", "address", "kind")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._record, name)

    def __init__(self, record: tuple[Any, ...]) -> None:
        self._record, self.kind = record, numba.typeof(record)
        self._words = np.array(_words(record, self.kind), np.uint64)
        self.address = address(self._words)


def by_address(record: Record) -> Record:
    """`record` for kernels; raises TypeError for a field that they cannot take."""
    return cast(Record, Struct(record))


def _words(value: Any, kind: Any) -> list[Any]:
    """What stands at the place of a field."""
    if isinstance(kind, _StructType):
        return [value.address]
    if isinstance(kind, types.BaseNamedTuple):
        return [word for each, inner in zip(value, kind.types, strict=True) for word in _words(each, inner)]
    if isinstance(kind, types.Array):
        return [value.ctypes.data, *value.shape, *value.strides]
    if isinstance(kind, types.Float):
        return [np.array([value, 0], f"f{kind.bitwidth // 8}").view(np.uint64)[0]]
    if isinstance(kind, types.Integer | types.Boolean):
        return [int(value) & 0xFFFFFFFFFFFFFFFF]
    raise TypeError(f"kernels take no {kind} by address")


def _size(kind: Any) -> int:
    """Words that a field takes."""
    if isinstance(kind, types.BaseNamedTuple):
        return sum(map(_size, kind.types))
    return 1 + 2 * kind.ndim if isinstance(kind, types.Array) else 1


class _StructType(types.Type):  # type: ignore[misc]
    def __init__(self, kind: types.BaseNamedTuple) -> None:
        super().__init__(f"struct({kind.name})")
        self.kind = kind

    def place(self, name: str) -> tuple[int, Any]:
        """The first word of a field, and its type."""
        index = self.kind.fields.index(name)
        return sum(map(_size, self.kind.types[:index])), self.kind.types[index]


@typeof_impl.register(Struct)
def _typeof(value: Struct, _context: Any) -> _StructType:
    return _StructType(value.kind)


register_model(_StructType)(OpaqueModel)


@unbox(_StructType)
def _unbox(_type: Any, value: Any, c: Any) -> Any:
    at = c.pyapi.object_getattr_string(value, "address")
    number = c.pyapi.long_as_longlong(at)
    c.pyapi.decref(at)
    failed = cgutils.is_not_null(c.builder, c.pyapi.err_occurred())
    return NativeValue(c.builder.inttoptr(number, cgutils.voidptr_t), is_error=failed)


@infer_getattr
class _Fields(AttributeTemplate):  # type: ignore[misc]
    key = _StructType

    def generic_resolve(self, struct: _StructType, name: str) -> Any:
        if name in struct.kind.fields:
            kind = struct.place(name)[1]
            return _StructType(kind) if isinstance(kind, types.BaseNamedTuple) else kind
        return None


@lower_getattr_generic(_StructType)
def _field(context: Any, builder: Any, struct: _StructType, value: Any, name: str) -> Any:
    place, kind = struct.place(name)
    words = builder.bitcast(value, I64.as_pointer())

    def word(index: int, llvm_type: Any = I64) -> Any:
        at = builder.gep(words, [long(place + index)])
        loaded = builder.load(builder.bitcast(at, llvm_type.as_pointer()))
        # Nobody writes there while a kernel runs: LLVM need not read it again after each store.
        loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
        return loaded

    if isinstance(kind, _StructType):
        return builder.inttoptr(word(0), cgutils.voidptr_t)
    if isinstance(kind, types.BaseNamedTuple):
        return builder.bitcast(builder.gep(words, [long(place)]), cgutils.voidptr_t)
    if not isinstance(kind, types.Array):
        return context.data_model_manager[kind].from_data(builder, word(0, context.get_data_type(kind)))
    # Imported where something is compiled, which most starts do not: it takes a tenth of them.
    arrays = import_module("numba.np.arrayobj")
    array = arrays.make_array(kind)(context, builder)
    arrays.populate_array(
        array,
        data=builder.inttoptr(word(0), context.get_data_type(kind.dtype).as_pointer()),
        shape=[word(1 + i) for i in range(kind.ndim)],
        strides=[word(1 + kind.ndim + i) for i in range(kind.ndim)],
        itemsize=context.get_constant(types.intp, kind.dtype.bitwidth // 8),
        meminfo=None,
    )
    return array._getvalue()
