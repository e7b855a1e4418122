"""A whole recipe in one pass over rows on a CPU, compiled by numba: see `plans` for its tables.

A torch operation costs microseconds to call and reads its operands from memory anew; a recipe takes
dozens of them. Here a row stays in the cache from its pre-activations to the steered vector: what
is active is selected once for all terms, and decoder rows are added once for all that is changed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from steerrec.kernels import (
    Floats,
    Indices,
    _add_rows,
    _compiled,
    _guess,
    _is_finite,
    _select,
    _width_of_maxima,
)
from steerrec.lanes import LANES, above, at_address, lowest

_SHIFT, _RESPONSE = range(2)  # of `terms.TERMS`
_NUMBER, _NEURON = range(2)  # of `terms.FACTORS`
_ADDED, _PLAIN, _REPLACED = range(3)
"""What becomes of the sum: the vector is added, nothing is, or the decoder bias is."""


@_compiled()
def _vector(address: int, length: int) -> Any:
    return carray(at_address(address), (length,), np.float32)


@_compiled()
def _matrix(address: int, rows: int, width: int) -> Any:
    return carray(at_address(address), (rows, width), np.float32)


@_compiled(fastmath={"reassoc", "contract"})
def _shift(row: Floats, strength: Any, shift: Floats, moved: Floats) -> bool:
    """Write ``row + strength * shift`` to `moved`; False if an entry of it is not finite."""
    nothing = np.float32(0)
    for j in range(len(row)):
        value = row[j] + strength * shift[j]
        moved[j] = value
        nothing += value * np.float32(0)
    return bool(nothing == 0)


@_compiled(fastmath={"reassoc", "contract"})
def _dot(one: Floats, other: Floats) -> Any:
    total = np.float32(0)
    for t in range(len(one)):
        total += one[t] * other[t]
    return total


@_compiled()
def _list_above(row: Floats, floor: Floats, entries: Floats, indices: Indices) -> int:
    """The entries above their floors, in order, and how many they are."""
    found, whole = 0, len(row) - len(row) % LANES
    for start in range(0, whole, LANES):
        bits = above(row, floor, start)
        while bits != 0:
            j = start + lowest(bits)
            bits &= bits - np.uint64(1)
            entries[found], indices[found] = row[j], j
            found += 1
    for j in range(whole, len(row)):
        if row[j] > floor[j]:
            entries[found], indices[found] = row[j], j
            found += 1
    return found


@_compiled()
def _active(
    row: Floats,
    guess: Any,
    maxima: Floats,
    k: int,
    floor: Floats,
    entries: Floats,
    indices: Indices,
) -> int:
    """The active latents of a finite row, all above 0, in order, and how many they are.

    What is above `floor`, or without one the k largest.
    """
    if len(floor) > 0:
        return _list_above(row, floor, entries, indices)
    _select(row, guess, maxima, k, entries, indices)
    found = 0
    for i in range(k):
        if entries[i] > 0:
            entries[found], indices[found] = entries[i], indices[i]
            found += 1
    return found


@_compiled()
def _factor(
    factors: Any, f: int, number: Any, x: Floats, entries: Floats, indices: Indices, count: int
) -> Any:
    """The factor in row f of the table for the user whose vector and active latents these are."""
    kind = factors[f, 0]
    if kind == _NUMBER:
        return _vector(factors[f, 1], 1)[0]
    if kind == _NEURON:
        fired = False
        for i in range(count):
            fired |= indices[i] == factors[f, 1] and entries[i] > number
        return np.float32(fired == (factors[f, 2] != 0))
    bounds = _vector(factors[f, 2], 3)
    found = _dot(x, _vector(factors[f, 1], len(x))) + bounds[0]
    return min(max(found, bounds[1]), bounds[2]) if found == found else found


@_compiled()
def _collect(changes: Floats, indices: Indices, count: int, weights: Floats, places: Indices) -> int:
    """Where `changes` are not 0 among these latents, which are set back to 0."""
    found = 0
    for i in range(count):
        j = indices[i]
        if changes[j] != 0:
            weights[found], places[found] = changes[j], j
            changes[j] = 0
            found += 1
    return found


@_compiled(
    "boolean(int64, int64, int64, int64, int64, int64, float32[:, ::1], int64[::1], "
    "int64[:, ::1], int64[::1], int64[:, ::1], float32[::1], int64)"
)
def steered(
    acts_at: int,
    vectors_at: int,
    out_at: int,
    first: int,
    rows: int,
    batch: int,
    strengths: Floats,
    sizes: Indices,
    terms: Any,
    uses: Indices,
    factors: Any,
    thresholds: Floats,
    end: int,
) -> bool:
    """User vectors steered by all terms of a recipe, at one strength or several.

    Parameters
    ----------
    acts_at, vectors_at, out_at
        Where they are: pre-activations of these rows [R, d_sae], the vectors of all users [B, H],
        and where the steered ones go, [A, B, H].
    first, rows, batch
        Number of the first of the rows; how many they are, R; B.
    strengths
        [A, R], or [A, 1] for all rows.
    sizes
        d_sae, H, k (0 if unknown), and where the decoder [d_sae, H], its bias [H] and the
        thresholds [d_sae] are, 0 where there are none and the k largest are active.
    terms
        A row each, int64 [T, 7]: kind, where its up to four operands are, and which of `uses` are
        its factors, from and to.
    uses
        Rows of `factors`.
    factors
        A row each, int64 [F, 3]: kind, and where the number is; or the latent, and whether it has
        to be active; or where weights and bounds are.
    thresholds
        What the latent has to be above, [F].
    end
        `_ADDED`, `_PLAIN` or `_REPLACED`.

    Returns
    -------
    bool
        False, with nothing of use in the output, if a number on the way is not finite.
    """
    width, k, batched = sizes[0], sizes[2], strengths.shape[1] > 1
    decoder, bias = _matrix(sizes[3], width, sizes[1]), _vector(sizes[4], sizes[1])
    floor = np.empty(width if sizes[5] != 0 else 0, np.float32)
    for j in range(len(floor)):
        floor[j] = max(_vector(sizes[5], width)[j], np.float32(0))
    maxima = np.empty(_width_of_maxima(width, k), np.float32)
    entries, indices = np.empty(width, np.float32), np.empty(width, np.int64)  # unsteered
    others, places = np.empty(width, np.float32), np.empty(width, np.int64)  # shifted
    weights, at = np.empty(width, np.float32), np.empty(width, np.int64)  # of decoder rows
    moved, changes = np.empty(width, np.float32), np.zeros(width, np.float32)
    values, total = np.empty(len(factors), np.float32), np.empty(sizes[1], np.float32)
    unknown = -np.float32(np.inf)
    guess, guesses = unknown, np.full((len(strengths), len(terms)), unknown, np.float32)
    for r in range(rows):
        row, count, known = _vector(acts_at + 4 * r * width, width), 0, False
        x = _vector(vectors_at + 4 * (first + r) * len(total), len(total))
        if not _is_finite(row):
            return False
        for a in range(len(strengths)):
            alpha = strengths[a, r if batched else 0]
            out = _vector(out_at + 4 * (a * batch + first + r) * len(total), len(total))
            if alpha == 0 and end != _REPLACED:  # nothing changes, whatever the terms are
                for t in range(len(total)):
                    out[t] = x[t] if end == _ADDED else np.float32(0)
                continue
            for t in range(len(total)):
                total[t] = 0
            if end != _REPLACED and not known:
                known = True
                count = _active(row, guess, maxima, k, floor, entries, indices)
                if len(floor) == 0 and count == k:
                    guess = _guess(entries, k)
                for f in range(len(factors)):
                    values[f] = _factor(factors, f, thresholds[f], x, entries, indices, count)
            pending = False  # whether unsteered latents have changes that are not added yet
            for n in range(len(terms)):
                strength = alpha
                for u in range(terms[n, 5], terms[n, 6]):
                    strength *= values[uses[u]]
                if not np.isfinite(strength):
                    return False
                if strength == 0 and end != _REPLACED:
                    continue
                if terms[n, 0] == _SHIFT:
                    shift = _vector(terms[n, 1], width)
                    if not _shift(row, strength, shift, moved):
                        return False
                    likely = guesses[a, n] if guesses[a, n] > unknown else guess
                    more = _active(moved, likely, maxima, k, floor, others, places)
                    if len(floor) == 0 and more == k:
                        guesses[a, n] = _guess(others, k)
                    for i in range(more):
                        changes[places[i]] += others[i]
                    for i in range(count):
                        changes[indices[i]] -= entries[i]
                    found = _collect(changes, places, more, weights, at)
                    _add_rows(total, decoder, weights, at, found)
                    pending = True
                elif terms[n, 0] == _RESPONSE:
                    vectors = _matrix(terms[n, 1], width, len(total))
                    constant = _vector(terms[n, 2], len(total))
                    for i in range(count):
                        weights[i] = strength * entries[i]
                    _add_rows(total, vectors, weights, indices, count)
                    for t in range(len(total)):
                        total[t] += strength * constant[t]
                else:
                    gain, low = _vector(terms[n, 1], width), _vector(terms[n, 2], width)
                    high, constant = _vector(terms[n, 3], width), _vector(terms[n, 4], len(total))
                    for i in range(count):
                        j, value = indices[i], entries[i]
                        changed = min(max(gain[j] * value, low[j]), high[j])
                        changes[j] += strength * (changed - value - low[j])
                    for t in range(len(total)):
                        total[t] += strength * constant[t]
                    pending = True
            if pending:
                found = _collect(changes, indices, count, weights, at)
                _add_rows(total, decoder, weights, at, found)
            for t in range(len(total)):
                if end == _ADDED:
                    out[t] = x[t] + total[t]
                elif end == _PLAIN:
                    out[t] = total[t]
                else:
                    out[t] = total[t] + bias[t]
    return True
