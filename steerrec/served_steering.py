"""Steering that is learned anew for whoever is served: a path of recipes for each set of users.

Not here: how it is learned (`steerrec.served_fitting`), and how far along the path a budget allows
to go (`steerrec.served_learning`).
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Histories
from steerrec.objectives import Objective, named_objective
from steerrec.operations import ResponseSteering
from steerrec.recommender import ItemHead
from steerrec.served_fitting import ServedFit, ServedTraining
from steerrec.steering_path import SteeringPath

if TYPE_CHECKING:
    from steerrec.rerank.candidates import Candidates

PRICE = 16.0
"""Where a path ends: the highest price of a list slot, in median temperatures of the users."""


def learn_served_path(
    head: ItemHead,
    sae: SparseAutoencoder,
    vectors: Tensor,
    objective: Objective,
    *,
    price: float = PRICE,
    k: int = 10,
    seen: Histories | None = None,
    training: ServedTraining | None = None,
) -> SteeringPath:
    """Learn steering for the users who are served, for all prices up to one.

    What anyone took next is not asked for: it needs the user vectors alone.

    Parameters
    ----------
    head, sae
        Item head of the frozen recommender, and an SAE of the vector that it scores.
    vectors
        User vectors of those who are served, [U, H].
    objective
        Supplies the prices; made for U users.
    price
        Where the path ends, in units of the users' median temperature.
    k
        Length of the lists.
    seen
        What is left out of each user's list; nothing if None.
    training
        Procedure.

    Returns
    -------
    SteeringPath
        Recipes at prices in equal steps, the identity first, so that position p is price p times
        the last.

    Raises
    ------
    TrainingError
        If there are no users, nothing can be learned from them, or a setting makes no sense.
    """
    training = training or ServedTraining()
    fit = ServedFit(head, sae, vectors, objective, k=k, seen=seen, training=training)
    record = served_record(objective, len(vectors), seen is not None, k, training)
    recipes = [identity(sae, record)]
    for responses, constant, step, now in fit.looks(price):
        found = {**record, "steps": step, "price": now}
        recipes.append(
            ResponseSteering(responses.cpu(), constant.cpu(), 1.0, recipes[0].name, found)
        )
    return SteeringPath(tuple(recipes))


def served_record(
    objective: Objective, users: int, mask_seen: bool, k: int, training: ServedTraining
) -> dict[str, Any]:
    """Provenance of what is learned for so many users."""
    return {
        "rule": "learned",
        "objective": objective.name,
        "k": k,
        "mask_seen": mask_seen,
        "training": asdict(training),
        "learned_on": "served",
        "users": users,
        "learned_from": min(users, training.users),
        "steps": 0,
        "price": 0.0,
    }


def identity(sae: SparseAutoencoder, record: dict[str, Any]) -> ResponseSteering:
    """The recipe that changes nothing, where a path begins."""
    nothing = torch.zeros(sae.d_sae, sae.d_in)
    name = f"learned-served-{record['objective']}"
    return ResponseSteering(nothing, nothing[0].clone(), 1.0, name, record)


@dataclass(eq=False)
class ServedSteering:
    """Learned steering as a comparison uses it: learned for each set of candidates it is given.

    Attributes
    ----------
    sae
        An SAE of the vector that the candidates are scored from.
    objective
        One of `steerrec.objectives.OBJECTIVES`.
    price, training
        See `learn_served_path`.
    seconds
        What learning has taken so far.
    """

    sae: SparseAutoencoder
    objective: str = "broad"
    price: float = PRICE
    training: ServedTraining = field(default_factory=ServedTraining)
    seconds: float = 0.0
    _paths: list[tuple[Candidates, SteeringPath]] = field(
        default_factory=list, init=False, repr=False
    )

    def path(self, candidates: Candidates) -> SteeringPath:
        """The path of these users; learned once, and kept for the last two sets of users."""
        for users, path in self._paths:
            if users is candidates:
                return path
        started = time.perf_counter()
        objective = named_objective(
            self.objective, candidates.counts, candidates.labels, users=len(candidates)
        )
        path = learn_served_path(
            candidates.head,
            self.sae,
            candidates.vectors,
            objective,
            price=self.price,
            k=candidates.k,
            seen=candidates.seen,
            training=self.training,
        )
        self.seconds += time.perf_counter() - started
        self._paths = [*self._paths[-1:], (candidates, path)]
        return path

    def describe(self) -> dict[str, Any]:
        """How it is learned, and a digest of the SAE, JSON-able."""
        sha = hashlib.sha256()
        for tensor in self.sae.state_dict().values():
            sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return {
            "objective": self.objective,
            "price": self.price,
            "training": asdict(self.training),
            "learned_on": "served",
            "sae": sha.hexdigest()[:16],
        }
