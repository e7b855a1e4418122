"""Learned steering: responses of neurons, fitted so that lists meet an exposure objective.

How responses are fitted is `steerrec.fitting`; here validation is looked at while prices grow, and
says when it is enough. `learn_steering` gives the one recipe for a budget of accuracy, `learn_path`
what there is to choose from for all budgets.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Split
from steerrec.errors import ArtifactError, TrainingError
from steerrec.evaluation import capture_held_out
from steerrec.fitting import (
    ROUNDED,
    ResponseFit,
    Snapshot,
    SteeringTraining,
    encode_users,
    latest_states,
    temperature,
)
from steerrec.item_dtypes import CompactItemHead
from steerrec.metrics import RankingMetrics
from steerrec.objectives import Objective, named_objective
from steerrec.operations import ResponseSteering, respond
from steerrec.progress import track
from steerrec.ranking import top_k
from steerrec.recommender import Recommender
from steerrec.steering_path import SteeringPath

__all__ = ["SteeringTraining", "latest_states", "learn_path", "learn_steering", "temperature"]

STRENGTHS = tuple(i / 16 for i in range(1, 21))
"""Strengths tried on validation."""

PATIENCE = 3
"""Looks in a row that find too much accuracy lost before learning ends."""

LEAST_REACH = 0.1
"""For however small a budget responses are learned up to this loss: a little of what gives a lot
is better than what gives a little, whose effect drowns in the noise of validation."""


def learn_steering(
    rec: Recommender,
    sae: SparseAutoencoder,
    split: Split,
    *,
    objective: str | Objective = "gini",
    budget: float = 0.05,
    k: int = 10,
    mask_seen: bool = False,
    training: SteeringTraining | None = None,
) -> ResponseSteering:
    """Learn steering on training histories, and choose its strength on validation.

    Parameters
    ----------
    rec, sae
        The frozen recommender, and an SAE of its own site.
    split
        Training histories to learn from; validation users to choose on. Test is not looked at.
    objective
        One of `steerrec.objectives.OBJECTIVES`, such as `gini`, or an `Objective`.
    budget
        Share of validation nDCG that may be given. At the strength of the result it is kept, and
        so is nDCG on tail targets; if no strength keeps both, the result is the identity.
    k, mask_seen
        Length of the lists, and whether items of a user's history are left out of them.
    training
        Procedure.

    Returns
    -------
    ResponseSteering
        `alpha` is the strength chosen; for other budgets up to this one take another strength.

    Raises
    ------
    TrainingError
        If there is nothing to learn from, or a setting makes no sense.
    """
    if not 0 <= budget < 1:
        raise TrainingError(f"budget is {budget}; expected a share of nDCG from 0 to below 1")
    training = training or SteeringTraining()
    objective = _prepared(rec, sae, split, objective, training)
    record = _record(objective, k, mask_seen, training) | {"budget": budget}
    name = f"learned-{objective.name}"
    if budget == 0:
        nothing = torch.zeros_like(sae.W_dec, device="cpu")
        return ResponseSteering(nothing, nothing[0].clone(), 0.0, name, record)
    judge = Judge(rec, sae, split, objective, k=k, mask_seen=mask_seen, training=training)
    fit = ResponseFit(rec, sae, split.train, objective, k=k, mask_seen=mask_seen, training=training)
    found = _within(fit, judge, budget)
    if training.neurons is not None:
        fit.keep(training.neurons)
        found = _within(fit, judge, budget)
    alpha, chosen, measured = judge.choose(found, budget)
    record |= {"steps": chosen.step, "price": chosen.price, "valid": measured}
    return ResponseSteering(chosen.vectors.cpu(), chosen.constant.cpu(), alpha, name, record)


def learn_path(
    rec: Recommender,
    sae: SparseAutoencoder,
    split: Split,
    *,
    objective: str | Objective = "gini",
    reach: float = LEAST_REACH,
    k: int = 10,
    mask_seen: bool = False,
    training: SteeringTraining | None = None,
) -> SteeringPath:
    """Learn steering on training histories, for all prices up to a loss of accuracy.

    Parameters
    ----------
    rec, sae, split, objective, k, mask_seen, training
        See `learn_steering`.
    reach
        The path ends with the last responses that keep ``1 - reach`` of validation nDCG, and nDCG
        on tail targets.

    Returns
    -------
    SteeringPath
        The recipes in the order of their prices, the identity first.

    Raises
    ------
    TrainingError
        If there is nothing to learn from, or a setting makes no sense.
    """
    if not 0 < reach < 1:
        raise TrainingError(f"reach is {reach}; expected a share of nDCG between 0 and 1")
    training = training or SteeringTraining()
    objective = _prepared(rec, sae, split, objective, training)
    judge = Judge(rec, sae, split, objective, k=k, mask_seen=mask_seen, training=training)
    fit = ResponseFit(rec, sae, split.train, objective, k=k, mask_seen=mask_seen, training=training)
    looks = _looks(fit, judge, reach)
    if training.neurons is not None:
        fit.keep(training.neurons)
        looks = _looks(fit, judge, reach)
    last = max((i for i, look in enumerate(looks) if judge.admits(look.valid, reach)), default=0)
    recipes = []
    record = _record(objective, k, mask_seen, training) | {"reach": reach}
    name = f"learned-{objective.name}"
    for look in looks[: last + 1]:
        vectors, constant, step, price = look.snapshot
        found = record | {"steps": step, "price": price, "valid": look.valid}
        recipes.append(ResponseSteering(vectors.cpu(), constant.cpu(), 1.0, name, found))
    return SteeringPath(tuple(recipes))


class _Look(NamedTuple):
    """Responses, and what they do at strength 1 on validation."""

    snapshot: Snapshot
    valid: dict[str, float]


def _prepared(
    rec: Recommender,
    sae: SparseAutoencoder,
    split: Split,
    objective: str | Objective,
    training: SteeringTraining,
) -> Objective:
    """The objective, after a check of what is to be learned."""
    if training.neurons is not None and not 0 < training.neurons <= sae.d_sae:
        raise TrainingError(
            f"{training.neurons} neurons asked for; this SAE has {sae.d_sae}, and at least 1 is "
            "needed"
        )
    require_scored_vector(rec, sae)
    if not isinstance(objective, str):
        return objective
    counts, groups = split.counts.copy(), rec.catalogue.groups.labels.copy()
    users = len(split.held_out("valid")[0])
    return named_objective(
        objective, torch.from_numpy(counts), torch.from_numpy(groups), users=users
    )


def require_scored_vector(rec: Recommender, sae: SparseAutoencoder) -> None:
    """Raise an error unless the SAE can be one of the vector that is scored, by exact items."""
    if isinstance(rec.item_head, CompactItemHead):
        raise TrainingError(ROUNDED)
    if sae.d_in != rec.item_head.width:
        raise ArtifactError(
            f"the SAE reads vectors of width {sae.d_in}, the item head {rec.item_head.width}; "
            "learned steering needs an SAE of the vector that the scores are computed from"
        )


def _record(
    objective: Objective, k: int, mask_seen: bool, training: SteeringTraining
) -> dict[str, Any]:
    return {
        "rule": "learned",
        "objective": objective.name,
        "k": k,
        "mask_seen": mask_seen,
        "training": asdict(training),
    }


def _looks(fit: ResponseFit, judge: Judge, reach: float) -> list[_Look]:
    """The path, the beginning first, until validation no longer admits what comes out."""
    looks, refused = [_Look(fit.snapshot(), judge.base)], 0
    for snapshot in fit.looks():
        looks.append(_Look(snapshot, judge.at_full_strength(snapshot)))
        refused = 0 if judge.admits(looks[-1].valid, reach) else refused + 1
        if refused == PATIENCE:
            break
    return looks


def _within(fit: ResponseFit, judge: Judge, budget: float) -> list[Snapshot]:
    """The responses that were best within the budget, and the last within twice the budget.

    At a lower strength the last may be better still.
    """
    reach = max(2 * budget, LEAST_REACH)
    looks = _looks(fit, judge, reach)
    name = judge.objective.name
    good = [i for i, look in enumerate(looks) if judge.admits(look.valid, budget)]
    best = min(good, key=lambda i: (looks[i].valid[name], i))
    last = max(i for i, look in enumerate(looks) if judge.admits(look.valid, reach))
    return [looks[i].snapshot for i in ([last] if best in (0, last) else [best, last])]


class Judge:
    """What steering does to the lists of the validation users."""

    def __init__(
        self,
        rec: Recommender,
        sae: SparseAutoencoder,
        split: Split,
        objective: Objective,
        *,
        k: int,
        mask_seen: bool,
        training: SteeringTraining,
    ) -> None:
        most = training.valid_users
        users = capture_held_out(rec, split, "valid", max_users=most, seed=training.seed)
        assert users.targets is not None
        self.head, self.objective, self.k = rec.item_head, objective, k
        self.seen = users.histories if mask_seen else None
        self.targets = users.targets
        self.counts = torch.from_numpy(split.counts.copy())
        self.groups = torch.from_numpy(rec.catalogue.groups.labels.copy())
        self.vectors = users.vectors.to(self.head.weight)
        self.latents = encode_users(sae, self.vectors)
        self.base = self.measure(self.vectors)

    def measure(self, vectors: Tensor) -> dict[str, float]:
        """nDCG, nDCG on tail targets, and the objective."""
        lists = top_k(vectors, self.head, self.k, seen=self.seen)
        metrics = RankingMetrics(self.counts, self.groups, self.k)
        metrics.update(lists.ids, self.targets)
        found = metrics.compute()
        return {
            "ndcg": found[f"ndcg@{self.k}"],
            "ndcg_tail": found[f"ndcg_tail@{self.k}"],
            self.objective.name: self.objective.value(metrics.exposure),
        }

    def admits(self, measured: dict[str, float], budget: float) -> bool:
        """Whether a budget is kept, and nDCG on tail targets (NaN where there are none)."""
        return (
            measured["ndcg"] >= (1 - budget) * self.base["ndcg"]
            and not measured["ndcg_tail"] < self.base["ndcg_tail"]
        )

    def at_full_strength(self, snapshot: Snapshot) -> dict[str, float]:
        """What responses do at strength 1."""
        change = snapshot.constant + respond(self.latents, snapshot.vectors)
        return self.measure(self.vectors + change)

    def choose(
        self, snapshots: list[Snapshot], budget: float
    ) -> tuple[float, Snapshot, dict[str, float]]:
        """The admissible strength and responses with the lowest objective; strength 0 is one."""
        best, found, chosen = 0.0, self.base, snapshots[0]
        for snapshot in snapshots:
            change = snapshot.constant + respond(self.latents, snapshot.vectors)
            for alpha in track(STRENGTHS, "strengths", unit="alpha"):
                there = self.measure(self.vectors + alpha * change)
                better = there[self.objective.name] < found[self.objective.name]
                if better and self.admits(there, budget):
                    best, found, chosen = alpha, there, snapshot
        return best, chosen, found
