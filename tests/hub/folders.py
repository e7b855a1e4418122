"""Small MODEL and ARTIFACT folders to push: an untrained SASRec, a random SAE, a real table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from steerrec.adapters.sasrec import SASRecRecommender, save
from steerrec.artifacts import Artifact
from steerrec.attribution import score_neurons
from steerrec.data import Histories
from steerrec.files import write_json
from steerrec.profiles import popularity_contrast
from steerrec.recommender import Recommender
from steerrec.steering import Steering

from ..unit.small_models import random_sae
from ..unit.toy_models import tiny_sasrec

HISTORIES = Histories.from_lists([[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11]])
DATA = {"format": "csv", "k_core": 3, "dedup": False}


def write_model(folder: Path, *, seed: int = 0, **settings: Any) -> Path:
    """A MODEL folder as `steerrec train` leaves it."""
    save(tiny_sasrec(seed=seed, **settings), folder)
    write_json(folder / "steerrec.json", {"data": DATA, "training": {"epochs": 1}})
    return folder


def make_artifact(rec: Recommender, *, latents: int = 32, seed: int = 0) -> Artifact:
    """An artifact with a table and a recipe."""
    sae = random_sae(rec.item_head.width, latents, seed=seed)
    made = Artifact.create(rec, sae, training={"seed": seed}, data=DATA)
    contrast = popularity_contrast(rec.catalogue)
    table = score_neurons(rec, sae, contrast, HISTORIES, users=64)
    made.at().tables[table.name] = table
    made.at().steerings["popsteer"] = Steering.popsteer(table, alpha=1.5)
    return made


def write_artifact(folder: Path, rec: Recommender, **settings: Any) -> Path:
    make_artifact(rec, **settings).save(folder)
    return folder


def scores(rec: SASRecRecommender) -> torch.Tensor:
    """What a model makes of a few histories, [3, N]."""
    with torch.no_grad():
        return rec.score(rec.make_batch(HISTORIES))
