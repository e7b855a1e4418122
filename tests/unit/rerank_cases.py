"""Small worlds for the re-ranking baselines: scores given outright, groups and counts at will."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steerrec.data import HEAD, MID, TAIL, Histories
from steerrec.recommender import ItemHead
from steerrec.rerank import Candidates, gather_candidates

from .tiny import catalogue

GROUPS = (HEAD, MID, TAIL)


@dataclass(frozen=True)
class World:
    """What an oracle needs of a case, in plain Python, and the candidates made of it."""

    scores: list[list[float]]  # [U][N]; minus infinity where an item is left out
    labels: list[int]
    counts: list[int]
    histories: list[list[int]]
    candidates: Candidates

    @property
    def k(self) -> int:
        return self.candidates.k

    def ranking(self, user: int) -> list[int]:
        """All items that are not left out, best first, equal ones by row."""
        scores = self.scores[user]
        items = [item for item in range(len(scores)) if scores[item] > -float("inf")]
        return sorted(items, key=lambda item: (-scores[item], item))

    def shares(self, user: int) -> list[float]:
        """Share of each group in the history, or in all training interactions without one."""
        labels, counts = self.labels, self.counts
        history = self.histories[user]
        if history:
            return [sum(labels[i] == g for i in history) / len(history) for g in GROUPS]
        pairs = list(zip(labels, counts, strict=True))
        return [sum(c for label, c in pairs if label == g) / sum(counts) for g in GROUPS]

    def relevance(self, user: int) -> list[float]:
        """Scores from 0 for the lowest to 1 for the best."""
        finite = [s for s in self.scores[user] if s > -float("inf")]
        if not finite or max(finite) == min(finite):
            return [0.0] * len(self.labels)
        low, high = min(finite), max(finite)
        return [max((s - low) / (high - low), 0.0) for s in self.scores[user]]

    def padded(self, items: list[int]) -> list[int]:
        return items + [-1] * (self.k - len(items))


def world(
    scores: list[list[float]] | Tensor,
    *,
    labels: list[int] | None = None,
    counts: list[int] | None = None,
    histories: list[list[int]] | None = None,
    k: int = 3,
    pool: int | None = None,
    mask_seen: bool = False,
    seed: int = 0,
) -> World:
    """A world of users whose vectors are one-hot, so that the item matrix is the scores."""
    matrix = torch.as_tensor(scores, dtype=torch.float32)
    users, items = matrix.shape
    counts = list(range(items, 0, -1)) if counts is None else counts
    histories = [[] for _ in range(users)] if histories is None else histories
    candidates = gather_candidates(
        torch.eye(users),
        ItemHead(matrix.T.contiguous()),
        Histories.from_lists(histories),
        catalogue(counts),
        k=k,
        pool=items if pool is None else pool,
        mask_seen=mask_seen,
        seed=seed,
        labels=labels,
    )
    given = matrix.tolist()
    if mask_seen:
        for row, history in zip(given, histories, strict=True):
            for item in history:
                row[item] = -float("inf")
    return World(given, candidates.labels.tolist(), counts, histories, candidates)


def random_worlds(
    n: int, *, seed: int = 0, ties: bool = True, most_items: int = 25
) -> Iterator[World]:
    """n worlds of all kinds: equal scores, missing groups, empty histories, seen items left out."""
    rng = np.random.default_rng(seed)
    for case in range(n):
        users, items = int(rng.integers(1, 9)), int(rng.integers(2, most_items))
        scores = rng.normal(scale=float(rng.choice([0.1, 1, 8])), size=(users, items))
        if ties and case % 3 == 0:
            scores = np.round(scores)
        groups = rng.choice(3, size=int(rng.integers(1, 4)), replace=False)
        k = int(rng.integers(1, min(items, 7) + 1))
        yield world(
            torch.from_numpy(scores).float(),
            labels=rng.choice(groups, items).tolist(),
            counts=(rng.integers(0, 40, items) + (np.arange(items) == 0)).tolist(),
            histories=[
                rng.integers(0, items, int(rng.integers(0, items))).tolist() for _ in range(users)
            ],
            k=k,
            pool=int(rng.integers(k, items + 1)),
            mask_seen=bool(case % 2),
            seed=case,
        )
