"""What numba has no words for: vector registers (comparisons as bits, products), and addresses."""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 64
"""Entries that are compared at once."""

_VECTOR = ir.VectorType(ir.FloatType(), LANES)


def _registers() -> tuple[int, int]:
    """Floats in a vector register of this processor, and registers of columns taken at once.

    The sums of `ROWS` rows are to fit into the 16 or 32 registers that there are.
    """
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 4
    if features.get("avx2"):
        return 8, 2
    return (4, 4) if platform.machine() in ("aarch64", "arm64") else (4, 2)


_FLOATS, _BESIDE = _registers()
ROWS = 6
"""Rows whose products are summed at once: each number of the matrix is read once for all."""
COLUMNS = _FLOATS * _BESIDE
"""Columns whose products with `ROWS` rows are summed at once."""
ROW_COLUMNS = 4 * COLUMNS
"""Columns whose products with a single row are summed at once."""


def _reaching(_: Any, row: Any, start: Any, bound: Any) -> Any:
    """Which of the entries ``row[start : start + LANES]`` are at least `bound`, as bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        entries = _loaded(context, builder, signature.args[0], args[0], args[1])
        bounds = _everywhere(builder, _VECTOR, args[2])
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


def _products(rows: int, vectors: int, *, onto: bool = False) -> Any:
    """Make `products` for so many rows, and columns of so many registers.

    With `onto` the products are added to what is in `out`, and the bias is not.
    """

    def products(_: Any, x: Any, depth: Any, matrix: Any, width: Any, bias: Any, out: Any) -> Any:
        """Write ``x @ matrix + bias`` for a few rows and columns, all of float32.

        Parameters
        ----------
        x, depth
            Address of vectors, one after another, and their length.
        matrix, width
            Address of the first of the columns [depth, width], and how many numbers a row has.
        bias
            Address of that of the first of the columns.
        out
            Address of the result, whose rows are of `width` numbers too.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, depth, matrix, width, bias, out = args
            number = depth.type
            below, across = (
                builder.mul(length, ir.Constant(number, 4)) for length in (depth, width)
            )
            kind = ir.VectorType(ir.FloatType(), _FLOATS)
            places = [
                builder.add(out, builder.mul(across, ir.Constant(number, r))) for r in range(rows)
            ]
            first = [[ir.Constant(kind, [0.0] * _FLOATS)] * vectors] * rows
            if onto:
                first = [
                    [_load(builder, kind, place, v) for v in range(vectors)] for place in places
                ]
            before = builder.block
            loop = builder.append_basic_block("products")
            after = builder.append_basic_block("products.end")
            builder.branch(loop)
            builder.position_at_end(loop)
            left, at_x, at_matrix = builder.phi(number), builder.phi(number), builder.phi(number)
            sums = [[builder.phi(kind) for _ in range(vectors)] for _ in range(rows)]
            there = [_load(builder, kind, at_matrix, v) for v in range(vectors)]
            added = []
            for r in range(rows):
                place = builder.add(at_x, builder.mul(below, ir.Constant(number, r)))
                entry = _everywhere(builder, kind, _load(builder, ir.FloatType(), place, 0))
                fused = ("contract",)
                added.append(
                    [
                        builder.fadd(builder.fmul(entry, row, flags=fused), total, flags=fused)
                        for row, total in zip(there, sums[r], strict=True)
                    ]
                )
            next_left = builder.sub(left, ir.Constant(number, 1))
            steps = [
                (left, depth, next_left),
                (at_x, x, builder.add(at_x, ir.Constant(number, 4))),
                (at_matrix, matrix, builder.add(at_matrix, across)),
            ]
            for r in range(rows):
                steps += list(zip(sums[r], first[r], added[r], strict=True))
            for phi, start, following in steps:
                phi.add_incoming(start, before)
                phi.add_incoming(following, loop)
            more = builder.icmp_signed(">", next_left, ir.Constant(number, 0))
            builder.cbranch(more, loop, after)
            builder.position_at_end(after)
            for place, row in zip(places, added, strict=True):
                for v, total in enumerate(row):
                    if not onto:
                        total = builder.fadd(total, _load(builder, kind, bias, v))
                    builder.store(total, _pointer(builder, kind, place, v), align=4)
            return context.get_dummy_value()

        return types.void(x, depth, matrix, width, bias, out), generate

    return products


def _pointer(builder: Any, kind: Any, address: Any, number: int) -> Any:
    """To the vector of this kind that so many others precede at an address."""
    place = builder.add(address, ir.Constant(address.type, 4 * _FLOATS * number))
    return builder.inttoptr(place, kind.as_pointer())


def _load(builder: Any, kind: Any, address: Any, number: int) -> Any:
    return builder.load(_pointer(builder, kind, address, number), align=4)


def _everywhere(builder: Any, kind: Any, value: Any) -> Any:
    """A vector of equal entries."""
    nothing = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
    places = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
    return builder.shuffle_vector(one, nothing, places)


def _loaded(context: Any, builder: Any, kind: Any, array: Any, start: Any) -> Any:
    """Entries of a float32 array from `start` on."""
    place = builder.gep(context.make_array(kind)(context, builder, array).data, [start])
    return builder.load(builder.bitcast(place, _VECTOR.as_pointer()), align=4)


reaching: Any = intrinsic(_reaching)
above: Any = intrinsic(_above)
lowest: Any = intrinsic(_lowest)
at_address: Any = intrinsic(_at_address)
fetch: Any = intrinsic(_fetch)
few_rows: Any = intrinsic(_products(ROWS, _BESIDE))
one_row: Any = intrinsic(_products(1, 4 * _BESIDE, onto=True))
