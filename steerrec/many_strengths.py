"""The same users at many strengths: what does not depend on the strength is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from steerrec.plans import ROWS_AT_ONCE, planned
from steerrec.recipes import Encoding
from steerrec.steering import SteerTransform

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
    changed = _compiled(x, transform, alphas)
    if changed is not None:
        return changed
    sae, step = transform.sae, transform.step
    vectors = x.to(transform.bias)
    pre_acts = sae.pre_acts(vectors, transform.bias)
    changes = torch.stack([step(Encoding(sae, vectors, pre_acts), alpha) for alpha in alphas])
    return (changes + sae.b_dec).to(x) if step.replaces else x + changes.to(x)


def _compiled(x: Tensor, transform: SteerTransform, alphas: Sequence[float]) -> Tensor | None:
    """The same by the compiled loop, or [B, H] at one strength; None if torch has to do it."""
    found = planned(transform, x)
    if found is None:
        return None
    plan, loops = found
    with np.errstate(over="ignore"):
        strengths = np.array(alphas, np.float32).reshape(-1, 1)
    return plan.steered(loops, x, strengths)
