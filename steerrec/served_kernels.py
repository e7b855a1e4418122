"""Inner loops of `served_fitting` on a CPU, compiled by numba: a user's items stay in the cache."""

from __future__ import annotations

import numpy as np

from steerrec.kernels import Floats, Indices, _compiled

_SUMS = {"reassoc", "contract", "nsz"}  # sums in any order; what is not finite stays so


@_compiled(fastmath=_SUMS)
def _dot(one: Floats, other: Floats) -> np.float32:
    total = np.float32(0)
    for t in range(len(one)):
        total += one[t] * other[t]
    return total


@_compiled(fastmath=_SUMS)
def _softmax(row: Floats) -> None:
    """The softmax of a row, in its place."""
    top = row[0]
    for c in range(len(row)):
        top = max(top, row[c])
    total = np.float32(0)
    for c in range(len(row)):
        row[c] = np.exp(row[c] - top)
        total += row[c]
    for c in range(len(row)):
        row[c] /= total


@_compiled(
    "void(float32[:, ::1], int64[:, ::1], float32[:, ::1], float32[:, ::1], float32[::1], "
    "float32[::1], float32[:, ::1], float32[:, ::1])",
    fastmath=_SUMS,
)
def pulled(
    weight: Floats,
    items: Indices,
    base: Floats,
    change: Floats,
    prices: Floats,
    heat: Floats,
    scores: Floats,
    out: Floats,
) -> None:
    """Steered scores of items, and the gradient of each user's loss by the user vector.

    Parameters
    ----------
    weight
        Item matrix, [N, H].
    items, base
        Items in question and their scores before steering, [U, C] each.
    change
        Of the user vectors, [U, H].
    prices
        Of a list slot, in units of score, [N].
    heat
        Temperatures, [U].
    scores, out
        Where the scores [U, C] and the gradient [U, H] go.
    """
    width = items.shape[1]
    wanted, now = np.empty(width, np.float32), np.empty(width, np.float32)
    for u in range(len(items)):
        for c in range(width):
            item = items[u, c]
            scores[u, c] = base[u, c] + _dot(weight[item], change[u])
            wanted[c] = (base[u, c] - prices[item]) / heat[u]
            now[c] = scores[u, c] / heat[u]
        _softmax(wanted)
        _softmax(now)
        for t in range(out.shape[1]):
            out[u, t] = 0
        for c in range(width):
            off, row = now[c] - wanted[c], weight[items[u, c]]
            for t in range(out.shape[1]):
                out[u, t] += off * row[t]


@_compiled("void(float32[:, ::1], int64[:, ::1], float32[:, ::1], float32[:, ::1])")
def scattered(values: Floats, indices: Indices, rows: Floats, out: Floats) -> None:
    """Add each user's row [U, H], times the latents [U, w] that are active, to theirs in `out`."""
    for u in range(len(values)):
        for i in range(values.shape[1]):
            value = values[u, i]
            if value != 0:
                place = out[indices[u, i]]
                for t in range(out.shape[1]):
                    place[t] += value * rows[u, t]
