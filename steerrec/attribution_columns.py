"""More columns for an attribution table: what neurons do in real users, to scores and to lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerrec.activations import collect_user_vectors
from steerrec.attribution import COLUMNS, AttributionTable, cohens_d
from steerrec.autoencoder import SparseAutoencoder
from steerrec.causal import causal_effects
from steerrec.data import Histories
from steerrec.effects import grad_attribution, logit_slopes, mean_latents
from steerrec.errors import ArtifactError, DataError, SiteError
from steerrec.item_properties import item_values, taste
from steerrec.moments import RunningMoments
from steerrec.profiles import Contrast
from steerrec.recommender import Recommender
from steerrec.sites import Site

ANYWHERE = ("cohens_d_users",)
"""Columns that an SAE at any site can have, cheap ones."""

SCORED = ("logit_attribution", "direct_effect", "grad_attribution")
"""Cheap columns that need the SAE at the vector that the scores are computed from."""

CAUSAL = "causal_effect"
"""The column that takes a ranking for every active latent of every user."""

SHARE = 0.2
"""How many of the real users are in the group with the most, and in that with the least."""


def add_columns(
    table: AttributionTable,
    rec: Recommender,
    sae: SparseAutoencoder,
    contrast: Contrast,
    train: Histories,
    *,
    columns: Sequence[str] | None = None,
    site: Site | None = None,
    users: int = 8192,
    causal_users: int = 2000,
    neurons: int | None = None,
    k: int = 10,
    mask_seen: bool = False,
    seed: int = 0,
    batch_size: int = 256,
) -> AttributionTable:
    """A table with these columns too; see docs/attribution.md for what each says.

    Parameters
    ----------
    table
        From `score_neurons`, of this contrast.
    rec, sae, contrast
        What the table is of.
    train
        Training histories: the real users.
    columns
        Some of `cohens_d_users`, `logit_attribution`, `direct_effect`, `grad_attribution` and
        `causal_effect`; by default all but the last that the site can have.
    site
        Where the SAE is attached; the recommender's own site by default.
    users
        At most so many real users, drawn at random.
    causal_users
        At most so many of them for `causal_effect`.
    neurons
        `causal_effect` of only so many neurons, the strongest by the other columns (see
        `AttributionTable.ranking`); of all by default. Which were measured is in
        `causal_measured`; the others have 0.
    k, mask_seen
        Length of the lists, and whether items of the history are left out of them.
    seed
        Same seed, same users.
    batch_size
        Users in one forward pass.

    Raises
    ------
    ArtifactError
        If there is no such column, or the table is of another SAE or contrast.
    SiteError
        If the site is not the scored vector and a column needs it.
    """
    scored = site is None or site == rec.site
    wanted = checked_columns(columns, scored=scored)
    if len(table) != sae.d_sae or table.name != contrast.name:
        raise ArtifactError(
            f"the table is of {table.name} and {len(table)} neurons, what is to be added of "
            f"{contrast.name} and {sae.d_sae}; expected those of one SAE and one contrast"
        )
    rng = np.random.default_rng([seed, 2])
    some = np.flatnonzero(train.lengths > 0)
    if len(some) == 0:
        raise DataError("no training histories to find real users in; expected at least one")
    drawn = rng.permutation(some)[:users]
    people = train.select(np.sort(drawn))
    items = item_values(contrast, rec.catalogue)
    found: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"real_users": len(people)}
    cheap = [name for name in wanted if name != CAUSAL]
    if cheap and cheap != ["logit_attribution"]:
        vectors = collect_user_vectors(
            rec, people, site, batch_size=batch_size, description="real users"
        )
        unit = scored and rec.item_head.normalize
        mean, rate = mean_latents(sae, vectors)
        found |= {"mean_latent_users": mean, "firing_rate_users": rate}
    if {"logit_attribution", "direct_effect"} & set(wanted):
        correlation, slope = logit_slopes(sae, rec.item_head, items)
        if "logit_attribution" in wanted:
            found["logit_attribution"] = correlation
        if "direct_effect" in wanted:
            weight = mean_latents(sae, vectors, unit=True)[0] if unit else mean
            found["direct_effect"] = weight * slope
    if "cohens_d_users" in wanted:
        d, error = _between_tastes(sae, vectors, taste(people, items.values))
        found |= {"cohens_d_users": d, "cohens_d_users_se": error}
    if "grad_attribution" in wanted:
        seen = people if mask_seen else None
        found["grad_attribution"] = grad_attribution(
            sae, rec.item_head, items.values, vectors, k=k, seen=seen
        )
        facts["lists"] = {"k": k, "mask_seen": mask_seen}
    grown = replace(table, columns={**table.columns, **_float(found)})
    if CAUSAL in wanted:
        few = train.select(np.sort(drawn[:causal_users]))
        chosen = None if neurons is None else grown.strongest(neurons)
        causal = causal_effects(
            rec,
            sae,
            items.values,
            few,
            site=site,
            neurons=chosen,
            k=k,
            mask_seen=mask_seen,
        )
        found |= {
            "causal_effect": causal.effect,
            "causal_effect_se": causal.standard_error,
            "causal_gini": causal.gini,
            "causal_active": causal.active,
            "causal_measured": causal.measured,
        }
        facts |= {"causal_users": len(few), "lists": {"k": k, "mask_seen": mask_seen}}
    return replace(
        table,
        columns={**table.columns, **_float(found)},
        provenance={**table.provenance, **facts},
    )


def checked_columns(columns: Sequence[str] | None, *, scored: bool) -> list[str]:
    """Columns that can be added, by default all cheap ones; raises for any other.

    `scored` says whether the SAE sits at the vector that the scores are computed from.
    """
    if columns is None:
        return [*ANYWHERE, *(SCORED if scored else ())]
    known = (*ANYWHERE, *SCORED, CAUSAL)
    for name in columns:
        if name not in known:
            raise ArtifactError(f"no column {name!r} can be added; there are {', '.join(known)}")
        if name in SCORED and not scored:
            raise SiteError(
                f"column {name} needs an SAE at the vector that the scores are computed from; at "
                f"this site there are {', '.join((*ANYWHERE, CAUSAL))}"
            )
    return list(dict.fromkeys(columns))


def columns_of(added: Sequence[str]) -> set[str]:
    """All columns of a table to which these have been added."""
    found = {*COLUMNS, *added}
    if {*added} - {"logit_attribution", CAUSAL}:
        found |= {"mean_latent_users", "firing_rate_users"}
    if "cohens_d_users" in added:
        found.add("cohens_d_users_se")
    if CAUSAL in added:
        found |= {f"causal_{name}" for name in ("effect_se", "gini", "active", "measured")}
    return found


def _between_tastes(
    sae: SparseAutoencoder, vectors: Tensor, tastes: np.ndarray, chunk: int = 4096
) -> tuple[Tensor, Tensor]:
    """Cohen's d, and its standard error, between the users with the most and the least taste."""
    order = torch.from_numpy(np.argsort(tastes, kind="stable"))
    n = max(1, int(SHARE * len(order)))
    moments = []
    for group in (order[-n:], order[:n]):
        running = RunningMoments(sae.d_sae)
        for rows in group.sort().values.split(chunk):
            running.update(sae.pre_acts(vectors[rows].to(sae.W_enc)).detach())
        moments.append(running)
    d, error, _ = cohens_d(*moments)
    return d, error


def _float(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.float() for name, values in columns.items()}
