"""Attribution tables: which neurons tell the two groups of a contrast apart, and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Histories
from steerrec.errors import ArtifactError
from steerrec.moments import RunningMoments
from steerrec.neuron_moments import FiringCounts, NeuronMoments
from steerrec.profiles import Contrast, synthetic_users
from steerrec.progress import track
from steerrec.recommender import Recommender, user_vectors
from steerrec.separation import aurocs, point_biserial
from steerrec.sites import Site

COLUMNS = (
    *("cohens_d", "cohens_d_se", "mean_a", "mean_b", "std_a", "std_b"),
    *("firing_rate_a", "firing_rate_b", "zero_variance"),
    *("point_biserial", "point_biserial_low", "point_biserial_high", "auroc", "auroc_se"),
)
"""What `score_neurons` fills in."""

RANKING = ("grad_attribution", "cohens_d")
"""By which column neurons are ranked unless another is named: the first that a table has."""

NEUTRAL = {"auroc": 0.5}
"""What a column says of a neuron that has nothing to do with the contrast, where it is not 0."""

RANKED_USERS = 2048
"""AUROC is computed from so many users of a group at most: their vectors are held at once."""


@dataclass(frozen=True, eq=False)
class AttributionTable:
    """Per-neuron numbers for one contrast.

    Attributes
    ----------
    columns
        Float32 [d_sae] each: `cohens_d` and its standard error `cohens_d_se`; `mean_a`, `mean_b`,
        `std_a`, `std_b` of the pre-activations over the synthetic users of groups A and B;
        `firing_rate_a`, `firing_rate_b`, the share of them in which the neuron is active;
        `zero_variance`, 1 where d was set to 0 for want of any variance; `point_biserial` with
        `point_biserial_low` and `point_biserial_high`; `auroc` with `auroc_se`. Those of
        `add_columns` where it was called. Whatever tells group A from B is positive, or above 0.5
        in `auroc`, for a neuron that carries A. Old tables have fewer columns.
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

    @property
    def ranking(self) -> str:
        """The column that neurons are ranked by unless another is named."""
        return next(column for column in RANKING if column in self.columns)

    def signed(self, column: str) -> Tensor:
        """A column as strengths, [d_sae]: 0 where a neuron has nothing to do with the contrast.

        Raises
        ------
        ArtifactError
            If the table has no such column.
        """
        if column not in self.columns:
            raise ArtifactError(
                f"the table of {self.name} has no column {column!r}; it has "
                f"{', '.join(sorted(self.columns))}: `steerrec score` adds others"
            )
        return self.columns[column] - NEUTRAL.get(column, 0.0)

    def strongest(self, n: int, by: str | None = None) -> Tensor:
        """The n neurons that are farthest from neutral in a column, strongest first, [n].

        Parameters
        ----------
        n
            How many.
        by
            A column; by default `ranking`.
        """
        order = self.signed(by or self.ranking).abs().sort(descending=True, stable=True).indices
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
    position, ddof 0 (arXiv 2508.17297); and how well each separates the two groups otherwise, see
    `steerrec.separation`. Memory is one batch, and the vectors of `RANKED_USERS` of each group.

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
    moments, rates, ranked = [], [], []
    labels = (contrast["group_a"]["label"], contrast["group_b"]["label"])
    for label, people in zip(labels, (group_a, group_b), strict=True):
        running, fired = NeuronMoments(sae), FiringCounts(sae)
        kept = torch.from_numpy(_sample(len(people)))
        some: list[Tensor] = []
        people = people.select(np.argsort(people.lengths, kind="stable"))  # little padding a batch
        starts = range(0, len(people), batch_size)
        for start in track(starts, f"{label} users", unit="batch"):
            stop = min(start + batch_size, len(people))
            vectors = user_vectors(rec, people.between(start, stop), site)
            sae.require_width(vectors)
            some.append(vectors[kept[start:stop].to(vectors.device)].float().cpu())
            vectors = vectors.to(sae.W_enc)
            running.update(vectors)
            fired.update(vectors)
        moments.append(running)
        rates.append(fired.counts / running.n)
        ranked.append(torch.cat(some))
    a, b = moments
    d, error, zero = cohens_d(a, b)
    r, low, high = point_biserial(a.mean, b.mean, a.variance, b.variance, a.n, b.n)
    area, area_error = aurocs(sae, *ranked)
    columns = {  # `COLUMNS`
        "cohens_d": d,
        "cohens_d_se": error,
        "mean_a": a.mean,
        "mean_b": b.mean,
        "std_a": a.variance.sqrt(),
        "std_b": b.variance.sqrt(),
        "firing_rate_a": rates[0],
        "firing_rate_b": rates[1],
        "zero_variance": zero,
        "point_biserial": torch.where(zero, 0.0, r),
        "point_biserial_low": low,
        "point_biserial_high": high,
        "auroc": torch.where(zero, 0.5, area),
        "auroc_se": torch.where(zero, 0.0, area_error),
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


def cohens_d(
    a: RunningMoments | NeuronMoments, b: RunningMoments | NeuronMoments
) -> tuple[Tensor, Tensor, Tensor]:
    """Cohen's d of every column between two groups, its standard error, and where nothing varies.

    The standard error is that of large samples (Hedges & Olkin 1985); d is 0 without variance.
    """
    pooled = ((a.variance + b.variance) / 2).sqrt()
    # a constant column keeps a few ulps of spread from rounding; that is no variance
    zero = pooled <= 1e-6 * torch.maximum(a.mean.abs(), b.mean.abs())
    d = torch.where(zero, 0.0, (a.mean - b.mean) / torch.where(zero, 1.0, pooled))
    error = ((a.n + b.n) / (a.n * b.n) + d.square() / (2 * (a.n + b.n))).sqrt()
    return d, error, zero


def _sample(users: int) -> NDArray[np.bool_]:
    """Which users are held for ranks: `RANKED_USERS` at most, drawn at random."""
    kept = np.ones(users, dtype=bool)
    if users > RANKED_USERS:
        kept[:] = False
        kept[np.random.default_rng(0).choice(users, RANKED_USERS, replace=False)] = True
    return kept
