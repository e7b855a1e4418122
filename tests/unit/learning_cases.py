"""A model that pushes popular items, users who took them, and an SAE: what learning is tried on."""

import numpy as np
import torch

from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Histories, leave_one_out
from steerrec.learning import SteeringTraining

from .tiny import TinyRecommender

ITEMS, WIDTH = 60, 8
QUICK = SteeringTraining(steps=40, users=256, learning_rate=0.05)


def popular_model():
    """One direction of the scores is popularity."""
    generator = torch.Generator().manual_seed(0)
    taste = torch.randn(ITEMS, WIDTH, generator=generator)
    popular = torch.linspace(1.5, -1.5, ITEMS)
    embedding, matrix = taste.clone(), taste.clone()
    embedding[:, 0], matrix[:, 0] = 1.0, popular
    counts = (1000 / (1 + torch.arange(ITEMS))).int().tolist()
    return TinyRecommender(embedding, matrix, counts)


def tasteful_split():
    """Half of each history is of one taste, drawn with popular items first."""
    rng = np.random.default_rng(0)
    weights = 1 / (1 + np.arange(ITEMS))
    users = [rng.choice(ITEMS, 6, p=weights / weights.sum()).tolist() for _ in range(300)]
    return leave_one_out(Histories.from_lists(users), num_items=ITEMS)


def small_sae():
    return SparseAutoencoder(WIDTH, 32, k=4, generator=torch.Generator().manual_seed(1))
