"""Loops over rows on a CPU, compiled by numba, for latents that are active above thresholds.

A companion of `kernels`, for SAEs of architecture jumprelu: what is active needs no selection, and
a shift of pre-activations changes the latents that it moves and no others.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steerrec.kernels import Floats, Indices, _compiled, _is_finite

_BLOCK = 16  # pre-activations whose largest excess is looked at before any of them is


@_compiled(fastmath={"nnan", "nsz", "reassoc", "contract"})  # rows that are not finite stay outside
def _excess(row: Floats, floor: Floats, start: int, stop: int) -> Any:
    top = row[start] - floor[start]
    for j in range(start, stop):
        top = max(top, row[j] - floor[j])
    return top


@_compiled("int64(float32[:, ::1], float32[::1])")
def most_above(pre_acts: Floats, floor: Floats) -> int:
    """The most entries above `floor` [d_sae] that a row of `pre_acts` [B, d_sae] has.

    -1 if an entry is not finite.
    """
    rows, width = pre_acts.shape
    most = 0
    for r in range(rows):
        if not _is_finite(pre_acts[r]):
            return -1
        found = 0
        for j in range(width):
            found += pre_acts[r, j] > floor[j]
        most = max(most, found)
    return most


@_compiled("void(float32[:, ::1], float32[::1], float32[:, ::1], int64[:, ::1])")
def above(pre_acts: Floats, floor: Floats, values: Floats, indices: Indices) -> None:
    """The entries of each finite row above `floor`, and where they are, into [B, w] each.

    `values` and `indices` are zeros to begin with, and rows with fewer than w end in zeros.
    """
    rows, width = pre_acts.shape
    for r in range(rows):
        row, found = pre_acts[r], 0
        for start in range(0, width, _BLOCK):
            stop = min(start + _BLOCK, width)
            if _excess(row, floor, start, stop) > 0:
                for j in range(start, stop):
                    if row[j] > floor[j]:
                        values[r, found], indices[r, found] = row[j], j
                        found += 1


# --- training


@_compiled("int64(float32[:, ::1], float32[::1], int64[::1], int64[::1], float32[::1])")
def listed_above(
    pre_acts: Floats, floor: Floats, offsets: Indices, columns: Indices, values: Floats
) -> int:
    """All entries above `floor` row after row: row r has those from ``offsets[r]`` on.

    Returns how many there are; more than `columns` and `values` hold are only counted.
    """
    rows, width = pre_acts.shape
    found, room = 0, len(columns)
    offsets[0] = 0
    for r in range(rows):
        row = pre_acts[r]
        for start in range(0, width, _BLOCK):
            stop = min(start + _BLOCK, width)
            if _excess(row, floor, start, stop) > 0:
                for j in range(start, stop):
                    if row[j] > floor[j]:
                        if found < room:
                            columns[found], values[found] = j, row[j]
                        found += 1
        offsets[r + 1] = found
    return found


@_compiled(
    "void(int64[::1], int64[::1], float32[::1], float32[:, ::1], float32[:, ::1])",
    fastmath={"contract"},
)
def sums_of_rows(
    offsets: Indices, columns: Indices, values: Floats, decoder: Floats, out: Floats
) -> None:
    """For each row the sum of decoder rows weighted by its entries, into `out` [B, H]."""
    for r in range(len(out)):
        for t in range(out.shape[1]):
            out[r, t] = 0
        for n in range(offsets[r], offsets[r + 1]):
            value = values[n]
            if value != 0:
                direction = decoder[columns[n]]
                for t in range(out.shape[1]):
                    out[r, t] += value * direction[t]


@_compiled(fastmath={"contract", "reassoc", "nsz"})
def _dot(one: Floats, other: Floats) -> Any:
    total = np.float32(0)
    for t in range(len(one)):
        total += one[t] * other[t]
    return total


@_compiled(
    "void(int64[::1], int64[::1], float32[::1], boolean[::1], float32[:, ::1], float32[:, ::1], "
    "float32[:, ::1], float32[:, ::1], float32[:, ::1], float32[::1], float32[::1], int64, int64)",
    fastmath={"contract"},
)
def add_gradients(
    offsets: Indices,
    columns: Indices,
    values: Floats,
    passes: Any,
    upstream: Floats,
    centred: Floats,
    decoder: Floats,
    to_decoder: Floats,
    to_encoder: Floats,
    to_bias: Floats,
    to_values: Floats,
    first: int,
    stop: int,
) -> None:
    """Add the gradients of a loss of ``sum_n values[n] * decoder[columns[n]]``.

    Those of other latents can be added at the same time elsewhere: each latent's are always added
    in the order of the rows.

    Parameters
    ----------
    offsets, columns, values
        Entries row after row, as of `listed_above`.
    passes
        Whether the gradient of a value is one of its pre-activation, [N].
    upstream
        Gradients of the sums, [B, H].
    centred
        What the encoder saw, ``x - b_dec`` [B, H].
    decoder
        [d_sae, H].
    to_decoder, to_encoder, to_bias
        Where gradients are added: [d_sae, H], [d_sae, H] (the encoder transposed) and [d_sae].
    to_values
        Where those of the values go, [N].
    first, stop
        Of which latents: from the first until before the second.
    """
    width = upstream.shape[1]
    for r in range(len(upstream)):
        above, x = upstream[r], centred[r]
        for n in range(offsets[r], offsets[r + 1]):
            j, value = columns[n], values[n]
            if j < first or j >= stop:
                continue
            slope = _dot(above, decoder[j])
            to_values[n] = slope
            if value != 0:
                row = to_decoder[j]
                for t in range(width):
                    row[t] += value * above[t]
            if passes[n]:
                to_bias[j] += slope
                row = to_encoder[j]
                for t in range(width):
                    row[t] += slope * x[t]
