"""Learned steering for the users who are served now, at the price that validation allows."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Catalogue, Histories, Split
from steerrec.errors import TrainingError
from steerrec.evaluation import CapturedUsers, capture_users
from steerrec.fitting import SteeringTraining
from steerrec.learning import LEAST_REACH, PATIENCE, Judge, require_scored_vector
from steerrec.objectives import Objective
from steerrec.operations import ResponseSteering
from steerrec.recommender import Recommender
from steerrec.served_fitting import ServedFit, ServedTraining
from steerrec.served_steering import PRICE, identity, served_record
from steerrec.strengths import objective_of


def learn_for_users(
    rec: Recommender,
    sae: SparseAutoencoder,
    split: Split,
    users: Histories | CapturedUsers,
    *,
    objective: str = "broad",
    budget: float = 0.05,
    k: int = 10,
    mask_seen: bool = False,
    training: ServedTraining | None = None,
    catalogue: Catalogue | None = None,
) -> ResponseSteering:
    """Learn steering for the users who are served, at the price that validation allows.

    The price is found on validation users, for whom steering is learned in the same way; then it is
    learned for `users` up to that price. Neither looks at what they took next, only choosing does,
    on validation. The result is a recipe for these users: learn it anew for others, or from time to
    time; others are steered too, by what the neurons that they share with these users do.

    Parameters
    ----------
    rec, sae
        The frozen recommender, and an SAE of its own site.
    split
        Validation users to choose on.
    users
        Histories of those who are served, or from `capture_users` where these are there already.
    objective
        See `objective_of`.
    budget
        Share of validation nDCG that may be given; nDCG on tail targets is kept there too. If no
        price keeps both the result is the identity.
    k, mask_seen
        Length of the lists, and whether items of a user's history are left out of them.
    training
        Procedure.
    catalogue
        Where the objective finds attributes; the recommender's own by default.

    Raises
    ------
    TrainingError
        If there is nobody to learn for, or a setting makes no sense.
    """
    if not 0 <= budget < 1:
        raise TrainingError(f"budget is {budget}; expected a share of nDCG from 0 to below 1")
    require_scored_vector(rec, sae)
    training = training or ServedTraining()
    if isinstance(users, Histories):
        users = capture_users(rec, users)

    def goal(count: int) -> Objective:
        return objective_of(objective, catalogue or rec.catalogue, split, users=count)

    valid = min(len(split.held_out("valid")[0]), training.users)
    looking = SteeringTraining(valid_users=training.users, seed=training.seed)
    judge = Judge(rec, sae, split, goal(valid), k=k, mask_seen=mask_seen, training=looking)
    price, measured = _price(judge, sae, budget, training) if budget else (0.0, judge.base)
    own = goal(len(users.histories))
    record = served_record(own, len(users.histories), mask_seen, k, training)
    record |= {"split": users.split, "budget": budget, "price": price, "valid": measured}
    if users.sample is not None:
        record["sample"] = users.sample
    nothing = identity(sae, record).with_alpha(0.0)
    if not price:
        return nothing
    seen = users.histories if mask_seen else None
    fit = ServedFit(rec.item_head, sae, users.vectors, own, k=k, seen=seen, training=training)
    last = deque(fit.looks(price), maxlen=1).pop()
    record["steps"] = last.step
    return replace(nothing, vectors=last.vectors.cpu(), alpha=1.0, provenance=record)


def _price(
    judge: Judge, sae: SparseAutoencoder, budget: float, training: ServedTraining
) -> tuple[float, dict[str, float]]:
    """The admissible price with the lowest objective, 0 if there is none, and what it does."""
    fit = ServedFit(
        judge.head,
        sae,
        judge.vectors,
        judge.objective,
        k=judge.k,
        seen=judge.seen,
        training=training,
    )
    best, found, refused = 0.0, judge.base, 0
    for snapshot in fit.looks(PRICE):
        there = judge.at_full_strength(snapshot)
        better = there[judge.objective.name] < found[judge.objective.name]
        if better and judge.admits(there, budget):
            best, found = snapshot.price, there
        refused = 0 if judge.admits(there, max(2 * budget, LEAST_REACH)) else refused + 1
        if refused == PATIENCE:
            break
    return best, found
