"""Loops over rows on a CPU, compiled by numba: selection, a steered decode, the best items.

A torch operation costs microseconds to call and reads its operands from memory anew; steering one
user vector takes a dozen of them. Here a row stays in the cache from its pre-activations to the
change of the vector. Arrays in, arrays out: what may be computed so is for the callers to know.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

_FINITE = {"nnan", "ninf", "nsz", "reassoc", "contract"}  # assumed only where it was looked at


def _compiled(
    signature: str | None = None, *, fastmath: set[str] | bool = False
) -> Callable[[Function], Function]:
    """Compile to machine code that other threads run beside, kept on disk where there is room."""

    def decorate(function: Function) -> Function:
        jit: Any = partial(njit, nogil=True, fastmath=fastmath)
        signatures = () if signature is None else (signature,)
        compiled: Function
        try:
            compiled = jit(*signatures, cache=True)(function)
        except Exception:  # nowhere to keep it, no room there, or what is kept is damaged
            compiled = jit(*signatures)(function)
        return compiled

    return decorate


# Loops count their index: over values themselves they would not be vectorised.


@_compiled()
def _is_finite(row: Floats) -> bool:
    bits, largest = row.view(np.uint32), np.uint32(0)
    for i in range(len(bits)):
        largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
    return bool(largest < np.uint32(0x7F800000))


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
        if count >= k:
            low = middle
            if count <= k + 1:
                break
        else:
            high = middle
    return low


@_compiled(fastmath=_FINITE)
def _select(row: Floats, maxima: Floats, k: int, entries: Floats, indices: Indices) -> None:
    """The k largest entries of a finite row and where they are, in no order.

    The maxima of groups of entries give a bound that k of the entries reach; those that do are
    few, and the smallest of them are dropped. `entries` and `indices` hold one more than the row.
    """
    width = len(maxima)
    groups = row.reshape(len(row) // width, width)  # entry j is in group j % width
    for i in range(width):
        maxima[i] = groups[0, i]
    for g in range(0, len(groups) - 3, 4):  # their number is 1 or a multiple of 4
        for i in range(width):
            one, other = (
                max(groups[g, i], groups[g + 1, i]),
                max(groups[g + 2, i], groups[g + 3, i]),
            )
            maxima[i] = max(maxima[i], max(one, other))
    bound = _lower_bound(maxima, k)
    found = 0
    for i in range(width):
        if maxima[i] >= bound:
            for g in range(len(groups)):
                value = groups[g, i]
                entries[found], indices[found] = value, g * width + i
                found += value >= bound
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
        if reach >= k:
            low, count = middle, reach
        else:
            high, above = np.int32(middle - 1), reach
    equal = k - above if count > k else count
    kept = 0
    for i in range(found):
        order = _ordered(bits[i])
        if order > low or (order == low and equal > 0):
            equal -= order == low
            entries[kept], indices[kept] = entries[i], indices[i]
            kept += 1


@_compiled()
def _ordered(bits: Any) -> Any:
    """The bits of a float as a number in the order of the floats."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@_compiled(fastmath={"contract"})
def _decode(out: Floats, decoder: Floats, entries: Floats, indices: Indices, k: int) -> None:
    for t in range(len(out)):
        out[t] = 0
    for i in range(k):
        value = entries[i]
        if value > 0:
            direction = decoder[indices[i]]
            for t in range(len(out)):
                out[t] += value * direction[t]


@_compiled()
def _width_of_maxima(width: int, k: int) -> int:
    for groups in (16, 8, 4):
        if width % groups == 0 and width // groups >= 4 * k:
            return width // groups
    return width


@_compiled("boolean(float32[:, ::1], int64, int64[:, ::1])")
def largest(values: Floats, k: int, indices: Indices) -> bool:
    """Where the k largest entries of each row of `values` [B, N] are, into `indices` [B, k].

    False, with nothing of use in `indices`, if an entry is not finite.
    """
    rows, width = values.shape
    maxima = np.empty(_width_of_maxima(width, k), np.float32)
    entries, found = np.empty(width + 1, np.float32), np.empty(width + 1, np.int64)
    for r in range(rows):
        if not _is_finite(values[r]):
            return False
        _select(values[r], maxima, k, entries, found)
        for i in range(k):
            indices[r, i] = found[i]
    return True


@_compiled(
    "boolean(float32[:, ::1], float32[::1], float32[::1], float32[:, ::1], int64, boolean, "
    "float32[:, ::1])"
)
def steered(
    pre_acts: Floats,
    shift: Floats,
    strength: Floats,
    decoder: Floats,
    k: int,
    delta: bool,
    out: Floats,
) -> bool:
    """What shifted pre-activations decode to, less what the unshifted ones do if `delta`.

    Parameters
    ----------
    pre_acts, shift
        [B, d_sae] and [d_sae].
    strength
        Factor on the shift, [B], or [1] for all rows.
    decoder
        [d_sae, H].
    k
        How many latents are active.
    delta
        Whether to take off what `pre_acts` themselves decode to.
    out
        Where it goes, [B, H].

    Returns
    -------
    bool
        False, with nothing of use in `out`, if a shifted pre-activation is not finite.
    """
    rows, width = pre_acts.shape
    maxima = np.empty(_width_of_maxima(width, k), np.float32)
    entries, indices = np.empty(width + 1, np.float32), np.empty(width + 1, np.int64)
    moved, before = np.empty(width, np.float32), np.empty(out.shape[1], np.float32)
    for r in range(rows):
        alpha = strength[r if len(strength) > 1 else 0]
        for j in range(width):
            moved[j] = pre_acts[r, j] + alpha * shift[j]
        if not _is_finite(moved):
            return False
        _select(moved, maxima, k, entries, indices)
        _decode(out[r], decoder, entries, indices, k)
        if delta:  # summed by itself, so that an empty edit comes to nothing exactly
            _select(pre_acts[r], maxima, k, entries, indices)
            _decode(before, decoder, entries, indices, k)
            for t in range(len(before)):
                out[r, t] -= before[t]
    return True


@_compiled(
    "boolean(float32[:, ::1], float32[::1], float32[::1], float32[:, ::1], int64, "
    "float32[:, ::1], int64[:, ::1], float32[:, ::1])"
)
def moved(
    pre_acts: Floats,
    shift: Floats,
    strength: Floats,
    decoder: Floats,
    k: int,
    values: Floats,
    indices: Indices,
    out: Floats,
) -> bool:
    """`steered` with `delta`, where the active latents of `pre_acts` are known already.

    `values` and `indices` [B, k] are in the order in which `largest` finds them, so that an empty
    edit comes to nothing exactly.
    """
    width = pre_acts.shape[1]
    maxima = np.empty(_width_of_maxima(width, k), np.float32)
    entries, found = np.empty(width + 1, np.float32), np.empty(width + 1, np.int64)
    row, before = np.empty(width, np.float32), np.empty(out.shape[1], np.float32)
    for r in range(len(pre_acts)):
        alpha = strength[r if len(strength) > 1 else 0]
        for j in range(width):
            row[j] = pre_acts[r, j] + alpha * shift[j]
        if not _is_finite(row):
            return False
        _select(row, maxima, k, entries, found)
        _decode(out[r], decoder, entries, found, k)
        _decode(before, decoder, values[r], indices[r], k)
        for t in range(len(before)):
            out[r, t] -= before[t]
    return True


@_compiled("void(float32[:, ::1], int64[:, ::1], float32[:, ::1], float32[:, ::1])")
def summed(values: Floats, indices: Indices, vectors: Floats, out: Floats) -> None:
    """The sum of `vectors` [V, H] by the active latents, `values` and `indices` [B, k]: [B, H]."""
    for r in range(len(values)):
        _decode(out[r], vectors, values[r], indices[r], values.shape[1])


@_compiled(
    "void(float32[:, ::1], int64[:, ::1], float32[::1], float32[::1], float32[::1], "
    "float32[:, ::1], float32[:, ::1])"
)
def bounded(
    values: Floats,
    indices: Indices,
    gain: Floats,
    low: Floats,
    high: Floats,
    decoder: Floats,
    out: Floats,
) -> None:
    """What scaling and bounding the active latents changes, beside what `low` gives to everyone.

    Parameters
    ----------
    values, indices
        The active latents, [B, k] each.
    gain, low, high
        Factor and bounds of every latent, [d_sae].
    decoder
        [d_sae, H].
    out
        Where it goes, [B, H].
    """
    for r in range(len(values)):
        for t in range(out.shape[1]):
            out[r, t] = 0
        for i in range(values.shape[1]):
            j, value = indices[r, i], values[r, i]
            change = min(max(gain[j] * value, low[j]), high[j]) - value - low[j]
            if change != 0:
                direction = decoder[j]
                for t in range(out.shape[1]):
                    out[r, t] += change * direction[t]


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
