"""The same users at many strengths: what does not depend on the strength is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from steerrec.compiled import as_arrays, kernels
from steerrec.recipes import Encoding
from steerrec.steering import ROWS_AT_ONCE, ShiftStep, SteerTransform

HELD = 64_000_000
"""At most so many numbers are held for the strengths of a group (or those of one strength)."""


@torch.no_grad()
def steered_at(
    vectors: Tensor, transform: SteerTransform, alphas: Sequence[float]
) -> Iterator[Tensor]:
    """User vectors steered at each strength in turn, bit for bit as by the transform itself.

    Users are encoded once for a group of strengths, and under a shift their unsteered latents are
    selected and decoded once.

    Parameters
    ----------
    vectors
        User vectors [U, H].
    transform
        The steering.
    alphas
        Strengths.

    Yields
    ------
    Tensor
        Steered vectors [U, H], one strength after another.
    """
    at_once = max(1, HELD // max(1, vectors.numel()))
    for first in range(0, len(alphas), at_once):
        group = alphas[first : first + at_once]
        found = vectors.new_empty(len(group), *vectors.shape)
        rows = ROWS_AT_ONCE if vectors.device.type == "cpu" else 4096
        for start in range(0, len(vectors), rows):
            part = slice(start, start + rows)
            found[:, part] = _steered(vectors[part], transform, group)
        yield from found


def _steered(x: Tensor, transform: SteerTransform, alphas: Sequence[float]) -> Tensor:
    """A few user vectors [B, H] at all of the strengths, [A, B, H]."""
    sae, step = transform.sae, transform.step
    vectors = x.to(transform.bias)
    pre_acts = sae.pre_acts(vectors, transform.bias)
    changes = _compiled(pre_acts, transform, alphas)
    if changes is None:
        changes = torch.stack([step(Encoding(sae, vectors, pre_acts), alpha) for alpha in alphas])
    return (changes + sae.b_dec).to(x) if step.replaces else x + changes.to(x)


def _compiled(
    pre_acts: Tensor, transform: SteerTransform, alphas: Sequence[float]
) -> Tensor | None:
    """What the step makes of pre-activations [B, d_sae] at all strengths; None if torch has to."""
    sae, step = transform.sae, transform.step
    if not isinstance(step, ShiftStep) or sae.threshold is not None or sae.k is None:
        return None
    arrays = as_arrays(pre_acts, step.shift, sae.W_dec)
    if arrays is None or kernels() is None:
        return None
    from steerrec.strength_kernels import steered_at as loop

    acts, shift, decoder = arrays
    with np.errstate(over="ignore"):
        strengths = np.array(alphas, np.float32)
    out = pre_acts.new_empty(len(alphas), len(pre_acts), sae.d_in)
    return (
        out
        if loop(acts, shift, strengths, decoder, sae.k, not step.replaces, out.numpy())
        else None
    )
