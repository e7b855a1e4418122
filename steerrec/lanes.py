"""What numba has no words for: many comparisons at once as bits, and memory at an address."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 64
"""Entries that are compared at once."""

_VECTOR = ir.VectorType(ir.FloatType(), LANES)


def _reaching(_: Any, row: Any, start: Any, bound: Any) -> Any:
    """Which of the entries ``row[start : start + LANES]`` are at least `bound`, as bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        entries = _loaded(context, builder, signature.args[0], args[0], args[1])
        nothing = ir.Constant(_VECTOR, ir.Undefined)
        one = builder.insert_element(nothing, args[2], ir.Constant(ir.IntType(32), 0))
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        bounds = builder.shuffle_vector(one, nothing, everywhere)
        return builder.bitcast(builder.fcmp_ordered(">=", entries, bounds), ir.IntType(LANES))

    return types.uint64(row, start, bound), generate


def _above(_: Any, row: Any, floor: Any, start: Any) -> Any:
    """Which of the entries ``row[start : start + LANES]`` are above those of `floor`, as bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        entries, floors = (
            _loaded(context, builder, signature.args[i], args[i], args[2]) for i in (0, 1)
        )
        return builder.bitcast(builder.fcmp_ordered(">", entries, floors), ir.IntType(LANES))

    return types.uint64(row, floor, start), generate


def _lowest(_: Any, bits: Any) -> Any:
    """The place of the lowest bit that is set, of bits that are not all 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(bits), generate


def _at_address(_: Any, address: Any) -> Any:
    """A pointer for `numba.carray`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


def _fetch(_: Any, address: Any) -> Any:
    """Have the memory at an address brought into the cache, without waiting for it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        insert: Any = cgutils.get_or_insert_function
        function = insert(builder.module, kind, "llvm.prefetch.p0")
        how = [ir.Constant(number, value) for value in (0, 3, 1)]  # to read, near, data
        builder.call(function, [builder.inttoptr(args[0], cgutils.voidptr_t), *how])
        return context.get_dummy_value()

    return types.void(address), generate


def _loaded(context: Any, builder: Any, kind: Any, array: Any, start: Any) -> Any:
    """Entries of a float32 array from `start` on."""
    place = builder.gep(context.make_array(kind)(context, builder, array).data, [start])
    return builder.load(builder.bitcast(place, _VECTOR.as_pointer()), align=4)


reaching: Any = intrinsic(_reaching)
above: Any = intrinsic(_above)
lowest: Any = intrinsic(_lowest)
at_address: Any = intrinsic(_at_address)
fetch: Any = intrinsic(_fetch)
