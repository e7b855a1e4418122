"""Attribution tables: which neurons tell the two groups of a contrast apart, and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerrec.activations import length_batches
from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Histories
from steerrec.neuron_moments import FiringCounts, NeuronMoments
from steerrec.profiles import Contrast, synthetic_users
from steerrec.progress import track
from steerrec.recommender import Recommender, user_vectors
from steerrec.sites import Site


@dataclass(frozen=True, eq=False)
class AttributionTable:
    """Per-neuron numbers for one contrast.

    Attributes
    ----------
    columns
        Float32 [d_sae] each: `cohens_d` and its standard error `cohens_d_se`; `mean_a`, `mean_b`,
        `std_a`, `std_b` of the pre-activations over the synthetic users of groups A and B;
        `firing_rate_a`, `firing_rate_b`, the share of them in which the neuron is active;
        `zero_variance`, 1 where d was set to 0 for want of any variance.
    contrast
        `Contrast.describe()` of the contrast.
    provenance
        Numbers of users, seed, window: what it takes to make the table again.
    unknown
        What a newer steerrec stored with it, which an artifact keeps.
    """

    columns: Mapping[str, Tensor]
    contrast: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.columns["cohens_d"])

    def __getitem__(self, column: str) -> Tensor:
        return self.columns[column]

    @property
    def name(self) -> str:
        """The contrast's name."""
        name: str = self.contrast["name"]
        return name

    def strongest(self, n: int, by: str = "cohens_d") -> Tensor:
        """The n neurons with the largest absolute value in a column, strongest first, [n]."""
        order = self.columns[by].abs().sort(descending=True, stable=True).indices
        return order[:n]


@torch.no_grad()
def score_neurons(
    rec: Recommender,
    sae: SparseAutoencoder,
    contrast: Contrast,
    train: Histories,
    *,
    site: Site | None = None,
    users: int = 8192,
    seed: int = 0,
    batch_size: int = 256,
) -> AttributionTable:
    """Cohen's d of every neuron between synthetic users of the two groups of a contrast.

    ``d_j = (mean_A - mean_B) / sqrt((s_A^2 + s_B^2) / 2)`` on pre-activations at the user
    position, ddof 0 (arXiv 2508.17297). Streaming: memory is one batch.

    Parameters
    ----------
    rec
        The frozen recommender.
    sae
        Its SAE.
    contrast
        Groups A and B.
    train
        Training histories, for the lengths of the synthetic users.
    site
        Where the SAE is attached; the recommender's own site by default.
    users
        Synthetic users a group.
    seed
        Same seed, same table.
    batch_size
        Users in one forward pass.
    """
    people = [
        synthetic_users(train, group, n=users, max_length=rec.max_length, seed=seed)
        for group in (contrast.group_a, contrast.group_b)
    ]
    return score_groups(
        rec,
        sae,
        *people,
        contrast=contrast.describe(),
        site=site,
        batch_size=batch_size,
        provenance={"seed": seed, "synthetic_users": users},
    )


@torch.no_grad()
def score_groups(
    rec: Recommender,
    sae: SparseAutoencoder,
    group_a: Histories,
    group_b: Histories,
    *,
    contrast: dict[str, Any],
    site: Site | None = None,
    batch_size: int = 256,
    provenance: Mapping[str, Any] | None = None,
) -> AttributionTable:
    """The same table between any two groups of users, such as real ones of different taste.

    Parameters
    ----------
    rec, sae, site, batch_size
        See `score_neurons`.
    group_a, group_b
        Histories of the users of each group.
    contrast
        What the table is to say of them; `Contrast.describe()` has its form.
    provenance
        Where the users come from, JSON-able.
    """
    moments, rates = [], []
    labels = (contrast["group_a"]["label"], contrast["group_b"]["label"])
    for label, people in zip(labels, (group_a, group_b), strict=True):
        running, fired = NeuronMoments(sae), FiringCounts(sae)
        batches = length_batches(people.lengths, batch_size)
        for rows in track(batches, f"{label} users", unit="batch"):
            vectors = user_vectors(rec, people.select(rows), site).to(sae.W_enc)
            running.update(vectors)
            fired.update(vectors)
        moments.append(running)
        rates.append(fired.counts / running.n)
    a, b = moments
    pooled = ((a.variance + b.variance) / 2).sqrt()
    # a constant column keeps a few ulps of spread from rounding; that is no variance
    zero = pooled <= 1e-6 * torch.maximum(a.mean.abs(), b.mean.abs())
    d = torch.where(zero, 0.0, (a.mean - b.mean) / torch.where(zero, 1.0, pooled))
    columns = {
        "cohens_d": d,
        "cohens_d_se": _standard_error(d, a.n, b.n),
        "mean_a": a.mean,
        "mean_b": b.mean,
        "std_a": a.variance.sqrt(),
        "std_b": b.variance.sqrt(),
        "firing_rate_a": rates[0],
        "firing_rate_b": rates[1],
        "zero_variance": zero,
    }
    return AttributionTable(
        columns={name: values.float() for name, values in columns.items()},
        contrast=contrast,
        provenance={
            "n_a": a.n,
            "n_b": b.n,
            "max_length": rec.max_length,
            **(provenance or {}),
        },
    )


def _standard_error(d: Tensor, n_a: int, n_b: int) -> Tensor:
    """Large-sample standard error of Cohen's d (Hedges & Olkin 1985)."""
    return ((n_a + n_b) / (n_a * n_b) + d.square() / (2 * (n_a + n_b))).sqrt()
