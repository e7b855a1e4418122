"""A whole recipe in one pass over rows on a CPU, compiled by numba: see `plans` for its tables.

A torch operation costs microseconds to call and reads its operands from memory anew; a recipe takes
dozens of them. Here a row stays in the cache from its pre-activations to the steered vector: what
is active is selected once for all terms, and decoder rows are added once for all that is changed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steerrec.encoder_kernels import _encode
from steerrec.kernels import (
    Floats,
    Indices,
    _compiled,
    _is_finite,
    _listed,
    _room,
    _select,
    _vector,
    _width_of_maxima,
)
from steerrec.lanes import LANES, ROWS, above, fetch

_SHIFT, _RESPONSE = range(2)  # of `terms.TERMS`
_NUMBER, _NEURON = range(2)  # of `terms.FACTORS`
_ADDED, _PLAIN, _REPLACED = range(3)
"""What becomes of the sum: the vector is added, nothing is, or the decoder bias is."""


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
def _list_above(row: Floats, floor: Floats, room: Any, entries: Floats, indices: Indices) -> int:
    """The entries above their floors, in order, and how many they are."""
    whole, some = len(row) - len(row) % LANES, 0
    for start in range(0, whole, LANES):
        bits = above(row, floor, start)
        room[0, some], room[1, some] = bits, start
        some += bits != 0
    room[0, some] = 0
    found = _listed(row, room, entries, indices)
    for j in range(whole, len(row)):
        entries[found], indices[found] = row[j], j
        found += row[j] > floor[j]
    return found


@_compiled()
def _active(
    row: Floats,
    maxima: Floats,
    room: Any,
    k: int,
    floor: Floats,
    entries: Floats,
    indices: Indices,
) -> int:
    """The active latents of a finite row, all above 0, in order, and how many they are.

    What is above `floor`, or without one the k largest.
    """
    if len(floor) > 0:
        return _list_above(row, floor, room, entries, indices)
    _select(row, maxima, room, k, entries, indices)
    found = 0
    for i in range(k):
        entries[found], indices[found] = entries[i], indices[i]
        found += entries[i] > 0
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
def _add(pieces: Any, weights: Floats, count: int, weight: Any, address: int, width: int) -> int:
    """Note down a vector of so many bytes that is to be added, and how many there are then."""
    pieces[count], weights[count] = address, weight
    for start in range(0, width, 64):
        fetch(address + start)
    return count + 1


@_compiled()
def _add_changes(
    pieces: Any,
    weights: Floats,
    count: int,
    changes: Floats,
    indices: Indices,
    decoder: int,
    width: int,
) -> int:
    """Note down decoder rows of these latents whose `changes` are not 0, which become 0."""
    for j in indices:
        _add(pieces, weights, count, changes[j], decoder + j * width, width)
        count += changes[j] != 0
        changes[j] = 0
    return count


@_compiled(fastmath={"contract"})
def _finish(out: Floats, onto: Floats, pieces: Any, weights: Floats, count: int) -> bool:
    """The sum of all that is noted down, added to `onto`; False if it is not finite."""
    for t in range(len(out)):
        out[t] = 0
    for i in range(0, count - 3, 4):  # four at once: `out` is read and written a fourth as often
        one, two = _vector(pieces[i], len(out)), _vector(pieces[i + 1], len(out))
        three, four = _vector(pieces[i + 2], len(out)), _vector(pieces[i + 3], len(out))
        a, b, c, d = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
        for t in range(len(out)):
            out[t] += (a * one[t] + b * two[t]) + (c * three[t] + d * four[t])
    for i in range(count - count % 4, count):
        row, weight = _vector(pieces[i], len(out)), weights[i]
        for t in range(len(out)):
            out[t] += weight * row[t]
    for t in range(len(out)):
        out[t] += onto[t]
    return _is_finite(out)


@_compiled(
    "boolean(int64, int64, int64, int64, int64, float32[:, ::1], int64[::1], "
    "int64[:, ::1], int64[::1], int64[:, ::1], float32[::1], int64)"
)
def steered(
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
    vectors_at, out_at
        Where the vectors of all users are, [B, H], and where the steered ones go, [A, B, H].
    first, rows, batch
        Number of the first of the rows to steer; how many they are, R; B.
    strengths
        [A, R], or [A, 1] for all rows.
    sizes
        d_sae, H, k (0 if unknown), and where these are: encoder [H, d_sae], its bias (that of the
        decoder taken into it) [d_sae], decoder [d_sae, H], its bias [H], and the thresholds
        [d_sae], 0 where there are none and the k largest are active.
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
    width, size, k, decoder, batched = sizes[0], sizes[1], sizes[2], sizes[5], len(strengths[0]) > 1
    length = 4 * size  # of a vector, in bytes
    acts, padded = np.empty((ROWS, width), np.float32), np.zeros(ROWS * size, np.float32)
    floor = np.empty(width if sizes[7] != 0 else 0, np.float32)
    for j in range(len(floor)):
        floor[j] = max(_vector(sizes[7], width)[j], np.float32(0))
    maxima = np.empty(_width_of_maxima(width, k), np.float32)
    bits, one_more = _room(width), width + 1
    entries, indices = np.empty(one_more, np.float32), np.empty(one_more, np.int64)  # unsteered
    others, places = np.empty(one_more, np.float32), np.empty(one_more, np.int64)  # shifted
    moved, changes = np.empty(width, np.float32), np.zeros(width, np.float32)
    values, nothing = np.empty(len(factors), np.float32), np.zeros(size, np.float32)
    active = k if len(floor) == 0 else width
    most = len(terms) * (active + 1) + active + 1  # of each term, of what is pending, and to spare
    pieces, weights = np.empty((2, most), np.int64), np.empty((2, most), np.float32)
    turn, waiting, out, onto = 0, -1, nothing, nothing
    for r in range(rows):
        at = vectors_at + (first + r) * length
        if r % ROWS == 0:
            _encode(at, min(ROWS, rows - r), size, sizes[3], sizes[4], acts, padded)
        row, x, count, known = acts[r % ROWS], _vector(at, size), 0, False
        if not _is_finite(row):
            return False
        for a in range(len(strengths)):
            alpha, noted = strengths[a, r if batched else 0], 0
            notes, by = pieces[turn], weights[turn]
            if end != _REPLACED and alpha != 0 and not known:
                known = True
                count = _active(row, maxima, bits, k, floor, entries, indices)
                for f in range(len(factors)):
                    values[f] = _factor(factors, f, thresholds[f], x, entries, indices, count)
            pending = False  # whether unsteered latents have changes that are not noted down yet
            for n in range(len(terms) if alpha != 0 or end == _REPLACED else 0):
                strength = alpha
                for u in range(terms[n, 5], terms[n, 6]):
                    strength *= values[uses[u]]
                if not np.isfinite(strength):
                    return False
                if strength == 0 and end != _REPLACED:
                    continue
                if terms[n, 0] == _SHIFT:
                    if not _shift(row, strength, _vector(terms[n, 1], width), moved):
                        return False
                    more = _active(moved, maxima, bits, k, floor, others, places)
                    for i in range(more):
                        changes[places[i]] += others[i]
                    for i in range(count):
                        changes[indices[i]] -= entries[i]
                    noted = _add_changes(notes, by, noted, changes, places[:more], decoder, length)
                    pending = True
                elif terms[n, 0] == _RESPONSE:
                    for i in range(count):
                        place = terms[n, 1] + indices[i] * length
                        noted = _add(notes, by, noted, strength * entries[i], place, length)
                    noted = _add(notes, by, noted, strength, terms[n, 2], length)
                else:
                    gain, low = _vector(terms[n, 1], width), _vector(terms[n, 2], width)
                    high = _vector(terms[n, 3], width)
                    for i in range(count):
                        j, value = indices[i], entries[i]
                        changed = min(max(gain[j] * value, low[j]), high[j])
                        changes[j] += strength * (changed - value - low[j])
                    noted = _add(notes, by, noted, strength, terms[n, 4], length)
                    pending = True
            if pending:
                noted = _add_changes(notes, by, noted, changes, indices[:count], decoder, length)
            # what was noted down before has arrived in the cache meanwhile
            if waiting >= 0 and not _finish(
                out, onto, pieces[1 - turn], weights[1 - turn], waiting
            ):
                return False
            turn, waiting = 1 - turn, noted
            out = _vector(out_at + (a * batch + first + r) * length, size)
            onto = x if end == _ADDED else nothing
            if end == _REPLACED:
                onto = _vector(sizes[6], size)
    return waiting < 0 or _finish(out, onto, pieces[1 - turn], weights[1 - turn], waiting)
