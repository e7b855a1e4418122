"""One user at many strengths, compiled by numba: the unshifted latents are selected once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerrec.kernels import Floats, _compiled, _decode, _is_finite, _select, _width_of_maxima


@_compiled(
    "boolean(float32[:, ::1], float32[::1], float32[::1], float32[:, ::1], int64, boolean, "
    "float32[:, :, ::1])"
)
def steered_at(
    pre_acts: Floats,
    shift: Floats,
    strengths: Floats,
    decoder: Floats,
    k: int,
    delta: bool,
    out: NDArray[Any],
) -> bool:
    """`kernels.steered` at each of the strengths [A] for all rows, into `out` [A, B, H]."""
    rows, width = pre_acts.shape
    maxima = np.empty(_width_of_maxima(width, k), np.float32)
    entries, indices = np.empty(width + 1, np.float32), np.empty(width + 1, np.int64)
    moved, before = np.empty(width, np.float32), np.empty(out.shape[2], np.float32)
    for r in range(rows):
        if not _is_finite(pre_acts[r]):
            return False
        if delta:
            _select(pre_acts[r], maxima, k, entries, indices)
            _decode(before, decoder, entries, indices, k)
        for a in range(len(strengths)):
            alpha = strengths[a]
            for j in range(width):
                moved[j] = pre_acts[r, j] + alpha * shift[j]
            if not _is_finite(moved):
                return False
            _select(moved, maxima, k, entries, indices)
            _decode(out[a, r], decoder, entries, indices, k)
            if delta:
                for t in range(len(before)):
                    out[a, r, t] -= before[t]
    return True
