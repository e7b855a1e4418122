"""Which column of an attribution table says best what happens when a neuron is switched off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerrec.attribution import AttributionTable
from steerrec.errors import ArtifactError

CANDIDATES = (
    "cohens_d",
    "point_biserial",
    "auroc",
    "cohens_d_users",
    "logit_attribution",
    "direct_effect",
    "grad_attribution",
)
"""Columns that claim to say which way, and how much, a neuron carries the contrast."""

STRONGEST = 50
"""How many of the strongest neurons two columns are compared by."""


@dataclass(frozen=True)
class ColumnAgreement:
    """How well a column goes with the causal effect, over neurons.

    Attributes
    ----------
    column
        Its name.
    correlation, interval
        Spearman's rank correlation of the signed values, and its bootstrap interval of 95 % over
        neurons.
    magnitude, magnitude_interval
        The same of absolute values: is a strong neuron strong?
    found
        Share of the causally strongest neurons that are among the strongest by this column.
    """

    column: str
    correlation: float
    interval: tuple[float, float]
    magnitude: float
    magnitude_interval: tuple[float, float]
    found: float


@dataclass(frozen=True)
class AttributionStudy:
    """How well each column goes with the causal effect.

    Attributes
    ----------
    contrast
        Name of the contrast.
    target
        The causal column.
    neurons
        How many were switched off and are active in some user; the others tell nothing.
    least_active
        Or in more than this share of the users.
    strongest
        How many the strongest are.
    reliability
        How much of the spread of the causal effect over these neurons is not the chance of which
        users were looked at: 1 less the mean squared standard error over the variance. Nothing
        can go with what is chance.
    rows
        One a column, the best first.
    """

    contrast: str
    target: str
    neurons: int
    least_active: float
    strongest: int
    reliability: float | None
    rows: tuple[ColumnAgreement, ...]

    @property
    def best(self) -> str:
        """The column of the highest rank correlation."""
        return self.rows[0].column

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


def attribution_study(
    table: AttributionTable,
    *,
    target: str = "causal_effect",
    columns: Sequence[str] | None = None,
    least_active: float = 0.0,
    replicates: int = 1000,
    seed: int = 0,
) -> AttributionStudy:
    """Compare the columns of a table with the causal effect.

    Parameters
    ----------
    table
        With `causal_effect`; see `add_columns`.
    target
        `causal_effect`, or `causal_gini`.
    columns
        Which to compare; by default those of `CANDIDATES` that the table has.
    least_active
        Only neurons that are active in more than this share of the users.
    replicates
        How often neurons are drawn with replacement for the intervals.
    seed
        Which are drawn.

    Raises
    ------
    ArtifactError
        If the table has no causal effect, or of fewer than three neurons.
    """
    if target not in table.columns:
        raise ArtifactError(
            f"the table of {table.name} has no {target}; add it with `steerrec score --causal all`"
        )
    usable = comparable(table, least_active)
    count = int(usable.sum())
    if count < 3:
        raise ArtifactError(
            f"{count} neurons were switched off and are active in "
            f"{f'more than {least_active:.2%} of the users' if least_active else 'a user'}; "
            "expected 3 at least"
        )
    wanted = [name for name in columns or CANDIDATES if columns or name in table.columns]
    values = torch.stack([table.signed(name)[usable] for name in (target, *wanted)]).double()
    values[values.abs() < 1e-12] = 0.0
    size = values.abs()
    both = torch.stack([values, size]).flatten(0, 1).numpy()  # [2 * (1 + columns), neurons]
    tied = [np.unique(row, return_inverse=True)[1] for row in both]
    observed = _rank_correlations(tied, np.ones(count))
    rng = np.random.default_rng(seed)
    drawn = [
        _rank_correlations(tied, np.bincount(rng.integers(count, size=count), minlength=count))
        for _ in range(replicates)
    ]
    ends = np.quantile(drawn, [0.025, 0.975], axis=0)  # [2, 2, columns]
    n = min(STRONGEST, count)
    top = size.argsort(dim=1, descending=True, stable=True)[:, :n]
    rows = [
        ColumnAgreement(
            column=name,
            correlation=float(observed[0, i]),
            interval=(float(ends[0, 0, i]), float(ends[1, 0, i])),
            magnitude=float(observed[1, i]),
            magnitude_interval=(float(ends[0, 1, i]), float(ends[1, 1, i])),
            found=float(torch.isin(top[0], top[i + 1]).double().mean()),
        )
        for i, name in enumerate(wanted)
    ]
    rows.sort(key=lambda row: -row.correlation)
    reliability = None
    if target == "causal_effect":
        noise = table["causal_effect_se"][usable].double().square().mean()
        reliability = float(1 - noise / values[0].var(correction=0).clamp_min(1e-30))
    return AttributionStudy(table.name, target, count, least_active, n, reliability, tuple(rows))


def comparable(table: AttributionTable, least_active: float = 0.0) -> Tensor:
    """Which neurons were switched off and are active in more than this share of users, [d_sae]."""
    return (table["causal_measured"] > 0) & (table["causal_active"] > least_active)


def _rank_correlations(tied: list[NDArray[np.int64]], times: NDArray[Any]) -> NDArray[np.float64]:
    """Spearman's correlation of the first row with every other, of both halves: [2, columns].

    Rows are known by the order of their values, equal ones under one number, and every neuron is
    there so many `times`: ranks of a resample need no sorting.
    """
    ranks = np.empty((len(tied), len(times)))
    for row, place in zip(ranks, tied, strict=True):
        sizes = np.bincount(place, times)
        row[:] = (sizes.cumsum() - sizes / 2)[place]
    ranks -= (ranks @ times / times.sum())[:, None]
    weighted = (ranks * times).reshape(2, -1, len(times))
    ranks = ranks.reshape(weighted.shape)
    norm = np.sqrt((weighted * ranks).sum(axis=2))  # [2, 1 + columns]
    product = (weighted[:, :1] * ranks[:, 1:]).sum(axis=2)
    found: NDArray[np.float64] = product / np.maximum(norm[:, :1] * norm[:, 1:], 1e-12)
    return found
