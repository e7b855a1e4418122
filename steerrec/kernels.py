"""Loops over rows on a CPU, compiled by numba: selection, sums of few rows, the best items.

Arrays in, arrays out: what may be computed so is for the callers to know. Recipes: `step_kernels`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numba.np.numpy_support import carray as _carray
from numpy.typing import NDArray

from steerrec.lanes import LANES, at_address, lowest, reaching

carray: Any = _carray

Function = TypeVar("Function", bound=Callable[..., Any])
Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

_FINITE = {"nnan", "ninf", "nsz", "reassoc", "contract"}  # assumed only where it was looked at


def _digest() -> str:
    """Of all loops: one is compiled into another, and numba does not notice that it changed."""
    here = Path(__file__)
    try:
        sources = [*here.parent.glob("*kernels.py"), here.with_name("lanes.py")]
        found = b"".join(map(Path.read_bytes, sorted(sources)))
    except OSError:  # an installation without sources, or in an archive, is that of a release
        found = version("steerrec").encode()
    return hashlib.sha256(found).hexdigest()[:16]


_DIGEST = _digest()


def _compiled(
    signature: str | None = None, *, fastmath: set[str] | bool = False
) -> Callable[[Function], Function]:
    """Compile to machine code that other threads run beside, kept on disk where there is room."""

    def decorate(function: Function) -> Function:
        jit: Any = partial(njit, nogil=True, fastmath=fastmath)
        signatures = () if signature is None else (signature,)
        compiled: Function
        function.__qualname__ += f"_{_DIGEST}"  # part of the name of the file that it is kept in
        try:
            compiled = jit(*signatures, cache=True)(function)
        except Exception:  # nowhere to keep it, no room there, or what is kept is damaged
            compiled = jit(*signatures)(function)
        return compiled

    return decorate


@_compiled()
def _vector(address: int, length: int) -> Any:
    """The float32 numbers at an address."""
    return carray(at_address(address), (length,), np.float32)


# Loops count their index: over values themselves they would not be vectorised.


@_compiled(fastmath={"reassoc", "contract"})
def _is_finite(row: Floats) -> bool:
    nothing = np.float32(0)
    for i in range(len(row)):
        nothing += row[i] * np.float32(0)  # NaN of what is not finite
    return bool(nothing == 0)


@_compiled(fastmath=_FINITE)
def _lower_bound(values: Floats, k: int) -> Any:
    """A number that at least k of the values reach, and hardly more, found by halving."""
    low = high = values[0]
    for i in range(len(values)):
        low, high = min(low, values[i]), max(high, values[i])
    for _ in range(24):
        middle = np.float32(0.5) * (low + high)
        if middle <= low:
            break
        count = 0
        for i in range(len(values)):
            count += values[i] >= middle
        enough = count >= k
        low, high = (middle, high) if enough else (low, middle)
        if enough and count <= k + 1:
            break
    return low


@_compiled(fastmath=_FINITE)
def _bound(row: Floats, maxima: Floats, k: int) -> Any:
    """A number that at least k entries of a finite row reach, and hardly more.

    It is one that k of the maxima of groups of entries reach: entry j is in group j % width.
    """
    width = len(maxima)
    rows = len(row) // width
    groups, rest = row[: rows * width].reshape(rows, width), row[rows * width :]
    for i in range(width):
        maxima[i] = groups[0, i]
    for g in range(0, rows - 3, 4):
        for i in range(width):
            one, other = (
                max(groups[g, i], groups[g + 1, i]),
                max(groups[g + 2, i], groups[g + 3, i]),
            )
            maxima[i] = max(maxima[i], max(one, other))
    for g in range(rows - rows % 4, rows):
        for i in range(width):
            maxima[i] = max(maxima[i], groups[g, i])
    for i in range(len(rest)):
        maxima[i] = max(maxima[i], rest[i])
    return _lower_bound(maxima, k)


# What data decide is decided without branches below: the processor could not foresee them.


@_compiled()
def _list(row: Floats, bound: Any, room: Any, entries: Floats, indices: Indices) -> int:
    """The entries that reach `bound`, in order, and how many they are; `room` as of `_room`."""
    whole, some = len(row) - len(row) % LANES, 0
    for start in range(0, whole, LANES):
        bits = reaching(row, start, bound)
        room[0, some], room[1, some] = bits, start
        some += bits != 0
    room[0, some] = 0
    found = _listed(row, room, entries, indices)
    for j in range(whole, len(row)):
        entries[found], indices[found] = row[j], j
        found += row[j] >= bound
    return found


@_compiled()
def _listed(row: Floats, room: Any, entries: Floats, indices: Indices) -> int:
    """The entries whose bits are set in `room`: bits, and where they start; bits 0 come last."""
    found = n = 0
    bits = room[0, 0]
    while bits != 0:
        j = np.int64(room[1, n]) + lowest(bits)
        entries[found], indices[found] = row[j], j
        found += 1
        bits &= bits - np.uint64(1)
        n += bits == 0
        bits = room[0, n] if bits == 0 else bits
    return found


@_compiled()
def _room(width: int) -> Any:
    return np.empty((2, width // LANES + 1), np.uint64)


@_compiled()
def _select(
    row: Floats, maxima: Floats, room: Any, k: int, entries: Floats, indices: Indices
) -> None:
    """The k largest entries of a finite row in the order of the row; of equal ones the first.

    `entries` and `indices` are one longer than the row.
    """
    found = _list(row, _bound(row, maxima, k), room, entries, indices)
    _keep(entries, indices, found, k)


@_compiled()
def _keep(entries: Floats, indices: Indices, found: int, k: int) -> None:
    """Move the k largest of the first `found` entries to the front; of equal ones the first."""
    bits = entries.view(np.int32)
    low: Any = _ordered(bits[0])
    high: Any = low
    for i in range(found):
        low, high = min(low, _ordered(bits[i])), max(high, _ordered(bits[i]))
    above, count = 0, found
    while count > k and low < high:  # `count` reach low, `above` of them reach more than high
        middle = np.int32((np.int64(low) + np.int64(high) + 1) >> 1)
        reach = 0
        for i in range(found):
            reach += _ordered(bits[i]) >= middle
        enough = reach >= k
        low, count = (middle, reach) if enough else (low, count)
        high, above = (high, above) if enough else (np.int32(middle - 1), reach)
    equal = k - above if count > k else count
    kept = 0
    for i in range(found):
        order = _ordered(bits[i])
        level = (order == low) & (equal > 0)
        equal -= level
        entries[kept], indices[kept] = entries[i], indices[i]
        kept += (order > low) | level


@_compiled()
def _ordered(bits: Any) -> Any:
    """The bits of a float as a number in the order of the floats."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@_compiled(fastmath={"contract"})
def _add_rows(out: Floats, vectors: Floats, weights: Floats, indices: Indices, count: int) -> None:
    """Add the rows of `vectors` [V, H] at the first `count` indices, times their weights."""
    for i in range(0, count - 3, 4):  # four at once: `out` is read and written a fourth as often
        one, two = vectors[indices[i]], vectors[indices[i + 1]]
        three, four = vectors[indices[i + 2]], vectors[indices[i + 3]]
        a, b, c, d = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
        for t in range(len(out)):
            out[t] += (a * one[t] + b * two[t]) + (c * three[t] + d * four[t])
    for i in range(count - count % 4, count):
        row, weight = vectors[indices[i]], weights[i]
        for t in range(len(out)):
            out[t] += weight * row[t]


@_compiled()
def _width_of_maxima(width: int, k: int) -> int:
    """How many groups: enough that few of the k largest share one."""
    return min(width, max(LANES, 4 * k))


@_compiled("boolean(float32[:, ::1], int64, int64[:, ::1])")
def largest(values: Floats, k: int, indices: Indices) -> bool:
    """Where the k largest entries of each row of `values` [B, N] are, into `indices` [B, k].

    False, with nothing of use in `indices`, if an entry is not finite.
    """
    rows, width = values.shape
    maxima = np.empty(_width_of_maxima(width, k), np.float32)
    entries, found = np.empty(width + 1, np.float32), np.empty(width + 1, np.int64)
    room = _room(width)
    for r in range(rows):
        if not _is_finite(values[r]):
            return False
        _select(values[r], maxima, room, k, entries, found)
        for i in range(k):
            indices[r, i] = found[i]
    return True


@_compiled("void(float32[:, ::1], int64[:, ::1], float32[:, ::1], float32[:, ::1])")
def summed(values: Floats, indices: Indices, vectors: Floats, out: Floats) -> None:
    """The sum of `vectors` [V, H] by the active latents, `values` and `indices` [B, w]: [B, H]."""
    for r in range(len(values)):
        for t in range(out.shape[1]):
            out[r, t] = 0
        _add_rows(out[r], vectors, values[r], indices[r], values.shape[1])


_BLOCK = 64  # scores whose largest is looked at before any of them is


@_compiled()
def _has_nan(row: Floats) -> bool:
    bits, largest = row.view(np.uint32), np.uint32(0)
    for i in range(len(bits)):
        largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
    return bool(largest > np.uint32(0x7F800000))


@_compiled(fastmath={"nnan", "nsz", "reassoc"})  # rows with a NaN do not come here
def _insert(row: Floats, rows: Indices, values: Floats, ids: Indices) -> None:
    """Put what is above the worst of `values`, which descend, in its place among them."""
    k, width = len(values), len(row)
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        top = row[start]
        for j in range(start, stop):
            top = max(top, row[j])
        if top <= values[k - 1]:
            continue
        for j in range(start, stop):
            value = row[j]
            if value > values[k - 1]:
                place = k - 1
                while place > 0 and value > values[place - 1]:
                    values[place], ids[place] = values[place - 1], ids[place - 1]
                    place -= 1
                values[place], ids[place] = value, rows[j]


@_compiled("boolean(float32[:, ::1], int64[::1], float32[:, ::1], int64[:, ::1])")
def best(scores: Floats, rows: Indices, values: Floats, ids: Indices) -> bool:
    """Add a chunk of scores to the best so far; equal scores are in the order in which they come.

    Parameters
    ----------
    scores
        [B, C], minus infinity for what is never taken.
    rows
        What the columns are called, [C].
    values, ids
        The k best so far, descending, and what they are called, [B, k]; minus infinity and -1 in
        empty places.

    Returns
    -------
    bool
        False, with nothing of use in `values` and `ids`, if a score is NaN.
    """
    for r in range(len(scores)):
        if _has_nan(scores[r]):
            return False
        _insert(scores[r], rows, values[r], ids[r])
    return True
