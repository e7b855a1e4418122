"""What a report page tells, as data: the model, what steering gains and costs, neurons, users.

The page made of it is in `report_page`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerrec.artifact_site import SiteArtifact
from steerrec.attribution import AttributionTable
from steerrec.card import budget_points
from steerrec.data import Catalogue, Split
from steerrec.describing import describe_neurons
from steerrec.evaluation import capture_held_out, rank, rank_steered
from steerrec.neurons import NeuronDescriptions
from steerrec.recipes import Recipe
from steerrec.recommender import Recommender
from steerrec.steered_users import SteeredUser, describe_users
from steerrec.steering import Splice, Steering
from steerrec.tradeoff import sweep

LORENZ_POINTS = 60
_PREFERRED = (0.05, 0.1, 0.01)  # budgets whose strength the lists and curves are shown at


@dataclass(frozen=True)
class Exposure:
    """Lorenz curves of how often items are listed.

    Attributes
    ----------
    items
        Share of the catalogue, the least listed items first, [P].
    before, after
        Share of all list slots that these hold, [P].
    """

    items: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything that the page shows.

    Attributes
    ----------
    model
        Class, items, width, where it is from, site.
    data
        How the interactions were read, and the users of the split.
    training
        Summary of how the SAE was trained, as the artifact holds it.
    latents, k
        Of the SAE; k is None where it has no fixed number of active latents.
    sweep
        The trade-off as `Sweep.to_dict` has it.
    comparison
        `Comparison.to_dict`, where a comparison was recorded.
    alpha, budget
        Strength that lists and curves are shown at, and the budget that it was chosen at; None
        where steering did not pay at any budget.
    exposure
        Before and after at this strength.
    neurons
        Descriptions of all neurons.
    users
        A few users before and after; empty where the SAE is not on the scored vector.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    training: Mapping[str, Any]
    latents: int
    k: int | None
    sweep: Mapping[str, Any]
    comparison: Mapping[str, Any] | None
    alpha: float
    budget: float | None
    exposure: Exposure
    neurons: NeuronDescriptions
    users: tuple[SteeredUser, ...]


def report_data(
    rec: Recommender,
    here: SiteArtifact,
    split: Split,
    *,
    contrast: str = "popularity",
    found: NeuronDescriptions | None = None,
    swept: Mapping[str, Any] | None = None,
    prepared: Mapping[str, Any] | None = None,
    source: str | None = None,
    catalogue: Catalogue | None = None,
    users: int = 12,
    top_k: int = 10,
    mask_seen: bool = False,
) -> ReportData:
    """Gather what a report tells.

    Parameters
    ----------
    rec
        The frozen recommender.
    here
        A site of its artifact: SAE, tables, results.
    split
        The histories.
    contrast
        Which table.
    found
        Descriptions of the neurons where they are known; they are found out otherwise.
    swept
        The trade-off, as `Sweep.to_dict` has it; by default the one that the artifact holds, and
        where it holds none it is measured.
    prepared
        How the data were read, for the page.
    source
        What the base model is called, for the page.
    catalogue
        The recommender's catalogue with more attributes, if the data has some.
    users
        How many users.
    top_k, mask_seen
        For a trade-off that has to be measured; a recorded one says its own.
    """
    table = here.table(contrast)
    own = here.site == rec.site
    if found is None:
        found = describe_neurons(
            rec, here.sae, table, split.train, site=here.site, catalogue=catalogue
        )
    swept = swept or here.results.get("sweep") or {}
    steering = steering_of(swept, here, table) if budget_points(swept) else None
    if steering is None:
        steering = Steering.popsteer(table)
        swept = sweep(
            rec, here.sae, steering, split, site=here.site, k=top_k, mask_seen=mask_seen
        ).to_dict()
    alpha, budget = _strength(swept)
    steering = steering.with_alpha(alpha)
    protocol = swept["points"][0]["test"]["protocol"]
    k, masked = int(protocol["k"]), bool(protocol["mask_seen"])

    capture = partial(capture_held_out, rec, split, "test")
    people = capture()
    base = rank(rec, people, k=k, mask_seen=masked)
    after = rank_steered(
        rec, here.sae, steering, people, capture, site=here.site, k=k, mask_seen=masked
    )
    shown: tuple[SteeredUser, ...] = ()
    if own:
        shown = describe_users(
            rec, here.sae, steering, people, count=users, k=k, mask_seen=masked, catalogue=catalogue
        )
    described = rec.describe()
    return ReportData(
        model={
            "class": type(rec.model).__name__,
            "source": source or str(described.get("source") or type(rec.model).__name__),
            "items": len(rec.catalogue),
            "groups": list(rec.catalogue.groups.sizes),
            "width": here.sae.d_in,
            "max_length": rec.max_length,
            "site": here.site.path,
            "scored": own,
        },
        data={
            **(prepared or {}),
            "users": len(split.histories),
            "evaluated": len(split.evaluated),
            "interactions": len(split.histories.items),
        },
        training=here.training,
        latents=here.sae.d_sae,
        k=here.sae.k,
        sweep=swept,
        comparison=here.results.get("compare"),
        alpha=alpha,
        budget=budget,
        exposure=lorenz(base.ids, after.ids, len(rec.catalogue)),
        neurons=found,
        users=shown,
    )


def steering_of(
    swept: Mapping[str, Any], here: SiteArtifact, table: AttributionTable
) -> Recipe | None:
    """The recipe that a recorded trade-off is of; None where the artifact cannot make it again.

    It can where the recipe is saved, or is the PopSteer rule on this table.
    """
    made = swept.get("steering")
    made = made if isinstance(made, Mapping) else {}
    name, neurons, contrast = str(made.get("name")), made.get("neurons"), made.get("contrast")
    if name in here.steerings:
        return here.steerings[name]
    other = isinstance(contrast, Mapping) and contrast.get("name") != table.name
    if made.get("rule") != "popsteer" or other:
        return None
    if type(neurons) is not int or not 0 < neurons <= len(table):
        return None
    compat, by = made.get("popsteer_compat") is True, str(made.get("by", "cohens_d"))
    if by not in table.columns:
        return None
    splice: Splice = "reconstruct" if made.get("splice") == "reconstruct" else "delta"
    return Steering.popsteer(
        table,
        neurons=None if neurons == len(table) else neurons,
        splice=None if compat else splice,
        popsteer_compat=compat,
        by=by,
    )


def _strength(swept: Mapping[str, Any]) -> tuple[float, float | None]:
    """The strength to show, and the budget that it was chosen at."""
    points = budget_points(swept)
    chosen = {} if points is None else {budget: alpha for budget, alpha, _ in points[1]}
    for budget in _PREFERRED:
        if chosen.get(budget):
            return float(chosen[budget]), budget
    strengths = [point["alpha"] for point in swept["points"] if point["alpha"]]
    return float(min(strengths, key=lambda alpha: abs(alpha - 1), default=1.0)), None


def lorenz(before: Tensor, after: Tensor, items: int, points: int = LORENZ_POINTS) -> Exposure:
    """Lorenz curves of two sets of lists [U, k] of catalogue rows; -1 is an empty slot."""
    places = np.unique(np.linspace(0, items, points + 1).round().astype(np.int64))

    def curve(ids: Tensor) -> tuple[float, ...]:
        counts = torch.bincount(ids[ids >= 0].flatten(), minlength=items).sort().values
        shares = np.concatenate([[0], counts.cumsum(0).numpy()])[places]
        return tuple((shares / max(int(counts.sum()), 1)).tolist())

    return Exposure(tuple((places / items).tolist()), curve(before), curve(after))
