"""Pre-activations of a few user vectors on a CPU, compiled by numba, for `step_kernels`.

A BLAS library does well with matrices of hundreds of rows and is of little use for a few. Here a
few rows are encoded at a time, and steered while what came of them is in the cache; each has the
same pre-activations to the last bit however many there are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steerrec.kernels import Floats, _compiled, _vector
from steerrec.lanes import COLUMNS, ROW_COLUMNS, ROWS, few_rows, one_row

_FEW = 3  # so many rows take as long as `ROWS`
_SIDE_BY_SIDE = 8  # rows of the encoder: a processor fetches ahead in as many places


@_compiled()
def _encode(
    x: int, rows: int, size: int, encoder: int, bias: int, out: Any, padded: Floats
) -> None:
    """Write the pre-activations of at most `ROWS` vectors to the first rows of `out`.

    Parameters
    ----------
    x, rows, size
        Address of the vectors, how many they are, and their length H.
    encoder, bias
        Addresses of [H, d_sae] and [d_sae].
    out
        [ROWS, d_sae], of which rows that there is no vector for may be written to as well.
    padded
        Room for ROWS vectors.
    """
    if rows < _FEW:
        for r in range(rows):
            _encode_one(x + 4 * r * size, size, encoder, bias, out[r])
        return
    here: Any = x
    width, at = out.shape[1], np.int64(out.ctypes.data)
    if rows < ROWS:
        vectors, here = _vector(x, rows * size), np.int64(padded.ctypes.data)
        for i in range(rows * size):
            padded[i] = vectors[i]
    whole = width - width % COLUMNS
    for j in range(0, whole, COLUMNS):
        few_rows(here, size, encoder + 4 * j, width, bias + 4 * j, at + 4 * j)
    for r in range(rows if whole < width else 0):
        _encode_rest(x + 4 * r * size, size, encoder, bias, whole, out[r])


@_compiled()
def _encode_one(x: int, size: int, encoder: int, bias: int, out: Floats) -> None:
    """The pre-activations of one vector.

    All that this takes is to read the encoder, so it is read as it lies in memory, several of its
    rows side by side.
    """
    width, at = len(out), np.int64(out.ctypes.data)
    whole = width - width % ROW_COLUMNS
    for j in range(whole):
        out[j] = np.float32(0)
    for i in range(0, size, _SIDE_BY_SIDE):
        here, first = x + 4 * i, encoder + 4 * i * width
        for j in range(0, whole, ROW_COLUMNS):
            one_row(here, min(_SIDE_BY_SIDE, size - i), first + 4 * j, width, 0, at + 4 * j)
    biases = _vector(bias, width)
    for j in range(whole):
        out[j] += biases[j]
    if whole < width:
        _encode_rest(x, size, encoder, bias, whole, out)


@_compiled(fastmath={"contract"})
def _encode_rest(x: int, size: int, encoder: int, bias: int, first: int, out: Floats) -> None:
    """The pre-activations of one vector from latent `first` on."""
    width = len(out)
    vector, biases = _vector(x, size), _vector(bias, width)
    for j in range(first, width):
        out[j] = np.float32(0)
    for i in range(size):
        entry, row = vector[i], _vector(encoder + 4 * i * width, width)
        for j in range(first, width):
            out[j] += entry * row[j]
    for j in range(first, width):
        out[j] += biases[j]
