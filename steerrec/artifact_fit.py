"""Whether an SAE still fits a model that has been retrained since: its FVU on the new vectors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from steerrec.activations import collect_user_vectors, sample_prefixes
from steerrec.artifact_site import SiteArtifact
from steerrec.autoencoder import fraction_of_variance_unexplained
from steerrec.data import Histories
from steerrec.recommender import Recommender

WORSE = 2.0
"""How many times the FVU may grow before an SAE counts as outgrown."""


@dataclass(frozen=True)
class Fit:
    """How well an SAE reconstructs the user vectors of another model than its own.

    Attributes
    ----------
    fvu
        On this model.
    recorded
        On users held out when the SAE was trained, None if that is not known.
    rows
        Prefixes that `fvu` was measured on.
    """

    fvu: float
    recorded: float | None
    rows: int


@torch.no_grad()
def measure_fit(
    rec: Recommender,
    histories: Histories,
    here: SiteArtifact,
    *,
    rows: int = 4096,
    seed: int = 0,
) -> Fit:
    """Measure the FVU of a site's SAE on sampled prefixes of histories."""
    users, lengths = sample_prefixes(histories, rows, np.random.default_rng(seed))
    prefixes = histories.prefixes(users, lengths, rec.max_length)
    vectors = collect_user_vectors(rec, prefixes, here.site, description="fit of the SAE")
    x = vectors.to(here.sae.W_enc)
    fvu = float(fraction_of_variance_unexplained(x, here.sae(x).x_hat))
    return Fit(fvu, None, rows)
