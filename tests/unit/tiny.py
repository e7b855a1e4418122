"""A recommender small enough to be worked by hand: the user vector is the mean of the items'."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from steerrec.data import Catalogue, Histories
from steerrec.recommender import ItemHead
from steerrec.sites import Site


class Mean(nn.Module):
    """Mean [B, H] of the real positions of [B, L, H]; id 0 pads."""

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        return x.sum(dim=1) / (input_ids != 0).sum(dim=1, keepdim=True).clamp_min(1)


class MeanModel(nn.Module):
    """Scores every item with the mean embedding of a history."""

    def __init__(self, embedding: Tensor, item_matrix: Tensor) -> None:
        super().__init__()
        padded = torch.cat([torch.zeros(1, embedding.shape[1]), embedding])
        self.item_embedding = nn.Embedding.from_pretrained(padded, padding_idx=0)
        self.mean = Mean()
        self.register_buffer("item_matrix", item_matrix)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.mean(self.item_embedding(input_ids), input_ids) @ self.item_matrix.T


class TinyRecommender:
    """`MeanModel` as a Recommender; `forwards` counts its forward passes."""

    def __init__(
        self, embedding: Tensor, item_matrix: Tensor, counts: list[int], max_length: int = 6
    ) -> None:
        self.model = MeanModel(embedding, item_matrix).eval().requires_grad_(False)
        self.catalogue = catalogue(counts)
        self.max_length = max_length
        self.forwards = 0

    @cached_property
    def site(self) -> Site:
        return Site("mean", layout="BH")

    @property
    def item_head(self) -> ItemHead:
        return ItemHead(self.model.item_matrix)

    def make_batch(self, histories: Histories) -> Mapping[str, Tensor]:
        self.forwards += 1
        longest = min(int(histories.lengths.max(initial=1)), self.max_length)
        return {"input_ids": torch.from_numpy(histories.padded(longest, -1) + 1)}

    def score(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.model(batch["input_ids"])

    def describe(self) -> dict[str, Any]:
        return {"adapter": "tiny", "source": "tests/unit/tiny.py"}


def catalogue(counts: list[int]) -> Catalogue:
    """Items 0..N-1 with these training counts."""
    rows = list(range(len(counts)))
    frame = {"row": rows, "item_id": rows, "title": [f"item {row}" for row in rows]}
    return Catalogue(pl.DataFrame({**frame, "count": counts}))


def random_recommender(
    items: int = 20, width: int = 4, *, max_length: int = 6, seed: int = 0
) -> TinyRecommender:
    """Random item vectors, at the input and in the head; item i was seen items - i times."""
    generator = torch.Generator().manual_seed(seed)
    embedding, matrix = torch.randn(2, items, width, generator=generator)
    return TinyRecommender(embedding, matrix, list(range(items, 0, -1)), max_length)


def random_histories(
    users: int = 40, items: int = 20, *, shortest: int = 1, longest: int = 12
) -> Histories:
    """Histories of `shortest` to `longest` random items."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(shortest, longest, users, endpoint=True)
    return Histories.from_lists([rng.integers(0, items, length).tolist() for length in lengths])
